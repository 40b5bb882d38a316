//! Firecracker, with everything in a configuration file and no API server.

use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use anyhow::Context;
use husk_proto::agent::READY_PORT;
use serde_json::json;

use super::{Guest, Running, Vmm, Word, quiet};

/// The kernel command line that husk-vmm uses; Firecracker adds the addresses of its devices.
const CMDLINE: &str = "console=ttyS0 quiet reboot=k panic=-1 8250.nr_uarts=1 \
                       root=/dev/vda rootfstype=erofs ro init=/sbin/init";

pub struct Firecracker {
    pub program: PathBuf,
}

impl Vmm for Firecracker {
    fn name(&self) -> &'static str {
        "firecracker"
    }

    fn start(&self, guest: &Guest, folder: &Path) -> anyhow::Result<Running> {
        let vsock = folder.join("v");
        let ready = format!("{}_{READY_PORT}", vsock.display());
        let listener = UnixListener::bind(ready).context("make a socket")?;
        let config = json!({
            "boot-source": { "kernel_image_path": guest.kernel, "boot_args": CMDLINE },
            "machine-config": { "vcpu_count": 1, "mem_size_mib": guest.memory_mib },
            "drives": [{
                "drive_id": "root",
                "path_on_host": guest.rootfs,
                "is_root_device": false,
                "is_read_only": true,
            }],
            "vsock": { "guest_cid": 3, "uds_path": vsock },
            "entropy": {},
        });
        let path = folder.join("config.json");
        std::fs::write(&path, config.to_string()).context("write the configuration")?;
        let child = quiet(&self.program)
            .args(["--no-api", "--id", "bench", "--config-file"])
            .arg(&path)
            .spawn()
            .context("start firecracker")?;
        Ok(Running { child, word: Word::Listener(listener), _control: None })
    }
}

/// The path of Firecracker, if it is on the PATH.
pub fn find() -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path).map(|folder| folder.join("firecracker")).find(|program| program.is_file())
}
