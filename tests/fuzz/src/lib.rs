//! Fuzz targets for everything that reads hostile bytes. A target is a module with a function `run`, which is
//! given bytes, and a function `seeds`, which makes inputs to begin with.

#[cfg(feature = "fs")]
pub mod apart;
#[cfg(feature = "vmm")]
pub mod control;
#[cfg(feature = "vmm")]
pub mod devices;
#[cfg(feature = "fs")]
pub mod fuse;
#[cfg(feature = "vmm")]
pub mod guest;
pub mod input;
#[cfg(feature = "vmm")]
pub mod snapshot;
#[cfg(feature = "streaming")]
pub mod streaming;

#[doc(hidden)]
pub use libfuzzer_sys::fuzz_target;

/// The variable that names the folder for a target's seeds. A target that finds it writes them there and ends.
pub const SEEDS: &str = "HUSK_FUZZ_SEEDS";

/// Makes libFuzzer's program of a target's module.
#[macro_export]
macro_rules! target {
    ($target:path) => {
        use $target as target;
        $crate::fuzz_target!(init: $crate::write_seeds(target::seeds), |data: &[u8]| target::run(data));
    };
}

/// Writes the seeds and ends the process, if that is wanted.
#[allow(clippy::unwrap_used)]
pub fn write_seeds(seeds: fn() -> Vec<Vec<u8>>) {
    let Some(folder) = std::env::var_os(SEEDS) else { return };
    for (number, seed) in seeds().iter().enumerate() {
        std::fs::write(std::path::Path::new(&folder).join(format!("seed-{number:02}")), seed).unwrap();
    }
    std::process::exit(0);
}
