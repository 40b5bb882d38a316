//! The `cpuid` leaves of the guest: the features that KVM supports, with a
//! topology of our own. All vCPUs are cores of one package, with one thread
//! each.

use kvm_bindings::{CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2};
use kvm_ioctls::{Cap, Kvm};

/// The leaves, in the order of the code below.
const FEATURES: u32 = 0x1;
const INTEL_CACHES: u32 = 0x4;
const PERFORMANCE: u32 = 0xa;
const TOPOLOGY: u32 = 0xb;
const TOPOLOGY_V2: u32 = 0x1f;
const AMD_FEATURES: u32 = 0x8000_0001;
const AMD_SIZES: u32 = 0x8000_0008;
const AMD_CACHES: u32 = 0x8000_001d;
const AMD_TOPOLOGY: u32 = 0x8000_001e;
const AMD_PERFORMANCE: u32 = 0x8000_0022;

const ECX_PDCM: u32 = 1 << 15;
const ECX_TSC_DEADLINE: u32 = 1 << 24;
const ECX_HYPERVISOR: u32 = 1 << 31;
const EDX_MULTITHREADING: u32 = 1 << 28;
const ECX_CMP_LEGACY: u32 = 1 << 1;
const ECX_AMD_PERFORMANCE: u32 = 1 << 23;
/// The levels of [`TOPOLOGY`].
const LEVEL_THREAD: u32 = 1;
const LEVEL_CORE: u32 = 2;

/// The `cpuid` leaves cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum CpuidError {
    /// KVM refused.
    #[error("ask KVM for the processor's features: {0}")]
    Kvm(#[from] kvm_ioctls::Error),
    /// There are more leaves than KVM accepts.
    #[error("the processor describes itself in too many leaves")]
    TooMany,
}

/// The `cpuid` leaves that all vCPUs of a machine have in common.
pub struct Template {
    entries: Vec<kvm_cpuid_entry2>,
    vcpus: u8,
}

impl Template {
    /// Asks KVM for its supported features.
    ///
    /// # Errors
    /// [`CpuidError`].
    pub fn new(kvm: &Kvm, vcpus: u8) -> Result<Self, CpuidError> {
        let supported = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)?;
        // KVM reports this feature of its local APIC apart.
        let tsc_deadline = kvm.check_extension(Cap::TscDeadlineTimer);
        Ok(Self::from_supported(supported.as_slice(), vcpus, tsc_deadline))
    }

    fn from_supported(supported: &[kvm_cpuid_entry2], vcpus: u8, tsc_deadline: bool) -> Self {
        let has_topology = supported.iter().any(|entry| entry.function == TOPOLOGY);
        let mut entries: Vec<_> = supported
            .iter()
            .filter(|entry| entry.function != TOPOLOGY && entry.function != TOPOLOGY_V2)
            .copied()
            .collect();
        if has_topology {
            let level = |index, eax, ebx, ecx| kvm_cpuid_entry2 {
                function: TOPOLOGY,
                index,
                flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
                eax,
                ebx,
                ecx,
                ..Default::default()
            };
            entries.push(level(0, 0, 1, LEVEL_THREAD << 8));
            entries.push(level(1, id_bits(vcpus), u32::from(vcpus), 1 | LEVEL_CORE << 8));
            entries.push(level(2, 0, 0, 2));
        }
        for entry in &mut entries {
            share(entry, vcpus, tsc_deadline);
        }
        Self { entries, vcpus }
    }

    /// The leaves of vCPU `index`.
    ///
    /// # Errors
    /// [`CpuidError::TooMany`].
    pub fn for_vcpu(&self, index: u8) -> Result<CpuId, CpuidError> {
        debug_assert!(index < self.vcpus);
        let apic_id = u32::from(index);
        let mut entries = self.entries.clone();
        for entry in &mut entries {
            match entry.function {
                FEATURES => entry.ebx = entry.ebx & 0x00ff_ffff | apic_id << 24,
                TOPOLOGY => entry.edx = apic_id,
                AMD_TOPOLOGY => (entry.eax, entry.ebx) = (apic_id, apic_id),
                _ => {}
            }
        }
        CpuId::from_entries(&entries).map_err(|_| CpuidError::TooMany)
    }
}

/// Sets the values that are the same on all vCPUs.
fn share(entry: &mut kvm_cpuid_entry2, vcpus: u8, tsc_deadline: bool) {
    let count = u32::from(vcpus);
    match entry.function {
        FEATURES => {
            entry.ebx = entry.ebx & 0xff00_ffff | count << 16;
            entry.ecx = entry.ecx & !ECX_PDCM | ECX_HYPERVISOR;
            if tsc_deadline {
                entry.ecx |= ECX_TSC_DEADLINE;
            }
            set(&mut entry.edx, EDX_MULTITHREADING, vcpus > 1);
        }
        INTEL_CACHES if entry.eax & 0x1f != 0 => {
            entry.eax = entry.eax & 0x3fff | sharing(entry.eax, count) << 14 | (count - 1).min(63) << 26;
        }
        AMD_CACHES if entry.eax & 0x1f != 0 => {
            entry.eax = entry.eax & 0x3fff | sharing(entry.eax, count) << 14;
        }
        // There are no performance counters: a pod has no use for them, and a
        // kernel that finds them spends boot time on their set-up.
        PERFORMANCE | AMD_PERFORMANCE => {
            (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0);
        }
        AMD_FEATURES => {
            entry.ecx &= !ECX_AMD_PERFORMANCE;
            if vcpus == 1 {
                entry.ecx &= !ECX_CMP_LEGACY;
            }
        }
        AMD_SIZES => entry.ecx = entry.ecx & !0xf0ff | (count - 1) | id_bits(vcpus) << 12,
        AMD_TOPOLOGY => entry.ecx = 0,
        _ => {}
    }
}

fn set(register: &mut u32, bit: u32, on: bool) {
    *register = if on { *register | bit } else { *register & !bit };
}

/// The number of vCPUs that share the cache that `eax` describes, less one: all
/// share the last level, each has the others for itself.
fn sharing(eax: u32, vcpus: u32) -> u32 {
    let level = eax >> 5 & 0x7;
    if level >= 3 { vcpus - 1 } else { 0 }
}

/// The number of bits of an APIC id that tell the vCPUs apart.
fn id_bits(vcpus: u8) -> u32 {
    u32::from(vcpus).next_power_of_two().trailing_zeros()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn leaf(function: u32, eax: u32, ebx: u32, ecx: u32, edx: u32) -> kvm_cpuid_entry2 {
        kvm_cpuid_entry2 { function, eax, ebx, ecx, edx, ..Default::default() }
    }

    fn find(cpuid: &CpuId, function: u32, index: u32) -> kvm_cpuid_entry2 {
        *cpuid.as_slice().iter().find(|e| e.function == function && e.index == index).unwrap()
    }

    #[test]
    fn each_vcpu_has_its_own_apic_id_everywhere() {
        let supported = [
            leaf(FEATURES, 0, 0xaa00_0800, 0, 0),
            leaf(TOPOLOGY, 9, 9, 9, 9),
            leaf(AMD_TOPOLOGY, 9, 9, 9, 9),
        ];
        let template = Template::from_supported(&supported, 6, true);
        let cpuid = template.for_vcpu(5).unwrap();
        assert_eq!(find(&cpuid, FEATURES, 0).ebx, 5 << 24 | 6 << 16 | 0x0800);
        assert_eq!(find(&cpuid, TOPOLOGY, 0).edx, 5);
        assert_eq!(find(&cpuid, TOPOLOGY, 1).edx, 5);
        assert_eq!(find(&cpuid, AMD_TOPOLOGY, 0).eax, 5);
        // Three bits tell six apart, and the package begins above them.
        assert_eq!(find(&cpuid, TOPOLOGY, 1).eax, 3);
        assert_eq!(find(&cpuid, TOPOLOGY, 1).ebx, 6);
    }

    #[test]
    fn the_guest_knows_that_it_is_one() {
        let supported = [leaf(FEATURES, 0, 0, ECX_PDCM, 0)];
        let with = Template::from_supported(&supported, 1, true).for_vcpu(0).unwrap();
        assert_eq!(find(&with, FEATURES, 0).ecx, ECX_HYPERVISOR | ECX_TSC_DEADLINE);
        let without = Template::from_supported(&supported, 1, false).for_vcpu(0).unwrap();
        assert_eq!(find(&without, FEATURES, 0).ecx, ECX_HYPERVISOR);
    }

    #[test]
    fn only_the_last_level_cache_is_shared() {
        let supported = [leaf(INTEL_CACHES, 1 | 1 << 5, 0, 0, 0), leaf(INTEL_CACHES, 3 | 3 << 5, 0, 0, 0)];
        let template = Template::from_supported(&supported, 4, false);
        let eax: Vec<u32> = template.entries.iter().map(|e| e.eax >> 14 & 0xfff).collect();
        assert_eq!(eax, [0, 3]);
    }

    #[test]
    fn a_processor_without_the_topology_leaf_gets_none() {
        let template = Template::from_supported(&[leaf(FEATURES, 0, 0, 0, 0)], 2, false);
        assert_eq!(template.entries.len(), 1);
        assert_ne!(template.entries[0].edx & EDX_MULTITHREADING, 0);
    }
}
