//! Brings files and WAL to this node. `pg_control` goes first and comes last: what is between can not be started.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use pgtandem_proto::message::{FileEntry, FilesReply, FilesRequest, Lsn, Progress};
use tokio::sync::watch;

use super::super::control_file::CONTROL_FILE;
use super::super::error::SyncError;
use super::super::facts;
use super::super::link::Link;
use super::super::rules::{self, NODE_CONF, RECOVERY_CONF};
use super::super::scan::FILES_MAX;
use super::super::wal::{segment_bytes_valid, segment_start};
use super::super::wal_stream::WalStream;
use super::follow::relay_folder;
use super::journal::{Journal, rename_durably, write_durably};
use super::manifest::{self, Content};
use super::plan::Wanted;
use super::pull::{Received, place, pull};
use super::tablespaces::Tablespace;
use super::{
    BEGIN_SECONDS_MAX, SILENCE_SECONDS_MAX, Source, Target, blocking, layout, progressing, room, settings, tablespaces,
    wal_files,
};
use crate::config::NodeConfig;

/// Most channels of a fill; each costs both nodes about 20 MiB.
const CHANNELS_MAX: usize = 6;
/// Connections in a row that end and have brought nothing.
const FRUITLESS_MAX: u64 = 3;
/// Pause before the connection is made again, milliseconds, for each that brought nothing.
const AGAIN_MS: u64 = 250;
/// Longest wait for what the other node said before its connection ended, on each channel, milliseconds.
const CAUSE_MS_MAX: u64 = 500;
/// Largest `backup_label`; real ones have about 300 bytes.
const LABEL_BYTES_MAX: usize = 64 << 10;

/// What the source said at the beginning.
#[derive(Clone, Copy, Debug)]
struct Begun {
    start: Lsn,
    timeline: u32,
    system_identifier: u64,
    wal_segment_bytes: u32,
    version_num: u32,
}

/// What it said at the end.
#[derive(Debug, Default)]
struct Ended {
    stop: u64,
    backup_label: Vec<u8>,
    tablespace_map: Vec<u8>,
    /// Pages of the source whose checksum is wrong, some of them named.
    damaged: Vec<String>,
    damaged_count: u64,
}

/// What lies here now.
struct Copied {
    /// Files that wait to be renamed.
    staged: Vec<String>,
    received: Received,
}

impl Target {
    /// Makes this node's data directory a copy of the source's, with the WAL that it needs to become consistent.
    /// PostgreSQL is stopped first. After an error the directory can not be started; the next fill sends only what
    /// differs.
    ///
    /// A connection that ends is made again as long as each one brings something that was not there before.
    pub async fn fill(&mut self, source: Arc<dyn Source>) -> Result<(), SyncError> {
        self.following = None;
        self.progress.send_replace(Progress::default());
        let mut fruitless = 0;
        loop {
            let (sent, wal) = self.counted();
            let error = match self.fill_once(source.clone()).await {
                Err(error) if error.is_lost_connection() => error,
                done => return done,
            };
            if self.counted().0 == sent {
                fruitless += 1;
            } else {
                fruitless = 1;
            }
            if fruitless > FRUITLESS_MAX {
                return Err(error);
            }
            tracing::warn!(%error, "a fill is taken up again: only what differs is sent");
            tokio::time::sleep(Duration::from_millis(AGAIN_MS * fruitless)).await;
            // What came stays counted; the comparison begins anew.
            let (bytes_sent, wal_bytes_received) = (self.counted().0, self.counted().1.max(wal));
            self.progress.send_replace(Progress { bytes_sent, wal_bytes_received, ..Progress::default() });
        }
    }

    /// Bytes of files and of WAL that came.
    fn counted(&self) -> (u64, u64) {
        let progress = self.progress.borrow();
        (progress.bytes_sent, progress.wal_bytes_received)
    }

    /// One backup, from its beginning to its end.
    async fn fill_once(&self, source: Arc<dyn Source>) -> Result<(), SyncError> {
        let node = self.postgres.node().clone();
        self.writers_ended().await;
        let stopped = self.postgres.stop(false).await;
        stopped.map_err(|source| SyncError::Server { action: "stopping PostgreSQL before it is filled", source })?;
        let mut link = source.open_files().await?;
        let begun = begin(&mut link).await?;
        check_identity(&node, begun).await?;
        let table = progressing(BEGIN_SECONDS_MAX, "the table of files", receive_table(&mut link)).await?;
        self.progress.send_modify(|progress| {
            progress.wal_start = begun.start.0;
            progress.wal_source = progress.wal_source.max(begun.start.0);
        });
        let entries = Arc::new(table);
        match self.fill_from(source, link, begun, &entries).await {
            Err(error) => blocking("looking for room", move || Err(room::of_fill(error, &node, &entries))).await,
            done => done,
        }
    }

    /// The rest of it, once the source has said what there is.
    async fn fill_from(
        &self,
        source: Arc<dyn Source>,
        link: Link<FilesRequest, FilesReply>,
        begun: Begun,
        entries: &Arc<Vec<FileEntry>>,
    ) -> Result<(), SyncError> {
        let node = self.postgres.node().clone();
        let pgdata = node.pgdata.clone();
        let state_dir = node.state_dir.clone();
        let arranged = Arc::clone(entries);
        let tablespaces = Arc::new(tablespaces::plan(&pgdata, &node.tablespaces, entries)?);
        let linked = Arc::clone(&tablespaces);
        blocking("arranging the data directory", move || {
            Journal::remove(&state_dir)?;
            layout::unmake(&pgdata)?;
            layout::arrange(&pgdata, &arranged, &linked)
        })
        .await?;
        let wal = WalStream::open(source.as_ref(), segment_start(begun.start, begun.wal_segment_bytes), begun.timeline)
            .await?;
        let journal = Journal {
            system_identifier: begun.system_identifier,
            timeline: begun.timeline,
            version_num: begun.version_num,
            wal_segment_bytes: begun.wal_segment_bytes,
            history: wal.history.clone(),
            start: begun.start.0,
            stop: 0,
            wal_end: 0,
        };
        let (stop, stopped) = watch::channel(None);
        let pg_wal = node.pgdata.join("pg_wal");
        let fetched =
            wal_files::fetch(wal, pg_wal, begun.start, begun.timeline, stopped, &self.progress, &self.writers);
        let mut links = vec![link];
        for _ in 1..channels() {
            links.push(attach(source.as_ref(), begun.start).await?);
        }
        let copied = async {
            let copied = self.copy(&mut links, &node.pgdata, entries).await?;
            stop.send_replace(Some(Lsn(copied.1.stop)));
            Ok(copied)
        };
        let ((copied, ended), wal_end) = tokio::try_join!(copied, fetched)?;
        let map = tablespaces::map(&tablespaces);
        if tablespaces::mapped(&map) != tablespaces::mapped(&String::from_utf8_lossy(&ended.tablespace_map)) {
            return Err(SyncError::refused(
                "a tablespace was made or dropped on the source while it was copied",
                "Start the recovery again: only what differs is sent.",
            ));
        }
        let journal = Journal { stop: ended.stop, wal_end: wal_end.0, ..journal };
        self.progress.send_modify(|progress| progress.damaged_pages = ended.damaged_count);
        if ended.damaged_count > 0 {
            tracing::error!(
                count = ended.damaged_count,
                pages = ended.damaged.join("; "),
                "pages of the source have wrong checksums; they are here as they are there"
            );
        }
        let entries = Arc::clone(entries);
        blocking("finishing the data directory", move || {
            finish(&node, &journal, &ended, &copied, &entries, &tablespaces)
        })
        .await
    }

    /// Files in their order, `pg_control` last, then the end of the backup.
    async fn copy(
        &self,
        links: &mut [Link<FilesRequest, FilesReply>],
        pgdata: &Path,
        entries: &[FileEntry],
    ) -> Result<(Copied, Ended), SyncError> {
        let (mut wanted, mut control, mut staged) = (Vec::new(), Vec::new(), Vec::new());
        for entry in entries.iter().filter(|entry| !entry.directory) {
            let node_file = rules::belongs_to_node(&entry.path);
            if node_file && layout::has_own(pgdata, &entry.path) {
                continue;
            }
            let stage = node_file || entry.path == CONTROL_FILE;
            if stage {
                staged.push(entry.path.clone());
            }
            let list = if entry.path == CONTROL_FILE { &mut control } else { &mut wanted };
            list.push(Wanted { entry: entry.clone(), place: place(pgdata, entry, stage) });
        }
        if control.is_empty() {
            return Err(SyncError::Protocol(format!("the table of files has no {CONTROL_FILE}")));
        }
        let total: u64 = wanted.iter().chain(&control).map(|wanted| wanted.entry.bytes).sum();
        self.progress.send_modify(|progress| {
            progress.bytes_total = total;
            progress.files_total = (wanted.len() + control.len()) as u64;
        });
        let copied = async {
            let mut received = pull(links, wanted, true, &self.progress, &self.writers).await?;
            let Some((first, _)) = links.split_first_mut() else {
                return Err(SyncError::Internal("no channel for files".into()));
            };
            received.extend(pull(std::slice::from_mut(first), control, false, &self.progress, &self.writers).await?);
            first.outgoing.send(FilesRequest::End).await?;
            receive_end(first).await.map(|ended| (received, ended))
        };
        match copied.await {
            Ok((received, ended)) => Ok((Copied { staged, received }, ended)),
            Err(error) => Err(cause(links, error).await),
        }
    }
}

/// Channels of a fill: as many as this machine has cores, within reason.
fn channels() -> usize {
    std::thread::available_parallelism().map_or(1, std::num::NonZero::get).clamp(1, CHANNELS_MAX)
}

/// Another channel for the backup that began at `start`.
async fn attach(source: &dyn Source, start: Lsn) -> Result<Link<FilesRequest, FilesReply>, SyncError> {
    let mut link = source.open_files().await?;
    link.outgoing.send(FilesRequest::Attach { start }).await?;
    match progressing(SILENCE_SECONDS_MAX, "another files channel", link.incoming.expect()).await? {
        FilesReply::Attached => Ok(link),
        FilesReply::Failed(failure) => Err(SyncError::Peer(failure)),
        _ => Err(SyncError::Protocol("a files channel was attached with something else".into())),
    }
}

/// A connection that ended may have said why before.
async fn cause(links: &mut [Link<FilesRequest, FilesReply>], error: SyncError) -> SyncError {
    if !matches!(error, SyncError::Closed { .. }) {
        return error;
    }
    for link in links {
        let said = async {
            loop {
                match link.incoming.receive().await {
                    Ok(Some(FilesReply::Failed(failure))) => break Some(failure),
                    Ok(Some(_)) => {}
                    Ok(None) | Err(_) => break None,
                }
            }
        };
        if let Ok(Some(failure)) = tokio::time::timeout(Duration::from_millis(CAUSE_MS_MAX), said).await {
            return SyncError::Peer(failure);
        }
    }
    error
}

async fn begin(link: &mut Link<FilesRequest, FilesReply>) -> Result<Begun, SyncError> {
    link.outgoing.send(FilesRequest::Begin).await?;
    match progressing(BEGIN_SECONDS_MAX, "the checkpoint on the source", link.incoming.expect()).await? {
        FilesReply::Begun { start, timeline, system_identifier, wal_segment_bytes, version_num }
            if segment_bytes_valid(wal_segment_bytes) && timeline > 0 =>
        {
            Ok(Begun { start, timeline, system_identifier, wal_segment_bytes, version_num })
        }
        FilesReply::Failed(failure) => Err(SyncError::Peer(failure)),
        _ => Err(SyncError::Protocol("a backup began with something else than its beginning".into())),
    }
}

/// Refuses what would destroy data of another cluster, or could never run here.
async fn check_identity(node: &NodeConfig, begun: Begun) -> Result<(), SyncError> {
    let binaries = facts::binaries_version_num(&node.bin_dir).await?;
    if binaries / 10_000 != begun.version_num / 10_000 {
        return Err(SyncError::refused(
            format!(
                "the source runs PostgreSQL {}, but {} holds PostgreSQL {}",
                begun.version_num / 10_000,
                node.bin_dir.display(),
                binaries / 10_000
            ),
            "Install the source's major version on this node and set bin_dir.",
        ));
    }
    let pgdata = node.pgdata.clone();
    let own = blocking("reading pg_control", move || Ok(layout::control_of(&pgdata))).await?;
    match own {
        Some(own) if own.system_identifier != begun.system_identifier => Err(SyncError::refused(
            format!(
                "{} holds the data of another cluster (system identifier {} instead of {})",
                node.pgdata.display(),
                own.system_identifier,
                begun.system_identifier
            ),
            "If nobody needs them, move that directory away; then start the recovery again.",
        )),
        _ => Ok(()),
    }
}

async fn receive_table(link: &mut Link<FilesRequest, FilesReply>) -> Result<Vec<FileEntry>, SyncError> {
    let mut table: Vec<FileEntry> = Vec::new();
    loop {
        let (entries, last) = match link.incoming.expect().await? {
            FilesReply::Table { entries, last } => (entries, last),
            FilesReply::Failed(failure) => return Err(SyncError::Peer(failure)),
            _ => return Err(SyncError::Protocol("something else came than the table of files".into())),
        };
        for entry in entries {
            if entry.id as usize != table.len() || table.len() >= FILES_MAX {
                return Err(SyncError::Protocol("the table of files is not numbered as it must be".into()));
            }
            if let Some(fault) = rules::path_fault(&entry.path) {
                return Err(SyncError::Protocol(format!("the path {:?} is refused: {fault}", entry.path)));
            }
            table.push(entry);
        }
        if last {
            break;
        }
    }
    let mut paths: Vec<&str> = table.iter().map(|entry| entry.path.as_str()).collect();
    paths.sort_unstable();
    if paths.windows(2).any(|pair| pair.first() == pair.last()) {
        return Err(SyncError::Protocol("the table of files names a path twice".into()));
    }
    Ok(table)
}

async fn receive_end(link: &mut Link<FilesRequest, FilesReply>) -> Result<Ended, SyncError> {
    let ended = match progressing(SILENCE_SECONDS_MAX, "the end of the backup", link.incoming.expect()).await? {
        FilesReply::Ended { stop, backup_label, tablespace_map, damaged, damaged_count } => {
            Ended { stop: stop.0, backup_label, tablespace_map, damaged, damaged_count }
        }
        FilesReply::Failed(failure) => return Err(SyncError::Peer(failure)),
        _ => return Err(SyncError::Protocol("something else came than the end of the backup".into())),
    };
    if ended.backup_label.is_empty() || ended.backup_label.len() > LABEL_BYTES_MAX {
        return Err(SyncError::Protocol("the backup came without a usable backup_label".into()));
    }
    Ok(ended)
}

/// Everything that makes the directory a standby's, synced; `pg_control` last.
fn finish(
    node: &NodeConfig,
    journal: &Journal,
    ended: &Ended,
    copied: &Copied,
    table: &[FileEntry],
    tablespaces: &[Tablespace],
) -> Result<(), SyncError> {
    let pgdata = &node.pgdata;
    let map = tablespaces::map(tablespaces);
    write_durably(&pgdata.join("backup_label"), &ended.backup_label)?;
    if !tablespaces.is_empty() {
        write_durably(&pgdata.join("tablespace_map"), map.as_bytes())?;
    }
    write_durably(&pgdata.join("standby.signal"), b"")?;
    for path in copied.staged.iter().filter(|path| *path != CONTROL_FILE) {
        let place = staged_path(pgdata, path);
        // It may have vanished on the source.
        if place.exists() {
            rename_durably(&place, &pgdata.join(path))?;
        }
    }
    configure(node, journal.version_num)?;
    let mut written = vec![("backup_label", Content::of(&ended.backup_label))];
    if !tablespaces.is_empty() {
        written.push(("tablespace_map", Content::of(map.as_bytes())));
    }
    let files = copied.received.iter().filter_map(|(id, content)| {
        let entry = table.get(*id as usize).filter(|entry| !rules::belongs_to_node(&entry.path))?;
        Some((entry.path.as_str(), *content))
    });
    manifest::write(pgdata, journal, files.chain(written))?;
    journal.store(&node.state_dir)?;
    layout::sync_file_system(pgdata)?;
    layout::sync_file_system(&pgdata.join("pg_wal"))?;
    for tablespace in tablespaces {
        layout::sync_file_system(&tablespace.path)?;
    }
    rename_durably(&staged_path(pgdata, CONTROL_FILE), &pgdata.join(CONTROL_FILE))
}

fn staged_path(pgdata: &Path, path: &str) -> PathBuf {
    pgdata.join(format!("{path}{}", rules::STAGED_ENDING))
}

/// B's own settings on top of whatever configuration lies here.
pub(super) fn configure(node: &NodeConfig, version_num: u32) -> Result<(), SyncError> {
    let pgdata = &node.pgdata;
    let node_conf = pgdata.join(NODE_CONF);
    if !node_conf.exists() {
        write_durably(&node_conf, settings::node_conf(node)?.as_bytes())?;
    }
    let recovery = settings::recovery_conf(node, &relay_folder(node), super::super::relay::RELAY_PORT, version_num)?;
    write_durably(&pgdata.join(RECOVERY_CONF), recovery.as_bytes())?;
    rewrite(&pgdata.join("postgresql.conf"), settings::with_includes)?;
    rewrite(&pgdata.join("postgresql.auto.conf"), settings::without_ours)
}

/// Changes a text file, if the change changes it.
fn rewrite(path: &Path, change: impl FnOnce(&str) -> String) -> Result<(), SyncError> {
    let text = match std::fs::read(path) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Vec::new(),
        Err(error) => return Err(SyncError::file("reading", path, error)),
    };
    let text = String::from_utf8(text).map_err(|_| {
        SyncError::refused(format!("{} is not UTF-8", path.display()), "Convert it on the source and on this node.")
    })?;
    let changed = change(&text);
    if changed == text { Ok(()) } else { write_durably(path, changed.as_bytes()) }
}
