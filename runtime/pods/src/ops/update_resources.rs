//! Other limits of a pod or a container while it runs.
//!
//! A request changes what it names; a number that is 0 and a text that is
//! empty stay as they were (CRI `api.proto`).

use std::sync::Arc;

use husk_backend::VmSize;
use husk_base::chain;
use husk_proto::agent::UpdateContainerRequest;
use husk_proto::cri::LinuxContainerResources;

use super::ready::ready_pod;
use super::{oom_score, pin_cpus};
use crate::model::{ContainerOp, Sandbox, State, Unlocked};
use crate::{Error, Node};

/// Changes the limits of a container.
///
/// # Errors
/// Limits that do not fit into the pod's VM, or that the agent refuses.
pub async fn update_container(
    node: &Arc<Node>,
    container_id: &str,
    asked: LinuxContainerResources,
) -> Result<(), Error> {
    let (sandbox, container) = node.registry.container(container_id)?;
    let mut unlocked = Unlocked::new();
    let container = container.lock_op(&mut unlocked).await;
    let old = container.record().config.linux.clone().unwrap_or_default().resources.unwrap_or_default();
    let new = merge(&old, asked);
    if let Some(size) = sandbox.record().size {
        check_size(&old, &new, size)?;
    }
    let mut resources = husk_oci::resource_limits(&new)?;
    sandbox.place(&node.config.run_dir).choose_cpus(&mut resources, &new);
    let update = UpdateContainerRequest {
        container_id: container.id.to_string(),
        resources_json: serde_json::to_vec(&resources)
            .map_err(|error| Error::Broken(format!("update resources: {error}")))?,
        oom_score_adj: husk_oci::oom_score_adj(&new)?.unwrap_or(0),
    };
    record(&container, &new).await?;
    if let Err(error) = apply(node, &sandbox, &container, update).await {
        record(&container, &old).await?;
        oom_score::set(node, &sandbox);
        if let Err(error) = pin_cpus::pin(node, &sandbox) {
            tracing::warn!(error = chain(&error), "failed to undo an update of resources");
        }
        return Err(error);
    }
    tracing::info!("resources updated");
    Ok(())
}

async fn record(container: &ContainerOp<'_>, resources: &LinuxContainerResources) -> Result<(), Error> {
    Ok(container
        .update(|record| {
            record.config.linux.get_or_insert_default().resources = Some(resources.clone());
        })
        .await?)
}

async fn apply(
    node: &Node,
    sandbox: &Sandbox,
    container: &ContainerOp<'_>,
    update: UpdateContainerRequest,
) -> Result<(), Error> {
    // A container that has ended, or cannot start, has nothing to limit.
    if !matches!(container.record().state, State::Created | State::Running)
        || !container.record().start_error.is_empty()
    {
        return Ok(());
    }
    pin_cpus::pin(node, sandbox)?;
    oom_score::set(node, sandbox);
    let running = ready_pod(sandbox)?;
    let updated =
        running.agent.call("update resources", async |mut agent| agent.update_container(update).await).await;
    match updated {
        // The container has ended meanwhile.
        Err(error) if error.status.code() == tonic::Code::FailedPrecondition => Ok(()),
        other => Ok(other.map(drop)?),
    }
}

/// `old` with what `new` names in its place.
fn merge(old: &LinuxContainerResources, new: LinuxContainerResources) -> LinuxContainerResources {
    let number = |old: i64, new: i64| if new == 0 { old } else { new };
    let text = |old: &str, new: String| if new.is_empty() { old.to_owned() } else { new };
    let mut hugepage_limits = old.hugepage_limits.clone();
    hugepage_limits
        .retain(|limit| new.hugepage_limits.iter().all(|other| other.page_size != limit.page_size));
    hugepage_limits.extend(new.hugepage_limits);
    let mut unified = old.unified.clone();
    unified.extend(new.unified);
    LinuxContainerResources {
        cpu_period: number(old.cpu_period, new.cpu_period),
        cpu_quota: number(old.cpu_quota, new.cpu_quota),
        cpu_shares: number(old.cpu_shares, new.cpu_shares),
        memory_limit_in_bytes: number(old.memory_limit_in_bytes, new.memory_limit_in_bytes),
        oom_score_adj: number(old.oom_score_adj, new.oom_score_adj),
        cpuset_cpus: text(&old.cpuset_cpus, new.cpuset_cpus),
        cpuset_mems: text(&old.cpuset_mems, new.cpuset_mems),
        hugepage_limits,
        unified,
        memory_swap_limit_in_bytes: match new.memory_swap_limit_in_bytes {
            0 => swap_limit(old, new.memory_limit_in_bytes),
            named => named,
        },
    }
}

/// The limit of memory and swap together, when a request names the memory's
/// alone: what is left for swap stays as it was.
const fn swap_limit(old: &LinuxContainerResources, memory: i64) -> i64 {
    let both = old.memory_swap_limit_in_bytes;
    if memory <= 0 || both <= 0 {
        return both;
    }
    if old.memory_limit_in_bytes <= 0 {
        // As for a new container.
        return 0;
    }
    memory.saturating_add(both.saturating_sub(old.memory_limit_in_bytes))
}

/// A limit that is larger than the machine limits nothing, and a new container
/// may have it. Who changes one to that wants more than there is.
fn check_size(
    old: &LinuxContainerResources,
    new: &LinuxContainerResources,
    size: VmSize,
) -> Result<(), Error> {
    /// The kernel's period where none is named, microseconds.
    const PERIOD: u64 = 100_000;
    let cpus = |limit: &LinuxContainerResources| {
        let period = if limit.cpu_period > 0 { limit.cpu_period.unsigned_abs() } else { PERIOD };
        if limit.cpu_quota > 0 { limit.cpu_quota.unsigned_abs().div_ceil(period) } else { 0 }
    };
    let mib =
        |limit: &LinuxContainerResources| limit.memory_limit_in_bytes.max(0).unsigned_abs().div_ceil(1 << 20);
    for (what, old, new, most) in [
        ("vCPUs", cpus(old), cpus(new), u64::from(size.vcpus)),
        ("MiB of memory", mib(old), mib(new), u64::from(size.memory_mib)),
    ] {
        if new != old && new > most {
            return Err(Error::WrongState(format!(
                "update resources: the limit takes {new} {what}, the pod's machine has {most} and cannot grow while it \
                 runs: make the pod anew"
            )));
        }
    }
    Ok(())
}

/// The size of a machine is decided when it starts. What fits into it is noted;
/// limits of the pod as a whole are those of the control group that the client
/// names as its parent, where the client sets them itself.
///
/// # Errors
/// The limits do not fit into the pod's machine.
pub async fn update_sandbox(
    node: &Arc<Node>,
    sandbox_id: &str,
    overhead: Option<LinuxContainerResources>,
    resources: Option<LinuxContainerResources>,
) -> Result<(), Error> {
    let sandbox = node.registry.sandbox(sandbox_id)?;
    let mut unlocked = Unlocked::new();
    let sandbox = sandbox.lock_op(&mut unlocked).await;
    ready_pod(&sandbox)?;
    let record = sandbox.record();
    let mut config = record.config.clone();
    let linux = config.linux.get_or_insert_default();
    for (kept, asked) in [(&mut linux.overhead, overhead), (&mut linux.resources, resources)] {
        if let Some(asked) = asked {
            *kept = Some(merge(&kept.take().unwrap_or_default(), asked));
        }
    }
    if let Some(handler) = node.config.handler(&record.handler).and_then(|(_, handler)| handler.vm())
        && let Some(size) = record.size
    {
        let wanted = VmSize::of(&config, handler);
        if wanted.vcpus > size.vcpus || wanted.memory_mib > size.memory_mib {
            return Err(Error::WrongState(format!(
                "update pod resources: they need a machine of {} vCPUs and {} MiB, this one has {} and {} and cannot \
                 grow while it runs: make the pod anew",
                wanted.vcpus, wanted.memory_mib, size.vcpus, size.memory_mib
            )));
        }
    }
    sandbox.update(|record| record.config = config).await?;
    tracing::info!("pod resources updated");
    Ok(())
}

#[cfg(test)]
mod tests {
    use husk_proto::cri::HugepageLimit;

    use super::*;

    #[test]
    fn what_is_not_named_stays() {
        let old = LinuxContainerResources {
            cpu_shares: 2,
            memory_limit_in_bytes: 100,
            cpuset_cpus: "0".into(),
            hugepage_limits: vec![HugepageLimit { page_size: "2MB".into(), limit: 1 }],
            unified: [("memory.high".to_owned(), "1".to_owned())].into(),
            ..Default::default()
        };
        assert_eq!(merge(&old, LinuxContainerResources::default()), old);
        let new = merge(
            &old,
            LinuxContainerResources {
                memory_limit_in_bytes: 200,
                cpu_quota: -1,
                hugepage_limits: vec![
                    HugepageLimit { page_size: "2MB".into(), limit: 5 },
                    HugepageLimit { page_size: "1GB".into(), limit: 6 },
                ],
                unified: [("memory.high".to_owned(), "2".to_owned())].into(),
                ..Default::default()
            },
        );
        assert_eq!((new.cpu_shares, new.memory_limit_in_bytes, new.cpu_quota), (2, 200, -1));
        assert_eq!(new.cpuset_cpus, "0");
        assert_eq!(new.hugepage_limits.iter().map(|limit| limit.limit).collect::<Vec<_>>(), [5, 6]);
        assert_eq!(new.unified.get("memory.high").map(String::as_str), Some("2"));
    }

    fn limits(memory: i64, both: i64) -> LinuxContainerResources {
        LinuxContainerResources {
            memory_limit_in_bytes: memory,
            memory_swap_limit_in_bytes: both,
            ..Default::default()
        }
    }

    #[test]
    fn a_new_limit_of_memory_leaves_as_much_for_swap_as_before() {
        for (old, asked, both) in [
            // All that was there was memory, and so it is again.
            ((100, 100), (200, 0), 200),
            ((100, 150), (200, 0), 250),
            ((100, 150), (20, 0), 70),
            ((100, 100), (200, 900), 900),
            ((100, 100), (0, 0), 100),
            // Without one it is the memory's when the limit is set.
            ((100, 0), (200, 0), 0),
            ((0, 100), (200, 0), 0),
            ((100, -1), (200, 0), -1),
            ((1, i64::MAX), (i64::MAX, 0), i64::MAX),
        ] {
            let new = merge(&limits(old.0, old.1), limits(asked.0, asked.1));
            assert_eq!(new.memory_swap_limit_in_bytes, both, "{old:?} {asked:?}");
        }
    }

    #[test]
    fn what_changes_must_fit_into_the_machine() {
        const MIB: i64 = 1 << 20;
        let size = VmSize { vcpus: 2, memory_mib: 512 };
        let limits = |memory: i64, cpu_quota, cpu_period| LinuxContainerResources {
            memory_limit_in_bytes: memory * MIB,
            cpu_quota,
            cpu_period,
            ..Default::default()
        };
        let none = LinuxContainerResources::default();
        for (new, fits) in [
            (limits(512, 200_000, 100_000), true),
            (limits(513, 0, 0), false),
            (limits(8 << 10, 0, 0), false),
            (limits(0, 200_001, 100_000), false),
            (limits(0, 200_001, 0), false),
            (limits(0, -1, 100_000), true),
            (limits(0, 50_000, 10_000), false),
            (limits(-1, i64::MAX, 1), false),
        ] {
            assert_eq!(check_size(&none, &new, size).is_ok(), fits, "{new:?}");
        }
        // A limit that was there before does not stand in the way of another change.
        let before = limits(1024, 300_000, 100_000);
        let shares = LinuxContainerResources { cpu_shares: 9, ..before.clone() };
        assert!(check_size(&before, &shares, size).is_ok());
        let error = check_size(&before, &limits(2048, 300_000, 100_000), size).unwrap_err().to_string();
        assert!(error.contains("2048 MiB") && error.contains("512"), "{error}");
    }
}
