//! The session itself: what it knows, and the loop that waits for either side.

use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use bytes::Bytes;

use crate::pg::build::{self, ClientError};
use crate::pg::frame::{self, Sender};
use crate::replicate::commit::Pool;
use crate::replicate::effects::{EffectLog, Position};
use crate::replicate::hub::Hub;
use crate::replicate::marks::Mark;
use crate::replicate::once::Halves;
use crate::replicate::schema::{Context, SessionFacts};
use crate::session::carried::Carried;
use crate::session::copy_file::OpenFile;
use crate::session::cycle::Cycle;
use crate::session::large_objects::Objects;
use crate::session::moving::Origin;
use crate::session::planning::PlanCache;
use crate::session::reused::Reused;
use crate::session::sequences::Touched;
use crate::session::statements::Statements;
use crate::session::tls::ClientTls;
use crate::session::wire::{End, Expect, Mode, Until, Wire};

/// What the sessions of one thread share.
#[derive(Clone, Debug)]
pub struct Thread {
    pub pool: Pool,
    pub plans: Rc<PlanCache>,
    /// `None`: requests for TLS are answered N.
    pub tls: Option<Arc<ClientTls>>,
}

/// How long a BEGIN may wait for the client's next message, to leave together with it. The transaction's `now()` is late by
/// that at most, as if the network had been.
const BEGIN_MS_MAX: u64 = 1;
/// A savepoint of the client's.
struct Savepoint {
    /// Never used twice.
    number: u64,
    name: String,
    position: Position,
}

/// Savepoints that are remembered at once.
const SAVEPOINTS_MAX: usize = 100_000;

pub struct Session {
    pub hub: Arc<Hub>,
    pub thread: Thread,
    pub wire: Wire,
    pub database: Arc<str>,
    /// Process id of the leader's backend.
    pub pid: i32,
    pub epoch: u64,
    pub secret: Arc<str>,
    /// Used in turn; `None` while one is being used.
    pub marks: [Option<Mark>; 2],
    pub next_mark: usize,
    /// Role and settings as last read; `None`: they may have changed.
    pub facts: Option<Arc<SessionFacts>>,
    /// The context of the effects that are made now.
    pub context: Option<Arc<Context>>,
    /// Of the context, as part of the key of plans.
    pub context_hash: u64,
    /// Settings changed in this transaction: its end may change them back.
    pub settings_touched: bool,
    /// Schema number of the last plan.
    pub planned_at: u64,
    /// The schema number when the block under way was opened, or before: its snapshot is not older. `None`: not known.
    pub schema_at_begin: Option<u64>,
    /// The client's Sync went to the server with the Execute before it.
    pub synced_early: bool,
    /// The last text of an effect that may come again.
    pub last_text: Option<Arc<str>>,
    /// Rows that the transaction had written to the catalog when a definition was sent that may do nothing, and the schema number.
    pub(super) catalog_before: (String, u64),
    /// The tag of a write whose commit is not decided yet.
    pub held_tag: Option<Bytes>,
    /// Where the data of the COPY under way are read, if the client does not send them.
    pub server_file: Option<OpenFile>,
    /// COPY whose rows are read afterwards: the block from which on they most likely are.
    pub(super) copied_from: Option<u64>,
    /// Effects of the transaction under way.
    pub log: EffectLog,
    pub touched: Touched,
    pub objects: Objects,
    savepoints: Vec<Savepoint>,
    last_savepoint: u64,
    /// Open on followers since the transaction's first statement of the `once` lane, to its end.
    pub halves: Option<Halves>,
    /// No other such statement runs before the block of ours around this one is committed.
    pub once_turn: Option<tokio::sync::OwnedMutexGuard<()>>,
    /// Nothing was done in the block yet but to open it.
    pub is_first: bool,
    /// The command tag of the last statement of the `once` lane.
    pub last_tag: Option<Bytes>,
    /// A block of ours is open where the client opened none.
    pub own_block: bool,
    /// Messages of the extended protocol were sent since the last Sync.
    pub in_batch: bool,
    /// An error of ours was sent: the client's messages are skipped until its Sync.
    pub skip_until_sync: bool,
    pub statements: Statements,
    pub(super) reused: Reused,
    /// Temp objects or uncommitted DDL: plans of this session are its own.
    pub has_own_catalog: bool,
    pub has_temp_objects: bool,
    /// This transaction has changed the schema, even if it rolled that back to a savepoint.
    pub ddl_under_way: bool,
    pub own_plans: PlanCache,
    /// When the transaction's first effect came.
    pub effects_since: Option<Instant>,
    pub(super) origin: Origin,
    pub(super) carried: Carried,
    pub(super) cycle: Cycle,
    /// Nothing was done in the client's transaction but a plain BEGIN.
    pub(super) only_begun: bool,
    /// The client's transaction was lost while it was silent: its next message is told so.
    pub(super) lost_transaction: bool,
}

impl Session {
    #[must_use]
    pub fn new(
        hub: Arc<Hub>,
        thread: Thread,
        wire: Wire,
        origin: Origin,
        pid: i32,
        secret: Arc<str>,
        [first, second]: [Mark; 2],
    ) -> Self {
        let log = EffectLog::new(Arc::clone(&hub.spill));
        let database = origin.start.database.as_str().into();
        let mut wire = wire;
        wire.secret = Arc::clone(&secret);
        wire.cancels = Some((Arc::clone(&hub.cancels), origin.cancel_key.clone()));
        Self {
            hub,
            thread,
            wire,
            database,
            pid,
            epoch: 0,
            secret,
            marks: [Some(first), Some(second)],
            next_mark: 0,
            facts: None,
            context: None,
            context_hash: 0,
            settings_touched: false,
            planned_at: 0,
            schema_at_begin: None,
            synced_early: false,
            last_text: None,
            catalog_before: Default::default(),
            held_tag: None,
            server_file: None,
            copied_from: None,
            log,
            touched: Touched::default(),
            objects: Objects::default(),
            savepoints: Vec::new(),
            last_savepoint: 0,
            halves: None,
            once_turn: None,
            is_first: false,
            last_tag: None,
            own_block: false,
            in_batch: false,
            skip_until_sync: false,
            statements: Statements::default(),
            reused: Reused::default(),
            has_own_catalog: false,
            has_temp_objects: false,
            ddl_under_way: false,
            own_plans: PlanCache::default(),
            effects_since: None,
            origin,
            carried: Carried::default(),
            cycle: Cycle::default(),
            only_begun: false,
            lost_transaction: false,
        }
    }

    /// Serves the client until one side ends.
    pub async fn run(mut self) {
        let end = loop {
            if let Err(end) = self.step().await
                && let Err(end) = self.move_on(end).await
            {
                break end;
            }
        };
        match &end {
            End::ServerGone => {
                if let Some(farewell) = self.wire.farewell.take() {
                    self.wire.to_client.extend_from_slice(&farewell);
                    let _ = self.wire.flush_client().await;
                } else {
                    self.tell_fatal(&ClientError::fatal(
                        "57P01",
                        "terminating connection: the connection to the leader's PostgreSQL ended",
                        "Connect again; an open transaction was rolled back.",
                    ))
                    .await;
                }
            }
            End::RolledBack => {
                let error = ClientError::fatal(
                    "40001",
                    "the transaction was rolled back: the leader's PostgreSQL ended before it was committed",
                    "Connect again and try the transaction again.",
                );
                self.tell_fatal(&error).await;
            }
            End::ClientProtocol(error) => {
                let error = ClientError::fatal("08P01", error.to_string(), "Use a client that speaks protocol 3.");
                self.tell_fatal(&error).await;
            }
            End::ServerProtocol(error) => {
                tracing::error!(%error, database = &*self.database, "the leader's PostgreSQL broke the protocol");
                let error = ClientError::fatal("08P01", error.to_string(), "Report this as a bug of pgtandem.");
                self.tell_fatal(&error).await;
            }
            End::ClientGone | End::Told | End::Unknown => {}
        }
        self.leave();
        self.wire.client.close().await;
    }

    /// Gives back what the session holds.
    pub fn leave(&mut self) {
        self.hub.cancels.move_key(&self.origin.cancel_key, None);
        self.give_marks_back();
    }

    pub(super) fn give_marks_back(&mut self) {
        for mark in &mut self.marks {
            if let Some(mark) = mark.take() {
                self.hub.marks.give_back(&self.database, mark);
            }
        }
    }

    /// Writes what waits for the client, and this as the last word.
    pub async fn tell_fatal(&mut self, error: &ClientError) {
        error.write(&mut self.wire.to_client);
        let _ = self.wire.flush_client().await;
    }

    /// Handles all messages that are there, then waits for more.
    async fn step(&mut self) -> Result<(), End> {
        loop {
            self.look_at_cycle();
            let frame = frame::take(&mut self.wire.from_client, Sender::Client).map_err(End::ClientProtocol)?;
            let Some(frame) = frame else { break };
            self.message(frame.freeze()).await?;
        }
        if self.wire.begin_waits {
            self.wire.flush_client().await?;
            let next = tokio::time::timeout(Duration::from_millis(BEGIN_MS_MAX), self.wire.fill_either());
            if let Ok(filled) = next.await {
                filled?;
                return self.wire.absorb();
            }
        }
        self.wire.flush_server().await?;
        self.wire.absorb()?;
        if self.halves.is_some() {
            self.fail_halves().await;
        }
        self.wire.flush_client().await?;
        self.wire.fill_either().await?;
        self.wire.absorb()
    }

    async fn message(&mut self, frame: Bytes) -> Result<(), End> {
        let tag = frame[0];
        if self.hub.replicates() {
            self.cycle.keep(&frame);
        }
        if (self.skip_until_sync || self.wire.is_skipping()) && !matches!(tag, b'S' | b'X') {
            return Ok(());
        }
        if self.lost_transaction && self.tell_lost_transaction(tag, &frame).await? {
            return Ok(());
        }
        self.only_begun &= self.wire.status != b'T' || matches!(tag, b'S' | b'H');
        match tag {
            b'Q' => self.simple_query(frame).await,
            b'P' | b'B' | b'D' | b'E' | b'C' | b'H' | b'S' => self.extended(tag, frame).await,
            b'X' => Err(End::ClientGone),
            b'F' => self.function_call(frame).await,
            // What is left of a COPY that failed; the server ignores it, too.
            b'd' | b'c' | b'f' if self.hub.replicates() => Ok(()),
            _ => {
                self.wire.to_server.extend_from_slice(&frame);
                Ok(())
            }
        }
    }

    /// Appends one of our prepared statements and what is expected of it. `portal` empty: the unnamed one, which ends a
    /// portal of the client's; otherwise it is closed again, and before: a statement that failed has left its portal to the block, because
    /// the server skipped the Close behind it.
    pub fn hidden(&mut self, portal: &str, statement: &str, values: &[Option<&[u8]>]) {
        let out = &mut self.wire.to_server;
        if !portal.is_empty() {
            build::close(out, b'P', portal.as_bytes());
            self.wire.expects.push_back(Expect::Close { hidden: true });
        }
        build::bind_text(out, portal.as_bytes(), statement.as_bytes(), values);
        build::execute(out, portal.as_bytes(), 0);
        self.wire.expects.extend([Expect::Bind { hidden: true }, Expect::Execute { mode: Mode::Hidden }]);
        if !portal.is_empty() {
            build::close(&mut self.wire.to_server, b'P', portal.as_bytes());
            self.wire.expects.push_back(Expect::Close { hidden: true });
        }
    }

    /// Ends a group of hidden messages so that the server answers: with a Sync, or inside the client's batch a Flush.
    pub fn end_hidden(&mut self) {
        if self.in_batch {
            build::flush(&mut self.wire.to_server);
        } else {
            build::sync(&mut self.wire.to_server);
            self.wire.expects.push_back(Expect::Sync { hidden: true });
        }
    }

    /// Sends a text of ours by the simple protocol and waits; the error it brought, if any, is kept in the results.
    pub async fn hidden_query(&mut self, text: &str) -> Result<bool, End> {
        self.wire.clear_results();
        self.wire.hide_errors = true;
        build::query(&mut self.wire.to_server, text.as_bytes());
        self.wire.expects.push_back(Expect::Query { mode: Mode::Hidden });
        let done = self.wire.pump(Until::Answered).await;
        self.wire.hide_errors = false;
        done?;
        Ok(self.wire.results.error.is_none())
    }

    /// Whether a block is open on the server, the client's or ours.
    #[must_use]
    pub fn in_block(&self) -> bool {
        self.wire.status != b'I' || self.own_block
    }

    /// A block is opened now: nothing has been seen in it yet.
    pub fn note_begin(&mut self) {
        let number = self.hub.schema_number.load(Ordering::Acquire);
        // While a DDL commit is under way: what the block will see is known when that has ended.
        self.schema_at_begin = number.is_multiple_of(2).then_some(number);
    }

    /// The same, unless one is open already: BEGIN inside a block is a warning.
    pub fn note_begin_once(&mut self) {
        if self.schema_at_begin.is_none() {
            self.note_begin();
        }
    }

    /// Whether one more savepoint can be remembered.
    ///
    /// # Errors
    /// Past [`SAVEPOINTS_MAX`].
    pub fn may_savepoint(&self) -> Result<(), ClientError> {
        if self.savepoints.len() >= SAVEPOINTS_MAX {
            return Err(ClientError::error("54000", "too many savepoints in one transaction", "Release some."));
        }
        Ok(())
    }

    /// SAVEPOINT, done by the server.
    pub fn remember_savepoint(&mut self, name: &str) {
        self.last_savepoint += 1;
        let (number, position) = (self.last_savepoint, self.log.position());
        self.savepoints.push(Savepoint { number, name: name.to_owned(), position });
    }

    /// RELEASE: this savepoint and those after it are gone.
    pub fn release(&mut self, name: &str) {
        if let Some(at) = self.savepoints.iter().rposition(|s| s.name == name) {
            self.savepoints.truncate(at);
            self.carried.release(at);
        }
    }

    /// ROLLBACK TO: effects since then are gone.
    pub fn roll_back_to(&mut self, name: &str) {
        if let Some(at) = self.savepoints.iter().rposition(|s| s.name == name) {
            let position = self.savepoints[at].position;
            self.savepoints.truncate(at + 1);
            self.carried.roll_back_to(at);
            self.log.truncate(position);
            self.objects.forget_made();
            self.reused.forget_locks();
            // What was planned since then may be about a catalog that is gone.
            self.own_plans.clear();
        }
    }

    /// How many savepoints are open; `None`: no transaction is.
    #[must_use]
    pub fn open_savepoints(&self) -> Option<usize> {
        self.in_block().then_some(self.savepoints.len())
    }

    /// The savepoints as open halves need them: their numbers, and how many effects are before each.
    #[must_use]
    pub fn savepoint_numbers(&self) -> Vec<(u64, usize)> {
        self.savepoints.iter().map(|s| (s.number, s.position.effects())).collect()
    }

    /// ROLLBACK TO reaches open halves before the leader, so that no follower holds a lock which the leader has given up.
    pub async fn roll_halves_back_to(&mut self, name: &str) {
        let savepoint = self.savepoints.iter().rfind(|s| s.name == name);
        let savepoint = savepoint.map(|s| (s.number, s.position.effects()));
        if let (Some((number, effects)), Some(halves)) = (savepoint, &mut self.halves) {
            halves.roll_back_to(&self.hub, number, effects).await;
        }
    }

    /// ROLLBACK reaches open halves before the leader.
    pub async fn roll_halves_back(&mut self) {
        let Some(halves) = self.halves.take() else { return };
        for lost in halves.roll_back(&self.hub).await {
            tracing::info!(node = %lost.follower.node.name, reason = lost.reason, "an open half ended with its connection");
        }
    }

    /// The leader's transaction failed, which gave up its locks back to the last savepoint: so do its halves.
    async fn fail_halves(&mut self) {
        if self.wire.status != b'E' || self.halves.is_none() {
            return;
        }
        match self.savepoints.last().map(|s| (s.number, s.position.effects())) {
            Some((number, effects)) => {
                if let Some(halves) = &mut self.halves {
                    halves.roll_back_to(&self.hub, number, effects).await;
                }
            }
            None => self.roll_halves_back().await,
        }
    }

    /// A transaction ended: settings made inside may be gone, and the isolation level was of that transaction alone.
    pub fn forget_settings(&mut self) {
        if self.settings_touched || self.facts.as_ref().is_some_and(|f| f.isolation != "read committed") {
            self.facts = None;
            self.settings_touched = false;
        }
    }

    /// The transaction is over: its effects are gone.
    pub fn forget_transaction(&mut self) {
        if self.ddl_under_way {
            self.ddl_under_way = false;
            self.has_own_catalog = self.has_temp_objects;
            self.own_plans.clear();
        }
        // What a commit has kept is gone from there already.
        self.carried.end(false);
        self.log = EffectLog::new(Arc::clone(&self.hub.spill));
        self.savepoints.clear();
        self.touched = Touched::default();
        self.objects = Objects::default();
        (self.halves, self.once_turn) = (None, None);
        // COMMIT AND CHAIN: the next one has begun.
        self.is_first = self.wire.status == b'T';
        self.statements.forget_portals();
        self.forget_settings();
        self.own_block = false;
        self.effects_since = None;
        self.held_tag = None;
        self.reused.forget_locks();
        self.schema_at_begin = None;
        if self.is_first {
            self.note_begin();
        }
    }
}
