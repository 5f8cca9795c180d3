//! What is damaged, and who looks at it then.

mod orc;
mod types;
mod wrong;

use std::cell::RefCell;
use std::fs;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use patcher::addr::{Gpa, Gva, LinkAddr};
use patcher::edition::object::Package;
use patcher::guest::dump::Dump;
use patcher::guest::{GuestError, ReadPhys, Registers as _};
use patcher::kernel::image::Image;
use patcher::kernel::locate::Kernel;
use patcher::kernel::names::Names;
use patcher::kernel::payload::Payload;
use patcher::kernel::stack::stack_words;
use patcher::kernel::unwind::stacks;
use patcher::kernel::{changed, log};

use crate::Options;
use crate::damage::{Random, damage, mend};

/// Does one case.
pub(crate) type Subject = Box<dyn FnMut(u64)>;

/// One kind of thing that comes from outside.
pub(crate) struct Target {
    name: &'static str,
    /// Makes the undamaged thing ready.
    pub(crate) make: fn(&Options) -> Result<Subject, String>,
}

const TARGETS: [Target; 9] = [
    Target {
        name: "bzimage",
        make: bzimage,
    },
    Target {
        name: "vmlinux",
        make: vmlinux,
    },
    Target {
        name: "btf",
        make: types::btf,
    },
    Target {
        name: "made-up",
        make: types::made_up,
    },
    Target {
        name: "orc",
        make: orc::orc,
    },
    Target {
        name: "dump",
        make: dump,
    },
    Target {
        name: "memory",
        make: memory,
    },
    Target {
        name: "text",
        make: text,
    },
    Target {
        name: "package",
        make: package,
    },
];

pub(crate) fn find(name: &str) -> Option<&'static Target> {
    let all = TARGETS.iter().chain(&wrong::WRONGS);
    all.into_iter().find(|target| target.name == name)
}

/// Those that are tried when none is named.
pub(crate) fn names() -> impl Iterator<Item = &'static str> {
    TARGETS.iter().map(|target| target.name)
}

fn read(path: &Path) -> Result<Vec<u8>, String> {
    fs::read(path).map_err(|error| format!("cannot read {}: {error}", path.display()))
}

/// The kernel in the bzImage.
fn unpacked(options: &Options) -> Result<Vec<u8>, String> {
    let file = read(&options.kernel)?;
    Payload::unpack(&file).map_err(|error| error.to_string())
}

/// The file that is booted: its header, which says where the packed kernel is, more often than that.
fn bzimage(options: &Options) -> Result<Subject, String> {
    const HEADER: Range<usize> = 0x1f0..0x290;
    let mut file = read(&options.kernel)?;
    let room = Payload::find(&file)
        .map_err(|error| error.to_string())?
        .size();
    let mut target = vec![0; room];
    Ok(Box::new(move |case| {
        let mut random = Random::new(case);
        let range = if random.below(2) == 0 {
            HEADER
        } else {
            0..file.len()
        };
        let undo = damage(&mut file, range, &mut random);
        let end = file.len() - random.below(2) * random.below(file.len());
        if let Ok(payload) = Payload::find(&file[..end]) {
            let room = payload.size().min(target.len());
            drop(payload.decompress_into(&mut target[..room]));
        }
        mend(&mut file, undo);
    }))
}

/// The unpacked kernel: the headers of the file and the tables that are read, more often than its code.
fn vmlinux(options: &Options) -> Result<Subject, String> {
    let dump = Dump::parse(Arc::new(read(&options.dump)?)).map_err(|error| error.to_string())?;
    let mut file = Arc::new(unpacked(options)?);
    let image = Image::parse(file.clone()).map_err(|error| error.to_string())?;
    let tables = image
        .sections()
        .iter()
        .filter(|section| !section.executable);
    let mut places: Vec<Range<usize>> = tables
        .map(|section| section.file.clone())
        .filter(|range| !range.is_empty())
        .collect();
    drop(image);
    // The headers; and the tables of symbols within read-only data are found by how they look.
    places.extend([0..4096, file.len().saturating_sub(4096)..file.len()]);
    Ok(Box::new(move |case| {
        let mut random = Random::new(case);
        let Some(bytes) = Arc::get_mut(&mut file) else {
            panic!("the case before this one kept the image");
        };
        let place = places[random.below(places.len())].clone();
        let undo = damage(bytes, place, &mut random);
        if let Ok(image) = Image::parse(file.clone()) {
            ask(&image, &mut random);
            if let Ok(kernel) = Kernel::locate(Arc::new(image), &dump, dump.vcpus()) {
                drop(stacks(&kernel, &dump, dump.vcpus(), &[]));
            }
        }
        if let Some(bytes) = Arc::get_mut(&mut file) {
            mend(bytes, undo);
        }
    }))
}

/// Asks an image for some of everything.
fn ask(image: &Image, random: &mut Random) {
    let symbols: Vec<_> = image.symbols().iter().take(200_000).collect();
    for _ in 0..32 {
        let Some(symbol) = symbols.get(random.below(symbols.len())) else {
            break;
        };
        drop(image.symbols().namesakes(&symbol.name));
        let at = LinkAddr(symbol.address.0.wrapping_add(random.below(64) as u64));
        let _ = image.symbols().containing(at);
        let _ = image.symbols().space(symbol);
        if let Some(range) = at.range(256) {
            drop(image.shipped().map(|shipped| shipped.sites().within(range)));
        }
    }
    for (name, path) in [
        ("task_struct", "thread.sp"),
        ("module", "mem[1].base"),
        ("rq", "cfs_tasks.next"),
        ("orc_entry", "type"),
    ] {
        let _ = image.types().member(name, path);
        drop(image.types().members(name));
        drop(image.types().layouts(name));
    }
}

/// The file of a recorded guest: its headers and notes.
fn dump(options: &Options) -> Result<Subject, String> {
    const HEADERS: usize = 0x4000;
    let whole = read(&options.dump)?;
    let image =
        Arc::new(Image::parse(Arc::new(unpacked(options)?)).map_err(|error| error.to_string())?);
    let mut file = Arc::new(whole);
    Ok(Box::new(move |case| {
        let mut random = Random::new(case);
        let Some(bytes) = Arc::get_mut(&mut file) else {
            panic!("the case before this one kept the dump");
        };
        let end = bytes.len().min(HEADERS);
        let undo = damage(bytes, 0..end, &mut random);
        if let Ok(dump) = Dump::parse(file.clone())
            && let Ok(kernel) = Kernel::locate(image.clone(), &dump, dump.vcpus())
        {
            drop(stacks(&kernel, &dump, dump.vcpus(), &[]));
        }
        if let Some(bytes) = Arc::get_mut(&mut file) {
            mend(bytes, undo);
        }
    }))
}

/// A guest whose memory lies: some of what is read of it is damaged.
struct Liar<'a> {
    dump: &'a Dump,
    random: RefCell<Random>,
}

impl ReadPhys for Liar<'_> {
    fn read_phys(&self, at: Gpa, buf: &mut [u8]) -> Result<(), GuestError> {
        /// One read in so many.
        const RATE: usize = 300;
        self.dump.read_phys(at, buf)?;
        let mut random = self.random.borrow_mut();
        if random.below(RATE) == 0 {
            let end = buf.len();
            drop(damage(buf, 0..end, &mut random));
        }
        Ok(())
    }
}

/// The recorded guest and its kernel.
fn recorded(options: &Options) -> Result<(Dump, Kernel), String> {
    let dump = Dump::parse(Arc::new(read(&options.dump)?)).map_err(|error| error.to_string())?;
    let image =
        Arc::new(Image::parse(Arc::new(unpacked(options)?)).map_err(|error| error.to_string())?);
    let kernel = Kernel::locate(image, &dump, dump.vcpus()).map_err(|error| error.to_string())?;
    Ok((dump, kernel))
}

/// Memory that lies to those who look for tasks, stacks, modules and the log.
fn memory(options: &Options) -> Result<Subject, String> {
    let (dump, kernel) = recorded(options)?;
    Ok(Box::new(move |case| {
        let random = RefCell::new(Random::new(case));
        let guest = &Liar {
            dump: &dump,
            random,
        };
        let forbidden = [Gva(0xffff_ffff_ffff_f000)..Gva(0xffff_ffff_ffff_f008)];
        drop(Kernel::locate(kernel.image().clone(), guest, dump.vcpus()));
        drop(Image::from_memory(guest, dump.vcpus()));
        drop(stacks(&kernel, guest, dump.vcpus(), &[]));
        drop(stack_words(&kernel, guest, dump.vcpus(), &forbidden));
        drop(Names::read(&kernel, guest));
        drop(log::read(&kernel, guest));
    }))
}

/// Memory that lies to those who compare text.
fn text(options: &Options) -> Result<Subject, String> {
    let (dump, kernel) = recorded(options)?;
    Ok(Box::new(move |case| {
        let random = RefCell::new(Random::new(case));
        let guest = Liar {
            dump: &dump,
            random,
        };
        drop(changed::compare(&kernel, &guest, &[], |_| ()));
    }))
}

/// An update's package.
fn package(options: &Options) -> Result<Subject, String> {
    let mut file = read(&options.package)?;
    Ok(Box::new(move |case| {
        let mut random = Random::new(case);
        let end = file.len();
        let undo = damage(&mut file, 0..end, &mut random);
        let end = end - random.below(2) * random.below(end);
        drop(Package::parse(&file[..end]));
        mend(&mut file, undo);
    }))
}
