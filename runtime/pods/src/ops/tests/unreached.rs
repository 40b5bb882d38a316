//! Pods that live and do not answer when huskd starts.

use std::time::Duration;

use husk_agent_client::fake::Fake;
use husk_config::Handler;

use super::*;

/// Longer than the agent of a pod here may take to answer.
const LONGER: Duration = Duration::from_secs(4);

/// A node whose pods' agents have a second to answer.
fn hasty_node(folder: &Path) -> Arc<Node> {
    let mut config = crate::test_util::config(folder);
    for handler in config.handlers.values_mut() {
        match handler {
            Handler::Vm(vm) => vm.agent_timeout_seconds = 1,
            Handler::Host(host) => host.agent_timeout_seconds = 1,
        }
    }
    Arc::new(Node::open(config).unwrap())
}

async fn until(what: impl Fn() -> bool) {
    let met = async {
        while !what() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(30), met).await.unwrap();
}

#[tokio::test]
async fn a_pod_that_is_silent_for_long_stays_and_is_taken_over_once_it_answers() {
    let folder = tempfile::tempdir().unwrap();
    let node = hasty_node(folder.path());
    let mute = sandbox(&node, Kind::Host, Phase::Ready).await;
    let inside = container(&mute, State::Running).await;
    let run_dir = sandbox_run_dir(&node.config.run_dir, &mute.id);
    std::fs::create_dir(&run_dir).unwrap();
    // Connections wait in its backlog, as those to a frozen pod do.
    let listener = UnixListener::bind(run_dir.join("agent.sock")).unwrap();
    recover_within(&node, LONGER).await.unwrap();
    let mute = node.registry.sandbox(mute.id.as_str()).unwrap();
    let (_, inside) = node.registry.container(inside.id.as_str()).unwrap();
    assert_eq!((mute.record().phase, inside.record().state.clone()), (Phase::Ready, State::Running));
    assert!(mute.unreached().is_some() && mute.running().is_none());

    listener.set_nonblocking(true).unwrap();
    let fake = Arc::new(Fake { endless: true, ..Fake::default() });
    fake.serve_on(tokio::net::UnixListener::from_std(listener).unwrap());
    until(|| mute.running().is_some()).await;
    assert_eq!(mute.unreached(), None);
    assert_eq!((mute.record().phase, inside.record().state.clone()), (Phase::Ready, State::Running));
}

#[tokio::test]
async fn a_pod_that_is_silent_can_be_stopped() {
    let folder = tempfile::tempdir().unwrap();
    let node = hasty_node(folder.path());
    let mute = sandbox(&node, Kind::Host, Phase::Ready).await;
    let run_dir = sandbox_run_dir(&node.config.run_dir, &mute.id);
    std::fs::create_dir(&run_dir).unwrap();
    let _listener = UnixListener::bind(run_dir.join("agent.sock")).unwrap();
    recover_within(&node, Duration::from_millis(100)).await.unwrap();
    let mute = node.registry.sandbox(mute.id.as_str()).unwrap();
    until(|| mute.unreached().is_some()).await;
    {
        let mut unlocked = Unlocked::new();
        let op = mute.lock_op(&mut unlocked).await;
        lifecycle::stop(&node, &op).await.unwrap();
    }
    assert_eq!((mute.record().phase, mute.unreached()), (Phase::NotReady, None));
    assert!(!run_dir.exists());
}
