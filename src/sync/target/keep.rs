//! Keeps what lies here before it is overwritten: a copy of the data directory beside it, which a lone server can be started on.
//!
//! ```text
//! pgdata -> pgdata.old-T.partial -> synced, renamed to pgdata.old-T -> the fill begins, in pgdata
//! ```
//! So a cut in the middle of the copy has touched nothing, and one later leaves what is kept alone. Where the file system can (Btrfs, XFS),
//! both share their blocks until the fill changes them; elsewhere each file is copied.

use std::fs::{self, DirBuilder, File, Metadata, OpenOptions};
use std::io::{self, Read};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use pgtandem_proto::message::{Kept, OldData, Progress};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::super::error::SyncError;
use super::super::rules::ARCHIVE_CONF;
use super::Target;
use super::journal::sync_folder;
use super::layout::{control_of, make_directory, sync_file_system};
use crate::config::NodeConfig;

/// Between the name of the data directory and the time.
const OLD: &str = ".old-";
/// At the end of the name of a copy that is not whole.
const PARTIAL: &str = ".partial";
/// What is copied at once, and counted.
const CHUNK_BYTES: u64 = 16 << 20;
/// What only a running server needs: with it, a start would look for that server first.
const LEFT_OUT: [&str; 1] = ["postmaster.pid"];
/// A lone server must not archive into the archive of the node that goes on.
const ARCHIVES_NOTHING: &str =
    "# Kept by pgtandem before this node was filled: this copy archives nothing.\narchive_mode = off\n";

impl Target {
    /// Stops PostgreSQL and keeps a copy of its data directory. Nothing is changed in the directory itself.
    pub async fn keep_old(&mut self) -> Result<Kept, SyncError> {
        self.following = None;
        self.progress.send_replace(Progress::default());
        self.writers_ended().await;
        let stopped = self.postgres.stop(false).await;
        stopped
            .map_err(|source| SyncError::Server { action: "stopping PostgreSQL before its files are kept", source })?;
        let node = self.postgres.node().clone();
        let ended = CancellationToken::new();
        let _ends_with_this = ended.clone().drop_guard();
        let progress = self.progress.clone();
        let work = self.writers.spawn_blocking(move || Copy { node: &node, progress: &progress, ended: &ended }.keep());
        work.await.map_err(|error| SyncError::Internal(format!("keeping the old files: {error}")))?
    }
}

/// What there is to keep on this node, and the room that it needs. Blocking: looks at each file once.
pub fn old_data(node: &NodeConfig) -> Result<OldData, SyncError> {
    let pgdata = &node.pgdata;
    let mut old = OldData { free_bytes: free_bytes(pgdata), ..OldData::default() };
    // What can not be started is not worth it.
    if control_of(pgdata).is_none() {
        return Ok(old);
    }
    for entry in entries(pgdata) {
        let (path, metadata) = entry?;
        if metadata.is_symlink() {
            old.link = path.display().to_string();
        } else if metadata.is_file() {
            old.bytes += metadata.len();
        }
    }
    Ok(old)
}

/// The newest copy that is kept here; none: it has no path. Blocking.
pub fn kept_before(node: &NodeConfig) -> Result<Kept, SyncError> {
    let newest = beside(&node.pgdata).into_iter().filter(|(_, partial)| !partial).map(|(path, _)| path).max();
    let Some(path) = newest else { return Ok(Kept::default()) };
    let bytes = entries(&path).map(|entry| entry.map(|(_, found)| if found.is_file() { found.len() } else { 0 }));
    let bytes = bytes.sum::<Result<u64, SyncError>>()?;
    Ok(Kept { path: path.display().to_string(), bytes, shared: false, earlier: true })
}

/// Copies of this data directory beside it, and whether each is not whole.
fn beside(pgdata: &Path) -> Vec<(PathBuf, bool)> {
    let name = pgdata.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let of = |found: &str| -> Option<bool> {
        let time = found.strip_prefix(&name)?.strip_prefix(OLD)?;
        let (time, partial) = time.strip_suffix(PARTIAL).map_or((time, false), |time| (time, true));
        (!time.is_empty() && time.bytes().all(|byte| byte.is_ascii_digit())).then_some(partial)
    };
    let entries = pgdata.parent().and_then(|parent| fs::read_dir(parent).ok()).into_iter().flatten().flatten();
    entries.filter_map(|entry| Some((entry.path(), of(entry.file_name().to_str()?)?))).collect()
}

fn entries(pgdata: &Path) -> impl Iterator<Item = Result<(PathBuf, Metadata), SyncError>> {
    walkdir::WalkDir::new(pgdata).min_depth(1).into_iter().map(|entry| {
        let entry = entry.and_then(|entry| entry.metadata().map(|metadata| (entry.into_path(), metadata)));
        entry.map_err(|error| {
            let path = error.path().unwrap_or(Path::new("")).to_path_buf();
            SyncError::file("looking at", &path, error.into())
        })
    })
}

fn free_bytes(pgdata: &Path) -> u64 {
    let beside = pgdata.parent().unwrap_or(pgdata);
    rustix::fs::statvfs(beside).map_or(0, |stat| stat.f_bavail.saturating_mul(stat.f_frsize))
}

struct Copy<'a> {
    node: &'a NodeConfig,
    progress: &'a watch::Sender<Progress>,
    /// Nobody waits for it any more.
    ended: &'a CancellationToken,
}

impl Copy<'_> {
    fn keep(&self) -> Result<Kept, SyncError> {
        let pgdata = &self.node.pgdata;
        for (path, _) in beside(pgdata).into_iter().filter(|(_, partial)| *partial) {
            fs::remove_dir_all(&path).map_err(|error| SyncError::file("removing", &path, error))?;
        }
        let total = old_data(self.node)?;
        if total.bytes == 0 {
            return Ok(Kept::default());
        }
        self.progress.send_modify(|progress| progress.bytes_to_keep = total.bytes);
        let seconds = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |since| since.as_secs());
        let with = |ending: &str| {
            let mut name = pgdata.as_os_str().to_owned();
            name.push(format!("{OLD}{seconds}{ending}"));
            PathBuf::from(name)
        };
        let (kept, partial) = (with(""), with(PARTIAL));
        let shared = self.copy_all(pgdata, &partial).inspect_err(|_| {
            // Half a copy is of no use, and its room is needed. What can not be removed is removed by the next attempt.
            let _ = fs::remove_dir_all(&partial);
        })?;
        fs::rename(&partial, &kept).map_err(|error| SyncError::file("renaming", &partial, error))?;
        kept.parent().map_or(Ok(()), sync_folder)?;
        tracing::info!(path = %kept.display(), bytes = total.bytes, shared, "the old data directory is kept");
        Ok(Kept { path: kept.display().to_string(), bytes: total.bytes, shared, earlier: false })
    }

    /// -> whether all blocks are shared
    fn copy_all(&self, from: &Path, to: &Path) -> Result<bool, SyncError> {
        let mut shares = true;
        DirBuilder::new().mode(0o700).create(to).map_err(|error| SyncError::file("making", to, error))?;
        for entry in entries(from) {
            if self.ended.is_cancelled() {
                return Err(SyncError::Internal("the copy of the old files was given up".into()));
            }
            let (path, metadata) = entry?;
            let Ok(below) = path.strip_prefix(from) else { continue };
            let place = to.join(below);
            if metadata.is_dir() {
                make_directory(&place, metadata.mode())?;
            } else if metadata.is_file() && !LEFT_OUT.iter().any(|name| below == Path::new(name)) {
                shares &= self.copy_file(&path, &place, &metadata, shares)?;
            } else if metadata.is_symlink() {
                return Err(linked(&path.display().to_string()));
            }
        }
        let archive = to.join(ARCHIVE_CONF);
        if archive.exists() {
            fs::write(&archive, ARCHIVES_NOTHING).map_err(|error| SyncError::file("writing", &archive, error))?;
        }
        sync_file_system(to)?;
        Ok(shares)
    }

    /// `try_share`: the file system may be able to. -> whether it did
    fn copy_file(&self, from: &Path, to: &Path, metadata: &Metadata, try_share: bool) -> Result<bool, SyncError> {
        let open = || -> io::Result<(File, File)> {
            let mode = metadata.mode() & 0o777;
            let new = OpenOptions::new().write(true).create_new(true).mode(mode).open(to)?;
            new.set_permissions(fs::Permissions::from_mode(mode))?;
            Ok((File::open(from)?, new))
        };
        let (mut old, mut new) = open().map_err(|error| SyncError::file("copying", from, error))?;
        let shared = try_share && rustix::fs::ioctl_ficlone(&new, &old).is_ok();
        let count = |bytes: u64| self.progress.send_modify(|progress| progress.bytes_kept += bytes);
        if shared {
            count(metadata.len());
            return Ok(true);
        }
        loop {
            let copied = io::copy(&mut (&mut old).take(CHUNK_BYTES), &mut new);
            match copied.map_err(|error| SyncError::file("writing", to, error))? {
                0 => return Ok(metadata.len() == 0 && try_share),
                bytes => count(bytes),
            }
            if self.ended.is_cancelled() {
                return Err(SyncError::Internal("the copy of the old files was given up".into()));
            }
        }
    }
}

fn linked(link: &str) -> SyncError {
    SyncError::refused(
        format!("the old data directory can not be kept: {link} is a link, and what it leads to would be overwritten"),
        "Copy both by hand, then start the recovery without --keep-old.",
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sync::target::tests::node;

    #[test]
    fn a_copy_is_whole_or_is_not_there() {
        let folder = tempfile::tempdir().unwrap();
        let pgdata = folder.path().join("data");
        fs::create_dir_all(pgdata.join("base/5")).unwrap();
        fs::write(pgdata.join("base/5/1"), vec![7; 100_000]).unwrap();
        fs::write(pgdata.join("base/5/empty"), []).unwrap();
        fs::write(pgdata.join("postmaster.pid"), "1").unwrap();
        fs::write(pgdata.join(ARCHIVE_CONF), "archive_mode = on").unwrap();
        fs::set_permissions(pgdata.join("base/5/1"), fs::Permissions::from_mode(0o640)).unwrap();
        let to = folder.path().join("data.old-7");
        let node = node(pgdata.clone());
        let (progress, ended) = (watch::Sender::new(Progress::default()), CancellationToken::new());
        let copy = Copy { node: &node, progress: &progress, ended: &ended };
        copy.copy_all(&pgdata, &to).unwrap();
        assert_eq!(fs::read(to.join("base/5/1")).unwrap(), vec![7; 100_000]);
        assert_eq!(fs::metadata(to.join("base/5/1")).unwrap().mode() & 0o777, 0o640);
        assert!(to.join("base/5/empty").exists() && !to.join("postmaster.pid").exists());
        assert_eq!(fs::read_to_string(to.join(ARCHIVE_CONF)).unwrap(), ARCHIVES_NOTHING);
        assert!(progress.borrow().bytes_kept >= 100_000);

        // It is found again, and nothing else is taken for one.
        for other in ["data.old-8.partial", "data.old-", "data.old-x", "data.forked-9", "other.old-9"] {
            fs::create_dir(folder.path().join(other)).unwrap();
        }
        let before = kept_before(&node).unwrap();
        assert_eq!((before.path, before.earlier), (to.display().to_string(), true));
        assert!(before.bytes >= 100_000);
        // Without a pg_control there is nothing to keep; what was not whole goes.
        assert_eq!(copy.keep().unwrap(), Kept::default());
        assert!(!folder.path().join("data.old-8.partial").exists() && to.exists());

        // Nobody waits for it any more.
        ended.cancel();
        assert!(copy.copy_all(&pgdata, &folder.path().join("data.old-10")).is_err());
        let link = pgdata.join("link");
        std::os::unix::fs::symlink(&to, &link).unwrap();
        let ended = CancellationToken::new();
        let error = Copy { ended: &ended, ..copy }.copy_all(&pgdata, &folder.path().join("data.old-11")).unwrap_err();
        assert!(error.to_string().contains("is a link"), "{error}");
    }
}
