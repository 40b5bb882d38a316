//! Exec, attach and port-forward: a server of their own, apart from CRI's.
//!
//! A verb [`offer`](Streaming::offer)s what it would do and gets a URL, which
//! it answers to the client with. Whoever brings that URL within a minute, once,
//! is connected to what was offered:
//!
//! ```text
//!            ┌── SPDY/3.1 ─────────── one stream each: stdin, stdout, … ──┐
//! client ────┤                                                            ├── Client ── verb
//!            ├── WebSocket ────────── one channel each ───────────────────┘
//!            └── SPDY/3.1, or SPDY/3.1 in a WebSocket ── ports ─────────────── socket in the guest
//! ```
//!
//! Nothing is buffered beyond a few pieces of each stream, no connection ends
//! for being idle, and the last byte of an output is sent before its end is,
//! however long the client takes to read it.

#![forbid(unsafe_code)]

use std::net::{SocketAddr, TcpListener};
use std::sync::{Arc, Mutex};

use futures::future::BoxFuture;
use tokio::net::UnixStream;
use tokio_util::sync::CancellationToken;

mod negotiate;
mod peer;
pub mod pipe;
mod ports;
pub mod pump;
mod remote_command;
mod resize;
mod server;
mod spdy;
mod status;
#[cfg(test)]
mod tests;
mod tokens;
mod tunnel;
mod waiting;
mod websocket;

pub use resize::{Size, Sizes};
pub use status::Ending;
pub use tokens::Error as TokenError;

use husk_base::lock;
use pipe::{Incoming, Outgoing};

/// Which streams a command's client is to have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Wanted {
    /// It may type.
    pub stdin: bool,
    /// It sees output.
    pub stdout: bool,
    /// It sees error output.
    pub stderr: bool,
    /// It has a terminal, whose size may change.
    pub terminal: bool,
}

/// A client that has come for a command.
#[derive(Debug)]
pub struct Client {
    /// What it types; ends when it is done, and when it has gone.
    pub stdin: Option<Incoming>,
    /// Sizes of its terminal.
    pub sizes: Option<Sizes>,
    /// For output.
    pub stdout: Option<Outgoing>,
    /// For error output.
    pub stderr: Option<Outgoing>,
    /// Cancelled when it has gone.
    pub gone: CancellationToken,
}

/// Runs a command, or joins one, for its client.
pub type Run = Box<dyn FnOnce(Client) -> BoxFuture<'static, Ending> + Send>;

/// Connects to a port of a pod.
pub type Connect = Arc<dyn Fn(u16) -> BoxFuture<'static, std::io::Result<UnixStream>> + Send + Sync>;

/// What waits for a client.
pub enum Offer {
    /// Exec.
    Exec(Wanted, Run),
    /// Attach.
    Attach(Wanted, Run),
    /// Port-forward.
    Ports(Connect),
}

impl Offer {
    /// The first part of its path.
    const fn path(&self) -> &'static str {
        match self {
            Self::Exec(..) => "exec",
            Self::Attach(..) => "attach",
            Self::Ports(_) => "portforward",
        }
    }
}

impl std::fmt::Debug for Offer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.path())
    }
}

/// The server, and what waits for its clients.
#[derive(Debug)]
pub struct Streaming {
    listener: Mutex<Option<TcpListener>>,
    address: SocketAddr,
    tokens: tokens::Tokens<Offer>,
}

impl Streaming {
    /// Listens; connections are served from [`serve`](Self::serve) on.
    ///
    /// # Errors
    /// The kernel's.
    pub fn listen(address: SocketAddr) -> std::io::Result<Self> {
        let listener = TcpListener::bind(address)?;
        listener.set_nonblocking(true)?;
        let address = listener.local_addr()?;
        Ok(Self { listener: Mutex::new(Some(listener)), address, tokens: tokens::Tokens::default() })
    }

    /// The URL at which a client finds `what`.
    ///
    /// # Errors
    /// When too many wait already.
    pub fn offer(&self, what: Offer) -> Result<String, TokenError> {
        let path = what.path();
        Ok(format!("http://{}/{path}/{}", self.address, self.tokens.give(what)?))
    }

    /// Serves for ever.
    ///
    /// # Errors
    /// When it serves already.
    pub async fn serve(self: Arc<Self>) -> std::io::Result<()> {
        let listener = lock(&self.listener).take().ok_or(std::io::ErrorKind::AddrInUse)?;
        server::serve(tokio::net::TcpListener::from_std(listener)?, self).await;
        Ok(())
    }
}
