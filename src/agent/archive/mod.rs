//! The agent's part in archiving: PostgreSQL's settings, base copies when they are due, retention, and the peers' copies.
//!
//! WAL itself is stored by `pgtandem wal push`, which PostgreSQL calls and which needs no agent (`crate::archive`).

mod keep;
mod ship;

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use pgtandem_proto::membership::NodeState;
use pgtandem_proto::message::{BaseCopy, Failure, FailureCode, PostgresState};
use tokio::sync::Mutex as AsyncMutex;
use tokio::time::sleep;

use super::node::Node;
use crate::archive::base::{self, Job};
use crate::archive::health::Seen;
use crate::archive::manifest::Manifest;
use crate::archive::names::{ArchivePath, StreamName};
use crate::archive::retention::{self, Copy, Keep};
use crate::archive::schedule::Schedule;
use crate::archive::stream::Stream;
use crate::archive::{ArchiveError, file, health, inventory, push, settings, verify};
use crate::config::{ArchiveConfig, Peers};
use crate::sync::SyncError;
use crate::sync::rules::{ARCHIVE_CONF, NODE_CONF};

pub(super) use keep::{folder, serve};
pub use ship::send_to;

/// How often it is looked whether a base copy is due, milliseconds.
const LOOK_MS: u64 = 2_000;
/// A file that is being written this long is not being written any more, seconds.
const UNFINISHED_S: u64 = 86_400;

/// Who works on the archive, and how it is.
#[derive(Debug, Default)]
pub struct Work {
    /// Held by whoever takes a base copy or removes something: one at a time.
    copying: AsyncMutex<()>,
    /// The last copy by schedule failed.
    copy_failed: AtomicBool,
    /// What is wrong; empty if nothing is.
    problem: Mutex<String>,
}

impl Work {
    pub(super) fn problem(&self) -> String {
        self.problem.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn set_problem(&self, what: Option<String>) {
        *self.problem.lock().unwrap_or_else(PoisonError::into_inner) = what.unwrap_or_default();
    }
}

impl Node {
    /// The archive of this node itself.
    fn own_archive(&self) -> PathBuf {
        self.config.archive_dir().join(&self.config.name)
    }

    fn keep(&self) -> Keep {
        let settings = self.cluster.archive.clone().unwrap_or_default();
        let copies = usize::try_from(settings.keep).unwrap_or(usize::MAX);
        Keep { copies, age_s: settings.keep_days.saturating_mul(86_400) }
    }
}

pub(super) fn now_s() -> u64 {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, ArchiveError> + Send + 'static,
) -> Result<T, ArchiveError> {
    let done = tokio::task::spawn_blocking(work).await;
    done.map_err(|error| SyncError::Internal(format!("working on the archive: {error}")))?
}

/// Writes the settings of archiving into the data directory, if there is one. PostgreSQL takes `archive_mode` over when it starts, the rest at once.
pub(super) async fn configure(node: &Node) -> Result<(), ArchiveError> {
    let (pgdata, name) = (node.config.pgdata.clone(), node.config.name.clone());
    let (settings, config) = (node.cluster.archive.clone(), node.cluster.path.clone());
    let changed = blocking(move || write_settings(&pgdata, settings.as_ref(), &config, &name)).await?;
    if changed && matches!(node.postgres().state(), PostgresState::Running | PostgresState::Standby) {
        tracing::warn!(
            "settings of archiving have changed; archive_mode is taken over when PostgreSQL is started anew, with its agent"
        );
        node.postgres()
            .reload()
            .map_err(|source| SyncError::Server { action: "telling PostgreSQL of its settings", source })?;
    }
    Ok(())
}

/// Whether something changed.
fn write_settings(
    pgdata: &Path,
    settings: Option<&ArchiveConfig>,
    config: &Path,
    node: &str,
) -> Result<bool, ArchiveError> {
    let path = pgdata.join(ARCHIVE_CONF);
    let before = read(&path)?;
    if !pgdata.is_dir() || (settings.is_none() && before.is_none()) {
        return Ok(false);
    }
    if settings.is_some() && config.as_os_str().is_empty() {
        return Err(ArchiveError::refused(
            "PostgreSQL can not be told which configuration to archive with: it came from no file",
            "report this",
        ));
    }
    let program = std::env::current_exe().map_err(ArchiveError::file("finding", Path::new("/proc/self/exe")))?;
    let text = settings::archive_conf(settings, &program, config, node)?;
    let changed = before.as_deref() != Some(text.as_str());
    if changed {
        replace(&path, &text)?;
    }
    // Nodes that were filled include it from postgresql.conf already.
    let includes = |text: &Option<String>| text.as_ref().is_some_and(|text| text.contains(ARCHIVE_CONF));
    let node_conf = pgdata.join(NODE_CONF);
    let own = read(&node_conf)?;
    if let Some(own) = own.filter(|own| !includes(&Some(own.clone())))
        && !includes(&read(&pgdata.join("postgresql.conf"))?)
    {
        replace(&node_conf, &format!("{}\ninclude_if_exists = '{ARCHIVE_CONF}'\n", own.trim_end()))?;
        return Ok(true);
    }
    Ok(changed)
}

fn read(path: &Path) -> Result<Option<String>, ArchiveError> {
    match fs::read_to_string(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        text => text.map(Some).map_err(ArchiveError::file("reading", path)),
    }
}

fn replace(path: &Path, text: &str) -> Result<(), ArchiveError> {
    let mut new = path.as_os_str().to_owned();
    new.push(file::NEW_ENDING);
    let new = PathBuf::from(new);
    let write = || -> io::Result<()> {
        fs::write(&new, text)?;
        fs::File::open(&new)?.sync_all()?;
        fs::rename(&new, path)
    };
    write().map_err(ArchiveError::file("writing", path))?;
    path.parent().map_or(Ok(()), file::sync_folder)
}

/// Base copies by schedule, retention, and the peers, for as long as the agent runs.
pub(super) async fn run(node: &Arc<Node>) {
    let Some(settings) = node.cluster.archive.clone() else { return };
    let peers =
        node.cluster.nodes.iter().filter(|other| other.name != node.config.name && settings.peers != Peers::None);
    let sending: Vec<_> = peers.map(|peer| ship::run(node, peer)).collect();
    tokio::join!(
        copy_by_schedule(node, settings.every_s),
        watch(node, settings.every_s),
        futures_util::future::join_all(sending)
    );
}

async fn copy_by_schedule(node: &Arc<Node>, every_s: u64) {
    let mut schedule = Schedule::new(every_s);
    loop {
        sleep(Duration::from_millis(LOOK_MS)).await;
        if !may_copy(node) {
            continue;
        }
        let due = match look(node).await {
            Ok(seen) => schedule.is_due(now_s(), seen.copied_s),
            Err(error) => {
                tracing::error!(%error, "the archive can not be read");
                schedule.ended(now_s(), false);
                false
            }
        };
        if due {
            let taken = base_copy(node).await;
            node.archive_work.copy_failed.store(taken.is_err(), Ordering::Relaxed);
            schedule.ended(now_s(), taken.is_ok());
            if let Err(failure) = taken {
                tracing::error!(what = failure.what, hint = failure.hint, "no base copy was taken; it is tried again");
            }
        }
    }
}

/// Keeps what `pgtandem status` says of the archive, also while a copy is taken.
async fn watch(node: &Arc<Node>, every_s: u64) {
    loop {
        let problem = match (may_copy(node), look(node).await) {
            (false, _) => None,
            (true, Ok(seen)) => health::problem(seen, every_s, now_s()),
            (true, Err(error)) => Some(error.to_string()),
        };
        node.archive_work.set_problem(problem);
        sleep(Duration::from_millis(LOOK_MS)).await;
    }
}

async fn look(node: &Arc<Node>) -> Result<Seen, ArchiveError> {
    let (pgdata, folder) = (node.config.pgdata.clone(), node.own_archive());
    let copy_failed = node.archive_work.copy_failed.load(Ordering::Relaxed);
    blocking(move || {
        let current = Stream::of(&pgdata)?.name();
        let copied_s = inventory::newest_base(&folder, current)?.map(|base| base.ended_s);
        Ok(Seen { waiting: push::backlog(&pgdata.join("pg_wal")), copied_s, copy_failed })
    })
    .await
}

/// A copy of a node that is not known to be current would be taken for one that is.
fn may_copy(node: &Node) -> bool {
    node.record().state == NodeState::InSync && node.postgres().state() == PostgresState::Running
}

/// Takes a base copy, and removes what retention has no use for afterwards.
pub(super) async fn base_copy(node: &Node) -> Result<BaseCopy, Failure> {
    let refuse = |what: String, hint: &str| Failure { code: FailureCode::WrongState, what, hint: hint.to_owned() };
    if node.cluster.archive.is_none() {
        let hint = "add [archive] to the configuration on every host and restart the agents; docs/archive.md";
        return Err(refuse("the configuration has no [archive]".to_owned(), hint));
    }
    if !may_copy(node) {
        let what = format!(
            "{} is {:?} and its PostgreSQL {:?}",
            node.config.name,
            node.record().state,
            node.postgres().state()
        );
        return Err(refuse(what, "take a copy of a member; pgtandem status"));
    }
    let _work = node.archive_work.copying.lock().await;
    let record = node.record();
    let job = Job {
        postgres: node.postgres().clone(),
        folder: node.own_archive(),
        node: node.config.name.clone(),
        leads: record.members.as_ref().is_some_and(|set| set.leader == node.config.name),
        bytes_per_s_max: node.cluster.cluster.fill_bytes_per_s_max,
    };
    let copied = base::take(&job).await.map_err(|error| error.failure())?;
    tracing::info!(name = %copied.name, bytes = copied.bytes, new = copied.bytes_new, "a base copy was taken");
    if copied.damaged_count > 0 {
        tracing::error!(pages = copied.damaged_count, named = ?copied.damaged, "pages of this server have wrong checksums");
    }
    let (folder, keep, current) = (node.own_archive(), node.keep(), copied.stream);
    if let Err(error) = blocking(move || expire(&folder, Some(current), keep)).await {
        tracing::error!(%error, "what retention has no use for could not be removed");
    }
    Ok(BaseCopy {
        stream: copied.stream.to_string(),
        name: copied.name.to_string(),
        files: copied.files,
        bytes: copied.bytes,
        bytes_new: copied.bytes_new,
        damaged: copied.damaged,
        damaged_count: copied.damaged_count,
    })
}

/// What lies in an archive, as retention looks at it.
struct Contents {
    copies: Vec<Copy>,
    wal: Vec<(StreamName, Vec<crate::archive::names::WalName>)>,
}

fn contents(folder: &Path) -> Result<Contents, ArchiveError> {
    let streams = inventory::streams(folder)?;
    let copies = streams.iter().flat_map(|stream| {
        stream.bases.iter().map(|base| {
            let manifest = Manifest::load(&stream.base_path(*base));
            let good = manifest.is_ok_and(|manifest| verify::incomplete(stream, *base, &manifest).is_none());
            Copy { stream: stream.name, name: *base, good }
        })
    });
    Ok(Contents {
        copies: copies.collect(),
        wal: streams.iter().map(|stream| (stream.name, stream.wal.clone())).collect(),
    })
}

/// Removes what retention has no use for. Blocking.
fn expire(folder: &Path, current: Option<StreamName>, keep: Keep) -> Result<(), ArchiveError> {
    let Contents { copies, wal } = contents(folder)?;
    let plan = retention::plan(&copies, &wal, current, keep, now_s());
    let copies = plan.copies.into_iter().map(|(stream, base)| ArchivePath::Base(stream, base));
    let wal = plan.wal.into_iter().map(|(stream, name)| ArchivePath::Wal(stream, name));
    remove(folder, &copies.chain(wal).collect::<Vec<_>>())
}

/// Removes what a process that was killed has left half written.
fn remove_unfinished(folder: &Path) -> Result<(), ArchiveError> {
    for entry in walkdir::WalkDir::new(folder).min_depth(2).into_iter().flatten() {
        let unfinished =
            entry.file_name().to_str().is_some_and(|name| name.starts_with('.') && name.ends_with(file::NEW_ENDING));
        let age = entry.metadata().ok().and_then(|metadata| metadata.modified().ok()?.elapsed().ok());
        if unfinished && age.is_some_and(|age| age > Duration::from_secs(UNFINISHED_S)) {
            fs::remove_file(entry.path()).map_err(ArchiveError::file("removing", entry.path()))?;
        }
    }
    Ok(())
}

/// Removes files of an archive, base copies first, and then the extents that no copy names any more.
fn remove(folder: &Path, paths: &[ArchivePath]) -> Result<(), ArchiveError> {
    for path in paths {
        let path = path.below(folder);
        match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(ArchiveError::file("removing", &path)(error));
            }
            _ => tracing::info!(path = %path.display(), "removed from the archive"),
        }
    }
    if paths.iter().any(|path| matches!(path, ArchivePath::Base(..))) {
        sweep(folder)?;
    }
    remove_unfinished(folder)?;
    for stream in inventory::streams(folder)?.iter().filter(|stream| stream.wal.is_empty() && stream.bases.is_empty()) {
        for part in [stream.folder.join("wal"), stream.folder.join("base"), stream.folder.clone()] {
            // It may hold what somebody else has put there, or a segment that is being stored.
            let _ = fs::remove_dir(part);
        }
    }
    Ok(())
}

/// Removes extents that no base copy names; none, if a copy can not be read.
fn sweep(folder: &Path) -> Result<(), ArchiveError> {
    let mut named = std::collections::HashSet::new();
    for stream in inventory::streams(folder)? {
        for base in &stream.bases {
            named.extend(Manifest::load(&stream.base_path(*base))?.hashes());
        }
    }
    for hash in inventory::extents(folder)? {
        if !named.contains(&hash) {
            let path = ArchivePath::Extent(hash).below(folder);
            fs::remove_file(&path).map_err(ArchiveError::file("removing", &path))?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_settings_are_included_once_and_follow_the_configuration() {
        let folder = tempfile::tempdir().unwrap();
        let (pgdata, config) = (folder.path(), Path::new("/etc/pgtandem.toml"));
        assert!(!write_settings(pgdata, None, config, "a").unwrap() && !pgdata.join(ARCHIVE_CONF).exists());
        fs::write(pgdata.join(NODE_CONF), "port = 5433\n").unwrap();
        let settings = ArchiveConfig::default();
        assert!(write_settings(pgdata, Some(&settings), config, "a").unwrap());
        assert!(!write_settings(pgdata, Some(&settings), config, "a").unwrap());
        let node_conf = fs::read_to_string(pgdata.join(NODE_CONF)).unwrap();
        assert_eq!(node_conf, "port = 5433\ninclude_if_exists = 'pgtandem.archive.conf'\n");
        assert!(fs::read_to_string(pgdata.join(ARCHIVE_CONF)).unwrap().contains("archive_mode = on"));
        assert!(write_settings(pgdata, None, config, "a").unwrap());
        assert!(!fs::read_to_string(pgdata.join(ARCHIVE_CONF)).unwrap().contains("archive_mode"));
    }

    #[test]
    fn extents_go_with_the_last_copy_that_names_them() {
        use crate::archive::manifest::{CopiedExtent, CopiedFile};
        let folder = tempfile::tempdir().unwrap();
        let extent = |content: &[u8]| {
            let hash = *blake3::hash(content).as_bytes();
            file::store_bytes(&ArchivePath::Extent(hash).below(folder.path()), content, None).unwrap();
            hash
        };
        let (one, both, none) = (extent(b"one"), extent(b"both"), extent(b"none"));
        let copy = |ended_s: u64, hashes: &[[u8; 32]]| {
            let extents = hashes.iter().map(|hash| CopiedExtent { bytes: 4, hash: Some(*hash) }).collect();
            let copied =
                CopiedFile { path: "base/5/1".into(), directory: false, mode: 0o600, tablespace: None, extents };
            let about = crate::archive::manifest::About {
                node: "a".into(),
                stream: "x".into(),
                system_identifier: 1,
                timeline: 1,
                wal_segment_bytes: 16 << 20,
                version_num: 150_018,
                leads: true,
                settings: Vec::new(),
            };
            let stream = StreamName { timeline: 1, hash: [0; 8] };
            let start = pgtandem_proto::message::Lsn(0x200_0028);
            let base = crate::archive::names::BaseName {
                ended_s,
                start: crate::archive::names::Segment::of(1, start, 16 << 20),
            };
            let path = ArchivePath::Base(stream, base);
            let manifest = Manifest::new(about, start, vec![copied]).encode().unwrap();
            file::store_bytes(&path.below(folder.path()), &manifest, None).unwrap();
            path
        };
        let (older, newer) = (copy(100, &[one, both]), copy(200, &[both]));
        remove(folder.path(), &[older]).unwrap();
        assert_eq!(inventory::extents(folder.path()).unwrap(), [both]);
        let _ = (newer, none);
    }
}
