//! How many retries the API may be asked to bear.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use parking_lot::{Mutex, MutexGuard};
use tokio::time::Instant;

/// The window over which the budget holds, in seconds.
const WINDOW: u64 = 10;

/// Allows a retry while, over the last 10 s, retries are at most a share of the requests plus a number a second. It goes
/// on through changes of the configuration, which say how many from then on.
///
/// tower's `TpsBudget` has the same shape, but counts in slots of a second (so that a burst at a
/// slot's border exceeds the window's limit) and by a clock that tests cannot turn.
#[derive(Debug)]
pub(super) struct Budget {
    start: Instant,
    /// Requests by second, modulo the ring's length: the second in the upper half, the count in the
    /// lower. Lock-free, since every request counts itself.
    requests: [AtomicU64; WINDOW as usize + 2],
    /// When each retry of the window was sent; never longer than the budget.
    retries: Mutex<VecDeque<Instant>>,
}

impl Budget {
    pub fn new() -> Self {
        Self { start: Instant::now(), requests: Default::default(), retries: Mutex::default() }
    }

    fn second(&self, now: Instant) -> u64 {
        now.saturating_duration_since(self.start).as_secs()
    }

    /// Counts a request of this moment.
    pub fn deposit(&self, now: Instant) {
        let second = self.second(now);
        let slot = &self.requests[(second % self.requests.len() as u64) as usize];
        // Relaxed: each slot is a counter of its own, and nothing else hangs on it.
        let _ = slot.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |slot| {
            Some(if slot >> 32 == second & 0xFFFF_FFFF { slot + 1 } else { second << 32 | 1 })
        });
    }

    /// Whether there is a retry in it: `ratio` of the requests and `floor` a second.
    pub fn has(&self, ratio: f64, floor: u32) -> bool {
        self.retries(Instant::now()).len() < self.allowed(ratio, floor)
    }

    /// Takes one out, if there is one.
    pub fn withdraw(&self, ratio: f64, floor: u32) -> bool {
        let allowed = self.allowed(ratio, floor);
        let now = Instant::now();
        let mut retries = self.retries(now);
        let is_granted = retries.len() < allowed;
        if is_granted {
            retries.push_back(now);
        }
        is_granted
    }

    /// How many there may be in the window that ends now.
    fn allowed(&self, ratio: f64, floor: u32) -> usize {
        let second = self.second(Instant::now());
        // A slot counts only while all of it lies in the window: at the edge, rather too few.
        let requests: u64 = self
            .requests
            .iter()
            .map(|slot| slot.load(Ordering::Relaxed))
            .filter(|slot| (slot >> 32) + WINDOW > second)
            .map(|slot| slot & 0xFFFF_FFFF)
            .sum();
        let floor = (floor as usize).saturating_mul(WINDOW as usize);
        ((requests as f64 * ratio) as usize).saturating_add(floor)
    }

    /// Those of the window that ends now.
    fn retries(&self, now: Instant) -> MutexGuard<'_, VecDeque<Instant>> {
        let mut retries = self.retries.lock();
        while retries.front().is_some_and(|sent| now - *sent >= Duration::from_secs(WINDOW)) {
            retries.pop_front();
        }
        retries
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn over_any_ten_seconds_retries_stay_within_a_fifth_of_the_requests_and_the_floor() {
        let budget = Budget::new();
        let mut granted: Vec<Instant> = Vec::new();
        let mut asked: Vec<Instant> = Vec::new();
        for tick in 0..600 {
            for _ in 0..20 {
                budget.deposit(Instant::now());
                asked.push(Instant::now());
                if budget.withdraw(0.2, 3) {
                    granted.push(Instant::now());
                }
            }
            let from = Instant::now();
            let within = |times: &[Instant]| {
                times.iter().filter(|time| from - **time < Duration::from_secs(WINDOW)).count()
            };
            assert!(within(&granted) as f64 <= within(&asked) as f64 * 0.2 + 30.0, "tick {tick}");
            tokio::time::advance(Duration::from_millis(100)).await;
        }
        assert!(granted.len() > 1000, "the budget refills: {} granted", granted.len());
    }

    #[tokio::test(start_paused = true)]
    async fn a_budget_of_nothing_grants_nothing() {
        let budget = Budget::new();
        budget.deposit(Instant::now());
        assert!(!budget.withdraw(0.0, 0));
    }

    #[tokio::test(start_paused = true)]
    async fn the_floor_alone_allows_thirty_retries_at_once_and_more_after_ten_seconds() {
        let budget = Budget::new();
        assert_eq!((0..100).filter(|_| budget.withdraw(0.0, 3)).count(), 30);
        tokio::time::advance(Duration::from_millis(9_999)).await;
        assert!(!budget.withdraw(0.0, 3));
        tokio::time::advance(Duration::from_millis(1)).await;
        assert_eq!((0..100).filter(|_| budget.withdraw(0.0, 3)).count(), 30);
    }

    #[tokio::test(start_paused = true)]
    async fn what_was_taken_counts_against_another_share_and_floor() {
        let budget = Budget::new();
        assert_eq!((0..100).filter(|_| budget.withdraw(0.0, 1)).count(), 10);
        assert_eq!((0..100).filter(|_| budget.withdraw(0.0, 3)).count(), 20);
        assert!(!budget.withdraw(0.0, 2));
    }
}
