//! Runs the cases of a target in worker processes, and says what they died of.

use std::fs;
use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::thread;
use std::time::Duration;

use crate::Options;

/// After so many findings a target is left.
const ENOUGH: u64 = 10;

/// One run.
#[derive(Debug)]
pub(crate) struct Run<'a> {
    options: &'a Options,
    /// Cases that failed once: target and number.
    kept: Vec<(String, u64)>,
}

/// How a worker's row of cases went.
enum Row {
    Done,
    /// It died at this case, of this.
    Died(u64, String),
}

impl<'a> Run<'a> {
    pub(crate) fn new(options: &'a Options) -> Result<Self, String> {
        let mut kept = Vec::new();
        if let Some(path) = &options.kept {
            let text = fs::read_to_string(path)
                .map_err(|error| format!("cannot read {}: {error}", path.display()))?;
            for line in text.lines().filter(|line| !line.starts_with('#')) {
                let case = line.split_whitespace().collect::<Vec<_>>();
                let [target, case, ..] = case[..] else {
                    return Err(format!("{}: '{line}' is not a case", path.display()));
                };
                let case = case
                    .parse()
                    .map_err(|_| format!("'{case}' is not a number"))?;
                kept.push((target.to_owned(), case));
            }
        }
        Ok(Self { options, kept })
    }

    /// Runs the kept cases of a target, then new ones; gives the number of findings.
    pub(crate) fn target(&self, name: &str) -> Result<u64, String> {
        let mut findings = 0;
        let kept = self.kept.iter().filter(|(target, _)| target == name);
        for (_, case) in kept {
            findings += self.row(name, *case, 1)?;
        }
        findings += self.row(name, self.options.first, self.options.cases)?;
        println!("{name}: {} cases, {findings} findings", self.options.cases);
        Ok(findings)
    }

    fn row(&self, name: &str, mut first: u64, count: u64) -> Result<u64, String> {
        let (end, mut findings) = (first.saturating_add(count), 0);
        while first < end && findings < ENOUGH {
            match self.work(name, first, end - first)? {
                Row::Done => break,
                Row::Died(case, why) => {
                    println!("{name} {case} {why}");
                    findings += 1;
                    first = case + 1;
                }
            }
        }
        Ok(findings)
    }

    /// One worker, until it has done its row or died.
    fn work(&self, name: &str, first: u64, count: u64) -> Result<Row, String> {
        let broken = |error| format!("cannot run a worker: {error}");
        let program = std::env::current_exe().map_err(broken)?;
        let mut child = Command::new(program)
            .arg("--worker")
            .args(["--first", &first.to_string(), "--cases", &count.to_string()])
            .arg("--kernel")
            .arg(&self.options.kernel)
            .arg("--dump")
            .arg(&self.options.dump)
            .arg("--package")
            .arg(&self.options.package)
            .arg(name)
            .stdout(Stdio::piped())
            .spawn()
            .map_err(broken)?;
        let lines = lines(&mut child).ok_or("a worker without output")?;
        let limit = Duration::from_secs(self.options.limit_s);
        let mut at = None;
        loop {
            match lines.recv_timeout(limit) {
                Ok(line) => at = Some(line.parse().map_err(|_| line)?),
                Err(RecvTimeoutError::Timeout) => {
                    child.kill().and_then(|()| child.wait()).map_err(broken)?;
                    let case = at.ok_or("a worker hangs before its first case")?;
                    return Ok(Row::Died(case, format!("does not end in {limit:?}")));
                }
                Err(RecvTimeoutError::Disconnected) => break,
            }
        }
        let status = child.wait().map_err(broken)?;
        match at {
            _ if status.success() => Ok(Row::Done),
            Some(case) => Ok(Row::Died(case, format!("ends with {status}"))),
            None => Err(format!(
                "a worker ended with {status} before its first case"
            )),
        }
    }
}

/// What a worker says, line by line.
fn lines(child: &mut Child) -> Option<Receiver<String>> {
    let output = child.stdout.take()?;
    let (send, lines) = mpsc::channel();
    thread::spawn(move || {
        for line in BufReader::new(output).lines().map_while(Result::ok) {
            if send.send(line).is_err() {
                break;
            }
        }
    });
    Some(lines)
}
