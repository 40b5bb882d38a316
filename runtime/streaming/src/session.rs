//! A session as an RPC offers it, and its client as the session sees it.

use std::sync::Arc;

use futures::future::BoxFuture;
use tokio::net::UnixStream;
use tokio_util::sync::CancellationToken;

use super::pipe::{Incoming, Outgoing};
use super::resize::Sizes;
use super::status::ExitStatus;

/// The streams that a command's client is to have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StreamOptions {
    /// The client may type.
    pub stdin: bool,
    /// The client sees output.
    pub stdout: bool,
    /// The client sees error output.
    pub stderr: bool,
    /// The client has a terminal, whose size may change.
    pub terminal: bool,
}

/// A client that has come for a command.
#[derive(Debug)]
pub struct Client {
    /// The bytes that the client types. The stream ends when the client is done, or has gone.
    pub stdin: Option<Incoming>,
    /// Sizes of the terminal.
    pub sizes: Option<Sizes>,
    /// Takes output.
    pub stdout: Option<Outgoing>,
    /// Takes error output.
    pub stderr: Option<Outgoing>,
    /// Cancelled when the client has gone.
    pub gone: CancellationToken,
}

/// Runs a command, or joins one, for its client.
pub type Run = Box<dyn FnOnce(Client) -> BoxFuture<'static, ExitStatus> + Send>;

/// Connects to a port of a pod.
pub type Connect = Arc<dyn Fn(u16) -> BoxFuture<'static, std::io::Result<UnixStream>> + Send + Sync>;

/// A session that waits for its client.
pub enum Session {
    /// A new command.
    Exec(StreamOptions, Run),
    /// A command that runs already.
    Attach(StreamOptions, Run),
    /// Connections to ports.
    Ports(Connect),
}

impl Session {
    /// The first part of its URL's path.
    pub const fn path(&self) -> &'static str {
        match self {
            Self::Exec(..) => "exec",
            Self::Attach(..) => "attach",
            Self::Ports(_) => "portforward",
        }
    }
}

impl std::fmt::Debug for Session {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.path())
    }
}
