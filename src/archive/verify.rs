//! Looks at everything in an archive: whether each file is what it says, and whether nothing is missing. Blocking; only reads.

use std::collections::{HashMap, HashSet};
use std::io;
use std::path::{Path, PathBuf};

use serde::Serialize;

use super::error::ArchiveError;
use super::file;
use super::inventory::{self, StreamFound};
use super::manifest::Manifest;
use super::names::{ArchivePath, BaseName, ENDING, Hash, Segment, WalName, gaps};
use super::push::{Header, SEGMENT_BYTES_MAX};
use pgtandem_proto::message::{EXTENT_BYTES, Lsn};

/// One thing that is wrong.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// Of the node's archive.
    pub folder: PathBuf,
    pub what: String,
}

/// What was looked at. Field names are stable.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Verified {
    pub wal_files: u64,
    pub base_copies: u64,
    pub extents: u64,
    pub bytes: u64,
    pub findings: Vec<Finding>,
}

/// Whether `base` can be restored as far as names say: its manifest, and the WAL that it needs. None: it can.
#[must_use]
pub fn incomplete(stream: &StreamFound, base: BaseName, manifest: &Manifest) -> Option<String> {
    let last = Segment::of(manifest.timeline, Lsn(manifest.stop.saturating_sub(1)), manifest.wal_segment_bytes);
    let segments = stream.segments();
    if segments.last().is_none_or(|newest| *newest < last) {
        return Some(format!("base copy {base} needs WAL up to {last}, which is not there"));
    }
    let gap = gaps(&segments, base.start, manifest.wal_segment_bytes).into_iter().find(|(first, _)| *first <= last)?;
    Some(format!("base copy {base} needs WAL segment {}, which is missing", gap.0))
}

/// Verifies the archive of a node in `folder`.
pub fn verify(folder: &Path, verified: &mut Verified) -> Result<(), ArchiveError> {
    let mut state = State { folder, verified, extents: HashMap::new() };
    let mut referenced = HashSet::new();
    for stream in inventory::streams(folder)? {
        let segment_bytes = state.wal(&stream);
        state.bases(&stream, segment_bytes, &mut referenced);
    }
    // Extents that no copy names: of one under way, or of one that went; they have to be whole all the same.
    for hash in inventory::extents(folder)? {
        if !referenced.contains(&hash) {
            state.extent(hash, None);
        }
    }
    Ok(())
}

struct State<'a> {
    folder: &'a Path,
    verified: &'a mut Verified,
    /// Those that were looked at already: how long; None: not to be had.
    extents: HashMap<Hash, Option<u64>>,
}

impl State<'_> {
    fn find(&mut self, what: String) {
        self.verified.findings.push(Finding { folder: self.folder.to_owned(), what });
    }

    /// Every file of the stream's WAL. -> bytes of a segment
    fn wal(&mut self, stream: &StreamFound) -> Option<u32> {
        let mut segment_bytes = None;
        for name in &stream.wal {
            let path = stream.folder.join("wal").join(format!("{name}{ENDING}"));
            let mut start = Start::default();
            let head = match file::unpack(&path, SEGMENT_BYTES_MAX, &mut start) {
                // Retention took it away since it was listed.
                Err(ArchiveError::File { source, .. }) if source.kind() == io::ErrorKind::NotFound => continue,
                Err(error) => {
                    self.find(error.to_string());
                    continue;
                }
                Ok(head) => head,
            };
            self.verified.wal_files += 1;
            self.verified.bytes += head.bytes;
            let WalName::Segment(segment) = name else { continue };
            match Header::of(&start.0).filter(|header| u64::from(header.segment_bytes) == head.bytes) {
                Some(header) if segment.start(header.segment_bytes) == header.start => {
                    segment_bytes = Some(header.segment_bytes);
                }
                _ => self.find(format!("{} is not the segment that its name says", path.display())),
            }
        }
        segment_bytes
    }

    fn bases(&mut self, stream: &StreamFound, segment_bytes: Option<u32>, referenced: &mut HashSet<Hash>) {
        let mut first_good = None;
        for base in &stream.bases {
            let path = stream.base_path(*base);
            let manifest = match Manifest::load(&path) {
                Err(ArchiveError::File { source, .. }) if source.kind() == io::ErrorKind::NotFound => continue,
                Err(error) => {
                    self.find(error.to_string());
                    continue;
                }
                Ok(manifest) => manifest,
            };
            self.verified.base_copies += 1;
            if let Some(why) = incomplete(stream, *base, &manifest) {
                self.find(why);
            }
            referenced.extend(manifest.hashes());
            for file in &manifest.files {
                for extent in &file.extents {
                    let Some(hash) = extent.hash else { continue };
                    if self.extent(hash, Some(base)) != Some(u64::from(extent.bytes)) {
                        self.find(format!("{} of base copy {base} can not be restored", file.path));
                    }
                }
            }
            first_good.get_or_insert(base.start);
        }
        let (Some(from), Some(segment_bytes)) = (first_good, segment_bytes) else { return };
        for (first, last) in gaps(&stream.segments(), from, segment_bytes) {
            let what = if first == last {
                format!("WAL segment {first} is")
            } else {
                format!("WAL segments {first} to {last} are")
            };
            self.find(format!(
                "{what} missing in {}: nothing behind can be restored from an earlier base copy",
                stream.folder.display()
            ));
        }
    }

    fn extent(&mut self, hash: Hash, needed_by: Option<&BaseName>) -> Option<u64> {
        if let Some(known) = self.extents.get(&hash) {
            return *known;
        }
        let path = ArchivePath::Extent(hash).below(self.folder);
        let found = match file::unpack(&path, EXTENT_BYTES as u64, &mut io::sink()) {
            Ok(head) if head.hash == hash => Some(head.bytes),
            Ok(_) => {
                self.find(format!("{} has another content than its name says", path.display()));
                None
            }
            Err(ArchiveError::File { source, .. })
                if source.kind() == io::ErrorKind::NotFound && needed_by.is_none() =>
            {
                None
            }
            Err(error) => {
                self.find(error.to_string());
                None
            }
        };
        if let Some(bytes) = found {
            self.verified.extents += 1;
            self.verified.bytes += bytes;
        }
        self.extents.insert(hash, found);
        found
    }
}

/// Keeps the first bytes of what is written to it.
#[derive(Default)]
struct Start(Vec<u8>);

impl io::Write for Start {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let missing = 64_usize.saturating_sub(self.0.len());
        self.0.extend(bytes.iter().take(missing));
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
