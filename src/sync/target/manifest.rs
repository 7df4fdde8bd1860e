//! The `backup_manifest` of a filled node, in PostgreSQL's own format, so that `pg_verifybackup` can say what it finds here.
//!
//! Each checksum is of what the source read, also where nothing was sent because this node said that it had the same:
//! nothing that was read back here goes into it, this node's own settings and logs apart. So a program that knows nothing
//! of us compares the bytes of one node's disk with those of the other's. True until PostgreSQL is started.

use std::fs;
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use pgtandem_proto::message::{EXTENT_BYTES, Lsn};
use ring::digest;
use walkdir::WalkDir;

use super::super::error::SyncError;
use super::super::rules;
use super::super::wal::format_lsn;
use super::journal::{Journal, rename_durably};
use crate::observe::time::utc;

/// Its name, relative to the data directory.
pub(super) const MANIFEST: &str = "backup_manifest";
/// From this version on a manifest names the cluster.
const NAMES_CLUSTER_VERSION_NUM: u32 = 170_000;
/// Directories of logs, which a node keeps.
const LOGS: [&str; 2] = ["log", "pg_log"];

/// Length and CRC32C of something, as the source read it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Content {
    pub bytes: u64,
    pub crc: u32,
}

impl Content {
    pub fn of(content: &[u8]) -> Content {
        Content { bytes: content.len() as u64, crc: crc32c::crc32c(content) }
    }

    fn and(self, next: Content) -> Content {
        let length = usize::try_from(next.bytes).unwrap_or(usize::MAX);
        Content { bytes: self.bytes + next.bytes, crc: crc32c::crc32c_combine(self.crc, next.crc, length) }
    }

    fn and_zeros(mut self, mut bytes: u64) -> Content {
        static ZEROS: [u8; 8192] = [0; 8192];
        while bytes > 0 {
            let now = usize::try_from(bytes).unwrap_or(ZEROS.len()).min(ZEROS.len());
            self.crc = crc32c::crc32c_append(self.crc, ZEROS.get(..now).unwrap_or(&ZEROS));
            self.bytes += now as u64;
            bytes -= now as u64;
        }
        self
    }
}

/// The extents of one file, in whatever order they come.
#[derive(Debug, Default)]
pub(super) struct Parts(Vec<Content>);

impl Parts {
    pub fn add(&mut self, index: u32, part: Content) {
        let index = index as usize;
        if index >= self.0.len() {
            self.0.resize(index + 1, Content::default());
        }
        if let Some(place) = self.0.get_mut(index) {
            *place = part;
        }
    }

    /// The file that they make. One that was cut between two reads has zeros behind the shorter extent.
    pub fn whole(&self) -> Content {
        let mut whole = Content::default();
        for (index, part) in self.0.iter().enumerate().filter(|(_, part)| part.bytes > 0) {
            let start = index as u64 * EXTENT_BYTES as u64;
            whole = whole.and_zeros(start.saturating_sub(whole.bytes)).and(*part);
        }
        whole
    }
}

/// Writes the manifest of the copy that `journal` tells of: `received`, files by their path, and what is this node's own.
pub(super) fn write<'a>(
    pgdata: &Path,
    journal: &Journal,
    received: impl Iterator<Item = (&'a str, Content)>,
) -> Result<(), SyncError> {
    let place = pgdata.join(MANIFEST);
    let staged = PathBuf::from(format!("{}{}", place.display(), rules::STAGED_ENDING));
    let failed = |error| SyncError::file("writing", &staged, error);
    let own = own_files(pgdata)?;
    let write = || -> io::Result<()> {
        use std::os::unix::fs::OpenOptionsExt;
        let file = fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&staged)?;
        let mut manifest = Manifest::begin(BufWriter::new(file), journal)?;
        for (path, content) in received {
            manifest.file(Path::new(path), content.bytes, modified(&pgdata.join(path)), Some(content.crc))?;
        }
        for (path, content, checked) in &own {
            let modified = modified(&pgdata.join(path));
            manifest.file(path, content.bytes, modified, checked.then_some(content.crc))?;
        }
        manifest.end(journal)?.into_inner().map_err(io::IntoInnerError::into_error)?.sync_all()
    };
    write().map_err(failed)?;
    rename_durably(&staged, &place)
}

/// Settings and certificates with their checksums, logs with their sizes only: they may be long, and are nobody's data.
fn own_files(pgdata: &Path) -> Result<Vec<(PathBuf, Content, bool)>, SyncError> {
    let mut found = Vec::new();
    for item in fs::read_dir(pgdata).map_err(|error| SyncError::file("listing", pgdata, error))? {
        let item = item.map_err(|error| SyncError::file("listing", pgdata, error))?;
        let name = PathBuf::from(item.file_name());
        let ours = name.to_str().is_some_and(rules::belongs_to_node);
        if ours && item.file_type().is_ok_and(|kind| kind.is_file()) {
            let content = fs::read(item.path()).map_err(|error| SyncError::file("reading", &item.path(), error))?;
            found.push((name, Content::of(&content), true));
        }
    }
    for folder in LOGS.iter().map(|name| pgdata.join(name)).filter(|folder| folder.is_dir()) {
        for item in WalkDir::new(&folder).follow_links(false) {
            let item = item.map_err(|error| SyncError::file("listing", &folder, error.into()))?;
            let bytes = item.metadata().map_or(0, |metadata| metadata.len());
            if let Ok(path) = item.path().strip_prefix(pgdata)
                && item.file_type().is_file()
            {
                found.push((path.to_path_buf(), Content { bytes, crc: 0 }, false));
            }
        }
    }
    Ok(found)
}

/// Seconds since 1970. `pg_control` has not got its name yet: now.
fn modified(path: &Path) -> u64 {
    let modified = fs::symlink_metadata(path).and_then(|metadata| metadata.modified());
    let since = modified.unwrap_or_else(|_| SystemTime::now()).duration_since(UNIX_EPOCH);
    since.map_or(0, |since| since.as_secs())
}

/// A manifest that is being written, with the hash over it (`backup_manifest.c`, `parse_manifest.c`).
struct Manifest<W> {
    out: W,
    hash: digest::Context,
    files: u64,
}

impl<W: Write> Manifest<W> {
    fn begin(out: W, journal: &Journal) -> io::Result<Manifest<W>> {
        let mut manifest = Manifest { out, hash: digest::Context::new(&digest::SHA256), files: 0 };
        if journal.version_num >= NAMES_CLUSTER_VERSION_NUM {
            manifest.text("{ \"PostgreSQL-Backup-Manifest-Version\": 2,\n")?;
            manifest.text(&format!("\"System-Identifier\": {},\n", journal.system_identifier))?;
        } else {
            manifest.text("{ \"PostgreSQL-Backup-Manifest-Version\": 1,\n")?;
        }
        manifest.text("\"Files\": [")?;
        Ok(manifest)
    }

    fn text(&mut self, text: &str) -> io::Result<()> {
        self.hash.update(text.as_bytes());
        self.out.write_all(text.as_bytes())
    }

    fn file(&mut self, path: &Path, bytes: u64, modified: u64, crc: Option<u32>) -> io::Result<()> {
        use std::os::unix::ffi::OsStrExt;
        let path = match path.to_str() {
            Some(path) => format!("\"Path\": {}", serde_json::Value::from(path)),
            None => format!("\"Encoded-Path\": \"{}\"", hex(path.as_os_str().as_bytes())),
        };
        // The number as it lies in memory: that is how PostgreSQL writes it.
        let checksum = crc.map_or_else(String::new, |crc| {
            format!(", \"Checksum-Algorithm\": \"CRC32C\", \"Checksum\": \"{}\"", hex(&crc.to_ne_bytes()))
        });
        let comma = if self.files == 0 { "" } else { "," };
        self.files += 1;
        let modified = utc(modified);
        self.text(&format!("{comma}\n{{ {path}, \"Size\": {bytes}, \"Last-Modified\": \"{modified} GMT\"{checksum} }}"))
    }

    fn end(mut self, journal: &Journal) -> io::Result<W> {
        let (timeline, start, stop) = (journal.timeline, format_lsn(Lsn(journal.start)), format_lsn(Lsn(journal.stop)));
        let range = format!("{{ \"Timeline\": {timeline}, \"Start-LSN\": \"{start}\", \"End-LSN\": \"{stop}\" }}");
        self.text(&format!("\n],\n\"WAL-Ranges\": [\n{range}\n],\n"))?;
        let Manifest { mut out, hash, .. } = self;
        writeln!(out, "\"Manifest-Checksum\": \"{}\"}}", hex(hash.finish().as_ref()))?;
        Ok(out)
    }
}

fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write;
    bytes.iter().fold(String::new(), |mut text, byte| {
        // Writing to a string can not fail.
        let _ = write!(text, "{byte:02x}");
        text
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn journal(version_num: u32) -> Journal {
        Journal {
            system_identifier: 7_123_456_789_012_345_678,
            timeline: 2,
            version_num,
            wal_segment_bytes: 16 << 20,
            history: Vec::new(),
            start: 0x1_0200_0028,
            stop: 0x1_0200_0100,
            wal_end: 0,
        }
    }

    fn text(version_num: u32) -> String {
        let mut manifest = Manifest::begin(Vec::new(), &journal(version_num)).unwrap();
        manifest.file(Path::new("base/5/1259"), 9, 0, Some(Content::of(b"123456789").crc)).unwrap();
        manifest.file(Path::new("log/a \"b\""), 7, 951_782_400, None).unwrap();
        String::from_utf8(manifest.end(&journal(version_num)).unwrap()).unwrap()
    }

    #[test]
    fn a_manifest_is_written_as_postgresql_writes_it() {
        let expected = r#"{ "PostgreSQL-Backup-Manifest-Version": 1,
"Files": [
{ "Path": "base/5/1259", "Size": 9, "Last-Modified": "1970-01-01 00:00:00 GMT", "Checksum-Algorithm": "CRC32C", "Checksum": "839206e3" },
{ "Path": "log/a \"b\"", "Size": 7, "Last-Modified": "2000-02-29 00:00:00 GMT" }
],
"WAL-Ranges": [
{ "Timeline": 2, "Start-LSN": "1/2000028", "End-LSN": "1/2000100" }
],
"#;
        let made = text(160_004);
        let (body, last) = made.split_at(expected.len());
        assert_eq!(body, expected);
        let sum = hex(digest::digest(&digest::SHA256, body.as_bytes()).as_ref());
        assert_eq!(last, format!("\"Manifest-Checksum\": \"{sum}\"}}\n"));
        assert!(text(170_000).starts_with(
            "{ \"PostgreSQL-Backup-Manifest-Version\": 2,\n\"System-Identifier\": 7123456789012345678,\n\"Files\": ["
        ));
    }

    proptest::proptest! {
        #[test]
        fn extents_in_any_order_make_the_checksum_of_the_file(
            lengths in proptest::collection::vec(0_usize..40, 1..5), backwards in proptest::bool::ANY,
        ) {
            // An extent is short where the file was cut while it was read.
            let mut file = Vec::new();
            let mut parts = Vec::new();
            for (index, length) in lengths.iter().enumerate() {
                let content: Vec<u8> = (0..length * 1000).map(|at| u8::try_from(at / 3 % 251).unwrap_or(0)).collect();
                if !content.is_empty() {
                    file.resize(index * EXTENT_BYTES, 0);
                    file.extend_from_slice(&content);
                }
                parts.push((u32::try_from(index).unwrap(), Content::of(&content)));
            }
            if backwards {
                parts.reverse();
            }
            let mut all = Parts::default();
            for (index, part) in parts {
                all.add(index, part);
            }
            assert_eq!(all.whole(), Content::of(&file));
        }
    }
}
