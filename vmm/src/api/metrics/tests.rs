//! Whatever functions are called and whyever something is not known: the page is read line by line by the format's rules, and says what it was given.

use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;

use super::page;
use crate::api::double::Double;
use crate::api::machine::{Counted, Machine};
use crate::api::wire::{Arena, CallList, Calls};

/// The samples of a page by name and labels, and the types of its families.
#[derive(Debug, Default)]
struct Page {
    samples: BTreeMap<(String, Vec<(String, String)>), f64>,
    types: BTreeMap<String, String>,
    comments: Vec<String>,
}

/// Reads a page; a line that breaks a rule is the error.
fn read(text: &str) -> Result<Page, String> {
    let mut page = Page::default();
    let (mut family, mut helped) = (String::new(), BTreeSet::new());
    let body = text.strip_suffix('\n').ok_or("no line break at the end")?;
    for line in body.split('\n') {
        let wrong = |what: &str| format!("{what}: {line:?}");
        if let Some(help) = line.strip_prefix("# HELP ") {
            let (name, help) = help.split_once(' ').ok_or(wrong("no help"))?;
            let fresh = helped.insert(name.to_owned());
            (fresh && is_name(name) && !help.contains('\\'))
                .then_some(())
                .ok_or(wrong("help"))?;
        } else if let Some(kind) = line.strip_prefix("# TYPE ") {
            let (name, kind) = kind.split_once(' ').ok_or(wrong("no type"))?;
            family = name.to_owned();
            let known = ["counter", "gauge", "summary"].contains(&kind) && helped.contains(name);
            let old = page.types.insert(family.clone(), kind.to_owned());
            (known && old.is_none())
                .then_some(())
                .ok_or(wrong("type"))?;
        } else if let Some(comment) = line.strip_prefix("# ") {
            page.comments.push(comment.to_owned());
        } else {
            let (name, labels, value) = sample(line).ok_or(wrong("no sample"))?;
            let of_family = match page.types.get(&family).map(String::as_str) {
                Some("summary") => ["_sum", "_count"].map(|end| format!("{family}{end}")),
                _ => [family.clone(), family.clone()],
            };
            of_family
                .contains(&name)
                .then_some(())
                .ok_or(wrong("another family's"))?;
            let old = page.samples.insert((name, labels), value);
            old.is_none().then_some(()).ok_or(wrong("given twice"))?;
        }
    }
    Ok(page)
}

/// A sample with its name, labels and value.
type Parsed = (String, Vec<(String, String)>, f64);

fn sample(line: &str) -> Option<Parsed> {
    let end = line.find(['{', ' '])?;
    let (name, mut rest) = line.split_at(end);
    let mut labels = Vec::new();
    while let Some(label) = rest.strip_prefix(['{', ',']) {
        let (label, value) = label.split_once("=\"")?;
        let mut unescaped = String::new();
        let mut chars = value.char_indices();
        let end = loop {
            let char = chars.next()?;
            match char {
                (at, '"') => break at,
                (_, '\\') => unescaped.push(match chars.next()?.1 {
                    'n' => '\n',
                    same @ ('\\' | '"') => same,
                    _ => return None,
                }),
                (_, plain) => unescaped.push(plain),
            }
        };
        is_name(label).then_some(())?;
        labels.push((label.to_owned(), unescaped));
        rest = value.get(end + 1..)?;
    }
    if !labels.is_empty() {
        rest = rest.strip_prefix('}')?;
    }
    let value = rest.strip_prefix(' ')?.parse().ok()?;
    is_name(name).then(|| (name.to_owned(), labels, value))
}

fn is_name(name: &str) -> bool {
    let legal = |c: char| c.is_ascii_lowercase() || c == '_';
    !name.is_empty() && name.chars().all(legal)
}

fn counted(calls: Vec<Calls>) -> Counted {
    Counted {
        calls: CallList { at_ms: 1, calls },
        arena: Arena {
            guest_physical: "0x0".to_owned(),
            bytes: 4096,
            used_bytes: 64,
        },
    }
}

fn any_calls() -> impl Strategy<Value = Calls> {
    // Few names, so that some are the same; and all that may need to be escaped.
    let function = prop_oneof![Just("f".to_owned()), "[\\\\\"\n{},= a-c\r\u{e9}]{0,6}"];
    (function, proptest::option::of(0..3u64), 0..1u64 << 40).prop_map(
        |(function, update, calls)| Calls {
            function,
            update,
            calls,
        },
    )
}

proptest! {
    #[test]
    fn every_line_can_be_read_and_every_call_is_in_it(
        calls in proptest::collection::vec(any_calls(), 0..12),
        why in proptest::option::of("[a\n\r#\"]{0,9}"),
    ) {
        let vm = Double::default().vm();
        let counts = counted(calls.clone());
        let text = page(&vm, &[], why.as_deref().map_or(Ok(&counts), Err));
        let read = read(&text);
        prop_assert!(read.is_ok(), "{} in\n{text}", read.unwrap_err());
        let read = read.unwrap();
        prop_assert_eq!(read.comments.len(), usize::from(why.is_some()));
        let mut sums: BTreeMap<_, u64> = BTreeMap::new();
        for calls in calls.iter().filter(|_| why.is_none()) {
            let edition = calls.update.map_or("original".to_owned(), |id| id.to_string());
            *sums.entry((calls.function.clone(), edition)).or_default() += calls.calls;
        }
        let printed = read.samples.iter().filter(|((name, _), _)| name == "exopatch_calls_total");
        let printed: BTreeMap<_, f64> = printed
            .map(|((_, labels), value)| ((labels[0].1.clone(), labels[1].1.clone()), *value))
            .collect();
        let sums: BTreeMap<_, f64> =
            sums.into_iter().map(|(labels, sum)| (labels, sum.to_string().parse().unwrap())).collect();
        prop_assert_eq!(printed, sums);
    }
}

#[test]
fn lines_that_break_a_rule_are_told() {
    let good = "# HELP a b\n# TYPE a counter\n";
    assert!(read(&format!("{good}a{{l=\"\\\\\\\"\\n\"}} 1\n")).is_ok());
    for bad in [
        "a 1\n",
        "# HELP a b\n# TYPE a counter\na 1",
        "# TYPE a counter\na 1\n",
        "# HELP a b\n# TYPE a counter\nb 1\n",
        "# HELP a b\n# TYPE a counter\na 1\na 1\n",
        "# HELP a b\n# TYPE a counter\na{l=\"\"\"} 1\n",
        "# HELP a b\n# TYPE a counter\na{l=\"\\t\"} 1\n",
        "# HELP a b\n# TYPE a counter\na{l=\"\n\"} 1\n",
        "# HELP a b\n# TYPE a summary\na 1\n",
        "# HELP a b\n# TYPE a counter\na x\n",
    ] {
        assert!(read(bad).is_err(), "{bad:?}");
    }
}
