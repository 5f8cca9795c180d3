//! The API as its clients see it: real connections to a real socket, with a double in place of the machine.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use serde_json::Value;

use super::double::Double;
use super::extract::{JSON_LIMIT, PACKAGE_LIMIT};
use super::machine::Machine;
use super::server::{Listening, Server};
use super::wire::ErrorBody;
use crate::events::EventKind;

/// A served double.
struct Served {
    double: Arc<Double>,
    server: Server,
    _directory: tempfile::TempDir,
}

impl Served {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let double = Arc::new(Double::default());
        let listening = Listening::open(&directory.path().join("api")).unwrap();
        let server = listening.serve(double.clone()).unwrap();
        Self {
            double,
            server,
            _directory: directory,
        }
    }

    fn connect(&self) -> UnixStream {
        let stream = UnixStream::connect(self.server.path()).unwrap();
        stream
            .set_read_timeout(Some(Duration::from_secs(20)))
            .unwrap();
        stream
    }

    /// Sends `raw`, reads until the server closes, and gives status, head and body.
    fn exchange(&self, raw: &[u8]) -> (u16, String, String) {
        let mut stream = self.connect();
        // The server may answer and close before it has read everything.
        drop(stream.write_all(raw));
        let mut answer = Vec::new();
        drop(stream.read_to_end(&mut answer));
        let answer = String::from_utf8(answer).unwrap();
        let (head, body) = answer.split_once("\r\n\r\n").unwrap_or((&answer, ""));
        let status = head
            .split(' ')
            .nth(1)
            .map_or(0, |code| code.parse().unwrap());
        (status, head.to_ascii_lowercase(), body.to_owned())
    }

    fn call(&self, line: &str, headers: &[&str], body: &[u8]) -> (u16, String, String) {
        let mut raw = format!("{line} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n");
        for header in headers {
            raw.push_str(header);
            raw.push_str("\r\n");
        }
        raw.push_str(&format!("Content-Length: {}\r\n\r\n", body.len()));
        let mut raw = raw.into_bytes();
        raw.extend_from_slice(body);
        self.exchange(&raw)
    }

    /// Calls, and compares the status, the error's code (or the state of what comes back) and a part of the answer.
    fn check(&self, line: &str, kind: &str, body: &[u8], status: u16, code: &str, part: &str) {
        let header = format!("Content-Type: {kind}");
        let headers: &[&str] = if kind.is_empty() { &[] } else { &[&header] };
        let (got, head, text) = self.call(line, headers, body);
        assert_eq!(got, status, "{line}: {text}");
        let json: Value =
            serde_json::from_str(&text).unwrap_or_else(|e| panic!("{line}: {e}: {text}"));
        if status >= 400 {
            let error: ErrorBody = serde_json::from_value(json.clone()).unwrap();
            for part in [&error.message, &error.cause, &error.hint] {
                assert!(!part.is_empty(), "{line}: {error:?}");
            }
        }
        let named = json.get("code").or_else(|| json.get("state"));
        assert_eq!(
            named.and_then(Value::as_str).unwrap_or(""),
            code,
            "{line}: {text}"
        );
        assert!(
            head.contains(part) || text.contains(part),
            "{line}: no {part:?} in {head} {text}"
        );
    }
}

const XPU: &str = "application/octet-stream";
const JSON: &str = "application/json";

#[test]
fn every_call_has_its_status_and_body() {
    let api = Served::new();
    api.check("GET /v1/health", "", b"", 200, "", "\"ok\"");
    api.check("GET /v1/vm", "", b"", 200, "running", "\"vcpus\":2");
    api.check("POST /v1/vm/pause", "", b"", 200, "", "\"changed\":true");
    api.check(
        "POST /v1/vm/pause?deadline_ms=9",
        "",
        b"",
        200,
        "",
        "\"changed\":false",
    );
    api.check("GET /v1/vm", "", b"", 200, "paused", "");
    api.check("POST /v1/vm/resume", "", b"", 200, "", "\"changed\":true");
    api.check(
        "POST /v1/vm/power-button",
        "",
        b"",
        202,
        "",
        "\"heard\":true",
    );
    api.check(
        "POST /v1/vm/dump",
        JSON,
        b"{\"path\":\"/x\"}",
        201,
        "",
        "/x",
    );
    api.check("GET /v1/kernel", "", b"", 200, "", "00ff");
    api.check(
        "POST /v1/updates?name=a.xpu",
        XPU,
        b"good",
        201,
        "applied",
        "location: /v1/updates/1",
    );
    api.check(
        "POST /v1/updates?check=true",
        XPU,
        b"good",
        200,
        "checked",
        "",
    );
    api.check(
        "POST /v1/updates?wait=false",
        XPU,
        b"good",
        202,
        "queued",
        "location: /v1/updates/3",
    );
    api.check("GET /v1/updates", "", b"", 200, "", "a.xpu");
    api.check("GET /v1/updates/1", "", b"", 200, "applied", "");
    api.check("GET /v1/calls", "", b"", 200, "", "\"calls\":7");
    api.check(
        "POST /v1/updates/1/verify",
        "",
        b"",
        200,
        "",
        "\"intact\":true",
    );
    api.check("POST /v1/updates/1/revert", "", b"", 200, "reverted", "");
    api.check(
        "POST /v1/updates/1/revert?wait=false",
        "",
        b"",
        202,
        "reverting",
        "",
    );
    api.check(
        "GET /openapi.json",
        "",
        b"",
        200,
        "",
        "/v1/updates/{id}/revert",
    );
    api.check("POST /v1/vm/kill", "", b"", 202, "running", "");
    let head = api.call("HEAD /v1/vm", &[], b"");
    assert_eq!((head.0, head.2.as_str()), (200, ""));
}

#[test]
fn metrics_are_text_that_tells_what_is_not_known() {
    let api = Served::new();
    let _ = api.call(
        "POST /v1/updates",
        &["Content-Type: application/octet-stream"],
        b"good",
    );
    let (status, head, text) = api.call("GET /metrics", &[], b"");
    assert_eq!(status, 200, "{text}");
    let kind = "content-type: text/plain; version=0.0.4; charset=utf-8";
    assert!(head.contains(kind), "{head}");
    let known = [
        "exopatch_calls_total{function=\"f\",edition=\"original\"} 7",
        "exopatch_arena_used_bytes 64",
    ];
    let always = [
        "exopatch_updates{state=\"applied\"} 1",
        "exopatch_updates{state=\"broken\"} 0",
        "exopatch_editions{state=\"draining\"} 0",
        "exopatch_pauses_total{by=\"user\"} 1",
        "exopatch_pause_seconds_sum 1.000300",
        "exopatch_pause_seconds_count 2",
        "exopatch_last_pause_seconds 0.000300",
        "exopatch_vcpus 2",
        "exopatch_uptime_seconds 0.007000",
    ];
    let has = |text: &str, line: &str| text.lines().any(|it| it == line);
    for line in always.iter().chain(&known) {
        assert!(has(&text, line), "no {line} in {text}");
    }
    let unknown = |flag: &AtomicBool, why: &str| {
        flag.store(true, Ordering::Relaxed);
        let (status, _, text) = api.call("GET /metrics", &[], b"");
        flag.store(false, Ordering::Relaxed);
        assert_eq!(status, 200, "{text}");
        assert!(always.iter().all(|line| has(&text, line)), "{text}");
        assert!(!known.iter().any(|line| has(&text, line)), "{text}");
        let why = format!("# calls and the arena are not known now: {why}");
        assert!(has(&text, &why), "{text}");
    };
    unknown(&api.double.busy, "an operation is under way");
    unknown(&api.double.ended, "c");
}

#[test]
fn every_view_of_the_kernel_has_its_call() {
    let api = Served::new();
    let good = |call: &str, part: &str| {
        let line = format!("GET /v1/kernel/{call}");
        api.check(&line, "", b"", 200, "", part);
        api.check(&line, "", b"", 200, "", "\"paused_us\":3");
    };
    good("symbols", "\"symbols\":[]");
    good("symbols?of=unix_ioctl", "\"name\":\"unix_ioctl\"");
    good("symbols?of=0x10", "\"symbol\":\"f\"");
    good("types?name=struct&member=file", "\"name\":\"struct file\"");
    good("modules?deadline_ms=7", "\"modules\":[]");
    good("tasks", "\"unowned_stacks\":[]");
    good("log", "\"console_level\":7");
    good("text", "\"compared\":0");
    good("text?each=true", "\"compared\":1");
    good("stack", "\"reliable\":0");
    good("stack?of=cpu0", "\"reliable\":0");
    good("stack?at=f%2B0x10&count=2", "\"reliable\":0");
    good("disasm?of=f%2B0x10", "\"function\":\"f+0x10\"");
    let bad = |call: &str, status: u16, code: &str, part: &str| {
        api.check(
            &format!("GET /v1/kernel/{call}"),
            "",
            b"",
            status,
            code,
            part,
        );
    };
    let malformed = "malformed_request";
    bad("symbols?of=0xg", 400, "no_address", "0xg");
    bad("types", 400, malformed, "name");
    bad(
        "modules?deadline_ms=0",
        400,
        malformed,
        "between 1 and 600000",
    );
    bad("tasks?of=1", 400, malformed, "unknown field");
    bad("log?deadline_ms=x", 400, malformed, "deadline_ms");
    bad("text?each=maybe", 400, malformed, "each");
    bad("stack?of=cpu", 400, "no_stack_owner", "cpuN");
    bad("stack?of=9", 404, "no_such_task", "");
    bad("stack?at=f&of=1", 400, malformed, "of and at");
    bad("stack?count=1", 400, malformed, "need at");
    bad("stack?at=f&count=0", 400, "count_out_of_range", "1 to 1000");
    bad("disasm", 400, malformed, "of");
    bad("disasm?of=f%2Bx", 400, "no_address", "f+x");
    bad("disasm?of=f&position=9", 404, "no_such_position", "");
    bad("nothing", 404, "not_found", "");
}

#[test]
fn a_call_that_is_none_says_what_is_wrong() {
    let api = Served::new();
    api.check("GET /", "", b"", 404, "not_found", "GET / is not a call");
    api.check("GET /v1/nothing", "", b"", 404, "not_found", "");
    api.check(
        "DELETE /v1/vm",
        "",
        b"",
        405,
        "method_not_allowed",
        "allow: get,head",
    );
    api.check(
        "GET /v1/vm/pause",
        "",
        b"",
        405,
        "method_not_allowed",
        "allow: post",
    );
}

#[test]
fn a_wrong_deadline_says_what_is_wrong() {
    let api = Served::new();
    let malformed = "malformed_request";
    api.check(
        "POST /v1/vm/pause?deadline_ms=soon",
        "",
        b"",
        400,
        malformed,
        "deadline_ms",
    );
    api.check(
        "POST /v1/vm/pause?deadline_ms=0",
        "",
        b"",
        400,
        malformed,
        "between 1 and 600000",
    );
    api.check(
        "POST /v1/vm/pause?deadline_ms=600001",
        "",
        b"",
        400,
        malformed,
        "",
    );
    api.check(
        "POST /v1/vm/pause?deadline=1",
        "",
        b"",
        400,
        malformed,
        "unknown field",
    );
}

#[test]
fn a_wrong_call_for_updates_says_what_is_wrong() {
    let api = Served::new();
    let malformed = "malformed_request";
    api.check("GET /v1/updates/one", "", b"", 400, malformed, "one");
    for (call, body) in [
        ("POST /v1/updates?clone=a", &b"good"[..]),
        ("POST /v1/updates?clone=a,,b", b""),
    ] {
        api.check(call, XPU, body, 400, malformed, "clone must be");
    }
    api.check(
        "GET /v1/updates/9",
        "",
        b"",
        404,
        "no_such_update",
        "exopatch update list",
    );
    api.check(
        "POST /v1/updates/9/revert",
        "",
        b"",
        404,
        "no_such_update",
        "",
    );
    api.check(
        "POST /v1/updates/9/verify",
        "",
        b"",
        404,
        "no_such_update",
        "",
    );
    api.check(
        "POST /v1/updates?chekc=true",
        XPU,
        b"good",
        400,
        malformed,
        "chekc",
    );
    api.check(
        "POST /v1/updates?name=a%0ab",
        XPU,
        b"good",
        400,
        malformed,
        "control characters",
    );
    api.check(
        "POST /v1/updates",
        "",
        b"good",
        415,
        "wrong_content_type",
        "Content-Type: application/oct",
    );
    api.check(
        "POST /v1/updates",
        JSON,
        b"{}",
        415,
        "wrong_content_type",
        "",
    );
    api.check("POST /v1/updates", XPU, b"refuse", 422, "wrong_kernel", "");
    api.check("POST /v1/updates", XPU, b"late", 504, "not_quiescent", "");
    api.check("POST /v1/updates", XPU, b"panic", 500, "internal", "");
    api.check("GET /v1/vm", "", b"", 200, "running", "");
    api.check(
        "POST /v1/updates",
        XPU,
        &vec![0; PACKAGE_LIMIT + 1],
        413,
        "body_too_large",
        "",
    );
}

#[test]
fn a_wrong_body_says_what_is_wrong() {
    let api = Served::new();
    let malformed = "malformed_request";
    let json_cases: [(&[u8], u16, &str, &str); 6] = [
        (b"", 400, malformed, "EOF"),
        (b"{\"path\":", 400, malformed, "EOF"),
        (b"{\"path\":1}", 400, malformed, "expected a string"),
        (
            b"{\"path\":\"/x\",\"y\":1}",
            400,
            malformed,
            "unknown field",
        ),
        (b"{\"path\":\"x\"}", 400, malformed, "absolute"),
        (&[b' '; JSON_LIMIT + 1], 413, "body_too_large", ""),
    ];
    for (body, status, code, part) in json_cases {
        api.check(
            "POST /v1/vm/dump",
            "application/json; charset=utf-8",
            body,
            status,
            code,
            part,
        );
    }
}

#[test]
fn an_ended_guest_takes_no_calls() {
    let api = Served::new();
    api.double.ended.store(true, Ordering::Relaxed);
    for call in ["pause", "resume", "kill", "power-button"] {
        api.check(
            &format!("POST /v1/vm/{call}"),
            "",
            b"",
            409,
            "guest_ended",
            "",
        );
    }
}

#[test]
fn what_is_not_http_is_answered_and_cut_off() {
    let api = Served::new();
    assert_eq!(api.exchange(b"\x16\x03\x01\x02\x00\r\n\r\n").0, 400);
    assert_eq!(
        api.exchange(b"GET /v1/vm HTTP/1.1\r\nConnection: close\r\n\r\n")
            .0,
        200,
        "needs no Host on a unix socket"
    );
    let long = format!("GET /v1/vm HTTP/1.1\r\nX: {}\r\n\r\n", "y".repeat(64 << 10));
    assert_eq!(api.exchange(long.as_bytes()).0, 431);
    // The head never ends: the server gives up on it, and serves others meanwhile.
    let began = Instant::now();
    let mut slow = api.connect();
    slow.write_all(b"GET /v1/vm HT").unwrap();
    api.check("GET /v1/vm", "", b"", 200, "running", "");
    let mut rest = Vec::new();
    drop(slow.read_to_end(&mut rest));
    assert!(began.elapsed() < Duration::from_secs(15));
    // Neither does this body; the client gets to know why.
    let stuck = b"POST /v1/updates HTTP/1.1\r\nContent-Type: application/octet-stream\r\nConnection: close\r\nContent-Length: 9\r\n\r\nabc";
    let (status, _, text) = api.exchange(stuck);
    assert!(
        status == 408 && text.contains("body_timeout"),
        "{status} {text}"
    );
}

#[test]
fn a_client_that_leaves_ends_no_operation() {
    let api = Served::new();
    let mut stream = api.connect();
    stream
        .write_all(b"POST /v1/updates HTTP/1.1\r\nHost: x\r\nContent-Type: application/octet-stream\r\nContent-Length: 4\r\n\r\ngood")
        .unwrap();
    drop(stream);
    let deadline = Instant::now() + Duration::from_secs(10);
    while api.double.updates().is_empty() {
        assert!(
            Instant::now() < deadline,
            "the operation was lost with its client"
        );
        std::thread::yield_now();
    }
}

#[test]
fn events_are_replayed_followed_and_ended() {
    let api = Served::new();
    let events = api.double.events();
    events.publish(EventKind::Started);
    events.publish(EventKind::PowerButton);
    let (status, _, text) = api.call("GET /v1/events", &["Last-Event-ID: x"], b"");
    assert!(
        status == 400 && text.contains("malformed_request"),
        "{text}"
    );

    let read_from = |header: &str, query: &str| {
        let mut stream = api.connect();
        let raw = format!("GET /v1/events{query} HTTP/1.1\r\nHost: x\r\n{header}\r\n");
        stream.write_all(raw.as_bytes()).unwrap();
        stream
    };
    let mut streams = [
        read_from("Last-Event-ID: 1\r\n", ""),
        read_from("", "?after=0"),
        read_from("Last-Event-ID: 2\r\n", "?after=0"),
    ];
    // Heads are here, so all three follow.
    let mut texts = [const { Vec::new() }; 3];
    for (stream, text) in streams.iter_mut().zip(&mut texts) {
        let mut byte = [0];
        while !text.ends_with(b"\r\n\r\n") {
            stream.read_exact(&mut byte).unwrap();
            text.push(byte[0]);
        }
    }
    events.publish(EventKind::LeftPaused);
    let path = api.server.path().to_owned();
    drop(api.server);
    assert!(!path.exists());
    let parts = [
        "2\nevent: power-button",
        "1\nevent: started",
        "3\nevent: left-paused",
    ];
    for ((stream, text), first) in streams.iter_mut().zip(&mut texts).zip(parts) {
        stream.read_to_end(text).unwrap();
        let text = String::from_utf8(text.clone())
            .unwrap()
            .replace("\r\n", "\n");
        assert!(text.contains("text/event-stream"));
        let (_, sent) = text.split_once("id: ").unwrap();
        assert!(sent.starts_with(first), "{first:?} is not first in {text}");
        assert!(text.contains("\"kind\":\"left-paused\""), "{text}");
    }
}

#[test]
fn curl_can_talk_to_it() {
    let api = Served::new();
    let socket: PathBuf = api.server.path().to_owned();
    let run = std::process::Command::new("curl")
        .args(["-sS", "--unix-socket"])
        .arg(&socket)
        .args([
            "-w",
            "%{http_code}",
            "-H",
            "Content-Type: application/octet-stream",
        ])
        .args(["--data-binary", "good", "http://exopatch/v1/updates"])
        .output();
    match run {
        Ok(output) => {
            let text = String::from_utf8(output.stdout).unwrap();
            assert!(text.ends_with("201") && text.contains("applied"), "{text}");
        }
        // The same exchange is made by hand in the other tests.
        Err(missing) => assert_eq!(missing.kind(), std::io::ErrorKind::NotFound),
    }
}
