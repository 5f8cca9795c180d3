//! Points in time as rules write them: `2026-01-31T12:00:00Z`, to the second and always UTC (RFC 3339).
//!
//! Years from 1970 to 9999, as every month has them; no leap second.

use std::fmt;

/// A point in time: seconds since 1970 began, UTC.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Instant(pub(super) u64);

/// Bytes of its text.
pub(super) const LEN: usize = "2026-01-31T12:00:00Z".len();

const DAY: u64 = 86_400;

impl Instant {
    /// Seconds since 1970 began.
    #[must_use]
    pub fn seconds(self) -> u64 {
        self.0
    }

    /// Reads a text of [`LEN`] bytes.
    pub(super) fn parse(text: &str) -> Option<Self> {
        let bytes = text.as_bytes();
        let marks = [
            (4, b'-'),
            (7, b'-'),
            (10, b'T'),
            (13, b':'),
            (16, b':'),
            (19, b'Z'),
        ];
        let marked = marks.iter().all(|(at, mark)| bytes.get(*at) == Some(mark));
        if bytes.len() != LEN || !marked {
            return None;
        }
        let number = |at: usize, len: usize| -> Option<u64> {
            let digits = text.get(at..at + len)?;
            let only = digits.bytes().all(|byte| byte.is_ascii_digit());
            only.then(|| digits.parse().ok())?
        };
        let (year, month, day) = (number(0, 4)?, number(5, 2)?, number(8, 2)?);
        let (hour, minute, second) = (number(11, 2)?, number(14, 2)?, number(17, 2)?);
        let valid = year >= 1970
            && (1..=12).contains(&month)
            && (1..=month_days(year, month)).contains(&day)
            && hour < 24
            && minute < 60
            && second < 60;
        let before = (1..month).map(|month| month_days(year, month)).sum::<u64>();
        valid.then(|| {
            let days = year_start(year) + before + day - 1;
            Self(days * DAY + hour * 3600 + minute * 60 + second)
        })
    }
}

impl fmt::Display for Instant {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (days, rest) = (self.0 / DAY, self.0 % DAY);
        // No year is longer than 366 days, so this one or a later one it is.
        let mut year = 1970 + days / 366;
        while year_start(year + 1) <= days {
            year += 1;
        }
        let mut day = days - year_start(year);
        let mut month = 1;
        while day >= month_days(year, month) {
            day -= month_days(year, month);
            month += 1;
        }
        let (hour, minute, second) = (rest / 3600, rest / 60 % 60, rest % 60);
        write!(
            f,
            "{year:04}-{month:02}-{:02}T{hour:02}:{minute:02}:{second:02}Z",
            day + 1
        )
    }
}

/// Days from 1970 to the beginning of `year`.
fn year_start(year: u64) -> u64 {
    let leaps = |year: u64| year / 4 - year / 100 + year / 400;
    (year - 1970) * 365 + leaps(year - 1) - leaps(1969)
}

fn month_days(year: u64, month: u64) -> u64 {
    match month {
        2 if year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400)) => {
            29
        }
        2 => 28,
        4 | 6 | 9 | 11 => 30,
        _ => 31,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::Instant;

    /// The last second that is understood.
    const LAST: Instant = Instant(253_402_300_799);

    #[test]
    fn known_instants_are_read() {
        for (text, want) in [
            ("1970-01-01T00:00:00Z", Some(0)),
            ("2000-02-29T12:34:56Z", Some(951_827_696)),
            ("2026-01-01T00:00:00Z", Some(1_767_225_600)),
            ("9999-12-31T23:59:59Z", Some(LAST.0)),
            ("2100-02-29T00:00:00Z", None),
            ("2026-13-01T00:00:00Z", None),
            ("2026-01-01T24:00:00Z", None),
            ("2026-01-01 00:00:00Z", None),
            ("2026-+1-01T00:00:00Z", None),
            ("1969-12-31T23:59:59Z", None),
        ] {
            assert_eq!(Instant::parse(text), want.map(Instant), "{text}");
        }
    }

    proptest! {
        #[test]
        fn what_is_printed_reads_the_same(at in 0..=LAST.0) {
            let at = Instant(at);
            prop_assert_eq!(Instant::parse(&at.to_string()), Some(at));
        }
    }
}
