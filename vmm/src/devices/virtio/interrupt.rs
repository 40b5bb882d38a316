//! A device's interrupt to its driver (virtio 1.2 §4.2.3.3).

use std::sync::atomic::{AtomicU32, Ordering};

use vmm_sys_util::eventfd::EventFd;

/// Bit of the interrupt status: the device has used buffers of a virtqueue.
pub const USED_RING: u32 = 1;
/// Bit of the interrupt status: the device's configuration changed.
pub const CONFIG_CHANGE: u32 = 2;

/// One device's interrupt line: an irqfd and the status register that the
/// driver reads to learn the cause.
#[derive(Debug)]
pub struct Interrupt {
    status: AtomicU32,
    generation: AtomicU32,
    line: EventFd,
}

impl Interrupt {
    /// `line` is registered with KVM as an irqfd, or an eventfd that a test
    /// watches.
    #[must_use]
    pub fn new(line: EventFd) -> Self {
        Self { status: AtomicU32::new(0), generation: AtomicU32::new(0), line }
    }

    /// Raises the line for `cause`, [`USED_RING`] or [`CONFIG_CHANGE`].
    pub fn trigger(&self, cause: u32) {
        if cause & CONFIG_CHANGE != 0 {
            self.generation.fetch_add(1, Ordering::SeqCst);
        }
        self.status.fetch_or(cause, Ordering::SeqCst);
        // A full counter means that the line is raised already.
        let _ = self.line.write(1);
    }

    /// The register `ConfigGeneration`. It counts changes, so that a driver
    /// which reads the configuration in pieces notices a change in between. A
    /// device changes its configuration and triggers under one lock.
    #[must_use]
    pub fn generation(&self) -> u32 {
        self.generation.load(Ordering::SeqCst)
    }

    /// The register `InterruptStatus`.
    #[must_use]
    pub fn status(&self) -> u32 {
        self.status.load(Ordering::SeqCst)
    }

    /// The register `InterruptACK`.
    pub fn acknowledge(&self, causes: u32) {
        self.status.fetch_and(!causes, Ordering::SeqCst);
    }

    /// Sets status and generation to their saved values.
    pub fn restore(&self, status: u32, generation: u32) {
        self.status.store(status, Ordering::SeqCst);
        self.generation.store(generation, Ordering::SeqCst);
    }

    /// The irqfd.
    #[must_use]
    pub const fn line(&self) -> &EventFd {
        &self.line
    }
}
