//! `archive_command`: stores a finished segment, and some that wait behind it. Blocking.
//!
//! PostgreSQL takes success as leave to recycle the segment, so it is on the disk by then. It calls with one segment after the other, and may
//! call again with one that was stored already: equal content is success, anything else under the same name is an error.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use super::error::ArchiveError;
use super::file::{self, Stored};
use super::names::{ArchivePath, Segment, WalName};
use super::stream::{HISTORY_BYTES_MAX, Stream};

/// Largest segment that `initdb --wal-segsize` makes, bytes.
pub const SEGMENT_BYTES_MAX: u64 = 1 << 30;
/// Segments that one call stores, at the same time, when PostgreSQL has more than one waiting.
pub const BATCH_MAX: usize = 8;
/// `SizeOfXLogLongPHD`: what a segment begins with.
const LONG_HEADER_BYTES: usize = 40;

/// What a push did.
#[derive(Clone, Copy, Debug)]
pub struct Pushed {
    pub path: ArchivePath,
    pub stored: Stored,
}

/// Stores `source`, a file in `pg_wal`, in the archive of a node.
pub fn push(folder: &Path, pgdata: &Path, source: &Path) -> Result<Pushed, ArchiveError> {
    let source = if source.is_absolute() { source.to_owned() } else { pgdata.join(source) };
    let text = source.file_name().unwrap_or_default().to_string_lossy();
    let name = WalName::parse(&text).ok_or_else(|| ArchiveError::Name(text.to_string()))?;
    let stream = Stream::of(pgdata)?;
    let path = ArchivePath::Wal(stream.name(), name);
    let store = |name: WalName, source: &Path| {
        check(&stream, name, source)?;
        let bytes_max = if name.segment().is_some() { SEGMENT_BYTES_MAX } else { HISTORY_BYTES_MAX };
        file::store(&ArchivePath::Wal(stream.name(), name).below(folder), bytes_max, || File::open(source))
    };
    let stored = std::thread::scope(|scope| {
        for (name, source) in waiting(&source, name) {
            // Its own call, later, says what is wrong with it.
            scope.spawn(move || store(name, &source));
        }
        store(name, &source)
    })?;
    Ok(Pushed { path, stored })
}

/// Segments of a data directory that PostgreSQL has marked as ready and has not got rid of yet, the next ones first.
#[must_use]
pub fn ready(pg_wal: &Path) -> Vec<Segment> {
    let ready = fs::read_dir(pg_wal.join("archive_status")).into_iter().flatten().flatten().filter_map(|entry| {
        let name = entry.file_name();
        Segment::parse(name.to_str()?.strip_suffix(".ready")?)
    });
    let mut ready: Vec<Segment> = ready.collect();
    ready.sort_unstable();
    ready
}

/// How many wait, and since when the oldest does, seconds since 1970. None: none waits.
#[must_use]
pub fn backlog(pg_wal: &Path) -> Option<(usize, u64)> {
    let ready = ready(pg_wal);
    let mark = pg_wal.join("archive_status").join(format!("{}.ready", ready.first()?));
    let since = fs::metadata(mark).ok()?.modified().ok()?.duration_since(std::time::SystemTime::UNIX_EPOCH).ok()?;
    Some((ready.len(), since.as_secs()))
}

/// Those of them behind this one that go with it.
fn waiting(source: &Path, name: WalName) -> Vec<(WalName, PathBuf)> {
    let (WalName::Segment(segment), Some(pg_wal)) = (name, source.parent()) else { return Vec::new() };
    let mut ready = ready(pg_wal);
    ready.retain(|other| *other > segment && other.timeline == segment.timeline);
    let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    ready.truncate((BATCH_MAX - 1).min(cores));
    ready.into_iter().map(|segment| (WalName::Segment(segment), pg_wal.join(segment.to_string()))).collect()
}

/// A segment says in its first page which server wrote it and where it belongs: what does not belong here never gets in.
fn check(stream: &Stream, name: WalName, source: &Path) -> Result<(), ArchiveError> {
    let (WalName::Segment(segment) | WalName::Partial(segment)) = name else { return Ok(()) };
    let mut header = [0; LONG_HEADER_BYTES];
    let mut read = || -> io::Result<()> { File::open(source)?.read_exact_at(&mut header, 0) };
    read().map_err(ArchiveError::file("reading", source))?;
    let header = Header::decode(&header);
    if header.system_identifier != stream.system_identifier || segment.start(header.segment_bytes) != header.start {
        return Err(ArchiveError::damaged(
            source,
            "it is no finished segment of this server: its first page belongs elsewhere",
        ));
    }
    Ok(())
}

/// `XLogLongPageHeaderData`, what matters of it here.
#[derive(Clone, Copy, Debug)]
pub struct Header {
    pub start: pgtandem_proto::message::Lsn,
    pub system_identifier: u64,
    pub segment_bytes: u32,
}

impl Header {
    #[must_use]
    pub fn decode(raw: &[u8; LONG_HEADER_BYTES]) -> Header {
        let long = |at: usize| raw.get(at..at + 8).and_then(|raw| raw.try_into().ok()).map_or(0, u64::from_le_bytes);
        let short = |at: usize| raw.get(at..at + 4).and_then(|raw| raw.try_into().ok()).map_or(0, u32::from_le_bytes);
        let start = pgtandem_proto::message::Lsn(long(8));
        Header { start, system_identifier: long(24), segment_bytes: short(32) }
    }

    /// Of the first bytes of a segment, if there are enough.
    #[must_use]
    pub fn of(content: &[u8]) -> Option<Header> {
        content.first_chunk().map(Header::decode)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::archive::stream::Stream;

    const SEGMENT_BYTES: u32 = 1 << 20;

    /// A data directory on the first timeline, as far as a push looks at it.
    fn pgdata(folder: &Path) -> PathBuf {
        let pgdata = folder.join("pgdata");
        fs::create_dir_all(pgdata.join("pg_wal/archive_status")).unwrap();
        fs::create_dir_all(pgdata.join("global")).unwrap();
        let mut control = vec![0_u8; 8192];
        control[..8].copy_from_slice(&7_u64.to_le_bytes());
        let crc = crc32c::crc32c(&control[..288]);
        control[288..292].copy_from_slice(&crc.to_le_bytes());
        fs::write(pgdata.join("global/pg_control"), control).unwrap();
        pgdata
    }

    fn segment(pgdata: &Path, number: u64, system_identifier: u64, fill: u8) -> String {
        let start = pgtandem_proto::message::Lsn(number * u64::from(SEGMENT_BYTES));
        let name = Segment::of(1, start, SEGMENT_BYTES).to_string();
        let mut content = vec![fill; SEGMENT_BYTES as usize];
        content[8..16].copy_from_slice(&start.0.to_le_bytes());
        content[24..32].copy_from_slice(&system_identifier.to_le_bytes());
        content[32..36].copy_from_slice(&SEGMENT_BYTES.to_le_bytes());
        fs::write(pgdata.join("pg_wal").join(&name), content).unwrap();
        name
    }

    #[test]
    fn a_push_stores_what_waits_too_and_can_be_repeated() {
        let folder = tempfile::tempdir().unwrap();
        let (pgdata, archive) = (pgdata(folder.path()), folder.path().join("archive/a"));
        let names: Vec<String> = (1..4).map(|number| segment(&pgdata, number, 7, 1)).collect();
        for name in &names[..2] {
            fs::write(pgdata.join(format!("pg_wal/archive_status/{name}.ready")), b"").unwrap();
        }
        let wal = archive.join(Stream::of(&pgdata).unwrap().name().to_string()).join("wal");
        let source = |name: &str| PathBuf::from("pg_wal").join(name);
        assert_eq!(push(&archive, &pgdata, &source(&names[0])).unwrap().stored, Stored::New);
        assert!(wal.join(format!("{}.zst", names[1])).exists() && !wal.join(format!("{}.zst", names[2])).exists());
        assert_eq!(push(&archive, &pgdata, &source(&names[1])).unwrap().stored, Stored::Same);
        segment(&pgdata, 1, 7, 2);
        assert!(matches!(push(&archive, &pgdata, &source(&names[0])), Err(ArchiveError::Other(_))));
    }

    #[test]
    fn what_is_no_segment_of_this_server_never_gets_in() {
        let folder = tempfile::tempdir().unwrap();
        let (pgdata, archive) = (pgdata(folder.path()), folder.path().join("archive/a"));
        let foreign = segment(&pgdata, 1, 8, 1);
        assert!(matches!(
            push(&archive, &pgdata, Path::new(&format!("pg_wal/{foreign}"))),
            Err(ArchiveError::Damaged { .. })
        ));
        let own = segment(&pgdata, 2, 7, 1);
        let recycled = Segment::of(1, pgtandem_proto::message::Lsn(3 << 20), SEGMENT_BYTES).to_string();
        fs::rename(pgdata.join("pg_wal").join(own), pgdata.join("pg_wal").join(&recycled)).unwrap();
        assert!(matches!(
            push(&archive, &pgdata, Path::new(&format!("pg_wal/{recycled}"))),
            Err(ArchiveError::Damaged { .. })
        ));
        assert!(matches!(push(&archive, &pgdata, Path::new("pg_wal/xlogtemp.1")), Err(ArchiveError::Name(_))));
        assert!(matches!(
            push(&archive, &pgdata, Path::new("pg_wal/00000002.history")),
            Err(ArchiveError::File { .. })
        ));
        assert!(!archive.exists() || fs::read_dir(&archive).unwrap().next().is_none());
    }
}
