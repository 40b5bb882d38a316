//! The first serial port (a 16550), for the output of the guest's kernel, and
//! the keyboard controller's reset line. Both are implemented by vm-superio;
//! this module puts them on the bus, and keeps the port's output in the
//! [`Console`].

use std::convert::Infallible;
use std::ops::Deref;
use std::sync::Arc;

use husk_vmm_api::ExitReason;
use serde::{Deserialize, Serialize};
use vm_superio::serial::{NoEvents, SerialState};
use vm_superio::{I8042Device, Serial, Trigger};
use vmm_sys_util::eventfd::EventFd;

use super::bus::BusDevice;
use crate::console::Console;
use crate::exit::ExitSignal;

/// The version of [`SerialPortState`].
const VERSION: u16 = 1;
/// The number of I/O ports of a 16550.
pub const SERIAL_PORTS: u64 = 8;
/// The number of I/O ports of the keyboard controller: data at 0, commands at
/// 4.
pub const I8042_PORTS: u64 = 5;

/// An eventfd as vm-superio's interrupt.
pub struct Line(EventFd);

impl Line {
    /// `event` is an irqfd, or an eventfd that a test watches.
    #[must_use]
    pub const fn new(event: EventFd) -> Self {
        Self(event)
    }
}

impl Deref for Line {
    type Target = EventFd;

    fn deref(&self) -> &EventFd {
        &self.0
    }
}

impl Trigger for Line {
    type E = std::io::Error;

    fn trigger(&self) -> std::io::Result<()> {
        self.0.write(1)
    }
}

/// The first serial port. It has no input.
pub struct SerialPort(Serial<Line, NoEvents, Console>);

/// A saved [`SerialPort`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SerialPortState {
    version: u16,
    baud_divisor: [u8; 2],
    interrupt_enable: u8,
    interrupt_identification: u8,
    line_control: u8,
    line_status: u8,
    modem_control: u8,
    modem_status: u8,
    scratch: u8,
    in_buffer: Vec<u8>,
}

/// The saved state is not one of this version.
#[derive(Debug, thiserror::Error)]
#[error("saved serial port cannot be restored: {0}")]
pub struct SerialRestoreError(String);

impl SerialPort {
    /// Makes a port that interrupts through `line`.
    #[must_use]
    pub fn new(line: EventFd, console: Console) -> Self {
        Self(Serial::new(Line(line), console))
    }

    /// Saves the port's registers. The console's text is not part of them.
    #[must_use]
    pub fn save(&self) -> SerialPortState {
        let state = self.0.state();
        SerialPortState {
            version: VERSION,
            baud_divisor: [state.baud_divisor_low, state.baud_divisor_high],
            interrupt_enable: state.interrupt_enable,
            interrupt_identification: state.interrupt_identification,
            line_control: state.line_control,
            line_status: state.line_status,
            modem_control: state.modem_control,
            modem_status: state.modem_status,
            scratch: state.scratch,
            in_buffer: state.in_buffer,
        }
    }

    /// Makes a port from its saved state.
    ///
    /// # Errors
    /// [`SerialRestoreError`].
    pub fn restore(
        state: SerialPortState,
        line: EventFd,
        console: Console,
    ) -> Result<Self, SerialRestoreError> {
        if state.version != VERSION {
            return Err(SerialRestoreError(format!("version {} is not {VERSION}", state.version)));
        }
        let [baud_divisor_low, baud_divisor_high] = state.baud_divisor;
        let state = SerialState {
            baud_divisor_low,
            baud_divisor_high,
            interrupt_enable: state.interrupt_enable,
            interrupt_identification: state.interrupt_identification,
            line_control: state.line_control,
            line_status: state.line_status,
            modem_control: state.modem_control,
            modem_status: state.modem_status,
            scratch: state.scratch,
            in_buffer: state.in_buffer,
        };
        Serial::from_state(&state, Line(line), NoEvents, console)
            .map(Self)
            .map_err(|error| SerialRestoreError(format!("{error:?}")))
    }
}

impl BusDevice for SerialPort {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        if let ([byte], Ok(offset)) = (data, u8::try_from(offset)) {
            *byte = self.0.read(offset);
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        if let ([byte], Ok(offset)) = (data, u8::try_from(offset)) {
            // Neither the console nor an eventfd can fail here.
            let _ = self.0.write(offset, *byte);
        }
    }
}

/// The keyboard controller. It has only the command that resets the machine
/// (`reboot=k`), and no state.
pub struct ResetLine(I8042Device<Reset>);

/// Ends the machine, for the reason that is on the guest's console.
struct Reset {
    exit: Arc<ExitSignal>,
    console: Console,
}

impl Trigger for Reset {
    type E = Infallible;

    fn trigger(&self) -> Result<(), Infallible> {
        let (reason, detail) = self.console.reason_for_reset(ExitReason::Reset);
        self.exit.raise(reason, detail);
        Ok(())
    }
}

impl ResetLine {
    /// Makes the controller. `exit` is raised when the guest asks for a reset.
    #[must_use]
    pub fn new(exit: Arc<ExitSignal>, console: Console) -> Self {
        Self(I8042Device::new(Reset { exit, console }))
    }
}

impl BusDevice for ResetLine {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        if let ([byte], Ok(offset)) = (data, u8::try_from(offset)) {
            *byte = self.0.read(offset);
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        if let ([byte], Ok(offset)) = (data, u8::try_from(offset)) {
            let _ = self.0.write(offset, *byte);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event() -> EventFd {
        EventFd::new(libc::EFD_NONBLOCK).unwrap()
    }

    #[test]
    fn what_the_guest_prints_is_kept() {
        let console = Console::default();
        let mut port = SerialPort::new(event(), console.clone());
        for byte in b"Linux version" {
            port.write(0, &[*byte]);
        }
        assert_eq!(console.text(), "Linux version");
    }

    #[test]
    fn a_restored_port_goes_on_as_the_saved_one_would() {
        let mut port = SerialPort::new(event(), Console::default());
        port.write(3, &[0x1b]);
        port.write(7, &[0x5a]);
        port.write(1, &[0x02]);
        let saved = port.save();
        let mut twin = SerialPort::restore(saved.clone(), event(), Console::default()).unwrap();
        assert_eq!(twin.save(), saved);
        for offset in 0..8 {
            let (mut a, mut b) = ([0], [0]);
            port.read(offset, &mut a);
            twin.read(offset, &mut b);
            assert_eq!(a, b, "register {offset}");
        }
        let other = SerialPortState { version: 99, ..saved };
        assert!(SerialPort::restore(other, event(), Console::default()).is_err());
    }

    #[test]
    fn only_the_reset_command_resets() {
        let exit = Arc::new(ExitSignal::new().unwrap());
        let mut line = ResetLine::new(Arc::clone(&exit), Console::default());
        line.write(0, &[0xfe]);
        line.write(4, &[0xd1]);
        line.write(4, &[0xfe, 0xfe]);
        assert_eq!(exit.reason(), None);
        line.write(4, &[0xfe]);
        assert_eq!(exit.reason().unwrap().0, ExitReason::Reset);
    }
}
