//! Entrances for `tests/fuzz`: what a registry, the author of an image, and `certs.d` say.

use std::path::Path;

use super::document::{self, Document};
use super::hosts::Hosts;
use super::layer::{Failure, Limits, Unpacker};

/// The folder that layers are unpacked into.
pub struct Layers(Unpacker);

impl Layers {
    /// `folder` exists and is empty.
    ///
    /// # Errors
    /// The error says in words why there is no unpacker.
    pub fn new(folder: &Path, limits: &Limits) -> Result<Self, String> {
        Unpacker::new(folder, limits).map(Self).map_err(words)
    }

    /// Applies the layer in a file.
    ///
    /// # Errors
    /// The error says in words why the layer is refused.
    pub fn apply(&mut self, blob: &Path, diff_id: &str) -> Result<(), String> {
        self.0.apply(blob, diff_id).map_err(words)
    }
}

fn words(failure: Failure) -> String {
    match failure {
        Failure::Refused(why) => why,
        Failure::Disk(stage, path, error) => format!("{stage} {}: {error}", path.display()),
    }
}

/// Reads a manifest or an index. What is read can be written, and is then read as the same.
///
/// # Panics
/// The document is another one after it was written.
pub fn manifest(bytes: &[u8], media_type: Option<&str>) {
    let Ok(document) = Document::read(bytes, media_type) else { return };
    let written = match &document {
        Document::Index(index) => serde_json::to_vec(index),
        Document::Manifest(manifest) => serde_json::to_vec(manifest),
    };
    let Ok(written) = written else { return };
    match (document, Document::read(&written, media_type)) {
        (Document::Index(first), Ok(Document::Index(second))) => assert_eq!(first, second),
        (Document::Manifest(first), Ok(Document::Manifest(second))) => assert_eq!(first, second),
        (first, second) => panic!("{first:?} became {second:?}"),
    }
}

/// Reads an image's configuration.
///
/// # Panics
/// The configuration is another one after it was written.
pub fn configuration(text: &str) {
    let Ok(first) = document::configuration(text) else { return };
    let Ok(written) = serde_json::to_string(&first) else { return };
    let second = document::configuration(&written);
    assert_eq!(second.ok(), Some(first));
}

/// Reads a `hosts.toml`.
///
/// # Panics
/// A host's address could lead anywhere else.
pub fn hosts(text: &str) {
    let Ok(hosts) = Hosts::parse(text, Path::new("/certs.d/host")) else { return };
    for host in hosts.mirrors.iter().chain(&hosts.server) {
        assert!(!host.address.is_empty() && !host.address.starts_with('/'), "{host:?}");
        assert!(!host.prefix.starts_with('/') && !host.prefix.contains(".."), "{host:?}");
    }
}
