//! Scopes of a real systemd, which runs in namespaces of its own and starts nothing else.

#![allow(clippy::unwrap_used)]

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

const PROGRAMS: [&str; 2] = ["/lib/systemd/systemd", "/usr/bin/dbus-daemon"];

/// Set where a test runs beside such a systemd.
const INSIDE: &str = "HUSK_TEST_BESIDE_SYSTEMD";

/// The only units: a message bus.
const UNITS: [(&str, &str); 3] = [
    ("idle.target", "[Unit]\nDefaultDependencies=no\nAllowIsolate=yes\nWants=dbus.socket dbus.service\n"),
    ("dbus.socket", "[Unit]\nDefaultDependencies=no\n[Socket]\nListenStream=/run/dbus/system_bus_socket\n"),
    (
        "dbus.service",
        "[Unit]\nDefaultDependencies=no\nRequires=dbus.socket\n[Service]\nType=notify\n\
         ExecStart=/usr/bin/dbus-daemon --system --address=systemd: --nofork --nopidfile --systemd-activation\n",
    ),
];

/// Makes the namespaces and becomes systemd. $1 is a control group for all of it, $2 the folder
/// of units.
const START: &str = r#"
mount --make-rprivate /
mount -t proc proc /proc
mount -t tmpfs tmpfs /run
umount -R /sys/fs/cgroup
mount -t cgroup2 cgroup2 /sys/fs/cgroup
mkdir -p "/sys/fs/cgroup/$1" && echo 1 >"/sys/fs/cgroup/$1/cgroup.procs"
exec unshare --cgroup --mount sh -ec '
    umount /sys/fs/cgroup
    mount -t cgroup2 cgroup2 /sys/fs/cgroup
    exec env -i container=husk-test SYSTEMD_UNIT_PATH="$1" SYSTEMD_LOG_TARGET=console \
        /lib/systemd/systemd --system --unit=idle.target --show-status=0' sh "$2"
"#;

/// Removes what it leaves of control groups.
const CLEAN: &str = r#"
umount -R /sys/fs/cgroup
mount -t cgroup2 cgroup2 /sys/fs/cgroup
find "/sys/fs/cgroup/$1" -depth -type d -exec rmdir {} +
"#;

struct Systemd {
    unshare: Child,
    pid: u32,
    group: String,
    _units: tempfile::TempDir,
}

impl Systemd {
    /// `None` where there is none, or where this process may not make namespaces.
    fn start() -> Option<Self> {
        let there = PROGRAMS.iter().all(|program| Path::new(program).exists());
        if !there || fs::metadata("/proc/self").unwrap().uid() != 0 {
            eprintln!("not run: it needs root, and {PROGRAMS:?}");
            return None;
        }
        let units = tempfile::tempdir().unwrap();
        for (name, text) in UNITS {
            fs::write(units.path().join(name), text).unwrap();
        }
        let group = format!("husk-test-{}", std::process::id());
        let log = fs::File::create(units.path().join("log")).unwrap();
        let unshare = Command::new("unshare")
            .args(["--mount", "--pid", "--fork", "--kill-child", "--uts", "--ipc", "--net"])
            .args(["sh", "-ec", START, "sh", &group])
            .arg(units.path())
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .unwrap();
        let path = units.path().join("log");
        let log = || fs::read_to_string(&path).unwrap_or_default();
        let mut systemd = Self { unshare, pid: 0, group, _units: units };
        let start = Instant::now();
        let children = format!("/proc/{0}/task/{0}/children", systemd.unshare.id());
        loop {
            let child = fs::read_to_string(&children).unwrap_or_default();
            if let Ok(pid) = child.trim().parse::<u32>()
                && PathBuf::from(format!("/proc/{pid}/root/run/dbus/system_bus_socket")).exists()
            {
                systemd.pid = pid;
                return Some(systemd);
            }
            if let Some(status) = systemd.unshare.try_wait().unwrap() {
                eprintln!("not run: no systemd in namespaces of its own here: {status}: {}", log());
                return None;
            }
            assert!(start.elapsed() < Duration::from_secs(30), "systemd does not start: {}", log());
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

impl Drop for Systemd {
    fn drop(&mut self) {
        let _ = self.unshare.kill();
        let _ = self.unshare.wait();
        std::thread::sleep(Duration::from_millis(200));
        let _ = Command::new("unshare").args(["--mount", "sh", "-c", CLEAN, "sh", &self.group]).status();
    }
}

#[test]
fn a_scope_lives_with_its_processes_and_ends_when_it_is_stopped() {
    if std::env::var_os(INSIDE).is_some() {
        let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
        return runtime.block_on(beside_systemd());
    }
    let Some(systemd) = Systemd::start() else { return };
    let inside = Command::new("nsenter")
        .args(["-t", &systemd.pid.to_string(), "-m", "-p", "-C", "-i", "-u", "-n"])
        .arg(std::env::current_exe().unwrap())
        .args(["a_scope_lives_with_its_processes_and_ends_when_it_is_stopped", "--exact", "--nocapture"])
        .env(INSIDE, "1")
        .output()
        .unwrap();
    let text =
        String::from_utf8_lossy(&inside.stdout).into_owned() + &String::from_utf8_lossy(&inside.stderr);
    assert!(inside.status.success() && text.contains("1 passed"), "{text}");
}

async fn beside_systemd() {
    let group = Path::new("/sys/fs/cgroup/husk.slice/husk-a.slice/husk-1.scope");
    let scope = husk_systemd::start(group, "a pod").await.unwrap();
    // Groups below it are the pod's: systemd leaves them alone.
    fs::create_dir(group.join("supervisor")).unwrap();
    let mut process = Command::new("/bin/sleep").arg("600").spawn().unwrap();
    fs::write(group.join("supervisor/cgroup.procs"), process.id().to_string()).unwrap();
    // A second one of that name is refused.
    let again = husk_systemd::start(group, "another").await.unwrap_err();
    assert!(husk_base::chain(&again).contains("husk-1.scope"), "{}", husk_base::chain(&again));
    drop(scope);
    tokio::time::sleep(Duration::from_secs(1)).await;
    let inside = fs::read_to_string(group.join("supervisor/cgroup.procs")).unwrap();
    assert_eq!(inside, format!("{}\n", process.id()));
    assert_eq!(fs::read_to_string(group.join("cgroup.procs")).unwrap(), "", "the idle process has gone");

    husk_systemd::stop(group).await.unwrap();
    let status = process.wait().unwrap();
    assert!(!status.success(), "it was ended with its scope");
    let start = Instant::now();
    while group.exists() {
        assert!(start.elapsed() < Duration::from_secs(20), "the group stays");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    husk_systemd::stop(group).await.unwrap();

    // A scope whose processes end is gone without a word, and can be made again.
    drop(husk_systemd::start(group, "a pod").await.unwrap());
    let start = Instant::now();
    while group.exists() {
        assert!(start.elapsed() < Duration::from_secs(20), "the group stays");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    drop(husk_systemd::start(group, "a pod").await.unwrap());
}
