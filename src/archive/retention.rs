//! What of an archive may go. Pure: what is there goes in, with the time; what to remove comes out.
//!
//! Kept are the newest `copies` good base copies, every one that is younger than `age_s`, and the newest one before those, so that each moment
//! of that time can be restored; WAL from the first segment that a kept copy needs on; all WAL of the stream that the server writes
//! now, until it has a copy of its own; and whatever would be the last good copy.

use std::collections::{BTreeMap, BTreeSet};

use super::names::{BaseName, Segment, StreamName, WalName};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Keep {
    /// At least one is kept in any case.
    pub copies: usize,
    /// 0: only `copies` counts.
    pub age_s: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Copy {
    pub stream: StreamName,
    pub name: BaseName,
    /// Its manifest can be read, and its WAL is there.
    pub good: bool,
}

/// What to remove.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    pub copies: BTreeSet<(StreamName, BaseName)>,
    pub wal: BTreeSet<(StreamName, WalName)>,
}

/// `current` is the stream that the server writes now; None: it is not known, and no stream's WAL goes as a whole.
#[must_use]
pub fn plan(
    copies: &[Copy],
    wal: &[(StreamName, Vec<WalName>)],
    current: Option<StreamName>,
    keep: Keep,
    now_s: u64,
) -> Plan {
    let mut good: Vec<&Copy> = copies.iter().filter(|copy| copy.good).collect();
    good.sort_unstable_by_key(|copy| std::cmp::Reverse((copy.name.ended_s, copy.stream, copy.name)));
    good.dedup();
    let since_s = now_s.saturating_sub(keep.age_s);
    let young = good.iter().take_while(|copy| keep.age_s > 0 && copy.name.ended_s >= since_s).count();
    // The one before them brings the server to the beginning of that time.
    let by_age = if keep.age_s > 0 { young + 1 } else { 0 };
    good.truncate(keep.copies.max(by_age).max(1));
    let kept: BTreeSet<(StreamName, BaseName)> = good.iter().map(|copy| (copy.stream, copy.name)).collect();
    let oldest_s = good.last().map(|copy| copy.name.ended_s);
    // One that can not be read goes with those of its age.
    let goes = |copy: &&Copy| {
        !kept.contains(&(copy.stream, copy.name))
            && (copy.good || oldest_s.is_some_and(|oldest| copy.name.ended_s < oldest))
    };
    let removed: BTreeSet<(StreamName, BaseName)> =
        copies.iter().filter(goes).map(|copy| (copy.stream, copy.name)).collect();
    let mut needed: BTreeMap<StreamName, Segment> = BTreeMap::new();
    for copy in copies.iter().filter(|copy| !removed.contains(&(copy.stream, copy.name))) {
        let first = needed.entry(copy.stream).or_insert(copy.name.start);
        *first = (*first).min(copy.name.start);
    }
    let mut plan = Plan { copies: removed, wal: BTreeSet::new() };
    for (stream, names) in wal {
        let old: Box<dyn Fn(&WalName) -> bool> = match needed.get(stream) {
            // Segments of timelines before come with a server that was filled; its copies are all of its own timeline.
            Some(&first) => Box::new(move |name| name.segment().is_some_and(|segment| segment < first)),
            // Nothing can be restored from WAL without a copy, but the first copy of the current stream may be under way.
            None if current.is_some_and(|current| current != *stream) && !kept.is_empty() => Box::new(|_| true),
            None => Box::new(|_| false),
        };
        plan.wal.extend(names.iter().filter(|name| old(name)).map(|name| (*stream, *name)));
    }
    plan
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const SEGMENT_BYTES: u32 = 16 << 20;

    fn stream(number: u8) -> StreamName {
        StreamName { timeline: u32::from(number) + 1, hash: [number; 8] }
    }

    fn segment(stream: StreamName, number: u64) -> Segment {
        Segment::of(stream.timeline, pgtandem_proto::message::Lsn(number * u64::from(SEGMENT_BYTES)), SEGMENT_BYTES)
    }

    fn copy(number: u8, ended_s: u64, start: u64, good: bool) -> Copy {
        let stream = stream(number);
        Copy { stream, name: BaseName { ended_s, start: segment(stream, start) }, good }
    }

    fn wal(number: u8, segments: std::ops::Range<u64>) -> (StreamName, Vec<WalName>) {
        let stream = stream(number);
        (stream, segments.map(|number| WalName::Segment(segment(stream, number))).collect())
    }

    #[test]
    fn the_newest_copies_and_their_wal_stay() {
        let copies = [copy(0, 100, 2, true), copy(0, 200, 5, true), copy(0, 300, 9, true)];
        let plan = plan(&copies, &[wal(0, 0..12)], Some(stream(0)), Keep { copies: 2, age_s: 0 }, 400);
        assert_eq!(plan.copies, [(stream(0), copies[0].name)].into());
        assert_eq!(plan.wal.len(), 5, "those before the one at which the second copy starts");
    }

    #[test]
    fn every_moment_of_the_age_can_be_restored() {
        let copies = [copy(0, 100, 2, true), copy(0, 200, 5, true), copy(0, 300, 9, true)];
        let plan = plan(&copies, &[], Some(stream(0)), Keep { copies: 1, age_s: 150 }, 400);
        assert_eq!(plan.copies, [(stream(0), copies[0].name)].into(), "the one of 200 is needed from 250 on");
    }

    #[test]
    fn the_wal_of_a_life_before_goes_with_its_copies() {
        let copies = [copy(0, 100, 2, true), copy(1, 300, 9, true)];
        let wal = [wal(0, 2..6), wal(1, 8..12), wal(2, 12..14)];
        let plan = plan(&copies, &wal, Some(stream(2)), Keep { copies: 1, age_s: 0 }, 400);
        assert_eq!(plan.copies, [(stream(0), copies[0].name)].into());
        let streams: BTreeSet<StreamName> = plan.wal.iter().map(|(stream, _)| *stream).collect();
        assert_eq!(streams, [stream(0), stream(1)].into(), "the current one has no copy yet, and stays whole");
    }

    proptest! {
        #[test]
        fn the_last_good_copy_and_what_it_needs_never_go(
            copies in prop::collection::vec((0_u8..3, 0_u64..1000, 0_u64..30, any::<bool>()), 0..12),
            ranges in prop::collection::vec((0_u8..3, 0_u64..30, 0_u64..30), 0..4),
            keep in (0_usize..4, 0_u64..500), current in prop::option::of(0_u8..3), now_s in 0_u64..2000,
        ) {
            let copies: Vec<Copy> = copies.into_iter().map(|(number, ended_s, start, good)| copy(number, ended_s, start, good)).collect();
            let all: Vec<_> = ranges.into_iter().map(|(number, first, count)| wal(number, first..first + count)).collect();
            let keep = Keep { copies: keep.0, age_s: keep.1 };
            let current = current.map(stream);
            let plan = plan(&copies, &all, current, keep, now_s);
            let stays = |copy: &&Copy| !plan.copies.contains(&(copy.stream, copy.name));
            let good: Vec<&Copy> = copies.iter().filter(|copy| copy.good).collect();
            let distinct: BTreeSet<_> = good.iter().map(|copy| (copy.stream, copy.name)).collect();
            let left: BTreeSet<_> = good.iter().copied().filter(stays).map(|copy| (copy.stream, copy.name)).collect();
            prop_assert!(left.len() >= distinct.len().min(keep.copies.max(1)) || left.len() == distinct.len());
            // What stays is not older than what goes.
            for gone in good.iter().filter(|copy| !stays(copy)) {
                prop_assert!(good.iter().filter(|copy| stays(copy)).all(|copy| copy.name.ended_s >= gone.name.ended_s));
                prop_assert!(keep.age_s == 0 || gone.name.ended_s < now_s.saturating_sub(keep.age_s));
            }
            for copy in copies.iter().filter(stays) {
                for (stream, name) in &plan.wal {
                    prop_assert!(*stream != copy.stream || name.segment().is_some_and(|segment| segment < copy.name.start));
                }
            }
            let has_copy = |stream: StreamName| copies.iter().any(|copy| copy.stream == stream && stays(&copy));
            for (stream, _) in &plan.wal {
                prop_assert!(has_copy(*stream) || (current.is_some() && current != Some(*stream)));
            }
            // It is done in one go, and removes nothing more if it is done again.
            let rest: Vec<Copy> = copies.iter().filter(stays).copied().collect();
            let wal: Vec<_> = all.iter().map(|(stream, names)| {
                (*stream, names.iter().filter(|name| !plan.wal.contains(&(*stream, **name))).copied().collect::<Vec<_>>())
            }).collect();
            prop_assert_eq!(super::plan(&rest, &wal, current, keep, now_s), Plan::default());
        }
    }
}
