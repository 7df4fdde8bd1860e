//! Halves that are open before their COMMIT, because a statement ran in them that can not be applied again.
//!
//! A transaction with such a statement has an open half on every follower from that statement on. The order of calls:
//! [`Halves::open`]; for each statement [`Halves::catch_up`], [`Halves::ready`] and, under the closed gate, [`Halves::run`], then
//! [`Halves::keep`] or [`Halves::undo`]; [`Halves::roll_back_to`] in between; at the end [`Halves::take`] for the COMMIT or
//! [`Halves::roll_back`]. Dropping them ends their connections, and so rolls back. A half is never made again: one that
//! is lost is reported in [`Halves::lost`], and its follower leaves.
//!
//! The client's text runs inside a function that exists for the moment and belongs to the client's role, SECURITY DEFINER: inside such a
//! function PostgreSQL lets nobody SET ROLE or SET SESSION AUTHORIZATION (guc.c, `GUC_NOT_WHILE_SEC_REST`), so that no code of a
//! client's can become the proxy's own role, which the session belongs to.

use std::fmt::Write as _;
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::join_all;
use pgtandem_proto::membership::NodeState;
use tokio::sync::OwnedSemaphorePermit;

use crate::replicate::cuts::Uncut;
use crate::replicate::deltas::{self, Delta};
use crate::replicate::effects::EffectLog;
use crate::replicate::flight::{Decision, Writer};
use crate::replicate::follower::{Answer, Connection, ServerError};
use crate::replicate::hub::{Follower, Hub, within};
use crate::replicate::schema::Context;
use crate::sql::facts::{quote_identifier, quote_literal};

/// How long a transaction may wait until a follower has a place for one more open half.
const OPEN_PLACE_MS_MAX: u64 = 30_000;

/// Savepoints of the session: a number that is never used twice, and how many effects are before it.
pub type Savepoints<'s> = &'s [(u64, usize)];

/// A statement as followers run it.
#[derive(Debug)]
pub struct Statement {
    pub context: Arc<Context>,
    /// Values of the session are literals in it.
    pub text: String,
    /// SQL names of the types of its parameters.
    pub types: Vec<String>,
    /// Parameter section of a `Bind`; empty for none.
    pub parameters: Vec<u8>,
    /// Settings that it reads and that no context has, with the leader's values.
    pub settings: Vec<(String, String)>,
    /// Part of the function's name that no other transaction uses now.
    pub number: i32,
}

/// What the statement did on one follower.
#[derive(Debug, PartialEq, Eq)]
pub struct Ran {
    /// Rows that it processed.
    pub rows: Option<u64>,
    pub deltas: Vec<Delta>,
}

/// A follower that lost its half: it must leave the member set.
#[derive(Debug)]
pub struct Lost {
    pub follower: Arc<Follower>,
    pub state: NodeState,
    pub reason: String,
}

#[derive(Debug)]
pub struct Halves {
    halves: Vec<Half>,
    lost: Vec<Lost>,
    _uncut: Uncut,
}

/// What is left to do with the savepoint around the last statement, before anything else.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Left {
    Nothing,
    Release,
    Undo,
}

#[derive(Debug)]
pub(super) struct Half {
    pub(super) follower: Arc<Follower>,
    connection: Connection,
    /// How many effects of the list are in it.
    applied: usize,
    /// Numbers of the session's savepoints that exist in it.
    savepoints: Vec<u64>,
    left: Left,
    _place: OwnedSemaphorePermit,
}

impl Halves {
    /// Opens a half on every follower. `None`: one has no place for it before the limit.
    pub async fn open(hub: &Hub, database: &Arc<str>, uncut: Uncut) -> Option<Self> {
        let mut halves = Self { halves: Vec::new(), lost: Vec::new(), _uncut: uncut };
        let view = hub.view();
        let mut places = Vec::with_capacity(view.followers.len());
        for follower in &view.followers {
            let place = Arc::clone(&follower.open_places).acquire_owned();
            let place = tokio::time::timeout(Duration::from_millis(OPEN_PLACE_MS_MAX), place).await;
            // The semaphore is never closed.
            places.push(place.ok()?.ok()?);
        }
        let opening = view.followers.iter().map(|follower| begin(hub, follower, database));
        for ((follower, place), opened) in view.followers.iter().zip(places).zip(join_all(opening).await) {
            let follower = Arc::clone(follower);
            match opened {
                Ok(connection) => halves.halves.push(Half {
                    follower,
                    connection,
                    applied: 0,
                    savepoints: Vec::new(),
                    left: Left::Nothing,
                    _place: place,
                }),
                Err(e) => halves.lose(follower, &e),
            }
        }
        Some(halves)
    }

    /// No follower takes part.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.halves.is_empty()
    }

    fn lose(&mut self, follower: Arc<Follower>, error: &ServerError) {
        let state = if error.is_sick() { NodeState::Stale } else { NodeState::Suspect };
        let reason = format!("its open half of a transaction was lost: {error}");
        self.lost.push(Lost { follower, state, reason });
    }

    /// The followers that lost their half since this was last asked. No commit of this transaction may be decided before they have
    /// left the member set.
    pub fn lost(&mut self) -> Vec<Lost> {
        std::mem::take(&mut self.lost)
    }

    /// Does the same in all halves at once; those that fail are lost.
    async fn all(&mut self, hub: &Hub, work: impl AsyncFn(&mut Half) -> Result<(), ServerError>) {
        let results = self.each(hub, work).await;
        self.sort_out(results);
    }

    fn sort_out(&mut self, results: Vec<Result<(), ServerError>>) {
        for (half, result) in std::mem::take(&mut self.halves).into_iter().zip(results) {
            match result {
                Ok(()) => self.halves.push(half),
                Err(e) => self.lose(half.follower, &e),
            }
        }
    }

    async fn each<T>(
        &mut self,
        hub: &Hub,
        work: impl AsyncFn(&mut Half) -> Result<T, ServerError>,
    ) -> Vec<Result<T, ServerError>> {
        self.each_within(hub.config.proxy.follower_ms_max, work).await
    }

    async fn each_within<T>(
        &mut self,
        limit_ms: u64,
        work: impl AsyncFn(&mut Half) -> Result<T, ServerError>,
    ) -> Vec<Result<T, ServerError>> {
        let work = &work;
        join_all(self.halves.iter_mut().map(|half| async move {
            let gone = half.follower.gone.clone();
            tokio::select! {
                result = within(limit_ms, work(half)) => result,
                () = gone.cancelled() => Err(ServerError::Other("it left the member set".into())),
            }
        }))
        .await
    }

    /// Brings all halves to where the list is, with the same savepoints.
    pub async fn catch_up(&mut self, hub: &Hub, log: &EffectLog, savepoints: Savepoints<'_>) {
        if let Some(number) = log.barrier
            && !self.halves.is_empty()
        {
            hub.gate.barrier(number).await;
        }
        self.all(hub, async |half| half.catch_up(hub, log, savepoints).await).await;
    }

    /// Sets a savepoint around the statement and prepares it, so that it can be run in one flight. A follower that has not answered
    /// after that many milliseconds has lost its half.
    pub async fn ready(&mut self, statement: &Statement, answer_ms: u64) {
        let results = self.each_within(answer_ms, async |half| half.ready(statement).await).await;
        self.sort_out(results);
    }

    /// Runs the statement in all halves, for at most `server_ms` on the server. Answers are in the order of followers; one that is
    /// sick, or has not answered after `answer_ms`, is among the lost and not among the answers: what it did is not known.
    pub async fn run(
        &mut self,
        statement: &Statement,
        server_ms: u64,
        answer_ms: u64,
    ) -> Vec<(String, Result<Ran, ServerError>)> {
        let results = self.each_within(answer_ms, async |half| half.run(statement, server_ms).await).await;
        let mut answers = Vec::with_capacity(results.len());
        for (mut half, result) in std::mem::take(&mut self.halves).into_iter().zip(results) {
            match result {
                Err(e) if e.is_sick() && !is_out_of_time(&e) => self.lose(half.follower, &e),
                result => {
                    half.left = Left::Undo;
                    answers.push((half.follower.node.name.clone(), result));
                    self.halves.push(half);
                }
            }
        }
        answers
    }

    /// The statement is part of the transaction: it is the last of this many effects.
    pub fn keep(&mut self, effects: usize) {
        for half in &mut self.halves {
            (half.left, half.applied) = (Left::Release, effects);
        }
    }

    /// Nothing of the last statement is left in any half.
    pub async fn undo(&mut self, hub: &Hub) {
        self.all(hub, async |half| half.settle().await).await;
    }

    /// As the leader is about to do. A savepoint that no half has was set after the last of what is in them.
    pub async fn roll_back_to(&mut self, hub: &Hub, savepoint: u64, effects: usize) {
        self.all(hub, async |half| half.roll_back_to(savepoint, effects).await).await;
    }

    /// Ends all halves; when this returns they hold no lock.
    pub async fn roll_back(mut self, hub: &Hub) -> Vec<Lost> {
        self.all(hub, async |half| {
            let mut writer = Writer::resume(&mut half.connection);
            writer.statement("ROLLBACK");
            writer.end().await.map(|_| ())
        })
        .await;
        // Whatever the reason, its connection ends with it, and nothing was decided.
        self.lost()
    }

    /// The half of this follower, for its COMMIT.
    pub(super) fn take(&mut self, follower: &Follower) -> Option<Half> {
        let at = self.halves.iter().position(|half| half.follower.id == follower.id)?;
        Some(self.halves.swap_remove(at))
    }
}

/// Whether the server itself ended the statement: a lock that was not free, or its time was over.
#[must_use]
pub fn is_out_of_time(error: &ServerError) -> bool {
    matches!(error.sqlstate(), Some("55P03" | "57014" | "40P01"))
}

/// A connection of its own: what the client's code sets in it must not reach another transaction.
async fn begin(hub: &Hub, follower: &Follower, database: &Arc<str>) -> Result<Connection, ServerError> {
    let (epoch, secret) = hub.epoch_and_secret().ok_or_else(|| ServerError::Other("the epoch is over".into()))?;
    let mut connection = hub.tunnel_connection(&follower.node, database, epoch, Some(&secret)).await?;
    let mut writer = Writer::resume(&mut connection);
    writer.execute("pgtandem_begin", &[]);
    writer.end().await?;
    Ok(connection)
}

impl Half {
    /// Does what is left with the savepoint of the last statement.
    async fn settle(&mut self) -> Result<(), ServerError> {
        let mut writer = Writer::resume(&mut self.connection);
        match std::mem::replace(&mut self.left, Left::Nothing) {
            Left::Nothing => return Ok(()),
            Left::Release => {}
            Left::Undo => {
                writer.connection.context = None;
                writer.statement("ROLLBACK TO SAVEPOINT pgtandem_once");
            }
        }
        writer.statement("RELEASE SAVEPOINT pgtandem_once");
        writer.end().await.map(|_| ())
    }

    async fn catch_up(&mut self, hub: &Hub, log: &EffectLog, savepoints: Savepoints<'_>) -> Result<(), ServerError> {
        self.settle().await?;
        let common = self.savepoints.iter().zip(savepoints).take_while(|(here, (there, _))| *here == there).count();
        if let Some(released) = self.savepoints.get(common) {
            let mut writer = Writer::resume(&mut self.connection);
            writer.statement(&format!("RELEASE SAVEPOINT pgtandem_s{released}"));
            writer.end().await?;
            self.savepoints.truncate(common);
        }
        for (savepoint, effects) in savepoints.get(common..).unwrap_or_default() {
            self.part(hub, log, *effects, Some(*savepoint)).await?;
        }
        self.part(hub, log, log.effects().len(), None).await
    }

    /// Applies the effects up to that number, then sets a savepoint. What only differs because earlier commits are not finished there
    /// yet is tried once more.
    async fn part(&mut self, hub: &Hub, log: &EffectLog, to: usize, savepoint: Option<u64>) -> Result<(), ServerError> {
        match self.try_part(log, to, savepoint).await {
            Err(e) if !e.is_sick() => {
                tracing::debug!(node = %self.follower.node.name, error = %e, "part of an open half is tried once more");
                self.connection.out.clear();
                self.connection.forget();
                let mut writer = Writer::resume(&mut self.connection);
                writer.statement("ROLLBACK TO SAVEPOINT pgtandem_part");
                writer.statement("RELEASE SAVEPOINT pgtandem_part");
                writer.end().await?;
                hub.gate.barrier(hub.gate.next_number()).await;
                self.try_part(log, to, savepoint).await?;
            }
            result => result?,
        }
        self.applied = to;
        self.savepoints.extend(savepoint);
        Ok(())
    }

    async fn try_part(&mut self, log: &EffectLog, to: usize, savepoint: Option<u64>) -> Result<(), ServerError> {
        let which = self.applied..to.max(self.applied);
        if which.is_empty() && savepoint.is_none() {
            return Ok(());
        }
        let mut writer = Writer::resume(&mut self.connection);
        if !which.is_empty() {
            writer.statement("SAVEPOINT pgtandem_part");
            writer.some_effects(log, which).await?;
            writer.statement("RELEASE SAVEPOINT pgtandem_part");
        }
        if let Some(savepoint) = savepoint {
            writer.statement(&format!("SAVEPOINT pgtandem_s{savepoint}"));
        }
        writer.end().await.map(|_| ())
    }

    async fn ready(&mut self, statement: &Statement) -> Result<(), ServerError> {
        self.settle().await?;
        let mut writer = Writer::resume(&mut self.connection);
        writer.statement("SAVEPOINT pgtandem_once");
        writer.enter(&statement.context, &crate::replicate::effects::EffectRole::Own);
        for (name, value) in &statement.settings {
            writer.statement(&format!(
                "SELECT pg_catalog.set_config({}, {}, true)",
                quote_literal(name),
                quote_literal(value)
            ));
        }
        writer.statement(&statement.definition());
        let owner = quote_identifier(&statement.context.role);
        writer.statement(&format!("ALTER FUNCTION {} OWNER TO {owner}", statement.signature()));
        self.left = Left::Undo;
        writer.end().await.map(|_| ())
    }

    async fn run(&mut self, statement: &Statement, ms_max: u64) -> Result<Ran, ServerError> {
        let mut writer = Writer::resume(&mut self.connection);
        writer.execute("pgtandem_deltas", &[]);
        writer.statement(&format!("SET LOCAL statement_timeout = {ms_max}"));
        writer.call(statement);
        writer.execute("pgtandem_deltas", &[]);
        writer.statement("SET LOCAL statement_timeout = 0");
        writer.statement(&format!("DROP FUNCTION {}", statement.signature()));
        // The client's code may have changed any setting.
        writer.connection.context = None;
        let answer = writer.end().await?;
        Ran::read(&answer).ok_or_else(|| ServerError::Other("the statement's counts were not answered".into()))
    }

    async fn roll_back_to(&mut self, savepoint: u64, effects: usize) -> Result<(), ServerError> {
        let Some(at) = self.savepoints.iter().position(|here| *here == savepoint) else { return self.settle().await };
        let mut writer = Writer::resume(&mut self.connection);
        // Settings that were made since are gone; the savepoint around the last statement, too.
        writer.connection.context = None;
        writer.statement(&format!("ROLLBACK TO SAVEPOINT pgtandem_s{savepoint}"));
        writer.end().await?;
        self.left = Left::Nothing;
        self.savepoints.truncate(at + 1);
        self.applied = self.applied.min(effects);
        Ok(())
    }

    /// Applies the rest and prepares. Gives the connection, which serves no other transaction.
    pub(super) async fn prepare(
        mut self,
        hub: &Hub,
        log: &EffectLog,
        decision: &Decision,
    ) -> Result<Connection, ServerError> {
        match self.try_prepare(hub, log, decision).await {
            Ok(()) => Ok(self.connection),
            Err(e) => {
                // It holds no lock when the leader rolls back.
                if !e.is_sick() {
                    self.connection.out.clear();
                    let mut writer = Writer::resume(&mut self.connection);
                    writer.statement("ROLLBACK");
                    writer.end().await?;
                }
                Err(e)
            }
        }
    }

    async fn try_prepare(&mut self, hub: &Hub, log: &EffectLog, decision: &Decision) -> Result<(), ServerError> {
        self.settle().await?;
        self.part(hub, log, log.effects().len(), None).await?;
        Writer::resume(&mut self.connection).prepare(decision).await
    }
}

impl Statement {
    fn signature(&self) -> String {
        format!("pgtandem.once_{}({})", self.number, self.types.join(", "))
    }

    /// The client's text as the body of a function, with its parameters as the function's.
    fn definition(&self) -> String {
        let mut body = format!("DECLARE n bigint; BEGIN EXECUTE {}", quote_literal(&self.text));
        for number in 1..=self.types.len() {
            let _ = write!(body, "{} ${number}", if number == 1 { " USING" } else { "," });
        }
        body.push_str("; GET DIAGNOSTICS n = ROW_COUNT; RETURN 'rows ' || n; END");
        format!(
            "CREATE FUNCTION {} RETURNS pg_catalog.text LANGUAGE plpgsql SECURITY DEFINER AS {}",
            self.signature(),
            quote_literal(&body)
        )
    }
}

impl Writer<'_> {
    fn call(&mut self, statement: &Statement) {
        let list = (1..=statement.types.len()).map(|number| format!("${number}")).collect::<Vec<_>>().join(", ");
        let text = format!("SELECT pgtandem.once_{}({list})", statement.number);
        crate::pg::build::parse(&mut self.connection.out, b"", text.as_bytes(), &[]);
        if statement.parameters.is_empty() {
            self.execute("", &[]);
        } else {
            crate::pg::build::bind_raw(&mut self.connection.out, b"", b"", &statement.parameters, &[]);
            crate::pg::build::execute(&mut self.connection.out, b"", 0);
        }
    }
}

impl Ran {
    /// The rows are: changes before, `rows n`, changes after.
    fn read(answer: &Answer) -> Option<Self> {
        let texts: Vec<&str> = answer.values.iter().flatten().filter_map(|v| std::str::from_utf8(v).ok()).collect();
        let [before, rows, after] = texts.as_slice() else { return None };
        let rows = rows.strip_prefix("rows ")?.parse().ok();
        Some(Self { rows, deltas: deltas::between(before, after)? })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_client_s_text_is_quoted_twice_and_its_parameters_are_the_function_s() {
        let statement = Statement {
            context: Arc::new(Context { role: "app".into(), settings: Vec::new() }),
            text: "SELECT f($1, 'it''s')".into(),
            types: vec!["integer".into(), "text".into()],
            parameters: Vec::new(),
            settings: Vec::new(),
            number: 7,
        };
        assert_eq!(
            statement.definition(),
            "CREATE FUNCTION pgtandem.once_7(integer, text) RETURNS pg_catalog.text LANGUAGE plpgsql SECURITY DEFINER AS \
             'DECLARE n bigint; BEGIN EXECUTE ''SELECT f($1, ''''it''''''''s'''')'' USING $1, $2; \
             GET DIAGNOSTICS n = ROW_COUNT; RETURN ''rows '' || n; END'"
        );
    }
}
