//! Why a function cannot be redirected. A refusal says what stands in the way and where; the guest is as it was.

use crate::addr::Gva;
use crate::x86::registers::Registers;

/// What kind of place of the kernel's own lies among the bytes that a jump would displace.
///
/// The names are those of the kernel's tables; see `kernel::sites`.
pub type SiteName = &'static str;

/// Why a function cannot be redirected.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// It has no fentry site, and nothing shows that its callers would do with another function in its place.
    #[error("{function} has no fentry site at {at}, and {why}")]
    NoFentry {
        /// The function.
        function: String,
        /// Its first byte.
        at: Gva,
        /// What stands in the way.
        why: &'static str,
    },
    /// It has no fentry site, and a caller relies on registers that it happens not to change.
    #[error(
        "{function} has no fentry site, and its caller at {caller} may rely on registers that it leaves alone ({registers}): at {at}, {why}"
    )]
    Reliance {
        /// The function.
        function: String,
        /// Where it is called.
        caller: Gva,
        /// The registers.
        registers: Registers,
        /// Where that was found.
        at: Gva,
        /// What is there.
        why: &'static str,
    },
    /// There is no room for a jump.
    #[error("{function} is too short: {room} bytes are left for a jump, which needs {needed}")]
    TooShort {
        /// The function.
        function: String,
        /// Bytes from where the jump would go to the next symbol, padding included.
        room: u64,
        /// Bytes that are needed.
        needed: u64,
    },
    /// It lies where no ordinary kernel function does.
    #[error("{function} at {at} is in the kernel's {region}: {why}")]
    Region {
        /// The function.
        function: String,
        /// Its first byte.
        at: Gva,
        /// The region.
        region: &'static str,
        /// What is special about it.
        why: &'static str,
    },
    /// The kernel changes, or has an entry about, an instruction that would be displaced.
    #[error("{function} has {site} at {at}, among the bytes that the jump would displace: {why}")]
    Site {
        /// The function.
        function: String,
        /// What it is.
        site: SiteName,
        /// Where.
        at: Gva,
        /// Why it cannot be displaced.
        why: &'static str,
    },
    /// Code of the function leads to the middle of the bytes that would be displaced.
    #[error("{part} leads from {from} to {to}, among the bytes that the jump would displace")]
    BranchInto {
        /// The function or a part of it, or the table that leads there.
        part: String,
        /// The instruction that leads there.
        from: Gva,
        /// Where it leads.
        to: Gva,
    },
    /// The function jumps through a table, whose targets are not known.
    #[error(
        "{part} jumps through a table at {at} (`{text}`), which may lead to the bytes that the jump would displace"
    )]
    JumpTable {
        /// The function or a part of it.
        part: String,
        /// The instruction.
        at: Gva,
        /// The instruction, disassembled.
        text: String,
    },
    /// Its code cannot be decoded.
    #[error("{part} cannot be decoded: {cause}")]
    Undecodable {
        /// The function or a part of it.
        part: String,
        /// Where and what.
        cause: crate::x86::insn::InsnError,
    },
    /// An instruction that would be displaced cannot run elsewhere.
    #[error("{function} cannot be given a relocated head: {cause}")]
    Immovable {
        /// The function.
        function: String,
        /// Which instruction and why.
        cause: crate::x86::insn::InsnError,
    },
    /// The running kernel's bytes are not those that its image says.
    #[error(
        "{function} was changed in the running kernel: at {at} it has {live:02x?} where its image says {expected:02x?} ({cause})"
    )]
    Changed {
        /// The function.
        function: String,
        /// The first byte that differs.
        at: Gva,
        /// Expected bytes from there.
        expected: Vec<u8>,
        /// Live bytes from there.
        live: Vec<u8>,
        /// What likely did it.
        cause: &'static str,
    },
    /// An update of ours is applied to it.
    #[error("{function} is already redirected (to {to}); revert that update first")]
    AlreadyRedirected {
        /// The function.
        function: String,
        /// Where its jump leads.
        to: Gva,
    },
    /// What the image says about the bytes is not enough to know what they must be.
    #[error("what the bytes of {function} must be in the running kernel cannot be known: {cause}")]
    Unpredictable {
        /// The function.
        function: String,
        /// Which bytes and why.
        cause: String,
    },
}
