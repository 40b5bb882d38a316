//! Virtual machines: the only code that talks to `husk-vmm`.
//!
//! A VM is started by [`launch`], as a clone if there is a [`template`] of it, and
//! spoken to through its [`Control`] socket. Both outlive huskd: [`reattach`] finds
//! them again, and [`destroy`] ends whatever is left.

#![cfg_attr(test, allow(clippy::disallowed_methods))]

use std::path::{Path, PathBuf};
use std::time::Duration;

use husk_agent_client::Agent;
use husk_base::blocking;
use husk_base::cgroup;
use husk_base::crash;
use husk_vmm_api::{Exit, Info, Request, Response, words};

mod control;
pub mod file_server;
#[expect(clippy::disallowed_methods, reason = "its functions block, and run where they may")]
mod force;
pub mod launch;
mod process;
mod sandbox_disks;
pub mod template;
#[expect(clippy::disallowed_methods, reason = "its functions block, and run where they may")]
mod users;
#[expect(clippy::disallowed_methods, reason = "its functions block, and run where they may")]
mod vmm_process;

pub use control::Control;
pub use process::Process;
pub use sandbox_disks::{DiskBounds, Error as DiskError, SandboxDisks, disk_bounds};
pub use vmm_process::listen_seqpacket;

/// The name of the VMM's program, as the kernel has it.
const PROGRAM: &str = "husk-vmm";

/// The longest time that the VMM may take for one request.
const CONTROL_TIMEOUT: Duration = Duration::from_secs(20);

/// The VMM of a VM that runs.
#[derive(Clone, Debug)]
pub struct Vmm {
    /// The socket on which it takes requests.
    pub control: Control,
    process: Process,
    run_dir: PathBuf,
}

impl Vmm {
    /// The VMM that is the process `process`; its files are in `run_dir`.
    #[must_use]
    pub fn new(control: Control, process: Process, run_dir: &Path) -> Self {
        Self { control, process, run_dir: run_dir.into() }
    }

    /// Returns when the VMM's process has ended: with the record of the VM's end,
    /// or without when the VMM was itself killed.
    pub async fn ended(&self) -> Option<Exit> {
        self.process.ended().await;
        exit_record(&self.run_dir).await
    }

    /// The last line of its log. The log itself goes with the machine.
    #[expect(clippy::disallowed_methods, reason = "it runs where it may block")]
    async fn last_output(&self) -> String {
        let path = self.run_dir.join(launch::LOG);
        let log = blocking(move || std::fs::File::open(path).and_then(words::read).unwrap_or_default()).await;
        log.lines().rfind(|line| !line.trim().is_empty()).unwrap_or_default().trim().to_owned()
    }
}

/// Something went wrong with a VM.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file that the VM is made of.
    #[error("{stage}: {path}: {cause}")]
    File {
        /// The step that failed.
        stage: &'static str,
        /// The file.
        path: PathBuf,
        /// The kernel's reason.
        #[source]
        cause: std::io::Error,
    },
    /// The VMM refused or failed at a request.
    #[error("VMM: {stage}: {message}")]
    Vmm {
        /// The step at which the VMM failed.
        stage: String,
        /// The VMM's reason.
        message: String,
    },
    /// The VMM cannot be reached.
    #[error("VMM: {stage}: {cause}")]
    Control {
        /// The request.
        stage: &'static str,
        /// The reason for which there was no answer.
        cause: String,
    },
    /// The VM ended before its agent was ready.
    #[error("guest boot: the machine ended ({reason:?}{}{detail}){}", if detail.is_empty() { "" } else { ": " }, console_tail(console))]
    Ended {
        /// The way in which it ended.
        reason: husk_vmm_api::ExitReason,
        /// The VMM's explanation; may be empty.
        detail: String,
        /// The end of the guest's console.
        console: String,
    },
    /// The VMM ended before the agent spoke, and left no record of the machine's end.
    #[error("guest boot: the VMM was killed{}", if log.is_empty() { "" } else { ": " }.to_owned() + log)]
    Killed {
        /// The last output of the VMM.
        log: String,
    },
    /// The agent was not ready in time.
    #[error("guest boot: timed out waiting for the agent after {seconds} s{}", console_tail(console))]
    Silent {
        /// The time limit, seconds.
        seconds: u64,
        /// The end of the guest's console.
        console: String,
    },
    /// The agent was ready, but does not answer.
    #[error("connect to agent: {0}")]
    Agent(String),
    /// All image disks are in use.
    #[error(
        "attach image: this pod already uses {0} different images; raise `image_slots` of its handler in the configuration"
    )]
    NoSlot(usize),
}

fn console_tail(console: &str) -> String {
    let lines: Vec<&str> = console.lines().filter(|line| !line.trim().is_empty()).collect();
    let last = lines.get(lines.len().saturating_sub(12)..).unwrap_or_default();
    if last.is_empty() {
        "; the guest's console is empty".into()
    } else {
        format!("; last lines of the guest's console:\n  {}", last.join("\n  "))
    }
}

/// The control socket in a VM's run directory.
fn control_path(run_dir: &Path) -> PathBuf {
    run_dir.join("vmm.sock")
}

/// The vsock device's socket in a VM's run directory.
fn vsock_path(run_dir: &Path) -> PathBuf {
    run_dir.join("vsock.sock")
}

/// The VMM's exit record in a VM's run directory.
fn exit_path(run_dir: &Path) -> PathBuf {
    run_dir.join("exit.json")
}

/// Takes over a VM that runs already, after a restart of huskd.
///
/// # Errors
/// The VMM or the agent does not answer. Whether the VM lives is another question, see
/// [`lives`].
pub async fn reattach(run_dir: &Path, agent_timeout: Duration) -> Result<(Vmm, Agent), Error> {
    let control = Control::new(control_path(run_dir));
    let process = Process::of(&control).await?;
    let agent = Agent::connect(vsock_path(run_dir), agent_timeout).await.map_err(Error::Agent)?;
    let agent = inspected_when_silent(agent, &control);
    Ok((Vmm::new(control, process, run_dir), agent))
}

/// Has huskd log the state of the VM when its agent does not answer.
fn inspected_when_silent(agent: Agent, control: &Control) -> Agent {
    let control = control.clone();
    agent.when_silent(move || {
        let control = control.clone();
        async move { control.log_inspection().await }
    })
}

/// Serial numbers of the image disks of a VM with `count` of them.
#[must_use]
pub fn slot_names(count: u8) -> Vec<String> {
    (0..count).map(|number| format!("image-{number}")).collect()
}

/// Whether a VMM listens in `run_dir`.
pub async fn lives(run_dir: &Path) -> bool {
    Control::new(control_path(run_dir)).listens().await
}

/// Whether the VMM of the VM in `run_dir` is among the host's processes, as far as
/// it can be told without its socket.
pub async fn has_process(run_dir: &Path) -> bool {
    force::is_there(run_dir).await
}

/// Whether there is a control socket in `run_dir`, with or without a VMM.
pub async fn has_socket(run_dir: &Path) -> bool {
    tokio::fs::try_exists(control_path(run_dir)).await.unwrap_or(false)
}

/// Whether a VMM is among the processes of a control group, by the name of its
/// program. The answer is never a reason to signal a process.
#[expect(clippy::disallowed_methods, reason = "it runs where it may block")]
pub async fn is_in_group(cgroup: &Path) -> bool {
    let cgroup = cgroup.to_owned();
    blocking(move || {
        let processes = std::fs::read_to_string(cgroup.join("cgroup.procs")).unwrap_or_default();
        processes.lines().any(|pid| {
            let program = std::fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
            program.trim_end() == PROGRAM
        })
    })
    .await
}

/// The problem of a VMM that left no exit record, if the kernel has killed it for want of
/// memory since the pod's start, when its control group had counted `before` such kills.
pub async fn out_of_memory(cgroup: Option<&Path>, before: u64) -> Option<String> {
    let cgroup = cgroup?.to_owned();
    let group = cgroup.clone();
    let kills = blocking(move || cgroup::oom_kills(&group)).await;
    (kills > before).then(|| {
        format!(
            "the pod's memory on the node ran out, and the kernel killed the machine's VMM: raise the pod's memory \
             limit or the overhead of its RuntimeClass, or free memory of the node (the pod's control group is {})",
            cgroup.display()
        )
    })
}

/// Ends the VMM that is still there of the machine in `run_dir`, and removes the folder:
/// by its socket, or by its process if it does not end when asked. Succeeds when there is
/// nothing.
///
/// # Errors
/// A VMM is there and does not end, or the folder cannot be removed.
pub async fn destroy(run_dir: &Path) -> Result<(), Error> {
    destroy_within(run_dir, CONTROL_TIMEOUT).await
}

/// As [`destroy`]; `limit` is how long a VMM that listens may take to end.
async fn destroy_within(run_dir: &Path, limit: Duration) -> Result<(), Error> {
    let path = control_path(run_dir);
    crash::point("VMM to be ended");
    if !has_socket(run_dir).await {
        if force::kill(run_dir).await? {
            tracing::warn!(path = %path.display(), "killed a VMM that had no socket any more");
        }
    } else if let Err(error) = Control::new(path.clone()).kill(limit).await {
        if !force::kill(run_dir).await? {
            return Err(error);
        }
        tracing::warn!(path = %path.display(), %error, "killed a VMM that did not end when asked");
    }
    crash::point("VMM ended");
    let folder = run_dir.to_owned();
    blocking(move || users::release(&folder)).await;
    match tokio::fs::remove_dir_all(run_dir).await {
        Err(cause) if cause.kind() != std::io::ErrorKind::NotFound => {
            Err(Error::File { stage: "remove sockets", path: run_dir.into(), cause })
        }
        _ => Ok(()),
    }
}

/// The exit record that the VMM left behind, if it could.
#[expect(clippy::disallowed_methods, reason = "it runs where it may block")]
pub async fn exit_record(run_dir: &Path) -> Option<Exit> {
    let path = exit_path(run_dir);
    blocking(move || {
        let file = std::fs::File::open(path).ok()?;
        serde_json::from_str(&words::read(file).ok()?).ok()
    })
    .await
}

/// Makes a file of `run_dir` that a process which faces a guest writes to, see
/// [`words`]. The process maps the file, which therefore has to be readable as well.
#[expect(clippy::disallowed_methods, reason = "run directories are in memory (tmpfs)")]
fn record_file(path: &Path) -> std::io::Result<std::fs::File> {
    use std::os::unix::fs::OpenOptionsExt;
    std::fs::File::options().read(true).write(true).create(true).truncate(true).mode(0o600).open(path)
}

impl Error {
    /// Names the step and the file of an error, for `map_err`.
    pub(crate) fn file(stage: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> Self + use<> {
        let path = path.to_owned();
        move |cause| Self::File { stage, path, cause }
    }
}

impl From<Exit> for Error {
    fn from(exit: Exit) -> Self {
        Self::Ended { reason: exit.reason, detail: exit.detail, console: exit.console }
    }
}
