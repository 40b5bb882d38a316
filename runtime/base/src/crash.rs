//! Places at which tests have huskd die.
//!
//! huskd may die at any instruction, and what matters is which of its effects on the
//! host were done by then. So every effect has a place before it or behind it, with a
//! name. `make crash` counts the places that a request passes, and kills huskd at each
//! of them. Only a build with the feature `crash-points` has them; in any other a place
//! is nothing.

/// Passes the place with this name.
#[cfg(not(feature = "crash-points"))]
#[inline(always)]
pub fn point(_name: impl std::fmt::Display) {}

#[cfg(feature = "crash-points")]
pub use armed::point;

#[cfg(feature = "crash-points")]
mod armed {
    use std::io::Write;
    use std::os::unix::fs::MetadataExt;
    use std::path::PathBuf;
    use std::sync::{LazyLock, Mutex};
    use std::time::Duration;

    /// Names the directory in which the test and huskd meet:
    ///
    /// | file | |
    /// | --- | --- |
    /// | `plan` | the number of the place at which huskd stands still, counted from the moment in which the file was put there; without the file no place counts |
    /// | `passed` | the names of the places that were passed, a line each |
    /// | `at` | exists while huskd stands still, which it does as long as `plan` is the same file |
    const DIRECTORY: &str = "HUSK_CRASH_POINTS";

    /// How often huskd looks whether the test has taken the plan away.
    const LOOK_AGAIN: Duration = Duration::from_millis(5);

    static PLACE: LazyLock<Option<PathBuf>> = LazyLock::new(|| std::env::var_os(DIRECTORY).map(Into::into));
    static COUNT: Mutex<Count> = Mutex::new(Count { plan: (0, 0, 0), passed: 0 });

    /// How many places were passed under a plan.
    struct Count {
        plan: Identity,
        passed: u64,
    }

    /// Inode and change time of a plan: another one has another.
    type Identity = (u64, i64, i64);

    /// Passes the place with this name: the test may have huskd stand still here.
    pub fn point(name: impl std::fmt::Display) {
        let Some(directory) = PLACE.as_deref() else { return };
        let plan = directory.join("plan");
        let identity = || {
            let metadata = std::fs::metadata(&plan).ok()?;
            Some((metadata.ino(), metadata.ctime(), metadata.ctime_nsec()))
        };
        // A thread that comes while another stands still waits as well: the host stays as it is.
        let mut count = crate::lock(&COUNT);
        let Some(found) = identity() else { return };
        if count.plan != found {
            *count = Count { plan: found, passed: 0 };
        }
        count.passed += 1;
        let passed = std::fs::File::options().append(true).create(true).open(directory.join("passed"));
        let _ = passed.and_then(|mut file| writeln!(file, "{name}"));
        let wanted = std::fs::read_to_string(&plan).unwrap_or_default();
        if wanted.trim().parse() != Ok(count.passed) {
            return;
        }
        let at = directory.join("at");
        let _ = std::fs::write(&at, name.to_string());
        while identity() == Some(found) {
            std::thread::sleep(LOOK_AGAIN);
        }
        let _ = std::fs::remove_file(&at);
    }
}
