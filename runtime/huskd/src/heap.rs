//! Keeps the daemon small: pulling an image takes memory in many threads, and
//! the C library's allocator would keep all of it for the next time.

/// Large blocks come straight from the kernel, and go straight back.
const LARGE: libc::c_int = 64 * 1024;

/// Sets the allocator up. Before the first thread.
pub fn configure() {
    // SAFETY: mallopt may be called at any time; both values are in range. One
    // that the C library does not take leaves its default.
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, 2);
        libc::mallopt(libc::M_MMAP_THRESHOLD, LARGE);
    }
}

/// Gives free memory back to the kernel. Takes milliseconds.
pub fn trim() {
    // SAFETY: malloc_trim may be called at any time, by any thread.
    unsafe {
        libc::malloc_trim(0);
    }
}
