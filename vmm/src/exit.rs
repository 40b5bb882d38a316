//! How a machine's end is noticed, and made known.
//!
//! Any thread may raise the [`ExitSignal`]; the first reason counts. The main
//! thread then writes an [`Exit`] into the exit descriptor, answers who waits,
//! and ends the process. A panic of any thread does the same by itself.

use std::fs::File;
use std::io::{self, Write};
use std::os::unix::fs::FileExt;
use std::sync::Mutex;

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use husk_vmm_api::{Exit, ExitReason};
use vmm_sys_util::eventfd::EventFd;

use crate::devices::console::Console;
use crate::lock;

/// Says that the machine has ended.
pub struct ExitSignal {
    reason: Mutex<Option<(ExitReason, String)>>,
    event: EventFd,
}

impl ExitSignal {
    /// A signal that was not raised yet.
    ///
    /// # Errors
    /// No eventfd can be made.
    pub fn new() -> io::Result<Self> {
        let event = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?;
        Ok(Self { reason: Mutex::new(None), event })
    }

    /// Ends the machine for `reason`, if it has not ended already.
    pub fn raise(&self, reason: ExitReason, detail: impl Into<String>) {
        lock(&self.reason).get_or_insert_with(|| (reason, detail.into()));
        let _ = self.event.write(1);
    }

    /// Why the machine has ended, if it has.
    #[must_use]
    pub fn reason(&self) -> Option<(ExitReason, String)> {
        lock(&self.reason).clone()
    }

    /// Makes the event loop wake up when the signal is raised.
    ///
    /// # Errors
    /// No more descriptors.
    pub fn waker(&self) -> io::Result<Waker> {
        Ok(Waker(self.event.try_clone()?))
    }
}

/// See [`ExitSignal::waker`].
pub struct Waker(EventFd);

impl MutEventSubscriber for Waker {
    fn process(&mut self, _: Events, _: &mut EventOps) {
        let _ = self.0.read();
    }

    fn init(&mut self, ops: &mut EventOps) {
        // A fresh eventfd on a fresh epoll instance: it can be added.
        let _ = ops.add(Events::new(&self.0, EventSet::IN));
    }
}

/// Writes `exit` for a daemon that comes back later.
///
/// # Errors
/// The file's.
pub fn record(file: &File, exit: &Exit) -> io::Result<()> {
    let text = serde_json::to_vec(exit)?;
    match file.write_all_at(&text, 0) {
        // A pipe serves as well as a file.
        Err(error) if error.raw_os_error() == Some(libc::ESPIPE) => (&mut &*file).write_all(&text),
        result => result,
    }
}

/// Lets a panic end the process at once, with a record like any other end: a
/// machine without one of its threads would hang.
pub fn end_on_panic(file: File, console: Console) {
    std::panic::set_hook(Box::new(move |panic| {
        let detail = format!("internal error: {panic}");
        eprintln!("husk-vmm: {detail}");
        let exit = Exit { reason: ExitReason::VmmError, detail, console: console.text() };
        let _ = record(&file, &exit);
        // SAFETY: ends the process without running anything else of it.
        unsafe { libc::_exit(ExitReason::VmmError.code()) }
    }));
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use std::io::Read;

    use super::*;

    #[test]
    fn the_first_reason_counts() {
        let signal = ExitSignal::new().unwrap();
        assert_eq!(signal.reason(), None);
        signal.raise(ExitReason::Panic, "first");
        signal.raise(ExitReason::Killed, "second");
        assert_eq!(signal.reason(), Some((ExitReason::Panic, "first".into())));
    }

    #[test]
    fn the_record_can_be_read_back() {
        let exit = Exit { reason: ExitReason::TripleFault, detail: "d".into(), console: "last words".into() };
        let file = tempfile::NamedTempFile::new().unwrap();
        record(file.as_file(), &exit).unwrap();
        let text = std::fs::read_to_string(file.path()).unwrap();
        assert_eq!(serde_json::from_str::<Exit>(&text).unwrap(), exit);

        let (mut reader, writer) = io::pipe().unwrap();
        record(&File::from(std::os::fd::OwnedFd::from(writer)), &exit).unwrap();
        let mut text = String::new();
        reader.read_to_string(&mut text).unwrap();
        assert_eq!(serde_json::from_str::<Exit>(&text).unwrap(), exit);
    }
}
