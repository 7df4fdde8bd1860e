//! B's data directory before, and around, the copy: made unstartable first, cleared of what is not A's, given
//! A's directories. Blocking. File contents are written by [`super::writer`].

use std::collections::HashMap;
use std::fs;
use std::io;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::Path;

use pgtandem_proto::message::FileEntry;
use walkdir::WalkDir;

use super::super::control_file::{self, CONTROL_FILE, ControlFile};
use super::super::error::SyncError;
use super::super::rules;
use super::journal::sync_folder;
use super::tablespaces::{self, Tablespace};

/// Files of a running server or an earlier copy that would change what a start does.
const REMOVED_FIRST: [&str; 8] = [
    "standby.signal",
    "recovery.signal",
    "promote",
    "backup_label",
    "tablespace_map",
    "backup_manifest",
    "postmaster.opts",
    "postmaster.pid",
];

/// Identity of the data that lie here, if `pg_control` is there and whole.
pub(in crate::sync) fn control_of(pgdata: &Path) -> Option<ControlFile> {
    control_file::parse(&fs::read(pgdata.join(CONTROL_FILE)).ok()?)
}

/// Makes the directory one that can not be started: `pg_control` goes first, durably, then WAL and signal files.
pub(super) fn unmake(pgdata: &Path) -> Result<(), SyncError> {
    make_directory(pgdata, 0o700)?;
    remove(&pgdata.join(CONTROL_FILE))?;
    let global = pgdata.join("global");
    if global.is_dir() {
        sync_folder(&global)?;
    }
    for name in REMOVED_FIRST {
        remove(&pgdata.join(name))?;
    }
    let pg_wal = pgdata.join("pg_wal");
    if pg_wal.is_dir() {
        for item in fs::read_dir(&pg_wal).map_err(|error| SyncError::file("listing", &pg_wal, error))? {
            let item = item.map_err(|error| SyncError::file("listing", &pg_wal, error))?;
            remove_any(&item.path())?;
        }
        sync_folder(&pg_wal)?;
    }
    sync_folder(pgdata)
}

/// Gives `pgdata` the directories of the table and removes everything that is not in it, except B's own files.
pub(super) fn arrange(pgdata: &Path, table: &[FileEntry], tablespaces: &[Tablespace]) -> Result<(), SyncError> {
    let wanted: HashMap<&str, &FileEntry> = table.iter().map(|entry| (entry.path.as_str(), entry)).collect();
    clear(pgdata, "", &wanted)?;
    tablespaces::link(pgdata, tablespaces)?;
    for tablespace in tablespaces {
        let (folder, prefix) = tablespace.content();
        if folder.exists() {
            clear(&folder, &format!("{prefix}/"), &wanted)?;
        }
    }
    for entry in table.iter().filter(|entry| entry.directory && entry.tablespace.is_none()) {
        make_directory(&pgdata.join(&entry.path), entry.mode)?;
    }
    Ok(())
}

/// Removes what is below `folder`, where names of the table begin with `prefix`, and does not belong there.
fn clear(folder: &Path, prefix: &str, wanted: &HashMap<&str, &FileEntry>) -> Result<(), SyncError> {
    let mut walk = WalkDir::new(folder).min_depth(1).follow_links(false).into_iter();
    while let Some(item) = walk.next() {
        let item = item.map_err(|error| {
            let path = error.path().unwrap_or(folder).to_path_buf();
            SyncError::file("listing", &path, error.into())
        })?;
        let directory = item.file_type().is_dir();
        let relative = item.path().strip_prefix(folder).ok().and_then(Path::to_str);
        let relative = relative.map(|path| format!("{prefix}{path}"));
        // A name that is not UTF-8 can not be in the table.
        let keep = relative.as_deref().is_some_and(|path| keeps(path, directory, item.path_is_symlink(), wanted));
        if keep && directory && relative.as_deref().is_some_and(|path| matches!(path, "log" | "pg_log")) {
            walk.skip_current_dir();
        }
        if !keep {
            remove_any(item.path())?;
            if directory {
                walk.skip_current_dir();
            }
        }
    }
    Ok(())
}

fn keeps(path: &str, directory: bool, link: bool, wanted: &HashMap<&str, &FileEntry>) -> bool {
    if link {
        // B's WAL may lie on a disk of its own.
        return path == "pg_wal" || wanted.get(path).is_some_and(|entry| entry.tablespace.is_some());
    }
    if matches!(path, "log" | "pg_log") {
        return directory;
    }
    match wanted.get(path) {
        Some(entry) => entry.directory == directory,
        None => !directory && rules::belongs_to_node(path),
    }
}

pub(super) fn make_directory(path: &Path, mode: u32) -> Result<(), SyncError> {
    // PostgreSQL accepts 0700 and 0750.
    let mode = 0o700 | (mode & 0o050);
    let make = || -> io::Result<()> {
        if path.is_dir() {
            return Ok(());
        }
        fs::DirBuilder::new().recursive(true).mode(mode).create(path)?;
        fs::set_permissions(path, fs::Permissions::from_mode(mode))
    };
    make().map_err(|error| SyncError::file("making", path, error))
}

fn remove(path: &Path) -> Result<(), SyncError> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(SyncError::file("removing", path, error)),
        _ => Ok(()),
    }
}

fn remove_any(path: &Path) -> Result<(), SyncError> {
    // The type of the link itself: what a link leads to is never touched.
    let removed = match fs::symlink_metadata(path) {
        Ok(metadata) if metadata.is_dir() => fs::remove_dir_all(path),
        Ok(_) => fs::remove_file(path),
        Err(error) => Err(error),
    };
    match removed {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(SyncError::file("removing", path, error)),
        _ => Ok(()),
    }
}

/// Whether B has a file of its own here, with something in it.
pub(super) fn has_own(pgdata: &Path, path: &str) -> bool {
    fs::symlink_metadata(pgdata.join(path)).is_ok_and(|metadata| metadata.is_file() && metadata.len() > 0)
}

/// Brings everything that was written below `path` to the disk.
pub(super) fn sync_file_system(path: &Path) -> Result<(), SyncError> {
    let sync = || -> io::Result<()> {
        let folder = fs::File::open(path)?;
        Ok(rustix::fs::syncfs(&folder)?)
    };
    sync().map_err(|error| SyncError::file("syncing the file system of", path, error))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(path: &str, directory: bool) -> FileEntry {
        FileEntry { id: 0, path: path.into(), directory, bytes: 0, mode: 0o700, tablespace: None }
    }

    #[test]
    fn what_is_not_in_the_table_goes_and_what_belongs_to_the_node_stays() {
        let temporary = tempfile::tempdir().unwrap();
        let root = temporary.path().join("data");
        let outside = temporary.path().join("outside");
        for folder in ["base/5", "base/6", "global", "log", "pg_wal", "pg_replslot/old"] {
            fs::create_dir_all(root.join(folder)).unwrap();
        }
        for file in [
            "base/5/1",
            "base/6/1",
            "global/pg_control",
            "log/a.log",
            "pg_wal/0001",
            "postgresql.conf",
            "standby.signal",
            "notes",
        ] {
            fs::write(root.join(file), file).unwrap();
        }
        fs::create_dir(&outside).unwrap();
        fs::write(outside.join("precious"), "x").unwrap();
        std::os::unix::fs::symlink(&outside, root.join("base/link")).unwrap();
        unmake(&root).unwrap();
        assert!(!root.join("global/pg_control").exists() && !root.join("pg_wal/0001").exists());
        assert!(!root.join("standby.signal").exists());
        let table = [
            entry("base", true),
            entry("base/5", true),
            entry("base/5/1", false),
            entry("global", true),
            entry("pg_wal", true),
            entry("pg_replslot", true),
            entry("pg_xact", true),
        ];
        arrange(&root, &table, &[]).unwrap();
        assert!(root.join("base/5/1").exists() && root.join("pg_xact").is_dir());
        assert!(root.join("postgresql.conf").exists() && root.join("log/a.log").exists());
        assert!(
            !root.join("base/6").exists() && !root.join("pg_replslot/old").exists() && !root.join("notes").exists()
        );
        assert!(fs::symlink_metadata(root.join("base/link")).is_err());
        assert!(outside.join("precious").exists());
    }
}
