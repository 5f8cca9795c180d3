//! Do Debian's other configurations of the same kernels look the same from outside? With all drivers and options (generic), and with locks that
//! sleep and interrupts that are threads (rt).

use tests::stock::{GENERIC_6_1, GENERIC_6_12, RT_6_1, RT_6_12, Stock};

use crate::see::all_views;
use crate::stops::{PLAIN, check};

/// Stops of each, unless `EXOPATCH_STOPS` says otherwise.
const STOPS: usize = 100;

fn seen_and_followed(stock: Stock) {
    all_views(stock);
    check(stock, PLAIN, STOPS);
}

#[test]
fn a_generic_6_1_is_seen_and_its_stacks_are_reliable() {
    seen_and_followed(GENERIC_6_1);
}

#[test]
fn a_preemptible_6_1_is_seen_and_its_stacks_are_reliable() {
    seen_and_followed(RT_6_1);
}

#[test]
fn a_generic_6_12_is_seen_and_its_stacks_are_reliable() {
    seen_and_followed(GENERIC_6_12);
}

#[test]
fn a_preemptible_6_12_is_seen_and_its_stacks_are_reliable() {
    seen_and_followed(RT_6_12);
}
