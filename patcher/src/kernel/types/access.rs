//! Where the value is that a function's argument is or leads to: `sock->sk->sk_protocol` as an argument's number, the offsets at which pointers
//! are followed, and what is found at the end.
//!
//! Only what a register holds by the calling convention (System V ABI for x86-64, section 3.2.3) has a number: six integers and pointers. What
//! is passed in any other way is an error that says so.

use super::budget::Budget;
use super::{Place, TypeError, Types};
use crate::kernel::btf::{Kind, RawType, code};

/// Arguments that registers hold.
pub const REGISTERS: usize = 6;
/// Furthest member, in bytes: what a displacement can say.
const MAX_OFFSET: u64 = 1 << 30;

/// Why an argument leads to no value.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AccessError {
    /// The types do not tell.
    #[error(transparent)]
    Type(#[from] TypeError),
    /// There is no such function among the types.
    #[error(
        "the kernel's types have no function {function}: its prototype is not known, so no argument of it can be asked about"
    )]
    NoFunction {
        /// The function.
        function: String,
    },
    /// It has no such argument.
    #[error("function {function} has no argument {argument}; it has {has}")]
    NoArgument {
        /// The function.
        function: String,
        /// The argument asked for.
        argument: String,
        /// Those that there are.
        has: String,
    },
    /// The argument is in no register.
    #[error("argument {argument} of {function} cannot be asked about: {why}")]
    NotInRegister {
        /// The function.
        function: String,
        /// The argument.
        argument: String,
        /// How it is passed.
        why: &'static str,
    },
    /// The way leads through something that is no pointer and no structure, or to nothing that is known.
    #[error("{step} cannot be reached: {what} is {why}")]
    NoWay {
        /// The step.
        step: String,
        /// From where.
        what: String,
        /// What that is.
        why: &'static str,
    },
    /// A structure has no such member.
    #[error("{what} has no member {member}")]
    NoMember {
        /// The structure.
        what: String,
        /// The member.
        member: String,
    },
    /// What is reached is no number.
    #[error("{what} is {why}, which compares with no number")]
    NoNumber {
        /// What was reached.
        what: String,
        /// What it is.
        why: &'static str,
    },
}

/// An argument, as asked for.
#[derive(Clone, Copy, Debug)]
pub enum Which<'a> {
    /// By its number, from 1.
    Number(usize),
    /// By its name.
    Name(&'a str),
}

/// One step from it.
#[derive(Clone, Copy, Debug)]
pub enum Hop<'a> {
    /// To a member, through the pointer if there is one.
    Member(&'a str),
    /// To an element of an array, or of what a pointer points to.
    Index(u32),
}

/// The way to a value, and what it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Access {
    /// Number of the argument, from 0: which of the registers has it.
    pub argument: usize,
    /// From it, at which offset, in bytes, the next pointer is read, and at the last the value; none when the argument is the value.
    pub loads: Vec<u32>,
    /// Bytes of the value, or of what is read to get at its bits: 1, 2, 4 or 8.
    pub size: u8,
    /// Whether it has a sign.
    pub signed: bool,
    /// For a bit field: its first bit in what is read, and how many it has.
    pub bits: Option<(u8, u8)>,
    /// The enumeration that it is one of, if that has a name.
    pub enumeration: Option<String>,
}

/// Where the way has got to.
struct Way {
    /// `None` while that is the argument itself, in its register.
    place: Option<Place>,
    id: u32,
    loads: Vec<u32>,
    /// For errors.
    text: String,
}

impl Types {
    /// The way from `argument` of `function` over `hops`.
    ///
    /// # Errors
    /// [`AccessError`].
    pub fn access(
        &self,
        function: &str,
        argument: Which<'_>,
        hops: &[Hop<'_>],
    ) -> Result<Access, AccessError> {
        self.of_function(function, |prototype, budget| {
            let (index, id, text) = self.argument(function, &prototype, argument, budget)?;
            let mut way = Way {
                place: None,
                id,
                loads: Vec::new(),
                text,
            };
            for hop in hops {
                self.hop(&mut way, *hop, budget)?;
            }
            self.arrived(index, way)
        })
    }

    /// Value of `enumerator`, whatever enumeration it is in.
    ///
    /// # Errors
    /// [`TypeError::NoEnumerator`], or [`TypeError::Ambiguous`] when several differ.
    pub fn any_enumerator(&self, enumerator: &str) -> Result<i64, TypeError> {
        let mut values: Vec<i64> = Vec::new();
        for id in 1..self.behind().0 {
            let raw = self.raw(id);
            let Some(of) = raw.filter(|of| matches!(of.kind, Kind::Enum | Kind::Enum64)) else {
                continue;
            };
            let all = (0..of.vlen).map_while(|index| self.raw_enumerator(&of, index));
            let named = all.filter(|(name, _)| self.string(*name) == enumerator.as_bytes());
            for (_, value) in named {
                if !values.contains(&value) {
                    values.push(value);
                }
            }
        }
        match values.as_slice() {
            [value] => Ok(*value),
            [] => Err(TypeError::NoEnumerator {
                name: "any".to_owned(),
                enumerator: enumerator.to_owned(),
            }),
            _ => Err(TypeError::Ambiguous {
                name: enumerator.to_owned(),
                count: values.len(),
            }),
        }
    }

    /// Whether the types say anything of what `function` takes or gives. Of assembly they may have the name, and say nothing; so they do of a C function
    /// that takes and gives nothing.
    #[must_use]
    pub fn has_prototype(&self, function: &str) -> bool {
        let any =
            |prototype: RawType, _: &Budget| Ok(prototype.vlen > 0 || prototype.size_or_type != 0);
        self.of_function(function, any).unwrap_or(false)
    }

    /// How many of the registers that carry arguments a call of `function` may use, by its prototype: at most [`REGISTERS`], and all of them where any
    /// arguments may follow.
    ///
    /// # Errors
    /// [`AccessError`] when the types have no such function, or several that differ.
    pub fn argument_registers(&self, function: &str) -> Result<usize, AccessError> {
        self.of_function(function, |prototype, budget| {
            let words = |id: u32| match self.size(id) {
                Some(size) if size <= 8 => 1,
                Some(size) if size <= 16 => 2,
                Some(_) => 0,
                None => REGISTERS,
            };
            // What two registers cannot carry back is written to where the caller says, in a register of its own.
            let result = prototype.size_or_type;
            let mut all =
                usize::from(result != 0 && self.size(result).is_none_or(|size| size > 16));
            for index in 0..prototype.vlen {
                if budget.look().is_none() {
                    return Ok(REGISTERS);
                }
                all += match self.raw_parameter(&prototype, index) {
                    Some((_, id)) if id != 0 => words(id),
                    _ => REGISTERS,
                };
            }
            Ok(all.min(REGISTERS))
        })
    }

    /// What `ask` answers for the prototypes of the functions called so, when they all answer the same.
    fn of_function<T: PartialEq>(
        &self,
        function: &str,
        ask: impl Fn(RawType, &Budget) -> Result<T, AccessError>,
    ) -> Result<T, AccessError> {
        let ids: Vec<u32> = self
            .named(self.functions(), function)
            .map(|(id, _)| id)
            .collect();
        let none = || AccessError::NoFunction {
            function: function.to_owned(),
        };
        if ids.is_empty() {
            let base = self.base.as_ref().ok_or_else(none)?;
            return base.of_function(function, ask);
        }
        self.agreed_among(function, &ids, |id, budget| {
            let prototype = self
                .raw(id)
                .and_then(|function| self.raw(function.size_or_type));
            let prototype = prototype.filter(|raw| raw.code == code::PROTOTYPE);
            ask(prototype.ok_or_else(none)?, budget)
        })
    }

    /// Number, type and name of the argument asked for.
    fn argument(
        &self,
        function: &str,
        prototype: &RawType,
        which: Which<'_>,
        budget: &Budget,
    ) -> Result<(usize, u32, String), AccessError> {
        let all = (0..prototype.vlen).map_while(|index| {
            budget.look()?;
            self.raw_parameter(prototype, index)
        });
        // The last is nothing where any may follow.
        let all: Vec<(String, u32)> = all
            .filter(|(_, id)| *id != 0)
            .map(|(name, id)| (String::from_utf8_lossy(self.string(name)).into_owned(), id))
            .collect();
        let found = match which {
            Which::Number(number) => number.checked_sub(1).filter(|index| *index < all.len()),
            Which::Name(name) => all.iter().position(|(has, _)| has == name),
        };
        let argument = match which {
            Which::Number(number) => format!("arg{number}"),
            Which::Name(name) => name.to_owned(),
        };
        let Some(index) = found else {
            return Err(AccessError::NoArgument {
                function: function.to_owned(),
                argument,
                has: list(&all),
            });
        };
        let by_value = |id: u32| {
            let kind = self.resolve(id).map(|raw| raw.kind);
            !matches!(
                kind,
                Some(Kind::Int | Kind::Ptr | Kind::Enum | Kind::Enum64)
            ) || self.size(id).is_none_or(|size| size > 8)
        };
        let why = if prototype.size_or_type != 0 && by_value(prototype.size_or_type) {
            Some("the function returns a structure, which changes what registers hold")
        } else if all[..=index].iter().any(|(_, id)| by_value(*id)) {
            Some("it or one before it is no integer or pointer of at most eight bytes")
        } else if index >= REGISTERS {
            Some("only the first six are in registers, the others are on the stack")
        } else {
            None
        };
        match why {
            Some(why) => Err(AccessError::NotInRegister {
                function: function.to_owned(),
                argument,
                why,
            }),
            None => Ok((index, all[index].1, argument)),
        }
    }

    fn hop(&self, way: &mut Way, hop: Hop<'_>, budget: &Budget) -> Result<(), AccessError> {
        let step = match hop {
            Hop::Member(name) => name.to_owned(),
            Hop::Index(index) => format!("[{index}]"),
        };
        let no_way = |way: &Way, why| AccessError::NoWay {
            step: step.clone(),
            what: way.text.clone(),
            why,
        };
        let raw = self
            .resolve(way.id)
            .ok_or_else(|| no_way(way, "of a type that is not known"))?;
        let mut place = match (raw.kind, way.place) {
            (Kind::Ptr, place) => {
                if let Some(place) = place {
                    way.loads.push(offset(way, place)?);
                }
                Place {
                    id: raw.size_or_type,
                    bit: 0,
                    bits: 0,
                }
            }
            (Kind::Array, Some(place)) if matches!(hop, Hop::Index(_)) => place,
            (Kind::Struct | Kind::Union, Some(place)) if matches!(hop, Hop::Member(_)) => place,
            _ => return Err(no_way(way, "no pointer, and nothing that has such a part")),
        };
        place = match hop {
            Hop::Member(name) => {
                let of = self.resolve(place.id);
                if !of.is_some_and(|of| matches!(of.kind, Kind::Struct | Kind::Union)) {
                    let why = "a pointer to what the kernel's types do not describe as a structure";
                    return Err(no_way(way, why));
                }
                let found = self.find(place, name.as_bytes(), 0, budget);
                found.ok_or_else(|| AccessError::NoMember {
                    what: format!("{}, {}", way.text, self.described(place.id)),
                    member: name.to_owned(),
                })?
            }
            Hop::Index(index) => {
                let (element, count) = match raw.kind {
                    Kind::Array => self.raw_array(&raw).unwrap_or((0, 0)),
                    _ => (place.id, u32::MAX),
                };
                if index >= count {
                    return Err(no_way(way, "an array that ends before it"));
                }
                let bits = self
                    .size(element)
                    .and_then(|size| size.checked_mul(8)?.checked_mul(index.into()));
                let bit = bits.and_then(|bits| place.bit.checked_add(bits));
                let bit = bit.ok_or_else(|| no_way(way, "of elements whose size is not known"))?;
                Place {
                    id: element,
                    bit,
                    bits: 0,
                }
            }
        };
        way.text = match hop {
            Hop::Member(_) => format!("{}->{step}", way.text),
            Hop::Index(_) => format!("{}{step}", way.text),
        };
        (way.place, way.id) = (Some(place), place.id);
        Ok(())
    }

    /// The value at the end of `way`.
    fn arrived(&self, argument: usize, mut way: Way) -> Result<Access, AccessError> {
        let (mut size, signed, enumeration) = self.scalar(way.id, way.text.clone())?;
        let mut bits = None;
        if let Some(place) = way.place {
            let mut at = place;
            if place.bits != 0 || !place.bit.is_multiple_of(8) {
                let no_number = || AccessError::NoNumber {
                    what: way.text.clone(),
                    why: "a bit field that no aligned word holds",
                };
                let (word, first) = word_of(place).ok_or_else(no_number)?;
                size = word;
                at.bit = place.bit - u64::from(first);
                let count = u8::try_from(place.bits).ok().filter(|count| *count > 0);
                bits = Some((first, count.ok_or_else(no_number)?));
            }
            way.loads.push(offset(&way, at)?);
        }
        Ok(Access {
            argument,
            loads: way.loads,
            size,
            signed,
            bits,
            enumeration,
        })
    }

    /// Bytes, sign and enumeration of a number of type `id`, which `what` has.
    fn scalar(&self, id: u32, what: String) -> Result<(u8, bool, Option<String>), AccessError> {
        let raw = self.resolve(id);
        let size = self.size(id).and_then(|size| u8::try_from(size).ok());
        let size = size.filter(|size| matches!(size, 1 | 2 | 4 | 8));
        match (raw, size) {
            (Some(raw), Some(size)) => match raw.kind {
                Kind::Int => Ok((size, self.is_signed(&raw), None)),
                Kind::Ptr => Ok((size, false, None)),
                Kind::Enum | Kind::Enum64 => {
                    let name = String::from_utf8_lossy(self.string(raw.name)).into_owned();
                    Ok((size, raw.flag, Some(name).filter(|name| !name.is_empty())))
                }
                _ => Err(AccessError::NoNumber {
                    what,
                    why: "a structure, an array or a floating-point number",
                }),
            },
            _ => Err(AccessError::NoNumber {
                what,
                why: "not of 1, 2, 4 or 8 bytes",
            }),
        }
    }

    fn described(&self, id: u32) -> String {
        let raw = self.resolve(id);
        let name = raw.map(|raw| String::from_utf8_lossy(self.string(raw.name)).into_owned());
        match name {
            Some(name) if !name.is_empty() => format!("a {name}"),
            _ => "a structure without a name".to_owned(),
        }
    }
}

/// Offset of `place`, in bytes.
fn offset(way: &Way, place: Place) -> Result<u32, AccessError> {
    let offset = Some(place.bit / 8).filter(|offset| *offset < MAX_OFFSET);
    offset
        .and_then(|offset| u32::try_from(offset).ok())
        .ok_or_else(|| AccessError::NoNumber {
            what: way.text.clone(),
            why: "too far away",
        })
}

/// The smallest aligned word that all bits of `place` are in: its bytes, and the first bit in it.
fn word_of(place: Place) -> Option<(u8, u8)> {
    let last = place.bit.checked_add(u64::from(place.bits).max(1) - 1)?;
    let fits = |size: &u8| place.bit / (u64::from(*size) * 8) == last / (u64::from(*size) * 8);
    let size = [1, 2, 4, 8].into_iter().find(fits)?;
    let first = u8::try_from(place.bit % (u64::from(size) * 8)).ok()?;
    Some((size, first))
}

/// The arguments' names, for an error.
fn list(all: &[(String, u32)]) -> String {
    match all {
        [] => "none".to_owned(),
        _ => {
            let names: Vec<&str> = all.iter().take(12).map(|(name, _)| name.as_str()).collect();
            names.join(", ")
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::{Access, Hop, Which};
    use crate::kernel::testing::Btf;
    use crate::kernel::types::Types;
    use crate::kernel::types::tests::types;

    /// Functions that take a pointer to a structure with everything in it, structures themselves, and too much.
    fn sample() -> Btf {
        let mut btf = Btf::default();
        let (byte, int, long) = (btf.int(1), btf.int(4), btf.int(8));
        let signed = btf.add("int", 1, 0, 4, &[1 << 24 | 32]);
        let own = signed + 3;
        let pointer = btf.add("", 2, 0, own, &[]);
        let array = btf.array(int, 3);
        let names =
            ["next", "numbers", "low", "split", "state", "cross"].map(|name| btf.string(name));
        let state = own + 1;
        let members = [
            [names[0], pointer, 0],
            [names[1], array, 64],
            [names[2], int, 3 << 24 | 165],
            [names[3], signed, 12 << 24 | 178],
            [names[4], state, 224],
            [names[5], int, 12 << 24 | 186],
        ];
        assert_eq!(btf.add("node", 4 | 0x80, 6, 32, &members.concat()), own);
        assert_eq!(btf.enumeration("state", &[("ON", 1), ("OFF", 2)]), state);
        btf.enumeration("other", &[("ON", 1), ("OFF", 3), ("ALONE", 9)]);
        let small = btf.structure("small", 8, &[("x", long, 0)]);
        let void = btf.add("", 2, 0, 0, &[]);
        let mut function = |name: &str, returns: u32, parameters: &[(&str, u32)]| {
            let mut extra = Vec::new();
            for (name, kind) in parameters {
                extra.extend([btf.string(name), *kind]);
            }
            let prototype = btf.add("", 13, parameters.len(), returns, &extra);
            btf.add(name, 12, 1, prototype, &[]);
        };
        function(
            "walk",
            int,
            &[("node", pointer), ("how", byte), ("to", void)],
        );
        let seven = ["a", "b", "c", "d", "e", "f", "g"].map(|name| (name, signed));
        function("seven", 0, &seven);
        function(
            "by_value",
            0,
            &[("first", int), ("small", small), ("last", int)],
        );
        function("gives_small", small, &[("first", int)]);
        function("twin", 0, &[("a", int)]);
        function("twin", 0, &[("b", int), ("a", int)]);
        btf
    }

    fn check(function: &str, which: Which<'_>, hops: &[Hop<'_>], want: Result<Access, &str>) {
        let types = types(sample().finish()).unwrap();
        match (types.access(function, which, hops), want) {
            (Ok(got), Ok(want)) => assert_eq!(got, want),
            (Err(got), Err(want)) => assert!(got.to_string().contains(want), "{got}"),
            (got, want) => panic!("{function}, {which:?}, {hops:?}: {got:?} instead of {want:?}"),
        }
    }

    fn access(argument: usize, loads: &[u32], size: u8, signed: bool) -> Access {
        Access {
            argument,
            loads: loads.to_vec(),
            size,
            signed,
            bits: None,
            enumeration: None,
        }
    }

    #[test]
    fn arguments_and_what_they_lead_to_are_found() {
        let (node, next) = (Which::Name("node"), Hop::Member("next"));
        let number = |index| [next, Hop::Member("numbers"), Hop::Index(index)];
        check("walk", Which::Number(2), &[], Ok(access(1, &[], 1, false)));
        check("walk", node, &[], Ok(access(0, &[], 8, false)));
        check(
            "walk",
            node,
            &[next, next],
            Ok(access(0, &[0, 0], 8, false)),
        );
        check("walk", node, &number(2), Ok(access(0, &[0, 16], 4, false)));
        let second = [Hop::Index(2), Hop::Member("numbers"), Hop::Index(0)];
        check("walk", node, &second, Ok(access(0, &[72], 4, false)));
        check("seven", Which::Name("f"), &[], Ok(access(5, &[], 4, true)));
        check(
            "by_value",
            Which::Number(1),
            &[],
            Ok(access(0, &[], 4, false)),
        );
        let bits = |size, loads: &[u32], signed, bits| {
            let bits = Some(bits);
            Ok(Access {
                bits,
                ..access(0, loads, size, signed)
            })
        };
        check(
            "walk",
            node,
            &[Hop::Member("low")],
            bits(1, &[20], false, (5, 3)),
        );
        check(
            "walk",
            node,
            &[Hop::Member("split")],
            bits(2, &[22], true, (2, 12)),
        );
    }

    #[test]
    fn an_enumeration_is_told_by_its_name() {
        let want = Access {
            enumeration: Some("state".to_owned()),
            ..access(0, &[28], 4, false)
        };
        check("walk", Which::Number(1), &[Hop::Member("state")], Ok(want));
    }

    #[test]
    fn what_no_register_or_type_tells_is_an_error() {
        let (node, next) = (Which::Name("node"), Hop::Member("next"));
        check("nothing", node, &[], Err("no function nothing"));
        check("walk", Which::Name("x"), &[], Err("it has node, how, to"));
        check("walk", Which::Number(0), &[], Err("no argument arg0"));
        check("walk", Which::Number(4), &[], Err("no argument arg4"));
        check(
            "walk",
            node,
            &[Hop::Member("x")],
            Err("node, a node has no member x"),
        );
        check(
            "walk",
            node,
            &[next, Hop::Member("numbers")],
            Err("compares with no number"),
        );
        check(
            "walk",
            node,
            &[Hop::Member("numbers"), Hop::Index(3)],
            Err("ends before it"),
        );
        check(
            "walk",
            node,
            &[Hop::Member("cross")],
            Err("no aligned word"),
        );
        check("walk", Which::Name("how"), &[next], Err("no pointer"));
        check(
            "walk",
            Which::Name("to"),
            &[next],
            Err("do not describe as a structure"),
        );
        check(
            "walk",
            Which::Name("to"),
            &[Hop::Index(1)],
            Err("size is not known"),
        );
        check("seven", Which::Name("g"), &[], Err("only the first six"));
        check(
            "by_value",
            Which::Name("small"),
            &[],
            Err("no integer or pointer"),
        );
        check(
            "by_value",
            Which::Name("last"),
            &[],
            Err("no integer or pointer"),
        );
        check(
            "gives_small",
            Which::Number(1),
            &[],
            Err("returns a structure"),
        );
        check(
            "twin",
            Which::Name("a"),
            &[],
            Err("2 different types called twin"),
        );
    }

    #[test]
    fn enumerators_are_found_where_all_that_have_them_agree() {
        let types = types(sample().finish()).unwrap();
        assert_eq!(types.any_enumerator("ON"), Ok(1));
        assert_eq!(types.any_enumerator("ALONE"), Ok(9));
        assert!(
            types
                .any_enumerator("OFF")
                .unwrap_err()
                .to_string()
                .contains("2 different")
        );
        assert!(types.any_enumerator("NONE").is_err());
    }

    fn ask(types: &Types) {
        for function in ["walk", "seven", "by_value", "twin"] {
            for number in 0..9 {
                let hops = [
                    Hop::Member("next"),
                    Hop::Index(1),
                    Hop::Member("numbers"),
                    Hop::Index(2),
                ];
                for count in 0..=hops.len() {
                    let _ = types.access(function, Which::Number(number), &hops[..count]);
                }
            }
        }
        let _ = types.any_enumerator("ON");
    }

    proptest! {
        #[test]
        fn damage_never_panics(changes in prop::collection::vec((any::<usize>(), any::<u8>()), 1..12)) {
            let mut bytes = sample().finish();
            let len = bytes.len();
            for (at, value) in changes {
                bytes[at % len] = value;
            }
            if let Ok(types) = types(bytes) {
                ask(&types);
            }
        }
    }
}
