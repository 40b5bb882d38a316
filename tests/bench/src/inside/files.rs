//! Measures small files that are made, looked up, renamed and removed, and a large file that is written and read.

use std::fs::File;
use std::io::{Read, Write};
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
use serde::{Deserialize, Serialize};

use super::MIB;
use crate::statistics::Spread;

/// How long the large file is left alone before it is read.
const SETTLED: Duration = Duration::from_millis(500);

/// How much work is done.
#[derive(Clone, Copy, Debug, clap::Args)]
pub struct Amount {
    /// Number of small files.
    #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..))]
    pub files: u32,
    /// Size of the large file, MiB.
    #[arg(long, default_value_t = 16, value_parser = clap::value_parser!(u64).range(1..))]
    pub file_mib: u64,
    /// Number of rounds.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u16).range(1..))]
    pub rounds: u16,
}

/// The speeds that were measured.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct Speeds {
    /// Files made in a second, each with a few bytes in it.
    pub create: Spread,
    /// Files looked up in a second, with nothing about them cached.
    pub stat: Spread,
    /// Files renamed in a second.
    pub rename: Spread,
    /// Files removed in a second.
    pub unlink: Spread,
    /// MiB written in a second, up to the end of `fsync`.
    pub write: Spread,
    /// MiB read in a second, none of which is in the reader's page cache.
    pub read: Spread,
    /// MiB read in a second when the file is read once more.
    pub read_again: Spread,
    /// Seconds that all of this took, by the clock of the measuring program.
    pub seconds: f64,
}

/// A file server's answers about names and attributes are cached for a second at most.
const FORGET: Duration = Duration::from_millis(1500);

/// Does all of the work in `folder`, and leaves nothing there.
pub fn measure(folder: &Path, amount: Amount) -> anyhow::Result<Speeds> {
    let started = Instant::now();
    let place = tempfile::tempdir_in(folder).context("make a folder")?;
    let mut rounds = Vec::new();
    for _ in 0..amount.rounds {
        let small = small(place.path(), amount.files)?;
        rounds.push((small, large(&place.path().join("large"), amount.file_mib)?));
    }
    let spread = |of: &dyn Fn(&(Small, Large)) -> f64| Spread::of(rounds.iter().map(of)).context("no rounds");
    Ok(Speeds {
        create: spread(&|(small, _)| small.create)?,
        stat: spread(&|(small, _)| small.stat)?,
        rename: spread(&|(small, _)| small.rename)?,
        unlink: spread(&|(small, _)| small.unlink)?,
        write: spread(&|(_, large)| large.write)?,
        read: spread(&|(_, large)| large.read)?,
        read_again: spread(&|(_, large)| large.read_again)?,
        seconds: started.elapsed().as_secs_f64(),
    })
}

struct Small {
    create: f64,
    stat: f64,
    rename: f64,
    unlink: f64,
}

fn small(folder: &Path, count: u32) -> anyhow::Result<Small> {
    let old = |number| folder.join(format!("old-{number}"));
    let new = |number| folder.join(format!("new-{number}"));
    let each = |step: &dyn Fn(u32) -> std::io::Result<()>| {
        let started = Instant::now();
        (0..count).try_for_each(step)?;
        anyhow::Ok(f64::from(count) / started.elapsed().as_secs_f64())
    };
    let forgetful = |step: &dyn Fn(u32) -> std::io::Result<()>| {
        std::thread::sleep(FORGET);
        each(step)
    };
    Ok(Small {
        create: each(&|number| std::fs::write(old(number), b"a few bytes")).context("make files")?,
        stat: forgetful(&|number| old(number).metadata().map(drop)).context("look at files")?,
        rename: forgetful(&|number| std::fs::rename(old(number), new(number))).context("rename files")?,
        unlink: forgetful(&|number| std::fs::remove_file(new(number))).context("remove files")?,
    })
}

struct Large {
    write: f64,
    read: f64,
    read_again: f64,
}

fn large(path: &Path, mebibytes: u64) -> anyhow::Result<Large> {
    let mut piece = vec![b'x'; MIB as usize];
    let started = Instant::now();
    let mut file = File::create(path).context("make a file")?;
    for _ in 0..mebibytes {
        file.write_all(&piece).context("write a file")?;
    }
    file.sync_all().context("store a file")?;
    let write = mebibytes as f64 / started.elapsed().as_secs_f64();
    // Stored data leaves the page cache on this advice, unless it is stored in the page cache alone.
    posix_fadvise(&file, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED).context("forget a file")?;
    drop(file);
    // Most files that are read again are not of this moment, in which another change might have the same time.
    thread::sleep(SETTLED);

    let mut read = || {
        let started = Instant::now();
        let mut file = File::open(path).context("open a file")?;
        let mut bytes = 0;
        loop {
            match file.read(&mut piece).context("read a file")? {
                0 => break,
                length => bytes += length as u64,
            }
        }
        ensure!(bytes == mebibytes * MIB, "{bytes} bytes came back of {mebibytes} MiB");
        Ok(mebibytes as f64 / started.elapsed().as_secs_f64())
    };
    let speeds = Large { write, read: read()?, read_again: read()? };
    std::fs::remove_file(path).context("remove a file")?;
    Ok(speeds)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn all_is_measured_and_nothing_is_left() {
        let folder = tempfile::tempdir().unwrap();
        let speeds = measure(folder.path(), Amount { files: 3, file_mib: 2, rounds: 1 }).unwrap();
        for spread in [speeds.create, speeds.stat, speeds.rename, speeds.unlink, speeds.write, speeds.read] {
            assert!(spread.min > 0.0 && spread.min == spread.max, "{spread:?}");
        }
        assert!(speeds.seconds > 3.0 * FORGET.as_secs_f64());
        assert_eq!(folder.path().read_dir().unwrap().count(), 0);
        assert!(measure(&folder.path().join("none"), Amount { files: 1, file_mib: 1, rounds: 1 }).is_err());
    }
}
