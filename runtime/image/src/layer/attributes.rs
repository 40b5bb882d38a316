//! The attributes of an entry: owner, mode, time, and extended attributes.

use std::io;

use super::super::tree::Attributes;
use super::archive::Entry;
use super::{Failure, damaged};

/// The prefix of the PAX records that carry extended attributes.
const XATTR: &[u8] = b"SCHILY.xattr.";
/// Most attributes of one entry, and most bytes of a value (Linux allows no more).
const MAX_XATTRS: usize = 256;
const MAX_XATTR_VALUE: usize = 64 * 1024;

/// Reads the attributes in the header and in the PAX records before it.
pub(super) fn read(entry: &Entry) -> Result<Attributes, Failure> {
    let header = &entry.header;
    let raw = header.as_old();
    let mut attributes = Attributes {
        uid: id(number(header.uid(), &raw.uid)?)?,
        gid: id(number(header.gid(), &raw.gid)?)?,
        mode: number(header.mode(), &raw.mode)?,
        mtime: (i64::try_from(number(header.mtime(), &raw.mtime)?).unwrap_or(0), 0),
        xattrs: Vec::new(),
    };
    for (key, value) in &entry.records {
        let text = std::str::from_utf8(value).ok();
        match key.as_slice() {
            // An empty value revokes a record (POSIX, `pax`).
            b"uid" if !value.is_empty() => attributes.uid = id(whole(text)?)?,
            b"gid" if !value.is_empty() => attributes.gid = id(whole(text)?)?,
            b"mtime" => attributes.mtime = text.and_then(time).unwrap_or(attributes.mtime),
            key => {
                if let Some(name) = key.strip_prefix(XATTR) {
                    xattr(name, value, &mut attributes.xattrs)?;
                }
            }
        }
    }
    Ok(attributes)
}

fn id(id: u64) -> Result<u32, Failure> {
    // For chown(2) the largest number means "leave as it is".
    match u32::try_from(id) {
        Ok(id) if id != u32::MAX => Ok(id),
        _ => Err(Failure::Refused(format!("owner {id} is not a user id"))),
    }
}

fn whole(text: Option<&str>) -> Result<u64, Failure> {
    text.and_then(|text| text.parse().ok())
        .ok_or_else(|| Failure::Refused("a PAX record's owner is not a number".into()))
}

/// Seconds and nanoseconds of a PAX time: "1600000000.25".
fn time(text: &str) -> Option<(i64, i64)> {
    let (seconds, fraction) = text.split_once('.').unwrap_or((text, ""));
    let seconds: i64 = seconds.parse().ok()?;
    if seconds < 0 || !fraction.bytes().all(|byte| byte.is_ascii_digit()) {
        return Some((seconds, 0));
    }
    let digits: String = fraction.chars().chain("000000000".chars()).take(9).collect();
    Some((seconds, digits.parse().ok()?))
}

/// Parses a number of a header. An empty field is zero, as for every tar.
fn number<T: Default>(parsed: io::Result<T>, field: &[u8]) -> Result<T, Failure> {
    match parsed {
        Err(_) if field.iter().all(|byte| matches!(byte, 0 | b' ')) => Ok(T::default()),
        parsed => parsed.map_err(damaged),
    }
}

/// Takes the attributes that have a meaning in a container. Those of overlayfs would
/// change the view of the guest's overlay, so no layer may bring them.
fn xattr(name: &[u8], value: &[u8], xattrs: &mut Vec<(String, Vec<u8>)>) -> Result<(), Failure> {
    let refused = |what: &str| {
        let name = String::from_utf8_lossy(name.get(..255).unwrap_or(name));
        Failure::Refused(format!("extended attribute `{name}` {what}"))
    };
    let text = std::str::from_utf8(name).map_err(|_| refused("has a name that is not UTF-8"))?;
    if text.is_empty() || text.len() > 255 || text.contains('\0') {
        return Err(refused("has a name that Linux does not allow"));
    }
    if value.len() > MAX_XATTR_VALUE || xattrs.len() >= MAX_XATTRS {
        return Err(refused("is too large, or one too many"));
    }
    if text.starts_with("user.") || text == "security.capability" || text.starts_with("system.posix_acl_") {
        xattrs.push((text.to_owned(), value.to_vec()));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_overlays_own_attributes_are_not_taken() {
        let mut taken = Vec::new();
        for name in ["user.mine", "trusted.overlay.opaque", "security.capability", "security.selinux"] {
            xattr(name.as_bytes(), b"v", &mut taken).unwrap();
        }
        let names: Vec<_> = taken.into_iter().map(|(name, _)| name).collect();
        assert_eq!(names, ["user.mine", "security.capability"]);
    }

    #[test]
    fn attributes_that_linux_would_not_have_are_refused() {
        for name in [&b"user.\xff"[..], b"", b"user.a\0b", &[b'u'; 256]] {
            assert!(xattr(name, b"", &mut Vec::new()).is_err(), "{name:?}");
        }
        assert!(xattr(b"user.big", &vec![0; MAX_XATTR_VALUE + 1], &mut Vec::new()).is_err());
        let mut full = vec![(String::new(), Vec::new()); MAX_XATTRS];
        assert!(xattr(b"user.more", b"", &mut full).is_err());
    }

    #[test]
    fn times_have_fractions() {
        for (text, want) in [
            ("1600000000", Some((1_600_000_000, 0))),
            ("1600000000.25", Some((1_600_000_000, 250_000_000))),
            ("1.1234567899", Some((1, 123_456_789))),
            ("-5.5", Some((-5, 0))),
            ("soon", None),
        ] {
            assert_eq!(time(text), want, "{text}");
        }
    }

    #[test]
    fn nobody_is_the_user_that_chown_takes_for_none() {
        assert!(id(0).is_ok());
        assert!(id(u64::from(u32::MAX)).is_err());
        assert!(id(1 << 40).is_err());
    }
}
