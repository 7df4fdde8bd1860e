//! A node joins: cut, backlog, join. The hub's side of a recovery.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use pgtandem_proto::membership::{MemberSet, NodeState};
use pgtandem_proto::message::{Lsn, Reply, Request};

use crate::agent::client::Control;
use crate::cluster::members;
use crate::cluster::rejoin::Standing;
use crate::crash::CrashPoint;
use crate::pg::build;
use crate::recovery::replication::{
    CutDone, Drained, JoinDone, Replication, ReplicationError, ReplicationErrorKind as Kind,
};
use crate::replicate::applier::{Applier, leader_error, node_error, record_error};
use crate::replicate::backlog::Backlog;
use crate::replicate::follower::Connection;
use crate::replicate::hub::{Hub, HubError, Reign, store_on};
use crate::replicate::resolve;

/// A backlog of at most that many transactions is short: the rest is applied while the gate is closed.
pub(super) const SHORT_MAX: u64 = 20;
/// How long one attempt at a cut waits for a statement that runs node by node.
const NODEWISE_MS_MAX: u64 = 50_000;
/// How long one agent may take to store the larger set while the gate is closed.
const STORE_MS_MAX: u64 = 2000;
/// How long it is waited for a change of the member set that may let a node in which nobody wants to come back any more.
const ABANDON_MS_MAX: u64 = 10_000;
/// What a batch under way may take past the limit of the gate.
const GRACE_MS: u64 = 500;
/// How long a node that was away may take to be made ready for the join: losses of others wait for it.
const READY_MS_MAX: u64 = 5_000;
/// How long one attempt at the cut waits for work that it must not fall into (transactions with a `once` statement, mostly).
const UNCUT_MS_MAX: u64 = 20_000;

impl Hub {
    fn backlog(&self, node: &str) -> Option<Arc<Backlog>> {
        self.backlogs.lock().unwrap_or_else(std::sync::PoisonError::into_inner).get(node).cloned()
    }

    pub(super) fn applier(&self, node: &str) -> Result<Applier<'_>, ReplicationError> {
        let (epoch, secret) = self.epoch_and_secret().ok_or_else(|| {
            ReplicationError::new(
                Kind::Stopping,
                "the epoch of this proxy ended during the recovery",
                "Start it again.",
            )
        })?;
        let node = self.node(node).map_err(|e| wrong_node(&e))?.clone();
        Ok(Applier::new(self, node, epoch, secret))
    }

    /// Generations of the leader's data, which are those of a node that was filled from it.
    async fn generations(&self, controls: &mut [(String, Control)]) -> Result<Vec<String>, ReplicationError> {
        let leader = self.view().set.leader.clone();
        let control = controls.iter_mut().find(|(name, _)| *name == leader).map(|(_, control)| control);
        let control = control.ok_or_else(|| record_error(&leader, &"it is not asked"))?;
        match control.request(&Request::Status).await.map_err(|e| record_error(&leader, &e))? {
            Reply::Status(status) => Ok(status.record.generations),
            other => Err(record_error(&leader, &control.unexpected("Status", &other))),
        }
    }

    async fn close_gate(&self) -> Result<crate::replicate::gate::Closed<'_>, ReplicationError> {
        self.gate
            .close(Duration::from_millis(self.config.proxy.gate_ms_max))
            .await
            .map_err(|e| ReplicationError::new(Kind::Gate, e.to_string(), "It is tried again by itself."))
    }
}

fn wrong_node(e: &HubError) -> ReplicationError {
    ReplicationError::new(Kind::WrongNode, e.to_string(), "Type: pgtandem status")
}

impl Replication for Hub {
    fn epoch(&self) -> u64 {
        self.epoch_and_secret().map_or(0, |(epoch, _)| epoch)
    }

    fn members(&self) -> MemberSet {
        self.view().set.clone()
    }

    async fn cut(&self, node: &str) -> Result<CutDone, ReplicationError> {
        self.node(node).map_err(|e| wrong_node(&e))?;
        let mut leader = self.leader_connection("postgres").await.map_err(|e| leader_error(&e))?;
        // The first use of a statement costs catalog reads that nobody should wait for.
        build::query(&mut leader.out, b"SELECT pg_logical_emit_message(false, 'pgtandem', 'cut is near')");
        leader.exchange().await.and_then(crate::replicate::follower::Answer::ok).map_err(|e| leader_error(&e))?;
        let cut =
            tokio::time::timeout(Duration::from_millis(NODEWISE_MS_MAX), self.nodewise.cut()).await.map_err(|_| {
                let what = "a statement that runs node by node (CREATE INDEX CONCURRENTLY or the like) is under way, or a client has \
                        prepared a transaction and not finished it";
                ReplicationError::new(Kind::Gate, what, "It is tried again by itself.")
            })?;
        let Some(cutting) = self.cuts.cut(Duration::from_millis(UNCUT_MS_MAX)).await else {
            let what =
                "a transaction that calls or fires code (CALL, triggers) was still open when the cut was to be made";
            return Err(ReplicationError::new(Kind::Gate, what, "It is tried again by itself; end such transactions."));
        };
        let closed = self.close_gate().await?;
        // What was given so far is in the WAL before X; from here on the node gets it by its backlog.
        self.sequences.forget_all();
        // The function gives the end of its record, a record boundary; its commit flushes past it. All commits that
        // passed the gate are finished, so each is before this record or comes after the gate opens.
        build::query(&mut leader.out, b"SELECT pg_logical_emit_message(true, 'pgtandem', 'cut')");
        let answer =
            leader.exchange().await.and_then(crate::replicate::follower::Answer::ok).map_err(|e| leader_error(&e))?;
        let x = answer.values.first().and_then(Option::as_ref).and_then(|v| parse_lsn(v));
        let x = x.ok_or_else(|| leader_error(&"no position of the marker record"))?;
        let backlog = Arc::new(Backlog::new(self.config.proxy.backlog_bytes_max, Some((cut, cutting))));
        self.backlogs.lock().unwrap_or_else(std::sync::PoisonError::into_inner).insert(node.to_owned(), backlog);
        Ok(CutDone { x, gate_closed_unix_us: closed.closed_unix_us(), gate_ms: closed.closed_ms() })
    }

    async fn drain(&self, node: &str, on_progress: &(dyn Fn(Drained) + Sync)) -> Result<(), ReplicationError> {
        let Some(backlog) = self.backlog(node) else {
            return Err(ReplicationError::new(Kind::WrongNode, format!("no cut was made for {node}"), "Start again."));
        };
        let mut applier = self.applier(node)?;
        let failed = |e: &dyn std::fmt::Display| node_error(node, &e.to_string());
        let open = self.tunnel_connection(&applier.node, "postgres", applier.epoch, None);
        let mut first = open.await.map_err(|e| failed(&e))?;
        let databases = resolve::databases(&mut first).await.map_err(|e| failed(&e))?;
        drop(first);
        for database in &databases {
            let open = self.tunnel_connection(&applier.node, database, applier.epoch, None);
            let mut connection = open.await.map_err(|e| failed(&e))?;
            resolve::raise_epoch(&mut connection, applier.epoch, &applier.secret).await.map_err(|e| failed(&e))?;
            resolve::resolve(&mut connection, &self.config.cluster.name, None).await.map_err(|e| failed(&e))?;
        }
        applier.apply(&backlog, SHORT_MAX, None, on_progress).await
    }

    async fn join(&self, node: &str) -> Result<JoinDone, ReplicationError> {
        let Some(backlog) = self.backlog(node) else {
            return Err(ReplicationError::new(Kind::WrongNode, format!("no cut was made for {node}"), "Start again."));
        };
        self.admit(self.applier(node)?, &backlog).await
    }

    async fn abandon(&self, node: &str) {
        if let Some(kept) = self.away.get(node) {
            self.away.end(node, "a recovery of it was begun, or it was detached");
            // It may just be let in: that ends first, one way or the other.
            let _ended = tokio::time::timeout(Duration::from_millis(ABANDON_MS_MAX), kept.attempt.lock()).await;
        }
        self.backlogs.lock().unwrap_or_else(std::sync::PoisonError::into_inner).remove(node);
    }

    async fn switch(&self, node: &str) -> Result<MemberSet, ReplicationError> {
        self.switch_leader(node).await
    }

    async fn remove(&self, node: &str, reason: &str) -> Result<MemberSet, ReplicationError> {
        self.remove_member(node, reason).await.map_err(|e| match &e {
            HubError::Members(_) | HubError::UnknownNode(_) => wrong_node(&e),
            _ => record_error(node, &e),
        })
    }
}

/// What a join needs behind the closed gate.
struct Ready {
    controls: Vec<(String, Control)>,
    generations: Vec<String>,
    standing: Standing,
    leaders: HashMap<Arc<str>, Connection>,
    spares: HashMap<Arc<str>, Vec<Connection>>,
}

impl Hub {
    /// Lets a node in that has all but the rest of its backlog.
    pub(super) async fn admit(
        &self,
        mut applier: Applier<'_>,
        backlog: &Backlog,
    ) -> Result<JoinDone, ReplicationError> {
        let node = &applier.node.name.clone();
        let _one_at_a_time = self.changing.lock().await;
        let larger = members::with(&self.view().set, node).map_err(|e| wrong_node(&e.into()))?;
        // All connections are made before the gate closes.
        let limit = Duration::from_millis(if applier.away.is_some() { READY_MS_MAX } else { u64::MAX });
        let ready = tokio::time::timeout(limit, self.make_ready(node, &larger, &mut applier, backlog)).await;
        let late = || Err(node_error(node, &"it did not answer in time when it was to be let in"));
        let Ready { mut controls, generations, standing, mut leaders, spares } = ready.unwrap_or_else(|_| late())?;
        CrashPoint::GrowReady.reached(node);
        let ignore = |_: Drained| ();
        let closed = self.close_gate().await?;
        let until = tokio::time::Instant::now() + Duration::from_millis(self.config.proxy.gate_ms_max);
        let rest = async {
            applier.apply(backlog, 0, Some(until), &ignore).await?;
            applier.check_kept()?;
            applier.compare_marks(&mut leaders).await
        };
        // What was under way when the time is over may be half applied, so this attempt is not taken up again.
        let late = || node_error(node, &"it did not apply the rest of the backlog before proxy.gate_ms_max");
        tokio::time::timeout_at(until + Duration::from_millis(GRACE_MS), rest).await.unwrap_or_else(|_| Err(late()))?;
        CrashPoint::GrowDrained.reached(node);
        let mut failure = None;
        for (name, control) in &mut controls {
            let is_new = name == node;
            let store = async {
                if is_new {
                    let request = Request::Join { members: larger.clone(), generations: generations.clone() };
                    return control.request(&request).await.map(|_| ());
                }
                store_on(control, &larger, NodeState::InSync, None, None).await
            };
            failure = match tokio::time::timeout(Duration::from_millis(STORE_MS_MAX), store).await {
                Ok(Ok(())) => {
                    CrashPoint::GrowStored.reached(name);
                    continue;
                }
                Ok(Err(e)) => Some(record_error(name, &e)),
                Err(_) => Some(record_error(name, &"no answer in time")),
            };
            break;
        }
        if let Some(failure) = failure {
            self.shrink_out(&larger, node, &failure.what).await?;
            return Err(failure);
        }
        self.backlogs.lock().unwrap_or_else(std::sync::PoisonError::into_inner).remove(node);
        let version = larger.version;
        self.show(larger);
        CrashPoint::GrowShown.reached(node);
        if let Some(follower) = self.view().followers.iter().find(|f| f.node.name == *node) {
            follower.put_spares(spares);
            follower.note_standing(standing);
        }
        Ok(JoinDone { gate_closed_unix_us: closed.closed_unix_us(), gate_ms: closed.closed_ms(), version })
    }

    /// What is done before the gate closes, while the member set can not change.
    async fn make_ready(
        &self,
        node: &String,
        larger: &MemberSet,
        applier: &mut Applier<'_>,
        backlog: &Backlog,
    ) -> Result<Ready, ReplicationError> {
        let mut controls = Vec::new();
        for name in larger.nodes.iter().filter(|n| *n != node).chain(std::iter::once(&node.to_owned())) {
            let config = self.node(name).map_err(|e| wrong_node(&e))?;
            let control = Control::connect(&self.identity, config).await.map_err(|e| record_error(name, &e))?;
            controls.push((name.clone(), control));
        }
        let generations = self.generations(&mut controls).await?;
        applier.connect_everywhere().await?;
        let ignore = |_: Drained| ();
        applier.apply(backlog, SHORT_MAX, None, &ignore).await?;
        let standing = applier.standing().await?;
        let mut leaders = HashMap::new();
        if applier.away.is_some() {
            leaders = applier.leaders().await?;
            if let Some(generation) = generations.first() {
                applier.write_generation(generation).await?;
            }
        }
        let sessions = usize::try_from(self.counters.sessions.load(Ordering::Relaxed)).unwrap_or_default();
        let spares = applier.spares(sessions).await?;
        applier.apply(backlog, SHORT_MAX, None, &ignore).await?;
        Ok(Ready { controls, generations, standing, leaders, spares })
    }

    /// The larger set could not be stored everywhere: the next version is without the node again, and is on all that remain before the gate
    /// opens, as at any loss. If that can not be had this reign is over, and the next one asks everybody.
    async fn shrink_out(&self, larger: &MemberSet, node: &str, reason: &str) -> Result<(), ReplicationError> {
        let mut leaving = Vec::new();
        let undone = async {
            let smaller = members::without(larger, node)?;
            // It may have stored the larger set, but nobody has granted it a lease under that: there is none to be waited out.
            self.tell_left(&smaller, node, NodeState::Stale, reason).await?;
            self.record_without(smaller, node, &mut leaving).await
        };
        let undone: Result<(), HubError> = undone.await;
        self.backlogs.lock().unwrap_or_else(std::sync::PoisonError::into_inner).remove(node);
        self.away.end(node, "it did not become a member when it was to be let in");
        undone.map_err(|e| {
            for name in &leaving {
                self.away.remove(name);
            }
            self.reign.send_replace(Reign::Starting);
            record_error(node, &e)
        })
    }
}

/// `16/B374D848`
fn parse_lsn(text: &[u8]) -> Option<Lsn> {
    let (high, low) = std::str::from_utf8(text).ok()?.split_once('/')?;
    Some(Lsn(u64::from_str_radix(high, 16).ok()? << 32 | u64::from_str_radix(low, 16).ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn positions_are_read_as_postgresql_writes_them() {
        assert_eq!(parse_lsn(b"16/B374D848"), Some(Lsn(0x16_B374_D848)));
        assert_eq!(parse_lsn(b"nonsense"), None);
    }
}
