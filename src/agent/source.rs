//! Where a fill gets its files and WAL from: channels to the agent of another node.

use std::sync::Arc;

use pgtandem_proto::hello::Channel;
use pgtandem_proto::message::{FilesReply, FilesRequest, WalReply, WalRequest};

use super::client::{self, ClientError};
use super::tls::Identity;
use crate::config::NodeConfig;
use crate::sync::SyncError;
use crate::sync::link::Link;
use crate::sync::target::{Opening, Source};

/// The agent of the node that is copied from.
pub struct AgentSource {
    identity: Identity,
    node: NodeConfig,
}

impl AgentSource {
    #[must_use]
    pub fn new(identity: Identity, node: NodeConfig) -> Arc<AgentSource> {
        Arc::new(AgentSource { identity, node })
    }
}

impl Source for AgentSource {
    fn open_files(&self) -> Opening<'_, Link<FilesRequest, FilesReply>> {
        Box::pin(async move {
            let connection = client::connect(&self.identity, &self.node, Channel::Files).await.map_err(failed)?;
            Ok(Link::over("files", connection))
        })
    }

    fn open_wal(&self) -> Opening<'_, Link<WalRequest, WalReply>> {
        Box::pin(async move {
            let connection = client::connect(&self.identity, &self.node, Channel::Wal).await.map_err(failed)?;
            Ok(Link::over("wal", connection))
        })
    }
}

#[allow(clippy::needless_pass_by_value, reason = "an argument of map_err")]
fn failed(error: ClientError) -> SyncError {
    SyncError::Peer(error.failure())
}
