//! `exopatch kernel ...` of a running machine: asks its API for a view, and shows it.

use std::time::Duration;

use serde::de::DeserializeOwned;

use super::http::Call;
use super::{Client, Failure, show};
use crate::output;
use crate::views::{Asked, Seen, View};

impl Client {
    /// Shows the kernel of the running machine, which is given up stopping after `deadline`.
    ///
    /// # Errors
    /// As [`Failure`] lists them.
    pub fn kernel(&self, deadline: Duration) -> Result<(), Failure> {
        self.block_on(async {
            let call = self.call(Call::get("/v1/kernel").deadline(deadline));
            let kernel = self.with_progress("reading the kernel", call).await?;
            self.print(&kernel, show::kernel)
        })
    }

    /// Shows a view of the running machine's kernel.
    ///
    /// # Errors
    /// As [`Failure`] lists them.
    pub fn see(&self, asked: &Asked, deadline: Duration) -> Result<(), Failure> {
        let call = call_for(asked).deadline(deadline);
        let seen = self.block_on(async {
            match asked {
                Asked::Symbols(_) => self.fetch(call, View::Symbols).await,
                Asked::Types(_) => self.fetch(call, View::Types).await,
                Asked::Modules => self.fetch(call, View::Modules).await,
                Asked::Tasks => self.fetch(call, View::Tasks).await,
                Asked::Log => self.fetch(call, View::Log).await,
                Asked::Text(_) => self.fetch(call, View::Text).await,
                Asked::Stack(_) | Asked::At(_) => self.fetch(call, View::Stack).await,
                Asked::Disasm(_) => self.fetch(call, View::Disasm).await,
            }
        })?;
        self.print(&seen, |seen| seen.view.table())?;
        if let (false, Some(us)) = (self.json, seen.paused_us) {
            output::note(match us {
                0 => "the guest did not have to stop for this".to_owned(),
                us => format!("the guest stood still for {us} us"),
            });
        }
        match &seen.view {
            View::Text(text) if text.unexplained() > 0 => Err(Failure::Differs(format!(
                "{} places of the kernel's text hold what neither its image nor anything known explains",
                text.unexplained()
            ))),
            _ => Ok(()),
        }
    }

    async fn fetch<T: DeserializeOwned>(
        &self,
        call: Call,
        form: impl FnOnce(T) -> View,
    ) -> Result<Seen<View>, Failure> {
        let call = self.call(call);
        let seen: Seen<T> = self.with_progress("looking at the kernel", call).await?;
        Ok(seen.map(form))
    }
}

/// The call that asks the API for `asked`.
fn call_for(asked: &Asked) -> Call {
    let (view, options) = match asked {
        Asked::Symbols(of) => (
            "symbols",
            vec![("of", of.as_ref().map(ToString::to_string))],
        ),
        Asked::Types(asked) => (
            "types",
            vec![
                ("name", Some(asked.name.clone())),
                ("member", asked.member.clone()),
                ("module", asked.module.clone()),
            ],
        ),
        Asked::Modules => ("modules", Vec::new()),
        Asked::Tasks => ("tasks", Vec::new()),
        Asked::Log => ("log", Vec::new()),
        Asked::Text(asked) => ("text", vec![("each", Some(asked.each.to_string()))]),
        Asked::Stack(of) => ("stack", vec![("of", Some(of.to_string()))]),
        Asked::At(asked) => (
            "stack",
            vec![
                ("at", Some(asked.of().to_string())),
                (
                    "position",
                    asked.place.position.map(|position| position.to_string()),
                ),
                ("count", Some(asked.count.to_string())),
            ],
        ),
        Asked::Disasm(asked) => (
            "disasm",
            vec![
                ("of", Some(asked.of.to_string())),
                (
                    "position",
                    asked.position.map(|position| position.to_string()),
                ),
            ],
        ),
    };
    Call::get(format!("/v1/kernel/{view}")).query(&options)
}

#[cfg(test)]
mod tests {
    use super::call_for;
    use crate::views::{Asked, at, disasm, stack, symbols, types};

    #[test]
    fn what_is_asked_comes_to_be_a_call() {
        let check = |asked: Asked, target: &str| assert_eq!(call_for(&asked).target, target);
        check(Asked::Symbols(None), "/v1/kernel/symbols");
        let at = symbols::Asked::parse("ffffffff81000000").unwrap();
        check(
            Asked::Symbols(Some(at)),
            "/v1/kernel/symbols?of=0xffffffff81000000",
        );
        check(
            Asked::Types(types::Asked::parse("struct", Some("file"), None)),
            "/v1/kernel/types?name=struct%20file",
        );
        check(
            Asked::Types(types::Asked::parse("evdev", Some("open"), Some("evdev"))),
            "/v1/kernel/types?name=evdev&member=open&module=evdev",
        );
        check(
            Asked::Stack(stack::Asked::parse("cpu1").unwrap()),
            "/v1/kernel/stack?of=cpu1",
        );
        check(
            Asked::At(at::Asked::parse("a+5", None, Some(3)).unwrap()),
            "/v1/kernel/stack?at=a%2B0x5&count=3",
        );
        let place = disasm::Asked::parse("a.cold+16", Some(2)).unwrap();
        check(
            Asked::Disasm(place),
            "/v1/kernel/disasm?of=a.cold%2B0x10&position=2",
        );
    }
}
