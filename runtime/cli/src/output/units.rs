//! Amounts of memory and of processors, as people write and read them.

use anyhow::bail;

/// Bytes as docker takes them: `512m`, `1.5g`, `1024`; all units are powers of 1024.
///
/// # Errors
/// Text that is none, and negative amounts.
pub fn bytes(text: &str) -> anyhow::Result<i64> {
    let lower = text.to_ascii_lowercase();
    let bare = lower.strip_suffix("ib").or_else(|| lower.strip_suffix('b')).unwrap_or(&lower);
    let (number, power) = match bare.char_indices().next_back() {
        Some((at, unit)) if "kmgt".contains(unit) => {
            (&bare[..at], "kmgt".find(unit).map_or(0, |place| place + 1))
        }
        _ => (bare, 0),
    };
    let factor = (0..power).fold(1.0, |factor, _| factor * 1024.0);
    match number.parse::<f64>() {
        Ok(number) if number >= 0.0 && number * factor < 9e18 => Ok((number * factor) as i64),
        _ => bail!("`{text}` is no amount of bytes: write 512m, 1.5g or 1048576"),
    }
}

/// Bytes in the unit in which they are a short number.
pub fn in_units(bytes: u64) -> String {
    let mut amount = bytes as f64;
    for unit in ["B", "KiB", "MiB", "GiB"] {
        if amount < 1024.0 {
            return if unit == "B" { format!("{bytes}B") } else { format!("{amount:.1}{unit}") };
        }
        amount /= 1024.0;
    }
    format!("{amount:.1}TiB")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_are_written_as_for_docker() {
        for (text, want) in [("512m", 512 << 20), ("1.5g", 3 << 29), ("7", 7), ("1KiB", 1024), ("2kb", 2048)]
        {
            assert_eq!(bytes(text).unwrap(), want, "{text}");
        }
        for text in ["", "m", "-1", "1x", "é", "9999999t", "nan"] {
            assert!(bytes(text).is_err(), "{text}");
        }
    }

    #[test]
    fn bytes_are_read_in_short() {
        assert_eq!([in_units(12), in_units(1536), in_units(5 << 40)], ["12B", "1.5KiB", "5.0TiB"]);
    }
}
