//! Measures how much of the host's memory a process holds, and which part of it
//! belongs to a guest.

use std::io;

use serde::Serialize;

/// A machine's memory is at least this large. Nothing else that a VMM maps readable
/// and writable in one piece is as large.
const SMALLEST_GUEST: u64 = 48 << 20;

/// The end of the name of a guest root image that is mapped into a machine.
const ROOT_IMAGE: &str = ".erofs";

/// Memory of a process or a part of it, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Memory {
    /// Resident pages, shared or not.
    pub resident: u64,
    /// Resident pages, each divided by the number of processes that map it.
    pub proportional: u64,
}

impl std::ops::AddAssign for Memory {
    fn add_assign(&mut self, other: Self) {
        self.resident += other.resident;
        self.proportional += other.proportional;
    }
}

/// The memory of a process: its own, and its guest's.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Split {
    pub own: Memory,
    pub guest: Memory,
}

impl std::ops::AddAssign for Split {
    fn add_assign(&mut self, other: Self) {
        self.own += other.own;
        self.guest += other.guest;
    }
}

/// Reads the figures of a process.
pub fn of_process(pid: u32) -> io::Result<Split> {
    std::fs::read_to_string(format!("/proc/{pid}/smaps")).map(|smaps| split(&smaps))
}

/// One mapping of `/proc/PID/smaps`.
#[derive(Debug, Default)]
struct Mapping {
    start: u64,
    end: u64,
    writable: bool,
    root_image: bool,
    memory: Memory,
}

/// Guest memory is each mapping of at least [`SMALLEST_GUEST`], and the guest root
/// image. A kernel that is mapped from its file into the middle of such a mapping
/// belongs to it.
fn split(smaps: &str) -> Split {
    let mut all = Split::default();
    let mut piece: Vec<Mapping> = Vec::new();
    let mut finish = |piece: &mut Vec<Mapping>| {
        let length: u64 = piece.iter().map(|mapping| mapping.end - mapping.start).sum();
        for mapping in piece.drain(..) {
            let of_guest = length >= SMALLEST_GUEST || mapping.root_image;
            *(if of_guest { &mut all.guest } else { &mut all.own }) += mapping.memory;
        }
    };
    for mapping in mappings(smaps) {
        let continues = piece.last().is_some_and(|last| last.end == mapping.start && last.writable);
        if !(continues && mapping.writable) {
            finish(&mut piece);
        }
        piece.push(mapping);
    }
    finish(&mut piece);
    all
}

fn mappings(smaps: &str) -> Vec<Mapping> {
    let mut mappings: Vec<Mapping> = Vec::new();
    for line in smaps.lines() {
        let mut words = line.split_ascii_whitespace();
        let Some(first) = words.next() else { continue };
        let second = words.next().unwrap_or_default();
        if let Some((start, end)) = range(first) {
            let (writable, root_image) = (second.contains("rw"), line.ends_with(ROOT_IMAGE));
            mappings.push(Mapping { start, end, writable, root_image, ..Default::default() });
        } else if let Some(mapping) = mappings.last_mut() {
            let bytes = second.parse::<u64>().unwrap_or(0) * 1024;
            match first {
                "Rss:" => mapping.memory.resident = bytes,
                "Pss:" => mapping.memory.proportional = bytes,
                _ => {}
            }
        }
    }
    mappings
}

/// Parses `7f0000000000-7f0000001000`.
fn range(word: &str) -> Option<(u64, u64)> {
    let (start, end) = word.split_once('-')?;
    let range = (u64::from_str_radix(start, 16).ok()?, u64::from_str_radix(end, 16).ok()?);
    (range.0 <= range.1).then_some(range)
}

/// Reads how much memory the host still has available, by its own estimate.
pub fn available() -> io::Result<u64> {
    let text = std::fs::read_to_string("/proc/meminfo")?;
    let kibibytes = text
        .lines()
        .find_map(|line| line.strip_prefix("MemAvailable:"))
        .and_then(|rest| rest.split_ascii_whitespace().next())
        .and_then(|number| number.parse::<u64>().ok());
    kibibytes.map(|number| number * 1024).ok_or_else(|| io::Error::other("/proc/meminfo has no MemAvailable"))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    /// A program, a guest of 256 MiB with its kernel mapped at 16 MiB, and a
    /// heap arena that is reserved but not writable.
    const SMAPS: &str = "\
55d000000000-55d000100000 r-xp 00000000 fe:00 1 /usr/bin/husk-vmm
Size:               1024 kB
Rss:                 800 kB
Pss:                 400 kB
7f0000000000-7f0001000000 rw-p 00000000 00:00 0
Rss:                  40 kB
Pss:                  40 kB
7f0001000000-7f0002000000 rw-p 00200000 fe:00 2 /usr/share/husk/vmlinux
Rss:                3000 kB
Pss:                 300 kB
7f0002000000-7f0010000000 rw-p 00000000 00:00 0
Rss:               20000 kB
Pss:               20000 kB
7f0010000000-7f0010021000 rw-p 00000000 00:00 0 [heap]
Rss:                   4 kB
Pss:                   4 kB
7f0018000000-7f0019000000 rw-p 00000000 fe:00 3 /usr/share/husk/rootfs.erofs
Rss:                 500 kB
Pss:                  50 kB
7f0020000000-7f0020021000 rw-p 00000000 00:00 0
Rss:                  60 kB
Pss:                  60 kB
7f0020021000-7f0024000000 ---p 00000000 00:00 0
Rss:                   0 kB
Pss:                   0 kB
VmFlags: mr mw me
";

    #[test]
    fn the_guest_is_told_from_its_vmm() {
        let smaps = SMAPS.replace("7f0010000000-7f0010021000", "7f0011000000-7f0011021000");
        let split = split(&smaps);
        assert_eq!(split.guest, Memory { resident: 23_540 << 10, proportional: 20_390 << 10 });
        assert_eq!(split.own, Memory { resident: 864 << 10, proportional: 464 << 10 });
    }

    #[test]
    fn a_process_without_a_guest_is_all_its_own() {
        let split = of_process(std::process::id()).unwrap();
        assert!(split.own.resident > 0 && split.own.resident >= split.own.proportional);
        assert_eq!(split.guest, Memory::default());
    }
}
