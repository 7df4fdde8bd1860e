//! What a recovery needs from the running proxy: the gate, the backlog, and the member set.
//!
//! Only the contract stands here. The replication hub implements it; the recovery runner calls it in the order
//! `cut`, `drain`, `join`, and `abandon` after any failure. Nothing here reaches a node by itself: files, WAL and
//! leaving recovery are the agents' work, asked for by the runner.

use std::future::Future;
use std::time::Duration;

use pgtandem_proto::membership::{Epoch, MemberSet};
use pgtandem_proto::message::Lsn;
use thiserror::Error;

/// The side of the proxy that a recovery drives.
///
/// Order of calls for one node: `cut` once, then `drain` once or more, then `join` once. `abandon` may be called at any
/// time, also when no cut was made, and ends the sequence. Each call is cancelled by dropping its future; the runner
/// calls `abandon` after that, so an implementation must not leave the gate closed when a future is dropped.
pub trait Replication: Send + Sync {
    /// The number of this proxy's reign; 0 between two reigns, when nobody is served.
    fn epoch(&self) -> Epoch;

    /// The member set under which commits are acknowledged now.
    fn members(&self) -> MemberSet;

    /// The median of the time that commits took over the last `over`; `None`: there were too few, or nobody counts.
    fn commit_median(&self, over: Duration) -> Option<Duration> {
        let _ = over;
        None
    }

    /// Above this part of what it was before, percent, that median slows a fill down; 0: never.
    fn fill_latency_percent_max(&self) -> u64 {
        0
    }

    /// Waits until nothing is under way that forbids a cut, closes the gate, writes the marker record, reads X, turns
    /// the backlog on for `node`, opens the gate. A gate that could not be closed in its limit is
    /// [`ReplicationErrorKind::Gate`]: nothing was changed and the caller may try again.
    fn cut(&self, node: &str) -> impl Future<Output = Result<CutDone, ReplicationError>> + Send;

    /// Connects to the node, which has left recovery; puts the epoch into its databases, rolls back every prepared
    /// transaction of ours there, and applies the backlog until it is short enough for a join.
    fn drain(
        &self,
        node: &str,
        on_progress: &(dyn Fn(Drained) + Sync),
    ) -> impl Future<Output = Result<(), ReplicationError>> + Send;

    /// Closes the gate, applies the rest of the backlog, stores the larger member set on the leader's node and the
    /// other members and on `node` last, opens the gate.
    ///
    /// [`ReplicationErrorKind::Gate`] means that nothing was stored yet and the caller may drain and try again. After
    /// any other error the implementation has shrunk the node out again before it opened the gate. `on_wait` is told when another change of
    /// the member set goes first: a sentence that says which.
    fn join(
        &self,
        node: &str,
        on_wait: &(dyn Fn(&str) + Sync),
    ) -> impl Future<Output = Result<JoinDone, ReplicationError>> + Send;

    /// Drops the backlog of `node`; the node stays out, and does not come back by itself. Does nothing for a node without a backlog or
    /// for a member.
    fn abandon(&self, node: &str) -> impl Future<Output = ()> + Send;

    /// Makes another member the leader. When this returns, this proxy serves nobody, and the one on that node's host may.
    fn switch(&self, node: &str) -> impl Future<Output = Result<MemberSet, ReplicationError>> + Send;

    /// Takes a member out of the set: its agent is told Stale if it answers, the smaller set is stored on the others,
    /// and the next commit goes without it. `reason` is one sentence, kept as the node's last error.
    fn remove(&self, node: &str, reason: &str) -> impl Future<Output = Result<MemberSet, ReplicationError>> + Send;
}

/// The cut was made: every commit is before `x` or in the backlog.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct CutDone {
    /// End of the marker record, a record boundary.
    pub x: Lsn,
    /// When the gate began to close, microseconds since 1970 by this host's clock.
    pub gate_closed_unix_us: u64,
    /// How long the gate was closed, milliseconds.
    pub gate_ms: f64,
}

/// The node is a member.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct JoinDone {
    /// When the gate began to close, microseconds since 1970 by this host's clock.
    pub gate_closed_unix_us: u64,
    /// How long the gate was closed, milliseconds.
    pub gate_ms: f64,
    /// Version of the member set that contains the node.
    pub version: u64,
}

/// How far the backlog of a node is applied. Counts of transactions.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Drained {
    /// Applied since the cut; only grows.
    pub applied: u64,
    /// Waiting now; grows and shrinks with the load.
    pub left: u64,
    /// Largest number that has waited at once since the cut.
    pub peak: u64,
}

/// Why the proxy could not do its share: what failed and why in one sentence, and what to do next in another.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("{what}")]
pub struct ReplicationError {
    pub kind: ReplicationErrorKind,
    /// What failed, where and why, with names.
    pub what: String,
    /// The next thing to do or type.
    pub hint: String,
}

/// What a [`ReplicationError`] means for the recovery.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReplicationErrorKind {
    /// The gate could not be closed within its limit; nothing changed, try again.
    Gate,
    /// The node did not answer, broke its connection, or refused.
    Node,
    /// The backlog reached its limit.
    Backlog,
    /// The node's data are not those that the backlog follows.
    Differs,
    /// The leader's PostgreSQL refused or did not answer.
    Leader,
    /// A record could not be stored durably.
    Record,
    /// The node is not one that this can be done with: unknown, the leader, already a member, not a member.
    WrongNode,
    /// The proxy is stopping.
    Stopping,
}

impl ReplicationError {
    #[must_use]
    pub fn new(kind: ReplicationErrorKind, what: impl Into<String>, hint: impl Into<String>) -> Self {
        Self { kind, what: what.into(), hint: hint.into() }
    }

    /// Whether nothing was changed and the same call may be made again.
    #[must_use]
    pub fn is_retriable(&self) -> bool {
        self.kind == ReplicationErrorKind::Gate
    }
}
