//! What is repeated, and how often in full. A part is one test of kernels with its counts; it is run in units, each in a lab of its own.

use crate::result::Sums;

/// One test, repeated.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Part {
    pub(crate) name: &'static str,
    /// As the tests of kernels list it.
    pub(crate) test: &'static str,
    /// How many units.
    pub(crate) units: u32,
    /// The environment variable with the count of one unit, and that count.
    pub(crate) count: (&'static str, u32),
    /// The figure that says that it was done.
    pub(crate) done: &'static str,
}

const ROUNDS: (&str, u32) = ("EXOPATCH_ROUNDS", 500);
const PAUSES: (&str, u32) = ("EXOPATCH_PAUSES", 1000);
const INSTANTS: (&str, u32) = ("EXOPATCH_INSTANTS", 100);
const SWITCHES: (&str, u32) = ("EXOPATCH_SWITCHES", 1000);
const KILLS: (&str, u32) = ("EXOPATCH_KILLS", 250);
/// Few, so that not much is lost when the lab fails.
const STOPS: (&str, u32) = ("EXOPATCH_STOPS", 1000);

/// All parts, in the order in which they are run.
pub(crate) const PARTS: [Part; 18] = [
    rounds(
        "applies-6.1",
        "patch::applies_and_reverts_in_a_row_under_four_callers_on_6_1",
    ),
    rounds(
        "applies-6.1-new",
        "patch::applies_and_reverts_in_a_row_under_four_callers_on_the_newest_6_1",
    ),
    rounds(
        "applies-6.12",
        "patch::applies_and_reverts_in_a_row_under_four_callers_on_6_12",
    ),
    Part {
        name: "pauses",
        test: "pause::many_pauses_of_four_busy_cpus_hang_none",
        units: 1,
        count: PAUSES,
        done: "pauses",
    },
    switches(
        "switches-6.1",
        "adaptive::a_pair_of_6_1_is_never_of_two_generations",
    ),
    switches(
        "switches-6.12",
        "adaptive::a_pair_of_6_12_is_never_of_two_generations",
    ),
    kills(
        "kills-6.1",
        "killed::what_killed_clients_of_6_1_asked_for_is_done_or_not",
    ),
    kills(
        "kills-6.12",
        "killed::what_killed_clients_of_6_12_asked_for_is_done_or_not",
    ),
    instants(
        "instants-6.1",
        "instant::running_stacks_of_6_1_are_those_of_its_tracer",
    ),
    instants(
        "instants-6.12",
        "instant::running_stacks_of_6_12_are_those_of_its_tracer",
    ),
    stops(
        "stops-6.1",
        "stops::stacks_of_a_busy_6_1_are_reliable_wherever_it_stops",
        24,
    ),
    stops(
        "stops-6.12",
        "stops::stacks_of_a_busy_6_12_are_reliable_wherever_it_stops",
        24,
    ),
    // These two stop one guest of each kernel.
    stops(
        "stops-probed",
        "stops::stacks_through_kprobes_are_reliable",
        13,
    ),
    stops(
        "stops-traced",
        "stops::stacks_under_the_graph_tracer_are_reliable",
        13,
    ),
    stops(
        "stops-6.1-generic",
        "flavours::stacks_of_a_busy_generic_6_1_are_reliable",
        1,
    ),
    stops(
        "stops-6.1-rt",
        "flavours::stacks_of_a_busy_rt_6_1_are_reliable",
        1,
    ),
    stops(
        "stops-6.12-generic",
        "flavours::stacks_of_a_busy_generic_6_12_are_reliable",
        1,
    ),
    stops(
        "stops-6.12-rt",
        "flavours::stacks_of_a_busy_rt_6_12_are_reliable",
        1,
    ),
];

const fn rounds(name: &'static str, test: &'static str) -> Part {
    Part {
        name,
        test,
        units: 1,
        count: ROUNDS,
        done: "applies",
    }
}

const fn switches(name: &'static str, test: &'static str) -> Part {
    Part {
        name,
        test,
        units: 5,
        count: SWITCHES,
        done: "switches",
    }
}

const fn kills(name: &'static str, test: &'static str) -> Part {
    Part {
        name,
        test,
        units: 1,
        count: KILLS,
        done: "kills",
    }
}

const fn instants(name: &'static str, test: &'static str) -> Part {
    Part {
        name,
        test,
        units: 1,
        count: INSTANTS,
        done: "instants",
    }
}

const fn stops(name: &'static str, test: &'static str, units: u32) -> Part {
    Part {
        name,
        test,
        units,
        count: STOPS,
        done: "stops",
    }
}

/// What all parts together should come to, with the bound and whether it is met.
pub(crate) fn wanted(all: &Sums) -> Vec<(String, bool)> {
    let sum = |name: &str| all.get(name).copied().unwrap_or(0);
    let (kernel, reliable) = (sum("in_kernel"), sum("in_kernel_reliable"));
    let (sleeping, sleeping_reliable) = (sum("sleeping"), sum("sleeping_reliable"));
    vec![
        at_least("stops", sum("stops"), 100_000),
        at_least(
            "stacks of vCPUs in the kernel beside entry text and idle",
            kernel,
            20_000,
        ),
        (
            format!("{reliable} of {kernel} such stacks reliable; at least 99 in 100"),
            kernel > 0 && reliable * 100 >= kernel * 99,
        ),
        (
            format!("{sleeping_reliable} of {sleeping} stacks of sleeping tasks reliable; all"),
            sleeping > 0 && sleeping == sleeping_reliable,
        ),
        at_least("applies and as many reverts", sum("applies"), 1500),
        at_least("switches of a pair of functions", sum("switches"), 10_000),
        (
            format!(
                "{} calls of that pair of two generations; none",
                sum("calls_of_two_generations")
            ),
            sum("switches") > 0 && sum("calls_of_two_generations") == 0,
        ),
        at_least(
            "clients killed at any moment of an apply or a revert, each of which was done or was not",
            sum("kills"),
            500,
        ),
        at_least("pauses in a row", sum("pauses"), 1000),
        at_least(
            "running stacks equal to the guest's own trace of that instant",
            sum("instants"),
            1000,
        ),
    ]
}

fn at_least(what: &str, have: u64, least: u64) -> (String, bool) {
    (format!("{have} {what}; at least {least}"), have >= least)
}
