//! The start, the life and the end of machines.

use std::fs;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use husk_vmm_api::{DiskConfig, ExitReason, Request, Response, socket};

use crate::support::{TIME_LIMIT, USER, Vmm, disk};

#[test]
#[ignore = "boots machines, in a KVM host: see tests/README.md"]
fn a_guest_that_ends_in_good_order() {
    let exit = Vmm::boot("shutdown", |_| (), &[]).wait();
    assert_eq!(exit.reason, ExitReason::Shutdown, "{}", exit.console);
    assert!(exit.console.contains("husk: shutdown"));
}

#[test]
#[ignore = "boots machines, in a KVM host: see tests/README.md"]
fn a_guest_that_resets() {
    assert_eq!(Vmm::boot("reset", |_| (), &[]).wait().reason, ExitReason::Reset);
}

#[test]
#[ignore = "boots machines, in a KVM host: see tests/README.md"]
fn a_kernel_that_panics() {
    let exit = Vmm::boot("panic", |_| (), &[]).wait();
    assert_eq!(exit.reason, ExitReason::Panic);
    assert!(exit.detail.contains("Attempted to kill init"), "{}", exit.detail);
    assert!(exit.console.contains(&exit.detail));
}

#[test]
#[ignore = "boots machines, in a KVM host: see tests/README.md"]
fn a_guest_that_triple_faults() {
    let exit = Vmm::boot("reset", |config| config.cmdline += " reboot=t", &[]).wait();
    assert_eq!(exit.reason, ExitReason::TripleFault);
}

#[test]
#[ignore = "boots machines, in a KVM host: see tests/README.md"]
fn a_guest_that_is_killed() {
    let vmm = Vmm::boot("idle", |_| (), &[]);
    vmm.wait_console("guest is up");
    let Response::Info(info) = vmm.ask(&Request::Info, &[]) else { panic!("no info") };
    assert!(info.booted && info.pid == vmm.pid());
    assert!(info.boot_us > 0 && info.boot_us < 60_000_000, "{} us", info.boot_us);
    let resident = info.guest_resident_bytes >> 20;
    assert!((1..128).contains(&resident), "{resident} MiB of 128 resident");
    let waiter = vmm.connect();
    socket::send(waiter.as_fd(), &Request::Wait, &[]).unwrap();
    assert_eq!(vmm.ask(&Request::Kill, &[]), Response::Ok);
    let (response, _) = socket::receive::<Response>(waiter.as_fd()).unwrap().unwrap();
    assert!(matches!(response, Response::Exited(exit) if exit.reason == ExitReason::Killed));
    assert_eq!(vmm.wait().reason, ExitReason::Killed);
}

#[test]
#[ignore = "boots machines, in a KVM host: see tests/README.md"]
fn many_processors_and_memory_above_the_hole() {
    for (vcpus, memory_mib) in [(1, 64), (2, 3200), (8, 128)] {
        let exit = Vmm::boot(
            "size",
            |config| {
                config.vcpus = vcpus;
                config.memory_mib = memory_mib;
            },
            &[],
        )
        .wait();
        assert_eq!(exit.reason, ExitReason::Shutdown, "{}", exit.console);
        let line = exit.console.lines().find(|line| line.starts_with("cpus")).expect("the guest counted");
        let words: Vec<&str> = line.split_whitespace().collect();
        assert_eq!(words[1], vcpus.to_string());
        let kib: u32 = words[3].parse().unwrap();
        assert!(
            kib <= memory_mib << 10 && kib > (memory_mib << 10) / 100 * 70,
            "{kib} KiB of {memory_mib} MiB"
        );
    }
}

#[test]
#[ignore = "boots machines, in a KVM host: see tests/README.md"]
fn the_guest_reads_and_writes_its_disks() {
    let file = disk(16 << 20, 3 * 512, "written by the host");
    let add =
        DiskConfig { serial: "data-0".into(), file: 2, read_only: false, limit: None, flush_limit: None };
    let exit = Vmm::boot("disks", |config| config.disks.push(add), &[&file]).wait();
    assert_eq!(exit.reason, ExitReason::Shutdown, "{}", exit.console);
    assert!(exit.console.contains("root is /dev/root ro,"), "{}", exit.console);
    assert!(exit.console.contains("vda is data-0, 32768 sectors"), "{}", exit.console);
    assert!(exit.console.contains("written by the host"), "{}", exit.console);
    let mut sector = [0; 20];
    file.read_exact_at(&mut sector, 5 * 512).unwrap();
    assert_eq!(&sector, b"written by the guest");
    let mut content = vec![0; 16 << 20];
    file.read_exact_at(&mut content, 0).unwrap();
    let mut here = tempfile::NamedTempFile::new().unwrap();
    std::io::Write::write_all(&mut here, &content).unwrap();
    let sum = std::process::Command::new("md5sum").arg(here.path()).output().unwrap();
    let sum = String::from_utf8(sum.stdout).unwrap();
    assert!(exit.console.contains(sum.split_whitespace().next().unwrap()), "{sum} {}", exit.console);
}

#[test]
#[ignore = "boots machines, in a KVM host: see tests/README.md"]
fn disks_come_and_go_while_the_guest_runs() {
    let vmm = Vmm::boot("slots", |config| config.slots = vec!["slot-0".into(), "slot-1".into()], &[]);
    vmm.wait_console("ready for a disk");
    let file = disk(1 << 20, 0, "hot plugged");
    let attach = Request::AttachDisk { slot: "slot-0".into(), file: 0, read_only: true };
    assert_eq!(vmm.ask(&attach, &[file.as_fd()]), Response::Ok);
    assert!(
        matches!(vmm.ask(&attach, &[file.as_fd()]), Response::Error { message, .. } if message.contains("detach"))
    );
    vmm.wait_console("got 2048 sectors: hot plugged");
    vmm.wait_console("ready to lose it");
    // The second time the slot is empty; the other slot was never filled.
    for slot in ["slot-0", "slot-0", "slot-1"] {
        assert_eq!(vmm.ask(&Request::DetachDisk { slot: slot.into() }, &[]), Response::Ok);
    }
    let exit = vmm.wait();
    assert!(exit.console.contains("lost it"), "{}", exit.console);
    let mut start = [0; 11];
    file.read_exact_at(&mut start, 0).unwrap();
    assert_eq!(&start, b"hot plugged", "a read-only disk was written to");
}

#[test]
#[ignore = "boots machines, in a KVM host: see tests/README.md"]
fn the_balloon_gives_memory_back() {
    let vmm = Vmm::boot("idle", |config| config.balloon = true, &[]);
    vmm.wait_console("guest is up");
    let info = || match vmm.ask(&Request::Info, &[]) {
        Response::Info(info) => info,
        other => panic!("{other:?}"),
    };
    assert_eq!(vmm.ask(&Request::SetBalloon { size_mib: 40 }, &[]), Response::Ok);
    let deadline = Instant::now() + TIME_LIMIT;
    while info().balloon_mib < 40 {
        assert!(Instant::now() < deadline, "the balloon has {} MiB", info().balloon_mib);
        std::thread::sleep(Duration::from_millis(20));
    }
    let resident = info().guest_resident_bytes >> 20;
    assert!(resident <= 128 - 40, "{resident} MiB resident besides a balloon of 40");
    let without = Vmm::boot("idle", |_| (), &[]);
    let refused = without.ask(&Request::SetBalloon { size_mib: 1 }, &[]);
    assert!(matches!(refused, Response::Error { stage, .. } if stage == "set the balloon"));
}

#[test]
#[ignore = "boots machines, in a KVM host: see tests/README.md"]
fn what_cannot_be_booted_is_refused_with_its_stage() {
    let text = disk(4096, 0, "no kernel");
    let ask = |vmm: &Vmm, config| match vmm.ask(&Request::Boot(config), &[text.as_fd(), text.as_fd()]) {
        Response::Error { stage, message } => (stage, message),
        other => panic!("{other:?}"),
    };
    let boot = |change: &dyn Fn(&mut husk_vmm_api::VmConfig)| {
        let vmm = Vmm::start();
        let mut config = vmm.config.clone();
        change(&mut config);
        ask(&vmm, Box::new(config))
    };
    let (stage, message) = boot(&|_| ());
    assert!(stage == "load the kernel" && message.contains("vmlinux"), "{stage}: {message}");
    for vcpus in [0, 65] {
        assert_eq!(boot(&|config| config.vcpus = vcpus).0, "check the configuration");
    }
    assert_eq!(boot(&|config| config.memory_mib = 1).0, "allocate guest memory");
    let (_, message) = boot(&|config| config.kernel = 7);
    assert!(message.contains("descriptor 7"), "{message}");

    // A process makes one machine at most, and serves requests without one.
    let vmm = Vmm::start();
    assert_eq!(ask(&vmm, Box::new(vmm.config.clone())).0, "load the kernel");
    assert_eq!(ask(&vmm, Box::new(vmm.config.clone())).0, "boot");
    let Response::Info(info) = vmm.ask(&Request::Info, &[]) else { panic!("no info") };
    assert!(!info.booted);
    assert_eq!(vmm.ask(&Request::Kill, &[]), Response::Ok);
    assert_eq!(vmm.wait().reason, ExitReason::Killed);
}

#[test]
#[ignore = "boots machines, in a KVM host: see tests/README.md"]
fn clients_that_do_not_behave_cost_nobody_else_anything() {
    let vmm = Vmm::boot("idle", |_| (), &[]);
    vmm.wait_console("guest is up");
    let garbage = vmm.connect();
    socket::send(garbage.as_fd(), &"no request", &[]).unwrap();
    let (response, _) = socket::receive::<Response>(garbage.as_fd()).unwrap().unwrap();
    assert!(matches!(response, Response::Error { .. }));
    // This client never reads its responses.
    let deaf = vmm.connect();
    while socket::send(deaf.as_fd(), &Request::Console, &[]).is_ok() {}
    drop(garbage);
    let crowd: Vec<_> = (0..20).map(|_| vmm.connect()).collect();
    drop((crowd, deaf));
    // The places become free when the VMM has noticed.
    let deadline = Instant::now() + TIME_LIMIT;
    let text = loop {
        match vmm.try_ask(&Request::Console) {
            Some(Response::Console { text }) => break text,
            other => assert!(Instant::now() < deadline, "{other:?}"),
        }
    };
    assert!(text.contains("guest is up"));
    assert_eq!(vmm.ask(&Request::Kill, &[]), Response::Ok);
}

#[test]
#[ignore = "boots machines, in a KVM host: see tests/README.md"]
fn the_vmm_itself_is_small() {
    let vmm = Vmm::boot("idle", |config| config.slots = (0..8).map(|i| format!("slot-{i}")).collect(), &[]);
    vmm.wait_console("guest is up");
    let smaps = fs::read_to_string(format!("/proc/{}/smaps", vmm.pid())).unwrap();
    // Guest memory begins with the first large mapping; the kernel's segments
    // lie within its 128 MiB.
    let mut own = 0;
    let mut guest = 0..0;
    let mut is_guest = false;
    for line in smaps.lines() {
        let words: Vec<&str> = line.split_whitespace().collect();
        if let Some((start, end)) = words[0].split_once('-')
            && let (Ok(start), Ok(end)) = (u64::from_str_radix(start, 16), u64::from_str_radix(end, 16))
        {
            if guest.is_empty() && end - start >= 8 << 20 {
                guest = start..start + (128 << 20);
            }
            is_guest = guest.contains(&start);
        } else if words[0] == "Pss:" && !is_guest {
            own += words[1].parse::<u64>().unwrap();
        }
    }
    assert!((100..=5 * 1024).contains(&own), "{own} KiB");
    println!("own memory: {own} KiB");
}

#[test]
#[ignore = "boots machines, in a KVM host: see tests/README.md"]
fn the_vmm_has_given_up_what_it_does_not_need() {
    let vmm = Vmm::boot("idle", |_| (), &[]);
    vmm.wait_console("guest is up");
    let process = PathBuf::from(format!("/proc/{}", vmm.pid()));
    let mut threads = 0;
    for thread in fs::read_dir(process.join("task")).unwrap() {
        let status = fs::read_to_string(thread.unwrap().path().join("status")).unwrap();
        let field = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name)).unwrap();
            line.split_whitespace().map(str::to_owned).collect::<Vec<_>>()
        };
        assert_eq!(field("Uid:"), [USER.to_string().as_str(); 4]);
        assert_eq!(field("Gid:"), [USER.to_string().as_str(); 4]);
        assert!(field("Groups:").is_empty());
        for set in ["CapInh:", "CapPrm:", "CapEff:", "CapAmb:"] {
            assert_eq!(field(set), ["0000000000000000"], "{set}");
        }
        assert_eq!(field("NoNewPrivs:"), ["1"]);
        // The process has a seccomp filter.
        assert_eq!(field("Seccomp:"), ["2"]);
        threads += 1;
    }
    assert!(threads >= 2, "{threads} threads");
    // The root is an empty directory, in which nothing can be made.
    let root = process.join("root");
    assert_eq!(fs::read_dir(&root).unwrap().count(), 0);
    assert!(fs::create_dir(root.join("new")).is_err());
    assert_ne!(fs::read_link(process.join("ns/mnt")).unwrap(), fs::read_link("/proc/self/ns/mnt").unwrap());
    assert_eq!(fs::read_to_string(process.join("mounts")).unwrap().lines().count(), 1);
}
