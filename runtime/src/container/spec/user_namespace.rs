//! User namespaces: the containers of a pod may have users that are others in
//! its machine. One for all containers of a pod, decided with the pod.

use husk_proto::{agent, cri};

use super::Error;

/// What a pod asks for; `None` when its users are the machine's.
///
/// # Errors
/// A namespace that a pod cannot have.
pub fn of_pod(config: &cri::PodSandboxConfig) -> Result<Option<agent::UserNamespace>, Error> {
    let security = config.linux.as_ref().and_then(|linux| linux.security_context.as_ref());
    let options = security.and_then(|security| security.namespace_options.as_ref());
    options.and_then(|options| options.userns_options.as_ref()).map_or(Ok(None), convert)
}

/// Checks that a container asks for its pod's, or for nothing.
pub(super) fn of_container(
    asked: Option<&cri::UserNamespace>,
    pod: Option<&agent::UserNamespace>,
) -> Result<(), Error> {
    let Some(asked) = asked else { return Ok(()) };
    if convert(asked)?.as_ref() == pod {
        return Ok(());
    }
    Err(Error::Invalid("`userns_options` of a container must be those of its pod".into()))
}

fn convert(asked: &cri::UserNamespace) -> Result<Option<agent::UserNamespace>, Error> {
    match cri::NamespaceMode::try_from(asked.mode) {
        Ok(cri::NamespaceMode::Node) => Ok(None),
        Ok(cri::NamespaceMode::Pod) => Ok(Some(agent::UserNamespace {
            uids: vec![range("uids", &asked.uids)?],
            gids: vec![range("gids", &asked.gids)?],
        })),
        _ => Err(Error::Invalid("mode of a user namespace is neither POD nor NODE".into())),
    }
}

fn range(what: &str, asked: &[cri::IdMapping]) -> Result<agent::IdMapping, Error> {
    match asked {
        [range] if range.container_id == 0 && range.length > 0 => Ok(agent::IdMapping {
            container_id: range.container_id,
            host_id: range.host_id,
            length: range.length,
        }),
        [_] => Err(Error::Invalid(format!("`{what}` of a user namespace does not map id 0"))),
        _ => Err(Error::Invalid(format!(
            "`{what}` of a user namespace has {} ranges: exactly one is possible",
            asked.len()
        ))),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    fn asked(mode: cri::NamespaceMode, ranges: &[(u32, u32, u32)]) -> cri::UserNamespace {
        let ranges: Vec<_> = ranges
            .iter()
            .map(|(container_id, host_id, length)| cri::IdMapping {
                container_id: *container_id,
                host_id: *host_id,
                length: *length,
            })
            .collect();
        cri::UserNamespace { mode: mode.into(), uids: ranges.clone(), gids: ranges }
    }

    #[test]
    fn one_range_that_maps_root_is_a_namespace() {
        use cri::NamespaceMode::{Container, Node, Pod, Target};
        let good = convert(&asked(Pod, &[(0, 1000, 65536)])).unwrap().unwrap();
        assert_eq!(good.uids.first().unwrap().host_id, 1000);
        assert_eq!(convert(&asked(Node, &[])).unwrap(), None);
        for bad in [
            asked(Pod, &[]),
            asked(Pod, &[(1, 1000, 5)]),
            asked(Pod, &[(0, 1000, 0)]),
            asked(Pod, &[(0, 1000, 5), (5, 9, 1)]),
            asked(Container, &[]),
            asked(Target, &[(0, 1000, 5)]),
        ] {
            assert!(convert(&bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn a_container_has_its_pods_namespace() {
        use cri::NamespaceMode::{Node, Pod};
        let pod = convert(&asked(Pod, &[(0, 1000, 65536)])).unwrap();
        assert!(of_container(None, pod.as_ref()).is_ok());
        assert!(of_container(Some(&asked(Pod, &[(0, 1000, 65536)])), pod.as_ref()).is_ok());
        assert!(of_container(Some(&asked(Pod, &[(0, 2000, 65536)])), pod.as_ref()).is_err());
        assert!(of_container(Some(&asked(Node, &[])), pod.as_ref()).is_err());
        assert!(of_container(Some(&asked(Pod, &[(0, 1000, 65536)])), None).is_err());
    }
}
