//! Containers by the names that people have for them.

use anyhow::bail;
use husk_proto::cri;

use crate::client::{self, Client};
use crate::labels;

/// All containers, the newest first.
pub async fn containers(client: &mut Client) -> anyhow::Result<Vec<cri::Container>> {
    let answer = client.list_containers(cri::ListContainersRequest::default()).await.map_err(client::said)?;
    let mut containers = answer.into_inner().containers;
    containers.sort_by_key(|container| std::cmp::Reverse(container.created_at));
    Ok(containers)
}

/// The container that a person means; see [`find`].
pub async fn container(client: &mut Client, wanted: &str) -> anyhow::Result<cri::Container> {
    Ok(find(&containers(client).await?, wanted)?.clone())
}

/// A container by its id, by the name that `husk` gave it, or, if only one has it, by the
/// beginning of its id or the name that it has in its pod.
pub fn find<'a>(containers: &'a [cri::Container], wanted: &str) -> anyhow::Result<&'a cri::Container> {
    let mut exact = containers.iter().filter(|container| container.id == wanted);
    if let Some(container) = exact.next() {
        return Ok(container);
    }
    let own: Vec<_> = containers.iter().filter(|container| own_name(container) == Some(wanted)).collect();
    let loose = || {
        let is_wanted = |container: &&cri::Container| {
            !wanted.is_empty() && (container.id.starts_with(wanted) || name(container) == wanted)
        };
        containers.iter().filter(is_wanted).collect::<Vec<_>>()
    };
    let found = if own.is_empty() { loose() } else { own };
    match found.as_slice() {
        [container] => Ok(container),
        [] => bail!("there is no container {wanted}: `husk ps -a` lists them"),
        _ => bail!("{wanted} is more than one container: use its id"),
    }
}

/// The name that `husk` gave a container; none for those that others made.
pub fn own_name(container: &cri::Container) -> Option<&str> {
    container.labels.get(labels::NAME).map(String::as_str)
}

/// The pod that was made for a container alone, and goes with it; none for a pod of others.
pub async fn own_pod(
    client: &mut Client,
    container: &cri::Container,
) -> anyhow::Result<Option<cri::PodSandbox>> {
    let Some(name) = own_name(container) else { return Ok(None) };
    let pods = client::pods(client).await?;
    Ok(pods.into_iter().find(|pod| pod.id == container.pod_sandbox_id && is_pod_of(pod, name)))
}

/// Whether a pod was made for the container of that name alone.
fn is_pod_of(pod: &cri::PodSandbox, name: &str) -> bool {
    pod.metadata.as_ref().is_some_and(|metadata| metadata.namespace == labels::NAMESPACE)
        && pod.labels.get(labels::NAME).is_some_and(|label| label == name)
}

/// The name by which people know a container.
pub fn name(container: &cri::Container) -> &str {
    let in_pod = || container.metadata.as_ref().map_or("", |metadata| metadata.name.as_str());
    own_name(container).unwrap_or_else(in_pod)
}

/// The status of a container, with the verbose part.
pub async fn status(client: &mut Client, id: &str) -> anyhow::Result<cri::ContainerStatusResponse> {
    let request = cri::ContainerStatusRequest { container_id: id.to_owned(), verbose: true };
    Ok(client.container_status(request).await.map_err(client::said)?.into_inner())
}

/// The word for a state, as docker has it.
pub const fn state(state: cri::ContainerState) -> &'static str {
    match state {
        cri::ContainerState::ContainerCreated => "created",
        cri::ContainerState::ContainerRunning => "running",
        cri::ContainerState::ContainerExited => "exited",
        cri::ContainerState::ContainerUnknown => "unknown",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn container(id: &str, in_pod: &str, own: Option<&str>) -> cri::Container {
        let metadata = Some(cri::ContainerMetadata { name: in_pod.into(), attempt: 0 });
        let labels = own.map(|own| (labels::NAME.to_owned(), own.to_owned())).into_iter().collect();
        cri::Container { id: id.into(), metadata, labels, ..Default::default() }
    }

    #[test]
    fn only_a_pod_that_was_made_for_a_container_goes_with_it() {
        let pod = |namespace: &str, name: Option<&str>| cri::PodSandbox {
            metadata: Some(cri::PodSandboxMetadata { namespace: namespace.into(), ..Default::default() }),
            labels: name.map(|name| (labels::NAME.to_owned(), name.to_owned())).into_iter().collect(),
            ..Default::default()
        };
        assert!(is_pod_of(&pod("husk", Some("web")), "web"));
        assert!(!is_pod_of(&pod("husk", Some("db")), "web"));
        assert!(!is_pod_of(&pod("default", Some("web")), "web"));
        assert!(!is_pod_of(&pod("husk", None), "web"));
    }

    #[test]
    fn a_container_is_found_by_id_and_by_name_and_never_guessed() {
        let all = [
            container("abc1", "web", Some("web")),
            container("abd2", "web", None),
            container("fe", "db", None),
            container("cafe", "x", Some("abc1")),
        ];
        let id =
            |wanted| find(&all, wanted).map(|found| found.id.as_str()).map_err(|error| error.to_string());
        // A whole id is nobody else's name.
        assert_eq!(id("abc1").as_deref(), Ok("abc1"));
        assert_eq!(id("web").as_deref(), Ok("abc1"));
        assert_eq!(id("abd").as_deref(), Ok("abd2"));
        assert_eq!(id("db").as_deref(), Ok("fe"));
        assert!(id("ab").unwrap_err().contains("more than one"));
        assert!(id("zz").unwrap_err().contains("husk ps -a") && id("").is_err());
    }
}
