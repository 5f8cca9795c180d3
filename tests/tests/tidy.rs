//! Holds the tree to what CONTRIBUTING.md says about it: sizes, first lines, where unsafe code may stand, which way
//! dependencies run. Every rule is a function from one file to its breaches, so that a breach names file and line.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use syn::spanned::Spanned;
use syn::visit::Visit;

/// Lines of code, without tests, above which a file is more than one concept.
const FILE_LINES: usize = 600;
/// Lines from the first to the last of a function above which it does not fit a screen.
const FUNCTION_LINES: usize = 100;
/// Lines above which ARCHITECTURE.md is no longer a map.
const ARCHITECTURE_LINES: usize = 300;

struct Source {
    /// Path relative to the repository.
    path: String,
    text: String,
}

fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .expect("the tests crate lies in the repository")
        .to_owned()
}

/// All text files that git tracks.
fn tracked() -> Vec<Source> {
    let listed = Command::new("git")
        .args(["ls-files", "-z"])
        .current_dir(repository())
        .output()
        .expect("git lists the tree");
    assert!(listed.status.success(), "git ls-files failed: {listed:?}");
    let sources: Vec<Source> = String::from_utf8(listed.stdout)
        .expect("paths are UTF-8")
        .split_terminator('\0')
        .filter_map(|path| {
            let text = fs::read_to_string(repository().join(path)).ok()?;
            Some(Source {
                path: path.to_owned(),
                text,
            })
        })
        .collect();
    assert!(
        sources.len() > 10,
        "only {} files are tracked",
        sources.len()
    );
    sources
}

fn check(what: &str, rule: impl Fn(&Source) -> Vec<String>) {
    let breaches: Vec<String> = tracked()
        .iter()
        .flat_map(|source| {
            rule(source)
                .into_iter()
                .map(|breach| format!("{}{breach}", source.path))
        })
        .collect();
    assert!(breaches.is_empty(), "{what}:\n{}", breaches.join("\n"));
}

fn is_rust(source: &Source) -> bool {
    Path::new(&source.path)
        .extension()
        .is_some_and(|extension| extension == "rs")
}

fn is_product(source: &Source) -> bool {
    is_rust(source)
        && ["patcher/src/", "vmm/src/"]
            .iter()
            .any(|dir| source.path.starts_with(dir))
}

fn is_test_module(item: &syn::Item) -> bool {
    let syn::Item::Mod(module) = item else {
        return false;
    };
    module.attrs.iter().any(|attribute| {
        attribute.path().is_ident("cfg")
            && attribute
                .parse_args::<syn::Ident>()
                .is_ok_and(|condition| condition == "test")
    })
}

/// Lines that hold code: neither empty nor only comment, tests left out.
fn code_lines(source: &Source) -> usize {
    let file = syn::parse_file(&source.text).expect("rustc accepts the file");
    let tests: Vec<_> = file
        .items
        .iter()
        .filter(|item| is_test_module(item))
        .map(|item| item.span().start().line..=item.span().end().line)
        .collect();
    source
        .text
        .lines()
        .enumerate()
        .filter(|(index, _)| !tests.iter().any(|range| range.contains(&(index + 1))))
        .map(|(_, line)| line.trim())
        .filter(|line| !line.is_empty() && !line.starts_with("//"))
        .count()
}

/// Every function of a file with its first line and its number of lines.
#[derive(Default)]
struct Functions(Vec<(String, usize, usize)>);

impl Functions {
    fn add(&mut self, name: &syn::Ident, span: proc_macro2::Span) {
        let (first, last) = (span.start().line, span.end().line);
        self.0.push((name.to_string(), first, last - first + 1));
    }
}

impl<'ast> Visit<'ast> for Functions {
    fn visit_item_fn(&mut self, function: &'ast syn::ItemFn) {
        self.add(&function.sig.ident, function.block.span());
        syn::visit::visit_item_fn(self, function);
    }

    fn visit_impl_item_fn(&mut self, function: &'ast syn::ImplItemFn) {
        self.add(&function.sig.ident, function.block.span());
        syn::visit::visit_impl_item_fn(self, function);
    }
}

#[test]
fn a_file_is_one_concept() {
    check("files too long", |source| {
        if !is_rust(source) {
            return Vec::new();
        }
        let lines = code_lines(source);
        (lines > FILE_LINES)
            .then(|| format!(": {lines} lines of code"))
            .into_iter()
            .collect()
    });
}

#[test]
fn a_function_fits_a_screen() {
    check("functions too long", |source| {
        if !is_rust(source) {
            return Vec::new();
        }
        let mut functions = Functions::default();
        functions.visit_file(&syn::parse_file(&source.text).expect("rustc accepts the file"));
        functions
            .0
            .into_iter()
            .filter(|(_, _, lines)| *lines > FUNCTION_LINES)
            .map(|(name, first, lines)| format!(":{first}: {name} has {lines} lines"))
            .collect()
    });
}

#[test]
fn a_module_says_what_it_is() {
    check("files without a first line of documentation", |source| {
        let silent = is_rust(source) && !source.text.starts_with("//!");
        silent.then(|| ":1".to_owned()).into_iter().collect()
    });
}

#[test]
fn unsafe_code_stands_in_the_vmm_alone() {
    let root = fs::read_to_string(repository().join("patcher/src/lib.rs"))
        .expect("the patcher has a root");
    assert!(
        root.contains("#![forbid(unsafe_code)]"),
        "the patcher must forbid unsafe code"
    );
    check("unsafe code outside the vmm", |source| {
        if !is_rust(source)
            || source.path.starts_with("vmm/src/")
            || source.path == "tests/tests/tidy.rs"
        {
            return Vec::new();
        }
        lines_with(source, |line| {
            line.contains("unsafe {") || line.contains("allow(unsafe_code")
        })
    });
}

#[test]
fn the_patcher_knows_no_machine_and_no_wire() {
    let manifest = fs::read_to_string(repository().join("patcher/Cargo.toml"))
        .expect("the patcher has a manifest");
    for stranger in ["kvm", "vm-memory", "serde", "axum", "hyper", "tokio", "vmm"] {
        let named = manifest.lines().any(|line| line.starts_with(stranger));
        assert!(!named, "patcher/Cargo.toml depends on {stranger}");
    }
    check("processes started outside edition/build.rs", |source| {
        if !is_product(source)
            || !source.path.starts_with("patcher/")
            || source.path == "patcher/src/edition/build.rs"
        {
            return Vec::new();
        }
        lines_with(source, |line| {
            line.contains("process::Command") || line.contains("Command::new")
        })
    });
}

#[test]
fn nothing_is_left_for_later() {
    check("stubs and notes to self", |source| {
        let judged = is_rust(source)
            || source.path.starts_with("scripts/")
            || source.path.starts_with("guest-images/");
        if !judged || source.path == "tests/tests/tidy.rs" {
            return Vec::new();
        }
        lines_with(source, |line| {
            [
                "TODO",
                "FIXME",
                "XXX:",
                "todo!(",
                "unimplemented!(",
                "#[ignore",
            ]
            .iter()
            .any(|mark| line.contains(mark))
        })
    });
}

#[test]
fn text_is_clean() {
    check("trailing white space or tabs in Rust", |source| {
        if source.path.ends_with(".snap")
            || source.path.ends_with(".svg")
            || source.path.starts_with("LICENSE")
        {
            return Vec::new();
        }
        lines_with(source, |line| {
            line.ends_with([' ', '\t']) || (is_rust(source) && line.starts_with('\t'))
        })
    });
}

#[test]
fn the_map_stays_a_map() {
    let map = fs::read_to_string(repository().join("ARCHITECTURE.md")).expect("there is a map");
    let lines = map.lines().count();
    assert!(
        lines <= ARCHITECTURE_LINES,
        "ARCHITECTURE.md has {lines} lines"
    );
    for source in tracked().iter().filter(|source| is_product(source)) {
        let room = source
            .path
            .rsplit('/')
            .next()
            .expect("a path has a last part");
        let folder = source
            .path
            .rsplit('/')
            .nth(1)
            .expect("a source lies in a folder");
        let stem = room.trim_end_matches(".rs");
        if stem.ends_with("tests") || stem == "lib" {
            continue;
        }
        let named = map.contains(stem) || (stem == "mod" && map.contains(folder));
        assert!(named, "ARCHITECTURE.md does not name {}", source.path);
    }
}

#[test]
fn every_crate_follows_the_workspace() {
    for name in ["patcher", "vmm", "tests"] {
        let manifest = fs::read_to_string(repository().join(name).join("Cargo.toml"))
            .expect("a crate has a manifest");
        assert!(
            manifest.contains("[lints]\nworkspace = true"),
            "{name} does not take the workspace's lints"
        );
        assert!(
            manifest.contains("rust-version.workspace"),
            "{name} does not take the workspace's rust-version"
        );
    }
}

fn lines_with(source: &Source, breach: impl Fn(&str) -> bool) -> Vec<String> {
    let numbered = source.text.lines().enumerate();
    numbered
        .filter(|(_, line)| breach(line))
        .map(|(index, line)| format!(":{}: {}", index + 1, line.trim()))
        .collect()
}
