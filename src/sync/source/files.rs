//! A files channel, source side: a backup session, its table of files, extents as they are asked for.
//!
//! B pulls; at most [`JOBS_MAX`] reads of [`JOB_EXTENTS_MAX`] extents are under way, and replies leave in the order
//! of the requests. Vanished, shortened and torn files are normal: WAL mends them on B.

use std::collections::{HashMap, VecDeque};
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use pgtandem_proto::message::{
    EXTENT_BYTES, EXTENTS_PER_REQUEST_MAX, Extent, ExtentContent, FileEntry, FileRoot, FilesReply, FilesRequest, Held,
    PAGE_BYTES,
};
use tokio::task::JoinHandle;
use tokio_postgres::Client;

use super::super::control_file::{self, CONTROL_FILE};
use super::super::error::SyncError;
use super::super::extent::{self, ExtentHash, RootHasher};
use super::super::link::Link;
use super::super::scan::scan;
use super::{SourceContext, session};

/// Reads under way for one channel.
const JOBS_MAX: usize = 4;
/// Extents of one read; with [`JOBS_MAX`] they bound the memory of a channel: 32 MiB, and 8 MiB in the link.
const JOB_EXTENTS_MAX: u32 = 8;
/// Bytes of names in one frame of the table.
const TABLE_FRAME_BYTES_MAX: usize = 256 << 10;
/// Roots in one frame of the end.
const ROOTS_PER_FRAME_MAX: usize = 8192;
/// Reads of `pg_control` until its CRC is right, and the pause between them, milliseconds.
const CONTROL_READS_MAX: u32 = 100;
const CONTROL_PAUSE_MS: u64 = 10;

/// A backup under way.
struct Backup {
    /// Ends the backup when it is dropped.
    client: Client,
    version_num: u32,
    pgdata: PathBuf,
    table: Arc<Vec<FileEntry>>,
    open_roots: HashMap<u32, RootHasher>,
    roots: Vec<FileRoot>,
}

type Job = JoinHandle<Result<Vec<(Extent, ExtentHash, usize)>, SyncError>>;

pub(super) async fn serve(link: &mut Link<FilesReply, FilesRequest>, context: &SourceContext) -> Result<(), SyncError> {
    let mut backup: Option<Backup> = None;
    let mut jobs: VecDeque<Job> = VecDeque::new();
    let mut waiting: VecDeque<FilesRequest> = VecDeque::new();
    loop {
        while jobs.len() < JOBS_MAX
            && let Some(request) = waiting.pop_front()
        {
            jobs.push_back(begin_read(backup.as_ref(), request)?);
        }
        let request = tokio::select! {
            read = next(&mut jobs), if !jobs.is_empty() => {
                jobs.pop_front();
                let Some(backup) = backup.as_mut() else { continue };
                for (extent, hash, bytes) in read? {
                    backup.note(&extent, &hash, bytes);
                    link.outgoing.send(FilesReply::Extent(extent)).await?;
                }
                continue;
            }
            request = link.incoming.receive(), if waiting.is_empty() => request?,
        };
        match request {
            None => return Ok(()),
            Some(FilesRequest::Begin) if backup.is_none() => backup = Some(begin(link, context).await?),
            Some(FilesRequest::Extents { file, first, have }) if backup.is_some() => {
                waiting.extend(split(file, first, &have)?);
            }
            Some(FilesRequest::End) if jobs.is_empty() => {
                let Some(backup) = backup.take() else { return Err(out_of_order()) };
                end(link, backup).await?;
            }
            Some(_) => return Err(out_of_order()),
        }
    }
}

fn out_of_order() -> SyncError {
    SyncError::Protocol("a files request came out of order".into())
}

async fn next(jobs: &mut VecDeque<Job>) -> Result<Vec<(Extent, ExtentHash, usize)>, SyncError> {
    match jobs.front_mut() {
        Some(job) => job.await.map_err(|error| SyncError::Internal(format!("reading files: {error}")))?,
        None => std::future::pending().await,
    }
}

/// Parts of a request that are small enough for one read each.
fn split(file: u32, first: u32, have: &[Option<Held>]) -> Result<Vec<FilesRequest>, SyncError> {
    if have.is_empty() || have.len() > EXTENTS_PER_REQUEST_MAX {
        return Err(SyncError::Protocol(format!("{} extents were asked for at once", have.len())));
    }
    if have.iter().flatten().any(|held| held.pages.len() > EXTENT_BYTES / PAGE_BYTES) {
        return Err(SyncError::Protocol("more pages were described than an extent has".into()));
    }
    let mut parts = Vec::new();
    let mut first = first;
    for part in have.chunks(JOB_EXTENTS_MAX as usize) {
        parts.push(FilesRequest::Extents { file, first, have: part.to_vec() });
        first = first.checked_add(JOB_EXTENTS_MAX).ok_or_else(out_of_order)?;
    }
    Ok(parts)
}

async fn begin(link: &mut Link<FilesReply, FilesRequest>, context: &SourceContext) -> Result<Backup, SyncError> {
    let client = session::connect(&context.postgres).await?;
    let identity = session::identify(&client).await?;
    session::reserve_slot(&client, &context.peer).await?;
    let start = session::start_backup(&client, &context.peer, identity.version_num).await?;
    link.outgoing
        .send(FilesReply::Begun {
            start,
            timeline: identity.timeline,
            system_identifier: identity.system_identifier,
            wal_segment_bytes: identity.wal_segment_bytes,
            version_num: identity.version_num,
        })
        .await?;
    let pgdata = context.postgres.node().pgdata.clone();
    let scanned = pgdata.clone();
    let table = tokio::task::spawn_blocking(move || scan(&scanned))
        .await
        .map_err(|error| SyncError::Internal(format!("listing files: {error}")))??;
    send_table(link, &table).await?;
    Ok(Backup {
        client,
        version_num: identity.version_num,
        pgdata,
        table: Arc::new(table),
        open_roots: HashMap::new(),
        roots: Vec::new(),
    })
}

async fn send_table(link: &mut Link<FilesReply, FilesRequest>, table: &[FileEntry]) -> Result<(), SyncError> {
    let mut rest = table;
    loop {
        let mut bytes = 0;
        let count = rest
            .iter()
            .take_while(|entry| {
                bytes += entry.path.len() + 32;
                bytes <= TABLE_FRAME_BYTES_MAX
            })
            .count();
        let (now, later) = rest.split_at(count);
        rest = later;
        let last = rest.is_empty();
        link.outgoing.send(FilesReply::Table { entries: now.to_vec(), last }).await?;
        if last {
            return Ok(());
        }
    }
}

/// Starts the read that answers one part of a request.
fn begin_read(backup: Option<&Backup>, request: FilesRequest) -> Result<Job, SyncError> {
    let (Some(backup), FilesRequest::Extents { file, first, have }) = (backup, request) else {
        return Err(out_of_order());
    };
    let entry = backup.table.get(file as usize).filter(|entry| !entry.directory);
    let Some(entry) = entry else {
        return Err(SyncError::Protocol(format!("file number {file} was asked for, which is not in the table")));
    };
    let path = backup.pgdata.join(&entry.path);
    let read = Read { file, first, path, bytes: entry.bytes };
    if entry.path == CONTROL_FILE {
        return Ok(tokio::spawn(read.run_until_whole(have)));
    }
    Ok(tokio::task::spawn_blocking(move || read.run(&have)))
}

/// One read of consecutive extents.
#[derive(Clone)]
struct Read {
    file: u32,
    first: u32,
    path: PathBuf,
    /// Size in the table; what a file has grown by is not read.
    bytes: u64,
}

impl Read {
    fn run(&self, have: &[Option<Held>]) -> Result<Vec<(Extent, ExtentHash, usize)>, SyncError> {
        let file = match open(&self.path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Ok((self.first..).zip(have).map(|(index, _)| self.vanished(index)).collect());
            }
            Err(error) => return Err(SyncError::file("opening", &self.path, error)),
        };
        (self.first..).zip(have).map(|(index, have)| self.extent(&file, index, have.as_ref())).collect()
    }

    /// `pg_control` is written in place while the server runs: it is read until it is whole. It is never compared.
    async fn run_until_whole(self, have: Vec<Option<Held>>) -> Result<Vec<(Extent, ExtentHash, usize)>, SyncError> {
        let nothing = vec![None; have.len()];
        for _ in 0..CONTROL_READS_MAX {
            let (read, nothing) = (self.clone(), nothing.clone());
            let extents = tokio::task::spawn_blocking(move || read.run(&nothing)).await;
            let extents = extents.map_err(|error| SyncError::Internal(format!("reading pg_control: {error}")))??;
            let whole = extents.iter().any(|(extent, ..)| {
                matches!(&extent.content, ExtentContent::Data(bytes) if control_file::parse(bytes).is_some())
            });
            if whole {
                return Ok(extents);
            }
            tokio::time::sleep(Duration::from_millis(CONTROL_PAUSE_MS)).await;
        }
        Err(SyncError::refused(
            format!("the CRC of {} was wrong in {CONTROL_READS_MAX} reads", self.path.display()),
            "Check the source with pg_controldata; its disk may be damaged.",
        ))
    }

    fn vanished(&self, index: u32) -> (Extent, ExtentHash, usize) {
        (Extent { file: self.file, index, content: ExtentContent::Vanished, end: true }, [0; 32], 0)
    }

    fn extent(&self, file: &File, index: u32, have: Option<&Held>) -> Result<(Extent, ExtentHash, usize), SyncError> {
        let wanted = extent::extent_bytes(self.bytes, index);
        let offset = u64::from(index) * EXTENT_BYTES as u64;
        let bytes =
            extent::read_at(file, offset, wanted).map_err(|error| SyncError::file("reading", &self.path, error))?;
        let end = bytes.len() < EXTENT_BYTES || offset + bytes.len() as u64 >= self.bytes;
        let hash = extent::hash(&bytes);
        let count = bytes.len();
        let length = u32::try_from(count).unwrap_or(u32::MAX);
        let content = if have.is_some_and(|held| held.hash == hash) {
            ExtentContent::Same { bytes: length }
        } else if extent::all_zeros(&bytes) {
            ExtentContent::Zeros { bytes: length }
        } else if let Some(delta) = have.and_then(|held| extent::delta(&bytes, held)) {
            ExtentContent::Pages { bytes: length, changed: delta.changed, data: delta.data }
        } else {
            ExtentContent::Data(bytes)
        };
        Ok((Extent { file: self.file, index, content, end }, hash, count))
    }
}

/// Opens a file that the scan found; a symbolic link that took its place since is not followed.
fn open(path: &Path) -> io::Result<File> {
    use rustix::fs::{Mode, OFlags};
    let file = rustix::fs::open(path, OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty())?;
    Ok(File::from(file))
}

impl Backup {
    /// Keeps the root of a file up to date with what leaves.
    fn note(&mut self, extent: &Extent, hash: &ExtentHash, bytes: usize) {
        if matches!(extent.content, ExtentContent::Vanished) {
            self.open_roots.remove(&extent.file);
            return;
        }
        let root = self.open_roots.entry(extent.file).or_default();
        root.add(hash, bytes);
        if extent.end
            && let Some(root) = self.open_roots.remove(&extent.file)
        {
            let (root, bytes) = root.finish();
            self.roots.push(FileRoot { file: extent.file, bytes, root });
        }
    }
}

async fn end(link: &mut Link<FilesReply, FilesRequest>, backup: Backup) -> Result<(), SyncError> {
    let ended = session::stop_backup(&backup.client, backup.version_num).await?;
    let mut rest = backup.roots.as_slice();
    loop {
        let (now, later) = rest.split_at(rest.len().min(ROOTS_PER_FRAME_MAX));
        rest = later;
        let last = rest.is_empty();
        link.outgoing
            .send(FilesReply::Ended {
                stop: ended.stop,
                backup_label: ended.backup_label.clone().into_bytes(),
                tablespace_map: ended.tablespace_map.clone().into_bytes(),
                roots: now.to_vec(),
                last,
            })
            .await?;
        if last {
            return Ok(());
        }
    }
}
