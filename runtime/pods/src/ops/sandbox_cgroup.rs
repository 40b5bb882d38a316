//! The control group of a pod, by the driver that the node is configured with.

use std::path::{Path, PathBuf};

use husk_base::cgroup;
use husk_base::id::SandboxId;
use husk_config::CgroupDriver;
use husk_proto::cri;
use husk_systemd::slice;

use crate::Error;

/// Where the control group of the sandbox `id` goes; `None` on a host without cgroup v2.
///
/// # Errors
/// A parent of the other driver: limits that the client sets there would not hold.
pub(super) fn choose(
    driver: CgroupDriver,
    config: &cri::PodSandboxConfig,
    id: &SandboxId,
) -> Result<Option<PathBuf>, Error> {
    let parent = config.linux.as_ref().map(|linux| linux.cgroup_parent.as_str()).unwrap_or_default();
    match driver {
        CgroupDriver::Cgroupfs if Path::new(parent).extension().is_some_and(|end| end == "slice") => {
            Err(Error::Invalid(format!(
                "sandbox `cgroup_parent` `{parent}` is a slice of systemd, and `cgroup_driver` of huskd's \
                 configuration is \"cgroupfs\": set it to \"systemd\", as the client's (the kubelet's \
                 `cgroupDriver`) seems to be, or both to cgroupfs"
            )))
        }
        CgroupDriver::Cgroupfs => Ok(cgroup::path(parent, id)),
        CgroupDriver::Systemd => {
            let slice = slice_of(parent).ok_or_else(|| {
                Error::Invalid(format!(
                    "sandbox `cgroup_parent` `{parent}` is no slice of systemd, and `cgroup_driver` of huskd's \
                     configuration is \"systemd\": set it to \"cgroupfs\", as the client's (the kubelet's \
                     `cgroupDriver`) seems to be, or both to systemd"
                ))
            })?;
            let scope = format!("husk-{}.scope", id.short());
            Ok(cgroup::root().map(|root| root.join(slice).join(scope)))
        }
    }
}

/// The group of a slice that is given by its name, or, as the kubelet does, by its group.
fn slice_of(parent: &str) -> Option<PathBuf> {
    if parent.is_empty() {
        return slice::expand(slice::DEFAULT);
    }
    let group = slice::expand(Path::new(parent).file_name()?.to_str()?)?;
    let below_root = Path::new(parent.strip_prefix('/').unwrap_or(parent));
    (below_root == group || below_root.components().count() == 1).then_some(group)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn choose(driver: CgroupDriver, parent: &str) -> Result<Option<PathBuf>, String> {
        let linux = cri::LinuxPodSandboxConfig { cgroup_parent: parent.into(), ..Default::default() };
        let config = cri::PodSandboxConfig { linux: Some(linux), ..Default::default() };
        let id = SandboxId::from("0123456789abcdef");
        super::choose(driver, &config, &id).map_err(|error| error.to_string())
    }

    #[test]
    fn a_parent_of_the_other_driver_is_refused_with_the_setting() {
        for parent in ["kubepods-burstable-pod1.slice", "/kubepods.slice", "/a/b.slice/"] {
            let error = choose(CgroupDriver::Cgroupfs, parent).unwrap_err();
            for word in ["`cgroup_parent`", parent, "slice of systemd", "`cgroup_driver`", "\"systemd\""] {
                assert!(error.contains(word), "{error}");
            }
        }
        for parent in
            ["/kubepods/burstable/pod1", "kubepods", "/", "/a/b.slice", "a--b.slice", "/x/../a.slice"]
        {
            let error = choose(CgroupDriver::Systemd, parent).unwrap_err();
            for word in ["`cgroup_parent`", parent, "no slice of systemd", "`cgroup_driver`", "\"cgroupfs\""]
            {
                assert!(error.contains(word), "{error}");
            }
        }
    }

    #[test]
    fn a_slice_is_given_by_its_name_or_by_its_group() {
        let group = "kubepods.slice/kubepods-pod1.slice";
        for parent in ["kubepods-pod1.slice", "/kubepods-pod1.slice", group, &format!("/{group}")] {
            assert_eq!(slice_of(parent), Some(group.into()), "{parent}");
            let Some(root) = cgroup::root() else { continue };
            let scope = root.join(group).join("husk-0123456789abc.scope");
            assert_eq!(choose(CgroupDriver::Systemd, parent), Ok(Some(scope)));
        }
        assert_eq!(slice_of(""), Some("system.slice".into()));
        assert_eq!(slice_of("-.slice"), Some(PathBuf::new()));
        let group = choose(CgroupDriver::Cgroupfs, "/kubepods/pod1").unwrap();
        assert!(
            group.is_none_or(|group| group == Path::new("/sys/fs/cgroup/kubepods/pod1/husk-0123456789abc"))
        );
    }
}
