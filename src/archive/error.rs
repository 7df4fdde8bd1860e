//! What can go wrong with an archive, and what to do about it.

use std::io;
use std::path::{Path, PathBuf};

use pgtandem_proto::message::{Failure, FailureCode};

use crate::sync::SyncError;

#[derive(Debug, thiserror::Error)]
pub enum ArchiveError {
    #[error("{action} {} failed: {source}", path.display())]
    File { action: &'static str, path: PathBuf, source: io::Error },
    /// The one thing that must never be resolved by a program: one of the two is the wrong history.
    #[error("{} holds other content than what is to be stored under this name", .0.display())]
    Other(PathBuf),
    #[error("{} is damaged: {why}", path.display())]
    Damaged { path: PathBuf, why: String },
    #[error("{0:?} is no name of a WAL segment or a timeline history")]
    Name(String),
    /// A condition is not met; nothing is broken.
    #[error("{what}")]
    Refused { what: String, hint: String },
    #[error(transparent)]
    Sync(#[from] SyncError),
}

impl ArchiveError {
    pub(crate) fn file(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> ArchiveError {
        move |source| ArchiveError::File { action, path: path.to_path_buf(), source }
    }

    pub(crate) fn damaged(path: &Path, why: impl Into<String>) -> ArchiveError {
        ArchiveError::Damaged { path: path.to_path_buf(), why: why.into() }
    }

    pub(crate) fn refused(what: impl Into<String>, hint: impl Into<String>) -> ArchiveError {
        ArchiveError::Refused { what: what.into(), hint: hint.into() }
    }

    /// The next thing to do, one sentence.
    #[must_use]
    pub fn hint(&self) -> String {
        match self {
            ArchiveError::File { source, .. } => match source.kind() {
                io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
                    "make room on that file system; PostgreSQL keeps its WAL and tries again".into()
                }
                io::ErrorKind::PermissionDenied => "run it as the user that PostgreSQL and the agent run as".into(),
                _ => "look at that path and its disk".into(),
            },
            ArchiveError::Other(_) => {
                "two servers, or a server that was set back in time, write to one archive: find out which, and move the file away \
                 only when you know that nobody needs it"
                    .into()
            }
            ArchiveError::Damaged { .. } => {
                "pgtandem wal verify says what else is damaged; the peers' disks may have a good copy of the file".into()
            }
            ArchiveError::Name(_) => "this command is meant to be called by PostgreSQL, with %p or %f".into(),
            ArchiveError::Refused { hint, .. } => hint.clone(),
            ArchiveError::Sync(error) => error.failure().hint,
        }
    }

    /// The same as it crosses the network.
    #[must_use]
    pub fn failure(&self) -> Failure {
        let code = match self {
            ArchiveError::Sync(error) => return error.failure(),
            ArchiveError::Refused { .. } => FailureCode::WrongState,
            ArchiveError::Name(_) => FailureCode::Request,
            _ => FailureCode::Internal,
        };
        Failure { code, what: self.to_string(), hint: self.hint() }
    }
}
