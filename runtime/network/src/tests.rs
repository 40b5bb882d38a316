//! Whole attachments with the distribution's plugins, in a "host" of the
//! test's own: a thread with its own network and mount namespaces, so that
//! neither bridges nor firewall rules nor `/run/netns` of the machine are
//! touched. Needs root and the plugins bridge, ptp, host-local and portmap.
use std::fs::{self, File};
use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, UdpSocket};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use nix::mount::{MsFlags, mount};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sched::{CloneFlags, unshare};
use nix::sys::socket::{AddressFamily, SockFlag, SockProtocol, SockType, socket};
use serde_json::{Value, json};
use tempfile::TempDir;

use super::*;

/// Writes an executable shell script. Not by this process: a descriptor open
/// for writing that a fork of another test inherits makes its execution fail.
pub fn script(path: &Path, text: &str) {
    let mut install = Command::new("install")
        .args(["-m", "755", "/dev/stdin"])
        .arg(path)
        .stdin(Stdio::piped())
        .spawn()
        .unwrap();
    install.stdin.take().unwrap().write_all(format!("#!/bin/sh\n{text}\n").as_bytes()).unwrap();
    assert!(install.wait().unwrap().success());
}

/// A host with nothing on it but a loopback interface.
struct Host {
    dir: TempDir,
}

impl Host {
    /// Runs a test on a host of its own. Threads and processes that it starts
    /// are on that host, too.
    fn run(test: impl AsyncFnOnce(Host) + Send + 'static) {
        let host = std::thread::spawn(move || {
            let dir = tempfile::tempdir().unwrap();
            unshare(CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWNS).expect("these tests need root");
            let none = None::<&str>;
            mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).unwrap();
            mount(none, "/run", Some("tmpfs"), MsFlags::empty(), none).unwrap();
            netns::with_netlink(async |netlink| {
                let up = rtnetlink::LinkUnspec::new_with_index(1).up().build();
                netlink.link().set(up).execute().await.unwrap();
            })
            .unwrap();
            for name in ["net.d", "bin", "leases"] {
                fs::create_dir(dir.path().join(name)).unwrap();
            }
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(test(Host { dir }));
        });
        if let Err(panic) = host.join() {
            std::panic::resume_unwind(panic);
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// The host's network as a daemon has it after its start.
    fn network(&self) -> Network {
        Network::new(NetworkConfig {
            conf_dir: self.path("net.d"),
            bin_dirs: vec![self.path("bin"), "/opt/cni/bin".into(), "/usr/lib/cni".into()],
            cache_dir: self.path("records"),
            plugin_timeout: Duration::from_secs(60),
        })
    }

    fn configure(&self, plugins: Value) {
        let list = json!({"cniVersion": "1.0.0", "name": "testnet", "plugins": plugins});
        fs::write(self.path("net.d/10-test.conflist"), list.to_string()).unwrap();
    }

    /// A bridge with addresses of both families, and a default route.
    fn bridge(&self) -> Value {
        json!({
            "type": "bridge", "bridge": "cni0", "isGateway": true, "ipMasq": true, "mtu": 1400,
            "ipam": {
                "type": "host-local", "dataDir": self.path("leases"),
                "ranges": [[{"subnet": "10.77.0.0/24"}], [{"subnet": "fd77::/64"}]],
                "routes": [{"dst": "0.0.0.0/0"}, {"dst": "::/0"}],
            },
        })
    }

    /// Addresses that are leased now.
    fn leases(&self) -> Vec<String> {
        let Ok(entries) = fs::read_dir(self.path("leases/testnet")) else { return Vec::new() };
        let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
        names.filter(|name| name.starts_with("10.") || name.starts_with("fd")).collect()
    }

    /// Fails when anything of a pod is left.
    async fn assert_clean(&self) {
        assert_eq!(self.network().recorded().await.unwrap(), Vec::<String>::new());
        assert_eq!(self.leases(), Vec::<String>::new());
        let pinned: Vec<_> = fs::read_dir("/run/netns").map(Iterator::collect).unwrap_or_default();
        assert!(pinned.is_empty(), "{pinned:?}");
        let mounts = fs::read_to_string("/proc/thread-self/mounts").unwrap();
        assert!(!mounts.contains("/run/netns/"), "{mounts}");
        // Where no plugin removed it, the kernel does, a moment after its
        // namespace has ended.
        let deadline = Instant::now() + Duration::from_secs(10);
        while !interfaces("veth").is_empty() {
            assert!(Instant::now() < deadline, "{:?}", interfaces("veth"));
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

/// Interfaces of the calling thread's namespace.
fn interfaces(prefix: &str) -> Vec<String> {
    let table = fs::read_to_string("/proc/thread-self/net/dev").unwrap();
    let names = table.lines().filter_map(|line| line.split_once(':')).map(|(name, _)| name.trim().to_owned());
    names.filter(|name| name.starts_with(prefix)).collect()
}

fn pod<'a>(id: &'a str, port_mappings: &'a [PortMapping]) -> PodRef<'a> {
    PodRef {
        sandbox_id: id,
        namespace: "default",
        name: "web",
        uid: "u-1",
        port_mappings,
        bandwidth: Bandwidth::default(),
        filtered: true,
    }
}

/// A guest in as much as the network can tell: it answers ARP for its address.
struct FakeGuest {
    tap: File,
    mac: [u8; 6],
    ip: Ipv4Addr,
}

/// The virtio net header that a tap with `IFF_VNET_HDR` puts before a frame.
const HEADER: usize = 10;

impl FakeGuest {
    fn new(attachment: &Attachment) -> Self {
        let interface = &attachment.interfaces[0];
        let IpAddr::V4(ip) = attachment.ips[0] else { panic!("{:?}", attachment.ips) };
        Self { tap: File::from(interface.tap.as_ref().unwrap().try_clone().unwrap()), mac: interface.mac, ip }
    }

    fn arp(&mut self, operation: u8, to: [u8; 6], target_mac: [u8; 6], target: Ipv4Addr) {
        let mut frame = vec![0; HEADER];
        frame.extend(to);
        frame.extend(self.mac);
        frame.extend([8, 6, 0, 1, 8, 0, 6, 4, 0, operation]);
        frame.extend(self.mac);
        frame.extend(self.ip.octets());
        frame.extend(target_mac);
        frame.extend(target.octets());
        self.tap.write_all(&frame).unwrap();
    }

    fn send(&mut self, frame: &[u8]) {
        self.tap.write_all(&[&[0; HEADER], frame].concat()).unwrap();
    }

    /// The next frame that `wanted` accepts; ARP requests are answered.
    fn receive(&mut self, wanted: impl Fn(&[u8]) -> bool) -> Vec<u8> {
        let deadline = Instant::now() + Duration::from_secs(20);
        let mut buffer = [0; 4096];
        loop {
            assert!(Instant::now() < deadline, "the frame did not arrive");
            let mut ready = [PollFd::new(std::os::fd::AsFd::as_fd(&self.tap), PollFlags::POLLIN)];
            if poll(&mut ready, PollTimeout::from(500u16)).unwrap() == 0 {
                continue;
            }
            let length = self.tap.read(&mut buffer).unwrap();
            let frame = &buffer[HEADER..length];
            if wanted(frame) {
                return frame.to_vec();
            }
            let arp_request = frame[12..14] == [8, 6] && frame[21] == 1;
            if arp_request && frame[38..42] == self.ip.octets() {
                let asker: [u8; 6] = frame[22..28].try_into().unwrap();
                let address = Ipv4Addr::from(<[u8; 4]>::try_from(&frame[28..32]).unwrap());
                self.arp(2, asker, asker, address);
            }
        }
    }
}

/// A socket that receives the frames that arrive at the host from its pods.
struct Sniffer(OwnedFd);

impl Sniffer {
    fn new() -> Self {
        let flags = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
        Self(socket(AddressFamily::Packet, SockType::Raw, flags, SockProtocol::EthAll).unwrap())
    }

    /// Sends frames, the last of which leaves for certain, and says which have
    /// arrived when that has.
    fn arrived(&self, guest: &mut FakeGuest, frames: &[Vec<u8>]) -> Vec<bool> {
        for frame in frames {
            guest.send(frame);
        }
        let mut arrived = vec![false; frames.len()];
        let deadline = Instant::now() + Duration::from_secs(20);
        let mut buffer = [0; 4096];
        while arrived.last() == Some(&false) {
            assert!(Instant::now() < deadline, "{arrived:?}");
            let mut ready = [PollFd::new(self.0.as_fd(), PollFlags::POLLIN)];
            if poll(&mut ready, PollTimeout::from(500u16)).unwrap() == 0 {
                continue;
            }
            let length = nix::unistd::read(&self.0, &mut buffer).unwrap();
            for (frame, arrived) in frames.iter().zip(&mut arrived) {
                *arrived |= buffer[..length].starts_with(frame);
            }
        }
        arrived
    }
}

/// Attaches, and puts the tap that came early with the others.
async fn attach(network: &Network, pod: &PodRef<'_>) -> Result<Attachment, Error> {
    let (early, tap) = tokio::sync::oneshot::channel();
    let mut attachment = network.attach(pod, early).await?;
    assert!(attachment.interfaces[0].tap.is_none());
    attachment.interfaces[0].tap = Some(tap.await.unwrap());
    Ok(attachment)
}

#[test]
fn a_pod_on_a_bridge_is_reached_and_reaches_out() {
    Host::run(async |host| {
        host.configure(json!([host.bridge()]));
        let network = host.network();
        network.ready().await.unwrap();
        let attachment = attach(&network, &pod("abcdef0123456789", &[])).await.unwrap();

        // The changes that a VM needs do not count as a broken connection.
        network.check("abcdef0123456789").await.unwrap();

        assert_eq!(attachment.netns, Path::new("/run/netns/husk-abcdef0123456"));
        assert_eq!(attachment.ips, ["10.77.0.2".parse::<IpAddr>().unwrap(), "fd77::2".parse().unwrap()]);
        let interface = &attachment.interfaces[0];
        assert_eq!((interface.name.as_str(), interface.mtu), ("eth0", 1400));
        assert_eq!(interface.addresses, ["10.77.0.2/24", "fd77::2/64"]);
        let routes: Vec<_> = attachment.routes.iter().map(|r| (r.destination.as_str(), r.gateway)).collect();
        let via = |gateway: &str| Some(gateway.parse().unwrap());
        assert_eq!(routes, [("0.0.0.0/0", via("10.77.0.1")), ("::/0", via("fd77::1"))]);

        let in_pod = netns::run(&attachment.netns, || interfaces("")).await.unwrap();
        assert!(
            ["lo", "eth0", "tap0_husk"].iter().all(|name| in_pod.iter().any(|i| i == name)),
            "{in_pod:?}"
        );

        // A frame goes out to the bridge, and the answer comes back in.
        let mut guest = FakeGuest::new(&attachment);
        guest.arp(1, [0xff; 6], [0; 6], Ipv4Addr::new(10, 77, 0, 1));
        let reply = guest.receive(|frame| frame[12..14] == [8, 6] && frame[21] == 2);
        assert_eq!(reply[..6], guest.mac);

        // A datagram goes from the host to the guest, which alone answers its ARP.
        let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
        socket.send_to(b"hello", "10.77.0.2:7").unwrap();
        let datagram = guest.receive(|frame| frame[12..14] == [8, 0] && frame.ends_with(b"hello"));
        assert_eq!(datagram[..6], guest.mac);

        drop((attachment, guest));
        network.detach("abcdef0123456789").await.unwrap();
        network.detach("abcdef0123456789").await.unwrap();
        host.assert_clean().await;
    });
}

/// Frames that a guest should not be able to send, with their names, and at last
/// one that it may.
fn spoofed(guest: &FakeGuest) -> (Vec<&'static str>, Vec<Vec<u8>>) {
    let other_mac = [2, 0, 0, 0, 0, 9];
    let frame = |mac: [u8; 6], ethertype: [u8; 2], payload: &[u8]| {
        let mut frame = [&[0xff; 6][..], &mac, &ethertype, payload].concat();
        frame.resize(frame.len().max(60), 0x5a);
        frame
    };
    let packet = |source: [u8; 4]| {
        [&[0x45, 0, 0, 46, 0, 0, 0, 0, 64, 253, 0, 0][..], &source, &[10, 77, 0, 255]].concat()
    };
    let arp = |sender: [u8; 4]| {
        [&[0, 1, 8, 0, 6, 4, 0, 2][..], &guest.mac, &sender, &[0xff; 6], &[10, 77, 0, 9]].concat()
    };
    let v6 = |source: &str, payload: &[u8]| {
        let ips = [source, "ff02::1"].map(|ip| ip.parse::<std::net::Ipv6Addr>().unwrap().octets());
        [&[0x60, 0, 0, 0, 0, 24, 58, 255][..], &ips[0], &ips[1], payload].concat()
    };
    let gateway = "fd77::1".parse::<std::net::Ipv6Addr>().unwrap().octets();
    let advertisement = [&[136, 0, 0, 0, 0x60, 0, 0, 0][..], &gateway].concat();
    let router = [&[134, 0, 0, 0, 64, 0, 0xff, 0xff][..], &[0; 16]].concat();
    let own = guest.ip.octets();
    let frames = vec![
        ("MAC", frame(other_mac, [8, 0], &packet(own))),
        ("IPv4", frame(guest.mac, [8, 0], &packet([10, 77, 0, 1]))),
        ("ARP", frame(guest.mac, [8, 6], &arp([10, 77, 0, 1]))),
        ("IPv6", frame(guest.mac, [0x86, 0xdd], &v6("fd77::1", &[128; 24]))),
        ("neighbour advertisement", frame(guest.mac, [0x86, 0xdd], &v6("fd77::2", &advertisement))),
        ("router advertisement", frame(guest.mac, [0x86, 0xdd], &v6("fd77::2", &router))),
        ("VLAN", frame(guest.mac, [0x81, 0], &[&[0, 5, 8, 0], &packet(own)[..]].concat())),
        ("own", frame(guest.mac, [8, 0], &packet(own))),
    ];
    frames.into_iter().unzip()
}

#[test]
fn a_guest_cannot_send_in_the_name_of_others() {
    Host::run(async |host| {
        host.configure(json!([host.bridge()]));
        let network = host.network();
        let attachment = attach(&network, &pod("aa", &[])).await.unwrap();
        let mut guest = FakeGuest::new(&attachment);
        assert_eq!(guest.ip, Ipv4Addr::new(10, 77, 0, 2));
        let (names, frames) = spoofed(&guest);
        let arrived = Sniffer::new().arrived(&mut guest, &frames);
        let passed: Vec<_> = names.iter().zip(arrived).filter(|(_, arrived)| *arrived).collect();
        assert_eq!(passed, [(&"own", true)]);
        drop((attachment, guest));
        network.detach("aa").await.unwrap();
        host.assert_clean().await;
    });
}

#[test]
fn a_pod_that_is_not_filtered_sends_what_it_likes() {
    Host::run(async |host| {
        host.configure(json!([host.bridge()]));
        let network = host.network();
        let target = PodRef { filtered: false, ..pod("aa", &[]) };
        let attachment = attach(&network, &target).await.unwrap();
        let mut guest = FakeGuest::new(&attachment);
        let (names, frames) = spoofed(&guest);
        let arrived = Sniffer::new().arrived(&mut guest, &frames);
        let lost: Vec<_> = names.iter().zip(arrived).filter(|(_, arrived)| !arrived).collect();
        // The kernel takes the tag off before a socket sees the frame.
        assert_eq!(lost, [(&"VLAN", false)]);
        drop((attachment, guest));
        network.detach("aa").await.unwrap();
        host.assert_clean().await;
    });
}

#[test]
fn the_kernel_has_what_pods_need() {
    Host::run(async move |_| probe().await.unwrap());
}

#[test]
fn a_host_port_leads_to_the_guest() {
    Host::run(async |host| {
        host.configure(json!([host.bridge(), {"type": "portmap", "capabilities": {"portMappings": true}}]));
        let mappings =
            [PortMapping { host_port: 8053, container_port: 53, protocol: Protocol::Udp, host_ip: None }];
        let network = host.network();
        let attachment = attach(&network, &pod("aa", &mappings)).await.unwrap();
        let mut guest = FakeGuest::new(&attachment);
        let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
        socket.send_to(b"query", "10.77.0.1:8053").unwrap();
        let datagram = guest.receive(|frame| frame[12..14] == [8, 0] && frame.ends_with(b"query"));
        assert_eq!(datagram[36..38], 53u16.to_be_bytes());
        drop((attachment, guest));
        network.detach("aa").await.unwrap();
        host.assert_clean().await;
        let rules = Command::new("iptables-save").output().unwrap();
        let rules = String::from_utf8(rules.stdout).unwrap();
        assert!(!rules.contains("8053") && !rules.contains("10.77.0.2"), "{rules}");
    });
}

#[test]
fn point_to_point_routes_are_carried_over() {
    Host::run(async |host| {
        host.configure(json!([{
            "type": "ptp", "ipam": {
                "type": "host-local", "dataDir": host.path("leases"), "subnet": "10.78.0.0/24",
                "routes": [{"dst": "0.0.0.0/0"}],
            },
        }]));
        let network = host.network();
        let attachment = attach(&network, &pod("aa", &[])).await.unwrap();
        // ptp wants all traffic to go by its gateway, that of the subnet, too.
        assert_eq!(attachment.interfaces[0].addresses, ["10.78.0.2/32"]);
        let routes: Vec<_> = attachment.routes.iter().map(|r| (r.destination.as_str(), r.gateway)).collect();
        let gateway = Some("10.78.0.1".parse().unwrap());
        assert_eq!(routes, [("10.78.0.1/32", None), ("10.78.0.0/24", gateway), ("0.0.0.0/0", gateway)]);
        drop(attachment);
        network.detach("aa").await.unwrap();
        host.assert_clean().await;
    });
}

#[test]
fn a_pod_is_disconnected_with_the_configuration_that_connected_it() {
    Host::run(async |host| {
        host.configure(json!([host.bridge()]));
        let attachment = attach(&host.network(), &pod("aa", &[])).await.unwrap();
        assert_eq!(host.leases().len(), 2);
        drop(attachment);
        // Another daemon disconnects the pod after its configuration was removed.
        fs::remove_file(host.path("net.d/10-test.conflist")).unwrap();
        let network = host.network();
        assert!(network.ready().await.unwrap_err().to_string().contains("no CNI configuration"));
        assert_eq!(network.recorded().await.unwrap(), ["aa"]);
        network.detach("aa").await.unwrap();
        host.assert_clean().await;
    });
}

#[test]
fn plugins_are_told_when_the_namespace_has_gone() {
    Host::run(async |host| {
        let log = host.path("log");
        let text = format!(
            r#"echo "$CNI_COMMAND [$CNI_NETNS]" >> {}; cat > /dev/null; echo '{{"ips":[{{"address":"10.0.0.2/8"}}]}}'"#,
            log.display()
        );
        script(&host.path("bin/logger"), &text);
        host.configure(json!([host.bridge(), {"type": "logger"}]));
        let network = host.network();
        let attachment = attach(&network, &pod("aa", &[])).await.unwrap();
        netns::remove(&attachment.netns).await.unwrap();
        drop(attachment);
        network.detach("aa").await.unwrap();
        assert_eq!(fs::read_to_string(log).unwrap(), "ADD [/run/netns/husk-aa]\nDEL []\n");
        host.assert_clean().await;
    });
}

#[test]
fn a_failing_plugin_is_named_and_everything_before_it_undone() {
    Host::run(async |host| {
        for (text, words) in [
            (
                r#"echo '{"code":7,"msg":"no room"}'; exit 1"#,
                "CNI plugin bad failed to ADD: no room (code 7)",
            ),
            ("exec sleep 600", "CNI plugin bad did not finish ADD within 1 s"),
            ("echo garbage", "CNI plugin bad answered ADD with something that is no result: \"garbage\""),
            ("exit 0", "it printed nothing"),
            (r#"echo '{"ips": []}'"#, "no address"),
            (r#"echo '{"ips": [{"address": "10.0.0.300/8"}]}'"#, "10.0.0.300/8"),
        ] {
            // On DEL it is as it should be, save for the one that hangs.
            let text = format!(
                r#"[ $CNI_COMMAND = ADD ] || case "{words}" in *finish*) ;; *) exit 0;; esac; {text}"#
            );
            script(&host.path("bin/bad"), &text.replace("\"garbage\"", ""));
            let mut network = host.network();
            if words.contains("finish") {
                // The real plugins may need longer than that on a slow machine.
                network.plugins.timeout = Duration::from_secs(1);
                host.configure(json!([{"type": "bad"}]));
            } else {
                host.configure(json!([host.bridge(), {"type": "bad"}]));
            }
            let error = husk_base::chain(&attach(&network, &pod("aa", &[])).await.unwrap_err());
            assert!(error.contains(words), "{error}");
            host.assert_clean().await;
        }
        host.configure(json!([host.bridge(), {"type": "absent"}]));
        let error = attach(&host.network(), &pod("aa", &[])).await.unwrap_err().to_string();
        assert!(error.contains("CNI plugin absent is not in"), "{error}");
        assert!(host.network().ready().await.unwrap_err().to_string().contains("absent"));
        host.assert_clean().await;
    });
}

/// A plugin that writes down how it was called, and fails at one command.
fn noting(host: &Host, name: &str, fails: &str) {
    let notes = host.path("notes");
    script(
        &host.path("bin").join(name),
        &format!(
            "echo \"{name} $CNI_COMMAND ${{CNI_CONTAINERID-unset}} ${{CNI_IFNAME-unset}} $(cat)\" >>{}\n\
             [ $CNI_COMMAND = ADD ] && echo '{{\"ips\": [{{\"address\": \"10.1.2.3/24\"}}]}}'\n\
             [ $CNI_COMMAND != '{fails}' ] || {{ echo '{{\"code\": 50, \"msg\": \"not now\"}}'; exit 1; }}",
            notes.display(),
        ),
    );
}

/// The calls of such plugins since the last time, each with its configuration.
fn notes(host: &Host) -> Vec<(String, Value)> {
    let text = fs::read_to_string(host.path("notes")).unwrap_or_default();
    let _ = fs::remove_file(host.path("notes"));
    let split = |line: &str| {
        let (call, config) = line.split_at(line.find('{').unwrap());
        (call.trim().to_owned(), serde_json::from_str(config).unwrap())
    };
    text.lines().map(split).collect()
}

#[test]
fn plugins_are_asked_how_the_network_is_and_what_no_pod_has() {
    Host::run(async |host| {
        noting(&host, "one", "CHECK");
        noting(&host, "two", "GC");
        let list = |version: &str, more: Value| {
            let mut list = json!({
                "name": "test", "cniVersion": version, "plugins": [{"type": "one"}, {"type": "two"}],
            });
            list.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
            fs::write(host.path("net.d/10-test.conflist"), list.to_string()).unwrap();
        };
        let calls = || notes(&host).into_iter().map(|(call, _)| call).collect::<Vec<_>>();

        list("1.1.0", json!({}));
        let network = host.network();
        let attached = network.attach_host_pod(&pod("aa", &[])).await.unwrap();
        drop((attached, calls()));

        network.status().await.unwrap();
        assert_eq!(calls(), ["one STATUS unset unset", "two STATUS unset unset"]);

        // The first that misses something says so.
        let error = network.check("aa").await.unwrap_err().to_string();
        assert_eq!(error, "CNI plugin one failed to CHECK: not now (code 50)");
        let [(call, config)] = &notes(&host)[..] else { panic!("one call") };
        assert_eq!(call, "one CHECK aa eth0");
        assert_eq!(config["prevResult"]["ips"][0]["address"], "10.1.2.3/24");

        // One that fails does not keep the other from it.
        network.collect_garbage().await;
        let made = notes(&host);
        assert_eq!(
            made.iter().map(|(call, _)| call.as_str()).collect::<Vec<_>>(),
            ["one GC unset unset", "two GC unset unset"]
        );
        let valid = json!([{"containerID": "aa", "ifname": "eth0"}]);
        assert!(made.iter().all(|(_, config)| config["cni.dev/valid-attachments"] == valid), "{made:?}");

        // The configuration can forbid a command, and older plugins do not have it.
        list("1.1.0", json!({"disableGC": true}));
        network.collect_garbage().await;
        list("1.0.0", json!({}));
        network.collect_garbage().await;
        network.status().await.unwrap();
        assert_eq!(calls(), [""; 0]);
        network.detach("aa").await.unwrap();
        list("1.0.0", json!({"disableCheck": "true"}));
        drop(network.attach_host_pod(&pod("bb", &[])).await.unwrap());
        drop(calls());
        network.check("bb").await.unwrap();
        assert_eq!(calls(), [""; 0]);
        network.detach("bb").await.unwrap();

        noting(&host, "two", "STATUS");
        list("1.1.0", json!({}));
        let error = network.status().await.unwrap_err().to_string();
        assert_eq!(error, "CNI plugin two failed to STATUS: not now (code 50)");
    });
}

#[test]
fn what_an_interrupted_attach_has_done_is_undone_later() {
    Host::run(async |host| {
        script(&host.path("bin/slow"), "[ $CNI_COMMAND = DEL ] || exec sleep 600");
        host.configure(json!([host.bridge(), {"type": "slow"}]));
        let network = host.network();
        let deadline = Instant::now() + Duration::from_secs(60);
        let target = pod("aa", &[]);
        let mut attaching = Box::pin(attach(&network, &target));
        while host.leases().len() < 2 {
            assert!(Instant::now() < deadline);
            let step = tokio::time::timeout(Duration::from_millis(50), &mut attaching).await;
            assert!(step.is_err(), "{step:?}");
        }
        drop(attaching);
        let error = attach(&network, &target).await.unwrap_err();
        assert!(matches!(error, Error::Exists(_)), "{error}");
        assert_eq!(host.network().recorded().await.unwrap(), ["aa"]);
        host.network().detach("aa").await.unwrap();
        host.assert_clean().await;
    });
}

#[test]
fn a_plugin_that_outlives_its_caller_leaves_nothing() {
    Host::run(async |host| {
        let (started, lease) = (host.path("started"), host.path("leases/late"));
        // A program of the plugin's does the work, as an IPAM plugin would.
        let text = format!(
            "cat >/dev/null; [ $CNI_COMMAND = ADD ] || exec rm -f {lease}
             touch {started}
             sh -c 'sleep 2; touch {lease}'
             echo '{{\"ips\": [{{\"address\": \"10.1.2.3/24\"}}]}}'",
            started = started.display(),
            lease = lease.display(),
        );
        script(&host.path("bin/late"), &text);
        host.configure(json!([{"type": "late"}]));
        let network = host.network();
        let target = pod("late-0123", &[]);
        let mut attaching = Box::pin(attach(&network, &target));
        let deadline = Instant::now() + Duration::from_secs(60);
        while !started.exists() {
            assert!(Instant::now() < deadline);
            let step = tokio::time::timeout(Duration::from_millis(20), &mut attaching).await;
            assert!(step.is_err(), "{step:?}");
        }
        // A huskd that is killed drops nothing.
        std::mem::forget(attaching);
        host.network().detach("late-0123").await.unwrap();
        tokio::time::sleep(Duration::from_secs(3)).await;
        assert!(!lease.exists(), "the interrupted ADD went on behind DEL");
        host.assert_clean().await;
    });
}

#[test]
fn a_full_disk_is_found_among_the_causes() {
    Host::run(async |host| {
        fs::create_dir(host.path("records")).unwrap();
        let none = None::<&str>;
        mount(none, &host.path("records"), Some("tmpfs"), MsFlags::empty(), Some("size=4k")).unwrap();
        host.configure(json!([host.bridge()]));
        let _ = fs::write(host.path("records/.full"), [0; 8192]);
        let error = attach(&host.network(), &pod("aa", &[])).await.unwrap_err();
        assert!(husk_base::is_full_disk(&error), "{error:?}");
        let text = husk_base::chain(&error);
        assert!(text.contains("record of a pod's network") && text.ends_with("(os error 28)"), "{text}");
        assert_eq!(text.matches("os error 28").count(), 1, "{text}");
        fs::remove_file(host.path("records/.full")).unwrap();
        host.assert_clean().await;
    });
}

#[test]
fn a_plugin_that_cannot_disconnect_keeps_the_record_for_the_next_try() {
    Host::run(async |host| {
        let flag = host.path("fixed");
        let text = format!(
            r#"cat >/dev/null; [ $CNI_COMMAND = ADD ] || [ -e {} ] || {{ echo '{{"code":1,"msg":"busy"}}'; exit 1; }}
               echo '{{"ips":[{{"address":"10.77.0.2/24"}}]}}'"#,
            flag.display()
        );
        script(&host.path("bin/stubborn"), &text);
        host.configure(json!([host.bridge(), {"type": "stubborn"}]));
        let network = host.network();
        drop(attach(&network, &pod("aa", &[])).await.unwrap());
        let error = network.detach("aa").await.unwrap_err().to_string();
        assert_eq!(error, "CNI plugin stubborn failed to DEL: busy (code 1)");
        assert_eq!(network.recorded().await.unwrap(), ["aa"]);
        fs::write(flag, "").unwrap();
        network.detach("aa").await.unwrap();
        host.assert_clean().await;
    });
}

#[test]
fn many_pods_at_once_get_addresses_of_their_own() {
    Host::run(async |host| {
        host.configure(json!([host.bridge()]));
        let network = host.network();
        let ids: Vec<String> = (0..4).map(|n| format!("pod{n}")).collect();
        let pods: Vec<_> = ids.iter().map(|id| pod(id, &[])).collect();
        let attached = futures::future::join_all(pods.iter().map(|pod| attach(&network, pod))).await;
        let mut ips: Vec<_> = attached.into_iter().map(|attachment| attachment.unwrap().ips[0]).collect();
        ips.sort();
        ips.dedup();
        assert_eq!(ips.len(), 4);
        for id in &ids {
            network.detach(id).await.unwrap();
        }
        host.assert_clean().await;
    });
}
