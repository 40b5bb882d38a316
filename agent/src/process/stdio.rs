//! The two sides of a process's standard streams: the process's, which is
//! passed through runc, and the agent's.

use std::fs;
use std::io;
use std::io::IoSliceMut;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::{self, Command};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use nix::fcntl::OFlag;
use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};
use nix::unistd::pipe2;
use tokio::net::UnixListener;
use tokio::time::timeout;

/// The directory of console sockets in a machine. It has few, short names in
/// it, because the path of a unix socket is limited to 107 bytes.
pub const CONSOLES: &str = "/run/husk/console";

/// How long to wait for the terminal. runc has sent it before it exits, so it
/// is there at once.
const TERMINAL_DEADLINE: Duration = Duration::from_secs(5);

/// The agent's ends of a process's streams.
pub struct Ends {
    /// Standard input, for writing.
    pub stdin: Option<OwnedFd>,
    /// Standard output, for reading.
    pub stdout: OwnedFd,
    /// Standard error, for reading; with a terminal it is part of `stdout`.
    pub stderr: Option<OwnedFd>,
    /// The terminal, for setting its size.
    pub terminal: Option<OwnedFd>,
}

/// The standard streams of a process that runc is about to start.
pub enum Stdio {
    /// Three pipes, or two and `/dev/null`.
    Pipes {
        /// The process's side, until it is passed to runc.
        process: Option<[process::Stdio; 3]>,
        /// The agent's side.
        ends: Ends,
    },
    /// A terminal that runc makes inside the container.
    Terminal {
        /// The socket to which runc sends the terminal.
        console: Console,
        /// Whether the terminal takes input.
        stdin: bool,
    },
}

impl Stdio {
    /// Makes pipes, or the socket for a terminal in the directory `consoles`.
    pub fn new(consoles: &Path, terminal: bool, stdin: bool) -> io::Result<Self> {
        if terminal {
            return Ok(Self::Terminal { console: Console::listen(consoles)?, stdin });
        }
        let (input, stdin) = if stdin {
            let (reader, writer) = pipe2(OFlag::O_CLOEXEC)?;
            (reader.into(), Some(writer))
        } else {
            (process::Stdio::null(), None)
        };
        let (stdout, output) = pipe2(OFlag::O_CLOEXEC)?;
        let (stderr, errors) = pipe2(OFlag::O_CLOEXEC)?;
        Ok(Self::Pipes {
            process: Some([input, output.into(), errors.into()]),
            ends: Ends { stdin, stdout, stderr: Some(stderr), terminal: None },
        })
    }

    /// Passes the process's side to the runc that starts it.
    pub fn pass_to(&mut self, runc: &mut Command) {
        match self {
            Self::Pipes { process, .. } => {
                if let Some([stdin, stdout, stderr]) = process.take() {
                    runc.stdin(stdin).stdout(stdout).stderr(stderr);
                }
            }
            Self::Terminal { console, .. } => {
                runc.arg("--console-socket").arg(&console.path);
            }
        }
    }

    /// The agent's side, once runc has started the process.
    pub async fn into_ends(self) -> io::Result<Ends> {
        match self {
            Self::Pipes { ends, .. } => Ok(ends),
            Self::Terminal { console, stdin } => {
                let terminal = console.receive().await?;
                let stdin = if stdin { Some(terminal.try_clone()?) } else { None };
                Ok(Ends { stdin, stdout: terminal.try_clone()?, stderr: None, terminal: Some(terminal) })
            }
        }
    }
}

/// The socket on which runc hands over a terminal's master (runc's
/// `--console-socket`).
pub struct Console {
    path: PathBuf,
    listener: UnixListener,
}

impl Console {
    fn listen(consoles: &Path) -> io::Result<Self> {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        fs::create_dir_all(consoles)?;
        let path = consoles.join(NEXT.fetch_add(1, Ordering::Relaxed).to_string());
        let listener = UnixListener::bind(&path)?;
        Ok(Self { path, listener })
    }

    async fn receive(&self) -> io::Result<OwnedFd> {
        let receive = async {
            let (connection, _) = self.listener.accept().await?;
            loop {
                connection.readable().await?;
                match connection.try_io(tokio::io::Interest::READABLE, || receive_fd(&connection)) {
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                    other => return other,
                }
            }
        };
        timeout(TERMINAL_DEADLINE, receive)
            .await
            .unwrap_or_else(|_| Err(io::Error::other("runc sent no terminal")))
    }
}

impl Drop for Console {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.path);
    }
}

fn receive_fd(socket: &impl AsRawFd) -> io::Result<OwnedFd> {
    // The message is the terminal's name; only the descriptor is used.
    let mut name = [0; 4096];
    let mut control = nix::cmsg_space!([std::os::fd::RawFd; 1]);
    let mut parts = [IoSliceMut::new(&mut name)];
    let message =
        recvmsg::<()>(socket.as_raw_fd(), &mut parts, Some(&mut control), MsgFlags::MSG_CMSG_CLOEXEC)?;
    for part in message.cmsgs()? {
        if let ControlMessageOwned::ScmRights(fds) = part
            && let Some(&fd) = fds.first()
        {
            // SAFETY: the kernel just made this descriptor for us; the control
            // buffer has room for one only, so no other is dropped.
            return Ok(unsafe { OwnedFd::from_raw_fd(fd) });
        }
    }
    Err(io::Error::other("runc's message carries no terminal"))
}

#[cfg(test)]
mod tests {
    use std::io::{IoSlice, Read, Write};
    use std::os::unix::net::UnixStream;

    use nix::sys::socket::{ControlMessage, sendmsg};

    use super::*;

    #[test]
    fn a_descriptor_sent_over_a_socket_is_received() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let (reader, writer) = pipe2(OFlag::O_CLOEXEC).unwrap();
        let fds = [writer.as_raw_fd()];
        sendmsg::<()>(
            theirs.as_raw_fd(),
            &[IoSlice::new(b"/dev/pts/0")],
            &[ControlMessage::ScmRights(&fds)],
            MsgFlags::empty(),
            None,
        )
        .unwrap();
        drop(writer);
        fs::File::from(receive_fd(&ours).unwrap()).write_all(b"hello").unwrap();
        let mut read = String::new();
        fs::File::from(reader).read_to_string(&mut read).unwrap();
        assert_eq!(read, "hello");
    }

    #[test]
    fn a_message_without_descriptor_is_an_error() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        theirs.write_all(b"x").unwrap();
        assert!(receive_fd(&ours).is_err());
    }
}
