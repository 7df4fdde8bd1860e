//! What a finished fill leaves for the catch-up after it: a small file in the agent's `state_dir`, outside PGDATA.
//!
//! It is a hint about a data directory, not a proof: without `pg_control` and `standby.signal` it means nothing.

use std::io::Write;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::super::error::SyncError;

/// Largest journal that is read.
const JOURNAL_BYTES_MAX: u64 = 1 << 20;

/// What is known about the server that the files came from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Journal {
    pub system_identifier: u64,
    pub timeline: u32,
    pub version_num: u32,
    pub wal_segment_bytes: u32,
    pub history: Vec<u8>,
    /// Where the backup began and ended.
    pub start: u64,
    pub stop: u64,
    /// WAL up to here lies in `pg_wal`.
    pub wal_end: u64,
}

fn path(state_dir: &Path) -> PathBuf {
    state_dir.join("sync").join("fill.json")
}

impl Journal {
    /// Stores it durably.
    pub fn store(&self, state_dir: &Path) -> Result<(), SyncError> {
        let path = path(state_dir);
        let text = serde_json::to_vec_pretty(self).map_err(|error| SyncError::Internal(error.to_string()))?;
        if let Some(folder) = path.parent() {
            std::fs::create_dir_all(folder).map_err(|error| SyncError::file("making", folder, error))?;
        }
        write_durably(&path, &text)
    }

    /// The journal of the last fill that was finished; `None` if there is none that can be read.
    pub fn load(state_dir: &Path) -> Option<Journal> {
        let path = path(state_dir);
        let bytes = std::fs::metadata(&path).ok()?.len();
        if bytes > JOURNAL_BYTES_MAX {
            return None;
        }
        serde_json::from_slice(&std::fs::read(&path).ok()?).ok()
    }

    /// Forgets it, before anything is changed in the data directory.
    pub fn remove(state_dir: &Path) -> Result<(), SyncError> {
        let path = path(state_dir);
        match std::fs::remove_file(&path) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                Err(SyncError::file("removing", &path, error))
            }
            _ => Ok(()),
        }
    }
}

/// Writes a whole file: new file, fsync, rename, fsync of the folder.
pub(super) fn write_durably(path: &Path, bytes: &[u8]) -> Result<(), SyncError> {
    let mut staged = path.as_os_str().to_owned();
    staged.push(super::super::rules::STAGED_ENDING);
    let staged = PathBuf::from(staged);
    let write = || -> std::io::Result<()> {
        use std::os::unix::fs::OpenOptionsExt;
        let mut file = std::fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&staged)?;
        file.write_all(bytes)?;
        file.sync_all()
    };
    write().map_err(|error| SyncError::file("writing", &staged, error))?;
    rename_durably(&staged, path)
}

/// Renames a synced file into place and syncs the folder.
pub(super) fn rename_durably(from: &Path, to: &Path) -> Result<(), SyncError> {
    std::fs::rename(from, to).map_err(|error| SyncError::file("renaming", from, error))?;
    to.parent().map_or(Ok(()), sync_folder)
}

pub(super) fn sync_folder(folder: &Path) -> Result<(), SyncError> {
    let sync = || std::fs::File::open(folder)?.sync_all();
    sync().map_err(|error| SyncError::file("syncing", folder, error))
}
