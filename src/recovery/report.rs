//! What a recovery tells about itself while it runs and when it has ended: phases, counters, and the cause of a failure.
//!
//! Plain values, published after every change; nothing here decides anything.

use std::time::Duration;

use pgtandem_proto::message::{Kept, Lsn, Progress};
use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::limits::WARNINGS_MAX;
use super::pace::Rates;
use super::replication::{Drained, ReplicationError, ReplicationErrorKind};
use super::throttle::Slowed;

/// Where a recovery is. In this order, without leaving one out; `Failed` can follow each but `Member`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// Facts of both nodes are compared; nothing was touched.
    Preflight,
    /// Files are brought; the node's data directory can not be started.
    Seeding,
    /// The node runs as a standby and replays.
    CatchingUp,
    /// The gate closes, X is read, it opens.
    Cut,
    /// The node replays to exactly X and stops being a standby.
    LeavingRecovery,
    /// What was committed since X is applied.
    Draining,
    /// The gate closes, the rest is applied, the larger member set is stored, it opens.
    Joining,
    Member,
    Failed,
}

impl Phase {
    /// In the words of the design.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Preflight => "preflight",
            Self::Seeding => "seeding",
            Self::CatchingUp => "catching up",
            Self::Cut => "cut",
            Self::LeavingRecovery => "leaving recovery",
            Self::Draining => "draining",
            Self::Joining => "joining",
            Self::Member => "member",
            Self::Failed => "failed",
        }
    }
}

/// Who or what ended a recovery.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum CauseKind {
    /// Preflight refused; nothing was touched.
    Refused,
    /// The node is a member and nobody agreed to detach it first.
    NeedsConsent,
    /// The node that is filled, its agent or the network to it.
    Node,
    /// The source, its agent or the network to it.
    Source,
    /// Nothing moved for longer than the step's limit.
    Stalled,
    /// The gate could not be closed in time, in all attempts.
    Gate,
    /// The backlog reached its limit.
    Backlog,
    /// The leader's PostgreSQL.
    Leader,
    /// A record could not be stored.
    Record,
    /// The proxy is stopping, or its reign ended.
    Stopping,
    /// This proxy must not serve, and waits.
    Waiting,
}

/// What went wrong and what to do about it, a sentence each.
#[derive(Clone, Debug, PartialEq, Eq, Error, Serialize, Deserialize)]
#[error("{what}")]
pub struct Cause {
    pub kind: CauseKind,
    pub what: String,
    pub hint: String,
}

impl Cause {
    #[must_use]
    pub fn new(kind: CauseKind, what: impl Into<String>, hint: impl Into<String>) -> Self {
        Self { kind, what: what.into(), hint: hint.into() }
    }
}

impl From<ReplicationError> for Cause {
    fn from(error: ReplicationError) -> Self {
        let kind = match error.kind {
            ReplicationErrorKind::Gate => CauseKind::Gate,
            ReplicationErrorKind::Node | ReplicationErrorKind::Differs => CauseKind::Node,
            ReplicationErrorKind::Backlog => CauseKind::Backlog,
            ReplicationErrorKind::Leader => CauseKind::Leader,
            ReplicationErrorKind::Record => CauseKind::Record,
            ReplicationErrorKind::WrongNode => CauseKind::Refused,
            ReplicationErrorKind::Stopping => CauseKind::Stopping,
        };
        Self { kind, what: error.what, hint: error.hint }
    }
}

/// `Failed { phase, cause, what to do }`.
#[derive(Clone, Debug, PartialEq, Eq, Error, Serialize, Deserialize)]
#[error("while {}: {cause}", phase.name())]
pub struct Failed {
    /// The phase in which it failed.
    pub phase: Phase,
    pub cause: Cause,
}

/// Everything known about one recovery.
#[derive(Clone, Debug, PartialEq)]
pub struct Report {
    pub phase: Phase,
    /// Counters of the fill and of the replay.
    pub progress: Progress,
    /// How fast they grow.
    pub rates: Rates,
    pub drained: Drained,
    pub x: Option<Lsn>,
    /// When the gate began to close for the cut, microseconds since 1970 by the proxy's clock.
    pub cut_gate_closed_unix_us: Option<u64>,
    /// How long the gate was closed for the cut, milliseconds.
    pub cut_gate_ms: Option<f64>,
    /// The same for the join.
    pub join_gate_closed_unix_us: Option<u64>,
    /// How long the gate was closed for the join, milliseconds.
    pub join_gate_ms: Option<f64>,
    /// Attempts at the cut and at the join; 1 each when all goes well.
    pub cut_attempts: u32,
    pub join_attempts: u32,
    /// Why the cut or the join is not made yet: what it waits for, or why it is tried again. One sentence.
    pub waits: Option<String>,
    /// `pg_verifybackup` was asked about the files, and found nothing wrong.
    pub verified: bool,
    /// Why the files are brought slower than they could be.
    pub slowed: Option<Slowed>,
    /// What lay on the node is to be kept, and where it is once it is; `None`: there was nothing, or it is not yet.
    pub keeps_old: bool,
    pub kept: Option<Kept>,
    /// Version of the member set that contains the node.
    pub version: Option<u64>,
    /// Time spent in each phase that has ended, in order.
    pub phases: Vec<(Phase, Duration)>,
    /// What the operator should know although it stops nothing.
    pub warnings: Vec<String>,
    pub failed: Option<Failed>,
    /// Nothing more will change.
    pub ended: bool,
}

impl Report {
    #[must_use]
    pub(crate) fn new() -> Self {
        Self {
            phase: Phase::Preflight,
            progress: Progress::default(),
            rates: Rates::default(),
            drained: Drained::default(),
            x: None,
            cut_gate_closed_unix_us: None,
            cut_gate_ms: None,
            join_gate_closed_unix_us: None,
            join_gate_ms: None,
            cut_attempts: 0,
            join_attempts: 0,
            waits: None,
            verified: false,
            slowed: None,
            keeps_old: false,
            kept: None,
            version: None,
            phases: Vec::new(),
            warnings: Vec::new(),
            failed: None,
            ended: false,
        }
    }

    /// Notes what was kept, and says so at once: somebody may want it although the recovery fails.
    pub(super) fn keep(&mut self, kept: Kept) {
        let Kept { path, bytes, .. } = &kept;
        if path.is_empty() {
            self.warn(
                "Nothing is kept: there is no data directory on the node that a server could be started on.".into(),
            );
            return;
        }
        let size = bytes.div_ceil(1 << 20);
        let where_to = format!("{path}, {size} MiB. To remove it there: rm -r {path}");
        self.warn(if kept.earlier {
            format!(
                "What lies on the node now was brought by an earlier attempt. What that one found there is kept: {where_to}"
            )
        } else {
            format!("What lay on the node is kept: {where_to}")
        });
        self.kept = Some(kept);
    }

    pub(super) fn warn(&mut self, warning: String) {
        if self.warnings.len() < WARNINGS_MAX {
            self.warnings.push(warning);
        }
    }
}
