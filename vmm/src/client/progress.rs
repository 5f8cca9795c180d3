//! What the user sees of a call that takes more than a second: a line on standard error, if that is a terminal.

use std::time::Duration;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use super::http::Call;
use super::{Client, Failure, clean, events};
use crate::api::wire::EventBody;

/// How long a call may be silent.
const SILENCE: Duration = Duration::from_secs(1);

impl Client {
    /// Runs `work`; once it takes long, shows `what`, followed by what the server says that its updates are doing.
    pub(super) async fn with_progress<T>(
        &self,
        what: &str,
        work: impl Future<Output = Result<T, Failure>>,
    ) -> Result<T, Failure> {
        let mut work = std::pin::pin!(work);
        if let Ok(result) = tokio::time::timeout(SILENCE, work.as_mut()).await {
            return result;
        }
        let line = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr());
        let style = ProgressStyle::with_template("{spinner} {prefix} {elapsed} {msg}");
        line.set_style(style.unwrap_or_else(|_| ProgressStyle::default_spinner()));
        line.set_prefix(what.to_owned());
        line.enable_steady_tick(Duration::from_millis(100));
        let result = tokio::select! {
            result = work.as_mut() => result,
            () = self.follow(&line) => work.await,
        };
        line.finish_and_clear();
        result
    }

    /// Keeps the line current. It is an ornament: without it the call goes on.
    async fn follow(&self, line: &ProgressBar) {
        if line.is_hidden() {
            return;
        }
        let Ok(response) = self.open(Call::get("/v1/events?after=0")).await else {
            return;
        };
        let mut reader = events::Reader::new(response);
        while let Ok(Some(event)) = reader.next(self).await {
            if let EventBody::Update { update } = event.body {
                line.set_message(clean(update.doing.as_deref().unwrap_or_default()));
            }
        }
    }
}
