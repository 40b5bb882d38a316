//! `husk events`: what happens to containers.

use std::time::Duration;

use husk_config::Config;
use husk_proto::cri::runtime_service_client::RuntimeServiceClient;
use husk_proto::cri::{self, ContainerEventType};
use serde_json::json;

use super::output::{self, Filter, Form, Item, Options, time};
use super::{client, labels};

/// The time within which huskd begins to tell.
const BEGIN: Duration = Duration::from_secs(10);

/// Prints what happens to containers and pods, from now on.
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  husk events --filter event=stopped --format '{{.Name}} {{.ExitCode}}'")]
pub struct Arguments {
    /// Show only events with this property: `event` (created, started, stopped, deleted), `container`, `pod` or `name`.
    #[arg(short, long, value_name = "KEY=VALUE")]
    filter: Vec<Filter>,
    #[command(flatten)]
    output: Options,
}

const FILTERS: [&str; 4] = ["event", "container", "pod", "name"];

/// Prints a line for each event; with `-o json`, a line of JSON.
pub async fn run(arguments: &Arguments, config: &Config) -> anyhow::Result<()> {
    let mut client = RuntimeServiceClient::new(client::channel(&config.socket, BEGIN).await?);
    let events = client.get_container_events(cri::GetEventsRequest {}).await.map_err(client::said)?;
    let mut events = events.into_inner();
    while let Some(event) = events.message().await.map_err(client::said)? {
        let item = item(&event);
        if Filter::pass(&arguments.filter, &FILTERS, |key, value| holds(&item, key, value))? {
            output::print(&line(&arguments.output, item)?)?;
        }
    }
    anyhow::bail!("huskd has ended")
}

fn line(options: &Options, item: Item) -> anyhow::Result<String> {
    if let Some(template) = &options.format {
        return template.render_all(&[item]);
    }
    let cell = |field: &str| output::cell(item.get(field));
    Ok(match options.output {
        Form::Json => format!("{}\n", serde_json::Value::from(item)),
        Form::Yaml => format!("---\n{}", output::document(Form::Yaml, &item.into())?),
        Form::Table => {
            let code = match cell("ExitCode") {
                code if code.is_empty() => code,
                code => format!(", exitCode={code}"),
            };
            format!(
                "{} {} {} {} (name={}, pod={}{code})\n",
                cell("Time"),
                cell("Type"),
                cell("Event"),
                cell("ID"),
                cell("Name"),
                cell("Pod"),
            )
        }
    })
}

fn holds(item: &Item, key: &str, value: &str) -> bool {
    let cell = |field: &str| output::cell(item.get(field));
    match key {
        "event" => cell("Event") == value,
        "container" => {
            cell("Type") == "container" && (cell("ID").starts_with(value) || cell("Name") == value)
        }
        "pod" => cell("PodID").starts_with(value) || cell("Pod") == value,
        _ => cell("Name") == value,
    }
}

fn item(event: &cri::ContainerEventResponse) -> Item {
    let pod = event.pod_sandbox_status.clone().unwrap_or_default();
    let metadata = pod.metadata.unwrap_or_default();
    let container = event.containers_statuses.iter().find(|status| status.id == event.container_id);
    // A pod's own events are those of a container with its id.
    let is_pod = event.container_id == pod.id;
    let name = container.map(|status| {
        let in_pod = || status.metadata.as_ref().map(|metadata| metadata.name.clone()).unwrap_or_default();
        status.labels.get(labels::NAME).cloned().unwrap_or_else(in_pod)
    });
    let word = match event.container_event_type() {
        ContainerEventType::ContainerCreatedEvent => "created",
        ContainerEventType::ContainerStartedEvent => "started",
        ContainerEventType::ContainerStoppedEvent => "stopped",
        ContainerEventType::ContainerDeletedEvent => "deleted",
    };
    let ended = container.filter(|status| status.state() == cri::ContainerState::ContainerExited);
    let fields = json!({
        "Time": time::rfc3339(event.created_at),
        "Type": if is_pod { "pod" } else { "container" },
        "Event": word,
        "ID": event.container_id,
        "Name": if is_pod { metadata.name.clone() } else { name.unwrap_or_default() },
        "Pod": format!("{}/{}", metadata.namespace, metadata.name),
        "PodID": pod.id,
        "ExitCode": ended.map(|status| status.exit_code),
    });
    fields.as_object().cloned().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stopped() -> Item {
        let status = cri::ContainerStatus {
            id: "c".into(),
            exit_code: 3,
            state: cri::ContainerState::ContainerExited.into(),
            labels: [(labels::NAME.to_owned(), "web".to_owned())].into(),
            ..Default::default()
        };
        item(&cri::ContainerEventResponse {
            container_id: "c".into(),
            container_event_type: ContainerEventType::ContainerStoppedEvent.into(),
            created_at: 1_000_000_000,
            pod_sandbox_status: Some(cri::PodSandboxStatus { id: "p".into(), ..Default::default() }),
            containers_statuses: vec![status],
        })
    }

    #[test]
    fn an_event_is_a_line_in_the_form_that_is_asked_for() {
        let form = |output, format: Option<&str>| {
            line(&Options { output, format: format.map(|text| text.parse().unwrap()) }, stopped()).unwrap()
        };
        assert_eq!(
            form(Form::Table, None),
            "1970-01-01T00:00:01Z container stopped c (name=web, pod=/, exitCode=3)\n"
        );
        assert_eq!(form(Form::Table, Some("{{.Name}} {{.ExitCode}}")), "web 3\n");
        assert_eq!(form(Form::Json, None).lines().count(), 1);
        assert!(holds(&stopped(), "event", "stopped") && holds(&stopped(), "container", "web"));
        assert!(!holds(&stopped(), "event", "started") && !holds(&stopped(), "pod", "q"));
    }
}
