//! Runs one recovery: takes work from the state machine, does it with the agents and the proxy, and reports.
//!
//! Thin: what comes next and how long it may take is decided in `core`. The control connection to the node's agent is
//! kept from Preflight to the end, because what the agent does for a recovery ends with that connection.

use std::convert::Infallible;
use std::pin::Pin;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use pgtandem_proto::membership::{Epoch, NodeState};
use pgtandem_proto::message::{Failure, Progress, Request};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use super::agents::{self, Agents};
use super::core::{Done, Input, Output, Recovery, Step, Wishes};
use super::limits::{LAG_BYTES_MAX, PACE_EVERY, PACE_MAX, USUAL_OVER};
use super::preflight;
use super::replication::{Drained, Replication};
use super::report::{Cause, CauseKind, Report};
use super::throttle::{self, Slowed, Throttle};
use crate::cluster::members;

/// How one recovery ends early.
#[derive(Clone, Debug, Default)]
pub struct Stop {
    /// An operator wants it to end.
    pub aborted: CancellationToken,
    /// The proxy stops.
    pub proxy: CancellationToken,
}

/// Recovers `node`, and publishes every change of the report. Never panics, always ends: as a member, or with
/// [`Report::failed`].
pub async fn run<R: Replication, A: Agents>(
    replication: &R,
    agents: &A,
    node: &str,
    wishes: Wishes,
    published: &watch::Sender<Report>,
    stop: &Stop,
) -> Report {
    let shell = Shell {
        replication,
        agents,
        node,
        wishes,
        epoch: replication.epoch(),
        target: Mutex::new(None),
        counters: watch::Sender::new(Counters::default()),
    };
    let mut counters = shell.counters.subscribe();
    let mut recovery = Recovery::new(Instant::now(), wishes);
    let mut work: Option<Work<'_>> = None;
    let mut stop_wanted = true;
    let mut phase = None;
    loop {
        while let Some(output) = recovery.poll_output() {
            match output {
                Output::Begin(step) => work = Some(Box::pin(shell.perform(step))),
                Output::Cancel => work = None,
            }
        }
        let report = recovery.report();
        if phase != Some(report.phase) {
            phase = Some(report.phase);
            info!(node, phase = report.phase.name(), "recovery");
        }
        published.send_replace(report.clone());
        if recovery.is_ended() {
            if let Some(failed) = &report.failed {
                warn!(node, phase = failed.phase.name(), hint = failed.cause.hint, "recovery failed: {}", failed.cause);
            }
            return report.clone();
        }
        let deadline = recovery.poll_timeout().map(tokio::time::Instant::from_std);
        tokio::select! {
            input = under_way(&mut work) => {
                work = None;
                // The last counters of this work belong to it.
                count(&mut recovery, &mut counters);
                recovery.handle(Instant::now(), input);
            }
            Ok(()) = counters.changed() => count(&mut recovery, &mut counters),
            () = until(deadline) => recovery.handle_timeout(Instant::now()),
            cause = stopped(stop), if stop_wanted => {
                stop_wanted = false;
                recovery.handle(Instant::now(), Input::Abort(cause));
            }
        }
    }
}

fn count(recovery: &mut Recovery, counters: &mut watch::Receiver<Counters>) {
    let now = counters.borrow_and_update().clone();
    recovery.handle(Instant::now(), Input::Progress(now.progress));
    recovery.handle(Instant::now(), Input::Drained(now.drained));
    recovery.handle(Instant::now(), Input::Slowed(now.slowed));
    if let Some(waits) = now.waits {
        recovery.handle(Instant::now(), Input::Waits(waits));
    }
}

type Work<'a> = Pin<Box<dyn Future<Output = Input> + Send + 'a>>;

async fn under_way(work: &mut Option<Work<'_>>) -> Input {
    match work {
        Some(work) => work.await,
        None => std::future::pending().await,
    }
}

async fn until(deadline: Option<tokio::time::Instant>) {
    match deadline {
        Some(deadline) => tokio::time::sleep_until(deadline).await,
        None => std::future::pending().await,
    }
}

async fn stopped(stop: &Stop) -> Cause {
    tokio::select! {
        () = stop.aborted.cancelled() => Cause::new(
            CauseKind::Stopping,
            "the recovery was ended by an operator",
            "run it again when you want the node back; it starts from what is there",
        ),
        () = stop.proxy.cancelled() => Cause::new(
            CauseKind::Stopping,
            "the proxy is stopping",
            "start the proxy and run the recovery again; it starts from what is there",
        ),
    }
}

#[derive(Clone, Debug, Default)]
struct Counters {
    progress: Progress,
    drained: Drained,
    /// What the join waits for.
    waits: Option<String>,
    slowed: Option<Slowed>,
}

struct Shell<'a, R, A: Agents> {
    replication: &'a R,
    agents: &'a A,
    node: &'a str,
    wishes: Wishes,
    /// The reign in which this recovery was begun; it does not outlive it.
    epoch: Epoch,
    /// The one connection to the node's agent. Out of its place while a request is under way on it, so that work
    /// which is dropped drops the connection, too.
    target: Mutex<Option<A::Control>>,
    /// Latest values only: a slow reader never holds up a fill.
    counters: watch::Sender<Counters>,
}

/// Why a step failed, and whether it may be begun again.
struct Broken {
    cause: Cause,
    retriable: bool,
}

impl From<Cause> for Broken {
    fn from(cause: Cause) -> Self {
        Self { cause, retriable: false }
    }
}

impl From<super::replication::ReplicationError> for Broken {
    fn from(error: super::replication::ReplicationError) -> Self {
        Self { retriable: error.is_retriable(), cause: error.into() }
    }
}

impl<R: Replication, A: Agents> Shell<'_, R, A> {
    async fn perform(&self, step: Step) -> Input {
        match self.try_perform(step).await {
            Ok(done) => Input::Done(done),
            Err(Broken { cause, retriable }) => Input::StepFailed { cause, retriable },
        }
    }

    async fn try_perform(&self, step: Step) -> Result<Done, Broken> {
        let node = self.node;
        match step {
            Step::Preflight => return self.preflight().await,
            Step::Detach => {
                self.replication.remove(node, "an operator detached it in order to recover it").await?;
            }
            Step::KeepOld => {
                self.same_reign()?;
                let source = self.replication.members().leader;
                let mut control = self.take_target()?;
                let counters = &self.counters;
                let mut on_progress = |progress| counters.send_modify(|now| now.progress = progress);
                let kept =
                    agents::keep_old(&mut control, self.epoch, source, &mut on_progress).await.map_err(of_node)?;
                self.put_target(control);
                return Ok(Done::Kept(kept));
            }
            Step::Fill => {
                self.same_reign()?;
                let source = self.replication.members().leader;
                // As it is before anything is read there.
                let usual = self.replication.commit_median(USUAL_OVER);
                tokio::select! {
                    biased;
                    filled = self.order(Request::Fill { epoch: self.epoch, source: source.clone() }) => filled?,
                    never = self.pace(&source, usual) => match never {},
                }
            }
            Step::Verify => self.order(Request::VerifyFill).await?,
            Step::CatchUp => {
                self.same_reign()?;
                let source = self.replication.members().leader;
                let request = Request::CatchUp { epoch: self.epoch, source, lag_bytes_max: LAG_BYTES_MAX };
                self.order(request).await?;
            }
            Step::HoldRelay => {
                let mut control = self.take_target()?;
                let held = agents::hold(&mut control).await.map_err(of_node)?;
                self.put_target(control);
                return Ok(Done::Held(held));
            }
            Step::Cut => {
                self.same_reign()?;
                return Ok(Done::Cut(self.replication.cut(node).await?));
            }
            Step::LeaveRecovery { x } => self.order(Request::LeaveRecovery { x }).await?,
            Step::Drain => {
                self.same_reign()?;
                let counters = &self.counters;
                let on_progress = |drained| counters.send_modify(|now| now.drained = drained);
                self.replication.drain(node, &on_progress).await?;
            }
            Step::Join => {
                self.same_reign()?;
                let members = self.replication.members();
                self.order(Request::Store {
                    members,
                    state: NodeState::Joining,
                    uncertain: true,
                    new_generation: None,
                    note: None,
                })
                .await?;
                let counters = &self.counters;
                let on_wait = |why: &str| counters.send_modify(|now| now.waits = Some(why.to_owned()));
                let joined = self.replication.join(node, &on_wait).await;
                counters.send_modify(|now| now.waits = None);
                return Ok(Done::Joined(joined?));
            }
            Step::ShrinkOut => {
                if members::contains(&self.replication.members(), node) {
                    self.replication.remove(node, "its join failed").await?;
                }
            }
            Step::Abandon => self.replication.abandon(node).await,
            Step::Release => drop(self.take_target().ok()),
            Step::DropSlot => {
                let mut source = self.source().await?;
                let request = Request::DropSlot { node: node.into() };
                agents::order(&mut source, request, &mut |_| {}).await.map_err(of_source)?;
            }
        }
        Ok(Done::Plain(step))
    }

    async fn preflight(&self) -> Result<Done, Broken> {
        // One that was lost would come back by itself; from here on it does not, or it is a member already.
        self.replication.abandon(self.node).await;
        let set = self.replication.members();
        preflight::judge_leader(self.node, &set)?;
        preflight::judge_reign(self.epoch)?;
        let mut target = self.agents.connect(self.node).await.map_err(of_node)?;
        let mut source = self.source().await?;
        let target_status = agents::status(&mut target).await.map_err(of_node)?;
        let is_member = preflight::judge_record(self.node, &set, self.epoch, &target_status)?;
        if is_member && !self.wishes.consent {
            return Ok(Done::Preflight { is_member, warnings: Vec::new() });
        }
        let source_status = agents::status(&mut source).await.map_err(of_source)?;
        preflight::judge_source(&set, &source_status)?;
        preflight::judge_fork(self.node, &source_status.record, &target_status.record)?;
        let source_facts = agents::facts(&mut source).await.map_err(of_source)?;
        let target_facts = agents::facts(&mut target).await.map_err(of_node)?;
        if self.wishes.verify {
            preflight::judge_programs(self.node, &target_facts)?;
        }
        let mut warnings = preflight::judge_facts(self.node, &set.leader, &source_facts, &target_facts)?;
        if self.wishes.keep_old {
            let old = agents::old_data(&mut target).await.map_err(of_node)?;
            warnings.extend(preflight::judge_room(self.node, source_facts.data_bytes.unwrap_or(0), &old)?);
        }
        let promise = Request::Promise { epoch: self.epoch };
        agents::order(&mut target, promise, &mut |_| {}).await.map_err(of_node)?;
        if !is_member && target_status.record.state == NodeState::InSync {
            // It was left behind without being told; no agent lets a node be filled that believes to be a member.
            let stale = Request::Store {
                members: set,
                state: NodeState::Stale,
                uncertain: false,
                new_generation: None,
                note: None,
            };
            agents::order(&mut target, stale, &mut |_| {}).await.map_err(of_node)?;
        }
        self.put_target(target);
        Ok(Done::Preflight { is_member, warnings })
    }

    /// Sends a request to the node's agent and waits for its end; its counters are published.
    async fn order(&self, request: Request) -> Result<(), Broken> {
        let mut control = self.take_target()?;
        let counters = &self.counters;
        let mut on_progress = |progress| counters.send_modify(|now| now.progress = progress);
        let fills = matches!(request, Request::Fill { .. } | Request::VerifyFill | Request::CatchUp { .. });
        agents::order(&mut control, request, &mut on_progress).await.map_err(of_node)?;
        // Counters come twice a second: what was faster than that is asked for.
        if fills && let Some(progress) = agents::status(&mut control).await.map_err(of_node)?.progress {
            counters.send_modify(|now| now.progress = progress);
        }
        self.put_target(control);
        Ok(())
    }

    /// Slows the fill down while commits take too long. What it can not tell the source it tells it a second later.
    async fn pace(&self, source: &str, usual: Option<Duration>) -> Infallible {
        let percent_max = self.replication.fill_latency_percent_max();
        if percent_max == 0 || usual.is_none() {
            return std::future::pending().await;
        }
        let mut throttle = Throttle::new(percent_max, usual);
        let mut control: Option<A::Control> = None;
        let (mut before, mut told) = (self.counters.borrow().progress.bytes_compared, 0);
        loop {
            tokio::time::sleep(PACE_EVERY).await;
            let compared = self.counters.borrow().progress.bytes_compared;
            let now = self.replication.commit_median(throttle::SECONDS * PACE_EVERY);
            let slowed = throttle.handle(now, compared.saturating_sub(before));
            before = compared;
            let limit = slowed.map_or(0, |slowed| slowed.bytes_per_s_max);
            if limit != told {
                info!(node = self.node, bytes_per_s_max = limit, ?slowed, "the fill is told how fast it may read");
                self.counters.send_modify(|now| now.slowed = slowed);
            }
            // A fill that was taken up again after a broken connection does not know its limit.
            if limit == 0 && told == 0 {
                continue;
            }
            told = limit;
            let telling = async {
                let mut asked = match control.take() {
                    Some(asked) => asked,
                    None => self.agents.connect(source).await?,
                };
                let request = Request::Pace { node: self.node.into(), bytes_per_s_max: limit };
                agents::order(&mut asked, request, &mut |_| {}).await?;
                Ok::<_, Failure>(asked)
            };
            control = tokio::time::timeout(PACE_MAX, telling).await.ok().and_then(Result::ok);
        }
    }

    async fn source(&self) -> Result<A::Control, Broken> {
        let leader = self.replication.members().leader;
        Ok(self.agents.connect(&leader).await.map_err(of_source)?)
    }

    fn same_reign(&self) -> Result<(), Cause> {
        if self.replication.epoch() == self.epoch {
            return Ok(());
        }
        Err(Cause::new(
            CauseKind::Stopping,
            format!("the reign of epoch {} ended while {} was being recovered", self.epoch, self.node),
            "run the recovery again; it starts from what is there",
        ))
    }

    fn take_target(&self) -> Result<A::Control, Cause> {
        self.target.lock().unwrap_or_else(PoisonError::into_inner).take().ok_or_else(|| {
            Cause::new(
                CauseKind::Node,
                format!("the connection to the agent of {} has ended", self.node),
                "run the recovery again; it starts from what is there",
            )
        })
    }

    fn put_target(&self, control: A::Control) {
        *self.target.lock().unwrap_or_else(PoisonError::into_inner) = Some(control);
    }
}

fn of_node(failure: Failure) -> Cause {
    Cause::new(CauseKind::Node, failure.what, failure.hint)
}

fn of_source(failure: Failure) -> Cause {
    Cause::new(CauseKind::Source, failure.what, failure.hint)
}

#[cfg(test)]
#[path = "runner_tests.rs"]
mod tests;
