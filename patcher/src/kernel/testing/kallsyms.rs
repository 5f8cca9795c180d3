//! The kallsyms tables of the made-up kernel, in every order that occurs.

use super::{Form, RODATA, Sym, TEXT, symbols};

/// The orders and widths in which kallsyms tables occur.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Order {
    /// As before Linux 4.20: addresses, base, names, and markers of eight bytes.
    Wide,
    /// As before 6.2: with markers of four.
    Old,
    /// As Debian's 6.1.170: the same, and the alphabetical order between markers and tokens.
    OldSorted,
    /// As from 6.4 on: addresses after the tokens.
    New,
    /// As from 7.0 on: each address from its own place, and no base.
    FromItself,
    /// As from 7.2 on: the same, aligned to four bytes.
    Tight,
}

pub(crate) const ORDERS: [Order; 6] = [
    Order::Wide,
    Order::Old,
    Order::OldSorted,
    Order::New,
    Order::FromItself,
    Order::Tight,
];

impl Form {
    fn order(self) -> Order {
        match self {
            Self::Old => Order::Old,
            Self::OldSorted => Order::OldSorted,
            Self::New => Order::New,
        }
    }
}

/// Bytes of something else before the kallsyms tables.
pub(crate) const BEFORE_KALLSYMS: usize = 0x4000;

/// The kallsyms tables for `symbols` in the order of `form`, as they are in the image.
pub(crate) fn kallsyms(form: Form, symbols: &[Sym]) -> Vec<u8> {
    kallsyms_in(form.order(), symbols)
}

/// The kallsyms tables for `symbols`, behind some bytes of something else that begins at `RODATA`.
pub(crate) fn kallsyms_in(order: Order, symbols: &[Sym]) -> Vec<u8> {
    // Every printable character is a token of its own; two longer ones are used where they fit.
    let token = |code: u8| match code {
        1 => "_of_many".to_owned(),
        2 => "Tfiller_".to_owned(),
        b' '..=b'~' => char::from(code).to_string(),
        _ => format!("unused{code}"),
    };
    let (mut table, mut index) = (Vec::new(), Vec::new());
    for code in 0..=255 {
        index.extend(u16::try_from(table.len()).unwrap().to_le_bytes());
        table.extend(token(code).bytes().chain([0]));
    }
    let (names, markers) = names(order, symbols);
    let aligned = |mut bytes: Vec<u8>| {
        let to = if order == Order::Tight { 4 } else { 8 };
        bytes.resize(bytes.len().next_multiple_of(to), 0);
        bytes
    };
    let count = u32::try_from(symbols.len()).unwrap().to_le_bytes().to_vec();
    let base = TEXT.to_le_bytes().to_vec();
    let sequence = vec![1; symbols.len() * 3];
    let absolute = |at: u64| match i32::try_from(at) {
        Ok(absolute) => absolute,
        Err(_) => i32::try_from(TEXT.wrapping_sub(1).wrapping_sub(at).cast_signed()).unwrap(),
    };
    let from_base = symbols
        .iter()
        .flat_map(|(at, ..)| absolute(*at).to_le_bytes());
    let from_base = from_base.collect();
    let from_itself = |start: usize| -> Vec<u8> {
        let place = (RODATA + start as u64..).step_by(4);
        let distance = |(at, from): (&Sym, u64)| at.0.wrapping_sub(from).cast_signed();
        let distances = symbols.iter().zip(place).map(distance);
        distances
            .flat_map(|distance| i32::try_from(distance).unwrap().to_le_bytes())
            .collect()
    };
    let mut bytes: Vec<u8> = (0..u32::try_from(BEFORE_KALLSYMS / 4).unwrap())
        .flat_map(|word| (word % 977).to_le_bytes())
        .collect();
    let mut put = |part: Vec<u8>| {
        bytes.extend(aligned(part));
        bytes.len()
    };
    let parts = match order {
        Order::Wide | Order::Old => vec![from_base, base, count, names, markers, table, index],
        Order::OldSorted => vec![
            from_base, base, count, names, markers, sequence, table, index,
        ],
        Order::New => vec![
            count, names, markers, table, index, from_base, base, sequence,
        ],
        Order::FromItself | Order::Tight => {
            let first = [count, names, markers, table, index].map(&mut put);
            vec![from_itself(first[4]), sequence]
        }
    };
    parts.into_iter().for_each(|part| {
        put(part);
    });
    bytes.extend([0xff; 64]);
    bytes
}

/// The compressed names of `symbols`, and their markers.
fn names(order: Order, symbols: &[Sym]) -> (Vec<u8>, Vec<u8>) {
    let (mut names, mut markers) = (Vec::new(), Vec::new());
    for (at, (_, kind, name)) in symbols.iter().enumerate() {
        if at % 256 == 0 {
            let marker = (names.len() as u64).to_le_bytes();
            let width = if order == Order::Wide { 8 } else { 4 };
            markers.extend(&marker[..width]);
        }
        let whole = format!("{kind}{name}")
            .replace("Tfiller_", "\u{2}")
            .replace("_of_many", "\u{1}");
        let len = u16::try_from(whole.len()).unwrap();
        if len < 0x80 {
            names.push(u8::try_from(len).unwrap());
        } else {
            names.extend([
                0x80 | (len & 0x7f).to_le_bytes()[0],
                (len >> 7).to_le_bytes()[0],
            ]);
        }
        names.extend(whole.bytes());
    }
    (names, markers)
}

/// Where the base of the symbols' addresses is.
pub(crate) fn kallsyms_base(form: Form) -> u64 {
    let tables = kallsyms(form, &symbols(form));
    let is_base = |at: &usize| tables[*at..].starts_with(&TEXT.to_le_bytes());
    let base = (BEFORE_KALLSYMS..tables.len()).step_by(8).find(is_base);
    RODATA + base.unwrap() as u64
}
