//! `husk completion` and `husk manual`: what shells and `man` know of this program,
//! made from its own arguments.

use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};

use anyhow::Context;
use clap::Command;
use clap_complete::Shell;

/// Prints the completions of a shell.
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  source <(husk completion bash)")]
pub struct Arguments {
    /// The shell.
    #[arg(value_parser = ["bash", "zsh", "fish"])]
    shell: String,
}

/// Writes a manual page for each command into a folder.
#[derive(Debug, clap::Args)]
pub struct Manual {
    /// The folder, which exists.
    folder: PathBuf,
}

/// Prints the completions of `husk`.
pub fn run(arguments: &Arguments, husk: Command) -> anyhow::Result<()> {
    let shell: Shell = arguments.shell.parse().map_err(anyhow::Error::msg)?;
    match std::io::stdout().write_all(&completions(shell, husk)) {
        // A reader that has seen enough.
        Err(error) if error.kind() != ErrorKind::BrokenPipe => Err(error).context("print the completions"),
        _ => Ok(()),
    }
}

fn completions(shell: Shell, mut husk: Command) -> Vec<u8> {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut husk, "husk", &mut script);
    script
}

/// Writes the pages `husk.1`, `husk-COMMAND.1` and so on.
pub fn manual(arguments: &Manual, husk: Command) -> anyhow::Result<()> {
    pages(husk, &arguments.folder)
        .with_context(|| format!("write manual pages to {}", arguments.folder.display()))
}

fn pages(husk: Command, folder: &Path) -> std::io::Result<()> {
    clap_mangen::generate_to(husk, folder)
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn each_shell_completes_every_command() {
        for shell in [Shell::Bash, Shell::Zsh, Shell::Fish] {
            let script = completions(shell, crate::Arguments::command());
            let script = String::from_utf8(script).unwrap();
            for command in crate::Arguments::command().get_subcommands().filter(|one| !one.is_hide_set()) {
                assert!(script.contains(command.get_name()), "{shell}: {}", command.get_name());
            }
        }
    }

    #[test]
    fn every_command_that_is_shown_has_a_page() {
        let folder = tempfile::tempdir().unwrap();
        pages(crate::Arguments::command(), folder.path()).unwrap();
        for command in crate::Arguments::command().get_subcommands() {
            let page = folder.path().join(format!("husk-{}.1", command.get_name()));
            assert_eq!(page.exists(), !command.is_hide_set(), "{}", page.display());
        }
        let page = std::fs::read_to_string(folder.path().join("husk.1")).unwrap();
        assert!(page.contains(".SH SYNOPSIS"), "{page}");
    }
}
