//! The tail of the guest's console, and the two lines in it that say why the
//! guest resets the machine.

use std::collections::VecDeque;
use std::io::Write;
use std::sync::{Arc, Mutex};

use husk_vmm_api::{CONSOLE_TAIL, ExitReason, SHUTDOWN_MARKER};

use crate::devices::virtio::rate::Limiter;
use crate::lock;

/// The text with which every panic of Linux begins (`panic()` in
/// `kernel/panic.c`).
const PANIC_MARKER: &str = "Kernel panic - not syncing";
/// Bytes at the start of a line that are searched for a marker.
const LINE_MAX: usize = 256;

/// The end of the guest's console output. Clones share it.
#[derive(Clone, Default)]
pub struct Console(Arc<Mutex<Tail>>);

#[derive(Default)]
struct Tail {
    bytes: VecDeque<u8>,
    line: Vec<u8>,
    panic: Option<String>,
    shutdown: bool,
    limiter: Option<Limiter>,
    /// Bytes that the limiter did not let in since the last that it did.
    dropped: u64,
}

impl Console {
    /// The last [`CONSOLE_TAIL`] bytes, with invalid UTF-8 replaced.
    #[must_use]
    pub fn text(&self) -> String {
        let mut tail = lock(&self.0);
        String::from_utf8_lossy(tail.bytes.make_contiguous()).into_owned()
    }

    /// Bounds what is kept of the output: what comes faster is left out, so that it does not
    /// push out what came before. Lines that say why a reset comes are noticed all the same.
    pub fn limit(&self, limiter: Option<Limiter>) {
        lock(&self.0).limiter = limiter;
    }

    /// The reason for which the guest pulled the reset line, according to its
    /// console, or `otherwise`.
    #[must_use]
    pub fn reason_for_reset(&self, otherwise: ExitReason) -> (ExitReason, String) {
        let tail = lock(&self.0);
        match &tail.panic {
            Some(line) => (ExitReason::Panic, line.clone()),
            None if tail.shutdown => (ExitReason::Shutdown, String::new()),
            None => (otherwise, String::new()),
        }
    }
}

impl Tail {
    fn push(&mut self, byte: u8) {
        self.keep(byte);
        if byte == b'\n' || byte == b'\r' {
            self.end_of_line();
        } else if self.line.len() < LINE_MAX {
            self.line.push(byte);
        }
    }

    fn keep(&mut self, byte: u8) {
        if let Some(limiter) = &mut self.limiter {
            if limiter.wait().is_some() {
                self.dropped = self.dropped.saturating_add(1);
                return;
            }
            limiter.take(1);
        }
        let dropped = std::mem::take(&mut self.dropped);
        if dropped > 0 {
            self.bytes.extend(format!("\n[husk-vmm: {dropped} bytes left out]\n").bytes());
        }
        self.bytes.push_back(byte);
        let above = self.bytes.len().saturating_sub(CONSOLE_TAIL);
        self.bytes.drain(..above);
    }

    fn end_of_line(&mut self) {
        let line = String::from_utf8_lossy(&self.line);
        if self.panic.is_none()
            && let Some(start) = line.find(PANIC_MARKER)
        {
            self.panic = line.get(start..).map(str::to_owned);
        }
        // A kernel with printk.time puts a time stamp before a /dev/kmsg line.
        self.shutdown |= line.trim_end().ends_with(SHUTDOWN_MARKER);
        self.line.clear();
    }
}

impl Write for Console {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        let mut tail = lock(&self.0);
        bytes.iter().for_each(|byte| tail.push(*byte));
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn after(output: &str) -> (ExitReason, String) {
        let mut console = Console::default();
        console.write_all(output.as_bytes()).unwrap();
        console.reason_for_reset(ExitReason::Reset)
    }

    #[test]
    fn only_the_end_is_kept() {
        let mut console = Console::default();
        console.write_all(&[b'a'; CONSOLE_TAIL]).unwrap();
        console.write_all(b"end").unwrap();
        let text = console.text();
        assert_eq!(text.len(), CONSOLE_TAIL);
        assert!(text.ends_with("aend"));
    }

    #[test]
    fn a_reset_means_what_the_guest_said_before() {
        assert_eq!(after("hello\n").0, ExitReason::Reset);
        assert_eq!(after("hello\nhusk: shutdown\r\n").0, ExitReason::Shutdown);
        assert_eq!(after("[    1.234567] husk: shutdown\n").0, ExitReason::Shutdown);
        let (reason, detail) = after("[    0.1] Kernel panic - not syncing: no init\nhusk: shutdown\n");
        assert_eq!(reason, ExitReason::Panic);
        assert_eq!(detail, "Kernel panic - not syncing: no init");
    }

    #[test]
    fn a_flood_does_not_push_out_what_came_before() {
        let limit = husk_vmm_api::RateLimit { bytes_per_second: 20, bytes_burst: 20, ..Default::default() };
        let mut console = Console::default();
        console.limit(Limiter::new(Some(&limit)));
        console.write_all(b"Linux version\n").unwrap();
        console.write_all(&[b'x'; 4 * CONSOLE_TAIL]).unwrap();
        console.write_all(b"\nKernel panic - not syncing: no init\n").unwrap();
        let text = console.text();
        assert!(text.starts_with("Linux version\n") && text.len() < 1000, "{text}");
        assert_eq!(console.reason_for_reset(ExitReason::Reset).0, ExitReason::Panic);
        std::thread::sleep(std::time::Duration::from_millis(150));
        console.write_all(b"on").unwrap();
        let text = console.text();
        assert!(text.ends_with(" bytes left out]\non"), "{text}");
    }

    #[test]
    fn an_endless_line_stays_bounded() {
        let mut console = Console::default();
        for _ in 0..100 {
            console.write_all(&[0xff; 1000]).unwrap();
        }
        let tail = console.0.lock().unwrap();
        assert!(tail.bytes.len() == CONSOLE_TAIL && tail.line.len() == LINE_MAX);
    }
}
