//! A statement of the `once` lane: on the leader under the closed gate, then in every follower's open half, then compared.
//!
//! While the gate is closed no commit shows anywhere, so all members are in the same state, and the same code has to do the
//! same. Neither a lock that is not free nor slow code may keep the gate closed: both servers end the statement themselves
//! before `proxy.gate_ms_max`; then it is undone on the followers, on the leader, and tried again with the gate open in between.
//! A follower that has not answered by then loses its half, and whatever is slow, the gate opens (`session/closing.rs`).

use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::pg::build::ClientError;
use crate::replicate::deltas::{self, Delta, Kind};
use crate::replicate::effects::Effect;
use crate::replicate::follower::ServerError;
use crate::replicate::once::{Halves, Ran, Statement, is_out_of_time};
use crate::replicate::shapes::ShapeName;
use crate::session::closing::Closing;
use crate::session::execute::SYNC;
use crate::session::limits::Limits;
use crate::session::once_leader::OnLeader;
use crate::session::planning::schema_changed;
use crate::session::run::Session;
use crate::session::simple::error_frame;
use crate::session::wire::End;
use crate::sql::plan::{Once, Plan};
use crate::sql::shape::Shape;

/// How often a statement that was out of time is tried again.
pub(super) const AGAIN_MAX: u32 = 5;
/// Pause before the second attempt, doubled for each further one.
const AGAIN_MS: u64 = 10;
/// How long a statement waits for a recovery that is between its cut and its join.
const JOIN_WAIT_MS_MAX: u64 = 60_000;
/// How long a statement waits for its turn among others of its kind.
const TURN_MS_MAX: u64 = 60_000;
/// What a statement may answer: it is held back until followers agree.
const HELD_BYTES_MAX: usize = 16 << 20;

/// A statement of this lane, and how the client sent it.
#[derive(Debug)]
pub struct OnceCall<'a> {
    pub plan: &'a Plan,
    pub once: &'a Once,
    pub shape: &'a Shape,
    pub text: &'a str,
    pub planned_at: u64,
    pub how: How<'a>,
    /// The command tag waits for the commit.
    pub hold_tag: bool,
}

#[derive(Clone, Copy, Debug)]
pub enum How<'a> {
    Simple,
    /// Types as in `Parse`, parameters and result formats as in `Bind`.
    Extended {
        types: &'a [u8],
        parameters: &'a [u8],
        formats: &'a [u8],
        in_parts: bool,
    },
}

/// What became of it.
#[derive(Debug)]
pub enum Ended {
    /// The client has the answer.
    Done,
    /// The server had an error, which the client has; the server's transaction has failed.
    Failed,
    /// Not done, for a reason of ours, which the client does not have yet.
    Refused(ClientError),
}

/// One attempt.
pub(super) enum Attempt {
    Ended(Ended),
    OutOfTime,
    /// The schema changed since it was planned.
    Replan,
}

pub(super) fn refused(message: impl Into<String>, hint: impl Into<String>) -> Ended {
    Ended::Refused(ClientError::error("0A000", message, hint))
}

fn retry(message: impl Into<String>) -> Ended {
    Ended::Refused(ClientError::error("40001", message, "Try the transaction again."))
}

fn no_turn() -> Ended {
    retry("other statements that call or fire code did not end in time")
}

impl Session {
    /// Runs the statement. The server's block is open.
    ///
    /// # Errors
    /// If one of both sides is gone.
    pub async fn run_once(&mut self, call: &OnceCall<'_>) -> Result<Ended, End> {
        self.catch_up().await?;
        if self.wire.is_skipping() {
            return Ok(Ended::Failed);
        }
        if self.facts.is_none()
            && let Some(error) = self.read_context().await?
        {
            self.wire.to_client.extend_from_slice(&error_frame(&error));
            return Ok(Ended::Failed);
        }
        let name = ShapeName::new(&self.database, &call.shape.key);
        if let Some(refusal) = self.refuses_once(call, &name) {
            return Ok(refusal);
        }
        let serializable = self.facts.as_ref().is_some_and(|facts| facts.isolation == "serializable");
        if serializable && self.chain_modes().await? == "READ ONLY, DEFERRABLE" {
            // Its snapshot waits for the writers that are open, and behind the closed gate those could not end.
            return Ok(refused(
                "code that may write is not called or fired in a SERIALIZABLE READ ONLY DEFERRABLE transaction",
                "Leave out DEFERRABLE.",
            ));
        }
        let hub = Arc::clone(&self.hub);
        // An earlier statement of the same text may have it still.
        let mut turn = self.once_turn.take();
        if turn.is_none() {
            turn = self.take_turn().await;
        }
        if turn.is_none() {
            return Ok(no_turn());
        }
        if self.halves.is_none() {
            let Some(uncut) = hub.cuts.begin(Duration::from_millis(JOIN_WAIT_MS_MAX)).await else {
                return Ok(retry("a node is joining, and until it has joined no code is called or fired"));
            };
            self.halves = Halves::open(&hub, &self.database, uncut).await;
            if self.halves.is_none() {
                return Ok(retry("a follower has no place for one more open transaction that calls or fires code"));
            }
        }
        let mut planned_at = call.planned_at;
        let mut ended = None;
        for attempt in 0..=AGAIN_MAX {
            if attempt > 0 {
                hub.once.again(&name);
                tokio::time::sleep(Duration::from_millis(AGAIN_MS << attempt)).await;
            }
            match self.try_once(call, &name, planned_at, attempt).await? {
                Attempt::Ended(done) => {
                    ended = Some(done);
                    break;
                }
                Attempt::OutOfTime => {}
                Attempt::Replan => {
                    // The catalog's question may wait for locks of somebody who waits for the turn.
                    turn = None;
                    if !self.still_planned(call.text, call.plan, planned_at).await? {
                        ended = Some(Ended::Refused(schema_changed()));
                        break;
                    }
                    planned_at = self.planned_at;
                    turn = self.take_turn().await;
                    if turn.is_none() {
                        ended = Some(no_turn());
                        break;
                    }
                }
            }
        }
        self.lose_halves().await;
        self.once_turn = turn.filter(|_| self.commits_next(call));
        Ok(ended.unwrap_or_else(|| {
            retry(format!(
                "the statement did not end in {} attempts of less than {} ms each: other transactions hold what it locks, or it takes long",
                AGAIN_MAX + 1,
                hub.config.proxy.gate_ms_max
            ))
        }))
    }

    /// Statements of the lane run one at a time. `None`: the others did not end in time.
    async fn take_turn(&self) -> Option<tokio::sync::OwnedMutexGuard<()>> {
        let turn = Arc::clone(&self.hub.once.order).lock_owned();
        tokio::time::timeout(Duration::from_millis(TURN_MS_MAX), turn).await.ok()
    }

    /// Whether nothing is between the statement and its commit. Then the next of its kind waits for that, because locks would only
    /// be in its way; but nobody may hold the turn who waits without a limit, for locks or for a client. What comes behind it in a
    /// simple text gives the turn back if it is not of the lane.
    fn commits_next(&self, call: &OnceCall<'_>) -> bool {
        let synced = || self.wire.from_client.starts_with(&SYNC);
        self.own_block && (matches!(call.how, How::Simple) || synced())
    }

    /// Followers that have lost their half leave the member set now; if that can not be stored the COMMIT will say so.
    async fn lose_halves(&mut self) {
        let lost = self.halves.as_mut().map(Halves::lost).unwrap_or_default();
        for lost in lost {
            if let Err(error) = self.hub.lost(&lost.follower, lost.state, &lost.reason).await {
                tracing::error!(%error, "a follower that lost its half could not be taken out yet");
            }
        }
    }

    fn refuses_once(&self, call: &OnceCall<'_>, name: &ShapeName) -> Option<Ended> {
        let facts = self.facts.as_ref()?;
        if let Some(why) = self.hub.once.refused(name) {
            return Some(refused(
                format!("this statement is not run any more: {why}"),
                "Make its code do the same on every server (see docs/limits.md), then restart the proxy.",
            ));
        }
        if let Some(error) = self.refuses_session(facts) {
            return Some(Ended::Refused(error));
        }
        // Code that was read in whole names none of them: the plan is this session's own.
        if self.has_temp_objects && call.once.proof.unproven.is_some() {
            return Some(refused(
                "code that is not proven is not called or fired in a session that has made temporary objects, which followers do not have",
                "Use another connection for it.",
            ));
        }
        if facts.isolation != "read committed" && !self.is_first {
            return Some(refused(
                format!(
                    "in {} a statement that calls or fires code must be the first of its transaction: it needs a snapshot that followers have, too",
                    facts.isolation.to_uppercase()
                ),
                "Use READ COMMITTED, or send it first.",
            ));
        }
        if let How::Extended { types, .. } = call.how
            && call.once.proof.odd_types
            && crate::session::parameters::has_user_types(types)
        {
            return Some(refused(
                "a parameter is of a type that is not PostgreSQL's own, and casts or checks of such types call functions that are not immutable",
                "Leave the parameter's type to the server, and cast it in the text.",
            ));
        }
        let parameters = match call.how {
            How::Simple => Vec::new(),
            How::Extended { types, parameters, .. } => {
                crate::session::parameters::texts(types, parameters).unwrap_or_default()
            }
        };
        if call.once.edits.reads_clock(call.text, call.shape, &parameters) {
            let refusal = crate::sql::refuse::clock_literal();
            return Some(refused(refusal.message, refusal.hint));
        }
        None
    }

    async fn try_once(
        &mut self,
        call: &OnceCall<'_>,
        name: &ShapeName,
        planned_at: u64,
        attempt: u32,
    ) -> Result<Attempt, End> {
        let hub = Arc::clone(&self.hub);
        let gate_ms = hub.config.proxy.gate_ms_max;
        let snapshot_is_kept = self.facts.as_ref().is_some_and(|facts| facts.isolation != "read committed");
        let Some(mut halves) = self.halves.take() else { return Ok(Attempt::OutOfTime) };
        let savepoints = self.savepoint_numbers();
        halves.catch_up(&hub, &self.log, &savepoints).await;
        let mut statement = None;
        if !snapshot_is_kept {
            if !self.ours(&[("pgtandem_once", &[])]).await? {
                self.halves = Some(halves);
                return Ok(self.told());
            }
            match self.prepare_once(call, &mut halves, hub.config.proxy.follower_ms_max).await? {
                Ok(made) => statement = Some(made),
                Err(attempt) => {
                    self.halves = Some(halves);
                    return Ok(attempt);
                }
            }
        }
        let mut gate = if halves.is_empty() && !snapshot_is_kept {
            Closing::not_needed(gate_ms)
        } else {
            match Closing::close(&hub.gate, gate_ms).await {
                Ok(gate) => gate,
                Err(_) => {
                    self.halves = Some(halves);
                    return self.give_up_attempt(!snapshot_is_kept).await;
                }
            }
        };
        if snapshot_is_kept {
            // The snapshot must be of the state that all members are in: taken anew, while nothing can change.
            if !gate.run(self.ours(&[("pgtandem_chain", &[]), ("pgtandem_once", &[])])).await? {
                self.halves = Some(halves);
                return Ok(self.told());
            }
            let answer_ms = gate.answer_ms();
            match gate.run(self.prepare_once(call, &mut halves, answer_ms)).await? {
                Ok(made) => statement = Some(made),
                Err(attempt) => {
                    self.halves = Some(halves);
                    return Ok(attempt);
                }
            }
        }
        if gate.is_over() {
            self.halves = Some(halves);
            return self.give_up_attempt(true).await;
        }
        if hub.schema_number.load(std::sync::atomic::Ordering::Acquire) != planned_at {
            self.halves = Some(halves);
            gate.open();
            self.give_up_attempt(true).await?;
            return Ok(Attempt::Replan);
        }
        let start = self.wire.to_client.len();
        self.wire.mute = true;
        let catches_errors = call.once.proof.catches_errors;
        let limits = gate.is_closed().then(|| Limits::new(gate.leader_ms(), attempt, catches_errors));
        let on_leader = gate.run(self.on_leader(call, limits.as_ref())).await;
        self.wire.mute = false;
        let on_leader = match on_leader? {
            Ok(on_leader) => on_leader,
            Err(attempt) => {
                self.halves = Some(halves);
                if matches!(attempt, Attempt::OutOfTime) {
                    self.wire.to_client.truncate(start);
                    self.wire.take_held_rows();
                    gate.open();
                    return self.give_up_attempt(true).await;
                }
                return Ok(attempt);
            }
        };
        let problem = match self.unsuited(&on_leader, start) {
            Some(refusal) => Some(Attempt::Ended(refusal)),
            // Others may have committed meanwhile.
            None if gate.is_over() => Some(Attempt::OutOfTime),
            None if on_leader.deltas.is_empty() => None,
            None => match (statement, gate.server_ms()) {
                (None, _) => None,
                (Some(_), None) => Some(Attempt::OutOfTime),
                (Some(statement), Some(server_ms)) => {
                    let answer_ms = gate.answer_ms();
                    let answers = gate.run(halves.run(&statement, server_ms, answer_ms)).await;
                    if gate.is_over() {
                        Some(Attempt::OutOfTime)
                    } else {
                        self.judge(name, &on_leader, answers).or_else(|| {
                            let kept = self.log.push(Effect::Once);
                            kept.err().map(|error| Attempt::Ended(Ended::Refused(error.into())))
                        })
                    }
                }
            },
        };
        // Nothing of it shows, and the leader still holds its locks: others need not wait while it is undone or kept.
        gate.open();
        if let Some(attempt) = problem {
            halves.undo(&hub).await;
            self.halves = Some(halves);
            self.wire.to_client.truncate(start);
            self.wire.take_held_rows();
            self.give_up_attempt(true).await?;
            return Ok(attempt);
        }
        // What wrote nothing is no effect.
        if !on_leader.deltas.is_empty() {
            halves.keep(self.log.effects().len());
            self.note_once(&on_leader);
        }
        self.halves = Some(halves);
        if call.hold_tag {
            self.held_tag.clone_from(&self.last_tag);
        }
        if !self.ours(&[("pgtandem_once_keep", &[])]).await? {
            return Ok(self.told());
        }
        hub.once.ran(name, call.once.proof.unproven.as_deref());
        Ok(Attempt::Ended(Ended::Done))
    }

    /// Undoes the statement on the leader, where followers have undone it already.
    async fn give_up_attempt(&mut self, has_savepoint: bool) -> Result<Attempt, End> {
        if has_savepoint && !self.ours(&[("pgtandem_once_undo", &[]), ("pgtandem_once_keep", &[])]).await? {
            return Ok(self.told());
        }
        Ok(Attempt::OutOfTime)
    }

    /// Reads what followers must be given, and has them ready within that time.
    async fn prepare_once(
        &mut self,
        call: &OnceCall<'_>,
        halves: &mut Halves,
        answer_ms: u64,
    ) -> Result<Result<Statement, Attempt>, End> {
        let Some(context) = self.context.clone() else {
            return Ok(Err(Attempt::Ended(Ended::Refused(schema_changed()))));
        };
        let settings = &call.once.proof.settings;
        let mut expressions: Vec<String> = call.once.session_values.clone();
        let setting =
            |name: &String| format!("pg_catalog.current_setting({}, true)", crate::sql::facts::quote_literal(name));
        expressions.extend(settings.iter().map(setting));
        let Some(values) = self.ask_each(&expressions).await? else { return Ok(Err(self.told())) };
        let (session_values, setting_values) = values.split_at(call.once.session_values.len().min(values.len()));
        let (types, parameters) = match call.how {
            How::Simple => (Vec::new(), Vec::new()),
            How::Extended { types, parameters, .. } => match self.parameter_types(call.text, types).await? {
                Some(types) => (types, parameters.to_vec()),
                None => return Ok(Err(self.told())),
            },
        };
        let given = settings.iter().zip(setting_values);
        let statement = Statement {
            context,
            text: call.once.follower_text(call.text, call.shape, session_values),
            parameters: if types.is_empty() { Vec::new() } else { parameters },
            types,
            settings: given.filter_map(|(name, value)| Some((name.clone(), value.clone()?))).collect(),
            number: self.marks.iter().flatten().next().map_or(0, |mark| mark.id),
        };
        halves.ready(&statement, answer_ms).await;
        Ok(Ok(statement))
    }

    /// Why what the leader did can not be done by followers.
    fn unsuited(&self, on_leader: &OnLeader, start: usize) -> Option<Ended> {
        if self.wire.to_client.len().saturating_sub(start) > HELD_BYTES_MAX {
            return Some(Ended::Refused(ClientError::error(
                "54000",
                "the answer of a statement that calls or fires code is more than 16 MB",
                "Let it write first, and SELECT the rows then.",
            )));
        }
        let bad = |delta: &&Delta| {
            !matches!(delta.kind, Kind::Permanent | Kind::Catalog) || delta.deferrable_triggers || delta.is_own()
        };
        let delta = on_leader.deltas.iter().find(bad)?;
        let table = &delta.table;
        Some(match delta.kind {
            Kind::Temporary => refused(
                format!("the statement wrote to the temporary table {table}, which followers do not have"),
                "Write to temporary tables in statements of their own.",
            ),
            Kind::Unlogged => refused(
                format!("the statement wrote to the unlogged table {table}: a node that is filled gets it empty"),
                format!("Type: ALTER TABLE {table} SET LOGGED"),
            ),
            Kind::LargeObject => refused(
                "the statement wrote large objects, whose numbers differ from server to server",
                "Use a bytea column.",
            ),
            _ if delta.is_own() => refused(
                format!("the statement wrote to {table}, which belongs to pgtandem itself"),
                "Leave the schema pgtandem alone.",
            ),
            Kind::Permanent | Kind::Catalog => refused(
                format!("the statement wrote to {table}, which has a deferrable trigger: it runs as late as COMMIT"),
                "Make the trigger not deferrable.",
            ),
        })
    }

    /// Compares what followers did. `None`: the same.
    fn judge(
        &self,
        name: &ShapeName,
        on_leader: &OnLeader,
        answers: Vec<(String, Result<Ran, ServerError>)>,
    ) -> Option<Attempt> {
        let mut out_of_time = false;
        for (node, answer) in answers {
            let difference = match answer {
                Err(error) if is_out_of_time(&error) => {
                    out_of_time = true;
                    None
                }
                Err(error) => Some(format!("on {node} it failed: {error}")),
                Ok(ran) => match (on_leader.rows, ran.rows) {
                    (Some(here), Some(there)) if here != there => {
                        Some(format!("it processed {here} rows on the leader, {there} on {node}"))
                    }
                    _ => deltas::difference(&on_leader.deltas, &ran.deltas).map(|what| format!("{what} ({node})")),
                },
            };
            if let Some(difference) = difference {
                tracing::error!(
                    node,
                    database = &*self.database,
                    statement = &*name.text,
                    difference,
                    "a statement did something else on a follower: undone, and refused from now on"
                );
                self.hub.once.refuse(name, &difference);
                return Some(Attempt::Ended(retry(format!(
                    "the statement did not do the same on every server, so it was undone: {difference}"
                ))));
            }
        }
        out_of_time.then_some(Attempt::OutOfTime)
    }

    /// What the transaction is, now that such a statement is part of it.
    fn note_once(&mut self, on_leader: &OnLeader) {
        self.effects_since.get_or_insert_with(Instant::now);
        self.log.deferrable_constraints = true;
        if on_leader.deltas.iter().any(|delta| delta.kind == Kind::Catalog) {
            self.log.ddl = true;
            self.ddl_under_way = true;
            self.has_own_catalog = true;
            self.own_plans.clear();
        }
    }
}
