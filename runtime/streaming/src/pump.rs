//! Moves bytes between a client's streams and sockets of the guest.

use std::io;

use bytes::BytesMut;
use tokio::io::AsyncWriteExt;
use tokio::net::UnixStream;

use super::pipe::{Incoming, Outgoing, PIECE};

/// Reads the guest's next bytes: at least one, or none at the stream's end. A
/// stream that is silent holds no buffer.
///
/// # Errors
/// The socket's error.
pub(crate) async fn read(from: &UnixStream) -> io::Result<BytesMut> {
    loop {
        from.readable().await?;
        let mut piece = BytesMut::with_capacity(PIECE);
        match from.try_read_buf(&mut piece) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error),
            Ok(_) => return Ok(piece),
        }
    }
}

/// Copies from the guest to the client, to the end. Without a client the bytes are dropped.
///
/// # Errors
/// The error of the guest's socket. A client that has gone is no error.
pub async fn output(from: UnixStream, to: Option<Outgoing>) -> io::Result<()> {
    let mut to = to;
    loop {
        let piece = read(&from).await?;
        if piece.is_empty() {
            break;
        }
        if let Some(client) = &to
            && client.send(piece.freeze()).await.is_err()
        {
            to = None;
        }
    }
    if let Some(to) = to {
        let _ = to.finish().await;
    }
    Ok(())
}

/// Copies from the client to the guest, until either has ended.
pub async fn input(mut from: Incoming, mut to: UnixStream) {
    while let Some(bytes) = from.recv().await {
        if to.write_all(&bytes).await.is_err() {
            return;
        }
    }
    let _ = to.shutdown().await;
}
