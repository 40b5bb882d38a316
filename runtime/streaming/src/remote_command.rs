//! Exec and attach over SPDY: a stream for each of the command's, and one for
//! how it ended.

use std::time::Duration;

use bytes::Bytes;
use tokio::time::timeout;

use super::negotiate::Protocol;
use super::pipe::{Gone, Outgoing};
use super::resize::Sizes;
use super::session::{Client, Run, StreamOptions};
use super::spdy::{Connection, Stream};

/// The time that a client has to open its streams.
const STREAMS_DEADLINE: Duration = Duration::from_secs(30);

/// Serves one client to the end.
pub async fn serve(mut connection: Connection, options: StreamOptions, protocol: Protocol, run: Run) {
    let resizes = options.terminal && protocol.resizes;
    let Ok(Some(streams)) = timeout(STREAMS_DEADLINE, Streams::open(&mut connection, options, resizes)).await
    else {
        return tracing::debug!("a streaming client did not open the streams that it asked for");
    };
    let Some((client, error, silent)) = streams.into_client(&connection) else { return };
    let said = async {
        let words = run(client).await.encode(protocol.language);
        if !words.is_empty() {
            error.send(Bytes::from(words)).await?;
        }
        error.finish().await?;
        // Clients look for the end of each stream before that of the connection.
        for stream in silent {
            stream.finish().await?;
        }
        Ok::<_, Gone>(())
    };
    let said = tokio::select! {
        said = said => said,
        // Streams that the client opens beyond those are reset.
        () = async { while connection.accept().await.is_some() {} std::future::pending().await } => return,
    };
    if said.is_ok() {
        connection.close().await;
    }
}

#[derive(Debug, Default)]
struct Streams {
    error: Option<Stream>,
    stdin: Option<Stream>,
    stdout: Option<Stream>,
    stderr: Option<Stream>,
    resize: Option<Stream>,
}

impl Streams {
    /// Waits for all of them, in any order; `None` if the client goes before.
    async fn open(connection: &mut Connection, options: StreamOptions, resizes: bool) -> Option<Self> {
        let mut streams = Self::default();
        let missing = |streams: &Self| {
            streams.error.is_none()
                || options.stdin && streams.stdin.is_none()
                || options.stdout && streams.stdout.is_none()
                || options.stderr && streams.stderr.is_none()
                || resizes && streams.resize.is_none()
        };
        while missing(&streams) {
            let stream = connection.accept().await?;
            let (place, expected) = match stream.headers.get("streamtype").unwrap_or_default() {
                "error" => (&mut streams.error, true),
                "stdin" => (&mut streams.stdin, options.stdin),
                "stdout" => (&mut streams.stdout, options.stdout),
                "stderr" => (&mut streams.stderr, options.stderr),
                "resize" => (&mut streams.resize, resizes),
                _ => continue,
            };
            if expected && place.is_none() {
                *place = Some(stream);
            }
        }
        Some(streams)
    }

    /// The client's streams, the one for its end, and our halves of those on
    /// which we say nothing. `None` unless there is an error stream.
    fn into_client(self, connection: &Connection) -> Option<(Client, Outgoing, Vec<Outgoing>)> {
        let mut silent = Vec::new();
        let mut hear = |stream: Option<Stream>| {
            stream.map(|stream| {
                silent.push(stream.outgoing);
                stream.incoming
            })
        };
        let (stdin, resize) = (hear(self.stdin), hear(self.resize));
        let say = |stream: Option<Stream>| stream.map(|stream| stream.outgoing);
        let client = Client {
            stdin,
            sizes: resize.map(Sizes::new),
            stdout: say(self.stdout),
            stderr: say(self.stderr),
            gone: connection.gone().clone(),
        };
        Some((client, self.error?.outgoing, silent))
    }
}
