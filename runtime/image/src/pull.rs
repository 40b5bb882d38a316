//! A pull: fetches the manifest, the configuration and the layers, makes the image's
//! file, and writes its record.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use futures::{StreamExt, TryStreamExt};
use husk_base::id::hex;
use husk_base::{blocking, chain, crash, remove_tree};
use oci_spec::distribution::Reference;
use oci_spec::image::{Descriptor, ImageConfiguration, ImageIndex, ImageManifest};
use sha2::{Digest, Sha256};
use tokio::io::AsyncWriteExt;

use super::chain::ChainId;
use super::document::{self, Document};
use super::layer::is_layer;
use super::metadata::ImageRecord;
use super::registry::{self, Credentials};
use super::store::file;
use super::{Error, ImageStore, erofs, reference, unpack};

mod source;
use source::{Rounds, Source, Wanted, sources};

/// Most layers that are fetched at the same time.
const PARALLEL: usize = 3;
/// Most bytes of a manifest, and of a configuration.
const MAX_DOCUMENT: usize = 4 << 20;
/// Most bytes of annotations that are kept of an image.
const MAX_ANNOTATIONS: usize = 64 << 10;
/// Most layers of an image, as in other runtimes.
const MAX_LAYERS: usize = 127;
/// Most entries of an index without a platform whose configuration is read.
const MAX_SILENT: usize = 16;
/// Attempts to fetch a blob before the pull fails.
const TRIES: u32 = 3;

/// The media types of manifests that are accepted.
const MEDIA_TYPES: &str = "application/vnd.oci.image.manifest.v1+json, \
                           application/vnd.oci.image.index.v1+json, \
                           application/vnd.docker.distribution.manifest.v2+json, \
                           application/vnd.docker.distribution.manifest.list.v2+json";

/// The number of the next pull, by which their folders differ.
static NEXT: AtomicU64 = AtomicU64::new(1);

/// The folder of a pull. It is removed with what is in it, by [`Workspace::close`], or in
/// the background when it is dropped.
struct Workspace(PathBuf);

impl Workspace {
    /// Removes the folder, and returns when it has gone.
    async fn close(mut self) {
        let path = std::mem::take(&mut self.0);
        blocking(move || remove_workspace(&path)).await;
    }
}

impl Drop for Workspace {
    fn drop(&mut self) {
        let path = std::mem::take(&mut self.0);
        if path.as_os_str().is_empty() {
            return;
        }
        match tokio::runtime::Handle::try_current() {
            Ok(runtime) => drop(runtime.spawn_blocking(move || remove_workspace(&path))),
            Err(_) => remove_workspace(&path),
        }
    }
}

/// This blocks.
fn remove_workspace(path: &Path) {
    // A process that was killed with its pull may just be making a file, and makes no
    // second one.
    let removed = remove_tree(path).or_else(|_| {
        std::thread::sleep(Duration::from_millis(50));
        remove_tree(path)
    });
    if let Err(error) = removed {
        tracing::warn!(path = %path.display(), %error, "failed to remove the folder of a pull");
    }
}

/// A document as it was received, with the registry's media type for it, and its digest,
/// which was computed here.
struct Fetched {
    bytes: Vec<u8>,
    media_type: Option<String>,
    digest: String,
}

/// A pull of one image.
struct Pull<'a> {
    store: &'a Arc<ImageStore>,
    sources: Vec<Source>,
    reference: Reference,
    name: String,
}

impl ImageStore {
    /// Pulls an image, and returns its id. An image that is here already is
    /// only looked up in the registry.
    ///
    /// # Errors
    /// Every error names the stage, and nothing is left behind.
    pub async fn pull(self: &Arc<Self>, name: &str, credentials: Credentials) -> Result<String, Error> {
        let reference = reference::parse(name)?;
        let canonical = reference::canonical(&reference);
        let sources = sources(&self.config, &reference, &credentials)?;
        let turn = self.in_flight.turn(&canonical);
        let limit = self.config.pull_timeout;
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let workspace = Workspace(self.pulls().join(format!("{}-{number}", std::process::id())));
        let pulled = tokio::time::timeout(limit, async {
            let _turn = turn.lock().await;
            let _pull = self.gates.pull(&canonical).await?;
            Pull { store: self, sources, reference, name: canonical.clone() }.run(&workspace.0).await
        })
        .await;
        // Nobody need wait for it after a success.
        if !matches!(pulled, Ok(Ok(_))) {
            workspace.close().await;
        }
        drop(turn);
        self.in_flight.forget_done();
        pulled.unwrap_or_else(|_| {
            Err(Error::Timeout {
                reference: canonical,
                stage: "pull".into(),
                cause: format!("not done within {} s", limit.as_secs()),
            })
        })
    }
}

impl Pull<'_> {
    async fn run(&self, workspace: &Path) -> Result<String, Error> {
        tokio::fs::create_dir_all(workspace).await.map_err(file("make folder", workspace))?;
        crash::point("folder of a pull made");
        let (manifest, digest) = self.manifest(workspace).await?;
        let id = manifest.config().digest().to_string();
        let mut tags = BTreeSet::new();
        if self.reference.digest().is_none() {
            tags.insert(self.name.clone());
        }
        let digests = BTreeSet::from([format!("{}@{digest}", reference::repository(&self.reference))]);
        let annotations = self.annotations(&manifest);
        let looked_up = id.clone();
        if let Some(known) = self.store.beside(move |store| store.by_id(&looked_up)).await? {
            let (tags, digests, annotations) = (tags.clone(), digests.clone(), annotations.clone());
            let known = ImageRecord { tags, digests, annotations, ..known };
            if self.store.beside(move |store| store.commit_existing(known)).await? {
                return Ok(id);
            }
        }

        let (config_text, config) = self.config(&manifest, workspace).await?;
        let diff_ids = config.rootfs().diff_ids().clone();
        let layers = self.layers(&manifest, &diff_ids)?;
        let chain_id = ChainId::of(&diff_ids).map_err(|cause| self.refused(cause))?;
        let record = ImageRecord {
            id: id.clone(),
            tags,
            digests,
            chain_id,
            size: 0,
            config: config_text,
            annotations,
        };
        let same = record.clone();
        if !self.store.beside(move |store| store.commit_existing(same)).await? {
            let make = self.make(layers, diff_ids, workspace);
            let packed = self.store.gates.while_there_is_room(&self.name, make).await?;
            self.store.beside(move |store| store.commit(record, &packed)).await?;
        }
        tracing::info!(image = self.name, id, "image pulled");
        Ok(id)
    }

    /// Fetches and unpacks the layers, and packs their files into one, which is on disk
    /// when this is done.
    async fn make(
        &self,
        layers: &[Descriptor],
        diff_ids: Vec<String>,
        workspace: &Path,
    ) -> Result<PathBuf, Error> {
        // The layers take as much space as the manifest says; the size of the unpacked
        // files is watched.
        let bytes = layers.iter().map(Descriptor::size).fold(0, u64::saturating_add);
        self.store.gates.has_room(&self.name, bytes)?;
        self.fetch(layers, workspace).await?;
        crash::point("layers fetched");
        let _unpack = self.store.gates.unpack(&self.name).await?;
        let (program, limits) = (&self.store.config.unpacker, &self.store.config.limits);
        let holes = unpack::unpack(program, workspace, limits, diff_ids, &self.name).await?;
        crash::point("layers unpacked");
        let packed = erofs::pack(program, workspace, limits.bytes, holes).await?;
        // The file is on disk before it gets its final name, which means that it
        // is complete.
        let synced = packed.clone();
        blocking(move || std::fs::File::open(&synced).and_then(|file| file.sync_all()))
            .await
            .map_err(file("sync", &packed))?;
        Ok(packed)
    }

    /// The annotations of the manifest, unless they are too large for lists of images.
    fn annotations(&self, manifest: &ImageManifest) -> BTreeMap<String, String> {
        let all: BTreeMap<_, _> = manifest.annotations().clone().unwrap_or_default().into_iter().collect();
        let bytes: usize = all.iter().map(|(key, value)| key.len() + value.len()).sum();
        if bytes > MAX_ANNOTATIONS {
            tracing::warn!(
                image = self.name,
                bytes,
                "annotations left out: more than {MAX_ANNOTATIONS} bytes"
            );
            return BTreeMap::new();
        }
        all
    }

    /// The manifest for this machine, and the digest that the reference resolves
    /// to.
    async fn manifest(&self, workspace: &Path) -> Result<(ImageManifest, String), Error> {
        let fetched = self.document(self.reference.digest()).await?;
        let document = Document::read(&fetched.bytes, fetched.media_type.as_deref());
        let manifest = match document.map_err(|cause| self.refused(cause))? {
            Document::Index(index) => self.choose(&index, workspace).await?,
            Document::Manifest(manifest) => *manifest,
        };
        let count = manifest.layers().len();
        if count > MAX_LAYERS {
            return Err(self.refused(format!("{count} layers are more than {MAX_LAYERS}")));
        }
        Ok((manifest, fetched.digest))
    }

    /// Chooses the image in an index for this machine: one for amd64, else one for 386, which runs
    /// on amd64 too. An entry without a platform is taken unless its configuration names another
    /// machine.
    async fn choose(&self, index: &ImageIndex, workspace: &Path) -> Result<ImageManifest, Error> {
        let declared = |machine| index.manifests().iter().find(|entry| is_for(entry, machine));
        if let Some(entry) = declared("amd64") {
            return self.entry(entry).await;
        }
        let silent = index.manifests().iter().filter(|entry| entry.platform().is_none());
        let mut older = None;
        for entry in silent.take(MAX_SILENT) {
            let manifest = self.entry(entry).await?;
            let (_, config) = self.config(&manifest, workspace).await?;
            if !matches!(config.os().to_string().as_str(), "" | "linux") {
                continue;
            }
            match config.architecture().to_string().as_str() {
                "" | "amd64" => return Ok(manifest),
                "386" if older.is_none() => older = Some(manifest),
                _ => {}
            }
        }
        match (declared("386"), older) {
            (Some(entry), _) => self.entry(entry).await,
            (None, Some(manifest)) => Ok(manifest),
            (None, None) => Err(self.refused("the image is not there for linux/amd64".into())),
        }
    }

    async fn entry(&self, entry: &Descriptor) -> Result<ImageManifest, Error> {
        let fetched = self.document(Some(entry.digest().as_ref())).await?;
        let document = Document::read(&fetched.bytes, Some(entry.media_type().as_ref()));
        match document.map_err(|cause| self.refused(cause))? {
            Document::Manifest(manifest) => Ok(*manifest),
            Document::Index(_) => Err(self.refused("an index inside of an index is not supported".into())),
        }
    }

    /// Fetches the document with that digest, or the one that the tag leads to.
    async fn document(&self, digest: Option<&str>) -> Result<Fetched, Error> {
        let wanted = if digest.is_some() { Wanted::Content } else { Wanted::Tag };
        let mut rounds = Rounds::new(&self.sources, wanted);
        while let Some(source) = rounds.next().await {
            match self.try_document(source, digest).await {
                Ok(document) => return Ok(document),
                Err((error, passing)) => rounds.failed(error, passing),
            }
        }
        Err(rounds.error(|| self.refused("hosts.toml lets no host resolve tags".into())))
    }

    /// Asks one source. An error comes with whether trying again may help.
    async fn try_document(&self, source: &Source, digest: Option<&str>) -> Result<Fetched, (Error, bool)> {
        let name = digest.or(self.reference.tag()).unwrap_or("latest");
        let fetched = source.registry.manifest(name, MEDIA_TYPES, MAX_DOCUMENT).await;
        let (bytes, media_type) = fetched.map_err(|failure| {
            let passing = failure.may_pass();
            (self.registry("fetch manifest", failure), passing)
        })?;
        let found = format!("sha256:{}", hex(&Sha256::digest(&bytes)));
        match digest {
            Some(asked) if asked != found => {
                Err((self.refused(format!("the registry answers digest {asked} with {found}")), false))
            }
            _ => Ok(Fetched { bytes, media_type, digest: found }),
        }
    }

    async fn config(
        &self,
        manifest: &ImageManifest,
        workspace: &Path,
    ) -> Result<(String, ImageConfiguration), Error> {
        if manifest.config().size() > MAX_DOCUMENT as u64 {
            return Err(self.refused("the configuration is too large".into()));
        }
        document::check_configuration_type(manifest.config().media_type().as_ref())
            .map_err(|cause| self.refused(cause))?;
        let path = workspace.join("config");
        self.blob("fetch configuration".into(), manifest.config(), &path).await?;
        let text = tokio::fs::read_to_string(&path).await.map_err(file("read configuration", &path))?;
        let config = document::configuration(&text)
            .map_err(|error| self.refused(format!("the configuration does not read: {error}")))?;
        Ok((text, config))
    }

    /// The layers, checked for their number and types.
    fn layers<'a>(
        &self,
        manifest: &'a ImageManifest,
        diff_ids: &[String],
    ) -> Result<&'a [Descriptor], Error> {
        if diff_ids.len() != manifest.layers().len() {
            return Err(self.refused(format!(
                "{} layers, and the configuration speaks of {}",
                manifest.layers().len(),
                diff_ids.len()
            )));
        }
        let mut types = manifest.layers().iter().map(|layer| layer.media_type().to_string());
        match types.find(|media_type| !is_layer(media_type)) {
            Some(unknown) => Err(self.refused(format!("a layer is of unknown type `{unknown}`"))),
            None => Ok(manifest.layers()),
        }
    }

    async fn fetch(&self, layers: &[Descriptor], workspace: &Path) -> Result<(), Error> {
        let count = layers.len();
        let mut fetches = Vec::with_capacity(count);
        for (number, layer) in layers.iter().enumerate() {
            let stage = format!("fetch layer {} of {count}", number + 1);
            fetches
                .push(async move { self.blob(stage, layer, &unpack::layer_path(workspace, number)).await });
        }
        futures::stream::iter(fetches).buffer_unordered(PARALLEL).try_collect::<()>().await
    }

    async fn blob(&self, stage: String, blob: &Descriptor, path: &Path) -> Result<(), Error> {
        let mut rounds = Rounds::new(&self.sources, Wanted::Content);
        while let Some(source) = rounds.next().await {
            match self.try_blob(source, &stage, blob, path).await {
                Ok(()) => return Ok(()),
                Err((error, passing)) => rounds.failed(error, passing),
            }
        }
        Err(rounds.error(|| self.refused("hosts.toml lets no host be pulled from".into())))
    }

    /// Asks one source. An error comes with whether trying again may help.
    async fn try_blob(
        &self,
        source: &Source,
        stage: &str,
        blob: &Descriptor,
        path: &Path,
    ) -> Result<(), (Error, bool)> {
        let disk = |error| (file("write", path)(error), false);
        let digest = blob.digest().to_string();
        let mut response = source.registry.blob(&digest).await.map_err(|failure| {
            let passing = failure.may_pass();
            (self.registry(stage, failure), passing)
        })?;
        let mut out = tokio::fs::File::create(path).await.map_err(disk)?;
        let (mut length, mut hash) = (0u64, Sha256::new());
        while let Some(chunk) = response.chunk().await.map_err(|error| match error.is_timeout() {
            true => (self.stalled(stage), false),
            false => (self.failed(stage, format!("the transfer broke: {}", chain(&error))), true),
        })? {
            length = length.saturating_add(chunk.len() as u64);
            if length > blob.size() {
                return Err((
                    self.refused(format!(
                        "{stage}: {digest} is longer than the {} bytes promised",
                        blob.size()
                    )),
                    false,
                ));
            }
            hash.update(&chunk);
            out.write_all(&chunk).await.map_err(disk)?;
        }
        out.flush().await.map_err(disk)?;
        if length < blob.size() {
            let cause = format!("{stage}: {digest} is truncated: {length} of {} bytes", blob.size());
            return Err((self.refused(cause), true));
        }
        let found = format!("sha256:{}", hex(&hash.finalize()));
        if found != digest {
            return Err((self.refused(format!("{stage}: {digest} came with digest {found}")), false));
        }
        Ok(())
    }

    fn refused(&self, cause: String) -> Error {
        Error::Refused { reference: self.name.clone(), cause }
    }

    fn failed(&self, stage: &str, cause: String) -> Error {
        Error::Registry { reference: self.name.clone(), stage: stage.into(), cause }
    }

    fn stalled(&self, stage: &str) -> Error {
        Error::Timeout {
            reference: self.name.clone(),
            stage: stage.into(),
            cause: format!(
                "not a byte from the registry for {} s",
                self.store.config.stall_timeout.as_secs()
            ),
        }
    }

    fn registry(&self, stage: &str, failure: registry::Failure) -> Error {
        let (reference, cause) = (self.name.clone(), failure.to_string());
        match failure {
            failure if failure.is_timeout() => self.stalled(stage),
            failure if failure.is_unauthorized() => Error::Unauthorized { reference, cause },
            failure if failure.is_not_found() => Error::NotFound { reference, cause },
            registry::Failure::TooLarge(_) => self.refused(format!("{stage}: {cause}")),
            _ => self.failed(stage, cause),
        }
    }
}

/// Whether an index says that an entry is for Linux on this machine. Only the first
/// variant runs on every such machine.
fn is_for(entry: &Descriptor, machine: &str) -> bool {
    entry.platform().as_ref().is_some_and(|platform| {
        platform.os().to_string() == "linux"
            && platform.architecture().to_string() == machine
            && matches!(platform.variant().as_deref(), None | Some("" | "v1"))
    })
}

async fn pause(tries: u32) {
    tokio::time::sleep(Duration::from_millis(200) * 2u32.pow(tries)).await;
}
