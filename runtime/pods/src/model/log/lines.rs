//! Lines of a log in the CRI format: a stream of bytes becomes lines, and of lines can
//! be told how many bytes of the stream they hold.

use chrono::{SecondsFormat, Utc};
use husk_proto::agent::stream::Kind;

use super::position::Taken;

/// Longest text in one log line, bytes; the same as other runtimes use.
pub(super) const MAX_LINE: usize = 16 * 1024;

/// Cuts a stream of bytes into log lines.
#[derive(Debug, Default)]
pub(super) struct Pieces {
    /// Text since the last newline that is in no line yet.
    rest: Vec<u8>,
}

impl Pieces {
    /// Takes bytes of the stream, and appends the lines that are whole to `out`.
    pub(super) fn push(&mut self, bytes: &[u8], name: &str, out: &mut Vec<u8>) {
        let time = Utc::now();
        for part in bytes.split_inclusive(|byte| *byte == b'\n') {
            let (text, ends) = match part.split_last() {
                Some((b'\n', text)) => (text, true),
                _ => (part, false),
            };
            self.rest.extend_from_slice(text);
            while self.rest.len() > MAX_LINE {
                let later = self.rest.split_off(MAX_LINE);
                line(out, &time, name, b'P', &self.rest);
                self.rest = later;
            }
            if ends {
                line(out, &time, name, b'F', &self.rest);
                self.rest.clear();
            }
        }
    }

    /// The stream has ended: what is left is a line without its newline.
    pub(super) fn finish(&mut self, name: &str, out: &mut Vec<u8>) {
        if !self.rest.is_empty() {
            line(out, &Utc::now(), name, b'P', &self.rest);
            self.rest.clear();
        }
    }

    /// How many bytes of the stream are in no line yet.
    pub(super) fn waiting(&self) -> u64 {
        self.rest.len() as u64
    }
}

fn line(out: &mut Vec<u8>, time: &chrono::DateTime<Utc>, name: &str, tag: u8, text: &[u8]) {
    out.extend_from_slice(time.to_rfc3339_opts(SecondsFormat::Nanos, true).as_bytes());
    out.push(b' ');
    out.extend_from_slice(name.as_bytes());
    out.extend_from_slice(&[b' ', tag, b' ']);
    out.extend_from_slice(text);
    out.push(b'\n');
}

/// Adds the bytes of both streams that the whole lines of `log` hold. Returns the length
/// of these lines: a last line without its newline is not counted.
pub(super) fn count(log: &[u8], taken: &mut Taken) -> usize {
    let whole = log.iter().rposition(|byte| *byte == b'\n').map_or(0, |end| end + 1);
    for line in log.get(..whole).unwrap_or_default().split(|byte| *byte == b'\n') {
        let mut words = line.splitn(4, |byte| *byte == b' ').skip(1);
        let (Some(name), Some(tag), Some(text)) = (words.next(), words.next(), words.next()) else {
            continue;
        };
        let kind = match name {
            b"stdout" => Kind::Stdout,
            b"stderr" => Kind::Stderr,
            _ => continue,
        };
        taken.add(kind, text.len() as u64 + u64::from(tag == b"F"));
    }
    whole
}

#[cfg(test)]
mod tests {
    #![allow(clippy::indexing_slicing)]

    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// However the bytes arrive, the log holds all of them, in lines of bounded length,
        /// which tell how many there were.
        #[test]
        fn no_byte_is_lost(chunks in proptest::collection::vec(proptest::collection::vec(prop_oneof![Just(b'\n'), any::<u8>()], 0..40_000), 0..4)) {
            let mut pieces = Pieces::default();
            let mut out = Vec::new();
            for chunk in &chunks {
                pieces.push(chunk, "stderr", &mut out);
            }
            pieces.finish("stderr", &mut out);
            let mut text = Vec::new();
            for line in out.split_inclusive(|byte| *byte == b'\n') {
                let line = &line[31..line.len() - 1];
                prop_assert!(line.len() <= MAX_LINE + 9);
                text.extend_from_slice(&line[9..]);
                if line[7] == b'F' {
                    text.push(b'\n');
                }
            }
            let all = chunks.concat();
            let mut taken = Taken::default();
            prop_assert_eq!(count(&out, &mut taken), out.len());
            prop_assert_eq!((taken.of(Kind::Stderr), taken.of(Kind::Stdout)), (all.len() as u64, 0));
            prop_assert_eq!(text, all);
        }

        #[test]
        fn any_log_can_be_counted(log in proptest::collection::vec(prop_oneof![Just(b'\n'), Just(b' '), any::<u8>()], 0..500)) {
            prop_assert!(count(&log, &mut Taken::default()) <= log.len());
        }
    }

    #[test]
    fn a_line_that_was_not_written_to_its_end_does_not_count() {
        let log = b"t stdout F one\nt stderr P tw\nt stdout F \nt stdout F thr";
        let mut taken = Taken::default();
        assert_eq!(count(log, &mut taken), log.len() - b"t stdout F thr".len());
        assert_eq!((taken.of(Kind::Stdout), taken.of(Kind::Stderr)), (5, 2));
    }
}
