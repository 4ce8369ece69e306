//! The memory that bodies take: all of them together no more than `limits.max_buffered`.

use std::sync::Arc;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// All of it.
#[derive(Debug, Clone)]
pub(crate) struct Room {
    /// Bytes that may still be held.
    free: Arc<Semaphore>,
    /// In bytes.
    size: usize,
}

/// What a body takes of it; once that was handed over, the next one.
#[derive(Debug)]
pub(crate) struct Share {
    room: Room,
    taken: Option<OwnedSemaphorePermit>,
    /// How much of that is for what is still to come, in bytes.
    early: usize,
}

impl Room {
    /// Room for so many bytes.
    pub fn new(size: usize) -> Self {
        Self { free: Arc::new(Semaphore::new(size)), size }
    }

    /// Nothing of it yet.
    pub fn share(&self) -> Share {
        Share { room: self.clone(), taken: None, early: 0 }
    }
}

impl Share {
    /// Takes room for so many bytes that have come, or returns false if there is none.
    pub fn take(&mut self, bytes: usize) -> bool {
        let early = bytes.min(self.early);
        self.early -= early;
        early == bytes || self.acquire(bytes - early)
    }

    /// Takes room for so many bytes that have only been announced. That must not be at the cost of what comes to others: half
    /// of the room stays free.
    pub fn take_early(&mut self, bytes: usize) -> bool {
        let others = self.room.size / 2;
        let has_room = self.room.free.available_permits().saturating_sub(bytes) >= others;
        let is_taken = has_room && self.acquire(bytes);
        self.early += if is_taken { bytes } else { 0 };
        is_taken
    }

    fn acquire(&mut self, bytes: usize) -> bool {
        let Ok(bytes) = u32::try_from(bytes) else { return false };
        match (Arc::clone(&self.room.free).try_acquire_many_owned(bytes), &mut self.taken) {
            (Ok(more), Some(taken)) => taken.merge(more),
            (Ok(first), none) => *none = Some(first),
            (Err(_), _) => return false,
        }
        true
    }

    /// All that was taken, for who holds it from now on. What is taken next is another body's.
    pub fn hand_over(&mut self) -> Option<OwnedSemaphorePermit> {
        self.early = 0;
        self.taken.take()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_announced_gets_room_once_and_only_where_half_of_all_stays_free() {
        let room = Room::new(100);
        let (mut one, mut other) = (room.share(), room.share());
        assert!(one.take(10) && !one.take_early(41) && one.take_early(40));
        assert!(!other.take_early(1) && other.take(50) && !other.take(1));
        // It has been paid for, and no more than that.
        assert!(one.take(39) && one.take(1) && !one.take(1));
        drop(one.hand_over());
        assert!(other.take(50) && !other.take(1));
    }

    #[test]
    fn what_one_body_has_announced_is_not_anothers() {
        let room = Room::new(100);
        let mut share = room.share();
        assert!(share.take_early(50));
        drop(share.hand_over());
        assert!(share.take(100) && !share.take(1));
    }

    #[test]
    fn a_body_that_breaks_off_leaves_the_room_that_it_took_early() {
        let room = Room::new(100);
        let mut broken = room.share();
        assert!(broken.take(10) && broken.take_early(40));
        drop(broken);
        assert!(room.share().take(100));
    }
}
