//! Flags of a container's process.

use std::path::PathBuf;

use anyhow::{Context, bail};
use husk_proto::cri;

use super::Plan;
use crate::labels;

/// The process: program, variables, user, streams, end.
#[derive(Clone, Debug, clap::Args)]
#[command(next_help_heading = "Process")]
pub struct Process {
    /// Keep the standard input open.
    #[arg(short, long)]
    pub(super) interactive: bool,
    /// Give the process a terminal.
    #[arg(short, long)]
    pub(super) tty: bool,
    /// Set a variable; without a value, it has the one of husk's own environment.
    #[arg(short, long, value_name = "KEY[=VALUE]")]
    env: Vec<String>,
    /// Read variables from a file with a `KEY=VALUE` on each line.
    #[arg(long, value_name = "FILE")]
    env_file: Vec<PathBuf>,
    /// The working directory.
    #[arg(short, long, value_name = "DIRECTORY")]
    workdir: Option<String>,
    /// The user, and the number of the group.
    #[arg(short, long, value_name = "USER[:GID]")]
    user: Option<String>,
    /// Add the process to a group, by its number.
    #[arg(long, value_name = "GID")]
    group_add: Vec<i64>,
    /// The program, in place of the image's; empty for none.
    #[arg(long, value_name = "PROGRAM")]
    entrypoint: Option<String>,
    /// The signal that asks the process to end.
    #[arg(long, value_name = "SIGNAL")]
    stop_signal: Option<String>,
    /// Seconds that `husk stop` leaves between that signal and SIGKILL.
    #[arg(long, value_name = "SECONDS")]
    pub(super) stop_timeout: Option<u32>,
}

impl Process {
    pub(super) fn apply(&self, words: &[String], plan: &mut Plan) -> anyhow::Result<()> {
        let config = &mut plan.container;
        (config.command, config.args) = match self.entrypoint.as_deref() {
            None => (Vec::new(), words.to_vec()),
            Some("") if words.is_empty() => {
                bail!("--entrypoint \"\": no program is left; name one after the image")
            }
            Some("") => (words.to_vec(), Vec::new()),
            Some(program) => (vec![program.to_owned()], words.to_vec()),
        };
        (config.stdin, config.tty) = (self.interactive, self.tty);
        config.working_dir = self.workdir.clone().unwrap_or_default();
        config.envs = self.variables()?;
        if let Some(signal) = &self.stop_signal {
            config.stop_signal = signal_of(signal)?.into();
        }
        if let Some(seconds) = self.stop_timeout {
            config.annotations.insert(labels::STOP_TIMEOUT.to_owned(), seconds.to_string());
        }
        let security = &mut plan.container_security;
        security.supplemental_groups.clone_from(&self.group_add);
        if let Some(user) = &self.user {
            set_user(user, security)?;
        }
        Ok(())
    }

    /// The variables: those of files first, so that flags win.
    fn variables(&self) -> anyhow::Result<Vec<cri::KeyValue>> {
        let mut variables = Vec::new();
        for file in &self.env_file {
            let text = std::fs::read_to_string(file)
                .with_context(|| format!("--env-file: read {}", file.display()))?;
            let lines = text.lines().map(str::trim_start);
            for line in lines.filter(|line| !line.is_empty() && !line.starts_with('#')) {
                variables.extend(variable(line));
            }
        }
        variables.extend(self.env.iter().filter_map(|given| variable(given)));
        match variables.iter().any(|variable| variable.key.is_empty()) {
            true => bail!("-e: a variable has no name: write KEY=VALUE"),
            false => Ok(variables),
        }
    }
}

/// A variable as it is written; nothing for a name that husk's environment does not have.
fn variable(given: &str) -> Option<cri::KeyValue> {
    let (key, value) = match given.split_once('=') {
        Some((key, value)) => (key, value.to_owned()),
        None => (given, std::env::var(given).ok()?),
    };
    Some(cri::KeyValue { key: key.to_owned(), value: value.into_bytes() })
}

/// Reads `USER[:GID]`.
fn set_user(given: &str, security: &mut cri::LinuxContainerSecurityContext) -> anyhow::Result<()> {
    let (user, group) = given.split_once(':').map_or((given, None), |(user, group)| (user, Some(group)));
    match user.parse() {
        Ok(value) => security.run_as_user = Some(cri::Int64Value { value }),
        Err(_) if user.is_empty() => bail!("-u {given}: there is no user before the group"),
        Err(_) => user.clone_into(&mut security.run_as_username),
    }
    if let Some(group) = group {
        let Ok(value) = group.parse() else {
            bail!("-u {given}: CRI takes a group by its number alone, and `{group}` is none");
        };
        security.run_as_group = Some(cri::Int64Value { value });
    }
    Ok(())
}

/// A signal as CRI names it, by its name or number.
fn signal_of(given: &str) -> anyhow::Result<cri::Signal> {
    let name = crate::signal::name(given)?;
    let name = name.strip_prefix("SIG").unwrap_or(&name);
    cri::Signal::from_str_name(&format!("SIGNAL_SIG{name}"))
        .with_context(|| format!("--stop-signal {given}: CRI has no such signal"))
}
