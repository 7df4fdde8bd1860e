//! One file of an archive: content, compressed, with its length and BLAKE3 in front.
//!
//! ```text
//! 0   4   50 2A 4D 18        of a frame that zstd skips, so that `zstd -dc FILE` gives the content without this program
//! 4   4   48, little-endian  length of that frame
//! 8   8   "pgtdarc1"
//! 16  8   length of the content, little-endian
//! 24  32  BLAKE3 of the content
//! 56      one zstd frame
//! ```
//!
//! Blocking. The file appears under its name only when it is whole and on the disk, and never in the place of another.

use std::fs::{self, File, OpenOptions};
use std::io::{self, BufReader, Read, Seek, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use super::error::ArchiveError;
use super::names::Hash;

const MAGIC: [u8; 16] = *b"\x50\x2A\x4D\x18\x30\0\0\0pgtdarc1";
const HEAD_BYTES: usize = 56;
/// Level of zstd: PostgreSQL's archiver waits for it.
const ZSTD_LEVEL: i32 = 1;
const BUFFER_BYTES: usize = 1 << 20;
/// Ending of files that are being written.
pub const NEW_ENDING: &str = ".new";

/// What stands in front.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Head {
    pub bytes: u64,
    pub hash: Hash,
}

impl Head {
    fn encode(self) -> [u8; HEAD_BYTES] {
        let mut out = [0; HEAD_BYTES];
        let (magic, rest) = out.split_at_mut(MAGIC.len());
        magic.copy_from_slice(&MAGIC);
        let (bytes, hash) = rest.split_at_mut(8);
        bytes.copy_from_slice(&self.bytes.to_le_bytes());
        hash.copy_from_slice(&self.hash);
        out
    }

    #[must_use]
    pub fn decode(raw: &[u8; HEAD_BYTES]) -> Option<Head> {
        let rest = raw.strip_prefix(&MAGIC)?;
        let (bytes, hash) = rest.split_first_chunk::<8>()?;
        Some(Head { bytes: u64::from_le_bytes(*bytes), hash: hash.try_into().ok()? })
    }

    /// Of the file at `path`, without looking at its content.
    pub fn read(path: &Path) -> Result<Head, ArchiveError> {
        let mut file = File::open(path).map_err(ArchiveError::file("opening", path))?;
        read_head(&mut file, path)
    }
}

fn read_head(file: &mut impl Read, path: &Path) -> Result<Head, ArchiveError> {
    let mut raw = [0; HEAD_BYTES];
    match file.read_exact(&mut raw) {
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Err(ArchiveError::damaged(path, "it is cut off")),
        Err(error) => Err(ArchiveError::file("reading", path)(error)),
        Ok(()) => Head::decode(&raw).ok_or_else(|| ArchiveError::damaged(path, "its head is none of pgtandem's")),
    }
}

/// What storing came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stored {
    New,
    /// The same content was there already.
    Same,
}

/// Stores what `open` reads, at most `bytes_max`, as `path`.
pub fn store(path: &Path, bytes_max: u64, open: impl Fn() -> io::Result<File>) -> Result<Stored, ArchiveError> {
    let reading = ArchiveError::file("reading what is to be stored as", path);
    if path.exists() {
        let mut content = open().map_err(reading)?;
        return same(path, hash_of(&mut content).map_err(ArchiveError::file("reading what is to be stored as", path))?);
    }
    let mut content = open().map_err(reading)?.take(bytes_max + 1);
    let head = write_beside(path, |file| {
        file.write_all(&[0; HEAD_BYTES])?;
        let mut hasher = blake3::Hasher::new();
        let mut encoder = zstd::stream::Encoder::new(&mut *file, ZSTD_LEVEL)?;
        let mut buffer = vec![0; BUFFER_BYTES];
        let mut bytes = 0_u64;
        loop {
            let count = content.read(&mut buffer)?;
            let Some(part) = buffer.get(..count).filter(|part| !part.is_empty()) else { break };
            bytes += part.len() as u64;
            if bytes > bytes_max {
                return Err(io::Error::new(io::ErrorKind::FileTooLarge, format!("it has more than {bytes_max} bytes")));
            }
            hasher.update(part);
            encoder.write_all(part)?;
        }
        encoder.finish()?;
        let head = Head { bytes, hash: *hasher.finalize().as_bytes() };
        file.rewind()?;
        file.write_all(&head.encode())?;
        Ok(head)
    })?;
    head.publish(path)
}

/// Stores `content` as `path`; `packed` is its zstd frame, if there is one already.
pub fn store_bytes(path: &Path, content: &[u8], packed: Option<&[u8]>) -> Result<Stored, ArchiveError> {
    let head = Head { bytes: content.len() as u64, hash: *blake3::hash(content).as_bytes() };
    if path.exists() {
        return same(path, head);
    }
    let written = write_beside(path, |file| {
        file.write_all(&head.encode())?;
        match packed {
            Some(packed) => file.write_all(packed)?,
            None => file.write_all(&zstd::bulk::compress(content, ZSTD_LEVEL)?)?,
        }
        Ok(head)
    })?;
    written.publish(path)
}

/// A file of an archive that arrives as it is, from another archive.
pub struct Arriving {
    path: PathBuf,
    new: PathBuf,
    file: File,
}

impl Arriving {
    pub fn begin(path: &Path) -> Result<Arriving, ArchiveError> {
        let (new, file) = create_beside(path)?;
        Ok(Arriving { path: path.to_owned(), new, file })
    }

    pub fn write(&mut self, bytes: &[u8]) -> Result<(), ArchiveError> {
        self.file.write_all(bytes).map_err(ArchiveError::file("writing", &self.new))
    }

    /// Where it is until then.
    #[must_use]
    pub fn new_path(&self) -> &Path {
        &self.new
    }

    /// What it says of itself.
    pub fn head(&self) -> Result<Head, ArchiveError> {
        Head::read(&self.new)
    }

    /// It is checked whole before it gets its name.
    pub fn finish(self, bytes_max: u64) -> Result<(Stored, Head), ArchiveError> {
        self.file.sync_all().map_err(ArchiveError::file("syncing", &self.new))?;
        let head = unpack(&self.new, bytes_max, &mut io::sink())?;
        let stored = Written { new: self.new.clone(), head }.publish(&self.path)?;
        Ok((stored, head))
    }
}

impl Drop for Arriving {
    fn drop(&mut self) {
        // After a finish it is gone already.
        let _ = fs::remove_file(&self.new);
    }
}

/// A whole and synced file that has not its name yet; removed when it is dropped.
struct Written {
    new: PathBuf,
    head: Head,
}

impl Drop for Written {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.new);
    }
}

impl Written {
    /// Gives it its name, durably, unless that is taken.
    fn publish(self, path: &Path) -> Result<Stored, ArchiveError> {
        match fs::hard_link(&self.new, path) {
            Ok(()) => {}
            // Another process was faster.
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => return same(path, self.head),
            Err(error) => return Err(ArchiveError::file("making", path)(error)),
        }
        if let Some(folder) = path.parent() {
            sync_folder(folder)?;
        }
        Ok(Stored::New)
    }
}

fn same(path: &Path, head: Head) -> Result<Stored, ArchiveError> {
    if Head::read(path)? == head { Ok(Stored::Same) } else { Err(ArchiveError::Other(path.to_owned())) }
}

fn hash_of(content: &mut File) -> io::Result<Head> {
    let mut hasher = blake3::Hasher::new();
    let bytes = io::copy(content, &mut hasher)?;
    Ok(Head { bytes, hash: *hasher.finalize().as_bytes() })
}

fn write_beside(path: &Path, write: impl FnOnce(&mut File) -> io::Result<Head>) -> Result<Written, ArchiveError> {
    let (new, mut file) = create_beside(path)?;
    let mut written = Written { new, head: Head { bytes: 0, hash: [0; 32] } };
    written.head = write(&mut file).map_err(ArchiveError::file("writing", path))?;
    file.sync_all().map_err(ArchiveError::file("syncing", path))?;
    Ok(written)
}

/// A new file in the folder of `path`, with a name that no other writer has.
fn create_beside(path: &Path) -> Result<(PathBuf, File), ArchiveError> {
    static NUMBER: AtomicU64 = AtomicU64::new(0);
    let (Some(folder), Some(name)) = (path.parent(), path.file_name()) else {
        return Err(ArchiveError::refused(format!("{} is no file name", path.display()), "name a file"));
    };
    let mut new = std::ffi::OsString::from(".");
    new.push(name);
    new.push(format!(".{}-{}{NEW_ENDING}", std::process::id(), NUMBER.fetch_add(1, Ordering::Relaxed)));
    let new = folder.join(new);
    let create = || OpenOptions::new().write(true).create_new(true).mode(0o600).open(&new);
    let created = match create() {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            make_folder(folder)?;
            create()
        }
        // Left by a process that had this number before the host was started again.
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
            fs::remove_file(&new).map_err(ArchiveError::file("removing", &new))?;
            create()
        }
        created => created,
    };
    Ok((new.clone(), created.map_err(ArchiveError::file("making", &new))?))
}

/// Makes a folder and what is above it, each durably within the one above.
pub fn make_folder(folder: &Path) -> Result<(), ArchiveError> {
    if folder.is_dir() {
        return Ok(());
    }
    let Some(above) = folder.parent() else { return Ok(()) };
    make_folder(above)?;
    match fs::DirBuilder::new().mode(0o700).create(folder) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
            return Err(ArchiveError::file("making", folder)(error));
        }
        _ => {}
    }
    sync_folder(above)
}

pub fn sync_folder(folder: &Path) -> Result<(), ArchiveError> {
    File::open(folder).and_then(|folder| folder.sync_all()).map_err(ArchiveError::file("syncing", folder))
}

/// Writes the content of the file at `path` to `out`, at most `bytes_max`, and proves it. What was written before an error is worth nothing.
pub fn unpack(path: &Path, bytes_max: u64, out: &mut impl Write) -> Result<Head, ArchiveError> {
    let mut file = File::open(path).map_err(ArchiveError::file("opening", path))?;
    let head = read_head(&mut file, path)?;
    if head.bytes > bytes_max {
        let why = format!("it says that its content has {} bytes; at most {bytes_max} are possible", head.bytes);
        return Err(ArchiveError::damaged(path, why));
    }
    let broken = |error: io::Error| ArchiveError::damaged(path, format!("it can not be decompressed ({error})"));
    let decoder = zstd::stream::Decoder::with_buffer(BufReader::new(file)).map_err(broken)?;
    let mut decoder = decoder.take(head.bytes + 1);
    let (mut hasher, mut buffer, mut bytes) = (blake3::Hasher::new(), vec![0; BUFFER_BYTES], 0_u64);
    loop {
        let count = decoder.read(&mut buffer).map_err(broken)?;
        let Some(part) = buffer.get(..count).filter(|part| !part.is_empty()) else { break };
        bytes += part.len() as u64;
        hasher.update(part);
        out.write_all(part).map_err(ArchiveError::file("writing the content of", path))?;
    }
    let found = Head { bytes, hash: *hasher.finalize().as_bytes() };
    if found != head {
        return Err(ArchiveError::damaged(path, "its content is not the one whose length and BLAKE3 stand in front"));
    }
    Ok(head)
}

/// The content of the file at `path`, at most `bytes_max`.
pub fn read(path: &Path, bytes_max: u64) -> Result<(Head, Vec<u8>), ArchiveError> {
    let mut content = Vec::new();
    let head = unpack(path, bytes_max, &mut content)?;
    Ok((head, content))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn leftovers(folder: &Path) -> usize {
        fs::read_dir(folder)
            .unwrap()
            .filter(|entry| entry.as_ref().unwrap().file_name().to_string_lossy().ends_with(NEW_ENDING))
            .count()
    }

    #[test]
    fn what_was_stored_comes_back_and_nothing_is_written_over() {
        let folder = tempfile::tempdir().unwrap();
        let (source, path) = (folder.path().join("source"), folder.path().join("a/b/stored.zst"));
        let content: Vec<u8> = (0..3_000_000_u32).flat_map(|n| (n / 9).to_le_bytes()).collect();
        fs::write(&source, &content).unwrap();
        let open = || File::open(&source);
        assert_eq!(store(&path, 1 << 30, open).unwrap(), Stored::New);
        assert_eq!(read(&path, 1 << 30).unwrap().1, content);
        assert_eq!(store(&path, 1 << 30, open).unwrap(), Stored::Same);
        assert_eq!(store_bytes(&path, &content, None).unwrap(), Stored::Same);
        fs::write(&source, b"other").unwrap();
        assert!(matches!(store(&path, 1 << 30, open), Err(ArchiveError::Other(_))));
        assert!(matches!(store_bytes(&path, b"other", None), Err(ArchiveError::Other(_))));
        assert_eq!(read(&path, 1 << 30).unwrap().1, content);
        assert!(store(&folder.path().join("too-long"), 4, open).is_err());
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 2, "the source and a");
        assert_eq!(leftovers(path.parent().unwrap()), 0);
    }

    #[test]
    fn plain_zstd_reads_it() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.zst");
        store_bytes(&path, b"some content", None).unwrap();
        let mut out = Vec::new();
        zstd::stream::copy_decode(File::open(&path).unwrap(), &mut out).unwrap();
        assert_eq!(out, b"some content");
    }

    #[test]
    fn every_changed_or_missing_byte_is_noticed() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.zst");
        store_bytes(&path, &b"0123456789abcdef".repeat(20), None).unwrap();
        let whole = fs::read(&path).unwrap();
        for at in 0..whole.len() {
            let mut changed = whole.clone();
            changed[at] ^= 1;
            fs::write(&path, &changed).unwrap();
            assert!(read(&path, 1 << 20).is_err(), "byte {at}");
            fs::write(&path, &whole[..at]).unwrap();
            assert!(read(&path, 1 << 20).is_err(), "{at} bytes");
        }
        fs::write(&path, &whole).unwrap();
        assert!(read(&path, 100).is_err(), "longer than allowed");
    }

    #[test]
    fn what_arrives_damaged_gets_no_name() {
        let folder = tempfile::tempdir().unwrap();
        let (one, other) = (folder.path().join("one.zst"), folder.path().join("other.zst"));
        store_bytes(&one, b"content", None).unwrap();
        let bytes = fs::read(&one).unwrap();
        let mut arriving = Arriving::begin(&other).unwrap();
        arriving.write(&bytes[..30]).unwrap();
        assert!(arriving.finish(1 << 20).is_err());
        assert!(!other.exists() && leftovers(folder.path()) == 0);
        let mut arriving = Arriving::begin(&other).unwrap();
        arriving.write(&bytes).unwrap();
        assert_eq!(arriving.finish(1 << 20).unwrap().0, Stored::New);
        assert_eq!(fs::read(&other).unwrap(), bytes);
    }
}
