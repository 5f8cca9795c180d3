//! The kernel's types, from BTF: where a member is, how large a structure is, what an enumerator's value is.
//!
//! Presence decides, never a version: a member that the kernel lacks is an error that callers may expect.
//! One pass over the section indexes the names; a type is decoded when it is asked about. Where several types bear
//! one name and answer differently, that is an error too.

pub mod access;
mod budget;
mod parts;
pub mod print;

use std::fmt;
use std::ops::Range;
use std::sync::{Arc, OnceLock};

use self::budget::Budget;
use super::btf::{Kind, Layout, RawType, code};
use super::image::Bytes;

/// Deepest nesting of types that is followed; the kernel's own stay below twenty.
const MAX_DEPTH: usize = 64;

/// Why a question about a type has no answer.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TypeError {
    /// The kernel has no types at all.
    #[error("the kernel has no types: {need}")]
    Absent {
        /// What is not there, and the kernel option that makes it.
        need: &'static str,
    },
    /// The section is damaged.
    #[error("section .BTF has {what} at {at:#x}")]
    Damaged {
        /// What is wrong.
        what: &'static str,
        /// Where, in bytes from the section's start.
        at: usize,
    },
    /// No type is called that.
    #[error("the kernel has no type {name}")]
    NoType {
        /// The name asked for.
        name: String,
    },
    /// The type has no such member.
    #[error("type {name} of the kernel has no member {member}")]
    NoMember {
        /// The type asked about.
        name: String,
        /// The part of the path that was not found.
        member: String,
    },
    /// The enumeration has no such enumerator.
    #[error("enumeration {name} of the kernel has no enumerator {enumerator}")]
    NoEnumerator {
        /// The enumeration asked about.
        name: String,
        /// The enumerator asked for.
        enumerator: String,
    },
    /// Several types bear the name and differ in what was asked.
    #[error("the kernel has {count} different types called {name}")]
    Ambiguous {
        /// The name asked for.
        name: String,
        /// How many.
        count: usize,
    },
    /// The type is so large, or nested so deep, that no kernel's is.
    #[error("type {name} of the kernel is too large to be read")]
    TooLarge {
        /// The name asked for.
        name: String,
    },
}

/// Where a member lies in its structure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Member {
    /// Bytes from the start of the structure; for a bit field, of the byte that its first bit is in.
    pub offset: u64,
    /// Bytes; for a bit field, of the bytes that it touches.
    pub size: u64,
    /// For a bit field: its first bit within the byte at `offset`, and how many bits it has.
    pub bits: Option<(u8, u8)>,
}

/// The types of one image, or of a module: those stand on the image's, refer to them by number, and share their strings.
pub struct Types {
    base: Option<Arc<Types>>,
    bytes: Bytes,
    section: Range<usize>,
    layout: Layout,
    /// Hash of a named structure's, union's, enumeration's or typedef's name in the upper half, id in the lower; sorted.
    by_name: Vec<u64>,
    /// The same of functions, indexed when the first is asked about.
    functions: OnceLock<Vec<u64>>,
    /// Why there are none.
    absent: Option<&'static str>,
}

impl Types {
    /// Indexes the types of a kernel, whose section `.BTF` is `section` of `bytes`.
    ///
    /// # Errors
    /// [`TypeError::Damaged`].
    pub fn parse(bytes: Bytes, section: Range<usize>) -> Result<Self, TypeError> {
        Self::parse_part(bytes, section, None)
    }

    fn parse_part(
        bytes: Bytes,
        section: Range<usize>,
        base: Option<Arc<Types>>,
    ) -> Result<Self, TypeError> {
        let data = (*bytes).as_ref().get(section.clone()).unwrap_or_default();
        let mut named = Vec::new();
        let layout = Layout::parse(data, |id, raw| {
            let wanted = matches!(
                raw.kind,
                Kind::Struct | Kind::Union | Kind::Enum | Kind::Enum64 | Kind::Typedef
            );
            if wanted && raw.name != 0 {
                named.push((id, raw.name));
            }
        })
        .map_err(|(what, at)| TypeError::Damaged { what, at })?;
        let mut types = Self {
            base,
            bytes,
            section,
            layout,
            by_name: Vec::new(),
            functions: OnceLock::new(),
            absent: None,
        };
        let (first, _) = types.first_own();
        let key = |(id, name): (u32, u32)| {
            let name = types.string(name);
            let entry = key(name) | u64::from(id.saturating_add(first - 1));
            (!name.is_empty()).then_some(entry)
        };
        let mut by_name: Vec<u64> = named.into_iter().filter_map(key).collect();
        by_name.sort_unstable();
        types.by_name = by_name;
        Ok(types)
    }

    /// Those of a kernel that has none, for the reason `need`: whatever is asked, that is the answer.
    pub(crate) fn absent(need: &'static str) -> Self {
        Self {
            bytes: Arc::new(Vec::new()),
            section: 0..0,
            layout: Layout {
                types: 0..0,
                strings: 0..0,
                starts: Vec::new(),
            },
            by_name: Vec::new(),
            functions: OnceLock::new(),
            absent: Some(need),
            base: None,
        }
    }

    /// The whole section that they were read from.
    #[must_use]
    pub fn section(&self) -> &[u8] {
        self.data()
    }

    /// What it means that nothing is called `name`.
    fn none(&self, name: &str) -> TypeError {
        match self.absent.or_else(|| self.base.as_ref()?.absent) {
            Some(need) => TypeError::Absent { need },
            None => TypeError::NoType {
                name: name.to_owned(),
            },
        }
    }

    /// How many types there are, those of the base not counted.
    #[must_use]
    pub fn len(&self) -> usize {
        self.layout.starts.len()
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.layout.starts.is_empty()
    }

    /// Where member `path` of structure, union or typedef `name` lies. `path` may go through members
    /// (`thread.sp`), through anonymous members without naming them, and through array elements (`slots[3]`).
    ///
    /// # Errors
    /// [`TypeError::NoType`], [`TypeError::NoMember`], [`TypeError::Ambiguous`], or [`TypeError::TooLarge`] for what no kernel has.
    pub fn member(&self, name: &str, path: &str) -> Result<Member, TypeError> {
        self.agreed(name, |id, budget| {
            let mut at = Place {
                id,
                bit: 0,
                bits: 0,
            };
            for part in path.split('.') {
                let none = || TypeError::NoMember {
                    name: name.to_owned(),
                    member: path.to_owned(),
                };
                at = self.step(at, part, budget).ok_or_else(none)?;
            }
            self.finish(at).ok_or_else(|| TypeError::NoMember {
                name: name.to_owned(),
                member: path.to_owned(),
            })
        })
    }

    /// The named members of structure or union `name`, in order, without those of anonymous members.
    ///
    /// # Errors
    /// [`TypeError::NoType`], [`TypeError::Ambiguous`] or [`TypeError::TooLarge`].
    pub fn members(&self, name: &str) -> Result<Vec<(String, Member)>, TypeError> {
        self.agreed(name, |id, budget| {
            let none = || TypeError::NoType {
                name: name.to_owned(),
            };
            let of = self
                .resolve(id)
                .filter(|raw| matches!(raw.kind, Kind::Struct | Kind::Union))
                .ok_or_else(none)?;
            let all = (0..of.vlen).map_while(|index| budget.look().map(|()| index));
            let raw = all.filter_map(|index| self.raw_member(&of, index));
            let named = raw.filter(|member| member.name != 0).filter_map(|member| {
                let place = Place {
                    id: member.kind,
                    bit: member.bit_offset.into(),
                    bits: member.bits,
                };
                let text = String::from_utf8_lossy(self.string(member.name));
                Some((text.into_owned(), self.finish(place)?))
            });
            Ok(named.collect())
        })
    }

    /// Offset of member `path` in bytes, where it is no bit field.
    ///
    /// # Errors
    /// As [`Types::member`].
    pub fn offset_of(&self, name: &str, path: &str) -> Result<u64, TypeError> {
        self.member(name, path).map(|member| member.offset)
    }

    /// Whether [`Types::member`] would answer.
    #[must_use]
    pub fn has_member(&self, name: &str, path: &str) -> bool {
        self.member(name, path).is_ok()
    }

    /// Bytes of structure, union, enumeration or typedef `name`.
    ///
    /// # Errors
    /// [`TypeError::NoType`], [`TypeError::Ambiguous`] or [`TypeError::TooLarge`].
    pub fn size_of(&self, name: &str) -> Result<u64, TypeError> {
        self.agreed(name, |id, _| {
            self.size(id).ok_or_else(|| TypeError::NoType {
                name: name.to_owned(),
            })
        })
    }

    /// Value of `enumerator` of enumeration `name`.
    ///
    /// # Errors
    /// [`TypeError::NoType`], [`TypeError::NoEnumerator`], [`TypeError::Ambiguous`] or [`TypeError::TooLarge`].
    pub fn enumerator(&self, name: &str, enumerator: &str) -> Result<i64, TypeError> {
        let all = self.enumerators(name)?;
        let found = all
            .into_iter()
            .find(|(candidate, _)| candidate == enumerator);
        let none = || TypeError::NoEnumerator {
            name: name.to_owned(),
            enumerator: enumerator.to_owned(),
        };
        found.map(|(_, value)| value).ok_or_else(none)
    }

    /// All enumerators of enumeration `name`, with their values.
    ///
    /// # Errors
    /// [`TypeError::NoType`], [`TypeError::Ambiguous`] or [`TypeError::TooLarge`].
    pub fn enumerators(&self, name: &str) -> Result<Vec<(String, i64)>, TypeError> {
        self.agreed(name, |id, budget| {
            let none = || TypeError::NoType {
                name: name.to_owned(),
            };
            let of = self
                .resolve(id)
                .filter(|of| matches!(of.kind, Kind::Enum | Kind::Enum64))
                .ok_or_else(none)?;
            let all = (0..of.vlen).map_while(|index| budget.look().map(|()| index));
            let named = all.filter_map(|index| self.raw_enumerator(&of, index));
            let text = |offset| String::from_utf8_lossy(self.string(offset)).into_owned();
            Ok(named.map(|(offset, value)| (text(offset), value)).collect())
        })
    }

    fn data(&self) -> &[u8] {
        (*self.bytes)
            .as_ref()
            .get(self.section.clone())
            .unwrap_or_default()
    }

    /// What `ask` answers for the types called `name`, when they all answer the same.
    fn agreed<T: PartialEq>(
        &self,
        name: &str,
        ask: impl Fn(u32, &Budget) -> Result<T, TypeError>,
    ) -> Result<T, TypeError> {
        self.agreed_among(name, &self.ids(name), ask)
    }

    /// What `ask` answers for the types `ids`, all called `name`, when they all answer the same.
    fn agreed_among<T: PartialEq, E: PartialEq + From<TypeError>>(
        &self,
        name: &str,
        ids: &[u32],
        ask: impl Fn(u32, &Budget) -> Result<T, E>,
    ) -> Result<T, E> {
        let budget = Budget::new();
        let within = ids.iter().map_while(|id| budget.look().map(|()| *id));
        let mut answers = within.map(|id| ask(id, &budget));
        let none = || Err(self.none(name).into());
        let first = answers.next().unwrap_or_else(none);
        let differ = answers.any(|answer| answer != first);
        if budget.is_spent() {
            let name = name.to_owned();
            return Err(TypeError::TooLarge { name }.into());
        }
        if differ {
            let (name, count) = (name.to_owned(), ids.len());
            return Err(TypeError::Ambiguous { name, count }.into());
        }
        first
    }

    /// The structures, unions and enumerations called `name`; if there are none, the typedefs; if there are none, the base's.
    fn ids(&self, name: &str) -> Vec<u32> {
        let (typedefs, tagged): (Vec<_>, Vec<_>) = self
            .named(&self.by_name, name)
            .partition(|(_, raw)| raw.kind == Kind::Typedef);
        match (&self.base, tagged.is_empty(), typedefs.is_empty()) {
            (Some(base), true, true) => base.ids(name),
            (_, true, _) => typedefs.into_iter().map(|(id, _)| id).collect(),
            (_, false, _) => tagged.into_iter().map(|(id, _)| id).collect(),
        }
    }

    /// The types of `index` that are called `name`.
    fn named<'a>(
        &'a self,
        index: &'a [u64],
        name: &'a str,
    ) -> impl Iterator<Item = (u32, RawType)> + 'a {
        let hash = key(name.as_bytes());
        let first = index.partition_point(|entry| *entry < hash);
        let same = index[first..]
            .iter()
            .take_while(move |entry| **entry >> 32 == hash >> 32);
        let of = move |entry: &u64| {
            let id = u32::try_from(entry & 0xffff_ffff).unwrap_or(0);
            let raw = self.raw(id)?;
            (self.string(raw.name) == name.as_bytes()).then_some((id, raw))
        };
        same.filter_map(of)
    }

    /// The functions' names, as `by_name`.
    fn functions(&self) -> &[u64] {
        self.functions.get_or_init(|| {
            let ((first, _), (behind, _)) = (self.first_own(), self.behind());
            let entry = |id| {
                let raw = self.raw(id)?;
                let name = self.string(raw.name);
                (raw.code == code::FUNCTION).then(|| key(name) | u64::from(id))
            };
            let mut functions: Vec<u64> = (first..behind).filter_map(entry).collect();
            functions.sort_unstable();
            functions
        })
    }

    /// Type `id` with its typedefs and qualifiers taken off.
    fn resolve(&self, mut id: u32) -> Option<RawType> {
        for _ in 0..MAX_DEPTH {
            let raw = self.raw(id)?;
            match raw.kind {
                Kind::Alias | Kind::Typedef => id = raw.size_or_type,
                _ => return Some(raw),
            }
        }
        None
    }

    /// Bytes of type `id`.
    fn size(&self, mut id: u32) -> Option<u64> {
        let mut times = 1_u64;
        for _ in 0..MAX_DEPTH {
            let raw = self.raw(id)?;
            let each: u64 = match raw.kind {
                Kind::Ptr => 8,
                Kind::Array => {
                    let (element, count) = self.raw_array(&raw)?;
                    times = times.checked_mul(count.into())?;
                    id = element;
                    continue;
                }
                Kind::Alias | Kind::Typedef => {
                    id = raw.size_or_type;
                    continue;
                }
                Kind::Int
                | Kind::Struct
                | Kind::Union
                | Kind::Enum
                | Kind::Enum64
                | Kind::Float => raw.size_or_type.into(),
                Kind::Fwd | Kind::Other => return None,
            };
            return each.checked_mul(times);
        }
        None
    }

    /// From `at` to its member `part`, which may end in `[index]`.
    fn step(&self, at: Place, part: &str, budget: &Budget) -> Option<Place> {
        let (member, mut indices) = part
            .split_once('[')
            .map_or((part, ""), |(member, indices)| (member, indices));
        let mut at = self.find(at, member.as_bytes(), 0, budget)?;
        while !indices.is_empty() {
            let (index, rest) = indices.split_once(']')?;
            let array = self.resolve(at.id).filter(|raw| raw.kind == Kind::Array)?;
            let (element, count) = self.raw_array(&array)?;
            let index: u64 = index
                .parse()
                .ok()
                .filter(|index| *index < u64::from(count))?;
            at = Place {
                id: element,
                bit: at
                    .bit
                    .checked_add(self.size(element)?.checked_mul(index * 8)?)?,
                bits: 0,
            };
            indices = rest.strip_prefix('[').unwrap_or(rest);
        }
        Some(at)
    }

    /// Member `name` of the structure at `at`, also within its anonymous members.
    fn find(&self, at: Place, name: &[u8], depth: usize, budget: &Budget) -> Option<Place> {
        let of = self
            .resolve(at.id)
            .filter(|raw| matches!(raw.kind, Kind::Struct | Kind::Union))?;
        if depth > MAX_DEPTH {
            return None;
        }
        let mut all = (0..of.vlen).map_while(|index| budget.look().map(|()| index));
        all.find_map(|index| {
            let member = self.raw_member(&of, index)?;
            let place = Place {
                id: member.kind,
                bit: at.bit.checked_add(member.bit_offset.into())?,
                bits: member.bits,
            };
            if member.name == 0 {
                self.find(place, name, depth + 1, budget)
            } else {
                (self.string(member.name) == name).then_some(place)
            }
        })
    }

    fn finish(&self, at: Place) -> Option<Member> {
        let offset = at.bit / 8;
        let first = u8::try_from(at.bit % 8).ok()?;
        if at.bits == 0 && first == 0 {
            return Some(Member {
                offset,
                size: self.size(at.id)?,
                bits: None,
            });
        }
        let bits = u8::try_from(at.bits).ok()?;
        let size = (u64::from(first) + u64::from(bits)).div_ceil(8);
        Some(Member {
            offset,
            size,
            bits: Some((first, bits)),
        })
    }
}

/// A member on the way through a path.
#[derive(Clone, Copy)]
struct Place {
    id: u32,
    bit: u64,
    bits: u32,
}

impl fmt::Debug for Types {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Types")
            .field("count", &self.len())
            .finish_non_exhaustive()
    }
}

/// The hash of a name (32-bit FNV-1a) in the upper half of a key.
fn key(name: &[u8]) -> u64 {
    let hash = name.iter().fold(0x811c_9dc5_u32, |hash, byte| {
        (hash ^ u32::from(*byte)).wrapping_mul(0x0100_0193)
    });
    u64::from(hash) << 32
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use proptest::prelude::*;

    use super::{Member, TypeError, Types};
    use crate::kernel::testing::{Btf, FORMS, btf};

    pub(in crate::kernel::types) fn types(bytes: Vec<u8>) -> Result<Types, TypeError> {
        let section = 0..bytes.len();
        Types::parse(Arc::new(bytes), section)
    }

    /// A structure with everything in it that C allows.
    pub(super) fn sample() -> Btf {
        let mut btf = Btf::default();
        let (int, long) = (btf.int(4), btf.int(8));
        let inner = btf.structure("inner", 16, &[("a", int, 0), ("b", long, 8)]);
        let alias = btf.add("inner_t", 8, 0, inner, &[]);
        let constant = btf.add("", 10, 0, alias, &[]);
        let anonymous = btf.structure("", 16, &[("deep", long, 8), ("inner", inner, 0)]);
        let slots = btf.array(constant, 4);
        let bits = btf.string("flag");
        let rest = btf.string("rest");
        // Bit fields: kind_flag set, size in the upper byte of the offset.
        let packed = btf.add(
            "packed",
            4 | 0x80,
            2,
            8,
            &[bits, int, 3 << 24 | 37, rest, int, 32],
        );
        btf.structure(
            "outer",
            128,
            &[
                ("x", alias, 4),
                ("", anonymous, 32),
                ("slots", slots, 48),
                ("p", packed, 112),
            ],
        );
        btf.enumeration("colour", &[("RED", 1), ("GREEN", 7)]);
        btf.structure("twice", 8, &[("same", int, 0), ("other", int, 4)]);
        btf.structure("twice", 8, &[("same", int, 0), ("other", int, 0)]);
        // A structure that contains itself, a typedef of itself, and an array without end.
        let own = 1 + btf.add("", 0x10, 0, 0, &[]);
        btf.structure("snake", 8, &[("", own, 0)]);
        btf.add("ouroboros", 8, 0, own + 1, &[]);
        let endless = own + 2;
        btf.array(endless, u32::MAX);
        btf.structure("sink", 8, &[("all", endless, 0)]);
        btf
    }

    fn check(name: &str, path: &str, want: Result<(u64, u64), &str>) {
        let types = types(sample().finish()).unwrap();
        match (types.member(name, path), want) {
            (
                Ok(Member {
                    offset,
                    size,
                    bits: None,
                }),
                Ok(want),
            ) => assert_eq!((offset, size), want, "{name}.{path}"),
            (Err(got), Err(want)) => assert!(got.to_string().contains(want), "{got}"),
            (got, want) => panic!("{name}.{path}: {got:?} instead of {want:?}"),
        }
    }

    #[test]
    fn members_are_found_wherever_they_are() {
        check("outer", "x.b", Ok((12, 8)));
        check("outer", "deep", Ok((40, 8)));
        check("outer", "inner.a", Ok((32, 4)));
        check("outer", "slots", Ok((48, 64)));
        check("outer", "slots[3].b", Ok((104, 8)));
        check("inner_t", "b", Ok((8, 8)));
        check("twice", "same", Ok((0, 4)));
    }

    #[test]
    fn what_is_absent_or_ambiguous_is_an_error() {
        check(
            "outer",
            "y",
            Err("type outer of the kernel has no member y"),
        );
        check("outer", "slots[4].b", Err("no member slots[4].b"));
        check("outer", "x[0]", Err("no member"));
        check("outer", "x.b.c", Err("no member"));
        check("nothing", "x", Err("the kernel has no type nothing"));
        check("twice", "other", Err("2 different types called twice"));
        check("snake", "x", Err("no member"));
        check("ouroboros", "x", Err("no member"));
        check("sink", "all", Err("no member"));
    }

    #[test]
    fn bit_fields_sizes_and_enumerators_are_known() {
        let types = types(sample().finish()).unwrap();
        let flag = Member {
            offset: 116,
            size: 1,
            bits: Some((5, 3)),
        };
        assert_eq!(types.member("outer", "p.flag"), Ok(flag));
        assert_eq!(types.size_of("outer"), Ok(128));
        assert_eq!(types.size_of("inner_t"), Ok(16));
        assert_eq!(types.enumerator("colour", "GREEN"), Ok(7));
        assert!(matches!(
            types.enumerator("colour", "BLUE"),
            Err(TypeError::NoEnumerator { .. })
        ));
        assert!(types.enumerator("outer", "RED").is_err());
        assert_eq!(types.members("inner").unwrap().len(), 2);
    }

    #[test]
    fn truncated_sections_are_errors() {
        let whole = sample().finish();
        assert!((0..whole.len()).all(|len| types(whole[..len].to_vec()).is_err()));
    }

    proptest! {
        #[test]
        fn damage_never_panics(form in 0..3_usize, changes in proptest::collection::vec((any::<usize>(), any::<u8>()), 1..12)) {
            for mut bytes in [btf(FORMS[form]), sample().finish()] {
                let len = bytes.len();
                for (at, value) in &changes {
                    bytes[at % len] = *value;
                }
                if let Ok(types) = types(bytes) {
                    for name in ["outer", "snake", "sink", "task_struct", "cpu_entry_area"] {
                        let _ = types.member(name, "slots[3].b");
                        let _ = types.member(name, "thread.sp");
                        let _ = types.members(name);
                        let _ = types.size_of(name);
                        let _ = types.enumerators(name);
                    }
                }
            }
        }
    }
}
