//! The system calls that the jail leaves: those on files below the root, and on
//! the socket. Any other call fails.
//!
//! So an attacker who takes over the process makes no connection, starts no
//! program, signals nobody, and reaches no other part of the kernel than files.

use husk_seccomp::{BackendError, List, Refusal};

const FILES: &[i64] = &[
    libc::SYS_openat,
    libc::SYS_openat2,
    libc::SYS_statx,
    libc::SYS_fstat,
    libc::SYS_newfstatat,
    libc::SYS_statfs,
    libc::SYS_fstatfs,
    libc::SYS_readlinkat,
    libc::SYS_getdents64,
    libc::SYS_mknodat,
    libc::SYS_mkdirat,
    libc::SYS_symlinkat,
    libc::SYS_linkat,
    libc::SYS_unlinkat,
    libc::SYS_renameat,
    libc::SYS_renameat2,
    libc::SYS_fchmod,
    libc::SYS_fchmodat,
    libc::SYS_fchown,
    libc::SYS_fchownat,
    libc::SYS_utimensat,
    libc::SYS_ftruncate,
    libc::SYS_fallocate,
    libc::SYS_fsync,
    libc::SYS_fdatasync,
    libc::SYS_syncfs,
    libc::SYS_lseek,
    libc::SYS_dup,
    libc::SYS_pread64,
    libc::SYS_pwrite64,
    libc::SYS_pwritev2,
    libc::SYS_copy_file_range,
    libc::SYS_getxattr,
    libc::SYS_setxattr,
    libc::SYS_listxattr,
    libc::SYS_removexattr,
    libc::SYS_fgetxattr,
    libc::SYS_fsetxattr,
    libc::SYS_flistxattr,
    libc::SYS_fremovexattr,
];

/// Calls that set the owner of new files.
const IDENTITY: &[i64] = &[libc::SYS_setfsuid, libc::SYS_setfsgid, libc::SYS_capget, libc::SYS_capset];

/// Restricts the calling thread, and the threads that it starts.
///
/// # Errors
/// The kernel has no seccomp.
pub fn install() -> Result<(), husk_seccomp::Error> {
    list()?.install(Refusal::Error)
}

fn list() -> Result<List, BackendError> {
    List::new()?.calls(FILES).calls(IDENTITY).descriptor_flags()
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;
    use std::os::fd::AsRawFd;
    use std::process::Command;

    use rustix::fs::{CWD, Mode, OFlags};

    use super::*;

    #[test]
    fn files_are_all_that_there_is() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("file");
        let restricted = move || {
            install().unwrap();
            let flags = OFlags::CREATE | OFlags::WRONLY;
            rustix::fs::openat(CWD, &file, flags, Mode::RUSR).unwrap();
            let connection = TcpListener::bind("127.0.0.1:0").unwrap_err();
            let program = Command::new("/bin/true").spawn().unwrap_err();
            [connection.raw_os_error(), program.raw_os_error()]
        };
        assert_eq!(std::thread::spawn(restricted).join().unwrap(), [Some(libc::EPERM); 2]);
    }

    /// `F_SETSIG`, from Linux, include/uapi/asm-generic/fcntl.h.
    const F_SETSIG: i32 = 10;

    /// A file with another process as its owner (`F_SETOWN`) sends signals to
    /// it.
    #[test]
    fn no_file_signals_another_process() {
        let (reader, mut writer) = std::io::pipe().unwrap();
        let mut victim = Command::new("/bin/sleep").arg("60").spawn().unwrap();
        let pid = i32::try_from(victim.id()).unwrap();
        let attack = move || {
            install().unwrap();
            let fd = reader.as_raw_fd();
            for (command, value) in [
                (libc::F_SETOWN, pid),
                (F_SETSIG, libc::SIGKILL),
                (libc::F_SETFL, libc::O_ASYNC | libc::O_NONBLOCK),
            ] {
                // SAFETY: these commands of fcntl take numbers.
                unsafe { libc::fcntl(fd, command, value) };
            }
            reader
        };
        let _reader = std::thread::spawn(attack).join().unwrap();
        std::io::Write::write_all(&mut writer, b"x").unwrap();
        std::thread::sleep(std::time::Duration::from_millis(300));
        let ended = victim.try_wait().unwrap();
        victim.kill().unwrap();
        victim.wait().unwrap();
        assert_eq!(ended, None);
    }
}
