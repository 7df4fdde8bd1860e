//! A member is lost, or taken out by a person: the smaller set is recorded on those that remain, and only then the first commit without it
//! is acknowledged.

use std::time::Duration;

use pgtandem_proto::membership::{MemberSet, NodeState};

use crate::agent::client::ClientError;
use crate::cluster::members;
use crate::crash::CrashPoint;
use crate::replicate::hub::{Follower, Hub, HubError};

/// How long a node that is leaving the set may take to be told so.
const TELL_MS_MAX: u64 = 1000;
/// How long the leader's agent may take to store a smaller set before the waiting commits fail.
const STORE_MS_MAX: u64 = 60_000;
/// How long another member may take before it counts as lost, too.
const MEMBER_STORE_MS_MAX: u64 = 5_000;
/// Pause between two attempts to store.
const STORE_RETRY_MS: u64 = 200;

impl Hub {
    /// Takes a follower out of the member set, or waits until a person does. When this returns, the smaller set is recorded on the
    /// remaining members, and commits may be acknowledged without it; or the epoch is over. Does nothing if it left already.
    ///
    /// # Errors
    /// If the smaller set can not be recorded within the limit, or nobody took it out: no commit may be acknowledged then.
    pub async fn lost(&self, follower: &Follower, state: NodeState, reason: &str) -> Result<(), HubError> {
        if self.protects() {
            return self.hold(follower, state, reason).await;
        }
        let _one_at_a_time = self.changing.lock().await;
        let view = self.view();
        if follower.gone.is_cancelled() || !view.followers.iter().any(|f| f.id == follower.id) {
            return Ok(());
        }
        tracing::warn!(node = %follower.node.name, ?state, reason, "follower leaves the member set");
        self.shrink(&view.set, &follower.node.name, state, reason, true).await
    }

    /// As [`Self::lost`], by name and for a person.
    ///
    /// # Errors
    /// If the node is not a follower in the set, or the set can not be recorded.
    pub async fn remove_member(&self, name: &str, reason: &str) -> Result<MemberSet, HubError> {
        let _one_at_a_time = self.changing.lock().await;
        let view = self.view();
        self.shrink(&view.set, name, NodeState::Stale, reason, false).await?;
        Ok(self.view().set.clone())
    }

    /// Takes one member out, and in the same step each other follower that can not be told of it: it is as lost, and two that are lost at once
    /// must not wait for each other. `returns`: what they miss from here on is kept for them.
    async fn shrink(
        &self,
        set: &MemberSet,
        name: &str,
        state: NodeState,
        reason: &str,
        returns: bool,
    ) -> Result<(), HubError> {
        let _shown = self.leaving.listed(name, reason);
        let mut leaving = vec![name.to_owned()];
        let leader_lost = self.leader_lost();
        if returns {
            self.keep_for(name, state);
        }
        let done = tokio::select! {
            biased;
            done = self.shrink_to_those_who_hear(set, name, state, reason, &mut leaving) => done,
            // Whoever leads next leaves out who does not answer then; it must not wait for a leader that does not hear of this.
            () = leader_lost.cancelled() => Err(HubError::NotStored {
                node: name.to_owned(),
                why: "the leader was lost meanwhile".to_owned(),
            }),
        };
        if done.is_err() {
            // They are members still.
            for name in &leaving {
                self.away.remove(name);
            }
        }
        done
    }

    async fn shrink_to_those_who_hear(
        &self,
        set: &MemberSet,
        name: &str,
        state: NodeState,
        reason: &str,
        leaving: &mut Vec<String>,
    ) -> Result<(), HubError> {
        let smaller = members::without(set, name)?;
        CrashPoint::ShrinkBegun.reached(name);
        self.dismiss(&smaller, name, state, reason).await?;
        self.record_without(smaller, name, leaving).await
    }

    /// The one that leaves needs no more telling: stores the smaller set on those that remain, and shows it. Each other follower that can not
    /// be told leaves, too.
    pub(super) async fn record_without(
        &self,
        mut smaller: MemberSet,
        name: &str,
        leaving: &mut Vec<String>,
    ) -> Result<(), HubError> {
        let mut unheard = false;
        while let Some((member, why)) = self.store_on_members(&smaller, name).await? {
            if self.protects() {
                // It stays; whatever it may have missed is settled before anything is acknowledged again.
                unheard = true;
                break;
            }
            smaller = members::without(&smaller, &member)?;
            let reason = format!("it could not be told that {name} has left: {why}");
            tracing::warn!(node = member, reason, "follower leaves the member set, too");
            leaving.push(member.clone());
            self.keep_for(&member, NodeState::Stale);
            self.dismiss(&smaller, &member, NodeState::Stale, &reason).await?;
        }
        if unheard {
            self.end_reign();
        }
        self.show(smaller);
        CrashPoint::ShrinkShown.reached(name);
        Ok(())
    }

    /// Tells a node that it is left behind, or waits its lease out.
    async fn dismiss(&self, smaller: &MemberSet, name: &str, state: NodeState, reason: &str) -> Result<(), HubError> {
        if !self.tell_left(smaller, name, state, reason).await? {
            tracing::info!(node = name, "its lease is waited out");
            self.wait_lease_out(name).await;
            CrashPoint::ShrinkLeaseOut.reached(name);
        }
        Ok(())
    }

    /// Tells a node that it is left behind. False: it could not be told.
    pub(super) async fn tell_left(
        &self,
        smaller: &MemberSet,
        name: &str,
        state: NodeState,
        reason: &str,
    ) -> Result<bool, HubError> {
        self.note_reason(name, reason);
        let tell = self.store(self.node(name)?, smaller, state, None, Some(reason));
        let told = within_agent(TELL_MS_MAX, tell).await;
        match &told {
            Ok(()) => CrashPoint::ShrinkTold.reached(name),
            Err(e) => tracing::info!(node = name, error = %e, "the node that leaves could not be told"),
        }
        Ok(told.is_ok())
    }

    /// Stores the set on each of its members, the leader first. Gives a follower on which it could not be, and why.
    async fn store_on_members(&self, set: &MemberSet, left: &str) -> Result<Option<(String, String)>, HubError> {
        // Each set has its own: whoever stored one of them, and nobody heard of it, must be told apart from who went on from there.
        let generation = format!("{:032x}", rand::random::<u128>());
        let followers = set.nodes.iter().filter(|node| **node != set.leader);
        for member in std::iter::once(&set.leader).chain(followers) {
            let node = self.node(member)?;
            let ms_max = if *member == set.leader { STORE_MS_MAX } else { MEMBER_STORE_MS_MAX };
            let deadline = tokio::time::Instant::now() + Duration::from_millis(ms_max);
            loop {
                let stored = self.store(node, set, NodeState::InSync, Some(&generation), None);
                let why = match tokio::time::timeout_at(deadline, stored).await {
                    Ok(Ok(())) => {
                        CrashPoint::ShrinkStored.reached(member);
                        break;
                    }
                    // Another reign has begun: no commit of this one may be acknowledged any more.
                    Ok(Err(e)) if e.is_old_epoch() => {
                        return Err(HubError::NotStored { node: left.to_owned(), why: e.to_string() });
                    }
                    Ok(Err(e)) => e.to_string(),
                    Err(_) => format!("no answer within {ms_max} ms"),
                };
                if tokio::time::Instant::now() >= deadline {
                    if *member == set.leader {
                        return Err(HubError::NotStored { node: left.to_owned(), why });
                    }
                    return Ok(Some((member.clone(), why)));
                }
                tracing::warn!(node = %member, error = why, "the smaller member set is not stored yet");
                tokio::time::sleep(Duration::from_millis(STORE_RETRY_MS)).await;
            }
        }
        Ok(None)
    }
}

async fn within_agent<T>(ms_max: u64, work: impl Future<Output = Result<T, ClientError>>) -> Result<T, HubError> {
    match tokio::time::timeout(Duration::from_millis(ms_max), work).await {
        Ok(result) => Ok(result?),
        Err(_) => Err(HubError::Other(format!("no answer within {ms_max} ms"))),
    }
}
