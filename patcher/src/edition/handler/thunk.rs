//! What handlers call to ask a predicate: it calls the predicate as the function was called, and leaves the arguments as they are.
//!
//! It lies in the code of the update that brought the predicate, so that it is unwound, known to the kernel and waited for with that.

use iced_x86::code_asm::CodeAssembler;
use iced_x86::{Decoder, DecoderOptions, Mnemonic};

use super::value::ARGUMENTS;
use super::{HandlerError, reach, returned};
use crate::addr::Gva;
use crate::edition::link::Returns;

/// The code that asks one predicate.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Thunk {
    /// Name of the predicate.
    pub name: String,
    /// Its first byte.
    pub at: Gva,
    /// The code: as many bytes wherever it is.
    pub bytes: Vec<u8>,
}

impl Thunk {
    /// What asks the predicate `name` at `predicate`, to run at `at`, for a kernel whose functions return as `returns` says. The predicate is to
    /// answer in `al`.
    ///
    /// With eight words above what the function was entered with, the stack is aligned as it was.
    ///
    /// # Errors
    /// [`HandlerError`] when one of them is not within reach of the other.
    pub fn new(
        name: &str,
        predicate: Gva,
        at: Gva,
        returns: Returns,
    ) -> Result<Self, HandlerError> {
        reach("a predicate", predicate, 1)?;
        reach("what asks a predicate", at, 1)?;
        let mut code = CodeAssembler::new(64)?;
        for (register, ..) in ARGUMENTS {
            code.push(register)?;
        }
        code.call(predicate.0)?;
        for (register, ..) in ARGUMENTS.into_iter().rev() {
            code.pop(register)?;
        }
        returned(&mut code, returns)?;
        Ok(Self {
            name: name.to_owned(),
            at,
            bytes: code.assemble(at.0)?,
        })
    }

    /// How many bytes it has pushed, from which of its addresses on; in order.
    pub fn pushed(&self) -> impl Iterator<Item = (Gva, i16)> {
        let decoder = Decoder::with_ip(64, &self.bytes, self.at.0, DecoderOptions::NONE);
        let mut pushed = 0_i16;
        let changes = decoder.into_iter().filter_map(move |instruction| {
            pushed = match instruction.mnemonic() {
                Mnemonic::Push => pushed.saturating_add(8),
                Mnemonic::Pop => pushed.saturating_sub(8),
                _ => return None,
            };
            Some((Gva(instruction.next_ip()), pushed))
        });
        std::iter::once((self.at, 0)).chain(changes)
    }

    /// Its name as a symbol.
    #[must_use]
    pub fn symbol(&self) -> String {
        format!("exopatch_ask_{}", self.name)
    }
}
