//! The records that `exopatch.h` and `exopatch_hooks.h` make: of the functions that a package replaces, of those that rules may ask, and of hooks.
//!
//! All are alike: a pointer to a function of the package, the length of the record, a number, and a name, with a zero behind it.

use object::Object as _;

use super::{NAME_LEN, Reader};
use crate::edition::hook::{CELLS, CELLS_LEN, Hook, Hooks, Moment};
use crate::edition::object::{Edition, Function, MAX_PREDICATES, PackageError, Predicate};

/// Bytes of one record: `struct exopatch_edition` and its like.
const RECORD_LEN: usize = 16 + NAME_LEN;

/// The record of what begins hooks.
const TICKER: &str = ".exopatch.ticker";

/// One of them.
struct Record {
    /// Where in the package's code its pointer leads: a section's index and an offset.
    place: Option<(usize, u64)>,
    number: u32,
    name: String,
}

impl Reader<'_, '_> {
    /// The records of a section of ours.
    fn records(&mut self, section: &'static str) -> Result<Vec<Record>, PackageError> {
        let bytes = self.ours(section)?;
        let pointers = self.pointers(section)?;
        let wrong = |why| PackageError::Ours { section, why };
        if bytes.len() % RECORD_LEN != 0 {
            return Err(wrong("does not hold whole records"));
        }
        let mut records = Vec::new();
        for (nth, record) in bytes.chunks_exact(RECORD_LEN).enumerate() {
            if word(record, 8).map(usize::try_from) != Some(Ok(RECORD_LEN)) {
                return Err(wrong("holds records of another layout"));
            }
            let name = record.get(16..).unwrap_or_default();
            let name = name
                .split(|&byte| byte == 0)
                .next()
                .filter(|name| !name.is_empty() && name.len() < NAME_LEN);
            let name = name
                .and_then(|name| std::str::from_utf8(name).ok())
                .filter(|name| name.is_ascii());
            let name = name.ok_or_else(|| wrong("holds a record without a function name"))?;
            let at = (nth * RECORD_LEN) as u64;
            let here = pointers.iter().find(|&&(offset, ..)| offset == at);
            let here = here.filter(|&&(_, index, to)| {
                self.sections
                    .get(index)
                    .is_some_and(|section| section.code && to < section.bytes.len() as u64)
            });
            records.push(Record {
                place: here.map(|&(_, index, to)| (index, to)),
                number: word(record, 12).unwrap_or_default(),
                name: name.to_owned(),
            });
        }
        Ok(records)
    }

    /// The records of `.exopatch.editions`.
    pub(super) fn editions(&mut self) -> Result<Vec<Edition>, PackageError> {
        let section = ".exopatch.editions";
        if self.file.section_by_name(section).is_none() {
            return Err(PackageError::NoEdition);
        }
        let editions = self.editions_in(section)?;
        if editions.is_empty() {
            return Err(PackageError::NoEdition);
        }
        Ok(editions)
    }

    fn editions_in(&mut self, section: &'static str) -> Result<Vec<Edition>, PackageError> {
        let mut editions: Vec<Edition> = Vec::new();
        for record in self.records(section)? {
            let (function, position) = (record.name, record.number);
            let Some((section, offset)) = record.place else {
                return Err(PackageError::NotAFunction { function });
            };
            if editions
                .iter()
                .any(|other| other.function == function && other.position == position)
            {
                return Err(PackageError::Twice { function });
            }
            editions.push(Edition {
                function,
                position,
                section,
                offset,
            });
        }
        Ok(editions)
    }

    /// The records of `.exopatch.hooks`, each of the beginning of one of `functions`, and what they are run by.
    pub(super) fn hooks(
        &mut self,
        editions: &[Edition],
        functions: &[Function],
    ) -> Result<Option<Hooks>, PackageError> {
        let section = ".exopatch.hooks";
        if self.file.section_by_name(section).is_none() {
            return Ok(None);
        }
        let wrong = |section, why| PackageError::Ours { section, why };
        let mut list: Vec<Hook> = Vec::new();
        for record in self.records(section)? {
            let moment = Moment::from_number(record.number);
            let moment = moment.ok_or_else(|| wrong(section, "holds a hook of no known moment"))?;
            let (place, name) = (record.place, record.name);
            let Some((section, offset)) = place.filter(|place| is_function(functions, *place))
            else {
                return Err(PackageError::NotAHook { name });
            };
            if list.iter().any(|other| other.moment == moment) {
                return Err(PackageError::TwoHooks { moment });
            }
            list.push(Hook {
                name,
                moment,
                section,
                offset,
            });
        }
        self.ours(TICKER)?;
        let mut tickers = self.editions_in(TICKER)?;
        let (Some(ticker), true) = (tickers.pop(), tickers.is_empty()) else {
            return Err(wrong(TICKER, "does not hold one record"));
        };
        if editions.iter().any(|it| it.function == ticker.function) {
            let function = ticker.function;
            return Err(PackageError::ReplacesTicker { function });
        }
        let sections = self.sections.iter().enumerate();
        let mut cells = sections.filter(|(_, section)| section.name == CELLS);
        let (Some((cells, holds)), None) = (cells.next(), cells.next()) else {
            return Err(wrong(CELLS, "is missing, or there more than once"));
        };
        if holds.bytes.len() < CELLS_LEN || !holds.align.is_multiple_of(8) {
            return Err(wrong(CELLS, "is of another layout"));
        }
        Ok(Some(Hooks {
            list,
            ticker,
            cells,
        }))
    }

    /// The records of `.exopatch.predicates`, each of the beginning of one of `functions`.
    pub(super) fn predicates(
        &mut self,
        functions: &[Function],
    ) -> Result<Vec<Predicate>, PackageError> {
        let name = ".exopatch.predicates";
        if self.file.section_by_name(name).is_none() {
            return Ok(Vec::new());
        }
        let records = self.records(name)?;
        let wrong = |why| PackageError::Ours { section: name, why };
        if records.len() > MAX_PREDICATES {
            let count = records.len();
            return Err(PackageError::TooManyPredicates { count });
        }
        let mut predicates: Vec<Predicate> = Vec::new();
        for Record {
            place,
            number,
            name,
        } in records
        {
            if number != 0 {
                return Err(wrong("holds records of another layout"));
            }
            let letter = |c: char| c.is_ascii_alphanumeric() || c == '_';
            if name.starts_with(|c: char| c.is_ascii_digit()) || !name.chars().all(letter) {
                return Err(wrong("holds a record without a function name"));
            }
            let Some((section, offset)) = place.filter(|place| is_function(functions, *place))
            else {
                return Err(PackageError::NotAPredicate { name });
            };
            if predicates.iter().any(|other| other.name == name) {
                return Err(PackageError::TwoPredicates { name });
            }
            predicates.push(Predicate {
                name,
                section,
                offset,
            });
        }
        Ok(predicates)
    }
}

/// Whether one of `functions` begins there: in a section, at an offset.
fn is_function(functions: &[Function], place: (usize, u64)) -> bool {
    let mut functions = functions.iter();
    functions.any(|it| (it.section, it.offset) == place)
}

fn word(record: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(record.get(at..at + 4)?.try_into().ok()?))
}
