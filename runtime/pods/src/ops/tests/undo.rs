//! Pods that were never ready, and cannot be undone at once.

use std::time::Duration;

use super::*;

#[tokio::test]
async fn a_pod_that_cannot_be_undone_is_tried_again_and_shown() {
    let folder = tempfile::tempdir().unwrap();
    let node = node(folder.path());
    let half = sandbox(&node, Kind::Vm, Phase::Creating).await;
    // A folder in the place of its disk is no file to remove.
    std::fs::create_dir(half.scratch()).unwrap();
    recover(&node).await.unwrap();
    let until = async |shown: bool| {
        let met = async {
            while node.registry.unfinished().contains_key(&half.id) != shown {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(20), met).await.unwrap();
    };
    until(true).await;
    assert!(node.registry.unfinished()[&half.id].contains("remove sandbox disk"));
    assert!(half.directory().exists());
    std::fs::remove_dir(half.scratch()).unwrap();
    until(false).await;
    assert!(!half.directory().exists());
}
