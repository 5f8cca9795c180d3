//! The API's one form of failure: a status code and a body with a code, a message, its cause and a hint.

use std::fmt;

use axum::Json;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use patcher::rule::RuleError;

use super::wire::ErrorBody;

/// A failed call.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ApiError {
    /// HTTP status.
    pub status: StatusCode,
    /// What the client reads.
    pub body: ErrorBody,
}

impl ApiError {
    /// A failure with all its parts.
    pub fn new(
        status: StatusCode,
        code: impl Into<String>,
        message: impl Into<String>,
        cause: impl Into<String>,
        hint: impl Into<String>,
    ) -> Self {
        Self {
            status,
            body: ErrorBody {
                code: code.into(),
                message: message.into(),
                cause: cause.into(),
                hint: hint.into(),
            },
        }
    }

    /// 400: the request itself makes no sense.
    pub fn malformed(what: impl fmt::Display) -> Self {
        Self::new(
            StatusCode::BAD_REQUEST,
            "malformed_request",
            "the request could not be read",
            what.to_string(),
            "GET /openapi.json describes every call, its options and its body",
        )
    }

    /// 400: a rule that cannot be read.
    pub fn rule(error: &RuleError) -> Self {
        Self::new(
            StatusCode::BAD_REQUEST,
            "rule_malformed",
            "the rule could not be read",
            error.to_string(),
            "a rule is tests as `uid = 1000`, `cmd in {1, 5..9}`, `share 10%` or `comm = \"nginx*\"`, joined by and, or, not and parentheses",
        )
    }

    /// 404: there is no such call.
    pub fn no_route(method: impl fmt::Display, path: &str) -> Self {
        Self::new(
            StatusCode::NOT_FOUND,
            "not_found",
            format!("there is nothing at {path}"),
            format!("{method} {path} is not a call of this API"),
            "GET /openapi.json lists all calls",
        )
    }

    /// 405: the path exists, not with this method.
    pub fn wrong_method(method: impl fmt::Display, path: &str) -> Self {
        Self::new(
            StatusCode::METHOD_NOT_ALLOWED,
            "method_not_allowed",
            format!("{path} cannot be called with {method}"),
            "the path exists, with other methods",
            "the Allow header of this answer lists the methods",
        )
    }

    /// 404: no update has this number.
    pub fn no_update(id: u64) -> Self {
        Self::new(
            StatusCode::NOT_FOUND,
            "no_such_update",
            format!("there is no update {id}"),
            "no update with this number was handed to this VM",
            "GET /v1/updates (exopatch update list) shows all updates",
        )
    }

    /// 408: the body did not arrive in time.
    pub fn slow_body(seconds: u64) -> Self {
        Self::new(
            StatusCode::REQUEST_TIMEOUT,
            "body_timeout",
            "the request's body did not arrive in time",
            format!("the client had {seconds} s to send it"),
            "send the body without stopping, from a file on this host",
        )
    }

    /// 413: the body is larger than the call allows.
    pub fn too_large(limit: usize) -> Self {
        Self::new(
            StatusCode::PAYLOAD_TOO_LARGE,
            "body_too_large",
            "the request's body is too large",
            format!("this call takes at most {limit} bytes"),
            "check that the right file was sent; an update package is an .xpu made by exopatch build",
        )
    }

    /// 415: the body is of another type than the call takes.
    pub fn wrong_type(got: &str, wanted: &str) -> Self {
        Self::new(
            StatusCode::UNSUPPORTED_MEDIA_TYPE,
            "wrong_content_type",
            format!("the request's body is declared as {got:?}"),
            format!("this call takes {wanted}"),
            format!("send the header Content-Type: {wanted}"),
        )
    }

    /// 500: a defect of the server.
    pub fn internal(what: impl fmt::Display) -> Self {
        Self::new(
            StatusCode::INTERNAL_SERVER_ERROR,
            "internal",
            "the call failed by a defect of exopatch",
            what.to_string(),
            "the VM runs on; please report this with the VMM's log",
        )
    }

    /// 503: the server stops, or cannot take more work.
    pub fn busy(what: impl fmt::Display) -> Self {
        Self::new(
            StatusCode::SERVICE_UNAVAILABLE,
            "busy",
            "exopatch cannot take this call now",
            what.to_string(),
            "try again when the operations before it are done (GET /v1/updates)",
        )
    }
}

impl fmt::Display for ApiError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.body.message, self.body.cause)
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        (self.status, Json(self.body)).into_response()
    }
}
