//! A pod whose containers run this program.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use husk_proto::cri::{
    AttachRequest, ContainerConfig, ContainerMetadata, CreateContainerRequest, ExecRequest, ExecSyncRequest,
    Mount, PodSandboxConfig, RemoveContainerRequest, RemovePodSandboxRequest, RunPodSandboxRequest,
    StartContainerRequest, StopPodSandboxRequest, runtime_service_client::RuntimeServiceClient,
};
use tonic::transport::Channel;

use crate::cri::{Client, image_spec, pod_config};

/// Paths of this program and of the volume in a container.
const PROGRAM: &str = "/husk-bench";
pub const VOLUME: &str = "/volume";

/// The interval at which a log is read.
const LOOK: Duration = Duration::from_millis(10);

pub struct Pod {
    runtime: RuntimeServiceClient<Channel>,
    config: PodSandboxConfig,
    image: String,
    mounts: Vec<Mount>,
    timeout: Duration,
    pub sandbox: String,
}

impl Pod {
    /// Makes a pod whose logs and volume are in `folder`.
    pub async fn run(client: &Client, image: &str, folder: &Path) -> anyhow::Result<Self> {
        let (logs, volume) = (folder.join("logs"), folder.join("volume"));
        for folder in [&logs, &volume] {
            std::fs::create_dir_all(folder).with_context(|| format!("make {}", folder.display()))?;
        }
        let program = std::env::current_exe().context("find this program")?;
        let mount = |container_path: &str, host_path: &Path, readonly| Mount {
            container_path: container_path.into(),
            host_path: host_path.display().to_string(),
            readonly,
            ..Default::default()
        };
        let mounts = vec![mount(PROGRAM, &program, true), mount(VOLUME, &volume, false)];

        let mut config = pod_config("streams");
        config.log_directory = logs.display().to_string();
        let (mut runtime, timeout) = (client.runtime(), client.timeout());
        let request =
            RunPodSandboxRequest { config: Some(config.clone()), runtime_handler: client.handler().into() };
        let answer = runtime.run_pod_sandbox(request).await.context("RunPodSandbox")?;
        let sandbox = answer.into_inner().pod_sandbox_id;
        Ok(Self { runtime, config, image: image.into(), mounts, timeout, sandbox })
    }

    /// Removes the pod with its containers.
    pub async fn end(mut self) -> anyhow::Result<()> {
        let stop = StopPodSandboxRequest { pod_sandbox_id: self.sandbox.clone() };
        self.runtime.stop_pod_sandbox(stop).await.context("StopPodSandbox")?;
        let remove = RemovePodSandboxRequest { pod_sandbox_id: self.sandbox };
        self.runtime.remove_pod_sandbox(remove).await.context("RemovePodSandbox")?;
        Ok(())
    }

    /// Starts `husk-bench inside` with these arguments.
    pub async fn start(&mut self, name: &str, arguments: &[&str], stdin: bool) -> anyhow::Result<Container> {
        let log_path = format!("{name}.log");
        let config = ContainerConfig {
            metadata: Some(ContainerMetadata { name: name.into(), attempt: 0 }),
            image: Some(image_spec(&self.image)),
            command: vec![PROGRAM.into(), "inside".into()],
            args: arguments.iter().map(|&word| word.into()).collect(),
            mounts: self.mounts.clone(),
            log_path: log_path.clone(),
            stdin,
            ..Default::default()
        };
        let request = CreateContainerRequest {
            pod_sandbox_id: self.sandbox.clone(),
            config: Some(config),
            sandbox_config: Some(self.config.clone()),
        };
        let answer = self.runtime.create_container(request).await.context("CreateContainer")?;
        let id = answer.into_inner().container_id;
        let request = StartContainerRequest { container_id: id.clone() };
        self.runtime.start_container(request).await.context("StartContainer")?;
        let path = Path::new(&self.config.log_directory).join(log_path);
        Ok(Container { id, log: Log { path, timeout: self.timeout } })
    }

    /// Removes a container, whether it runs or not, with its log.
    pub async fn remove(&mut self, container: Container) -> anyhow::Result<()> {
        let request = RemoveContainerRequest { container_id: container.id };
        self.runtime.remove_container(request).await.context("RemoveContainer")?;
        std::fs::remove_file(container.log.path).context("remove a log")
    }

    /// Runs ExecSync and returns what the command printed.
    pub async fn exec_sync(&mut self, container: &Container, command: &[&str]) -> anyhow::Result<Vec<u8>> {
        let request = ExecSyncRequest {
            container_id: container.id.clone(),
            cmd: words(command),
            timeout: self.timeout.as_secs().try_into().unwrap_or(i64::MAX),
        };
        let answer = self.runtime.exec_sync(request).await.context("ExecSync")?.into_inner();
        let errors = String::from_utf8_lossy(&answer.stderr);
        ensure!(answer.exit_code == 0, "{command:?} ended with status {}: {errors}", answer.exit_code);
        Ok(answer.stdout)
    }

    /// Runs `husk-bench inside` with ExecSync.
    pub async fn inside(&mut self, container: &Container, arguments: &[&str]) -> anyhow::Result<Vec<u8>> {
        self.exec_sync(container, &[&[PROGRAM, "inside"], arguments].concat()).await
    }

    /// Asks for the URL of a command's streams: its output, and no input.
    pub async fn exec(&mut self, container: &Container, command: &[&str]) -> anyhow::Result<String> {
        let request = ExecRequest {
            container_id: container.id.clone(),
            cmd: words(command),
            stdout: true,
            ..Default::default()
        };
        Ok(self.runtime.exec(request).await.context("Exec")?.into_inner().url)
    }

    /// Asks for the URL of a container's streams: its input and output.
    pub async fn attach(&mut self, container: &Container) -> anyhow::Result<String> {
        let container_id = container.id.clone();
        let request = AttachRequest { container_id, stdin: true, stdout: true, ..Default::default() };
        Ok(self.runtime.attach(request).await.context("Attach")?.into_inner().url)
    }
}

fn words(command: &[&str]) -> Vec<String> {
    command.iter().map(|&word| word.into()).collect()
}

/// A container that has been started.
pub struct Container {
    id: String,
    pub log: Log,
}

/// A container's log, in the CRI format.
pub struct Log {
    pub path: PathBuf,
    /// The time limit for the log to grow.
    pub timeout: Duration,
}

impl Log {
    /// Waits until the log has something for which `is_it` is true.
    pub async fn wait_for(&self, is_it: impl Fn(&Self) -> std::io::Result<bool>) -> anyhow::Result<()> {
        let deadline = Instant::now() + self.timeout;
        while !is_it(self).with_context(|| format!("read {}", self.path.display()))? {
            if Instant::now() > deadline {
                bail!("{} does not grow to what it should be", self.path.display());
            }
            tokio::time::sleep(LOOK).await;
        }
        Ok(())
    }

    /// Whether the log has anything in it.
    pub fn has_begun(&self) -> std::io::Result<bool> {
        Ok(self.path.metadata()?.len() > 0)
    }
}
