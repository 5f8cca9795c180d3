//! Whether two images are of one kernel and say the same of it: that of its file, and the one recovered from a guest's memory.

use super::image::Image;
use super::orc::OrcTable;
use super::symbols::Symbol;

/// What two images agree on, all of it compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Agreed {
    /// Symbols: name, address, kind and size of each.
    pub symbols: usize,
    /// Bytes of types.
    pub type_bytes: usize,
    /// Entries of the unwind table; none where neither has a table.
    pub unwind: usize,
}

/// The first thing that two images say differently.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Disagreement {
    /// They are of two kernels.
    #[error("the build-ids differ, or are not at one place")]
    BuildId,
    /// One has more symbols.
    #[error("there are {one} symbols here, {other} there")]
    Count {
        /// Symbols of the first.
        one: usize,
        /// Of the second.
        other: usize,
    },
    /// A symbol differs.
    #[error("symbol {index} is {} at {} here, {} at {} there", .one.name, .one.address, .other.name, .other.address)]
    Symbol {
        /// Its index in the order of addresses.
        index: usize,
        /// As the first has it.
        one: Box<Symbol>,
        /// As the second has it.
        other: Box<Symbol>,
    },
    /// The types differ.
    #[error("the types differ, at byte {at:#x} first")]
    Types {
        /// The first byte that does.
        at: usize,
    },
    /// The unwind tables differ, or only one is there and sound.
    #[error("the unwind tables differ")]
    Unwind,
}

/// Compares all that both images have.
///
/// # Errors
/// The first difference.
pub fn agree(one: &Image, other: &Image) -> Result<Agreed, Disagreement> {
    let build_id = |image: &Image| (image.build_id().to_vec(), image.build_id_at());
    if build_id(one) != build_id(other) {
        return Err(Disagreement::BuildId);
    }
    let (first, second) = (one.symbols(), other.symbols());
    if first.len() != second.len() {
        return Err(Disagreement::Count {
            one: first.len(),
            other: second.len(),
        });
    }
    let pairs = first.iter().zip(second.iter()).enumerate();
    let different = |(_, (one, other)): &(usize, (Symbol, Symbol))| one != other;
    if let Some((index, (one, other))) = pairs.into_iter().find(different) {
        return Err(Disagreement::Symbol {
            index,
            one: Box::new(one),
            other: Box::new(other),
        });
    }
    let types = (one.types().section(), other.types().section());
    if types.0 != types.1 {
        let at = types
            .0
            .iter()
            .zip(types.1)
            .position(|(one, other)| one != other);
        let shorter = types.0.len().min(types.1.len());
        return Err(Disagreement::Types {
            at: at.unwrap_or(shorter),
        });
    }
    let table = |table: &OrcTable| (table.at(), table.len());
    let unwind = match (one.orc(), other.orc()) {
        (Ok(one), Ok(other)) if table(one) == table(other) && one.arrays() == other.arrays() => {
            one.len()
        }
        (Err(one), Err(other)) if std::mem::discriminant(one) == std::mem::discriminant(other) => 0,
        _ => return Err(Disagreement::Unwind),
    };
    Ok(Agreed {
        symbols: first.len(),
        type_bytes: types.0.len(),
        unwind,
    })
}
