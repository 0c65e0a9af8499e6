//! Which uplink slots are free.

use std::collections::HashSet;

use ipnet::Ipv4Net;

use super::slot::{Slot, slot_count};

/// The slots of a pool, as far as this process knows. The kernel's routing table has the last word.
#[derive(Debug)]
pub(super) struct Slots {
    prefix: String,
    pool: Ipv4Net,
    taken: HashSet<u32>,
    next: u32,
}

impl Slots {
    pub(super) fn new(prefix: &str, pool: Ipv4Net) -> Self {
        let mut slots = Self { prefix: prefix.to_owned(), pool, taken: HashSet::new(), next: 0 };
        // Instances that share a pool rarely meet if each begins somewhere else.
        slots.jump();
        slots
    }

    /// A free slot. The one given back last comes last: the world's late answers to its former owner find nobody.
    pub(super) fn take(&mut self) -> Option<Slot> {
        let count = slot_count(self.pool);
        let index = (0..count).map(|step| (self.next + step) % count).find(|index| !self.taken.contains(index))?;
        self.taken.insert(index);
        self.next = (index + 1) % count;
        Some(Slot::new(&self.prefix, self.pool, index))
    }

    /// The slot that an existing interface occupies, if it is one of the pool's.
    pub(super) fn take_by_name(&mut self, interface: &str) -> Option<Slot> {
        let index = Slot::index_of(&self.prefix, self.pool, interface)?;
        self.taken.insert(index);
        Some(Slot::new(&self.prefix, self.pool, index))
    }

    pub(super) fn give_back(&mut self, slot: &Slot) {
        self.taken.remove(&slot.index);
    }

    /// Goes on at a random place.
    pub(super) fn jump(&mut self) {
        self.next = rand::random_range(0..slot_count(self.pool));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn slots(pool: &str) -> Slots {
        Slots::new("bj000000-", pool.parse().expect("a network"))
    }

    #[test]
    fn every_slot_is_given_once_and_again_when_it_is_back() {
        let mut slots = slots("10.214.0.0/28");
        let taken: Vec<Slot> = std::iter::from_fn(|| slots.take()).collect();
        let distinct: HashSet<_> = taken.iter().map(|slot| slot.index).collect();
        assert_eq!((taken.len(), distinct.len()), (8, 8));
        slots.give_back(&taken[3]);
        assert_eq!(slots.take(), Some(taken[3].clone()));
        assert_eq!(slots.take(), None);
    }

    #[test]
    fn a_slot_rests_before_it_is_given_again() {
        let mut slots = slots("10.214.0.0/28");
        let first = slots.take().expect("a slot");
        slots.give_back(&first);
        assert_ne!(slots.take().expect("a slot").index, first.index);
    }

    #[test]
    fn slots_found_on_the_host_are_not_given_out() {
        let mut slots = slots("10.214.0.0/29");
        for index in [0, 1, 3] {
            assert!(slots.take_by_name(&format!("bj000000-{index}")).is_some());
        }
        assert!(slots.take_by_name("bj111111-2").is_none());
        assert_eq!(slots.take().map(|slot| slot.index), Some(2));
        assert_eq!(slots.take(), None);
    }
}
