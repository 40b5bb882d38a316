//! Tap interfaces, made in the namespace of the calling thread.
//!
//! A tap is not persistent: it goes with its last descriptor, so there is
//! nothing to clean up after a VMM that died.

use std::fs::OpenOptions;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;

mod ioctl {
    //! Two numbers from `linux/if_tun.h`.
    nix::ioctl_write_ptr_bad!(set_interface, nix::request_code_write!(b'T', 202, 4), libc::ifreq);
}

/// Makes a tap with a single queue that carries a virtio net header before
/// each Ethernet frame (`IFF_VNET_HDR`).
///
/// # Errors
/// The kernel's; `InvalidInput` for a name that no interface can have.
#[expect(clippy::disallowed_methods, reason = "it runs on a thread of its own")]
pub fn create(name: &str) -> io::Result<OwnedFd> {
    let tun = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC)
        .open("/dev/net/tun")?;
    // SAFETY: `ifreq` is a C struct of integers and a union of such, for which
    // all zeroes is a value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    let room = request.ifr_name.len();
    if name.is_empty() || name.len() >= room || name.contains('/') {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, format!("{name:?} is no interface name")));
    }
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from.cast_signed();
    }
    // The three flags are below 0x8000 as u16s; IFF_VNET_HDR is 0x4000.
    request.ifr_ifru.ifru_flags = (libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR) as libc::c_short;
    // SAFETY: TUNSETIFF reads an `ifreq` and writes the name back into the
    // kernel's copy of it; the descriptor is open.
    unsafe { ioctl::set_interface(tun.as_raw_fd(), &raw const request) }?;
    Ok(tun.into())
}
