//! The leader's PostgreSQL is lost and this proxy lives: another member leads from the next version on, in the same epoch, and nobody is
//! asked whether it may, because no other proxy can have served (`cluster::start::successor`).
//!
//! The new leader's record says so first, with the mark that it still takes over: whoever begins a reign from it, this proxy or the next one,
//! resolves what it holds prepared as a leader whose predecessor is gone. The reign that is raised next does that, before anybody is served.

use std::time::Duration;

use pgtandem_proto::membership::{MemberSet, NodeState};
use pgtandem_proto::message::PostgresState;

use crate::agent::client::ClientError;
use crate::cluster::start::{self, Candidate};
use crate::crash::CrashPoint;
use crate::proxy::reign;
use crate::replicate::hub::{Hub, store_on};

/// How long an agent may take to say what its node is. Whoever does not leaves the set.
const ASK_MS_MAX: u64 = 1_000;
/// How long an agent may take to store the set.
const STORE_MS_MAX: u64 = 5_000;

/// Who leads.
pub(super) enum Taken {
    By(MemberSet),
    /// No other member can: the leader's own restart is waited for.
    ByNobody,
    /// Whether the new leader has stored it is not known: the next reign asks.
    NotKnown,
}

/// Serves nobody from here on, and stores the set of the new leader everywhere where it can be stored.
pub(super) async fn take_over(hub: &Hub, epoch: u64) -> Taken {
    hub.leave_leader();
    // Whoever waits for a follower of this reign stops, and lets a change of the set that is under way end.
    hub.forget_followers();
    let _one_at_a_time = hub.changing.lock().await;
    hub.forget_followers();
    let set = hub.view().set.clone();
    // In mode protection nothing is acknowledged on fewer nodes: the old leader's own restart is waited for.
    if set.nodes.len() < 2 || hub.protects() {
        return Taken::ByNobody;
    }
    let asked = hub.config.nodes.iter().map(|node| async move {
        let answer = tokio::time::timeout(Duration::from_millis(ASK_MS_MAX), reign::ask_once(hub, node)).await;
        (&node.name, answer.ok().and_then(Result::ok))
    });
    let mut asked = futures_util::future::join_all(asked).await;
    let records: Vec<_> = asked
        .iter()
        .map(|(node, answer)| {
            let answer = answer.as_ref();
            (*node, answer.map(|m| (m.status.record.clone(), m.status.postgres == PostgresState::Running)))
        })
        .collect();
    let candidates: Vec<_> = records
        .iter()
        .map(|(node, answer)| Candidate { node, answer: answer.as_ref().map(|(record, runs)| (record, *runs)) })
        .collect();
    let Some(next) = start::successor(&hub.config.proxy.node, &set, epoch, &candidates) else {
        return Taken::ByNobody;
    };
    // The old leader may hold acknowledged writes that nobody else has finished, and goes its own way if it comes back: a generation without it.
    let generation = format!("{:032x}", rand::random::<u128>());
    let Some((_, Some(leader))) = asked.iter_mut().find(|(node, _)| **node == next.leader) else {
        return Taken::ByNobody;
    };
    let stored = store_on(&mut leader.control, &next, NodeState::InSync, Some(&generation), None);
    match tokio::time::timeout(Duration::from_millis(STORE_MS_MAX), stored).await {
        Ok(Ok(())) => CrashPoint::TakeoverStored.reached(&next.leader),
        // It has said no: everything is as it was.
        Ok(Err(error @ (ClientError::Failed { .. } | ClientError::Refused { .. }))) => {
            tracing::warn!(node = next.leader, %error, "it can not lead");
            return Taken::ByNobody;
        }
        _ => return Taken::NotKnown,
    }
    let others = asked.into_iter().filter(|(node, _)| **node != next.leader && set.nodes.contains(node));
    let told = others.map(|(node, answer)| tell(hub, node, answer, &set, &next, &generation));
    futures_util::future::join_all(told).await;
    tracing::warn!(from = set.leader, to = next.leader, ?next, "another member leads from here on");
    Taken::By(next)
}

/// A node that stays stores the set; one that leaves is told, or its last lease is waited out. Whoever should stay and can not store it is
/// found out by the reign that follows.
async fn tell(
    hub: &Hub,
    node: &str,
    answer: Option<reign::Member>,
    set: &MemberSet,
    next: &MemberSet,
    generation: &str,
) {
    let stays = next.nodes.iter().any(|name| name == node);
    let (state, generation) = if stays { (NodeState::InSync, Some(generation)) } else { (NodeState::Stale, None) };
    let reason = if node == set.leader {
        "its PostgreSQL was lost while it led"
    } else {
        "it did not answer, or did not run, when the leader was lost"
    };
    if !stays {
        hub.note_reason(node, reason);
    }
    let note = (!stays).then_some(reason);
    let stored = async {
        match answer {
            Some(mut member) => store_on(&mut member.control, next, state, generation, note).await.is_ok(),
            None => false,
        }
    };
    let stored = tokio::time::timeout(Duration::from_millis(STORE_MS_MAX), stored).await.unwrap_or(false);
    if !stored {
        tracing::warn!(node, "could not be told who leads");
        if !stays {
            hub.wait_lease_out(node).await;
        }
    }
    CrashPoint::TakeoverTold.reached(node);
}
