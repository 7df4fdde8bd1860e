//! Stands where `sync` will be, with its signatures, until that part is merged: every fill is refused.
use pgtandem_proto::message::{Failure, FailureCode, Lsn};

#[derive(Debug, thiserror::Error)]
#[error("filling is not part of this build")]
pub struct SyncError;
impl SyncError {
    #[must_use]
    pub fn failure(&self) -> Failure {
        Failure { code: FailureCode::Internal, what: self.to_string(), hint: "merge sync".into() }
    }
}
pub mod source {
    use super::SyncError;
    use crate::agent::{connection::Connection, postgres::Postgres};
    pub struct SourceContext {
        pub postgres: Postgres,
        pub peer: String,
    }
    pub async fn serve_files(_: Connection, _: &SourceContext) -> Result<(), SyncError> {
        Err(SyncError)
    }
    pub async fn serve_wal(_: Connection, _: &SourceContext) -> Result<(), SyncError> {
        Err(SyncError)
    }
    pub async fn drop_slot(_: &Postgres, _: &str) -> Result<(), SyncError> {
        Err(SyncError)
    }
}
pub mod target {
    use super::{Lsn, SyncError};
    pub struct Target;
    impl Target {
        pub async fn fill(&mut self) -> Result<(), SyncError> {
            Err(SyncError)
        }
        pub async fn catch_up(&mut self, _: u64) -> Result<(), SyncError> {
            Err(SyncError)
        }
        pub async fn hold(&mut self) -> Result<Lsn, SyncError> {
            Err(SyncError)
        }
        pub async fn leave_recovery(&mut self, _: Lsn) -> Result<(), SyncError> {
            Err(SyncError)
        }
        pub async fn abort(&mut self) {}
    }
}
pub mod facts {
    use pgtandem_proto::message::NodeFacts;
    pub async fn gather(_: &crate::config::NodeConfig, _: &crate::agent::postgres::Postgres) -> NodeFacts {
        NodeFacts::default()
    }
}
