//! Rate limits of a pod's devices: those of its handler, and lower ones of its own.

use husk_vmm_api::RateLimit;

use crate::Limits;

impl Limits {
    /// The devices, by the names that the configuration has.
    pub const DEVICES: [&str; 7] =
        ["network_in", "network_out", "disk", "flush", "volumes", "vsock", "console"];

    fn of_mut(&mut self, device: &str) -> Option<&mut Option<RateLimit>> {
        Some(match device {
            "network_in" => &mut self.network_in,
            "network_out" => &mut self.network_out,
            "disk" => &mut self.disk,
            "flush" => &mut self.flush,
            "volumes" => &mut self.volumes,
            "vsock" => &mut self.vsock,
            "console" => &mut self.console,
            _ => return None,
        })
    }

    /// Lowers the limit of a device to `text`: rates and bursts as the configuration has
    /// them, with commas between (`bytes_per_second = 1000000, bytes_burst = 4000000`). What
    /// is lower already stays.
    ///
    /// # Errors
    /// The error names the word that is wrong.
    pub fn lower(&mut self, device: &str, text: &str) -> Result<(), String> {
        let names = Self::DEVICES.join(", ");
        let limit = self.of_mut(device).ok_or_else(|| format!("`{device}` is not one of {names}"))?;
        let wanted = parse(text)?;
        *limit = Some(limit.map_or(wanted, |limit| lowest(&limit, &wanted)));
        self.check()
    }

    /// Checks that devices have only limits that mean something to them.
    pub(crate) fn check(&self) -> Result<(), String> {
        let bytes = |limit: &RateLimit| limit.bytes_per_second > 0 || limit.bytes_burst > 0;
        let operations = |limit: &RateLimit| limit.operations_per_second > 0 || limit.operations_burst > 0;
        if self.flush.as_ref().is_some_and(bytes) {
            return Err("flush: bytes_per_second and bytes_burst have no meaning for it".into());
        }
        if self.console.as_ref().is_some_and(operations) {
            return Err("console: operations_per_second and operations_burst have no meaning for it".into());
        }
        Ok(())
    }
}

fn parse(text: &str) -> Result<RateLimit, String> {
    let mut limit = RateLimit::default();
    for part in text.split(',') {
        let Some((key, value)) = part.split_once('=') else {
            return Err(format!("`{}` is no `key = number`", part.trim()));
        };
        let place = match key.trim() {
            "bytes_per_second" => &mut limit.bytes_per_second,
            "bytes_burst" => &mut limit.bytes_burst,
            "operations_per_second" => &mut limit.operations_per_second,
            "operations_burst" => &mut limit.operations_burst,
            key => return Err(format!("`{key}` is no key of a limit")),
        };
        let value = value.trim();
        *place = value.parse().map_err(|_| format!("`{value}` is no number"))?;
    }
    Ok(limit)
}

/// The limit that lets through no more than either.
fn lowest(one: &RateLimit, other: &RateLimit) -> RateLimit {
    let bytes = |limit: &RateLimit| (limit.bytes_per_second, limit.bytes_burst);
    let operations = |limit: &RateLimit| (limit.operations_per_second, limit.operations_burst);
    RateLimit::new(lower(bytes(one), bytes(other)), lower(operations(one), operations(other)))
}

/// The lower of two rates and the lower of two bursts. A rate of 0 is no limit.
fn lower(one: (u64, u64), other: (u64, u64)) -> (u64, u64) {
    let burst = |(rate, burst): (u64, u64)| if burst == 0 { rate } else { burst };
    match (one.0, other.0) {
        (_, 0) => one,
        (0, _) => other,
        _ => (one.0.min(other.0), burst(one).min(burst(other))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_limit_is_lowered_and_never_raised() {
        let mut limits = Limits { disk: Some(RateLimit::new((1000, 0), (0, 0))), ..Limits::default() };
        limits.lower("disk", "bytes_per_second = 2000, bytes_burst=10, operations_per_second=5").unwrap();
        assert_eq!(limits.disk, Some(RateLimit::new((1000, 10), (5, 0))));
        limits.lower("disk", "bytes_per_second=500,bytes_burst=9000").unwrap();
        assert_eq!(limits.disk, Some(RateLimit::new((500, 10), (5, 0))));
        // No limit is no lower one.
        limits.lower("disk", "bytes_per_second = 0, operations_per_second = 0").unwrap();
        assert_eq!(limits.disk, Some(RateLimit::new((500, 10), (5, 0))));
        for device in Limits::DEVICES {
            let text = if device == "console" { "bytes_per_second=7" } else { "operations_per_second=7" };
            let mut limits = Limits::default();
            limits.lower(device, text).unwrap();
            assert_ne!(limits, Limits::default(), "{device}");
        }
    }

    #[test]
    fn what_is_no_limit_is_refused_by_its_word() {
        for (device, text, word) in [
            ("disc", "bytes_per_second=1", "disc"),
            ("disk", "", "no `key = number`"),
            ("disk", "1000", "1000"),
            ("disk", "bytes=1", "bytes"),
            ("disk", "bytes_per_second=fast", "fast"),
            ("disk", "bytes_per_second=-1", "-1"),
            ("flush", "bytes_per_second=1", "flush"),
            ("console", "operations_per_second=1", "console"),
        ] {
            let error = Limits::default().lower(device, text).unwrap_err();
            assert!(error.contains(word), "{error}");
        }
    }
}
