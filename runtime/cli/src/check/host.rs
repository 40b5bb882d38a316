//! Requirements of the host: privileges, the kernel's network parts, CNI, cgroups.

use std::path::Path;
use std::time::Duration;

use husk_config::Config;
use husk_network::{self as network, Network, NetworkConfig};
use husk_proto::cri;

use super::report::{Finding, Report};
use crate::client;

/// Checks all of them.
pub async fn check(report: &mut Report, config: &Config) {
    report.add("root", root());
    report.add("tap and tc", redirection().await);
    report.add("cni", cni(config).await);
    report.add("cgroup v2", cgroups());
}

/// Whether huskd serves.
pub async fn huskd(report: &mut Report, config: &Config) {
    let version = async {
        let mut client = client::connect(&config.socket).await?;
        let answer = client.version(cri::VersionRequest::default()).await.map_err(client::said)?;
        anyhow::Ok(answer.into_inner().runtime_version)
    };
    let finding = match version.await {
        Ok(version) => Finding::Ok(format!("{version} on {}", config.socket.display())),
        Err(error) => Finding::note(error.to_string(), "systemctl start huskd"),
    };
    report.add("huskd", finding);
}

fn root() -> Finding {
    if nix::unistd::geteuid().is_root() {
        Finding::Ok("yes".into())
    } else {
        Finding::missing("huskd makes machines, namespaces and mounts", "sudo husk check")
    }
}

/// Tries redirection in a network namespace that no other process is in.
async fn redirection() -> Finding {
    match network::probe().await {
        Ok(()) => Finding::Ok("the kernel makes taps, and redirects and filters their traffic".into()),
        Err(error) => Finding::missing(
            husk_base::chain(&error),
            "modprobe -a tun veth bridge sch_ingress cls_u32 cls_bpf act_mirred",
        ),
    }
}

async fn cni(config: &Config) -> Finding {
    let network = Network::new(NetworkConfig {
        conf_dir: config.network.conf_dir.clone(),
        bin_dirs: config.network.bin_dirs.clone(),
        cache_dir: config.state_dir.join("network"),
        plugin_timeout: Duration::from_secs(config.network.plugin_timeout_seconds),
    });
    match network.ready().await {
        Ok(()) => Finding::Ok(format!("{}, and its plugins", config.network.conf_dir.display())),
        Err(reason) => {
            let plugins = config.network.bin_dirs.iter().any(|dir| dir.join("bridge").exists());
            let fix = if plugins {
                "put a CNI configuration there; docs/guides/network.md has one to start from"
            } else {
                "apt install containernetworking-plugins"
            };
            Finding::missing(reason.to_string(), fix)
        }
    }
}

fn cgroups() -> Finding {
    if Path::new("/sys/fs/cgroup/cgroup.controllers").exists() {
        Finding::Ok("/sys/fs/cgroup".into())
    } else {
        Finding::note(
            "not mounted on /sys/fs/cgroup: a pod's cost to the host is not limited, and there are no host pods",
            "boot with systemd.unified_cgroup_hierarchy=1",
        )
    }
}
