//! Ids of sandboxes and containers: 32 random bytes in hexadecimal, as clients
//! of other CRI runtimes know them.

use std::fmt::{self, Write};

use serde::{Deserialize, Serialize};

fn random() -> String {
    let mut bytes = [0u8; 32];
    // Only a kernel without getrandom(2) fails, and no other kernel runs guests.
    while crate::random::fill(&mut bytes).is_err() {}
    hex(&bytes)
}

/// Writes bytes in hexadecimal.
#[must_use]
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::with_capacity(2 * bytes.len()), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

macro_rules! id {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $name(String);

        impl $name {
            /// Makes a new id, which was never used before.
            #[must_use]
            pub fn random() -> Self {
                Self(random())
            }

            /// Whether a text has the form of an id.
            #[must_use]
            pub fn is_one(text: &str) -> bool {
                text.len() == 64 && text.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
            }

            /// The id as text.
            #[must_use]
            pub fn as_str(&self) -> &str {
                &self.0
            }

            /// The first 13 characters, which are enough for a person and a log.
            #[must_use]
            pub fn short(&self) -> &str {
                self.0.get(..13).unwrap_or(&self.0)
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl From<&str> for $name {
            fn from(text: &str) -> Self {
                Self(text.to_owned())
            }
        }
    };
}

id!(
    /// Id of a pod sandbox.
    SandboxId
);
id!(
    /// Id of a container.
    ContainerId
);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_64_hexadecimal_digits_and_differ() {
        let (one, other) = (SandboxId::random(), SandboxId::random());
        assert_ne!(one, other);
        assert_eq!(one.as_str().len(), 64);
        assert!(SandboxId::is_one(one.as_str()));
        assert!(!SandboxId::is_one("lost+found") && !SandboxId::is_one(&format!("{one}~")));
        assert!(one.as_str().starts_with(one.short()));
    }
}
