//! Does an update leave the guest's own tools in peace, and do they leave it?

use tests::guest::{Guest, Options};
use tests::stock;

use crate::patch::{apply, revert};
use crate::witness::{SETTLE, assert_clean, assert_unchanged, boot_asking, one_line, wait_answer};

/// What SIOCATMARK on a datagram socket answers now.
fn ask(guest: &mut Guest) -> String {
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
