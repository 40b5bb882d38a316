//! One call of one CNI plugin: the program, its environment, its deadline.
//!
//! A plugin is a program that somebody else wrote: its output is bounded, its
//! time is bounded, and when it is killed the programs that it started
//! (`iptables`, an IPAM plugin) go with it, because the whole call is one
//! process group. See the CNI specification, section 2.

use std::ffi::OsString;
use std::io;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use husk_spawn::helper;
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use serde::Deserialize;
use serde_json::Value;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt};
use tokio::process::{Child, Command};

/// Most bytes of a plugin's answer.
const MAX_STDOUT: u64 = 1024 * 1024;

/// Bytes of a plugin's log that are read, and of these the last that errors show.
const MAX_STDERR: u64 = 256 * 1024;
const SHOWN_STDERR: usize = 500;

/// A call went wrong.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// None of the plugin directories has the program.
    #[error("CNI plugin {plugin} is not in {directories}: install it (Debian: containernetworking-plugins)")]
    NotFound {
        /// Type of the plugin.
        plugin: String,
        /// The directories that were searched.
        directories: String,
    },
    /// The program did not start.
    #[error("CNI plugin {plugin} cannot be executed")]
    Start {
        /// Type of the plugin.
        plugin: String,
        /// The kernel's reason.
        source: io::Error,
    },
    /// The program was killed at its deadline.
    #[error("CNI plugin {plugin} did not finish {command} within {seconds} s and was killed")]
    TimedOut {
        /// Type of the plugin.
        plugin: String,
        /// The command, "ADD".
        command: Verb,
        /// The deadline.
        seconds: u64,
    },
    /// The plugin says that it failed.
    #[error("CNI plugin {plugin} failed to {command}: {reason}")]
    Failed {
        /// Type of the plugin.
        plugin: String,
        /// The command, "ADD".
        command: Verb,
        /// The plugin's own text.
        reason: String,
    },
    /// The plugin succeeded with an answer that is none.
    #[error("CNI plugin {plugin} answered {command} with something that is no result: {reason}")]
    Answer {
        /// Type of the plugin.
        plugin: String,
        /// The command, "ADD".
        command: Verb,
        /// The reason.
        reason: String,
    },
}

/// A command of CNI.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verb {
    /// Connect a pod.
    Add,
    /// Disconnect a pod.
    Del,
    /// Compare the pod's connection with the result of ADD.
    Check,
    /// Report whether pods can be connected.
    Status,
    /// Release what no pod has any more.
    Gc,
}

impl std::fmt::Display for Verb {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Add => "ADD",
            Self::Del => "DEL",
            Self::Check => "CHECK",
            Self::Status => "STATUS",
            Self::Gc => "GC",
        })
    }
}

/// The pod that a call is about, as the environment names it.
#[derive(Clone, Copy, Debug)]
pub struct Target<'a> {
    /// The sandbox's id, `CNI_CONTAINERID`.
    pub sandbox_id: &'a str,
    /// The file of the netns, `CNI_NETNS`; `None` when it no longer exists.
    pub netns: Option<&'a Path>,
    /// The interface's name, `CNI_IFNAME`.
    pub interface: &'a str,
    /// The pod's names for plugins, `CNI_ARGS`.
    pub args: &'a str,
}

impl Target<'_> {
    /// The target of calls that are about no pod.
    pub const NONE: Self = Self { sandbox_id: "", netns: None, interface: "", args: "" };
}

/// The plugins of the node, and their deadline.
#[derive(Clone, Debug)]
pub struct Plugins {
    /// Directories with plugins, the first that has one wins.
    pub directories: Vec<PathBuf>,
    /// The deadline of one call of one plugin.
    pub timeout: Duration,
}

impl Plugins {
    /// Path of a plugin's program.
    ///
    /// # Errors
    /// [`Error::NotFound`].
    pub async fn find(&self, plugin: &str) -> Result<PathBuf, Error> {
        for directory in &self.directories {
            let path = directory.join(plugin);
            if tokio::fs::metadata(&path).await.is_ok_and(|found| found.is_file()) {
                return Ok(path);
            }
        }
        Err(Error::NotFound {
            plugin: plugin.to_owned(),
            directories: self
                .directories
                .iter()
                .map(|d| d.display().to_string())
                .collect::<Vec<_>>()
                .join(", "),
        })
    }

    /// Calls a plugin with a configuration and returns what it printed, which
    /// is `Value::Null` when it was nothing.
    ///
    /// # Errors
    /// Any of [`Error`]. The plugin and the programs that it started are dead then.
    pub async fn call(
        &self,
        plugin: &str,
        verb: Verb,
        target: Target<'_>,
        config: &Value,
    ) -> Result<Value, Error> {
        let program = self.find(plugin).await?;
        let path = std::env::join_paths(&self.directories).unwrap_or_else(|_| OsString::new());
        let mut command = Command::from(helper(program));
        if !matches!(verb, Verb::Status | Verb::Gc) {
            command
                .env("CNI_CONTAINERID", target.sandbox_id)
                .env("CNI_NETNS", target.netns.unwrap_or(Path::new("")))
                .env("CNI_IFNAME", target.interface)
                .env("CNI_ARGS", target.args);
        }
        let child = command
            .env("CNI_COMMAND", verb.to_string())
            .env("CNI_PATH", path)
            .current_dir("/")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .process_group(0)
            .spawn()
            .map_err(|source| Error::Start { plugin: plugin.to_owned(), source })?;
        let mut group = Group { leader: child.id().and_then(|id| i32::try_from(id).ok()), child };
        let output = match tokio::time::timeout(self.timeout, group.output(config)).await {
            Ok(output) => output.map_err(|source| Error::Start { plugin: plugin.to_owned(), source })?,
            Err(_) => {
                group.kill();
                // Killed, so this ends at once; it leaves no zombie.
                let _ = group.child.wait().await;
                let seconds = self.timeout.as_secs();
                return Err(Error::TimedOut { plugin: plugin.to_owned(), command: verb, seconds });
            }
        };
        group.leader = None;
        let answer = || Error::Answer {
            plugin: plugin.to_owned(),
            command: verb,
            reason: format!("{:?}", excerpt(&output.stdout)),
        };
        if !output.status.success() {
            let reason = output.reason();
            return Err(Error::Failed { plugin: plugin.to_owned(), command: verb, reason });
        }
        if output.stdout.len() as u64 > MAX_STDOUT {
            let reason = format!("more than {MAX_STDOUT} bytes");
            return Err(Error::Answer { plugin: plugin.to_owned(), command: verb, reason });
        }
        if output.stdout.trim_ascii().is_empty() {
            return Ok(Value::Null);
        }
        serde_json::from_slice(&output.stdout).map_err(|_| answer())
    }
}

/// A running plugin. Dropped before its end (the call was cancelled), it
/// takes all of its process group with it.
struct Group {
    leader: Option<i32>,
    child: Child,
}

struct Output {
    status: ExitStatus,
    stdout: Vec<u8>,
    stderr: Vec<u8>,
}

impl Group {
    /// Feeds the plugin and waits until it has ended and closed its output.
    async fn output(&mut self, config: &Value) -> io::Result<Output> {
        let input = config.to_string();
        let mut stdin = self.child.stdin.take();
        let stdout = self.child.stdout.take();
        let stderr = self.child.stderr.take();
        let feed = async {
            if let Some(stdin) = &mut stdin {
                // A plugin that does not read its input says so by failing.
                let _ = stdin.write_all(input.as_bytes()).await;
            }
            drop(stdin.take());
        };
        let ((), stdout, stderr) =
            tokio::join!(feed, read_bounded(stdout, MAX_STDOUT + 1), read_bounded(stderr, MAX_STDERR));
        Ok(Output { stdout: stdout?, stderr: stderr?, status: self.child.wait().await? })
    }

    fn kill(&mut self) {
        if let Some(leader) = self.leader.take() {
            let _ = killpg(Pid::from_raw(leader), Signal::SIGKILL);
        }
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        self.kill();
    }
}

/// Reads to the end; what exceeds `limit` is read and dropped, so that the
/// plugin does not block on a full pipe.
async fn read_bounded(stream: Option<impl AsyncRead + Unpin>, limit: u64) -> io::Result<Vec<u8>> {
    let mut kept = Vec::new();
    if let Some(mut stream) = stream {
        (&mut stream).take(limit).read_to_end(&mut kept).await?;
        tokio::io::copy(&mut stream, &mut tokio::io::sink()).await?;
    }
    Ok(kept)
}

impl Output {
    /// The reason of a failure: the plugin's error object (section 5, "Error"), or else
    /// its log, or else how it ended.
    fn reason(&self) -> String {
        #[derive(Deserialize)]
        struct Reported {
            code: Option<u64>,
            msg: String,
            details: Option<String>,
        }
        if let Ok(error) = serde_json::from_slice::<Reported>(&self.stdout) {
            let mut reason = error.msg;
            if let Some(details) = error.details.filter(|details| !details.is_empty()) {
                reason = format!("{reason}: {details}");
            }
            if let Some(code) = error.code {
                reason = format!("{reason} (code {code})");
            }
            return reason;
        }
        match [&self.stderr, &self.stdout].into_iter().map(|text| excerpt(text)).find(|text| !text.is_empty())
        {
            Some(text) => format!("{}: {text}", self.status),
            None => self.status.to_string(),
        }
    }
}

/// The end of a text, as far as an error message has room for it.
fn excerpt(text: &[u8]) -> String {
    let text = text.trim_ascii();
    let start = text.len().saturating_sub(SHOWN_STDERR);
    String::from_utf8_lossy(text.get(start..).unwrap_or_default()).into_owned()
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use serde_json::json;

    use super::*;

    /// Calls a shell script as if it were a plugin.
    async fn call(script: &str, timeout: Duration) -> Result<Value, Error> {
        let dir = tempfile::tempdir().unwrap();
        crate::tests::script(&dir.path().join("fake"), script);
        let plugins = Plugins { directories: vec![dir.path().to_owned()], timeout };
        let target = Target {
            sandbox_id: "abc",
            netns: Some(Path::new("/run/netns/x")),
            interface: "eth0",
            args: "A=B",
        };
        plugins.call("fake", Verb::Add, target, &json!({"name": "n", "type": "fake"})).await
    }

    const LONG: Duration = Duration::from_secs(30);

    #[tokio::test]
    async fn the_plugin_sees_its_environment_and_configuration() {
        let answer = call(
            r#"printf '{"env":"%s","in":%s}' "$CNI_COMMAND $CNI_CONTAINERID $CNI_NETNS $CNI_IFNAME $CNI_ARGS" "$(cat)""#,
            LONG,
        )
        .await
        .unwrap();
        assert_eq!(answer["env"], "ADD abc /run/netns/x eth0 A=B");
        assert_eq!(answer["in"], json!({"name": "n", "type": "fake"}));
    }

    #[tokio::test]
    async fn a_plugin_is_not_spared_as_huskd_is_when_memory_runs_out() {
        const SCORE: &str = "/proc/self/oom_score_adj";
        let before = std::fs::read_to_string(SCORE).unwrap();
        // Raising it needs no privilege.
        std::fs::write(SCORE, "100").unwrap();
        let answer = call("printf '%s' \"$(cat /proc/self/oom_score_adj)\"", LONG).await;
        std::fs::write(SCORE, before).unwrap();
        assert_eq!(answer.unwrap(), 0);
    }

    #[tokio::test]
    async fn an_error_object_becomes_one_sentence() {
        let error =
            call(r#"echo '{"code":11,"msg":"no addresses","details":"range 0"}'; exit 1"#, LONG).await;
        let text = error.unwrap_err().to_string();
        assert_eq!(text, "CNI plugin fake failed to ADD: no addresses: range 0 (code 11)");
    }

    #[tokio::test]
    async fn a_plugin_that_dies_without_a_word_is_told_by_its_log_or_its_end() {
        let text = call("echo no such bridge >&2; exit 3", LONG).await.unwrap_err().to_string();
        assert!(text.contains("no such bridge") && text.contains('3'), "{text}");
        let text = call("kill -9 $$", LONG).await.unwrap_err().to_string();
        assert!(text.contains("signal: 9"), "{text}");
    }

    #[tokio::test]
    async fn garbage_and_floods_are_refused() {
        let text = call("echo hello", LONG).await.unwrap_err().to_string();
        assert!(text.contains("no result") && text.contains("hello"), "{text}");
        let text = call("head -c 3000000 /dev/zero", LONG).await.unwrap_err().to_string();
        assert!(text.contains("more than"), "{text}");
        assert_eq!(call("true", LONG).await.unwrap(), Value::Null);
    }

    #[tokio::test]
    async fn a_plugin_that_hangs_is_killed_with_what_it_started() {
        let dir = tempfile::tempdir().unwrap();
        let pid = dir.path().join("pid");
        let script = format!("sleep 600 & echo $! > {}; wait", pid.display());
        let error = call(&script, Duration::from_secs(1)).await.unwrap_err();
        assert!(matches!(error, Error::TimedOut { seconds: 1, .. }), "{error}");
        let pid: i32 = std::fs::read_to_string(&pid).unwrap().trim().parse().unwrap();
        let deadline = Instant::now() + Duration::from_secs(10);
        loop {
            // An orphan that was killed stays a zombie until its new parent reaps it.
            let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
            if stat.is_empty() || stat.contains(") Z ") {
                break;
            }
            assert!(Instant::now() < deadline, "{stat}");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    #[tokio::test]
    async fn a_missing_plugin_is_named_with_the_directories() {
        let plugins = Plugins { directories: vec!["/nonexistent/bin".into()], timeout: LONG };
        let text = plugins.find("bridge").await.unwrap_err().to_string();
        assert!(text.contains("bridge") && text.contains("/nonexistent/bin"), "{text}");
    }
}
