//! A node joins: cut, backlog, join ([`admit`](super::admit)). The hub's side of a recovery.

use std::sync::Arc;
use std::time::Duration;

use pgtandem_proto::membership::MemberSet;
use pgtandem_proto::message::Lsn;

use crate::pg::build;
use crate::recovery::replication::{
    CutDone, Drained, JoinDone, Replication, ReplicationError, ReplicationErrorKind as Kind,
};
use crate::replicate::applier::{Applier, leader_error, node_error, record_error};
use crate::replicate::backlog::Backlog;
use crate::replicate::hub::{Hub, HubError};
use crate::replicate::resolve;

/// A backlog of at most that many transactions is short: the rest is applied while the gate is closed.
pub(super) const SHORT_MAX: u64 = 20;
/// How long one attempt at a cut waits for a statement that runs node by node.
const NODEWISE_MS_MAX: u64 = 50_000;
/// How long it is waited for a change of the member set that may let a node in which nobody wants to come back any more.
const ABANDON_MS_MAX: u64 = 10_000;
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

    pub(super) async fn close_gate(&self) -> Result<crate::replicate::gate::Closed<'_>, ReplicationError> {
        self.gate
            .close(Duration::from_millis(self.config.proxy.gate_ms_max))
            .await
            .map_err(|e| ReplicationError::new(Kind::Gate, e.to_string(), "It is tried again by itself."))
    }
}

pub(super) fn wrong_node(e: &HubError) -> ReplicationError {
    ReplicationError::new(Kind::WrongNode, e.to_string(), "Type: pgtandem status")
}

impl Replication for Hub {
    fn epoch(&self) -> u64 {
        self.epoch_and_secret().map_or(0, |(epoch, _)| epoch)
    }

    fn members(&self) -> MemberSet {
        self.view().set.clone()
    }

    fn commit_median(&self, over: Duration) -> Option<Duration> {
        Hub::commit_median(self, over)
    }

    fn fill_latency_percent_max(&self) -> u64 {
        self.config.cluster.fill_latency_percent_max
    }

    async fn cut(&self, node: &str) -> Result<CutDone, ReplicationError> {
        self.node(node).map_err(|e| wrong_node(&e))?;
        let mut leader = self.leader_connection("postgres").await.map_err(|e| leader_error(&e))?;
        // The first use of a statement costs catalog reads that nobody should wait for.
        build::query(&mut leader.out, b"SELECT pg_logical_emit_message(false, 'pgtandem', 'cut is near')");
        leader.exchange().await.and_then(crate::replicate::follower::Answer::ok).map_err(|e| leader_error(&e))?;
        let cut =
            tokio::time::timeout(Duration::from_millis(NODEWISE_MS_MAX), self.nodewise.cut()).await.map_err(|_| {
                let what = "a statement that runs node by node (CREATE INDEX CONCURRENTLY or the like) is under way or waits for the join \
                        of another node, or a client has prepared a transaction and not finished it";
                ReplicationError::new(Kind::Gate, what, "It is tried again by itself.")
            })?;
        let Some(cutting) = self.cuts.cut(Duration::from_millis(UNCUT_MS_MAX)).await else {
            let what = "a transaction that calls or fires code (CALL, triggers) was still open, or waits for the join of another node";
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

    async fn join(&self, node: &str, on_wait: &(dyn Fn(&str) + Sync)) -> Result<JoinDone, ReplicationError> {
        let Some(backlog) = self.backlog(node) else {
            return Err(ReplicationError::new(Kind::WrongNode, format!("no cut was made for {node}"), "Start again."));
        };
        self.admit(self.applier(node)?, &backlog, on_wait).await
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
