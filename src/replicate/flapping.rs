//! A node that comes back and is lost again, again and again: how long it is kept out. Pure.
//!
//! Each loss may cost writes the limit of a follower's answer (`proxy.follower_ms_max`), and each return costs them a moment. A node that
//! is restarted a few times is let in at once; one that goes on being lost waits longer each time, so that clients are left alone.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// A return counts for that long.
pub const REMEMBERED_S: u64 = 600;
/// That many returns within this time are free.
pub const FREE: usize = 5;
/// The first wait; each further one is twice as long, up to the second number.
const WAIT_S: (u64, u64) = (10, 160);

/// When a node came back, the latest last.
#[derive(Debug, Default)]
pub struct Returns {
    at: VecDeque<Instant>,
}

impl Returns {
    pub fn note(&mut self, now: Instant) {
        self.forget(now);
        // More than these do not make the wait longer.
        if self.at.len() > FREE + 8 {
            self.at.pop_front();
        }
        self.at.push_back(now);
    }

    /// How often it came back lately, and how long it is kept out now that it is lost again.
    pub fn wait(&mut self, now: Instant) -> (usize, Duration) {
        self.forget(now);
        let count = self.at.len();
        let (first, longest) = WAIT_S;
        let wait = match count.checked_sub(FREE) {
            None | Some(0) => 0,
            Some(over) => (first << (over - 1).min(16)).min(longest),
        };
        (count, Duration::from_secs(wait))
    }

    fn forget(&mut self, now: Instant) {
        let is_old = |at: &Instant| now.duration_since(*at) >= Duration::from_secs(REMEMBERED_S);
        while self.at.front().is_some_and(is_old) {
            self.at.pop_front();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn after(count: u64, every_s: u64) -> (usize, u64) {
        let begin = Instant::now();
        let mut returns = Returns::default();
        for n in 0..count {
            returns.note(begin + Duration::from_secs(n * every_s));
        }
        let (known, wait) = returns.wait(begin + Duration::from_secs(count * every_s));
        (known, wait.as_secs())
    }

    #[test]
    fn a_few_restarts_are_free_and_one_that_flaps_waits_longer_each_time() {
        assert_eq!([0, 1, 5].map(|count| after(count, 8).1), [0; 3]);
        assert_eq!([6, 7, 8, 9, 10, 11, 100].map(|count| after(count, 1).1), [10, 20, 40, 80, 160, 160, 160]);
    }

    #[test]
    fn what_was_long_ago_is_forgotten() {
        assert_eq!(after(50, REMEMBERED_S), (0, 0));
        assert_eq!(after(50, 100), (5, 0));
    }
}
