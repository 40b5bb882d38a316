//! The VMM's control protocol: packets of JSON as the VMM reads them from huskd, and huskd from a VMM that its guest may
//! have taken over.

use std::os::fd::AsFd;

use husk_vmm_api::socket::{self, receive};
use husk_vmm_api::{
    DeviceReport, DiskConfig, Exit, ExitReason, FsState, HostPort, Info, Inspection, NetConfig, QueueReport,
    RateLimit, Request, Response, TemplateConfig, VcpuReport, VmConfig, VsockConfig,
};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::devices::{packets, send};
use crate::input::Input;

/// Receives one packet.
pub fn run(data: &[u8]) {
    let mut input = Input::new(data);
    match input.byte() % 5 {
        0 => packet::<Request>(input.rest()),
        1 => packet::<Response>(input.rest()),
        2 => packet::<Info>(input.rest()),
        3 => packet::<Inspection>(input.rest()),
        _ => packet::<Exit>(input.rest()),
    }
}

/// A message that is understood can be sent, and arrives as the same.
#[allow(clippy::unwrap_used)]
fn packet<M: Serialize + DeserializeOwned + PartialEq + std::fmt::Debug>(bytes: &[u8]) {
    let (here, there) = packets();
    send(&there, bytes);
    let Ok(Some((message, fds))) = receive::<M>(here.as_fd()) else { return };
    assert!(fds.is_empty());
    socket::send(there.as_fd(), &message, &[]).unwrap();
    let again = receive::<M>(here.as_fd()).unwrap().map(|(message, _)| message);
    assert_eq!(again, Some(message));
}

fn seed(kind: u8, message: &impl Serialize) -> Vec<u8> {
    [vec![kind], serde_json::to_vec(message).unwrap_or_default()].concat()
}

/// Messages as both sides send them.
#[must_use]
pub fn seeds() -> Vec<Vec<u8>> {
    let limit =
        RateLimit { bytes_per_second: 1, bytes_burst: 2, operations_per_second: 3, operations_burst: 4 };
    let config = VmConfig {
        vcpus: 1,
        memory_mib: 128,
        kernel: 0,
        cmdline: "quiet".into(),
        root: 1,
        disks: vec![DiskConfig {
            serial: "disk".into(),
            file: 2,
            read_only: false,
            limit: Some(limit),
            flush_limit: Some(limit),
        }],
        slots: vec!["image-0".into()],
        slot_limit: None,
        console_limit: Some(limit),
        nets: vec![NetConfig {
            tap: 3,
            mac: [2, 0, 0, 0, 0, 1],
            mtu: 1500,
            receive_limit: None,
            send_limit: Some(limit),
        }],
        vsock: Some(VsockConfig {
            cid: 3,
            listener: 4,
            host_port: Some(HostPort { port: 1024, socket: 5 }),
            limit: Some(limit),
        }),
        fs: Some("volumes".into()),
        fs_limit: None,
        balloon: true,
        template: Some(TemplateConfig { state: 6, memory: 7 }),
    };
    let info = Info {
        pid: 1,
        booted: true,
        boot_us: 5,
        guest_resident_bytes: 4096,
        balloon_mib: 0,
        fs: FsState::Serving,
        connections: 1,
        protocol: 1,
        release: "0.1.0".into(),
    };
    let queues = vec![QueueReport { available: 1, taken: 1, notify_after: 2, used: 1, interrupt_after: 2 }];
    let inspection = Inspection {
        vcpus: vec![VcpuReport::Gone],
        devices: vec![DeviceReport { kind: 2, status: 15, interrupt: 0, queues }],
    };
    let exit = Exit { reason: ExitReason::Panic, detail: "why".into(), console: "tail".into() };
    vec![
        seed(0, &Request::Boot(Box::new(config))),
        seed(0, &Request::AttachDisk { slot: "image-0".into(), file: 0, read_only: true }),
        seed(0, &Request::Wait),
        seed(1, &Response::Error { stage: "load kernel".into(), message: "why".into() }),
        seed(1, &Response::Inspection(inspection.clone())),
        seed(2, &info),
        seed(3, &inspection),
        seed(4, &exit),
    ]
}
