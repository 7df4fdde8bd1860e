//! What the commands do inside the running proxy: status, recover, detach.

use std::io;
use std::sync::Arc;

use pgtandem_proto::message::NodeStatus;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::timeout;

use super::message::{ControlAnswer, ControlRequest, Detached, Outcome, Switched};
use super::server::{Answers, Handler};
use crate::cluster::members;
use crate::config::NodeConfig;
use crate::observe::explain;
use crate::observe::progress::RecoveryView;
use crate::observe::status::{ClusterStatus, NodeFindings, Problem, StatusSource};
use crate::recovery::agents::{self, Agents};
use crate::recovery::contact::{CONTACT_MAX, Seen, silent};
use crate::recovery::core::Wishes;
use crate::recovery::recoveries::Recoveries;
use crate::recovery::replication::Replication;
use crate::recovery::report::{Cause, CauseKind, Phase, Report};

/// Everything that the commands need of a running proxy.
#[derive(Debug)]
pub struct Operations<R, A, S> {
    pub cluster: String,
    pub nodes: Vec<NodeConfig>,
    pub recoveries: Arc<Recoveries<R, A>>,
    pub seen: Arc<Seen>,
    pub source: Arc<S>,
}

impl<R: Replication + 'static, A: Agents, S: StatusSource> Handler for Operations<R, A, S> {
    async fn handle(&self, request: ControlRequest, answers: &mut Answers) -> io::Result<ControlAnswer> {
        if let Some(why) = self.source.waiting().filter(|_| request != ControlRequest::Status) {
            let Problem { what, hint } = explain::waiting(why);
            return Ok(ControlAnswer::Error { error: Cause::new(CauseKind::Waiting, what, hint).into() });
        }
        let outcome = match request {
            ControlRequest::Status => Ok(Outcome::Status { status: Box::new(self.status().await) }),
            ControlRequest::Recover { node, yes, verify, keep_old } => {
                let wishes = Wishes { consent: yes, verify, keep_old };
                return self.recover(&node, wishes, answers).await;
            }
            ControlRequest::Switch { node } => self.switch(&node).await.map(Outcome::Switch),
            ControlRequest::Detach { node } => self.detach(&node).await.map(Outcome::Detach),
        };
        Ok(match outcome {
            Ok(result) => ControlAnswer::Result { result },
            Err(cause) => ControlAnswer::Error { error: cause.into() },
        })
    }
}

impl<R: Replication + 'static, A: Agents, S: StatusSource> Operations<R, A, S> {
    /// Asks every agent, all at once, with a short limit; what one does not answer is taken from its last contact.
    pub async fn status(&self) -> ClusterStatus {
        let mut asked = JoinSet::new();
        for (place, node) in self.nodes.iter().enumerate() {
            let (agents, name) = (self.recoveries.agents().clone(), node.name.clone());
            asked.spawn(async move { (place, ask(&*agents, &name).await) });
        }
        let mut given: Vec<_> = self.nodes.iter().map(|node| Err(silent(&node.name).what)).collect();
        while let Some(joined) = asked.join_next().await {
            if let Ok((place, answer)) = joined
                && let Some(slot) = given.get_mut(place)
            {
                *slot = answer;
            }
        }
        let findings: Vec<_> = self.nodes.iter().zip(given).map(|(node, answer)| self.findings(node, answer)).collect();
        if let Some(why) = self.source.waiting() {
            // What this proxy knows of members is not true: the records say more.
            let sets = findings.iter().filter_map(|found| found.answer.as_ref().ok()?.record.members.as_ref());
            let set = sets.max_by_key(|set| members::number(set)).cloned();
            let mut status = ClusterStatus::new(&self.cluster, set.as_ref(), None, false, findings);
            status.set_waiting(why);
            return status;
        }
        let set = self.recoveries.replication().members();
        let mut status = ClusterStatus::new(&self.cluster, Some(&set), Some(self.source.counters()), true, findings);
        status.once = self.source.once();
        let held = self.source.missing().into_iter().map(|(node, why)| explain::held(&node, &why));
        let leaving = self.source.leaving().into_iter().map(|(node, why)| explain::leaving(&node, &why));
        let not_served = self.source.not_served().map(|why| explain::not_served(&why));
        status.problems.splice(0..0, not_served.into_iter().chain(held).chain(leaving));
        status
    }

    fn findings(&self, node: &NodeConfig, answer: Result<NodeStatus, String>) -> NodeFindings {
        // A recovery that was not begun says nothing about the node.
        let begun = self
            .recoveries
            .report(&node.name)
            .filter(|report| report.failed.as_ref().is_none_or(|failed| failed.cause.kind != CauseKind::NeedsConsent));
        NodeFindings {
            name: node.name.clone(),
            address: node.agent.to_string(),
            earlier: self.seen.get(&node.name).status,
            answer,
            last_error: self.source.last_error(&node.name),
            away: self.source.away(&node.name),
            recovering: begun.as_ref().is_some_and(|report| !report.ended),
            recovery: begun.as_ref().map(|report| RecoveryView::new(&node.name, report)),
        }
    }

    /// Starts a recovery, or looks on at the one under way, until it ends. It goes on when the command goes away.
    async fn recover(&self, node: &str, wishes: Wishes, answers: &mut Answers) -> io::Result<ControlAnswer> {
        let Some(started) = self.recoveries.start(node, wishes) else {
            return Ok(ControlAnswer::Error { error: self.unknown(node).into() });
        };
        let mut report = started.report;
        loop {
            let now = report.borrow_and_update().clone();
            if now.ended {
                return Ok(last_word(node, &now));
            }
            answers.send(&ControlAnswer::Progress(Box::new(RecoveryView::new(node, &now)))).await?;
            tokio::time::sleep(PROGRESS_EVERY).await;
            if report.changed().await.is_err() && !report.borrow().ended {
                return Ok(ControlAnswer::Error { error: vanished(node).into() });
            }
        }
    }

    async fn switch(&self, node: &str) -> Result<Switched, Cause> {
        if !self.recoveries.nodes().iter().any(|known| known == node) {
            return Err(self.unknown(node));
        }
        let set = self.recoveries.replication().switch(node).await?;
        Ok(Switched { node: node.into(), members: set.nodes, epoch: set.epoch })
    }

    async fn detach(&self, node: &str) -> Result<Detached, Cause> {
        if !self.recoveries.nodes().iter().any(|known| known == node) {
            return Err(self.unknown(node));
        }
        if let Some(mut report) = self.recoveries.abort(node) {
            wait_for_end(&mut report).await;
        }
        let replication = self.recoveries.replication();
        let set = replication.members();
        if !members::contains(&set, node) {
            // It was lost, and would come back by itself.
            replication.abandon(node).await;
        }
        let set = replication.members();
        if !members::contains(&set, node) {
            return Ok(Detached { node: node.into(), was_member: false, members: set.nodes, version: set.version });
        }
        if set.leader == node {
            return Err(Cause::new(
                CauseKind::Refused,
                format!("{node} is the leader and can not be detached"),
                "make another node the leader first: pgtandem switch NODE",
            ));
        }
        let set = replication.remove(node, "an operator detached it").await?;
        Ok(Detached { node: node.into(), was_member: true, members: set.nodes, version: set.version })
    }

    fn unknown(&self, node: &str) -> Cause {
        let names: Vec<_> = self.nodes.iter().map(|known| known.name.as_str()).collect();
        Cause::new(
            CauseKind::Refused,
            format!("no node is named {node}; the configuration has {}", names.join(", ")),
            "give one of these names",
        )
    }
}

/// At most this often a line of progress is written to a command.
const PROGRESS_EVERY: std::time::Duration = std::time::Duration::from_millis(50);

async fn wait_for_end(report: &mut watch::Receiver<Report>) {
    // An error: its task is gone, which is an end, too.
    let _ = report.wait_for(|report| report.ended).await;
}

async fn ask<A: Agents>(clients: &A, node: &str) -> Result<NodeStatus, String> {
    let answer = async {
        let mut control = clients.connect(node).await?;
        agents::status(&mut control).await
    };
    match timeout(CONTACT_MAX, answer).await {
        Ok(answer) => answer.map_err(|failure| failure.what),
        Err(_) => Err(silent(node).what),
    }
}

fn last_word(node: &str, report: &Report) -> ControlAnswer {
    match &report.failed {
        None if report.phase == Phase::Member => {
            ControlAnswer::Result { result: Outcome::Recover { recovery: Box::new(RecoveryView::new(node, report)) } }
        }
        None => ControlAnswer::Error { error: vanished(node).into() },
        Some(failed) => ControlAnswer::Error { error: failed.clone().into() },
    }
}

fn vanished(node: &str) -> Cause {
    Cause::new(
        CauseKind::Stopping,
        format!("the recovery of {node} ended without a last word"),
        "look at the proxy's log, then at pgtandem status",
    )
}
