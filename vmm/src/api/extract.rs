//! Reading requests: every way in which one can be wrong ends in an [`ApiError`], and none takes more than its limits.

use std::time::Duration;

use axum::body::Bytes;
use axum::extract::rejection::{PathRejection, QueryRejection};
use axum::extract::{FromRequest, FromRequestParts, Path, Query, Request};
use axum::http::header::CONTENT_TYPE;
use axum::http::request::Parts;
use http_body_util::{BodyExt, LengthLimitError, Limited};
use serde::de::DeserializeOwned;

use super::error::ApiError;

/// Largest package, in bytes: a kernel's own modules are smaller by far.
pub(super) const PACKAGE_LIMIT: usize = 8 << 20;
/// Largest JSON body, in bytes.
pub(super) const JSON_LIMIT: usize = 16 << 10;
/// How long a body may take to arrive, in seconds.
pub(super) const BODY_SECONDS: u64 = 10;
/// The deadline of an operation whose caller gave none, in milliseconds.
pub(super) const DEADLINE_MS: u64 = 5_000;
/// The longest deadline, in milliseconds.
pub(super) const LONGEST_DEADLINE_MS: u64 = 600_000;

/// A call's deadline, from its `deadline_ms`.
///
/// # Errors
/// 400 outside 1 to [`LONGEST_DEADLINE_MS`].
pub(super) fn deadline(ms: Option<u64>) -> Result<Duration, ApiError> {
    match ms.unwrap_or(DEADLINE_MS) {
        ms @ 1..=LONGEST_DEADLINE_MS => Ok(Duration::from_millis(ms)),
        ms => Err(ApiError::malformed(format_args!(
            "deadline_ms is {ms}; it must be between 1 and {LONGEST_DEADLINE_MS}"
        ))),
    }
}

/// The query's options. Unknown ones are refused, so that a misspelt `check` never applies.
#[derive(Debug)]
pub(super) struct Options<T>(pub(super) T);

impl<S: Send + Sync, T: DeserializeOwned> FromRequestParts<S> for Options<T> {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, ApiError> {
        let query: Result<Query<T>, QueryRejection> = Query::from_request_parts(parts, state).await;
        match query {
            Ok(Query(options)) => Ok(Self(options)),
            Err(wrong) => Err(ApiError::malformed(wrong.body_text())),
        }
    }
}

/// A number in the path.
#[derive(Debug)]
pub(super) struct Id(pub(super) u64);

impl<S: Send + Sync> FromRequestParts<S> for Id {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, ApiError> {
        let id: Result<Path<u64>, PathRejection> = Path::from_request_parts(parts, state).await;
        match id {
            Ok(Path(id)) => Ok(Self(id)),
            Err(wrong) => Err(ApiError::malformed(wrong.body_text())),
        }
    }
}

/// A body of bytes.
#[derive(Debug)]
pub(super) struct Octets(pub(super) Vec<u8>);

impl<S: Send + Sync> FromRequest<S> for Octets {
    type Rejection = ApiError;

    async fn from_request(request: Request, _: &S) -> Result<Self, ApiError> {
        let body = read(request, "application/octet-stream", PACKAGE_LIMIT).await?;
        Ok(Self(body.into()))
    }
}

/// A body of JSON.
#[derive(Debug)]
pub(super) struct JsonBody<T>(pub(super) T);

impl<S: Send + Sync, T: DeserializeOwned> FromRequest<S> for JsonBody<T> {
    type Rejection = ApiError;

    async fn from_request(request: Request, _: &S) -> Result<Self, ApiError> {
        let body = read(request, "application/json", JSON_LIMIT).await?;
        serde_json::from_slice(&body)
            .map(Self)
            .map_err(|wrong| ApiError::malformed(format_args!("in the body's JSON: {wrong}")))
    }
}

/// The whole body, if it is declared as `wanted`, no longer than `limit` and here in time.
async fn read(request: Request, wanted: &str, limit: usize) -> Result<Bytes, ApiError> {
    let declared = match request.headers().get(CONTENT_TYPE) {
        Some(value) => value.to_str().unwrap_or("?"),
        None => "nothing",
    };
    let essence = declared.split(';').next().unwrap_or_default().trim();
    if !essence.eq_ignore_ascii_case(wanted) {
        return Err(ApiError::wrong_type(declared, wanted));
    }
    let body = Limited::new(request.into_body(), limit).collect();
    match tokio::time::timeout(Duration::from_secs(BODY_SECONDS), body).await {
        Err(_elapsed) => Err(ApiError::slow_body(BODY_SECONDS)),
        Ok(Ok(body)) => Ok(body.to_bytes()),
        Ok(Err(wrong)) if wrong.downcast_ref::<LengthLimitError>().is_some() => {
            Err(ApiError::too_large(limit))
        }
        Ok(Err(wrong)) => Err(ApiError::malformed(format_args!(
            "its body broke off: {wrong}"
        ))),
    }
}
