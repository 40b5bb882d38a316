//! Runs a pod's steps over CRI and measures each of them.

use std::collections::HashMap;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use husk_proto::cri::{
    ContainerConfig, ContainerMetadata, CreateContainerRequest, ImageSpec, LinuxPodSandboxConfig,
    PodSandboxConfig, PodSandboxMetadata, PullImageRequest, RemoveContainerRequest, RemovePodSandboxRequest,
    RunPodSandboxRequest, StartContainerRequest, StopContainerRequest, StopPodSandboxRequest, VersionRequest,
    image_service_client::ImageServiceClient, runtime_service_client::RuntimeServiceClient,
};
use hyper_util::rt::TokioIo;
use tokio::net::UnixStream;
use tonic::transport::{Channel, Endpoint};

/// A runtime that serves CRI.
#[derive(Clone, Debug)]
pub struct Target {
    /// The runtime's name in the report.
    pub name: String,
    /// The runtime's endpoint: `unix://` and the path of its socket.
    pub endpoint: String,
    /// The runtime handler of its pods.
    pub handler: String,
}

impl FromStr for Target {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (name, rest) = text.split_once('=').ok_or("NAME=ENDPOINT[,HANDLER] is wanted")?;
        let (endpoint, handler) = rest.split_once(',').unwrap_or((rest, ""));
        if name.is_empty() || !endpoint.starts_with("unix://") {
            return Err("NAME=ENDPOINT[,HANDLER] is wanted, with an endpoint that begins with unix://".into());
        }
        Ok(Self { name: name.into(), endpoint: endpoint.into(), handler: handler.into() })
    }
}

impl Target {
    /// The path of its socket.
    pub fn socket(&self) -> PathBuf {
        self.endpoint.strip_prefix("unix://").unwrap_or(&self.endpoint).into()
    }
}

/// The steps in the order in which a pod goes through them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, serde::Serialize)]
pub enum Step {
    RunPodSandbox,
    CreateContainer,
    StartContainer,
    StopContainer,
    RemoveContainer,
    StopPodSandbox,
    RemovePodSandbox,
}

impl Step {
    pub const ALL: [Self; 7] = [
        Self::RunPodSandbox,
        Self::CreateContainer,
        Self::StartContainer,
        Self::StopContainer,
        Self::RemoveContainer,
        Self::StopPodSandbox,
        Self::RemovePodSandbox,
    ];
}

/// The time that each step of one pod took.
pub type Times = HashMap<Step, Duration>;

/// A connection to a runtime.
#[derive(Clone)]
pub struct Client {
    runtime: RuntimeServiceClient<Channel>,
    images: ImageServiceClient<Channel>,
    handler: String,
    timeout: Duration,
}

/// A pod with one running container.
#[derive(Debug)]
pub struct Pod {
    pub sandbox: String,
    container: String,
    pub times: Times,
}

impl Client {
    pub async fn connect(target: &Target, timeout: Duration) -> anyhow::Result<Self> {
        let socket = target.socket();
        let path = socket.clone();
        let channel = Endpoint::from_static("http://cri")
            .connect_timeout(Duration::from_secs(10))
            .timeout(timeout)
            .connect_with_connector(tower::service_fn(move |_| {
                let path = path.clone();
                async move { UnixStream::connect(path).await.map(TokioIo::new) }
            }))
            .await
            .with_context(|| format!("connect to {}: is the runtime running?", socket.display()))?;
        Ok(Self {
            runtime: RuntimeServiceClient::new(channel.clone()),
            images: ImageServiceClient::new(channel),
            handler: target.handler.clone(),
            timeout,
        })
    }

    /// The client, for requests that only one measurement makes.
    pub fn runtime(&self) -> RuntimeServiceClient<Channel> {
        self.runtime.clone()
    }

    pub fn handler(&self) -> &str {
        &self.handler
    }

    /// The time limit of a request.
    pub const fn timeout(&self) -> Duration {
        self.timeout
    }

    /// Name and version, as the runtime reports them.
    pub async fn version(&mut self) -> anyhow::Result<String> {
        let version = self.runtime.version(VersionRequest::default()).await.context("Version")?.into_inner();
        Ok(format!("{} {}", version.runtime_name, version.runtime_version))
    }

    pub async fn pull(&mut self, image: &str) -> anyhow::Result<Duration> {
        let request = PullImageRequest { image: Some(image_spec(image)), ..Default::default() };
        let started = Instant::now();
        self.images.pull_image(request).await.with_context(|| format!("PullImage {image}"))?;
        Ok(started.elapsed())
    }

    /// Does the first three steps. When one fails, what they made is removed.
    pub async fn start_pod(&mut self, name: &str, image: &str) -> anyhow::Result<Pod> {
        let mut times = Times::new();
        let config = pod_config(name);
        let request =
            RunPodSandboxRequest { config: Some(config.clone()), runtime_handler: self.handler.clone() };
        let started = Instant::now();
        let answer = self.runtime.run_pod_sandbox(request).await.context("RunPodSandbox")?;
        times.insert(Step::RunPodSandbox, started.elapsed());
        let sandbox = answer.into_inner().pod_sandbox_id;

        match self.start_container(&sandbox, config, image, &mut times).await {
            Ok(container) => Ok(Pod { sandbox, container, times }),
            Err(error) => {
                let stop = StopPodSandboxRequest { pod_sandbox_id: sandbox.clone() };
                let _ = self.runtime.stop_pod_sandbox(stop).await;
                let remove = RemovePodSandboxRequest { pod_sandbox_id: sandbox };
                let _ = self.runtime.remove_pod_sandbox(remove).await;
                Err(error)
            }
        }
    }

    async fn start_container(
        &mut self,
        sandbox: &str,
        sandbox_config: PodSandboxConfig,
        image: &str,
        times: &mut Times,
    ) -> anyhow::Result<String> {
        let request = CreateContainerRequest {
            pod_sandbox_id: sandbox.to_owned(),
            config: Some(container_config(image)),
            sandbox_config: Some(sandbox_config),
        };
        let started = Instant::now();
        let answer = self.runtime.create_container(request).await.context("CreateContainer")?;
        times.insert(Step::CreateContainer, started.elapsed());
        let container = answer.into_inner().container_id;

        let started = Instant::now();
        let request = StartContainerRequest { container_id: container.clone() };
        self.runtime.start_container(request).await.context("StartContainer")?;
        times.insert(Step::StartContainer, started.elapsed());
        Ok(container)
    }

    /// Does the other four steps.
    pub async fn end_pod(&mut self, pod: Pod) -> anyhow::Result<Times> {
        let Pod { sandbox: pod_sandbox_id, container: container_id, mut times } = pod;

        let started = Instant::now();
        let request = StopContainerRequest { container_id: container_id.clone(), timeout: 0 };
        self.runtime.stop_container(request).await.context("StopContainer")?;
        times.insert(Step::StopContainer, started.elapsed());

        let started = Instant::now();
        self.runtime
            .remove_container(RemoveContainerRequest { container_id })
            .await
            .context("RemoveContainer")?;
        times.insert(Step::RemoveContainer, started.elapsed());

        let started = Instant::now();
        let request = StopPodSandboxRequest { pod_sandbox_id: pod_sandbox_id.clone() };
        self.runtime.stop_pod_sandbox(request).await.context("StopPodSandbox")?;
        times.insert(Step::StopPodSandbox, started.elapsed());

        let started = Instant::now();
        let request = RemovePodSandboxRequest { pod_sandbox_id };
        self.runtime.remove_pod_sandbox(request).await.context("RemovePodSandbox")?;
        times.insert(Step::RemovePodSandbox, started.elapsed());
        Ok(times)
    }

    /// Starts all pods at once. A failure ends the measurement, after the other pods
    /// have been removed.
    pub async fn start_pods(&self, names: &[String], image: &str) -> anyhow::Result<Vec<Pod>> {
        let tasks: Vec<_> = names
            .iter()
            .map(|name| {
                let (mut client, name, image) = (self.clone(), name.clone(), image.to_owned());
                tokio::spawn(async move { client.start_pod(&name, &image).await })
            })
            .collect();
        let (mut pods, mut failure) = (Vec::new(), None);
        for task in tasks {
            match task.await.context("a task ended early")? {
                Ok(pod) => pods.push(pod),
                Err(error) => failure = Some(error),
            }
        }
        let Some(failure) = failure else { return Ok(pods) };
        let _ = self.end_pods(pods).await;
        Err(failure)
    }

    /// Ends all pods at once.
    pub async fn end_pods(&self, pods: Vec<Pod>) -> anyhow::Result<Vec<Times>> {
        let tasks: Vec<_> = pods
            .into_iter()
            .map(|pod| {
                let mut client = self.clone();
                tokio::spawn(async move { client.end_pod(pod).await })
            })
            .collect();
        let mut times = Vec::new();
        for task in tasks {
            times.push(task.await.context("a task ended early")??);
        }
        Ok(times)
    }

    /// Makes sure that the figures mean something: the container does run.
    pub async fn check_running(&mut self, pod: &Pod) -> anyhow::Result<()> {
        let request = husk_proto::cri::ExecSyncRequest {
            container_id: pod.container.clone(),
            cmd: vec!["echo".into(), "alive".into()],
            timeout: self.timeout.as_secs().try_into().unwrap_or(i64::MAX),
        };
        let answer = self.runtime.exec_sync(request).await.context("ExecSync")?.into_inner();
        if answer.stdout != b"alive\n" {
            bail!("the container does not run: {}", String::from_utf8_lossy(&answer.stderr));
        }
        Ok(())
    }
}

pub fn pod_config(name: &str) -> PodSandboxConfig {
    PodSandboxConfig {
        metadata: Some(PodSandboxMetadata {
            name: name.to_owned(),
            uid: format!("{name}-{}", std::process::id()),
            namespace: "husk-bench".into(),
            attempt: 0,
        }),
        hostname: name.to_owned(),
        linux: Some(LinuxPodSandboxConfig::default()),
        ..Default::default()
    }
}

fn container_config(image: &str) -> ContainerConfig {
    ContainerConfig {
        metadata: Some(ContainerMetadata { name: "sleeper".into(), attempt: 0 }),
        image: Some(image_spec(image)),
        command: vec!["sleep".into()],
        args: vec!["100000".into()],
        ..Default::default()
    }
}

pub fn image_spec(image: &str) -> ImageSpec {
    ImageSpec { image: image.to_owned(), ..Default::default() }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn peers_have_a_name_an_endpoint_and_perhaps_a_handler() {
        let kata: Target = "kata=unix:///run/c.sock,kata".parse().unwrap();
        assert_eq!((kata.name.as_str(), kata.handler.as_str()), ("kata", "kata"));
        assert_eq!(kata.socket(), PathBuf::from("/run/c.sock"));
        assert_eq!("runc=unix:///run/c.sock".parse::<Target>().unwrap().handler, "");
        for wrong in ["unix:///run/c.sock", "=unix:///x", "a=tcp://x"] {
            assert!(wrong.parse::<Target>().is_err(), "{wrong}");
        }
    }
}
