//! `husk logs`: the output of a container, from its log file.

use std::collections::VecDeque;
use std::io::Write;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, bail};
use husk_config::Config;
use husk_proto::cri;

use super::client::{self, Client};
use super::find;
use super::output::time;

mod reader;

use reader::{Reader, Record};

/// The time between two looks at a log that is followed.
const LOOK_AGAIN: Duration = Duration::from_millis(100);

/// Prints the output of a container from its log.
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  husk logs -f --since 10m web")]
pub struct Arguments {
    /// The container's id, the beginning of its id, or its name.
    container: String,
    /// Go on with what the container writes, until it ends.
    #[arg(short, long)]
    follow: bool,
    /// Print only the last lines; `all` for everything.
    #[arg(short = 'n', long, value_name = "LINES", default_value = "all")]
    tail: String,
    /// Leave out what is older: a duration before now (`10m`), or a time (`2026-01-31T12:00:00Z`).
    #[arg(long, value_name = "TIME")]
    since: Option<String>,
    /// Leave out what is newer.
    #[arg(long, value_name = "TIME")]
    until: Option<String>,
    /// Begin each line with the time at which it was written.
    #[arg(short, long)]
    timestamps: bool,
}

/// Prints the log: standard output to the standard output, standard error to standard error.
pub async fn run(arguments: &Arguments, config: &Config) -> anyhow::Result<()> {
    let printer = Printer::new(arguments)?;
    let tail = match arguments.tail.as_str() {
        "all" => None,
        lines => Some(lines.parse::<usize>().context("--tail: write a number of lines, or `all`")?),
    };
    let mut client = client::connect(&config.socket).await?;
    let container = find::container(&mut client, &arguments.container).await?;
    let path = log_path(&mut client, &container.id).await?;
    let mut reader = Reader::open(Path::new(&path))?;
    printer.print_all(newest(&mut reader, tail, |record| printer.takes(record))?)?;
    if !arguments.follow {
        return Ok(());
    }
    loop {
        // The state comes first: what is written after it is read after it.
        let runs = runs(&mut client, &container.id).await;
        let mut read = false;
        while let Some(record) = reader.next()? {
            read = true;
            printer.print(&record)?;
        }
        if !runs && !reader.reopen()? {
            return Ok(());
        }
        if !read && !reader.reopen()? {
            tokio::time::sleep(LOOK_AGAIN).await;
        }
    }
}

async fn log_path(client: &mut Client, id: &str) -> anyhow::Result<String> {
    let path = find::status(client, id).await?.status.unwrap_or_default().log_path;
    if path.is_empty() {
        bail!("container {id} has no log: the pod has no log directory, or the container no log path");
    }
    Ok(path)
}

/// Whether the container may still write.
async fn runs(client: &mut Client, id: &str) -> bool {
    let request = cri::ContainerStatusRequest { container_id: id.to_owned(), verbose: false };
    match client.container_status(request).await {
        Ok(answer) => matches!(
            answer.into_inner().status.unwrap_or_default().state(),
            cri::ContainerState::ContainerCreated | cri::ContainerState::ContainerRunning
        ),
        // huskd that is away comes back, and the container goes on meanwhile.
        Err(status) => status.code() != tonic::Code::NotFound,
    }
}

/// The records that are in the log now: all, or those of the last lines.
fn newest(
    reader: &mut Reader,
    lines: Option<usize>,
    takes: impl Fn(&Record) -> bool,
) -> anyhow::Result<VecDeque<Record>> {
    let (mut records, mut whole) = (VecDeque::new(), 0);
    while let Some(record) = reader.next()? {
        if !takes(&record) {
            continue;
        }
        whole += usize::from(record.ends_line);
        records.push_back(record);
        while lines.is_some_and(|lines| whole > lines) {
            whole -= usize::from(records.pop_front().is_some_and(|record| record.ends_line));
        }
    }
    if lines == Some(0) {
        records.clear();
    }
    Ok(records)
}

/// Prints records as the flags say.
struct Printer {
    since: i64,
    until: i64,
    timestamps: bool,
}

impl Printer {
    fn new(arguments: &Arguments) -> anyhow::Result<Self> {
        let point = |given: &Option<String>| given.as_deref().map(time::point).transpose();
        Ok(Self {
            since: point(&arguments.since).context("--since")?.unwrap_or(i64::MIN),
            until: point(&arguments.until).context("--until")?.unwrap_or(i64::MAX),
            timestamps: arguments.timestamps,
        })
    }

    fn takes(&self, record: &Record) -> bool {
        (self.since..=self.until).contains(&record.nanos)
    }

    fn print_all(&self, records: VecDeque<Record>) -> anyhow::Result<()> {
        records.iter().try_for_each(|record| self.print(record))
    }

    fn print(&self, record: &Record) -> anyhow::Result<()> {
        if !self.takes(record) {
            return Ok(());
        }
        if record.is_error {
            self.write(record, &mut std::io::stderr().lock())
        } else {
            self.write(record, &mut std::io::stdout().lock())
        }
    }

    fn write(&self, record: &Record, output: &mut impl Write) -> anyhow::Result<()> {
        if self.timestamps && record.begins_line {
            write!(output, "{} ", record.time)?;
        }
        output.write_all(&record.text)?;
        if record.ends_line {
            output.write_all(b"\n")?;
        }
        Ok(output.flush()?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn log(lines: &[&str]) -> (tempfile::TempDir, Reader) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("log");
        std::fs::write(&path, lines.concat()).unwrap();
        let reader = Reader::open(&path).unwrap();
        (folder, reader)
    }

    #[test]
    fn the_last_lines_are_whole_ones() {
        let lines = [
            "1970-01-01T00:00:01Z stdout F one\n",
            "1970-01-01T00:00:02Z stdout P two \n",
            "1970-01-01T00:00:02Z stdout F halves\n",
            "1970-01-01T00:00:03Z stderr F three\n",
        ];
        let texts = |lines: Option<usize>, reader: &mut Reader| {
            let records = newest(reader, lines, |_| true).unwrap();
            records
                .iter()
                .map(|one| String::from_utf8_lossy(&one.text).into_owned())
                .collect::<Vec<_>>()
                .join("|")
        };
        for (tail, want) in [(None, "one|two |halves|three"), (Some(2), "two |halves|three"), (Some(0), "")] {
            let (_folder, mut reader) = log(&lines);
            assert_eq!(texts(tail, &mut reader), want, "{tail:?}");
        }
    }

    #[test]
    fn times_choose_records_and_begin_lines() {
        let (_folder, mut reader) =
            log(&["1970-01-01T00:00:01Z stdout P a\n", "1970-01-01T00:00:02Z stdout F b\n"]);
        let printer = Printer { since: 0, until: 1_500_000_000, timestamps: true };
        let mut output = Vec::new();
        let mut taken = 0;
        while let Some(record) = reader.next().unwrap() {
            taken += usize::from(printer.takes(&record));
            printer.write(&record, &mut output).unwrap();
        }
        assert_eq!((taken, String::from_utf8(output).unwrap().as_str()), (1, "1970-01-01T00:00:01Z ab\n"));
    }
}
