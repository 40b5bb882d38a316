//! Times for people: ages, and points in time that people write.

use std::time::{Duration, SystemTime};

use anyhow::{Context, bail};
use chrono::{DateTime, NaiveDateTime, SecondsFormat, Utc};

/// The time since `nanos`, nanoseconds since 1970, in its largest unit.
pub fn age(nanos: i64) -> String {
    let then = SystemTime::UNIX_EPOCH + Duration::from_nanos(u64::try_from(nanos).unwrap_or_default());
    let seconds = then.elapsed().unwrap_or_default().as_secs();
    match seconds {
        0..60 => format!("{seconds}s"),
        60..3600 => format!("{}m", seconds / 60),
        3600..86400 => format!("{}h", seconds / 3600),
        _ => format!("{}d", seconds / 86400),
    }
}

/// A point in time, nanoseconds since 1970, as RFC 3339 writes it; nothing for 0.
pub fn rfc3339(nanos: i64) -> String {
    if nanos <= 0 {
        return String::new();
    }
    DateTime::from_timestamp_nanos(nanos).to_rfc3339_opts(SecondsFormat::AutoSi, true)
}

/// A point in time as people write it, in nanoseconds since 1970: a duration before now (`10m`,
/// `1h30m`), seconds since 1970, or a date as in RFC 3339, whose time and zone may be absent.
///
/// # Errors
/// Text that is none of these.
pub fn point(text: &str) -> anyhow::Result<i64> {
    if let Ok(duration) = duration(text) {
        let before = Utc::now().timestamp_nanos_opt().unwrap_or(i64::MAX);
        return Ok(before.saturating_sub(i64::try_from(duration.as_nanos()).unwrap_or(i64::MAX)));
    }
    if let Ok(seconds) = text.parse::<f64>() {
        return Ok((seconds * 1e9) as i64);
    }
    let nanos = |time: DateTime<Utc>| time.timestamp_nanos_opt().context("a time that is too far away");
    if let Ok(time) = DateTime::parse_from_rfc3339(text) {
        return nanos(time.to_utc());
    }
    let zoneless = [text.to_owned(), format!("{text}T00:00:00")];
    for text in zoneless {
        if let Ok(time) = NaiveDateTime::parse_from_str(&text, "%Y-%m-%dT%H:%M:%S%.f") {
            return nanos(time.and_utc());
        }
    }
    bail!("`{text}` is no time: write 10m, 2026-01-31, 2026-01-31T12:00:00Z, or seconds since 1970")
}

/// A duration as Go writes it: `90s`, `1h30m`, `250ms`.
///
/// # Errors
/// Text that is none.
pub fn duration(text: &str) -> anyhow::Result<Duration> {
    let refused = || anyhow::anyhow!("`{text}` is no duration: write 90s, 10m or 1h30m");
    let (mut total, mut rest) = (Duration::ZERO, text);
    if rest.is_empty() {
        return Err(refused());
    }
    while !rest.is_empty() {
        let end = rest.find(|letter: char| !letter.is_ascii_digit() && letter != '.').ok_or_else(refused)?;
        let (number, unit) = rest.split_at(end);
        let end = unit.find(|letter: char| letter.is_ascii_digit() || letter == '.').unwrap_or(unit.len());
        let (unit, after) = unit.split_at(end);
        let seconds = match unit {
            "ms" => 0.001,
            "s" => 1.0,
            "m" => 60.0,
            "h" => 3600.0,
            "d" => 86400.0,
            _ => return Err(refused()),
        };
        let number: f64 = number.parse().map_err(|_| refused())?;
        let part = Duration::try_from_secs_f64(number * seconds).map_err(|_| refused())?;
        total = total.checked_add(part).ok_or_else(refused)?;
        rest = after;
    }
    Ok(total)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ages_are_in_their_largest_unit() {
        let ago = |seconds| {
            let then = SystemTime::now() - Duration::from_secs(seconds);
            let nanos = then.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_nanos();
            age(i64::try_from(nanos).unwrap_or_default())
        };
        assert_eq!([ago(30), ago(90), ago(7200), ago(200_000)], ["30s", "1m", "2h", "2d"]);
    }

    #[test]
    fn durations_are_written_as_in_go() {
        for (text, millis) in [("90s", 90_000), ("1h30m", 5_400_000), ("250ms", 250), ("1.5s", 1500)] {
            assert_eq!(duration(text).unwrap().as_millis(), millis, "{text}");
        }
        for text in ["", "5", "s", "1x", "-1s", "1m1", "99999999999999999999h"] {
            assert!(duration(text).is_err(), "{text}");
        }
    }

    #[test]
    fn a_point_in_time_is_written_in_many_ways() {
        let second = 1_000_000_000;
        assert_eq!(point("1970-01-02").unwrap(), 86_400 * second);
        assert_eq!(point("1970-01-01T00:00:05Z").unwrap(), 5 * second);
        assert_eq!(point("1970-01-01T01:00:05.5+01:00").unwrap(), 5 * second + second / 2);
        assert_eq!(point("7").unwrap(), 7 * second);
        let now = Utc::now().timestamp_nanos_opt().unwrap();
        assert!((now - 60 * second - point("1m").unwrap()).abs() < second);
        assert!(point("yesterday").is_err());
        assert_eq!(rfc3339(5 * second), "1970-01-01T00:00:05Z");
    }
}
