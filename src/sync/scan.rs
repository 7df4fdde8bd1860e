//! Lists the files of a data directory that belong to a copy, by the rules of [`super::rules`].
//!
//! Blocking. Reads names and sizes only. On a running server files come and go meanwhile; what vanishes is left out,
//! and what appears later is made by WAL.

use std::collections::{HashMap, HashSet};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use pgtandem_proto::message::{FileEntry, Tablespace};
use walkdir::{DirEntry, WalkDir};

use super::control_file::{self, CONTROL_FILE};
use super::error::SyncError;
use super::rules;

/// Most files and directories of a copy; the table is held in memory on both nodes, about 150 bytes each.
pub const FILES_MAX: usize = 10_000_000;
/// Reads of `pg_control` for the name of a directory.
const CONTROL_READS_MAX: u32 = 100;

/// The files and directories of `pgdata` and its tablespaces, directories before what they contain, numbered from 0.
pub fn scan(pgdata: &Path) -> Result<Vec<FileEntry>, SyncError> {
    let mut scan = Scan { entries: Vec::new(), unlogged: HashMap::new(), linked: Vec::new() };
    scan.walk(pgdata, "")?;
    if !scan.linked.is_empty() {
        let version = version_directory(pgdata)?;
        for link in std::mem::take(&mut scan.linked) {
            let (folder, path) = (pgdata.join(&link).join(&version), format!("{link}/{version}"));
            let metadata = folder.metadata().map_err(|error| SyncError::file("looking at", &folder, error))?;
            scan.entries.push(entry(path.clone(), true, &metadata));
            scan.walk(&folder, &path)?;
        }
    }
    let Scan { mut entries, unlogged, .. } = scan;
    entries.retain(|entry| !is_unlogged(entry, &unlogged));
    for (id, entry) in entries.iter_mut().enumerate() {
        entry.id = u32::try_from(id).unwrap_or(u32::MAX);
    }
    Ok(entries)
}

/// The directory of this server's version in every tablespace (`TABLESPACE_VERSION_DIRECTORY`).
fn version_directory(pgdata: &Path) -> Result<String, SyncError> {
    let read = |name: &str| {
        let path = pgdata.join(name);
        std::fs::read(&path).map_err(|error| SyncError::file("reading", &path, error))
    };
    let major = String::from_utf8_lossy(&read("PG_VERSION")?).trim().to_owned();
    // The version does not change, so a read that is torn elsewhere is only tried again.
    for _ in 0..CONTROL_READS_MAX {
        if let Some(control) = control_file::parse(&read(CONTROL_FILE)?) {
            return Ok(format!("PG_{major}_{}", control.catalog_version));
        }
    }
    Err(SyncError::Internal("pg_control can not be read".into()))
}

/// Boot of this host, device and inode of a directory; None: it is not there.
#[must_use]
pub fn directory_identity(path: &Path) -> Option<String> {
    let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    let metadata = std::fs::metadata(path).ok()?;
    Some(format!("{} {} {}", boot.trim(), metadata.dev(), metadata.ino()))
}

struct Scan {
    entries: Vec<FileEntry>,
    /// By directory: numbers of relations whose init fork exists.
    unlogged: HashMap<String, HashSet<String>>,
    /// Links to tablespaces.
    linked: Vec<String>,
}

impl Scan {
    /// Lists what is below `root`, which is called `prefix` in the table.
    fn walk(&mut self, root: &Path, prefix: &str) -> Result<(), SyncError> {
        let mut walk = WalkDir::new(root).min_depth(1).follow_links(false).follow_root_links(true);
        walk = walk.sort_by_file_name();
        let mut walk = walk.into_iter();
        while let Some(item) = walk.next() {
            let item = match item {
                Ok(item) => item,
                Err(error) if vanished(&error) => continue,
                Err(error) => {
                    let path = error.path().unwrap_or(root).to_path_buf();
                    return Err(SyncError::file("listing", &path, error.into()));
                }
            };
            let Some(path) = relative(root, item.path()) else {
                return Err(SyncError::refused(
                    format!("the name of {} is not UTF-8, so it can not be copied", item.path().display()),
                    "Move that file out of the data directory.",
                ));
            };
            let path = if prefix.is_empty() { path } else { format!("{prefix}/{path}") };
            if self.item(&item, path)? {
                walk.skip_current_dir();
            }
            if self.entries.len() > FILES_MAX {
                return Err(SyncError::refused(
                    format!("{} holds more than {FILES_MAX} files", root.display()),
                    "This version can not copy so many files.",
                ));
            }
        }
        Ok(())
    }

    /// Lists one item. -> whether it is a directory whose content is left out
    fn item(&mut self, item: &DirEntry, path: String) -> Result<bool, SyncError> {
        if rules::name_excluded(&path) {
            return Ok(item.file_type().is_dir());
        }
        if item.path_is_symlink() && rules::is_tablespace(&path) {
            return self.tablespace(item, path).map(|()| false);
        }
        // pg_wal and the statistics directory may be links to directories elsewhere; each node has its own.
        let linked_directory = item.path_is_symlink() && rules::content_excluded(&path);
        if item.path_is_symlink() && !linked_directory {
            tracing::warn!(%path, "a symbolic link in the data directory is not copied");
            return Ok(false);
        }
        let metadata = match item.metadata() {
            Ok(metadata) => metadata,
            Err(error) if vanished(&error) => return Ok(false),
            Err(error) => return Err(SyncError::file("reading the size of", item.path(), error.into())),
        };
        let directory = metadata.is_dir() || linked_directory;
        if !directory && !metadata.is_file() {
            tracing::warn!(%path, "a special file in the data directory is not copied");
            return Ok(false);
        }
        let (parent, name) = path.rsplit_once('/').unwrap_or(("", &path));
        if rules::content_excluded(parent) || in_excluded(parent) {
            if directory && rules::kept_inside_excluded(&path) {
                self.entries.push(entry(path, true, &metadata));
            }
            return Ok(directory);
        }
        if !directory
            && let Some(number) = rules::init_fork_of(name)
            && rules::is_database(parent)
        {
            self.unlogged.entry(parent.to_owned()).or_default().insert(number.to_owned());
        }
        self.entries.push(entry(path, directory, &metadata));
        Ok(false)
    }

    fn tablespace(&mut self, item: &DirEntry, path: String) -> Result<(), SyncError> {
        let failed = |error| SyncError::file("looking at", item.path(), error);
        let target = std::fs::read_link(item.path()).map_err(failed)?;
        let metadata = std::fs::metadata(item.path()).map_err(failed)?;
        let (Some(target), Some(identity)) = (target.to_str(), directory_identity(item.path())) else {
            return Err(SyncError::refused(
                format!("the directory of the tablespace {path} can not be read"),
                "Give it a path in UTF-8, or repair its link.",
            ));
        };
        let tablespace = Some(Tablespace { path: target.to_owned(), identity });
        self.linked.push(path.clone());
        self.entries.push(FileEntry { tablespace, ..entry(path, true, &metadata) });
        Ok(())
    }
}

/// Directories of 17 and later below `pg_wal`, and anything else deep in an excluded one.
fn in_excluded(parent: &str) -> bool {
    parent.split_once('/').is_some_and(|(top, _)| rules::content_excluded(top))
}

fn is_unlogged(entry: &FileEntry, unlogged: &HashMap<String, HashSet<String>>) -> bool {
    let Some((parent, name)) = entry.path.rsplit_once('/') else { return false };
    let Some(numbers) = unlogged.get(parent) else { return false };
    !entry.directory && rules::unlogged_fork(name).is_some_and(|number| numbers.contains(number))
}

fn entry(path: String, directory: bool, metadata: &std::fs::Metadata) -> FileEntry {
    let bytes = if directory { 0 } else { metadata.len() };
    FileEntry { id: 0, path, directory, bytes, mode: metadata.mode() & 0o7777, tablespace: None }
}

fn vanished(error: &walkdir::Error) -> bool {
    error.io_error().is_some_and(|error| error.kind() == io::ErrorKind::NotFound)
}

/// `path` below `pgdata` with '/' between its parts, if it is UTF-8.
fn relative(pgdata: &Path, path: &Path) -> Option<String> {
    let rest = path.strip_prefix(pgdata).ok()?;
    rest.to_str().map(str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_listing_holds_what_a_base_backup_would() {
        let directory = tempfile::tempdir().unwrap();
        let root = directory.path();
        for sub in ["base/5", "base/pgsql_tmp", "global", "pg_wal/archive_status", "pg_replslot/x", "pg_tblspc"] {
            std::fs::create_dir_all(root.join(sub)).unwrap();
        }
        for file in [
            "base/5/16384",
            "base/5/16385",
            "base/5/16385.1",
            "base/5/16385_vm",
            "base/5/16385_init",
            "base/5/t3_16386",
            "base/pgsql_tmp/pgsql_tmp1.0",
            "global/pg_control",
            "pg_wal/000000010000000000000001",
            "pg_replslot/x/state",
            "postmaster.pid",
            "PG_VERSION",
        ] {
            std::fs::write(root.join(file), file).unwrap();
        }
        let entries = scan(root).unwrap();
        let paths: Vec<&str> = entries.iter().map(|entry| entry.path.as_str()).collect();
        assert_eq!(
            paths,
            [
                "PG_VERSION",
                "base",
                "base/5",
                "base/5/16384",
                "base/5/16385_init",
                "global",
                "global/pg_control",
                "pg_replslot",
                "pg_tblspc",
                "pg_wal",
                "pg_wal/archive_status",
            ]
        );
        assert!(entries.iter().enumerate().all(|(index, entry)| entry.id as usize == index));
        std::os::unix::fs::symlink("/nowhere", root.join("pg_tblspc/1")).unwrap();
        assert!(scan(root).is_err(), "a tablespace is missing");
    }
}
