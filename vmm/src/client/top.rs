//! `exopatch top`: functions and their editions with the calls that get to them, what drains, who is bound, and the last pauses, again and again.
//!
//! All of it comes from the API. While an operation keeps the counts back, the rest goes on being shown.

mod view;

use std::time::Duration;

use clap::Args;
use tokio::task::JoinHandle;

use self::view::View;
use super::http::Call;
use super::screen::Screen;
use super::{Client, EXIT_CODES, Failure, parse_time};
use crate::api::wire::{CallList, UpdateList, Vm};

/// How long a look waits for the counts.
const COUNTS_WITHIN: Duration = Duration::from_secs(1);

/// How to watch.
#[derive(Args, Clone, Copy, Debug)]
#[command(after_help = EXIT_CODES)]
pub struct TopArgs {
    /// Look again after this time
    #[arg(long, value_name = "TIME", default_value = "1s", value_parser = parse_time)]
    interval: Duration,
    /// Look twice, that far apart, print one table and end
    #[arg(long)]
    once: bool,
}

/// What was seen so far.
struct Watch<'c> {
    client: &'c Client,
    /// The request for counts that is under way: while it is, there is no other.
    asked: Option<JoinHandle<Result<CallList, Failure>>>,
    /// The last counts, and those before.
    counts: [Option<CallList>; 2],
}

impl Client {
    /// Shows what goes on until a key or a signal ends it. To what is no terminal it prints one table after the other.
    ///
    /// # Errors
    /// As [`Failure`] lists them; when exopatch ends, that it does not answer.
    pub fn top(&self, args: TopArgs) -> Result<(), Failure> {
        self.block_on(async {
            let mut watch = Watch::new(self);
            if args.once {
                watch.look().await?;
                tokio::time::sleep(args.interval).await;
                let seen = watch.look().await?;
                return self.print(&seen, View::table);
            }
            let mut screen = if self.json { None } else { Screen::enter()? };
            match &mut screen {
                None => watch.print(args.interval).await,
                Some(screen) => tokio::select! {
                    ended = screen.ended() => Ok(ended?),
                    failed = watch.draw(args.interval) => failed,
                },
            }
        })
    }
}

impl<'c> Watch<'c> {
    fn new(client: &'c Client) -> Self {
        Self {
            client,
            asked: None,
            counts: [None, None],
        }
    }

    /// Draws until something fails.
    async fn draw(&mut self, interval: Duration) -> Result<(), Failure> {
        loop {
            let seen = self.look().await?;
            let every = interval.as_millis();
            Screen::draw(&format!("{}\nevery {every} ms; q ends\n", seen.table()))?;
            tokio::time::sleep(interval).await;
        }
    }

    /// Prints until nobody reads any more.
    async fn print(&mut self, interval: Duration) -> Result<(), Failure> {
        loop {
            let seen = self.look().await?;
            if !self.client.is_read(&seen, |seen| seen.table() + "\n")? {
                return Ok(());
            }
            tokio::time::sleep(interval).await;
        }
    }

    async fn look(&mut self) -> Result<View, Failure> {
        let vm: Vm = self.client.call(Call::get("/v1/vm")).await?;
        let list: UpdateList = self.client.call(Call::get("/v1/updates")).await?;
        let unknown = match self.counts().await {
            Ok(None) => Some("an operation is under way".to_owned()),
            Ok(Some(counts)) => {
                self.counts.swap(0, 1);
                self.counts[0] = Some(counts);
                None
            }
            // The guest has ended, most likely: there is still something to be seen.
            Err(Failure::Refused { body, .. }) => Some(body.cause),
            Err(other) => return Err(other),
        };
        let [now, before] = &self.counts;
        let mut view = View::new(&vm, &list.updates, now.as_ref(), before.as_ref());
        view.calls_unknown = unknown;
        Ok(view)
    }

    /// The counts, if they come in time; else the next look goes on waiting for them.
    async fn counts(&mut self) -> Result<Option<CallList>, Failure> {
        let client = self.client;
        let asked = self.asked.get_or_insert_with(|| {
            let client = client.clone();
            let mut call = Call::get("/v1/calls");
            call.patience = None;
            tokio::spawn(async move { client.call(call).await })
        });
        let Ok(answered) = tokio::time::timeout(COUNTS_WITHIN, asked).await else {
            return Ok(None);
        };
        self.asked = None;
        answered.map_err(|died| client.broken_off(died))?.map(Some)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::Ordering;

    use super::{Client, Watch};
    use crate::api::double::Double;
    use crate::api::server::Listening;

    #[test]
    fn counts_that_are_kept_back_are_asked_for_once_and_waited_for() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("api");
        let double = Arc::new(Double::default());
        let listening = Listening::open(&path).unwrap();
        let server = listening.serve(double.clone()).unwrap();
        let client = Client::new(Some(&path), true).unwrap();
        let mut watch = Watch::new(&client);
        // Whether the calls are new, and why not.
        let mut look = |busy: bool| {
            double.busy.store(busy, Ordering::Relaxed);
            let seen = client.block_on(async {
                let seen = watch.look().await?;
                let again = watch.asked.as_ref().map(tokio::task::JoinHandle::id);
                if busy {
                    assert_eq!(watch.look().await?, seen);
                    let asked = watch.asked.as_ref().map(tokio::task::JoinHandle::id);
                    assert_eq!(asked, again);
                    double.busy.store(false, Ordering::Relaxed);
                    let later = watch.look().await?;
                    assert_eq!(later.calls_unknown, None);
                }
                Ok(seen)
            });
            seen.unwrap().calls_unknown
        };
        assert_eq!(look(false), None);
        assert_eq!(look(true).as_deref(), Some("an operation is under way"));
        double.ended.store(true, Ordering::Relaxed);
        assert_eq!(look(false).as_deref(), Some("c"));
        drop(server);
        let gone = client.block_on(async { watch.look().await });
        assert!(
            matches!(gone, Err(super::Failure::Connect { .. })),
            "{gone:?}"
        );
    }
}
