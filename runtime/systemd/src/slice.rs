//! Names of slices, and the control groups that they stand for (systemd.slice(5)).

use std::path::PathBuf;

/// The end of every slice's name.
pub const SUFFIX: &str = ".slice";

/// The slice that all others are in.
pub const ROOT: &str = "-.slice";

/// The slice of services, where units go that name none.
pub const DEFAULT: &str = "system.slice";

/// The control group of a slice, below the root of all: `a-b.slice` is in `a.slice`.
/// `None` for what is no name of a slice.
#[must_use]
pub fn expand(slice: &str) -> Option<PathBuf> {
    if slice == ROOT {
        return Some(PathBuf::new());
    }
    let name = slice.strip_suffix(SUFFIX)?;
    // A unit has no other letters in its name (systemd.unit(5)), but for templates.
    let is_known = |letter: char| letter.is_ascii_alphanumeric() || ":_.\\-".contains(letter);
    if slice.len() > 255 || !name.chars().all(is_known) || name.split('-').any(str::is_empty) {
        return None;
    }
    let ends = name.match_indices('-').map(|(end, _)| end).chain([name.len()]);
    Some(ends.filter_map(|end| Some(format!("{}{SUFFIX}", name.get(..end)?))).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_dash_is_a_level() {
        for (slice, path) in [
            ("-.slice", ""),
            ("system.slice", "system.slice"),
            ("a-b.slice", "a.slice/a-b.slice"),
            (
                "kubepods-burstable-pod1_2.slice",
                "kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod1_2.slice",
            ),
        ] {
            assert_eq!(expand(slice), Some(path.into()), "{slice}");
        }
    }

    #[test]
    fn what_is_no_slice_is_refused() {
        for slice in [
            "",
            ".slice",
            "a",
            "a.scope",
            "-a.slice",
            "a-.slice",
            "a--b.slice",
            "a/b.slice",
            "/a.slice",
            "a b.slice",
            "é.slice",
        ] {
            assert_eq!(expand(slice), None, "{slice}");
        }
        assert_eq!(expand(&format!("{}.slice", "a".repeat(250))), None);
    }
}
