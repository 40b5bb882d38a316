//! Templates: a VM that has booted until its agent waits, saved once for
//! its key, so that the VMs of pods begin there.
//!
//! ```text
//! <state>/templates/<boot>-<key>/state    vCPUs and devices
//! <state>/templates/<boot>-<key>/memory   guest memory, mapped privately by all clones
//! ```
//!
//! `boot` names the boot of the host: a template does not outlive the kernel under
//! which it was made. `key` is a hash of all that must be the same: kernel,
//! root file system and VMM, vCPUs, memory, disks. The VM is saved
//! before it is a pod; a clone gets its clock, its random numbers, its addresses
//! and its name from the agent's `CreateSandbox`, as a VM that booted does.
//!
//! No pod waits for a template. Those of the sizes that pods without limits have are made when
//! huskd starts; any other when its key is asked for the second time, after the
//! pod that asked has its VM. A VM boots while its key has no template, and always if it
//! cannot have one, because it has several network interfaces or cannot be saved.

use std::collections::HashSet;
use std::fmt;
use std::fs::{self, File};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use futures::FutureExt;
use futures::future::BoxFuture;
use husk_base::id::{SandboxId, hex};
use husk_base::{blocking, crash, lock};
use husk_config::VmHandler;
use husk_proto::agent::ContainerStatsRequest;
use sha2::{Digest, Sha256};
use tokio::sync::Semaphore;

use super::launch::{self, Launched, MAIN_MAC, Nic, Plan};
use super::{Control, Error, SandboxDisks};

/// How many templates are kept on disk; the oldest are removed.
const MAX: usize = 8;
/// How many keys are remembered to have been asked for.
const MAX_SEEN: usize = 256;
/// The longest time until the guest has closed the connections that huskd has closed.
const HANG_UP: Duration = Duration::from_secs(5);

/// Makes a tap that is connected to nothing, for the network interface of a VM
/// that shall become a template.
#[derive(Clone)]
pub struct MakeTap(Arc<dyn Fn() -> BoxFuture<'static, io::Result<OwnedFd>> + Send + Sync>);

impl MakeTap {
    /// Wraps `make`, which is called for each template.
    pub fn new<F>(make: impl Fn() -> F + Send + Sync + 'static) -> Self
    where
        F: Future<Output = io::Result<OwnedFd>> + Send + 'static,
    {
        Self(Arc::new(move || make().boxed()))
    }

    fn call(&self) -> BoxFuture<'static, io::Result<OwnedFd>> {
        (self.0)()
    }
}

impl fmt::Debug for MakeTap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("MakeTap")
    }
}

/// The templates of a node.
#[derive(Debug)]
pub struct Templates {
    /// The directory of the templates.
    dir: PathBuf,
    /// The run directories of VMs that shall become templates.
    run_dir: PathBuf,
    disks: Arc<SandboxDisks>,
    make_tap: MakeTap,
    known: Mutex<Known>,
    /// Held while a template is made: one at a time.
    making: Semaphore,
}

/// The keys that were asked for.
#[derive(Debug, Default)]
struct Known {
    /// Keys that were asked for at least once.
    seen: HashSet<String>,
    /// Keys whose VMs cannot be saved.
    unsupported: HashSet<String>,
}

/// The open files of a template.
#[derive(Debug)]
pub struct Template {
    /// The state of vCPUs and devices.
    pub state: File,
    /// The guest memory.
    pub memory: File,
}

/// The reason for which no template was made.
enum Failure {
    /// The VM did not start. A pod's own would not either.
    Boot(Error),
    /// The VM cannot be saved.
    Save(Error),
}

impl Templates {
    /// Keeps templates below `state_dir`.
    #[must_use]
    pub fn new(state_dir: &Path, run_dir: &Path, disks: Arc<SandboxDisks>, make_tap: MakeTap) -> Self {
        Self {
            dir: state_dir.join("templates"),
            run_dir: run_dir.join("templates"),
            disks,
            make_tap,
            known: Mutex::default(),
            making: Semaphore::new(1),
        }
    }

    /// Removes templates that an earlier huskd had not finished, and those of an
    /// earlier boot of the host.
    pub async fn recover(&self) {
        self.end_making().await;
        let this_boot = host_boot();
        for folder in entries(&self.dir).await {
            let name = folder.file_name().unwrap_or_default().to_string_lossy().into_owned();
            if !name.starts_with(&this_boot) || name.ends_with(".new") {
                remove(&folder).await;
            }
        }
    }

    /// Ends VMs that shall become templates: huskd is about to end, or has
    /// just started.
    pub async fn end_making(&self) {
        for folder in entries(&self.run_dir).await {
            if let Err(error) = super::destroy(&folder).await {
                tracing::warn!(path = %folder.display(), %error, "failed to end the VM of a template");
            }
        }
    }

    /// Makes the template for pods of the handler that have no limits, unless there is one.
    pub async fn prepare(&self, handler: &VmHandler) {
        let Some(key) = TemplateKey::of(handler, handler.vcpus, handler.memory_mib).await else { return };
        if self.open(&key).await.is_none() {
            self.make(key).await;
        }
    }

    /// Starts a VM, as a clone if there is a template of its key.
    ///
    /// # Errors
    /// As for [`launch::launch`].
    pub async fn launch(self: &Arc<Self>, plan: &Plan<'_>) -> Result<Launched, Error> {
        // A template has one network interface.
        let key = match plan.nics.len() {
            1 => TemplateKey::of(plan.handler, plan.vcpus, plan.memory_mib).await,
            _ => None,
        };
        let Some(key) = key else { return launch::launch(plan, None).await };
        if let Some(template) = self.open(&key).await {
            match launch::launch(plan, Some(template)).await {
                Ok(launched) => return Ok(launched),
                Err(error) => {
                    tracing::warn!(%error, "failed to clone a VM; booting one instead");
                    remove(&self.dir.join(&key.name)).await;
                    super::destroy(&plan.run_dir).await?;
                }
            }
        }
        let launched = launch::launch(plan, None).await?;
        if self.is_wanted(&key) {
            let templates = self.clone();
            tokio::spawn(async move { templates.make(key).await });
        }
        Ok(launched)
    }

    /// Whether a key that has no template should get one: it was asked for before, and its VM
    /// can be saved as far as is known.
    fn is_wanted(&self, key: &TemplateKey) -> bool {
        let mut known = lock(&self.known);
        if known.unsupported.contains(&key.name) {
            return false;
        }
        // Pods may have ever other sizes.
        if known.seen.len() >= MAX_SEEN {
            known.seen.clear();
        }
        !known.seen.insert(key.name.clone())
    }

    /// Makes the template of a key, unless another is being made: the key will be asked
    /// for again.
    async fn make(&self, key: TemplateKey) {
        let Ok(_one_at_a_time) = self.making.try_acquire() else { return };
        if self.open(&key).await.is_some() {
            return;
        }
        match make(&key, &self.place(&key), &self.disks, &self.make_tap).await {
            Ok(()) => self.evict().await,
            Err(Failure::Boot(error)) => {
                tracing::warn!(template = key.name, %error, "failed to start the VM of a template; trying again when it is wanted");
            }
            Err(Failure::Save(error)) => {
                tracing::warn!(template = key.name, %error, "failed to save a template; VMs of this size will boot");
                lock(&self.known).unsupported.insert(key.name);
            }
        }
    }

    async fn open(&self, key: &TemplateKey) -> Option<Template> {
        let folder = self.dir.join(&key.name);
        let open = async |name| Some(tokio::fs::File::open(folder.join(name)).await.ok()?.into_std().await);
        Some(Template { state: open("state").await?, memory: open("memory").await? })
    }

    fn place(&self, key: &TemplateKey) -> Place {
        Place { folder: self.dir.join(&key.name), run_dir: self.run_dir.join(&key.name) }
    }

    /// Removes the oldest templates. Clones keep the memory that they have mapped, so a
    /// template can be removed at any time.
    async fn evict(&self) {
        let mut all = entries(&self.dir).await;
        #[expect(clippy::disallowed_methods, reason = "it runs where it may block")]
        let made = |folder: &PathBuf| fs::metadata(folder).and_then(|metadata| metadata.modified()).ok();
        all = blocking(move || {
            all.sort_by_cached_key(made);
            all
        })
        .await;
        for folder in all.iter().take(all.len().saturating_sub(MAX)) {
            remove(folder).await;
        }
    }
}

/// All that must be the same in a VM and its template.
#[derive(Clone, Debug)]
struct TemplateKey {
    name: String,
    handler: VmHandler,
    vcpus: u8,
    memory_mib: u32,
}

impl TemplateKey {
    /// The key of a handler's VMs of this size; `None` for a handler without templates.
    async fn of(handler: &VmHandler, vcpus: u8, memory_mib: u32) -> Option<Self> {
        let handler = handler.clone();
        blocking(move || Self::new(&handler, vcpus, memory_mib)).await
    }

    /// As [`Self::of`]. The call blocks.
    #[expect(clippy::disallowed_methods, reason = "it runs where it may block")]
    fn new(handler: &VmHandler, vcpus: u8, memory_mib: u32) -> Option<Self> {
        if !handler.template {
            return None;
        }
        let mut hash = Sha256::new();
        hash.update(env!("CARGO_PKG_VERSION"));
        for file in [&handler.vmm, &handler.kernel, &handler.rootfs] {
            // A file that is not there makes a key all the same: no VM starts without it.
            let identity = fs::metadata(file).map_or([0; 5], |file| {
                [
                    file.dev(),
                    file.ino(),
                    file.size(),
                    file.mtime().cast_unsigned(),
                    file.mtime_nsec().cast_unsigned(),
                ]
            });
            hash.update(format!("{} {identity:?}\n", file.display()));
        }
        let VmHandler { disk_mib, image_slots, kernel_cmdline, .. } = handler;
        hash.update(format!("{vcpus} {memory_mib} {disk_mib} {image_slots} {kernel_cmdline}"));
        let digest = hex(&hash.finalize()[..8]);
        Some(Self { name: format!("{}-{digest}", host_boot()), handler: handler.clone(), vcpus, memory_mib })
    }
}

/// A name for this boot of the host.
#[expect(clippy::disallowed_methods, reason = "a file of /proc waits for no disk")]
fn host_boot() -> String {
    let id = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    id.chars().take(8).collect()
}

/// The directories in which a template is made.
struct Place {
    folder: PathBuf,
    run_dir: PathBuf,
}

/// Boots a VM and saves it. The template appears as a whole, and nothing else stays.
async fn make(
    key: &TemplateKey,
    place: &Place,
    disks: &SandboxDisks,
    make_tap: &MakeTap,
) -> Result<(), Failure> {
    let started = Instant::now();
    let work = place.folder.with_extension("new");
    remove(&work).await;
    super::destroy(&place.run_dir).await.map_err(Failure::Boot)?;
    let made = make_in(key, place, &work, disks, make_tap).await;
    if let Err(error) = super::destroy(&place.run_dir).await {
        tracing::warn!(template = key.name, %error, "failed to end the VM of a template");
    }
    let made = match made {
        Ok(()) => publish(&work, &place.folder).await,
        failed => failed,
    };
    if made.is_err() {
        remove(&work).await;
    } else {
        let took_ms = u64::try_from(started.elapsed().as_millis()).unwrap_or(u64::MAX);
        tracing::info!(template = key.name, took_ms, memory_mib = key.memory_mib, "template saved");
    }
    made
}

async fn publish(work: &Path, folder: &Path) -> Result<(), Failure> {
    // A template that is there could not be opened, so it is damaged.
    remove(folder).await;
    crash::point("template to be published");
    let renamed = tokio::fs::rename(work, folder).await;
    renamed.map_err(Error::file("publish", folder)).map_err(Failure::Save)
}

async fn make_in(
    key: &TemplateKey,
    place: &Place,
    work: &Path,
    disks: &SandboxDisks,
    make_tap: &MakeTap,
) -> Result<(), Failure> {
    let failed = |what: &Path| Error::file("make", what);
    tokio::fs::create_dir_all(work).await.map_err(failed(work)).map_err(Failure::Save)?;
    let disk = work.join("disk");
    disks
        .create(&disk, key.handler.disk_mib)
        .await
        .map_err(|error| Failure::Boot(Error::file("make", &disk)(io::Error::other(error))))?;
    let tap = make_tap.call().await.map_err(Error::file("make a tap for", work)).map_err(Failure::Boot)?;
    let id = SandboxId::from(format!("template-{}", key.name).as_str());
    let plan = Plan {
        id: &id,
        handler: &key.handler,
        vcpus: key.vcpus,
        memory_mib: key.memory_mib,
        limits: &key.handler.limits,
        run_dir: place.run_dir.clone(),
        scratch: disk.clone(),
        nics: vec![Nic { tap, mac: MAIN_MAC }],
        cgroup: None,
    };
    let Launched { vmm, agent, .. } = launch::launch(&plan, None).await.map_err(Failure::Boot)?;
    // Any answer shows that the agent has set itself up.
    let asked = agent
        .call("try the agent", async |mut agent| {
            agent.container_stats(ContainerStatsRequest::default()).await
        })
        .await;
    if let Err(error) = asked
        && error.status.code() == tonic::Code::DeadlineExceeded
    {
        return Err(Failure::Boot(Error::Agent(error.to_string())));
    }
    let control = vmm.control.clone();
    drop(agent);
    hang_up(&control).await.map_err(Failure::Save)?;

    crash::point("template to be saved");
    let create = async |name: &str| {
        let path = work.join(name);
        let file = tokio::fs::File::create_new(&path).await.map_err(failed(&path)).map_err(Failure::Save)?;
        Ok(file.into_std().await)
    };
    let (state, memory) = (create("state").await?, create("memory").await?);
    control.save(state, memory).await.map_err(Failure::Save)?;
    tokio::fs::remove_file(&disk).await.map_err(failed(&disk)).map_err(Failure::Save)
}

/// Waits until the guest has no connection open, because a clone could not go on with it.
async fn hang_up(control: &Control) -> Result<(), Error> {
    let begun = Instant::now();
    while control.info().await?.connections > 0 {
        if begun.elapsed() > HANG_UP {
            return Err(Error::Agent("the guest does not close its connections".into()));
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    Ok(())
}

#[expect(clippy::disallowed_methods, reason = "it runs where it may block")]
async fn entries(folder: &Path) -> Vec<PathBuf> {
    let folder = folder.to_owned();
    blocking(|| fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path()).collect())
        .await
}

async fn remove(folder: &Path) {
    match tokio::fs::remove_dir_all(folder).await {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            tracing::warn!(path = %folder.display(), %error, "failed to remove a template");
        }
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn handler(folder: &Path) -> VmHandler {
        for name in ["vmm", "kernel", "rootfs"] {
            fs::write(folder.join(name), name).unwrap();
        }
        let place = |name| folder.join(name);
        let (vmm, kernel, rootfs) = (place("vmm"), place("kernel"), place("rootfs"));
        VmHandler { vmm, kernel, rootfs, template: true, ..VmHandler::default() }
    }

    fn templates(folder: &Path) -> Templates {
        let disks = Arc::new(SandboxDisks::new(folder.join("scratch")));
        let make_tap = MakeTap::new(|| async { Err(io::ErrorKind::Unsupported.into()) });
        Templates::new(&folder.join("state"), &folder.join("run"), disks, make_tap)
    }

    #[test]
    fn a_key_is_all_that_a_clone_shares() {
        let folder = tempfile::tempdir().unwrap();
        let handler = handler(folder.path());
        let name =
            |handler: &VmHandler, vcpus, memory| TemplateKey::new(handler, vcpus, memory).unwrap().name;
        let one = name(&handler, 1, 256);
        assert_eq!(one, name(&handler, 1, 256));
        let mut all = HashSet::from([one, name(&handler, 2, 256), name(&handler, 1, 512)]);
        all.insert(name(&VmHandler { disk_mib: 99, ..handler.clone() }, 1, 256));
        all.insert(name(&VmHandler { image_slots: 2, ..handler.clone() }, 1, 256));
        all.insert(name(&VmHandler { kernel_cmdline: "x".into(), ..handler.clone() }, 1, 256));
        fs::write(&handler.kernel, "another one").unwrap();
        all.insert(name(&handler, 1, 256));
        assert_eq!(all.len(), 7);
    }

    #[tokio::test]
    async fn what_was_left_half_made_or_by_another_boot_goes() {
        let folder = tempfile::tempdir().unwrap();
        let templates = templates(folder.path());
        let good = TemplateKey::new(&handler(folder.path()), 1, 256).unwrap();
        let half = format!("{}.new", good.name);
        for name in [&good.name, &half, "00000000-1", "something"] {
            fs::create_dir_all(templates.dir.join(name)).unwrap();
            fs::write(templates.dir.join(name).join("state"), "").unwrap();
            fs::write(templates.dir.join(name).join("memory"), "").unwrap();
        }
        templates.recover().await;
        assert_eq!(entries(&templates.dir).await, [templates.dir.join(&good.name)]);
        assert!(templates.open(&good).await.is_some());
    }

    #[test]
    fn a_template_is_wanted_when_its_key_is_asked_for_again() {
        let folder = tempfile::tempdir().unwrap();
        let templates = templates(folder.path());
        let handler = handler(folder.path());
        let key = |memory| TemplateKey::new(&handler, 1, memory).unwrap();
        assert!(!templates.is_wanted(&key(256)) && !templates.is_wanted(&key(512)));
        assert!(templates.is_wanted(&key(256)) && templates.is_wanted(&key(256)));
        lock(&templates.known).unsupported.insert(key(256).name);
        assert!(!templates.is_wanted(&key(256)) && templates.is_wanted(&key(512)));
        for memory in 1000..1000 + 2 * u32::try_from(MAX_SEEN).unwrap() {
            templates.is_wanted(&key(memory));
        }
        assert!(lock(&templates.known).seen.len() <= MAX_SEEN);
    }

    #[tokio::test]
    async fn the_oldest_templates_go() {
        let folder = tempfile::tempdir().unwrap();
        let templates = templates(folder.path());
        for number in 0..MAX + 2 {
            fs::create_dir_all(templates.dir.join(number.to_string())).unwrap();
            std::thread::sleep(Duration::from_millis(20));
        }
        templates.evict().await;
        assert_eq!(entries(&templates.dir).await.len(), MAX);
        assert!(!templates.dir.join("0").exists() && !templates.dir.join("1").exists());
    }

    #[test]
    fn a_handler_without_templates_has_none() {
        let folder = tempfile::tempdir().unwrap();
        let handler = VmHandler { template: false, ..handler(folder.path()) };
        assert!(TemplateKey::new(&handler, 1, 256).is_none());
    }
}
