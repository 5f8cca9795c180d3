//! Which functions are redirected that most patchers leave alone: those without fentry site, those with little room, those that lead into their
//! own beginning?

use serde_json::Value;
use tests::guest::{Guest, Options};
use tests::stock::{LTS_6_1, NEWEST_6_12, Stock};

use crate::patch::{apply, revert};
use crate::witness::{assert_clean, one_line};

const STOCKS: [Stock; 2] = [LTS_6_1, NEWEST_6_12];

/// What becomes of a 5 that the guest writes, by way of `kstrtoint()`.
fn written(guest: &mut Guest) -> String {
    one_line(
        guest,
        "sh -c 'echo 5 >/proc/$$/oom_score_adj; cat /proc/$$/oom_score_adj'",
    )
}

/// Where the guest says that `symbol` begins.
fn address(guest: &mut Guest, symbol: &str) -> u64 {
    let line = one_line(guest, &format!("grep ' {symbol}$' /proc/kallsyms"));
    let (address, _) = line.split_once(' ').expect("an address and more");
    u64::from_str_radix(address, 16).expect("hexadecimal")
}

/// The refusal of a package, with its code and its message.
fn refused(guest: &Guest, stock: Stock, package: &str) -> (String, String) {
    let path = stock.edition(package);
    let path = path.to_str().expect("paths of tests are UTF-8");
    let reply = guest.client.call(&["update", "apply", path]);
    let code = reply.refusal(package).to_owned();
    let cause = reply.json["cause"].as_str().unwrap_or_default().to_owned();
    println!("{stock:?}: {package}: {code}: {cause}");
    (code, cause)
}

#[test]
fn a_function_without_fentry_is_redirected_and_reverted() {
    for stock in STOCKS {
        let mut guest = Guest::boot(&Options::new(stock).cpus(2));
        assert_eq!(written(&mut guest), "5", "{stock:?}");
        for _ in 0..3 {
            let id = apply(&guest, &stock.edition("kstrtoint_more"));
            assert_eq!(written(&mut guest), "6", "{stock:?}");
            let id = id.to_string();
            let state = guest.client.call(&["update", "verify", &id]);
            assert_eq!(
                state.expect("the verification")["intact"],
                Value::Bool(true)
            );
            revert(&guest, id.parse().expect("a number"));
            assert_eq!(written(&mut guest), "5", "{stock:?}");
        }
        assert_clean(&mut guest);
    }
}

#[test]
fn rules_choose_the_calls_of_a_function_without_fentry() {
    for stock in STOCKS {
        let mut guest = Guest::boot(&Options::new(stock).cpus(2));
        let path = stock.edition("kstrtoint_more");
        let path = path.to_str().expect("paths of tests are UTF-8");
        for (rule, want) in [("base = 16", "5"), ("base = 0", "6")] {
            let update = guest
                .client
                .call(&["update", "apply", path, "--when", rule]);
            let update = update.expect("the apply");
            assert_eq!(written(&mut guest), want, "{stock:?}, when {rule}");
            revert(&guest, update["id"].as_u64().expect("an id"));
        }
        assert_eq!(written(&mut guest), "5", "{stock:?}");
        assert_clean(&mut guest);
    }
}

/// Functions with a fentry site whose beginning cannot give way to a jump. Beyond them only initialisation code and patched places are refused.
#[test]
fn functions_that_begin_where_a_jump_cannot_be_are_refused() {
    for (stock, short) in [
        (LTS_6_1, "function_too_short"),
        // It has the room, but all that is in it is a place that the kernel knows.
        (NEWEST_6_12, "patch_site_in_the_way"),
    ] {
        let mut guest = Guest::boot(&Options::new(stock));
        let (code, cause) = refused(&guest, stock, "refused_branch_into");
        assert_eq!(code, "branch_into_displaced_code", "{stock:?}: {cause}");
        let begin = address(&mut guest, "hrtimer_cancel");
        let place = |what: &str| {
            let (_, at) = cause.split_once(what).expect("where");
            let at = at.trim_start_matches("0x");
            let end = at.find(|c: char| !c.is_ascii_hexdigit());
            let at = &at[..end.unwrap_or(at.len())];
            u64::from_str_radix(at, 16).expect("hexadecimal")
        };
        let (from, to) = (place(" leads from "), place(" to "));
        assert!((begin + 5..begin + 16).contains(&to), "{begin:x}: {cause}");
        assert!((begin..begin + 0x80).contains(&from), "{begin:x}: {cause}");
        let (code, cause) = refused(&guest, stock, "refused_too_short");
        assert_eq!(code, short, "{stock:?}: {cause}");
        assert_clean(&mut guest);
    }
}

#[test]
fn a_function_whose_caller_relies_on_registers_is_refused() {
    for stock in STOCKS {
        let mut guest = Guest::boot(&Options::new(stock));
        let (code, cause) = refused(&guest, stock, "refused_relied_on");
        assert_eq!(code, "callers_rely_on_registers", "{stock:?}: {cause}");
        // The caller keeps its own argument there, or a copy of it.
        let caller = cause.split_once("its caller at 0x").expect("a caller").1;
        let caller = caller.split(' ').next().unwrap_or_default();
        let caller = u64::from_str_radix(caller, 16).expect("hexadecimal");
        let first = address(&mut guest, "xas_load");
        assert!(
            (first..first + 0x40).contains(&caller),
            "{first:x}: {cause}"
        );
        assert!(cause.contains("(rdi)") || cause.contains("(r8)"), "{cause}");
        let (code, cause) = refused(&guest, stock, "refused_assembly");
        assert_eq!(code, "function_without_fentry", "{stock:?}: {cause}");
        assert!(cause.contains("assembly"), "{cause}");
        assert_clean(&mut guest);
    }
}
