//! The memory, processor time and network traffic of the whole machine.

use std::fs;

use husk_proto::agent::{InterfaceStat, MachineStat};

/// Ticks of `/proc/stat` per second (`USER_HZ`, the same on all architectures
/// of today).
const TICKS_PER_SECOND: u64 = 100;

/// Reads the current values.
pub fn stat() -> MachineStat {
    let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
    let memory = read("/proc/meminfo");
    MachineStat {
        memory_total_bytes: kilobytes(&memory, "MemTotal"),
        memory_available_bytes: kilobytes(&memory, "MemAvailable"),
        cpu_usage_nanos: busy_ticks(&read("/proc/stat")).saturating_mul(1_000_000_000 / TICKS_PER_SECOND),
        agent_rss_bytes: kilobytes(&read("/proc/self/status"), "VmRSS"),
        interfaces: interfaces(&read("/proc/net/dev")),
    }
}

/// Parses `/proc/net/dev`: two lines of headings, then one line per interface:
/// `<name>: <8 numbers of received data> <8 of sent data>`.
fn interfaces(text: &str) -> Vec<InterfaceStat> {
    let line = |line: &str| {
        let (name, numbers) = line.split_once(':')?;
        let numbers: Vec<u64> = numbers.split_whitespace().map(|word| word.parse().unwrap_or(0)).collect();
        let at = |index: usize| numbers.get(index).copied().unwrap_or(0);
        let name = name.trim();
        (name != "lo").then(|| InterfaceStat {
            name: name.to_owned(),
            rx_bytes: at(0),
            rx_packets: at(1),
            rx_errors: at(2),
            rx_dropped: at(3),
            tx_bytes: at(8),
            tx_packets: at(9),
            tx_errors: at(10),
            tx_dropped: at(11),
        })
    };
    text.lines().skip(2).filter_map(line).collect()
}

fn kilobytes(text: &str, key: &str) -> u64 {
    let value = text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(':'));
    let kilobytes = value.and_then(|value| value.trim().trim_end_matches("kB").trim().parse::<u64>().ok());
    kilobytes.unwrap_or(0).saturating_mul(1024)
}

/// Ticks that all processors together were busy: the first line of `/proc/stat`
/// without idle and iowait, and without the guest times, which are already in
/// user and nice (proc_stat(5)).
fn busy_ticks(stat: &str) -> u64 {
    let Some(all) = stat.lines().find_map(|line| line.strip_prefix("cpu ")) else { return 0 };
    let ticks = all.split_whitespace().map(|field| field.parse::<u64>().unwrap_or(0));
    ticks.take(8).enumerate().filter(|(at, _)| !matches!(at, 3 | 4)).map(|(_, ticks)| ticks).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_told_in_bytes() {
        let text = "MemTotal:         249000 kB\nMemFree:  1 kB\nMemAvailable:     200000 kB\n";
        assert_eq!(kilobytes(text, "MemTotal"), 249_000 * 1024);
        assert_eq!(kilobytes(text, "MemAvailable"), 200_000 * 1024);
        assert_eq!(kilobytes(text, "Mem"), 0);
    }

    #[test]
    fn idle_time_is_no_use() {
        let text = "cpu  10 20 30 1000 500 1 2 3 7 8\ncpu0 1 1 1 1\n";
        assert_eq!(busy_ticks(text), 10 + 20 + 30 + 1 + 2 + 3);
        assert_eq!(busy_ticks(""), 0);
    }

    #[test]
    fn interfaces_count_without_loopback() {
        let text = "Inter-|   Receive                                                |  Transmit\n \
            face |bytes    packets errs drop fifo frame compressed multicast|bytes    packets errs drop fifo colls carrier compressed\n    \
            lo:  10 1 0 0 0 0 0 0 10 1 0 0 0 0 0 0\n  \
            eth0: 1500 12 1 2 0 0 0 0 900 8 3 4 0 0 0 0\nbroken\n";
        let found = interfaces(text);
        assert_eq!(found.len(), 1, "{found:?}");
        let eth0 = found.first().cloned().unwrap_or_default();
        assert_eq!(
            (eth0.name.as_str(), eth0.rx_bytes, eth0.rx_packets, eth0.rx_errors, eth0.rx_dropped),
            ("eth0", 1500, 12, 1, 2)
        );
        assert_eq!((eth0.tx_bytes, eth0.tx_packets, eth0.tx_errors, eth0.tx_dropped), (900, 8, 3, 4));
    }

    #[test]
    fn this_machine_has_figures() {
        let stat = stat();
        assert!(stat.memory_total_bytes >= stat.memory_available_bytes);
        assert!(stat.agent_rss_bytes > 0 && stat.cpu_usage_nanos > 0);
    }
}
