//! `husk ps`: a table of the containers on this node.

use std::collections::HashMap;

use husk_config::Config;
use husk_proto::cri::{self, ContainerState};
use serde_json::json;

use super::output::{self, Filter, Item, Options, labels_match, short, time};
use super::{client, find};

/// Lists containers: those that run, or all.
///
/// `husk ps -a --filter status=exited -q` prints the ids of those that have ended.
#[derive(Debug, clap::Args)]
#[command(
    visible_alias = "list",
    after_help = "Example:\n  husk ps -a --format 'table {{.Name}}\\t{{.Status}}'"
)]
pub struct Arguments {
    /// Show containers that do not run, too.
    #[arg(short, long)]
    all: bool,
    /// Print ids only.
    #[arg(short, long)]
    quiet: bool,
    /// Show only containers with this property: `id`, `name`, `status`, `pod`, `image`, `exited` (the exit code) or `label`.
    #[arg(short, long, value_name = "KEY=VALUE")]
    filter: Vec<Filter>,
    #[command(flatten)]
    output: Options,
}

const COLUMNS: [output::Column; 6] = [
    ("CONTAINER ID", "ShortID"),
    ("IMAGE", "Image"),
    ("CREATED", "RunningFor"),
    ("STATUS", "Status"),
    ("POD", "Pod"),
    ("NAME", "Name"),
];

const FILTERS: [&str; 7] = ["id", "name", "status", "pod", "image", "exited", "label"];

/// Prints the table.
pub async fn run(arguments: &Arguments, config: &Config) -> anyhow::Result<()> {
    let mut client = client::connect(&config.socket).await?;
    let pods: HashMap<String, cri::PodSandbox> =
        client::pods(&mut client).await?.into_iter().map(|pod| (pod.id.clone(), pod)).collect();
    // A filter by a state asks for containers in it, whether they run or not.
    let all =
        arguments.all || arguments.filter.iter().any(|filter| ["status", "exited"].contains(&&*filter.key));
    let mut items = Vec::new();
    for container in find::containers(&mut client).await? {
        if !all && container.state() != ContainerState::ContainerRunning {
            continue;
        }
        let Some(status) = status(&mut client, &container).await? else { continue };
        let item = item(&container, &status, pods.get(&container.pod_sandbox_id));
        if Filter::pass(&arguments.filter, &FILTERS, |key, value| holds(&container, &item, key, value))? {
            items.push(item);
        }
    }
    output::list(&arguments.output, arguments.quiet, &COLUMNS, items)
}

/// The status of a container; nothing if it was removed meanwhile.
async fn status(
    client: &mut client::Client,
    container: &cri::Container,
) -> anyhow::Result<Option<cri::ContainerStatus>> {
    let request = cri::ContainerStatusRequest { container_id: container.id.clone(), verbose: false };
    match client.container_status(request).await {
        Ok(answer) => Ok(answer.into_inner().status),
        Err(status) if status.code() == tonic::Code::NotFound => Ok(None),
        Err(status) => Err(client::said(status)),
    }
}

fn holds(container: &cri::Container, item: &Item, key: &str, value: &str) -> bool {
    let text = |field: &str| output::cell(item.get(field));
    match key {
        "id" => container.id.starts_with(value),
        "name" => text("Name").contains(value),
        "status" => text("State") == value,
        "pod" => text("Pod") == value || text("PodID").starts_with(value),
        "image" => text("Image") == value || text("Image").split(':').next() == Some(value),
        "exited" => text("State") == "exited" && text("ExitCode") == value,
        _ => labels_match(&container.labels, value),
    }
}

fn item(container: &cri::Container, status: &cri::ContainerStatus, pod: Option<&cri::PodSandbox>) -> Item {
    let pod = pod.and_then(|pod| pod.metadata.clone()).unwrap_or_default();
    let fields = json!({
        "ID": container.id,
        "ShortID": short(&container.id),
        "Image": status.image.as_ref().map(|image| image.image.clone()),
        "ImageID": status.image_id,
        "Name": find::name(container),
        "Pod": format!("{}/{}", pod.namespace, pod.name),
        "PodID": container.pod_sandbox_id,
        "State": find::state(status.state()),
        "Status": describe(status),
        "ExitCode": (status.state() == ContainerState::ContainerExited).then_some(status.exit_code),
        "RunningFor": time::age(container.created_at),
        "CreatedAt": time::rfc3339(container.created_at),
        "StartedAt": time::rfc3339(status.started_at),
        "FinishedAt": time::rfc3339(status.finished_at),
        "Labels": container.labels,
    });
    fields.as_object().cloned().unwrap_or_default()
}

/// A container's state as people read it.
fn describe(status: &cri::ContainerStatus) -> String {
    match status.state() {
        ContainerState::ContainerCreated => "Created".into(),
        ContainerState::ContainerRunning => format!("Up {}", time::age(status.started_at)),
        ContainerState::ContainerExited => {
            format!("Exited ({}) {} ago", status.exit_code, time::age(status.finished_at))
        }
        ContainerState::ContainerUnknown => "Unknown".into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn exited() -> (cri::Container, cri::ContainerStatus) {
        let labels = [("app".to_owned(), "web".to_owned())].into();
        let container = cri::Container { id: "0123456789abcdef".into(), labels, ..Default::default() };
        let image = Some(cri::ImageSpec { image: "docker.io/library/nginx:1".into(), ..Default::default() });
        let state = ContainerState::ContainerExited.into();
        (container, cri::ContainerStatus { state, exit_code: 3, finished_at: 1, image, ..Default::default() })
    }

    #[test]
    fn a_container_is_described_by_how_it_ended() {
        let (container, mut status) = exited();
        let shown = item(&container, &status, None);
        assert_eq!((&shown["ShortID"], &shown["ExitCode"]), (&json!("0123456789abc"), &json!(3)));
        assert!(output::cell(shown.get("Status")).starts_with("Exited (3) "));
        status.set_state(ContainerState::ContainerRunning);
        let shown = item(&container, &status, None);
        assert!(output::cell(shown.get("Status")).starts_with("Up ") && shown["ExitCode"].is_null());
    }

    #[test]
    fn filters_look_at_what_a_container_is() {
        let (container, status) = exited();
        let shown = item(&container, &status, None);
        let holds = |key, value| holds(&container, &shown, key, value);
        assert!(holds("id", "0123") && holds("status", "exited") && holds("exited", "3"));
        assert!(holds("image", "docker.io/library/nginx") && holds("label", "app=web"));
        assert!(!holds("status", "running") && !holds("exited", "0") && !holds("image", "nginx"));
    }
}
