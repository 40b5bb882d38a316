//! `husk stop`: containers are asked to end, and then killed.

use anyhow::Context;
use husk_config::Config;
use husk_proto::cri;

use super::client::{self, Client};
use super::{find, labels, output};

/// The seconds that a container gets unless it, or the caller, says otherwise.
pub const GRACE: i64 = 10;

/// Stops containers: each is sent its stop signal, and SIGKILL when its time is over.
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  husk stop -t 30 web db")]
pub struct Arguments {
    /// The containers' ids, beginnings of ids, or names.
    #[arg(required = true)]
    containers: Vec<String>,
    /// Seconds to wait before the container is killed; without it, what the container was made with, else 10.
    #[arg(short, long = "time", visible_alias = "timeout", value_name = "SECONDS")]
    time: Option<u32>,
}

/// Stops one after the other, and prints what was stopped.
pub async fn run(arguments: &Arguments, config: &Config) -> anyhow::Result<()> {
    let mut client = client::connect_for_work(&config.socket).await?;
    for wanted in &arguments.containers {
        let container = find::container(&mut client, wanted).await?;
        let grace = grace(arguments.time, &container)?;
        stop(&mut client, &container, grace).await?;
        output::print(&format!("{wanted}\n"))?;
    }
    Ok(())
}

/// Stops a container, and the pod that was made for it alone.
pub async fn stop(client: &mut Client, container: &cri::Container, grace: i64) -> anyhow::Result<()> {
    let request = cri::StopContainerRequest { container_id: container.id.clone(), timeout: grace };
    client.stop_container(request).await.map_err(client::said)?;
    if find::own_pod(client, container).await?.is_some() {
        client::stop_pod(client, &container.pod_sandbox_id).await?;
    }
    Ok(())
}

fn grace(asked: Option<u32>, container: &cri::Container) -> anyhow::Result<i64> {
    match (asked, container.annotations.get(labels::STOP_TIMEOUT)) {
        (Some(seconds), _) => Ok(seconds.into()),
        (None, Some(text)) => text
            .parse()
            .with_context(|| format!("annotation {} is `{text}`, and no number", labels::STOP_TIMEOUT)),
        (None, None) => Ok(GRACE),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_container_has_the_time_that_it_was_made_with_unless_the_caller_says_otherwise() {
        let annotated = |text: &str| cri::Container {
            annotations: [(labels::STOP_TIMEOUT.to_owned(), text.to_owned())].into(),
            ..Default::default()
        };
        assert_eq!(grace(None, &cri::Container::default()).unwrap(), 10);
        assert_eq!(grace(None, &annotated("3")).unwrap(), 3);
        assert_eq!(grace(Some(0), &annotated("3")).unwrap(), 0);
        assert!(grace(None, &annotated("soon")).unwrap_err().to_string().contains("stop-timeout"));
    }
}
