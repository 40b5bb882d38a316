//! The end of a machine: how it is noticed, recorded, and reported.
//!
//! Any thread may raise the [`ExitSignal`]; the first reason counts. The main
//! thread then writes the exit record, answers the clients that wait, and ends
//! the process. A panic of any thread does the same by itself.

use std::fs::File;
use std::io::{self, Write};
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Mutex};

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use husk_vmm_api::words::{EXIT_SIZE, Words, say};
use husk_vmm_api::{Exit, ExitReason};
use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::signal::register_signal_handler;

use crate::console::Console;
use crate::lock;

/// Most bytes of the detail in an exit record.
const MAX_DETAIL: usize = 4096;

/// The signal that the machine has ended.
pub struct ExitSignal {
    reason: Mutex<Option<(ExitReason, String)>>,
    event: EventFd,
}

impl ExitSignal {
    /// Makes a signal that is not raised yet.
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

    /// The reason for which the machine has ended, if it has.
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

/// Wakes up the event loop, see [`ExitSignal::waker`].
pub struct Waker(EventFd);

impl MutEventSubscriber for Waker {
    fn process(&mut self, _: Events, _: &mut EventOps) {
        let _ = self.0.read();
    }

    fn init(&mut self, ops: &mut EventOps) {
        // This cannot fail: the eventfd and the epoll instance are both new.
        let _ = ops.add(Events::new(&self.0, EventSet::IN));
    }
}

/// The file of the exit record, which a later `huskd` reads.
#[derive(Debug)]
pub struct Record(Target);

#[derive(Debug)]
enum Target {
    Words(Words),
    /// A file that cannot be mapped: a pipe, or one that is open for writing alone.
    File(File),
}

impl Record {
    /// An exit record in `file`.
    #[must_use]
    pub fn new(file: File) -> Self {
        Self(Words::map(&file, EXIT_SIZE).map_or_else(|_| Target::File(file), Target::Words))
    }

    /// Writes the record of this end.
    pub fn write(&self, exit: &Exit) {
        let mut exit = exit.clone();
        exit.detail.truncate(exit.detail.floor_char_boundary(MAX_DETAIL));
        match serde_json::to_vec(&exit) {
            Ok(text) => self.write_bytes(&text),
            Err(error) => say(format_args!("husk-vmm: failed to write the exit record: {error}")),
        }
    }

    /// Writes a record that is already JSON text. A signal handler may call
    /// this.
    pub fn write_bytes(&self, text: &[u8]) {
        match &self.0 {
            Target::Words(words) => words.replace(text),
            Target::File(file) => {
                // A pipe serves as well as a file.
                if file.write_all_at(text, 0).is_err() {
                    let _ = (&mut &*file).write_all(text);
                }
            }
        }
    }
}

/// Lets SIGTERM end the process. The first process of a PID namespace has no
/// default action for it, and a host that shuts down ends its processes with
/// it.
///
/// # Errors
/// The error of sigaction(2).
pub fn end_when_asked() -> Result<(), vmm_sys_util::errno::Error> {
    extern "C" fn end(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
        // SAFETY: ends the process without running anything else of it.
        unsafe { libc::_exit(ExitReason::Killed.code()) }
    }
    register_signal_handler(libc::SIGTERM, end)
}

/// Lets a panic end the process at once, with a record like any other end: a
/// machine without one of its threads would hang.
pub fn end_on_panic(record: Arc<Record>, console: Console) {
    std::panic::set_hook(Box::new(move |panic| {
        let detail = format!("internal error: {panic}");
        say(format_args!("husk-vmm: {detail}"));
        let exit = Exit { reason: ExitReason::VmmError, detail, console: console.text() };
        record.write(&exit);
        // SAFETY: ends the process without running anything else of it.
        unsafe { libc::_exit(ExitReason::VmmError.code()) }
    }));
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use husk_vmm_api::words;

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
        Record::new(file.reopen().unwrap()).write(&exit);
        let text = words::read(file.reopen().unwrap()).unwrap();
        assert_eq!(serde_json::from_str::<Exit>(&text).unwrap(), exit);

        let (mut reader, writer) = io::pipe().unwrap();
        Record::new(File::from(std::os::fd::OwnedFd::from(writer))).write(&exit);
        let mut text = String::new();
        reader.read_to_string(&mut text).unwrap();
        assert_eq!(serde_json::from_str::<Exit>(&text).unwrap(), exit);
    }

    #[test]
    fn the_longest_record_is_whole() {
        let exit = Exit {
            reason: ExitReason::Panic,
            detail: "\u{1}".repeat(100_000),
            console: "\u{2}".repeat(husk_vmm_api::CONSOLE_TAIL),
        };
        let file = tempfile::NamedTempFile::new().unwrap();
        Record::new(file.reopen().unwrap()).write(&exit);
        let text = words::read(file.reopen().unwrap()).unwrap();
        let read: Exit = serde_json::from_str(&text).unwrap();
        assert_eq!((read.console, read.detail.len()), (exit.console, MAX_DETAIL));
    }
}
