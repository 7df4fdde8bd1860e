//! When the next base copy is due. Pure: time is an argument, seconds since 1970.
//!
//! Order of calls: [`Schedule::is_due`] whenever someone looks; if it says so, a copy is made and [`Schedule::ended`] is told.

/// The pause after a copy that failed, doubled each time up to [`RETRY_S_MAX`].
pub const RETRY_S: u64 = 60;
pub const RETRY_S_MAX: u64 = 3600;

#[derive(Clone, Copy, Debug)]
pub struct Schedule {
    /// 0: never.
    every_s: u64,
    /// Not before this, after a failure.
    not_before_s: u64,
    failures: u32,
}

impl Schedule {
    #[must_use]
    pub fn new(every_s: u64) -> Schedule {
        Schedule { every_s, not_before_s: 0, failures: 0 }
    }

    /// `last_s` is when the newest copy of the current stream ended; None: it has none, and its WAL is of no use yet.
    #[must_use]
    pub fn is_due(&self, now_s: u64, last_s: Option<u64>) -> bool {
        if self.every_s == 0
            || (self.failures > 0 && now_s < self.not_before_s && self.not_before_s - now_s <= RETRY_S_MAX)
        {
            return false;
        }
        // A copy from the future was made under a wrong clock, and says nothing of when the next one is due.
        last_s.is_none_or(|last_s| last_s.abs_diff(now_s) >= self.every_s)
    }

    pub fn ended(&mut self, now_s: u64, well: bool) {
        self.failures = if well { 0 } else { self.failures.saturating_add(1) };
        let doubled = RETRY_S.saturating_mul(1_u64.checked_shl(self.failures.saturating_sub(1)).unwrap_or(u64::MAX));
        self.not_before_s = now_s.saturating_add(doubled.min(RETRY_S_MAX));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_copy_is_due_at_once_and_then_by_the_interval() {
        let schedule = Schedule::new(86_400);
        assert!(schedule.is_due(1_000_000, None));
        assert!(!schedule.is_due(1_000_000, Some(999_999)));
        assert!(schedule.is_due(1_000_000, Some(1_000_000 - 86_400)));
        assert!(!Schedule::new(0).is_due(1_000_000, None));
    }

    proptest::proptest! {
        #[test]
        fn failures_are_tried_again_later_and_later_and_never_given_up(failures in 1_u32..80, now_s in 0_u64..1 << 40) {
            let mut schedule = Schedule::new(3600);
            for _ in 0..failures {
                schedule.ended(now_s, false);
            }
            assert!(!schedule.is_due(now_s + RETRY_S - 1, None));
            assert!(schedule.is_due(now_s + RETRY_S_MAX, None));
            // A clock that was set back holds nothing up for longer.
            assert!(schedule.is_due(now_s.saturating_sub(2 * RETRY_S_MAX), None) || now_s < 2 * RETRY_S_MAX);
            schedule.ended(now_s, true);
            assert!(schedule.is_due(now_s, None));
        }
    }
}
