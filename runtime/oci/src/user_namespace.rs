//! User namespaces: the users of a pod's containers may be others in
//! its guest, or on the host. All containers of a pod have the same namespace, which is decided
//! with the pod.

use husk_proto::{agent, cri};
use husk_volumes as volumes;
use husk_volumes::is_image;
use oci_spec::OciSpecError;
use oci_spec::runtime::{LinuxIdMapping, LinuxIdMappingBuilder, Spec};

use super::Error;

/// The user namespace that a pod asks for; `None` if it asks for none.
///
/// # Errors
/// A namespace that a pod cannot have.
pub fn of_pod(config: &cri::PodSandboxConfig) -> Result<Option<agent::UserNamespace>, Error> {
    let security = config.linux.as_ref().and_then(|linux| linux.security_context.as_ref());
    let options = security.and_then(|security| security.namespace_options.as_ref());
    options.and_then(|options| options.userns_options.as_ref()).map_or(Ok(None), convert)
}

/// Checks that a container asks for its pod's namespace, or for none.
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

/// Marks the volumes that a container is to see with the ids of its pod's
/// user namespace. The agent mounts these so, and images always.
///
/// # Errors
/// Mappings that are not the pod's.
pub(super) fn map_volumes(
    spec: &mut Spec,
    asked: &[cri::Mount],
    pod: Option<&agent::UserNamespace>,
) -> Result<(), Error> {
    for mount in asked.iter().filter(|it| !(it.uid_mappings.is_empty() && it.gid_mappings.is_empty())) {
        let invalid = |problem| Error::Invalid(format!("mount of `{}`: {problem}", mount.container_path));
        let Some(pod) = pod else {
            return Err(invalid("`uidMappings` and `gidMappings` need a pod with `userns_options`"));
        };
        if !(same(&mount.uid_mappings, &pod.uids) && same(&mount.gid_mappings, &pod.gids)) {
            return Err(invalid(
                "`uidMappings` and `gidMappings` must both be those of the pod's `userns_options`",
            ));
        }
        if is_image(mount) {
            continue;
        }
        let place = volumes::clean(&format!("/{}", mount.container_path));
        let (uids, gids) = (mappings(&pod.uids)?, mappings(&pod.gids)?);
        let mut found = false;
        for bind in spec.mounts_mut().iter_mut().flatten() {
            if place.as_ref() == Some(bind.destination()) {
                found = true;
                bind.set_uid_mappings(Some(uids.clone()));
                bind.set_gid_mappings(Some(gids.clone()));
            }
        }
        if !found {
            return Err(invalid("it is in no place of the container where its ids could be mapped"));
        }
    }
    Ok(())
}

fn same(asked: &[cri::IdMapping], pods: &[agent::IdMapping]) -> bool {
    let asked = asked.iter().map(|range| (range.container_id, range.host_id, range.length));
    asked.eq(pods.iter().map(|range| (range.container_id, range.host_id, range.length)))
}

/// The mappings in the form of the OCI configuration.
pub(super) fn mappings(ranges: &[agent::IdMapping]) -> Result<Vec<LinuxIdMapping>, OciSpecError> {
    let range = |range: &agent::IdMapping| {
        let mapping = LinuxIdMappingBuilder::default().container_id(range.container_id);
        mapping.host_id(range.host_id).size(range.length).build()
    };
    ranges.iter().map(range).collect()
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
    fn volumes_are_mapped_as_the_pod_is_or_refused() {
        use cri::NamespaceMode::Pod;
        let pods = asked(Pod, &[(0, 1000, 65536)]);
        let pod = convert(&pods).unwrap();
        let plain = cri::Mount {
            container_path: "/data/./x/".into(),
            host_path: "/srv".into(),
            ..Default::default()
        };
        let mount =
            cri::Mount { uid_mappings: pods.uids.clone(), gid_mappings: pods.gids.clone(), ..plain.clone() };
        let mapped = |mount: &cri::Mount, pod: Option<&agent::UserNamespace>| {
            let json = r#"{"ociVersion":"1.0.2","mounts":[
                {"destination":"/data","type":"bind","source":"/a"},
                {"destination":"/data/x","type":"bind","source":"/b"}]}"#;
            let mut spec: Spec = serde_json::from_str(json).unwrap();
            map_volumes(&mut spec, std::slice::from_ref(mount), pod).map_err(|error| error.to_string())?;
            let told = |mount: &oci_spec::runtime::Mount| {
                [mount.uid_mappings(), mount.gid_mappings()].map(|ranges| {
                    let ranges = ranges.iter().flatten();
                    ranges
                        .map(|range| (range.container_id(), range.host_id(), range.size()))
                        .collect::<Vec<_>>()
                })
            };
            Ok::<_, String>(spec.mounts().iter().flatten().map(told).collect::<Vec<_>>())
        };
        let (none, range) = ([vec![], vec![]], [vec![(0, 1000, 65536)], vec![(0, 1000, 65536)]]);
        assert_eq!(mapped(&mount, pod.as_ref()).unwrap(), [none.clone(), range]);
        assert_eq!(mapped(&plain, pod.as_ref()).unwrap(), [none.clone(), none.clone()]);
        assert_eq!(mapped(&plain, None).unwrap(), [none.clone(), none.clone()]);
        let image = Some(cri::ImageSpec { image: "models".into(), ..Default::default() });
        assert_eq!(
            mapped(&cri::Mount { image, ..mount.clone() }, pod.as_ref()).unwrap(),
            [none.clone(), none]
        );

        assert!(mapped(&mount, None).unwrap_err().contains("userns_options"));
        let other = asked(Pod, &[(0, 2000, 65536)]).uids;
        let two = asked(Pod, &[(0, 1000, 5), (5, 9, 1)]).uids;
        for bad in [
            cri::Mount { uid_mappings: other.clone(), ..mount.clone() },
            cri::Mount { gid_mappings: other, ..mount.clone() },
            cri::Mount { uid_mappings: two.clone(), gid_mappings: two, ..mount.clone() },
            cri::Mount { gid_mappings: Vec::new(), ..mount.clone() },
            cri::Mount { uid_mappings: Vec::new(), ..mount.clone() },
            cri::Mount { container_path: "/elsewhere".into(), ..mount.clone() },
        ] {
            let error = mapped(&bad, pod.as_ref()).unwrap_err();
            assert!(error.contains("mount of `"), "{error}");
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
