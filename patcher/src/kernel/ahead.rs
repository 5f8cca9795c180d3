//! Members of the guest's lists, read several at a time in the order of a walk before this one.
//!
//! Where a member is, the one before it tells: a walk waits for the memory of each in turn. If the order is known, the next ones can be read
//! without that, and a processor waits for all of them together. The walk still goes by what the members say: a guess that is wrong costs a read.

use super::gather::{Fields, Gather};
use super::locate::KernelError;
use super::memory::Memory;
use crate::addr::Gva;
use crate::guest::ReadPhys;

/// Members that are read at once, and that are looked among for one that is not the next.
const AT_ONCE: usize = 8;

/// Members as they are read.
pub(crate) struct Ahead<'a> {
    order: &'a [Gva],
    /// The place in the order behind the last that was read.
    next: usize,
    /// Those that have been read, and room for others.
    held: Vec<(Option<Gva>, Fields)>,
}

impl<'a> Ahead<'a> {
    /// `order` is where members were found before.
    pub(crate) fn new(gather: &'a Gather, order: &'a [Gva]) -> Self {
        Self {
            order,
            next: 0,
            held: vec![(None, gather.fields()); AT_ONCE],
        }
    }

    /// The fields of the member at `at`.
    ///
    /// # Errors
    /// When it cannot be read.
    pub(crate) fn read<R: ReadPhys + ?Sized>(
        &mut self,
        memory: &Memory<'_, R>,
        at: Gva,
    ) -> Result<&Fields, KernelError> {
        let held = self.held.iter().position(|(held, _)| *held == Some(at));
        let place = match held {
            Some(place) => place,
            None => self.fill(memory, at).map(|()| 0)?,
        };
        Ok(&self.held[place].1)
    }

    /// Reads the member at `at`, and behind it those that are likely to follow.
    fn fill<R: ReadPhys + ?Sized>(
        &mut self,
        memory: &Memory<'_, R>,
        at: Gva,
    ) -> Result<(), KernelError> {
        let mut coming = self.order.iter().skip(self.next).take(AT_ONCE);
        let place = coming.position(|coming| *coming == at);
        // Of one that is not to be expected here nothing follows.
        let following = place.map_or(0, |_| AT_ONCE - 1);
        self.next += place.map_or(0, |skipped| skipped + 1);
        let follow = self.order.iter().skip(self.next).take(following);
        self.next += follow.len();
        let mut follow = follow.copied();
        let mut wanted = Ok(());
        for (place, (held, fields)) in self.held.iter_mut().enumerate() {
            let next = if place == 0 { Some(at) } else { follow.next() };
            let read = next.map(|next| fields.read(memory, next));
            *held = next.filter(|_| matches!(read, Some(Ok(()))));
            if let (0, Some(read)) = (place, read) {
                wanted = read;
            }
        }
        wanted
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::Ahead;
    use crate::addr::Gva;
    use crate::kernel::gather::Gather;
    use crate::kernel::memory::Memory;
    use crate::kernel::testing::Form;
    use crate::kernel::testing::guest::TinyGuest;

    const MEMBERS: u64 = 40;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        /// Whatever order is believed in, each member is read as it is; places where nothing is are no members.
        #[test]
        fn a_wrong_order_changes_nothing(order in proptest::collection::vec(0..MEMBERS + 2, 0..80), from in 0..MEMBERS) {
            let mut guest = TinyGuest::new(Form::New, 4);
            let members: Vec<u64> = (0..MEMBERS).map(|_| guest.object(64)).collect();
            for (number, at) in members.iter().enumerate() {
                guest.put(at + 8, number as u64);
            }
            let kernel = guest.kernel();
            let memory = Memory::new(&kernel, &guest).unwrap();
            let place = |number: &u64| members.get(usize::try_from(*number).unwrap());
            let order = order.iter().map(|number| Gva(place(number).copied().unwrap_or(number.saturating_sub(MEMBERS))));
            let order: Vec<Gva> = order.collect();
            let gather = Gather::new(&[(8, 8)]);
            let mut ahead = Ahead::new(&gather, &order);
            for number in (from..MEMBERS).chain(0..from) {
                let at = Gva(*place(&number).unwrap());
                let read = ahead.read(&memory, at).unwrap().u64(8);
                prop_assert_eq!(read, number);
            }
            prop_assert!(ahead.read(&memory, Gva(0)).is_err());
        }
    }
}
