//! Does bad input get an error that names the thing and the way out, and change nothing?

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::{Command, Stdio};

use tests::guest::{Guest, Options};
use tests::stock::{self, LTS_6_1, NEWEST_6_12};

use crate::patch::apply;
use crate::witness::{SETTLE, assert_unchanged, boot_asking, wait_answer};

/// `exopatch run` with these arguments must end by itself with status `status`, and its error must hold every one of `words`.
fn run_fails(args: &[&str], status: i32, words: &[&str]) {
    let output = Command::new(stock::exopatch())
        .arg("run")
        .args(args)
        .stdin(Stdio::null())
        .output()
        .expect("exopatch starts");
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(status), "{args:?}: {said}");
    for word in words {
        assert!(
            said.contains(word),
            "{args:?} does not say '{word}': {said}"
        );
    }
}

fn text(path: &Path) -> &str {
    path.to_str().expect("paths of tests are UTF-8")
}

#[test]
fn kernels_and_configs_that_are_none() {
    let dir = tempfile::tempdir().expect("a directory");
    let file = |name: &str, bytes: &[u8]| {
        let path = dir.path().join(name);
        fs::write(&path, bytes).expect("a file");
        path
    };
    let kernel = fs::read(LTS_6_1.file("vmlinuz")).expect("a kernel");
    let truncated = file("truncated", &kernel[..100_000]);
    let header_only = file("header", &kernel[..700]);
    let empty = file("empty", b"");
    let script = file("script", b"#!/bin/sh\nexit 0\n");
    let config = file("config.toml", b"kernel = 3\n");
    let unknown = file("unknown.toml", b"kernle = \"x\"\n");
    let good = LTS_6_1.file("vmlinuz");
    let missing = dir.path().join("missing");
    let cases: &[(&[&str], &[&str])] = &[
        (&["--kernel", text(&missing)], &["missing", "No such file"]),
        (&["--kernel", text(&truncated)], &["truncated"]),
        (&["--kernel", text(&header_only)], &["header"]),
        (&["--kernel", text(&empty)], &["empty"]),
        (&["--kernel", text(&script)], &["script"]),
        (&["--kernel", text(dir.path())], &["regular file"]),
        (&["--config", text(&config)], &["config.toml", "kernel"]),
        (&["--config", text(&unknown)], &["unknown.toml", "kernle"]),
        (&["--kernel", text(&good), "--cpus", "0"], &["cpus"]),
        (&["--kernel", text(&good), "--cpus", "100000"], &["cpus"]),
        (&["--kernel", text(&good), "--memory", "1M"], &["memory"]),
        (&["--kernel", text(&good), "--memory", "much"], &["memory"]),
        (
            &["--kernel", text(&good), "--initrd", text(&missing)],
            &["missing"],
        ),
    ];
    for (args, words) in cases {
        run_fails(args, 2, words);
    }
}

#[test]
fn sockets_that_cannot_be_served() {
    let dir = tempfile::tempdir().expect("a directory");
    let kernel = LTS_6_1.file("vmlinuz");
    let live = dir.path().join("live.sock");
    let _listener = UnixListener::bind(&live).expect("a listener");
    let regular = dir.path().join("regular");
    fs::write(&regular, b"precious").expect("a file");
    let nowhere = dir.path().join("no/such/dir/api.sock");
    for (socket, words) in [
        (&live, "use"),
        (&regular, "not a socket"),
        (&nowhere, "No such file"),
    ] {
        run_fails(
            &["--kernel", text(&kernel), "--api-sock", text(socket)],
            2,
            &[words, text(socket)],
        );
    }
    assert_eq!(fs::read(&regular).expect("still there"), b"precious");
    assert!(live.exists());
}

#[test]
fn a_dead_socket_is_replaced_and_the_new_one_is_private() {
    let mut guest = Guest::boot(&Options::new(LTS_6_1).cpus(1));
    let mode = fs::metadata(guest.client.socket())
        .expect("the socket")
        .permissions()
        .mode();
    assert_eq!(mode & 0o777, 0o600);
    guest.type_line("poweroff -f");
    assert_eq!(guest.wait_end(), 0);
    let dead = guest.dir().join("dead.sock");
    drop(UnixListener::bind(&dead).expect("a listener"));
    let guest = Guest::boot(&Options::new(LTS_6_1).cpus(1).socket(dead));
    assert_eq!(
        guest.client.call(&["vm", "status"]).expect("the status")["state"],
        "running"
    );
}

#[test]
fn packages_that_do_not_fit() {
    let guest = boot_asking(&Options::new(LTS_6_1), 1);
    let good = fs::read(LTS_6_1.edition("unix_ioctl_notty")).expect("a package");
    let bad = guest.dir().join("bad.xpu");
    let cases: &[(&str, Vec<u8>)] = &[
        ("empty", Vec::new()),
        ("not an ELF file", b"hello".to_vec()),
        ("truncated", good[..good.len() / 2].to_vec()),
        ("cut in its header", good[..60].to_vec()),
        (
            "for another kernel",
            fs::read(NEWEST_6_12.edition("unix_ioctl_notty")).expect("a package"),
        ),
        (
            "names a missing symbol",
            fs::read(LTS_6_1.edition("refused_missing_symbol")).expect("a package"),
        ),
        (
            "names an ambiguous symbol",
            fs::read(LTS_6_1.edition("refused_ambiguous_symbol")).expect("a package"),
        ),
        (
            "replaces a missing function",
            fs::read(LTS_6_1.edition("refused_missing_function")).expect("a package"),
        ),
        (
            "replaces a function without fentry",
            fs::read(LTS_6_1.edition("refused_no_fentry")).expect("a package"),
        ),
    ];
    let mark = guest.console.mark();
    for (what, bytes) in cases {
        fs::write(&bad, bytes).expect("a file");
        let reply = guest.client.call(&["update", "apply", text(&bad)]);
        println!("{what}: {}", reply.json);
        assert!(!reply.refusal(what).is_empty());
        for field in ["message", "cause", "hint"] {
            assert!(
                reply.json[field]
                    .as_str()
                    .is_some_and(|text| !text.is_empty()),
                "{what}: no {field}: {reply:?}"
            );
        }
    }
    assert_unchanged(&guest, mark, SETTLE, "after refusals");
    let _ = apply(&guest, &LTS_6_1.edition("unix_ioctl_notty"));
    let _ = wait_answer(&guest, mark, 0, |answer| answer == "ENOTTY");
}

#[test]
fn a_full_arena_refuses_and_keeps_what_is_applied() {
    let guest = boot_asking(&Options::new(LTS_6_1), 1);
    let big = LTS_6_1.edition("big_data");
    let mut applied = 0;
    let refusal = loop {
        let reply = guest.client.call(&["update", "apply", text(&big)]);
        if reply.status != 0 {
            break reply;
        }
        applied += 1;
        assert!(applied < 64, "the arena has no end");
        let id = reply.json["id"].as_u64().expect("an id").to_string();
        let _ = guest
            .client
            .call(&["update", "revert", &id])
            .expect("the revert");
    };
    println!("after {applied} packages: {}", refusal.json);
    assert!(applied > 0);
    assert_eq!(refusal.refusal("an apply into a full arena"), "arena_full");
    let mark = guest.console.mark();
    assert_unchanged(&guest, mark, SETTLE, "a full arena");
}
