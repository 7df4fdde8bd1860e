//! The pipelines of a fill, one for each channel: hash what B has, ask for it, write what comes.
//!
//! ```text
//! plan -> hash jobs (ordered) -> request, if credits are left -> replies (in the order of requests) -> writer thread
//! ```
//! Channels share the plan, so each does as much as it can. Memory is bounded by the credits, whatever the number and
//! size of files.

use std::collections::VecDeque;
use std::path::Path;
use std::sync::Arc;

use futures_util::future::try_join_all;
use pgtandem_proto::message::{
    EXTENT_BYTES, Extent, ExtentContent, FileEntry, FilesReply, FilesRequest, Progress, SmallContent, SmallFiles,
};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use tokio_util::task::TaskTracker;

use super::super::error::SyncError;
use super::super::extent::{Digest, ExtentHash, Sum, extent_bytes};
use super::super::link::Link;
use super::manifest::Content;
use super::plan::{Piece, Plan, Wanted};
use super::writer::{Arrived, Place, Writer, have, have_small, remove_vanished, unpack, write_small};
use super::{SILENCE_SECONDS_MAX, progressing};
use crate::agent::buffers::Buffers;

/// Bytes that are asked for and not yet handed to a writer, over all channels.
const OUTSTANDING_BYTES_MAX: u64 = 48 << 20;
/// What a request costs at least: many small files must not become too many requests.
const REQUEST_COST_BYTES_MIN: u64 = 64 << 10;
/// Pieces of a channel that are being hashed.
const HASH_JOBS_MAX: usize = 2;
/// Replies of a channel that wait for its writer thread.
const WRITES_MAX: usize = 4;

/// What was there before a piece was asked for.
enum Before {
    Extents(Vec<Option<Digest>>),
    Small(Vec<Option<ExtentHash>>),
}

/// A piece that was asked for, and how much of it came.
struct Outstanding {
    piece: Piece,
    before: Before,
    received: u32,
    cost: u64,
}

/// One reply on its way to the disk.
enum Op {
    Extent { wanted: usize, arrived: Arrived },
    Small { wanted: Vec<usize>, before: Vec<Option<ExtentHash>>, files: SmallFiles },
}

/// What the source read of the files that are here now, by their number in the table.
pub(super) type Received = Vec<(u32, Content)>;

/// Pulls all of `wanted` over `links`. Returns when everything is written, and both ends agree about what was sent.
pub(super) async fn pull(
    links: &mut [Link<FilesRequest, FilesReply>],
    wanted: Vec<Wanted>,
    bundles: bool,
    progress: &watch::Sender<Progress>,
    writers: &TaskTracker,
) -> Result<Received, SyncError> {
    let plan = Arc::new(Plan::new(wanted, bundles));
    let writer = Arc::new(Writer::default());
    let buffers = Buffers::new(EXTENT_BYTES);
    let credits = OUTSTANDING_BYTES_MAX / links.len().max(1) as u64;
    let pulls = links.iter_mut().map(|link| {
        let (writes, operations) = mpsc::channel(WRITES_MAX);
        let (plan, writer) = (Arc::clone(&plan), Arc::clone(&writer));
        let puller = Puller {
            plan: Arc::clone(&plan),
            buffers: buffers.clone(),
            writes,
            progress,
            credits,
            sum: Sum::default(),
        };
        let written = writers.spawn_blocking(move || write_all(&plan, &writer, operations));
        async move {
            let pulled = puller.run(link).await;
            // The writer's own error is the cause if it ended first; dropping the queue above ends it.
            let written = written.await.map_err(|error| SyncError::Internal(format!("writing files: {error}")))?;
            written.and_then(|received| pulled.map(|()| received))
        }
    });
    try_join_all(pulls).await.map(|received| received.concat())
}

fn write_all(plan: &Plan, writer: &Writer, mut operations: mpsc::Receiver<Op>) -> Result<Received, SyncError> {
    let mut received = Received::new();
    while let Some(operation) = operations.blocking_recv() {
        match operation {
            Op::Extent { wanted: number, arrived } => {
                let Some(wanted) = plan.wanted.get(number) else { continue };
                let bytes = wanted.entry.bytes;
                let whole = writer.extent(number, &wanted.place, bytes, plan.extents_of(number), arrived)?;
                received.extend(whole.map(|whole| (wanted.entry.id, whole)));
            }
            Op::Small { wanted, before, files } => write_files(plan, &wanted, &before, files, &mut received)?,
        }
    }
    Ok(received)
}

fn write_files(
    plan: &Plan,
    wanted: &[usize],
    before: &[Option<ExtentHash>],
    files: SmallFiles,
    received: &mut Received,
) -> Result<(), SyncError> {
    let wanted: Vec<&Wanted> = wanted.iter().filter_map(|number| plan.wanted.get(*number)).collect();
    let bytes_max: u64 = wanted.iter().map(|wanted| wanted.entry.bytes).sum();
    let mut data = unpack(files.data, usize::try_from(bytes_max).unwrap_or(usize::MAX))?;
    for ((wanted, before), file) in wanted.into_iter().zip(before).zip(&files.files) {
        let bytes = match file.content {
            SmallContent::Same { bytes } if *before == Some(file.hash) => bytes,
            SmallContent::Same { .. } => {
                return Err(SyncError::Protocol("a file is said to be the same that is not here".into()));
            }
            SmallContent::Vanished => {
                remove_vanished(&wanted.place)?;
                continue;
            }
            SmallContent::Data { bytes } => {
                if bytes as usize > data.len() {
                    return Err(SyncError::Protocol("small files are shorter than announced".into()));
                }
                write_small(&wanted.place, &data.split_to(bytes as usize), &file.hash)?;
                bytes
            }
        };
        received.push((wanted.entry.id, Content { bytes: u64::from(bytes), crc: file.crc }));
    }
    if data.is_empty() { Ok(()) } else { Err(SyncError::Protocol("small files are longer than announced".into())) }
}

struct Puller<'a> {
    plan: Arc<Plan>,
    buffers: Buffers,
    writes: mpsc::Sender<Op>,
    progress: &'a watch::Sender<Progress>,
    credits: u64,
    sum: Sum,
}

impl Puller<'_> {
    async fn run(mut self, link: &mut Link<FilesRequest, FilesReply>) -> Result<(), SyncError> {
        let mut hashing: VecDeque<(Piece, JoinHandle<Result<Before, SyncError>>)> = VecDeque::new();
        let mut ready: Option<(Piece, Before)> = None;
        let mut outstanding: VecDeque<Outstanding> = VecDeque::new();
        let mut outstanding_bytes = 0;
        loop {
            while hashing.len() < HASH_JOBS_MAX
                && let Some(piece) = self.plan.take()
            {
                let job = self.hash(&piece);
                hashing.push_back((piece, job));
            }
            if hashing.is_empty() && ready.is_none() && outstanding.is_empty() {
                return self.check(link).await;
            }
            tokio::select! {
                hashed = next(&mut hashing), if ready.is_none() && !hashing.is_empty() => {
                    if let Some((piece, _)) = hashing.pop_front() {
                        ready = Some((piece, hashed?));
                    }
                }
                room = link.outgoing.reserve(), if ready.is_some() && outstanding_bytes < self.credits => {
                    let room = room?;
                    if let Some((piece, before)) = ready.take() {
                        let cost = self.plan.bytes(&piece).max(REQUEST_COST_BYTES_MIN);
                        outstanding_bytes += cost;
                        room.send(self.request(&piece, &before));
                        outstanding.push_back(Outstanding { piece, before, received: 0, cost });
                    }
                }
                reply = progressing(SILENCE_SECONDS_MAX, "the copy of the files", link.incoming.expect()),
                    if !outstanding.is_empty() => {
                    let reply = reply?;
                    if let Some(front) = outstanding.front_mut()
                        && self.handle(front, reply).await?
                    {
                        outstanding_bytes -= front.cost;
                        outstanding.pop_front();
                    }
                }
                else => return Err(SyncError::Internal("the copy of the files has nothing to wait for".into())),
            }
        }
    }

    fn hash(&self, piece: &Piece) -> JoinHandle<Result<Before, SyncError>> {
        let (plan, buffers, piece) = (Arc::clone(&self.plan), self.buffers.clone(), piece.clone());
        tokio::task::spawn_blocking(move || {
            let place = |wanted: usize| plan.wanted.get(wanted).map(|wanted| wanted.place.path.as_path());
            match piece {
                Piece::Extents { wanted, first, count } => {
                    let path = place(wanted).unwrap_or(Path::new(""));
                    Ok(Before::Extents(have(path, first, count, &buffers)?))
                }
                Piece::Small { wanted } => {
                    let hashes = wanted.iter().filter_map(|wanted| place(*wanted)).map(have_small);
                    Ok(Before::Small(hashes.collect::<Result<_, _>>()?))
                }
            }
        })
    }

    fn file(&self, wanted: usize) -> u32 {
        self.plan.wanted.get(wanted).map_or(u32::MAX, |wanted| wanted.entry.id)
    }

    fn request(&self, piece: &Piece, before: &Before) -> FilesRequest {
        match (piece, before) {
            (Piece::Small { wanted }, Before::Small(hashes)) => {
                let files = wanted.iter().zip(hashes).map(|(wanted, hash)| (self.file(*wanted), *hash)).collect();
                FilesRequest::Small { files }
            }
            (Piece::Extents { wanted, first, .. }, Before::Extents(digests)) => {
                let have = digests.iter().map(|digest| digest.as_ref().map(Digest::held)).collect();
                FilesRequest::Extents { file: self.file(*wanted), first: *first, have }
            }
            // A piece is hashed as what it is.
            (Piece::Small { .. }, Before::Extents(_)) | (Piece::Extents { .. }, Before::Small(_)) => {
                FilesRequest::Check
            }
        }
    }

    /// Both ends must have counted the same answers.
    async fn check(self, link: &mut Link<FilesRequest, FilesReply>) -> Result<(), SyncError> {
        link.outgoing.send(FilesRequest::Check).await?;
        match progressing(SILENCE_SECONDS_MAX, "the sum over the files", link.incoming.expect()).await? {
            FilesReply::Sum { answers, sum } if self.sum == (Sum { answers, sum }) => Ok(()),
            FilesReply::Sum { answers, .. } => Err(SyncError::Protocol(format!(
                "{answers} answers were sent, and what came are {} others",
                self.sum.answers
            ))),
            FilesReply::Failed(failure) => Err(SyncError::Peer(failure)),
            _ => Err(SyncError::Protocol("a files reply came out of order".into())),
        }
    }

    /// Checks a reply against what was asked and passes it to the writer. -> whether the piece is complete
    async fn handle(&mut self, front: &mut Outstanding, reply: FilesReply) -> Result<bool, SyncError> {
        match (reply, &mut front.before) {
            (FilesReply::Extent(extent), Before::Extents(before)) => {
                let Piece::Extents { wanted, first, count } = front.piece else { return Ok(true) };
                let due = first.saturating_add(front.received);
                if extent.file != self.file(wanted) || extent.index != due {
                    return Err(SyncError::Protocol("an extent came that was not due".into()));
                }
                let before = before.get_mut(front.received as usize).and_then(Option::take);
                front.received += 1;
                self.take(wanted, extent, before).await?;
                Ok(front.received == count)
            }
            (FilesReply::Small(files), Before::Small(before)) => {
                let Piece::Small { wanted } = &front.piece else { return Ok(true) };
                let asked = wanted.iter().map(|wanted| self.file(*wanted));
                if !asked.eq(files.files.iter().map(|file| file.file)) {
                    return Err(SyncError::Protocol("files came that were not due".into()));
                }
                let before = std::mem::take(before);
                self.take_small(wanted.clone(), before, files).await?;
                Ok(true)
            }
            (FilesReply::Failed(failure), _) => Err(SyncError::Peer(failure)),
            _ => Err(SyncError::Protocol("a files reply came out of order".into())),
        }
    }

    async fn take(&mut self, wanted: usize, extent: Extent, before: Option<Digest>) -> Result<(), SyncError> {
        let Extent { file, index, hash, crc, content } = extent;
        let (bytes, same, sent) = match &content {
            ExtentContent::Same { bytes } => (Some(*bytes as usize), *bytes as usize, 0),
            ExtentContent::Zeros { bytes } => (Some(*bytes as usize), 0, 0),
            ExtentContent::Data(packed) => {
                let bytes = packed.unpacked.map_or(packed.data.len(), |bytes| bytes as usize);
                (Some(bytes), 0, packed.data.len())
            }
            ExtentContent::Pages { bytes, data, .. } => {
                let (bytes, changed) = (*bytes as usize, data.unpacked.map_or(data.data.len(), |bytes| bytes as usize));
                (Some(bytes), bytes.saturating_sub(changed), data.data.len())
            }
            ExtentContent::Vanished => (None, 0, 0),
        };
        self.sum.add(file, index, bytes.map(|bytes| (bytes, &hash)));
        let bytes = self.plan.wanted.get(wanted).map_or(0, |wanted| wanted.entry.bytes);
        let announced = extent_bytes(bytes, index) as u64;
        let last = u64::from(index) + 1 >= u64::from(self.plan.extents_of(wanted));
        self.write(Op::Extent { wanted, arrived: Arrived { index, hash, crc, content, before } }).await?;
        self.advance(u64::from(last), announced, same as u64, sent as u64);
        Ok(())
    }

    async fn take_small(
        &mut self,
        wanted: Vec<usize>,
        before: Vec<Option<ExtentHash>>,
        files: SmallFiles,
    ) -> Result<(), SyncError> {
        let (mut compared, mut same) = (0, 0);
        for (number, file) in wanted.iter().zip(&files.files) {
            let announced = self.plan.wanted.get(*number).map_or(0, |wanted| wanted.entry.bytes);
            compared += announced;
            let bytes = match file.content {
                SmallContent::Same { bytes } => {
                    same += announced;
                    bytes as usize
                }
                SmallContent::Data { bytes } => bytes as usize,
                SmallContent::Vanished => {
                    self.sum.add(file.file, 0, None);
                    continue;
                }
            };
            self.sum.add(file.file, 0, Some((bytes, &file.hash)));
        }
        let (count, sent) = (wanted.len() as u64, files.data.data.len() as u64);
        self.write(Op::Small { wanted, before, files }).await?;
        self.advance(count, compared, same, sent);
        Ok(())
    }

    async fn write(&self, operation: Op) -> Result<(), SyncError> {
        // The thread that writes ended with an error of its own, which the caller finds.
        let sent = self.writes.send(operation).await;
        sent.map_err(|_| SyncError::Internal("writing files ended early".into()))
    }

    fn advance(&self, files: u64, compared: u64, same: u64, sent: u64) {
        self.progress.send_modify(|progress| {
            progress.files += files;
            progress.bytes_compared += compared;
            progress.bytes_same += same;
            progress.bytes_sent += sent;
        });
    }
}

async fn next(hashing: &mut VecDeque<(Piece, JoinHandle<Result<Before, SyncError>>)>) -> Result<Before, SyncError> {
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
    Place { path: path.into(), mode: entry.mode }
}
