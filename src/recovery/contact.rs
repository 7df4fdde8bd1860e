//! The proxy's contact with every agent, once a second: it remembers what they say for `status`, and tells a node that was
//! left behind what it is. That writes records only in the direction that the member set already has; agents refuse what is older.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use pgtandem_proto::membership::{MemberSet, NodeState, Record};
use pgtandem_proto::message::{Failure, FailureCode, NodeStatus, Request};
use tokio::task::JoinSet;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use super::agents::{self, Agents};
use super::replication::Replication;
use crate::cluster::{members, record};

/// Wait between two contacts with one agent.
pub const CONTACT_EVERY: Duration = Duration::from_secs(1);
/// Longest wait for an agent's answer in one contact.
pub const CONTACT_MAX: Duration = Duration::from_secs(3);

/// The last answer of each agent. Its size is that of the configuration.
#[derive(Debug, Default)]
pub struct Seen {
    nodes: Mutex<HashMap<String, LastSeen>>,
}

/// What is known of one agent.
#[derive(Clone, Debug, Default)]
pub struct LastSeen {
    pub status: Option<NodeStatus>,
    /// Why the last contact failed; `None` if it did not.
    pub failure: Option<Failure>,
}

impl Seen {
    #[must_use]
    pub fn get(&self, node: &str) -> LastSeen {
        self.nodes.lock().unwrap_or_else(PoisonError::into_inner).get(node).cloned().unwrap_or_default()
    }

    /// Remembers an answer, or why there was none; an earlier status stays. Returns whether reachability changed.
    pub fn put(&self, node: &str, answer: Result<NodeStatus, Failure>) -> bool {
        let mut nodes = self.nodes.lock().unwrap_or_else(PoisonError::into_inner);
        let known = nodes.entry(node.to_owned()).or_default();
        let was_failed = known.failure.is_some();
        match answer {
            Ok(status) => {
                known.status = Some(status);
                known.failure = None;
            }
            Err(failure) => known.failure = Some(failure),
        }
        was_failed != known.failure.is_some()
    }
}

/// What a contact has to write into a node's record, if anything. `leader`: the leader's record, if it is known under this set.
/// Pure.
#[must_use]
pub fn duty(node: &str, set: &MemberSet, leader: Option<&Record>, status: &NodeStatus) -> Option<Request> {
    let record = &status.record;
    let recorded = record.members.as_ref().map_or((0, 0), members::number);
    let ours = members::number(set);
    if members::contains(set, node) || recorded > ours || record.promised > set.epoch {
        // Nothing to tell to a member, nor to one that knows more than we do.
        return None;
    }
    // Whether its data went another way than the leader's is told by the generations of both.
    let leader = leader.filter(|leader| leader.members.as_ref() == Some(set))?;
    let state = record::left_behind(record, &leader.generations);
    let is_news = match record.state {
        NodeState::InSync => true,
        NodeState::Stale | NodeState::Suspect => state == NodeState::Forked,
        _ => false,
    };
    is_news.then(|| Request::Store { members: set.clone(), state, uncertain: false, new_generation: None, note: None })
}

/// Keeps contact with every node until `stop`. One connection and one task for each, so that an agent that does not
/// answer holds up nobody.
pub async fn run<R: Replication + 'static, A: Agents>(
    replication: Arc<R>,
    agents: Arc<A>,
    nodes: Vec<String>,
    seen: Arc<Seen>,
    stop: CancellationToken,
) {
    let mut tasks = JoinSet::new();
    for node in nodes {
        let (replication, agents, seen) = (replication.clone(), agents.clone(), seen.clone());
        tasks.spawn(stop.clone().run_until_cancelled_owned(async move {
            keep_contact(&*replication, &*agents, &node, &seen).await;
        }));
    }
    while tasks.join_next().await.is_some() {}
}

async fn keep_contact<R: Replication, A: Agents>(replication: &R, agents: &A, node: &str, seen: &Seen) {
    let mut control: Option<A::Control> = None;
    loop {
        // Taken out of its place: a contact that fails or is late ends its connection.
        let answer = timeout(CONTACT_MAX, contact(replication, agents, node, seen, control.take()))
            .await
            .unwrap_or_else(|_| Err(silent(node)));
        let (answer, failure) = match answer {
            Ok((kept, status)) => {
                control = Some(kept);
                (Ok(status), None)
            }
            Err(failure) => (Err(failure.clone()), Some(failure)),
        };
        if seen.put(node, answer) {
            match failure {
                Some(failure) => warn!(node, hint = failure.hint, "no contact with the agent: {}", failure.what),
                None => info!(node, "contact with the agent again"),
            }
        }
        tokio::time::sleep(CONTACT_EVERY).await;
    }
}

async fn contact<R: Replication, A: Agents>(
    replication: &R,
    agents: &A,
    node: &str,
    seen: &Seen,
    control: Option<A::Control>,
) -> Result<(A::Control, NodeStatus), Failure> {
    let mut control = match control {
        Some(control) => control,
        None => agents.connect(node).await?,
    };
    let mut status = agents::status(&mut control).await?;
    // The set is read after the record: a record that is newer than the set is left alone.
    if replication.epoch() == 0 {
        // Nobody is served: this proxy decides nothing about anybody.
        return Ok((control, status));
    }
    let set = replication.members();
    let leader = seen.get(&set.leader).status.map(|status| status.record);
    if let Some(request) = duty(node, &set, leader.as_ref(), &status) {
        let told = request.clone();
        match agents::order(&mut control, request, &mut |_| {}).await {
            Ok(()) => {
                if let Request::Store { state, .. } = told {
                    info!(node, ?state, "wrote the node's record");
                }
                status = agents::status(&mut control).await?;
            }
            // The set has moved on meanwhile; the next contact sees the new one.
            Err(failure) if failure.code == FailureCode::OldEpoch => {}
            Err(failure) => return Err(failure),
        }
    }
    Ok((control, status))
}

pub(crate) fn silent(node: &str) -> Failure {
    Failure {
        code: FailureCode::Peer,
        what: format!("the agent of {node} did not answer within {} s", CONTACT_MAX.as_secs()),
        hint: format!("look at the agent's log on the host of {node}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cluster::record::{blank, running};

    fn status(state: NodeState, uncertain: bool, set: &MemberSet) -> NodeStatus {
        running(Record { promised: set.epoch, members: Some(set.clone()), state, uncertain, ..blank("shop", "b") })
    }

    fn told(node: &str, set: &MemberSet, status: &NodeStatus) -> Option<(NodeState, bool)> {
        let leader = Record { generations: vec!["g2".into(), "g1".into()], ..status.record.clone() };
        let leader = Record { members: Some(set.clone()), ..leader };
        match duty(node, set, Some(&leader), status) {
            Some(Request::Store { state, uncertain, .. }) => Some((state, uncertain)),
            _ => None,
        }
    }

    #[test]
    fn a_node_that_was_left_behind_is_told() {
        let before = members::with(&members::first("a"), "b").unwrap();
        let now = members::without(&before, "b").unwrap();
        assert_eq!(told("b", &now, &status(NodeState::InSync, true, &before)), Some((NodeState::Stale, false)));
        let next_reign = members::in_epoch(&now, 7, "a").unwrap();
        assert_eq!(told("b", &next_reign, &status(NodeState::InSync, false, &before)), Some((NodeState::Stale, false)));
    }

    #[test]
    fn a_node_that_went_on_alone_is_kept_for_a_person() {
        let before = members::with(&members::first("a"), "b").unwrap();
        let now = members::in_epoch(&members::without(&before, "b").unwrap(), 7, "a").unwrap();
        let with = |generation: &str| {
            let status = status(NodeState::InSync, true, &before);
            NodeStatus {
                record: Record { generations: vec![generation.into(), "g1".into()], ..status.record },
                ..status
            }
        };
        assert_eq!(told("b", &now, &with("g2")), Some((NodeState::Stale, false)));
        assert_eq!(told("b", &now, &with("alone")), Some((NodeState::Forked, false)));
        // It was left behind, and the leader that left it behind is not the one that leads now.
        let stale = |generation| NodeStatus {
            record: Record { state: NodeState::Stale, ..with(generation).record },
            ..with(generation)
        };
        assert_eq!(told("b", &now, &stale("alone")), Some((NodeState::Forked, false)));
        assert_eq!(told("b", &now, &stale("g2")), None);
        assert_eq!(duty("b", &now, None, &with("g2")), None, "the leader's generations are not known yet");
    }

    #[test]
    fn nothing_is_told_to_a_member() {
        let set = members::with(&members::first("a"), "b").unwrap();
        assert_eq!(told("b", &set, &status(NodeState::InSync, true, &set)), None);
    }

    #[test]
    fn a_node_that_knows_more_than_we_do_is_left_alone() {
        let before = members::first("a");
        let joined = members::with(&before, "b").unwrap();
        assert_eq!(duty("b", &before, None, &status(NodeState::InSync, false, &joined)), None);
    }

    #[test]
    fn nothing_is_told_to_a_node_that_does_not_serve() {
        let set = members::first("a");
        for state in
            [NodeState::Seeding, NodeState::CatchingUp, NodeState::Joining, NodeState::Forked, NodeState::Blank]
        {
            assert_eq!(duty("b", &set, None, &status(state, true, &set)), None);
        }
    }
}
