//! Chain ids: the names of stacks of layers, by which their files are stored.

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use husk_base::id::hex;

/// Most characters that an error quotes of a text that is not a digest.
const MAX_SHOWN: usize = 80;

/// The name of a stack of layers (OCI image-spec, `config.md`). An image chooses the input,
/// and a file is named by the result, so a chain id is always a digest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub(super) struct ChainId(String);

impl ChainId {
    /// Makes the name of the stack of layers with these digests, the lowest
    /// first.
    ///
    /// # Errors
    /// Names the first text that is no digest.
    pub(super) fn of(diff_ids: &[String]) -> Result<Self, String> {
        for diff_id in diff_ids {
            check(diff_id).map_err(|cause| format!("the image's configuration: diff id {cause}"))?;
        }
        let digest = |text: &str| format!("sha256:{}", hex(&Sha256::digest(text)));
        let mut ids = diff_ids.iter();
        let first = ids.next().cloned().unwrap_or_else(|| digest(""));
        Ok(Self(ids.fold(first, |chain, diff_id| digest(&format!("{chain} {diff_id}")))))
    }

    /// The digits, without "sha256:".
    pub(super) fn digits(&self) -> &str {
        self.0.strip_prefix("sha256:").unwrap_or(&self.0)
    }
}

impl TryFrom<String> for ChainId {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        check(&text).map_err(|cause| format!("chain id {cause}"))?;
        Ok(Self(text))
    }
}

impl From<ChainId> for String {
    fn from(id: ChainId) -> Self {
        id.0
    }
}

/// Checks that a text is a SHA-256 digest in its only spelling.
fn check(text: &str) -> Result<(), String> {
    let is_digit = |byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f');
    match text.strip_prefix("sha256:") {
        Some(digits) if digits.len() == 64 && digits.bytes().all(is_digit) => Ok(()),
        _ => {
            let shown: String = text.chars().take(MAX_SHOWN).collect();
            Err(format!("{shown:?} is not `sha256:` and 64 lowercase hexadecimal digits"))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn digest(digit: char) -> String {
        format!("sha256:{}", String::from(digit).repeat(64))
    }

    #[test]
    fn a_chain_is_named_by_the_digests_of_its_layers() {
        let empty = ChainId::of(&[]).unwrap();
        assert_eq!(empty.digits(), "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855");
        assert_eq!(ChainId::of(&[digest('a')]).unwrap().digits(), "a".repeat(64));
        let two = ChainId::of(&[digest('a'), digest('b')]).unwrap();
        assert_eq!(two.digits(), hex(&Sha256::digest(format!("{} {}", digest('a'), digest('b')))));
    }

    #[test]
    fn what_is_no_digest_names_no_file() {
        let long = format!("{}0", digest('a'));
        for text in ["", "/etc/passwd", "sha256:/etc/passwd", "../../x", "./x", &"a".repeat(64), &long] {
            assert!(ChainId::try_from(text.to_owned()).is_err(), "{text}");
        }
        for text in [digest('A'), digest('g'), digest('a').replace("sha256", "sha512")] {
            let error = ChainId::of(&[digest('a'), text.clone()]).unwrap_err();
            assert!(error.contains("the image's configuration") && error.contains(&text), "{error}");
        }
        let error = ChainId::of(&["x\n".repeat(1 << 20)]).unwrap_err();
        assert!(error.len() < 1000 && !error.contains('\n'), "{error}");
    }
}
