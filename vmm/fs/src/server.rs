//! Threads that take requests from the socket and answer them.
//!
//! There is one thread while no request has to wait for a disk, and one more
//! for each that does, up to [`MAX_THREADS`]. Any idle thread reads the next
//! request; answers go out in any order.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use husk_vmm_api::MAX_FUSE_MESSAGE;
use husk_vmm_api::words::say;

use crate::Errno;
use crate::passthrough::Passthrough;

/// Most requests that are in progress at a time.
const MAX_THREADS: usize = 8;

/// Bytes of a thread's stack. Only touched pages cost memory.
const STACK: usize = 256 * 1024;

struct Server {
    socket: OwnedFd,
    files: Passthrough,
    threads: AtomicUsize,
    idle: AtomicUsize,
}

/// Serves until the other end of `socket` is closed.
///
/// # Errors
/// The socket's.
pub fn serve(socket: OwnedFd, files: Passthrough) -> io::Result<()> {
    let server = Server { socket, files, threads: AtomicUsize::new(1), idle: AtomicUsize::new(0) };
    work(&Arc::new(server))
}

fn work(server: &Arc<Server>) -> io::Result<()> {
    let mut packet = vec![0; MAX_FUSE_MESSAGE];
    let mut answer = Vec::new();
    loop {
        server.idle.fetch_add(1, Ordering::SeqCst);
        let received = rustix::io::read(&server.socket, &mut packet);
        let was_last = server.idle.fetch_sub(1, Ordering::SeqCst) == 1;
        let len = match received {
            // The machine has ended, or the device `/dev/fuse` was unmounted.
            Ok(0) | Err(Errno::CONNRESET | Errno::NODEV) => return Ok(()),
            Ok(len) => len,
            Err(Errno::INTR | Errno::AGAIN | Errno::NOENT) => continue,
            Err(error) => return Err(error.into()),
        };
        if was_last {
            add_thread(server);
        }
        let request = packet.get(..len).unwrap_or_default();
        if let Some(answer) = server.files.answer(request, &mut answer) {
            send(&server.socket, answer)?;
        }
    }
}

/// If no thread can be made, requests wait for each other.
fn add_thread(server: &Arc<Server>) {
    if server.threads.fetch_add(1, Ordering::SeqCst) >= MAX_THREADS {
        server.threads.fetch_sub(1, Ordering::SeqCst);
        return;
    }
    let theirs = Arc::clone(server);
    let spawned = thread::Builder::new().name("husk-fs-io".into()).stack_size(STACK).spawn(move || {
        let ended = work(&theirs);
        if let Err(error) = &ended {
            say(format_args!("husk-fs: {error}"));
        }
        // The process ends when the socket is closed, whichever thread notices.
        std::process::exit(i32::from(ended.is_err()));
    });
    if spawned.is_err() {
        server.threads.fetch_sub(1, Ordering::SeqCst);
    }
}

fn send(socket: &OwnedFd, answer: &[u8]) -> io::Result<()> {
    loop {
        match rustix::io::write(socket, answer) {
            Ok(_) => return Ok(()),
            Err(Errno::INTR | Errno::AGAIN) => {}
            // The kernel has no memory for a packet of this size now.
            Err(Errno::NOBUFS | Errno::NOMEM) => thread::sleep(std::time::Duration::from_millis(1)),
            // The request was aborted (`/dev/fuse`), or the other end is
            // closed.
            Err(Errno::NOENT | Errno::PIPE | Errno::CONNRESET) => return Ok(()),
            Err(error) => return Err(error.into()),
        }
    }
}
