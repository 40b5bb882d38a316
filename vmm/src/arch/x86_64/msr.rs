//! Model-specific registers: the few that must not keep KVM's reset value, and
//! the list that a snapshot saves.

use kvm_bindings::{KVM_MAX_MSR_ENTRIES, Msrs, kvm_msr_entry};
use kvm_ioctls::{Kvm, VcpuFd};

/// The time stamp counter.
pub const TSC: u32 = 0x10;
/// The value of the time stamp counter at which the local timer fires; 0 is
/// never.
pub const TSC_DEADLINE: u32 = 0x6e0;

const IA32_MISC_ENABLE: u32 = 0x1a0;
const MISC_ENABLE_FAST_STRING: u64 = 1;
const MTRR_DEF_TYPE: u32 = 0x2ff;
const MTRR_ENABLE: u64 = 1 << 11;
const MTRR_WRITE_BACK: u64 = 6;

/// The memory type range registers, which KVM has but does not list: the
/// variable ranges, the fixed ones, and the default.
fn mtrrs() -> impl Iterator<Item = u32> {
    (0x200..0x210).chain([0x250, 0x258, 0x259]).chain(0x268..0x270).chain([MTRR_DEF_TYPE])
}

/// Model-specific registers could not be read or written.
#[derive(Debug, thiserror::Error)]
pub enum MsrError {
    /// The list exceeds KVM's limit.
    #[error("list of {0} model-specific registers is too long")]
    TooMany(usize),
    /// KVM refused.
    #[error("model-specific registers: {0}")]
    Kvm(#[from] kvm_ioctls::Error),
    /// KVM does not accept this register.
    #[error("model-specific register {0:#x} refused")]
    Refused(u32),
}

/// Sets the values that firmware would set: fast string operations are on
/// (Intel guests switch `rep movsb` off otherwise), and all memory is cached
/// write-back.
///
/// # Errors
/// [`MsrError`].
pub fn set_boot_values(vcpu: &VcpuFd) -> Result<(), MsrError> {
    let entry = |index, data| kvm_msr_entry { index, data, ..Default::default() };
    write(
        vcpu,
        &[
            entry(IA32_MISC_ENABLE, MISC_ENABLE_FAST_STRING),
            entry(MTRR_DEF_TYPE, MTRR_ENABLE | MTRR_WRITE_BACK),
        ],
    )
}

/// Writes all of `entries`.
///
/// # Errors
/// [`MsrError::Refused`] names the first register that KVM does not accept.
pub fn write(vcpu: &VcpuFd, entries: &[kvm_msr_entry]) -> Result<(), MsrError> {
    for chunk in entries.chunks(KVM_MAX_MSR_ENTRIES) {
        let msrs = Msrs::from_entries(chunk).map_err(|_| MsrError::TooMany(chunk.len()))?;
        let written = vcpu.set_msrs(&msrs)?;
        if let Some(refused) = chunk.get(written) {
            return Err(MsrError::Refused(refused.index));
        }
    }
    Ok(())
}

/// Reads some registers that every vCPU has.
///
/// # Errors
/// [`MsrError`].
pub fn read<const N: usize>(vcpu: &VcpuFd, indices: [u32; N]) -> Result<[u64; N], MsrError> {
    let entries = indices.map(|index| kvm_msr_entry { index, ..Default::default() });
    let mut msrs = Msrs::from_entries(&entries).map_err(|_| MsrError::TooMany(N))?;
    let count = vcpu.get_msrs(&mut msrs)?;
    if let Some(refused) = indices.get(count) {
        return Err(MsrError::Refused(*refused));
    }
    let mut values = [0; N];
    for (value, entry) in values.iter_mut().zip(msrs.as_slice()) {
        *value = entry.data;
    }
    Ok(values)
}

/// Reads all registers that must be saved with a vCPU according to KVM, except
/// those that this vCPU does not have.
///
/// # Errors
/// [`MsrError`].
pub fn read_all(kvm: &Kvm, vcpu: &VcpuFd) -> Result<Vec<kvm_msr_entry>, MsrError> {
    let indices = kvm.get_msr_index_list()?;
    let listed = indices.as_slice().iter().copied();
    let mut wanted: Vec<kvm_msr_entry> =
        listed.chain(mtrrs()).map(|index| kvm_msr_entry { index, ..Default::default() }).collect();
    let mut read = Vec::with_capacity(wanted.len());
    while !wanted.is_empty() {
        let length = wanted.len().min(KVM_MAX_MSR_ENTRIES);
        let chunk = wanted.get(..length).unwrap_or_default();
        let mut msrs = Msrs::from_entries(chunk).map_err(|_| MsrError::TooMany(length))?;
        let count = vcpu.get_msrs(&mut msrs)?.min(length);
        read.extend_from_slice(msrs.as_slice().get(..count).unwrap_or_default());
        // KVM stops at the first register that it cannot read: skip that one
        // and continue.
        let skipped = usize::from(count < length);
        wanted.drain(..count + skipped);
    }
    Ok(read)
}
