//! Whether an address of a package's own code or data may get to be known to the guest: in a timer, a list, a table, a message that is printed later.
//!
//! An edition that no thread is in any more can still be reached through such an address, so its room is only used again when no
//! relocation hands one out. Direct branches do not, nor do instructions that read or write a variable in place. What runs hooks does, but
//! only until they have ended, which is waited for (see [`crate::apply::hooks`]).

use iced_x86::{Decoder, DecoderOptions, Instruction, Mnemonic};

use super::hook::CELLS;
use super::link::ORIGINAL;
use super::object::{Package, Place, Relocation, Section};

/// Tables that the kernel reads while they are published, and not after; and what runs hooks, which the kernel knows until the last has ended.
const TABLES: [&str; 3] = ["__ex_table", "__bug_table", CELLS];

/// The first place of `package` that hands an address of its own out, for people to read; `None` when there is none.
#[must_use]
pub fn escape(package: &Package) -> Option<String> {
    let sections = package.sections().iter();
    sections
        .filter(|section| !TABLES.contains(&section.name.as_str()))
        .find_map(|section| escape_of(package, section))
}

fn escape_of(package: &Package, section: &Section) -> Option<String> {
    let own = |relocation: &&Relocation| {
        let symbol = package.symbols().get(relocation.symbol);
        symbol.is_some_and(|symbol| match symbol.place {
            Place::Here(index, _) => {
                let at = package.sections().get(index);
                at.is_none_or(|section| section.name != CELLS)
            }
            _ => symbol.name.starts_with(ORIGINAL),
        })
    };
    let mut own: Vec<&Relocation> = section.relocations.iter().filter(own).collect();
    if own.is_empty() {
        return None;
    }
    if section.code {
        own.sort_by_key(|relocation| relocation.offset);
        let kept = stays_inside(section);
        own.retain(|relocation| kept.binary_search(&relocation.offset).is_err());
    }
    let first = own.first()?;
    let symbol = package.symbols().get(first.symbol)?;
    Some(format!(
        "{}+{:#x} may hand out the address of {}",
        section.name, first.offset, symbol.name
    ))
}

/// The offsets of displacements that stay inside: of direct branches, and of operands that are read or written in place.
fn stays_inside(section: &Section) -> Vec<usize> {
    let mut decoder = Decoder::new(64, &section.bytes, DecoderOptions::NONE);
    let (mut kept, mut instruction) = (Vec::new(), Instruction::default());
    while decoder.can_decode() {
        let start = decoder.position();
        decoder.decode_out(&mut instruction);
        let offsets = decoder.get_constant_offsets(&instruction);
        if instruction.is_jcc_short_or_near()
            || instruction.is_jmp_short_or_near()
            || instruction.is_call_near()
        {
            kept.push(start + offsets.immediate_offset());
        } else if instruction.is_ip_rel_memory_operand() && instruction.mnemonic() != Mnemonic::Lea
        {
            kept.push(start + offsets.displacement_offset());
        }
    }
    kept
}

#[cfg(test)]
mod tests {
    use super::escape;
    use crate::edition::object::Package;
    use crate::edition::object::tests::Maker;
    use crate::kernel::testing::BUILD_ID;

    /// What escapes of `code` with a 32-bit PC-relative relocation at `offset` to `symbol`.
    fn check(code: &[u8], offset: u64, symbol: &str, addend: i64, want: Option<&str>) {
        let mut maker = Maker::for_kernel(code, &BUILD_ID);
        maker.relocate_text(offset, 4, symbol, addend);
        maker.edition("f", 0, 0);
        maker.orc();
        let package = Package::parse(&maker.finish()).unwrap();
        let got = escape(&package);
        match want {
            Some(want) => assert!(
                got.as_ref().is_some_and(|got| got.contains(want)),
                "{got:?}"
            ),
            None => assert_eq!(got, None, "{code:02x?}"),
        }
    }

    #[test]
    fn branches_and_variables_in_place_stay_inside() {
        let original = "exopatch_original_f";
        check(&[0xe8, 0, 0, 0, 0, 0xc3], 1, original, -4, None);
        check(&[0xe9, 0, 0, 0, 0], 1, original, -4, None);
        check(&[0x90, 0x0f, 0x84, 0, 0, 0, 0, 0xc3], 3, original, -4, None);
        // lea rdi, [rip + original]
        let lea = [0x48, 0x8d, 0x3d, 0, 0, 0, 0, 0xc3];
        check(
            &lea,
            3,
            original,
            -4,
            Some(".text+0x3 may hand out the address of exopatch_original_f"),
        );
        // mov rdi, offset
        check(
            &[0x48, 0xc7, 0xc7, 0, 0, 0, 0, 0xc3],
            3,
            original,
            0,
            Some("may hand out"),
        );
        // lea of the kernel's own
        check(&lea, 3, "printk", -4, None);
    }
}
