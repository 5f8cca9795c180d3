//! Are the types that modules brought read as the guest has them?

use std::fs;
use std::time::{Duration, Instant};

use patcher::guest::{Guest as _, PausedGuest as _, Registers as _};
use patcher::kernel::locate::Kernel;
use patcher::kernel::modules;
use tests::stock::{LTS_6_1, NEWEST_6_12, Stock};
use vmm::kernel_index;

use crate::stops::boot;

/// What the guest says of them: a line for each module, its name and all bytes, in hexadecimal.
const SAY: &str = r#"cd /sys/kernel/btf
for types in *; do
    [ $types = vmlinux ] || echo "types of $types: $(hexdump -ve '1/1 "%02x"' $types)"
done
echo exopatch-guest: loaded
sleep 1000"#;

fn compare(stock: Stock) {
    let dir = tempfile::tempdir().expect("a directory");
    let vm = boot(dir.path(), stock, SAY);
    let said = fs::read_to_string(dir.path().join("console")).expect("what the guest said");
    let told = said.lines().filter_map(|line| {
        let (name, bytes) = line.split_once("types of ")?.1.split_once(": ")?;
        Some((name.to_owned(), bytes.trim().to_owned()))
    });
    let mut told: Vec<(String, String)> = told.collect();
    told.sort();

    let image = kernel_index::load(&stock.file("vmlinuz")).expect("an index");
    let mut guest = vm.guest().expect("a guest that nobody else has");
    let paused = guest.pause(Instant::now() + Duration::from_secs(10));
    let paused = paused.expect("a guest that stands still");
    let kernel = Kernel::locate(image.into(), &paused, paused.vcpus()).expect("the kernel");
    let loaded = modules::read(&kernel, &paused).expect("the modules");
    let bytes = |module: &modules::Module| {
        let seen = module.btf(&kernel, &paused).expect("types");
        let seen = seen.unwrap_or_default();
        let types = module
            .types(&kernel, &paused)
            .expect("types that are sound");
        let count = types.map_or(0, |types| types.len());
        println!("{}: {} bytes, {count} types", module.name, seen.len());
        assert!(count > 0);
        seen.iter().map(|byte| format!("{byte:02x}")).collect()
    };
    let seen = loaded
        .iter()
        .map(|module| (module.name.clone(), bytes(module)));
    let mut seen: Vec<(String, String)> = seen.collect();
    seen.sort();
    paused.resume().expect("a guest that goes on");
    drop(guest);
    vm.kill("the end of the test");
    let _ = vm.wait();
    assert!(seen.len() > 1, "{seen:?}");
    assert_eq!(seen, told, "{stock:?}");
}

#[test]
fn types_of_modules_of_6_1_are_those_of_the_guest() {
    compare(LTS_6_1);
}

#[test]
fn types_of_modules_of_6_12_are_those_of_the_guest() {
    compare(NEWEST_6_12);
}
