//! Code taken from one place to another: what it reaches relative to itself stays where it was.

use iced_x86::{Code, Decoder, DecoderOptions};

use crate::addr::LinkAddr;

/// `code`, which was made for `from`, as it must be at `to`; `None` when it cannot be taken there.
pub(super) fn moved(code: &[u8], from: LinkAddr, to: LinkAddr) -> Option<Vec<u8>> {
    let own = from.0..=from.0.checked_add(code.len() as u64)?;
    let distance = from.0.wrapping_sub(to.0);
    let mut result = code.to_vec();
    let mut decoder = Decoder::with_ip(64, code, from.0, DecoderOptions::NONE);
    while decoder.can_decode() {
        let start = decoder.position();
        let instruction = decoder.decode();
        if instruction.code() == Code::INVALID {
            return None;
        }
        let constants = decoder.get_constant_offsets(&instruction);
        let branch = instruction.is_jmp_short_or_near()
            || instruction.is_jcc_short_or_near()
            || instruction.is_call_near();
        let (field, target) = if branch {
            let field = (constants.immediate_offset(), constants.immediate_size());
            (field, instruction.near_branch_target())
        } else if instruction.is_ip_rel_memory_operand() {
            let field = (
                constants.displacement_offset(),
                constants.displacement_size(),
            );
            (field, instruction.ip_rel_memory_address())
        } else {
            continue;
        };
        if own.contains(&target) {
            continue;
        }
        // A short branch out of replaced code has no room for another distance.
        let (offset, 4) = field else { return None };
        let at = start + offset;
        let bytes = result.get_mut(at..at + 4)?;
        let old = i32::from_le_bytes(bytes.try_into().ok()?);
        // Distances wrap: what is reached may be a CPU's variable, near zero.
        let [a, b, c, d, ..] = distance.to_le_bytes();
        let new = old.wrapping_add(i32::from_le_bytes([a, b, c, d]));
        bytes.copy_from_slice(&new.to_le_bytes());
    }
    Some(result)
}

#[cfg(test)]
mod tests {
    use super::{LinkAddr, moved};

    #[test]
    fn what_leaves_the_code_still_leads_where_it_did() {
        let check = |code: &[u8], want: Option<&[u8]>| {
            let got = moved(code, LinkAddr(0x2000), LinkAddr(0x1000));
            assert_eq!(got.as_deref(), want, "{code:02x?}");
        };
        check(&[0xe8, 0, 1, 0, 0], Some(&[0xe8, 0, 0x11, 0, 0]));
        check(
            &[0x0f, 0x84, 0, 1, 0, 0],
            Some(&[0x0f, 0x84, 0, 0x11, 0, 0]),
        );
        check(
            &[0x48, 0x8b, 0x05, 0, 1, 0, 0],
            Some(&[0x48, 0x8b, 0x05, 0, 0x11, 0, 0]),
        );
        // Within itself, nothing changes; nor without any.
        check(&[0xeb, 0, 0x90], Some(&[0xeb, 0, 0x90]));
        check(&[0x0f, 0xae, 0xe8], Some(&[0x0f, 0xae, 0xe8]));
        check(&[0xeb, 0x70], None);
        check(&[0x0f, 0x0b, 0x06], None);
    }
}
