//! How fast a recovery moves, from counters that come with the time. Pure.

use std::time::{Duration, Instant};

use pgtandem_proto::message::Progress;

/// Rates are over the last time from this length to twice this length.
const WINDOW: Duration = Duration::from_secs(5);
/// Nothing is said about a shorter time.
const SHORTEST: Duration = Duration::from_millis(500);

/// Bytes in a second; 0 as long as nothing is known.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Rates {
    pub compared: f64,
    pub sent: f64,
    /// WAL that the source makes, and that the node replays.
    pub wal_made: f64,
    pub wal_replayed: f64,
}

/// Remembers counters of some seconds ago.
#[derive(Clone, Debug, Default)]
pub struct Pace {
    older: Option<(Instant, Progress)>,
    newer: Option<(Instant, Progress)>,
}

impl Pace {
    /// Takes the counters of now. -> how fast they grow
    pub fn handle(&mut self, now: Instant, progress: Progress) -> Rates {
        let newer = *self.newer.get_or_insert((now, progress));
        let (since, before) = *self.older.get_or_insert(newer);
        if now.saturating_duration_since(newer.0) >= WINDOW {
            (self.older, self.newer) = (Some(newer), Some((now, progress)));
        }
        let took = now.saturating_duration_since(since);
        if took < SHORTEST {
            return Rates::default();
        }
        let rate = |now: u64, before: u64| now.saturating_sub(before) as f64 / took.as_secs_f64();
        // A position that was not known before is no speed.
        let position = |now: u64, before: u64| if before == 0 { 0.0 } else { rate(now, before) };
        Rates {
            compared: rate(progress.bytes_compared, before.bytes_compared),
            sent: rate(progress.bytes_sent, before.bytes_sent),
            wal_made: position(progress.wal_source, before.wal_source),
            wal_replayed: position(progress.wal_replayed, before.wal_replayed),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(bytes: u64) -> Progress {
        Progress { bytes_compared: bytes, wal_source: 1000 + bytes / 2, ..Progress::default() }
    }

    #[test]
    fn rates_are_of_the_last_seconds() {
        let (mut pace, start) = (Pace::default(), Instant::now());
        assert_eq!(pace.handle(start, at(0)), Rates::default());
        for second in 1..=10 {
            let rates = pace.handle(start + Duration::from_secs(second), at(second * 100));
            assert!((rates.compared - 100.0).abs() < 1.0 && (rates.wal_made - 50.0).abs() < 1.0, "{rates:?}");
        }
        // It stands still: after two windows nothing is left of what was before.
        for second in 11..=30 {
            pace.handle(start + Duration::from_secs(second), at(1000));
        }
        assert!(pace.handle(start + Duration::from_secs(31), at(1000)).compared < 1.0);
    }
}
