//! The fence: how far WAL may be handed to PostgreSQL. Pure.
//!
//! This is what stops a standby at exactly X. Bytes come in as they arrive, in order ([`Fence::handle_wal`]); what
//! may go out comes from [`Fence::poll_wal`]. Nothing past the limit is ever returned, whatever arrives, and what
//! was once returned counts as handed over. One fence lives as long as a relay; PostgreSQL may connect anew
//! ([`Fence::handle_restart`]) and is held by the same limit.

use std::collections::VecDeque;

use bytes::Bytes;
use pgtandem_proto::message::Lsn;

/// Bytes that wait behind the limit before the relay stops reading from the source.
pub const WAITING_BYTES_MAX: usize = 8 << 20;

/// Why bytes or a limit can not be taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FenceError {
    #[error("WAL from {found:X} came where {expected:X} was due")]
    Gap { expected: u64, found: u64 },
    #[error("WAL up to {handed:X} was handed over already, which is past {limit:X}")]
    Passed { handed: u64, limit: u64 },
}

/// The limit, what was handed over, and what waits.
#[derive(Debug)]
pub struct Fence {
    /// None: no limit.
    limit: Option<Lsn>,
    /// Nothing beyond this was ever handed over.
    handed: u64,
    /// Position of the first byte that waits.
    next: u64,
    waiting: VecDeque<Bytes>,
    waiting_bytes: usize,
}

impl Fence {
    /// A fence for a PostgreSQL that has WAL up to `handed` already.
    #[must_use]
    pub fn new(handed: Lsn) -> Fence {
        Fence { limit: None, handed: handed.0, next: 0, waiting: VecDeque::new(), waiting_bytes: 0 }
    }

    /// The furthest position that was ever handed over.
    #[must_use]
    pub fn handed(&self) -> Lsn {
        Lsn(self.handed)
    }

    #[must_use]
    pub fn limit(&self) -> Option<Lsn> {
        self.limit
    }

    /// Whether more can be taken in.
    #[must_use]
    pub fn has_room(&self) -> bool {
        self.waiting_bytes < WAITING_BYTES_MAX
    }

    /// PostgreSQL asks for WAL from `from`: what waits is for an earlier connection.
    pub fn handle_restart(&mut self, from: Lsn) {
        self.waiting.clear();
        self.waiting_bytes = 0;
        self.next = from.0;
    }

    /// Takes bytes that begin at `start`, which is where the ones before ended.
    pub fn handle_wal(&mut self, start: Lsn, bytes: Bytes) -> Result<(), FenceError> {
        let expected = self.next + self.waiting_bytes as u64;
        if start.0 != expected {
            return Err(FenceError::Gap { expected, found: start.0 });
        }
        self.waiting_bytes += bytes.len();
        self.waiting.push_back(bytes);
        Ok(())
    }

    /// From here on nothing more is handed over. -> how far it went
    pub fn hold(&mut self) -> Lsn {
        self.limit = Some(Lsn(self.handed));
        Lsn(self.handed)
    }

    /// Lets WAL through up to exactly `limit`. An error, and no change, if more was handed over before.
    pub fn release_to(&mut self, limit: Lsn) -> Result<(), FenceError> {
        if self.handed > limit.0 {
            return Err(FenceError::Passed { handed: self.handed, limit: limit.0 });
        }
        self.limit = Some(limit);
        Ok(())
    }

    /// The next bytes that may be handed over, with their position; they count as handed over from now on.
    pub fn poll_wal(&mut self) -> Option<(Lsn, Bytes)> {
        let start = self.next;
        let room = self.limit.map_or(u64::MAX, |limit| limit.0.saturating_sub(start));
        let front = self.waiting.front_mut()?;
        let count = usize::try_from(room).unwrap_or(usize::MAX).min(front.len());
        if count == 0 {
            // Empty chunks carry nothing; a limit that is reached lets nothing through.
            if front.is_empty() {
                self.waiting.pop_front();
                return self.poll_wal();
            }
            return None;
        }
        let bytes = front.split_to(count);
        if front.is_empty() {
            self.waiting.pop_front();
        }
        self.waiting_bytes -= count;
        self.next += count as u64;
        self.handed = self.handed.max(self.next);
        Some((Lsn(start), bytes))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const SEGMENT: u64 = 16 << 20;

    /// Everything that comes out, as positions; checks that it is contiguous.
    fn drain(fence: &mut Fence, from: &mut u64) {
        while let Some((start, bytes)) = fence.poll_wal() {
            assert_eq!(start.0, *from);
            *from += bytes.len() as u64;
        }
    }

    fn stops_exactly(x: u64) {
        let start = SEGMENT;
        let mut fence = Fence::new(Lsn(0));
        fence.handle_restart(Lsn(start));
        fence.handle_wal(Lsn(start), Bytes::from(vec![0; 1000])).unwrap();
        let mut out = start;
        drain(&mut fence, &mut out);
        assert_eq!(fence.hold(), Lsn(start + 1000));
        let mut position = start + 1000;
        while position < x + 500_000 && fence.has_room() {
            fence.handle_wal(Lsn(position), Bytes::from(vec![0; 131_072])).unwrap();
            position += 131_072;
            drain(&mut fence, &mut out);
            assert_eq!(out, start + 1000, "held");
        }
        fence.release_to(Lsn(x)).unwrap();
        drain(&mut fence, &mut out);
        while position < x + 500_000 {
            fence.handle_wal(Lsn(position), Bytes::from(vec![0; 131_072])).unwrap();
            position += 131_072;
            drain(&mut fence, &mut out);
        }
        assert_eq!(out, x);
        assert_eq!(fence.handed(), Lsn(x));
    }

    #[test]
    fn x_inside_a_chunk_is_where_it_stops() {
        stops_exactly(SEGMENT + 300_001);
    }

    #[test]
    fn x_behind_a_page_header_is_where_it_stops() {
        stops_exactly(SEGMENT + 40 * 8192 + 24);
        stops_exactly(SEGMENT + 40 * 8192);
    }

    #[test]
    fn x_at_the_end_of_a_segment_is_where_it_stops() {
        stops_exactly(2 * SEGMENT);
        stops_exactly(2 * SEGMENT + 40);
    }

    #[test]
    fn x_at_what_was_handed_over_lets_nothing_more_through() {
        stops_exactly(SEGMENT + 1000);
    }

    #[test]
    fn a_new_connection_is_held_by_the_same_limit() {
        let mut fence = Fence::new(Lsn(0));
        fence.handle_restart(Lsn(0));
        fence.handle_wal(Lsn(0), Bytes::from(vec![0; 100])).unwrap();
        fence.poll_wal().unwrap();
        fence.hold();
        fence.release_to(Lsn(150)).unwrap();
        fence.handle_restart(Lsn(0));
        fence.handle_wal(Lsn(0), Bytes::from(vec![0; 400])).unwrap();
        let mut out = 0;
        drain(&mut fence, &mut out);
        assert_eq!(out, 150);
        assert_eq!(fence.release_to(Lsn(149)), Err(FenceError::Passed { handed: 150, limit: 149 }));
        assert_eq!(fence.handle_wal(Lsn(399), Bytes::new()), Err(FenceError::Gap { expected: 400, found: 399 }));
    }

    #[derive(Clone, Debug)]
    enum Step {
        Arrive(usize),
        Hand,
        Hold,
        Release(u64),
        Restart(u64),
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            4 => (0_usize..5000).prop_map(Step::Arrive),
            4 => Just(Step::Hand),
            1 => Just(Step::Hold),
            1 => (0_u64..20_000).prop_map(Step::Release),
            1 => (0_u64..3).prop_map(Step::Restart),
        ]
    }

    proptest! {
        #[test]
        fn nothing_past_the_limit_is_ever_handed_over(steps in prop::collection::vec(step(), 0..80)) {
            let mut fence = Fence::new(Lsn(0));
            let (mut arrived, mut limit, mut out) = (0_u64, u64::MAX, 0_u64);
            for step in steps {
                match step {
                    Step::Arrive(count) => {
                        fence.handle_wal(Lsn(arrived), Bytes::from(vec![7; count])).unwrap();
                        arrived += count as u64;
                    }
                    Step::Hand => {
                        drain(&mut fence, &mut out);
                        prop_assert_eq!(out, arrived.min(limit).max(out));
                        prop_assert!(out >= arrived.min(limit));
                    }
                    Step::Hold => limit = fence.hold().0,
                    Step::Release(far) => {
                        let handed = fence.handed().0;
                        match fence.release_to(Lsn(far)) {
                            Ok(()) => limit = far,
                            Err(_) => prop_assert!(handed > far),
                        }
                    }
                    Step::Restart(back) => {
                        let from = fence.handed().0.saturating_sub(back * 100);
                        fence.handle_restart(Lsn(from));
                        arrived = from;
                        out = from;
                    }
                }
                prop_assert!(fence.handed().0 <= limit);
            }
        }
    }
}
