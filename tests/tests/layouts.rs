//! Are the symbols of stock kernels of many series found, in whatever order their tables are? Judged by what else the same file says: its
//! section headers, its table of traced functions, its types. None of them is booted.
#![expect(clippy::print_stdout, reason = "a test prints the figures that it saw")]

use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use patcher::addr::LinkAddr;
use patcher::kernel::image::{Image, Section};
use patcher::kernel::orc::OrcError;
use patcher::kernel::payload::Payload;
use patcher::kernel::sites::SiteKind;
use patcher::kernel::symbols::Space;
use tests::stock::{self, layouts};

/// Sections that two symbols bound, where a kernel has them.
const BOUNDED: [(&str, &str, &str); 6] = [
    (".BTF", "__start_BTF", "__stop_BTF"),
    (".notes", "__start_notes", "__stop_notes"),
    (
        ".orc_unwind_ip",
        "__start_orc_unwind_ip",
        "__stop_orc_unwind_ip",
    ),
    (".orc_unwind", "__start_orc_unwind", "__stop_orc_unwind"),
    ("__ex_table", "__start___ex_table", "__stop___ex_table"),
    ("__bug_table", "__start___bug_table", "__stop___bug_table"),
];

fn load(vmlinuz: &Path) -> Image {
    let file = std::fs::read(vmlinuz).expect("the kernel can be read");
    let vmlinux = Payload::unpack(&file).expect("it unpacks");
    Image::parse(Arc::new(vmlinux)).expect("it is a kernel")
}

fn section<'a>(image: &'a Image, name: &str) -> Option<&'a Section> {
    image.sections().iter().find(|section| section.name == name)
}

/// The symbols of the file's own sections are where their headers say.
fn sections(image: &Image) -> usize {
    let at = |name: &str| image.symbols().lookup(name).expect(name).address;
    let text = section(image, ".text").expect("code").range.clone();
    assert_eq!(at("_text"), text.start);
    // Some kernels have the code that they start with between that and the constants.
    let constants = section(image, ".rodata").expect("constants").range.start;
    assert!(text.start < at("_etext") && at("_etext") <= constants);
    let mut bounded = 0;
    for (name, start, end) in BOUNDED {
        if let Some(section) = section(image, name) {
            assert_eq!(at(start)..at(end), section.range, "{name}");
            bounded += 1;
        }
    }
    bounded
}

/// Each symbol is found by its address and, if no other has its name, by that; none is of an unknown kind.
fn lookups(image: &Image) {
    let symbols = image.symbols();
    let mut previous = LinkAddr(0);
    for (index, symbol) in symbols.iter().enumerate() {
        assert!(previous <= symbol.address, "{symbol:?}");
        previous = symbol.address;
        let name = symbol.name.bytes();
        assert!(name.len() > 0 && name.into_iter().all(|byte| byte.is_ascii_graphic()));
        assert!(b"AaBbDdRrTtVvWw".contains(&symbol.kind), "{symbol:?}");
        // A name is found in some microseconds, but there are many.
        if index % 7 == 0 {
            let mut alike = symbols.namesakes(&symbol.name).into_iter();
            assert!(alike.any(|found| found.symbol == symbol), "{symbol:?}");
        }
        if symbol.size > 0 {
            let inside = LinkAddr(symbol.address.0 + symbol.size / 2);
            let (found, offset) = symbols.containing(inside).expect("a symbol");
            assert_eq!((found.address, offset), (symbol.address, symbol.size / 2));
        }
    }
}

/// Where traced functions call the tracer, a symbol begins, or did four bytes before; but for functions that another replaced when the
/// kernel was linked, whose code is still there, and without a name (558 of Debian's 6.1).
fn traced(image: &Image) -> usize {
    let shipped = image.shipped().expect("its tables are understood");
    let text = section(image, ".text").expect("code").range.clone();
    let sites = shipped.sites().first(SiteKind::Fentry, &text, usize::MAX);
    let named = sites.iter().filter(|site| {
        let found = image.symbols().containing(site.range.start);
        found.is_some_and(|(_, offset)| [0, 4].contains(&offset))
    });
    let named = named.count();
    assert!(
        named * 100 >= sites.len() * 97,
        "{named} of {}",
        sites.len()
    );
    named
}

/// What each CPU has of its own is told from what the image has, wherever it is linked.
fn percpu(image: &Image) -> &'static str {
    let symbols = image.symbols();
    let space = |name: &str| symbols.space(&symbols.lookup(name).expect(name));
    assert_eq!(space("runqueues"), Space::PerCpu);
    assert_eq!(space("init_task"), Space::Image);
    assert_eq!(space("schedule"), Space::Image);
    let section = section(image, ".data..percpu").expect("per-CPU data");
    let runqueues = symbols.lookup("runqueues").expect("it is there");
    assert!(section.range.contains(&runqueues.address));
    if section.range.start == LinkAddr(0) {
        "from zero on"
    } else {
        "in the image"
    }
}

#[test]
fn stock_kernels_of_every_series_are_understood() {
    let own = stock::ALL.map(|kernel| (kernel.0.to_owned(), Some(kernel.file("vmlinuz"))));
    for (name, vmlinuz) in own.into_iter().chain(layouts()) {
        let Some(vmlinuz) = vmlinuz else {
            println!("{name}: skipped, as the archive no longer has it");
            continue;
        };
        let start = Instant::now();
        let image = load(&vmlinuz);
        let elapsed = start.elapsed();
        lookups(&image);
        let (bounded, percpu) = (sections(&image), percpu(&image));
        assert!(image.types().member("task_struct", "thread.sp").is_ok());
        // Linux 7.1 gave the registers in its entries other numbers: that is seen, and none of them is believed.
        let unwind = match image.orc() {
            Ok(table) => format!("{} unwind entries", table.len()),
            Err(refused @ OrcError::Meaning { .. }) => refused.to_string(),
            Err(error) => panic!("{error}"),
        };
        println!(
            "{name}: {} symbols, {bounded} sections, {} traced functions, {} types, {unwind}, per-CPU {percpu}; {elapsed:?}",
            image.symbols().len(),
            traced(&image),
            image.types().len(),
        );
    }
}
