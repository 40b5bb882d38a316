//! Flags of a container's files.

use anyhow::bail;
use husk_proto::cri;

use super::{Plan, mount};

/// Volumes and devices.
#[derive(Clone, Debug, clap::Args)]
#[command(next_help_heading = "Files")]
pub struct Storage {
    /// Mount a file or directory of the host; a directory that is missing is made. Options: ro, rslave, noexec, …
    #[arg(short, long, value_name = "HOST_PATH:PATH[:OPTIONS]")]
    volume: Vec<String>,
    /// Mount a file or directory of the host that exists, or an image.
    #[arg(long, value_name = "type=bind|image,src=…,dst=…[,readonly]")]
    mount: Vec<String>,
    /// Keep the container from writing to its image's files.
    #[arg(long)]
    read_only: bool,
    /// Give the container a device: a path, or a name of CDI.
    #[arg(long, value_name = "PATH[:PATH[:rwm]]")]
    device: Vec<String>,
}

impl Storage {
    pub(super) fn apply(&self, plan: &mut Plan) -> anyhow::Result<()> {
        for given in &self.volume {
            let volume = mount::volume(given)?;
            plan.directories.push(volume.host_path.clone().into());
            plan.container.mounts.push(volume);
        }
        for given in &self.mount {
            let mount = mount::mount(given)?;
            plan.images.extend(mount.image.iter().map(|image| image.image.clone()));
            plan.container.mounts.push(mount);
        }
        plan.container_security.readonly_rootfs = self.read_only;
        for given in &self.device {
            if given.starts_with('/') {
                plan.container.devices.push(device(given)?);
            } else if given.contains('/') && given.contains('=') {
                plan.container.cdi_devices.push(cri::CdiDevice { name: given.clone() });
            } else {
                bail!("--device {given}: write a path, or a name of CDI such as vendor.com/class=name");
            }
        }
        Ok(())
    }
}

/// Reads `PATH[:PATH_INSIDE[:PERMISSIONS]]`.
fn device(given: &str) -> anyhow::Result<cri::Device> {
    let parts: Vec<&str> = given.split(':').collect();
    let is_permissions = |text: &str| !text.is_empty() && text.chars().all(|letter| "rwm".contains(letter));
    let (host, inside, permissions) = match parts[..] {
        [host] => (host, host, "rwm"),
        [host, permissions] if is_permissions(permissions) => (host, host, permissions),
        [host, inside] => (host, inside, "rwm"),
        [host, inside, permissions] if is_permissions(permissions) => (host, inside, permissions),
        _ => bail!("--device {given}: write PATH, PATH:PATH_INSIDE or PATH:PATH_INSIDE:rwm"),
    };
    Ok(cri::Device {
        host_path: host.to_owned(),
        container_path: inside.to_owned(),
        permissions: permissions.to_owned(),
    })
}
