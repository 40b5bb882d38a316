//! `husk inspect`: everything about a container, and the state of a VM, for a guest that hangs.

use anyhow::{Context, bail};
use husk_config::Config;
use husk_proto::cri;
use serde_json::{Value, json};

use super::output::{self, Options, time};
use super::{client, find};

/// Prints everything about containers, or the state of the vCPUs and devices of a pod's VM, as JSON.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Examples:\n  husk inspect --format '{{.State.ExitCode}}' web\n  husk inspect husk/web    the VM of that pod"
)]
pub struct Arguments {
    /// A container's id, the beginning of its id, or its name. Or a pod's id, the beginning of its
    /// id, its name, or NAMESPACE/NAME. While huskd does not run, only a pod's id works.
    #[arg(required = true)]
    names: Vec<String>,
    #[command(flatten)]
    output: Options,
}

/// Prints a JSON document for each name.
pub async fn run(arguments: &Arguments, config: &Config) -> anyhow::Result<()> {
    for name in &arguments.names {
        let value = match container(config, name).await? {
            Some(container) => container,
            None => vm(config, name).await?,
        };
        output::one(&arguments.output, &value)?;
    }
    Ok(())
}

/// The container of that name; nothing if there is none, or no huskd.
async fn container(config: &Config, name: &str) -> anyhow::Result<Option<Value>> {
    let Ok(mut client) = client::connect(&config.socket).await else { return Ok(None) };
    let containers = find::containers(&mut client).await?;
    let Ok(container) = find::find(&containers, name) else { return Ok(None) };
    let status = find::status(&mut client, &container.id).await?;
    let pod = client::status(&mut client, &container.pod_sandbox_id).await?;
    Ok(Some(describe(container, &status, &pod)?))
}

/// Everything about a container.
fn describe(
    container: &cri::Container,
    answer: &cri::ContainerStatusResponse,
    pod: &cri::PodSandboxStatusResponse,
) -> anyhow::Result<Value> {
    let status = answer.status.as_ref().context("huskd knows the container and says nothing about it")?;
    let (inner, pod_inner) = (client::info(&answer.info), client::info(&pod.info));
    let pod_status = pod.status.clone().unwrap_or_default();
    let metadata = pod_status.metadata.unwrap_or_default();
    let network = pod_status.network.unwrap_or_default();
    Ok(json!({
        "ID": status.id,
        "Name": find::name(container),
        "Image": status.image.as_ref().map(|image| image.image.clone()),
        "ImageID": status.image_id,
        "Created": time::rfc3339(status.created_at),
        "State": {
            "Status": find::state(status.state()),
            "ExitCode": status.exit_code,
            "Reason": status.reason,
            "Message": status.message,
            "StartedAt": time::rfc3339(status.started_at),
            "FinishedAt": time::rfc3339(status.finished_at),
            "Pid": inner["guestPid"],
        },
        "Pod": {
            "ID": pod_status.id,
            "Name": metadata.name,
            "Namespace": metadata.namespace,
            "Handler": pod_status.runtime_handler,
            "IPAddress": network.ip,
            "Config": pod_inner["config"],
        },
        "LogPath": status.log_path,
        "Labels": status.labels,
        "Annotations": status.annotations,
        "Config": inner["config"],
    }))
}

/// The state of a pod's VM.
async fn vm(config: &Config, name: &str) -> anyhow::Result<Value> {
    let (id, control) = client::vm(config, name).await?;
    match control.inspect().await {
        Ok(inspection) => Ok(serde_json::to_value(&inspection)?),
        Err(error) => bail!("the VM of pod {id} does not run: {error}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_container_is_described_with_its_pod() {
        let status = cri::ContainerStatus { id: "c".into(), exit_code: 3, ..Default::default() };
        let info = [("info".to_owned(), r#"{"guestPid": 7, "config": {"tty": true}}"#.to_owned())].into();
        let answer = cri::ContainerStatusResponse { status: Some(status), info };
        let network = Some(cri::PodSandboxNetworkStatus { ip: "10.0.0.2".into(), ..Default::default() });
        let status = Some(cri::PodSandboxStatus { id: "p".into(), network, ..Default::default() });
        let pod = cri::PodSandboxStatusResponse { status, ..Default::default() };
        let value = describe(&cri::Container::default(), &answer, &pod).unwrap();
        assert_eq!((&value["State"]["ExitCode"], &value["State"]["Pid"]), (&json!(3), &json!(7)));
        assert_eq!((&value["Pod"]["IPAddress"], &value["Config"]["tty"]), (&json!("10.0.0.2"), &json!(true)));
    }
}
