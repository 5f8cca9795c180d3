//! Do stock kernels boot as shipped, with the processors and memory they were promised, at a place of their own?

use std::collections::BTreeSet;

use tests::guest::{Guest, Options};
use tests::stock::{self, LTS_6_1, NEWEST_6_12, Stock};

use crate::witness::assert_clean;

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
