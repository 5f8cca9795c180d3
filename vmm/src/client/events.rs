//! Reading the event stream.

use http_body_util::BodyExt;
use hyper::Response;
use hyper::body::Incoming;

use super::{Client, Failure};
use crate::api::wire::Event;

/// Longest line that is kept: an event with an update is the largest.
const LINE_LIMIT: usize = 1 << 20;

/// The events of one answer.
#[derive(Debug)]
pub(super) struct Reader {
    body: Incoming,
    lines: Lines,
}

impl Reader {
    pub(super) fn new(response: Response<Incoming>) -> Self {
        Self {
            body: response.into_body(),
            lines: Lines::default(),
        }
    }

    /// The next event; `None` when the server has ended the stream.
    pub(super) async fn next(&mut self, client: &Client) -> Result<Option<Event>, Failure> {
        loop {
            while let Some(line) = self.lines.take() {
                // Every event of ours is one line of data; id and name are in the data as well.
                if let Some(data) = line.strip_prefix(b"data: ") {
                    let event =
                        serde_json::from_slice(data).map_err(|cause| client.strange(cause))?;
                    return Ok(Some(event));
                }
            }
            match self.body.frame().await {
                None => return Ok(None),
                Some(Err(cause)) => return Err(client.broken_off(cause)),
                Some(Ok(frame)) => {
                    if let Ok(data) = frame.into_data() {
                        self.lines.put(&data);
                    }
                }
            }
            if self.lines.0.len() > LINE_LIMIT {
                return Err(client.strange("an event has no end"));
            }
        }
    }
}

/// Bytes, given out line by line.
#[derive(Debug, Default)]
struct Lines(Vec<u8>);

impl Lines {
    fn put(&mut self, bytes: &[u8]) {
        self.0.extend_from_slice(bytes);
    }

    fn take(&mut self) -> Option<Vec<u8>> {
        let end = self.0.iter().position(|byte| *byte == b'\n')?;
        let mut line: Vec<u8> = self.0.drain(..=end).collect();
        line.pop();
        Some(line)
    }
}

#[cfg(test)]
mod tests {
    use super::Lines;

    #[test]
    fn lines_are_whole_wherever_the_bytes_are_cut() {
        let text = b"id: 1\ndata: {}\n\n: x\n";
        for cut in 0..=text.len() {
            let mut lines = Lines::default();
            let mut got = Vec::new();
            for part in [&text[..cut], &text[cut..]] {
                lines.put(part);
                got.extend(std::iter::from_fn(|| lines.take()));
            }
            let wanted: [&[u8]; 4] = [b"id: 1", b"data: {}", b"", b": x"];
            assert_eq!(got, wanted, "cut at {cut}");
        }
    }
}
