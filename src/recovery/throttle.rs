//! How fast a fill may read on the leader, by how long commits take there. Pure: called once a second.
//!
//! As long as the median is above its value before the recovery by more than the written part, the limit is halved; when it is not, the limit
//! grows again, and goes. What slowing down does not cure is not the fill's doing: after a while at the lowest limit the median as it is
//! becomes the usual one.

use std::time::Duration;

/// Lowest limit, bytes in a second: a recovery must come to its end.
pub const SLOWEST_BYTES_PER_S: u64 = 8 << 20;
/// A median that is longer by less than this is not too long, whatever part of the usual one it is.
pub const NOTICED: Duration = Duration::from_millis(1);
/// The median is of so many seconds: a change of the limit shows in it after that time.
pub const SECONDS: u32 = 2;
/// Decisions at the lowest limit until the median as it is counts as usual.
pub const IN_VAIN_MAX: u32 = 10;

/// A fill that is slowed down, and why.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Slowed {
    pub bytes_per_s_max: u64,
    /// Medians of commits: before the recovery, and now.
    pub usual: Duration,
    pub now: Duration,
}

/// Call [`Throttle::handle`] once a second; what it gives is the limit from then on.
#[derive(Debug)]
pub struct Throttle {
    percent_max: u64,
    usual: Option<Duration>,
    slowed: Option<Slowed>,
    /// Fastest second without a limit.
    fastest: u64,
    /// Seconds until a change of the limit can be seen.
    blind: u32,
    in_vain: u32,
}

impl Throttle {
    /// `percent_max`: of the `usual` median; 0: never slower. Without a usual one nothing is ever too slow.
    #[must_use]
    pub fn new(percent_max: u64, usual: Option<Duration>) -> Self {
        Self { percent_max, usual, slowed: None, fastest: 0, blind: 0, in_vain: 0 }
    }

    /// `now`: the median of the last seconds, if anybody writes; `read`: bytes that the fill has read in the last second.
    pub fn handle(&mut self, now: Option<Duration>, read: u64) -> Option<Slowed> {
        let usual = self.usual.filter(|_| self.percent_max > 0)?;
        if self.slowed.is_none() {
            self.fastest = self.fastest.max(read);
        }
        if self.blind > 0 {
            self.blind -= 1;
            return self.slowed;
        }
        let allowed = usual.as_secs_f64() * self.percent_max as f64 / 100.0;
        match now.filter(|now| now.as_secs_f64() > allowed && *now > usual + NOTICED) {
            Some(now) => self.slow_down(usual, now, read),
            None => self.speed_up(now.unwrap_or(usual)),
        }
        self.slowed
    }

    fn slow_down(&mut self, usual: Duration, now: Duration, read: u64) {
        let before = self.slowed.map(|slowed| slowed.bytes_per_s_max);
        self.in_vain = if before == Some(SLOWEST_BYTES_PER_S) { self.in_vain + 1 } else { 0 };
        if self.in_vain >= IN_VAIN_MAX {
            (self.usual, self.in_vain) = (Some(now), 0);
            return;
        }
        let bytes_per_s_max = (before.unwrap_or(read) / 2).max(SLOWEST_BYTES_PER_S);
        self.slowed = Some(Slowed { bytes_per_s_max, usual, now });
        self.blind = SECONDS;
    }

    fn speed_up(&mut self, now: Duration) {
        self.in_vain = 0;
        let fastest = self.fastest;
        self.slowed = self.slowed.and_then(|slowed| {
            let bytes_per_s_max = slowed.bytes_per_s_max + slowed.bytes_per_s_max / 4;
            // A limit that is never reached is none.
            (bytes_per_s_max < fastest).then_some(Slowed { bytes_per_s_max, now, ..slowed })
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const USUAL: Duration = Duration::from_millis(2);
    const SLOW: Duration = Duration::from_millis(9);
    const MIB: u64 = 1 << 20;

    /// A fill that could read 200 MiB in a second, beside commits that take long when it reads more than `bearable`.
    fn play(throttle: &mut Throttle, bearable: u64, seconds: u32) -> Vec<u64> {
        let mut read = 200 * MIB;
        let mut reads = Vec::new();
        for _ in 0..seconds {
            let now = if read > bearable { SLOW } else { USUAL };
            read = throttle.handle(Some(now), read).map_or(200 * MIB, |slowed| slowed.bytes_per_s_max);
            reads.push(read);
        }
        reads
    }

    #[test]
    fn it_finds_what_the_leader_bears_and_goes_back_to_full_speed() {
        let mut throttle = Throttle::new(300, Some(USUAL));
        let reads = play(&mut throttle, 60 * MIB, 60);
        assert_eq!(reads[0], 100 * MIB, "halved at once");
        let late = &reads[20..];
        assert!(late.iter().all(|read| (25 * MIB..=80 * MIB).contains(read)), "{reads:?}");
        assert!(late.iter().filter(|read| **read <= 60 * MIB).count() * 2 > late.len(), "{reads:?}");
        let reads = play(&mut throttle, 1000 * MIB, 20);
        assert_eq!(reads.last(), Some(&(200 * MIB)), "{reads:?}");
        assert_eq!(throttle.slowed, None);
    }

    #[test]
    fn what_slowing_down_does_not_cure_is_not_its_doing() {
        let mut throttle = Throttle::new(300, Some(USUAL));
        let reads = play(&mut throttle, 0, 120);
        assert!(reads.contains(&SLOWEST_BYTES_PER_S) && reads.iter().all(|read| *read >= SLOWEST_BYTES_PER_S));
        assert_eq!(reads.last(), Some(&(200 * MIB)), "{reads:?}");
        assert_eq!(throttle.usual, Some(SLOW));
    }

    #[test]
    fn nothing_is_slowed_down_for_nothing() {
        for (mut throttle, now) in [
            (Throttle::new(0, Some(USUAL)), Some(SLOW)),
            (Throttle::new(300, None), Some(SLOW)),
            (Throttle::new(300, Some(USUAL)), Some(Duration::from_millis(5))),
            (Throttle::new(300, Some(USUAL)), None),
            // Far above, and nobody would notice.
            (Throttle::new(300, Some(Duration::from_micros(100))), Some(Duration::from_micros(900))),
        ] {
            assert!((0..50).all(|_| throttle.handle(now, 200 * MIB).is_none()), "{throttle:?}");
        }
    }
}
