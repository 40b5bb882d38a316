//! CPUs of the host that a pod runs on. Numbers of the host's CPUs mean nothing
//! inside a VM, so what its containers name together is given to the control group
//! of its VMM.

use crate::model::{Sandbox, State};
use crate::{Error, Node};

/// Gives the VMM the CPUs and memory nodes that the pod's containers name; all of
/// its parent's as long as one of them names none.
///
/// # Errors
/// When a container names some and the host does not give them.
pub(crate) fn pin(node: &Node, sandbox: &Sandbox) -> Result<(), Error> {
    let resources = sandbox.containers().into_iter().filter_map(|container| {
        let record = container.record();
        let resources = record.config.linux.as_ref().and_then(|linux| linux.resources.clone());
        (!matches!(record.state, State::Exited(_))).then(|| resources.unwrap_or_default())
    });
    let (cpus, mems): (Vec<_>, Vec<_>) =
        resources.map(|resources| (resources.cpuset_cpus, resources.cpuset_mems)).unzip();
    Ok(sandbox.place(&node.config.run_dir).pin(&union(&cpus), &union(&mems))?)
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
