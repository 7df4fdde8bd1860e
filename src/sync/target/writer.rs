//! Writes extents at their places, in the order in which they come, and keeps a root per file. Blocking.
//!
//! Nothing is synced here; that happens once at the end. Links are not followed.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use bytes::Bytes;
use pgtandem_proto::message::{EXTENT_BYTES, FileRoot, Held};

use super::super::error::SyncError;
use super::super::extent::{self, ExtentHash, RootHasher};

/// What is done to one file, in order: extents, then one of the two ends.
#[derive(Debug)]
pub(super) enum Write {
    /// What is there already is right.
    Same {
        index: u32,
        hash: ExtentHash,
        bytes: usize,
    },
    Zeros {
        index: u32,
        bytes: usize,
    },
    Data {
        index: u32,
        bytes: Bytes,
    },
    /// Pages, by their offset in an extent of `bytes`; the others are right.
    Pages {
        index: u32,
        bytes: usize,
        pages: Vec<(usize, Bytes)>,
    },
    /// All extents were handled; the file ends where the last one did.
    Finish,
    /// The file is gone on A.
    Vanish,
}

/// The file that a [`Write`] is for.
#[derive(Clone, Debug)]
pub(super) struct Place {
    pub file: u32,
    pub path: PathBuf,
    pub mode: u32,
}

#[derive(Debug, Default)]
pub(super) struct Writer {
    current: Option<Current>,
    /// Of the files that are finished.
    roots: HashMap<u32, FileRoot>,
}

#[derive(Debug)]
struct Current {
    file: u32,
    open: File,
    /// Length before the copy began; behind it there is nothing that could be wrong.
    length: u64,
    end: u64,
    root: RootHasher,
    vanished: bool,
}

impl Writer {
    pub fn handle(&mut self, place: &Place, write: Write) -> Result<(), SyncError> {
        let failed = |error| SyncError::file("writing", &place.path, error);
        if self.current.as_ref().is_none_or(|current| current.file != place.file) {
            self.current = Some(open(place).map_err(|error| SyncError::file("opening", &place.path, error))?);
        }
        let Some(current) = &mut self.current else { return Ok(()) };
        match write {
            Write::Same { index, hash, bytes } => current.took(index, &hash, bytes).map_err(failed)?,
            Write::Zeros { index, bytes } => {
                let hash = extent::hash(ZEROS.get(..bytes).unwrap_or(&ZEROS));
                current.zeros(offset(index), bytes as u64).map_err(failed)?;
                current.took(index, &hash, bytes).map_err(failed)?;
            }
            Write::Data { index, bytes } => {
                current.open.write_all_at(&bytes, offset(index)).map_err(failed)?;
                current.took(index, &extent::hash(&bytes), bytes.len()).map_err(failed)?;
            }
            Write::Pages { index, bytes, pages } => {
                for (at, page) in pages {
                    current.open.write_all_at(&page, offset(index) + at as u64).map_err(failed)?;
                }
                // The root is over what lies here now, so it proves that the other pages were right.
                let whole = extent::read_at(&current.open, offset(index), bytes).map_err(failed)?;
                current.took(index, &extent::hash(&whole), whole.len()).map_err(failed)?;
            }
            Write::Vanish => current.vanished = true,
            Write::Finish => self.finish(place)?,
        }
        Ok(())
    }

    fn finish(&mut self, place: &Place) -> Result<(), SyncError> {
        let Some(current) = self.current.take() else { return Ok(()) };
        if current.vanished {
            return std::fs::remove_file(&place.path).map_err(|error| SyncError::file("removing", &place.path, error));
        }
        current.open.set_len(current.end).map_err(|error| SyncError::file("cutting", &place.path, error))?;
        let (root, bytes) = current.root.finish();
        self.roots.insert(place.file, FileRoot { file: place.file, bytes, root });
        Ok(())
    }

    /// Roots of all finished files.
    pub fn into_roots(self) -> HashMap<u32, FileRoot> {
        self.roots
    }
}

static ZEROS: [u8; EXTENT_BYTES] = [0; EXTENT_BYTES];

fn offset(index: u32) -> u64 {
    u64::from(index) * EXTENT_BYTES as u64
}

fn open(place: &Place) -> io::Result<Current> {
    use rustix::fs::{Mode, OFlags};
    // PostgreSQL accepts files of 0600 and 0640.
    let mode = Mode::from_raw_mode(0o600 | (place.mode & 0o040));
    let flags = OFlags::RDWR | OFlags::CREATE | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let open = File::from(rustix::fs::open(&place.path, flags, mode)?);
    let length = open.metadata()?.len();
    Ok(Current { file: place.file, open, length, end: 0, root: RootHasher::default(), vanished: false })
}

impl Current {
    /// Makes `bytes` at `offset` zeros; where the file did not reach it has none to overwrite.
    fn zeros(&mut self, offset: u64, bytes: u64) -> io::Result<()> {
        let bytes = bytes.min(self.length.saturating_sub(offset));
        let zeros = ZEROS.get(..usize::try_from(bytes).unwrap_or(EXTENT_BYTES)).unwrap_or(&ZEROS);
        self.open.write_all_at(zeros, offset)
    }

    /// Accounts for an extent. What an older and longer file had behind a short extent becomes zeros, in case the
    /// file goes on after all.
    fn took(&mut self, index: u32, hash: &ExtentHash, bytes: usize) -> io::Result<()> {
        self.root.add(hash, bytes);
        let start = offset(index);
        if bytes > 0 {
            self.end = start + bytes as u64;
        }
        if bytes < EXTENT_BYTES {
            self.zeros(start + bytes as u64, (EXTENT_BYTES - bytes) as u64)?;
        }
        Ok(())
    }
}

/// Hashes of what is at `path` from extent `first` on: `None` where there is nothing.
pub(super) fn have(path: &Path, first: u32, count: u32) -> Result<Vec<Option<Held>>, SyncError> {
    use rustix::fs::{Mode, OFlags};
    let nothing = vec![None; count as usize];
    let file = match rustix::fs::open(path, OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty()) {
        Ok(file) => File::from(file),
        Err(rustix::io::Errno::NOENT) => return Ok(nothing),
        Err(error) => return Err(SyncError::file("opening", path, error.into())),
    };
    let mut held = nothing;
    for (index, held) in (first..).zip(&mut held) {
        let bytes = extent::read_at(&file, offset(index), EXTENT_BYTES)
            .map_err(|error| SyncError::file("reading", path, error))?;
        if bytes.is_empty() {
            break;
        }
        *held = Some(extent::describe(&bytes));
    }
    Ok(held)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn place(path: &Path) -> Place {
        Place { file: 3, path: path.to_path_buf(), mode: 0o600 }
    }

    fn data(index: u32, bytes: &[u8]) -> Write {
        Write::Data { index, bytes: Bytes::copy_from_slice(bytes) }
    }

    #[test]
    fn a_longer_old_file_ends_where_the_new_one_does() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("f");
        std::fs::write(&path, vec![7; 3 * EXTENT_BYTES + 5]).unwrap();
        let kept = have(&path, 0, 4).unwrap();
        assert!(kept.iter().all(Option::is_some));
        let mut writer = Writer::default();
        let place = place(&path);
        writer
            .handle(&place, Write::Same { index: 0, hash: kept[0].as_ref().unwrap().hash, bytes: EXTENT_BYTES })
            .unwrap();
        writer.handle(&place, data(1, b"new")).unwrap();
        writer.handle(&place, data(2, b"")).unwrap();
        writer.handle(&place, Write::Finish).unwrap();
        let content = std::fs::read(&path).unwrap();
        assert_eq!(content.len(), EXTENT_BYTES + 3);
        assert!(content[..EXTENT_BYTES].iter().all(|byte| *byte == 7));
        assert_eq!(&content[EXTENT_BYTES..], b"new");
        assert_eq!(writer.into_roots()[&3].bytes, EXTENT_BYTES as u64 + 3);
    }

    #[test]
    fn pages_change_only_what_they_name() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("f");
        std::fs::write(&path, vec![7; 3 * 8192 + 100]).unwrap();
        let mut writer = Writer::default();
        let place = place(&path);
        let pages = vec![(8192, Bytes::from(vec![1; 8192])), (2 * 8192, Bytes::from(vec![2; 50]))];
        writer.handle(&place, Write::Pages { index: 0, bytes: 2 * 8192 + 50, pages }).unwrap();
        writer.handle(&place, Write::Finish).unwrap();
        let content = std::fs::read(&path).unwrap();
        let expected = [vec![7; 8192], vec![1; 8192], vec![2; 50]].concat();
        assert!(content == expected);
        let mut root = RootHasher::default();
        root.add(&extent::hash(&expected), expected.len());
        assert_eq!(writer.into_roots()[&3].root, root.finish().0);
    }

    #[test]
    fn zeros_overwrite_what_was_there_and_what_goes_on_behind_a_gap_has_zeros_before_it() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("f");
        std::fs::write(&path, vec![7; 2 * EXTENT_BYTES]).unwrap();
        let mut writer = Writer::default();
        let place = place(&path);
        writer.handle(&place, Write::Zeros { index: 0, bytes: EXTENT_BYTES }).unwrap();
        writer.handle(&place, data(1, b"short")).unwrap();
        writer.handle(&place, data(2, &[9; 10])).unwrap();
        writer.handle(&place, Write::Finish).unwrap();
        let content = std::fs::read(&path).unwrap();
        assert_eq!(content.len(), 2 * EXTENT_BYTES + 10);
        assert!(content[..EXTENT_BYTES].iter().all(|byte| *byte == 0));
        assert!(content[EXTENT_BYTES + 5..2 * EXTENT_BYTES].iter().all(|byte| *byte == 0));
        assert_eq!(&content[2 * EXTENT_BYTES..], &[9; 10]);
    }

    #[test]
    fn a_file_that_vanished_on_the_source_goes() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("f");
        let mut writer = Writer::default();
        writer.handle(&place(&path), data(0, b"x")).unwrap();
        writer.handle(&place(&path), Write::Vanish).unwrap();
        writer.handle(&place(&path), Write::Finish).unwrap();
        assert!(!path.exists());
        assert!(writer.into_roots().is_empty());
    }
}
