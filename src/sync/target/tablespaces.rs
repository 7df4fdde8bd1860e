//! Tablespaces on B: where each of them goes, and the links and the map that lead there. Blocking.
//!
//! A tablespace is at the same path as on A, or where the node's `tablespaces` say. Everything is checked before anything
//! is touched: a directory that another server uses is never written to.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use pgtandem_proto::message::FileEntry;

use super::super::error::SyncError;
use super::super::rules::TABLESPACES;
use super::super::scan::directory_identity;
use super::layout::make_directory;

/// One tablespace of the table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Tablespace {
    /// `pg_tblspc/<oid>`
    pub link: String,
    /// Its directory on this node.
    pub path: PathBuf,
    /// The directory in it that servers of this version use, `PG_15_202209061`.
    version: String,
}

/// Where each tablespace of the table goes; refuses what would overwrite another server's data.
pub(super) fn plan(
    pgdata: &Path,
    elsewhere: &BTreeMap<PathBuf, PathBuf>,
    table: &[FileEntry],
) -> Result<Vec<Tablespace>, SyncError> {
    let mut planned: Vec<Tablespace> = Vec::new();
    for entry in table {
        let Some(found) = &entry.tablespace else { continue };
        let theirs = Path::new(&found.path);
        let path = elsewhere.get(theirs).cloned().unwrap_or_else(|| theirs.to_owned());
        let mapping = "Give it a directory of its own: tablespaces = { \"path on the leader\" = \"path here\" } in this [[node]].";
        if !path.is_absolute() || found.path.bytes().any(|byte| byte == 0) {
            return Err(SyncError::Protocol(format!("the tablespace {} has no usable path", entry.path)));
        }
        if directory_identity(&path).is_some_and(|identity| identity == found.identity) {
            return Err(SyncError::refused(
                format!("{} is the leader's own tablespace: both servers would write to it", path.display()),
                mapping,
            ));
        }
        if planned.iter().any(|other| other.path.starts_with(&path) || path.starts_with(&other.path)) {
            return Err(SyncError::refused(format!("two tablespaces would share {}", path.display()), mapping));
        }
        let below = |other: &&FileEntry| other.path.strip_prefix(&entry.path).is_some_and(|rest| rest.starts_with('/'));
        let version = table.iter().find(below).and_then(|other| other.path.split('/').nth(2));
        let Some(version) = version.map(ToOwned::to_owned) else {
            return Err(SyncError::Protocol(format!("the tablespace {} is empty", entry.path)));
        };
        let ours = fs::read_link(pgdata.join(&entry.path)).is_ok_and(|link| link == path);
        let used = fs::read_dir(path.join(&version)).is_ok_and(|mut items| items.next().is_some());
        if used && !ours {
            return Err(SyncError::refused(
                format!("{} holds tables of a server that is not this node's", path.join(&version).display()),
                mapping,
            ));
        }
        planned.push(Tablespace { link: entry.path.clone(), path, version });
    }
    Ok(planned)
}

/// Makes directories and links. What was linked elsewhere before is left where it is.
pub(super) fn link(pgdata: &Path, tablespaces: &[Tablespace]) -> Result<(), SyncError> {
    if tablespaces.is_empty() {
        return Ok(());
    }
    make_directory(&pgdata.join(TABLESPACES), 0o700)?;
    for tablespace in tablespaces {
        make_directory(&tablespace.path, 0o700)?;
        let link = pgdata.join(&tablespace.link);
        let make = || -> io::Result<()> {
            match fs::symlink_metadata(&link) {
                Ok(found) if found.file_type().is_symlink() => {
                    if fs::read_link(&link)? == tablespace.path {
                        return Ok(());
                    }
                    fs::remove_file(&link)?;
                }
                Ok(found) if found.is_dir() => fs::remove_dir_all(&link)?,
                Ok(_) => fs::remove_file(&link)?,
                Err(_) => {}
            }
            std::os::unix::fs::symlink(&tablespace.path, &link)
        };
        make().map_err(|error| SyncError::file("making", &link, error))?;
    }
    Ok(())
}

impl Tablespace {
    /// The directory with its files, and what it is called in the table.
    pub fn content(&self) -> (PathBuf, String) {
        (self.path.join(&self.version), format!("{}/{}", self.link, self.version))
    }
}

/// The text of `tablespace_map`, in the form of `do_pg_backup_start`: PostgreSQL makes the links from it.
pub(super) fn map(tablespaces: &[Tablespace]) -> String {
    let mut text = String::new();
    for tablespace in tablespaces {
        let oid = tablespace.link.rsplit('/').next().unwrap_or_default();
        let mut path = String::new();
        for character in tablespace.path.display().to_string().chars() {
            if matches!(character, '\n' | '\r' | '\\') {
                path.push('\\');
            }
            path.push(character);
        }
        // Writing to a string can not fail.
        let _ = writeln!(text, "{oid} {path}");
    }
    text
}

/// Numbers of the tablespaces in a `tablespace_map`, sorted.
pub(super) fn mapped(map: &str) -> Vec<String> {
    let mut oids: Vec<String> = map
        .lines()
        .filter_map(|line| line.split(' ').next())
        .filter(|oid| is_oid(oid))
        .map(ToOwned::to_owned)
        .collect();
    oids.sort_unstable();
    oids
}

fn is_oid(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit())
}

#[cfg(test)]
mod tests {
    use pgtandem_proto::message;

    use super::*;

    fn entries(path: &Path, identity: &str) -> Vec<FileEntry> {
        let entry = |path: &str, tablespace| FileEntry {
            id: 0,
            path: path.into(),
            directory: true,
            bytes: 0,
            mode: 0o700,
            tablespace,
        };
        let found = message::Tablespace { path: path.display().to_string(), identity: identity.into() };
        vec![
            entry("pg_tblspc", None),
            entry("pg_tblspc/16384", Some(found)),
            entry("pg_tblspc/16384/PG_15_202209061", None),
        ]
    }

    #[test]
    fn a_tablespace_goes_to_its_own_directory_and_never_to_another_servers() {
        let folder = tempfile::tempdir().unwrap();
        let (pgdata, theirs, here) =
            (folder.path().join("data"), folder.path().join("theirs"), folder.path().join("here"));
        fs::create_dir_all(theirs.join("PG_15_202209061/5")).unwrap();
        fs::create_dir_all(&pgdata).unwrap();
        let identity = directory_identity(&theirs).unwrap();
        let refused = plan(&pgdata, &BTreeMap::new(), &entries(&theirs, &identity)).unwrap_err();
        assert!(refused.to_string().contains("leader's own"), "{refused}");
        let refused = plan(&pgdata, &BTreeMap::new(), &entries(&theirs, "another host")).unwrap_err();
        assert!(refused.to_string().contains("not this node's"), "{refused}");

        let elsewhere = BTreeMap::from([(theirs.clone(), here.clone())]);
        let planned = plan(&pgdata, &elsewhere, &entries(&theirs, &identity)).unwrap();
        link(&pgdata, &planned).unwrap();
        assert_eq!(directory_identity(&pgdata.join("pg_tblspc/16384")), directory_identity(&here));
        assert_eq!(map(&planned), format!("16384 {}\n", here.display()));
        assert_eq!(mapped(&map(&planned)), ["16384"]);
        // It is this node's own from now on.
        fs::create_dir_all(here.join("PG_15_202209061/5")).unwrap();
        assert_eq!(plan(&pgdata, &elsewhere, &entries(&theirs, &identity)).unwrap(), planned);
    }

    #[test]
    fn paths_in_the_map_are_escaped_as_postgresql_does() {
        let tablespace = Tablespace {
            link: "pg_tblspc/7".into(),
            path: PathBuf::from("/mnt/a\\b\nc"),
            version: "PG_15_202209061".into(),
        };
        assert_eq!(map(&[tablespace]), "7 /mnt/a\\\\b\\\nc\n");
    }
}
