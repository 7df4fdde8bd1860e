//! The first frame in each direction: who speaks, which versions and features, and what the connection is for.

use serde::{Deserialize, Serialize};

use crate::membership::Epoch;
use crate::message::{Failure, FailureCode};

/// Oldest and newest protocol version that this program speaks.
pub const VERSION_MIN: u16 = 1;
pub const VERSION_MAX: u16 = 1;
/// Features of this program, as bits; those of both ends are used. None exist in version 1.
pub const FEATURES: u64 = 0;
/// Longest name of a cluster or node, bytes.
pub const NAME_BYTES_MAX: usize = 32;

/// What a connection is for. Fixed for its whole life.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Channel {
    /// [`crate::message::Request`] and [`crate::message::Reply`].
    Control,
    /// Behind HELLO both ends forward raw bytes between the caller and the node's PostgreSQL. Cut when the node
    /// promises an epoch above this one.
    Tunnel { epoch: Epoch },
    /// [`crate::message::FilesRequest`] and [`crate::message::FilesReply`].
    Files,
    /// [`crate::message::WalRequest`] and [`crate::message::WalReply`].
    Wal,
    /// Opened by the proxy of this epoch; the node asks with [`crate::message::LeaseAsk`], the proxy answers with
    /// [`crate::message::LeaseGrant`].
    Lease { epoch: Epoch },
    /// [`crate::message::ArchiveRequest`] and [`crate::message::ArchiveReply`].
    Archive,
}

/// From the side that connected.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    pub version_min: u16,
    pub version_max: u16,
    pub features: u64,
    pub cluster: String,
    /// Name of the caller, as in its certificate: a node's, or `proxy`.
    pub from: String,
    pub channel: Channel,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum HelloReply {
    Accepted {
        version: u16,
        features: u64,
        /// Name of the node that answers.
        node: String,
        /// Its promised epoch.
        promised: Epoch,
    },
    /// The connection ends behind this.
    Refused(Failure),
}

impl Hello {
    #[must_use]
    pub fn new(cluster: &str, from: &str, channel: Channel) -> Hello {
        Hello {
            version_min: VERSION_MIN,
            version_max: VERSION_MAX,
            features: FEATURES,
            cluster: cluster.to_owned(),
            from: from.to_owned(),
            channel,
        }
    }

    /// The version and features that both ends speak, or why there is no talking to this caller.
    pub fn negotiate(&self, cluster: &str) -> Result<(u16, u64), Failure> {
        let refuse = |what: String, hint: &str| Failure { code: FailureCode::Peer, what, hint: hint.to_owned() };
        if self.cluster != cluster {
            return Err(refuse(
                format!("the caller belongs to cluster {:?}, this node to {cluster:?}", cut(&self.cluster)),
                "compare [cluster] name in the configuration of both hosts",
            ));
        }
        let version = VERSION_MAX.min(self.version_max);
        if version < VERSION_MIN.max(self.version_min) {
            return Err(refuse(
                format!(
                    "the caller speaks versions {} to {} of the agent protocol, this node {VERSION_MIN} to {VERSION_MAX}",
                    self.version_min, self.version_max
                ),
                "install the same version of pgtandem on all hosts",
            ));
        }
        Ok((version, FEATURES & self.features))
    }
}

/// A name from the network, short enough for a message.
fn cut(name: &str) -> String {
    name.chars().take(NAME_BYTES_MAX).collect()
}
