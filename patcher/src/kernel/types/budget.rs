//! How much of a section one question may look at. A damaged or hostile one refers to the same lists over and over: without an end to it, an answer
//! would take hours or all memory.

use std::cell::Cell;

/// More members, enumerators and types of one name than any question about a kernel meets.
const LOOKS: usize = 1 << 17;

/// What is left of it.
#[derive(Debug)]
pub(super) struct Budget(Cell<usize>);

impl Budget {
    pub(super) fn new() -> Self {
        Self(Cell::new(LOOKS))
    }

    /// One more is looked at; `None` when that is too much.
    pub(super) fn look(&self) -> Option<()> {
        let left = self.0.get().checked_sub(1)?;
        self.0.set(left);
        Some(())
    }

    /// Nothing is left: what was found so far need not be all.
    pub(super) fn is_spent(&self) -> bool {
        self.0.get() == 0
    }
}

#[cfg(test)]
mod tests {
    use crate::kernel::testing::Btf;
    use crate::kernel::types::tests::types;
    use crate::kernel::types::{TypeError, Types};

    fn refused<T: std::fmt::Debug>(got: Result<T, TypeError>, name: &str) {
        let name = name.to_owned();
        assert_eq!(got.unwrap_err(), TypeError::TooLarge { name });
    }

    /// Structures that share one long list, so that following each of them would look at a multiple of what the section has.
    fn sharing() -> Types {
        let mut btf = Btf::default();
        let int = btf.int(4);
        let long = btf.structure("", 8, &vec![("x", int, 0); 2000]);
        btf.structure("wide", 8, &vec![("", long, 0); 1000]);
        for _ in 0..600 {
            btf.structure("twin", 8, &[("", long, 0)]);
        }
        btf.structure("last", 8, &[("", long, 0), ("y", int, 4)]);
        types(btf.finish()).unwrap()
    }

    #[test]
    fn no_question_looks_at_shared_lists_without_end() {
        let types = sharing();
        refused(types.member("wide", "y"), "wide");
        refused(types.member("twin", "y"), "twin");
        assert_eq!(types.offset_of("last", "y"), Ok(4));
        // Found before that is too much.
        assert_eq!(types.offset_of("wide", "x"), Ok(0));
        refused(types.layouts("wide"), "wide");
        refused(types.layouts("twin"), "twin");
        assert!(types.layouts("last").is_ok());
    }

    #[test]
    fn namesakes_count_together() {
        let mut btf = Btf::default();
        for _ in 0..40 {
            btf.enumeration("many", &vec![("X", 1); 30_000]);
        }
        btf.enumeration("few", &vec![("X", 1); 30_000]);
        let types = types(btf.finish()).unwrap();
        refused(types.enumerators("many"), "many");
        assert_eq!(types.enumerators("few").unwrap().len(), 30_000);
    }

    #[test]
    fn a_prototype_within_itself_is_refused() {
        let mut btf = Btf::default();
        let int = btf.int(4);
        let own = int + 2;
        let prototype = btf.add("", 2, 0, own, &[]);
        let mut parameters = [0, int].repeat(60_000);
        parameters.extend([0, prototype]);
        btf.add("", 13, 60_001, int, &parameters);
        btf.add("endless", 12, 0, own, &[]);
        let types = types(btf.finish()).unwrap();
        refused(types.layouts("endless"), "endless");
    }

    #[test]
    fn what_is_longer_than_a_name_is_none() {
        let mut btf = Btf::default();
        let int = btf.int(4);
        let [fits, long] = [511, 512].map(|len| "n".repeat(len));
        btf.structure(&fits, 4, &[("a", int, 0)]);
        btf.structure(&long, 4, &[("a", int, 0)]);
        let types = types(btf.finish()).unwrap();
        assert_eq!(types.size_of(&fits), Ok(4));
        for name in [long.as_str(), ""] {
            let name = name.to_owned();
            assert_eq!(types.size_of(&name), Err(TypeError::NoType { name }));
        }
    }
}
