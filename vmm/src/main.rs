//! `husk-vmm`: one process that runs one pod's virtual machine.

use std::fs::File;
use std::os::fd::{FromRawFd, OwnedFd, RawFd};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use husk_vmm::exit::{self, Record};
use husk_vmm::jail::{self, filter};
use husk_vmm::vmm::Vmm;
use husk_vmm_api::{ExitReason, words};

const USAGE: &str = "usage: husk-vmm --id <sandbox id> --user <uid> --control-fd <n> --exit-fd <n>
It is started by huskd, as root; the descriptors are a listening SOCK_SEQPACKET
unix socket, and a file for the record of the machine's end. It becomes the user,
who should own nothing else.";

fn main() -> ExitCode {
    let started = Instant::now();
    keep_memory_small();
    match run(started) {
        Ok(reason) => ExitCode::from(reason.code() as u8),
        Err(error) => {
            words::say(format_args!("husk-vmm: {error:#}"));
            ExitCode::from(ExitReason::VmmError.code() as u8)
        }
    }
}

fn run(started: Instant) -> Result<ExitReason> {
    let Some(arguments) = Arguments::parse(std::env::args().skip(1))? else {
        println!("{USAGE}");
        return Ok(ExitReason::Shutdown);
    };
    let control = inherit(arguments.control_fd).context("--control-fd")?;
    let exit = inherit(arguments.exit_fd).context("--exit-fd")?;
    let record = Arc::new(Record::new(File::from(exit)));
    words::log_to_standard_error().context("map the log")?;
    exit::end_when_asked().context("handle signals")?;
    filter::end_on_refusal(Arc::clone(&record)).context("handle signals")?;
    let vmm = Vmm::new(control, record, started).context(arguments.id)?;
    jail::enter(arguments.user)?;
    filter::install(filter::Thread::Loop)?;
    Ok(vmm.run())
}

/// The arguments. There are four, which no library needs to parse.
struct Arguments {
    /// The sandbox id, shown in a list of processes.
    id: String,
    user: u32,
    control_fd: RawFd,
    exit_fd: RawFd,
}

impl Arguments {
    /// Parses the arguments; `None` when help is asked for.
    fn parse(mut words: impl Iterator<Item = String>) -> Result<Option<Self>> {
        let (mut id, mut user, mut control_fd, mut exit_fd) = (None, None, None, None);
        while let Some(word) = words.next() {
            if word == "--help" || word == "-h" {
                return Ok(None);
            }
            let value = words.next().with_context(|| format!("{word} needs a value\n{USAGE}"))?;
            match word.as_str() {
                "--id" => id = Some(value),
                "--user" => user = Some(value.parse().context("--user")?),
                "--control-fd" => control_fd = Some(value.parse().context("--control-fd")?),
                "--exit-fd" => exit_fd = Some(value.parse().context("--exit-fd")?),
                _ => bail!("unknown argument {word}\n{USAGE}"),
            }
        }
        match (id, user, control_fd, exit_fd) {
            (Some(id), Some(user), Some(control_fd), Some(exit_fd)) => {
                Ok(Some(Self { id, user, control_fd, exit_fd }))
            }
            _ => bail!("an argument is missing\n{USAGE}"),
        }
    }
}

/// Takes over a descriptor that the parent left open for us.
fn inherit(fd: RawFd) -> Result<OwnedFd> {
    ensure!(fd > 2, "{fd} is a standard stream");
    // SAFETY: fcntl with F_SETFD takes any number and no pointer.
    let result = unsafe { libc::fcntl(fd, libc::F_SETFD, libc::FD_CLOEXEC) };
    ensure!(result == 0, "descriptor {fd} is not open");
    // SAFETY: it is open, and the process has just begun: nobody else in it
    // owns a descriptor yet.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Uses one heap for all threads, and takes large blocks directly from the
/// kernel, so that they go back to it when they are freed.
fn keep_memory_small() {
    // SAFETY: called before there is any other thread.
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, 1);
        libc::mallopt(libc::M_MMAP_THRESHOLD, 64 * 1024);
    }
}
