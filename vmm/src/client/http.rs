//! One HTTP call over the API socket.

use std::fmt::Display;
use std::time::Duration;

use http_body_util::{BodyExt, Full, Limited};
use hyper::body::{Bytes, Incoming};
use hyper::{Method, Request, Response};
use hyper_util::rt::TokioIo;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::net::UnixStream;

use super::{Client, Failure};
use crate::api::wire::ErrorBody;

/// Largest answer that is read: all symbols of a large kernel are some twenty megabytes.
const ANSWER_LIMIT: usize = 128 << 20;
/// What a call may take beyond the deadline that it carries: other operations may be before it, and the first one reads
/// the kernel's image.
pub(super) const MARGIN: Duration = Duration::from_secs(120);

/// A call to make.
#[derive(Debug)]
pub(super) struct Call {
    pub(super) method: Method,
    /// Path and query.
    pub(super) target: String,
    pub(super) content_type: &'static str,
    pub(super) body: Vec<u8>,
    /// When to give up on the server; `None` waits for as long as it is connected.
    pub(super) patience: Option<Duration>,
}

impl Call {
    pub(super) fn get(target: impl Into<String>) -> Self {
        Self {
            method: Method::GET,
            target: target.into(),
            content_type: "",
            body: Vec::new(),
            patience: Some(MARGIN),
        }
    }

    pub(super) fn post(target: impl Into<String>) -> Self {
        Self {
            method: Method::POST,
            ..Self::get(target)
        }
    }

    pub(super) fn delete(target: impl Into<String>) -> Self {
        Self {
            method: Method::DELETE,
            ..Self::get(target)
        }
    }

    /// Options with a value, as the query.
    pub(super) fn query(mut self, options: &[(&str, Option<String>)]) -> Self {
        for (name, value) in options {
            let Some(value) = value else { continue };
            self.target
                .push(if self.target.contains('?') { '&' } else { '?' });
            self.target.push_str(name);
            self.target.push('=');
            self.target.push_str(&percent_encode(value));
        }
        self
    }

    /// A deadline, as the query and for our own patience.
    pub(super) fn deadline(mut self, deadline: Duration) -> Self {
        self.patience = Some(deadline.saturating_add(MARGIN));
        self.query(&[("deadline_ms", Some(deadline.as_millis().to_string()))])
    }

    pub(super) fn body(mut self, content_type: &'static str, body: Vec<u8>) -> Self {
        (self.content_type, self.body) = (content_type, body);
        self
    }

    pub(super) fn json(self, value: &impl Serialize) -> Result<Self, Failure> {
        let body = serde_json::to_vec(value).map_err(|cause| Failure::Output(cause.into()))?;
        Ok(self.body("application/json", body))
    }
}

/// RFC 3986, section 2.1: everything but the unreserved characters.
pub(super) fn percent_encode(text: &str) -> String {
    let mut encoded = String::with_capacity(text.len());
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) {
            encoded.push(char::from(byte));
        } else {
            encoded.push_str(&format!("%{byte:02X}"));
        }
    }
    encoded
}

impl Client {
    /// Runs `work` on a runtime of its own.
    pub(super) fn block_on<T>(
        &self,
        work: impl Future<Output = Result<T, Failure>>,
    ) -> Result<T, Failure> {
        tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(|cause| self.cannot_connect(cause))?
            .block_on(work)
    }

    fn cannot_connect(&self, cause: std::io::Error) -> Failure {
        Failure::Connect {
            path: self.socket.clone(),
            cause,
        }
    }

    pub(super) fn broken_off(&self, cause: impl Display) -> Failure {
        Failure::BrokenOff {
            path: self.socket.clone(),
            cause: cause.to_string(),
        }
    }

    pub(super) fn strange(&self, cause: impl Display) -> Failure {
        Failure::Strange {
            path: self.socket.clone(),
            cause: cause.to_string(),
        }
    }

    /// Sends the call; gives the answer with its body yet to come, if it is not a failure.
    pub(super) async fn open(&self, call: Call) -> Result<Response<Incoming>, Failure> {
        let stream = UnixStream::connect(&self.socket)
            .await
            .map_err(|cause| self.cannot_connect(cause))?;
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
            .await
            .map_err(|cause| self.broken_off(cause))?;
        // Its failures reach us as failures of the exchange.
        tokio::spawn(async move { drop(connection.await) });
        let mut request = Request::builder()
            .method(call.method)
            .uri(call.target)
            .header("host", "exopatch");
        if !call.content_type.is_empty() {
            request = request.header("content-type", call.content_type);
        }
        let request = request
            .body(Full::new(Bytes::from(call.body)))
            .map_err(|cause| self.strange(cause))?;
        let response = sender
            .send_request(request)
            .await
            .map_err(|cause| self.broken_off(cause))?;
        let status = response.status();
        if status.is_success() {
            return Ok(response);
        }
        let text = self.read(response).await?;
        match serde_json::from_slice::<ErrorBody>(&text) {
            Ok(body) => Err(Failure::Refused {
                status: status.as_u16(),
                body,
            }),
            Err(_) => Err(self.strange(format_args!("it says {status}"))),
        }
    }

    async fn read(&self, response: Response<Incoming>) -> Result<Bytes, Failure> {
        let body = Limited::new(response.into_body(), ANSWER_LIMIT)
            .collect()
            .await;
        Ok(body.map_err(|cause| self.broken_off(cause))?.to_bytes())
    }

    /// Makes the call and reads the answer.
    pub(super) async fn call<T: DeserializeOwned>(&self, call: Call) -> Result<T, Failure> {
        let patience = call.patience;
        let exchange = async {
            let response = self.open(call).await?;
            let text = self.read(response).await?;
            serde_json::from_slice(&text).map_err(|cause| self.strange(cause))
        };
        match patience {
            None => exchange.await,
            Some(patience) => match tokio::time::timeout(patience, exchange).await {
                Ok(answer) => answer,
                Err(_elapsed) => {
                    Err(self.broken_off(format_args!("no answer within {} s", patience.as_secs())))
                }
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::Call;
    use std::time::Duration;

    #[test]
    fn a_query_is_encoded() {
        let call = Call::post("/v1/updates")
            .query(&[("name", Some("a b&é.xpu".to_owned())), ("x", None)])
            .deadline(Duration::from_millis(20));
        assert_eq!(
            call.target,
            "/v1/updates?name=a%20b%26%C3%A9.xpu&deadline_ms=20"
        );
        assert_eq!(call.patience, Some(Duration::from_millis(120_020)));
    }
}
