//! SPDY and WebSockets, as a client of exec, attach and port-forward may speak them. A session must end when its
//! client has: an hour of the session's own time may pass meanwhile, because that is what it waits for a client that
//! reads slowly.

use std::sync::Arc;
use std::time::Duration;

use futures::FutureExt;
use husk_streaming::{Client, Connect, ExitStatus, Run, StreamOptions};
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex};
use tokio::net::UnixStream;
use tokio::time::timeout;

/// The longest time that a session may go on after its client has said its last byte.
const ENDS_WITHIN: Duration = Duration::from_secs(2 * 3600);

/// Bytes that wait between client and server. More wait in the session's own buffers.
const PIPE: usize = 64 << 10;

/// The streams that a number asks for.
const fn options(number: u8) -> StreamOptions {
    StreamOptions {
        stdin: number & 1 != 0,
        stdout: number & 2 != 0,
        stderr: number & 4 != 0,
        terminal: number & 8 != 0,
    }
}

/// A command that repeats its input on its outputs, and learns the sizes of its terminal.
fn repeat() -> Run {
    Box::new(|client| {
        async {
            let Client { stdin, sizes, stdout, stderr, .. } = client;
            let input = async {
                let Some(mut stdin) = stdin else { return };
                while let Some(bytes) = stdin.recv().await {
                    for output in [&stdout, &stderr].into_iter().flatten() {
                        if output.send(bytes.clone()).await.is_err() {
                            return;
                        }
                    }
                }
            };
            let sizes = async {
                let Some(mut sizes) = sizes else { return };
                while sizes.next().await.is_some() {}
            };
            tokio::join!(input, sizes);
            for output in [stdout, stderr].into_iter().flatten() {
                let _ = output.finish().await;
            }
            ExitStatus::Exit(3)
        }
        .boxed()
    })
}

/// Connects to a port whose server repeats what it hears; some ports have none.
fn connect() -> Connect {
    Arc::new(|port| {
        async move {
            if port.is_multiple_of(3) {
                return Err(std::io::ErrorKind::ConnectionRefused.into());
            }
            let (ours, theirs) = UnixStream::pair()?;
            drop(tokio::spawn(async move {
                let (mut reader, mut writer) = theirs.into_split();
                let _ = tokio::io::copy(&mut reader, &mut writer).await;
            }));
            Ok(ours)
        }
        .boxed()
    })
}

/// Says `bytes` to a server and hears what it answers, until both are done.
#[allow(clippy::expect_used)]
fn converse<F: Future<Output = ()>>(bytes: &[u8], serve: impl FnOnce(DuplexStream) -> F) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().start_paused(true).build();
    runtime.expect("a runtime").block_on(async {
        let (client, server) = duplex(PIPE);
        let (mut reader, mut writer) = tokio::io::split(client);
        let say = async {
            let _ = writer.write_all(bytes).await;
            let _ = writer.shutdown().await;
        };
        let hear = async {
            let mut piece = [0; 4096];
            while reader.read(&mut piece).await.is_ok_and(|read| read > 0) {}
        };
        let all = async { tokio::join!(serve(server), say, hear) };
        timeout(ENDS_WITHIN, all).await.expect("the session goes on without its client");
    });
}

/// Exec, attach and port-forward over SPDY.
pub mod spdy {
    use husk_streaming::fuzzing::{Frames, command_over_spdy, frames, ports_over_spdy};

    use super::{connect, converse, options, repeat};
    use crate::input::{Input, Output};

    /// Headers that mean something, and some that do not.
    const HEADERS: [(&str, &str); 16] = [
        ("streamtype", "error"),
        ("streamtype", "stdin"),
        ("streamtype", "stdout"),
        ("streamtype", "stderr"),
        ("streamtype", "resize"),
        ("streamtype", "data"),
        ("port", "80"),
        ("port", "0"),
        ("port", "3"),
        ("port", "70000"),
        ("requestid", "1"),
        ("requestid", "2"),
        ("requestid", ""),
        ("StreamType", "DATA"),
        ("", ""),
        ("x", "a value of some length that packs badly: 0123456789abcdef"),
    ];

    /// Reads frames off the input: as they are on the wire, or as orders for a client to send some, because no fuzzer
    /// finds headers that unpack.
    pub fn run(data: &[u8]) {
        let mut input = Input::new(data);
        let (how, which) = (input.byte(), input.byte());
        let bytes = if how & 1 == 0 { input.rest().to_vec() } else { ordered(&mut input) };
        match how >> 1 & 3 {
            0 => frames(&bytes),
            1 => converse(&bytes, |io| ports_over_spdy(io, connect())),
            _ => converse(&bytes, |io| {
                command_over_spdy(io, options(which & 15), (which >> 4).into(), repeat())
            }),
        }
    }

    fn ordered(input: &mut Input) -> Vec<u8> {
        let mut frames = Frames::default();
        let mut next = 1;
        for _ in 0..100 {
            let Some(order) = input.next() else { break };
            match order % 8 {
                0 | 1 => {
                    let chosen: Vec<_> = input
                        .bytes((order >> 4).into())
                        .iter()
                        .map(|byte| HEADERS[usize::from(byte % 16)])
                        .collect();
                    frames.open(next, order & 8 != 0, &chosen);
                    next += 2;
                }
                2 | 3 => {
                    let (stream, length) = (input.byte().into(), input.u16());
                    let bytes = input.bytes((order >> 4).into());
                    let bytes: Vec<u8> = bytes
                        .iter()
                        .copied()
                        .chain(std::iter::repeat(7))
                        .take((length % 9000).into())
                        .collect();
                    frames.data(stream, order & 8 != 0, &bytes);
                }
                4 => frames.reset(input.byte().into()),
                5 => frames.ping(input.byte().into()),
                6 => frames.go_away(),
                _ => frames.raw(input.bytes((order >> 3).into())),
            }
        }
        frames.done()
    }

    /// Sessions as Go's client has them, in both forms.
    #[must_use]
    pub fn seeds() -> Vec<Vec<u8>> {
        let mut exec = Frames::default();
        for (stream, kind) in [(1, "error"), (3, "stdin"), (5, "stdout"), (7, "stderr"), (9, "resize")] {
            exec.open(stream, kind == "stdout", &[("streamtype", kind)]);
        }
        exec.data(9, false, br#"{"Width":80,"Height":24}"#);
        exec.data(3, false, b"words");
        exec.ping(1);
        exec.data(3, true, b"");
        exec.go_away();
        let exec = exec.done();
        let mut ports = Frames::default();
        for (stream, kind) in [(1, "error"), (3, "data")] {
            ports.open(stream, kind == "error", &[("streamtype", kind), ("port", "80"), ("requestid", "0")]);
        }
        ports.data(3, true, b"GET / HTTP/1.0\r\n\r\n");
        let ports = ports.done();
        let say = |how: u8, which: u8| Output::default().byte(how).byte(which);
        let open = |output: Output, header: u8| output.byte(16).byte(header);
        let data = |output: Output, order: u8, stream: u8| output.byte(order).byte(stream).u16(40);
        vec![
            say(0, 0).bytes(&exec).0,
            say(4, 0x0f).bytes(&exec).0,
            say(2, 0).bytes(&ports).0,
            data(open(open(open(say(5, 0x13), 0), 1), 2), 2, 3).byte(5).byte(1).byte(4).byte(3).0,
            data(say(3, 0).bytes(&[48, 0, 6, 10, 48, 5, 6, 10]), 10, 3).byte(4).byte(3).0,
            data(say(3, 0).bytes(&[48, 0, 8, 10, 48, 5, 8, 10]), 2, 3).0,
        ]
    }
}

/// Exec, attach and port-forward over a WebSocket.
pub mod websocket {
    use husk_streaming::fuzzing::{Frames, command_over_websocket, ports_over_websocket};

    use super::{connect, converse, options, repeat};
    use crate::input::{Input, Output};

    const CONTINUATION: u8 = 0;
    const TEXT: u8 = 1;
    const BINARY: u8 = 2;
    const CLOSE: u8 = 8;
    const PING: u8 = 9;
    const FIN: u8 = 0x80;

    /// Reads messages off the input as they are on the wire.
    pub fn run(data: &[u8]) {
        let mut input = Input::new(data);
        let (how, which) = (input.byte(), input.byte());
        let bytes = input.rest();
        if how & 1 == 0 {
            let options = options(which);
            converse(bytes, |io| command_over_websocket(io, options, (how >> 1).into(), repeat()));
        } else {
            converse(bytes, |io| ports_over_websocket(io, connect()));
        }
    }

    /// A frame of a client, whose mask changes nothing.
    fn frame(head: u8, payload: &[u8]) -> Vec<u8> {
        let frame = match u8::try_from(payload.len()).ok().filter(|length| *length < 126) {
            Some(length) => Output::default().byte(head).byte(0x80 | length),
            None => {
                Output::default().byte(head).byte(0x80 | 126).bytes(&(payload.len() as u16).to_be_bytes())
            }
        };
        frame.bytes(&[0; 4]).bytes(payload).0
    }

    /// Sessions as Go's client has them.
    #[must_use]
    pub fn seeds() -> Vec<Vec<u8>> {
        let close = frame(FIN | CLOSE, &[3, 232]);
        let channels = [
            frame(FIN | BINARY, b"\x00words"),
            frame(FIN | BINARY, b"\x04{\"Width\":80,\"Height\":24}"),
            frame(BINARY, b"\x00in"),
            frame(FIN | PING, b"?"),
            frame(FIN | CONTINUATION, b" pieces"),
            frame(FIN | BINARY, &[0; 1000]),
            frame(FIN | BINARY, &[255, 0]),
            close.clone(),
        ]
        .concat();
        let base64 = [frame(FIN | TEXT, b"0d29yZHM="), frame(FIN | TEXT, b"4e30="), close.clone()].concat();
        let mut ports = Frames::default();
        for (stream, kind) in [(1, "error"), (3, "data")] {
            ports.open(stream, kind == "error", &[("streamtype", kind), ("port", "80"), ("requestid", "0")]);
        }
        ports.data(3, true, b"GET / HTTP/1.0\r\n\r\n");
        let ports = [frame(FIN | BINARY, &ports.done()), close].concat();
        vec![
            [&[0, 15][..], &channels].concat(),
            [&[2, 7][..], &channels].concat(),
            [&[4, 15][..], &base64].concat(),
            [&[1, 0][..], &ports].concat(),
        ]
    }
}
