//! Formats the figures for a person.

use std::fmt::Write;

use super::{Measurement, Runtime};
use crate::inside::files::Speeds;
use crate::statistics::Spread;

type Figure<T> = (&'static str, fn(&T) -> Option<Spread>);

/// Figures of which less is better.
const TIMES: [Figure<Runtime>; 2] = [
    ("ExecSync of `true`, ms", |runtime| Some(runtime.exec.sync)),
    ("Exec of `true`, ms", |runtime| Some(runtime.exec.streamed)),
];

/// Figures of which more is better.
const SPEEDS: [Figure<Runtime>; 4] = [
    ("output to the log, MiB/s", |runtime| Some(runtime.output.log)),
    ("output to a client, MiB/s", |runtime| Some(runtime.output.attached)),
    ("port, from the pod, MiB/s", |runtime| runtime.ports.map(|ports| ports.from_pod)),
    ("port, to the pod, MiB/s", |runtime| runtime.ports.map(|ports| ports.to_pod)),
];

/// Speeds of a volume; more is better.
const FILES: [Figure<Speeds>; 7] = [
    ("create, 1/s", |files| Some(files.create)),
    ("stat, 1/s", |files| Some(files.stat)),
    ("rename, 1/s", |files| Some(files.rename)),
    ("unlink, 1/s", |files| Some(files.unlink)),
    ("write and fsync, MiB/s", |files| Some(files.write)),
    ("read, MiB/s", |files| Some(files.read)),
    ("read again, MiB/s", |files| Some(files.read_again)),
];

/// Husk comes first. It is compared with the others, and every runtime's volume with a directory of the host.
pub fn render(all: &Measurement) -> String {
    let mut text = String::new();
    streams(&mut text, &all.runtimes);
    for runtime in &all.runtimes {
        files(&mut text, runtime, &all.host_files);
    }
    text
}

fn streams(text: &mut String, runtimes: &[Runtime]) {
    let Some((husk, peers)) = runtimes.split_first() else { return };
    let mut heads = cell(&husk.name);
    for peer in peers {
        heads += &cell(&peer.name);
        heads += &ratio_head(&peer.name);
    }
    line(text, format_args!("\n{:<26}{heads}", "median (min to max)"));
    for (name, figure) in TIMES.into_iter().chain(SPEEDS) {
        let Some(ours) = figure(husk) else { continue };
        let mut cells = cell(&spread(ours));
        for peer in peers {
            let Some(theirs) = figure(peer) else { continue };
            cells += &cell(&spread(theirs));
            cells += &ratio(ours, theirs);
        }
        line(text, format_args!("{name:<26}{cells}"));
    }
}

fn files(text: &mut String, runtime: &Runtime, host: &Speeds) {
    let heads = [cell(&runtime.name), cell("host"), ratio_head("host")].concat();
    line(text, format_args!("\n{:<26}{heads}", "files of a volume"));
    for (name, figure) in FILES {
        if let (Some(ours), Some(hosts)) = (figure(&runtime.files), figure(host)) {
            let cells = [cell(&spread(ours)), cell(&spread(hosts)), ratio(ours, hosts)].concat();
            line(text, format_args!("{name:<26}{cells}"));
        }
    }
}

fn cell(words: &str) -> String {
    format!("{words:>26}")
}

fn ratio_head(of: &str) -> String {
    format!("{:>16}", format!("/ {of}"))
}

fn ratio(ours: Spread, theirs: Spread) -> String {
    format!("{:>16.3}", ours.median / theirs.median)
}

fn spread(Spread { min, median, max }: Spread) -> String {
    let number = |value: f64| if value < 100.0 { format!("{value:.1}") } else { format!("{value:.0}") };
    format!("{} ({} to {})", number(median), number(min), number(max))
}

/// Writing to a string cannot fail.
fn line(text: &mut String, arguments: std::fmt::Arguments<'_>) {
    let _ = writeln!(text, "{arguments}");
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::super::{exec::Exec, output::Output, ports::Ports};
    use super::*;

    fn spread_of(median: f64) -> Spread {
        Spread { min: median / 2.0, median, max: median * 2.0 }
    }

    fn speeds(median: f64) -> Speeds {
        let spread = spread_of(median);
        Speeds {
            create: spread,
            stat: spread,
            rename: spread,
            unlink: spread,
            write: spread,
            read: spread,
            read_again: spread,
            seconds: 1.0,
        }
    }

    fn runtime(name: &str, median: f64, ports: bool) -> Runtime {
        let spread = spread_of(median);
        Runtime {
            name: name.into(),
            version: "1".into(),
            handler: String::new(),
            exec: Exec { sync: spread, streamed: spread },
            output: Output { log: spread, attached: spread },
            ports: ports.then_some(Ports { from_pod: spread, to_pod: spread }),
            files: speeds(median),
        }
    }

    fn rendered(runtimes: Vec<Runtime>) -> String {
        let host_files = speeds(1000.0);
        render(&Measurement { runtimes, host_files, mebibytes: 1, small_files: 1, large_file_mib: 1 })
    }

    fn found<'a>(text: &'a str, start: &str) -> Vec<&'a str> {
        text.lines().filter(|line| line.starts_with(start)).collect()
    }

    #[test]
    fn husk_is_divided_by_its_peers_and_everyone_by_the_host() {
        let text = rendered(vec![runtime("husk", 100.0, true), runtime("containerd", 400.0, true)]);
        assert!(found(&text, "ExecSync")[0].ends_with("400 (200 to 800)           0.250"), "{text}");
        let created = found(&text, "create");
        assert!(created[0].ends_with("0.100") && created[1].ends_with("0.400"), "{text}");
    }

    #[test]
    fn without_a_peer_there_is_no_ratio_and_without_crictl_no_port() {
        let text = rendered(vec![runtime("husk", 50.0, false)]);
        assert!(found(&text, "ExecSync")[0].ends_with("50.0 (25.0 to 100)"), "{text}");
        assert!(found(&text, "port").is_empty(), "{text}");
    }
}
