//! The control interface of `husk-vmm`.
//!
//! huskd makes a listening `SOCK_SEQPACKET` unix socket, and passes it to
//! `husk-vmm` as an open descriptor. So a later huskd finds a running VMM by the
//! socket's path, and the VMM itself needs no access to that path. Each packet is
//! one JSON [`Request`] or [`Response`]. File descriptors travel in `SCM_RIGHTS`,
//! and a message names them by their place in the packet ([`FdIndex`]). Every
//! request gets one response, in order. [`Request::Wait`] is answered when the
//! machine has ended, so a client sends it on a connection of its own.
//!
//! The arguments of the program are `husk-vmm --id <sandbox id> --user <uid>
//! --control-fd <n> --exit-fd <n>`. huskd starts it as root; it opens KVM, and then
//! becomes the user, who should own nothing else. The exit descriptor is a file
//! that receives one JSON [`Exit`] before the process ends, for a huskd that was
//! not running at that time.

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

/// The first packet that a file server sends: it is ready. All other packets are
/// FUSE messages.
pub const FILE_SERVER_READY: &[u8] = b"READY";

/// How many bytes of the guest's console the VMM keeps and returns.
pub const CONSOLE_TAIL: usize = 16 * 1024;

/// The line that a guest writes to its console (`/dev/console`, or `/dev/kmsg`
/// with a priority that the console prints) before it ends in good order.
///
/// The machine has no ACPI and so no power switch. The guest ends with
/// `reboot(RB_AUTOBOOT)`, which Linux turns into the keyboard controller's
/// reset (`reboot=k`). The VMM reports a reset as [`ExitReason::Shutdown`] when
/// this line came before it, as [`ExitReason::Panic`] when the kernel printed a
/// panic, and as [`ExitReason::Reset`] otherwise. Because terminals buffer, the
/// guest waits with `tcdrain` until the line is out.
pub const SHUTDOWN_MARKER: &str = "husk: shutdown";

/// The place of a file descriptor among those sent with the message.
pub type FdIndex = usize;

/// A request to the VMM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Request {
    /// Builds the machine and starts its vCPUs. Only the first such request is
    /// served, even if it fails.
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
    /// Empties a slot, which the guest must have unmounted. Emptying an empty slot
    /// succeeds, because the client may not know whether it was filled.
    DetachDisk {
        /// Serial number of the slot.
        slot: String,
    },
    /// Connects the file system device to its server, once. The connection is a
    /// `SOCK_SEQPACKET` socket on which each packet is one FUSE message.
    AttachFs {
        /// The VMM's end of the connection.
        server: FdIndex,
    },
    /// Asks the guest to return memory. The guest decides how much it returns.
    SetBalloon {
        /// Wanted size of the balloon, MiB.
        size_mib: u32,
    },
    /// Saves a snapshot of the machine, from which clones start
    /// ([`VmConfig::template`]), and ends the machine.
    Save {
        /// A new file for the state of vCPUs and devices.
        state: FdIndex,
        /// A new file for the guest's memory.
        memory: FdIndex,
    },
    /// Asks for the machine's [`Info`].
    Info,
    /// Asks for the last bytes of the guest's console, at most [`CONSOLE_TAIL`].
    Console,
    /// Asks for the present state of vCPUs and devices, to find out why a guest
    /// hangs.
    Inspect,
    /// Asks for the machine's end: the response is [`Response::Exited`], once
    /// it has ended.
    Wait,
    /// Ends the machine at once.
    Kill,
}

/// A response to a request.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Response {
    /// The request succeeded.
    Ok,
    /// The response to [`Request::Info`].
    Info(Info),
    /// The response to [`Request::Console`].
    Console {
        /// The text, with invalid UTF-8 replaced.
        text: String,
    },
    /// The response to [`Request::Inspect`].
    Inspection(Inspection),
    /// The response to [`Request::Wait`].
    Exited(Exit),
    /// The request failed, and the machine is as it was before. The exceptions
    /// are a machine that could not be saved, which has ended, and a machine that
    /// could not be built, which the VMM does not try to build again.
    Error {
        /// The step that failed, "load kernel".
        stage: String,
        /// The cause, and what to do.
        message: String,
    },
}

/// The configuration of a machine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmConfig {
    /// Number of vCPUs, 1 to 64.
    pub vcpus: u8,
    /// Guest memory, MiB.
    pub memory_mib: u32,
    /// The kernel, an uncompressed ELF `vmlinux`.
    pub kernel: FdIndex,
    /// Text that is added to the kernel's command line.
    pub cmdline: String,
    /// The image of the guest root (EROFS). The VMM maps it into the machine as
    /// persistent memory, and all machines share its pages. The file must not be
    /// written to; it is replaced by renaming another one over it.
    pub root: FdIndex,
    /// Disks, in the order in which the guest numbers them.
    pub disks: Vec<DiskConfig>,
    /// Serial numbers of block devices that start empty. They come after
    /// `disks`.
    pub slots: Vec<String>,
    /// The rate limit of each of `slots`.
    #[serde(default)]
    pub slot_limit: Option<RateLimit>,
    /// How much of the guest's console is kept. It has bytes only.
    #[serde(default)]
    pub console_limit: Option<RateLimit>,
    /// Network interfaces.
    pub nets: Vec<NetConfig>,
    /// The vsock device, if the machine has one.
    pub vsock: Option<VsockConfig>,
    /// Tag of the file system device, if the machine has one. The device starts
    /// without a server, see [`Request::AttachFs`].
    #[serde(default)]
    pub fs: Option<String>,
    /// How much may be asked of the file system device's server.
    #[serde(default)]
    pub fs_limit: Option<RateLimit>,
    /// Whether the machine has a balloon with free page reporting.
    pub balloon: bool,
    /// The snapshot that the machine starts from instead of booting. Everything
    /// else in the configuration must be equal to that of the machine that was
    /// saved.
    #[serde(default)]
    pub template: Option<TemplateConfig>,
}

/// The files that [`Request::Save`] wrote. Clones share the pages of the memory
/// file until they write to them, so nobody may write to the files.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TemplateConfig {
    /// The state of vCPUs and devices.
    pub state: FdIndex,
    /// The guest's memory.
    pub memory: FdIndex,
}

/// A virtio block device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskConfig {
    /// Serial number that the guest reads, at most 20 bytes of ASCII.
    pub serial: String,
    /// The file or block device behind it.
    pub file: FdIndex,
    /// Whether guest writes are refused.
    pub read_only: bool,
    /// The disk's rate limit.
    #[serde(default)]
    pub limit: Option<RateLimit>,
    /// How often it may be flushed. It has operations only.
    #[serde(default)]
    pub flush_limit: Option<RateLimit>,
}

/// How much a device may do in a second, and how much at once after it was
/// idle. A rate of 0 is no limit; a burst of 0 is the amount of one second.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct RateLimit {
    /// Bytes a second: of packets, or of data on a disk.
    pub bytes_per_second: u64,
    /// Most bytes at once.
    pub bytes_burst: u64,
    /// Packets, or requests to a disk, a second.
    pub operations_per_second: u64,
    /// Most packets or requests at once.
    pub operations_burst: u64,
}

impl RateLimit {
    /// A limit of rates and bursts: of bytes, and of operations.
    #[must_use]
    pub const fn new(bytes: (u64, u64), operations: (u64, u64)) -> Self {
        Self {
            bytes_per_second: bytes.0,
            bytes_burst: bytes.1,
            operations_per_second: operations.0,
            operations_burst: operations.1,
        }
    }
}

/// A virtio network interface on a tap.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetConfig {
    /// A non-blocking descriptor of `/dev/net/tun` with its tap set up (`IFF_TAP |
    /// IFF_NO_PI | IFF_VNET_HDR`). The VMM sets header size and offloads.
    pub tap: FdIndex,
    /// Hardware address in the guest.
    pub mac: [u8; 6],
    /// Largest packet that the guest sends, bytes.
    pub mtu: u16,
    /// The rate limit of received packets.
    #[serde(default)]
    pub receive_limit: Option<RateLimit>,
    /// The rate limit of sent packets.
    #[serde(default)]
    pub send_limit: Option<RateLimit>,
}

/// The virtio vsock device, with unix sockets on the host's side. A client
/// connects to the listener and sends `CONNECT <port>\n`; the answer is `OK
/// <port>\n`. The guest itself can connect to one port of the host, once.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VsockConfig {
    /// Context id of the guest, 3 or more.
    pub cid: u32,
    /// A listening `SOCK_STREAM` unix socket.
    pub listener: FdIndex,
    /// The port of the host that the guest can connect to. A clone has none.
    pub host_port: Option<HostPort>,
    /// How much the guest may send.
    #[serde(default)]
    pub limit: Option<RateLimit>,
}

/// The port of the host that a guest can connect to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostPort {
    /// The number of the port.
    pub port: u32,
    /// The VMM's end of a connected `SOCK_STREAM` unix socket. The other end
    /// receives the bytes that the guest sends.
    pub socket: FdIndex,
}

/// The state of a machine and its VMM.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Info {
    /// Process id of the VMM, as it knows itself: 1 in a PID namespace of its own.
    /// The socket tells its client the true one, see [`socket::receive_from`].
    pub pid: u32,
    /// Whether [`Request::Boot`] has succeeded.
    pub booted: bool,
    /// Microseconds from the process's start to the first entry into the guest.
    pub boot_us: u64,
    /// Bytes of guest memory that the host holds for the machine now.
    pub guest_resident_bytes: u64,
    /// Memory that the balloon holds now, MiB.
    pub balloon_mib: u32,
    /// The state of the file system device.
    #[serde(default, deserialize_with = "known_or_default")]
    pub fs: FsState,
    /// Open connections of the vsock device.
    #[serde(default)]
    pub connections: usize,
    /// The VMM's version of this interface, see [`PROTOCOL`].
    #[serde(default)]
    pub protocol: u32,
    /// The VMM's release of Husk; empty for releases before this field was
    /// added.
    #[serde(default)]
    pub release: String,
}

/// Takes a value that only a later release knows for the default.
fn known_or_default<'de, D, T>(deserializer: D) -> Result<T, D::Error>
where
    D: serde::Deserializer<'de>,
    T: serde::de::DeserializeOwned + Default,
{
    let value = serde_json::Value::deserialize(deserializer)?;
    Ok(serde_json::from_value(value).unwrap_or_default())
}

/// Whether a file system device has a server that answers its requests.
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

/// The state of a machine; its parts are read at slightly different moments.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Inspection {
    /// The state of each vCPU.
    pub vcpus: Vec<VcpuReport>,
    /// The state of each virtio device, in the order of their addresses.
    pub devices: Vec<DeviceReport>,
}

/// The state of a vCPU.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum VcpuReport {
    /// The vCPU's thread left the guest and reported its state.
    Seen {
        /// The vCPU waits for an interrupt.
        halted: bool,
        /// Instruction pointer.
        rip: u64,
        /// The stack pointer.
        rsp: u64,
        /// The flags register; bit 9 is set when the vCPU takes interrupts.
        rflags: u64,
        /// Vectors of interrupts that wait for the vCPU.
        requested: Vec<u8>,
        /// Vectors of interrupts that the vCPU is handling.
        in_service: Vec<u8>,
        /// Value of the time stamp counter at which the timer fires; 0 if it does not.
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
    /// The status that the driver has written: 15 when the driver has finished
    /// its set-up.
    pub status: u32,
    /// Interrupts that the driver has not acknowledged.
    pub interrupt: u32,
    /// The virtqueues; empty until the driver has set up the device.
    pub queues: Vec<QueueReport>,
}

/// The state of a virtqueue: counters of 16 bits that only grow.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct QueueReport {
    /// Chains that the driver has made available.
    pub available: u16,
    /// Chains of these that the device has taken.
    pub taken: u16,
    /// The device asks for a notification when the driver makes the chain after
    /// this one available.
    pub notify_after: u16,
    /// Chains that the device has returned.
    pub used: u16,
    /// The driver asks for an interrupt when the device returns the chain after
    /// this one.
    pub interrupt_after: u16,
}

/// The exit record: the end of a machine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Exit {
    /// The kind of the machine's end.
    #[serde(deserialize_with = "known_or_default")]
    pub reason: ExitReason,
    /// The cause in words; empty for kinds that need none.
    pub detail: String,
    /// The last lines of the guest's console.
    pub console: String,
}

/// The kinds of a machine's end. [`ExitReason::code`] is the exit code of the
/// process.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ExitReason {
    /// The guest shut down: it reset the machine after [`SHUTDOWN_MARKER`].
    Shutdown,
    /// The guest reset the machine without [`SHUTDOWN_MARKER`].
    Reset,
    /// The guest kernel panicked.
    Panic,
    /// The guest triple-faulted.
    TripleFault,
    /// A client sent [`Request::Kill`].
    Killed,
    /// A client sent [`Request::Save`], and the machine was saved.
    Saved,
    /// The VMM itself could not continue; `detail` says why.
    #[default]
    VmmError,
}

impl ExitReason {
    /// The exit code of the process.
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
    use super::*;

    #[test]
    fn answers_of_other_releases_are_understood() {
        // The response of the first release, which ended with this field.
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
