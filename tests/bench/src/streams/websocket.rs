//! The client's side of exec and attach over a WebSocket, in the version of the protocol that every runtime speaks: the
//! first byte of each message names its stream.

use anyhow::{Context, bail};
use futures::{SinkExt, StreamExt};
use tokio::net::TcpStream;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::client::IntoClientRequest;
use tokio_tungstenite::tungstenite::http::HeaderValue;
use tokio_tungstenite::tungstenite::http::header::SEC_WEBSOCKET_PROTOCOL;

const STDIN: u8 = 0;
const STDOUT: u8 = 1;
const STATUS: u8 = 3;

/// A client of a container's streams.
pub struct Streams(WebSocketStream<TcpStream>);

/// A message from the server.
pub enum Said {
    /// Output of that many bytes.
    Output(u64),
    /// The status with which the command ended; the last message.
    Ended(String),
}

impl Streams {
    /// Connects to the URL that Exec or Attach returned.
    pub async fn connect(url: &str) -> anyhow::Result<Self> {
        let rest = url.strip_prefix("http://").with_context(|| format!("{url} is not plain HTTP"))?;
        let (address, _) = rest.split_once('/').with_context(|| format!("{url} has no path"))?;
        let stream = TcpStream::connect(address).await.with_context(|| format!("connect to {address}"))?;
        stream.set_nodelay(true).context("set up a connection")?;
        let mut request = format!("ws://{rest}").into_client_request().context("make a request")?;
        request.headers_mut().insert(SEC_WEBSOCKET_PROTOCOL, HeaderValue::from_static("v4.channel.k8s.io"));
        let (socket, _) =
            tokio_tungstenite::client_async(request, stream).await.context("open a WebSocket")?;
        Ok(Self(socket))
    }

    /// Sends input.
    pub async fn send(&mut self, text: &str) -> anyhow::Result<()> {
        let message = [&[STDIN], text.as_bytes()].concat();
        self.0.send(Message::Binary(message.into())).await.context("send input")
    }

    /// Receives the next message.
    pub async fn next(&mut self) -> anyhow::Result<Said> {
        loop {
            let message = self.0.next().await.context("the connection ended early")?;
            let Message::Binary(bytes) = message.context("read a message")? else { continue };
            match bytes.split_first() {
                Some((&STDOUT, output)) if !output.is_empty() => {
                    return Ok(Said::Output(output.len() as u64));
                }
                Some((&STATUS, status)) if !status.is_empty() => {
                    return Ok(Said::Ended(String::from_utf8_lossy(status).into_owned()));
                }
                // Some servers open each stream with an empty message.
                Some((_, [])) | None => {}
                Some((other, _)) => bail!("there was something on stream {other}"),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use tokio_tungstenite::tungstenite::handshake::server::{Request, Response};

    use super::*;

    /// A client of a server that sends `messages` and closes.
    async fn client_of(messages: &'static [&'static [u8]]) -> Streams {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}/attach/token", listener.local_addr().unwrap());
        tokio::spawn(async move {
            let (stream, _) = listener.accept().await.unwrap();
            #[allow(clippy::result_large_err)]
            let agree = |request: &Request, mut response: Response| {
                assert_eq!(request.uri().path(), "/attach/token");
                let protocol = request.headers()[SEC_WEBSOCKET_PROTOCOL].clone();
                response.headers_mut().insert(SEC_WEBSOCKET_PROTOCOL, protocol);
                Ok(response)
            };
            let mut socket = tokio_tungstenite::accept_hdr_async(stream, agree).await.unwrap();
            for &message in messages {
                socket.send(Message::Binary(message.into())).await.unwrap();
            }
        });
        Streams::connect(&url).await.unwrap()
    }

    #[tokio::test]
    async fn output_is_counted_and_the_status_is_the_end() {
        let mut client = client_of(&[&[1], &[3], b"\x01output", b"\x03{}"]).await;
        assert!(matches!(client.next().await.unwrap(), Said::Output(6)));
        assert!(matches!(client.next().await.unwrap(), Said::Ended(status) if status == "{}"));
        assert!(client.next().await.is_err());
    }

    #[tokio::test]
    async fn errors_of_the_command_are_no_output() {
        assert!(client_of(&[b"\x02not found"]).await.next().await.is_err());
        assert!(Streams::connect("https://127.0.0.1/exec/token").await.is_err());
    }
}
