//! What C allows, written as C.

use proptest::prelude::*;

use super::super::tests::{sample, types};
use super::{TypeError, TypeLayout};
use crate::kernel::testing::Btf;

/// A structure with every kind of declaration, and a function.
fn declarations() -> Btf {
    let mut btf = Btf::default();
    let (int, long) = (
        btf.add("int", 1, 0, 4, &[32]),
        btf.add("long", 1, 0, 8, &[64]),
    );
    let pointer = |btf: &mut Btf, to: u32| btf.add("", 2, 0, to, &[]);
    let constant = btf.add("", 10, 0, int, &[]);
    let to_constant = pointer(&mut btf, constant);
    let constant_pointer = btf.add("", 10, 0, to_constant, &[]);
    let nothing = pointer(&mut btf, 0);
    let name = btf.string("file");
    let rest = btf.string("offset");
    let prototype = btf.add(
        "",
        13,
        3,
        long,
        &[name, nothing, rest, constant_pointer, 0, 0],
    );
    let callback = pointer(&mut btf, prototype);
    let callbacks = btf.array(callback, 3);
    let five = btf.array(int, 5);
    let to_array = pointer(&mut btf, five);
    let anonymous = btf.structure("", 8, &[("low", int, 0), ("high", int, 4)]);
    let choice = btf.add("", 5, 2, 8, &[0; 6]);
    let (whole, halves) = (btf.string("whole"), btf.string(""));
    let other = btf.add("", 5, 2, 8, &[whole, long, 0, halves, anonymous, 0]);
    let flexible = btf.array(long, 0);
    btf.structure(
        "all",
        64,
        &[
            ("callbacks", callbacks, 0),
            ("array", to_array, 24),
            ("next", 0, 32),
            ("", other, 40),
            ("parts", anonymous, 48),
            ("tail", flexible, 64),
        ],
    );
    let _ = choice;
    btf.add("walk", 12, 1, prototype, &[]);
    btf.add("number_t", 8, 0, constant_pointer, &[]);
    btf.add("half_t", 8, 0, anonymous, &[]);
    let big = btf.string("BIG");
    btf.add("sizes", 19, 1, 8, &[big, 0, 0xffff_ffff]);
    btf
}

fn check(btf: &Btf, name: &str, want: &str) {
    let layouts = types(btf.finish()).unwrap().layouts(name).unwrap();
    let got: String = layouts.iter().map(TypeLayout::to_string).collect();
    let squeezed = |text: &str| {
        let lines = text
            .lines()
            .map(|line| line.split_whitespace().collect::<Vec<_>>().join(" "));
        lines.filter(|line| !line.is_empty()).collect::<Vec<_>>()
    };
    assert_eq!(squeezed(&got), squeezed(want), "{got}");
}

#[test]
fn declarations_nest_as_in_c() {
    let all = "struct all {
        long (*callbacks[3])(void *file, const int *const offset, ...); /* 0 24 */
        int (*array)[5]; /* 24 8 */
        void next; /* 32 0 */
        union {
            long whole; /* 40 8 */
            struct {
                int low; /* 40 4 */
                int high; /* 44 4 */
            }; /* 40 8 */
        }; /* 40 8 */
        struct {
            int low; /* 48 4 */
            int high; /* 52 4 */
        } parts; /* 48 8 */
        long tail[0]; /* 64 0 */
        };
        /* 64 bytes */";
    check(&declarations(), "struct all", all);
    check(
        &declarations(),
        "walk",
        "long walk(void *file, const int *const offset, ...);",
    );
    check(
        &declarations(),
        "number_t",
        "typedef const int *const number_t;\n/* 8 bytes */",
    );
    check(
        &declarations(),
        "half_t",
        "typedef struct {\nint low; /* 0 4 */\nint high; /* 4 4 */\n} half_t;\n/* 8 bytes */",
    );
    check(
        &declarations(),
        "enum sizes",
        "enum sizes {\nBIG = 18446744069414584320,\n};\n/* 8 bytes */",
    );
}

#[test]
fn bit_fields_enumerations_and_namesakes_are_shown() {
    check(
        &sample(),
        "packed",
        "struct packed {\nint flag:3; /* 4:5 4 */\nint rest; /* 4 4 */\n};\n/* 8 bytes */",
    );
    check(
        &sample(),
        "colour",
        "enum colour {\nRED = 1,\nGREEN = 7,\n};\n/* 4 bytes */",
    );
    let twice = types(sample().finish()).unwrap().layouts("twice").unwrap();
    assert_eq!(twice.len(), 2);
}

#[test]
fn what_is_absent_or_endless_is_an_error() {
    let mut btf = sample();
    // A nameless structure in itself.
    let own = btf.int(4) + 1;
    btf.structure("", 8, &[("", own, 0)]);
    btf.structure("matryoshka", 8, &[("doll", own, 0)]);
    let types = types(btf.finish()).unwrap();
    for (name, want) in [
        ("nothing", "no type nothing"),
        ("union outer", "no type union outer"),
        ("matryoshka", "type matryoshka of the kernel is too large"),
    ] {
        let got: Result<_, TypeError> = types.layouts(name);
        assert!(
            got.as_ref()
                .is_err_and(|got| got.to_string().contains(want)),
            "{name}: {got:?}"
        );
    }
    // A name for itself is no type, but no endless one either.
    assert_eq!(types.layouts("ouroboros").unwrap()[0].size, None);
}

proptest! {
    #[test]
    fn damage_never_panics(changes in proptest::collection::vec((any::<usize>(), any::<u8>()), 1..12)) {
        for mut bytes in [declarations().finish(), sample().finish()] {
            let len = bytes.len();
            for (at, value) in &changes {
                bytes[at % len] = *value;
            }
            if let Ok(types) = types(bytes) {
                for name in ["all", "walk", "number_t", "half_t", "sizes", "outer", "snake", "sink", "packed"] {
                    let _ = types.layouts(name).map(|layouts| layouts.iter().map(TypeLayout::to_string).collect::<Vec<_>>());
                }
            }
        }
    }
}
