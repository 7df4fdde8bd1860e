//! WAL that comes while the files are copied: whole segments in B's `pg_wal`, synced before A may forget them.
//!
//! Only before PostgreSQL is started; from then on nothing but its walreceiver writes there.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use bytes::Bytes;
use pgtandem_proto::message::{Lsn, Progress, WalReply};
use tokio::sync::watch;
use tokio_util::task::TaskTracker;

use super::super::error::SyncError;
use super::super::wal::{history_name, segment_name, segment_start};
use super::super::wal_stream::WalStream;
use super::journal::{sync_folder, write_durably};
use super::{SILENCE_SECONDS_MAX, progressing};

/// Takes WAL from the start of the segment of `start` until `stop` is known and reached. -> how far it came
pub(super) async fn fetch(
    mut wal: WalStream,
    pg_wal: PathBuf,
    start: Lsn,
    timeline: u32,
    mut stop: watch::Receiver<Option<Lsn>>,
    progress: &watch::Sender<Progress>,
    writers: &TaskTracker,
) -> Result<Lsn, SyncError> {
    let segment_bytes = wal.wal_segment_bytes;
    if !wal.history.is_empty() {
        write_durably(&pg_wal.join(history_name(timeline)), &wal.history)?;
    }
    let mut writer =
        SegmentWriter { pg_wal, timeline, segment_bytes, open: None, position: segment_start(start, segment_bytes) };
    loop {
        if stop.borrow_and_update().is_some_and(|stop| writer.position >= stop) {
            break;
        }
        let reply = tokio::select! {
            reply = progressing(SILENCE_SECONDS_MAX, "WAL from the source", wal.link.incoming.expect()) => reply?,
            changed = stop.changed() => match changed {
                Ok(()) => continue,
                Err(_) => return Err(SyncError::Internal("the copy of the files ended without its end".into())),
            },
        };
        match reply {
            WalReply::Data { start, flushed, bytes } => {
                progress.send_modify(|progress| {
                    progress.wal_bytes_received += bytes.len() as u64;
                    progress.wal_source = progress.wal_source.max(flushed.0);
                });
                let handled = writers.spawn_blocking(move || writer.handle(start, bytes).map(|()| writer)).await;
                writer = handled.map_err(|error| SyncError::Internal(format!("writing WAL: {error}")))??;
                wal.acknowledge(segment_start(writer.position, segment_bytes)).await?;
            }
            WalReply::Flushed { flushed } => {
                progress.send_modify(|progress| progress.wal_source = progress.wal_source.max(flushed.0));
            }
            WalReply::Failed(failure) => return Err(SyncError::Peer(failure)),
            WalReply::Started { .. } => return Err(SyncError::Protocol("a wal channel started twice".into())),
        }
    }
    tokio::task::spawn_blocking(move || writer.finish())
        .await
        .map_err(|error| SyncError::Internal(format!("writing WAL: {error}")))?
}

struct SegmentWriter {
    pg_wal: PathBuf,
    timeline: u32,
    segment_bytes: u32,
    open: Option<(PathBuf, File)>,
    /// Everything before it is written.
    position: Lsn,
}

impl SegmentWriter {
    fn handle(&mut self, start: Lsn, mut bytes: Bytes) -> Result<(), SyncError> {
        if start != self.position {
            return Err(SyncError::Protocol("WAL from the source has a gap".into()));
        }
        let segment_bytes = u64::from(self.segment_bytes);
        while !bytes.is_empty() {
            let offset = self.position.0 % segment_bytes;
            let room = usize::try_from(segment_bytes - offset).unwrap_or(usize::MAX);
            let part = bytes.split_to(bytes.len().min(room));
            let name = segment_name(self.timeline, self.position, self.segment_bytes);
            let (path, file) = match &mut self.open {
                Some(open) => open,
                None => self.open.insert(create(&self.pg_wal, &name, segment_bytes)?),
            };
            file.write_all_at(&part, offset).map_err(|error| SyncError::file("writing", path, error))?;
            self.position = Lsn(self.position.0 + part.len() as u64);
            if self.position.0.is_multiple_of(segment_bytes) {
                self.finish_segment()?;
            }
        }
        Ok(())
    }

    fn finish_segment(&mut self) -> Result<(), SyncError> {
        match self.open.take() {
            Some((path, file)) => file.sync_all().map_err(|error| SyncError::file("syncing", &path, error)),
            None => Ok(()),
        }
    }

    fn finish(mut self) -> Result<Lsn, SyncError> {
        self.finish_segment()?;
        sync_folder(&self.pg_wal)?;
        Ok(self.position)
    }
}

/// A segment of full size; what is not written yet are zeros, which PostgreSQL takes for the end of WAL.
fn create(pg_wal: &Path, name: &str, segment_bytes: u64) -> Result<(PathBuf, File), SyncError> {
    use std::os::unix::fs::OpenOptionsExt;
    let path = pg_wal.join(name);
    let create = || -> std::io::Result<File> {
        let file = std::fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&path)?;
        file.set_len(segment_bytes)?;
        Ok(file)
    };
    let file = create().map_err(|error| SyncError::file("making", &path, error))?;
    Ok((path, file))
}
