//! Sandboxes of a node that is a folder: what huskd does to records, and to what
//! it finds beside them.

use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use husk_backend::Ending;
use husk_base::dirs::sandbox_run_dir;
use husk_base::id::SandboxId;
use husk_config::Kind;
use husk_proto::cri;

use super::lifecycle;
use super::recover::{recover, recover_within};
use super::remove_container::tear_down;
use crate::Node;
use crate::model::sandbox::{CONTAINERS, RECORD};
use crate::model::{ContainerRecord, Events, Phase, SandboxRecord, State, Unlocked, names};
use crate::test_util::{container, node, running, sandbox};

mod golden;
mod records;
mod undo;
mod unreached;

#[tokio::test]
async fn nothing_in_the_folder_of_sandboxes_keeps_huskd_from_starting() {
    let folder = tempfile::tempdir().unwrap();
    let node = node(folder.path());
    let sandboxes = node.sandboxes_dir();
    let (notes, found) = (sandboxes.join("notes.txt"), sandboxes.join("lost+found"));
    std::fs::write(&notes, "of the administrator").unwrap();
    std::fs::create_dir(&found).unwrap();
    let file = sandboxes.join(SandboxId::random().as_str());
    std::fs::write(&file, "").unwrap();
    // Nothing was made of a pod without a record.
    let empty = SandboxId::random();
    let path = sandboxes.join(empty.as_str());
    std::fs::create_dir(&path).unwrap();
    std::fs::write(path.join("scratch.ext4"), "disk").unwrap();
    let run_dir = sandbox_run_dir(&node.config.run_dir, &empty);
    std::fs::create_dir(&run_dir).unwrap();
    let good = sandbox(&node, Kind::Vm, Phase::NotReady).await;
    recover(&node).await.unwrap();
    assert!(notes.exists() && found.exists() && file.exists());
    assert!(!path.exists() && !run_dir.exists());
    assert!(node.registry.sandbox(good.id.as_str()).is_ok());
}

#[tokio::test]
async fn a_stop_in_the_middle_of_which_huskd_ended_is_finished() {
    let folder = tempfile::tempdir().unwrap();
    let node = node(folder.path());
    let stopping = sandbox(&node, Kind::Vm, Phase::NotReady).await;
    let running = container(&stopping, State::Running).await;
    std::fs::write(stopping.scratch(), "disk").unwrap();
    let run_dir = sandbox_run_dir(&node.config.run_dir, &stopping.id);
    std::fs::create_dir(&run_dir).unwrap();
    recover(&node).await.unwrap();
    assert!(!run_dir.exists() && !stopping.scratch().exists());
    let (_, running) = node.registry.container(running.id.as_str()).unwrap();
    assert!(matches!(running.record().state, State::Exited(_)));
    let stopped = node.registry.sandbox(stopping.id.as_str()).unwrap();
    assert_eq!(stopped.record().phase, Phase::NotReady);
}

#[tokio::test]
async fn a_mute_guest_holds_up_nobody_and_is_not_ended_at_once() {
    let folder = tempfile::tempdir().unwrap();
    let node = node(folder.path());
    let mute = sandbox(&node, Kind::Host, Phase::Ready).await;
    mute.update(|record| record.handler = "of-an-earlier-configuration".into()).await.unwrap();
    let inside = container(&mute, State::Running).await;
    let gone = sandbox(&node, Kind::Vm, Phase::Ready).await;
    let run_dir = sandbox_run_dir(&node.config.run_dir, &mute.id);
    std::fs::create_dir(&run_dir).unwrap();
    // Connections wait in its backlog, and nobody ever takes one.
    let _listener = UnixListener::bind(run_dir.join("agent.sock")).unwrap();
    let limit = std::time::Duration::from_millis(300);
    tokio::time::timeout(limit * 50, recover_within(&node, limit)).await.unwrap().unwrap();
    let gone = node.registry.sandbox(gone.id.as_str()).unwrap();
    assert_eq!(gone.record().phase, Phase::NotReady);
    assert!(!gone.record().problem.is_empty());

    let mute = node.registry.sandbox(mute.id.as_str()).unwrap();
    assert_eq!(mute.record().phase, Phase::Ready);
    let mut unlocked = Unlocked::new();
    let op = tokio::time::timeout(limit, mute.lock_op(&mut unlocked)).await.expect("it can be stopped");
    // A container that is not known to have left the machine is not forgotten.
    let (_, inside) = node.registry.container(inside.id.as_str()).unwrap();
    let refused = tear_down(&node, &op, &inside).await.unwrap_err();
    assert!(refused.to_string().contains("has not answered"), "{refused}");
    assert!(node.registry.container(inside.id.as_str()).is_ok());
}

#[tokio::test]
async fn a_container_that_was_never_made_is_no_exited_one_when_its_pod_ends() {
    let folder = tempfile::tempdir().unwrap();
    let node = node(folder.path());
    let pod = sandbox(&node, Kind::Vm, Phase::Ready).await;
    let unmade = container(&pod, State::Creating).await;
    node.registry.add_sandbox(pod.clone());
    node.registry.add_container(pod.clone(), unmade.clone());
    lifecycle::ended(&pod, &Ending::of("the machine panicked")).await;
    assert_eq!(unmade.record().state, State::Creating);
    let mut unlocked = Unlocked::new();
    lifecycle::stop(&node, &pod.lock_op(&mut unlocked).await).await.unwrap();
    assert!(node.registry.container(unmade.id.as_str()).is_err());
    assert_eq!(std::fs::read_dir(pod.directory().join("containers")).unwrap().count(), 0);
}

#[tokio::test]
async fn containers_of_a_vmm_that_was_killed_for_want_of_memory_are_told_so() {
    let folder = tempfile::tempdir().unwrap();
    let (sandbox, container) = running(folder.path(), "p", Events::default()).await;
    sandbox.add_container(container.clone());
    let ending = Ending { problem: "the node's memory ran out".into(), out_of_memory: true };
    lifecycle::ended(&sandbox, &ending).await;
    let State::Exited(exit) = container.record().state.clone() else { panic!("it has ended") };
    assert_eq!((exit.code, exit.reason.as_str()), (137, "OOMKilled"));
    assert_eq!((exit.message, sandbox.record().problem.clone()), (ending.problem.clone(), ending.problem));
}

#[tokio::test]
async fn a_full_disk_keeps_nothing_from_being_given_back() {
    let folder = tempfile::tempdir().unwrap();
    let node = node(folder.path());
    let full = sandbox(&node, Kind::Vm, Phase::Ready).await;
    std::fs::write(full.scratch(), "all that there was").unwrap();
    // No record can be written any more.
    std::fs::create_dir(full.directory().join("sandbox.new")).unwrap();
    assert!(full.update(|_| {}).await.is_err());
    let mut unlocked = Unlocked::new();
    lifecycle::stop(&node, &full.lock_op(&mut unlocked).await).await.unwrap();
    assert!(!full.scratch().exists());
    assert_eq!(full.record().phase, Phase::NotReady);
}
