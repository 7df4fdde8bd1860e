//! The receiving end of a wal channel, as the fill and the relay use it: its start is checked here.

use pgtandem_proto::message::{Lsn, WalReply, WalRequest};

use super::error::SyncError;
use super::link::Link;
use super::target::Source;
use super::wal::segment_bytes_valid;

/// A started wal channel; `Data` and `Flushed` follow without end.
pub(super) struct WalStream {
    pub link: Link<WalRequest, WalReply>,
    pub system_identifier: u64,
    pub wal_segment_bytes: u32,
    /// History file of the timeline; empty for the first.
    pub history: Vec<u8>,
    pub flushed: Lsn,
    acknowledged: Lsn,
}

impl WalStream {
    /// Opens a channel to `source` that begins at `from`.
    pub async fn open(source: &dyn Source, from: Lsn, timeline: u32) -> Result<WalStream, SyncError> {
        let mut link = source.open_wal().await?;
        link.outgoing.send(WalRequest::Start { from, timeline }).await?;
        match link.incoming.expect().await? {
            WalReply::Started { timeline: found, system_identifier, wal_segment_bytes, history, flushed } => {
                if found != timeline || !segment_bytes_valid(wal_segment_bytes) {
                    return Err(SyncError::Protocol(
                        "a wal channel started with another timeline or segment size".into(),
                    ));
                }
                Ok(WalStream { link, system_identifier, wal_segment_bytes, history, flushed, acknowledged: Lsn(0) })
            }
            WalReply::Failed(failure) => Err(SyncError::Peer(failure)),
            WalReply::Data { .. } | WalReply::Flushed { .. } => {
                Err(SyncError::Protocol("a wal channel sent WAL before its start".into()))
            }
        }
    }

    /// Tells the source what it may forget; only forward.
    pub async fn acknowledge(&mut self, flushed: Lsn) -> Result<(), SyncError> {
        if flushed > self.acknowledged {
            self.acknowledged = flushed;
            self.link.outgoing.send(WalRequest::Acknowledge { flushed }).await?;
        }
        Ok(())
    }
}
