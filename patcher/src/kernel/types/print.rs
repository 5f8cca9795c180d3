//! Types as C, with the place of every member: `struct task_struct` as the kernel was built with it.
//!
//! Only the types that are shown are decoded. What a damaged section would make endless is cut off with an error.

use std::fmt;

use super::{MAX_DEPTH, TypeError, Types};
use crate::kernel::btf::{Kind, RawType, code};

/// More lines than all types of one name have, those of their anonymous members counted.
const MAX_LINES: usize = 1 << 14;
/// More characters than they have.
const MAX_TEXT: usize = 1 << 21;
/// Characters that a parameter counts for, beside its own.
const PARAMETER: usize = 16;
/// Column behind which the places stand.
const COLUMN: usize = 56;

/// Where what a line declares lies in the outermost type.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LinePlace {
    /// Bytes from its start; for a bit field, of the byte that its first bit is in.
    pub offset: u64,
    /// Bytes; for a bit field, of the type that it is declared with.
    pub size: u64,
    /// For a bit field: its first bit within the byte at `offset`, and how many bits it has.
    pub bits: Option<(u8, u8)>,
}

/// One line of a type.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Line {
    /// How deep it is nested.
    pub depth: usize,
    /// Its C.
    pub text: String,
    /// Where it lies, if it declares a member.
    pub place: Option<LinePlace>,
}

/// A type, written as C. Its text form has the places as comments: offset and bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TypeLayout {
    /// Its lines.
    pub lines: Vec<Line>,
    /// Its bytes, unless it is a function.
    pub size: Option<u64>,
}

impl fmt::Display for TypeLayout {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for line in &self.lines {
            let text = format!("{:indent$}{}", "", line.text, indent = line.depth * 4);
            match line.place {
                None => writeln!(f, "{text}")?,
                Some(LinePlace {
                    offset,
                    size,
                    bits: None,
                }) => {
                    writeln!(f, "{text:COLUMN$} /* {offset:5}     {size:5} */")?;
                }
                Some(LinePlace {
                    offset,
                    size,
                    bits: Some((bit, _)),
                }) => {
                    writeln!(f, "{text:COLUMN$} /* {offset:5}:{bit:<2}  {size:5} */")?;
                }
            }
        }
        match self.size {
            Some(size) => writeln!(f, "/* {size} bytes */"),
            None => Ok(()),
        }
    }
}

impl Types {
    /// Every type called `name`, as C. `name` may begin with `struct`, `union` or `enum`; without, typedefs and
    /// functions count too. Types that look the same are given once: several are different types of one name.
    ///
    /// # Errors
    /// [`TypeError::NoType`], or [`TypeError::TooLarge`] for what no kernel has.
    pub fn layouts(&self, name: &str) -> Result<Vec<TypeLayout>, TypeError> {
        let (wanted, bare) = match name.trim().split_once(' ') {
            Some(("struct", bare)) => (Some(Kind::Struct), bare.trim()),
            Some(("union", bare)) => (Some(Kind::Union), bare.trim()),
            Some(("enum", bare)) => (Some(Kind::Enum), bare.trim()),
            _ => (None, name.trim()),
        };
        let fits = |raw: &RawType| match wanted {
            None => true,
            Some(Kind::Enum) => matches!(raw.kind, Kind::Enum | Kind::Enum64),
            Some(kind) => raw.kind == kind,
        };
        let mut found: Vec<(u32, RawType)> = self
            .named(&self.by_name, bare)
            .filter(|(_, raw)| fits(raw))
            .collect();
        if found.is_empty() && wanted.is_none() {
            found.extend(self.named(self.functions(), bare));
        }
        let mut layouts: Vec<TypeLayout> = Vec::new();
        let mut room = Room {
            lines: MAX_LINES,
            text: MAX_TEXT,
        };
        for (id, raw) in found {
            let layout =
                self.layout_of(id, &raw, &mut room)
                    .ok_or_else(|| TypeError::TooLarge {
                        name: name.to_owned(),
                    })?;
            if !layouts.contains(&layout) {
                layouts.push(layout);
            }
        }
        match &self.base {
            _ if !layouts.is_empty() => Ok(layouts),
            Some(base) => base.layouts(name),
            None => Err(self.none(name)),
        }
    }

    fn layout_of(&self, id: u32, raw: &RawType, room: &mut Room) -> Option<TypeLayout> {
        let mut printer = Printer {
            types: self,
            lines: Vec::new(),
            room,
        };
        let name = self.text(raw.name);
        let size = match raw.kind {
            Kind::Typedef => {
                let mut declared = printer.declare(raw.size_or_type, name, 0)?;
                declared.base = declared.base.prefixed("typedef ");
                printer.declaration(&declared, Context::default(), None)?;
                self.size(id)
            }
            Kind::Other => {
                let declared = printer.declare(raw.size_or_type, name, 0)?;
                printer.declaration(&declared, Context::default(), None)?;
                None
            }
            _ => {
                let declared = Declared {
                    base: Base::Inline(id, String::new()),
                    declarator: String::new(),
                    through_pointer: false,
                };
                printer.declaration(&declared, Context::default(), None)?;
                self.size(id)
            }
        };
        Some(TypeLayout {
            lines: printer.lines,
            size,
        })
    }

    fn text(&self, name: u32) -> String {
        String::from_utf8_lossy(self.string(name)).into_owned()
    }
}

/// What a declaration begins with: a type's name, or the type itself, which has none.
enum Base {
    Named(String),
    /// With what stands before it.
    Inline(u32, String),
}

impl Base {
    fn prefixed(self, prefix: &str) -> Self {
        match self {
            Self::Named(name) => Self::Named(format!("{prefix}{name}")),
            Self::Inline(id, before) => Self::Inline(id, format!("{prefix}{before}")),
        }
    }
}

/// A declaration, apart.
struct Declared {
    base: Base,
    declarator: String,
    /// What the base is lies elsewhere.
    through_pointer: bool,
}

/// Where a declaration stands.
#[derive(Clone, Copy, Default)]
struct Context {
    depth: usize,
    /// The first bit of what it is in.
    bit: u64,
}

/// What may still be written: types refer to others more often than all of them could be shown.
struct Room {
    lines: usize,
    text: usize,
}

impl Room {
    fn take(&mut self, text: usize) -> Option<()> {
        self.text = self.text.checked_sub(text)?;
        Some(())
    }
}

struct Printer<'a> {
    types: &'a Types,
    lines: Vec<Line>,
    room: &'a mut Room,
}

impl Printer<'_> {
    fn line(&mut self, depth: usize, text: String, place: Option<LinePlace>) -> Option<()> {
        self.room.take(text.len())?;
        self.room.lines = self.room.lines.checked_sub(1)?;
        self.lines.push(Line { depth, text, place });
        Some(())
    }

    /// Takes the declaration of `inner` as a `id` apart, as C nests it: from the name outwards.
    fn declare(&mut self, mut id: u32, inner: String, depth: usize) -> Option<Declared> {
        let (mut declarator, mut qualifiers) = (inner, String::new());
        let mut through_pointer = false;
        for _ in 0..=MAX_DEPTH {
            self.room.take(declarator.len())?;
            let Some(raw) = self.types.raw(id) else {
                let base = Base::Named(format!("{qualifiers}void"));
                return (id == 0).then_some(Declared {
                    base,
                    declarator,
                    through_pointer,
                });
            };
            let grouped = |declarator: &str| match declarator.starts_with('*') {
                true => format!("({declarator})"),
                false => declarator.to_owned(),
            };
            match (raw.kind, raw.code) {
                (Kind::Ptr, _) => {
                    declarator = format!("*{qualifiers}{declarator}");
                    qualifiers.clear();
                    through_pointer = true;
                    id = raw.size_or_type;
                }
                (Kind::Array, _) => {
                    let (element, count) = self.types.raw_array(&raw)?;
                    declarator = format!("{}[{count}]", grouped(&declarator));
                    id = element;
                }
                (Kind::Other, code::FUNCTION) => id = raw.size_or_type,
                (Kind::Other, code::PROTOTYPE) => {
                    let parameters = self.parameters(&raw, depth)?;
                    declarator = format!("{}({parameters})", grouped(&declarator));
                    id = raw.size_or_type;
                }
                (Kind::Alias, kind) => {
                    qualifiers.push_str(match kind {
                        code::VOLATILE => "volatile ",
                        code::CONST => "const ",
                        code::RESTRICT => "restrict ",
                        _ => "",
                    });
                    id = raw.size_or_type;
                }
                _ => {
                    let base = self.base(id, &raw).prefixed(&qualifiers);
                    return Some(Declared {
                        base,
                        declarator,
                        through_pointer,
                    });
                }
            }
        }
        None
    }

    fn base(&self, id: u32, raw: &RawType) -> Base {
        let tag = match raw.kind {
            Kind::Struct => "struct ",
            Kind::Union => "union ",
            Kind::Enum | Kind::Enum64 => "enum ",
            Kind::Fwd if raw.flag => "union ",
            Kind::Fwd => "struct ",
            _ => "",
        };
        let name = self.types.text(raw.name);
        if name.is_empty() && !tag.is_empty() {
            Base::Inline(id, String::new())
        } else {
            Base::Named(format!("{tag}{name}"))
        }
    }

    fn parameters(&mut self, raw: &RawType, depth: usize) -> Option<String> {
        if depth > MAX_DEPTH {
            return None;
        }
        let mut list = Vec::new();
        for index in 0..raw.vlen {
            let (name, kind) = self.types.raw_parameter(raw, index)?;
            // Each is held until all are there, whatever becomes of them then.
            self.room.take(PARAMETER)?;
            if name == 0 && kind == 0 {
                list.push("...".to_owned());
                continue;
            }
            let declared = self.declare(kind, self.types.text(name), depth + 1)?;
            let base = match declared.base {
                Base::Named(base) => base,
                Base::Inline(id, before) => {
                    let raw = self.types.raw(id)?;
                    format!("{before}{} {{ ... }}", keyword(&raw))
                }
            };
            list.push(joined(&base, &declared.declarator));
        }
        let text = if list.is_empty() {
            "void".to_owned()
        } else {
            list.join(", ")
        };
        self.room.take(text.len())?;
        Some(text)
    }

    /// Writes a declaration: one line, or those of a type that stands in it.
    fn declaration(
        &mut self,
        declared: &Declared,
        at: Context,
        place: Option<LinePlace>,
    ) -> Option<()> {
        let bits = match place.and_then(|place| place.bits) {
            Some((_, bits)) => format!(":{bits}"),
            None => String::new(),
        };
        match &declared.base {
            Base::Named(base) => {
                let text = format!("{}{bits};", joined(base, &declared.declarator));
                self.line(at.depth, text, place)
            }
            Base::Inline(id, before) => {
                let raw = self.types.raw(*id)?;
                let name = self.types.text(raw.name);
                let head = joined(&format!("{before}{}", keyword(&raw)), &name);
                self.line(at.depth, format!("{head} {{"), None)?;
                let bit = if declared.through_pointer { 0 } else { at.bit };
                let inside = Context {
                    depth: at.depth + 1,
                    bit,
                };
                self.body(&raw, inside)?;
                let tail = joined("}", &declared.declarator);
                self.line(at.depth, format!("{tail}{bits};"), place)
            }
        }
    }

    fn body(&mut self, raw: &RawType, at: Context) -> Option<()> {
        if at.depth > MAX_DEPTH {
            return None;
        }
        for index in 0..raw.vlen {
            if matches!(raw.kind, Kind::Enum | Kind::Enum64) {
                let (name, value) = self.types.raw_enumerator(raw, index)?;
                let unsigned = raw.kind == Kind::Enum64 && !raw.flag && value < 0;
                let value = if unsigned {
                    value.cast_unsigned().to_string()
                } else {
                    value.to_string()
                };
                let text = format!("{} = {value},", self.types.text(name));
                self.line(at.depth, text, None)?;
                continue;
            }
            let member = self.types.raw_member(raw, index)?;
            let declared = self.declare(member.kind, self.types.text(member.name), 0)?;
            let bit = at.bit.checked_add(member.bit_offset.into())?;
            let field = member.bits != 0 || !bit.is_multiple_of(8);
            let bits =
                field.then_some((u8::try_from(bit % 8).ok()?, u8::try_from(member.bits).ok()?));
            let place = LinePlace {
                offset: bit / 8,
                // A flexible array, and what is only declared, have no bytes.
                size: self.types.size(member.kind).unwrap_or(0),
                bits,
            };
            self.declaration(&declared, Context { bit, ..at }, Some(place))?;
        }
        Some(())
    }
}

fn keyword(raw: &RawType) -> &'static str {
    match (raw.kind, raw.code) {
        (_, code::UNION) => "union",
        (_, code::STRUCT) => "struct",
        (Kind::Fwd, _) if raw.flag => "union",
        (Kind::Fwd, _) => "struct",
        _ => "enum",
    }
}

/// A base and what it declares, which may be nothing.
fn joined(base: &str, declarator: &str) -> String {
    if declarator.is_empty() {
        base.to_owned()
    } else {
        format!("{base} {declarator}")
    }
}

#[cfg(test)]
mod tests;
