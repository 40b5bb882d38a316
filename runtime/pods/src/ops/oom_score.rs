//! How willingly the kernel ends a pod when the node is out of memory. Its VMM
//! and file server hold the memory of all its containers: they have the lowest
//! score that the client gives to one of them, and 0 until it gives any.

use crate::Node;
use crate::model::{Sandbox, State};

/// Gives the pod's processes the score. Where huskd may not lower it, it stays.
pub(crate) fn set(node: &Node, sandbox: &Sandbox) {
    let scores = sandbox.containers().into_iter().filter_map(|container| {
        let record = container.record();
        let resources = record.config.linux.as_ref().and_then(|linux| linux.resources.as_ref());
        let score = resources.map_or(0, |resources| resources.oom_score_adj);
        (!matches!(record.state, State::Exited(_))).then_some(score)
    });
    let score = lowest(scores);
    if let Err(error) = sandbox.place(&node.config.run_dir).set_oom_score(score) {
        tracing::debug!(score, %error, "failed to set the OOM score of the pod's VMM");
    }
}

/// The lowest of all, as the kernel takes it.
fn lowest(scores: impl Iterator<Item = i64>) -> i64 {
    scores.min().unwrap_or(0).clamp(-1000, 1000)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pod_is_as_safe_as_its_safest_container() {
        assert_eq!(lowest([].into_iter()), 0);
        assert_eq!(lowest([936, -997, 1000].into_iter()), -997);
        assert_eq!(lowest([1000].into_iter()), 1000);
        assert_eq!(lowest([i64::MIN].into_iter()), -1000);
    }
}
