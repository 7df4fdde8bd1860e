//! A files channel, source side: a backup session, its table of files, extents as they are asked for.
//!
//! B pulls; at most [`JOBS_MAX`] reads of [`JOB_EXTENTS_MAX`] extents are under way on a channel, and replies leave in the
//! order of the requests.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use pgtandem_proto::frame::Message;
use pgtandem_proto::message::{
    EXTENT_BYTES, EXTENTS_PER_REQUEST_MAX, FileEntry, FilesReply, FilesRequest, PAGE_BYTES, SMALL_FILES_PER_REQUEST_MAX,
};
use tokio::task::JoinHandle;
use tokio_postgres::Client;

use super::super::error::SyncError;
use super::super::extent::Sum;
use super::super::link::{Link, Outgoing};
use super::super::scan::scan;
use super::backup::{Backup, Owned};
use super::read::{Done, Job, Reader};
use super::{SourceContext, session};
use crate::agent::buffers::Buffers;

/// Reads under way for one channel.
const JOBS_MAX: usize = 3;
/// Extents of one read; with [`JOBS_MAX`] they bound the memory of a channel: 12 MiB, and 8 MiB in the link.
const JOB_EXTENTS_MAX: usize = 4;
/// Bytes of names in one frame of the table.
const TABLE_FRAME_BYTES_MAX: usize = 256 << 10;
/// A connection that carries more than this is not helped by compression, bytes per second over all channels.
const PACK_BYTES_PER_S_MAX: u64 = 150_000_000;
/// How long a channel is watched before it is decided anew whether to compress, milliseconds.
const PACK_WINDOW_MS: u64 = 250;

/// What this channel works for.
enum Role {
    /// It began the backup, and ends it.
    Owner(Box<Owner>),
    Helper(Arc<Backup>),
}

struct Owner {
    /// Ends the backup when it is dropped.
    client: Client,
    version_num: u32,
    owned: Owned,
}

impl Role {
    fn backup(&self) -> &Arc<Backup> {
        match self {
            Role::Owner(owner) => &owner.owned.backup,
            Role::Helper(backup) => backup,
        }
    }
}

pub(super) async fn serve(link: &mut Link<FilesReply, FilesRequest>, context: &SourceContext) -> Result<(), SyncError> {
    let role = match link.incoming.receive().await? {
        None => return Ok(()),
        Some(FilesRequest::Begin) => Role::Owner(Box::new(begin(link, context).await?)),
        Some(FilesRequest::Attach { start }) => {
            let backup = context.backups.find(&context.peer, start).ok_or_else(|| {
                SyncError::refused(
                    format!("no backup for {} that began at this position is under way", context.peer),
                    "Start the recovery again: only what differs is sent.",
                )
            })?;
            link.outgoing.send(FilesReply::Attached).await?;
            Role::Helper(backup)
        }
        Some(_) => return Err(out_of_order()),
    };
    let backup = Arc::clone(role.backup());
    backup.channels.fetch_add(1, Ordering::Relaxed);
    let helper = matches!(role, Role::Helper(_));
    let served = tokio::select! {
        served = answer(link, role) => served,
        () = backup.ended(), if helper => {
            Err(SyncError::refused("the backup ended", "Start the recovery again: only what differs is sent."))
        }
    };
    backup.channels.fetch_sub(1, Ordering::Relaxed);
    served
}

async fn answer(link: &mut Link<FilesReply, FilesRequest>, role: Role) -> Result<(), SyncError> {
    let backup = Arc::clone(role.backup());
    let mut owner = match role {
        Role::Owner(owner) => Some(owner),
        Role::Helper(_) => None,
    };
    let mut reader = Reader { backup: Arc::clone(&backup), buffers: Buffers::new(EXTENT_BYTES), pack: false };
    let mut jobs: VecDeque<JoinHandle<Result<Done, SyncError>>> = VecDeque::new();
    let mut waiting: VecDeque<Job> = VecDeque::new();
    let mut pace = Pace::new();
    let mut sum = Sum::default();
    loop {
        while jobs.len() < JOBS_MAX
            && let Some(job) = waiting.pop_front()
        {
            backup.throttle.pass(job.bytes(&backup)).await;
            reader.pack = pace.packs(backup.channels.load(Ordering::Relaxed));
            let reader = reader.clone();
            jobs.push_back(tokio::task::spawn_blocking(move || reader.run(&job)));
        }
        let request = tokio::select! {
            read = next(&mut jobs), if !jobs.is_empty() => {
                jobs.pop_front();
                let done = read?;
                done.add_to(&mut sum);
                for reply in done.replies {
                    pace.send(&link.outgoing, reply).await?;
                }
                continue;
            }
            request = link.incoming.receive(), if waiting.is_empty() => request?,
        };
        match request {
            None => return Ok(()),
            Some(FilesRequest::Extents { file, first, have }) => {
                if have.is_empty() || have.len() > EXTENTS_PER_REQUEST_MAX {
                    return Err(SyncError::Protocol(format!("{} extents were asked for at once", have.len())));
                }
                if have.iter().flatten().any(|held| held.pages.len() > EXTENT_BYTES / PAGE_BYTES) {
                    return Err(SyncError::Protocol("more pages were described than an extent has".into()));
                }
                let mut first = first;
                for part in have.chunks(JOB_EXTENTS_MAX) {
                    waiting.push_back(Job::Extents { file, first, have: part.to_vec() });
                    let count = u32::try_from(part.len()).unwrap_or(u32::MAX);
                    first = first.checked_add(count).ok_or_else(out_of_order)?;
                }
            }
            Some(FilesRequest::Small { files }) => {
                if files.is_empty() || files.len() > SMALL_FILES_PER_REQUEST_MAX {
                    return Err(SyncError::Protocol(format!("{} files were asked for at once", files.len())));
                }
                let job = Job::Small { files };
                if job.bytes(&backup) > EXTENT_BYTES as u64 {
                    return Err(SyncError::Protocol("small files were asked for that are too much together".into()));
                }
                waiting.push_back(job);
            }
            Some(FilesRequest::Check) if jobs.is_empty() => {
                let Sum { answers, sum } = std::mem::take(&mut sum);
                link.outgoing.send(FilesReply::Sum { answers, sum }).await?;
            }
            Some(FilesRequest::End) if jobs.is_empty() => match owner.take() {
                Some(owner) => return end(link, *owner).await,
                None => return Err(out_of_order()),
            },
            Some(_) => return Err(out_of_order()),
        }
    }
}

fn out_of_order() -> SyncError {
    SyncError::Protocol("a files request came out of order".into())
}

async fn next(jobs: &mut VecDeque<JoinHandle<Result<Done, SyncError>>>) -> Result<Done, SyncError> {
    match jobs.front_mut() {
        Some(job) => job.await.map_err(|error| SyncError::Internal(format!("reading files: {error}")))?,
        None => std::future::pending().await,
    }
}

/// Finds out while it sends whether the connection is what everything waits for.
struct Pace {
    began: Instant,
    waited: Duration,
    bytes: u64,
    pack: bool,
}

impl Pace {
    fn new() -> Pace {
        Pace { began: Instant::now(), waited: Duration::ZERO, bytes: 0, pack: false }
    }

    async fn send(&mut self, outgoing: &Outgoing<FilesReply>, reply: FilesReply) -> Result<(), SyncError> {
        let bytes = reply.bulk().map_or(0, |bulk| bulk.len() as u64);
        let began = Instant::now();
        outgoing.send(reply).await?;
        self.waited += began.elapsed();
        self.bytes += bytes;
        Ok(())
    }

    /// Whether to compress what is read next: most of the time was spent waiting for room, and what went out meanwhile,
    /// on all of `channels`, is less than zstd makes.
    fn packs(&mut self, channels: usize) -> bool {
        let took = self.began.elapsed();
        if took >= Duration::from_millis(PACK_WINDOW_MS) {
            self.pack = decide(took, self.waited, self.bytes.saturating_mul(channels as u64));
            *self = Pace { pack: self.pack, ..Pace::new() };
        }
        self.pack
    }
}

fn decide(took: Duration, waited: Duration, bytes: u64) -> bool {
    let per_s = bytes as f64 / took.as_secs_f64();
    waited > took / 2 && per_s < PACK_BYTES_PER_S_MAX as f64
}

async fn begin(link: &mut Link<FilesReply, FilesRequest>, context: &SourceContext) -> Result<Owner, SyncError> {
    let client = session::connect(&context.postgres).await?;
    let identity = session::identify(&client).await?;
    if context.keeps_wal {
        session::reserve_slot(&client, &context.peer).await?;
    }
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
    let backup = Backup::new(pgdata, table, start, identity.checksums, context.bytes_per_s_max);
    // Before B has all of the table: then it attaches other channels.
    let owned = context.backups.begin(&context.peer, backup);
    send_table(link, &owned.backup.table).await?;
    Ok(Owner { client, version_num: identity.version_num, owned })
}

async fn send_table(link: &mut Link<FilesReply, FilesRequest>, table: &[FileEntry]) -> Result<(), SyncError> {
    let mut rest = table;
    loop {
        let mut bytes = 0;
        let count = rest
            .iter()
            .take_while(|entry| {
                bytes += entry.path.len() + entry.tablespace.as_ref().map_or(0, |found| found.path.len() + 64) + 32;
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

async fn end(link: &mut Link<FilesReply, FilesRequest>, owner: Owner) -> Result<(), SyncError> {
    let ended = session::stop_backup(&owner.client, owner.version_num).await?;
    let (damaged, damaged_count) = owner.owned.backup.damaged();
    link.outgoing
        .send(FilesReply::Ended {
            stop: ended.stop,
            backup_label: ended.backup_label.into_bytes(),
            tablespace_map: ended.tablespace_map.into_bytes(),
            damaged,
            damaged_count,
        })
        .await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_slow_connection_is_compressed_for() {
        let second = Duration::from_secs(1);
        assert!(decide(second, second * 9 / 10, 30_000_000));
        assert!(!decide(second, second * 9 / 10, 1_000_000_000));
        assert!(!decide(second, second / 10, 30_000_000), "the disk is what is slow");
    }
}
