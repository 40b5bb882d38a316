//! Starts a pod in a VM.

use std::io;
use std::path::Path;
use std::time::Instant;

use husk_base::FileError;
use husk_config::VmHandler;
use husk_network::{Attachment, GuestInterface, Route};
use husk_proto::agent::{self, CreateSandboxRequest};
use husk_vm::launch::{self, MAIN_MAC, Nic};
use tokio::sync::oneshot;

use crate::start::{Services, StartPlan, Started, Times, guest_dns, or_hosts};
use crate::{Backend, Error, ImageDisks, RunningPod, VmSize};

/// Fresh bytes for the guest's random number generator.
const SEED: usize = 64;

pub(crate) async fn start(
    services: Services<'_>,
    plan: &StartPlan<'_>,
    handler: &VmHandler,
) -> Result<Started, Error> {
    let StartPlan { place, config, .. } = plan;
    let VmSize { vcpus, memory_mib } = VmSize::of(config, handler);
    let started = Instant::now();
    let entropy = seed(husk_base::random::fill)?;
    let vm = |nics| launch::Plan {
        id: &place.id,
        handler,
        vcpus,
        memory_mib,
        limits: &plan.limits,
        run_dir: place.run_dir.clone(),
        scratch: plan.scratch.clone(),
        nics,
        cgroup: place.cgroup.clone(),
    };

    // The VM boots while the CNI plugins are at work: it needs a tap for that, and
    // nothing that they decide.
    let (early, main_tap) = oneshot::channel();
    let attach = async {
        let attached = services.network.attach(&plan.network, early).await?;
        Ok::<_, Error>((attached, started.elapsed()))
    };
    let boot = async {
        services.disks.create(&plan.scratch, handler.disk_mib).await?;
        // Without a tap the other branch has failed, and says why.
        let Ok(tap) = main_tap.await else { return std::future::pending().await };
        let copy = tap.try_clone().map_err(FileError::at("pass tap", Path::new("/dev/net/tun")))?;
        let nic = Nic { tap: copy, mac: MAIN_MAC };
        Ok((services.templates.launch(&vm(vec![nic])).await?, tap))
    };
    let ((network, network_time), (mut launched, main_tap)) = tokio::try_join!(attach, boot)?;

    let Attachment { netns, ips, mut interfaces, routes, dns } = network;
    let mut guest_interfaces: Vec<_> = interfaces.iter().map(guest_interface).collect();
    if interfaces.len() > 1 {
        // The plugins made more than could be known: once more, with all.
        tracing::info!(interfaces = interfaces.len(), "booting again for more interfaces");
        drop(launched);
        husk_vm::destroy(&place.run_dir).await?;
        let mut main_tap = Some(main_tap);
        let nics = interfaces.iter_mut().filter_map(|interface| {
            let tap = interface.tap.take().or_else(|| main_tap.take())?;
            Some(Nic { tap, mac: interface.mac })
        });
        launched = services.templates.launch(&vm(nics.collect())).await?;
    } else if let Some(main) = guest_interfaces.first_mut() {
        main.device_mac = mac_text(MAIN_MAC);
    }

    let request = CreateSandboxRequest {
        hostname: husk_oci::host_name(config, false),
        dns: Some(guest_dns(config, or_hosts(config, dns).await)),
        interfaces: guest_interfaces,
        routes: routes.into_iter().map(guest_route).collect(),
        scratch_serial: launch::SCRATCH_SERIAL.into(),
        time_unix_nanos: husk_base::now(),
        entropy,
        hooks: husk_oci::hooks::programs(&handler.hooks)?,
        ..Default::default()
    };
    let disks = ImageDisks::new(handler.image_slots);
    let running = RunningPod { backend: Backend::Vm(launched.vmm), agent: launched.agent, disks };
    let times = Times {
        network: network_time,
        vmm: launched.start,
        kernel: launched.kernel,
        agent: launched.connect,
    };
    Ok(Started { running, request, netns, ips, pid: launched.vmm_pid, cloned: launched.cloned, times })
}

fn guest_interface(interface: &GuestInterface) -> agent::Interface {
    agent::Interface {
        name: interface.name.clone(),
        mac: mac_text(interface.mac),
        mtu: interface.mtu.into(),
        addresses: interface.addresses.clone(),
        device_mac: String::new(),
    }
}

fn mac_text(mac: [u8; 6]) -> String {
    mac.map(|byte| format!("{byte:02x}")).join(":")
}

fn guest_route(route: Route) -> agent::Route {
    agent::Route {
        destination: route.destination,
        gateway: route.gateway.map(|gateway| gateway.to_string()).unwrap_or_default(),
        interface: route.interface,
    }
}

/// The machine's own random numbers begin with it. A clone that had none would go
/// on with those of its template, as every other clone.
fn seed(fill: impl FnOnce(&mut [u8]) -> io::Result<()>) -> Result<Vec<u8>, Error> {
    let mut seed = vec![0u8; SEED];
    fill(&mut seed).map_err(Error::Seed)?;
    Ok(seed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pod_without_a_seed_does_not_start() {
        let error = seed(|_| Err(io::ErrorKind::PermissionDenied.into())).unwrap_err().to_string();
        assert!(error.contains("seed") && error.contains("getrandom"), "{error}");
        assert!(matches!(seed(husk_base::random::fill), Ok(seed) if seed.len() == SEED));
    }
}
