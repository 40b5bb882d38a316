//! The texts that a process which faces a guest leaves behind: its log, and the
//! exit record.
//!
//! Each text is in a file of a fixed size, which the process maps before it
//! handles any input of its guest, and then closes: from then on the process only
//! writes to memory. An attacker who takes over the process can garble the text,
//! but cannot fill the host's file system with it. The rest of the file behind
//! the text is zeroes.

use std::fmt;
use std::fs::File;
use std::io::{self, Read};
use std::num::NonZeroUsize;
use std::os::fd::AsFd;
use std::ptr::NonNull;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicUsize, Ordering};

use nix::libc;
use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};

/// Most bytes of a log; what comes later is lost.
pub const LOG_SIZE: usize = 16 << 10;

/// Most bytes of an exit record. It holds the console's tail, of which JSON makes
/// six bytes for each at worst, and the cause of the end.
pub const EXIT_SIZE: usize = 128 << 10;

/// Bytes of a page of memory.
const PAGE: usize = 4096;

/// A text in a mapped file.
#[derive(Debug)]
pub struct Words {
    start: NonNull<u8>,
    size: usize,
    used: AtomicUsize,
}

// SAFETY: the memory is written through `append` and `replace` alone, and is never
// read here: threads that write at once mix up their texts at worst, and each byte
// is copied to a place of the mapping.
unsafe impl Send for Words {}
// SAFETY: as above.
unsafe impl Sync for Words {}

impl Words {
    /// Extends a regular file to `size` bytes, and maps it to add text behind what
    /// the file already holds. The file must be open for reading and writing. Its
    /// space is allocated as the text grows.
    ///
    /// # Errors
    /// The file is not a regular one, or cannot be that large.
    pub fn map(file: &File, size: usize) -> io::Result<Self> {
        let metadata = file.metadata()?;
        if !metadata.is_file() {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a regular file"));
        }
        let used = usize::try_from(metadata.len()).unwrap_or(size).min(size);
        file.set_len(size as u64)?;
        let length = NonZeroUsize::new(size).ok_or(io::ErrorKind::InvalidInput)?;
        let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: a new mapping at a place of the kernel's choice.
        let start = unsafe { mmap(None, length, protection, MapFlags::MAP_SHARED, file.as_fd(), 0) };
        let start = start.inspect_err(|_| {
            // Other programs that append to the file continue behind its text.
            let _ = file.set_len(used as u64);
        })?;
        Ok(Self { start: start.cast(), size, used: used.into() })
    }

    /// Appends as much of `more` as there is room for. It takes no memory and no
    /// lock, so a signal handler may call it.
    pub fn append(&self, more: &[u8]) {
        let took = |used: usize| Some(used.saturating_add(more.len()).min(self.size));
        let at = self.used.fetch_update(Ordering::Relaxed, Ordering::Relaxed, took).unwrap_or(self.size);
        self.write(at, more);
    }

    /// Replaces the whole text by `text`, or by as much of it as there is room
    /// for.
    pub fn replace(&self, text: &[u8]) {
        self.used.store(text.len().min(self.size), Ordering::Relaxed);
        self.write(0, text);
    }

    fn write(&self, at: usize, text: &[u8]) {
        let at = at.min(self.size);
        let length = text.len().min(self.size - at);
        if length == 0 || !self.has_room(at, length) {
            return;
        }
        // SAFETY: `at + length` bytes are within the mapping, which lives as long
        // as `self`, and `text` is elsewhere.
        unsafe { std::ptr::copy_nonoverlapping(text.as_ptr(), self.start.as_ptr().add(at), length) }
    }

    /// Makes the file system allocate space for these bytes. Without that, a
    /// full file system would end the process (`SIGBUS`). Linux before 5.14
    /// cannot be asked.
    fn has_room(&self, at: usize, length: usize) -> bool {
        let first = at - at % PAGE;
        // SAFETY: pages of the mapping, whose content stays.
        let result = unsafe {
            let start = self.start.as_ptr().add(first);
            libc::madvise(start.cast(), at + length - first, libc::MADV_POPULATE_WRITE)
        };
        result == 0 || io::Error::last_os_error().raw_os_error() == Some(libc::EINVAL)
    }
}

impl Drop for Words {
    fn drop(&mut self) {
        // SAFETY: the mapping is this value's, and nobody has a pointer into it.
        let _ = unsafe { munmap(self.start.cast(), self.size) };
    }
}

/// Reads the text of such a file, or of any other: the bytes before the first
/// zero, and no more than a process may have left there.
///
/// # Errors
/// The error of reading the file.
pub fn read(file: File) -> io::Result<String> {
    let mut bytes = Vec::new();
    file.take(EXIT_SIZE as u64).read_to_end(&mut bytes)?;
    let text = bytes.split(|byte| *byte == 0).next().unwrap_or_default();
    Ok(String::from_utf8_lossy(text).into_owned())
}

/// The log of this process, once [`log_to_standard_error`] has set it.
static LOG: OnceLock<Words> = OnceLock::new();

/// Makes the file behind standard error the log of this process. [`say`] and
/// [`log_bytes`] then write there, and standard error is closed to other
/// writers. If standard error is not a file that can be mapped, it stays as it
/// is.
///
/// # Errors
/// The process has too many open files.
pub fn log_to_standard_error() -> io::Result<()> {
    let file = File::from(io::stderr().as_fd().try_clone_to_owned()?);
    let nowhere = File::options().write(true).open("/dev/null")?;
    let Ok(log) = Words::map(&file, LOG_SIZE) else { return Ok(()) };
    let _ = LOG.set(log);
    nix::unistd::dup2_stderr(nowhere)?;
    Ok(())
}

/// Writes a line to the log, or to standard error if the process has no log.
pub fn say(line: fmt::Arguments<'_>) {
    match LOG.get() {
        Some(log) => log.append(format!("{line}\n").as_bytes()),
        None => eprintln!("{line}"),
    }
}

/// Adds bytes to the log, if there is one. A signal handler may call it.
pub fn log_bytes(bytes: &[u8]) {
    if let Some(log) = LOG.get() {
        log.append(bytes);
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn text(file: &tempfile::NamedTempFile) -> String {
        read(File::open(file.path()).unwrap()).unwrap()
    }

    #[test]
    fn a_text_ends_where_its_file_does() {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(b"before\n").unwrap();
        let words = Words::map(file.as_file(), LOG_SIZE).unwrap();
        words.append(b"after\n");
        assert_eq!(text(&file), "before\nafter\n");
        for _ in 0..3 {
            words.append(&[b'x'; LOG_SIZE / 2]);
        }
        words.append(b"lost");
        assert_eq!(text(&file).len(), LOG_SIZE);
        assert!(text(&file).ends_with('x'));
        assert_eq!(file.as_file().metadata().unwrap().len(), LOG_SIZE as u64);
    }

    #[test]
    fn a_record_is_replaced_and_a_reader_has_a_bound() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let words = Words::map(file.as_file(), EXIT_SIZE).unwrap();
        words.replace(b"{}");
        assert_eq!(text(&file), "{}");
        words.replace(&vec![b'y'; 2 * EXIT_SIZE]);
        assert_eq!(text(&file).len(), EXIT_SIZE);
        // The program that wrote it does not matter.
        file.as_file().set_len(0).unwrap();
        std::fs::write(file.path(), vec![b'z'; 3 * EXIT_SIZE]).unwrap();
        assert_eq!(text(&file).len(), EXIT_SIZE);
        assert!(Words::map(&File::open("/dev/null").unwrap(), 1).is_err());
        // A file that is open for writing only stays as it is.
        std::fs::write(file.path(), "text").unwrap();
        let write_only = File::options().append(true).open(file.path()).unwrap();
        assert!(Words::map(&write_only, EXIT_SIZE).is_err());
        assert_eq!(std::fs::metadata(file.path()).unwrap().len(), 4);
    }

    #[test]
    fn a_full_file_system_loses_the_text_and_nothing_else() {
        // A file that was truncated has no room either.
        let file = tempfile::NamedTempFile::new().unwrap();
        let words = Words::map(file.as_file(), LOG_SIZE).unwrap();
        words.append(b"kept");
        file.as_file().set_len(4096).unwrap();
        words.append(&[b'x'; LOG_SIZE]);
        words.append(b"lost");
        assert_eq!(text(&file), "kept");
    }

    #[test]
    fn threads_write_beside_each_other() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let words = Words::map(file.as_file(), LOG_SIZE).unwrap();
        std::thread::scope(|scope| {
            for letter in [b'a', b'b', b'c', b'd'] {
                let words = &words;
                scope.spawn(move || (0..100).for_each(|_| words.append(&[letter; 10])));
            }
        });
        let text = text(&file);
        for letter in ['a', 'b', 'c', 'd'] {
            assert_eq!(text.chars().filter(|other| *other == letter).count(), 1000);
        }
    }
}
