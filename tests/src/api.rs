//! The API without a process a call: one HTTP connection that stays open.
//!
//! For what is called hundreds of times, or timed: between request and reply there is only the socket. Speaks as much of HTTP/1.1
//! as the server's answers to these calls need: a status and a body of known length.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use serde_json::Value;

/// What any call may take: the longest deadline that tests give, and the first call's reading of the kernel's image.
const PATIENCE: Duration = Duration::from_secs(90);

/// A connection to the API of one machine.
#[derive(Debug)]
pub struct Api(BufReader<UnixStream>);

impl Api {
    /// Connects to the machine that serves `socket`.
    ///
    /// # Errors
    /// When nobody does.
    pub fn connect(socket: &Path) -> Result<Self, String> {
        let connected = UnixStream::connect(socket).and_then(|stream| {
            stream.set_read_timeout(Some(PATIENCE))?;
            Ok(stream)
        });
        let stream = connected.map_err(|error| format!("{}: {error}", socket.display()))?;
        Ok(Self(BufReader::new(stream)))
    }

    /// Makes a call (`POST /v1/vm/pause`) and gives the JSON of its answer.
    ///
    /// # Errors
    /// When the answer is a failure, with all of it, or does not come.
    pub fn call(&mut self, call: &str, body: &[u8]) -> Result<Value, String> {
        let text = self.text(call, body)?;
        serde_json::from_str(&text).map_err(|error| format!("{call}: {error} in {text}"))
    }

    /// Makes a call and gives its answer as text.
    ///
    /// # Errors
    /// As [`Api::call`].
    pub fn text(&mut self, call: &str, body: &[u8]) -> Result<String, String> {
        self.exchange(call, body)
            .map_err(|error| format!("{call}: {error}"))
    }

    fn exchange(&mut self, call: &str, body: &[u8]) -> Result<String, String> {
        let failed = |error: std::io::Error| error.to_string();
        let mut request = format!(
            "{call} HTTP/1.1\r\nHost: exopatch\r\nContent-Type: application/octet-stream\r\nContent-Length: {}\r\n\r\n",
            body.len()
        )
        .into_bytes();
        request.extend_from_slice(body);
        self.0.get_mut().write_all(&request).map_err(failed)?;
        let status = self.line()?;
        let mut length = 0;
        loop {
            let header = self.line()?.to_ascii_lowercase();
            if header.is_empty() {
                break;
            }
            if let Some(value) = header.strip_prefix("content-length:") {
                length = value.trim().parse().map_err(|_| header.clone())?;
            }
        }
        let mut answer = vec![0; length];
        self.0.read_exact(&mut answer).map_err(failed)?;
        let text = String::from_utf8_lossy(&answer).into_owned();
        let code = status.split(' ').nth(1).unwrap_or_default();
        if !code.starts_with('2') {
            return Err(format!("{status}: {text}"));
        }
        Ok(text)
    }

    fn line(&mut self) -> Result<String, String> {
        let mut line = String::new();
        match self.0.read_line(&mut line) {
            Ok(0) => Err("the machine hung up".to_owned()),
            Ok(_) => Ok(line.trim_end().to_owned()),
            Err(error) => Err(error.to_string()),
        }
    }
}
