//! Followers' side of a commit: every member gets its half and prepares it; later it is finished off the client's path.
//!
//! Works on one thread: connections to followers are pooled per thread, so that nobody waits for another thread's wake-up.

use std::cell::RefCell;
use std::collections::HashMap;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use futures_util::future::join_all;
use pgtandem_proto::membership::NodeState;

use tokio::sync::OwnedSemaphorePermit;

use crate::replicate::effects::{EffectLog, EffectsError};
use crate::replicate::flight::{self, Decision};
use crate::replicate::follower::{Connection, ServerError};
use crate::replicate::hub::{Follower, Hub, HubError, within};
use crate::replicate::once::{Half, Halves};

/// Idle connections to one follower, over all databases and threads.
const IDLE_MAX: usize = 64;
/// How long a transaction may wait for those before it, and for its place, on top of what it took on the leader.
const PLACE_MS_MAX: u64 = 120_000;
/// Pause between two attempts to take out a member that could not finish.
const RETRY_MS: u64 = 500;
/// A half may take this many times as long as the leader needed for the transaction, on top of the fixed limit.
pub const SLOWER_MAX: u64 = 4;

type Idle = HashMap<(u64, Arc<str>), Vec<Connection>>;

/// Connections to followers that one thread keeps, by follower and database.
#[derive(Clone, Debug)]
pub struct Pool {
    idle: Rc<RefCell<Idle>>,
    /// This thread's share of the idle connections to one follower.
    idle_max: usize,
}

impl Pool {
    /// The pool of one of `threads` threads.
    #[must_use]
    pub fn of_one_of(threads: usize) -> Self {
        Self { idle: Rc::default(), idle_max: (IDLE_MAX / threads.max(1)).max(1) }
    }

    /// A connection, and whether it has been idle.
    async fn take(
        &self,
        hub: &Hub,
        follower: &Follower,
        database: &Arc<str>,
    ) -> Result<(Connection, bool), ServerError> {
        let key = (follower.id, Arc::clone(database));
        if let Some(mut connection) = self.idle.borrow_mut().get_mut(&key).and_then(Vec::pop) {
            connection.at_schema(hub.schema_number.load(Ordering::Acquire));
            return Ok((connection, true));
        }
        if let Some(connection) = follower.take_spare(database) {
            return Ok((connection, true));
        }
        Ok((self.open(hub, follower, database).await?, false))
    }

    async fn open(&self, hub: &Hub, follower: &Follower, database: &Arc<str>) -> Result<Connection, ServerError> {
        let (epoch, secret) = hub.epoch_and_secret().ok_or_else(|| ServerError::Other("the epoch is over".into()))?;
        hub.tunnel_connection(&follower.node, database, epoch, Some(&secret)).await
    }

    fn give_back(&self, hub: &Hub, follower: &Follower, database: &Arc<str>, connection: Connection) {
        let mut idle = self.idle.borrow_mut();
        if follower.gone.is_cancelled() {
            idle.retain(|(id, _), _| *id != follower.id);
            return;
        }
        let kept: usize = idle.iter().filter(|((id, _), _)| *id == follower.id).map(|(_, list)| list.len()).sum();
        if kept >= self.idle_max {
            // Connections to databases that were dropped or renamed have ended.
            idle.retain(|(_, database), _| hub.marks.knows(database));
        }
        if kept < self.idle_max {
            idle.entry((follower.id, Arc::clone(database))).or_default().push(connection);
        }
    }
}

/// A follower that holds the half prepared, and the connection that did it.
#[derive(Debug)]
pub struct Prepared {
    follower: Arc<Follower>,
    connection: Connection,
    /// It may serve other transactions afterwards.
    reusable: bool,
    /// Its place among the transactions that one follower works on at once.
    _place: OwnedSemaphorePermit,
}

#[derive(Debug, thiserror::Error)]
pub enum PrepareError {
    /// The follower can not prepare what the transaction did; nobody is suspect.
    #[error("{0}")]
    Unsupported(String),
    #[error("the followers are too busy: no place within {0} ms")]
    Busy(u64),
    /// What was kept of the transaction can not be read again: the proxy's own disk.
    #[error(transparent)]
    Effects(EffectsError),
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
    /// What it holds if it passed the gate before its halves are made.
    pub inside: Option<Inside>,
    /// The halves of a transaction that can not be applied again: a follower without one leaves.
    pub open: &'a RefCell<Option<Halves>>,
}

/// Taken before the gate by a transaction whose halves are made behind it, so that nobody who waits for it to come out can be
/// what it waits for.
#[derive(Debug)]
pub struct Inside {
    /// Number of its pass: its halves wait at most for those before it.
    pub number: u64,
    /// Places, by the follower's id.
    places: RefCell<HashMap<u64, OwnedSemaphorePermit>>,
}

/// Places on every follower of one version of the member set.
#[derive(Debug)]
pub struct Reserved {
    pub version: (u64, u64),
    places: HashMap<u64, OwnedSemaphorePermit>,
}

impl Reserved {
    /// No follower is in the set.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.places.is_empty()
    }

    /// With the number of the pass that it was taken for.
    #[must_use]
    pub fn inside(self, number: u64) -> Inside {
        Inside { number, places: RefCell::new(self.places) }
    }
}

impl Commit<'_> {
    /// Waits for what the transaction must come after, and takes a place on every follower, for halves that are made inside the
    /// gate.
    ///
    /// # Errors
    /// If there is no place in time, or the session's epoch is over.
    pub async fn reserve(&self) -> Result<Reserved, PrepareError> {
        let view = self.hub.view();
        if self.hub.reign_epoch() != Some(self.epoch) {
            return Err(PrepareError::ReignOver);
        }
        let places = self.places(&view.followers).await?;
        let places = view.followers.iter().map(|follower| follower.id).zip(places).collect();
        Ok(Reserved { version: (view.set.epoch, view.set.version), places })
    }

    /// Makes every follower of the current member set hold the half; those in `held` do already. A follower that can
    /// not has left the set when this returns. Gives the version of the set that it is true for.
    ///
    /// # Errors
    /// If a follower refuses what the transaction did, or the smaller set can not be recorded.
    pub async fn prepare(&self, held: &mut Vec<Prepared>) -> Result<(u64, u64), PrepareError> {
        let lost = self.open.borrow_mut().as_mut().map(Halves::lost).unwrap_or_default();
        for lost in lost {
            self.lose(&lost.follower, lost.state, &lost.reason).await?;
        }
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
            let places = self.places(&missing).await?;
            let flights = missing.iter().zip(places).map(|(follower, place)| {
                let half = self.open.borrow_mut().as_mut().map(|open| open.take(follower));
                async move {
                    match half {
                        None => self.half(follower, place).await,
                        Some(half) => self.open_half(follower, half, place).await,
                    }
                }
            });
            let flights: Vec<_> = flights.collect();
            let reusable = self.open.borrow().is_none();
            let mut failed = Vec::new();
            for (follower, result) in missing.iter().zip(join_all(flights).await) {
                match result {
                    Ok((connection, place)) => {
                        held.push(Prepared { follower: Arc::clone(follower), connection, reusable, _place: place });
                    }
                    Err(e) => failed.push((follower, e)),
                }
            }
            // Judged only now: whoever has prepared must be in `held`, so that it is rolled back.
            for (follower, error) in failed {
                match error {
                    e if e.sqlstate() == Some("0A000") => return Err(PrepareError::Unsupported(e.to_string())),
                    ServerError::Effects(e) => return Err(PrepareError::Effects(e)),
                    e => {
                        let state = if e.is_sick() { NodeState::Stale } else { NodeState::Suspect };
                        let reason =
                            format!("its half of a transaction in database {} failed: {}", self.database, told(&e));
                        self.lose(follower, state, &reason).await?;
                    }
                }
            }
        }
    }

    /// A follower leaves the member set. If the reign ends meanwhile, the next one decides.
    async fn lose(&self, follower: &Follower, state: NodeState, reason: &str) -> Result<(), PrepareError> {
        match self.hub.lost(follower, state, reason).await {
            Err(_) if self.hub.reign_epoch() != Some(self.epoch) => Err(PrepareError::ReignOver),
            left => Ok(left?),
        }
    }

    /// Waits for what the transaction must come after, and for a place on each follower, always in the same order. Slow members
    /// and a slow leader show here, so nobody counts as lost for it.
    async fn places(&self, missing: &[Arc<Follower>]) -> Result<Vec<OwnedSemaphorePermit>, PrepareError> {
        let waiting = async {
            if let Some(number) = self.log.barrier {
                self.hub.gate.barrier(number).await;
            }
            let mut places = Vec::with_capacity(missing.len());
            // Whoever holds a place has prepared, or waits only for those that have: nothing can wait for itself.
            for follower in missing {
                let reserved = self.inside.as_ref().and_then(|i| i.places.borrow_mut().remove(&follower.id));
                places.push(match reserved {
                    Some(place) => Ok(place),
                    None => Arc::clone(&follower.places).acquire_owned().await,
                });
            }
            places
        };
        let limit_ms = PLACE_MS_MAX + SLOWER_MAX * self.leader_ms;
        match tokio::time::timeout(Duration::from_millis(limit_ms), waiting).await {
            // The semaphores are never closed.
            Ok(places) => places.into_iter().collect::<Result<_, _>>().map_err(|_| PrepareError::ReignOver),
            Err(_) => Err(PrepareError::Busy(limit_ms)),
        }
    }

    /// A connection for a half, and the half prepared. A connection that had been idle may have died of that: a new one tries
    /// again, after what the old one may have left is gone.
    async fn prepare_on_any(&self, follower: &Follower) -> (Result<(), ServerError>, Option<Connection>) {
        let (mut connection, was_idle) = match self.pool.take(self.hub, follower, self.database).await {
            Ok(taken) => taken,
            Err(e) => return (Err(e), None),
        };
        let result = flight::prepare(&mut connection, self.log, self.decision).await;
        // Also one that was ended because a statement needed the database for itself.
        let ended = |e: &ServerError| matches!(e, ServerError::Io(_)) || e.sqlstate() == Some("57P01");
        if !was_idle || !result.as_ref().is_err_and(ended) {
            return (result, Some(connection));
        }
        let mut connection = match self.pool.open(self.hub, follower, self.database).await {
            Ok(connection) => connection,
            Err(e) => return (Err(e), None),
        };
        let result = match flight::finish(&mut connection, &self.decision.gid, false).await {
            Ok(()) => flight::prepare(&mut connection, self.log, self.decision).await,
            Err(e) => Err(e),
        };
        (result, Some(connection))
    }

    /// As [`within`]; but where others may hold locks for long on followers, the time that passes then does not count.
    async fn within<T>(
        &self,
        ms_max: u64,
        work: impl Future<Output = Result<T, ServerError>>,
    ) -> Result<T, ServerError> {
        let mut work = std::pin::pin!(work);
        loop {
            match tokio::time::timeout(Duration::from_millis(ms_max), &mut work).await {
                Ok(result) => return result,
                Err(_) if self.hub.nodewise.may_block_halves() => {}
                Err(_) => return Err(ServerError::Timeout(ms_max)),
            }
        }
    }

    /// A half that is open already.
    async fn open_half(
        &self,
        follower: &Arc<Follower>,
        half: Option<Half>,
        place: OwnedSemaphorePermit,
    ) -> Result<(Connection, OwnedSemaphorePermit), ServerError> {
        let Some(half) = half else { return Err(ServerError::Other("its open half was lost".into())) };
        let limit_ms = self.hub.config.proxy.follower_ms_max + SLOWER_MAX * self.leader_ms;
        tokio::select! {
            result = self.within(limit_ms, half.prepare(self.hub, self.log, self.decision)) => Ok((result?, place)),
            () = follower.gone.cancelled() => Err(ServerError::Other("it left the member set".into())),
        }
    }

    /// One follower's half. What only differs because earlier commits are not finished there yet is made once more.
    async fn half(
        &self,
        follower: &Arc<Follower>,
        place: OwnedSemaphorePermit,
    ) -> Result<(Connection, OwnedSemaphorePermit), ServerError> {
        let limit_ms = self.hub.config.proxy.follower_ms_max + SLOWER_MAX * self.leader_ms;
        let work = async {
            let (result, connection) = self.prepare_on_any(follower).await;
            let Some(mut connection) = connection else { return Err(result.err().unwrap_or_else(no_connection)) };
            match result {
                Err(e) if !e.is_sick() && e.sqlstate() != Some("0A000") => {
                    tracing::debug!(node = %follower.node.name, error = %e, "half is made once more");
                    self.hub.counters.halves_remade.fetch_add(1, Ordering::Relaxed);
                    if !self.log.ddl && self.inside.is_none() {
                        // The follower may not have an index yet, or still have one, that the leader has done with.
                        self.hub.nodewise.quiet().await;
                    }
                    let number = self.inside.as_ref().map_or_else(|| self.hub.gate.next_number(), |i| i.number);
                    self.hub.gate.barrier(number).await;
                    flight::prepare(&mut connection, self.log, self.decision).await?;
                }
                result => result?,
            }
            Ok((connection, place))
        };
        tokio::select! {
            result = self.within(limit_ms, work) => result,
            () = follower.gone.cancelled() => Err(ServerError::Other("it left the member set".into())),
        }
    }
}

/// Commits or rolls back what is prepared. A follower that can not is taken out of the member set.
/// When this returns it is true on every member.
/// True: everybody who held it has finished it; otherwise somebody has left, or the reign is over.
pub async fn finish(hub: &Hub, pool: &Pool, database: &Arc<str>, held: Vec<Prepared>, gid: &str, commit: bool) -> bool {
    let finishing = held.into_iter().map(|mut prepared| async move {
        let result = tokio::select! {
            result = within(hub.config.proxy.follower_ms_max, flight::finish(&mut prepared.connection, gid, commit)) => result,
            () = prepared.follower.gone.cancelled() => return false,
        };
        match result {
            Ok(()) => {
                if prepared.reusable {
                    pool.give_back(hub, &prepared.follower, database, prepared.connection);
                }
                true
            }
            Err(e) => {
                let reason = format!("finishing {gid} in database {database} failed: {e}");
                take_out(hub, &prepared.follower, &reason, gid).await;
                false
            }
        }
    });
    join_all(finishing).await.into_iter().all(|finished| finished)
}

/// Connections whose halves stay prepared.
pub fn give_back(hub: &Hub, pool: &Pool, database: &Arc<str>, held: Vec<Prepared>) {
    for prepared in held {
        pool.give_back(hub, &prepared.follower, database, prepared.connection);
    }
}

/// As [`finish`], for what every member holds prepared although no session keeps a connection for it.
pub async fn finish_on_all(hub: &Hub, pool: &Pool, database: &Arc<str>, gid: &str, commit: bool) {
    let followers = hub.view().followers.clone();
    let finishing = followers.into_iter().map(|follower| async move {
        let work = async {
            let (mut connection, was_idle) = pool.take(hub, &follower, database).await?;
            let first = flight::finish(&mut connection, gid, commit).await;
            if was_idle && first.is_err() {
                connection = pool.open(hub, &follower, database).await?;
                flight::finish(&mut connection, gid, commit).await?;
            } else {
                first?;
            }
            pool.give_back(hub, &follower, database, connection);
            Ok(())
        };
        let result = tokio::select! {
            result = within(hub.config.proxy.follower_ms_max, work) => result,
            () = follower.gone.cancelled() => return,
        };
        if let Err(e) = result {
            take_out(hub, &follower, &format!("finishing {gid} in database {database} failed: {e}"), gid).await;
        }
    });
    join_all(finishing).await;
}

/// A member must not stay one with a half that is decided and not finished, so there is no giving up: nobody waits for this but
/// the gate, and a new epoch ends it.
async fn take_out(hub: &Hub, follower: &Follower, reason: &str, gid: &str) {
    while let Err(e) = hub.lost(follower, NodeState::Stale, reason).await {
        tracing::error!(error = %e, gid, "a member with an unfinished transaction could not be taken out yet");
        tokio::time::sleep(Duration::from_millis(RETRY_MS)).await;
    }
}

/// What a person understands of a follower's error: counts are asserted by a division, whose error says nothing.
fn told(error: &ServerError) -> String {
    match error.sqlstate() {
        Some("22012") => "a statement changed another number of rows there than on the leader".to_owned(),
        _ => error.to_string(),
    }
}

fn no_connection() -> ServerError {
    ServerError::Other("no connection".into())
}
