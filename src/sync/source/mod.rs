//! The source of a fill: answers what B asks on a files channel and on a wal channel.
//!
//! It reads A's data directory and holds a backup session and a replication slot on A's PostgreSQL. It changes
//! nothing else there, and knows nothing of where the bytes go.

mod backup;
mod files;
mod read;
mod session;
mod wal;

use pgtandem_proto::message::{FilesReply, FilesRequest, WalReply, WalRequest};

use super::error::SyncError;
use super::link::Link;
use crate::agent::connection::Connection;
use crate::agent::postgres::Postgres;

pub use backup::Backups;
pub use session::{drop_slot, slot_name};

/// What serving needs to know about this node and its caller.
#[derive(Clone)]
pub struct SourceContext {
    /// This node's PostgreSQL, which runs.
    pub postgres: Postgres,
    /// Name of the node that is filled, as in its certificate.
    pub peer: String,
    /// What this node serves to all others.
    pub backups: Backups,
    /// What a fill may read here in a second; 0: as much as it can.
    pub bytes_per_s_max: u64,
    /// A slot keeps WAL from the begin of a backup on, for a peer that fetches it.
    pub keeps_wal: bool,
}

/// Serves a files channel until B ends it. The backup session ends with it, whatever happens.
pub async fn serve_files(connection: Connection, context: &SourceContext) -> Result<(), SyncError> {
    serve_files_link(Link::over("files", connection), context).await
}

/// As [`serve_files`], over a link.
pub async fn serve_files_link(
    mut link: Link<FilesReply, FilesRequest>,
    context: &SourceContext,
) -> Result<(), SyncError> {
    let served = files::serve(&mut link, context).await;
    if let Err(error) = &served {
        // The peer may be gone already.
        let _ = link.outgoing.send(FilesReply::Failed(error.failure())).await;
    }
    served
}

/// Serves a wal channel until B ends it.
pub async fn serve_wal(connection: Connection, context: &SourceContext) -> Result<(), SyncError> {
    serve_wal_link(Link::over("wal", connection), context).await
}

/// As [`serve_wal`], over a link.
pub async fn serve_wal_link(mut link: Link<WalReply, WalRequest>, context: &SourceContext) -> Result<(), SyncError> {
    let served = wal::serve(&mut link, context).await;
    if let Err(error) = &served {
        let _ = link.outgoing.send(WalReply::Failed(error.failure())).await;
    }
    served
}
