//! All stacks of recorded guests with few and many threads, followed natively, beside drgn on the same recording.

use std::time::Instant;

use patcher::guest::Registers as _;
use patcher::kernel::unwind::stacks;
use serde_json::Value;
use tests::oracle;
use tests::recorded::{Load, Recorded, open};
use tests::stock::Stock;

use crate::figures::{Figures, Target, median};
use crate::outside::number;

/// Threads of the guests, and the memory in MiB that these need.
const SIZES: [(u32, u64); 3] = [(100, 256), (1000, 256), (10_000, 768)];
/// What following the stacks of the largest may take beside drgn.
const OF_PEER: f64 = 1.0 / 20.0;
/// What one task of the largest guest may cost beside one of the guest before: the cost grows with the tasks, and no faster.
const LINEAR: f64 = 1.5;
/// How often exopatch follows them at least: it takes milliseconds, in which much else can come between.
const ROUNDS: usize = 25;
/// drgn takes a second for some hundred tasks: above this number it is measured once.
const OFTEN: u32 = 1000;

/// One guest's stacks.
struct Followed {
    ms: f64,
    tasks: f64,
    frames: usize,
}

/// Stacks of guests of all sizes.
pub(crate) fn unwind(figures: &mut Figures, stock: Stock, samples: usize) -> Result<(), String> {
    let mut a_task = Vec::new();
    for (threads, memory_mib) in SIZES {
        eprintln!("measuring stacks {}, {threads} threads", stock.0);
        let load = Load::Sleepers(threads);
        let recorded = Recorded {
            stock,
            load,
            memory_mib,
        };
        let core = recorded.kept()?;
        let ours = ours(stock, &core, samples.max(ROUNDS))?;
        let mut times = Vec::new();
        for _ in 0..if threads > OFTEN { 1 } else { samples } {
            let theirs = oracle::drgn("stacks.py", stock, &core, &[])?;
            let frames = frames(&theirs);
            if frames != ours.frames {
                return Err(format!(
                    "{}: {} frames, but drgn finds {frames}",
                    core.display(),
                    ours.frames
                ));
            }
            times.push(number(&theirs, "follow_s")? * 1e3);
        }
        let largest = threads == SIZES[SIZES.len() - 1].0;
        let of = |what: &str| format!("stacks {}, {threads} threads: {what}", stock.0);
        figures.add(
            of("all followed"),
            ours.ms,
            "ms",
            Some(("drgn", median(times)?)),
            largest.then_some(Target::RatioAtMost(OF_PEER)),
        );
        let seconds = ours.ms / 1e3;
        figures.add(of("tasks"), ours.tasks / seconds, "a second", None, None);
        figures.add(
            of("frames"),
            ours.frames as f64 / seconds,
            "a second",
            None,
            None,
        );
        a_task.push((threads, ours.ms * 1e3 / ours.tasks));
    }
    if let [.., (fewer, before), (threads, largest)] = a_task[..] {
        figures.add(
            format!("stacks {}, {threads} threads: one task", stock.0),
            largest,
            "us",
            Some((&format!("{fewer} threads"), before)),
            Some(Target::RatioAtMost(LINEAR)),
        );
    }
    Ok(())
}

fn ours(stock: Stock, core: &std::path::Path, samples: usize) -> Result<Followed, String> {
    let opened = open(stock, core)?;
    let mut followed = Followed {
        ms: 0.0,
        tasks: 0.0,
        frames: 0,
    };
    let mut times = Vec::new();
    for _ in 0..samples {
        let start = Instant::now();
        let found = stacks(&opened.kernel, &opened.dump, opened.dump.vcpus(), &[])
            .map_err(|error| format!("{}: {error}", core.display()))?;
        times.push(start.elapsed().as_secs_f64() * 1e3);
        if let Some(stack) = found.stacks.iter().find(|stack| stack.end.is_err()) {
            return Err(format!("{}: not reliable: {stack:?}", core.display()));
        }
        followed.tasks = found.tasks.tasks.len() as f64;
        followed.frames = found.stacks.iter().map(|stack| stack.frames.len()).sum();
    }
    followed.ms = median(times)?;
    Ok(followed)
}

/// The frames that drgn found: of the tasks that do not run, and of the CPUs.
fn frames(theirs: &Value) -> usize {
    let list = |name: &str| {
        theirs[name]
            .as_array()
            .map(Vec::as_slice)
            .unwrap_or_default()
    };
    let current = |task: &Value| {
        list("cpus")
            .iter()
            .any(|cpu| cpu["current"] == task["address"])
    };
    let asleep = list("tasks").iter().filter(|task| !current(task));
    let all = asleep.chain(list("cpus"));
    all.filter_map(|stack| stack["frames"].as_array())
        .map(Vec::len)
        .sum()
}
