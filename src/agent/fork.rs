//! Moves the data directory of a fork aside: they may be the only copy of an acknowledged write, so nothing is deleted.

use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use crate::sync::rules;

/// Renames `pgdata` to `pgdata.forked-<seconds since 1970>` and makes an empty one; gives where the data are. `None`: there were
/// none, as after a crash in the middle of this.
pub fn move_aside(pgdata: &Path) -> io::Result<Option<PathBuf>> {
    let is_empty = !pgdata.join("PG_VERSION").try_exists()?;
    let seconds = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |since| since.as_secs());
    let mut name = pgdata.as_os_str().to_owned();
    name.push(format!(".forked-{seconds}"));
    let aside = PathBuf::from(name);
    if !is_empty {
        fs::rename(pgdata, &aside)?;
    }
    match DirBuilder::new().mode(0o700).create(pgdata) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
        _ => {}
    }
    keep_own_files(&aside, pgdata)?;
    if let Some(parent) = pgdata.parent() {
        File::open(parent)?.sync_all()?;
    }
    Ok((!is_empty).then_some(aside))
}

/// What belongs to the node and not to its data (its settings, its certificates) stays where it was, too, so that a recovery finds it.
fn keep_own_files(aside: &Path, pgdata: &Path) -> io::Result<()> {
    let entries = match fs::read_dir(aside) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        entries => entries?,
    };
    for entry in entries {
        let entry = entry?;
        if entry.file_type()?.is_file() && entry.file_name().to_str().is_some_and(rules::belongs_to_node) {
            let copy = pgdata.join(entry.file_name());
            fs::copy(entry.path(), &copy)?;
            File::open(&copy)?.sync_all()?;
        }
    }
    File::open(pgdata)?.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_data_are_kept_and_it_can_be_done_again() {
        let folder = tempfile::tempdir().unwrap();
        let pgdata = folder.path().join("pgdata");
        assert_eq!(move_aside(&pgdata).unwrap(), None);
        fs::write(pgdata.join("PG_VERSION"), "15\n").unwrap();
        fs::write(pgdata.join("postgresql.conf"), "port = 5433\n").unwrap();
        let aside = move_aside(&pgdata).unwrap().unwrap();
        assert_eq!(fs::read(aside.join("PG_VERSION")).unwrap(), b"15\n");
        assert_eq!(fs::read_dir(&pgdata).unwrap().count(), 1);
        assert_eq!(fs::read(pgdata.join("postgresql.conf")).unwrap(), b"port = 5433\n");
        assert_eq!(move_aside(&pgdata).unwrap(), None);
    }
}
