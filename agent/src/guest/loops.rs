//! Loop devices, which turn an image's file into a filesystem on the host,
//! where no VMM makes a disk of it (loop(4)).

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};

use nix::errno::Errno;

/// Most attempts to get a free loop device: another process may take the one
/// that the kernel names.
const ATTEMPTS: usize = 64;

const FLAG_READ_ONLY: u32 = 1;
/// The device is detached with its last user, which is a mount.
const FLAG_AUTOCLEAR: u32 = 4;

/// `struct loop_info64` of `linux/loop.h`.
#[repr(C)]
struct Info {
    device: u64,
    inode: u64,
    rdevice: u64,
    offset: u64,
    size_limit: u64,
    number: u32,
    encrypt_type: u32,
    encrypt_key_size: u32,
    flags: u32,
    file_name: [u8; 64],
    crypt_name: [u8; 64],
    encrypt_key: [u8; 32],
    init: [u64; 2],
}

/// `struct loop_config` of `linux/loop.h`.
#[repr(C)]
struct Config {
    fd: u32,
    block_size: u32,
    info: Info,
    reserved: [u64; 8],
}

nix::ioctl_none_bad!(get_free, 0x4C82);
nix::ioctl_write_ptr_bad!(configure, 0x4C0A, Config);

/// A loop device. It exists until this is dropped, or for as long after that as
/// it is mounted.
#[derive(Debug)]
pub struct Loop {
    path: PathBuf,
    _device: File,
}

impl Loop {
    /// Attaches a file to a free device, read-only.
    pub fn attach(file: &Path) -> io::Result<Self> {
        let backing = File::open(file)?;
        let control = OpenOptions::new().read(true).write(true).open("/dev/loop-control")?;
        let config = Config {
            fd: backing.as_raw_fd().unsigned_abs(),
            block_size: 0,
            info: Info {
                device: 0,
                inode: 0,
                rdevice: 0,
                offset: 0,
                size_limit: 0,
                number: 0,
                encrypt_type: 0,
                encrypt_key_size: 0,
                flags: FLAG_READ_ONLY | FLAG_AUTOCLEAR,
                file_name: name(file),
                crypt_name: [0; 64],
                encrypt_key: [0; 32],
                init: [0; 2],
            },
            reserved: [0; 8],
        };
        for _ in 0..ATTEMPTS {
            // SAFETY: the request has no argument.
            let number = unsafe { get_free(control.as_raw_fd()) }?;
            let path = PathBuf::from(format!("/dev/loop{number}"));
            let device = match OpenOptions::new().read(true).open(&path) {
                // The device vanished between the two calls.
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                device => device?,
            };
            // SAFETY: `config` is laid out as the kernel's loop_config, which
            // it only reads during the call.
            match unsafe { configure(device.as_raw_fd(), &raw const config) } {
                Ok(_) => return Ok(Self { path, _device: device }),
                Err(Errno::EBUSY) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Err(io::Error::other("every free loop device was taken by others"))
    }

    /// The device node.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

/// The end of the path, for the output of `losetup`.
fn name(file: &Path) -> [u8; 64] {
    use std::os::unix::ffi::OsStrExt;
    let mut name = [0; 64];
    let bytes = file.as_os_str().as_bytes();
    let start = bytes.len().saturating_sub(63);
    for (to, from) in name.iter_mut().zip(bytes.get(start..).unwrap_or_default()) {
        *to = *from;
    }
    name
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_structures_are_the_kernels() {
        assert_eq!((size_of::<Info>(), size_of::<Config>()), (232, 304));
    }

    #[test]
    fn a_long_path_keeps_its_end_and_a_zero_behind_it() {
        let long = "/".repeat(100) + "image.erofs";
        let name = name(Path::new(&long));
        assert!(name.starts_with(b"//") && name.ends_with(b"image.erofs\0"));
    }
}
