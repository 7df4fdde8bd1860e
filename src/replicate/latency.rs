//! How long commits take, over the last seconds. Pure: time comes in.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// Seconds that are remembered.
const SECONDS_MAX: usize = 20;
/// Counts in a second: eight for each doubling, from 16 microseconds to about a second; what takes longer is in the last one.
const BUCKETS: usize = 128;
const PER_DOUBLING: f64 = 8.0;
const SHORTEST_US: f64 = 16.0;
/// Nothing is said about fewer commits.
const COMMITS_MIN: u64 = 20;

/// Counts of the last seconds.
#[derive(Debug, Default)]
pub struct Latencies {
    seconds: VecDeque<(Instant, [u32; BUCKETS])>,
}

impl Latencies {
    /// A commit has taken so long.
    pub fn handle(&mut self, now: Instant, took: Duration) {
        let is_over = |(begun, _): &(Instant, _)| now.saturating_duration_since(*begun) >= Duration::from_secs(1);
        if self.seconds.back().is_none_or(is_over) {
            if self.seconds.len() == SECONDS_MAX {
                self.seconds.pop_front();
            }
            self.seconds.push_back((now, [0; BUCKETS]));
        }
        if let Some((_, counts)) = self.seconds.back_mut()
            && let Some(count) = counts.get_mut(bucket(took))
        {
            *count = count.saturating_add(1);
        }
    }

    /// The median of the last `over`; `None`: there were too few.
    #[must_use]
    pub fn median(&self, now: Instant, over: Duration) -> Option<Duration> {
        let recent = self.seconds.iter().filter(|(begun, _)| now.saturating_duration_since(*begun) <= over);
        let mut sums = [0_u64; BUCKETS];
        for (_, counts) in recent {
            for (sum, count) in sums.iter_mut().zip(counts) {
                *sum += u64::from(*count);
            }
        }
        let total: u64 = sums.iter().sum();
        let mut before = 0;
        let middle = sums.iter().position(|sum| {
            before += sum;
            before * 2 >= total
        });
        middle.filter(|_| total >= COMMITS_MIN).map(middle_of)
    }
}

#[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "not negative, and cut to the last bucket")]
fn bucket(took: Duration) -> usize {
    let us = took.as_secs_f64() * 1e6;
    (((us.max(SHORTEST_US) / SHORTEST_US).log2() * PER_DOUBLING) as usize).min(BUCKETS - 1)
}

fn middle_of(bucket: usize) -> Duration {
    Duration::from_secs_f64(SHORTEST_US / 1e6 * ((bucket as f64 + 0.5) / PER_DOUBLING).exp2())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_is_of_the_last_seconds() {
        let (mut latencies, start) = (Latencies::default(), Instant::now());
        assert_eq!(latencies.median(start, Duration::from_secs(10)), None);
        for second in 0..30_u64 {
            let now = start + Duration::from_secs(second);
            // Slower from the 24th second on, and a long one now and then.
            let usual = Duration::from_millis(if second < 24 { 2 } else { 9 });
            for n in 0..30 {
                latencies.handle(now, if n % 10 == 0 { Duration::from_secs(100) } else { usual });
            }
        }
        let now = start + Duration::from_secs(29);
        let is_about = |over: u64, ms: f64| {
            let median = latencies.median(now, Duration::from_secs(over)).unwrap().as_secs_f64() * 1000.0;
            assert!((ms * 0.9..ms * 1.1).contains(&median), "{median} ms instead of {ms}");
        };
        is_about(3, 9.0);
        is_about(100, 2.0);
        assert_eq!(latencies.median(now + Duration::from_secs(60), Duration::from_secs(5)), None, "nobody writes");
        assert_eq!(latencies.seconds.len(), SECONDS_MAX);
    }

    #[test]
    fn any_time_has_its_place() {
        assert_eq!((bucket(Duration::ZERO), bucket(Duration::MAX)), (0, BUCKETS - 1));
        for us in [20, 500, 3_000, 40_000, 600_000] {
            let told = middle_of(bucket(Duration::from_micros(us))).as_secs_f64() * 1e6;
            assert!((told / us as f64 - 1.0).abs() < 0.1, "{us}: {told}");
        }
    }
}
