//! The records of a log file as CRI has it: `TIME STREAM TAG TEXT`, where the tag `P` says that the
//! line goes on in the next record of the stream, and `F` that it does not.

use std::fs::File;
use std::io::{BufRead, BufReader, ErrorKind};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use anyhow::Context;
use chrono::DateTime;

/// One record.
#[derive(Debug, PartialEq, Eq)]
pub struct Record {
    /// The time as the log has it.
    pub time: String,
    /// The same time, nanoseconds since 1970.
    pub nanos: i64,
    /// Whether it is standard error's.
    pub is_error: bool,
    /// Whether a line begins with it.
    pub begins_line: bool,
    /// Whether the line ends with it.
    pub ends_line: bool,
    /// The text, without the line's end.
    pub text: Vec<u8>,
}

/// Reads a log that may grow, and be replaced by a new file.
pub struct Reader {
    path: PathBuf,
    file: BufReader<File>,
    /// The beginning of a record whose end is not written yet.
    partial: Vec<u8>,
    /// Whether the last record of standard output, and of standard error, was a line's end.
    ended: [bool; 2],
}

impl Reader {
    /// Opens the log.
    ///
    /// # Errors
    /// The kernel's.
    pub fn open(path: &Path) -> anyhow::Result<Self> {
        let file = File::open(path).with_context(|| format!("open the log {}", path.display()))?;
        Ok(Self { path: path.to_owned(), file: BufReader::new(file), partial: Vec::new(), ended: [true; 2] })
    }

    /// The next record; nothing at the end of what is written. Lines that are no records are
    /// left out.
    ///
    /// # Errors
    /// The kernel's.
    pub fn next(&mut self) -> anyhow::Result<Option<Record>> {
        loop {
            let read = self.file.read_until(b'\n', &mut self.partial);
            read.with_context(|| format!("read the log {}", self.path.display()))?;
            if self.partial.last() != Some(&b'\n') {
                return Ok(None);
            }
            self.partial.pop();
            let line = std::mem::take(&mut self.partial);
            if let Some(mut record) = parse(line) {
                let [output, error] = &mut self.ended;
                let ended = if record.is_error { error } else { output };
                record.begins_line = std::mem::replace(ended, record.ends_line);
                return Ok(Some(record));
            }
        }
    }

    /// Goes on with the file that has taken the place of this one; false if there is none.
    ///
    /// # Errors
    /// The kernel's.
    pub fn reopen(&mut self) -> anyhow::Result<bool> {
        let there = match std::fs::metadata(&self.path) {
            Ok(there) => there,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(false),
            Err(error) => return Err(error.into()),
        };
        if there.ino() == self.file.get_ref().metadata()?.ino() {
            return Ok(false);
        }
        *self = Self { ended: self.ended, ..Self::open(&self.path)? };
        Ok(true)
    }
}

fn parse(line: Vec<u8>) -> Option<Record> {
    let mut parts = line.splitn(4, |byte| *byte == b' ');
    let mut word = || parts.next().and_then(|part| std::str::from_utf8(part).ok());
    let (time, stream, tag) = (word()?.to_owned(), word()?.to_owned(), word()?.to_owned());
    let nanos = DateTime::parse_from_rfc3339(&time).ok()?.timestamp_nanos_opt()?;
    let is_error = match stream.as_str() {
        "stdout" => false,
        "stderr" => true,
        _ => return None,
    };
    let ends_line = tag.split(':').next() == Some("F");
    let text = parts.next().unwrap_or_default().to_vec();
    Some(Record { time, nanos, is_error, begins_line: true, ends_line, text })
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[test]
    fn records_are_read_as_they_are_written() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("log");
        let mut file = File::create(&path).unwrap();
        let mut reader = Reader::open(&path).unwrap();
        let text =
            |reader: &mut Reader| reader.next().unwrap().map(|one| String::from_utf8(one.text).unwrap());
        assert_eq!(text(&mut reader), None);
        file.write_all(b"1970-01-01T00:00:01.5Z stdout F one\nno record\n1970-01-01T00:00:02Z st").unwrap();
        assert_eq!(text(&mut reader).as_deref(), Some("one"));
        assert_eq!(text(&mut reader), None);
        file.write_all(b"derr P a b \n").unwrap();
        let record = reader.next().unwrap().unwrap();
        assert_eq!((record.is_error, record.ends_line, record.nanos), (true, false, 2_000_000_000));
        assert_eq!(record.text, b"a b ");
        assert!(!reader.reopen().unwrap());
        std::fs::rename(&path, folder.path().join("old")).unwrap();
        assert!(!reader.reopen().unwrap());
        std::fs::write(&path, "1970-01-01T00:00:03Z stdout F \n1970-01-01T00:00:03Z stderr F c\n").unwrap();
        assert!(reader.reopen().unwrap());
        assert_eq!(text(&mut reader).as_deref(), Some(""));
        assert!(!reader.next().unwrap().unwrap().begins_line);
    }
}
