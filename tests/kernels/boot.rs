//! Do stock kernels boot as shipped, with the processors and memory they were promised, at a place of their own?

use std::collections::BTreeSet;

use tests::guest::{Guest, Options};
use tests::stock::{self, LTS_6_1, NEWEST_6_12, Stock};

use crate::witness::{assert_clean, one_line};

/// What a guest says of its machine must be what it was given; its log must hold no complaint.
fn check(options: &Options) -> Guest {
    let mut guest = Guest::boot(options);
    let cpus = guest.sh("grep -c ^processor /proc/cpuinfo").text();
    assert_eq!(cpus, options.cpus.to_string(), "{options:?}");
    let total_kib: u64 = number(&guest.sh("grep MemTotal /proc/meminfo").text());
    let (given_kib, least_kib) = (options.memory_mib << 10, (options.memory_mib << 10) * 3 / 4);
    assert!(
        (least_kib..=given_kib).contains(&total_kib),
        "{options:?}: the guest sees {total_kib} KiB"
    );
    let clock = guest
        .sh("cat /sys/devices/system/clocksource/clocksource0/current_clocksource")
        .text();
    assert_eq!(clock, "kvm-clock", "{options:?}");
    assert_clean(&mut guest);
    guest
}

fn number(text: &str) -> u64 {
    text.chars()
        .filter(char::is_ascii_digit)
        .collect::<String>()
        .parse()
        .expect("a number")
}

fn boots_with_each_number_of_cpus(stock: Stock) {
    for cpus in [1, 2, 4] {
        check(&Options::new(stock).cpus(cpus));
    }
}

#[test]
fn lts_6_1_boots_with_1_2_and_4_cpus() {
    boots_with_each_number_of_cpus(LTS_6_1);
}

#[test]
fn newest_6_1_boots_with_1_2_and_4_cpus() {
    boots_with_each_number_of_cpus(stock::NEWEST_6_1);
}

#[test]
fn newest_6_12_boots_with_1_2_and_4_cpus() {
    boots_with_each_number_of_cpus(NEWEST_6_12);
}

#[test]
fn memory_reaches_beyond_the_32_bit_hole() {
    for stock in stock::ALL {
        check(&Options::new(stock).memory_mib(5 << 10));
    }
}

/// Processors that 8 bits do not tell apart come up, and interrupts of devices reach them. Starting all of them would take an emulated
/// processor minutes: `maxcpus` has the guest leave most of them alone.
#[test]
fn more_processors_than_8_bits_tell_apart() {
    const CPUS: usize = 288;
    const LAST: usize = CPUS - 1;
    for stock in [LTS_6_1, NEWEST_6_12] {
        let options = Options::new(stock).cpus(288).memory_mib(1 << 10);
        let mut guest = Guest::boot(&options.cmdline("maxcpus=2"));
        let present = one_line(&mut guest, "cat /sys/devices/system/cpu/present");
        assert_eq!(present, format!("0-{LAST}"), "{stock:?}");
        let start =
            format!("echo 1 >/sys/devices/system/cpu/cpu{LAST}/online && taskset -c {LAST} true");
        let _ = one_line(&mut guest, &start);
        let ours = "sed -n 's/^ *\\([0-9]*\\):.*ttyS0$/\\1/p' /proc/interrupts";
        let moved = format!(
            "cd /proc/irq/$({ours}) && echo {LAST} >smp_affinity_list && cat smp_affinity_list"
        );
        assert_eq!(one_line(&mut guest, &moved), LAST.to_string(), "{stock:?}");
        // A line that was moved goes on to where it was until its next interrupt.
        let _ = one_line(&mut guest, "true");
        let told = one_line(&mut guest, "grep ttyS0 /proc/interrupts");
        // A column for each processor that runs: the last one's is the third.
        let counts: Vec<&str> = told.split_whitespace().collect();
        println!("{stock:?}: interrupts by processor: {:?}", &counts[1..4]);
        assert_ne!(counts[3], "0", "{stock:?}: {told}");
        assert_clean(&mut guest);
        let pressed = guest.client.call(&["vm", "power-button"]);
        drop(pressed.expect("the button"));
        assert_eq!(
            guest.wait_end(),
            0,
            "{stock:?}: the button's level interrupt"
        );
    }
}

/// What is typed ahead of a guest that is slow to read arrives whole, and without more being typed.
#[test]
fn long_lines_that_are_typed_at_once_arrive() {
    for stock in [LTS_6_1, NEWEST_6_12] {
        let mut guest = Guest::boot(&Options::new(stock));
        for length in (300..1500).step_by(150) {
            let word = "x".repeat(length);
            assert_eq!(one_line(&mut guest, &format!("echo {word}")), word);
        }
    }
}

#[test]
fn an_elf_kernel_boots_through_pvh() {
    for stock in stock::ALL {
        check(&Options::new(stock).kernel("vmlinux"));
    }
}

#[test]
fn the_kernel_chooses_its_own_place_at_each_boot() {
    for stock in [LTS_6_1, NEWEST_6_12] {
        let text = |_| {
            check(&Options::new(stock).cpus(1))
                .sh("grep ' _text$' /proc/kallsyms")
                .text()
        };
        let places: BTreeSet<_> = (0..3).map(text).collect();
        assert!(
            places.len() > 1,
            "{stock:?} was at {places:?} in all of three boots"
        );
    }
}
