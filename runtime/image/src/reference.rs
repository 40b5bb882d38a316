//! The names of images, as people write them and as the store keeps them.

use oci_spec::distribution::Reference;

use super::Error;

/// A possible meaning of a name in a request.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Name {
    /// A reference: "docker.io/library/nginx:latest", or with a digest.
    Reference(String),
    /// An id or the beginning of one, without "sha256:".
    Id(String),
}

/// Parses a name for a pull.
pub(super) fn parse(name: &str) -> Result<Reference, Error> {
    name.parse::<Reference>()
        .map_err(|error| Error::Reference { name: name.to_owned(), cause: error.to_string() })
}

/// Completes a name that may be short: with its host, and with a tag or a digest. `None`
/// for a text that is not a name.
#[must_use]
pub fn full_name(name: &str) -> Option<String> {
    parse(name).ok().map(|reference| canonical(&reference))
}

/// Whether `server`, a host or a URL, is the registry of an image. For a text that is
/// not a name the answer is yes, because its pull fails anyway.
#[must_use]
pub fn is_at(name: &str, server: &str) -> bool {
    // The first is Docker Hub's name; the others are its servers.
    const HUB: [&str; 3] = ["docker.io", "index.docker.io", "registry-1.docker.io"];
    let host = server.split_once("://").map_or(server, |(_, rest)| rest);
    let host = host.split('/').next().unwrap_or_default();
    let hub = |host: &str| HUB.contains(&host);
    parse(name).map_or(true, |reference| {
        let registry = reference.registry();
        registry.eq_ignore_ascii_case(host) || (hub(registry) && hub(host))
    })
}

/// The possible meanings of a name. Ids come first, because twelve hexadecimal digits
/// are also a repository's name.
pub(super) fn candidates(name: &str) -> Vec<Name> {
    let mut candidates = Vec::new();
    let digits = name.strip_prefix("sha256:").unwrap_or(name);
    if (4..=64).contains(&digits.len())
        && digits.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
    {
        candidates.push(Name::Id(digits.to_owned()));
    }
    if let Ok(reference) = parse(name) {
        candidates.push(Name::Reference(canonical(&reference)));
    }
    candidates
}

/// Writes a reference in the store's only form: with its host, and with a tag or a
/// digest; if there are both, with the digest alone.
pub(super) fn canonical(reference: &Reference) -> String {
    match (reference.digest(), reference.tag()) {
        (Some(digest), _) => format!("{}@{digest}", repository(reference)),
        (None, tag) => format!("{}:{}", repository(reference), tag.unwrap_or("latest")),
    }
}

/// Host and repository.
pub(super) fn repository(reference: &Reference) -> String {
    format!("{}/{}", reference.registry(), reference.repository())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_server_is_the_images_registry_or_not() {
        for (name, server, want) in [
            ("registry.example:5000/app", "https://registry.example:5000/v2/", true),
            ("registry.example:5000/app", "registry.example:5000", true),
            ("registry.example:5000/app", "registry.example", false),
            ("registry.example/app", "https://registry.example.evil/", false),
            ("nginx", "https://index.docker.io/v1/", true),
            ("nginx", "registry.example", false),
            ("registry.example/app", "docker.io", false),
        ] {
            assert_eq!(is_at(name, server), want, "{name} {server}");
        }
    }

    #[test]
    fn short_names_are_docker_hubs() {
        for (name, want) in [
            ("nginx", "docker.io/library/nginx:latest"),
            ("user/app:1", "docker.io/user/app:1"),
            ("127.0.0.1:5000/husk/nginx:1", "127.0.0.1:5000/husk/nginx:1"),
            ("localhost/a", "localhost/a:latest"),
        ] {
            assert_eq!(canonical(&parse(name).unwrap()), want);
        }
        let digest = format!("sha256:{}", "a".repeat(64));
        assert_eq!(
            canonical(&parse(&format!("nginx:1@{digest}")).unwrap()),
            format!("docker.io/library/nginx@{digest}")
        );
    }

    #[test]
    fn hexadecimal_digits_may_be_an_id() {
        assert!(matches!(candidates("deadbeefcafe").first(), Some(Name::Id(_))));
        assert!(matches!(candidates("nginx").first(), Some(Name::Reference(_))));
        let id = format!("sha256:{}", "0".repeat(64));
        assert!(matches!(candidates(&id).first(), Some(Name::Id(_))));
    }

    #[test]
    fn what_is_no_name_is_refused() {
        for name in ["", "host.example/UPPER", "a b", "http://x/y", "x@sha256:zz"] {
            assert!(parse(name).is_err(), "{name:?}");
        }
    }
}
