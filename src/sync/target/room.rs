//! What is said when a disk of the node is full: which file system, how much is missing there, what to type.
//!
//! Looks only once something has failed or stands still; before that, room is PostgreSQL's and the file system's matter.

use std::collections::HashMap;
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use pgtandem_proto::message::FileEntry;

use super::super::error::SyncError;
use crate::config::NodeConfig;

/// How long replay may stand still beside a full disk, seconds: the standby tries again for ever, and says so in its log only.
const STILL_SECONDS_MAX: u64 = 5;
/// Bytes of a block in the count of blocks that a file has (`st_blocks`).
const BLOCK_BYTES: u64 = 512;

/// A file system that holds, or would hold, a path.
struct Disk {
    device: u64,
    /// The top of it that is seen from that path.
    top: PathBuf,
    free_bytes: u64,
    /// It has room, but not for one more file.
    no_files: bool,
}

impl Disk {
    fn of(path: &Path) -> io::Result<Disk> {
        let there = path.ancestors().find(|folder| folder.exists()).unwrap_or(Path::new("/"));
        // What a link leads to is where the bytes go.
        let there = fs::canonicalize(there)?;
        let device = fs::metadata(&there)?.dev();
        let same = |folder: &&Path| fs::metadata(folder).is_ok_and(|metadata| metadata.dev() == device);
        let top = there.ancestors().take_while(same).last().unwrap_or(&there).to_path_buf();
        let stat = rustix::fs::statvfs(&there)?;
        let no_files = stat.f_files > 0 && stat.f_favail == 0;
        Ok(Disk { device, top, free_bytes: stat.f_bavail.saturating_mul(stat.f_frsize), no_files })
    }

    fn state(&self) -> String {
        let top = self.top.display();
        if self.no_files {
            return format!("the file system at {top} can not hold one more file (it has no free inode)");
        }
        format!("the file system at {top} has {} MiB free", self.free_bytes >> 20)
    }

    fn hint(&self, node: &str, missing: Option<u64>) -> String {
        let missing = missing.map(|bytes| bytes.saturating_sub(self.free_bytes).div_ceil(1 << 20));
        let room = match missing.filter(|mib| *mib > 0) {
            Some(mib) => format!("Make room for {mib} MiB more, and for WAL, at {}", self.top.display()),
            None => format!("Make room at {}", self.top.display()),
        };
        format!("{room}; then: pgtandem recover {node}. Only what differs is sent.")
    }
}

/// A fill's error with what it needs, if it is that a disk is full. Blocking: looks at each file of `table` once.
pub(super) fn of_fill(error: SyncError, node: &NodeConfig, table: &[FileEntry]) -> SyncError {
    let SyncError::File { path, source, .. } = &error else { return error };
    if !matches!(source.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded) {
        return error;
    }
    let Ok(disk) = Disk::of(path) else { return error };
    let missing = missing_bytes(&node.pgdata, table, disk.device);
    let needs = match missing.div_ceil(1 << 20) {
        0 => "no file that is still to come lies there, only what is written beside the files".to_owned(),
        mib => format!("the files that are still to come there need up to {mib} MiB, besides WAL"),
    };
    SyncError::Full {
        what: format!("{error}; {}, and {needs}", disk.state()),
        hint: disk.hint(&node.name, Some(missing)),
    }
}

/// Bytes that the files of `table` need on this device beyond those that they have there.
fn missing_bytes(pgdata: &Path, table: &[FileEntry], device: u64) -> u64 {
    let mut folders: HashMap<PathBuf, bool> = HashMap::new();
    let files = table.iter().filter(|entry| !entry.directory);
    let missing = files.map(|entry| {
        let path = pgdata.join(&entry.path);
        if let Ok(metadata) = fs::symlink_metadata(&path) {
            let has = metadata.blocks().saturating_mul(BLOCK_BYTES);
            return if metadata.dev() == device { entry.bytes.saturating_sub(has) } else { 0 };
        }
        let folder = path.parent().unwrap_or(pgdata).to_path_buf();
        let here = folders.entry(folder).or_insert_with_key(|folder| {
            let there = folder.ancestors().find(|folder| folder.exists());
            there.and_then(|there| fs::metadata(there).ok()).is_some_and(|metadata| metadata.dev() == device)
        });
        if *here { entry.bytes } else { 0 }
    });
    missing.sum()
}

/// A standby's error with the disk that is full, if one is that it writes to.
pub(super) fn of_standby(error: SyncError, node: &NodeConfig, wal_segment_bytes: u32) -> SyncError {
    match full(node, wal_segment_bytes) {
        Some(disk) if !matches!(error, SyncError::Full { .. }) => {
            SyncError::Full { what: format!("{error}; {}", disk.state()), hint: disk.hint(&node.name, None) }
        }
        _ => error,
    }
}

/// A disk of this server that has no room for a segment of WAL.
fn full(node: &NodeConfig, wal_segment_bytes: u32) -> Option<Disk> {
    let disks = [node.pgdata.join("pg_wal"), node.pgdata.clone()].into_iter().filter_map(|path| Disk::of(&path).ok());
    disks.into_iter().find(|disk| disk.free_bytes < u64::from(wal_segment_bytes) || disk.no_files)
}

/// Looks at the disk when a standby stands still.
pub(super) struct Still<T> {
    last: Option<T>,
    since: Instant,
}

impl<T: PartialEq> Still<T> {
    pub fn new() -> Still<T> {
        Still { last: None, since: Instant::now() }
    }

    /// `now` is how far the standby is, `behind` that there is more. An error if it has stood there for a while, and a disk is full.
    pub fn check(&mut self, now: T, behind: bool, node: &NodeConfig, wal_segment_bytes: u32) -> Result<(), SyncError> {
        if !behind || self.last.as_ref() != Some(&now) {
            *self = Still { last: Some(now), since: Instant::now() };
            return Ok(());
        }
        if self.since.elapsed() < Duration::from_secs(STILL_SECONDS_MAX) {
            return Ok(());
        }
        self.since = Instant::now();
        full(node, wal_segment_bytes).map_or(Ok(()), |disk| {
            Err(SyncError::Full {
                what: format!("PostgreSQL on {} gets no further: {}", node.pgdata.display(), disk.state()),
                hint: disk.hint(&node.name, None),
            })
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_missing_is_what_files_have_not_got_on_that_disk() {
        let folder = tempfile::tempdir().unwrap();
        let pgdata = folder.path();
        fs::write(pgdata.join("half"), vec![1; 1 << 20]).unwrap();
        let entry = |path: &str, bytes| FileEntry {
            id: 0,
            path: path.into(),
            directory: false,
            bytes,
            mode: 0o600,
            tablespace: None,
        };
        let table = [entry("half", 2 << 20), entry("base/5/new", 3 << 20)];
        let disk = Disk::of(&pgdata.join("base/5/new")).unwrap();
        assert!(pgdata.starts_with(&disk.top) || disk.top == Path::new("/"));
        // The file system may not have given the file its blocks yet.
        let missing = missing_bytes(pgdata, &table, disk.device);
        assert!((4 << 20..=5 << 20).contains(&missing), "{missing}");
        assert_eq!(missing_bytes(pgdata, &table, disk.device + 1), 0);
        assert!(
            disk.hint("b", Some(disk.free_bytes + (5 << 20)))
                .starts_with("Make room for 5 MiB more, and for WAL, at /")
        );
    }
}
