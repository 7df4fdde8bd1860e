//! `restore_command`: gives a server that recovers the WAL file that it asks for. Blocking.
//!
//! To PostgreSQL "not there" means that the archive ends here, and recovery ends with it. So that is said only of what is really past
//! the end: a damaged file, or a hole with more WAL behind it, has to stop the recovery instead ([`Fetched::Missing`] against an error).

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use super::error::ArchiveError;
use super::file;
use super::names::{ENDING, StreamName, WalName};
use super::push::{Header, SEGMENT_BYTES_MAX};
use super::stream::Stream;

/// What came of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fetched {
    FromArchive,
    /// From `pg_wal` of the server that is archived: it had not been archived yet.
    FromServer,
    /// The archive ends before it.
    Missing,
}

/// Puts the file `name` of the stream in `folder` to `to`. `live` is the data directory of the server whose archive this is, if it is on this host.
pub fn fetch(folder: &Path, live: Option<&Path>, name: &str, to: &Path) -> Result<Fetched, ArchiveError> {
    let name = WalName::parse(name).ok_or_else(|| ArchiveError::Name(name.to_owned()))?;
    let wal = folder.join("wal");
    let path = wal.join(format!("{name}{ENDING}"));
    if path.exists() {
        file::unpack(&path, SEGMENT_BYTES_MAX, &mut create(to)?)?;
        return Ok(Fetched::FromArchive);
    }
    let Some(segment) = name.segment() else { return Ok(Fetched::Missing) };
    if matches!(name, WalName::Segment(_))
        && let Some(live) = live
        && from_server(folder, live, name, to)?
    {
        // Once it is archived its file in pg_wal may be used again, perhaps while it was read.
        if path.exists() {
            file::unpack(&path, SEGMENT_BYTES_MAX, &mut create(to)?)?;
            return Ok(Fetched::FromArchive);
        }
        return Ok(Fetched::FromServer);
    }
    if behind(&wal, segment)? {
        return Err(ArchiveError::damaged(&wal, format!("{name} is missing, and later segments are there")));
    }
    Ok(Fetched::Missing)
}

fn create(to: &Path) -> Result<File, ArchiveError> {
    let open = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(to);
    open.map_err(ArchiveError::file("making", to))
}

/// Whether there is a segment of the same timeline behind this one.
fn behind(wal: &Path, segment: super::names::Segment) -> Result<bool, ArchiveError> {
    for entry in fs::read_dir(wal).map_err(ArchiveError::file("listing", wal))? {
        let entry = entry.map_err(ArchiveError::file("listing", wal))?.file_name();
        let found = entry.to_str().and_then(|name| name.strip_suffix(ENDING)).and_then(WalName::parse);
        if let Some(WalName::Segment(other)) = found
            && other.timeline == segment.timeline
            && other > segment
        {
            return Ok(true);
        }
    }
    Ok(false)
}

/// The segment that the server writes now ends somewhere within the file; recovery finds that end by itself, as after a crash.
fn from_server(folder: &Path, live: &Path, name: WalName, to: &Path) -> Result<bool, ArchiveError> {
    let Some(segment) = name.segment() else { return Ok(false) };
    let stream = folder.file_name().and_then(|name| name.to_str()).and_then(StreamName::parse);
    // Filled anew since, or not to be read: then it is not the server of this stream any more.
    let Ok(found) = Stream::of(live) else { return Ok(false) };
    if stream != Some(found.name()) {
        return Ok(false);
    }
    let source: PathBuf = live.join("pg_wal").join(name.to_string());
    let mut content = Vec::new();
    let mut read = || -> io::Result<()> {
        File::open(&source)?.take(SEGMENT_BYTES_MAX + 1).read_to_end(&mut content)?;
        Ok(())
    };
    match read() {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
        read => read.map_err(ArchiveError::file("reading", &source))?,
    }
    // A file that waits to be used again has the name of a segment to come and the content of one that was.
    let whose = Header::of(&content).filter(|header| {
        header.system_identifier == found.system_identifier
            && header.segment_bytes as usize == content.len()
            && segment.start(header.segment_bytes) == header.start
    });
    if whose.is_none() {
        return Ok(false);
    }
    create(to)?.write_all(&content).map_err(ArchiveError::file("writing", to))?;
    Ok(true)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_end_of_the_archive_is_told_apart_from_a_hole_in_it() {
        let folder = tempfile::tempdir().unwrap();
        let (stream, to) = (folder.path().join("00000001-0011223344556677"), folder.path().join("RECOVERYXLOG"));
        let store =
            |name: &str| file::store_bytes(&stream.join(format!("wal/{name}.zst")), name.as_bytes(), None).unwrap();
        store("000000010000000000000001");
        store("000000010000000000000003");
        let fetch = |name: &str| fetch(&stream, None, name, &to);
        assert_eq!(fetch("000000010000000000000001").unwrap(), Fetched::FromArchive);
        assert_eq!(fs::read(&to).unwrap(), b"000000010000000000000001");
        assert!(matches!(fetch("000000010000000000000002"), Err(ArchiveError::Damaged { .. })));
        assert_eq!(fetch("000000010000000000000004").unwrap(), Fetched::Missing);
        assert_eq!(fetch("000000020000000000000002").unwrap(), Fetched::Missing);
        assert_eq!(fetch("00000002.history").unwrap(), Fetched::Missing);
        let path = stream.join("wal/000000010000000000000001.zst");
        fs::write(&path, &fs::read(&path).unwrap()[..60]).unwrap();
        assert!(matches!(fetch("000000010000000000000001"), Err(ArchiveError::Damaged { .. })));
    }
}
