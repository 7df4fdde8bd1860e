//! Writes what comes to its place, and proves it: the bytes that lie there afterwards have the hash that the source
//! announced. Blocking; extents of a file may come in any order, from several threads.
//!
//! Nothing is synced here; that happens once at the end. Links are not followed.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use pgtandem_proto::message::{EXTENT_BYTES, ExtentContent, Packed, SMALL_FILE_BYTES_MAX};

use super::super::error::SyncError;
use super::super::extent::{self, Digest, ExtentHash, delta_pages, extent_bytes};
use super::manifest::{Content, Parts};
use crate::agent::buffers::Buffers;

/// Where a file is written.
#[derive(Clone, Debug)]
pub(super) struct Place {
    pub path: PathBuf,
    pub mode: u32,
}

/// The files that are being written.
#[derive(Debug, Default)]
pub(super) struct Writer {
    open: Mutex<HashMap<usize, Arc<Open>>>,
}

#[derive(Debug)]
struct Open {
    file: File,
    /// Length before the copy began; behind it there is nothing that could be wrong.
    length: u64,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    /// Extents that have not come yet.
    left: u32,
    parts: Parts,
    vanished: bool,
}

/// One extent of a file, as it came.
pub(super) struct Arrived {
    pub index: u32,
    pub hash: ExtentHash,
    pub crc: u32,
    pub content: ExtentContent,
    /// What was here before.
    pub before: Option<Digest>,
}

impl Writer {
    /// Takes an extent of file number `file`, which has `extents` of them in a table that says that it has `bytes`.
    /// -> what the source read of the file, when this was the last of it and it is still there
    pub fn extent(
        &self,
        file: usize,
        place: &Place,
        bytes: u64,
        extents: u32,
        arrived: Arrived,
    ) -> Result<Option<Content>, SyncError> {
        let (index, crc) = (arrived.index, arrived.crc);
        let open = self.open(file, place, extents)?;
        let taken = open.take(place, extent_bytes(bytes, arrived.index), arrived)?;
        let done = {
            let mut state = open.state.lock().unwrap_or_else(PoisonError::into_inner);
            state.left = state.left.saturating_sub(1);
            match taken {
                Some(bytes) => state.parts.add(index, Content { bytes: bytes as u64, crc }),
                None => state.vanished = true,
            }
            (state.left == 0).then(|| (state.parts.whole(), state.vanished))
        };
        let Some((whole, vanished)) = done else { return Ok(None) };
        self.open.lock().unwrap_or_else(PoisonError::into_inner).remove(&file);
        if vanished {
            let removed = std::fs::remove_file(&place.path);
            return removed.map(|()| None).map_err(|error| SyncError::file("removing", &place.path, error));
        }
        open.file.set_len(whole.bytes).map_err(|error| SyncError::file("cutting", &place.path, error))?;
        Ok(Some(whole))
    }

    fn open(&self, file: usize, place: &Place, extents: u32) -> Result<Arc<Open>, SyncError> {
        let mut all = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(open) = all.get(&file) {
            return Ok(Arc::clone(open));
        }
        let opened = open(place).and_then(|file| Ok((file.metadata()?.len(), file)));
        let (length, opened) = opened.map_err(|error| SyncError::file("opening", &place.path, error))?;
        let state = Mutex::new(State { left: extents.max(1), parts: Parts::default(), vanished: false });
        let open = Arc::new(Open { file: opened, length, state });
        all.insert(file, Arc::clone(&open));
        Ok(open)
    }
}

impl Open {
    /// Writes it and checks it. -> how many bytes it has; None: it is gone on A
    fn take(&self, place: &Place, announced: usize, arrived: Arrived) -> Result<Option<usize>, SyncError> {
        let failed = |error| SyncError::file("writing", &place.path, error);
        let Arrived { index, hash, content, before, .. } = arrived;
        let start = u64::from(index) * EXTENT_BYTES as u64;
        let fits = |bytes: u32| -> Result<usize, SyncError> {
            let bytes = bytes as usize;
            if bytes <= announced { Ok(bytes) } else { Err(protocol("an extent is longer than its file")) }
        };
        let (bytes, found) = match content {
            ExtentContent::Same { bytes } => {
                let before = before.ok_or_else(|| protocol("an extent is said to be the same that is not here"))?;
                if before.bytes != bytes as usize {
                    return Err(protocol("an extent of another length is said to be the same"));
                }
                (before.bytes, before.hash)
            }
            ExtentContent::Zeros { bytes } => {
                let bytes = fits(bytes)?;
                self.zeros(start, bytes as u64).map_err(failed)?;
                (bytes, extent::hash(ZEROS.get(..bytes).unwrap_or(&ZEROS)))
            }
            ExtentContent::Data(packed) => {
                let content = unpack(packed, announced)?;
                let found = extent::hash(&content);
                if found == hash {
                    self.file.write_all_at(&content, start).map_err(failed)?;
                }
                (content.len(), found)
            }
            ExtentContent::Pages { bytes, changed, data } => {
                let bytes = fits(bytes)?;
                let data = unpack(data, bytes)?;
                let pages = delta_pages(bytes, &changed, &data).zip(before.as_ref());
                let (pages, before) = pages.ok_or_else(|| protocol("the pages of an extent do not add up"))?;
                let found = before.with_pages(bytes, &pages);
                let found = found.ok_or_else(|| protocol("pages of an extent are missing"))?;
                if found == hash {
                    for (at, page) in joined(&pages, &data) {
                        self.file.write_all_at(&page, start + at as u64).map_err(failed)?;
                    }
                }
                (bytes, found)
            }
            ExtentContent::Vanished => return Ok(None),
        };
        if found != hash {
            return Err(other_content(&place.path));
        }
        if bytes < EXTENT_BYTES {
            // What an older and longer file had here becomes zeros, in case the file goes on after all.
            self.zeros(start + bytes as u64, (EXTENT_BYTES - bytes) as u64).map_err(failed)?;
        }
        Ok(Some(bytes))
    }

    /// Makes `bytes` at `offset` zeros; where the file did not reach it has none to overwrite.
    fn zeros(&self, offset: u64, bytes: u64) -> io::Result<()> {
        let bytes = bytes.min(self.length.saturating_sub(offset));
        let zeros = ZEROS.get(..usize::try_from(bytes).unwrap_or(EXTENT_BYTES)).unwrap_or(&ZEROS);
        self.file.write_all_at(zeros, offset)
    }
}

static ZEROS: [u8; EXTENT_BYTES] = [0; EXTENT_BYTES];

/// Pages that follow each other become one write: they lie behind each other in `data`, too.
fn joined(pages: &[(usize, Bytes)], data: &Bytes) -> Vec<(usize, Bytes)> {
    let mut runs: Vec<(usize, usize, usize)> = Vec::new();
    let mut from = 0;
    for (at, page) in pages {
        let to = from + page.len();
        match runs.last_mut() {
            Some((start, first, end)) if *start + (*end - *first) == *at => *end = to,
            _ => runs.push((*at, from, to)),
        }
        from = to;
    }
    runs.into_iter().map(|(at, from, to)| (at, data.slice(from..to))).collect()
}

fn protocol(what: &str) -> SyncError {
    SyncError::Protocol(what.into())
}

fn other_content(path: &Path) -> SyncError {
    SyncError::Protocol(format!("{} arrived with another content than it was sent with", path.display()))
}

/// The bytes themselves, of which there are at most `bytes_max`.
pub(super) fn unpack(packed: Packed, bytes_max: usize) -> Result<Bytes, SyncError> {
    let bytes = packed.unpacked.map_or(packed.data.len(), |bytes| bytes as usize);
    if bytes > bytes_max {
        return Err(protocol("more bytes came than were announced"));
    }
    if packed.unpacked.is_none() {
        return Ok(packed.data);
    }
    match zstd::bulk::decompress(&packed.data, bytes) {
        Ok(content) if content.len() == bytes => Ok(content.into()),
        _ => Err(protocol("compressed bytes can not be read")),
    }
}

/// Writes a small file whole.
pub(super) fn write_small(place: &Place, content: &[u8], hash: &ExtentHash) -> Result<(), SyncError> {
    if extent::hash(content) != *hash {
        return Err(other_content(&place.path));
    }
    let write = || -> io::Result<()> {
        let file = open(place)?;
        file.write_all_at(content, 0)?;
        file.set_len(content.len() as u64)
    };
    write().map_err(|error| SyncError::file("writing", &place.path, error))
}

/// Removes a file that is gone on A.
pub(super) fn remove_vanished(place: &Place) -> Result<(), SyncError> {
    match std::fs::remove_file(&place.path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(SyncError::file("removing", &place.path, error)),
        _ => Ok(()),
    }
}

fn open(place: &Place) -> io::Result<File> {
    use rustix::fs::{Mode, OFlags};
    // PostgreSQL accepts files of 0600 and 0640.
    let mode = Mode::from_raw_mode(0o600 | (place.mode & 0o040));
    let flags = OFlags::RDWR | OFlags::CREATE | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    Ok(File::from(rustix::fs::open(&place.path, flags, mode)?))
}

fn open_to_read(path: &Path) -> Result<Option<File>, SyncError> {
    use rustix::fs::{Mode, OFlags};
    match rustix::fs::open(path, OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty()) {
        Ok(file) => Ok(Some(File::from(file))),
        Err(rustix::io::Errno::NOENT) => Ok(None),
        Err(error) => Err(SyncError::file("opening", path, error.into())),
    }
}

/// Hashes of what is at `path` from extent `first` on: `None` where there is nothing.
pub(super) fn have(path: &Path, first: u32, count: u32, buffers: &Buffers) -> Result<Vec<Option<Digest>>, SyncError> {
    let mut held = vec![None; count as usize];
    let Some(file) = open_to_read(path)? else { return Ok(held) };
    let mut buffer = buffers.take();
    for (index, held) in (first..).zip(&mut held) {
        let offset = u64::from(index) * EXTENT_BYTES as u64;
        let place = buffer.content().get_mut(..EXTENT_BYTES).unwrap_or_default();
        let bytes = extent::read_into(&file, offset, place).map_err(|error| SyncError::file("reading", path, error))?;
        if bytes == 0 {
            break;
        }
        *held = place.get(..bytes).map(Digest::of);
    }
    Ok(held)
}

/// The hash of a small file; `None` if there is none, or another one that is not small.
pub(super) fn have_small(path: &Path) -> Result<Option<ExtentHash>, SyncError> {
    let Some(file) = open_to_read(path)? else { return Ok(None) };
    let mut content = vec![0; SMALL_FILE_BYTES_MAX + 1];
    let read = extent::read_into(&file, 0, &mut content);
    let bytes = read.map_err(|error| SyncError::file("reading", path, error))?;
    Ok(if bytes <= SMALL_FILE_BYTES_MAX { content.get(..bytes).map(extent::hash) } else { None })
}

#[cfg(test)]
mod tests {
    use super::*;

    const LONG: u64 = 3 * EXTENT_BYTES as u64;

    fn place(path: &Path) -> Place {
        Place { path: path.to_path_buf(), mode: 0o600 }
    }

    fn data(index: u32, bytes: &[u8]) -> Arrived {
        let content = ExtentContent::Data(Packed { unpacked: None, data: Bytes::copy_from_slice(bytes) });
        Arrived { index, hash: extent::hash(bytes), crc: crc32c::crc32c(bytes), content, before: None }
    }

    fn buffers() -> Buffers {
        Buffers::new(EXTENT_BYTES)
    }

    #[test]
    fn a_longer_old_file_ends_where_the_new_one_does_in_whatever_order_it_comes() {
        for order in [[0, 1, 2], [2, 1, 0], [1, 2, 0]] {
            let folder = tempfile::tempdir().unwrap();
            let path = folder.path().join("f");
            std::fs::write(&path, vec![7; 3 * EXTENT_BYTES + 5]).unwrap();
            let kept = have(&path, 0, 4, &buffers()).unwrap();
            assert!(kept.iter().all(Option::is_some));
            let writer = Writer::default();
            for index in order {
                let arrived = match index {
                    0 => {
                        let before = kept[0].clone();
                        let content = ExtentContent::Same { bytes: 1 << 20 };
                        Arrived { index, hash: before.as_ref().unwrap().hash, crc: 0, content, before }
                    }
                    1 => data(1, b"new"),
                    _ => data(2, b""),
                };
                writer.extent(0, &place(&path), LONG, 3, arrived).unwrap();
            }
            let content = std::fs::read(&path).unwrap();
            assert_eq!(content.len(), EXTENT_BYTES + 3, "{order:?}");
            assert!(content[..EXTENT_BYTES].iter().all(|byte| *byte == 7));
            assert_eq!(&content[EXTENT_BYTES..], b"new");
        }
    }

    #[test]
    fn pages_change_only_what_they_name() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("f");
        std::fs::write(&path, vec![7; 3 * 8192 + 100]).unwrap();
        let before = have(&path, 0, 1, &buffers()).unwrap().remove(0);
        let expected = [vec![7; 8192], vec![1; 8192], vec![2; 50]].concat();
        let packed = Packed { unpacked: None, data: expected[8192..].to_vec().into() };
        let content = ExtentContent::Pages { bytes: 2 * 8192 + 50, changed: vec![0b110], data: packed };
        let arrived = Arrived { index: 0, hash: extent::hash(&expected), crc: 0, content, before };
        Writer::default().extent(0, &place(&path), 3 * 8192, 1, arrived).unwrap();
        assert!(std::fs::read(&path).unwrap() == expected);
    }

    #[test]
    fn what_is_not_what_was_announced_is_refused_and_not_written() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("f");
        std::fs::write(&path, b"old").unwrap();
        let wrong = Arrived { hash: extent::hash(b"other"), ..data(0, b"some") };
        let error = Writer::default().extent(0, &place(&path), 5, 1, wrong).unwrap_err();
        assert!(error.to_string().contains("another content"), "{error}");
        assert!(write_small(&place(&path), b"some", &extent::hash(b"other")).is_err());
        assert_eq!(std::fs::read(&path).unwrap(), b"old");
        let long = data(0, b"longer than announced");
        assert!(Writer::default().extent(0, &place(&path), 5, 1, long).is_err());
        let same = Arrived { content: ExtentContent::Same { bytes: 3 }, ..data(0, b"old") };
        assert!(Writer::default().extent(0, &place(&path), 5, 1, same).is_err(), "nothing was here");
    }

    #[test]
    fn zeros_overwrite_what_was_there_and_what_goes_on_behind_a_gap_has_zeros_before_it() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("f");
        std::fs::write(&path, vec![7; 2 * EXTENT_BYTES]).unwrap();
        let writer = Writer::default();
        let content = ExtentContent::Zeros { bytes: 1 << 20 };
        let zeros = Arrived { index: 0, hash: extent::hash(&ZEROS), crc: 0, content, before: None };
        writer.extent(0, &place(&path), LONG, 3, data(2, &[9; 10])).unwrap();
        writer.extent(0, &place(&path), LONG, 3, zeros).unwrap();
        writer.extent(0, &place(&path), LONG, 3, data(1, b"short")).unwrap();
        let content = std::fs::read(&path).unwrap();
        assert_eq!(content.len(), 2 * EXTENT_BYTES + 10);
        assert!(content[..EXTENT_BYTES].iter().all(|byte| *byte == 0));
        assert!(content[EXTENT_BYTES + 5..2 * EXTENT_BYTES].iter().all(|byte| *byte == 0));
        assert_eq!(&content[2 * EXTENT_BYTES..], &[9; 10]);
    }

    #[test]
    fn what_is_told_of_a_file_is_what_the_source_read_also_where_nothing_was_sent() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("f");
        std::fs::write(&path, vec![7; EXTENT_BYTES + 10]).unwrap();
        let mut kept = have(&path, 0, 2, &buffers()).unwrap();
        let writer = Writer::default();
        let second = data(1, b"some");
        let (crc, tail) = (0x1234_5678, second.crc);
        assert_eq!(writer.extent(0, &place(&path), LONG, 2, second).unwrap(), None);
        let before = kept.remove(0);
        let content = ExtentContent::Same { bytes: 1 << 20 };
        let same = Arrived { index: 0, hash: before.as_ref().unwrap().hash, crc, content, before };
        let whole = writer.extent(0, &place(&path), LONG, 2, same).unwrap();
        let expected = Content { bytes: EXTENT_BYTES as u64 + 4, crc: crc32c::crc32c_combine(crc, tail, 4) };
        assert_eq!(whole, Some(expected), "not what lies here");
    }

    #[test]
    fn a_file_that_vanished_on_the_source_goes() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("f");
        let writer = Writer::default();
        writer.extent(0, &place(&path), LONG, 2, data(0, b"x")).unwrap();
        let gone = Arrived { content: ExtentContent::Vanished, ..data(1, b"") };
        writer.extent(0, &place(&path), LONG, 2, gone).unwrap();
        assert!(!path.exists());
    }

    #[test]
    fn compressed_bytes_come_out_as_they_were_and_never_longer_than_announced() {
        let content = vec![5; 100_000];
        let packed = zstd::bulk::compress(&content, 1).unwrap();
        let packed = |unpacked| Packed { unpacked: Some(unpacked), data: packed.clone().into() };
        assert_eq!(unpack(packed(100_000), EXTENT_BYTES).unwrap(), content);
        for unpacked in [99_999, 100_001, u32::MAX] {
            assert!(unpack(packed(unpacked), EXTENT_BYTES).is_err());
        }
    }
}
