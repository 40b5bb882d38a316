//! Runs runc, the OCI runtime, and passes its error messages on.

use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio as StdStdio};
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde::Deserialize;
use tokio::select;
use tokio::time::{sleep, timeout};

use crate::guest::mode::Mode;
use crate::process::reaper::{self, Exited, Launch, Reaper};
use crate::process::stdio::Stdio;

const RUNC: &str = "runc";
const ROOT: &str = "/run/husk/runc";
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// How long a call may take. It takes milliseconds on hardware.
const DEADLINE: Duration = Duration::from_secs(120);

/// How often to check whether a program has started: at first, and at most.
const FIRST_LOOK: Duration = Duration::from_millis(1);
const LONGEST_LOOK: Duration = Duration::from_millis(50);

/// Bytes at the end of its log that are searched for the error.
const LOG_TAIL: u64 = 64 * 1024;

/// A call of runc failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// runc could not be run, or its files could not be read.
    #[error("{doing}: {cause}")]
    Io { doing: &'static str, cause: io::Error },
    /// runc ended with an error message.
    #[error("{0}")]
    Refused(String),
    /// runc did not end in time and was killed.
    #[error("runc did not end within {} s", DEADLINE.as_secs())]
    Hangs,
    /// The container was started, but its program did not start in time.
    #[error(
        "the program did not start within {} s; a startContainer hook that runs longer holds it up",
        DEADLINE.as_secs()
    )]
    NotStarted,
}

fn io_error(doing: &'static str) -> impl FnOnce(io::Error) -> Error {
    move |cause| Error::Io { doing, cause }
}

/// The files of one call: the log that runc writes, and the pid of the process
/// that it started. They are removed afterwards.
struct Files {
    log: PathBuf,
    pid: PathBuf,
}

impl Files {
    fn new(directory: &Path, call: &str) -> Self {
        Self { log: directory.join(format!("{call}.log")), pid: directory.join(format!("{call}.pid")) }
    }

    fn read_pid(&self) -> Result<Pid, Error> {
        let text = fs::read_to_string(&self.pid).map_err(io_error("read runc's pid file"))?;
        let pid = text.trim().parse().map_err(io::Error::other);
        Ok(Pid::from_raw(pid.map_err(io_error("read runc's pid file"))?))
    }
}

impl Drop for Files {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.log);
        let _ = fs::remove_file(&self.pid);
    }
}

/// How to run runc here.
pub struct Runc {
    reaper: Reaper,
    program: PathBuf,
    /// The directory of runc's state of containers.
    root: PathBuf,
}

impl Runc {
    /// The machine's own runc, or the one that a supervisor on the host was given.
    pub fn new(reaper: Reaper, mode: &Mode) -> Self {
        let program = mode.host().map_or(Path::new(RUNC), |host| &host.runc).to_owned();
        Self { reaper, program, root: mode.at(ROOT) }
    }

    /// Runs `runc create`, which makes the container of `bundle` up to the
    /// point where its program would start.
    pub async fn create(&self, id: &str, bundle: &Path, stdio: &mut Stdio) -> Result<(Pid, Exited), Error> {
        let files = Files::new(bundle, "create");
        let mut runc = self.command(&files, "create");
        runc.arg("--bundle").arg(bundle).arg("--pid-file").arg(&files.pid);
        stdio.pass_to(&mut runc);
        runc.arg(id);
        let launch = self.reaper.launch();
        run(&launch, runc, &files).await?;
        let pid = files.read_pid()?;
        Ok((pid, launch.claim(pid)))
    }

    /// Runs `runc start`, which lets the container's program start; its process is
    /// `init`, which runs runc until then. Returns when the program has started, or
    /// when the process has ended.
    ///
    /// `runc start` itself returns earlier: before the `startContainer` hooks, and
    /// before the program. A signal of that moment may be lost, because it goes to a
    /// thread of runc's that ends with execve(2).
    pub async fn start(&self, id: &str, bundle: &Path, init: (Pid, &Exited)) -> Result<(), Error> {
        let files = Files::new(bundle, "start");
        let mut runc = self.command(&files, "start");
        runc.arg(id);
        let before = Program::of(init.0);
        run(&self.reaper.launch(), runc, &files).await?;
        let replaced = async {
            let mut pause = FIRST_LOOK;
            while Program::of(init.0) == before {
                sleep(pause).await;
                pause = (pause * 2).min(LONGEST_LOOK);
            }
        };
        select! {
            replaced = timeout(DEADLINE, replaced) => replaced.map_err(|_| Error::NotStarted),
            _ = reaper::ended(init.1.clone()) => Ok(()),
        }
    }

    /// Runs `runc exec`, which starts the process that the file `process`
    /// describes (the `process` object of the OCI configuration) in a running
    /// container.
    pub async fn exec(
        &self,
        id: &str,
        bundle: &Path,
        call: &str,
        process: &Path,
        stdio: &mut Stdio,
    ) -> Result<(Pid, Exited), Error> {
        let files = Files::new(bundle, call);
        let mut runc = self.command(&files, "exec");
        runc.arg("--detach").arg("--process").arg(process).arg("--pid-file").arg(&files.pid);
        stdio.pass_to(&mut runc);
        runc.arg(id);
        let launch = self.reaper.launch();
        run(&launch, runc, &files).await?;
        let pid = files.read_pid()?;
        Ok((pid, launch.claim(pid)))
    }

    /// Runs `runc update`, which changes the container's limits to those of the
    /// file `resources` (`linux.resources` of the OCI configuration).
    pub async fn update(&self, id: &str, bundle: &Path, resources: &Path) -> Result<(), Error> {
        let files = Files::new(bundle, "update");
        let mut runc = self.command(&files, "update");
        runc.arg("--resources").arg(resources).arg(id);
        run(&self.reaper.launch(), runc, &files).await
    }

    /// Runs `runc delete --force`, which kills the remaining processes, and
    /// removes the container's cgroup and runc's state. A container that runc
    /// does not know counts as deleted.
    pub async fn delete(&self, id: &str, bundle: &Path) -> Result<(), Error> {
        let files = Files::new(bundle, "delete");
        let mut runc = self.command(&files, "delete");
        runc.arg("--force").arg(id);
        run(&self.reaper.launch(), runc, &files).await
    }

    fn command(&self, files: &Files, operation: &str) -> Command {
        let mut runc = Command::new(&self.program);
        runc.env_clear()
            .env("PATH", PATH)
            .arg("--root")
            .arg(&self.root)
            .arg("--log")
            .arg(&files.log)
            .args(["--log-format", "json", operation])
            .stdin(StdStdio::null())
            .stdout(StdStdio::null())
            .stderr(StdStdio::null());
        runc
    }
}

/// The properties of a process that execve(2) changes.
#[derive(Debug, PartialEq, Eq)]
struct Program {
    file: Option<(u64, u64)>,
    arguments: Vec<u8>,
}

impl Program {
    fn of(pid: Pid) -> Self {
        let file = fs::metadata(format!("/proc/{pid}/exe")).ok();
        Self {
            file: file.map(|file| (file.dev(), file.ino())),
            arguments: fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default(),
        }
    }
}

async fn run(launch: &Launch, mut runc: Command, files: &Files) -> Result<(), Error> {
    let (pid, exited) = launch.spawn(&mut runc).map_err(io_error("run runc"))?;
    // runc holds the process's side of the pipes now. A copy here would keep
    // the pipes open after the process has ended.
    drop(runc);
    let ended = reaper::ended(exited);
    let exit = match timeout(DEADLINE, ended).await {
        Ok(exit) => exit.map_err(io_error("wait for runc"))?,
        Err(_) => {
            let _ = kill(pid, Signal::SIGKILL);
            return Err(Error::Hangs);
        }
    };
    if exit.code == 0 {
        return Ok(());
    }
    let log = read_tail(&files.log).unwrap_or_default();
    Err(Error::Refused(last_error(&log).unwrap_or_else(|| match exit.signal {
        Some(signal) => format!("runc was killed by signal {signal}"),
        None => format!("runc ended with status {}", exit.code),
    })))
}

fn read_tail(path: &Path) -> io::Result<String> {
    let mut file = File::open(path)?;
    let start = file.metadata()?.len().saturating_sub(LOG_TAIL);
    file.seek(SeekFrom::Start(start))?;
    let mut bytes = Vec::new();
    file.take(LOG_TAIL).read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

#[derive(Deserialize)]
struct LogLine {
    level: String,
    msg: String,
}

/// The message of the last error in runc's JSON log, without the prefix that
/// repeats the operation.
fn last_error(log: &str) -> Option<String> {
    let line = log
        .lines()
        .rev()
        .filter_map(|line| serde_json::from_str::<LogLine>(line).ok())
        .find(|line| matches!(line.level.as_str(), "error" | "fatal" | "panic"))?;
    let message = line.msg.trim();
    let message = match message.split_once(" failed: ") {
        Some((doing, cause)) if doing.starts_with("runc ") => cause,
        _ => message,
    };
    Some(message.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_error_is_what_runc_says() {
        let log = r#"{"level":"warning","msg":"unable to get oom kill count","time":"t"}
{"level":"error","msg":"first","time":"t"}
{"level":"error","msg":"runc create failed: unable to start container process: exec: \"nope\": executable file not found in $PATH","time":"t"}
{"level":"info","msg":"after"}
"#;
        assert_eq!(
            last_error(log).unwrap(),
            "unable to start container process: exec: \"nope\": executable file not found in $PATH"
        );
    }

    #[test]
    fn a_log_without_errors_or_without_json_has_none() {
        assert_eq!(last_error(""), None);
        assert_eq!(last_error("{\"level\":\"info\",\"msg\":\"x\"}\nSIGSEGV: segmentation\n{\"lev"), None);
    }

    #[test]
    fn only_the_end_of_a_long_log_is_read() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("log");
        fs::write(&path, "x".repeat(LOG_TAIL as usize + 100) + "end").unwrap();
        let tail = read_tail(&path).unwrap();
        assert_eq!(tail.len() as u64, LOG_TAIL);
        assert!(tail.ends_with("xend"));
    }
}
