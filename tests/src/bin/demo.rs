//! What `scripts/demo` shows: a stock guest whose kernel gets a fix while it runs, host and guest side by side in time.
//!
//! It ends with status 0 only if everything that it tells was seen in the guest's own output.
#![expect(clippy::print_stdout, reason = "the demo's output is its purpose")]

use std::fs;
use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use serde_json::Value;
use tests::guest::{Guest, Options};
use tests::stock::LTS_6_1;

/// What the fix for CVE-2026-52928 makes a datagram socket answer.
const FIXED: &str = "EOPNOTSUPP";
/// How long the guest is watched after each step.
const WATCH: Duration = Duration::from_secs(2);
/// Every so many answers one is shown, besides those that differ from the one before.
const SHOWN: usize = 5;
const HOST_WIDTH: usize = 66;

fn main() -> ExitCode {
    let edition = std::env::args_os().nth(1).map(PathBuf::from);
    let mut show = Show::begin(edition);
    match show.run() {
        Ok(()) => {
            println!(
                "\nSeen: the old answer, the new one, the old one, the new one; same boot, same modules, same taint flags."
            );
            ExitCode::SUCCESS
        }
        Err(why) => {
            println!("\nThe demo FAILED: {why}");
            ExitCode::FAILURE
        }
    }
}

/// The two columns, and how far the guest's console has been shown.
struct Show {
    started: Instant,
    colours: bool,
    guest: Guest,
    /// First line of the console that was not shown yet.
    shown: usize,
    /// Answers seen since the last one that was shown.
    unshown: usize,
    last: Option<String>,
    edition: Option<PathBuf>,
}

impl Show {
    fn begin(edition: Option<PathBuf>) -> Self {
        let release = fs::read_to_string(LTS_6_1.file("package")).unwrap_or_default();
        println!(
            "exopatch: a live fix for a stock kernel, from outside ({})\n",
            release.trim()
        );
        let started = Instant::now();
        let workload = "exopatch.run=probe,siocatmark,0,100";
        let guest = Guest::start(&Options::new(LTS_6_1).cmdline(workload));
        let colours = std::io::stdout().is_terminal();
        let mut show = Self {
            started,
            colours,
            guest,
            shown: 0,
            unshown: 0,
            last: None,
            edition,
        };
        show.row("HOST", "GUEST (its serial console)");
        show.host("$ exopatch run --kernel vmlinuz --cpus 2 --memory 256M ...");
        show
    }

    fn run(&mut self) -> Result<(), String> {
        self.guest.wait_ready();
        self.host("the guest has booted; a program in it asks ten times a second:");
        self.host("  SIOCATMARK on an AF_UNIX datagram socket");
        let old = self.watch()?;
        let edition = self.choose(&old)?;
        let before = self.identity();
        let uptime = self.uptime();
        self.host(&format!(
            "guest: up {uptime} s; modules and taint: {before}"
        ));

        let id = self.apply(&edition)?;
        let new = self.watch()?;
        differ(&old, &new)?;
        self.update("revert", &id)?;
        let reverted = self.watch()?;
        same("after the revert", &old, &reverted)?;
        self.apply(&edition)?;
        let again = self.watch()?;
        same("after the second apply", &new, &again)?;

        let after = self.identity();
        let uptime = self.uptime();
        self.host(&format!("guest: up {uptime} s; modules and taint: {after}"));
        same("modules, taint flags and boot id", &before, &after)?;
        let complaints = self.guest.complaints();
        if complaints.is_empty() {
            Ok(())
        } else {
            Err(format!("the guest's log says: {complaints:#?}"))
        }
    }

    /// The edition to show: the fix, or another visible behaviour where the kernel has the fix already.
    fn choose(&mut self, old: &str) -> Result<PathBuf, String> {
        if let Some(edition) = self.edition.clone() {
            self.host(&format!("the edition given: {}", edition.display()));
            return Ok(edition);
        }
        if old == FIXED {
            self.host("this kernel has the fix for CVE-2026-52928 already; instead an edition");
            self.host("is shown that makes the same request answer ENOTTY");
            return Ok(LTS_6_1.edition("unix_ioctl_notty"));
        }
        if old != "OK" {
            return Err(format!(
                "the guest's kernel answers {old}; OK or {FIXED} was expected"
            ));
        }
        self.host("CVE-2026-52928: it should say EOPNOTSUPP, and does not");
        Ok(LTS_6_1.edition("unix_ioctl"))
    }

    /// Shows the guest for a while; gives its one answer in the second half of that time.
    fn watch(&mut self) -> Result<String, String> {
        let end = Instant::now() + WATCH;
        let mut settled = None;
        while Instant::now() < end {
            self.follow();
            if settled.is_none() && end.saturating_duration_since(Instant::now()) < WATCH / 2 {
                settled = Some(self.shown);
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        let lines = self.guest.console.since(settled.unwrap_or(self.shown));
        let mut answers: Vec<&str> = lines.iter().filter_map(|line| answer(line)).collect();
        let count = answers.len();
        answers.dedup();
        match answers[..] {
            [one] if count > 2 => Ok(one.to_owned()),
            _ => Err(format!(
                "the guest gave {count} answers, of these kinds: {answers:?}"
            )),
        }
    }

    /// Shows what the guest has printed since.
    fn follow(&mut self) {
        let lines = self.guest.console.since(self.shown);
        self.shown += lines.len();
        for line in lines {
            let Some(name) = answer(&line) else { continue };
            let changed = self.last.as_deref() != Some(name);
            self.unshown += 1;
            if changed || self.unshown >= SHOWN {
                let mark = if changed && self.last.is_some() {
                    "   <== changed"
                } else {
                    ""
                };
                self.row("", &format!("{line}{mark}"));
                self.unshown = 0;
            }
            self.last = Some(name.to_owned());
        }
    }

    fn apply(&mut self, edition: &Path) -> Result<String, String> {
        let path = edition
            .to_str()
            .ok_or("the edition's path is not UTF-8")?
            .to_owned();
        let update = self.update("apply", &path)?;
        Ok(update["id"].to_string())
    }

    /// One call of the client, with what it cost the guest.
    fn update(&mut self, verb: &str, what: &str) -> Result<Value, String> {
        let name = Path::new(what)
            .file_name()
            .map_or(what.into(), |name| name.to_string_lossy());
        self.host(&format!("$ exopatch update {verb} {name}"));
        let reply = self
            .guest
            .client
            .call(&["update", verb, what, "--deadline", "20s"]);
        if reply.status != 0 {
            return Err(format!(
                "exopatch update {verb} ended with {}: {} {}",
                reply.status, reply.json, reply.stderr
            ));
        }
        let report = &reply.json[if verb == "apply" {
            "applied"
        } else {
            "reverted"
        }];
        let phases = &report["phases"];
        self.host(&format!(
            "  {verb} done; the guest stood still for {} us:",
            report["pause_us"]
        ));
        let parts = ["stop", "prove", "scan", "verify", "write", "resume"];
        let parts: Vec<_> = parts
            .iter()
            .map(|part| format!("{part} {}", phases[format!("{part}_us")]))
            .collect();
        self.host(&format!("  {}", parts.join(", ")));
        Ok(reply.json)
    }

    /// Modules, taint flags and boot id, shortened for the screen by what they hold.
    fn identity(&mut self) -> String {
        let taint = self.guest.sh("cat /proc/sys/kernel/tainted").text();
        let boot = self.guest.sh("cat /proc/sys/kernel/random/boot_id").text();
        let modules = self.guest.sh("cut -d' ' -f1 /proc/modules").text();
        let clean = |text: String| {
            text.lines()
                .filter(|line| answer(line).is_none())
                .collect::<Vec<_>>()
                .join(",")
        };
        format!(
            "{} / {} / {}",
            clean(modules),
            clean(taint),
            clean(boot).get(..8).unwrap_or_default()
        )
    }

    fn uptime(&mut self) -> String {
        let text = self.guest.sh("cut -d' ' -f1 /proc/uptime").text();
        text.lines()
            .find(|line| answer(line).is_none())
            .unwrap_or_default()
            .to_owned()
    }

    fn host(&mut self, text: &str) {
        self.follow();
        self.row(text, "");
    }

    fn row(&self, host: &str, guest: &str) {
        let time = self.started.elapsed().as_secs_f64();
        let (bold, green, plain) = if self.colours {
            ("\x1b[1m", "\x1b[32m", "\x1b[0m")
        } else {
            ("", "", "")
        };
        println!("{time:6.2} s | {bold}{host:HOST_WIDTH$}{plain} | {green}{guest}{plain}");
    }
}

/// The answer in a line of the guest's program: `siocatmark: N RESULT NAME`.
fn answer(line: &str) -> Option<&str> {
    line.strip_prefix("siocatmark: ")?.split(' ').nth(2)
}

fn differ(old: &str, new: &str) -> Result<(), String> {
    if old == new {
        Err(format!("the guest still answers {new} after the apply"))
    } else {
        Ok(())
    }
}

fn same(when: &str, wanted: &str, seen: &str) -> Result<(), String> {
    if wanted == seen {
        Ok(())
    } else {
        Err(format!("{when}: {wanted} was expected, {seen} was seen"))
    }
}
