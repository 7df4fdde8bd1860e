//! The recovery state machine: what to do next, never how. No I/O, no clock: time comes in as an argument.

use std::collections::VecDeque;
use std::time::Instant;

use pgtandem_proto::message::{Kept, Lsn, Progress};

use super::limits::{CUT_ATTEMPTS_MAX, JOIN_ATTEMPTS_MAX, RETRY_WAIT, stall_max};
use super::pace::Pace;
use super::replication::{CutDone, Drained, JoinDone};
use super::report::{Cause, CauseKind, Failed, Phase, Report};
use super::throttle::Slowed;

/// What the operator wants of a recovery besides its end.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Wishes {
    /// A member is detached first.
    pub consent: bool,
    /// PostgreSQL's own programs look at the files before the node's first start.
    pub verify: bool,
    /// What lies on the node is kept beside it.
    pub keep_old: bool,
}

/// One piece of work for the runner. Only one is under way at any time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// Gather and compare the facts. -> [`Done::Preflight`]
    Preflight,
    /// Take the node out of the member set. -> [`Done::Plain`]
    Detach,
    /// Keep what lies there. -> [`Done::Kept`], with progress
    KeepOld,
    /// Bring the files. -> [`Done::Plain`], with progress
    Fill,
    /// Let other programs look at them. -> [`Done::Plain`], with progress
    Verify,
    /// Run as a standby until it is close. -> [`Done::Plain`], with progress
    CatchUp,
    /// The relay hands over nothing more. -> [`Done::Held`]
    HoldRelay,
    /// Read X and turn the backlog on. -> [`Done::Cut`]
    Cut,
    /// Replay to exactly `x` and leave recovery. -> [`Done::Plain`], with progress
    LeaveRecovery { x: Lsn },
    /// Apply the backlog until it is short. -> [`Done::Plain`], with drained
    Drain,
    /// Record the node as joining, then let it in. -> [`Done::Joined`]
    Join,
    /// After a failed join: whatever was stored, take the node out again. -> [`Done::Plain`]
    ShrinkOut,
    /// Drop the backlog. -> [`Done::Plain`]
    Abandon,
    /// End the connection to the node's agent, which ends what it does for this recovery. -> [`Done::Plain`]
    Release,
    /// Remove the replication slot on the source. -> [`Done::Plain`]
    DropSlot,
}

/// The good end of a [`Step`].
#[derive(Clone, Debug, PartialEq)]
pub enum Done {
    Preflight {
        is_member: bool,
        warnings: Vec<String>,
    },
    /// The end of every step that has nothing to tell.
    Plain(Step),
    Kept(Kept),
    /// Nothing beyond this position was handed to the node.
    Held(Lsn),
    Cut(CutDone),
    Joined(JoinDone),
}

#[derive(Clone, Debug, PartialEq)]
pub enum Input {
    Done(Done),
    /// The step under way failed. `retriable`: nothing was changed by it and it may be begun again.
    StepFailed {
        cause: Cause,
        retriable: bool,
    },
    Progress(Progress),
    Drained(Drained),
    /// The join under way waits for this.
    Waits(String),
    /// The fill under way is slowed down, or is not any more.
    Slowed(Option<Slowed>),
    /// Somebody wants this recovery to end: an operator, or a proxy that stops.
    Abort(Cause),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Output {
    /// Do this, and answer with [`Input::Done`] or [`Input::StepFailed`].
    Begin(Step),
    /// Drop the work under way; no answer to it is expected any more.
    Cancel,
}

/// The way of one node from lost to member.
///
/// Order of calls: [`Recovery::new`]; then, until [`Recovery::is_ended`]: take every [`Recovery::poll_output`] until it
/// is `None`; wait until work ends, counters move, or the time [`Recovery::poll_timeout`] has come; hand that to
/// [`Recovery::handle`] or [`Recovery::handle_timeout`]. [`Recovery::report`] may be read at any moment.
///
/// Every input is defined in every phase: the end of a step that is not under way, counters that come late, and
/// anything after the end change nothing. What holds:
/// - `Member` is reached only through all phases, in order.
/// - Until [`Step::Join`] is begun no output touches the member set, [`Step::Detach`] apart.
/// - A failed join is followed by [`Step::ShrinkOut`] before any other work and before `Failed`.
#[derive(Debug)]
pub struct Recovery {
    wishes: Wishes,
    report: Report,
    /// Counters as they came last, and how fast they grow.
    told: Progress,
    pace: Pace,
    phase_since: Instant,
    /// The work under way.
    step: Option<Step>,
    /// When the work under way counts as stuck, or the wait before `retry` ends.
    deadline: Option<Instant>,
    /// Work to begin again when `deadline` has come.
    retry: Option<Step>,
    /// Work that ends a failure or a success, in order; nothing of it can change the outcome.
    clean_up: VecDeque<Step>,
    /// At most a cancel and a begin.
    outputs: VecDeque<Output>,
    /// Came while a join was under way, and ends the recovery if that join does not succeed.
    abort: Option<Cause>,
    /// What there is to clean up.
    fill_begun: bool,
    cut_begun: bool,
}

impl Recovery {
    #[must_use]
    pub fn new(now: Instant, wishes: Wishes) -> Self {
        let mut recovery = Self {
            wishes,
            report: Report { keeps_old: wishes.keep_old, ..Report::new() },
            told: Progress::default(),
            pace: Pace::default(),
            phase_since: now,
            step: None,
            deadline: None,
            retry: None,
            clean_up: VecDeque::new(),
            outputs: VecDeque::new(),
            abort: None,
            fill_begun: false,
            cut_begun: false,
        };
        recovery.begin(now, Step::Preflight);
        recovery
    }

    #[must_use]
    pub fn report(&self) -> &Report {
        &self.report
    }

    /// Nothing is under way and nothing will be.
    #[must_use]
    pub fn is_ended(&self) -> bool {
        self.report.ended && self.outputs.is_empty()
    }

    pub fn poll_output(&mut self) -> Option<Output> {
        self.outputs.pop_front()
    }

    /// When [`Recovery::handle_timeout`] wants to be called.
    #[must_use]
    pub fn poll_timeout(&self) -> Option<Instant> {
        self.deadline
    }

    pub fn handle(&mut self, now: Instant, input: Input) {
        match input {
            Input::Done(done) => self.handle_done(now, done),
            Input::StepFailed { cause, retriable } => self.handle_step_failed(now, cause, retriable),
            Input::Progress(progress) => self.handle_progress(now, progress),
            Input::Drained(drained) => self.handle_drained(now, drained),
            Input::Slowed(slowed) => {
                if self.step == Some(Step::Fill) {
                    self.report.slowed = slowed;
                }
            }
            Input::Waits(why) => {
                if self.step == Some(Step::Join) {
                    self.report.waits = Some(why);
                }
            }
            Input::Abort(cause) => {
                if self.is_decided() {
                    return;
                }
                // A join that is under way is let through to its end: it takes milliseconds, and half of it is worse.
                if self.step == Some(Step::Join) {
                    self.abort = Some(cause);
                } else {
                    self.fail(now, cause);
                }
            }
        }
    }

    /// Does nothing before the time that [`Recovery::poll_timeout`] gave.
    pub fn handle_timeout(&mut self, now: Instant) {
        if self.deadline.is_none_or(|deadline| now < deadline) {
            return;
        }
        if let Some(step) = self.retry.take() {
            self.begin(now, step);
            return;
        }
        let Some(step) = self.step else {
            self.deadline = None;
            return;
        };
        let seconds = stall_max(step).as_secs();
        let cause = Cause::new(
            CauseKind::Stalled,
            format!("{} showed no progress for {seconds} s", describe(step)),
            "look at the agents' logs of both nodes, then run the recovery again; it starts from what is there",
        );
        if self.is_decided() {
            self.outputs.push_back(Output::Cancel);
            self.step = None;
            self.report.warn(cause.what);
            self.next_clean_up(now);
        } else {
            self.fail(now, cause);
        }
    }

    /// The outcome stands; only cleaning up is left.
    fn is_decided(&self) -> bool {
        matches!(self.report.phase, Phase::Member | Phase::Failed) || self.report.failed.is_some()
    }

    fn handle_done(&mut self, now: Instant, done: Done) {
        let Some(step) = self.step else { return };
        match (step, done) {
            (Step::Preflight, Done::Preflight { is_member, warnings }) => {
                for warning in warnings {
                    self.report.warn(warning);
                }
                if !is_member {
                    self.enter(now, Phase::Seeding, self.first_on_node());
                } else if self.wishes.consent {
                    self.begin(now, Step::Detach);
                } else {
                    let cause = Cause::new(
                        CauseKind::NeedsConsent,
                        "the node is a member and in use",
                        "add --yes to detach it first; until it is back, writes are on one node less",
                    );
                    self.fail_after(now, cause, false);
                }
            }
            (Step::Detach, Done::Plain(Step::Detach)) => self.enter(now, Phase::Seeding, self.first_on_node()),
            (Step::KeepOld, Done::Kept(kept)) => {
                self.report.keep(kept);
                self.begin(now, Step::Fill);
            }
            (Step::Fill, Done::Plain(Step::Fill)) if self.wishes.verify => self.begin(now, Step::Verify),
            (Step::Verify, Done::Plain(Step::Verify)) => {
                self.report.verified = true;
                self.enter(now, Phase::CatchingUp, Step::CatchUp);
            }
            (Step::Fill, Done::Plain(Step::Fill)) => self.enter(now, Phase::CatchingUp, Step::CatchUp),
            (Step::CatchUp, Done::Plain(Step::CatchUp)) => self.enter(now, Phase::Cut, Step::HoldRelay),
            (Step::HoldRelay, Done::Held(_)) => self.begin(now, Step::Cut),
            (Step::Cut, Done::Cut(cut)) => {
                self.report.x = Some(cut.x);
                self.report.cut_gate_closed_unix_us = Some(cut.gate_closed_unix_us);
                self.report.cut_gate_ms = Some(cut.gate_ms);
                self.enter(now, Phase::LeavingRecovery, Step::LeaveRecovery { x: cut.x });
            }
            (Step::LeaveRecovery { x }, Done::Plain(Step::LeaveRecovery { x: reached })) if x == reached => {
                self.enter(now, Phase::Draining, Step::Drain);
            }
            (Step::Drain, Done::Plain(Step::Drain)) => self.enter(now, Phase::Joining, Step::Join),
            (Step::Join, Done::Joined(joined)) => {
                self.report.join_gate_closed_unix_us = Some(joined.gate_closed_unix_us);
                self.report.join_gate_ms = Some(joined.gate_ms);
                self.report.version = Some(joined.version);
                self.set_phase(now, Phase::Member);
                self.clean_up.extend([Step::DropSlot, Step::Release]);
                self.next_clean_up(now);
            }
            (_, Done::Plain(ended)) if ended == step && self.is_decided() => self.next_clean_up(now),
            // The end of work that is not under way.
            _ => {}
        }
    }

    fn handle_step_failed(&mut self, now: Instant, cause: Cause, retriable: bool) {
        let Some(step) = self.step else { return };
        if self.is_decided() {
            self.report.warn(format!("{} failed: {cause}", describe(step)));
            self.step = None;
            self.next_clean_up(now);
            return;
        }
        if let Some(abort) = self.abort.take() {
            self.fail_after(now, abort, step == Step::Join);
            return;
        }
        let again = match step {
            Step::Cut if retriable && self.report.cut_attempts < CUT_ATTEMPTS_MAX => Some(Step::Cut),
            Step::Join if retriable && self.report.join_attempts < JOIN_ATTEMPTS_MAX => Some(Step::Drain),
            _ => None,
        };
        if let Some(step) = again {
            self.report.waits = Some(cause.what);
            if step == Step::Drain {
                self.set_phase(now, Phase::Draining);
            }
            self.step = None;
            self.retry = Some(step);
            self.deadline = Some(now + RETRY_WAIT);
            return;
        }
        // A join that says that it changed nothing has nothing to shrink out, yet asking costs nothing.
        self.fail_after(now, cause, step == Step::Join);
    }

    fn handle_progress(&mut self, now: Instant, progress: Progress) {
        let watched = matches!(
            self.step,
            Some(Step::KeepOld | Step::Fill | Step::Verify | Step::CatchUp | Step::LeaveRecovery { .. })
        );
        if !watched {
            return;
        }
        let grown = grown(self.report.progress, progress);
        // A fill that is taken up again compares from the beginning: that moves, although it is not further than before.
        if progress != self.told {
            self.told = progress;
            self.progressed(now);
        }
        self.report.progress = grown;
        self.report.rates = self.pace.handle(now, progress);
    }

    fn handle_drained(&mut self, now: Instant, drained: Drained) {
        if !matches!(self.step, Some(Step::Drain | Step::Join)) {
            return;
        }
        let grew = drained.applied > self.report.drained.applied;
        self.report.drained = Drained { peak: drained.peak.max(self.report.drained.peak), ..drained };
        if grew {
            self.progressed(now);
        }
    }

    fn progressed(&mut self, now: Instant) {
        // An attempt at the gate has a limit of its own that no counter moves.
        if let Some(step) = self.step
            && !matches!(step, Step::Cut | Step::Join)
        {
            self.deadline = Some(now + stall_max(step));
        }
    }

    /// What changes something on the node first.
    fn first_on_node(&self) -> Step {
        if self.wishes.keep_old { Step::KeepOld } else { Step::Fill }
    }

    fn enter(&mut self, now: Instant, phase: Phase, step: Step) {
        self.set_phase(now, phase);
        self.begin(now, step);
    }

    fn set_phase(&mut self, now: Instant, phase: Phase) {
        let spent = now.saturating_duration_since(self.phase_since);
        let left = self.report.phase;
        // Draining and joining may alternate; their times add up.
        if let Some(entry) = self.report.phases.iter_mut().find(|(known, _)| *known == left) {
            entry.1 += spent;
        } else {
            self.report.phases.push((left, spent));
        }
        // What the join waited for is told while it drains again, too.
        if !matches!((left, phase), (Phase::Joining, Phase::Draining) | (Phase::Draining, Phase::Joining)) {
            self.report.waits = None;
        }
        self.report.phase = phase;
        self.phase_since = now;
    }

    fn begin(&mut self, now: Instant, step: Step) {
        match step {
            Step::KeepOld | Step::Fill => self.fill_begun = true,
            Step::Cut => {
                self.cut_begun = true;
                self.report.cut_attempts += 1;
            }
            Step::Join => self.report.join_attempts += 1,
            _ => {}
        }
        self.report.slowed = None;
        self.step = Some(step);
        self.retry = None;
        self.deadline = Some(now + stall_max(step));
        self.outputs.push_back(Output::Begin(step));
    }

    /// Ends the work under way and fails.
    fn fail(&mut self, now: Instant, cause: Cause) {
        let joining = self.step == Some(Step::Join);
        if self.step.take().is_some() {
            self.outputs.push_back(Output::Cancel);
        }
        self.fail_after(now, cause, joining);
    }

    /// Fails with no work under way any more.
    fn fail_after(&mut self, now: Instant, cause: Cause, joining: bool) {
        self.step = None;
        self.retry = None;
        self.report.failed = Some(Failed { phase: self.report.phase, cause });
        if joining {
            self.clean_up.push_back(Step::ShrinkOut);
        }
        if self.cut_begun {
            self.clean_up.push_back(Step::Abandon);
        }
        if self.fill_begun {
            self.clean_up.extend([Step::Release, Step::DropSlot]);
        }
        self.next_clean_up(now);
    }

    fn next_clean_up(&mut self, now: Instant) {
        if let Some(step) = self.clean_up.pop_front() {
            self.begin(now, step);
            return;
        }
        self.step = None;
        self.deadline = None;
        if self.report.failed.is_some() {
            self.set_phase(now, Phase::Failed);
        }
        self.report.ended = true;
    }
}

/// The counters of one recovery only grow, whichever part of the agent has sent them.
fn grown(old: Progress, new: Progress) -> Progress {
    Progress {
        files: old.files.max(new.files),
        bytes_total: old.bytes_total.max(new.bytes_total),
        bytes_compared: old.bytes_compared.max(new.bytes_compared),
        bytes_same: old.bytes_same.max(new.bytes_same),
        bytes_sent: old.bytes_sent.max(new.bytes_sent),
        wal_bytes_received: old.wal_bytes_received.max(new.wal_bytes_received),
        wal_source: old.wal_source.max(new.wal_source),
        wal_replayed: old.wal_replayed.max(new.wal_replayed),
        wal_start: old.wal_start.max(new.wal_start),
        files_total: old.files_total.max(new.files_total),
        damaged_pages: old.damaged_pages.max(new.damaged_pages),
        bytes_verified: old.bytes_verified.max(new.bytes_verified),
        bytes_to_keep: old.bytes_to_keep.max(new.bytes_to_keep),
        bytes_kept: old.bytes_kept.max(new.bytes_kept),
    }
}

/// The step as the subject of a sentence.
fn describe(step: Step) -> &'static str {
    match step {
        Step::Preflight => "asking both nodes for their facts",
        Step::Detach => "detaching the member",
        Step::KeepOld => "keeping the old files",
        Step::Fill => "bringing the files",
        Step::Verify => "letting pg_verifybackup read the files",
        Step::CatchUp => "catching up with the source",
        Step::HoldRelay => "holding the relay",
        Step::Cut => "the cut",
        Step::LeaveRecovery { .. } => "replaying to the cut and leaving recovery",
        Step::Drain => "applying the backlog",
        Step::Join => "the join",
        Step::ShrinkOut => "taking the node out again",
        Step::Abandon => "dropping the backlog",
        Step::Release => "ending the connection to the node's agent",
        Step::DropSlot => "removing the replication slot on the source",
    }
}

#[cfg(test)]
#[path = "core_tests.rs"]
mod tests;
