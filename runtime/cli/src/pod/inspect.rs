//! `husk pod inspect`: everything about a pod.

use anyhow::Context;
use husk_config::Config;
use husk_proto::cri;
use serde_json::{Value, json};

use crate::client;
use crate::output::{self, Options, time};
use crate::pods;

/// Prints everything about pods, as JSON.
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  husk pod inspect --format '{{.IPAddress}}' web")]
pub struct Arguments {
    /// The pods' ids, beginnings of ids, names, or NAMESPACE/NAME.
    #[arg(required = true, value_name = "POD")]
    pods: Vec<String>,
    #[command(flatten)]
    output: Options,
}

/// Prints a document for each pod.
pub async fn run(arguments: &Arguments, config: &Config) -> anyhow::Result<()> {
    let mut client = client::connect(&config.socket).await?;
    let all = client::pods(&mut client).await?;
    for wanted in &arguments.pods {
        let id = &client::find(&all, wanted)?.id;
        let value = describe(&client::status(&mut client, id).await?)?;
        output::one(&arguments.output, &value)?;
    }
    Ok(())
}

fn describe(answer: &cri::PodSandboxStatusResponse) -> anyhow::Result<Value> {
    let status = answer.status.as_ref().context("huskd knows the pod and says nothing about it")?;
    let info = client::info(&answer.info);
    let metadata = status.metadata.clone().unwrap_or_default();
    let network = status.network.clone().unwrap_or_default();
    let more: Vec<&str> = network.additional_ips.iter().map(|ip| ip.ip.as_str()).collect();
    Ok(json!({
        "ID": status.id,
        "Name": metadata.name,
        "Namespace": metadata.namespace,
        "State": pods::state(status.state()),
        "Handler": status.runtime_handler,
        "Created": time::rfc3339(status.created_at),
        "IPAddress": network.ip,
        "AdditionalIPAddresses": more,
        "Labels": status.labels,
        "Annotations": status.annotations,
        "Info": info,
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pod_is_described_with_what_huskd_tells_beyond_cri() {
        let status = Some(cri::PodSandboxStatus { id: "p".into(), ..Default::default() });
        let info = [("info".to_owned(), r#"{"pid": 7}"#.to_owned())].into();
        let value = describe(&cri::PodSandboxStatusResponse { status, info, ..Default::default() }).unwrap();
        assert_eq!((&value["ID"], &value["Info"]["pid"]), (&json!("p"), &json!(7)));
        assert!(describe(&cri::PodSandboxStatusResponse::default()).is_err());
    }
}
