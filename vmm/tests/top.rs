//! `exopatch top` on a terminal: whichever way it ends, the terminal is as it was.

use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{Mode, OFlags, open};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{Termios, tcgetattr};

const SOON: Duration = Duration::from_secs(30);
const TO_OTHER_SCREEN: &str = "\x1b[?1049h\x1b[?25l";
const TO_OWN_SCREEN: &str = "\x1b[?25h\x1b[?1049l";

/// Answers the calls of a view until the listener's other end is shut.
fn serve(listener: &UnixListener) {
    for stream in listener.incoming() {
        let Ok(stream) = stream else { return };
        let mut stream = BufReader::new(stream);
        let mut lines = Vec::new();
        while lines.last().is_none_or(|line: &String| line != "\r\n") {
            let mut line = String::new();
            stream.read_line(&mut line).expect("a request");
            lines.push(line);
        }
        let body = match lines[0].split(' ').nth(1) {
            Some("/v1/vm") => {
                r#"{"state":"running","vcpus":2,"memory_mib":1,"uptime_ms":7,"kernel":"k","cmdline":""}"#
            }
            Some("/v1/updates") => r#"{"updates":[]}"#,
            Some("/v1/calls") => r#"{"at_ms":1,"calls":[{"function":"unix_ioctl","calls":5}]}"#,
            other => panic!("{other:?} was called"),
        };
        let head = "HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length:";
        let answer = format!("{head} {}\r\n\r\n{body}", body.len());
        stream.get_mut().write_all(answer.as_bytes()).expect("sent");
    }
}

/// A terminal: our end, and the one of programs.
fn terminal() -> (File, OwnedFd) {
    let ours = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).expect("a terminal");
    grantpt(&ours).expect("granted");
    unlockpt(&ours).expect("unlocked");
    let name = ptsname(&ours, Vec::new()).expect("its name");
    let theirs = open(name, OFlags::RDWR | OFlags::NOCTTY, Mode::empty()).expect("its other end");
    (ours.into(), theirs)
}

/// Reads what is shown until `enough` of it is.
fn read_until(terminal: &mut File, shown: &mut String, enough: impl Fn(&str) -> bool) {
    let limit = Instant::now() + SOON;
    while !enough(shown) {
        assert!(Instant::now() < limit, "only {shown:?} was shown");
        let wait = Timespec {
            tv_sec: 0,
            tv_nsec: 100_000_000,
        };
        let mut ready = [PollFd::new(terminal, PollFlags::IN)];
        if poll(&mut ready, Some(&wait)).expect("a poll") > 0 {
            let mut bytes = [0; 4096];
            let count = terminal.read(&mut bytes).expect("text");
            shown.push_str(&String::from_utf8_lossy(&bytes[..count]));
        }
    }
}

/// What of a terminal's settings programs change.
fn settings(terminal: &OwnedFd) -> String {
    let Termios {
        input_modes,
        output_modes,
        control_modes,
        local_modes,
        ..
    } = tcgetattr(terminal).expect("settings");
    format!("{input_modes:?} {output_modes:?} {control_modes:?} {local_modes:?}")
}

/// Watches on a terminal, has `end` end that, and compares how it ended: its exit status, or the signal.
fn check(what: &str, status: Result<i32, i32>, end: impl Fn(&mut File, &Child)) {
    let directory = tempfile::tempdir().expect("a directory");
    let socket = directory.path().join("api");
    let listener = UnixListener::bind(&socket).expect("a socket");
    std::thread::spawn(move || serve(&listener));
    let (mut ours, theirs) = terminal();
    let before = settings(&theirs);
    let stdio = || Stdio::from(theirs.try_clone().expect("a descriptor"));
    let mut child = Command::new(env!("CARGO_BIN_EXE_exopatch"))
        .arg("--api-sock")
        .arg(&socket)
        .args(["top", "--interval", "50ms"])
        .stdin(stdio())
        .stdout(stdio())
        .stderr(stdio())
        .spawn()
        .expect("exopatch starts");
    let mut shown = String::new();
    read_until(&mut ours, &mut shown, |shown| {
        shown.matches("unix_ioctl").count() > 2
    });
    assert_ne!(settings(&theirs), before, "{what}: keys are not taken");
    assert!(shown.starts_with(TO_OTHER_SCREEN), "{what}: {shown:?}");
    assert!(!shown.contains(TO_OWN_SCREEN), "{what}: {shown:?}");
    if what == "nobody answers" {
        std::fs::remove_file(&socket).expect("removed");
    }
    end(&mut ours, &child);
    read_until(&mut ours, &mut shown, |shown| shown.contains(TO_OWN_SCREEN));
    let ended = child.wait().expect("its end");
    let ended = ended.code().ok_or(ended.signal().unwrap_or_default());
    assert_eq!(ended, status, "{what}: {shown:?}");
    assert_eq!(settings(&theirs), before, "{what}");
    assert_eq!(shown.matches(TO_OWN_SCREEN).count(), 1, "{what}: {shown:?}");
}

fn signal(name: &str, child: &Child) {
    let pid = child.id().to_string();
    let sent = Command::new("kill").args(["-s", name, &pid]).status();
    assert!(sent.expect("kill starts").success());
}

#[test]
fn the_terminal_is_left_as_it_was_whichever_way_it_ends() {
    let press = |key: &'static [u8]| {
        move |terminal: &mut File, _: &Child| terminal.write_all(key).expect("typed")
    };
    check("q", Ok(0), press(b"q"));
    check("Ctrl-C", Ok(0), press(b"x\x03"));
    for name in ["TERM", "HUP", "INT"] {
        check(name, Ok(0), |_, child| signal(name, child));
    }
    check("QUIT", Err(3), |_, child| signal("QUIT", child));
    check("SEGV", Err(11), |_, child| signal("SEGV", child));
    check("nobody answers", Ok(3), |_, _| {});
}
