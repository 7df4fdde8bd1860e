//! What has to be asked for, piece by piece: channels take the next piece when they have room for it.
//!
//! Large files are split, so that one of them keeps every channel busy; small ones are asked for by the dozen.

use std::sync::{Arc, Mutex, PoisonError};

use pgtandem_proto::message::{EXTENT_BYTES, FileEntry, SMALL_FILE_BYTES_MAX, SMALL_FILES_PER_REQUEST_MAX};

use super::super::extent::extent_count;
use super::writer::Place;

/// Extents of one request.
pub(super) const BATCH_EXTENTS_MAX: u32 = 4;
/// Bytes of the small files of one request.
const SMALL_BYTES_MAX: u64 = 768 << 10;

/// A file to be pulled, and where it is written.
#[derive(Clone, Debug)]
pub(super) struct Wanted {
    pub entry: FileEntry,
    pub place: Place,
}

impl Wanted {
    fn is_small(&self) -> bool {
        self.entry.bytes <= SMALL_FILE_BYTES_MAX as u64
    }
}

/// One request's worth of work. Numbers are places in the list of wanted files.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Piece {
    Extents { wanted: usize, first: u32, count: u32 },
    Small { wanted: Vec<usize> },
}

/// All pieces of all files, in order, each of them once.
#[derive(Debug)]
pub(super) struct Plan {
    pub wanted: Arc<[Wanted]>,
    /// Whether small files are asked for together.
    bundles: bool,
    next: Mutex<Next>,
}

#[derive(Debug, Default)]
struct Next {
    file: usize,
    extent: u32,
}

impl Plan {
    pub fn new(wanted: Vec<Wanted>, bundles: bool) -> Plan {
        Plan { wanted: wanted.into(), bundles, next: Mutex::default() }
    }

    /// Extents that are asked for one by one, of a file.
    pub fn extents_of(&self, wanted: usize) -> u32 {
        let bytes = self.wanted.get(wanted).map_or(0, |wanted| wanted.entry.bytes);
        u32::try_from(extent_count(bytes)).unwrap_or(u32::MAX)
    }

    pub fn take(&self) -> Option<Piece> {
        let mut next = self.next.lock().unwrap_or_else(PoisonError::into_inner);
        let first = self.wanted.get(next.file)?;
        if self.bundles && first.is_small() {
            let (mut small, mut bytes) = (Vec::new(), 0);
            while let Some(wanted) = self.wanted.get(next.file).filter(|wanted| wanted.is_small()) {
                bytes += wanted.entry.bytes;
                if small.len() == SMALL_FILES_PER_REQUEST_MAX || (bytes > SMALL_BYTES_MAX && !small.is_empty()) {
                    break;
                }
                small.push(next.file);
                next.file += 1;
            }
            return Some(Piece::Small { wanted: small });
        }
        let extents = self.extents_of(next.file).max(1);
        let count = (extents - next.extent).min(BATCH_EXTENTS_MAX);
        let piece = Piece::Extents { wanted: next.file, first: next.extent, count };
        next.extent += count;
        if next.extent == extents {
            *next = Next { file: next.file + 1, extent: 0 };
        }
        Some(piece)
    }

    /// Bytes that a piece may bring.
    pub fn bytes(&self, piece: &Piece) -> u64 {
        let of = |wanted: usize| self.wanted.get(wanted).map_or(0, |wanted| wanted.entry.bytes);
        match piece {
            Piece::Extents { wanted, count, .. } => of(*wanted).min(u64::from(*count) * EXTENT_BYTES as u64),
            Piece::Small { wanted } => wanted.iter().map(|wanted| of(*wanted)).sum(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wanted(id: u32, bytes: u64) -> Wanted {
        let path = format!("f{id}");
        Wanted {
            entry: FileEntry { id, path: path.clone(), directory: false, bytes, mode: 0o600, tablespace: None },
            place: Place { path: path.into(), mode: 0o600 },
        }
    }

    #[test]
    fn a_plan_names_every_extent_once_and_small_files_together() {
        let plan = Plan::new(vec![wanted(0, 0), wanted(1, 5), wanted(2, 9 << 20), wanted(3, 65_536)], true);
        let pieces: Vec<Piece> = std::iter::from_fn(|| plan.take()).collect();
        let extents = |first, count| Piece::Extents { wanted: 2, first, count };
        let small = |wanted: &[usize]| Piece::Small { wanted: wanted.to_vec() };
        assert_eq!(pieces, [small(&[0, 1]), extents(0, 4), extents(4, 4), extents(8, 1), small(&[3])]);
    }

    #[test]
    fn a_bundle_is_not_larger_than_a_frame() {
        let plan = Plan::new((0..1000).map(|id| wanted(id, 60_000)).collect(), true);
        let pieces: Vec<Piece> = std::iter::from_fn(|| plan.take()).collect();
        assert!(pieces.iter().all(|piece| plan.bytes(piece) <= EXTENT_BYTES as u64));
        let files: usize =
            pieces.iter().map(|piece| if let Piece::Small { wanted } = piece { wanted.len() } else { 0 }).sum();
        assert_eq!(files, 1000);
        let plan = Plan::new((0..1000).map(|id| wanted(id, 0)).collect(), true);
        assert_eq!(std::iter::from_fn(|| plan.take()).count(), 4);
    }
}
