//! Stack traces as a kernel prints them into its log.
//!
//! Lines of which the kernel is not sure have a question mark and are left out. Where an exception interrupted the kernel the trace goes on
//! with the registers of that place, of which `RIP` names the code; registers of a user's end it.

use std::collections::BTreeMap;

/// What precedes the frames, on a line of its own.
const BEGIN: &str = "Call Trace:";

/// The frames that lines show, from the innermost out, each as `symbol+offset/size [module]`.
pub fn frames<'a>(lines: impl IntoIterator<Item = &'a str>) -> Vec<String> {
    let mut frames = Vec::new();
    for line in lines {
        match line.strip_prefix("RIP: ") {
            Some(place) if is_user(place) => break,
            Some(place) => frames.extend(place.split_once(':').and_then(|(_, code)| frame(code))),
            None => frames.extend(line.strip_prefix(' ').and_then(frame)),
        }
    }
    frames
}

/// `symbol+0xa/0xb [module build-id]` without the build-id, if it is that.
fn frame(text: &str) -> Option<String> {
    let (place, module) = match text.trim_end().split_once(" [") {
        Some((place, module)) => (place, Some(module.strip_suffix(']')?)),
        None => (text.trim_end(), None),
    };
    let (symbol, numbers) = place.split_once('+')?;
    let (offset, size) = numbers.split_once('/')?;
    let is_number = |text: &str| {
        let digits = text.strip_prefix("0x");
        digits.is_some_and(|digits| u64::from_str_radix(digits, 16).is_ok())
    };
    if symbol.contains(' ') || !is_number(offset) || !is_number(size) {
        return None;
    }
    let module = module.and_then(|module| module.split(' ').next());
    let module = module.map(|module| format!(" [{module}]"));
    Some(format!("{place}{}", module.unwrap_or_default()))
}

/// Whether what follows `RIP: ` is of the user's code, as the selector's lowest bits say.
fn is_user(place: &str) -> bool {
    let selector = place.split(':').next();
    let selector = selector.and_then(|digits| u16::from_str_radix(digits, 16).ok());
    selector.is_some_and(|selector| selector & 3 == 3)
}

/// The registers that lines show before the frames begin, by name; none when there are none.
#[must_use]
pub fn registers(lines: &[&str]) -> BTreeMap<String, u64> {
    let before = lines.iter().take_while(|line| **line != BEGIN);
    let mut registers = BTreeMap::new();
    for line in before {
        let mut words = line.split_whitespace();
        while let Some(word) = words.next() {
            let Some(name) = word.strip_suffix(':').filter(|name| name.starts_with('R')) else {
                continue;
            };
            // A selector may stand before the value.
            let value = words.next().and_then(|value| value.rsplit(':').next());
            let value = value.and_then(|value| u64::from_str_radix(value, 16).ok());
            registers.extend(value.map(|value| (name.to_owned(), value)));
        }
    }
    registers
}

/// Whether the registers that lines show before the frames begin are of the user's code.
#[must_use]
pub fn of_user(lines: &[&str]) -> bool {
    let mut before = lines.iter().take_while(|line| **line != BEGIN);
    before.any(|line| line.strip_prefix("RIP: ").is_some_and(is_user))
}

#[cfg(test)]
mod tests {
    use super::{frames, of_user, registers};

    const LINES: [&str; 18] = [
        "CPU: 1 PID: 7 Comm: a Not tainted 6.1",
        "RIP: 0010:inner+0x10/0x20",
        "Code: 48 89 e5",
        "RSP: 0018:ffffc90000000010 EFLAGS: 00000246",
        "RAX: 000000000000002a RBX: 0000000000000001 R08: 0000000000000002",
        "Call Trace:",
        " <IRQ>",
        " ? stale+0x1/0x2",
        " caller+0x3/0x4",
        " </IRQ>",
        " <TASK>",
        " asm_exc_page_fault+0x22/0x30",
        "RIP: 0010:copy+0xa/0x10 [evdev]",
        "RSP: 0018:ffffc90000000f00 EFLAGS: 00000206",
        " driver+0xb/0xc [evdev 0123abcd]",
        "  .nr_running                    : 0",
        "RIP: 0033:0x4011f0",
        " behind+0x1/0x2",
    ];

    #[test]
    fn frames_are_what_the_kernel_is_sure_of() {
        let want = [
            "inner+0x10/0x20",
            "caller+0x3/0x4",
            "asm_exc_page_fault+0x22/0x30",
            "copy+0xa/0x10 [evdev]",
            "driver+0xb/0xc [evdev]",
        ];
        assert_eq!(frames(LINES), want);
        for no_frame in [
            " a b+0x1/0x2",
            " f+1/0x2",
            " f+0x1",
            " ? f+0x1/0x2",
            "f+0x1/0x2",
        ] {
            assert!(frames([no_frame]).is_empty(), "{no_frame}");
        }
    }

    #[test]
    fn registers_are_those_before_the_frames() {
        let got = registers(&LINES);
        let got: Vec<_> = got
            .iter()
            .map(|(name, value)| (name.as_str(), *value))
            .collect();
        let want = [
            ("R08", 2),
            ("RAX", 42),
            ("RBX", 1),
            ("RSP", 0xffff_c900_0000_0010),
        ];
        assert_eq!(got, want);
        assert!(!of_user(&LINES) && of_user(&LINES[15..]) && !of_user(&LINES[5..]));
    }
}
