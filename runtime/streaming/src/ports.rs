//! Port-forward over SPDY: for each connection a stream of data and one for
//! what went wrong.

use std::collections::HashMap;
use std::pin::pin;
use std::time::Duration;

use bytes::Bytes;
use futures::future::{Either, select};
use tokio::io::AsyncWriteExt;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::task::JoinSet;
use tokio::time::{Instant, interval};

use super::pipe::{Incoming, Outgoing};
use super::pump;
use super::session::Connect;
use super::spdy::{Connection, Stream};

/// The longest wait of a connection's one stream for the other.
const PAIR_DEADLINE: Duration = Duration::from_secs(30);

/// Serves one client until it goes.
pub async fn serve(mut connection: Connection, connect: Connect) {
    let mut pairs = Pairs::default();
    let mut forwards = JoinSet::new();
    let mut tick = interval(PAIR_DEADLINE);
    loop {
        tokio::select! {
            stream = connection.accept() => {
                let Some(stream) = stream else { break };
                if let Some(pair) = pairs.add(stream) {
                    forwards.spawn(forward(pair, connect.clone()));
                }
            }
            Some(_) = forwards.join_next() => {}
            _ = tick.tick() => pairs.forget_old(),
        }
    }
    forwards.shutdown().await;
    connection.close().await;
}

/// Both streams of a connection.
#[derive(Debug)]
struct Pair {
    port: u16,
    data: Stream,
    error: Stream,
}

/// Streams whose other has not come yet.
#[derive(Debug, Default)]
struct Pairs(HashMap<String, (Instant, bool, Stream)>);

impl Pairs {
    /// Takes a stream in; answers with a pair if it completes one. Streams that
    /// make no sense are reset.
    fn add(&mut self, stream: Stream) -> Option<Pair> {
        let is_data = match stream.headers.get("streamtype")? {
            "data" => true,
            "error" => false,
            _ => return None,
        };
        let port = stream.headers.get("port")?.parse().ok().filter(|port| *port != 0)?;
        // The oldest clients do not number connections, but open the error
        // stream first and the data stream right after it.
        let connection = match stream.headers.get("requestid") {
            Some(id) => id.to_owned(),
            None if is_data => format!("#{}", stream.id.saturating_sub(2)),
            None => format!("#{}", stream.id),
        };
        match self.0.remove(&connection) {
            Some((_, other_is_data, other)) if other_is_data != is_data => {
                let (data, error) = if is_data { (stream, other) } else { (other, stream) };
                Some(Pair { port, data, error })
            }
            _ => {
                self.0.insert(connection, (Instant::now(), is_data, stream));
                None
            }
        }
    }

    fn forget_old(&mut self) {
        self.0.retain(|_, (since, _, _)| since.elapsed() < PAIR_DEADLINE);
    }
}

async fn forward(pair: Pair, connect: Connect) {
    let Pair { port, data, error } = pair;
    let Stream { incoming, outgoing, reset, .. } = data;
    let connected = tokio::select! {
        connected = connect(port) => connected,
        () = reset.cancelled() => {
            let _ = error.outgoing.finish().await;
            return;
        }
    };
    let socket = match connected {
        Ok(socket) => socket,
        Err(problem) => {
            let words = format!("error forwarding port {port}: {problem}");
            let _ = error.outgoing.send(Bytes::from(words)).await;
            let _ = error.outgoing.finish().await;
            return;
        }
    };
    // Each way ends alone, however long the other goes on: a client that has
    // asked its last may wait for days for the answer.
    let (reader, writer) = socket.into_split();
    let (up, down) = (pin!(up(incoming, writer)), pin!(down(reader, outgoing)));
    let answered = async {
        match select(up, down).await {
            Either::Left(((), down)) => {
                down.await;
                None
            }
            Either::Right(((), up)) => Some(up),
        }
    };
    let rest = tokio::select! {
        rest = answered => rest,
        () = reset.cancelled() => None,
    };
    // Clients wait for this before they close the connection that they forward.
    let _ = error.outgoing.finish().await;
    if let Some(up) = rest {
        tokio::select! {
            () = up => {}
            () = reset.cancelled() => {}
        }
    }
}

/// Copies from the client to the port.
async fn up(mut from_client: Incoming, mut writer: OwnedWriteHalf) {
    while let Some(bytes) = from_client.recv().await {
        if writer.write_all(&bytes).await.is_err() {
            break;
        }
    }
    let _ = writer.shutdown().await;
}

/// Copies from the port to the client. A connection to the agent that breaks is reset:
/// it shall not look like an end. One that the agent closes is an end, also
/// when the port's server has reset its own.
async fn down(reader: OwnedReadHalf, to_client: Outgoing) {
    loop {
        let Ok(piece) = pump::read(reader.as_ref()).await else { return };
        if piece.is_empty() {
            let _ = to_client.finish().await;
            return;
        }
        if to_client.send(piece.freeze()).await.is_err() {
            return;
        }
    }
}
