//! Do Debian's other configurations of the same kernels look the same from outside? With all drivers and options (generic), and with locks that
//! sleep and interrupts that are threads (rt).

use tests::stock::{GENERIC_6_1, GENERIC_6_12, RT_6_1, RT_6_12};

use crate::see::all_views;
use crate::stops::{PLAIN, check};

/// Stops of each, unless `EXOPATCH_STOPS` says otherwise.
const STOPS: usize = 100;

#[test]
fn a_running_generic_6_1_is_seen_as_it_sees_itself() {
    all_views(GENERIC_6_1);
}

#[test]
fn a_running_generic_6_12_is_seen_as_it_sees_itself() {
    all_views(GENERIC_6_12);
}

#[test]
fn a_running_rt_6_1_is_seen_as_it_sees_itself() {
    all_views(RT_6_1);
}

#[test]
fn a_running_rt_6_12_is_seen_as_it_sees_itself() {
    all_views(RT_6_12);
}

#[test]
fn stacks_of_a_busy_generic_6_1_are_reliable() {
    check(GENERIC_6_1, PLAIN, STOPS);
}

#[test]
fn stacks_of_a_busy_generic_6_12_are_reliable() {
    check(GENERIC_6_12, PLAIN, STOPS);
}

#[test]
fn stacks_of_a_busy_rt_6_1_are_reliable() {
    check(RT_6_1, PLAIN, STOPS);
}

#[test]
fn stacks_of_a_busy_rt_6_12_are_reliable() {
    check(RT_6_12, PLAIN, STOPS);
}
