//! Followers' side of a commit: every member gets its half and prepares it; later it is finished off the client's path.
//!
//! Works on one thread: connections to followers are pooled per thread, so that nobody waits for another thread's wake-up.

use std::cell::RefCell;
use std::collections::HashMap;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use futures_util::future::join_all;
use pgtandem_proto::membership::NodeState;

use tokio::sync::OwnedSemaphorePermit;

use crate::replicate::effects::EffectLog;
use crate::replicate::flight::{self, Decision};
use crate::replicate::follower::{Connection, ServerError};
use crate::replicate::hub::{Follower, Hub, HubError, within};

/// Idle connections that one thread keeps per follower, over all databases.
const IDLE_MAX: usize = 32;
/// A half may take this many times as long as the leader needed for the transaction, on top of the fixed limit.
const SLOWER_MAX: u64 = 4;

type Idle = HashMap<(u64, Arc<str>), Vec<Connection>>;

/// Connections to followers that one thread keeps, by follower and database.
#[derive(Clone, Debug, Default)]
pub struct Pool {
    idle: Rc<RefCell<Idle>>,
}

impl Pool {
    async fn take(&self, hub: &Hub, follower: &Follower, database: &Arc<str>) -> Result<Connection, ServerError> {
        let key = (follower.id, Arc::clone(database));
        if let Some(connection) = self.idle.borrow_mut().get_mut(&key).and_then(Vec::pop) {
            return Ok(connection);
        }
        if let Some(connection) = follower.take_spare(database) {
            return Ok(connection);
        }
        let (epoch, secret) = hub.epoch_and_secret().ok_or_else(|| ServerError::Other("the epoch is over".into()))?;
        hub.tunnel_connection(&follower.node, database, epoch, Some(&secret)).await
    }

    fn give_back(&self, follower: &Follower, database: &Arc<str>, connection: Connection) {
        let mut idle = self.idle.borrow_mut();
        if follower.gone.is_cancelled() {
            idle.retain(|(id, _), _| *id != follower.id);
            return;
        }
        let kept: usize = idle.iter().filter(|((id, _), _)| *id == follower.id).map(|(_, list)| list.len()).sum();
        if kept < IDLE_MAX {
            idle.entry((follower.id, Arc::clone(database))).or_default().push(connection);
        }
    }
}

/// A follower that holds the half prepared, and the connection that did it.
#[derive(Debug)]
pub struct Prepared {
    follower: Arc<Follower>,
    connection: Connection,
    /// Its place among the transactions that one follower works on at once.
    _place: OwnedSemaphorePermit,
}

#[derive(Debug, thiserror::Error)]
pub enum PrepareError {
    /// The follower can not prepare what the transaction did; nobody is suspect.
    #[error("{0}")]
    Unsupported(String),
    /// A new epoch is being raised: the session's is over.
    #[error("the epoch of this session is over")]
    ReignOver,
    #[error(transparent)]
    Hub(#[from] HubError),
}

/// The followers' side of one transaction.
#[derive(Debug)]
pub struct Commit<'a> {
    pub hub: &'a Hub,
    pub pool: &'a Pool,
    pub database: &'a Arc<str>,
    pub log: &'a EffectLog,
    pub decision: &'a Decision,
    /// The session's epoch.
    pub epoch: u64,
    /// How long the leader worked on it, milliseconds.
    pub leader_ms: u64,
}

impl Commit<'_> {
    /// Makes every follower of the current member set hold the half; those in `held` do already. A follower that can
    /// not has left the set when this returns. Gives the version of the set that it is true for.
    ///
    /// # Errors
    /// If a follower refuses what the transaction did, or the smaller set can not be recorded.
    pub async fn prepare(&self, held: &mut Vec<Prepared>) -> Result<(u64, u64), PrepareError> {
        loop {
            let view = self.hub.view();
            // Looked at after the view: a new reign says so before it forgets the followers.
            if self.hub.reign_epoch() != Some(self.epoch) {
                return Err(PrepareError::ReignOver);
            }
            held.retain(|p| view.followers.iter().any(|f| f.id == p.follower.id));
            let missing: Vec<_> =
                view.followers.iter().filter(|f| !held.iter().any(|p| p.follower.id == f.id)).cloned().collect();
            if missing.is_empty() {
                return Ok((view.set.epoch, view.set.version));
            }
            let flights = missing.iter().map(|f| self.half(f));
            for (follower, result) in missing.iter().zip(join_all(flights).await) {
                match result {
                    Ok((connection, place)) => {
                        held.push(Prepared { follower: Arc::clone(follower), connection, _place: place });
                    }
                    Err(e) if e.sqlstate() == Some("0A000") => return Err(PrepareError::Unsupported(e.to_string())),
                    Err(e) => {
                        let state = if e.is_sick() { NodeState::Stale } else { NodeState::Suspect };
                        let reason = format!("its half of a transaction in database {} failed: {e}", self.database);
                        self.hub.lost(follower, state, &reason).await?;
                    }
                }
            }
        }
    }

    /// One follower's half. What only differs because earlier commits are not finished there yet is made once more.
    async fn half(&self, follower: &Arc<Follower>) -> Result<(Connection, OwnedSemaphorePermit), ServerError> {
        let limit_ms = self.hub.config.proxy.follower_ms_max + SLOWER_MAX * self.leader_ms;
        let work = async {
            if let Some(number) = self.log.barrier {
                self.hub.gate.barrier(number).await;
            }
            // Whoever holds a place has prepared, or waits only for those that have: nothing can wait for itself.
            let place = Arc::clone(&follower.places).acquire_owned().await;
            let place = place.map_err(|_| ServerError::Other("it left the member set".into()))?;
            let mut connection = self.pool.take(self.hub, follower, self.database).await?;
            match flight::prepare(&mut connection, self.log, self.decision).await {
                Err(e) if !e.is_sick() && e.sqlstate() != Some("0A000") => {
                    tracing::debug!(node = %follower.node.name, error = %e, "half is made once more");
                    self.hub.counters.halves_remade.fetch_add(1, Ordering::Relaxed);
                    self.hub.gate.barrier(self.hub.gate.next_number()).await;
                    flight::prepare(&mut connection, self.log, self.decision).await?;
                }
                result => result?,
            }
            Ok((connection, place))
        };
        tokio::select! {
            result = within(limit_ms, work) => result,
            () = follower.gone.cancelled() => Err(ServerError::Other("it left the member set".into())),
        }
    }
}

/// Commits or rolls back what is prepared. A follower that can not is taken out of the member set.
/// When this returns it is true on every member.
///
/// # Errors
/// If a smaller set can not be recorded.
pub async fn finish(
    hub: &Hub,
    pool: &Pool,
    database: &Arc<str>,
    held: Vec<Prepared>,
    gid: &str,
    commit: bool,
) -> Result<(), HubError> {
    let finishing = held.into_iter().map(|mut prepared| async move {
        let result = tokio::select! {
            result = within(hub.config.proxy.follower_ms_max, flight::finish(&mut prepared.connection, gid, commit)) => result,
            () = prepared.follower.gone.cancelled() => return Ok(()),
        };
        match result {
            Ok(()) => pool.give_back(&prepared.follower, database, prepared.connection),
            Err(e) => {
                let reason = format!("finishing {gid} in database {database} failed: {e}");
                hub.lost(&prepared.follower, NodeState::Stale, &reason).await?;
            }
        }
        Ok(())
    });
    join_all(finishing).await.into_iter().collect()
}
