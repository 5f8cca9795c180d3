//! Whether a call lies before an address: if not, it is no return address.

use iced_x86::{Decoder, DecoderOptions, Mnemonic};

/// The longest call, in bytes: one by way of memory, with prefixes.
const LONGEST: usize = 9;
/// Bytes to look at.
pub(crate) const BEFORE: usize = LONGEST;

/// Whether `code` ends with a call.
pub(crate) fn ends_with_call(code: &[u8]) -> bool {
    // Nearly all are direct: one byte and a distance of four.
    let direct = code.len().checked_sub(5).and_then(|at| code.get(at)) == Some(&0xe8);
    direct || ends_with(code, Mnemonic::Call)
}

/// Whether `code` ends with a far return: the kernel's first code for a CPU leaves a return address by hand, behind one.
pub(crate) fn ends_with_far_return(code: &[u8]) -> bool {
    ends_with(code, Mnemonic::Retf)
}

fn ends_with(code: &[u8], mnemonic: Mnemonic) -> bool {
    (1..=LONGEST.min(code.len())).any(|len| {
        let last = &code[code.len() - len..];
        let instruction = Decoder::new(64, last, DecoderOptions::NONE).decode();
        instruction.len() == len && instruction.mnemonic() == mnemonic
    })
}

#[cfg(test)]
mod tests {
    use super::{ends_with_call, ends_with_far_return};

    #[test]
    fn every_form_of_call_is_one() {
        for (code, call) in [
            (&[0xe8, 1, 2, 3, 4][..], true),
            // With a prefix for padding; through a register, memory, a table, a per-CPU variable; with a large register.
            (&[0x2e, 0xe8, 1, 2, 3, 4], true),
            (&[0x90, 0xff, 0xd0], true),
            (&[0x90, 0x41, 0xff, 0xd3], true),
            (&[0xff, 0x50, 0x18], true),
            (&[0x90, 0xff, 0x14, 0x25, 0, 0, 0, 0x80], true),
            (&[0x65, 0xff, 0x14, 0x25, 0, 0, 0, 0x80], true),
            (&[0x41, 0xff, 0x94, 0xc4, 0, 1, 0, 0], true),
            (&[0xe9, 1, 2, 3, 4], false),
            (&[0xff, 0xe0], false),
            (&[0x0f, 0x1f, 0x44, 0, 0], false),
            (&[0xe8, 1, 2, 3], false),
            (&[0xe8, 1, 2, 3, 4, 0x90], false),
            (&[], false),
        ] {
            assert_eq!(ends_with_call(code), call, "{code:02x?}");
        }
        assert!(ends_with_far_return(&[0x50, 0x48, 0xcb]));
        assert!(!ends_with_far_return(&[0x50, 0x48, 0xc3]));
    }
}
