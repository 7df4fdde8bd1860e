//! Reads what one request asks for. Blocking.
//!
//! Vanished, shortened and torn files are normal: WAL mends them on B. A page with a wrong checksum is read again, since it
//! may have been half written at that moment; if it stays the same, it is damaged, and that is reported.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use pgtandem_proto::message::{
    EXTENT_BYTES, Extent, ExtentContent, FileEntry, FilesReply, Held, PAGE_BYTES, Packed, SMALL_FILE_BYTES_MAX,
    SmallContent, SmallFile, SmallFiles,
};

use super::super::checksum::{first_block, is_sound};
use super::super::control_file::{self, CONTROL_FILE};
use super::super::error::SyncError;
use super::super::extent::{self, Digest, ExtentHash, Sum};
use super::backup::Backup;
use crate::agent::buffers::{Buffer, Buffers};

/// Reads of a page whose checksum is wrong, and the pause before each, milliseconds.
const PAGE_READS_MAX: u32 = 3;
const PAGE_PAUSE_MS: u64 = 2;
/// Reads of `pg_control` until its CRC is right, and the pause between them, milliseconds.
const CONTROL_READS_MAX: u32 = 100;
const CONTROL_PAUSE_MS: u64 = 10;
/// Level of zstd: the fastest one that is worth it.
const ZSTD_LEVEL: i32 = 1;
/// Shorter ones are not compressed.
const PACKED_BYTES_MIN: usize = 4096;

/// What one job does.
pub(super) enum Job {
    Extents { file: u32, first: u32, have: Vec<Option<Held>> },
    Small { files: Vec<(u32, Option<ExtentHash>)> },
}

/// A job's replies, and what they add to the channel's sum.
#[derive(Default)]
pub(super) struct Done {
    pub replies: Vec<FilesReply>,
    pub sum: Vec<Answer>,
}

/// File, extent, and what it was; None: it is gone.
type Answer = (u32, u32, Option<(usize, ExtentHash)>);

impl Done {
    pub fn add_to(&self, sum: &mut Sum) {
        for (file, index, content) in &self.sum {
            sum.add(*file, *index, content.as_ref().map(|(bytes, hash)| (*bytes, hash)));
        }
    }
}

/// What a reader needs; cheap to clone.
#[derive(Clone)]
pub(super) struct Reader {
    pub backup: Arc<Backup>,
    pub buffers: Buffers,
    /// Whether what is sent is compressed.
    pub pack: bool,
}

impl Job {
    /// Bytes that it reads, for the throttle.
    pub fn bytes(&self, backup: &Backup) -> u64 {
        let of = |file: u32| backup.table.get(file as usize).map_or(0, |entry| entry.bytes);
        match self {
            Job::Extents { file, have, .. } => of(*file).min(have.len() as u64 * EXTENT_BYTES as u64),
            Job::Small { files } => files.iter().map(|(file, _)| of(*file)).sum(),
        }
    }
}

impl Reader {
    pub fn run(&self, job: &Job) -> Result<Done, SyncError> {
        match job {
            Job::Extents { file, first, have } => self.extents(*file, *first, have),
            Job::Small { files } => self.small(files),
        }
    }

    fn entry(&self, file: u32) -> Result<&FileEntry, SyncError> {
        let entry = self.backup.table.get(file as usize).filter(|entry| !entry.directory);
        entry.ok_or_else(|| SyncError::Protocol(format!("file number {file} was asked for, which is not in the table")))
    }

    fn extents(&self, file: u32, first: u32, have: &[Option<Held>]) -> Result<Done, SyncError> {
        let entry = self.entry(file)?;
        let path = self.backup.pgdata.join(&entry.path);
        if entry.path == CONTROL_FILE {
            return control(file, &path);
        }
        let open = open(&path)?;
        let mut done = Done::default();
        for (index, have) in (first..).zip(have) {
            let Some(open) = &open else {
                let content = ExtentContent::Vanished;
                done.replies.push(FilesReply::Extent(Extent { file, index, hash: [0; 32], crc: 0, content }));
                done.sum.push((file, index, None));
                continue;
            };
            let wanted = extent::extent_bytes(entry.bytes, index);
            let offset = u64::from(index) * EXTENT_BYTES as u64;
            let mut buffer = self.buffers.take();
            let place = buffer.content().get_mut(..wanted).unwrap_or_default();
            let failed = |error| SyncError::file("reading", &path, error);
            let bytes = extent::read_into(open, offset, place).map_err(failed)?;
            self.verify(open, entry, offset, place.get_mut(..bytes).unwrap_or_default()).map_err(failed)?;
            let crc = crc32c::crc32c(place.get(..bytes).unwrap_or_default());
            let (hash, content) = self.content(buffer, bytes, have.as_ref());
            done.sum.push((file, index, Some((bytes, hash))));
            done.replies.push(FilesReply::Extent(Extent { file, index, hash, crc, content }));
        }
        Ok(done)
    }

    fn content(&self, mut buffer: Buffer, bytes: usize, have: Option<&Held>) -> (ExtentHash, ExtentContent) {
        let content = buffer.content().get(..bytes).unwrap_or_default();
        let length = u32::try_from(bytes).unwrap_or(u32::MAX);
        let Some(held) = have else {
            let hash = extent::hash(content);
            if extent::all_zeros(content) {
                return (hash, ExtentContent::Zeros { bytes: length });
            }
            return (hash, ExtentContent::Data(self.packed(buffer.freeze(bytes))));
        };
        let digest = Digest::of(content);
        let content = if held.hash == digest.hash {
            ExtentContent::Same { bytes: length }
        } else if extent::all_zeros(content) {
            ExtentContent::Zeros { bytes: length }
        } else if let Some(delta) = extent::delta(content, &digest, held) {
            ExtentContent::Pages { bytes: length, changed: delta.changed, data: self.packed(delta.data) }
        } else {
            ExtentContent::Data(self.packed(buffer.freeze(bytes)))
        };
        (digest.hash, content)
    }

    fn packed(&self, data: Bytes) -> Packed {
        if self.pack
            && data.len() >= PACKED_BYTES_MIN
            && let Ok(packed) = zstd::bulk::compress(&data, ZSTD_LEVEL)
            && packed.len() < data.len() / 10 * 9
        {
            return Packed { unpacked: u32::try_from(data.len()).ok(), data: packed.into() };
        }
        Packed { unpacked: None, data }
    }

    /// Reads pages again whose checksum is wrong. A page that changes meanwhile is being written: its WAL is on the way.
    fn verify(&self, file: &File, entry: &FileEntry, offset: u64, content: &mut [u8]) -> io::Result<()> {
        let Some(first) = first_block(&entry.path).filter(|_| self.backup.checksums) else { return Ok(()) };
        let first = first.saturating_add(u32::try_from(offset / PAGE_BYTES as u64).unwrap_or(u32::MAX));
        for (index, (block, page)) in (first..).zip(content.chunks_exact_mut(PAGE_BYTES)).enumerate() {
            if is_sound(page, block, self.backup.start) {
                continue;
            }
            let before = page.to_vec();
            let at = offset + (index * PAGE_BYTES) as u64;
            for _ in 0..PAGE_READS_MAX {
                std::thread::park_timeout(Duration::from_millis(PAGE_PAUSE_MS));
                let read = extent::read_into(file, at, page)?;
                if read < PAGE_BYTES || is_sound(page, block, self.backup.start) {
                    break;
                }
            }
            if *page == before[..] {
                self.backup.damage(&entry.path, block);
            }
        }
        Ok(())
    }

    fn small(&self, files: &[(u32, Option<ExtentHash>)]) -> Result<Done, SyncError> {
        let (mut answers, mut data, mut done) = (Vec::with_capacity(files.len()), Vec::new(), Done::default());
        for (file, have) in files {
            let entry = self.entry(*file)?;
            if entry.path == CONTROL_FILE {
                return Err(SyncError::Protocol("pg_control was asked for among others".into()));
            }
            let path = self.backup.pgdata.join(&entry.path);
            let wanted = usize::try_from(entry.bytes).unwrap_or(usize::MAX);
            if wanted > SMALL_FILE_BYTES_MAX {
                return Err(SyncError::Protocol(format!("{} is not small", entry.path)));
            }
            let Some(open) = open(&path)? else {
                done.sum.push((*file, 0, None));
                answers.push(SmallFile { file: *file, hash: [0; 32], crc: 0, content: SmallContent::Vanished });
                continue;
            };
            let start = data.len();
            data.resize(start + wanted, 0);
            let failed = |error| SyncError::file("reading", &path, error);
            let bytes = extent::read_into(&open, 0, data.get_mut(start..).unwrap_or_default()).map_err(failed)?;
            data.truncate(start + bytes);
            self.verify(&open, entry, 0, data.get_mut(start..).unwrap_or_default()).map_err(failed)?;
            let content = data.get(start..).unwrap_or_default();
            let (hash, crc) = (extent::hash(content), crc32c::crc32c(content));
            done.sum.push((*file, 0, Some((bytes, hash))));
            let length = u32::try_from(bytes).unwrap_or(u32::MAX);
            let content = if have.as_ref() == Some(&hash) {
                data.truncate(start);
                SmallContent::Same { bytes: length }
            } else {
                SmallContent::Data { bytes: length }
            };
            answers.push(SmallFile { file: *file, hash, crc, content });
        }
        done.replies.push(FilesReply::Small(SmallFiles { files: answers, data: self.packed(data.into()) }));
        Ok(done)
    }
}

/// Opens a file that the scan found; a symbolic link that took its place since is not followed. None: it is gone.
fn open(path: &Path) -> Result<Option<File>, SyncError> {
    use rustix::fs::{Mode, OFlags};
    match rustix::fs::open(path, OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty()) {
        Ok(file) => Ok(Some(File::from(file))),
        Err(rustix::io::Errno::NOENT) => Ok(None),
        Err(error) => Err(SyncError::file("opening", path, error.into())),
    }
}

/// `pg_control` is written in place while the server runs: it is read until it is whole. It is never compared.
fn control(file: u32, path: &PathBuf) -> Result<Done, SyncError> {
    for _ in 0..CONTROL_READS_MAX {
        let bytes = std::fs::read(path).map_err(|error| SyncError::file("reading", path, error))?;
        if bytes.len() <= EXTENT_BYTES && control_file::parse(&bytes).is_some() {
            let (hash, crc) = (extent::hash(&bytes), crc32c::crc32c(&bytes));
            let sum = vec![(file, 0, Some((bytes.len(), hash)))];
            let content = ExtentContent::Data(Packed { unpacked: None, data: bytes.into() });
            return Ok(Done { replies: vec![FilesReply::Extent(Extent { file, index: 0, hash, crc, content })], sum });
        }
        std::thread::park_timeout(Duration::from_millis(CONTROL_PAUSE_MS));
    }
    Err(SyncError::refused(
        format!("the CRC of {} was wrong in {CONTROL_READS_MAX} reads", path.display()),
        "Check the source with pg_controldata; its disk may be damaged.",
    ))
}
