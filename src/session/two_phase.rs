//! Two-phase commit by clients: PREPARE TRANSACTION, COMMIT PREPARED, ROLLBACK PREPARED.

use std::cell::RefCell;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use bytes::Bytes;

use crate::pg::build::{self, ClientError};
use crate::replicate::commit::{self, PrepareError, Prepared};
use crate::replicate::effects::EffectLog;
use crate::replicate::flight::Decision;
use crate::replicate::gate::{Closed, Pass};
use crate::replicate::hub::{HubError, PLACES};
use crate::replicate::nodewise::{HOME, Place, Servers};
use crate::replicate::resolve;
use crate::replicate::two_phase::{self, Fate, Found, Note, Transaction};
use crate::session::commit::{OUTCOME_MS_MAX, OUTCOME_POLL_MS, SchemaChange, Told, prepare_error};
use crate::session::effect::{client_error_frame, put_tag};
use crate::session::nodewise::TURN_MS_MAX;
use crate::session::run::Session;
use crate::session::simple::error_frame;
use crate::session::wire::{End, Expect, Mode, Until};
use crate::sql::facts::quote_literal;
use crate::sql::plan::Finish;

impl Session {
    /// PREPARE TRANSACTION in a block of the client's. After an error the transaction is gone everywhere.
    pub async fn prepare_transaction(&mut self, gid: &str) -> Result<Told, End> {
        self.cycle.is_special = true;
        self.wire.flush_much_to_client().await?;
        if self.halves.is_some() {
            // A half that is open on a follower has a connection of its own and ends with its session.
            self.roll_halves_back().await;
            self.hidden_query("ROLLBACK").await?;
            return Ok(Err(client_error_frame(&ClientError::error(
                "0A000",
                "PREPARE TRANSACTION of a transaction that has called or fired code is not supported",
                "Use COMMIT.",
            ))));
        }
        if self.log.schema_bound.is_some() {
            self.hidden_query("ROLLBACK").await?;
            return Ok(Err(client_error_frame(&ClientError::error(
                "0A000",
                "PREPARE TRANSACTION of a definition about all objects that are there is not supported: others may be there at its end",
                "Use COMMIT, or name one object in each statement.",
            ))));
        }
        let mut sequences = None;
        if self.touched.is_used() {
            match self.carry_sequences().await? {
                Ok(reached) => sequences = Some(reached),
                Err(error) => {
                    self.hidden_query("ROLLBACK").await?;
                    return Ok(Err(error));
                }
            }
        }
        let fresh = EffectLog::new(Arc::clone(&self.hub.spill));
        let log = Arc::new(std::mem::replace(&mut self.log, fresh));
        if log.deferrable_constraints && !self.hidden_query("SET CONSTRAINTS ALL IMMEDIATE").await? {
            let error = self.last_error();
            self.hidden_query("ROLLBACK").await?;
            return Ok(Err(error));
        }
        if self.facts.is_none()
            && let Some(error) = self.read_context().await?
        {
            self.hidden_query("ROLLBACK").await?;
            return Ok(Err(error_frame(&error)));
        }
        let transaction = match self.note_transaction(gid, log.ddl).await? {
            Ok(transaction) => transaction,
            Err(error) => {
                self.hidden_query("ROLLBACK").await?;
                return Ok(Err(client_error_frame(&error)));
            }
        };
        let note = &transaction.note;
        let owner = self.context.as_ref().map(|context| context.role.clone());
        let decision = Decision { mark_id: note.mark_id, mark_n: note.mark_n, after: None, gid: gid.to_owned(), owner };
        let mut held = Vec::new();
        match self.prepare_everywhere(&log, &decision, &mut held).await {
            Ok(Ok(())) => {
                commit::give_back(&self.hub, &self.thread.pool, &self.database, held);
                self.hub.two_phase.put(transaction);
                if let Some((generation, bounds)) = sequences {
                    // Sequences are moved at once, whatever becomes of the transaction.
                    self.hub.sequences.raise(generation, &self.database, bounds);
                }
                Ok(Ok(()))
            }
            Ok(Err(error)) => {
                self.forget_transaction_of_client(*transaction).await;
                Ok(Err(error))
            }
            Err(end) => {
                self.look_later(transaction, None);
                Err(end)
            }
        }
    }

    /// Takes the name and a mark for it, and notes both down on every member.
    async fn note_transaction(&mut self, gid: &str, ddl: bool) -> Result<Result<Box<Transaction>, ClientError>, End> {
        self.hidden_query("SELECT pg_catalog.current_setting('max_prepared_transactions')").await?;
        let value = self.wire.results.values.pop().flatten().unwrap_or_default();
        let most: usize = String::from_utf8_lossy(&value).parse().unwrap_or(0);
        match self.hub.two_phase.reserve(gid) {
            // The same words as PostgreSQL's.
            None => {
                let what = format!("transaction identifier \"{gid}\" is already in use");
                return Ok(Err(ClientError::error("42710", what, "Finish that one, or use another name.")));
            }
            Some(count) if count + PLACES >= most => {
                self.hub.two_phase.forget(gid);
                let what = format!(
                    "maximum number of prepared transactions reached: {most}, of which pgtandem needs {} itself",
                    PLACES + 1
                );
                let hint = "Finish some, or raise max_prepared_transactions on every server.";
                return Ok(Err(ClientError::error("53200", what, hint)));
            }
            Some(_) => {}
        }
        let noted = self.take_mark_for(gid, ddl).await;
        if noted.is_err() {
            self.hub.two_phase.forget(gid);
        }
        Ok(noted.map(Box::new))
    }

    async fn take_mark_for(&self, gid: &str, ddl: bool) -> Result<Transaction, ClientError> {
        let hub = &self.hub;
        let Ok(hold) = tokio::time::timeout(Duration::from_millis(TURN_MS_MAX), hub.nodewise.hold()).await else {
            let what =
                format!("a node has been joining for {TURN_MS_MAX} ms: it could not be told of this transaction's end");
            return Err(ClientError::error("40001", what, "Try it again."));
        };
        let Some(mut mark) = hub.marks.take(&self.database) else {
            let what = format!("database \"{}\" has no free mark", self.database);
            return Err(ClientError::error("53300", what, "Close connections."));
        };
        let (mark_n, _) = mark.begin().await;
        let (gid, database) = (gid.to_owned(), self.database.to_string());
        let note = Note { gid, database, mark_id: mark.id, mark_n, ddl };
        let servers = self.servers();
        let noted = async {
            for follower in &hub.view().followers {
                two_phase::note(&servers, Place::Follower(&follower.node), &note).await?;
            }
            two_phase::note(&servers, Place::Leader, &note).await
        };
        if let Err(e) = noted.await {
            hub.marks.give_back(&self.database, mark);
            let what = format!("the transaction could not be noted down on every member: {e}");
            return Err(ClientError::error("40001", what, "Try it again; see: pgtandem status"));
        }
        Ok(Transaction { note, mark, hold })
    }

    /// Followers first, the leader last: while it holds the name, all do.
    async fn prepare_everywhere(
        &mut self,
        log: &Arc<EffectLog>,
        decision: &Decision,
        held: &mut Vec<Prepared>,
    ) -> Result<Told, End> {
        let hub = Arc::clone(&self.hub);
        let _flight = if log.ddl {
            match self.ddl_flight().await? {
                Ok(flight) => Some(flight),
                Err(error) => return self.abort(Vec::new(), decision, error).await.map(Err),
            }
        } else {
            None
        };
        match self.followers(&hub, log, decision, &RefCell::new(None)).prepare(held).await {
            Ok(_) => {}
            Err(PrepareError::ReignOver) => return Err(End::RolledBack),
            Err(error) => {
                return self.abort(std::mem::take(held), decision, prepare_error(&error)).await.map(Err);
            }
        }
        self.wire.mute = true;
        let prepared = self.prepare_leader(decision).await;
        self.wire.mute = false;
        match prepared? {
            Ok(()) => Ok(Ok(())),
            Err(error) => {
                self.abandon(std::mem::take(held), decision).await?;
                Ok(Err(error_frame(&error)))
            }
        }
    }

    pub async fn simple_finish(&mut self, frame: &[u8], finish: &Finish) -> Result<(), End> {
        if self.in_block() {
            return self.forward(frame).await;
        }
        self.wire.hold_ready = true;
        let done = self.finish_transaction(frame, Expect::Query { mode: Mode::Forward }, finish).await;
        self.wire.hold_ready = false;
        if let Err(error) = done? {
            error.write(&mut self.wire.to_client);
        }
        build::ready_for_query(&mut self.wire.to_client, self.wire.status);
        Ok(())
    }

    pub async fn execute_finish(&mut self, frame: &Bytes, finish: &Finish) -> Result<(), End> {
        self.catch_up().await?;
        if self.wire.is_skipping() {
            return Ok(());
        }
        let expect = Expect::Execute { mode: Mode::Forward };
        if self.in_block() {
            self.wire.clear_results();
            self.pass(frame, expect);
            build::flush(&mut self.wire.to_server);
            return self.wire.pump(Until::Answered).await;
        }
        if let Err(error) = self.finish_transaction(frame, expect, finish).await? {
            error.write(&mut self.wire.to_client);
            self.skip_until_sync = !self.synced_early;
        }
        self.end_early_sync();
        Ok(())
    }

    /// Sends the client's COMMIT or ROLLBACK PREPARED to the leader, which decides, and finishes it on the followers.
    async fn finish_transaction(
        &mut self,
        frame: &[u8],
        expect: Expect,
        finish: &Finish,
    ) -> Result<Result<(), ClientError>, End> {
        self.cycle.is_special = true;
        let Finish { gid, commit } = finish;
        let hub = Arc::clone(&self.hub);
        let transaction = match hub.two_phase.take(gid, &self.database) {
            Found::Open(transaction) => transaction,
            Found::Busy => {
                let what = format!("prepared transaction with identifier \"{gid}\" is busy");
                return Ok(Err(ClientError::error("55000", what, "Another session prepares or finishes it.")));
            }
            Found::Elsewhere => return self.let_leader_say(frame, expect).await,
            Found::None => return self.finish_unknown(frame, expect, gid).await,
        };
        let ddl = transaction.note.ddl && *commit;
        let flight = if ddl { Some(self.ddl_flight().await) } else { None };
        let flight = match flight.transpose() {
            Ok(flight) => flight,
            Err(end) => {
                self.look_later(transaction, None);
                return Err(end);
            }
        };
        let mut closed: Option<Closed<'_>> = None;
        let pass = match flight {
            Some(Err(error)) => Err(error),
            _ if ddl => self.pass_and_close(&hub, &mut closed).await,
            _ => self.pass_open(&hub).await,
        };
        let pass = match pass {
            Ok(pass) => pass,
            Err(error) => {
                hub.two_phase.put(transaction);
                return Ok(Err(error));
            }
        };
        let change = closed.as_ref().map(|_| SchemaChange::begin(&hub));
        self.wire.hold_tag = true;
        let answered = self.let_leader_say(frame, expect).await;
        self.wire.hold_tag = false;
        if let Err(end) = answered {
            self.look_later(transaction, Some(pass));
            return Err(end);
        }
        if self.wire.results.error.is_some() {
            hub.two_phase.put(transaction);
            return Ok(Ok(()));
        }
        let tag = self.wire.results.tag.take().unwrap_or_default();
        commit::finish_on_all(&hub, &self.thread.pool, &self.database, gid, *commit).await;
        drop((change, closed, pass));
        let mut transaction = transaction;
        transaction.mark.decide(*commit);
        self.forget_transaction_of_client(*transaction).await;
        if *commit {
            hub.counters.commits.fetch_add(1, Ordering::Relaxed);
            if ddl {
                hub.sequences.forget(&self.database);
            }
        }
        put_tag(&mut self.wire.to_client, &tag);
        Ok(Ok(()))
    }

    async fn let_leader_say(&mut self, frame: &[u8], expect: Expect) -> Result<Result<(), ClientError>, End> {
        self.wire.clear_results();
        self.pass(frame, expect);
        if matches!(expect, Expect::Execute { .. }) {
            self.end_execute();
        }
        self.wire.pump(Until::Answered).await?;
        Ok(Ok(()))
    }

    /// No session of this proxy has prepared it: whoever did was not replicated.
    async fn finish_unknown(
        &mut self,
        frame: &[u8],
        expect: Expect,
        gid: &str,
    ) -> Result<Result<(), ClientError>, End> {
        let text = format!("SELECT 1 FROM pg_catalog.pg_prepared_xacts WHERE gid = {}", quote_literal(gid));
        self.hidden_query(&text).await?;
        if self.wire.results.values.is_empty() {
            return self.let_leader_say(frame, expect).await;
        }
        let what = format!("the transaction \"{gid}\" was not prepared through pgtandem: followers do not have it");
        Ok(Err(ClientError::error("0A000", what, "Finish it on the server where it was prepared.")))
    }

    /// It is finished everywhere, or was never prepared.
    async fn forget_transaction_of_client(&self, transaction: Transaction) {
        let Transaction { note, mark, hold } = transaction;
        if self.hub.reign_epoch() != Some(self.epoch) {
            // Followers that were not told are by the next epoch, which needs the note.
            return;
        }
        if let Err(error) = two_phase::forget(&self.servers(), &note.gid).await {
            // Decided all the same: the next epoch takes the note away.
            tracing::info!(gid = note.gid, %error, "the note of a prepared transaction was not taken away");
        }
        self.hub.marks.give_back(&note.database, mark);
        self.hub.two_phase.forget(&note.gid);
        drop(hold);
    }

    /// The connection to the leader ended: what became of the transaction is seen when the backend is gone.
    fn look_later(&self, transaction: Box<Transaction>, pass: Option<Pass>) {
        let (hub, pool, database) = (Arc::clone(&self.hub), self.thread.pool.clone(), Arc::clone(&self.database));
        let (epoch, secret, pid) = (self.epoch, Arc::clone(&self.secret), self.pid);
        tokio::task::spawn_local(async move {
            let _pass = pass;
            let deadline = tokio::time::Instant::now() + Duration::from_millis(OUTCOME_MS_MAX);
            let servers = Servers { hub: &hub, epoch, secret: &secret };
            while tokio::time::Instant::now() < deadline {
                let look = async {
                    let mut leader = hub.leader_connection_of(HOME, &secret, epoch).await?;
                    resolve::backend_gone(&mut leader, pid).await?;
                    two_phase::look(&servers, &transaction.note).await
                };
                let found: Result<Fate, HubError> = look.await;
                // A new epoch finds out by itself.
                match found {
                    _ if hub.reign_epoch().is_some_and(|now| now != epoch) => return,
                    _ if hub.reign_epoch().is_none() => {
                        tokio::time::sleep(Duration::from_millis(OUTCOME_POLL_MS)).await;
                    }
                    Ok(Fate::Open) => return hub.two_phase.put(transaction),
                    Ok(fate) => {
                        let gid = &transaction.note.gid;
                        commit::finish_on_all(&hub, &pool, &database, gid, fate == Fate::Committed).await;
                        if hub.reign_epoch() != Some(epoch) {
                            return;
                        }
                        if let Err(error) = two_phase::forget(&servers, gid).await {
                            tracing::info!(gid, %error, "the note of a prepared transaction was not taken away");
                        }
                        hub.two_phase.forget(gid);
                        let Transaction { note, mut mark, .. } = *transaction;
                        mark.decide(fate == Fate::Committed);
                        return hub.marks.give_back(&note.database, mark);
                    }
                    Err(_) => tokio::time::sleep(Duration::from_millis(OUTCOME_POLL_MS)).await,
                }
            }
            tracing::error!(gid = transaction.note.gid, "the leader did not come back in time: a new epoch finds out");
        });
    }
}
