//! How a transaction with effects ends: followers prepare, the leader decides, the client is told, followers finish.
//!
//! `replication.md` calls the steps 1 to 5. If the leader's connection ends while its COMMIT is under way, only its mark says
//! what became of it.

use std::cell::RefCell;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use bytes::BytesMut;

use crate::crash::CrashPoint;
use crate::pg::build::ClientError;
use crate::replicate::backlog::Entry;
use crate::replicate::commit::{self, Commit, PrepareError, Prepared};
use crate::replicate::effects::EffectLog;
use crate::replicate::flight::{self, Decision};
use crate::replicate::gate::{Closed, Pass};
use crate::replicate::hub::{Hub, HubError, Reign};
use crate::replicate::once::Halves;
use crate::replicate::resolve;
use crate::session::conditional::still_there;
use crate::session::effect::client_error_frame;
use crate::session::run::Session;
use crate::session::simple::error_frame;
use crate::session::wire::{End, Until};

/// How often a DDL commit tries to close the gate.
const CLOSE_ATTEMPTS_MAX: usize = 5;
/// How long a lost COMMIT waits for the leader to come back and tell.
pub(super) const OUTCOME_MS_MAX: u64 = 120_000;
pub(super) const OUTCOME_POLL_MS: u64 = 50;

/// What the client is told: nothing more, or this error as a frame.
pub type Told = Result<(), BytesMut>;

impl Session {
    /// Commits the transaction under way. On an error it is rolled back on every member before this returns.
    ///
    /// # Errors
    /// If the session must end.
    pub async fn commit(&mut self, chain: bool) -> Result<Told, End> {
        // A client that is gone is noticed before followers prepare, not in the middle of the decision.
        self.wire.flush_much_to_client().await?;
        let begun = Instant::now();
        let mut sequences = None;
        if self.touched.is_used() {
            match self.carry_sequences().await? {
                Ok(reached) => sequences = Some(reached),
                Err(error) => {
                    self.roll_back_everywhere().await?;
                    return Ok(Err(error));
                }
            }
        } else if self.log.ddl {
            self.hub.sequences.forget(&self.database);
        }
        let fresh = EffectLog::new(Arc::clone(&self.hub.spill));
        let log = Arc::new(std::mem::replace(&mut self.log, fresh));
        let open = RefCell::new(self.halves.take());
        if log.is_empty() {
            // What ran in the halves was rolled back to a savepoint, or wrote nothing.
            drop(open);
            let ok = self.hidden_query(if chain { "COMMIT AND CHAIN" } else { "COMMIT" }).await?;
            self.carried.end(ok);
            return Ok(if ok { Ok(()) } else { Err(self.last_error()) });
        }
        if log.deferrable_constraints && !self.hidden_query("SET CONSTRAINTS ALL IMMEDIATE").await? {
            let error = self.last_error();
            self.halves = open.take();
            self.roll_back_everywhere().await?;
            return Ok(Err(error));
        }
        let serializable = match self.is_serializable().await? {
            Ok(serializable) => serializable,
            Err(error) => {
                self.halves = open.take();
                self.roll_back_everywhere().await?;
                return Ok(Err(error));
            }
        };
        let _flight = if log.ddl {
            match self.ddl_flight().await? {
                Ok(flight) => Some(flight),
                Err(error) => {
                    self.halves = open.take();
                    self.roll_back_everywhere().await?;
                    return Ok(Err(client_error_frame(&error)));
                }
            }
        } else {
            None
        };
        let place = self.next_mark;
        self.next_mark = (place + 1) % self.marks.len();
        let Some(mut mark) = self.marks[place].take() else { return Err(End::Told) };
        let (mark_n, finished) = mark.begin().await;
        let decision = Decision {
            mark_id: mark.id,
            mark_n,
            after: mark.decided,
            gid: flight::gid(&self.hub.config.cluster.name, self.epoch, mark.id, mark_n),
            owner: None,
        };
        CrashPoint::CommitBegun.reached(&self.database);
        let mut held = Vec::new();
        let told = if serializable {
            self.decide_serializable(&log, &decision, &mut held, &open, chain).await
        } else {
            self.decide(&log, &decision, &mut held, &open, chain).await
        };
        if matches!(&told, Ok(Ok(_))) {
            self.cycle.committed = true;
            self.carried.end(true);
            self.hub.counters.commits.fetch_add(1, Ordering::Relaxed);
            self.hub.note_commit(begun.elapsed());
            if let Some((generation, bounds)) = sequences {
                self.hub.sequences.raise(generation, &self.database, bounds);
            }
        }
        // If the session ends here a member may still hold this n prepared: the mark stays out of use until the next epoch.
        let told = told?;
        mark.decide(told.is_ok());
        self.marks[place] = Some(mark);
        let pass = match told {
            Ok(pass) => pass,
            Err(error) => return Ok(Err(error)),
        };
        let (hub, pool, database) = (Arc::clone(&self.hub), self.thread.pool.clone(), Arc::clone(&self.database));
        tokio::task::spawn_local(async move {
            commit::finish(&hub, &pool, &database, held, &decision.gid, true).await;
            drop((pass, finished));
        });
        Ok(Ok(()))
    }

    /// Prepares, passes the gate and commits. Gives the pass: dropping it says that every member has finished.
    async fn decide(
        &mut self,
        log: &Arc<EffectLog>,
        decision: &Decision,
        held: &mut Vec<Prepared>,
        open: &RefCell<Option<Halves>>,
        chain: bool,
    ) -> Result<Result<Pass, BytesMut>, End> {
        let hub = Arc::clone(&self.hub);
        let started = Instant::now();
        let mut closed: Option<Closed<'_>>;
        let pass: Pass = loop {
            // The gate is not held while followers work.
            closed = None;
            let version = match self.followers(&hub, log, decision, open).prepare(held).await {
                Ok(version) => version,
                Err(PrepareError::ReignOver) => return self.decided_by_next(decision).await,
                Err(error) => {
                    let error = prepare_error(&error);
                    self.halves = open.take();
                    return self.abort(std::mem::take(held), decision, error).await.map(Err);
                }
            };
            let pass = match self.pass_gate(&hub, log, &mut closed).await {
                Ok(pass) => pass,
                Err(_) if self.is_over() => return self.decided_by_next(decision).await,
                Err(error) => {
                    self.halves = open.take();
                    return self.abort(std::mem::take(held), decision, error).await.map(Err);
                }
            };
            let set = &hub.view().set;
            if (set.epoch, set.version) == version {
                break pass;
            }
        };
        CrashPoint::CommitPrepared.reached(&self.database);
        tracing::trace!(gid = decision.gid, prepared_us = started.elapsed().as_micros(), "members have prepared");
        self.decide_on_leader(log, decision, held, chain, (pass, closed)).await
    }

    /// The followers' side of a commit.
    pub(super) fn followers<'a>(
        &'a self,
        hub: &'a Hub,
        log: &'a EffectLog,
        decision: &'a Decision,
        open: &'a RefCell<Option<Halves>>,
    ) -> Commit<'a> {
        let leader_ms = self.effects_since.map_or(0, |t| u64::try_from(t.elapsed().as_millis()).unwrap_or(u64::MAX));
        Commit {
            hub,
            pool: &self.thread.pool,
            database: &self.database,
            log,
            decision,
            epoch: self.epoch,
            leader_ms: leader_ms.min(24 * 3_600_000),
            inside: None,
            open,
        }
    }

    /// The reign of the session is over, and this proxy begins another, or has begun it.
    fn is_over(&self) -> bool {
        match &*self.hub.reign.borrow() {
            Reign::Serving { epoch, .. } => *epoch != self.epoch,
            Reign::Starting => true,
            Reign::Waiting(_) | Reign::Stopping => false,
        }
    }

    /// The reign of the session ended before its COMMIT was sent. A leader that took over may have committed it all the same, if every member
    /// held it: it could not know better. What it did stands.
    async fn decided_by_next(&mut self, decision: &Decision) -> Result<Result<Pass, BytesMut>, End> {
        if self.outcome(decision).await? {
            self.wire.status = b'I';
            return Ok(Ok(self.hub.gate.pass().await));
        }
        Err(End::RolledBack)
    }

    /// Passes the gate; a change of the schema closes it behind itself.
    pub(super) async fn pass_gate<'h>(
        &self,
        hub: &'h Hub,
        log: &EffectLog,
        closed: &mut Option<Closed<'h>>,
    ) -> Result<Pass, ClientError> {
        if !log.ddl {
            return self.pass_open(hub).await;
        }
        let pass = self.pass_and_close(hub, closed).await?;
        still_there(hub, log).map(|()| pass)
    }

    pub(super) async fn pass_open(&self, hub: &Hub) -> Result<Pass, ClientError> {
        let pass = hub.gate.pass().await;
        self.still_serving().map(|()| pass)
    }

    /// Passes the gate, which is closed behind it.
    pub(super) async fn pass_and_close<'h>(
        &self,
        hub: &'h Hub,
        closed: &mut Option<Closed<'h>>,
    ) -> Result<Pass, ClientError> {
        let mut attempt = 0;
        let gate = loop {
            match hub.gate.close(Duration::from_millis(hub.config.proxy.gate_ms_max)).await {
                Ok(gate) => break gate,
                Err(_) if attempt < CLOSE_ATTEMPTS_MAX => attempt += 1,
                Err(error) => {
                    return Err(ClientError::error("40001", error.to_string(), "Try the transaction again."));
                }
            }
        };
        self.still_serving()?;
        let pass = hub.gate.pass_closed(&gate);
        *closed = Some(gate);
        Ok(pass)
    }

    /// A change of the leader closes the gate: what it held back is not decided here any more.
    fn still_serving(&self) -> Result<(), ClientError> {
        if self.hub.reign_epoch() == Some(self.epoch) {
            return Ok(());
        }
        let what = "the transaction was rolled back: the leader changed before it was committed";
        Err(ClientError::error("40001", what, "Try the transaction again."))
    }

    /// Followers have prepared, the gate is passed: mark and COMMIT on the leader.
    pub(super) async fn decide_on_leader(
        &mut self,
        log: &Arc<EffectLog>,
        decision: &Decision,
        held: &mut Vec<Prepared>,
        chain: bool,
        (pass, closed): (Pass, Option<Closed<'_>>),
    ) -> Result<Result<Pass, BytesMut>, End> {
        let hub = Arc::clone(&self.hub);
        let entries = Entered::new(hub.enter_backlogs(&self.database, log, decision));
        // Whoever plans from here on waits for the gate: the old catalog is over, and the new one not yet everywhere.
        let change = closed.as_ref().map(|_| SchemaChange::begin(&hub));
        self.wire.mute = true;
        let result = self.commit_leader(decision, chain).await;
        self.wire.mute = false;
        let committed = match result {
            Ok(()) if self.wire.results.error.is_none() => true,
            Ok(()) => {
                entries.settle(false);
                let error = self.last_error();
                self.abandon(std::mem::take(held), decision).await?;
                return Ok(Err(error));
            }
            Err(end) => {
                tracing::info!(%end, gid = decision.gid, "the leader's connection ended with a COMMIT under way");
                let committed = self.outcome(decision).await?;
                // The transaction that it chains is lost with its server.
                self.wire.status = if chain && committed { b'T' } else { b'I' };
                committed
            }
        };
        entries.settle(committed);
        if committed {
            CrashPoint::CommitDecided.reached(&self.database);
        } else {
            self.abandon(std::mem::take(held), decision).await?;
            return Err(End::RolledBack);
        }
        if let Some(gate) = closed {
            self.finish_closed(held, decision, change, gate).await;
        }
        Ok(Ok(pass))
    }

    /// Finished under the closed gate: its catalog is everywhere before anything later arrives.
    pub(super) async fn finish_closed(
        &mut self,
        held: &mut Vec<Prepared>,
        decision: &Decision,
        change: Option<SchemaChange<'_>>,
        gate: Closed<'_>,
    ) {
        let all = std::mem::take(held);
        commit::finish(&self.hub, &self.thread.pool, &self.database, all, &decision.gid, true).await;
        drop(change);
        self.has_own_catalog = self.has_temp_objects;
        self.own_plans.clear();
        drop(gate);
    }

    /// Mark and COMMIT in one flight: the decision.
    async fn commit_leader(&mut self, decision: &Decision, chain: bool) -> Result<(), End> {
        let (id, n) = (decision.mark_id.to_string(), decision.mark_n.to_string());
        let secret = Arc::clone(&self.secret);
        self.wire.clear_results();
        self.wire.hide_errors = true;
        self.hidden("", "pgtandem_mark", &[Some(secret.as_bytes()), Some(id.as_bytes()), Some(n.as_bytes())]);
        self.hidden("", if chain { "pgtandem_commit_chain" } else { "pgtandem_commit" }, &[]);
        crate::pg::build::sync(&mut self.wire.to_server);
        self.wire.expects.push_back(crate::session::wire::Expect::Sync { hidden: true });
        let done = self.wire.pump(Until::Answered).await;
        self.wire.hide_errors = false;
        done?;
        if self.wire.results.error.is_some() && self.wire.status != b'I' {
            let error = self.wire.results.error.take();
            self.hidden_query("ROLLBACK").await?;
            self.wire.results.error = error;
        }
        Ok(())
    }

    pub(super) fn last_error(&mut self) -> BytesMut {
        error_frame(&self.wire.results.error.take().unwrap_or_default())
    }

    /// Rolled back in open halves, then on the leader: no follower holds a lock that the leader has given up.
    pub(super) async fn roll_back_everywhere(&mut self) -> Result<(), End> {
        self.roll_halves_back().await;
        self.hidden_query("ROLLBACK").await.map(|_| ())
    }

    /// Nothing was decided: rolled back on every member that had prepared, in halves that are open still, then on the leader.
    pub(super) async fn abort(
        &mut self,
        held: Vec<Prepared>,
        decision: &Decision,
        error: ClientError,
    ) -> Result<BytesMut, End> {
        self.abandon(held, decision).await?;
        self.roll_back_everywhere().await?;
        Ok(client_error_frame(&error))
    }

    /// When this returns without an error, the half is on no member any more, so that a failure may be told: a member that still
    /// held it could be made the leader, and would commit what may have been acknowledged.
    pub(super) async fn abandon(&mut self, held: Vec<Prepared>, decision: &Decision) -> Result<(), End> {
        let finished = commit::finish(&self.hub, &self.thread.pool, &self.database, held, &decision.gid, false).await;
        if finished || self.hub.reign_epoch() == Some(self.epoch) {
            return Ok(());
        }
        // The reign ended in the middle. The next one rolls it back before it serves, if it is this proxy's.
        let mut reign = self.hub.reign.subscribe();
        let decided = reign.wait_for(|reign| !matches!(reign, Reign::Starting));
        match tokio::time::timeout(Duration::from_millis(OUTCOME_MS_MAX), decided).await {
            Ok(Ok(reign)) if matches!(*reign, Reign::Serving { .. }) => {}
            _ => return Err(End::Unknown),
        }
        // A leader that took over has committed it if every member still held it.
        match self.hub.marks.decided_after(self.epoch, &self.database, decision.mark_id) {
            Some(n) if n < decision.mark_n => Ok(()),
            _ => Err(End::Unknown),
        }
    }

    /// The leader's connection ended with a COMMIT under way. Its mark says whether it was committed: once the backend is gone,
    /// or, if a new epoch was raised, as that found it before anybody could use the mark again.
    async fn outcome(&mut self, decision: &Decision) -> Result<bool, End> {
        self.outcome_by(decision, async |session| session.mark_of_dead_backend(decision.mark_id).await).await
    }

    /// Asks for a decision's mark by `attempt` until it is known, or a new reign knows it.
    pub(super) async fn outcome_by(
        &mut self,
        decision: &Decision,
        attempt: impl AsyncFn(&Self) -> Result<i64, HubError>,
    ) -> Result<bool, End> {
        // What the server said last was about this statement at most; the end of the session is told by itself.
        self.wire.results.error = None;
        // Nor does it owe anything: what is asked for here is what it had not answered.
        self.wire.expects.clear();
        let deadline = Instant::now() + Duration::from_millis(OUTCOME_MS_MAX);
        while Instant::now() < deadline {
            match self.hub.reign_epoch() {
                Some(epoch) if epoch == self.epoch => {
                    let read = attempt(self).await;
                    // A new reign that began meanwhile may have counted the mark on.
                    if self.hub.reign_epoch() == Some(self.epoch) {
                        match read {
                            Ok(n) => return Ok(n >= decision.mark_n),
                            // The database was dropped, and the commit with it.
                            Err(HubError::Server(e)) if e.sqlstate() == Some("3D000") => return Ok(false),
                            Err(_) => {}
                        }
                    }
                }
                Some(_) => {
                    let n = self.hub.marks.decided_after(self.epoch, &self.database, decision.mark_id);
                    return n.map(|n| n >= decision.mark_n).ok_or(End::Unknown);
                }
                // Another host decides it.
                None if matches!(*self.hub.reign.borrow(), Reign::Waiting(_)) => return Err(End::Unknown),
                None => {}
            }
            tokio::time::sleep(Duration::from_millis(OUTCOME_POLL_MS)).await;
        }
        tracing::error!(
            gid = decision.gid,
            "the outcome of a COMMIT is not known: the leader did not come back in time"
        );
        Err(End::Unknown)
    }

    /// The mark on the leader after this session's backend has ended.
    async fn mark_of_dead_backend(&self, id: i32) -> Result<i64, HubError> {
        let mut connection = self.hub.leader_connection_of(&self.database, &self.secret, self.epoch).await?;
        resolve::backend_gone(&mut connection, self.pid).await?;
        Ok(resolve::mark(&mut connection, id).await?)
    }
}

/// A transaction in the backlogs. Dropped without a verdict, nobody knows what became of it: the recoveries fail.
pub(super) struct Entered(Vec<Arc<Entry>>);

impl Entered {
    pub(super) fn new(entries: Vec<Arc<Entry>>) -> Self {
        Self(entries)
    }

    pub(super) fn settle(mut self, committed: bool) {
        for entry in self.0.drain(..) {
            entry.settle(committed);
        }
    }
}

impl Drop for Entered {
    fn drop(&mut self) {
        for entry in &self.0 {
            entry.give_up();
        }
    }
}

/// A DDL commit under way: the schema number is odd.
pub(super) struct SchemaChange<'a>(&'a Hub);

impl<'a> SchemaChange<'a> {
    pub(super) fn begin(hub: &'a Hub) -> Self {
        hub.schema_number.fetch_add(1, Ordering::AcqRel);
        Self(hub)
    }
}

impl Drop for SchemaChange<'_> {
    fn drop(&mut self) {
        self.0.schema_number.fetch_add(1, Ordering::AcqRel);
    }
}

pub(super) fn prepare_error(error: &PrepareError) -> ClientError {
    match error {
        PrepareError::Unsupported(why) => ClientError::error(
            "0A000",
            format!("the transaction can not be prepared on a follower: {why}"),
            "Do this in a transaction of its own.",
        ),
        PrepareError::Busy(_) => ClientError::error("40001", error.to_string(), "Try the transaction again."),
        PrepareError::Effects(_) => {
            ClientError::error("53400", error.to_string(), "Make room in the proxy's state_dir.")
        }
        PrepareError::ReignOver => ClientError::fatal("57P01", error.to_string(), "Connect again."),
        PrepareError::Hub(HubError::Protected { node, .. }) => ClientError::error(
            "40001",
            error.to_string(),
            format!("To go on without it, type: pgtandem detach {node}; then: pgtandem recover {node}"),
        ),
        PrepareError::Hub(why) => ClientError::error(
            "40001",
            format!("a follower was lost and the smaller member set could not be stored: {why}"),
            "Type: pgtandem status",
        ),
    }
}
