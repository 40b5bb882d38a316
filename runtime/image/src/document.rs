//! The documents of an image: index, manifest and configuration.
//!
//! One digest must mean one thing to every reader. So a document that could be read as an
//! index and as a manifest is refused, and so is one whose media type contradicts its
//! content (CVE-2021-41190). `null` is accepted where Go's JSON, in which images are
//! written, takes it for an empty value.

use oci_spec::image::{ImageConfiguration, ImageIndex, ImageManifest};
use serde::Deserialize;
use serde::de::IgnoredAny;
use serde_json::{Map, Value, json};

/// Media types of an index.
const INDEX: [&str; 2] =
    ["application/vnd.oci.image.index.v1+json", "application/vnd.docker.distribution.manifest.list.v2+json"];
/// Media types of a manifest.
const MANIFEST: [&str; 2] =
    ["application/vnd.oci.image.manifest.v1+json", "application/vnd.docker.distribution.manifest.v2+json"];
/// Media types of a configuration. Old registries have given images the last four.
const CONFIGURATION: [&str; 6] = [
    "application/vnd.oci.image.config.v1+json",
    "application/vnd.docker.container.image.v1+json",
    "application/octet-stream",
    "application/json",
    "text/html",
    "",
];

/// A document that a name leads to in a registry.
#[derive(Debug)]
pub(super) enum Document {
    Index(Box<ImageIndex>),
    Manifest(Box<ImageManifest>),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Index,
    Manifest,
}

/// The members that determine the kind of a document.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Outline {
    schema_version: Option<u64>,
    media_type: Option<String>,
    manifests: Option<Vec<IgnoredAny>>,
    config: Option<IgnoredAny>,
    layers: Option<Vec<IgnoredAny>>,
    fs_layers: Option<Vec<IgnoredAny>>,
}

impl Document {
    /// Reads a document that an index, or the registry, calls `media_type`.
    ///
    /// # Errors
    /// The reason why it is refused.
    pub(super) fn read(bytes: &[u8], media_type: Option<&str>) -> Result<Self, String> {
        let wrong = |error: serde_json::Error| format!("the manifest does not read: {error}");
        let outline: Outline = serde_json::from_slice(bytes).map_err(wrong)?;
        match outline.kind(media_type)? {
            Kind::Index => serde_json::from_slice(bytes).map(|index| Self::Index(Box::new(index))),
            Kind::Manifest => {
                serde_json::from_slice(bytes).map(|manifest| Self::Manifest(Box::new(manifest)))
            }
        }
        .map_err(wrong)
    }
}

impl Outline {
    fn kind(&self, media_type: Option<&str>) -> Result<Kind, String> {
        let some = |list: &Option<Vec<IgnoredAny>>| list.as_ref().is_some_and(|list| !list.is_empty());
        if self.schema_version == Some(1) || some(&self.fs_layers) {
            return Err("the manifest is of schema 1, which is not supported: push the image again".into());
        }
        let is_manifest = self.config.is_some() || some(&self.layers);
        if some(&self.manifests) && is_manifest {
            return Err("the manifest has `manifests` beside `config` or `layers`, and could mean two \
                        images"
                .into());
        }
        let content = match is_manifest {
            true => Some(Kind::Manifest),
            false => self.manifests.is_some().then_some(Kind::Index),
        };
        let named = self.media_type.as_deref().filter(|text| !text.is_empty());
        let named = named.map(|text| kind(text).ok_or_else(|| foreign(text))).transpose()?;
        let claims = [media_type.and_then(kind), named, content];
        let mut claims = claims.into_iter().flatten();
        let first = claims.next().ok_or("the manifest does not read: it has no `config` and no `layers`")?;
        if claims.any(|claim| claim != first) {
            return Err(format!(
                "the manifest contradicts its media type `{}`",
                media_type.or(self.media_type.as_deref()).unwrap_or_default()
            ));
        }
        Ok(first)
    }
}

fn kind(media_type: &str) -> Option<Kind> {
    if INDEX.contains(&media_type) {
        Some(Kind::Index)
    } else {
        MANIFEST.contains(&media_type).then_some(Kind::Manifest)
    }
}

fn foreign(media_type: &str) -> String {
    let shown: String = media_type.chars().filter(|c| !c.is_control()).take(100).collect();
    format!("`{shown}` is not the media type of an image's manifest")
}

/// Checks the media type that a manifest gives for its configuration: a chart or another
/// artifact is not an image.
pub(super) fn check_configuration_type(media_type: &str) -> Result<(), String> {
    if CONFIGURATION.contains(&media_type) {
        return Ok(());
    }
    let shown: String = media_type.chars().filter(|c| !c.is_control()).take(100).collect();
    Err(format!("it is not a container image: its configuration is of type `{shown}`"))
}

/// Reads an image's configuration.
pub(super) fn configuration(text: &str) -> serde_json::Result<ImageConfiguration> {
    let mut value: Value = serde_json::from_str(text)?;
    if let Some(image) = value.as_object_mut() {
        drop_nulls(image);
        for member in ["architecture", "os"] {
            image.entry(member).or_insert_with(|| json!(""));
        }
        let rootfs = image.entry("rootfs").or_insert_with(|| json!({}));
        if let Some(rootfs) = rootfs.as_object_mut() {
            drop_nulls(rootfs);
            rootfs.entry("type").or_insert_with(|| json!("layers"));
            rootfs.entry("diff_ids").or_insert_with(|| json!([]));
        }
        if let Some(config) = image.get_mut("config").and_then(Value::as_object_mut) {
            drop_nulls(config);
            for (member, empty) in
                [("Volumes", json!({})), ("ExposedPorts", json!({})), ("Labels", json!(""))]
            {
                let values = config.get_mut(member).and_then(Value::as_object_mut);
                for value in values.into_iter().flat_map(Map::values_mut).filter(|value| value.is_null()) {
                    *value = empty.clone();
                }
            }
        }
    }
    serde_json::from_value(value)
}

/// Removes members that are `null`, which mean the same as their absence.
fn drop_nulls(object: &mut Map<String, Value>) {
    object.retain(|_, value| !value.is_null());
}

#[cfg(test)]
mod tests {
    use super::*;

    fn descriptor() -> Value {
        json!({"mediaType": MANIFEST[0], "digest": format!("sha256:{}", "a".repeat(64)), "size": 1})
    }

    fn read(document: &Value, media_type: Option<&str>) -> Result<Document, String> {
        Document::read(document.to_string().as_bytes(), media_type)
    }

    #[test]
    fn a_document_means_one_thing() {
        let manifest = json!({"schemaVersion": 2, "config": descriptor(), "layers": [descriptor()]});
        let index = json!({"schemaVersion": 2, "manifests": [descriptor()]});
        for media_type in [None, Some(MANIFEST[0]), Some(MANIFEST[1]), Some("application/json")] {
            assert!(matches!(read(&manifest, media_type), Ok(Document::Manifest(_))), "{media_type:?}");
        }
        assert!(matches!(read(&index, Some(INDEX[1])), Ok(Document::Index(_))));
        for (document, media_type, word) in [
            (&manifest, Some(INDEX[0]), "contradicts"),
            (&index, Some(MANIFEST[0]), "contradicts"),
            (&json!({"mediaType": INDEX[0], "config": descriptor(), "layers": []}), None, "contradicts"),
            (&json!({"mediaType": MANIFEST[0], "manifests": [descriptor()]}), None, "contradicts"),
            (&json!({"manifests": [descriptor()], "layers": [descriptor()]}), None, "two images"),
            (&json!({"manifests": [descriptor()], "config": descriptor()}), None, "two images"),
            (&json!({"mediaType": "text/plain", "config": descriptor()}), None, "`text/plain`"),
            (&json!({"schemaVersion": 1, "fsLayers": [1]}), None, "schema 1"),
            (&json!({}), None, "no `config`"),
        ] {
            let error = read(document, media_type).unwrap_err();
            assert!(error.contains(word), "{document}: {error}");
        }
        assert!(check_configuration_type("application/vnd.cncf.helm.config.v1+json").is_err());
    }

    #[test]
    fn null_is_empty_in_a_configuration() {
        let text = json!({
            "architecture": "amd64", "os": "linux", "created": null,
            "config": {
                "Volumes": {"/d": null}, "ExposedPorts": {"80/tcp": null}, "Labels": {"a": null},
                "Env": null, "Cmd": ["/run"],
            },
            "rootfs": {"type": "layers", "diff_ids": null},
        });
        let image = configuration(&text.to_string()).unwrap();
        let config = image.config().clone().unwrap();
        assert_eq!(config.volumes().clone().unwrap(), ["/d"]);
        assert_eq!(config.exposed_ports().clone().unwrap(), ["80/tcp"]);
        assert_eq!(config.labels().clone().unwrap().get("a").map(String::as_str), Some(""));
        assert!(configuration("{}").unwrap().rootfs().diff_ids().is_empty());
        assert!(configuration(r#"{"config": {"Volumes": {"/d": 1}}}"#).is_err());
        assert!(configuration("[]").is_err());
    }
}
