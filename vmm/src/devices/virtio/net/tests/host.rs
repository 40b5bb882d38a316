//! The host's side: a real tap, and a packet socket on it.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::thread;
use std::time::Duration;

use nix::sched::{CloneFlags, unshare};

/// The protocol that tells frames of these tests from those that the kernel
/// sends by itself; it is reserved for local experiments (IEEE 802).
pub const ETHERTYPE: [u8; 2] = [0x88, 0xb5];
pub const IPV4: [u8; 2] = [0x08, 0x00];

/// Bytes of `struct virtio_net_hdr`, which packet sockets use.
const HEADER_LEN: usize = 10;

/// Runs a test in a network namespace of its own, which ends with it. Returns
/// false without the privileges to make one.
pub fn in_namespace(test: impl FnOnce() + Send + 'static) -> bool {
    let run = move || {
        if unshare(CloneFlags::CLONE_NEWNET).is_err() || tap("probe").is_err() {
            eprintln!("skipped: no network namespace or no /dev/net/tun");
            return false;
        }
        // Otherwise the kernel looks for IPv6 routers.
        let _ = fs::write("/proc/sys/net/ipv6/conf/default/disable_ipv6", "1");
        test();
        true
    };
    match thread::spawn(run).join() {
        Ok(ran) => ran,
        Err(panic) => std::panic::resume_unwind(panic),
    }
}

fn request(name: &str) -> libc::ifreq {
    // SAFETY: all zeroes are a valid request.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from.cast_signed();
    }
    request
}

fn check(result: libc::c_int) -> io::Result<libc::c_int> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

/// A tap, as huskd makes it.
pub fn tap(name: &str) -> io::Result<OwnedFd> {
    let file = OpenOptions::new().read(true).write(true).open("/dev/net/tun")?;
    let mut request = request(name);
    request.ifr_ifru.ifru_flags = (libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR) as i16;
    // SAFETY: the ioctl reads and writes the request.
    check(unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, &raw mut request) })?;
    Ok(file.into())
}

/// A packet socket on an interface.
pub struct Wire {
    socket: File,
}

impl Wire {
    /// Sets the interface up, and opens a packet socket on it.
    pub fn new(name: &str) -> Self {
        let protocol = i32::from((libc::ETH_P_ALL as u16).to_be());
        // SAFETY: plain system calls with pointers to what they are meant for.
        let socket = unsafe {
            let fd =
                check(libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_CLOEXEC, protocol)).unwrap();
            let socket = File::from_raw_fd(fd);
            let mut request = request(name);
            check(libc::ioctl(fd, libc::SIOCGIFINDEX, &raw mut request)).unwrap();
            let index = request.ifr_ifru.ifru_ifindex;
            request.ifr_ifru.ifru_mtu = 9000;
            check(libc::ioctl(fd, libc::SIOCSIFMTU, &raw mut request)).unwrap();
            request.ifr_ifru.ifru_flags = (libc::IFF_UP | libc::IFF_NOARP) as i16;
            check(libc::ioctl(fd, libc::SIOCSIFFLAGS, &raw mut request)).unwrap();
            let mut address: libc::sockaddr_ll = std::mem::zeroed();
            address.sll_family = libc::AF_PACKET as u16;
            address.sll_protocol = protocol as u16;
            address.sll_ifindex = index;
            check(libc::bind(fd, (&raw const address).cast(), size_of_val(&address) as u32)).unwrap();
            let one: libc::c_int = 1;
            let len = size_of_val(&one) as u32;
            check(libc::setsockopt(fd, libc::SOL_PACKET, 15, (&raw const one).cast(), len)).unwrap();
            let timeout = libc::timeval { tv_sec: 10, tv_usec: 0 };
            let len = size_of_val(&timeout) as u32;
            let timeout = (&raw const timeout).cast();
            check(libc::setsockopt(fd, libc::SOL_SOCKET, libc::SO_RCVTIMEO, timeout, len)).unwrap();
            socket
        };
        // The kernel needs a moment to see that the tap has a reader.
        thread::sleep(Duration::from_millis(10));
        Self { socket }
    }

    /// Sends a frame into the tap, with the first bytes of a virtio header.
    pub fn send(&self, header: [u8; HEADER_LEN], frame: &[u8]) {
        let packet = [&header[..], frame].concat();
        assert_eq!((&self.socket).write(&packet).unwrap(), packet.len());
    }

    /// The next frame of these tests that comes out of the tap.
    pub fn receive(&self, ethertype: [u8; 2]) -> ([u8; HEADER_LEN], Vec<u8>) {
        let mut packet = vec![0; 70_000];
        loop {
            let len = (&self.socket).read(&mut packet).expect("a frame");
            if packet[HEADER_LEN + 12..HEADER_LEN + 14] == ethertype {
                return (packet[..HEADER_LEN].try_into().unwrap(), packet[HEADER_LEN..len].to_vec());
            }
        }
    }
}
