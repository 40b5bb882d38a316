//! Records that this huskd cannot use, and those of every release.

use super::*;
use crate::model::LookupError;

fn named(name: &str) -> cri::PodSandboxConfig {
    let metadata = cri::PodSandboxMetadata { name: name.into(), uid: "u".into(), ..Default::default() };
    cri::PodSandboxConfig { metadata: Some(metadata), ..Default::default() }
}

/// A socket on which a pod's VMM listens, as far as one can tell without asking it.
fn vmm(run_dir: &Path) -> std::os::fd::OwnedFd {
    std::fs::create_dir_all(run_dir).unwrap();
    husk_vm::listen_seqpacket(&run_dir.join("vmm.sock")).unwrap()
}

#[tokio::test]
async fn a_pod_whose_record_does_not_read_is_left_alone_and_its_name_stays_taken() {
    let (newer, typo, cut) = (
        |text: &str| text.replacen("\"version\": 1", "\"version\": 999", 1),
        |text: &str| text.replacen("\"created_at\": 1", "\"created_at\": \"x\"", 1),
        |text: &str| text[..text.len() - 40].to_owned(),
    );
    let damages: [&dyn Fn(&str) -> String; 3] = [&newer, &typo, &cut];
    let folder = tempfile::tempdir().unwrap();
    let node = node(folder.path());
    let mut pods = Vec::new();
    for (number, damage) in damages.into_iter().enumerate() {
        let pod = sandbox(&node, Kind::Vm, Phase::Ready).await;
        let config = named(&format!("pod-{number}"));
        pod.update(|record| record.config = config.clone()).await.unwrap();
        let path = pod.directory().join(RECORD);
        let before = std::fs::read_to_string(&path).unwrap();
        let after = damage(&before);
        assert_ne!(before, after);
        std::fs::write(&path, &after).unwrap();
        let run_dir = sandbox_run_dir(&node.config.run_dir, &pod.id);
        let machine = vmm(&run_dir);
        pods.push((pod.id.clone(), config, path, after, run_dir, machine));
    }
    recover(&node).await.unwrap();
    for (id, config, path, text, run_dir, _machine) in &pods {
        assert!(run_dir.join("vmm.sock").exists(), "its machine is not ended");
        assert_eq!(std::fs::read_to_string(path).unwrap(), *text);
        assert_eq!(std::fs::read_to_string(path.with_extension("json.bad")).unwrap(), *text);
        let taken = node.registry.reserve(names::sandbox(config), "other").unwrap_err();
        assert_eq!(taken.holder, id.as_str());
        assert!(taken.to_string().contains("does not read"), "{taken}");
        let unread = node.registry.sandbox(id.short()).unwrap_err();
        assert!(matches!(&unread, LookupError::Unread { advice, .. } if advice.contains("restart huskd")));
    }
    assert_eq!(node.registry.unread().len(), pods.len());
}

#[tokio::test]
async fn a_pod_that_lives_and_has_lost_its_record_is_left_alone() {
    let folder = tempfile::tempdir().unwrap();
    let node = node(folder.path());
    let pod = sandbox(&node, Kind::Vm, Phase::Ready).await;
    std::fs::remove_file(pod.directory().join(RECORD)).unwrap();
    let run_dir = sandbox_run_dir(&node.config.run_dir, &pod.id);
    let _machine = vmm(&run_dir);
    recover(&node).await.unwrap();
    assert!(run_dir.exists() && pod.directory().exists());
    assert!(node.registry.sandbox(pod.id.as_str()).is_err());
    assert_eq!(node.registry.unread().len(), 1);
}

#[tokio::test]
async fn a_container_whose_record_does_not_read_is_not_made_again() {
    let folder = tempfile::tempdir().unwrap();
    let node = node(folder.path());
    let pod = sandbox(&node, Kind::Vm, Phase::NotReady).await;
    pod.update(|record| record.config = named("web")).await.unwrap();
    let metadata = cri::ContainerMetadata { name: "app".into(), attempt: 2 };
    let config = cri::ContainerConfig { metadata: Some(metadata), ..Default::default() };
    let app = container(&pod, State::Running).await;
    app.update(|record| record.config = config.clone()).await.unwrap();
    let path = pod.directory().join("containers").join(format!("{}.json", app.id));
    let text = std::fs::read_to_string(&path).unwrap().replacen("\"running\"", "\"of_the_future\"", 1);
    std::fs::write(&path, &text).unwrap();
    recover(&node).await.unwrap();
    assert_eq!(std::fs::read_to_string(&path).unwrap(), text);
    let name = names::container(&config, &pod.record().config);
    assert_eq!(node.registry.reserve(name.clone(), "other").unwrap_err().holder, app.id.as_str());
    let [unread] = &node.registry.unread_of(&pod.id)[..] else { panic!("one record does not read") };
    assert_eq!(unread.disks, Some(vec![("image-0".into(), PathBuf::new())]));
    assert!(matches!(node.registry.container(app.id.as_str()), Err(LookupError::Unread { .. })));
    // The record goes with its pod.
    let pod = node.registry.sandbox(pod.id.as_str()).unwrap();
    let mut unlocked = Unlocked::new();
    lifecycle::forget(&node, &pod.lock_op(&mut unlocked).await).await.unwrap();
    assert!(node.registry.unread().is_empty());
    node.registry.reserve(name, "other").unwrap().keep();
}

#[tokio::test]
async fn a_pod_whose_containers_cannot_be_listed_is_one_that_has_unknown_ones() {
    let folder = tempfile::tempdir().unwrap();
    let node = node(folder.path());
    let pod = sandbox(&node, Kind::Vm, Phase::NotReady).await;
    let containers = pod.directory().join(CONTAINERS);
    std::fs::remove_dir(&containers).unwrap();
    std::fs::write(&containers, "").unwrap();
    recover(&node).await.unwrap();
    let [unread] = &node.registry.unread_of(&pod.id)[..] else { panic!("nothing is known of them") };
    assert_eq!((&unread.name, &unread.disks), (&None, &None));
}

#[tokio::test]
async fn what_a_later_release_has_added_to_a_record_survives_this_one() {
    let folder = tempfile::tempdir().unwrap();
    let node = node(folder.path());
    let pod = sandbox(&node, Kind::Vm, Phase::Ready).await;
    let path = pod.directory().join(RECORD);
    let mut record: serde_json::Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    record["of_the_future"] = 1.into();
    record["boot"]["of_the_future"] = 2.into();
    std::fs::write(&path, record.to_string()).unwrap();
    // The record notes that the machine has gone.
    recover(&node).await.unwrap();
    let record: serde_json::Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    assert_eq!(record["phase"], "not_ready");
    assert_eq!((&record["of_the_future"], &record["boot"]["of_the_future"]), (&1.into(), &2.into()));
}
