//! The size of the client's terminal, as its resize stream tells it: JSON
//! objects, one after the other.

use bytes::Bytes;
use serde::Deserialize;

use super::pipe::Incoming;

/// Most bytes of an object.
const MAX_OBJECT: usize = 1024;

/// The size of a terminal.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
pub struct Size {
    /// Characters of a line.
    #[serde(rename = "Width")]
    pub columns: u16,
    /// Number of lines.
    #[serde(rename = "Height")]
    pub rows: u16,
}

/// Reads sizes off a stream.
#[derive(Debug)]
pub struct Sizes {
    stream: Incoming,
    rest: Vec<u8>,
}

impl Sizes {
    /// Makes a reader of a resize stream.
    #[must_use]
    pub const fn new(stream: Incoming) -> Self {
        Self { stream, rest: Vec::new() }
    }

    /// The next size; `None` at the stream's end, and when it makes no sense.
    pub async fn next(&mut self) -> Option<Size> {
        loop {
            match self.parse() {
                Some(Ok(size)) => return Some(size),
                Some(Err(())) => return None,
                None => {}
            }
            let more: Bytes = self.stream.recv().await?;
            if self.rest.len().saturating_add(more.len()) > MAX_OBJECT.saturating_add(super::pipe::PIECE) {
                return None;
            }
            self.rest.extend_from_slice(&more);
        }
    }

    /// The first size in what is there; `None` if it is not there as a whole.
    fn parse(&mut self) -> Option<Result<Size, ()>> {
        let mut values = serde_json::Deserializer::from_slice(&self.rest).into_iter::<Size>();
        let parsed = match values.next()? {
            Ok(size) => Ok(size),
            Err(error) if error.is_eof() && self.rest.len() <= MAX_OBJECT => return None,
            Err(_) => Err(()),
        };
        let consumed = values.byte_offset().min(self.rest.len());
        self.rest.drain(..consumed);
        Some(parsed)
    }
}

#[cfg(test)]
mod tests {
    use tokio::sync::mpsc;

    use super::*;

    async fn sizes(pieces: &[&'static str]) -> Vec<Size> {
        let (sender, stream) = mpsc::channel(pieces.len());
        for piece in pieces {
            sender.send(Bytes::from_static(piece.as_bytes())).await.unwrap();
        }
        drop(sender);
        let (mut sizes, mut all) = (Sizes::new(stream), Vec::new());
        while let Some(size) = sizes.next().await {
            all.push(size);
        }
        all
    }

    #[tokio::test]
    async fn sizes_come_whole_in_pieces_and_together() {
        let expected = [Size { columns: 80, rows: 24 }, Size { columns: 1, rows: 2 }];
        let (one, two) = (r#"{"Width":80,"Height":24}"#, r#"{"Width":1,"Height":2}"#);
        assert_eq!(sizes(&[one, "\n", two]).await, expected);
        assert_eq!(sizes(&["{\"Width\":80,\"Height\":24}\n{\"Width\":1,\"Height\":2}\n"]).await, expected);
        assert_eq!(sizes(&["{\"Width\":80,\"Hei", "ght\":24}\n", two]).await, expected);
    }

    #[tokio::test]
    async fn nonsense_ends_it() {
        assert_eq!(sizes(&["what?", r#"{"Width":1,"Height":2}"#]).await, []);
        assert_eq!(sizes(&[r#"{"Width":70000,"Height":2}"#]).await, []);
        assert_eq!(sizes(&["{\"Width\":                    "; 1000]).await, []);
    }
}
