//! A type of the kernel, or of a module, as C with the place of every member; or where one of its members lies.
//!
//! The kernel's own are in its image. Those of a module are in the guest alone.

use patcher::kernel::image::Image;
use patcher::kernel::modules;
use patcher::kernel::types::print::TypeLayout;
use patcher::kernel::types::{self as own};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::table::{line, or_dash};
use super::{Shown, Subject, ViewError};
use crate::output::clean;

/// `struct task_struct` names one type in two words.
const KINDS: [&str; 3] = ["struct", "union", "enum"];

/// Which type, and which of its members.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Asked {
    /// The type: a name, or one with its kind: `struct task_struct`.
    pub name: String,
    /// The member: through members (`thread.sp`) and array elements (`slots[3]`).
    pub member: Option<String>,
    /// The module whose type it may be; one that it does not have is the kernel's.
    pub module: Option<String>,
}

impl Asked {
    /// What one or two words ask for: a kind belongs to the name behind it.
    #[must_use]
    pub fn parse(name: &str, member: Option<&str>, module: Option<&str>) -> Self {
        let (name, member) = match member {
            Some(bare) if KINDS.contains(&name) => (format!("{name} {bare}"), None),
            _ => (name.to_owned(), member.map(str::to_owned)),
        };
        let module = module.map(str::to_owned);
        Self {
            name,
            member,
            module,
        }
    }
}

/// A member, or all types of a name.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(untagged)]
pub enum Types {
    /// One member, if one was asked for.
    Member(TypeMember),
    /// The types.
    Layouts(TypeLayouts),
}

/// All types of one name.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct TypeLayouts {
    /// The name.
    pub name: String,
    /// Each of them.
    pub layouts: Vec<Layout>,
}

/// One type.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Layout {
    /// Bytes, unless it is a function.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub size: Option<u64>,
    /// Its declaration.
    pub lines: Vec<LayoutLine>,
    /// The declaration with the place of every member, as people read it.
    pub text: String,
}

/// One line of a declaration.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct LayoutLine {
    /// How many braces it stands in.
    pub depth: usize,
    /// The line, as C.
    pub text: String,
    /// Bytes from the outermost type's start, if the line declares a member.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub offset: Option<u64>,
    /// Bytes of the member.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub size: Option<u64>,
    /// A bit field's first bit in the byte at `offset`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub first_bit: Option<u8>,
    /// How many bits a bit field has.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bits: Option<u8>,
}

/// One member.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct TypeMember {
    /// The type.
    pub name: String,
    /// The path to the member.
    pub member: String,
    /// Bytes from the type's start.
    pub offset: u64,
    /// Bytes; of a bit field, those that it touches.
    pub size: u64,
    /// A bit field's first bit in the byte at `offset`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub first_bit: Option<u8>,
    /// How many bits a bit field has.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bits: Option<u8>,
}

/// Finds what was asked for, among the types of a module that the guest has loaded if one was named.
pub(super) fn read(subject: &Subject<'_>, asked: &Asked) -> Result<Types, ViewError> {
    let Some(name) = &asked.module else {
        return of_image(subject.kernel.image(), asked);
    };
    let Subject { kernel, guest, .. } = subject;
    let loaded = modules::read(kernel, *guest)?;
    let missing = || ViewError::NoModule { name: name.clone() };
    let module = loaded.iter().find(|module| &module.name == name);
    let types = module.ok_or_else(missing)?.types(kernel, *guest)?;
    let none = || ViewError::NoModuleTypes { name: name.clone() };
    among(&types.ok_or_else(none)?, asked)
}

/// Finds what was asked for, among the kernel's own types.
pub(super) fn of_image(image: &Image, asked: &Asked) -> Result<Types, ViewError> {
    among(image.types(), asked)
}

fn among(types: &own::Types, asked: &Asked) -> Result<Types, ViewError> {
    match &asked.member {
        None => layouts(types, &asked.name).map(Types::Layouts),
        Some(path) => member(types, &asked.name, path).map(Types::Member),
    }
}

fn layouts(types: &own::Types, name: &str) -> Result<TypeLayouts, ViewError> {
    let found = types.layouts(name)?;
    Ok(TypeLayouts {
        name: name.to_owned(),
        layouts: found.into_iter().map(layout).collect(),
    })
}

fn layout(of: TypeLayout) -> Layout {
    let text = of.to_string();
    let lines = of.lines.into_iter().map(|line| {
        let bits = line.place.and_then(|place| place.bits);
        LayoutLine {
            depth: line.depth,
            text: line.text,
            offset: line.place.map(|place| place.offset),
            size: line.place.map(|place| place.size),
            first_bit: bits.map(|(first, _)| first),
            bits: bits.map(|(_, count)| count),
        }
    });
    Layout {
        size: of.size,
        lines: lines.collect(),
        text,
    }
}

/// Where member `path` of type `name` lies. The kind of type may be written before its name.
fn member(types: &own::Types, name: &str, path: &str) -> Result<TypeMember, ViewError> {
    let bare = match name.split_once(' ') {
        Some((kind, bare)) if KINDS.contains(&kind) => bare.trim(),
        _ => name,
    };
    let found = types.member(bare, path)?;
    Ok(TypeMember {
        name: name.to_owned(),
        member: path.to_owned(),
        offset: found.offset,
        size: found.size,
        first_bit: found.bits.map(|(first, _)| first),
        bits: found.bits.map(|(_, count)| count),
    })
}

impl Shown for Types {
    fn table(&self) -> String {
        match self {
            Self::Layouts(found) => {
                let lines = found.layouts.iter().flat_map(|layout| layout.text.lines());
                lines.map(|line| clean(line) + "\n").collect()
            }
            Self::Member(found) => member_table(found),
        }
    }
}

fn member_table(found: &TypeMember) -> String {
    let mut text = String::new();
    line(&mut text, "type", &found.name);
    line(&mut text, "member", &found.member);
    let offset = found.offset;
    line(&mut text, "offset", format_args!("{offset} ({offset:#x})"));
    line(&mut text, "size", found.size);
    if found.bits.is_some() {
        line(&mut text, "first bit", or_dash(found.first_bit));
        line(&mut text, "bits", or_dash(found.bits));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::Asked;

    #[test]
    fn a_kind_belongs_to_the_name() {
        let check = |name: &str, member: Option<&str>, want: (&str, Option<&str>)| {
            let asked = Asked::parse(name, member, None);
            assert_eq!((asked.name.as_str(), asked.member.as_deref()), want);
        };
        check("struct", Some("file"), ("struct file", None));
        check("file", Some("f_op"), ("file", Some("f_op")));
        check("struct", None, ("struct", None));
        check("struct file", Some("f_op"), ("struct file", Some("f_op")));
    }
}
