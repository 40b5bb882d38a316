//! Amounts of memory, as people read them.

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
    fn bytes_are_read_in_short() {
        assert_eq!([in_units(12), in_units(1536), in_units(5 << 40)], ["12B", "1.5KiB", "5.0TiB"]);
    }
}
