//! A real agent makes a pod, runs containers through the real runc, and takes
//! everything down again; its streams and RPCs go over the kernel's loopback
//! vsock. The test needs a machine of its own: root, cgroup v2,
//! `vsock_loopback`, and two virtio disks with the serial numbers `image` (an
//! EROFS filesystem with busybox) and `scratch` (ext4).

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod support;

use std::time::{Duration, Instant};

use husk_proto::agent::stream::Kind;
use husk_proto::agent::*;
use serde_json::json;
use support::{MAC, Machine, answer_to_a_stranger, container, read_all, read_until, spec, stream};
use tokio::io::{AsyncReadExt, AsyncWriteExt, BufReader};
use tonic::Code;

#[tokio::test]
#[ignore = "needs a machine of its own, see the top of this file"]
async fn the_life_of_a_pod() {
    step("strangers");
    assert_eq!(answer_to_a_stranger().await, b"");
    let mut machine = Machine::start().await;
    nothing_works_before_the_sandbox(&mut machine).await;
    the_sandbox_is_set_up(&mut machine).await;
    streams_carry_everything(&mut machine).await;
    users_are_looked_up_in_the_image(&mut machine).await;
    failures_leave_nothing_behind(&mut machine).await;
    execs_run_in_the_container(&mut machine).await;
    limits_are_those_of_a_node(&mut machine).await;
    files_are_on_one_device(&mut machine).await;
    what_is_deleted_is_given_back(&mut machine).await;
    terminals_work(&mut machine).await;
    signals_end_processes(&mut machine).await;
    memory_limits_are_told_apart(&mut machine).await;
    containers_share_a_pid_namespace(&mut machine).await;
    many_at_once(&mut machine).await;
    removal_frees_the_image(&mut machine).await;
    the_agent_stays_small(&mut machine).await;
    shutdown_ends_it(machine).await;
}

fn step(name: &str) {
    println!("--- {name}");
}

async fn nothing_works_before_the_sandbox(machine: &mut Machine) {
    step("before the sandbox");
    let error = machine.create(container("early", &["true"])).await.unwrap_err();
    assert_eq!(error.code(), Code::FailedPrecondition, "{error}");
    let error = machine
        .client
        .create_sandbox(CreateSandboxRequest {
            sandbox_id: "pod".into(),
            dns: Some(Dns { servers: vec!["nonsense".into()], ..Dns::default() }),
            ..Default::default()
        })
        .await
        .unwrap_err();
    assert_eq!(error.code(), Code::InvalidArgument, "{error}");
}

async fn the_sandbox_is_set_up(machine: &mut Machine) {
    step("sandbox");
    let request = CreateSandboxRequest {
        sandbox_id: "pod".into(),
        hostname: "web-0".into(),
        dns: Some(Dns {
            servers: vec!["10.88.0.1".into()],
            searches: vec!["svc".into()],
            options: vec!["ndots:5".into()],
        }),
        interfaces: vec![Interface {
            name: "eth0".into(),
            mac: MAC.into(),
            mtu: 1400,
            addresses: vec!["10.88.0.5/16".into(), "fd00::5/64".into()],
            device_mac: String::new(),
        }],
        routes: vec![
            Route { destination: "0.0.0.0/0".into(), gateway: "10.88.0.1".into(), interface: "eth0".into() },
            Route { destination: "::/0".into(), gateway: "fd00::1".into(), interface: "eth0".into() },
            Route { destination: "10.96.0.7/12".into(), gateway: String::new(), interface: "eth0".into() },
            Route {
                destination: "10.200.0.0/16".into(),
                gateway: "172.16.0.1".into(),
                interface: "eth0".into(),
            },
        ],
        sysctls: [("net.ipv4.ip_forward".to_owned(), "1".to_owned())].into(),
        shared_pid_namespace: true,
        scratch_serial: "scratch".into(),
        entropy: vec![7; 64],
        ..Default::default()
    };
    let before = Instant::now();
    let answer = machine.client.create_sandbox(request.clone()).await.unwrap().into_inner();
    println!("CreateSandbox took {:?}", before.elapsed());
    assert!(!answer.kernel_release.is_empty() && !answer.agent_version.is_empty());
    let error = machine.client.create_sandbox(request).await.unwrap_err();
    assert_eq!(error.code(), Code::FailedPrecondition, "{error}");

    assert_eq!(machine.read(paths::HOSTNAME), "web-0\n");
    assert!(machine.read(paths::HOSTS).contains("10.88.0.5\tweb-0\nfd00::5\tweb-0\n"));
    assert!(machine.read(paths::RESOLV_CONF).starts_with("nameserver 10.88.0.1\n"));
    assert_eq!(machine.in_netns("cat /proc/sys/net/ipv4/ip_forward").trim(), "1");
    let link = machine.in_netns("ip -o addr show eth0; ip -o link show eth0; ip -o link show lo");
    assert!(
        link.contains("10.88.0.5/16") && link.contains("fd00::5/64") && link.contains("mtu 1400"),
        "{link}"
    );
    assert!(link.contains("global nodad") && link.contains("LOOPBACK,UP"), "{link}");
    let routes = machine.in_netns("ip route; ip -6 route");
    for route in [
        "default via 10.88.0.1 dev eth0",
        "default via fd00::1 dev eth0",
        "10.96.0.0/12 dev eth0",
        "10.200.0.0/16 via 172.16.0.1 dev eth0",
    ] {
        assert!(routes.contains(route), "{route}: {routes}");
    }
}

async fn streams_carry_everything(machine: &mut Machine) {
    step("streams");
    let mut request = container("cat", &["sh", "-c", "echo err >&2; cat; echo end; exit 7"]);
    request.stdin = true;
    request.stdin_once = true;
    let before = Instant::now();
    machine.create(request).await.unwrap();
    println!("CreateContainer took {:?}", before.elapsed());
    let mut stdin = stream(Kind::Stdin, "cat", "").await.unwrap();
    let stdout = stream(Kind::Stdout, "cat", "").await.unwrap();
    let stderr = stream(Kind::Stderr, "cat", "").await.unwrap();
    let mut waiting = machine.client.clone();
    let early = tokio::spawn(async move {
        let request = WaitProcessRequest { container_id: "cat".into(), ..Default::default() };
        waiting.wait_process(request).await.unwrap().into_inner().exit_code
    });
    let before = Instant::now();
    machine.start_container("cat").await;
    println!("StartContainer took {:?}", before.elapsed());
    let data: Vec<u8> = (0..5_000_000u32).map(|n| (n % 251) as u8).collect();
    let sent = data.clone();
    let writer = tokio::spawn(async move {
        stdin.write_all(&sent).await.unwrap();
        stdin.shutdown(std::net::Shutdown::Write).unwrap();
        stdin
    });
    let output = read_all(stdout).await;
    writer.await.unwrap();
    assert!(output.len() == data.len() + 4 && output.starts_with(&data) && output.ends_with(b"end\n"));
    assert_eq!(read_all(stderr).await, b"err\n");
    assert_eq!(machine.wait("cat", "").await.exit_code, 7);
    assert_eq!(early.await.unwrap(), 7);
    assert_eq!(
        read_all(stream(Kind::Stdout, "cat", "").await.unwrap()).await,
        b"",
        "an ended stream is empty"
    );
    assert!(stream(Kind::Stdin, "cat", "").await.unwrap_err().starts_with("ERR standard input"));
    assert!(stream(Kind::Stdout, "nobody", "").await.unwrap_err().starts_with("ERR there is no container"));
    machine.remove("cat").await;
    machine.remove("cat").await;

    // Output that nobody takes must not keep a waiter for ever.
    machine.create(container("mute", &["echo", "unheard"])).await.unwrap();
    machine.start_container("mute").await;
    let before = Instant::now();
    assert_eq!(machine.wait("mute", "").await.exit_code, 0);
    assert!((5..60).contains(&before.elapsed().as_secs()), "{:?}", before.elapsed());
    machine.remove("mute").await;
}

async fn users_are_looked_up_in_the_image(machine: &mut Machine) {
    step("users");
    let mut request = container("who", &["sh", "-c", "id -u; id -g; id -G; echo $HOME"]);
    request.user = Some(User { user: "www".into(), additional_gids: vec![4242], strict_groups: false });
    machine.create(request.clone()).await.unwrap();
    machine.start_container("who").await;
    let output = read_all(stream(Kind::Stdout, "who", "").await.unwrap()).await;
    assert_eq!(String::from_utf8(output).unwrap(), "33\n33\n33 104 4242\n/var/www\n");
    machine.remove("who").await;
    request.user = Some(User { user: "nobody-here".into(), ..User::default() });
    let error = machine.create(request).await.unwrap_err();
    assert_eq!(error.code(), Code::InvalidArgument);
    assert!(error.message().contains("no user \"nobody-here\" in the container's /etc/passwd"), "{error}");
}

async fn failures_leave_nothing_behind(machine: &mut Machine) {
    step("failures");
    let request = container("bad", &["/no/such/program"]);
    let refused = machine.client.create_container(request).await.unwrap().into_inner();
    assert!(refused.start_error.contains("/no/such/program"), "{refused:?}");
    let mut request = container("bad", &["true"]);
    request.rootfs = Some(Rootfs { image_serial: "no-such-disk".into(), ..Rootfs::default() });
    let error = machine.create(request).await.unwrap_err();
    assert!(error.message().contains("no block device has the serial number \"no-such-disk\""), "{error}");
    for id in ["", "../x", "a/b"] {
        let error = machine.create(container(id, &["true"])).await.unwrap_err();
        assert_eq!(error.code(), Code::InvalidArgument, "{id:?}");
    }
    for path in [
        "/run/husk/bundles/bad",
        "/run/husk/scratch/containers/bad",
        "/run/husk/runc/bad",
        "/sys/fs/cgroup/pod/bad",
    ] {
        assert!(!machine.exists(path), "{path} is left");
    }
    assert!(!machine.mounts().contains("/run/husk/images"), "{}", machine.mounts());
    let error = machine
        .client
        .start_container(StartContainerRequest { container_id: "bad".into() })
        .await
        .unwrap_err();
    assert_eq!(error.code(), Code::NotFound);
}

async fn execs_run_in_the_container(machine: &mut Machine) {
    step("exec");
    machine.create(container("main", &["sleep", "1000"])).await.unwrap();
    let error = machine.create(container("main", &["true"])).await.unwrap_err();
    assert_eq!(error.code(), Code::AlreadyExists);
    let error = machine.exec("main", "e0", &["true"]).await.unwrap_err();
    assert_eq!(error.code(), Code::FailedPrecondition, "{error}");
    machine.start_container("main").await;
    let again = StartContainerRequest { container_id: "main".into() };
    assert_eq!(machine.client.start_container(again).await.unwrap_err().code(), Code::FailedPrecondition);

    let before = Instant::now();
    let (output, code) = machine.output_of("main", "e1", &["sh", "-c", "echo hello; exit 3"]).await;
    println!("exec took {:?}", before.elapsed());
    assert_eq!((output.as_str(), code), ("hello\n", 3));
    assert_eq!(machine.wait("main", "e1").await.exit_code, 3, "a second wait is answered too");
    let error = machine.exec("main", "e1", &["true"]).await.unwrap_err();
    assert_eq!(error.code(), Code::AlreadyExists);
    let error = machine.exec("main", "e2", &["/no/such/program"]).await.unwrap_err();
    assert!(error.message().starts_with("runc exec: "), "{error}");
    assert!(machine.exec("main", "e2", &["true"]).await.is_ok(), "its id is free again");

    // The output of a child that is left behind is part of the command's
    // output.
    let script = "(sleep 4; echo late) & echo started";
    let (output, code) = machine.output_of("main", "e3", &["sh", "-c", script]).await;
    assert_eq!((output.as_str(), code), ("started\nlate\n", 0));

    machine.exec_with("main", "e4", &["wc", "-c"], false, true).await.unwrap();
    let mut stdin = stream(Kind::Stdin, "main", "e4").await.unwrap();
    let stdout = stream(Kind::Stdout, "main", "e4").await.unwrap();
    stdin.write_all(&[b'x'; 12345]).await.unwrap();
    stdin.shutdown(std::net::Shutdown::Write).unwrap();
    assert_eq!(read_all(stdout).await, b"12345\n");

    let (output, _) = machine
        .output_of("main", "e5", &["sh", "-c", "cat /etc/hosts; df /dev/shm; head -c 1000 /dev/zero > /kept"])
        .await;
    assert!(output.contains("web-0"), "{output}");
    let request = ContainerStatsRequest { container_ids: vec!["main".into()] };
    let stats = machine.client.container_stats(request).await.unwrap().into_inner();
    let stat = &stats.containers[0];
    assert!(stat.cpu_usage_nanos > 0 && stat.memory_usage_bytes > 0 && stat.pids >= 1, "{stat:?}");
    assert!(stat.writable_layer_bytes >= 1000 && stat.writable_layer_inodes >= 1, "{stat:?}");
    println!("{stats:?}");
    let request = ContainerStatsRequest { container_ids: vec!["nobody".into()] };
    assert_eq!(machine.client.container_stats(request).await.unwrap_err().code(), Code::NotFound);
}

async fn limits_are_those_of_a_node(machine: &mut Machine) {
    step("limits");
    let (limits, _) = machine.output_of("main", "l1", &["cat", "/proc/self/limits"]).await;
    for name in ["Max processes", "Max pending signals", "Max core file size"] {
        let line = limits.lines().find_map(|line| line.strip_prefix(name)).unwrap_or_default();
        let words: Vec<_> = line.split_whitespace().take(2).collect();
        assert_eq!(words, ["unlimited", "unlimited"], "{name}: {limits}");
    }
    for (path, least) in [
        ("kernel/threads-max", 65_536),
        ("vm/max_map_count", 262_144),
        ("fs/inotify/max_user_watches", 524_288),
        ("fs/inotify/max_user_instances", 8192),
        ("net/ipv4/tcp_max_tw_buckets", 65_536),
    ] {
        // Parameters of the network are those of the reader's namespace.
        let value: u64 = machine.in_netns(&format!("cat /proc/sys/{path}")).trim().parse().unwrap();
        assert!(value >= least, "{path}: {value}");
    }
}

async fn files_are_on_one_device(machine: &mut Machine) {
    step("device numbers");
    // These are files of the image and of the writable layer.
    let script = "echo new > /new; stat -c %d / /bin /bin/busybox /etc/passwd /new | sort -u | wc -l; \
                  stat -c %i /etc/passwd; echo '#' >> /etc/passwd; stat -c %i /etc/passwd";
    let (output, _) = machine.output_of("main", "d1", &["sh", "-c", script]).await;
    let lines: Vec<_> = output.lines().collect();
    assert!(lines[0] == "1" && lines[1] == lines[2], "{output}");
}

async fn what_is_deleted_is_given_back(machine: &mut Machine) {
    step("trim");
    let mounts = machine.mounts();
    let device = mounts.lines().find_map(|line| line.split_once(" /run/husk/scratch ")).unwrap().0;
    let counters = device.replace("/dev/", "/sys/class/block/") + "/stat";
    let discarded = || {
        let counters = std::fs::read_to_string(&counters).unwrap();
        counters.split_whitespace().nth(13).unwrap().parse::<u64>().unwrap() * 512
    };
    let script = "dd if=/dev/zero of=/big bs=1M count=64; sync; rm /big";
    assert_eq!(machine.output_of("main", "g1", &["sh", "-c", script]).await.1, 0);
    let deadline = Instant::now() + Duration::from_secs(60);
    while discarded() < 64 << 20 {
        assert!(Instant::now() < deadline, "{} bytes were given back", discarded());
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
}

async fn terminals_work(machine: &mut Machine) {
    step("terminal");
    machine.exec_with("main", "t1", &["sh"], true, true).await.unwrap();
    assert!(stream(Kind::Stderr, "main", "t1").await.unwrap_err().contains("part of stdout"));
    let mut stdin = stream(Kind::Stdin, "main", "t1").await.unwrap();
    let mut stdout = BufReader::new(stream(Kind::Stdout, "main", "t1").await.unwrap());
    let resize =
        ResizeTerminalRequest { container_id: "main".into(), process_id: "t1".into(), rows: 33, columns: 77 };
    machine.client.resize_terminal(resize.clone()).await.unwrap();
    machine
        .client
        .resize_terminal(ResizeTerminalRequest { rows: 0, columns: 0, ..resize.clone() })
        .await
        .unwrap();
    stdin.write_all(b"stty size\n").await.unwrap();
    read_until(&mut stdout, "33 77").await;
    stdin.write_all(b"exit 5\n").await.unwrap();
    assert_eq!(machine.wait("main", "t1").await.exit_code, 5);
    let error = machine
        .client
        .resize_terminal(ResizeTerminalRequest { process_id: "e1".into(), ..resize })
        .await
        .unwrap_err();
    assert_eq!(error.code(), Code::FailedPrecondition);

    let mut request = container("tty", &["sh", "-c", "tty; read line; echo got $line"]);
    request.terminal = true;
    request.stdin = true;
    machine.create(request).await.unwrap();
    let mut stdin = stream(Kind::Stdin, "tty", "").await.unwrap();
    let mut stdout = BufReader::new(stream(Kind::Stdout, "tty", "").await.unwrap());
    machine.start_container("tty").await;
    read_until(&mut stdout, "/dev/pts/").await;
    stdin.write_all(b"a line\n").await.unwrap();
    read_until(&mut stdout, "got a line").await;
    assert_eq!(machine.wait("tty", "").await.exit_code, 0);
    machine.remove("tty").await;
}

async fn signals_end_processes(machine: &mut Machine) {
    step("signals");
    machine.exec("main", "s1", &["sleep", "1000"]).await.unwrap();
    machine.signal("main", "s1", libc::SIGTERM, false).await;
    assert_eq!(machine.wait("main", "s1").await.exit_code, 128 + libc::SIGTERM);
    machine.signal("main", "s1", libc::SIGTERM, false).await;
    let request = SignalProcessRequest { container_id: "main".into(), signal: 65, ..Default::default() };
    assert_eq!(machine.client.signal_process(request).await.unwrap_err().code(), Code::InvalidArgument);

    // A real-time signal has no name: 40 here, and systemd's SIGRTMIN+3.
    machine.exec("main", "s2", &["sh", "-c", "kill -40 $$"]).await.unwrap();
    assert_eq!(machine.wait("main", "s2").await.exit_code, 128 + 40);
    machine.exec("main", "s3", &["sleep", "1000"]).await.unwrap();
    machine.signal("main", "s3", 37, false).await;
    assert_eq!(machine.wait("main", "s3").await.exit_code, 128 + 37);

    let trap = "trap 'exit 9' USR1; while :; do sleep 0.1; done";
    machine.create(container("trap", &["sh", "-c", &format!("({trap}) & {trap}")])).await.unwrap();
    machine.start_container("trap").await;
    tokio::time::sleep(Duration::from_secs(2)).await;
    machine.signal("trap", "", libc::SIGUSR1, true).await;
    assert_eq!(machine.wait("trap", "").await.exit_code, 9);
    machine.remove("trap").await;

    machine.create(container("forks", &["sh", "-c", "sleep 1000 & sleep 1000 & wait"])).await.unwrap();
    machine.start_container("forks").await;
    machine.signal("forks", "", libc::SIGKILL, true).await;
    let outcome = machine.wait("forks", "").await;
    assert_eq!((outcome.exit_code, outcome.oom_killed), (128 + libc::SIGKILL, false));
    assert!(outcome.finished_at_unix_nanos > 0);
    let error = machine.exec("forks", "late", &["true"]).await.unwrap_err();
    assert_eq!(error.code(), Code::FailedPrecondition);
    machine.remove("forks").await;
}

async fn memory_limits_are_told_apart(machine: &mut Machine) {
    step("out of memory");
    machine.create(container("oom", &["tail", "/dev/zero"])).await.unwrap();
    machine.start_container("oom").await;
    let outcome = machine.wait("oom", "").await;
    assert_eq!((outcome.exit_code, outcome.oom_killed), (128 + libc::SIGKILL, true));
    machine.remove("oom").await;

    machine.create(container("oom", &["sh", "-c", "tail /dev/zero; exit 0"])).await.unwrap();
    machine.start_container("oom").await;
    let outcome = machine.wait("oom", "").await;
    assert_eq!((outcome.exit_code, outcome.oom_killed), (0, true));
    machine.remove("oom").await;
}

async fn containers_share_a_pid_namespace(machine: &mut Machine) {
    step("shared pid namespace");
    let in_shared = |id: &str, args: &[&str]| {
        let mut spec = spec(id, args);
        spec["linux"]["namespaces"] =
            json!([{"type": "mount"}, {"type": "pid", "path": paths::PID_NAMESPACE}]);
        CreateContainerRequest { spec_json: spec.to_string().into_bytes(), ..container(id, args) }
    };
    machine.create(in_shared("first", &["sh", "-c", "sleep 4321 & exec sleep 1234"])).await.unwrap();
    machine.start_container("first").await;
    machine.create(in_shared("second", &["sh", "-c", "sleep 1; ps"])).await.unwrap();
    machine.start_container("second").await;
    let output = read_all(stream(Kind::Stdout, "second", "").await.unwrap()).await;
    let output = String::from_utf8(output).unwrap();
    assert!(output.contains("sleep 1234") && output.contains("husk-pause"), "{output}");
    // The container's first process is not that of the namespace, so the other
    // one must be ended too.
    machine.signal("first", "", 37, false).await;
    assert_eq!(machine.wait("first", "").await.exit_code, 128 + 37);
    let (output, _) = machine.output_of("main", "ps", &["true"]).await;
    assert_eq!(output, "");
    machine.remove("first").await;
    machine.remove("second").await;
    assert!(!machine.exists("/sys/fs/cgroup/pod/first"));
}

async fn many_at_once(machine: &mut Machine) {
    step("many at once");
    let mut running = Vec::new();
    for n in 0..8 {
        let mut client = machine.client.clone();
        running.push(tokio::spawn(async move {
            let id = format!("many-{n}");
            let script = format!("echo out-{n}; exit {n}");
            client.create_container(container(&id, &["sh", "-c", &script])).await.unwrap();
            client.start_container(StartContainerRequest { container_id: id.clone() }).await.unwrap();
            let output = read_all(stream(Kind::Stdout, &id, "").await.unwrap()).await;
            assert_eq!(output, format!("out-{n}\n").as_bytes());
            let wait = WaitProcessRequest { container_id: id.clone(), process_id: String::new() };
            assert_eq!(client.wait_process(wait).await.unwrap().into_inner().exit_code, n);
            client.remove_container(RemoveContainerRequest { container_id: id }).await.unwrap();
        }));
    }
    for task in running {
        task.await.unwrap();
    }
}

async fn removal_frees_the_image(machine: &mut Machine) {
    step("removal");
    assert!(machine.mounts().contains("/run/husk/images/image"));
    let before = Instant::now();
    machine.remove("main").await;
    println!("RemoveContainer took {:?}", before.elapsed());
    let error = stream(Kind::Stdout, "main", "").await.unwrap_err();
    assert!(error.contains("there is no container"), "{error}");
    assert!(!machine.mounts().contains("/run/husk/images"), "{}", machine.mounts());
    assert!(!machine.mounts().contains("overlay /run/husk"), "{}", machine.mounts());
    for directory in
        ["/run/husk/bundles", "/run/husk/scratch/containers", "/run/husk/runc", "/run/husk/console"]
    {
        let directory = format!("/proc/{}/root{directory}", machine.pid);
        assert_eq!(std::fs::read_dir(&directory).unwrap().count(), 0, "{directory}");
    }
}

async fn the_agent_stays_small(machine: &mut Machine) {
    step("memory");
    let status = std::fs::read_to_string(format!("/proc/{}/status", machine.pid)).unwrap();
    for line in status.lines().filter(|line| line.starts_with("Vm") || line.starts_with("Rss")) {
        println!("{line}");
    }
    let fds = std::fs::read_dir(format!("/proc/{}/fd", machine.pid)).unwrap().count();
    assert!(fds < 20, "{fds} descriptors are open");
}

async fn shutdown_ends_it(mut machine: Machine) {
    step("shutdown");
    machine.create(container("last", &["sleep", "1000"])).await.unwrap();
    machine.start_container("last").await;
    let mut stdout = stream(Kind::Stdout, "last", "").await.unwrap();
    machine.client.shutdown(ShutdownRequest {}).await.unwrap();
    assert_eq!(stdout.read(&mut [0]).await.unwrap_or(0), 0);
    assert!(machine.ended());
}
