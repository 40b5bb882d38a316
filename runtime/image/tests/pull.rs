//! Pulls from a registry that answers as each test wants, including lies.

#![allow(clippy::unwrap_used, clippy::indexing_slicing)]

use std::collections::{BTreeSet, HashMap};
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use husk_base::id::hex;
use husk_image::{Credentials, Error, ImageConfig, ImageStore};
use serde_json::json;
use sha2::{Digest, Sha256};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
const INDEX: &str = "application/vnd.oci.image.index.v1+json";
const LAYER: &str = "application/vnd.oci.image.layer.v1.tar+gzip";

/// The behaviour of the registry.
#[derive(Clone, Default)]
struct Behaviour {
    /// Media types and bodies by path.
    answers: HashMap<String, (String, Vec<u8>)>,
    /// Requests without this header line are answered with 401.
    authorization: Option<String>,
    /// The challenge of these answers; without one, a password is demanded.
    challenge: Option<String>,
    /// Redirects by path.
    redirects: HashMap<String, String>,
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

/// The configuration of an image.
fn config(architecture: &str) -> serde_json::Value {
    let (_, diff_id) = layer("etc/motd", "hello");
    json!({
        "architecture": architecture, "os": "linux", "config": {"Cmd": ["/hello"]},
        "rootfs": {"type": "layers", "diff_ids": [diff_id]},
    })
}

/// The platform of an image in an index.
fn platform(architecture: &str, variant: Option<&str>) -> serde_json::Value {
    let mut platform = json!({"os": "linux", "architecture": architecture});
    if let Some(variant) = variant {
        platform["variant"] = variant.into();
    }
    platform
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

    /// Adds an image with one layer of this type; returns the digest of its
    /// manifest.
    fn image(&mut self, config: &serde_json::Value, layer_type: &str) -> String {
        let (blob, _) = layer("etc/motd", "hello");
        let config = config.to_string();
        let config_digest = self.blob(config.as_bytes());
        let layer_digest = self.blob(&blob);
        let manifest = json!({
            "schemaVersion": 2, "mediaType": MANIFEST,
            "config": {"mediaType": "application/vnd.oci.image.config.v1+json", "digest": config_digest, "size": config.len()},
            "layers": [{"mediaType": layer_type, "digest": layer_digest, "size": blob.len()}],
            "annotations": {"version": "1"},
        })
        .to_string();
        let digest = digest(manifest.as_bytes());
        for name in [digest.as_str(), "plain"] {
            self.put(&format!("/v2/app/manifests/{name}"), MANIFEST, manifest.as_bytes());
        }
        digest
    }

    /// Adds `app:1` for several platforms: each with the digest of its
    /// manifest.
    fn index(&mut self, manifests: &[(serde_json::Value, &str)]) {
        let entry = |(platform, digest): &(serde_json::Value, &str)| {
            let mut entry = json!({"mediaType": MANIFEST, "digest": digest, "size": 1});
            if !platform.is_null() {
                entry["platform"] = platform.clone();
            }
            entry
        };
        let manifests: Vec<_> = manifests.iter().map(entry).collect();
        let index = json!({"schemaVersion": 2, "mediaType": INDEX, "manifests": manifests}).to_string();
        self.put("/v2/app/manifests/1", INDEX, index.as_bytes());
    }

    /// An honest registry with `app:1` for two platforms.
    fn honest() -> Self {
        let mut registry = Self::default();
        let ours = registry.image(&config("amd64"), LAYER);
        let (other, ours) = (digest(b"other"), ours.as_str());
        registry.index(&[(platform("arm64", None), &other), (platform("amd64", None), ours)]);
        registry.put("/v2/", "text/plain", b"");
        registry
    }

    fn layer_path(&self) -> String {
        let (blob, _) = layer("etc/motd", "hello");
        format!("/v2/app/blobs/{}", digest(&blob))
    }

    async fn serve(self) -> SocketAddr {
        self.serve_at("127.0.0.1").await
    }

    async fn serve_at(self, address: &str) -> SocketAddr {
        let listener = TcpListener::bind((address, 0)).await.unwrap();
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
            // A query tells a mirror which registry it stands for.
            let path = head.split([' ', '?']).nth(1).unwrap();
            let allowed = self
                .authorization
                .as_ref()
                .is_none_or(|line| head.to_lowercase().contains(&line.to_lowercase()));
            let fails = self
                .failures
                .fetch_update(Ordering::SeqCst, Ordering::SeqCst, |left| left.checked_sub(1))
                .is_ok();
            let challenge = self.challenge.as_deref().unwrap_or("Basic realm=\"r\"");
            let unauthorized = format!("401 Unauthorized\r\nwww-authenticate: {challenge}");
            let moved = self.redirects.get(path).map(|to| format!("307 Moved\r\nlocation: {to}"));
            let (status, kind, body) = match self.answers.get(path) {
                _ if moved.is_some() => (moved.as_deref().unwrap(), "text/plain", &[][..]),
                _ if !allowed => (unauthorized.as_str(), "text/plain", &[][..]),
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
    store: Arc<ImageStore>,
    registry: SocketAddr,
}

impl Node {
    async fn with(behaviour: Behaviour) -> Self {
        Self::at(behaviour.serve().await, |_| {})
    }

    /// A node that pulls from the registry at an address, configured by `change`.
    fn at(registry: SocketAddr, change: impl FnOnce(&mut ImageConfig)) -> Self {
        Self::at_in(tempfile::tempdir().unwrap(), registry, change)
    }

    fn at_in(root: tempfile::TempDir, registry: SocketAddr, change: impl FnOnce(&mut ImageConfig)) -> Self {
        let _ = rustls::crypto::ring::default_provider().install_default();
        let mut config = ImageConfig {
            stall_timeout: Duration::from_millis(500),
            pull_timeout: Duration::from_secs(20),
            hosts_dir: root.path().join("certs.d"),
            unpacker: env!("CARGO_BIN_EXE_husk-unpack").into(),
            ..ImageConfig::default()
        };
        change(&mut config);
        let store = ImageStore::open(root.path(), config).unwrap();
        Self { root, store: Arc::new(store), registry }
    }

    async fn pull(&self, name: &str) -> Result<String, Error> {
        self.pull_with(name, Credentials::Anonymous).await
    }

    async fn pull_with(&self, name: &str, auth: Credentials) -> Result<String, Error> {
        self.store.pull(&format!("{}/{name}", self.registry), auth).await
    }

    /// Writes the `hosts.toml` of a registry.
    fn hosts(&self, registry: &str, text: &str) {
        let folder = self.root.path().join("certs.d").join(registry);
        std::fs::create_dir_all(&folder).unwrap();
        std::fs::write(folder.join("hosts.toml"), text).unwrap();
    }

    /// Checks that a failed pull is in no list, and has no files.
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
    assert_eq!(image.annotations, [("version".to_owned(), "1".to_owned())].into());
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
    assert_eq!(node.store.pulls_under_way(), 0);
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
    node.pull_with("app:1", Credentials::Basic("u".into(), "p".into())).await.unwrap();
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
async fn a_disk_keeps_the_room_that_it_is_to_keep() {
    let registry = Behaviour::honest().serve().await;
    let node = Node::at(registry, |config| config.min_free = 1 << 60);
    let error = node.pull("app:1").await.unwrap_err();
    assert!(error.is_disk_full() && error.to_string().contains("`min_free_mib` of [images]"), "{error}");
    node.assert_nothing_left().await;
}

/// A registry with `app:plain`, which has this one layer.
fn with_layer(packed: &[u8], diff_id: &str, kind: &str) -> Behaviour {
    let mut config = config("amd64");
    config["rootfs"]["diff_ids"] = json!([diff_id]);
    let mut registry = Behaviour::default();
    registry.image(&config, kind);
    let manifest = "/v2/app/manifests/plain";
    let mut document: serde_json::Value = serde_json::from_slice(&registry.answers[manifest].1).unwrap();
    document["layers"][0]["digest"] = registry.blob(packed).into();
    document["layers"][0]["size"] = packed.len().into();
    registry.put(manifest, MANIFEST, document.to_string().as_bytes());
    registry
}

/// An image with a large file of zeros.
fn zeros(bytes: usize) -> Behaviour {
    const PIECE: usize = 64 << 20;
    let mut header = tar::Header::new_gnu();
    header.set_path("zeros").unwrap();
    header.set_size(bytes as u64);
    header.set_mode(0o644);
    header.set_cksum();
    let mut packed = zstd::encode_all(header.as_bytes().as_slice(), 1).unwrap();
    packed.extend(zstd::encode_all(vec![0; PIECE].as_slice(), 1).unwrap().repeat(bytes / PIECE));
    with_layer(&packed, &digest(b""), "application/vnd.oci.image.layer.v1.tar+zstd")
}

#[tokio::test]
async fn holes_of_sparse_files_take_no_room_in_an_image() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::File::create(folder.path().join("sparse")).unwrap().set_len(256 << 20).unwrap();
    let mut tar = std::process::Command::new("tar");
    tar.args(["--sparse", "--create", "--file=-", "--directory"]).arg(folder.path()).arg("sparse");
    let layer = tar.output().unwrap().stdout;
    assert!(!layer.is_empty() && layer.len() < 1 << 20);
    let registry = with_layer(&layer, &digest(&layer), "application/vnd.oci.image.layer.v1.tar");
    let node = Node::with(registry).await;
    node.pull("app:plain").await.unwrap();
    assert!(node.store.fs_info().used_bytes < 8 << 20, "{:?}", node.store.fs_info());
}

#[test]
fn a_layer_that_fills_the_disk_is_stopped_while_it_is_unpacked() {
    let folder = tempfile::tempdir().unwrap();
    let run = move || {
        use nix::mount::{MsFlags, mount};
        const NOTHING: Option<&str> = None;
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNS).unwrap();
        mount(NOTHING, "/", NOTHING, MsFlags::MS_SLAVE | MsFlags::MS_REC, NOTHING).unwrap();
        mount(NOTHING, folder.path(), Some("tmpfs"), MsFlags::empty(), Some("size=512M")).unwrap();
        let pull = async {
            let registry = zeros(2 << 30).serve().await;
            let node = Node::at_in(tempfile::tempdir_in(folder.path()).unwrap(), registry, |config| {
                config.min_free = 256 << 20;
                config.pull_timeout = Duration::from_secs(120);
            });
            let error = node.pull("app:plain").await.unwrap_err();
            assert!(error.is_disk_full() && error.to_string().contains("MiB are free"), "{error}");
            node.assert_nothing_left().await;
        };
        tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(pull);
    };
    std::thread::spawn(run).join().unwrap();
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
async fn an_image_does_not_choose_a_file_of_the_host() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("disk.erofs");
    std::fs::write(&file, "of the host").unwrap();
    let absolute = folder.path().join("disk").to_str().unwrap().to_owned();
    for diff_id in
        [absolute.clone(), format!("sha256:{absolute}"), "../../outside".into(), "./outside".into()]
    {
        let mut registry = Behaviour::default();
        let mut config = config("amd64");
        config["rootfs"]["diff_ids"] = json!([diff_id]);
        registry.image(&config, LAYER);
        let node = Node::with(registry).await;
        let images = node.root.path().join("images");
        for outside in [node.root.path().join("outside.erofs"), images.join("rootfs/outside.erofs")] {
            std::fs::write(outside, "of the host").unwrap();
        }
        let error = node.pull("app:plain").await.unwrap_err();
        assert!(matches!(&error, Error::Refused { .. }), "{error}");
        assert!(error.to_string().contains("the image's configuration: diff id"), "{error}");
        assert!(node.store.list().unwrap().is_empty());
        node.store.remove(&format!("{}/app:plain", node.registry)).unwrap();
        assert!(file.exists() && node.root.path().join("outside.erofs").exists());
    }
}

#[tokio::test]
async fn a_layer_is_unpacked_as_its_bytes_say() {
    let types =
        ["oci.image.layer.v1.tar", "oci.image.layer.v1.tar+zstd", "docker.image.rootfs.foreign.diff.tar"];
    for kind in types {
        let mut registry = Behaviour::default();
        registry.image(&config("amd64"), &format!("application/vnd.{kind}"));
        Node::with(registry).await.pull("app:plain").await.unwrap();
    }
    let mut registry = Behaviour::default();
    registry.image(&config("amd64"), "application/octet-stream");
    let error = Node::with(registry).await.pull("app:plain").await.unwrap_err();
    assert!(error.to_string().contains("unknown type `application/octet-stream`"), "{error}");
}

#[tokio::test]
async fn an_index_leads_to_the_image_that_this_machine_can_run() {
    let mut images = Behaviour::default();
    let mut image = |architecture: &str, name: &str| {
        let mut config = config(architecture);
        config["config"]["Cmd"] = json!([name]);
        images.image(&config, LAYER)
    };
    let (plain, newer, arm, silent) =
        (image("amd64", "plain"), image("amd64", "newer"), image("arm64", "arm"), image("", "silent"));
    let old = image("386", "old");
    let amd64 = |variant| platform("amd64", variant);
    let nowhere = || json!({"os": "unknown", "architecture": "unknown"});
    let none = serde_json::Value::Null;
    for (index, want) in [
        (vec![(amd64(Some("v3")), &newer), (amd64(None), &plain)], Some("plain")),
        (vec![(amd64(Some("v2")), &newer), (amd64(Some("v1")), &plain)], Some("plain")),
        (vec![(amd64(Some("v3")), &newer), (nowhere(), &arm)], None),
        (vec![(none.clone(), &newer), (amd64(Some("")), &plain)], Some("plain")),
        (vec![(none.clone(), &arm), (nowhere(), &newer), (none.clone(), &plain)], Some("plain")),
        (vec![(none.clone(), &silent)], Some("silent")),
        (vec![(nowhere(), &arm), (platform("386", None), &old)], Some("old")),
        (vec![(platform("386", None), &old), (none.clone(), &plain)], Some("plain")),
        (vec![(none.clone(), &old), (none.clone(), &arm)], Some("old")),
        (vec![(none, &arm)], None),
    ] {
        let mut registry = images.clone();
        let entries: Vec<_> =
            index.iter().map(|(platform, digest)| (platform.clone(), digest.as_str())).collect();
        registry.index(&entries);
        let node = Node::with(registry).await;
        match (node.pull("app:1").await, want) {
            (Ok(id), Some(name)) => {
                let image = node.store.resolve(&id).unwrap().unwrap();
                let command = image.config.config().as_ref().and_then(|config| config.cmd().clone());
                assert_eq!(command.unwrap(), [name], "{index:?}");
            }
            (Err(error), None) => {
                assert!(error.to_string().contains("not there for linux/amd64"), "{error}");
                node.assert_nothing_left().await;
            }
            (pulled, _) => panic!("{index:?}: {pulled:?}"),
        }
    }
}

#[tokio::test]
async fn a_document_that_could_mean_two_images_is_refused() {
    let honest = Behaviour::honest();
    let both = |first: &str, second: &str| {
        let mut one: serde_json::Value = serde_json::from_slice(&honest.answers[first].1).unwrap();
        let other: serde_json::Value = serde_json::from_slice(&honest.answers[second].1).unwrap();
        for (key, value) in other.as_object().unwrap() {
            one.as_object_mut().unwrap().entry(key).or_insert(value.clone());
        }
        one
    };
    let (index, manifest) = ("/v2/app/manifests/1", "/v2/app/manifests/plain");
    for (kind, body, word) in [
        (INDEX, both(index, manifest), "two images"),
        (MANIFEST, both(manifest, index), "two images"),
        (INDEX, serde_json::from_slice(&honest.answers[manifest].1).unwrap(), "contradicts"),
    ] {
        let mut registry = honest.clone();
        registry.put(index, kind, body.to_string().as_bytes());
        let node = Node::with(registry).await;
        let error = node.pull("app:1").await.unwrap_err();
        assert!(matches!(&error, Error::Refused { .. }) && error.to_string().contains(word), "{error}");
        node.assert_nothing_left().await;
    }
}

#[tokio::test]
async fn a_configuration_as_go_writes_it_is_taken() {
    let mut config = config("amd64");
    config["config"]["Volumes"] = json!({"/d": null});
    config["config"]["ExposedPorts"] = json!({"80/tcp": null});
    let mut registry = Behaviour::default();
    registry.image(&config, LAYER);
    let node = Node::with(registry).await;
    let id = node.pull("app:plain").await.unwrap();
    let image = node.store.resolve(&id).unwrap().unwrap();
    assert_eq!(image.config.config().as_ref().unwrap().volumes().clone().unwrap(), ["/d"]);
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
    let error = node.store.pull(&format!("{free}/app:1"), Credentials::Anonymous).await.unwrap_err();
    assert!(error.to_string().contains("fetch manifest"), "{error}");
}

/// An address on which nobody listens.
async fn nowhere() -> SocketAddr {
    TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap()
}

#[tokio::test]
async fn a_mirror_stands_for_a_registry_and_leaves_no_trace_in_names() {
    let node = Node::with(Behaviour::honest()).await;
    node.hosts("registry.example", &format!("server = 'http://{}'", nowhere().await));
    assert!(node.store.pull("registry.example/app:1", Credentials::Anonymous).await.is_err());
    let (dead, live) = (nowhere().await, node.registry);
    node.hosts(
        "registry.example",
        &format!("server = 'http://{dead}'\n[host.'http://{dead}']\n[host.'http://{live}']\n"),
    );
    let id = node.store.pull("registry.example/app:1", Credentials::Anonymous).await.unwrap();
    let image = node.store.resolve(&id).unwrap().unwrap();
    assert_eq!(image.repo_tags, ["registry.example/app:1"]);
    assert!(image.repo_digests[0].starts_with("registry.example/app@sha256:"), "{:?}", image.repo_digests);
}

#[tokio::test]
async fn a_mirror_that_lies_or_lacks_a_blob_is_passed_over() {
    let lacking = {
        let mut registry = Behaviour::honest();
        registry.answers.remove(&registry.layer_path());
        registry
    };
    let lying = {
        let mut registry = Behaviour::honest();
        registry.put(&registry.layer_path(), "application/octet-stream", b"another layer");
        registry
    };
    for mirror in [lacking, lying, Behaviour::default()] {
        let node = Node::with(Behaviour::honest()).await;
        let mirror = mirror.serve().await;
        node.hosts(
            "registry.example",
            &format!("server = 'http://{}'\n[host.'http://{mirror}']\n", node.registry),
        );
        node.store.pull("registry.example/app:1", Credentials::Anonymous).await.unwrap();
    }
}

#[tokio::test]
async fn a_host_does_only_what_it_may() {
    let node = Node::with(Behaviour::honest()).await;
    let (dead, live) = (nowhere().await, node.registry);
    let file = |mirror: &str| {
        format!("server = 'http://{dead}'\n[host.'http://{live}']\ncapabilities = ['{mirror}']\n")
    };
    // The registry decides the meaning of a tag: a mirror that may only serve content
    // cannot.
    node.hosts("registry.example", &file("pull"));
    let error = node.store.pull("registry.example/app:1", Credentials::Anonymous).await.unwrap_err();
    assert!(error.to_string().contains("fetch manifest"), "{error}");
    let manifest = Behaviour::honest().answers["/v2/app/manifests/plain"].1.clone();
    let by_digest = format!("registry.example/app@{}", digest(&manifest));
    node.store.pull(&by_digest, Credentials::Anonymous).await.unwrap();
    node.hosts("other.example", &file("resolve"));
    let error = node.store.pull("other.example/app:plain", Credentials::Anonymous).await;
    // The image is here already: its layers are not requested.
    assert!(error.is_ok(), "{error:?}");
}

#[tokio::test]
async fn a_path_under_override_path_is_taken_as_it_is() {
    let mut registry = Behaviour::honest();
    registry.answers = std::mem::take(&mut registry.answers)
        .into_iter()
        .map(|(path, answer)| (path.replace("/v2/app/", "/proxy/v2/project/app/"), answer))
        .collect();
    let node = Node::with(registry).await;
    node.hosts(
        "registry.example",
        &format!("[host.'http://{}/proxy/v2/project']\noverride_path = true\n", node.registry),
    );
    node.store.pull("registry.example/app:1", Credentials::Anonymous).await.unwrap();
}

#[tokio::test]
async fn credentials_go_to_the_server_and_to_no_mirror() {
    let locked = Behaviour { authorization: Some("authorization: Basic dTpw".into()), ..Behaviour::honest() };
    let node = Node::with(locked).await;
    let auth = Credentials::Basic("u".into(), "p".into());
    node.hosts(
        "registry.example",
        &format!("server = 'http://{}'\n[host.'http://{}']", nowhere().await, node.registry),
    );
    let error = node.store.pull("registry.example/app:1", auth.clone()).await.unwrap_err();
    assert!(error.to_string().contains(&format!("mirror http://{}", node.registry)), "{error}");
    node.hosts("registry.example", &format!("server = 'http://{}'", node.registry));
    node.store.pull("registry.example/app:1", auth).await.unwrap();
}

#[tokio::test]
async fn a_file_that_cannot_be_used_fails_the_pull_by_its_name() {
    let node = Node::with(Behaviour::honest()).await;
    let registry = node.registry.to_string();
    for text in ["[host", "[host.'ftp://x']", "[host.'https://x']\nca = 'none.crt'"] {
        node.hosts(&registry, text);
        let error = node.pull("app:1").await.unwrap_err();
        assert!(matches!(error, Error::Hosts { .. }), "{text}: {error}");
        assert!(error.to_string().contains("certs.d"), "{error}");
    }
    node.assert_nothing_left().await;
}

/// Terminates TLS in front of `plain`, one connection at a time.
fn tls_in_front_of(plain: SocketAddr, certificate: &str, key: &str) -> SocketAddr {
    use rustls::pki_types::pem::PemObject;
    use rustls::pki_types::{CertificateDer, PrivateKeyDer};
    use std::io::{Read, Write};
    let config = rustls::ServerConfig::builder()
        .with_no_client_auth()
        .with_single_cert(
            vec![CertificateDer::from_pem_slice(certificate.as_bytes()).unwrap()],
            PrivateKeyDer::from_pem_slice(key.as_bytes()).unwrap(),
        )
        .unwrap();
    let config = Arc::new(config);
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let serve = move |stream: std::net::TcpStream| -> std::io::Result<()> {
        let connection = rustls::ServerConnection::new(config.clone()).unwrap();
        let mut tls = rustls::StreamOwned::new(connection, stream);
        let mut back = std::net::TcpStream::connect(plain)?;
        loop {
            for answer in [false, true] {
                let mut head = Vec::new();
                let mut byte = [0];
                while !head.ends_with(b"\r\n\r\n") {
                    if answer {
                        back.read_exact(&mut byte)?
                    } else {
                        tls.read_exact(&mut byte)?
                    }
                    head.push(byte[0]);
                }
                if !answer {
                    back.write_all(&head)?;
                    continue;
                }
                let text = String::from_utf8_lossy(&head).to_lowercase();
                let length = text.split("content-length: ").nth(1).and_then(|rest| rest.split('\r').next());
                let mut body = vec![0; length.unwrap().parse().unwrap()];
                back.read_exact(&mut body)?;
                tls.write_all(&head)?;
                tls.write_all(&body)?;
                tls.flush()?;
            }
        }
    };
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let serve = serve.clone();
            std::thread::spawn(move || serve(stream));
        }
    });
    address
}

#[tokio::test]
async fn a_certificate_counts_if_hosts_toml_vouches_for_it() {
    let (certificate, key) = (include_str!("localhost.crt"), include_str!("localhost.key"));
    let node = Node::with(Behaviour::honest()).await;
    let tls = tls_in_front_of(node.registry, certificate, key);
    let file = |more: &str| {
        format!("server = 'http://127.0.0.1:1'\n[host.'https://localhost:{}']\n{more}", tls.port())
    };
    let pull = || node.store.pull("registry.example/app:1", Credentials::Anonymous);
    node.hosts("registry.example", &file(""));
    let error = pull().await.unwrap_err();
    assert!(error.to_string().contains("ertificate"), "{error}");
    node.hosts("registry.example", &file("ca = 'registry.crt'"));
    std::fs::write(node.root.path().join("certs.d/registry.example/registry.crt"), certificate).unwrap();
    pull().await.unwrap();
    node.hosts("unverified.example", &file("skip_verify = true"));
    node.store.pull("unverified.example/app:1", Credentials::Anonymous).await.unwrap();
}

#[tokio::test]
async fn a_certificate_counts_if_it_is_in_the_registrys_own_folder() {
    let (certificate, key) = (include_str!("localhost.crt"), include_str!("localhost.key"));
    for file in [None, Some("ca = 'own.crt'")] {
        let node = Node::with(Behaviour::honest()).await;
        let registry = format!("localhost:{}", tls_in_front_of(node.registry, certificate, key).port());
        let name = format!("{registry}/app:1");
        assert!(node.store.pull(&name, Credentials::Anonymous).await.is_err());
        let folder = node.root.path().join("certs.d").join(&registry);
        std::fs::create_dir_all(&folder).unwrap();
        std::fs::write(folder.join("own.crt"), certificate).unwrap();
        if let Some(text) = file {
            node.hosts(&registry, text);
        }
        node.store.pull(&name, Credentials::Anonymous).await.unwrap();
    }
}

/// Answers every request with `head`, and then with an endless body, of which
/// at most `most` bytes are sent.
async fn endless(head: &'static str, most: u64) -> (SocketAddr, Arc<AtomicU64>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let sent = Arc::new(AtomicU64::new(0));
    let counted = sent.clone();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let counted = counted.clone();
            tokio::spawn(async move {
                let mut request = [0; 4096];
                let _ = stream.read(&mut request).await;
                let head = head.replace("ADDRESS", &address.to_string());
                let path = String::from_utf8_lossy(&request).split([' ', '?']).nth(1).map(str::to_owned);
                // The realm of a challenge grants a token that never ends.
                let head = match path.as_deref() {
                    Some("/token") => "HTTP/1.1 200 OK".to_owned(),
                    _ => head,
                };
                let _ = stream.write_all(format!("{head}\r\n\r\n").as_bytes()).await;
                while counted.load(Ordering::Relaxed) < most && stream.write_all(&[b' '; 65536]).await.is_ok()
                {
                    counted.fetch_add(65536, Ordering::Relaxed);
                }
            });
        }
    });
    (address, sent)
}

#[tokio::test]
async fn an_answer_that_never_ends_is_given_up_after_a_while() {
    const MOST: u64 = 256 << 20;
    for (head, word) in [
        ("HTTP/1.1 200 OK", "larger than"),
        ("HTTP/1.1 404 Not Found", "404"),
        ("HTTP/1.1 400 Bad Request", "400"),
        (
            "HTTP/1.1 401 Unauthorized\r\nwww-authenticate: Bearer realm=\"http://ADDRESS/token\"",
            "token from",
        ),
    ] {
        let node = Node::with(Behaviour::honest()).await;
        let (registry, sent) = endless(head, MOST).await;
        let name = format!("{registry}/app:1");
        let error = node.store.pull(&name, Credentials::Anonymous).await.unwrap_err().to_string();
        assert!(error.contains(word), "{head}: {error}");
        // The sockets' buffers come on top.
        assert!(sent.load(Ordering::Relaxed) < 64 << 20, "{head}: {sent:?}");
        node.assert_nothing_left().await;
    }
}

#[tokio::test]
async fn a_token_is_asked_for_where_the_registry_says() {
    let mut tokens =
        Behaviour { authorization: Some("authorization: Basic dTpw".into()), ..Behaviour::default() };
    tokens.put(
        "/token",
        "application/json",
        br#"{"token": "", "access_token": "granted", "expires_in": 60}"#,
    );
    let realm = format!("http://{}/token", tokens.serve().await);
    let registry = Behaviour {
        authorization: Some("authorization: Bearer granted".into()),
        challenge: Some(format!("Digest realm=\"x\", Bearer realm=\"{realm}\",service=\"s\"")),
        ..Behaviour::honest()
    };
    let node = Node::with(registry).await;
    let basic = |password: &str| Credentials::Basic("u".into(), password.into());
    for refused in [Credentials::Anonymous, basic("other"), Credentials::Bearer("other".into())] {
        let error = node.pull_with("app:1", refused.clone()).await.unwrap_err();
        assert!(matches!(error, Error::Unauthorized { .. }), "{refused:?}: {error}");
        assert!(!error.to_string().contains("other"), "{error}");
    }
    node.assert_nothing_left().await;
    node.pull_with("app:1", basic("p")).await.unwrap();
    node.pull_with("app:1", Credentials::Bearer("granted".into())).await.unwrap();
}

/// Runs a test on a thread whose network is empty but for loopback, and for a public and a
/// private address of this machine.
fn on_the_internet<F: Future<Output = ()>>(test: impl FnOnce() -> F + Send + 'static) {
    let run = move || {
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).unwrap();
        for arguments in [&["link", "set", "lo", "up"][..], &["addr", "add", PUBLIC, "dev", "lo"]] {
            assert!(std::process::Command::new("ip").args(arguments).status().unwrap().success());
        }
        tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(test());
    };
    std::thread::spawn(run).join().unwrap();
}

/// An address of a block that is reserved for documentation (RFC 5737).
const PUBLIC: &str = "203.0.113.7";

/// A server on loopback, as an administrator may run one, and the count of its
/// requests.
async fn secret_service() -> (SocketAddr, Arc<AtomicU64>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let asked = Arc::new(AtomicU64::new(0));
    let counted = asked.clone();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            counted.fetch_add(1, Ordering::SeqCst);
            let body = r#"{"token": "secret"}"#;
            let head = format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n", body.len());
            let mut request = [0; 4096];
            let _ = stream.read(&mut request).await;
            let _ = stream.write_all(format!("{head}{body}").as_bytes()).await;
        }
    });
    (address, asked)
}

#[test]
fn a_registry_sends_huskd_to_no_service_of_the_node() {
    on_the_internet(|| async {
        let (service, asked) = secret_service().await;
        let mut realms = vec![];
        for host in ["127.0.0.1", "localhost"] {
            let realm = format!("http://{host}:{}/token", service.port());
            realms.push(Behaviour {
                authorization: Some("authorization: Bearer granted".into()),
                challenge: Some(format!("Bearer realm=\"{realm}\"")),
                ..Behaviour::honest()
            });
            let honest = Behaviour::honest();
            let redirects = [(honest.layer_path(), format!("http://{host}:{}/", service.port()))].into();
            realms.push(Behaviour { redirects, ..honest });
        }
        for registry in realms {
            let address = registry.serve_at(PUBLIC).await;
            let node = Node::at(address, |config| config.insecure_registries = vec![address.to_string()]);
            let error = node.pull("app:1").await.unwrap_err();
            assert!(error.to_string().contains("`trusted_hosts` of [images]"), "{error}");
            node.assert_nothing_left().await;
        }
        assert_eq!(asked.load(Ordering::SeqCst), 0);
    });
}

#[test]
fn a_host_that_the_configuration_trusts_may_be_anywhere() {
    on_the_internet(|| async {
        let mut tokens = Behaviour::default();
        tokens.put("/token", "application/json", br#"{"token": "granted"}"#);
        let realm = format!("http://{}/token", tokens.serve().await);
        let registry = Behaviour {
            authorization: Some("authorization: Bearer granted".into()),
            challenge: Some(format!("Bearer realm=\"{realm}\"")),
            ..Behaviour::honest()
        };
        let address = registry.serve_at(PUBLIC).await;
        let node = Node::at(address, |config| {
            config.insecure_registries = vec![address.to_string()];
            config.trusted_hosts = vec!["127.0.0.1".into()];
        });
        node.pull_with("app:1", Credentials::Basic("u".into(), "p".into())).await.unwrap();
    });
}

#[tokio::test]
async fn a_password_stays_in_the_registrys_own_domain() {
    let (service, asked) = secret_service().await;
    let registry = Behaviour {
        authorization: Some("authorization: Bearer secret".into()),
        challenge: Some(format!("Bearer realm=\"http://localhost:{}/token\"", service.port())),
        ..Behaviour::honest()
    };
    let node = Node::with(registry).await;
    let error = node.pull_with("app:1", Credentials::Basic("u".into(), "p".into())).await.unwrap_err();
    assert!(error.to_string().contains("password") && error.to_string().contains("localhost"), "{error}");
    assert_eq!(asked.load(Ordering::SeqCst), 0);
    node.pull("app:1").await.unwrap();
}

#[tokio::test]
async fn a_registry_with_tls_sends_nobody_to_plain_http() {
    let (certificate, key) = (include_str!("localhost.crt"), include_str!("localhost.key"));
    let (service, asked) = secret_service().await;
    let registry = Behaviour {
        authorization: Some("authorization: Bearer secret".into()),
        challenge: Some(format!("Bearer realm=\"http://{service}/token\"")),
        ..Behaviour::honest()
    };
    let node = Node::with(registry).await;
    let tls = tls_in_front_of(node.registry, certificate, key);
    let file = format!("server = 'https://localhost:{}'\nca = 'registry.crt'", tls.port());
    node.hosts("registry.example", &file);
    std::fs::write(node.root.path().join("certs.d/registry.example/registry.crt"), certificate).unwrap();
    let error = node.store.pull("registry.example/app:1", Credentials::Anonymous).await.unwrap_err();
    assert!(error.to_string().contains("not https"), "{error}");
    assert_eq!(asked.load(Ordering::SeqCst), 0);
}

#[tokio::test]
async fn content_may_be_at_another_server() {
    let honest = Behaviour::honest();
    let elsewhere = honest.clone().serve().await;
    let path = honest.layer_path();
    let redirects = [(path.clone(), format!("http://{elsewhere}{path}"))].into();
    Node::with(Behaviour { redirects, ..honest.clone() }).await.pull("app:1").await.unwrap();
    let circle = [(path.clone(), path)].into();
    let error = Node::with(Behaviour { redirects: circle, ..honest }).await.pull("app:1").await.unwrap_err();
    assert!(error.to_string().contains("more than 10 times"), "{error}");
}
