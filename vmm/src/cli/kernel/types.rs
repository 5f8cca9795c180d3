//! `exopatch kernel types`: a type of the kernel as C, or where one of its members lies.

use patcher::kernel::image::Image;
use patcher::kernel::types::print::TypeLayout;
use serde::Serialize;

use super::Shown;
use super::failure::Failure;
use super::table::{line, or_dash};
use crate::client::clean;

/// `types struct task_struct` names one type in two words.
const KINDS: [&str; 3] = ["struct", "union", "enum"];

/// Which type was asked for, and which of its members.
pub(super) fn asked<'a>(name: &str, member: Option<&'a str>) -> (String, Option<&'a str>) {
    match member {
        Some(bare) if KINDS.contains(&name) => (format!("{name} {bare}"), None),
        _ => (name.to_owned(), member),
    }
}

/// All types of one name.
#[derive(Debug, Serialize)]
pub(super) struct Layouts {
    name: String,
    layouts: Vec<Layout>,
    /// As the patcher writes it.
    #[serde(skip)]
    text: String,
}

#[derive(Debug, Serialize)]
struct Layout {
    /// Bytes, unless it is a function.
    size: Option<u64>,
    lines: Vec<Line>,
}

#[derive(Debug, Serialize)]
struct Line {
    depth: usize,
    text: String,
    /// Bytes from the outermost type's start, if the line declares a member.
    offset: Option<u64>,
    size: Option<u64>,
    /// A bit field's first bit in the byte at `offset`.
    first_bit: Option<u8>,
    bits: Option<u8>,
}

/// Every type called `name`.
pub(super) fn layouts(image: &Image, name: &str) -> Result<Layouts, Failure> {
    let found = image.types().layouts(name)?;
    Ok(Layouts {
        name: name.to_owned(),
        text: found.iter().map(TypeLayout::to_string).collect(),
        layouts: found.into_iter().map(layout).collect(),
    })
}

fn layout(of: TypeLayout) -> Layout {
    let lines = of.lines.into_iter().map(|line| {
        let bits = line.place.and_then(|place| place.bits);
        Line {
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
    }
}

impl Shown for Layouts {
    fn table(&self) -> String {
        self.text.lines().map(|line| clean(line) + "\n").collect()
    }
}

/// One member.
#[derive(Debug, Serialize)]
pub(super) struct Member {
    name: String,
    member: String,
    offset: u64,
    /// Bytes; of a bit field, those that it touches.
    size: u64,
    first_bit: Option<u8>,
    bits: Option<u8>,
}

/// Where member `path` of type `name` lies. The kind of type may be written before its name.
pub(super) fn member(image: &Image, name: &str, path: &str) -> Result<Member, Failure> {
    let bare = match name.split_once(' ') {
        Some((kind, bare)) if KINDS.contains(&kind) => bare.trim(),
        _ => name,
    };
    let found = image.types().member(bare, path)?;
    Ok(Member {
        name: name.to_owned(),
        member: path.to_owned(),
        offset: found.offset,
        size: found.size,
        first_bit: found.bits.map(|(first, _)| first),
        bits: found.bits.map(|(_, count)| count),
    })
}

impl Shown for Member {
    fn table(&self) -> String {
        let mut text = String::new();
        line(&mut text, "type", &self.name);
        line(&mut text, "member", &self.member);
        line(
            &mut text,
            "offset",
            format_args!("{0} ({0:#x})", self.offset),
        );
        line(&mut text, "size", self.size);
        if self.bits.is_some() {
            line(&mut text, "first bit", or_dash(self.first_bit));
            line(&mut text, "bits", or_dash(self.bits));
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::asked;

    #[test]
    fn a_kind_belongs_to_the_name() {
        assert_eq!(
            asked("struct", Some("file")),
            ("struct file".to_owned(), None)
        );
        assert_eq!(
            asked("file", Some("f_op")),
            ("file".to_owned(), Some("f_op"))
        );
        assert_eq!(asked("struct", None), ("struct".to_owned(), None));
        assert_eq!(
            asked("struct file", Some("f_op")),
            ("struct file".to_owned(), Some("f_op"))
        );
    }
}
