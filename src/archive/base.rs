//! Takes a base copy of this node's PostgreSQL into its archive.
//!
//! It is a fill whose target is the archive: the same source reads the same files under the same rules (`sync::source`: what is left out,
//! torn pages read again, checksums verified, `pg_control` read until it is whole), in this process, and what it gives is stored as
//! extents by their hash. What an earlier copy has stored already is only named again. The manifest comes last, when the WAL up to the
//! copy's end is in the archive: until then there is no copy.

use std::collections::VecDeque;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime};

use pgtandem_proto::message::{EXTENT_BYTES, Extent, ExtentContent, FileEntry, FilesReply, FilesRequest, Lsn};
use tokio::task::JoinHandle;
use tokio_postgres::Client;

use super::error::ArchiveError;
use super::file::{self, Stored};
use super::manifest::{About, CopiedExtent, CopiedFile, Manifest};
use super::names::{ArchivePath, BaseName, Hash, Segment, WalName};
use super::stream::Stream;
use crate::agent::postgres::Postgres;
use crate::sync::SyncError;
use crate::sync::extent::extent_count;
use crate::sync::link::Link;
use crate::sync::source::{self, Backups, SourceContext};

/// Extents of one request.
const REQUEST_EXTENTS_MAX: u32 = 16;
/// Extents that are being stored at the same time; with the link's queue they bound the memory of a copy.
const STORING_MAX: usize = 6;
/// How long no WAL may arrive in the archive before a copy is given up, seconds.
pub const WAL_SECONDS_MAX: u64 = 120;
const WAL_POLL_MS: u64 = 50;
/// Settings that a server needs at least as large as the one whose WAL it replays, and what it needs to start at all.
const SETTINGS: [&str; 6] = [
    "max_connections",
    "max_worker_processes",
    "max_wal_senders",
    "max_prepared_transactions",
    "max_locks_per_transaction",
    "shared_preload_libraries",
];

/// What to copy, and where to.
#[derive(Clone)]
pub struct Job {
    pub postgres: Postgres,
    /// Folder of the node's archive.
    pub folder: PathBuf,
    pub node: String,
    pub leads: bool,
    /// What may be read in a second; 0: no limit.
    pub bytes_per_s_max: u64,
}

/// A copy that is there.
#[derive(Clone, Debug)]
pub struct Copied {
    pub stream: super::names::StreamName,
    pub name: BaseName,
    pub files: u64,
    pub bytes: u64,
    /// Of these the ones that no earlier copy had.
    pub bytes_new: u64,
    pub damaged: Vec<String>,
    pub damaged_count: u64,
}

/// Takes a copy. Dropping the future ends the backup; what was stored stays for the next one.
pub async fn take(job: &Job) -> Result<Copied, ArchiveError> {
    let connecting = |source| SyncError::Server { action: "connecting to the PostgreSQL that is copied", source };
    let client = job.postgres.connect("postgres").await.map_err(connecting)?;
    let settings = settings(&client).await?;
    let pgdata = job.postgres.node().pgdata.clone();
    let stream = blocking(move || Stream::of(&pgdata)).await?;
    let (mut link, far) = Link::<FilesRequest, FilesReply>::pair("files");
    let context = SourceContext {
        postgres: job.postgres.clone(),
        peer: "the archive".to_owned(),
        backups: Backups::default(),
        bytes_per_s_max: job.bytes_per_s_max,
        keeps_wal: false,
    };
    let serving = tokio::spawn(async move { source::serve_files_link(far, &context).await });
    let copied = copy(job, &stream, settings, &mut link).await;
    drop(link);
    // Its own error came over the link; the backup session is gone when it has ended.
    let _ = serving.await;
    copied
}

async fn copy(
    job: &Job,
    stream: &Stream,
    settings: Vec<(String, String)>,
    link: &mut Link<FilesRequest, FilesReply>,
) -> Result<Copied, ArchiveError> {
    link.outgoing.send(FilesRequest::Begin).await?;
    let FilesReply::Begun { start, timeline, system_identifier, wal_segment_bytes, version_num } = next(link).await?
    else {
        return Err(unexpected());
    };
    if timeline != stream.timeline || system_identifier != stream.system_identifier {
        return Err(ArchiveError::refused("PostgreSQL was replaced while the copy began", "try again"));
    }
    let table = table(link).await?;
    let about = About {
        node: job.node.clone(),
        stream: stream.name().to_string(),
        system_identifier,
        timeline,
        wal_segment_bytes,
        version_num,
        leads: job.leads,
        settings,
    };
    let mut bytes_new = 0;
    let files = contents(job, link, table, &mut bytes_new).await?;
    link.outgoing.send(FilesRequest::End).await?;
    let FilesReply::Ended { stop, backup_label, tablespace_map, damaged, damaged_count } = next(link).await? else {
        return Err(unexpected());
    };
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    let mut manifest = Manifest::new(about, start, files);
    manifest.stop = stop.0;
    manifest.ended_us = u64::try_from(now.as_micros()).unwrap_or(u64::MAX);
    manifest.backup_label = text(backup_label)?;
    manifest.tablespace_map = text(tablespace_map)?;
    manifest.damaged = damaged;
    manifest.damaged_count = damaged_count;
    let first = Segment::of(timeline, start, wal_segment_bytes);
    let last = Segment::of(timeline, Lsn(stop.0.saturating_sub(1)), wal_segment_bytes);
    wait_for_wal(&job.folder, stream, first, last, wal_segment_bytes).await?;
    // A moment later, never earlier: the name must not say that more is in it than is.
    let name = BaseName { ended_s: now.as_secs() + 1, start: first };
    let path = ArchivePath::Base(stream.name(), name).below(&job.folder);
    let content = manifest.encode()?;
    blocking(move || file::store_bytes(&path, &content, None)).await?;
    Ok(Copied {
        stream: stream.name(),
        name,
        files: manifest.files.iter().filter(|file| !file.directory).count() as u64,
        bytes: manifest.bytes(),
        bytes_new,
        damaged: manifest.damaged,
        damaged_count,
    })
}

fn text(bytes: Vec<u8>) -> Result<String, ArchiveError> {
    String::from_utf8(bytes)
        .map_err(|_| ArchiveError::refused("the backup label is not UTF-8", "name tablespaces in UTF-8"))
}

fn unexpected() -> ArchiveError {
    SyncError::Protocol("the source of the copy answered out of order".into()).into()
}

async fn next(link: &mut Link<FilesRequest, FilesReply>) -> Result<FilesReply, ArchiveError> {
    match link.incoming.expect().await? {
        FilesReply::Failed(failure) => Err(SyncError::Peer(failure).into()),
        reply => Ok(reply),
    }
}

async fn table(link: &mut Link<FilesRequest, FilesReply>) -> Result<Vec<FileEntry>, ArchiveError> {
    let mut table = Vec::new();
    loop {
        let FilesReply::Table { entries, last } = next(link).await? else { return Err(unexpected()) };
        table.extend(entries);
        if last {
            return Ok(table);
        }
    }
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, ArchiveError> + Send + 'static,
) -> Result<T, ArchiveError> {
    let done = tokio::task::spawn_blocking(work).await;
    done.map_err(|error| SyncError::Internal(format!("working on the archive: {error}")))?
}

/// Asks for every extent of every file, stores what comes, and notes what it was.
async fn contents(
    job: &Job,
    link: &mut Link<FilesRequest, FilesReply>,
    table: Vec<FileEntry>,
    bytes_new: &mut u64,
) -> Result<Vec<CopiedFile>, ArchiveError> {
    let requests = table.iter().filter(|entry| !entry.directory).flat_map(|entry| {
        let count = u32::try_from(extent_count(entry.bytes)).unwrap_or(u32::MAX);
        (0..count).step_by(REQUEST_EXTENTS_MAX as usize).map(move |first| {
            let have = vec![None; REQUEST_EXTENTS_MAX.min(count - first) as usize];
            FilesRequest::Extents { file: entry.id, first, have }
        })
    });
    let expected: u64 = table.iter().filter(|entry| !entry.directory).map(|entry| extent_count(entry.bytes)).sum();
    let mut found: Vec<Option<Vec<CopiedExtent>>> = table.iter().map(|_| Some(Vec::new())).collect();
    let (outgoing, incoming) = (&link.outgoing, &mut link.incoming);
    let asking = async {
        for request in requests {
            outgoing.send(request).await?;
        }
        Ok::<(), ArchiveError>(())
    };
    let taking = async {
        let mut storing: VecDeque<Storing> = VecDeque::new();
        for _ in 0..expected {
            let extent = match incoming.expect().await? {
                FilesReply::Extent(extent) => extent,
                FilesReply::Failed(failure) => return Err(SyncError::Peer(failure).into()),
                _ => return Err(unexpected()),
            };
            if storing.len() >= STORING_MAX
                && let Some(oldest) = storing.pop_front()
            {
                oldest.note(&mut found, bytes_new).await?;
            }
            storing.push_back(Storing::begin(job.folder.clone(), extent));
        }
        for storing in storing {
            storing.note(&mut found, bytes_new).await?;
        }
        Ok(())
    };
    tokio::try_join!(asking, taking)?;
    let files = table.into_iter().zip(found).filter_map(|(entry, extents)| {
        Some(CopiedFile {
            path: entry.path,
            directory: entry.directory,
            mode: entry.mode,
            tablespace: entry.tablespace.map(|tablespace| tablespace.path),
            // A file that vanished while it was copied: WAL knows what became of it.
            extents: extents?,
        })
    });
    Ok(files.collect())
}

/// An extent on its way to the disk.
struct Storing {
    file: u32,
    index: u32,
    /// What it is, and whether it was new; None: its file is gone.
    task: JoinHandle<Result<Option<(CopiedExtent, Stored)>, ArchiveError>>,
}

impl Storing {
    fn begin(folder: PathBuf, extent: Extent) -> Storing {
        let (file, index) = (extent.file, extent.index);
        Storing { file, index, task: tokio::task::spawn_blocking(move || store(&folder, extent)) }
    }

    async fn note(self, found: &mut [Option<Vec<CopiedExtent>>], bytes_new: &mut u64) -> Result<(), ArchiveError> {
        let stored = self.task.await.map_err(|error| SyncError::Internal(format!("storing an extent: {error}")))??;
        let Some(place) = found.get_mut(self.file as usize) else { return Err(unexpected()) };
        let Some((extent, stored)) = stored else {
            *place = None;
            return Ok(());
        };
        if stored == Stored::New {
            *bytes_new += u64::from(extent.bytes);
        }
        if let Some(extents) = place {
            if extents.len() != self.index as usize {
                return Err(unexpected());
            }
            extents.push(extent);
        }
        Ok(())
    }
}

fn store(folder: &Path, extent: Extent) -> Result<Option<(CopiedExtent, Stored)>, ArchiveError> {
    let length = |bytes: usize| u32::try_from(bytes).unwrap_or(u32::MAX);
    let packed = match extent.content {
        ExtentContent::Vanished => return Ok(None),
        ExtentContent::Zeros { bytes } => return Ok(Some((CopiedExtent { bytes, hash: None }, Stored::Same))),
        ExtentContent::Data(packed) => packed,
        ExtentContent::Same { .. } | ExtentContent::Pages { .. } => return Err(unexpected()),
    };
    if packed.data.is_empty() {
        return Ok(Some((CopiedExtent { bytes: 0, hash: None }, Stored::Same)));
    }
    let unpacked = match packed.unpacked {
        Some(bytes) if bytes as usize <= EXTENT_BYTES => {
            let unpack = zstd::bulk::decompress(&packed.data, bytes as usize);
            Some(unpack.map_err(|error| SyncError::Protocol(format!("an extent can not be decompressed: {error}")))?)
        }
        Some(_) => return Err(unexpected()),
        None => None,
    };
    let content: &[u8] = unpacked.as_deref().unwrap_or(&packed.data);
    let path = ArchivePath::Extent(extent.hash).below(folder);
    // Its name is its content, and a name is given to what is whole only.
    let stored = if path.exists() {
        Stored::Same
    } else {
        if *blake3::hash(content).as_bytes() != extent.hash {
            return Err(SyncError::Protocol("an extent came with another content than its hash says".into()).into());
        }
        file::store_bytes(&path, content, unpacked.as_ref().map(|_| &packed.data[..]))?
    };
    Ok(Some((CopiedExtent { bytes: length(content.len()), hash: Some(extent.hash) }, stored)))
}

/// Settings of the server. Refuses one that does not archive: a copy without WAL is none.
async fn settings(client: &Client) -> Result<Vec<(String, String)>, ArchiveError> {
    let sql = |action| move |source| SyncError::Sql { action, source };
    let names: Vec<&str> = SETTINGS.iter().copied().chain(["archive_mode"]).collect();
    let rows = client
        .query("SELECT name, setting FROM pg_settings WHERE name = ANY ($1) ORDER BY name", &[&names])
        .await
        .map_err(sql("asking PostgreSQL for its settings"))?;
    let mut found = Vec::new();
    for row in rows {
        let name: String = row.try_get(0).map_err(sql("reading PostgreSQL's settings"))?;
        let value: String = row.try_get(1).map_err(sql("reading PostgreSQL's settings"))?;
        if name != "archive_mode" {
            found.push((name, value));
        } else if value == "off" {
            return Err(ArchiveError::refused(
                "PostgreSQL runs with archive_mode = off, so nothing can be restored from a copy",
                "restart the agent of this node, and with it PostgreSQL: archive_mode is taken over at a start only; postgresql.conf has \
                 to end with: include_if_exists = 'pgtandem.node.conf'",
            ));
        }
    }
    Ok(found)
}

/// Returns when all segments from `first` to `last` are in the archive.
async fn wait_for_wal(
    folder: &Path,
    stream: &Stream,
    first: Segment,
    last: Segment,
    segment_bytes: u32,
) -> Result<(), ArchiveError> {
    let (mut segment, mut moved) = (first, Instant::now());
    while segment <= last {
        let path = ArchivePath::Wal(stream.name(), WalName::Segment(segment)).below(folder);
        if path.exists() {
            (segment, moved) = (segment.next(segment_bytes), Instant::now());
            continue;
        }
        if moved.elapsed() > Duration::from_secs(WAL_SECONDS_MAX) {
            let what = format!(
                "WAL segment {segment}, which the copy needs, did not come into the archive for {WAL_SECONDS_MAX} s"
            );
            return Err(ArchiveError::refused(
                what,
                "PostgreSQL's log says why archive_command fails; pg_stat_archiver, too",
            ));
        }
        tokio::time::sleep(Duration::from_millis(WAL_POLL_MS)).await;
    }
    Ok(())
}

/// The extents that are missing of `wanted`. Blocking.
#[must_use]
pub fn missing(folder: &Path, wanted: &[Hash]) -> Vec<Hash> {
    wanted.iter().copied().filter(|hash| !ArchivePath::Extent(*hash).below(folder).exists()).collect()
}
