//! The pipeline of a fill: hash what B has, ask for it, write what comes. One task; disk work on blocking threads.
//!
//! ```text
//! plan -> hash jobs (ordered) -> request, if credits are left -> replies (in the order of requests) -> writer thread
//! ```
//! Memory is bounded by the credits, whatever the number and size of files.

use std::collections::{HashMap, VecDeque};
use std::path::Path;
use std::sync::Arc;

use pgtandem_proto::message::{
    EXTENT_BYTES, Extent, ExtentContent, FileEntry, FileRoot, FilesReply, FilesRequest, Held, Progress,
};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;

use super::super::error::SyncError;
use super::super::extent::{ExtentHash, delta_pages, extent_bytes, extent_count};
use super::super::link::Link;
use super::writer::{Place, Write, Writer, have};
use super::{SILENCE_SECONDS_MAX, progressing};

/// Bytes that are asked for and not yet handed to the writer.
const OUTSTANDING_BYTES_MAX: u64 = 64 << 20;
/// What a request costs at least: many small files must not become too many requests.
const REQUEST_COST_BYTES_MIN: u64 = 64 << 10;
/// Extents of one request.
const BATCH_EXTENTS_MAX: u64 = 8;
/// Batches that are being hashed.
const HASH_JOBS_MAX: usize = 4;
/// Extents that wait for the writer thread.
const WRITES_MAX: usize = 16;

/// A file to be pulled, and where it is written.
#[derive(Clone, Debug)]
pub(super) struct Wanted {
    pub entry: FileEntry,
    pub place: Place,
}

/// Consecutive extents of one file.
#[derive(Clone, Copy, Debug)]
struct Batch {
    /// Index into the list of wanted files.
    wanted: usize,
    first: u32,
    count: u32,
    /// The file has no further batch.
    last: bool,
}

/// A batch that was asked for, and how much of it came.
struct Outstanding {
    batch: Batch,
    /// Hash of each extent that was there.
    have: Vec<Option<ExtentHash>>,
    received: u32,
    cost: u64,
}

type HashJob = JoinHandle<Result<Vec<Option<Held>>, SyncError>>;
type Op = (Place, Write);

/// Pulls all of `wanted`, in order. -> the root of each file that did not vanish
pub(super) async fn pull(
    link: &mut Link<FilesRequest, FilesReply>,
    wanted: Vec<Wanted>,
    progress: &watch::Sender<Progress>,
) -> Result<HashMap<u32, FileRoot>, SyncError> {
    let wanted: Arc<[Wanted]> = wanted.into();
    let (writes, operations) = mpsc::channel(WRITES_MAX);
    let writer = tokio::task::spawn_blocking(move || write_all(operations));
    let pulled = Puller { wanted, writes, progress }.run(link).await;
    // The writer's own error is the cause if it ended first; dropping the queue above ends it.
    let roots = writer.await.map_err(|error| SyncError::Internal(format!("writing files: {error}")))?;
    roots.and_then(|roots| pulled.map(|()| roots))
}

fn write_all(mut operations: mpsc::Receiver<Op>) -> Result<HashMap<u32, FileRoot>, SyncError> {
    let mut writer = Writer::default();
    while let Some((place, write)) = operations.blocking_recv() {
        writer.handle(&place, write)?;
    }
    Ok(writer.into_roots())
}

/// All batches of all files, in order; a file without extents has one batch of none.
fn plan(wanted: &[Wanted]) -> impl Iterator<Item = Batch> + '_ {
    wanted.iter().enumerate().flat_map(|(index, wanted)| {
        let extents = extent_count(wanted.entry.bytes);
        let batches = extents.div_ceil(BATCH_EXTENTS_MAX).max(1);
        (0..batches).map(move |batch| {
            let first = batch * BATCH_EXTENTS_MAX;
            Batch {
                wanted: index,
                first: u32::try_from(first).unwrap_or(u32::MAX),
                count: u32::try_from(extents.saturating_sub(first).min(BATCH_EXTENTS_MAX)).unwrap_or(0),
                last: batch + 1 == batches,
            }
        })
    })
}

struct Puller<'a> {
    wanted: Arc<[Wanted]>,
    writes: mpsc::Sender<Op>,
    progress: &'a watch::Sender<Progress>,
}

impl Puller<'_> {
    async fn run(self, link: &mut Link<FilesRequest, FilesReply>) -> Result<(), SyncError> {
        let wanted = Arc::clone(&self.wanted);
        let mut plan = plan(&wanted);
        let mut hashing: VecDeque<(Batch, HashJob)> = VecDeque::new();
        let mut ready: Option<(Batch, Vec<Option<Held>>)> = None;
        let mut outstanding: VecDeque<Outstanding> = VecDeque::new();
        let mut outstanding_bytes = 0;
        loop {
            while hashing.len() < HASH_JOBS_MAX
                && let Some(batch) = plan.next()
            {
                hashing.push_back((batch, self.hash(batch)));
            }
            if hashing.is_empty() && ready.is_none() && outstanding.is_empty() {
                return Ok(());
            }
            tokio::select! {
                hashed = next(&mut hashing), if ready.is_none() && !hashing.is_empty() => {
                    if let Some((batch, _)) = hashing.pop_front() {
                        ready = Some((batch, hashed?));
                    }
                }
                room = link.outgoing.reserve(), if ready.is_some() && outstanding_bytes < OUTSTANDING_BYTES_MAX => {
                    let room = room?;
                    if let Some((batch, have)) = ready.take() {
                        let cost = self.cost(batch);
                        outstanding_bytes += cost;
                        let hashes = have.iter().map(|held| held.as_ref().map(|held| held.hash)).collect();
                        outstanding.push_back(Outstanding { batch, have: hashes, received: 0, cost });
                        // An empty file has nothing to ask for, only its turn among the writes.
                        if batch.count > 0 {
                            room.send(FilesRequest::Extents { file: self.file(batch), first: batch.first, have });
                        }
                    }
                }
                reply = progressing(SILENCE_SECONDS_MAX, "the copy of the files", link.incoming.expect()),
                    if outstanding.front().is_some_and(|front| front.batch.count > 0) => match reply? {
                    FilesReply::Extent(extent) => {
                        if let Some(front) = outstanding.front_mut() {
                            self.handle(front, extent).await?;
                        }
                    }
                    FilesReply::Failed(failure) => return Err(SyncError::Peer(failure)),
                    _ => return Err(SyncError::Protocol("a files reply came out of order".into())),
                },
                else => return Err(SyncError::Internal("the copy of the files has nothing to wait for".into())),
            }
            while outstanding.front().is_some_and(|front| front.received == front.batch.count) {
                let Some(done) = outstanding.pop_front() else { break };
                outstanding_bytes -= done.cost;
                if done.batch.last {
                    self.write(done.batch, Write::Finish).await?;
                    self.progress.send_modify(|progress| progress.files += 1);
                }
            }
        }
    }

    fn hash(&self, batch: Batch) -> HashJob {
        let wanted = Arc::clone(&self.wanted);
        tokio::task::spawn_blocking(move || match wanted.get(batch.wanted) {
            Some(wanted) if batch.count > 0 => have(&wanted.place.path, batch.first, batch.count),
            _ => Ok(Vec::new()),
        })
    }

    fn file(&self, batch: Batch) -> u32 {
        self.wanted.get(batch.wanted).map_or(u32::MAX, |wanted| wanted.entry.id)
    }

    fn cost(&self, batch: Batch) -> u64 {
        let bytes = self.wanted.get(batch.wanted).map_or(0, |wanted| wanted.entry.bytes);
        bytes.min(u64::from(batch.count) * EXTENT_BYTES as u64).max(REQUEST_COST_BYTES_MIN)
    }

    async fn write(&self, batch: Batch, write: Write) -> Result<(), SyncError> {
        let Some(wanted) = self.wanted.get(batch.wanted) else { return Ok(()) };
        let sent = self.writes.send((wanted.place.clone(), write)).await;
        // The thread that writes ended with an error of its own, which the caller finds.
        sent.map_err(|_| SyncError::Internal("writing files ended early".into()))
    }

    /// Checks one extent against what was asked and passes it to the writer.
    async fn handle(&self, front: &mut Outstanding, extent: Extent) -> Result<(), SyncError> {
        let batch = front.batch;
        if extent.file != self.file(batch) || extent.index != batch.first.saturating_add(front.received) {
            return Err(SyncError::Protocol("an extent came that was not due".into()));
        }
        let announced =
            self.wanted.get(batch.wanted).map_or(0, |wanted| extent_bytes(wanted.entry.bytes, extent.index));
        let have = front.have.get(front.received as usize).copied().flatten();
        let index = extent.index;
        let (write, same, sent) = match extent.content {
            ExtentContent::Same { bytes } => match have {
                Some(hash) => (Write::Same { index, hash, bytes: bytes as usize }, bytes as usize, 0),
                None => return Err(SyncError::Protocol("an extent is said to be the same that is not here".into())),
            },
            ExtentContent::Zeros { bytes } => (Write::Zeros { index, bytes: bytes as usize }, 0, 0),
            ExtentContent::Data(bytes) => {
                let count = bytes.len();
                (Write::Data { index, bytes }, 0, count)
            }
            ExtentContent::Pages { bytes, changed, data } => {
                let (bytes, sent) = (bytes as usize, data.len());
                let pages = delta_pages(bytes, &changed, &data).filter(|_| have.is_some() && bytes <= announced);
                let pages = pages.ok_or_else(|| SyncError::Protocol("the pages of an extent do not add up".into()))?;
                (Write::Pages { index, bytes, pages }, bytes - sent, sent)
            }
            ExtentContent::Vanished => (Write::Vanish, 0, 0),
        };
        let bytes = match &write {
            Write::Same { bytes, .. } | Write::Zeros { bytes, .. } | Write::Pages { bytes, .. } => *bytes,
            Write::Data { bytes, .. } => bytes.len(),
            Write::Vanish | Write::Finish => 0,
        };
        if bytes > announced {
            return Err(SyncError::Protocol("an extent is longer than its file".into()));
        }
        front.received += 1;
        self.write(batch, write).await?;
        self.progress.send_modify(|progress| {
            progress.bytes_compared += announced as u64;
            progress.bytes_same += same as u64;
            progress.bytes_sent += sent as u64;
        });
        Ok(())
    }
}

async fn next(hashing: &mut VecDeque<(Batch, HashJob)>) -> Result<Vec<Option<Held>>, SyncError> {
    match hashing.front_mut() {
        Some((_, job)) => job.await.map_err(|error| SyncError::Internal(format!("hashing files: {error}")))?,
        None => std::future::pending().await,
    }
}

/// What a file of the table becomes on B.
pub(super) fn place(pgdata: &Path, entry: &FileEntry, staged: bool) -> Place {
    let mut path = pgdata.join(&entry.path).into_os_string();
    if staged {
        path.push(super::super::rules::STAGED_ENDING);
    }
    Place { file: entry.id, path: path.into(), mode: entry.mode }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_plan_names_every_extent_once() {
        let wanted = |id: u32, bytes: u64| Wanted {
            entry: FileEntry { id, path: format!("f{id}"), directory: false, bytes, mode: 0o600 },
            place: Place { file: id, path: format!("f{id}").into(), mode: 0o600 },
        };
        let files = [wanted(0, 0), wanted(1, 5), wanted(2, 20 << 20)];
        let batches: Vec<_> = plan(&files).map(|batch| (batch.wanted, batch.first, batch.count, batch.last)).collect();
        assert_eq!(batches, [(0, 0, 0, true), (1, 0, 1, true), (2, 0, 8, false), (2, 8, 8, false), (2, 16, 4, true)]);
    }
}
