//! Logs of the made-up kernel, sound and damaged.

use proptest::prelude::*;

use super::{Caller, Log, LogError, NUMBER, STATE_SHIFT, Unwritten, read};
use crate::kernel::testing::guest::TinyGuest;
use crate::kernel::testing::{FORMS, Form};

const COUNT_BITS: u64 = 3;
const SIZE_BITS: u64 = 8;
const RESERVED: u64 = 0;
const COMMITTED: u64 = 1;
const FINALIZED: u64 = 2;
const REUSABLE: u64 = 3;

/// A ring being filled: eight descriptors, 256 bytes of texts.
struct Ring {
    guest: TinyGuest,
    at: u64,
    descriptors: u64,
    infos: u64,
    texts: u64,
    /// Where the next text goes.
    position: u64,
}

impl Ring {
    fn new(form: Form, oldest: u64, newest: u64) -> Self {
        let mut guest = TinyGuest::new(form, 4);
        let (at, descriptors) = (guest.object(72), guest.object(8 * 24));
        let (infos, texts) = (guest.object(8 * 88), guest.object(256));
        let pointer = guest.at("prb");
        guest.put(pointer, at);
        let console = guest.at("console_printk");
        guest.put(console, 7);
        let words = [
            (0, COUNT_BITS),
            (8, descriptors),
            (16, infos),
            (24, newest),
            (32, oldest),
            (40, SIZE_BITS),
            (48, texts),
        ];
        for (offset, value) in words {
            guest.put(at + offset, value);
        }
        Self {
            guest,
            at,
            descriptors,
            infos,
            texts,
            position: 0,
        }
    }

    fn descriptor(&mut self, number: u64, state: u64, begin: u64, next: u64) {
        let at = self.descriptors + number % 8 * 24;
        self.guest.put(at, state << STATE_SHIFT | number & NUMBER);
        self.guest.put(at + 8, begin);
        self.guest.put(at + 16, next);
    }

    fn info(&mut self, number: u64, len: usize, level: u64, caller: u64) {
        let at = self.infos + number % 8 * 88;
        self.guest.put(at, number + 1000);
        self.guest.put(at + 8, number * 1_000_000);
        self.guest
            .put(at + 16, len as u64 | 3 << 16 | level << 29 | caller << 32);
        self.guest.put_bytes(at + 24, b"pci\0");
        self.guest.put_bytes(at + 40, b"0000:00\0");
    }

    /// A record as the kernel would place it.
    fn record(&mut self, number: u64, state: u64, text: &str) {
        let len = 8 + (text.len() as u64).next_multiple_of(8);
        let begin = self.position;
        let (block, next) = if begin % 256 + len <= 256 {
            (begin % 256, begin + len)
        } else {
            (0, begin.next_multiple_of(256) + len)
        };
        self.guest.put(self.texts + block, number);
        self.guest
            .put_bytes(self.texts + block + 8, text.as_bytes());
        self.position = next;
        self.descriptor(number, state, begin, next);
        self.info(number, text.len(), 6, 1);
    }

    fn log(&mut self) -> Result<Log, LogError> {
        let kernel = self.guest.kernel();
        read(&kernel, &self.guest)
    }
}

/// A record that is gone, and three: the last begins at the start of the texts again, over the first.
fn sample(form: Form) -> Ring {
    let mut ring = Ring::new(form, 20, 27);
    for (number, text) in [
        (20, "g".repeat(64)),
        (21, "a".repeat(80)),
        (22, "b".repeat(77)),
        (23, "c".repeat(40)),
    ] {
        ring.record(number, FINALIZED, &text);
    }
    ring.descriptor(20, REUSABLE, 1, 1);
    ring
}

#[test]
fn records_are_read_whatever_state_they_are_in() {
    for form in FORMS {
        let mut ring = sample(form);
        ring.record(24, COMMITTED, "not yet");
        ring.descriptor(25, FINALIZED, 3, 3);
        ring.info(25, 0, 4, 0x8000_0002);
        ring.descriptor(26, FINALIZED, 1, 1);
        ring.info(26, 17, 4, 77);
        ring.descriptor(27, RESERVED, 0, 0);
        let log = ring.log().unwrap();
        let texts: Vec<String> = log
            .records
            .iter()
            .map(|record| record.text.clone())
            .collect();
        let want = [
            "a".repeat(80),
            "b".repeat(77),
            "c".repeat(40),
            "not yet".to_owned(),
            String::new(),
            String::new(),
        ];
        assert_eq!(texts, want, "{form:?}");
        let flags: Vec<(u64, u8, bool, bool)> = log
            .records
            .iter()
            .map(|record| (record.seq, record.level, record.open, record.lost_text))
            .collect();
        let want = [
            (1021, 6, false, false),
            (1022, 6, false, false),
            (1023, 6, false, false),
            (1024, 6, true, false),
            (1025, 4, false, false),
            (1026, 4, false, true),
        ];
        assert_eq!(flags, want);
        assert_eq!(
            (log.records[0].caller, log.records[4].caller),
            (Caller::Task(1), Caller::Cpu(2))
        );
        assert_eq!(
            (log.records[0].facility, log.records[0].nanoseconds),
            (3, 21_000_000)
        );
        assert_eq!(
            log.records[0].device,
            ("pci".to_owned(), "0000:00".to_owned())
        );
        assert_eq!(log.unwritten, [(27, Unwritten::BeingWritten)]);
        assert_eq!(log.console_level, Some(7));
        // The number is taken, the descriptor is not yet.
        ring.descriptor(27 - 8, REUSABLE, 0, 0);
        assert_eq!(
            ring.log().unwrap().unwritten,
            [(27, Unwritten::BeingReserved)]
        );
    }
}

#[test]
fn what_the_kernel_would_not_do_is_refused_by_name() {
    let check = |damage: &dyn Fn(&mut Ring), want: &str| {
        let mut ring = sample(Form::New);
        for number in 24..28 {
            ring.descriptor(number, REUSABLE, 0, 0);
        }
        damage(&mut ring);
        let got = ring
            .log()
            .map(|log| log.records.len())
            .map_err(|error| error.to_string());
        match got {
            Ok(count) => assert!(want.is_empty() && count == 3, "{count} {want}"),
            Err(got) => assert!(!want.is_empty() && got.contains(want), "{got}, not {want}"),
        }
    };
    check(&|_| (), "");
    check(
        &|ring| ring.guest.put(ring.at, 40),
        "count of descriptors is unsound",
    );
    check(
        &|ring| ring.guest.put(ring.at + 40, 60),
        "size of texts is unsound",
    );
    check(
        &|ring| ring.guest.put(ring.at + 24, 29),
        "too far from the oldest",
    );
    check(&|ring| ring.guest.put(ring.at + 8, 0), "cannot be read");
    check(
        &|ring| ring.descriptor(21 + 8, FINALIZED, 72, 160),
        "descriptor with another's number",
    );
    check(
        &|ring| ring.descriptor(21, FINALIZED, 72, 72 + 512),
        "whose text is nowhere",
    );
    check(
        &|ring| ring.descriptor(21, FINALIZED, 76, 160),
        "does not fit its place",
    );
    check(
        &|ring| ring.descriptor(21, FINALIZED, 72, 152),
        "does not fit its place",
    );
    check(
        &|ring| ring.guest.put(ring.texts + 72, 20),
        "whose text is another's",
    );
}

#[test]
fn texts_cannot_be_more_than_their_ring() {
    // Each block goes on to the end of the ring, and so holds all that come after it.
    let mut ring = Ring::new(Form::Old, 0, 7);
    for number in 0..8 {
        ring.guest.put(ring.texts + 8 * number, number);
        ring.descriptor(number, FINALIZED, 8 * number, 256);
        ring.info(number, 248 - 8 * usize::try_from(number).unwrap(), 6, 0);
    }
    let got = ring.log().unwrap_err().to_string();
    assert!(got.contains("together longer than their ring"), "{got}");
}

proptest! {
    #[test]
    fn damage_never_panics(form in 0..3_usize, changes in proptest::collection::vec((0..5_u8, any::<u16>(), any::<u64>(), 0..3_u8), 1..8)) {
        let mut ring = sample(FORMS[form]);
        for (place, offset, value, how) in changes {
            let (base, len) = match place {
                0 => (ring.at, 72),
                1 | 2 => (ring.descriptors, 8 * 24),
                3 => (ring.infos, 8 * 88),
                _ => (ring.texts, 256),
            };
            let target = base + u64::from(offset) % (len / 8) * 8;
            let old = ring.guest.get(target);
            ring.guest.put(target, match how {
                0 => value,
                1 => value & 0xff,
                _ => old ^ 1 << (value & 63),
            });
        }
        if let Ok(log) = ring.log() {
            prop_assert!(log.records.len() <= 1 << 8);
        }
    }
}
