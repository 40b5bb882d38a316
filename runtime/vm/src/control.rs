//! The control socket of one `husk-vmm`, see `husk_vmm_api`.

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use husk_base::{blocking, crash};
use husk_vmm_api::{Inspection, socket};
use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, SockFlag, SockType, UnixAddr, connect, setsockopt, socket as new_socket, sockopt,
};
use nix::sys::time::{TimeVal, TimeValLike};

use super::{CONTROL_TIMEOUT, Error, Info, Request, Response};

/// The longest time that saving a VM may take.
const SAVE_TIMEOUT: Duration = Duration::from_secs(60);

/// The pause before a VMM that has hung up is asked again.
const TRY_AGAIN: Duration = Duration::from_millis(50);

/// The socket on which one VMM listens. Each request has a connection of its own, so a VMM
/// that hangs holds up no other request, and nothing is kept open between requests.
#[derive(Clone, Debug)]
pub struct Control {
    path: PathBuf,
}

impl Control {
    /// The VMM that listens at `path`.
    #[must_use]
    pub const fn new(path: PathBuf) -> Self {
        Self { path }
    }

    /// Boots the VM; `fds` are the descriptors that the configuration names by their place.
    ///
    /// # Errors
    /// The VMM's reason.
    pub async fn boot(&self, config: husk_vmm_api::VmConfig, fds: Vec<OwnedFd>) -> Result<(), Error> {
        self.done("boot", Request::Boot(Box::new(config)), fds).await
    }

    /// Saves the VM into two new files, and ends it.
    ///
    /// # Errors
    /// The VMM's reason; the VM has ended then as well.
    pub async fn save(&self, state: File, memory: File) -> Result<(), Error> {
        let request = Request::Save { state: 0, memory: 1 };
        match self.ask("save", request, vec![state.into(), memory.into()], SAVE_TIMEOUT).await? {
            Some(Response::Ok) => Ok(()),
            other => Err(unexpected("save", other)),
        }
    }

    /// Puts a disk into a slot.
    ///
    /// # Errors
    /// The VMM's reason.
    pub async fn attach_disk(&self, slot: String, file: OwnedFd) -> Result<(), Error> {
        self.done("attach disk", Request::AttachDisk { slot, file: 0, read_only: true }, vec![file]).await
    }

    /// Empties a slot.
    ///
    /// # Errors
    /// The VMM's reason.
    pub async fn detach_disk(&self, slot: String) -> Result<(), Error> {
        self.done("detach disk", Request::DetachDisk { slot }, Vec::new()).await
    }

    /// Gives the file system device its server, by the VMM's end of a socket.
    ///
    /// # Errors
    /// The VMM's reason.
    pub async fn attach_fs(&self, socket: OwnedFd) -> Result<(), Error> {
        self.done("attach file server", Request::AttachFs { server: 0 }, vec![socket]).await
    }

    /// The VM's memory, connections and versions, as its VMM reports them.
    ///
    /// # Errors
    /// The VMM does not answer.
    pub async fn info(&self) -> Result<Info, Error> {
        match self.ask("info", Request::Info, Vec::new(), CONTROL_TIMEOUT).await? {
            Some(Response::Info(info)) => Ok(info),
            other => Err(unexpected("info", other)),
        }
    }

    /// The end of the guest's console; empty when the VMM does not answer.
    pub async fn console(&self) -> String {
        match self.ask("console", Request::Console, Vec::new(), Duration::from_secs(2)).await {
            Ok(Some(Response::Console { text })) => text,
            _ => String::new(),
        }
    }

    /// Whether a VMM listens, however slowly it answers.
    pub async fn listens(&self) -> bool {
        let control = self.clone();
        let connected = blocking(move || control.connect("look for the VMM", CONTROL_TIMEOUT)).await;
        !matches!(connected, Ok(None))
    }

    /// The state of the vCPUs and devices.
    ///
    /// # Errors
    /// The VMM does not answer.
    pub async fn inspect(&self) -> Result<Inspection, Error> {
        match self.ask("inspect", Request::Inspect, Vec::new(), CONTROL_TIMEOUT).await? {
            Some(Response::Inspection(inspection)) => Ok(inspection),
            other => Err(unexpected("inspect", other)),
        }
    }

    /// Logs the state of the vCPUs and devices: for a guest that does not answer,
    /// before its client ends it.
    pub async fn log_inspection(&self) {
        match self.inspect().await.map(|inspection| serde_json::to_string(&inspection)) {
            Ok(Ok(machine)) => {
                tracing::warn!(vmm = %self.path.display(), machine, "the guest does not answer")
            }
            Ok(Err(error)) => tracing::warn!(%error, "failed to inspect a VM whose guest does not answer"),
            Err(error) => tracing::warn!(%error, "the guest does not answer, nor does its VMM"),
        }
    }

    /// Ends the VM, and returns when its VMM listens no more. A VM that has
    /// ended already is no error.
    ///
    /// # Errors
    /// When the VMM is there and does not end within `limit`.
    pub async fn kill(&self, limit: Duration) -> Result<(), Error> {
        let control = self.clone();
        blocking(move || {
            let stage = "kill";
            let deadline = Instant::now() + limit;
            let mut pause = Duration::ZERO;
            // A VMM with too many clients hangs up too, but still listens.
            while let Some(socket) = control.connect(stage, limit)? {
                ask_to_end(&socket).map_err(|error| failed(stage, &error, limit))?;
                if Instant::now() > deadline {
                    let cause = format!(
                        "the VMM hung up for {} s, and listens still: end other clients of {}",
                        limit.as_secs(),
                        control.path.display()
                    );
                    return Err(Error::Control { stage, cause });
                }
                #[expect(clippy::disallowed_methods, reason = "it runs where it may block")]
                std::thread::sleep(pause);
                pause = TRY_AGAIN;
            }
            Ok(())
        })
        .await
    }

    async fn done(&self, stage: &'static str, request: Request, fds: Vec<OwnedFd>) -> Result<(), Error> {
        match self.ask(stage, request, fds, CONTROL_TIMEOUT).await? {
            Some(Response::Ok) => Ok(()),
            other => Err(unexpected(stage, other)),
        }
    }

    /// Sends one request and receives its answer.
    async fn ask(
        &self,
        stage: &'static str,
        request: Request,
        fds: Vec<OwnedFd>,
        limit: Duration,
    ) -> Result<Option<Response>, Error> {
        crash::point(format_args!("VMM to be asked: {stage}"));
        let control = self.clone();
        let answer = blocking(move || {
            let socket = control
                .connect(stage, limit)?
                .ok_or_else(|| Error::Control { stage, cause: "the VMM has ended".into() })?;
            let fds: Vec<BorrowedFd<'_>> = fds.iter().map(AsFd::as_fd).collect();
            socket::send(socket.as_fd(), &request, &fds).map_err(|error| failed(stage, &error, limit))?;
            socket::receive_from::<Response>(socket.as_fd()).map_err(|error| failed(stage, &error, limit))
        })
        .await?;
        crash::point(format_args!("VMM has answered: {stage}"));
        Ok(answer.map(|answer| match answer.message {
            // The VMM has a process namespace of its own, and does not know its number in ours.
            Response::Info(info) => Response::Info(Info { pid: answer.pid.unwrap_or(info.pid), ..info }),
            other => other,
        }))
    }

    /// Connects to the VMM; `None` when none listens.
    pub(super) fn connect(&self, stage: &'static str, limit: Duration) -> Result<Option<OwnedFd>, Error> {
        let run = || -> nix::Result<OwnedFd> {
            let socket = new_socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_CLOEXEC, None)?;
            let limit = TimeVal::seconds(i64::try_from(limit.as_secs()).unwrap_or(i64::MAX));
            setsockopt(&socket, sockopt::ReceiveTimeout, &limit)?;
            setsockopt(&socket, sockopt::SendTimeout, &limit)?;
            setsockopt(&socket, sockopt::PassCred, &true)?;
            connect(socket.as_raw_fd(), &UnixAddr::new(&self.path)?)?;
            Ok(socket)
        };
        match run() {
            Ok(socket) => Ok(Some(socket)),
            Err(Errno::ECONNREFUSED | Errno::ENOENT) => Ok(None),
            Err(errno) => Err(Error::Control { stage, cause: errno.to_string() }),
        }
    }
}

/// Asks a VMM to end, and returns when it has hung up.
fn ask_to_end(socket: &OwnedFd) -> Result<(), socket::Error> {
    let hung_up = |error| match error {
        socket::Error::Socket(Errno::EPIPE | Errno::ECONNRESET) => Ok(()),
        error => Err(error),
    };
    if let Err(error) = socket::send(socket.as_fd(), &Request::Kill, &[]) {
        return hung_up(error);
    }
    loop {
        match socket::receive::<Response>(socket.as_fd()) {
            Ok(Some(_)) => {}
            Ok(None) => return Ok(()),
            Err(error) => return hung_up(error),
        }
    }
}

fn failed(stage: &'static str, error: &socket::Error, limit: Duration) -> Error {
    let cause = match error {
        socket::Error::Socket(Errno::EAGAIN) => {
            format!("no answer within {} s", limit.as_secs())
        }
        other => other.to_string(),
    };
    Error::Control { stage, cause }
}

fn unexpected(stage: &'static str, response: Option<Response>) -> Error {
    match response {
        Some(Response::Error { stage, message }) => Error::Vmm { stage, message },
        Some(Response::Exited(exit)) => exit.into(),
        Some(other) => Error::Control { stage, cause: format!("unexpected answer {other:?}") },
        None => Error::Control { stage, cause: "the VMM ended without an answer".into() },
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use std::os::fd::FromRawFd;
    use std::path::Path;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use nix::sys::socket::{Backlog, accept, bind, listen};

    use super::*;

    pub(crate) fn listener(path: &Path) -> OwnedFd {
        let socket =
            new_socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_CLOEXEC, None).unwrap();
        bind(socket.as_raw_fd(), &UnixAddr::new(path).unwrap()).unwrap();
        listen(&socket, Backlog::new(8).unwrap()).unwrap();
        socket
    }

    #[tokio::test]
    async fn a_vmm_that_turns_clients_away_is_asked_until_it_ends() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("vmm.sock");
        let listener = listener(&path);
        let asked = Arc::new(AtomicUsize::new(0));
        let count = asked.clone();
        let vmm = std::thread::spawn(move || {
            let client = || {
                let fd = accept(listener.as_raw_fd()).unwrap();
                // SAFETY: the kernel has just made this descriptor.
                unsafe { OwnedFd::from_raw_fd(fd) }
            };
            for _ in 0..3 {
                drop(client());
            }
            let client = client();
            let request = socket::receive::<Request>(client.as_fd()).unwrap();
            assert!(matches!(request, Some((Request::Kill, _))));
            count.fetch_add(1, Ordering::Relaxed);
            drop(listener);
        });
        Control::new(path).kill(CONTROL_TIMEOUT).await.unwrap();
        assert_eq!(asked.load(Ordering::Relaxed), 1);
        vmm.join().unwrap();
    }

    #[tokio::test]
    async fn a_vmm_that_has_ended_already_is_no_error() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("vmm.sock");
        Control::new(path.clone()).kill(CONTROL_TIMEOUT).await.unwrap();
        drop(listener(&path));
        assert!(path.exists());
        Control::new(path).kill(CONTROL_TIMEOUT).await.unwrap();
    }
}
