//! How a SERIALIZABLE transaction with effects ends: the leader prepares first, then followers, and the leader's COMMIT
//! PREPARED is the decision.
//!
//! At its COMMIT PostgreSQL may still refuse a serializable transaction. A follower that had prepared before could then be
//! committed without a leader, although the leader would have refused. PREPARE TRANSACTION makes that check, and once it is done the
//! COMMIT PREPARED can not be refused. The mark is inside what is prepared, so it says "decided" only after that.
//!
//! All of it happens inside the gate, so no cut finds such a transaction prepared on the leader.

use std::cell::RefCell;
use std::sync::Arc;

use bytes::{Bytes, BytesMut};

use crate::pg::build::{self, ClientError};
use crate::pg::message::error_field;
use crate::replicate::commit::{self, PrepareError, Prepared};
use crate::replicate::effects::EffectLog;
use crate::replicate::flight::{self, Decision};
use crate::replicate::gate::{Closed, Pass};
use crate::replicate::hub::HubError;
use crate::replicate::once::Halves;
use crate::replicate::resolve;
use crate::session::commit::{Entered, SchemaChange, prepare_error};
use crate::session::effect::client_error_frame;
use crate::session::run::Session;
use crate::session::wire::{End, Expect, Until};
use crate::sql::facts::quote_literal;

impl Session {
    /// Whether the transaction under way is SERIALIZABLE.
    ///
    /// # Errors
    /// If the session must end.
    pub(super) async fn is_serializable(&mut self) -> Result<Result<bool, BytesMut>, End> {
        if self.facts.is_none()
            && let Some(error) = self.read_context().await?
        {
            return Ok(Err(crate::session::simple::error_frame(&error)));
        }
        Ok(Ok(self.facts.as_ref().is_some_and(|facts| facts.isolation == "serializable")))
    }

    /// As `decide`, for a SERIALIZABLE transaction.
    pub(super) async fn decide_serializable(
        &mut self,
        log: &Arc<EffectLog>,
        decision: &Decision,
        held: &mut Vec<Prepared>,
        open: &RefCell<Option<Halves>>,
        chain: bool,
    ) -> Result<Result<Pass, BytesMut>, End> {
        let hub = Arc::clone(&self.hub);
        let mut closed: Option<Closed<'_>>;
        let (reserved, pass) = loop {
            closed = None;
            let reserved = match self.followers(&hub, log, decision, open).reserve().await {
                Ok(reserved) => reserved,
                Err(PrepareError::ReignOver) => return Err(End::RolledBack),
                Err(error) => {
                    self.halves = open.take();
                    return self.abort(Vec::new(), decision, prepare_error(&error)).await.map(Err);
                }
            };
            let pass = match self.pass_gate(&hub, log, &mut closed).await {
                Ok(pass) => pass,
                Err(error) => {
                    self.halves = open.take();
                    return self.abort(Vec::new(), decision, error).await.map(Err);
                }
            };
            let set = &hub.view().set;
            if (set.epoch, set.version) == reserved.version {
                break (reserved, pass);
            }
        };
        if reserved.is_empty() {
            // Nobody else can hold it, so there is nothing to agree on; and nobody joins while this is inside the gate.
            return self.decide_on_leader(log, decision, held, chain, (pass, closed)).await;
        }
        let chain = if chain { Some(self.chain_modes().await?) } else { None };
        // From here to the decision the client can not hold anything up.
        self.wire.mute = true;
        let prepared = self.prepare_leader(decision).await;
        self.wire.mute = false;
        match prepared {
            Ok(Ok(())) => {}
            Ok(Err(error)) => return Ok(Err(Self::not_prepared(&error))),
            Err(end) => {
                tracing::info!(%end, gid = decision.gid, "the leader's connection ended with a PREPARE under way");
                self.wire.status = b'I';
                self.finish_on_leader(decision, false, true).await?;
                return Err(End::RolledBack);
            }
        }
        let followers = self.followers(&hub, log, decision, open);
        let followers = commit::Commit { inside: Some(reserved.inside(pass.number)), ..followers };
        let halves = followers.prepare(held).await;
        drop(followers);
        match halves {
            Ok(_) => {}
            // Nothing was decided. A leader that took over has committed it if every member held it.
            Err(PrepareError::ReignOver) => {
                if self.finish_on_leader(decision, false, true).await? {
                    self.wire.status = b'I';
                    return Ok(Ok(pass));
                }
                return Err(End::RolledBack);
            }
            Err(error) => {
                self.abandon(std::mem::take(held), decision).await?;
                self.halves = open.take();
                self.roll_halves_back().await;
                self.finish_prepared(decision, false).await?;
                return Ok(Err(client_error_frame(&prepare_error(&error))));
            }
        }
        let entries = Entered::new(hub.enter_backlogs(&self.database, log, decision));
        let change = closed.as_ref().map(|_| SchemaChange::begin(&hub));
        let committed = self.finish_prepared(decision, true).await?;
        entries.settle(committed);
        if !committed {
            self.abandon(std::mem::take(held), decision).await?;
            return Err(End::RolledBack);
        }
        if let Some(gate) = closed {
            self.finish_closed(held, decision, change, gate).await;
        }
        if let Some(modes) = chain {
            // If the leader is lost now, the client hears first that this was committed.
            let _ = self.hidden_query(&format!("BEGIN ISOLATION LEVEL SERIALIZABLE, {modes}")).await;
        }
        Ok(Ok(pass))
    }

    /// The modes that COMMIT AND CHAIN keeps, read before the transaction is gone from the session.
    pub(super) async fn chain_modes(&mut self) -> Result<String, End> {
        self.hidden_query(
            "SELECT CASE pg_catalog.current_setting('transaction_read_only') WHEN 'on' THEN 'READ ONLY' ELSE 'READ WRITE' END || \
             CASE pg_catalog.current_setting('transaction_deferrable') WHEN 'on' THEN ', DEFERRABLE' ELSE ', NOT DEFERRABLE' END",
        )
        .await?;
        let value = self.wire.results.values.pop().flatten().unwrap_or_default();
        Ok(String::from_utf8_lossy(&value).into_owned())
    }

    /// Mark and PREPARE TRANSACTION in one flight. After an error, whose body is given, the transaction is gone.
    pub(super) async fn prepare_leader(&mut self, decision: &Decision) -> Result<Result<(), Bytes>, End> {
        let (id, n) = (decision.mark_id.to_string(), decision.mark_n.to_string());
        let secret = Arc::clone(&self.secret);
        let text = format!("PREPARE TRANSACTION {}", quote_literal(&decision.gid));
        self.wire.clear_results();
        self.wire.hide_errors = true;
        self.hidden("", "pgtandem_mark", &[Some(secret.as_bytes()), Some(id.as_bytes()), Some(n.as_bytes())]);
        build::parse(&mut self.wire.to_server, b"", text.as_bytes(), &[]);
        self.wire.expects.push_back(Expect::Parse { hidden: true });
        self.hidden("", "", &[]);
        build::sync(&mut self.wire.to_server);
        self.wire.expects.push_back(Expect::Sync { hidden: true });
        let done = self.wire.pump(Until::Answered).await;
        self.wire.hide_errors = false;
        done?;
        let prepared = self.wire.results.tag.as_deref() == Some(b"PREPARE TRANSACTION");
        if self.wire.results.error.is_none() && prepared {
            return Ok(Ok(()));
        }
        let error = self.wire.results.error.take();
        if self.wire.status != b'I' {
            self.hidden_query("ROLLBACK").await?;
        }
        Ok(Err(error.unwrap_or_default()))
    }

    /// Why a SERIALIZABLE transaction could not be prepared, as the client is told.
    fn not_prepared(error: &[u8]) -> BytesMut {
        if error_field(error, b'C') != Some(b"0A000") {
            return crate::session::simple::error_frame(error);
        }
        let why = error_field(error, b'M').map(|m| String::from_utf8_lossy(m).into_owned()).unwrap_or_default();
        client_error_frame(&ClientError::error(
            "0A000",
            format!("a SERIALIZABLE transaction that writes is prepared before it is committed: {why}"),
            "Do this in a transaction of its own, or use REPEATABLE READ or READ COMMITTED.",
        ))
    }

    /// COMMIT PREPARED or ROLLBACK PREPARED on the leader. Gives what became of the transaction.
    async fn finish_prepared(&mut self, decision: &Decision, commit: bool) -> Result<bool, End> {
        let verb = if commit { "COMMIT" } else { "ROLLBACK" };
        self.wire.mute = true;
        let done = self.hidden_query(&format!("{verb} PREPARED '{}'", decision.gid)).await;
        self.wire.mute = false;
        match done {
            Ok(true) => Ok(commit),
            // The role was local to the transaction, for example: only its owner or a superuser may.
            Ok(false) => {
                self.wire.results.error = None;
                self.finish_on_leader(decision, commit, false).await
            }
            Err(end) => {
                tracing::info!(%end, gid = decision.gid, "the leader's connection ended with a decision under way");
                self.wire.status = b'I';
                self.finish_on_leader(decision, commit, true).await
            }
        }
    }

    /// The same on a connection of the proxy's own, as often as it takes. If a new epoch was raised, nothing is finished here: it
    /// has read the marks and rolled back what the leader had only prepared.
    async fn finish_on_leader(&mut self, decision: &Decision, commit: bool, session_lost: bool) -> Result<bool, End> {
        self.outcome_by(decision, async |session| session.finish_once(decision, commit, session_lost).await).await
    }

    /// One attempt; gives the mark afterwards.
    async fn finish_once(&self, decision: &Decision, commit: bool, session_lost: bool) -> Result<i64, HubError> {
        let mut connection = self.hub.leader_connection_of(&self.database, &self.secret, self.epoch).await?;
        if session_lost {
            resolve::backend_gone(&mut connection, self.pid).await?;
        }
        flight::finish(&mut connection, &decision.gid, commit).await?;
        Ok(resolve::mark(&mut connection, decision.mark_id).await?)
    }
}
