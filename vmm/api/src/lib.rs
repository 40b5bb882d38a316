//! The control interface of `husk-vmm`.
//!
//! huskd makes a listening `SOCK_SEQPACKET` unix socket, and starts
//! `husk-vmm` with it as an open descriptor; so huskd can come back to a
//! running VMM through the socket's path, and the VMM needs no access to it.
//! Each packet is one JSON [`Request`] or [`Response`]; file descriptors ride
//! along in `SCM_RIGHTS`, and a message names them by their place in the
//! packet ([`FdIndex`]). Every request gets one response, in order;
//! [`Request::Wait`] gets its own when the machine has ended, so a client
//! gives it a connection for itself.
//!
//! Arguments of the program: `husk-vmm --id <sandbox id> --user <uid>
//! --control-fd <n> --exit-fd <n>`. It is started as root, opens KVM, and becomes
//! the user, who should own nothing else. The exit descriptor is a file that
//! receives one JSON [`Exit`] before the process ends, for a daemon that was not
//! there to wait.

use serde::{Deserialize, Serialize};

pub mod socket;
pub mod words;

/// The version of this interface. It grows when a client has to treat a VMM
/// differently; fields and requests that are merely new do not change it. A VMM of
/// a release before there were versions has 0.
pub const PROTOCOL: u32 = 1;

/// Largest packet, in bytes.
pub const MAX_PACKET: usize = 128 * 1024;

/// Most descriptors in one packet; the kernel's own limit is 253.
pub const MAX_FDS: usize = 64;

/// Largest FUSE message between the VMM and a file server, bytes: 128 KiB of
/// data, and room for its headers.
pub const MAX_FUSE_MESSAGE: usize = (128 << 10) + (4 << 10);

/// The first packet from a file server, to whoever started it: it is ready. All
/// others are FUSE messages.
pub const FILE_SERVER_READY: &[u8] = b"READY";

/// Most bytes of the guest's console that are kept and returned.
pub const CONSOLE_TAIL: usize = 16 * 1024;

/// The line that a guest writes to its console (`/dev/console`, or `/dev/kmsg`
/// with a priority that the console prints) before it ends in good order.
///
/// The machine has no ACPI and so no power switch; the guest ends with
/// `reboot(RB_AUTOBOOT)`, which Linux turns into the keyboard controller's
/// reset (`reboot=k`). The VMM reports that as [`ExitReason::Shutdown`] when
/// this line came before, as [`ExitReason::Panic`] when the kernel printed a
/// panic, and as [`ExitReason::Reset`] otherwise. A terminal buffers: the guest
/// waits with `tcdrain` until the line is out.
pub const SHUTDOWN_MARKER: &str = "husk: shutdown";

/// Place of a file descriptor among those sent with the message.
pub type FdIndex = usize;

/// A request of huskd to the VMM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Request {
    /// Builds the machine and starts its vCPUs. Once, even if that fails.
    Boot(Box<VmConfig>),
    /// Puts a disk into an empty slot, see [`VmConfig::slots`].
    AttachDisk {
        /// Serial number of the slot.
        slot: String,
        /// The file or block device behind it.
        file: FdIndex,
        /// Guest writes are refused.
        read_only: bool,
    },
    /// Empties a slot. The guest must have unmounted it. A slot that is empty
    /// already is no error: whoever asks may not know whether it was filled.
    DetachDisk {
        /// Serial number of the slot.
        slot: String,
    },
    /// Gives the file system device its server, once: a connected
    /// `SOCK_SEQPACKET` socket on which each packet is one FUSE message.
    AttachFs {
        /// The VMM's end of it.
        server: FdIndex,
    },
    /// Asks the guest for memory back; it gets what it gives.
    SetBalloon {
        /// Size the balloon shall have, MiB.
        size_mib: u32,
    },
    /// Saves the machine for clones of it, see [`VmConfig::template`], and ends it.
    Save {
        /// A new file for the state of processors and devices.
        state: FdIndex,
        /// A new file for the guest's memory.
        memory: FdIndex,
    },
    /// How the machine is.
    Info,
    /// The last bytes of the guest's console, at most [`CONSOLE_TAIL`].
    Console,
    /// The present state of vCPUs and devices, for a guest that hangs.
    Inspect,
    /// Answered with [`Response::Exited`] when the machine has ended.
    Wait,
    /// Ends the machine at once.
    Kill,
}

/// A response of the VMM.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Response {
    /// Done.
    Ok,
    /// To [`Request::Info`].
    Info(Info),
    /// To [`Request::Console`].
    Console {
        /// Text, with invalid UTF-8 replaced.
        text: String,
    },
    /// To [`Request::Inspect`].
    Inspection(Inspection),
    /// To [`Request::Wait`].
    Exited(Exit),
    /// The request failed, and the machine is as it was. But one that could not
    /// be saved has ended, and one that could not be built is not tried again.
    Error {
        /// The step that failed, "load kernel".
        stage: String,
        /// The error that it met.
        message: String,
    },
}

/// A machine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmConfig {
    /// 1 to 64.
    pub vcpus: u8,
    /// Guest memory, MiB.
    pub memory_mib: u32,
    /// Uncompressed ELF `vmlinux`.
    pub kernel: FdIndex,
    /// Added to the kernel's command line.
    pub cmdline: String,
    /// Image of the root file system (EROFS). It is mapped into the machine as
    /// persistent memory, and all machines share its pages; it must not be
    /// written to, only replaced by renaming.
    pub root: FdIndex,
    /// Disks in the order in which the guest counts them.
    pub disks: Vec<DiskConfig>,
    /// Serial numbers of block devices that start empty, after `disks`.
    pub slots: Vec<String>,
    /// How much each of `slots` may do.
    #[serde(default)]
    pub slot_limit: Option<RateLimit>,
    /// Network interfaces.
    pub nets: Vec<NetConfig>,
    /// The vsock device, if there is to be one.
    pub vsock: Option<VsockConfig>,
    /// Tag of the file system device, if there is to be one. It starts without
    /// a server, see [`Request::AttachFs`].
    #[serde(default)]
    pub fs: Option<String>,
    /// A balloon with free page reporting.
    pub balloon: bool,
    /// The machine goes on where this one was saved, instead of booting. All
    /// else must be as it was there.
    #[serde(default)]
    pub template: Option<TemplateConfig>,
}

/// The files of [`Request::Save`]. Clones share the memory's pages for as long
/// as they do not write to them; it must not be written to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TemplateConfig {
    /// The state of processors and devices.
    pub state: FdIndex,
    /// The guest's memory.
    pub memory: FdIndex,
}

/// A virtio block device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskConfig {
    /// Serial number that the guest sees, at most 20 bytes of ASCII.
    pub serial: String,
    /// The file or block device behind it.
    pub file: FdIndex,
    /// Guest writes are refused.
    pub read_only: bool,
    /// How much it may do.
    #[serde(default)]
    pub limit: Option<RateLimit>,
}

/// How much a device may do in a second, and at once after it has done less. A
/// rate of 0 is no limit; a burst of 0 is what the rate gives in a second.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct RateLimit {
    /// Bytes of packets or of data on a disk.
    pub bytes_per_second: u64,
    /// Bytes at once.
    pub bytes_burst: u64,
    /// Packets, or requests to a disk.
    pub operations_per_second: u64,
    /// Packets or requests at once.
    pub operations_burst: u64,
}

/// A virtio network interface on a tap.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetConfig {
    /// A descriptor of `/dev/net/tun` with its tap set up (`IFF_TAP |
    /// IFF_NO_PI | IFF_VNET_HDR`), non-blocking. Header size and offloads are
    /// set by the VMM.
    pub tap: FdIndex,
    /// Hardware address in the guest.
    pub mac: [u8; 6],
    /// Largest packet that the guest sends, bytes.
    pub mtu: u16,
    /// How much it may receive.
    #[serde(default)]
    pub receive_limit: Option<RateLimit>,
    /// How much it may send.
    #[serde(default)]
    pub send_limit: Option<RateLimit>,
}

/// The virtio vsock device, with unix sockets on the host's side: a client
/// connects to the listener and says `CONNECT <port>\n`, the answer is `OK
/// <port>\n`. The guest itself can connect to one port of the host, once.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VsockConfig {
    /// Context id of the guest, 3 or more.
    pub cid: u32,
    /// A listening `SOCK_STREAM` unix socket.
    pub listener: FdIndex,
    /// The port of the host that the guest can connect to; none for a clone.
    pub host_port: Option<HostPort>,
}

/// See [`VsockConfig::host_port`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostPort {
    /// The port's number.
    pub port: u32,
    /// A connected `SOCK_STREAM` unix socket, the VMM's end of it: what the
    /// guest says comes out of the other one.
    pub socket: FdIndex,
}

/// How a machine is.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Info {
    /// Process id of the VMM, as it knows itself: 1 in a PID namespace of its own.
    /// The socket tells its client the true one, see [`socket::receive_from`].
    pub pid: u32,
    /// False before [`Request::Boot`] has succeeded.
    pub booted: bool,
    /// Microseconds from the process's start to the first entry into the guest.
    pub boot_us: u64,
    /// Bytes of guest memory that the host holds for it now.
    pub guest_resident_bytes: u64,
    /// Memory that the balloon holds now, MiB.
    pub balloon_mib: u32,
    /// How its file system device is.
    #[serde(default, deserialize_with = "known_or_default")]
    pub fs: FsState,
    /// Open connections of its vsock device.
    #[serde(default)]
    pub connections: usize,
    /// Its version of this interface, see [`PROTOCOL`].
    #[serde(default)]
    pub protocol: u32,
    /// The release of Husk that it is of; empty for those before it was told.
    #[serde(default)]
    pub release: String,
}

/// A value that a later release may have added is taken for the default.
fn known_or_default<'de, D, T>(deserializer: D) -> Result<T, D::Error>
where
    D: serde::Deserializer<'de>,
    T: serde::de::DeserializeOwned + Default,
{
    let value = serde_json::Value::deserialize(deserializer)?;
    Ok(serde_json::from_value(value).unwrap_or_default())
}

/// Whether the requests to a file system device are answered.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FsState {
    /// The machine has no such device.
    #[default]
    None,
    /// The device has no server yet.
    Waiting,
    /// The device has a server.
    Serving,
    /// The server has gone.
    Gone,
}

/// The state of a machine, at about one moment.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Inspection {
    /// One for each vCPU.
    pub vcpus: Vec<VcpuReport>,
    /// One for each virtio device, in the order of their addresses.
    pub devices: Vec<DeviceReport>,
}

/// The state of a vCPU.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum VcpuReport {
    /// The vCPU's thread came out of the guest and looked.
    Seen {
        /// The vCPU waits for an interrupt.
        halted: bool,
        /// Address of its instruction.
        rip: u64,
        /// The stack pointer.
        rsp: u64,
        /// The flags register; bit 9 is set when the vCPU takes interrupts.
        rflags: u64,
        /// Vectors of interrupts that it has yet to take.
        requested: Vec<u8>,
        /// Vectors of interrupts that it is handling.
        in_service: Vec<u8>,
        /// Value of its time stamp counter at which its timer fires; 0 is never.
        timer: u64,
        /// The time stamp counter.
        tsc: u64,
    },
    /// The vCPU's thread has ended, or is held by the host's kernel.
    Gone,
}

/// The state of a virtio device (virtio 1.2 §2.7, §4.2.2).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceReport {
    /// Kind of device (virtio 1.2 §5): 1 network, 2 block, 4 entropy, 5
    /// balloon, 19 socket.
    pub kind: u32,
    /// The status that the driver has written: 15 when it is at work.
    pub status: u32,
    /// Interrupts that the driver has not acknowledged.
    pub interrupt: u32,
    /// The virtqueues; empty until the driver is at work.
    pub queues: Vec<QueueReport>,
}

/// The state of a virtqueue: counters of 16 bits that only grow.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct QueueReport {
    /// Chains that the driver has made available.
    pub available: u16,
    /// Number of these that the device has taken.
    pub taken: u16,
    /// The device wants to be notified of the chain after this one.
    pub notify_after: u16,
    /// Chains that the device has given back.
    pub used: u16,
    /// The driver wants to be interrupted for the chain after this one.
    pub interrupt_after: u16,
}

/// The end of a machine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Exit {
    /// The kind.
    #[serde(deserialize_with = "known_or_default")]
    pub reason: ExitReason,
    /// In words, for the kinds that need them.
    pub detail: String,
    /// The last lines of the guest's console.
    pub console: String,
}

/// The kinds of end. The process's exit code is [`ExitReason::code`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ExitReason {
    /// The guest ended in good order: reset after [`SHUTDOWN_MARKER`].
    Shutdown,
    /// The guest reset the machine and had not said why.
    Reset,
    /// The guest kernel panicked.
    Panic,
    /// The guest triple-faulted.
    TripleFault,
    /// [`Request::Kill`].
    Killed,
    /// [`Request::Save`].
    Saved,
    /// The VMM itself could not go on; `detail` says why.
    #[default]
    VmmError,
}

impl ExitReason {
    /// Exit code of the process.
    #[must_use]
    pub const fn code(self) -> i32 {
        match self {
            Self::Shutdown => 0,
            Self::VmmError => 1,
            Self::Reset => 10,
            Self::Panic => 11,
            Self::TripleFault => 12,
            Self::Killed => 13,
            Self::Saved => 14,
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn answers_of_other_releases_are_understood() {
        // Of the first release, to its last field.
        let old = r#"{"info":{"pid":7,"booted":true,"boot_us":1,"guest_resident_bytes":2,"balloon_mib":3}}"#;
        let Response::Info(info) = serde_json::from_str(old).unwrap() else { panic!("it is an Info") };
        assert_eq!((info.pid, info.protocol, info.release.as_str()), (7, 0, ""));
        let new = r#"{"info":{"pid":7,"booted":true,"boot_us":1,"guest_resident_bytes":2,"balloon_mib":3,
            "fs":"of_the_future","protocol":9,"release":"9.0","of_the_future":[1]}}"#;
        let Response::Info(info) = serde_json::from_str(new).unwrap() else { panic!("it is an Info") };
        assert_eq!((info.fs, info.protocol, info.release.as_str()), (FsState::None, 9, "9.0"));
        let exit: Exit =
            serde_json::from_str(r#"{"reason":"of_the_future","detail":"why","console":"","x":1}"#).unwrap();
        assert_eq!((exit.reason, exit.detail.as_str()), (ExitReason::VmmError, "why"));
    }
}
