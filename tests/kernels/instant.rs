//! Are running stacks those that the guest's own tracer sees at the same instant?
//!
//! The guest has a probe on a function, whose every hit its tracer records with a stack of its own. A breakpoint of ours is on the same
//! function's first instruction: each call of it stops the guest just before the probe, the stack is followed from outside, and the guest
//! goes on into its probe. Both see the same calls in the same order on each CPU, and tell them apart by registers: so hit by hit, address by
//! address, the two must be equal. The guest's trace begins in its own tracer and goes through the function, where ours begins; from there on
//! nothing is left out of either, but for the few traces that the guest ends early, at thunks of which its own tables say nothing. Ours may end only
//! there, in a thunk that was interrupted, and then the guest's ends there too.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use patcher::addr::Gva;
use patcher::guest::{PausedGuest as _, Registers as _};
use patcher::kernel::locate::Kernel;
use patcher::kernel::stack::Who;
use patcher::kernel::unwind::{Frame, Reason, Stack, Unreliable, Via, stacks};
use tests::figures;
use tests::inside::Inside;
use tests::stock::{LTS_6_1, NEWEST_6_12, Stock};

use crate::witness::count;

/// At least so many hits of each function, unless `EXOPATCH_INSTANTS` says otherwise.
const HITS: usize = 12;
const CPUS: u32 = 2;
/// What thunks are called by which the kernel branches to where a register says.
const THUNK: &str = "__x86_indirect_thunk_";
/// So long may a hit take to come.
const HIT_LIMIT: Duration = Duration::from_secs(20);

/// In what context a function is called.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Context {
    Task,
    SoftIrq,
    Interrupt,
    Nmi,
}

impl Context {
    /// As the tracer's column of flags tells it (Linux Documentation/trace/ftrace.rst, "hardirq/softirq").
    fn of_flag(flag: char) -> Self {
        match flag {
            'z' | 'Z' => Self::Nmi,
            'h' | 'H' => Self::Interrupt,
            's' => Self::SoftIrq,
            '.' => Self::Task,
            other => panic!("the tracer's flag {other:?} is unknown"),
        }
    }
}

/// One call of the function.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Hit {
    /// Stack pointer and first two arguments.
    registers: [u64; 3],
    /// Where its callers go on, from the innermost out.
    callers: Vec<u64>,
}

/// The calls that were seen, in their order, by CPU.
type Hits<T> = BTreeMap<usize, Vec<T>>;

/// Keeps the processors in each of the contexts: system calls, faults of the user's and of the kernel's own, timers, callbacks.
const LOAD: [&str; 3] = [
    "probe churn 3",
    "while :; do dd if=/dev/zero of=/dev/null bs=256k count=1; done",
    "while :; do usleep 2000; done",
];

/// And in NMIs, by asking for the other processor's stack.
const ASK: &str = "while :; do echo l >/proc/sysrq-trigger; usleep 50000; done";

/// What is called in which context, under that load.
const FUNCTIONS: [(&str, Context); 6] = [
    ("hrtimer_interrupt", Context::Interrupt),
    ("update_process_times", Context::Interrupt),
    ("run_timer_softirq", Context::SoftIrq),
    ("rcu_core", Context::SoftIrq),
    (FAULT, Context::Task),
    ("show_regs", Context::Nmi),
];

/// The one that page faults come to.
const FAULT: &str = "handle_mm_fault";

/// Puts a probe on `function`, whose hits the tracer will record with their stacks.
fn probe(guest: &Inside, function: &str) {
    let commands = [
        "cd /sys/kernel/tracing",
        "echo 0 >tracing_on",
        &format!("echo 'p:hit {function} sp=%sp:x64 di=%di:x64 si=%si:x64' >kprobe_events"),
        "echo stacktrace >events/kprobes/hit/trigger",
        "echo sym-addr >trace_options",
        "echo 4096 >buffer_size_kb",
        "echo 1 >events/kprobes/hit/enable",
        "echo >trace",
    ];
    let _ = guest.must(&commands.join(" && "));
}

const RECORD: &str = "echo 1 >/sys/kernel/tracing/tracing_on";
const STOP_RECORDING: &str = "echo 0 >/sys/kernel/tracing/tracing_on";

/// What the guest's tracer recorded, with the context of each hit. `is_own` knows the function's own code.
fn recorded(guest: &Inside, is_own: impl Fn(u64) -> bool) -> Hits<(Context, Hit)> {
    let text = guest.file("/sys/kernel/tracing/trace");
    let commands = [
        "cd /sys/kernel/tracing",
        "echo '!stacktrace' >events/kprobes/hit/trigger",
        "echo 0 >events/kprobes/hit/enable",
        "echo >kprobe_events",
    ];
    let _ = guest.must(&commands.join(" && "));
    let mut hits: Hits<(Context, Hit)> = Hits::new();
    // A hit's stack comes behind it on the same CPU, wherever other CPUs' lie.
    let (mut begun, mut open): (BTreeMap<usize, _>, Option<(usize, Vec<_>)>) = Default::default();
    // A last line closes the last stack.
    for line in text
        .lines()
        .filter(|line| !line.starts_with('#'))
        .chain([""])
    {
        if let Some(frame) = line.strip_prefix(" => ") {
            let (_, frames) = open.as_mut().expect("a stack that was begun");
            frames.push(address(frame));
            continue;
        }
        if let Some((cpu, frames)) = open.take() {
            if let Some((context, registers)) = begun.remove(&cpu) {
                let callers = callers(&frames, &is_own);
                let hit = Hit { registers, callers };
                hits.entry(cpu).or_default().push((context, hit));
            } else {
                // Recording can begin between a hit and its stack.
                assert!(!hits.contains_key(&cpu), "a stack without a hit");
            }
        }
        let Some((head, rest)) = line.split_once(": ") else {
            assert!(line.is_empty(), "{line:?}");
            continue;
        };
        let mut words = head.split_whitespace().rev().skip(1);
        let flags = words.next().expect(line);
        let cpu = words.next().expect(line).trim_matches(['[', ']']);
        let cpu = cpu.parse().expect(line);
        if rest == "<stack trace>" {
            open = Some((cpu, Vec::new()));
        } else {
            let context = Context::of_flag(flags.chars().nth(2).expect(line));
            let old = begun.insert(cpu, (context, registers(rest)));
            assert!(old.is_none(), "a hit without a stack before {line}");
        }
    }
    hits
}

/// The callers of a function: they stand behind its own frame, and those of its probe before that.
fn callers(frames: &[Option<u64>], is_own: impl Fn(u64) -> bool) -> Vec<u64> {
    let own = frames.iter().position(|frame| frame.is_some_and(&is_own));
    let own = own.unwrap_or_else(|| panic!("the function is not in {frames:x?}"));
    let callers = frames[own + 1..].iter();
    callers.map(|at| at.expect("a caller's address")).collect()
}

/// The address behind a name: `name <ffffffff81000000>`. The tracer's own trampoline has none.
fn address(frame: &str) -> Option<u64> {
    let (_, at) = frame.strip_suffix('>')?.rsplit_once('<')?;
    Some(u64::from_str_radix(at, 16).unwrap_or_else(|_| panic!("no address: {frame:?}")))
}

/// `hit: (...) sp=0x... di=0x... si=0x...`
fn registers(text: &str) -> [u64; 3] {
    ["sp", "di", "si"].map(|name| {
        let mut words = text.split_whitespace();
        let value = words.find_map(|word| word.strip_prefix(name)?.strip_prefix("=0x"));
        let value = value.and_then(|value| u64::from_str_radix(value, 16).ok());
        value.unwrap_or_else(|| panic!("no {name} in {text:?}"))
    })
}

/// Stops the guest at each call of the function that begins at `at`, and follows its stack: from before the tracer begins to record until
/// after it has ended, with at least `hits` between.
fn taken(guest: &Inside, kernel: &Kernel, at: Gva, hits: usize) -> Hits<Hit> {
    let mut machine = guest.vm.guest().expect("a guest that nobody else has");
    let mut breakpoint = machine.break_at(at);
    let mut all = Hits::new();
    let mut take = || {
        let (paused, came) = breakpoint
            .next(Instant::now() + HIT_LIMIT)
            .unwrap_or_else(|error| panic!("{error}; the guest ended with {:?}", guest.vm.ended()));
        let found = stacks(kernel, &paused, paused.vcpus(), &[]).expect("the stacks");
        let many = came.len();
        for cpu in came {
            let own = found.stacks.iter().find(|it| it.who == Who::Vcpu(cpu));
            let hit = hit(
                kernel,
                at,
                own.expect("the vCPU's stack"),
                &paused.vcpus()[cpu].gpr,
            );
            all.entry(cpu).or_insert_with(Vec::new).push(hit);
        }
        paused.resume().expect("a guest that goes on");
        many
    };
    // The breakpoint is there, and has hit, before the guest records.
    let _ = take();
    during(guest, RECORD, &mut take);
    let mut seen = 0;
    while seen < hits {
        seen += take();
    }
    during(guest, STOP_RECORDING, &mut take);
    all
}

/// Has the guest carry out `command` while its calls of the function are taken.
fn during(guest: &Inside, command: &str, take: &mut dyn FnMut() -> usize) {
    let mark = guest.begin(command);
    let answer = loop {
        let _ = take();
        if let Some(answer) = guest.answered(mark) {
            break answer;
        }
    };
    assert_eq!(answer.status, 0, "'{command}': {}", answer.text());
}

/// The call that a vCPU was stopped at, from its stack and general-purpose registers.
fn hit(kernel: &Kernel, at: Gva, own: &Stack, gpr: &[u64; 16]) -> Hit {
    let frames: Vec<_> = own.frames.iter().map(|it| it.describe(kernel)).collect();
    if let Err(Unreliable { reason, .. }) = &own.end {
        let outermost = frames.last().expect("a frame");
        assert!(
            outermost.starts_with(THUNK) && matches!(reason, Reason::Undefined { .. }),
            "{reason:?} after {frames:?}"
        );
    }
    assert_eq!(own.frames[0].ip, at, "{frames:?}");
    Hit {
        registers: [gpr[4], gpr[7], gpr[6]],
        callers: own.frames[1..].iter().map(|frame| frame.ip.0).collect(),
    }
}

/// Hits that were seen alike.
#[derive(Debug, Default)]
struct Alike {
    contexts: Vec<Context>,
    /// Hits whose trace ends at code of which the guest's own tables say nothing; ours goes on to the stack's end but where that code is a thunk that
    /// was interrupted.
    given_up: usize,
}

/// Are these the same call, and the same callers as far as the guest's trace goes?
fn alike(hit: &Hit, own: &Hit) -> bool {
    hit.registers == own.registers && own.callers.starts_with(&hit.callers)
}

/// Proves that what was recorded is a part of what was taken, hit by hit and without a gap.
fn compare(
    taken: &Hits<Hit>,
    recorded: &Hits<(Context, Hit)>,
    name: impl Fn(u64) -> String,
) -> Alike {
    let mut found = Alike::default();
    for (cpu, recorded) in recorded {
        let taken = taken.get(cpu).map_or(&[][..], Vec::as_slice);
        let equal = |window: &&[Hit]| {
            let pairs = recorded.iter().zip(*window);
            pairs.filter(|((_, hit), own)| alike(hit, own)).count()
        };
        let best = taken.windows(recorded.len()).max_by_key(equal);
        let best = best.unwrap_or_else(|| {
            panic!("CPU {cpu}: {recorded:#x?} are more than were taken: {taken:#x?}")
        });
        for ((context, hit), own) in recorded.iter().zip(best) {
            let names = |hit: &Hit| hit.callers.iter().map(|at| name(*at)).collect::<Vec<_>>();
            assert!(
                alike(hit, own),
                "CPU {cpu}, {context:?}, where {} others agree: {:#?} are not {:#?}",
                equal(&best),
                names(own),
                names(hit)
            );
            let outermost = own.callers.last();
            let both = outermost.is_some_and(|at| name(*at).starts_with(THUNK));
            found.given_up += usize::from(both || hit.callers.len() < own.callers.len());
            found.contexts.push(*context);
        }
    }
    found
}

/// An address of the kernel's code as its tracer prints it.
fn name(kernel: &Kernel, at: u64) -> String {
    let via = Via::Call;
    Frame {
        ip: Gva(at),
        via,
        at: None,
    }
    .describe(kernel)
}

/// Page faults beneath hits.
#[derive(Debug, Default)]
struct Faults {
    /// Of a user's code: nothing of the kernel lies beneath.
    user: usize,
    /// Of the kernel's own.
    kernel: usize,
}

fn faults(kernel: &Kernel, hits: &Hits<Hit>) -> Faults {
    let mut faults = Faults::default();
    for hit in hits.values().flatten() {
        let mut callers = hit.callers.iter();
        if callers.any(|at| name(kernel, *at).starts_with("asm_exc_page_fault+")) {
            match callers.next() {
                None => faults.user += 1,
                Some(_) => faults.kernel += 1,
            }
        }
    }
    faults
}

/// Keeps the guest's processors in many contexts, and does `more` beside.
pub(crate) fn keep_busy(guest: &Inside, more: &[&str]) {
    // What is typed goes first.
    let background = |load| format!("sh -c 'renice -n 19 $$; {load}' >/dev/null 2>&1 &");
    let load: String = LOAD.iter().chain(more).map(background).collect();
    let _ = guest.must(&load);
}

fn check(stock: Stock) {
    let guest = Inside::boot(stock, CPUS);
    let kernel = guest.kernel(stock);
    let hits = count("EXOPATCH_INSTANTS", HITS);
    keep_busy(&guest, &[ASK]);
    let (mut all, mut all_given_up) = (0, 0);
    for (function, context) in FUNCTIONS {
        let at = kernel.symbol(function).expect("the function");
        probe(&guest, function);
        let taken = taken(&guest, &kernel, at, hits);
        let recorded = recorded(&guest, |caller| {
            let code = name(&kernel, caller);
            code.split_once('+')
                .is_some_and(|(code, _)| code == function)
        });
        let Alike { contexts, given_up } = compare(&taken, &recorded, |at| name(&kernel, at));
        assert!(
            contexts.iter().all(|it| *it == context),
            "{function}: {contexts:?}"
        );
        assert!(
            contexts.len() >= hits,
            "{function}: {} hits were recorded",
            contexts.len()
        );
        all += contexts.len();
        all_given_up += given_up;
        let deepest = taken.values().flatten().map(|hit| hit.callers.len()).max();
        let faults = faults(&kernel, &taken);
        println!(
            "{stock:?} {function}: {} hits in {context:?}, {given_up} that the guest gave up on, up to {deepest:?} callers, {faults:?}",
            contexts.len()
        );
        assert!(given_up * 10 <= contexts.len(), "{given_up} are too many");
        if function == FAULT {
            assert!(faults.user > 0 && faults.kernel > 0, "{faults:?}");
        }
    }
    figures::note(&serde_json::json!({ "instants": all, "given_up_by_the_guest": all_given_up }));
    let log = guest.sh("dmesg | grep -E 'WARNING:|BUG:|Oops|general protection'");
    assert_eq!(log.status, 1, "the guest complains: {}", log.text());
}

#[test]
fn running_stacks_of_6_1_are_those_of_its_tracer() {
    check(LTS_6_1);
}

#[test]
fn running_stacks_of_6_12_are_those_of_its_tracer() {
    check(NEWEST_6_12);
}
