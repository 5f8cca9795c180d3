//! What processors the guest sees: all that KVM supports here, as one package of single-threaded cores.
//!
//! Leaf numbers and fields: Intel SDM vol. 2, CPUID; AMD APM vol. 3, appendix E.

use kvm_bindings::{CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};

use crate::layout::SHORT_IDS;

/// CPUID of the guest could not be put together.
#[derive(Debug, thiserror::Error)]
#[error("KVM reports more CPUID leaves than it takes")]
pub struct TooManyLeaves;

const FEATURES: u32 = 1;
const CACHES_INTEL: u32 = 4;
const TOPOLOGY: u32 = 0xb;
const TOPOLOGY_V2: u32 = 0x1f;
const ADDRESS_SIZES_AMD: u32 = 0x8000_0008;
const CACHES_AMD: u32 = 0x8000_001d;
const NODES_AMD: u32 = 0x8000_001e;
const FEATURES_AMD: u32 = 0x8000_0001;
/// KVM's own features (kernel `Documentation/virt/kvm/x86/cpuid.rst`).
const FEATURES_KVM: u32 = 0x4000_0001;

/// Leaf 1, ECX: APIC timer by time stamp deadline.
const TSC_DEADLINE: u32 = 1 << 24;
/// Leaf 1, ECX: under a hypervisor.
const HYPERVISOR: u32 = 1 << 31;
/// Leaf 1, EDX: more than one logical processor in the package.
const MULTI_THREADED: u32 = 1 << 28;
/// Leaf 0x8000_0001, ECX: the threads counted in leaf 1 are cores.
const COUNT_IS_OF_CORES: u32 = 1 << 1;
/// Leaf 0x4000_0001, EAX: interrupt messages have 15-bit destinations. The I/O APIC of `devices` has them; KVM's has not.
const LONG_DESTINATIONS: u32 = 1 << 15;
/// Size of the line that CLFLUSH flushes, in 8 bytes.
const CLFLUSH_LINE: u32 = 8;

/// The CPUID of vCPU `index` of `count`, from what KVM `supported`s. Its APIC identifier is its index.
///
/// # Errors
/// When the leaves are too many for KVM.
pub fn of_vcpu(
    supported: &CpuId,
    index: u32,
    count: u32,
    tsc_deadline: bool,
) -> Result<CpuId, TooManyLeaves> {
    let mut leaves: Vec<kvm_cpuid_entry2> = supported
        .as_slice()
        .iter()
        .filter(|leaf| !matches!(leaf.function, TOPOLOGY | TOPOLOGY_V2))
        .copied()
        .collect();
    for leaf in &mut leaves {
        describe(leaf, index, count, tsc_deadline);
    }
    let highest = leaves
        .iter()
        .find(|leaf| leaf.function == 0)
        .map_or(0, |leaf| leaf.eax);
    for function in [TOPOLOGY, TOPOLOGY_V2] {
        if highest >= function {
            leaves.extend(topology(function, index, count));
        }
    }
    CpuId::from_entries(&leaves).map_err(|_| TooManyLeaves)
}

/// Bits of an APIC identifier that tell the cores of the package apart.
fn core_bits(count: u32) -> u32 {
    count.next_power_of_two().trailing_zeros()
}

fn describe(leaf: &mut kvm_cpuid_entry2, index: u32, count: u32, tsc_deadline: bool) {
    let others = count - 1;
    match leaf.function {
        FEATURES => {
            let logical = count.next_power_of_two().min(255);
            leaf.ebx = (leaf.ebx & 0xff) | CLFLUSH_LINE << 8 | logical << 16 | (index & 0xff) << 24;
            leaf.ecx |= HYPERVISOR;
            if tsc_deadline {
                leaf.ecx |= TSC_DEADLINE;
            }
            leaf.edx &= !MULTI_THREADED;
            if count > 1 {
                leaf.edx |= MULTI_THREADED;
            }
        }
        CACHES_INTEL if leaf.eax & 0x1f != 0 => {
            let cores = others.min(63);
            leaf.eax = (leaf.eax & 0x3fff) | sharers(leaf.eax, others) << 14 | cores << 26;
        }
        CACHES_AMD if leaf.eax & 0x1f != 0 => {
            leaf.eax = (leaf.eax & 0x3fff) | sharers(leaf.eax, others) << 14;
        }
        FEATURES_KVM if count > SHORT_IDS => leaf.eax |= LONG_DESTINATIONS,
        FEATURES_AMD if count > 1 => leaf.ecx |= COUNT_IS_OF_CORES,
        ADDRESS_SIZES_AMD => {
            leaf.ecx = (leaf.ecx & !0xf0ff) | others.min(255) | core_bits(count).min(15) << 12;
        }
        NODES_AMD => {
            leaf.eax = index;
            leaf.ebx = index & 0xff;
            leaf.ecx = 0;
        }
        _ => {}
    }
}

/// How many others share a cache: those of level 3 are the package's, all below are a core's own.
fn sharers(eax: u32, others: u32) -> u32 {
    let level = eax >> 5 & 7;
    if level >= 3 { others.min(0xfff) } else { 0 }
}

fn topology(function: u32, index: u32, count: u32) -> [kvm_cpuid_entry2; 3] {
    /// Level types.
    const NONE: u32 = 0;
    const THREADS: u32 = 1;
    const CORES: u32 = 2;
    let level = |number: u32, kind: u32, shift: u32, processors: u32| kvm_cpuid_entry2 {
        function,
        index: number,
        flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
        eax: shift,
        ebx: processors,
        ecx: number | kind << 8,
        edx: index,
        ..Default::default()
    };
    [
        level(0, THREADS, 0, 1),
        level(1, CORES, core_bits(count), count & 0xffff),
        level(2, NONE, 0, 0),
    ]
}

#[cfg(test)]
mod tests {
    use kvm_bindings::{CpuId, kvm_cpuid_entry2};

    use super::{FEATURES, FEATURES_KVM, LONG_DESTINATIONS, NODES_AMD, TOPOLOGY, of_vcpu};

    fn supported() -> CpuId {
        let leaf = |function, eax| kvm_cpuid_entry2 {
            function,
            eax,
            ..Default::default()
        };
        CpuId::from_entries(&[
            leaf(0, 0x10),
            leaf(FEATURES, 0),
            leaf(TOPOLOGY, 77),
            leaf(NODES_AMD, 0),
            leaf(FEATURES_KVM, 1),
        ])
        .expect("leaves")
    }

    fn check(index: u32, count: u32, shift: u32) {
        let cpuid = of_vcpu(&supported(), index, count, true).expect("leaves");
        let leaves = cpuid.as_slice();
        let find = |function, number| {
            leaves
                .iter()
                .find(|leaf| leaf.function == function && leaf.index == number)
                .copied()
                .expect("a leaf")
        };
        assert_eq!(find(FEATURES, 0).ebx >> 24, index & 0xff);
        assert_eq!(find(TOPOLOGY, 0).edx, index);
        assert_eq!(find(TOPOLOGY, 1).eax, shift);
        assert_eq!(find(TOPOLOGY, 1).ebx, count);
        assert_eq!(find(NODES_AMD, 0).eax, index);
        let long = if count > 255 { LONG_DESTINATIONS } else { 0 };
        assert_eq!(find(FEATURES_KVM, 0).eax, 1 | long);
        let topology = leaves.iter().filter(|leaf| leaf.function == TOPOLOGY);
        assert_eq!(topology.count(), 3);
    }

    #[test]
    fn every_vcpu_has_its_own_place_in_one_package() {
        check(0, 1, 0);
        check(3, 4, 2);
        check(4, 5, 3);
        check(254, 255, 8);
        check(300, 512, 9);
    }
}
