//! The server of exec, attach and port-forward, apart from CRI's.
//!
//! An RPC [`offer`](Streaming::offer)s a [`Session`] and gets a URL, which is its
//! answer to the client. The first client that brings that URL within a minute
//! is connected to the session:
//!
//! ```text
//!            ┌── SPDY/3.1 ─────────── one stream each: stdin, stdout, … ──┐
//! client ────┤                                                            ├── Client ── session
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

pub mod channel;
#[cfg(feature = "fuzzing")]
pub mod fuzzing;
mod negotiate;
mod peer;
mod pipe;
mod ports;
pub mod pump;
mod remote_command;
mod resize;
mod server;
mod session;
mod spdy;
mod status;
#[cfg(test)]
mod tests;
mod tokens;
mod tunnel;
mod waiting;
mod websocket;

pub use pipe::{Gone, Incoming, Outgoing};
pub use resize::{Size, Sizes};
pub use session::{Client, Connect, Run, Session, StreamOptions};
pub use status::ExitStatus;
pub use tokens::Error as TokenError;

use husk_base::lock;

/// The server, with the sessions that wait for their clients.
#[derive(Debug)]
pub struct Streaming {
    listener: Mutex<Option<TcpListener>>,
    address: SocketAddr,
    tokens: Arc<tokens::Tokens<Session>>,
}

impl Streaming {
    /// Listens. Connections are served from [`serve`](Self::serve) on.
    ///
    /// # Errors
    /// The kernel's error.
    pub fn listen(address: SocketAddr) -> std::io::Result<Self> {
        let listener = TcpListener::bind(address)?;
        listener.set_nonblocking(true)?;
        let address = listener.local_addr()?;
        Ok(Self { listener: Mutex::new(Some(listener)), address, tokens: Arc::default() })
    }

    /// The URL at which a client finds a session.
    ///
    /// # Errors
    /// Too many sessions wait already.
    pub fn offer(&self, session: Session) -> Result<String, TokenError> {
        let path = session.path();
        Ok(format!("http://{}/{path}/{}", self.address, self.tokens.give(session)?))
    }

    /// Serves for ever.
    ///
    /// # Errors
    /// The server serves already.
    pub async fn serve(self: Arc<Self>) -> std::io::Result<()> {
        let listener = lock(&self.listener).take().ok_or(std::io::ErrorKind::AddrInUse)?;
        server::serve(tokio::net::TcpListener::from_std(listener)?, self.tokens.clone()).await;
        Ok(())
    }
}
