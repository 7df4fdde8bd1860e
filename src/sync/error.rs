//! What can go wrong while files and WAL are moved, and how it is said to the peer and to people.

use std::io;
use std::path::{Path, PathBuf};

use pgtandem_proto::message::{Failure, FailureCode};

use crate::agent::postgres::{PostgresError, describe};

/// One error of a fill, a catch-up or a source. Where the fault lies is the variant's name.
#[derive(Debug, thiserror::Error)]
pub enum SyncError {
    #[error("{action} {} failed: {source}", path.display())]
    File { action: &'static str, path: PathBuf, source: io::Error },
    #[error("{action}: {}", describe(source))]
    Sql { action: &'static str, source: tokio_postgres::Error },
    #[error("{action}: {source}")]
    Server { action: &'static str, source: PostgresError },
    /// The other node said why it can not.
    #[error("{}", .0.what)]
    Peer(Failure),
    /// The connection to the other node is gone.
    #[error("the {channel} connection to the other node ended: {reason}")]
    Closed { channel: &'static str, reason: String },
    /// The other node sent what it must not.
    #[error("the other node broke the agent protocol: {0}")]
    Protocol(String),
    /// A condition is not met; nothing is broken.
    #[error("{what}")]
    Refused { what: String, hint: String },
    /// A disk has no room.
    #[error("{what}")]
    Full { what: String, hint: String },
    /// Nothing moved for too long.
    #[error("{what} did not advance for {seconds} s")]
    Stalled { what: &'static str, seconds: u64, hint: String },
    /// A task of ours ended in a way that it must not.
    #[error("internal error: {0}")]
    Internal(String),
}

impl SyncError {
    pub(crate) fn file(action: &'static str, path: &Path, source: io::Error) -> SyncError {
        SyncError::File { action, path: path.to_path_buf(), source }
    }

    pub(crate) fn refused(what: impl Into<String>, hint: impl Into<String>) -> SyncError {
        SyncError::Refused { what: what.into(), hint: hint.into() }
    }

    /// Whether the connection to the other node is gone, or could not be made; it may come back.
    pub(crate) fn is_lost_connection(&self) -> bool {
        match self {
            SyncError::Closed { .. } => true,
            SyncError::Peer(failure) => failure.code == FailureCode::Peer,
            _ => false,
        }
    }

    /// The same error in the form that crosses the network.
    #[must_use]
    pub fn failure(&self) -> Failure {
        let (code, hint) = match self {
            SyncError::Peer(failure) => return failure.clone(),
            SyncError::File { source, .. } => (FailureCode::Postgres, file_hint(source)),
            SyncError::Server { source, .. } => return Failure { what: self.to_string(), ..source.failure() },
            SyncError::Sql { .. } => {
                (FailureCode::Postgres, "Look at PostgreSQL's log on that node, then start the recovery again.".into())
            }
            SyncError::Closed { .. } => (
                FailureCode::Peer,
                "Check that the agent of the other node runs and is reachable, then start the recovery again: only what differs is sent.".into(),
            ),
            SyncError::Protocol(_) => {
                (FailureCode::Peer, "Check that both nodes run the same version of pgtandem.".into())
            }
            SyncError::Refused { hint, .. } => (FailureCode::WrongState, hint.clone()),
            SyncError::Full { hint, .. } => (FailureCode::Postgres, hint.clone()),
            SyncError::Stalled { hint, .. } => (FailureCode::Limit, hint.clone()),
            SyncError::Internal(_) => (FailureCode::Internal, "Start the recovery again and report this.".into()),
        };
        Failure { code, what: self.to_string(), hint }
    }
}

fn file_hint(error: &io::Error) -> String {
    match error.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
            "Make room on that file system, then start the recovery again: only what differs is sent.".into()
        }
        io::ErrorKind::PermissionDenied => {
            "The agent has to run as the owner of the data directory; check who owns this file.".into()
        }
        _ => "Check that disk, then start the recovery again: only what differs is sent.".into(),
    }
}
