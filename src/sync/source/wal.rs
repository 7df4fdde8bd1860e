//! A wal channel, source side: A's segment files up to its flushed position, without end.
//!
//! Reads files and asks PostgreSQL for the position; does not speak the replication protocol. A replication slot
//! keeps the segments; should one be gone or recycled all the same, that is noticed and said.

use std::fs::File;
use std::io;
use std::path::Path;
use std::time::{Duration, Instant};

use bytes::Bytes;
use pgtandem_proto::message::{Lsn, WAL_CHUNK_BYTES_MAX, WalReply, WalRequest};
use tokio::sync::watch;
use tokio_postgres::{Client, Statement};

use super::super::error::SyncError;
use super::super::extent::read_at;
use super::super::link::{Link, Outgoing};
use super::super::wal::{WAL_PAGE_BYTES, history_name, pages_belong, segment_name};
use super::{SourceContext, session};

/// Bytes read from a segment at once.
const READ_BYTES_MAX: u64 = 1 << 20;
/// Pause between two looks at the flushed position while B has everything, milliseconds.
const POLL_MS: u64 = 2;
/// A caught-up B hears from us at least this often, milliseconds.
const SILENCE_MS_MAX: u64 = 1000;
/// Largest history file: one short line per timeline.
const HISTORY_BYTES_MAX: usize = 256 << 10;

pub(super) async fn serve(link: &mut Link<WalReply, WalRequest>, context: &SourceContext) -> Result<(), SyncError> {
    let (from, timeline) = match link.incoming.receive().await? {
        Some(WalRequest::Start { from, timeline }) => (from, timeline),
        Some(WalRequest::Acknowledge { .. }) => {
            return Err(SyncError::Protocol("a wal channel began with an acknowledgement".into()));
        }
        None => return Ok(()),
    };
    let client = session::connect(&context.postgres).await?;
    let identity = session::identify(&client).await?;
    if timeline != identity.timeline {
        return Err(SyncError::refused(
            format!("WAL of timeline {timeline} was asked for, but the source is on timeline {}", identity.timeline),
            "Start the recovery again.",
        ));
    }
    let pg_wal = context.postgres.node().pgdata.join("pg_wal");
    let history = read_history(&pg_wal, timeline)?;
    link.outgoing
        .send(WalReply::Started {
            timeline,
            system_identifier: identity.system_identifier,
            wal_segment_bytes: identity.wal_segment_bytes,
            history,
            flushed: identity.flushed,
        })
        .await?;
    let statement = client
        .prepare("SELECT pg_current_wal_flush_lsn()::text")
        .await
        .map_err(|source| SyncError::Sql { action: "asking for the flushed position", source })?;
    let reader = Reader { pg_wal: &pg_wal, timeline, segment_bytes: identity.wal_segment_bytes };
    let (acknowledged, acknowledgements) = watch::channel(Lsn(0));
    // Whichever ends first ends all: the peer is gone, or there is no more WAL to be had.
    tokio::select! {
        sent = send_all(&link.outgoing, &client, &statement, reader, from) => sent,
        advanced = keep_slot(context, acknowledgements) => advanced,
        received = async {
            loop {
                match link.incoming.receive().await? {
                    Some(WalRequest::Acknowledge { flushed }) => { acknowledged.send_replace(flushed); }
                    Some(WalRequest::Start { .. }) => {
                        return Err(SyncError::Protocol("a wal channel was started twice".into()));
                    }
                    None => return Ok(()),
                }
            }
        } => received,
    }
}

/// Moves the slot behind what B has made safe; only the newest position counts.
async fn keep_slot(context: &SourceContext, mut acknowledgements: watch::Receiver<Lsn>) -> Result<(), SyncError> {
    let client = session::connect(&context.postgres).await?;
    while acknowledgements.changed().await.is_ok() {
        let flushed = *acknowledgements.borrow_and_update();
        session::advance_slot(&client, &context.peer, flushed).await?;
    }
    std::future::pending().await
}

#[derive(Clone, Copy)]
struct Reader<'a> {
    pg_wal: &'a Path,
    timeline: u32,
    segment_bytes: u32,
}

async fn send_all(
    outgoing: &Outgoing<WalReply>,
    client: &Client,
    statement: &Statement,
    reader: Reader<'_>,
    from: Lsn,
) -> Result<(), SyncError> {
    let action = "asking for the flushed position";
    let mut position = from;
    let mut flushed = Lsn(0);
    let mut said = Instant::now();
    loop {
        while position < flushed {
            let bytes = reader.read(position, flushed).await?;
            if bytes.is_empty() {
                return Err(SyncError::Internal("WAL below the flushed position is not in its file".into()));
            }
            for start in (0..bytes.len()).step_by(WAL_CHUNK_BYTES_MAX) {
                let chunk = bytes.slice(start..bytes.len().min(start + WAL_CHUNK_BYTES_MAX));
                let start = position;
                position = Lsn(position.0 + chunk.len() as u64);
                outgoing.send(WalReply::Data { start, flushed, bytes: chunk }).await?;
            }
            said = Instant::now();
        }
        let row = client.query_one(statement, &[]).await.map_err(|source| SyncError::Sql { action, source })?;
        let now = session::lsn(&row, 0, action)?;
        if now > flushed {
            flushed = now;
            if position < flushed {
                continue;
            }
        }
        if said.elapsed() >= Duration::from_millis(SILENCE_MS_MAX) {
            outgoing.send(WalReply::Flushed { flushed }).await?;
            said = Instant::now();
        }
        tokio::time::sleep(Duration::from_millis(POLL_MS)).await;
    }
}

impl Reader<'_> {
    /// Some of the bytes from `from` to `to`, at most to the end of the segment of `from`.
    async fn read(&self, from: Lsn, to: Lsn) -> Result<Bytes, SyncError> {
        let name = segment_name(self.timeline, from, self.segment_bytes);
        let path = self.pg_wal.join(&name);
        let segment_bytes = u64::from(self.segment_bytes);
        tokio::task::spawn_blocking(move || {
            // From the start of a page, so that its header proves whose bytes these are.
            let page_start = from.0 - from.0 % WAL_PAGE_BYTES as u64;
            let segment_end = from.0 - from.0 % segment_bytes + segment_bytes;
            let end = to.0.min(segment_end).min(page_start + READ_BYTES_MAX);
            let length = usize::try_from(end - page_start).unwrap_or(0);
            let file = File::open(&path).map_err(|error| match error.kind() {
                io::ErrorKind::NotFound => gone(&name),
                _ => SyncError::file("opening", &path, error),
            })?;
            let bytes = read_at(&file, page_start % segment_bytes, length)
                .map_err(|error| SyncError::file("reading", &path, error))?;
            if !pages_belong(Lsn(page_start), &bytes) {
                return Err(gone(&name));
            }
            let skipped = usize::try_from(from.0 - page_start).unwrap_or(0);
            Ok(bytes.slice(skipped.min(bytes.len())..))
        })
        .await
        .map_err(|error| SyncError::Internal(format!("reading WAL: {error}")))?
    }
}

fn gone(segment: &str) -> SyncError {
    SyncError::refused(
        format!(
            "WAL segment {segment} is no longer on the source: more WAL was made than max_slot_wal_keep_size keeps"
        ),
        "Raise max_slot_wal_keep_size on the source, then start the recovery again: only what differs is sent.",
    )
}

fn read_history(pg_wal: &Path, timeline: u32) -> Result<Vec<u8>, SyncError> {
    if timeline == 1 {
        return Ok(Vec::new());
    }
    let path = pg_wal.join(history_name(timeline));
    match File::open(&path).and_then(|file| read_at(&file, 0, HISTORY_BYTES_MAX)) {
        Ok(bytes) => Ok(bytes.to_vec()),
        // Without it B sees this timeline as one without a past, which is all that it needs.
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(error) => Err(SyncError::file("reading", &path, error)),
    }
}
