//! The main loop of the process: one event loop that serves the control socket
//! and the devices until the machine has ended.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use event_manager::{EventManager, SubscriberOps};
use husk_vmm_api::{Exit, ExitReason, FdIndex, FsState, Info, Request, Response, VmConfig};

use crate::builder::{self, Descriptors};
use crate::console::Console;
use crate::control::{ClientId, ControlServer};
use crate::exit::{self, ExitSignal, Record};
use crate::hypervisor::{Hypervisor, HypervisorError};
use crate::lock;
use crate::machine::{Machine, Subscriber};
use crate::stage::{StageError, at};
use crate::{snapshot, vcpu};

/// How long a process without a machine waits for a request to boot.
const BOOT_WAIT: Duration = Duration::from_secs(60);

/// The state of the main loop.
pub struct Vmm {
    started: Instant,
    events: EventManager<Subscriber>,
    control: Arc<Mutex<ControlServer>>,
    exit: Arc<ExitSignal>,
    record: Arc<Record>,
    console: Console,
    /// The VM, made in advance while the process could still open KVM. The boot
    /// takes it.
    hypervisor: Option<Result<Hypervisor, HypervisorError>>,
    machine: Option<Machine>,
    /// Clients that wait for the machine's end.
    waiting: Vec<ClientId>,
}

impl Vmm {
    /// Makes the main loop, which serves `control`, a listening socket, and
    /// writes the exit record to `record`. `started` is the time at which the
    /// process began.
    ///
    /// # Errors
    /// [`StageError`].
    pub fn new(control: OwnedFd, record: Arc<Record>, started: Instant) -> Result<Self, StageError> {
        let console = Console::default();
        exit::end_on_panic(Arc::clone(&record), console.clone());
        vcpu::install_kick_handler().map_err(at("handle signals"))?;
        let exit = Arc::new(ExitSignal::new().map_err(at("make an eventfd"))?);
        let control = Arc::new(Mutex::new(ControlServer::new(control).map_err(at("listen"))?));
        let mut events = EventManager::new().map_err(at("make an event loop"))?;
        events.add_subscriber(Arc::clone(&control) as Subscriber);
        let waker = exit.waker().map_err(at("make an eventfd"))?;
        events.add_subscriber(Arc::new(Mutex::new(waker)) as Subscriber);
        Ok(Self {
            started,
            events,
            control,
            exit,
            record,
            console,
            hypervisor: Some(Hypervisor::new()),
            machine: None,
            waiting: Vec::new(),
        })
    }

    /// Runs until the machine has ended, and says why it has.
    pub fn run(mut self) -> ExitReason {
        let (reason, detail) = loop {
            let failed = match self.events.run_with_timeout(self.patience()) {
                Ok(_) => None,
                Err(event_manager::Error::Epoll(errno)) if errno.errno() == libc::EINTR => None,
                Err(error) => Some(format!("wait for events: {error}")),
            };
            if let Some(error) = failed {
                self.exit.raise(ExitReason::VmmError, error);
            }
            self.serve_clients();
            if self.machine.is_none()
                && self.started.elapsed() > BOOT_WAIT
                && !lock(&self.control).has_clients()
            {
                self.exit.raise(ExitReason::VmmError, "nobody asked for a machine to be booted");
            }
            if let Some(end) = self.exit.reason() {
                break end;
            }
        };
        let exit = Exit { reason, detail, console: self.console.text() };
        self.record.write(&exit);
        let response = Response::Exited(exit);
        let control = lock(&self.control);
        for client in &self.waiting {
            control.reply(*client, &response);
        }
        reason
    }

    /// Milliseconds to wait for events: without limit (-1) once there is a
    /// machine.
    fn patience(&self) -> i32 {
        if self.machine.is_some() {
            return -1;
        }
        let left = BOOT_WAIT.saturating_sub(self.started.elapsed());
        left.as_millis().clamp(1000, 60_000) as i32
    }

    fn serve_clients(&mut self) {
        loop {
            let Some(incoming) = lock(&self.control).take_request() else { return };
            let response = match incoming.request {
                Ok((request, fds)) => self.serve(incoming.client, request, Descriptors::new(fds)),
                Err(message) => Some(Response::Error { stage: "read the request".into(), message }),
            };
            if let Some(response) = response {
                lock(&self.control).reply(incoming.client, &response);
            }
        }
    }

    /// Serves a request. `None` when the response comes later.
    fn serve(&mut self, client: ClientId, request: Request, mut fds: Descriptors) -> Option<Response> {
        let done = match request {
            Request::Boot(config) => self.boot(&config, fds),
            Request::AttachDisk { slot, file, read_only } => self.with_machine("attach a disk", |machine| {
                machine.attach_disk(&slot, fds.take(file)?, read_only).map_err(|error| error.to_string())
            }),
            Request::DetachDisk { slot } => self.with_machine("detach a disk", |machine| {
                machine.detach_disk(&slot).map_err(|error| error.to_string())
            }),
            Request::AttachFs { server } => self.with_machine("attach a file server", |machine| {
                machine.attach_fs(fds.take(server)?).map_err(|error| error.to_string())
            }),
            Request::SetBalloon { size_mib } => self.with_machine("set the balloon", |machine| {
                machine.set_balloon(size_mib).map_err(|error| error.to_string())
            }),
            Request::Save { state, memory } => self.save(state, memory, fds),
            Request::Info => return Some(Response::Info(self.info())),
            Request::Console => return Some(Response::Console { text: self.console.text() }),
            Request::Inspect => {
                return Some(match self.machine.as_ref().map(Machine::inspect) {
                    Some(inspection) => Response::Inspection(inspection),
                    None => Response::Error {
                        stage: "inspect".into(),
                        message: "no machine was booted yet".into(),
                    },
                });
            }
            Request::Wait => {
                self.waiting.push(client);
                return None;
            }
            Request::Kill => {
                self.exit.raise(ExitReason::Killed, "");
                Ok(())
            }
        };
        Some(match done {
            Ok(()) => Response::Ok,
            Err((stage, message)) => Response::Error { stage: stage.into(), message },
        })
    }

    fn boot(&mut self, config: &VmConfig, fds: Descriptors) -> Result<(), (&'static str, String)> {
        if self.machine.is_some() {
            return Err(("boot", "the machine runs already".into()));
        }
        let hypervisor = self
            .hypervisor
            .take()
            .ok_or(("boot", "it has failed before: start another process".into()))?
            .map_err(|error| ("create a VM", error.to_string()))?;
        let (machine, subscribers) = builder::build(hypervisor, config, fds, &self.exit, &self.console)
            .map_err(|error| (error.stage, error.cause.to_string()))?;
        for subscriber in subscribers {
            self.events.add_subscriber(subscriber);
        }
        self.machine = Some(machine);
        Ok(())
    }

    /// Saves the machine, which ends with that.
    fn save(
        &mut self,
        state: FdIndex,
        memory: FdIndex,
        mut fds: Descriptors,
    ) -> Result<(), (&'static str, String)> {
        const STAGE: &str = "save";
        let state = File::from(fds.take(state).map_err(|error| (STAGE, error))?);
        let memory = File::from(fds.take(memory).map_err(|error| (STAGE, error))?);
        let machine = self.machine.take().ok_or((STAGE, "no machine was booted yet".into()))?;
        let saved = snapshot::machine::save(machine, &memory)
            .and_then(|saved| snapshot::format::write(&state, &saved).map_err(at(STAGE)));
        match &saved {
            Ok(()) => self.exit.raise(ExitReason::Saved, ""),
            Err(error) => self.exit.raise(ExitReason::VmmError, error.to_string()),
        }
        saved.map_err(|error| (error.stage, error.cause.to_string()))
    }

    fn with_machine(
        &self,
        stage: &'static str,
        action: impl FnOnce(&Machine) -> Result<(), String>,
    ) -> Result<(), (&'static str, String)> {
        let machine = self.machine.as_ref().ok_or((stage, "no machine was booted yet".into()))?;
        action(machine).map_err(|message| (stage, message))
    }

    fn info(&self) -> Info {
        let machine = self.machine.as_ref();
        let entered = machine.and_then(Machine::entered);
        Info {
            pid: std::process::id(),
            booted: machine.is_some(),
            boot_us: entered.map_or(0, |entered| {
                entered.duration_since(self.started).as_micros().try_into().unwrap_or(u64::MAX)
            }),
            guest_resident_bytes: machine.map_or(0, Machine::resident_bytes),
            balloon_mib: machine.map_or(0, Machine::balloon_mib),
            fs: machine.map_or(FsState::None, Machine::fs_state),
            connections: machine.map_or(0, Machine::connections),
            protocol: husk_vmm_api::PROTOCOL,
            release: env!("CARGO_PKG_VERSION").into(),
        }
    }
}
