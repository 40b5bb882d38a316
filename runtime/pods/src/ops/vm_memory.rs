//! The memory that the node lets a pod have, and the memory that its VM may use. A VM that
//! uses more than it may is killed by the node's kernel, with all containers of the pod.

use std::path::PathBuf;
use std::time::Duration;

use husk_backend::{RunningPod, memory_limit_mib};
use husk_base::cgroup;

use crate::Error;
use crate::model::{Sandbox, SandboxRecord};

/// MiB that a VM may use beside its guest's memory: of its VMM, its file server, and the
/// kernel for both.
const BESIDE_GUEST_MIB: u64 = 44;

/// MiB without which no machine boots. A booted guest that is idle has touched 46 and
/// more (`docs/benchmarks.md`).
const BOOT_MIB: u64 = 48;

/// How long a VMM whose connections have broken may take until it has ended.
const END_TIMEOUT: Duration = Duration::from_secs(2);

/// A pod whose limit is below what its VM may use.
#[derive(Debug, PartialEq, Eq)]
struct Shortage {
    /// The control group with the limit.
    group: PathBuf,
    allowed_mib: u64,
    /// Guest memory and the rest.
    used_mib: u64,
    handler: String,
    /// The memory of `overhead.podFixed` that the RuntimeClass should have.
    overhead_mib: u64,
}

impl Shortage {
    /// `None` for a pod with enough, and for one without a VM.
    fn of(record: &SandboxRecord) -> Option<Self> {
        let size = record.size?;
        let (group, allowed) = cgroup::memory_limit(record.cgroup.as_deref()?)?;
        let (allowed_mib, guest_mib) = (allowed >> 20, u64::from(size.memory_mib));
        let used_mib = guest_mib + BESIDE_GUEST_MIB;
        (allowed_mib < used_mib).then(|| Self {
            group,
            allowed_mib,
            used_mib,
            handler: record.handler.clone(),
            overhead_mib: guest_mib.saturating_sub(memory_limit_mib(&record.config)) + BESIDE_GUEST_MIB,
        })
    }

    fn advice(&self) -> String {
        format!(
            "give the RuntimeClass of the handler `{}` an `overhead.podFixed` with `memory: {}Mi`, or raise the \
             pod's memory limit",
            self.handler, self.overhead_mib
        )
    }
}

impl std::fmt::Display for Shortage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "the pod may use {} MiB of the node's memory (memory.max of {}), and its machine up to {} MiB: \
             {}, or the node's kernel may end the pod for want of memory",
            self.allowed_mib,
            self.group.display(),
            self.used_mib,
            self.advice()
        )
    }
}

/// Refuses a pod whose machine could not even boot within the pod's limit, and warns of
/// one that it may outgrow.
///
/// # Errors
/// The error names the limit, and the overhead that is missing.
pub(super) fn check(record: &SandboxRecord) -> Result<(), Error> {
    let Some(shortage) = Shortage::of(record) else { return Ok(()) };
    if shortage.allowed_mib < BOOT_MIB {
        return Err(Error::WrongState(format!(
            "the pod may use {} MiB of the node's memory (memory.max of {}), and no machine boots in less than \
             {BOOT_MIB} MiB: {}",
            shortage.allowed_mib,
            shortage.group.display(),
            shortage.advice()
        )));
    }
    tracing::warn!(sandbox = %record.id, problem = %shortage, "the pod's memory limit is too low for its machine");
    Ok(())
}

/// A warning about a pod whose machine may use more memory than the pod may.
#[must_use]
pub fn memory_warning(record: &SandboxRecord) -> Option<String> {
    Shortage::of(record).map(|shortage| shortage.to_string())
}

/// The error of a pod that did not come up: that its VMM was killed for want of memory, if
/// it was, whatever failed for it.
pub(super) async fn explain_start(record: &SandboxRecord, error: Error) -> Error {
    // A host pod has no size.
    let cgroup = record.cgroup.as_deref().filter(|_| record.size.is_some());
    match husk_vm::out_of_memory(cgroup, 0).await {
        Some(problem) => Error::Full(format!("start the pod's VM: {problem}")),
        None => error,
    }
}

/// The error of an operation in a pod: the end of the pod, if that is the reason for which
/// its agent or its VMM did not answer.
pub(super) async fn explain(sandbox: &Sandbox, running: &RunningPod, error: Error) -> Error {
    if !matches!(&error, Error::Agent(agent) if agent.lost) && !matches!(&error, Error::Vm(_)) {
        return error;
    }
    let record = sandbox.record();
    let end = running.backend.wait(record.cgroup.as_deref(), record.oom_kills);
    let ended = tokio::time::timeout(END_TIMEOUT, end);
    match ended.await {
        Ok(ending) if ending.out_of_memory => Error::Full(ending.problem),
        _ => error,
    }
}

#[cfg(test)]
mod tests {
    use husk_proto::cri;

    use super::*;
    use crate::test_util::sandbox_record;
    use husk_backend::VmSize;

    fn shortage(allowed_mib: u64, limit_mib: i64) -> Option<Shortage> {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("memory.max"), format!("{}\n", allowed_mib << 20)).unwrap();
        let resources =
            cri::LinuxContainerResources { memory_limit_in_bytes: limit_mib << 20, ..Default::default() };
        let linux = cri::LinuxPodSandboxConfig { resources: Some(resources), ..Default::default() };
        let mut record = sandbox_record("p");
        record.config.linux = Some(linux);
        record.size = Some(VmSize { vcpus: 1, memory_mib: 256 + u32::try_from(limit_mib).unwrap() });
        record.cgroup = Some(folder.path().to_owned());
        let shortage = Shortage::of(&record);
        assert_eq!(check(&record).is_err(), allowed_mib < BOOT_MIB);
        if let Err(error) = check(&record) {
            let text = error.to_string();
            assert!(text.contains("memory: 300Mi") && text.contains("kata-runtime"), "{text}");
            assert!(text.contains(&format!("{allowed_mib} MiB")), "{text}");
        }
        assert_eq!(memory_warning(&record).is_some(), shortage.is_some());
        shortage
    }

    #[test]
    fn a_pod_is_refused_in_which_no_machine_boots_and_warned_of_when_its_machine_may_outgrow_it() {
        // As the kubelet has it: the pod's limit is the containers' and the overhead.
        assert_eq!(shortage(24 + 300, 24), None);
        for (allowed, limit) in [(24, 24), (47, 47), (48, 48), (512, 512)] {
            let shortage = shortage(allowed, limit).unwrap();
            assert_eq!((shortage.used_mib, shortage.overhead_mib), (limit.unsigned_abs() + 300, 300));
        }
    }

    #[tokio::test]
    async fn a_pod_that_did_not_start_because_its_vmm_was_killed_is_told_so() {
        let folder = tempfile::tempdir().unwrap();
        let mut record = sandbox_record("p");
        record.cgroup = Some(folder.path().to_owned());
        let error = || Error::Broken("the VMM hung up".into());
        assert!(matches!(explain_start(&record, error()).await, Error::Broken(_)));
        std::fs::write(folder.path().join("memory.events"), "oom 1\noom_kill 1\n").unwrap();
        let Error::Full(text) = explain_start(&record, error()).await else { panic!("another error") };
        assert!(text.contains("the kernel killed the machine's VMM") && text.contains("overhead"), "{text}");
    }
}
