//! Saves a running guest, and continues with clones of it.

use std::fs::File;
use std::os::fd::AsFd;

use husk_vmm_api::{DiskConfig, ExitReason, Request, Response, TemplateConfig, VmConfig};

use crate::support::{Vmm, disk};

const DISK: u64 = 1 << 20;

fn with_disk(config: &mut VmConfig) {
    config.disks.push(DiskConfig {
        serial: "data".into(),
        file: 2,
        read_only: false,
        limit: None,
        flush_limit: None,
    });
}

/// A saved machine: its configuration, its state, and its memory.
struct Template {
    config: VmConfig,
    state: File,
    memory: File,
}

fn save(vcpus: u8) -> (Template, u32) {
    let change = |config: &mut VmConfig| {
        config.vcpus = vcpus;
        with_disk(config);
    };
    let vmm = Vmm::boot("count", change, &[&disk(DISK, 0, "the template")]);
    vmm.wait_console("3: the template");
    let (state, memory) = (tempfile::tempfile().unwrap(), tempfile::tempfile().unwrap());
    let config = vmm.config.clone();
    let request = Request::Save { state: 0, memory: 1 };
    assert_eq!(vmm.ask(&request, &[state.as_fd(), memory.as_fd()]), Response::Ok);
    let exit = vmm.wait();
    assert_eq!(exit.reason, ExitReason::Saved);
    let last = numbers(&exit.console).last().copied().expect("it counted");
    (Template { config, state, memory }, last)
}

/// The numbers that the guest has counted, from complete lines.
fn numbers(console: &str) -> Vec<u32> {
    console.lines().filter_map(|line| line.split_once(": ")?.0.trim().parse().ok()).collect()
}

impl Template {
    fn reopened(file: &File) -> File {
        File::open(format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(file))).unwrap()
    }

    fn clone(&self, change: impl FnOnce(&mut VmConfig), text: &str) -> Result<Vmm, Response> {
        let (state, memory) = (Self::reopened(&self.state), Self::reopened(&self.memory));
        let mut config = self.config.clone();
        config.template = Some(TemplateConfig { state: 3, memory: 4 });
        change(&mut config);
        Vmm::boot_as(config, &[&disk(DISK, 0, text), &state, &memory])
    }
}

#[test]
#[ignore = "boots machines, in a KVM host: see tests/README.md"]
fn clones_go_on_where_the_template_was_saved_with_disks_of_their_own() {
    for vcpus in [1, 2] {
        let (template, last) = save(vcpus);
        let clones: Vec<_> = ["one", "two"].map(|text| (text, template.clone(|_| (), text).unwrap())).into();
        for (text, vmm) in &clones {
            vmm.wait_console(&format!("{}: {text}", last + 3));
            let counted = numbers(&vmm.console());
            assert!(counted.iter().all(|number| *number > last), "{last}, then {counted:?}");
            let Response::Info(info) = vmm.ask(&Request::Info, &[]) else { panic!("no info") };
            assert_eq!(info.connections, 0);
        }
        for (_, vmm) in clones {
            assert_eq!(vmm.ask(&Request::Kill, &[]), Response::Ok);
            assert_eq!(vmm.wait().reason, ExitReason::Killed);
        }
    }
}

#[test]
#[ignore = "boots machines, in a KVM host: see tests/README.md"]
fn a_clone_that_would_be_another_machine_is_refused() {
    let (template, _) = save(1);
    let refused = |change: &dyn Fn(&mut VmConfig)| match template.clone(change, "x") {
        Err(Response::Error { stage, message }) => format!("{stage}: {message}"),
        Err(other) => panic!("{other:?}"),
        Ok(_) => panic!("it was cloned"),
    };
    for (change, words) in [
        (&(|config: &mut VmConfig| config.vcpus = 2) as &dyn Fn(&mut VmConfig), "1 vCPUs instead of 2"),
        (&|config| config.memory_mib = 64, "the machine 67108864"),
        (&|config| config.cmdline += " more", "other words for its kernel"),
        (&|config| config.balloon = true, "one device more"),
        (&|config| config.disks[0].serial = "other".into(), "in the place of a disk"),
        (&|config| config.disks[0].read_only = true, "in the place of a disk"),
        (&|config| config.template = Some(TemplateConfig { state: 4, memory: 3 }), "this is no snapshot"),
    ] {
        let message = refused(change);
        assert!(message.starts_with("restore the template: ") && message.contains(words), "{message}");
    }
}
