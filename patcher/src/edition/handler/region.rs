//! The beginning of the arena's code half: what all handlers call, made once for a kernel.
//!
//! One piece of code for each width loads from an address that nothing vouches for. It takes the address in `r10`, gives the value there, zero-extended,
//! and in `eax` zero, or another number when nothing can be read there; no other register changes. An address of a user, of the legacy
//! vsyscall page and of what lies above it is not tried; any other that faults goes on where the exception table says. (The carry flag would be the obvious answer,
//! but the return thunk of kernels that count calls changes the flags.)

use iced_x86::BlockEncoderOptions;
use iced_x86::code_asm::{
    CodeAssembler, byte_ptr, dword_ptr, eax, qword_ptr, r10, r10d, rax, word_ptr,
};

use super::{HandlerError, reach, returned};
use crate::addr::Gva;
use crate::edition::link::Returns;

/// Addresses from here on are not tried, counted from the end of the address space: the vsyscall page (kernel `Documentation/arch/x86/x86_64/mm.rst`),
/// which user code may read and the kernel may not, with the seven bytes before it, from which a load would touch it.
const FROM_VSYSCALL: i32 = -0xa0_0007;
/// Bytes that are loaded, one piece of code for each.
const WIDTHS: [u8; 4] = [1, 2, 4, 8];

/// The shared code.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Region {
    /// Its first byte.
    pub at: Gva,
    /// The code.
    pub bytes: Vec<u8>,
    /// Its parts: address, bytes, name.
    pub symbols: Vec<(Gva, u64, String)>,
    /// Entries for an exception table: the instruction that may fault, and where it then goes on.
    pub fixups: Vec<(Gva, Gva)>,
    loads: [Gva; 4],
}

impl Region {
    /// The shared code at `at`, for a kernel whose functions return as `returns` says.
    ///
    /// # Errors
    /// [`HandlerError`] when `at` is not within reach of the kernel's code.
    pub fn new(at: Gva, returns: Returns) -> Result<Self, HandlerError> {
        reach("the region of handlers", at, 1)?;
        if let Returns::Thunk(thunk) = returns {
            reach("the return thunk", thunk, 1)?;
        }
        let mut code = CodeAssembler::new(64)?;
        let mut labels = Vec::new();
        for width in WIDTHS {
            let (mut start, mut load, mut bad) = (
                code.create_label(),
                code.create_label(),
                code.create_label(),
            );
            code.set_label(&mut start)?;
            code.mov(rax, r10)?;
            code.sar(rax, 56)?;
            code.inc(eax)?;
            code.jne(bad)?;
            code.cmp(r10, FROM_VSYSCALL)?;
            code.jae(bad)?;
            code.set_label(&mut load)?;
            match width {
                1 => code.movzx(r10d, byte_ptr(r10))?,
                2 => code.movzx(r10d, word_ptr(r10))?,
                4 => code.mov(r10d, dword_ptr(r10))?,
                _ => code.mov(r10, qword_ptr(r10))?,
            }
            code.xor(eax, eax)?;
            returned(&mut code, returns)?;
            code.set_label(&mut bad)?;
            code.mov(eax, 1)?;
            returned(&mut code, returns)?;
            labels.push([start, load, bad]);
        }
        let options = BlockEncoderOptions::RETURN_NEW_INSTRUCTION_OFFSETS;
        let done = code.assemble_options(at.0, options)?;
        let mut region = Self {
            at,
            symbols: Vec::new(),
            fixups: Vec::new(),
            loads: [at; 4],
            bytes: Vec::new(),
        };
        let end = at.0.wrapping_add(done.inner.code_buffer.len() as u64);
        for (index, [start, load, bad]) in labels.iter().enumerate() {
            let next = labels.get(index + 1);
            let next = next.map_or(Ok(end), |[next, ..]| done.label_ip(next))?;
            let start = done.label_ip(start)?;
            let name = format!("exopatch_load_{}", WIDTHS[index]);
            region
                .symbols
                .push((Gva(start), next.wrapping_sub(start), name));
            region
                .fixups
                .push((Gva(done.label_ip(load)?), Gva(done.label_ip(bad)?)));
            region.loads[index] = Gva(start);
        }
        region.bytes = done.inner.code_buffer;
        Ok(region)
    }

    /// What loads `width` bytes.
    pub(super) fn load(&self, width: u8) -> Gva {
        let index = WIDTHS.iter().position(|has| *has == width);
        self.loads[index.unwrap_or(WIDTHS.len() - 1)]
    }
}
