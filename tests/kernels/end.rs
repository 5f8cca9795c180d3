//! Does the process end when the guest does, with a status that tells how?

use tests::guest::{Guest, Options};
use tests::stock::{self, LTS_6_1, NEWEST_6_12, Stock};

/// The statuses of `exopatch run`, as its help lists them.
const POWER_OFF: i32 = 0;
const RESET: i32 = 10;
const PANIC: i32 = 11;
const TRIPLE_FAULT: i32 = 12;
const KILLED: i32 = 13;

/// Boots a guest, has it end, and compares the status of the process.
fn check(stock: Stock, cmdline: &str, end: impl FnOnce(&mut Guest), status: i32) {
    let mut guest = Guest::boot(&Options::new(stock).cmdline(cmdline));
    end(&mut guest);
    assert_eq!(
        guest.wait_end(),
        status,
        "{stock:?}; exopatch said:\n{}",
        guest.log.since(0).join("\n")
    );
    let socket = guest.client.socket();
    assert!(!socket.exists(), "{} was left behind", socket.display());
}

fn typing(line: &'static str) -> impl FnOnce(&mut Guest) {
    move |guest| guest.type_line(line)
}

#[test]
fn power_off() {
    for stock in stock::ALL {
        check(stock, "", typing("poweroff -f"), POWER_OFF);
    }
}

#[test]
fn power_button() {
    for stock in stock::ALL {
        check(
            stock,
            "",
            |guest| {
                drop(
                    guest
                        .client
                        .call(&["vm", "power-button"])
                        .expect("the button"),
                )
            },
            POWER_OFF,
        );
    }
}

#[test]
fn reset_in_every_way_that_the_kernel_knows() {
    for how in ["reboot=acpi", "reboot=kbd"] {
        check(LTS_6_1, how, typing("reboot -f"), RESET);
        check(NEWEST_6_12, how, typing("reboot -f"), RESET);
    }
}

#[test]
fn triple_fault() {
    check(LTS_6_1, "reboot=triple", typing("reboot -f"), TRIPLE_FAULT);
    check(
        NEWEST_6_12,
        "reboot=triple",
        typing("reboot -f"),
        TRIPLE_FAULT,
    );
}

#[test]
fn panic_that_hangs_and_panic_that_resets() {
    for stock in stock::ALL {
        check(
            stock,
            "panic=0",
            typing("echo c >/proc/sysrq-trigger"),
            PANIC,
        );
        check(
            stock,
            "panic=-1",
            typing("echo c >/proc/sysrq-trigger"),
            PANIC,
        );
    }
}

#[test]
fn kill_by_the_api() {
    check(
        LTS_6_1,
        "",
        |guest| drop(guest.client.call(&["vm", "kill"]).expect("the kill")),
        KILLED,
    );
}
