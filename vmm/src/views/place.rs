//! Names for addresses: the kernel's, its modules', each CPU's variables, and the code of updates.

use patcher::addr::Gva;
use patcher::kernel::modules::ModuleError;
use patcher::kernel::names::{Names, Place};

use super::{Subject, Update};

/// The names of one moment.
#[derive(Debug)]
pub(super) struct Places<'a> {
    pub(super) names: Names<'a>,
    updates: &'a [Update],
}

impl<'a> Places<'a> {
    /// Reads them.
    pub(super) fn read(subject: &Subject<'a>) -> Result<Self, ModuleError> {
        Ok(Self {
            names: Names::read(subject.kernel, subject.guest)?,
            updates: subject.updates,
        })
    }

    /// What is at `at`; an update's code is given as that of a module.
    pub(super) fn at(&self, at: Gva) -> Option<Place> {
        let ours = self.updates.iter().find_map(|update| {
            let mut pieces = update.code.pieces.iter();
            let (range, name) = pieces.find(|(range, _)| range.contains(&at))?;
            let of = match update.id {
                Some(id) => format!("update {id}"),
                None => "a reverted update".to_owned(),
            };
            Some(Place {
                symbol: name.clone(),
                offset: at.offset_from(range.start)?,
                size: range.end.offset_from(range.start)?,
                module: Some(of),
                cpu: None,
            })
        });
        ours.or_else(|| self.names.at(at))
    }
}

/// A place in a few words: `symbol+0x1f/0x80 [module]`, as the kernel prints it.
pub(crate) fn text_of(place: &Place) -> String {
    let mut text = format!("{}+{:#x}/{:#x}", place.symbol, place.offset, place.size);
    if let Some(module) = &place.module {
        text.push_str(&format!(" [{module}]"));
    }
    if let Some(cpu) = place.cpu {
        text.push_str(&format!(" of CPU {cpu}"));
    }
    text
}
