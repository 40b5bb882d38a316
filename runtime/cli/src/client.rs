//! Shared by the subcommands: a CRI client of huskd, pods by the names that a person has for
//! them, and their VMs.

use std::collections::HashMap;
use std::path::Path;
use std::time::Duration;

use anyhow::bail;
use husk_base::dirs::sandbox_run_dir;
use husk_base::id::SandboxId;
use husk_config::Config;
use husk_proto::cri;
use husk_proto::cri::image_service_client::ImageServiceClient;
use husk_proto::cri::runtime_service_client::RuntimeServiceClient;
use husk_vm::Control;
use hyper_util::rt::TokioIo;
use serde_json::Value;
use tokio::net::UnixStream;
use tonic::transport::{Channel, Endpoint};

/// The time limit of a request that only asks.
const TIMEOUT: Duration = Duration::from_secs(10);

/// The time limit of a request that has something done: images come from far away, and stopping
/// a container takes as long as its user allows.
const WORK_TIMEOUT: Duration = Duration::from_secs(3600);

/// A connection to huskd.
pub type Client = RuntimeServiceClient<Channel>;

/// A connection to the images of huskd.
pub type Images = ImageServiceClient<Channel>;

/// Connects to huskd.
pub async fn connect(socket: &Path) -> anyhow::Result<Client> {
    Ok(RuntimeServiceClient::new(channel(socket, TIMEOUT).await?))
}

/// Connects to the images of huskd.
pub async fn images(socket: &Path) -> anyhow::Result<Images> {
    images_within(socket, TIMEOUT).await
}

/// The same with another time limit of a request.
pub async fn images_within(socket: &Path, limit: Duration) -> anyhow::Result<Images> {
    // An answer with many images is longer than tonic's limit of 4 MiB.
    Ok(ImageServiceClient::new(channel(socket, limit).await?).max_decoding_message_size(64 << 20))
}

/// Connects to huskd, for requests that take their time.
pub async fn connect_for_work(socket: &Path) -> anyhow::Result<Client> {
    Ok(RuntimeServiceClient::new(channel(socket, WORK_TIMEOUT).await?))
}

/// A connection whose requests have this time limit.
pub async fn channel(socket: &Path, limit: Duration) -> anyhow::Result<Channel> {
    let path = socket.to_owned();
    // The address is not used: the connector has the socket's path.
    let channel = Endpoint::from_static("http://localhost")
        .timeout(limit)
        .connect_with_connector(tower::service_fn(move |_| {
            let path = path.clone();
            async move { UnixStream::connect(path).await.map(TokioIo::new) }
        }))
        .await;
    match channel {
        Ok(channel) => Ok(channel),
        Err(error) => bail!("huskd does not answer on {}: {}", socket.display(), cause(&error)),
    }
}

/// The first cause, which is the kernel's error. The errors around it only say that there was
/// one.
fn cause(error: &dyn std::error::Error) -> String {
    let mut cause = error;
    while let Some(source) = cause.source() {
        cause = source;
    }
    cause.to_string()
}

/// All pods.
pub async fn pods(client: &mut Client) -> anyhow::Result<Vec<cri::PodSandbox>> {
    let request = cri::ListPodSandboxRequest::default();
    let answer = client.list_pod_sandbox(request).await.map_err(said)?;
    Ok(answer.into_inner().items)
}

/// One pod's status, with the verbose part.
pub async fn status(client: &mut Client, id: &str) -> anyhow::Result<cri::PodSandboxStatusResponse> {
    let request = cri::PodSandboxStatusRequest { pod_sandbox_id: id.to_owned(), verbose: true };
    Ok(client.pod_sandbox_status(request).await.map_err(said)?.into_inner())
}

/// The verbose part of an answer, which CRI leaves to the runtime; null if there is none.
pub fn info(verbose: &HashMap<String, String>) -> Value {
    verbose.get("info").and_then(|text| serde_json::from_str(text).ok()).unwrap_or_default()
}

/// Stops a pod: its containers, and its VM.
pub async fn stop_pod(client: &mut Client, id: &str) -> anyhow::Result<()> {
    let request = cri::StopPodSandboxRequest { pod_sandbox_id: id.to_owned() };
    client.stop_pod_sandbox(request).await.map_err(said)?;
    Ok(())
}

/// The reason for which huskd cannot reach a pod that lives and does not answer.
pub fn unreached(status: &cri::PodSandboxStatusResponse) -> Option<String> {
    Some(info(&status.info).get("unreached")?.as_str()?.to_owned())
}

/// The configuration with which a pod was made, as the verbose part of its status has it.
pub fn pod_config(status: &cri::PodSandboxStatusResponse) -> cri::PodSandboxConfig {
    let config = info(&status.info).get_mut("config").map(Value::take);
    config.and_then(|config| serde_json::from_value(config).ok()).unwrap_or_default()
}

/// Turns a refusal into an error with huskd's message.
pub fn said(status: tonic::Status) -> anyhow::Error {
    anyhow::anyhow!("huskd: {}", status.message())
}

/// The pod that a person means by the beginning of its id, its name, or its
/// namespace and name.
pub fn find<'a>(pods: &'a [cri::PodSandbox], wanted: &str) -> anyhow::Result<&'a cri::PodSandbox> {
    let is_wanted = |pod: &&cri::PodSandbox| {
        let names = pod.metadata.as_ref().is_some_and(|metadata| {
            metadata.name == wanted || format!("{}/{}", metadata.namespace, metadata.name) == wanted
        });
        names || (!wanted.is_empty() && pod.id.starts_with(wanted))
    };
    let mut found = pods.iter().filter(is_wanted);
    match (found.next(), found.next()) {
        (Some(pod), None) => Ok(pod),
        (None, _) => bail!("there is no pod {wanted}: `husk pods` lists them"),
        (Some(_), Some(_)) => bail!("{wanted} is more than one pod: use its id"),
    }
}

/// The id of the pod that a person means. VMs live on without huskd, and
/// that is when a person wants to see them: then only the id works.
async fn find_id(config: &Config, wanted: &str) -> anyhow::Result<String> {
    match connect(&config.socket).await {
        Ok(mut huskd) => Ok(find(&pods(&mut huskd).await?, wanted)?.id.clone()),
        Err(_) => Ok(wanted.to_owned()),
    }
}

/// The control socket of the VM of a pod that a person means, and the pod's id.
pub async fn vm(config: &Config, wanted: &str) -> anyhow::Result<(String, Control)> {
    let id = find_id(config, wanted).await?;
    match control(config, &id) {
        Some(control) => Ok((id, control)),
        None => bail!("pod {id} has no VM: its containers are the host's"),
    }
}

/// The control socket of a pod's VMM; none for a pod of host containers.
pub fn control(config: &Config, sandbox_id: &str) -> Option<Control> {
    let folder = sandbox_run_dir(&config.run_dir, &SandboxId::from(sandbox_id));
    (!husk_hostpod::owns(&folder)).then(|| Control::new(folder.join("vmm.sock")))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pod(id: &str, name: &str) -> cri::PodSandbox {
        let metadata =
            cri::PodSandboxMetadata { name: name.into(), namespace: "default".into(), ..Default::default() };
        cri::PodSandbox { id: id.into(), metadata: Some(metadata), ..Default::default() }
    }

    #[test]
    fn a_pod_that_cannot_be_reached_is_told_from_others() {
        let why = |info: &str| {
            let info = [("info".to_owned(), info.to_owned())].into();
            unreached(&cri::PodSandboxStatusResponse { info, ..Default::default() })
        };
        assert_eq!(why(r#"{"unreached":"no answer"}"#).as_deref(), Some("no answer"));
        assert_eq!(why(r#"{"unreached":null}"#), None);
        assert_eq!((why("{}"), why("?")), (None, None));
    }

    #[test]
    fn a_pod_is_found_by_id_and_by_name_and_never_guessed() {
        let pods = [pod("abc1", "web"), pod("abd2", "db")];
        assert_eq!(find(&pods, "abc").unwrap().id, "abc1");
        assert_eq!(find(&pods, "db").unwrap().id, "abd2");
        assert_eq!(find(&pods, "default/web").unwrap().id, "abc1");
        assert!(find(&pods, "ab").unwrap_err().to_string().contains("more than one"));
        assert!(find(&pods, "x").unwrap_err().to_string().contains("no pod x"));
        assert!(find(&pods, "").is_err());
    }
}
