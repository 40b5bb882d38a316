//! Names of containers.

use anyhow::{Context, bail};

const FIRST: [&str; 32] = [
    "amber", "bold", "brave", "brisk", "calm", "clear", "clever", "cosy", "crisp", "early", "fair", "fleet",
    "fresh", "gentle", "golden", "happy", "keen", "kind", "light", "lively", "lucky", "merry", "mild",
    "neat", "noble", "quick", "quiet", "rapid", "sharp", "steady", "sunny", "warm",
];

const SECOND: [&str; 32] = [
    "acorn", "almond", "barley", "beech", "birch", "cedar", "chestnut", "clover", "fern", "fig", "hazel",
    "holly", "ivy", "juniper", "larch", "linden", "maize", "maple", "millet", "oak", "oat", "olive", "pecan",
    "pine", "quinoa", "rice", "rye", "sorrel", "spelt", "walnut", "wheat", "willow",
];

/// Checks a name that a person gave: it becomes part of file names.
pub fn check(name: &str) -> anyhow::Result<&str> {
    let begins_well = name.starts_with(|letter: char| letter.is_ascii_alphanumeric());
    let is_known = |letter: char| letter.is_ascii_alphanumeric() || "_.-".contains(letter);
    if !begins_well || !name.chars().all(is_known) || name.len() > 128 {
        bail!(
            "--name {name}: a name has letters, digits, `_`, `.` and `-`, begins with a letter or digit, and has at \
             most 128 of them"
        );
    }
    Ok(name)
}

/// A name for a container that was given none.
pub fn made_up() -> anyhow::Result<String> {
    let mut random = [0; 4];
    husk_base::random::fill(&mut random).context("get random bytes")?;
    let random = u32::from_ne_bytes(random);
    let pick = |words: &[&'static str; 32], shift: u32| {
        usize::try_from((random >> shift) % 32)
            .ok()
            .and_then(|place| words.get(place).copied())
            .unwrap_or("husk")
    };
    Ok(format!("{}-{}-{:04x}", pick(&FIRST, 16), pick(&SECOND, 24), random & 0xffff))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_such_that_files_can_have_them() {
        for name in ["a", "web-1", "A.b_c"] {
            assert_eq!(check(name).unwrap(), name);
        }
        for name in ["", "-a", "a/b", ".", "a b", "é", &"a".repeat(129)] {
            assert!(check(name).is_err(), "{name}");
        }
        assert!(check(&made_up().unwrap()).is_ok());
        assert_ne!(made_up().unwrap(), made_up().unwrap());
    }
}
