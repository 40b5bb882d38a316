//! Pulls from a registry that does as it is told, lies included.

#![allow(clippy::unwrap_used, clippy::indexing_slicing)]

use std::net::SocketAddr;

use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

use super::*;
use crate::image::ImageConfig;

const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
const INDEX: &str = "application/vnd.oci.image.index.v1+json";
const LAYER: &str = "application/vnd.oci.image.layer.v1.tar+gzip";

/// How the registry behaves.
#[derive(Clone, Default)]
struct Behaviour {
    /// Answers by path.
    answers: HashMap<String, (String, Vec<u8>)>,
    /// Requests without this header line are answered with 401.
    authorization: Option<String>,
    /// Paths that contain this get a header and no body, for ever.
    hang: Option<String>,
    /// This many requests fail with 503 first.
    failures: Arc<AtomicU64>,
}

fn digest(bytes: &[u8]) -> String {
    format!("sha256:{}", hex(&Sha256::digest(bytes)))
}

fn layer(name: &str, text: &str) -> (Vec<u8>, String) {
    use std::io::Write;
    let mut tar = tar::Builder::new(Vec::new());
    let mut header = tar::Header::new_gnu();
    header.set_size(text.len() as u64);
    header.set_mode(0o644);
    tar.append_data(&mut header, name, text.as_bytes()).unwrap();
    let tar = tar.into_inner().unwrap();
    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    gzip.write_all(&tar).unwrap();
    (gzip.finish().unwrap(), digest(&tar))
}

impl Behaviour {
    fn put(&mut self, path: &str, kind: &str, body: &[u8]) {
        self.answers.insert(path.to_owned(), (kind.to_owned(), body.to_vec()));
    }

    fn blob(&mut self, body: &[u8]) -> String {
        let digest = digest(body);
        self.put(&format!("/v2/app/blobs/{digest}"), "application/octet-stream", body);
        digest
    }

    /// An honest registry with `app:1` for two platforms.
    fn honest() -> Self {
        let mut registry = Self::default();
        let (blob, diff_id) = layer("etc/motd", "hello");
        let config = json!({
            "architecture": "amd64", "os": "linux", "config": {"Cmd": ["/hello"]},
            "rootfs": {"type": "layers", "diff_ids": [diff_id]},
        })
        .to_string();
        let config_digest = registry.blob(config.as_bytes());
        let layer_digest = registry.blob(&blob);
        let manifest = json!({
            "schemaVersion": 2, "mediaType": MANIFEST,
            "config": {"mediaType": "application/vnd.oci.image.config.v1+json", "digest": config_digest, "size": config.len()},
            "layers": [{"mediaType": LAYER, "digest": layer_digest, "size": blob.len()}],
        })
        .to_string();
        let entry = |architecture: &str, digest: String| {
            json!({"mediaType": MANIFEST, "digest": digest, "size": manifest.len(),
                   "platform": {"os": "linux", "architecture": architecture}})
        };
        let ours = digest(manifest.as_bytes());
        let index = json!({
            "schemaVersion": 2, "mediaType": INDEX,
            "manifests": [entry("arm64", digest(b"other")), entry("amd64", ours.clone())],
        })
        .to_string();
        registry.put(&format!("/v2/app/manifests/{ours}"), MANIFEST, manifest.as_bytes());
        registry.put("/v2/app/manifests/1", INDEX, index.as_bytes());
        registry.put("/v2/app/manifests/plain", MANIFEST, manifest.as_bytes());
        registry.put("/v2/", "text/plain", b"");
        registry
    }

    fn layer_path(&self) -> String {
        let (blob, _) = layer("etc/motd", "hello");
        format!("/v2/app/blobs/{}", digest(&blob))
    }

    async fn serve(self) -> SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                tokio::spawn(self.clone().answer(stream));
            }
        });
        address
    }

    async fn answer(self, mut stream: TcpStream) -> std::io::Result<()> {
        loop {
            let mut head = Vec::new();
            while !head.ends_with(b"\r\n\r\n") {
                head.push(stream.read_u8().await?);
            }
            let head = String::from_utf8(head).unwrap();
            let path = head.split(' ').nth(1).unwrap();
            let allowed = self
                .authorization
                .as_ref()
                .is_none_or(|line| head.to_lowercase().contains(&line.to_lowercase()));
            let fails = self
                .failures
                .fetch_update(Ordering::SeqCst, Ordering::SeqCst, |left| left.checked_sub(1))
                .is_ok();
            let (status, kind, body) = match self.answers.get(path) {
                _ if !allowed => {
                    ("401 Unauthorized\r\nwww-authenticate: Basic realm=\"r\"", "text/plain", &[][..])
                }
                _ if fails => ("503 Service Unavailable", "text/plain", &[][..]),
                Some((kind, body)) => ("200 OK", kind.as_str(), body.as_slice()),
                None => (
                    "404 Not Found",
                    "application/json",
                    &br#"{"errors":[{"code":"MANIFEST_UNKNOWN","message":"unknown"}]}"#[..],
                ),
            };
            let length = body.len();
            stream
                .write_all(
                    format!("HTTP/1.1 {status}\r\ncontent-type: {kind}\r\ncontent-length: {length}\r\n\r\n")
                        .as_bytes(),
                )
                .await?;
            if self.hang.as_ref().is_some_and(|part| path.contains(part)) {
                std::future::pending::<()>().await;
            }
            stream.write_all(body).await?;
        }
    }
}

struct Node {
    root: tempfile::TempDir,
    store: ImageStore,
    registry: SocketAddr,
}

impl Node {
    async fn with(behaviour: Behaviour) -> Self {
        let _ = rustls::crypto::ring::default_provider().install_default();
        let root = tempfile::tempdir().unwrap();
        let config = ImageConfig {
            stall_timeout: Duration::from_millis(500),
            pull_timeout: Duration::from_secs(20),
            ..ImageConfig::default()
        };
        let store = ImageStore::open(root.path(), config).unwrap();
        Self { root, store, registry: behaviour.serve().await }
    }

    async fn pull(&self, name: &str) -> Result<String, Error> {
        self.pull_with(name, RegistryAuth::Anonymous).await
    }

    async fn pull_with(&self, name: &str, auth: RegistryAuth) -> Result<String, Error> {
        self.store.pull(&format!("{}/{name}", self.registry), auth).await
    }

    /// A failed pull is in no list, and has no files.
    async fn assert_nothing_left(&self) {
        assert!(self.store.list().unwrap().is_empty());
        for folder in ["images/pulls", "images/rootfs"] {
            let left: Vec<_> =
                std::fs::read_dir(self.root.path().join(folder)).into_iter().flatten().collect();
            assert!(left.is_empty(), "{folder}: {left:?}");
        }
    }
}

#[tokio::test]
async fn an_image_is_pulled_and_known_by_all_its_names() {
    let node = Node::with(Behaviour::honest()).await;
    let id = node.pull("app:1").await.unwrap();
    let image = node.store.resolve(&format!("{}/app:1", node.registry)).unwrap().unwrap();
    assert_eq!(*image.id, id);
    assert!(image.repo_digests[0].contains("/app@sha256:"));
    let magic = std::fs::read(&image.rootfs).unwrap()[1024..1028].to_vec();
    assert_eq!(magic, 0xE0F5_E1E2u32.to_le_bytes(), "an EROFS superblock");
    assert_eq!(node.pull("app:plain").await.unwrap(), id, "the same image without an index");
    let image = node.store.resolve(&id).unwrap().unwrap();
    assert_eq!((image.repo_tags.len(), image.repo_digests.len()), (2, 2));
    assert_eq!(node.store.fs_info().inodes, 1);
}

#[tokio::test]
async fn pulls_of_one_image_at_once_all_succeed() {
    let node = Node::with(Behaviour::honest()).await;
    let pulls = (0..5).map(|_| node.pull("app:1"));
    let ids: BTreeSet<_> = futures::future::join_all(pulls).await.into_iter().map(Result::unwrap).collect();
    assert_eq!(ids.len(), 1);
    assert!(lock(&node.store.flights.0).is_empty());
}

#[tokio::test]
async fn a_registry_that_stumbles_is_asked_again() {
    let registry = Behaviour { failures: Arc::new(AtomicU64::new(1)), ..Behaviour::honest() };
    Node::with(registry).await.pull("app:1").await.unwrap();
}

#[tokio::test]
async fn credentials_are_used_and_their_absence_is_told() {
    let registry =
        Behaviour { authorization: Some("authorization: Basic dTpw".into()), ..Behaviour::honest() };
    let node = Node::with(registry).await;
    let error = node.pull("app:1").await.unwrap_err();
    assert!(matches!(error, Error::Unauthorized { .. }), "{error}");
    node.assert_nothing_left().await;
    node.pull_with("app:1", RegistryAuth::Basic("u".into(), "p".into())).await.unwrap();
}

#[tokio::test]
async fn an_absent_image_is_not_found() {
    let node = Node::with(Behaviour::honest()).await;
    let error = node.pull("app:2").await.unwrap_err();
    assert!(matches!(error, Error::NotFound { .. }), "{error}");
    node.assert_nothing_left().await;
}

#[tokio::test]
async fn a_registry_that_hangs_is_given_up() {
    for part in ["/blobs/", "/manifests/"] {
        let registry = Behaviour { hang: Some(part.into()), ..Behaviour::honest() };
        let node = Node::with(registry).await;
        let error = node.pull("app:1").await.unwrap_err();
        assert!(matches!(error, Error::Timeout { .. }), "{part}: {error}");
        node.assert_nothing_left().await;
    }
}

#[tokio::test]
async fn lies_are_refused_and_leave_nothing() {
    let honest = Behaviour::honest();
    let path = honest.layer_path();
    let (body, _) = layer("etc/motd", "hello");
    let mut other = body.clone();
    *other.last_mut().unwrap() ^= 1;
    let longer = [body.clone(), vec![0; 10]].concat();
    for (what, body) in
        [("other bytes", other), ("fewer bytes", body[..body.len() / 2].to_vec()), ("more bytes", longer)]
    {
        let mut registry = honest.clone();
        registry.put(&path, "application/octet-stream", &body);
        let node = Node::with(registry).await;
        let error = node.pull("app:1").await.unwrap_err();
        assert!(matches!(&error, Error::Refused { .. } | Error::Registry { .. }), "{what}: {error}");
        node.assert_nothing_left().await;
    }
}

#[tokio::test]
async fn a_manifest_that_is_none_is_refused() {
    for body in ["", "{}", "[1,2", r#"{"schemaVersion":2,"manifests":[]}"#] {
        let mut registry = Behaviour::honest();
        registry.put("/v2/app/manifests/1", MANIFEST, body.as_bytes());
        let node = Node::with(registry).await;
        let error = node.pull("app:1").await.unwrap_err();
        assert!(matches!(&error, Error::Refused { .. } | Error::Registry { .. }), "{body}: {error}");
        node.assert_nothing_left().await;
    }
}

#[tokio::test]
async fn nobody_at_the_address_is_told_so() {
    let node = Node::with(Behaviour::honest()).await;
    let free = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
    let error = node.store.pull(&format!("{free}/app:1"), RegistryAuth::Anonymous).await.unwrap_err();
    assert!(error.to_string().contains("fetch manifest"), "{error}");
}
