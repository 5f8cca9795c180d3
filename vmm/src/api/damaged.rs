//! The API under damaged requests, in this process: whatever the path, the query, the type and the body are, the answer is one of those that are
//! promised, and a failure says why in the one form. None may be a panic of ours.

use std::sync::Arc;

use axum::body::Body;
use axum::http::{Request, header};
use http_body_util::BodyExt as _;
use hyper::service::Service as _;
use hyper_util::service::TowerToHyperService;
use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::{Index, select};
use proptest::test_runner::TestCaseResult;
use serde_json::Value;
use tokio::sync::watch;

use super::double::Double;
use super::routes::{Api, router};
use super::wire::ErrorBody;

const METHODS: [&str; 5] = ["GET", "POST", "HEAD", "DELETE", "PUT"];
const GETS: [&str; 16] = [
    "/v1/health",
    "/v1/vm",
    "/v1/kernel",
    "/v1/kernel/symbols",
    "/v1/kernel/types",
    "/v1/kernel/modules",
    "/v1/kernel/tasks",
    "/v1/kernel/log",
    "/v1/kernel/text",
    "/v1/kernel/stack",
    "/v1/kernel/disasm",
    "/v1/events",
    "/v1/updates",
    "/v1/updates/1",
    "/v1/sets",
    "/v1/times",
];
const POSTS: [&str; 10] = [
    "/v1/vm/pause",
    "/v1/vm/resume",
    "/v1/vm/power-button",
    "/v1/vm/dump",
    "/v1/vm/kill",
    "/v1/updates",
    "/v1/updates/1/revert",
    "/v1/updates/1/verify",
    "/v1/sets/some",
    "/v1/times/some",
];
const KEYS: [&str; 13] = [
    "of",
    "at",
    "name",
    "member",
    "module",
    "position",
    "count",
    "deadline_ms",
    "each",
    "check",
    "wait",
    "after",
    "unknown",
];
const VALUES: [&str; 27] = [
    "",
    "0",
    "1",
    "-1",
    "1e3",
    "1000",
    "600000",
    "600001",
    "18446744073709551615",
    "18446744073709551616",
    "0x",
    "0x10",
    "0xffffffffffffffffff",
    "ffffffff81000000",
    "true",
    "yes",
    "all",
    "cpu0",
    "cpu-1",
    "cpu99999999999999999999",
    "f",
    "f%2B0x10",
    "f%2B",
    "f%2B0xffffffffffffffff",
    "struct%20file",
    "a[4294967296].b",
    "%00%ff%c3",
];
const TYPES: [&str; 5] = [
    "application/json",
    "application/octet-stream",
    "application/json; charset=utf-8",
    ";",
    "text/plain",
];
const JSONS: [&str; 11] = [
    "{}",
    "{\"path\":\"/x\"}",
    "{\"path\":\"/x\",\"deadline_ms\":1}",
    "{\"path\":\"/x\",\"path\":\"/y\"}",
    "{\"path\":\"\\ud800\"}",
    "{\"path\":\"/\\u0000\"}",
    "{\"path\":{\"path\":[]},\"deadline_ms\":1e400}",
    "{\"deadline_ms\":-1,\"path\":\"/x\"}",
    "[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[",
    "null",
    "good",
];

/// One request, before it is known whether HTTP lets it be one.
#[derive(Clone, Debug)]
struct Damaged {
    method: &'static str,
    path: String,
    query: Option<String>,
    kind: Option<&'static str>,
    last_seen: Option<&'static str>,
    body: Vec<u8>,
}

/// Puts some bytes of a text in place of others, or takes them out.
fn changed(bytes: &mut Vec<u8>, changes: &[(Index, Option<u8>)]) {
    for (at, new) in changes {
        if bytes.is_empty() {
            return;
        }
        let at = at.index(bytes.len());
        match new {
            Some(new) => bytes[at] = *new,
            None => drop(bytes.remove(at)),
        }
    }
}

fn changes() -> impl Strategy<Value = Vec<(Index, Option<u8>)>> {
    prop_oneof![
        2 => Just(Vec::new()),
        1 => vec((any::<Index>(), any::<Option<u8>>()), 1..4),
    ]
}

fn path() -> impl Strategy<Value = (&'static str, String)> {
    let known = prop_oneof![
        select(&GETS[..]).prop_map(|path| ("GET", path)),
        select(&POSTS[..]).prop_map(|path| ("POST", path)),
    ];
    (
        known,
        prop::option::weighted(0.1, select(&METHODS[..])),
        changes(),
    )
        .prop_map(|((method, path), other, changes)| {
            let mut bytes = path.as_bytes().to_vec();
            // Most paths stay whole: what is behind a path that is none is not looked at.
            if changes.len() > 2 {
                changed(&mut bytes, &changes);
            }
            let path = String::from_utf8_lossy(&bytes).into_owned();
            (other.unwrap_or(method), path)
        })
}

fn query() -> impl Strategy<Value = String> {
    let value = prop_oneof![
        4 => select(&VALUES[..]).prop_map(str::to_owned),
        1 => "[!-~]{0,20}",
        1 => any::<u64>().prop_map(|value| value.to_string()),
        1 => (0..20_000_usize).prop_map(|len| "x".repeat(len)),
    ];
    let pair = (select(&KEYS[..]), value).prop_map(|(key, value)| format!("{key}={value}"));
    (vec(pair, 0..4), changes()).prop_map(|(pairs, changes)| {
        let mut bytes = pairs.join("&").into_bytes();
        changed(&mut bytes, &changes);
        String::from_utf8_lossy(&bytes).into_owned()
    })
}

fn request() -> impl Strategy<Value = Damaged> {
    let body = prop_oneof![
        4 => select(&JSONS[..]).prop_map(|json| json.as_bytes().to_vec()),
        1 => vec(any::<u8>(), 0..64),
        1 => (0..20_000_usize).prop_map(|len| vec![b'['; len]),
    ];
    let rest = (
        prop::option::of(query()),
        prop::option::weighted(0.9, select(&TYPES[..])),
        prop::option::weighted(0.2, select(&VALUES[..])),
    );
    (path(), rest, body, changes()).prop_map(
        |((method, path), (query, kind, last_seen), mut body, changes)| {
            changed(&mut body, &changes);
            Damaged {
                method,
                path,
                query,
                kind,
                last_seen,
                body,
            }
        },
    )
}

impl Damaged {
    /// The request; `None` where HTTP itself has no such one.
    fn build(&self) -> Option<Request<Body>> {
        let query = self.query.iter().map(|query| format!("?{query}"));
        let uri: String = std::iter::once(self.path.clone()).chain(query).collect();
        let mut request = Request::builder().method(self.method).uri(uri);
        if let Some(kind) = self.kind {
            request = request.header(header::CONTENT_TYPE, kind);
        }
        if let Some(id) = self.last_seen {
            request = request.header("last-event-id", id);
        }
        // The double's own way to panic is none of the API's.
        let body = match self.body.starts_with(b"panic") {
            true => Vec::new(),
            false => self.body.clone(),
        };
        request.body(Body::from(body)).ok()
    }
}

/// What every answer must be.
fn judge(of: &Damaged, status: u16, kind: &str, body: &[u8]) -> TestCaseResult {
    prop_assert!(
        matches!(status, 200..=202 | 400..=499),
        "{of:?}: {status}: {}",
        String::from_utf8_lossy(body)
    );
    prop_assert_eq!(kind, "application/json", "{:?}: {}", of, status);
    if of.method == "HEAD" {
        return Ok(());
    }
    let json: Result<Value, _> = serde_json::from_slice(body);
    prop_assert!(json.is_ok(), "{of:?}: {}", String::from_utf8_lossy(body));
    if status >= 400 {
        let error: Result<ErrorBody, _> = serde_json::from_slice(body);
        let error = error.map_err(|wrong| TestCaseError::fail(format!("{of:?}: {wrong}")))?;
        for part in [&error.code, &error.message, &error.cause, &error.hint] {
            prop_assert!(!part.is_empty(), "{of:?}: {error:?}");
        }
    }
    Ok(())
}

proptest! {
    #[test]
    fn damaged_requests_are_answered_as_promised(requests in vec(request(), 1..16)) {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_time()
            .build()
            .unwrap();
        let (_stop, stopped) = watch::channel(false);
        let api = TowerToHyperService::new(router(Api::new(Arc::new(Double::default()), stopped)));
        for of in requests {
            let Some(request) = of.build() else {
                continue;
            };
            let judged: TestCaseResult = runtime.block_on(async {
                let answer = api.call(request).await.unwrap();
                let status = answer.status().as_u16();
                let kind = answer.headers().get(header::CONTENT_TYPE);
                let kind = kind.map_or("", |kind| kind.to_str().unwrap()).to_owned();
                // Events have no end.
                if kind == "text/event-stream" {
                    prop_assert_eq!(status, 200);
                    return Ok(());
                }
                let body = answer.into_body().collect().await.unwrap().to_bytes();
                judge(&of, status, &kind, &body)
            });
            judged?;
        }
    }
}
