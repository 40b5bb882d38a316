//! Measures the time from the start of a VMM until the agent in its guest is
//! ready. Husk's VMM and Firecracker are measured in turns, with the same kernel,
//! root file system, command line and number of vCPUs.
//!
//! Both measurements end with the agent's `READY` over vsock.

use std::io::{BufRead, BufReader};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use serde::Serialize;

use crate::memory;
use crate::statistics::Spread;

mod firecracker;
mod husk;

pub use firecracker::find as firecracker_on_path;

/// The guest that both VMMs boot.
#[derive(Debug, clap::Args)]
pub struct Guest {
    /// An uncompressed kernel.
    #[arg(long, default_value = "target/guest/vmlinux")]
    pub kernel: PathBuf,
    /// A read-only root file system, with the agent as its init.
    #[arg(long, default_value = "target/guest/rootfs.erofs")]
    pub rootfs: PathBuf,
    /// Guest memory, MiB.
    #[arg(long, default_value_t = 256)]
    pub memory_mib: u32,
    /// Most seconds that a guest may take.
    #[arg(long, default_value_t = 120)]
    pub timeout: u64,
}

/// A VMM that can boot a guest.
trait Vmm {
    fn name(&self) -> &'static str;
    /// Starts the VMM, with its files in `folder`. Returns when the VMM has got all
    /// of its requests.
    fn start(&self, guest: &Guest, folder: &Path) -> anyhow::Result<Running>;
}

/// A VMM process, ended when it is dropped.
struct Running {
    child: Child,
    /// The socket on which the agent reports that it is ready.
    word: Word,
    /// Descriptors that stay open for as long as the VMM runs.
    _control: Option<std::os::fd::OwnedFd>,
}

/// The host's end of the port that the agent connects to.
enum Word {
    /// A listening socket, as Firecracker needs it.
    Listener(UnixListener),
    /// The connection itself, as husk-vmm needs it.
    Stream(UnixStream),
}

impl AsRawFd for Word {
    fn as_raw_fd(&self) -> RawFd {
        match self {
            Self::Listener(socket) => socket.as_raw_fd(),
            Self::Stream(socket) => socket.as_raw_fd(),
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The figures of one VMM.
#[derive(Debug, Serialize)]
pub struct Boot {
    pub name: &'static str,
    /// Milliseconds from exec until the agent is ready.
    pub to_agent: Spread,
    /// The part of these milliseconds that the guest's kernel counted itself.
    pub in_guest: Spread,
    /// Proportional bytes of the VMM's own memory when the agent is ready.
    pub own_memory: Spread,
}

/// Boots `runs` guests with each available VMM, in turns.
pub fn measure(
    guest: &Guest,
    vmm: &Path,
    firecracker: Option<PathBuf>,
    runs: u16,
) -> anyhow::Result<Vec<Boot>> {
    for file in [&guest.kernel, &guest.rootfs, vmm] {
        ensure!(file.exists(), "{} is missing: run `make build`", file.display());
    }
    let mut vmms: Vec<Box<dyn Vmm>> = vec![Box::new(husk::Husk { program: vmm.into() })];
    match firecracker {
        Some(program) => vmms.push(Box::new(firecracker::Firecracker { program })),
        None => eprintln!("there is no firecracker on the PATH to compare with"),
    }
    let mut figures: Vec<Vec<Figures>> = vmms.iter().map(|_| Vec::new()).collect();
    // The first turn warms the page cache.
    for turn in 0..=runs {
        for (vmm, figures) in vmms.iter().zip(&mut figures) {
            let figure = boot(vmm.as_ref(), guest).with_context(|| format!("boot with {}", vmm.name()))?;
            if turn > 0 {
                figures.push(figure);
            }
        }
    }
    let summary = |vmm: &dyn Vmm, figures: &[Figures]| {
        let spread = |of: &dyn Fn(&Figures) -> f64| Spread::of(figures.iter().map(of)).context("no runs");
        Ok(Boot {
            name: vmm.name(),
            to_agent: spread(&|f| f.to_agent.as_secs_f64() * 1e3)?,
            in_guest: spread(&|f| f.in_guest.as_secs_f64() * 1e3)?,
            own_memory: spread(&|f| f.own_memory as f64)?,
        })
    };
    vmms.iter().zip(figures).map(|(vmm, figures)| summary(vmm.as_ref(), &figures)).collect()
}

struct Figures {
    to_agent: Duration,
    in_guest: Duration,
    own_memory: u64,
}

fn boot(vmm: &dyn Vmm, guest: &Guest) -> anyhow::Result<Figures> {
    let folder = tempfile::tempdir().context("make a folder")?;

    let started = Instant::now();
    let mut running = vmm.start(guest, folder.path())?;
    let stream = accept(&mut running, started + Duration::from_secs(guest.timeout))?;
    let to_agent = started.elapsed();

    stream.set_read_timeout(Some(Duration::from_secs(10))).context("set a time-out")?;
    let mut line = String::new();
    BufReader::new(stream).read_line(&mut line).context("hear the agent")?;
    let own = memory::of_process(running.child.id()).context("read the VMM's memory")?.own;
    Ok(Figures { to_agent, in_guest: guest_time(&line)?, own_memory: own.proportional })
}

/// Waits for the agent's connection, for the VMM's end, or for the deadline.
fn accept(running: &mut Running, deadline: Instant) -> anyhow::Result<UnixStream> {
    let mut poll = libc::pollfd { fd: running.word.as_raw_fd(), events: libc::POLLIN, revents: 0 };
    loop {
        // SAFETY: `poll` is one valid structure, and outlives the call.
        if unsafe { libc::poll(&raw mut poll, 1, 200) } > 0 {
            return match &running.word {
                Word::Listener(listener) => Ok(listener.accept().context("hear the agent")?.0),
                Word::Stream(stream) => stream.try_clone().context("hear the agent"),
            };
        }
        if let Some(status) = running.child.try_wait().context("wait for the VMM")? {
            bail!("the VMM ended before the agent spoke: {status}");
        }
        ensure!(Instant::now() < deadline, "the agent did not speak in time");
    }
}

/// Parses `READY <microseconds since the kernel started>`.
fn guest_time(line: &str) -> anyhow::Result<Duration> {
    line.trim_end()
        .strip_prefix("READY ")
        .and_then(|number| number.parse().ok())
        .map(Duration::from_micros)
        .with_context(|| format!("the agent said {line:?}"))
}

/// Makes a command that prints nothing and reads nothing.
fn quiet(program: &Path) -> Command {
    let mut command = Command::new(program);
    command
        .stdin(std::process::Stdio::null())
        .stdout(std::process::Stdio::null())
        .stderr(std::process::Stdio::null());
    command
}

/// Formats the figures for a person.
pub fn render(boots: &[Boot]) -> String {
    let mut text = format!(
        "{:<14}{:>28}   {:>28}   {:>12}\n",
        "", "exec to agent, ms", "of it in the guest, ms", "own MiB"
    );
    let cells = |spread: Spread| format!("{:>10.1}{:>9.1}{:>9.1}", spread.min, spread.median, spread.max);
    for boot in boots {
        let own = boot.own_memory.median / 1024.0 / 1024.0;
        text +=
            &format!("{:<14}{}   {}   {own:>12.1}\n", boot.name, cells(boot.to_agent), cells(boot.in_guest));
    }
    if let [husk, peer] = boots {
        let ratio = husk.to_agent.median / peer.to_agent.median;
        let verdict = if ratio <= 1.3 { "held" } else { "EXCEEDED" };
        text += &format!("{ratio:.2} times {}'s; the budget is 1.30: {verdict}\n", peer.name);
    }
    text
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn the_agent_says_how_long_its_kernel_took() {
        assert_eq!(guest_time("READY 412345\n").unwrap(), Duration::from_micros(412_345));
        for wrong in ["", "READY", "READY -1\n", "HELLO 1\n"] {
            assert!(guest_time(wrong).is_err(), "{wrong:?}");
        }
    }

    #[test]
    fn the_budget_is_a_ratio_of_medians() {
        let boot = |name, median| {
            let spread = Spread { min: median, median, max: median };
            Boot { name, to_agent: spread, in_guest: spread, own_memory: spread }
        };
        assert!(render(&[boot("husk", 130.0), boot("firecracker", 100.0)]).ends_with("held\n"));
        assert!(render(&[boot("husk", 131.0), boot("firecracker", 100.0)]).ends_with("EXCEEDED\n"));
        assert!(!render(&[boot("husk", 131.0)]).contains("budget"));
    }

    #[test]
    fn a_vmm_that_ends_is_not_waited_for() {
        let folder = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(folder.path().join("s")).unwrap();
        let child = quiet(Path::new("/bin/true")).spawn().unwrap();
        let mut running = Running { child, word: Word::Listener(listener), _control: None };
        let error = accept(&mut running, Instant::now() + Duration::from_secs(60)).unwrap_err();
        assert!(error.to_string().contains("ended before"), "{error}");
    }
}
