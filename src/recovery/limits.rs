//! The limits of a recovery. They are limits on lack of progress, not on time, wherever progress can be seen:
//! a terabyte may take its hours, and a stuck disk is found after two minutes.

use std::time::Duration;

use super::core::Step;

/// Records and facts of two nodes.
pub const PREFLIGHT_MAX: Duration = Duration::from_secs(30);
/// A member told and the smaller set stored; may have to wait for nodes that do not answer.
pub const DETACH_MAX: Duration = Duration::from_secs(60);
/// No counter of the fill moved. Starting the backup is a checkpoint on the source, which moves none.
pub const FILL_STALL_MAX: Duration = Duration::from_secs(180);
/// Neither WAL received nor WAL replayed grew.
pub const CATCH_UP_STALL_MAX: Duration = Duration::from_secs(180);
pub const HOLD_MAX: Duration = Duration::from_secs(15);
/// One attempt at a cut, with its wait for transactions that forbid it. The gate itself has a far shorter limit.
pub const CUT_MAX: Duration = Duration::from_secs(60);
/// Attempts at a cut whose gate could not be closed in time.
pub const CUT_ATTEMPTS_MAX: u32 = 20;
/// The rest of the WAL up to X was not replayed, or the promotion did not end, and no counter moved.
pub const LEAVE_RECOVERY_STALL_MAX: Duration = Duration::from_secs(180);
/// Not one transaction of the backlog was applied.
pub const DRAIN_STALL_MAX: Duration = Duration::from_secs(60);
/// One attempt at the join. The gate, the backlog and the agents have far shorter limits; this one only says that
/// a join which never ends is one that failed.
pub const JOIN_MAX: Duration = Duration::from_secs(300);
/// Attempts at a join whose gate could not be closed in time; the backlog is drained again between them.
pub const JOIN_ATTEMPTS_MAX: u32 = 20;
/// Wait between two attempts at the gate.
pub const RETRY_WAIT: Duration = Duration::from_millis(250);
/// Each step of cleaning up after a failure or a success.
pub const CLEAN_UP_MAX: Duration = Duration::from_secs(15);
/// A node is let into the cut when it is at most this far behind the source. Bytes of WAL.
pub const LAG_BYTES_MAX: u64 = 4 << 20;
/// Warnings kept with one recovery; more are counted, not kept.
pub const WARNINGS_MAX: usize = 32;

/// How often it is looked whether a fill slows commits down.
pub const PACE_EVERY: Duration = Duration::from_secs(1);
/// How long the source may take to be told how fast a fill may read.
pub const PACE_MAX: Duration = Duration::from_secs(3);
/// Before a fill: commits of this time tell how long one usually takes.
pub const USUAL_OVER: Duration = Duration::from_secs(10);

/// How long a step may show no progress.
#[must_use]
pub fn stall_max(step: Step) -> Duration {
    match step {
        Step::Preflight => PREFLIGHT_MAX,
        Step::Detach | Step::ShrinkOut => DETACH_MAX,
        Step::KeepOld | Step::Fill | Step::Verify => FILL_STALL_MAX,
        Step::CatchUp => CATCH_UP_STALL_MAX,
        Step::HoldRelay => HOLD_MAX,
        Step::Cut => CUT_MAX,
        Step::LeaveRecovery { .. } => LEAVE_RECOVERY_STALL_MAX,
        Step::Drain => DRAIN_STALL_MAX,
        Step::Join => JOIN_MAX,
        Step::Abandon | Step::Release | Step::DropSlot => CLEAN_UP_MAX,
    }
}
