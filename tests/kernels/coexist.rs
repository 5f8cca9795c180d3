//! Does an update leave the guest's own tools in peace, and do they leave it?

use tests::guest::{Guest, Options};
use tests::stock;

use crate::patch::{apply, revert};
use crate::witness::{SETTLE, assert_clean, assert_unchanged, boot_asking, one_line, wait_answer};

/// What SIOCATMARK on a datagram socket answers now.
pub(crate) fn ask(guest: &mut Guest) -> String {
    let line = one_line(guest, "probe siocatmark 1");
    line.rsplit(' ').next().unwrap_or_default().to_owned()
}

#[test]
fn the_guest_traces_a_redirected_function() {
    let tracing = "cd /sys/kernel/tracing";
    for stock in stock::ALL {
        let mut guest = Guest::boot(&Options::new(stock));
        let old = ask(&mut guest);
        let id = apply(&guest, &stock.edition("unix_ioctl_notty"));
        let start = "echo unix_ioctl >set_ftrace_filter && echo function >current_tracer";
        one_line(&mut guest, &format!("{tracing} && {start}"));
        assert_eq!(
            ask(&mut guest),
            "ENOTTY",
            "{stock:?}: traced after an apply"
        );
        let traced = one_line(
            &mut guest,
            &format!(
                "probe siocatmark 20 1 >/dev/null; {tracing} && grep -c 'unix_ioctl <-' trace"
            ),
        );
        assert_eq!(traced.trim(), "21", "{stock:?}: calls traced");
        revert(&guest, id);
        assert_eq!(ask(&mut guest), old, "{stock:?}: reverted while traced");
        let _ = apply(&guest, &stock.edition("unix_ioctl_notty"));
        assert_eq!(ask(&mut guest), "ENOTTY", "{stock:?}: applied while traced");
        one_line(
            &mut guest,
            &format!("{tracing} && echo nop >current_tracer"),
        );
        assert_eq!(ask(&mut guest), "ENOTTY", "{stock:?}: no longer traced");
        assert_eq!(
            one_line(&mut guest, "cat /proc/sys/kernel/ftrace_enabled"),
            "1",
            "{stock:?}"
        );
        assert_clean(&mut guest);
    }
}

/// Tracers, return probes and entry probes are set before and after a rule makes the jump lead to a handler: all of them see every call, and
/// every call gets its edition.
#[test]
fn the_guest_traces_a_function_whose_editions_are_chosen() {
    let tracing = "cd /sys/kernel/tracing";
    for stock in stock::ALL {
        let mut guest = Guest::boot(&Options::new(stock));
        let old = ask(&mut guest);
        let probes = "echo 'p:entry unix_ioctl' >kprobe_events; echo 'r:back unix_ioctl $retval' >>kprobe_events; \
                      echo 1 >events/kprobes/enable";
        let graph = "echo unix_ioctl >set_graph_function && echo function_graph >current_tracer";
        one_line(&mut guest, &format!("{tracing} && {probes}"));
        let package = stock.edition("unix_ioctl_notty");
        let package = package.to_str().expect("UTF-8");
        let chosen = [
            "update",
            "apply",
            package,
            "--when",
            "cmd = 0x8905",
            "--count",
        ];
        let update = guest.client.call(&chosen).expect("the apply");
        assert_eq!(update["state"], "applied", "{update:#}");
        assert_eq!(ask(&mut guest), "ENOTTY", "{stock:?}: probed before");
        one_line(&mut guest, &format!("{tracing} && {graph}"));
        assert_eq!(ask(&mut guest), "ENOTTY", "{stock:?}: traced since");
        let calls = |guest: &Guest| {
            let told = guest.client.call(&["update", "calls"]).expect("the calls");
            let told = told["calls"].as_array().expect("calls").iter();
            told.map(|of| of["calls"].as_u64().expect("a count"))
                .sum::<u64>()
        };
        let before = calls(&guest);
        let seen = one_line(
            &mut guest,
            &format!(
                "{tracing} && echo >trace; probe siocatmark 20 1 >/dev/null; \
                 echo $(grep -c entry: trace) $(grep -c back: trace) $(grep -c 'unix_ioctl' trace)"
            ),
        );
        let seen: Vec<u64> = seen
            .split_whitespace()
            .filter_map(|count| count.parse().ok())
            .collect();
        println!(
            "{stock:?}: {seen:?} lines of {} calls",
            calls(&guest) - before
        );
        assert_eq!(calls(&guest) - before, 20, "{stock:?}: counted");
        assert_eq!(seen.get(..2), Some(&[20, 20][..]), "{stock:?}: probed");
        assert!(seen[2] >= 40, "{stock:?}: traced");
        let other = ["update", "use", "1", "--when", "cmd = 1"];
        let used = guest.client.call(&other).expect("the use");
        assert_eq!(used["state"], "applied", "{used:#}");
        assert_eq!(ask(&mut guest), old, "{stock:?}: for other calls");
        one_line(
            &mut guest,
            &format!(
                "{tracing} && echo nop >current_tracer; echo 0 >events/kprobes/enable; echo >kprobe_events"
            ),
        );
        revert(&guest, 1);
        assert_eq!(ask(&mut guest), old, "{stock:?}: reverted");
        assert_clean(&mut guest);
    }
}

#[test]
fn a_kprobe_inside_the_displaced_bytes_is_refused_and_nothing_has_changed() {
    for stock in stock::ALL {
        let mut guest = boot_asking(&Options::new(stock), 1);
        let old = wait_answer(&guest, 0, 0, |_| true);
        let events = "/sys/kernel/tracing/kprobe_events";
        // The first instruction behind the fentry site, which ends at 5, or at 9 where the function begins with endbr64.
        let armed = (5..16).any(|offset| {
            let add = format!("echo p:behind unix_ioctl+{offset} >{events}");
            guest.sh(&add).status == 0
        });
        assert!(
            armed,
            "{stock:?}: no kprobe could be set behind the fentry site"
        );
        one_line(
            &mut guest,
            "echo 1 >/sys/kernel/tracing/events/kprobes/enable",
        );
        let package = stock.edition("unix_ioctl_notty");
        let reply = guest
            .client
            .call(&["update", "apply", package.to_str().expect("UTF-8")]);
        println!("{stock:?}: {}", reply.json);
        assert!(!reply.refusal("an apply onto a kprobe").is_empty());
        let mark = guest.console.mark();
        assert_unchanged(&guest, mark, SETTLE, stock.0);
        one_line(
            &mut guest,
            &format!("echo 0 >/sys/kernel/tracing/events/kprobes/enable; echo >{events}"),
        );
        let mark = guest.console.mark();
        let _ = apply(&guest, &stock.edition("unix_ioctl_notty"));
        let new = wait_answer(&guest, mark, 0, |answer| answer != old);
        assert_eq!(new, "ENOTTY", "{stock:?}: once the kprobe is gone");
        assert_clean(&mut guest);
    }
}

#[test]
fn the_arena_cannot_be_had_through_dev_mem() {
    for stock in stock::ALL {
        let mut guest = Guest::boot(&Options::new(stock));
        let kernel = guest.client.call(&["kernel", "info"]).expect("the kernel");
        let start = kernel["arena"]["guest_physical"]
            .as_str()
            .expect("where the arena is")
            .to_owned();
        let _ = apply(&guest, &stock.edition("unix_ioctl_notty"));
        let told = one_line(&mut guest, "cat /proc/iomem");
        let listed = told
            .lines()
            .any(|line| line.contains(start.trim_start_matches("0x")) && line.contains("Unusable"));
        assert!(listed, "{stock:?}: {start} is not marked in\n{told}");
        let tried = one_line(&mut guest, &format!("probe devmem {start} 4096"));
        assert!(!tried.contains("OK"), "{stock:?}: {tried}");
        assert!(
            tried.contains("read -1") && tried.contains("mmap -1"),
            "{stock:?}: {tried}"
        );
    }
}
