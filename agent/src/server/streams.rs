//! Accepts the connections of streams ([`husk_proto::agent::stream`]) and
//! passes each to its process, or to a port of the pod.

use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt;
use husk_proto::agent::stream::{Kind, MAX_HEADER, OutputHeader, PortHeader, StreamHeader};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt};
use tokio::sync::Semaphore;
use tokio::time::{sleep, timeout};

use crate::connection::{Connection, Incoming};
use crate::container::ProcessRef;
use crate::pod::port;
use crate::server::Agent;

/// How long a connection may take to name its stream: as long as huskd waits for
/// the answer.
const HEADER_DEADLINE: Duration = Duration::from_secs(20);

/// Most connections whose header has not come. Further ones wait in the
/// backlog.
const MAX_HEADERLESS: usize = 64;

/// Serves until the last source of connections ends.
pub async fn serve(mut incoming: Incoming, agent: Arc<Agent>) {
    let headerless = Arc::new(Semaphore::new(MAX_HEADERLESS));
    loop {
        let Ok(permit) = headerless.clone().acquire_owned().await else { return };
        match incoming.next().await {
            Some(Ok(connection)) => {
                let agent = agent.clone();
                tokio::spawn(async move {
                    // After the deadline the connection is closed, with the
                    // part of the header that has come.
                    let received = timeout(HEADER_DEADLINE, receive(connection, &agent)).await;
                    drop(permit);
                    if let Ok(Ok(Some(forward))) = received {
                        forward.copy().await;
                    }
                });
            }
            None => return,
            Some(Err(error)) => {
                tracing::warn!(%error, "failed to accept a stream");
                sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

/// The request of a connection, from its first line.
#[derive(Debug, PartialEq, Eq)]
enum StreamRequest {
    Stream(StreamHeader),
    Output(OutputHeader),
    Port(PortHeader),
}

enum Found {
    Stream(ProcessRef, Kind),
    Output(ProcessRef, OutputHeader),
    Port(port::Target),
}

/// Reads a connection's header and answers it. Returns the connection to a port,
/// which is still to be joined to the host's.
async fn receive(
    mut connection: Connection,
    agent: &Agent,
) -> std::io::Result<Option<port::Forward<Connection>>> {
    let found = match read_header(&mut connection).await {
        Ok((StreamRequest::Stream(header), early)) => {
            let process = find(agent, &header.container_id, &header.process_id, header.kind);
            process.map(|process| (Found::Stream(process, header.kind), early))
        }
        Ok((StreamRequest::Output(header), early)) => {
            let process = find(agent, &header.container_id, "", header.kind);
            process.map(|process| (Found::Output(process, header), early))
        }
        Ok((StreamRequest::Port(PortHeader(port)), early)) => {
            port::connect(port).await.map(|target| (Found::Port(target), early))
        }
        Err(reason) => Err(reason),
    };
    match found {
        Ok((Found::Stream(process, kind), early)) => {
            connection.write_all(b"OK\n").await?;
            process.connect(kind, connection, early).await;
        }
        Ok((Found::Output(process, header), _)) => {
            connection.write_all(b"OK\n").await?;
            process.connect_output(header.kind, connection, Some(header.from)).await;
        }
        Ok((Found::Port(target), early)) => {
            connection.write_all(b"OK\n").await?;
            return Ok(Some(port::Forward { host: connection, target, early }));
        }
        Err(reason) => {
            connection.write_all(format!("ERR {reason}\n").as_bytes()).await?;
            connection.shutdown().await?;
        }
    }
    Ok(None)
}

fn find(agent: &Agent, container_id: &str, process_id: &str, kind: Kind) -> Result<ProcessRef, String> {
    let container = agent.containers.get(container_id).map_err(|error| error.to_string())?;
    let process = container.process(process_id).map_err(|error| error.to_string())?;
    process.check_stream(kind).map_err(str::to_owned)?;
    Ok(process)
}

/// Reads the first line. Returns it with the bytes that came behind it.
async fn read_header(connection: &mut (impl AsyncRead + Unpin)) -> Result<(StreamRequest, Vec<u8>), String> {
    let mut received = Vec::with_capacity(MAX_HEADER);
    loop {
        let room = MAX_HEADER - received.len();
        let count = connection.take(room as u64).read_buf(&mut received).await.map_err(|e| e.to_string())?;
        if let Some(newline) = received.iter().position(|byte| *byte == b'\n') {
            let early = received.split_off(newline + 1);
            let line = std::str::from_utf8(&received).map_err(|error| error.to_string())?;
            if let Ok(port) = line.parse() {
                return Ok((StreamRequest::Port(port), early));
            }
            if let Ok(output) = line.parse() {
                return Ok((StreamRequest::Output(output), Vec::new()));
            }
            let header: StreamHeader = line.parse().map_err(|bad| format!("{bad}"))?;
            let early = match header.kind {
                Kind::Stdin => early,
                Kind::Stdout | Kind::Stderr => Vec::new(),
            };
            return Ok((StreamRequest::Stream(header), early));
        }
        if count == 0 {
            return Err(format!("no header of at most {MAX_HEADER} bytes"));
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    async fn read(bytes: &[u8]) -> Result<(StreamRequest, Vec<u8>), String> {
        let mut reader: &[u8] = bytes;
        read_header(&mut reader).await
    }

    fn stream(kind: Kind, container_id: &str, process_id: &str) -> StreamRequest {
        StreamRequest::Stream(StreamHeader {
            kind,
            container_id: container_id.into(),
            process_id: process_id.into(),
        })
    }

    #[tokio::test]
    async fn what_follows_the_header_is_input() {
        let (header, early) = read(b"STREAM stdin c1 e1\nfirst\nbytes").await.unwrap();
        assert_eq!(header, stream(Kind::Stdin, "c1", "e1"));
        assert_eq!(early, b"first\nbytes");
    }

    #[tokio::test]
    async fn what_follows_a_port_is_for_the_port() {
        let read = read(b"PORT 80\nGET /").await.unwrap();
        assert_eq!(read, (StreamRequest::Port(PortHeader(80)), b"GET /".to_vec()));
    }

    #[tokio::test]
    async fn an_output_is_asked_for_from_a_byte_on() {
        let header = OutputHeader { kind: Kind::Stderr, container_id: "c1".into(), from: 4711 };
        let read = read(b"OUTPUT stderr c1 4711\n").await.unwrap();
        assert_eq!(read, (StreamRequest::Output(header), Vec::new()));
    }

    #[tokio::test]
    async fn a_header_may_come_in_pieces() {
        let (mut host, mut agent) = tokio::io::duplex(3);
        let writer = tokio::spawn(async move { host.write_all(b"STREAM stdout c1\n").await.map(|()| host) });
        let (header, early) = read_header(&mut agent).await.unwrap();
        assert_eq!((header, early), (stream(Kind::Stdout, "c1", ""), Vec::new()));
        writer.await.unwrap().unwrap();
    }

    #[tokio::test]
    async fn endless_and_broken_headers_are_refused() {
        assert!(read(&vec![b'x'; 100_000]).await.unwrap_err().contains("no header"));
        assert!(read(b"STREAM stdout c1").await.is_err());
        assert!(read(b"STREAM \xff c1\n").await.is_err());
        assert!(read(b"HELLO\n").await.is_err());
    }

    proptest! {
        #[test]
        fn any_bytes_are_survived(bytes in prop::collection::vec(any::<u8>(), 0..2000)) {
            let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
            let _ = runtime.block_on(read(&bytes));
        }
    }
}
