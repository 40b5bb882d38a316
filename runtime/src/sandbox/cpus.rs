//! Which CPUs of the host a pod runs on. Numbers of the host's CPUs mean
//! nothing inside a machine, so what its containers name together is given to
//! the control group of its VMM.

use super::Sandbox;
use crate::config::Kind;
use crate::container::State;
use crate::cri::error::Error;
use crate::vm;

/// Gives the VMM the CPUs and memory nodes that the pod's containers name; all
/// of its parent's as long as one of them names none.
///
/// # Errors
/// When a container names some and the host does not give them.
pub fn pin(sandbox: &Sandbox) -> Result<(), Error> {
    if sandbox.record().kind == Kind::Host {
        // Its containers have groups of their own, with CPUs of their own.
        return Ok(());
    }
    let resources = sandbox.containers().into_iter().filter_map(|container| {
        let record = container.record();
        let resources = record.config.linux.as_ref().and_then(|linux| linux.resources.clone());
        (!matches!(record.state, State::Exited(_))).then(|| resources.unwrap_or_default())
    });
    let (cpus, mems): (Vec<_>, Vec<_>) =
        resources.map(|resources| (resources.cpuset_cpus, resources.cpuset_mems)).unzip();
    let cgroup = sandbox.record().cgroup.clone();
    for (file, named) in [("cpuset.cpus", cpus), ("cpuset.mems", mems)] {
        let list = union(&named);
        let Some(cgroup) = &cgroup else {
            if list.is_empty() {
                continue;
            }
            return Err(Error::FailedPrecondition(
                "cpuset_cpus, cpuset_mems: the host has no control groups (version 2) to pin a pod with"
                    .into(),
            ));
        };
        if let Err(cause) = vm::set_list(cgroup, file, &list)
            && !list.is_empty()
        {
            return Err(Error::File {
                stage: "pin the pod to CPUs of the host",
                path: cgroup.join(file),
                cause,
            });
        }
    }
    Ok(())
}

/// All lists in one; empty, which stands for all, when one of them is.
fn union(lists: &[String]) -> String {
    if lists.iter().any(String::is_empty) { String::new() } else { lists.join(",") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_container_without_a_list_may_run_anywhere_and_so_may_its_pod() {
        assert_eq!(union(&[]), "");
        assert_eq!(union(&["0-1".into(), "3".into()]), "0-1,3");
        assert_eq!(union(&["0-1".into(), String::new()]), "");
    }
}
