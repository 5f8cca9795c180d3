//! Sets of nonzero 64-bit keys in the arena's data half: the host fills them, handlers look into them.
//!
//! A key has two slots that it may be in, so a look-up reads at most two. The host changes a set by single aligned stores, in the order given,
//! while the guest looks into it: a key that stays is found at any time. For that a key only ever moves from its first slot to its second,
//! which look-ups read in this order, and is in both before it leaves the first (two-choice hashing with the moves of cuckoo hashing;
//! loads are not reordered with loads, nor stores with stores: Intel SDM volume 3, section 9.2.2).

use crate::addr::Gva;

/// Multipliers of the two hashes, of a key's lower half and of all of it; only that they are odd and look random matters.
pub(crate) const FIRST: u32 = 0x9e37_79b1;
pub(crate) const SECOND: u64 = 0x9e37_79b9_7f4a_7c15;
/// Sizes that are possible, as powers of two.
const BITS: std::ops::RangeInclusive<u8> = 1..=20;
/// Most keys that are moved to make room for one.
const MAX_MOVES: usize = 64;

/// Why a set is not as asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SetError {
    /// Zero is no key.
    #[error("zero cannot be in a set: it is what no task, argument or field is told by")]
    Zero,
    /// No room for the key.
    #[error(
        "{key:#x} finds no room in a set with {len} of {slots} slots in use; a set of twice as many has it"
    )]
    Full {
        /// The key.
        key: u64,
        /// Keys in the set.
        len: usize,
        /// Its slots.
        slots: usize,
    },
    /// No set can be so large, or so small.
    #[error("a set of 2^{bits} slots is not possible: 2^1 to 2^20 are")]
    Size {
        /// The power of two.
        bits: u8,
    },
    /// It does not lie where a handler can look into it.
    #[error("a set of {size:#x} bytes at {at} is not where handlers can look into it")]
    Place {
        /// Its first slot.
        at: Gva,
        /// Its bytes.
        size: u64,
    },
}

/// Where a set is: all that a handler needs to know of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SetPlace {
    /// Its first slot, aligned to 8 bytes.
    pub at: Gva,
    /// Its slots, as a power of two.
    pub bits: u8,
    /// Whether no key in it has more than 32 bits, as numbers of tasks, users and the like. A look-up for so many is then one of the lower half
    /// alone, and must not outlive that.
    pub low: bool,
}

/// Eight bytes to store at an address that is aligned to as many.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Store {
    /// Where.
    pub at: Gva,
    /// What.
    pub value: u64,
}

/// A set, as the host knows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Set {
    at: Gva,
    bits: u8,
    slots: Vec<u64>,
    len: usize,
}

/// Whether `key` has at most 32 bits.
#[must_use]
pub fn is_low(key: u64) -> bool {
    u32::try_from(key).is_ok()
}

impl Set {
    /// An empty set at `at` with 2^`bits` slots.
    ///
    /// # Errors
    /// [`SetError::Size`] or [`SetError::Place`].
    pub fn new(at: Gva, bits: u8) -> Result<Self, SetError> {
        if !BITS.contains(&bits) {
            return Err(SetError::Size { bits });
        }
        let size = 8 << bits;
        if !at.0.is_multiple_of(8) || at.checked_add(size).is_none() {
            return Err(SetError::Place { at, size });
        }
        let mut set = Self {
            at,
            bits,
            slots: vec![0; 1 << bits],
            len: 0,
        };
        set.slots[0] = set.empty(0);
        Ok(set)
    }

    /// Its memory: the first byte, and how many.
    #[must_use]
    pub fn memory(&self) -> (Gva, u64) {
        (self.at, 8 << self.bits)
    }

    /// Where it is, with the keys that are in it now, which are all looked at.
    #[must_use]
    pub fn place(&self) -> SetPlace {
        SetPlace {
            at: self.at,
            bits: self.bits,
            low: self.keys().all(is_low),
        }
    }

    /// The slots that `key` may be in, in the order in which they are looked into.
    fn slots_of(&self, key: u64) -> [usize; 2] {
        let bits = u32::from(self.bits);
        let low = u32::try_from(key & 0xffff_ffff).unwrap_or(0);
        let first = u64::from(low.wrapping_mul(FIRST) >> (32 - bits));
        let second = key.wrapping_mul(SECOND) >> (64 - bits);
        [first, second].map(|slot| usize::try_from(slot).unwrap_or(0))
    }

    /// Its memory as it is to be now.
    #[must_use]
    pub fn bytes(&self) -> Vec<u8> {
        self.slots
            .iter()
            .flat_map(|slot| slot.to_le_bytes())
            .collect()
    }

    /// Keys in it.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Whether `key` is in it.
    #[must_use]
    pub fn contains(&self, key: u64) -> bool {
        self.slot_of(key).is_some()
    }

    /// The keys in it, in no order that means anything.
    pub fn keys(&self) -> impl Iterator<Item = u64> {
        let slots = self.slots.iter().enumerate();
        let used = slots.filter(|(slot, key)| **key != self.empty(*slot));
        used.map(|(_, key)| *key)
    }

    /// Puts `key` in: the stores to make, in order; none if it is in already.
    ///
    /// # Errors
    /// [`SetError::Zero`], or [`SetError::Full`], after which the set is as it was.
    pub fn insert(&mut self, key: u64) -> Result<Vec<Store>, SetError> {
        if key == 0 {
            return Err(SetError::Zero);
        }
        if self.contains(key) {
            return Ok(Vec::new());
        }
        let mut slots = self.slots_of(key).into_iter();
        let way = slots.find_map(|slot| self.way(slot));
        let Some(way) = way else {
            return Err(SetError::Full {
                key,
                len: self.len,
                slots: self.slots.len(),
            });
        };
        self.len += 1;
        let moved = way.windows(2).rev().map(|pair| (pair[1], pair[0]));
        let mut stores = Vec::new();
        for (to, from) in moved {
            stores.push(self.store(to, self.slots[from]));
        }
        stores.push(self.store(way[0], key));
        Ok(stores)
    }

    /// Takes `key` out: the store to make; none if it is not in.
    pub fn remove(&mut self, key: u64) -> Option<Store> {
        let slot = self.slot_of(key)?;
        self.len -= 1;
        Some(self.store(slot, self.empty(slot)))
    }

    /// What an empty slot holds: nothing that a look-up for it finds there. Zero does, but in the first slot, which is where zero is looked for;
    /// there it is a key that is looked for elsewhere.
    fn empty(&self, slot: usize) -> u64 {
        let elsewhere = |key: &u64| !self.slots_of(*key).contains(&0);
        match slot {
            0 => (1..).find(elsewhere).unwrap_or(0),
            _ => 0,
        }
    }

    fn slot_of(&self, key: u64) -> Option<usize> {
        let slots = self.slots_of(key);
        slots
            .into_iter()
            .find(|slot| key != 0 && self.slots[*slot] == key)
    }

    /// Slots from `slot` to an empty one, each but the last with a key in it whose second slot is the next.
    fn way(&self, slot: usize) -> Option<Vec<usize>> {
        let mut way = vec![slot];
        for _ in 0..MAX_MOVES {
            let at = *way.last()?;
            let key = self.slots[at];
            if key == self.empty(at) {
                return Some(way);
            }
            let [first, second] = self.slots_of(key);
            if first != at || way.contains(&second) {
                return None;
            }
            way.push(second);
        }
        None
    }

    fn store(&mut self, slot: usize, value: u64) -> Store {
        self.slots[slot] = value;
        Store {
            at: Gva(self.at.0.wrapping_add(slot as u64 * 8)),
            value,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::{Set, SetError, Store};
    use crate::addr::Gva;

    const AT: Gva = Gva(0xffff_ffff_ffa0_1000);

    /// The guest's memory of a set.
    struct Memory(Vec<u64>);

    impl Memory {
        fn of(set: &Set) -> Self {
            let bytes = set.bytes();
            let slots = bytes.chunks(8);
            Self(
                slots
                    .map(|slot| u64::from_le_bytes(slot.try_into().unwrap()))
                    .collect(),
            )
        }

        fn slot(store: &Store) -> usize {
            usize::try_from((store.at.0 - AT.0) / 8).unwrap()
        }

        /// A look-up that reads its first slot before the first of `stores` and the second behind any number of them.
        fn found(&self, set: &Set, key: u64, stores: &[Store]) -> bool {
            let [first, second] = set.slots_of(key);
            let mut now = self.0.clone();
            let mut seen = now[second] == key;
            let early = now[first] == key;
            if !early {
                for store in stores {
                    now[Self::slot(store)] = store.value;
                    seen &= now[second] == key;
                }
            }
            early || seen
        }
    }

    #[test]
    fn zero_and_impossible_sizes_are_errors() {
        let mut set = Set::new(AT, 4).unwrap();
        assert_eq!(set.insert(0), Err(SetError::Zero));
        assert!(!set.contains(0) && set.remove(0).is_none());
        for bits in [0, 21, 255] {
            assert_eq!(Set::new(AT, bits).unwrap_err(), SetError::Size { bits });
        }
        assert!(matches!(Set::new(Gva(4), 1), Err(SetError::Place { .. })));
    }

    #[test]
    fn what_an_empty_slot_holds_is_never_found() {
        for bits in 1..=12 {
            let set = Set::new(AT, bits).unwrap();
            let memory = Memory::of(&set);
            for key in (0..2000).chain([u64::MAX, 1 << 32, 5 << 32]) {
                assert!(!memory.found(&set, key, &[]), "{key:#x} of {bits}");
            }
        }
    }

    #[test]
    fn a_set_half_full_of_tasks_has_room() {
        // As a slab has them, in memory of 64 GiB.
        let task = |index: u64| {
            0xffff_8880_0000_0000 + ((index % 16) << 32) + (index / 16) * 9280 / 64 * 64
        };
        let mut set = Set::new(AT, 12).unwrap();
        for index in 0..1300 {
            set.insert(task(index)).unwrap();
        }
    }

    proptest! {
        #[test]
        fn what_stays_is_found_between_any_two_stores(
            changes in proptest::collection::vec((any::<bool>(), 1_u64..60), 1..120),
            bits in 1_u8..7,
        ) {
            let mut set = Set::new(AT, bits).unwrap();
            let mut memory = Memory::of(&set);
            let mut model = BTreeSet::new();
            for (insert, key) in changes {
                let key = key * 0x0001_0000_0440;
                let stays: Vec<u64> = model.iter().copied().filter(|has| *has != key).collect();
                let stores = if insert {
                    match set.insert(key) {
                        Ok(stores) => {
                            model.insert(key);
                            stores
                        }
                        Err(error) => {
                            let (len, slots) = (model.len(), 1 << bits);
                            prop_assert_eq!(error, SetError::Full { key, len, slots });
                            Vec::new()
                        }
                    }
                } else {
                    prop_assert_eq!(set.contains(key), model.remove(&key));
                    set.remove(key).into_iter().collect()
                };
                for done in 0..=stores.len() {
                    for has in &stays {
                        prop_assert!(memory.found(&set, *has, &stores[done..]), "{:#x}", has);
                    }
                    if let Some(store) = stores.get(done) {
                        memory.0[Memory::slot(store)] = store.value;
                    }
                }
                prop_assert_eq!(&memory.0, &Memory::of(&set).0);
                prop_assert_eq!(set.len(), model.len());
                prop_assert!(!set.place().low || model.is_empty());
                let all = (1..60).map(|key| key * 0x0001_0000_0440);
                prop_assert!(all.clone().all(|key| memory.found(&set, key, &[]) == model.contains(&key)));
            }
        }
    }
}
