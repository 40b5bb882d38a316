//! Names, sizes and times of images, as people read them.

/// Repository and tag of "host/name:tag", or repository and digest of "host/name@digest".
pub fn split(name: &str) -> (&str, &str) {
    if let Some(parts) = name.split_once('@') {
        return parts;
    }
    // A colon before the last slash is that of a port.
    match name.rsplit_once(':') {
        Some((repository, tag)) if !tag.contains('/') => (repository, tag),
        _ => (name, "<none>"),
    }
}

/// The beginning of an id, long enough to name one image.
pub fn short(id: &str) -> &str {
    let digits = id.strip_prefix("sha256:").unwrap_or(id);
    digits.get(..12).unwrap_or(digits)
}

/// A size in units of 1000, as docker shows it.
pub fn size(bytes: u64) -> String {
    const UNITS: [&str; 4] = ["kB", "MB", "GB", "TB"];
    if bytes < 1000 {
        return format!("{bytes}B");
    }
    // Exact enough for three digits.
    #[allow(clippy::cast_precision_loss)]
    let mut value = bytes as f64 / 1000.0;
    let mut unit = UNITS[0];
    for next in &UNITS[1..] {
        if value < 999.5 {
            break;
        }
        value /= 1000.0;
        unit = next;
    }
    let digits = if value < 9.995 {
        2
    } else if value < 99.95 {
        1
    } else {
        0
    };
    format!("{value:.digits$}{unit}")
}

/// The day and time of "2026-01-02T03:04:05.6Z", without what is below a second.
pub fn time(stamp: &str) -> String {
    stamp.get(..19).unwrap_or(stamp).replace('T', " ")
}

/// The text without what would move a terminal's cursor or colour it.
pub fn printable(text: &str) -> String {
    text.chars().map(|letter| if letter.is_control() { ' ' } else { letter }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_port_is_no_tag() {
        assert_eq!(split("docker.io/library/debian:12"), ("docker.io/library/debian", "12"));
        assert_eq!(split("localhost:5000/a/b:1"), ("localhost:5000/a/b", "1"));
        assert_eq!(split("localhost:5000/a"), ("localhost:5000/a", "<none>"));
        assert_eq!(split("localhost:5000/a@sha256:12"), ("localhost:5000/a", "sha256:12"));
    }

    #[test]
    fn sizes_have_three_digits() {
        let said = [0, 999, 1000, 4_567, 45_678, 456_789, 999_700, 74_800_000, 3_000_000_000].map(size);
        assert_eq!(said, ["0B", "999B", "1.00kB", "4.57kB", "45.7kB", "457kB", "1.00MB", "74.8MB", "3.00GB"]);
        assert_eq!(size(u64::MAX), "18446744TB");
    }

    #[test]
    fn ids_and_times_are_cut_where_people_read() {
        assert_eq!(short("sha256:0123456789abcdef"), "0123456789ab");
        assert_eq!(short("é"), "é");
        assert_eq!(time("2026-01-02T03:04:05.678Z"), "2026-01-02 03:04:05");
        assert_eq!(time("éééééééééééé"), "éééééééééééé");
        assert_eq!(printable("a\u{1b}[31mb\n"), "a [31mb ");
    }
}
