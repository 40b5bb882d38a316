//! Limits of containers that depend on the features of this kernel.

use std::path::Path;

use oci_spec::runtime::{LinuxHugepageLimit, LinuxResources, Spec};

use crate::guest::cgroup;
use crate::guest::mode::Mode;

/// The limit cannot be set on this kernel.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("hugepage_limits: there are no huge pages of {0}, or no control group that counts them")]
pub struct NoSuchPages(String);

/// Leaves out limits on huge pages of sizes that the machine does not have:
/// clients set the limits of all sizes of the host to zero, and a machine may
/// have fewer sizes.
pub fn fit_to_machine(spec: &mut Spec, mode: &Mode) -> Result<(), NoSuchPages> {
    let resources = spec.linux_mut().as_mut().and_then(|linux| linux.resources_mut().as_mut());
    let Some(resources) = resources else { return Ok(()) };
    let limits = resources.hugepage_limits().clone().unwrap_or_default();
    let limits = existing(limits, |size| has_pages(mode, size))?;
    resources.set_hugepage_limits((!limits.is_empty()).then_some(limits));
    Ok(())
}

/// Does the same for `runc update`, which knows limits on huge pages only as
/// files of the cgroup.
pub fn for_update(mut resources: LinuxResources, mode: &Mode) -> Result<LinuxResources, NoSuchPages> {
    let limits = resources.hugepage_limits().clone().unwrap_or_default();
    let limits = existing(limits, |size| has_pages(mode, size))?;
    resources.set_hugepage_limits(None);
    let mut files = resources.unified().clone().unwrap_or_default();
    for limit in limits {
        files.entry(file(limit.page_size())).or_insert_with(|| limit.limit().to_string());
    }
    resources.set_unified((!files.is_empty()).then_some(files));
    Ok(resources)
}

fn file(size: &str) -> String {
    format!("hugetlb.{size}.max")
}

/// Whether cgroups of the pod count huge pages of this size. Only cgroups below
/// the root have such counters.
fn has_pages(mode: &Mode, size: &str) -> bool {
    counts(mode.host().map_or(Path::new(cgroup::AGENT), |host| &host.cgroup), size)
}

fn counts(cgroup: &Path, size: &str) -> bool {
    !size.contains(['/', '\0']) && cgroup.join(file(size)).exists()
}

fn existing(
    limits: Vec<LinuxHugepageLimit>,
    exists: impl Fn(&str) -> bool,
) -> Result<Vec<LinuxHugepageLimit>, NoSuchPages> {
    let mut kept = Vec::with_capacity(limits.len());
    for limit in limits {
        if exists(limit.page_size()) {
            kept.push(limit);
        } else if limit.limit() != 0 {
            return Err(NoSuchPages(limit.page_size().clone()));
        }
    }
    Ok(kept)
}

#[cfg(test)]
mod tests {
    use oci_spec::runtime::LinuxHugepageLimitBuilder;

    use super::*;

    fn limit(size: &str, bytes: i64) -> LinuxHugepageLimit {
        LinuxHugepageLimitBuilder::default().page_size(size).limit(bytes).build().unwrap()
    }

    #[test]
    fn nothing_of_what_is_not_there_is_no_limit() {
        let exists = |size: &str| size == "2MB";
        assert_eq!(existing(vec![limit("1GB", 0), limit("2MB", 0)], exists).unwrap(), [limit("2MB", 0)]);
        assert_eq!(existing(vec![limit("1GB", 5)], exists).unwrap_err(), NoSuchPages("1GB".into()));
    }

    #[test]
    fn a_cgroup_says_which_pages_it_counts() {
        let group = tempfile::tempdir().unwrap();
        std::fs::write(group.path().join("hugetlb.2MB.max"), "max\n").unwrap();
        assert!(counts(group.path(), "2MB") && !counts(group.path(), "1GB"));
    }

    #[test]
    fn a_size_is_not_a_path() {
        let group = tempfile::tempdir().unwrap();
        std::fs::create_dir(group.path().join("hugetlb.x")).unwrap();
        std::fs::write(group.path().join("y.max"), "").unwrap();
        assert!(!counts(group.path(), "x/../y"));
    }
}
