//! Lists the files of a data directory that belong to a copy, by the rules of [`super::rules`].
//!
//! Blocking. Reads names and sizes only. On a running server files come and go meanwhile; what vanishes is left out,
//! and what appears later is made by WAL.

use std::collections::{HashMap, HashSet};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use pgtandem_proto::message::FileEntry;
use walkdir::WalkDir;

use super::error::SyncError;
use super::rules;

/// Most files and directories of a copy; the table is held in memory on both nodes, about 150 bytes each.
pub const FILES_MAX: usize = 10_000_000;

/// The files and directories of `pgdata`, directories before what they contain, numbered from 0.
pub fn scan(pgdata: &Path) -> Result<Vec<FileEntry>, SyncError> {
    let mut entries = Vec::new();
    let mut unlogged: HashMap<String, HashSet<String>> = HashMap::new();
    let mut walk = WalkDir::new(pgdata).min_depth(1).follow_links(false).sort_by_file_name().into_iter();
    while let Some(item) = walk.next() {
        let item = match item {
            Ok(item) => item,
            Err(error) if vanished(&error) => continue,
            Err(error) => {
                let path = error.path().unwrap_or(pgdata).to_path_buf();
                return Err(SyncError::file("listing", &path, error.into()));
            }
        };
        let Some(path) = relative(pgdata, item.path()) else {
            return Err(SyncError::refused(
                format!("the name of {} is not UTF-8, so it can not be copied", item.path().display()),
                "Move that file out of the data directory.",
            ));
        };
        if rules::name_excluded(&path) {
            if item.file_type().is_dir() {
                walk.skip_current_dir();
            }
            continue;
        }
        // pg_wal and the statistics directory may be links to directories elsewhere; each node has its own.
        let linked_directory = item.path_is_symlink() && rules::content_excluded(&path);
        if item.path_is_symlink() && !linked_directory {
            if path.starts_with("pg_tblspc/") {
                return Err(tablespaces_refused(&path));
            }
            tracing::warn!(%path, "a symbolic link in the data directory is not copied");
            continue;
        }
        let metadata = match item.metadata() {
            Ok(metadata) => metadata,
            Err(error) if vanished(&error) => continue,
            Err(error) => return Err(SyncError::file("reading the size of", item.path(), error.into())),
        };
        let directory = metadata.is_dir() || linked_directory;
        if !directory && !metadata.is_file() {
            tracing::warn!(%path, "a special file in the data directory is not copied");
            continue;
        }
        if path.starts_with("pg_tblspc/") {
            return Err(tablespaces_refused(&path));
        }
        let (parent, name) = path.rsplit_once('/').unwrap_or(("", &path));
        if rules::content_excluded(parent) || in_excluded(parent) {
            if directory && rules::kept_inside_excluded(&path) {
                entries.push(entry(path, true, &metadata));
            }
            if directory {
                walk.skip_current_dir();
            }
            continue;
        }
        if !directory
            && let Some(number) = rules::init_fork_of(name)
            && parent.starts_with("base/")
        {
            unlogged.entry(parent.to_owned()).or_default().insert(number.to_owned());
        }
        entries.push(entry(path, directory, &metadata));
        if entries.len() > FILES_MAX {
            return Err(SyncError::refused(
                format!("{} holds more than {FILES_MAX} files", pgdata.display()),
                "This version can not copy so many files.",
            ));
        }
    }
    entries.retain(|entry| !is_unlogged(entry, &unlogged));
    for (id, entry) in entries.iter_mut().enumerate() {
        entry.id = u32::try_from(id).unwrap_or(u32::MAX);
    }
    Ok(entries)
}

fn tablespaces_refused(path: &str) -> SyncError {
    SyncError::refused(
        format!("the source has a tablespace ({path}); tablespaces are not copied by this version"),
        "Move its tables to pg_default and drop the tablespace, then start the recovery again.",
    )
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
        std::os::unix::fs::symlink("/tmp", root.join("pg_tblspc/1")).unwrap();
        assert!(scan(root).is_err());
    }
}
