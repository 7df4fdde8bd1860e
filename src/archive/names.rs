//! Names within an archive, and what they mean. Pure; a name from disk or network is taken only if it is written as we write it.

use std::fmt;
use std::path::{Path, PathBuf};

use pgtandem_proto::message::Lsn;

use super::moment;

/// Ending of every file of an archive.
pub const ENDING: &str = ".zst";
/// Folder of the extents, beside the streams.
pub const EXTENTS: &str = "extents";

/// A WAL segment by its name: timeline, and the two halves of its number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Segment {
    pub timeline: u32,
    high: u32,
    low: u32,
}

impl Segment {
    /// The one that contains `lsn`.
    #[must_use]
    pub fn of(timeline: u32, lsn: Lsn, segment_bytes: u32) -> Segment {
        let number = lsn.0 / u64::from(segment_bytes);
        let per_id = 0x1_0000_0000_u64 / u64::from(segment_bytes);
        let part = |value: u64| u32::try_from(value).unwrap_or(u32::MAX);
        Segment { timeline, high: part(number / per_id), low: part(number % per_id) }
    }

    #[must_use]
    pub fn parse(name: &str) -> Option<Segment> {
        let part = |at: usize| hexadecimal(name.get(at..at + 8)?);
        (name.len() == 24).then_some(())?;
        Some(Segment { timeline: part(0)?, high: part(8)?, low: part(16)? })
    }

    #[must_use]
    pub fn next(self, segment_bytes: u32) -> Segment {
        Segment::of(self.timeline, Lsn(self.start(segment_bytes).0 + u64::from(segment_bytes)), segment_bytes)
    }

    /// Its first position.
    #[must_use]
    pub fn start(self, segment_bytes: u32) -> Lsn {
        Lsn((u64::from(self.high) << 32) + u64::from(self.low) * u64::from(segment_bytes))
    }
}

impl fmt::Display for Segment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:08X}{:08X}{:08X}", self.timeline, self.high, self.low)
    }
}

/// Exactly the digits that we write.
fn hexadecimal(text: &str) -> Option<u32> {
    let digits = text.bytes().all(|byte| byte.is_ascii_digit() || (b'A'..=b'F').contains(&byte));
    (text.len() == 8 && digits).then(|| u32::from_str_radix(text, 16).ok())?
}

/// What PostgreSQL hands to `archive_command`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum WalName {
    Segment(Segment),
    /// The last segment of a timeline that a server has left (`.partial`).
    Partial(Segment),
    /// A note about a backup that PostgreSQL writes for people (`.backup`).
    Backup(Segment, u32),
    /// Of which timelines this one is the continuation.
    History(u32),
}

impl WalName {
    #[must_use]
    pub fn parse(name: &str) -> Option<WalName> {
        if let Some(timeline) = name.strip_suffix(".history") {
            return hexadecimal(timeline).map(WalName::History);
        }
        if let Some(segment) = name.strip_suffix(".partial") {
            return Segment::parse(segment).map(WalName::Partial);
        }
        if let Some((segment, offset)) = name.strip_suffix(".backup").and_then(|name| name.split_once('.')) {
            return Some(WalName::Backup(Segment::parse(segment)?, hexadecimal(offset)?));
        }
        Segment::parse(name).map(WalName::Segment)
    }

    /// The segment that it belongs to; None for a history.
    #[must_use]
    pub fn segment(self) -> Option<Segment> {
        match self {
            WalName::Segment(segment) | WalName::Partial(segment) | WalName::Backup(segment, _) => Some(segment),
            WalName::History(_) => None,
        }
    }
}

impl fmt::Display for WalName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            WalName::Segment(segment) => segment.fmt(f),
            WalName::Partial(segment) => write!(f, "{segment}.partial"),
            WalName::Backup(segment, offset) => write!(f, "{segment}.{offset:08X}.backup"),
            WalName::History(timeline) => write!(f, "{timeline:08X}.history"),
        }
    }
}

/// One server's WAL from the beginning of a timeline on; see [`super::stream`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct StreamName {
    pub timeline: u32,
    /// Of system identifier and history.
    pub hash: [u8; 8],
}

impl StreamName {
    #[must_use]
    pub fn parse(name: &str) -> Option<StreamName> {
        let (timeline, rest) = name.split_once('-')?;
        let mut hash = [0; 8];
        if rest.len() != 16 || !rest.is_ascii() {
            return None;
        }
        for (index, byte) in hash.iter_mut().enumerate() {
            *byte = u8::from_str_radix(rest.get(2 * index..2 * index + 2)?, 16).ok()?;
        }
        let found = StreamName { timeline: hexadecimal(timeline)?, hash };
        (found.to_string() == name).then_some(found)
    }
}

impl fmt::Display for StreamName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:08X}-", self.timeline)?;
        self.hash.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

/// A base copy: when it ended, and where its WAL begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BaseName {
    /// Seconds since 1970.
    pub ended_s: u64,
    pub start: Segment,
}

impl BaseName {
    #[must_use]
    pub fn parse(name: &str) -> Option<BaseName> {
        let (ended, start) = name.split_once('-')?;
        Some(BaseName { ended_s: moment::parse_compact(ended)?, start: Segment::parse(start)? })
    }
}

impl fmt::Display for BaseName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}", moment::compact(self.ended_s), self.start)
    }
}

/// BLAKE3 of some content.
pub type Hash = [u8; 32];

/// A file of an archive, relative to the node's folder.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum ArchivePath {
    Wal(StreamName, WalName),
    Base(StreamName, BaseName),
    Extent(Hash),
}

impl ArchivePath {
    #[must_use]
    pub fn parse(path: &str) -> Option<ArchivePath> {
        let mut parts = path.strip_suffix(ENDING)?.split('/');
        let (first, second, third) = (parts.next()?, parts.next()?, parts.next()?);
        let found = match second {
            "wal" => ArchivePath::Wal(StreamName::parse(first)?, WalName::parse(third)?),
            "base" => ArchivePath::Base(StreamName::parse(first)?, BaseName::parse(third)?),
            _ => ArchivePath::Extent(*blake3::Hash::from_hex(third).ok()?.as_bytes()),
        };
        (parts.next().is_none() && found.to_string() == path).then_some(found)
    }

    /// Where it is below the folder of its node.
    #[must_use]
    pub fn below(&self, folder: &Path) -> PathBuf {
        folder.join(self.to_string())
    }
}

impl fmt::Display for ArchivePath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ArchivePath::Wal(stream, name) => write!(f, "{stream}/wal/{name}{ENDING}"),
            ArchivePath::Base(stream, name) => write!(f, "{stream}/base/{name}{ENDING}"),
            ArchivePath::Extent(hash) => {
                let hash = blake3::Hash::from_bytes(*hash).to_hex();
                write!(f, "{EXTENTS}/{}/{hash}{ENDING}", hash.get(..2).unwrap_or_default())
            }
        }
    }
}

/// What is missing between `from` and the last of `found`, which are sorted: first and last of each gap.
#[must_use]
pub fn gaps(found: &[Segment], from: Segment, segment_bytes: u32) -> Vec<(Segment, Segment)> {
    let mut gaps = Vec::new();
    let mut wanted = from;
    for segment in found.iter().filter(|segment| segment.timeline == from.timeline && **segment >= from) {
        if *segment != wanted {
            let before = Lsn(segment.start(segment_bytes).0.saturating_sub(1));
            gaps.push((wanted, Segment::of(from.timeline, before, segment_bytes)));
        }
        wanted = segment.next(segment_bytes);
    }
    gaps
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sync::wal::segment_name;

    #[test]
    fn what_postgresql_archives_is_known() {
        for name in [
            "0000000200000001000000FF",
            "0000000200000001000000FF.partial",
            "000000010000000000000002.00000028.backup",
            "00000002.history",
        ] {
            assert_eq!(WalName::parse(name).map(|found| found.to_string()).as_deref(), Some(name));
        }
        for name in
            ["", "0000000200000001000000ff", "../../etc/passwd", "0000000200000001000000F", "2.history", "x.partial"]
        {
            assert_eq!(WalName::parse(name), None, "{name:?}");
        }
    }

    proptest::proptest! {
        #[test]
        fn segments_are_counted_as_postgresql_counts_them(timeline in 1_u32.., lsn in 0_u64..1 << 52, shift in 20_u32..31) {
            let bytes = 1_u32 << shift;
            let segment = Segment::of(timeline, Lsn(lsn), bytes);
            assert_eq!(segment.to_string(), segment_name(timeline, Lsn(lsn), bytes));
            assert_eq!(Segment::parse(&segment.to_string()), Some(segment));
            assert!(segment.start(bytes).0 <= lsn && lsn < segment.next(bytes).start(bytes).0);
            assert!(segment < segment.next(bytes));
        }

        #[test]
        fn a_path_that_is_taken_stays_below_its_folder(path in "\\PC{0,60}|(0000000[12]-[0-9a-f]{16}|extents|[.]{1,2})/(wal|base|[0-9a-f]{2})/[0-9A-F.a-z]{0,40}") {
            if let Some(found) = ArchivePath::parse(&path) {
                assert_eq!(found.to_string(), path);
                assert!(found.below(Path::new("/x")).components().all(|part| part != std::path::Component::ParentDir));
            }
        }

        #[test]
        fn paths_are_read_as_they_are_written(timeline in 1_u32.., lsn in 0_u64..1 << 52, hash: [u8; 32], ended_s in 0_u64..1 << 36) {
            let start = Segment::of(timeline, Lsn(lsn), 16 << 20);
            let stream = StreamName { timeline, hash: hash[..8].try_into().unwrap() };
            for path in [
                ArchivePath::Wal(stream, WalName::Partial(start)),
                ArchivePath::Base(stream, BaseName { ended_s, start }),
                ArchivePath::Extent(hash),
            ] {
                assert_eq!(ArchivePath::parse(&path.to_string()), Some(path));
            }
        }

        #[test]
        fn gaps_are_exactly_what_is_missing(present in proptest::collection::vec(proptest::bool::ANY, 1..40)) {
            let at = |index: usize| Segment::of(3, Lsn(index as u64 * (1 << 28)), 1 << 28);
            let found: Vec<Segment> = present.iter().enumerate().filter(|(_, there)| **there).map(|(index, _)| at(index)).collect();
            let gaps = gaps(&found, at(0), 1 << 28);
            let last = present.iter().rposition(|there| *there).map_or(0, |last| last + 1);
            for (index, there) in present.iter().enumerate().take(last) {
                assert_eq!(!there, gaps.iter().any(|(first, last)| (*first..=*last).contains(&at(index))));
            }
            assert!(gaps.iter().all(|(first, last)| first <= last));
        }
    }
}
