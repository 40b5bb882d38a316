//! `husk pods`: a table of the pods on this node.

use husk_config::Config;
use husk_proto::cri;
use serde_json::json;

use super::client;
use super::output::{self, Filter, Item, Options, labels_match, short, time};

/// Lists the pods of this node.
#[derive(Debug, clap::Args)]
pub struct Arguments {
    /// Print ids only.
    #[arg(long, short)]
    quiet: bool,
    /// Show only pods with this property: `id`, `name`, `namespace`, `state`, `handler`, or `label`
    /// (`label=app`, `label=app=web`).
    #[arg(long, short, value_name = "KEY=VALUE")]
    filter: Vec<Filter>,
    #[command(flatten)]
    output: Options,
}

const COLUMNS: [output::Column; 6] = [
    ("POD ID", "ShortID"),
    ("NAMESPACE", "Namespace"),
    ("NAME", "Name"),
    ("STATE", "State"),
    ("AGE", "Age"),
    ("HANDLER", "Handler"),
];

const FILTERS: [&str; 6] = ["id", "name", "namespace", "state", "handler", "label"];

/// Prints the table.
pub async fn run(arguments: &Arguments, config: &Config) -> anyhow::Result<()> {
    let mut client = client::connect(&config.socket).await?;
    let mut pods = client::pods(&mut client).await?;
    pods.sort_by_key(|pod| std::cmp::Reverse(pod.created_at));
    let mut items = Vec::new();
    for pod in &pods {
        let unreached = !arguments.quiet
            && pod.state() == cri::PodSandboxState::SandboxReady
            && client::status(&mut client, &pod.id)
                .await
                .is_ok_and(|status| client::unreached(&status).is_some());
        let item = item(pod, unreached);
        if Filter::pass(&arguments.filter, &FILTERS, |key, value| holds(pod, &item, key, value))? {
            items.push(item);
        }
    }
    output::list(&arguments.output, arguments.quiet, &COLUMNS, items)
}

/// Whether a pod has the property of a filter.
fn holds(pod: &cri::PodSandbox, item: &Item, key: &str, value: &str) -> bool {
    let field = |name: &str| item.get(name).and_then(|field| field.as_str()) == Some(value);
    match key {
        "id" => pod.id.starts_with(value),
        "name" => field("Name"),
        "namespace" => field("Namespace"),
        "state" => field("State"),
        "handler" => field("Handler"),
        _ => labels_match(&pod.labels, value),
    }
}

fn item(pod: &cri::PodSandbox, unreached: bool) -> Item {
    let metadata = pod.metadata.clone().unwrap_or_default();
    let fields = json!({
        "ID": pod.id,
        "ShortID": short(&pod.id),
        "Namespace": metadata.namespace,
        "Name": metadata.name,
        "State": if unreached { "unreached" } else { state(pod.state()) },
        "Age": time::age(pod.created_at),
        "CreatedAt": time::rfc3339(pod.created_at),
        "Handler": pod.runtime_handler,
        "Labels": pod.labels,
    });
    fields.as_object().cloned().unwrap_or_default()
}

/// The name of a state.
pub fn state(state: cri::PodSandboxState) -> &'static str {
    match state {
        cri::PodSandboxState::SandboxReady => "ready",
        cri::PodSandboxState::SandboxNotready => "not ready",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pod_that_does_not_answer_is_no_ready_one() {
        assert_eq!(item(&cri::PodSandbox::default(), true)["State"], "unreached");
        assert_eq!(item(&cri::PodSandbox::default(), false)["State"], "ready");
    }
}
