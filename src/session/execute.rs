//! Execute in lock step: writes, transaction control, and what runs behind the read-only guard.

use std::sync::Arc;

use bytes::{Buf, Bytes};

use crate::pg::build::{self, ClientError};
use crate::pg::frame;
use crate::pg::message;
use crate::session::effect::put_tag;
use crate::session::guard::is_write;
use crate::session::once::{Ended, How, OnceCall};
use crate::session::parameters;
use crate::session::planning::{Planned, mode_of, schema_changed};
use crate::session::run::Session;
use crate::session::simple::{error_frame, refused};
use crate::session::statements::{Prepared, Rest};
use crate::session::wire::{End, Expect, Mode, Until};
use crate::sql::plan::{Control, EffectPlan, Lane, Once, Plan, Write};
use crate::sql::shape::Shape;

/// The client's Sync, whole.
pub(super) const SYNC: [u8; 5] = [b'S', 0, 0, 0, 4];

/// What the client bound to the portal that it executes.
#[derive(Clone, Copy)]
pub struct Sent<'a> {
    pub prepared: &'a Arc<Prepared>,
    pub parameters: &'a Bytes,
    pub formats: &'a Bytes,
    pub name: &'a [u8],
    pub rows_max: u32,
}

impl Session {
    /// Opens a block of ours inside the client's batch.
    pub(super) fn open_block_in_batch(&mut self) {
        if !self.in_block() {
            self.hidden("pgtandem_p", "pgtandem_begin", &[]);
            self.own_block = true;
            self.is_first = true;
            self.note_begin();
        }
    }

    /// `sent`: `None` for a portal that is not known.
    pub async fn execute_guarded(&mut self, frame: &Bytes, sent: Option<&Sent<'_>>) -> Result<(), End> {
        self.open_block_in_batch();
        if self.needs_snapshot_first() {
            self.hidden("pgtandem_p", "pgtandem_snapshot", &[]);
        }
        self.hidden("pgtandem_p", "pgtandem_guard", &[]);
        self.hidden("pgtandem_p", "pgtandem_guard_on", &[]);
        self.catch_up().await?;
        if self.wire.is_skipping() {
            return Ok(());
        }
        let (answered, flushes) = (self.wire.to_client.len(), self.wire.flushes);
        self.wire.clear_results();
        self.wire.hide_errors = true;
        self.wire.hold_tag = true;
        self.pass(frame, Expect::Execute { mode: Mode::Forward });
        let done = self.catch_up().await;
        self.wire.hide_errors = false;
        self.wire.hold_tag = false;
        done?;
        if let Some(error) = self.wire.results.error.take() {
            if let Some(sent) = sent.filter(|_| is_write(&error) && self.wire.flushes == flushes) {
                self.wire.to_client.truncate(answered);
                return self.execute_writing(sent).await;
            }
            self.tell_guard_error(&error);
            return Ok(());
        }
        // A cancel may still hit the statement here: its tag comes when nothing can fail any more.
        let tag = self.wire.results.tag.take();
        self.hidden("pgtandem_p", "pgtandem_guard_off", &[]);
        self.catch_up().await?;
        if let Some(tag) = tag.filter(|_| !self.wire.is_skipping()) {
            put_tag(&mut self.wire.to_client, &tag);
        }
        Ok(())
    }

    /// A query that wrote behind the guard, once more in its own lane.
    async fn execute_writing(&mut self, sent: &Sent<'_>) -> Result<(), End> {
        if !self.leave_guard().await? {
            return Ok(());
        }
        let text = Arc::clone(&sent.prepared.text);
        match self.plan_writing(&text).await? {
            Planned::One { plan, shape, .. } => match &plan.lane {
                Lane::Once(once) => {
                    let planned_at = self.planned_at;
                    self.execute_once(sent, &plan, once, &shape, planned_at).await
                }
                Lane::Refused(refusal) => self.refuse_extended(&refused(refusal)).await,
                _ => self.refuse_extended(&refused(&crate::sql::refuse::guarded_write())).await,
            },
            Planned::Refused(error) => self.refuse_extended(&error).await,
            Planned::Failed(error) => {
                self.wire.to_client.extend_from_slice(&error_frame(&error));
                self.skip_until_sync = true;
                Ok(())
            }
            Planned::Several(_) | Planned::Nothing | Planned::Skipped => Ok(()),
        }
    }

    /// A statement of the `once` lane.
    pub async fn execute_once(
        &mut self,
        sent: &Sent<'_>,
        plan: &Plan,
        once: &Once,
        shape: &Shape,
        planned_at: u64,
    ) -> Result<(), End> {
        if !self.end_earlier_batches().await? {
            return Ok(());
        }
        self.open_block_in_batch();
        let how = How::Extended {
            types: &sent.prepared.types,
            parameters: sent.parameters,
            formats: sent.formats,
            in_parts: sent.rows_max > 0,
        };
        let text = Arc::clone(&sent.prepared.text);
        let call = OnceCall { plan, once, shape, text: &text, planned_at, how, hold_tag: false };
        match self.run_once(&call).await? {
            Ended::Done => {
                let rows = self.wire.take_held_rows().unwrap_or_default();
                let rest = Rest { rows, tag: self.last_tag.clone().unwrap_or_default() };
                if let Some(portal) = self.statements.portal_mut(sent.name) {
                    portal.rest = Some(rest);
                }
                if sent.rows_max > 0 { self.give_part(sent.name, sent.rows_max).await } else { Ok(()) }
            }
            Ended::Failed => {
                self.skip_until_sync = true;
                Ok(())
            }
            Ended::Refused(error) => self.refuse_extended(&error).await,
        }
    }

    /// Waits for the answers to batches before this one: an error there is not this statement's, nor is their `ReadyForQuery`.
    /// False: the batch under way has failed already.
    async fn end_earlier_batches(&mut self) -> Result<bool, End> {
        if self.wire.expects.iter().any(|expect| matches!(expect, Expect::Sync { .. })) {
            self.catch_up().await?;
        }
        Ok(!self.wire.is_skipping())
    }

    /// Takes the client's Sync if it has come already and ends no block of ours: it goes along with the Execute before it, and one
    /// round trip to the leader answers both. [`Self::end_early_sync`] tells the client that it is ready.
    fn take_early_sync(&mut self) -> bool {
        if self.own_block || !self.wire.from_client.starts_with(&SYNC) {
            return false;
        }
        self.wire.from_client.advance(SYNC.len());
        self.cycle.keep(&SYNC);
        self.synced_early = true;
        self.in_batch = false;
        self.wire.hold_ready = true;
        true
    }

    /// Asks the server for its answers up to here: with the client's Sync, if that is next, else with a Flush.
    pub fn end_execute(&mut self) {
        if self.take_early_sync() {
            build::sync(&mut self.wire.to_server);
            self.wire.expects.push_back(Expect::Sync { hidden: false });
        } else {
            build::flush(&mut self.wire.to_server);
        }
    }

    /// What the client's Sync would have brought, if it was taken early.
    pub fn end_early_sync(&mut self) {
        if std::mem::take(&mut self.synced_early) {
            self.wire.hold_ready = false;
            self.end_of_batch();
            build::ready_for_query(&mut self.wire.to_client, self.wire.status);
        }
    }

    pub async fn execute_write(
        &mut self,
        frame: &Bytes,
        write: &Write,
        prepared: &Arc<Prepared>,
        parameters: &Bytes,
        rows_max: u32,
    ) -> Result<(), End> {
        self.run_write_of_batch(frame, write, prepared, parameters, rows_max).await?;
        self.end_early_sync();
        Ok(())
    }

    /// A setting may have been changed since Bind: an effect is made under what holds now. False: the batch has failed.
    pub async fn know_context(&mut self) -> Result<bool, End> {
        if self.facts.is_none() && self.wire.status != b'E' {
            self.catch_up().await?;
            if self.wire.is_skipping() {
                return Ok(false);
            }
            if let Some(error) = self.read_context().await? {
                self.wire.to_client.extend_from_slice(&error_frame(&error));
                self.skip_until_sync = true;
                return Ok(false);
            }
        }
        Ok(true)
    }

    async fn run_write_of_batch(
        &mut self,
        frame: &Bytes,
        write: &Write,
        prepared: &Arc<Prepared>,
        parameters: &Bytes,
        rows_max: u32,
    ) -> Result<(), End> {
        if !self.end_earlier_batches().await? || !self.know_context().await? {
            return Ok(());
        }
        if let Some(refusal) = self.refuse_execution(write, prepared, parameters)? {
            return self.refuse_extended(&refusal).await;
        }
        self.open_block_in_batch();
        if !self.lock_tables(write).await? {
            return Ok(());
        }
        // A write runs whole at the first Execute, whatever its limit; the client gets the rows in the parts that it asks for.
        let in_parts = rows_max > 0 && write.client_returning;
        let forwarded = |expect: &Expect| matches!(expect, Expect::Execute { mode } if *mode != Mode::Hidden);
        if in_parts || self.wire.expects.iter().any(forwarded) {
            // What is held back must be the rows and the command tag of this statement alone.
            self.catch_up().await?;
        }
        if self.wire.is_skipping() {
            return Ok(());
        }
        if write.asks_first() {
            self.catch_up().await?;
            if self.wire.is_skipping() {
                return Ok(());
            }
            if let Err(error) = self.before_write(write, &prepared.text, parameters).await? {
                return self.refuse_extended(&error).await;
            }
        }
        let position = self.log.position();
        self.touched.begin(&prepared.plan.sequences);
        self.wire.clear_results();
        let mode = mode_of(write);
        let (name, _) = message::execute(frame::body(frame)).map_err(End::ClientProtocol)?;
        (self.wire.hold_rows, self.wire.hold_tag) = (in_parts, true);
        if rows_max > 0 {
            build::execute(&mut self.wire.to_server, name, 0);
            self.wire.expects.push_back(Expect::Execute { mode });
        } else {
            self.pass(frame, Expect::Execute { mode });
        }
        if in_parts || matches!(write.effect, EffectPlan::Copy { .. } | EffectPlan::CopiedRows(_)) {
            build::flush(&mut self.wire.to_server);
        } else {
            self.end_execute();
        }
        let types = Arc::clone(&prepared.types);
        let taken = self.take_write(write, &prepared.shape, &prepared.text, parameters, types).await;
        self.wire.hold_tag = false;
        let rows = self.wire.take_held_rows();
        let effect = taken?;
        if self.wire.results.error.is_some() {
            self.log.truncate(position);
            return Ok(());
        }
        let text = Arc::clone(&prepared.text);
        let effect = match effect {
            Ok(()) if !self.still_planned(&text, &prepared.plan, prepared.schema_number).await? => {
                Err(schema_changed())
            }
            Ok(()) if rows.is_none() => Err(ClientError::error(
                "54000",
                "the rows of a RETURNING that is fetched in parts are more than 16 MB",
                "Fetch all rows at once.",
            )),
            effect => effect,
        };
        if let Err(error) = effect {
            self.log.truncate(position);
            if self.wire.is_skipping() {
                // The server failed at our request (a COPY), and the client has not heard why.
                error.write(&mut self.wire.to_client);
                return Ok(());
            }
            return self.refuse_extended(&error).await;
        }
        if in_parts {
            let rest = Rest { rows: rows.unwrap_or_default(), tag: self.wire.results.tag.clone().unwrap_or_default() };
            if let Some(portal) = self.statements.portal_mut(name) {
                portal.rest = Some(rest);
            }
            return self.give_part(name, rows_max).await;
        }
        self.tell_tag(self.wire.results.tag.clone(), false);
        Ok(())
    }

    /// The next rows of a portal that has run, as many as the client asks for (0: all).
    pub async fn give_part(&mut self, name: &[u8], rows_max: u32) -> Result<(), End> {
        self.catch_up().await?;
        if self.wire.is_skipping() {
            return Ok(());
        }
        let Some(rest) = self.statements.portal_mut(name).and_then(|portal| portal.rest.as_mut()) else {
            return Ok(());
        };
        let all = rest.rows.len();
        let part = usize::try_from(rows_max).ok().filter(|n| *n > 0).unwrap_or(usize::MAX);
        for row in rest.rows.drain(..part.min(all)) {
            self.wire.to_client.extend_from_slice(&row);
        }
        if all >= part {
            build::frame(&mut self.wire.to_client, b's', |_| {});
        } else {
            // As PostgreSQL does: the tag counts the rows of this part.
            let count = rest.tag.rsplit(|byte| *byte == b' ').next().map_or(0, <[u8]>::len);
            let mut tag = rest.tag.get(..rest.tag.len() - count).unwrap_or_default().to_vec();
            tag.extend_from_slice(all.to_string().as_bytes());
            put_tag(&mut self.wire.to_client, &tag);
        }
        Ok(())
    }

    /// Why this execution can not be carried to followers.
    pub fn refuse_execution(
        &self,
        write: &Write,
        prepared: &Prepared,
        parameters: &[u8],
    ) -> Result<Option<ClientError>, End> {
        if let Some(refusal) = self.refuses_write(write) {
            return Ok(Some(refusal));
        }
        if let EffectPlan::Copy { server_file: true, .. } = &write.effect {
            let hint = "Send it as a simple query, without parameters, or use COPY ... FROM STDIN.";
            return Ok(Some(ClientError::error(
                "0A000",
                "COPY FROM a file of the server by the extended protocol is not replicated",
                hint,
            )));
        }
        if let EffectPlan::Text { dates_matter: true, .. } = &write.effect {
            let texts = parameters::texts(&prepared.types, parameters).map_err(End::ClientProtocol)?;
            if write.reads_clock(&prepared.text, &prepared.shape, &texts) {
                return Ok(Some(refused(&crate::sql::refuse::clock_literal())));
            }
        }
        Ok(None)
    }

    pub async fn execute_control(&mut self, frame: &Bytes, control: &Control, text: &str) -> Result<(), End> {
        self.run_control_of_batch(frame, control, text).await?;
        self.end_early_sync();
        Ok(())
    }

    async fn run_control_of_batch(&mut self, frame: &Bytes, control: &Control, text: &str) -> Result<(), End> {
        if !self.end_earlier_batches().await? {
            return Ok(());
        }
        // Whether a commit may be decided depends on all that came before it; a BEGIN can wait for its answer with them.
        if self.own_block || !matches!(control, Control::Begin { .. }) {
            self.catch_up().await?;
        }
        if self.wire.is_skipping() {
            return Ok(());
        }
        match control {
            Control::Begin { with_modes: false } if self.own_block => {
                self.own_block = false;
                self.wire.status = b'T';
                build::command_complete(&mut self.wire.to_client, "BEGIN");
                return Ok(());
            }
            Control::Commit { chain } if self.has_to_decide() && self.in_block() && self.wire.status != b'E' => {
                self.in_batch = false;
                let told = self.commit(*chain).await?;
                self.in_batch = true;
                match told {
                    Ok(()) => build::command_complete(&mut self.wire.to_client, "COMMIT"),
                    Err(error) => {
                        self.wire.to_client.extend_from_slice(&error);
                        self.skip_until_sync = true;
                    }
                }
                self.forget_transaction();
                return Ok(());
            }
            Control::Prepare { .. } if self.own_block => {
                let what = "PREPARE TRANSACTION of a transaction that no BEGIN has opened is not supported";
                return self.refuse_extended(&ClientError::error("0A000", what, "BEGIN first.")).await;
            }
            Control::Prepare { gid } if self.in_block() && self.wire.status != b'E' => {
                self.in_batch = false;
                let told = self.prepare_transaction(gid).await?;
                self.in_batch = true;
                match told {
                    Ok(()) => build::command_complete(&mut self.wire.to_client, "PREPARE TRANSACTION"),
                    Err(error) => {
                        self.wire.to_client.extend_from_slice(&error);
                        self.skip_until_sync = true;
                    }
                }
                self.forget_transaction();
                return Ok(());
            }
            Control::Savepoint { .. } => {
                if let Err(error) = self.may_savepoint() {
                    return self.refuse_extended(&error).await;
                }
            }
            Control::SetConstraints if !self.know_context().await? => return Ok(()),
            _ => {}
        }
        match control {
            Control::Rollback { .. } => self.roll_halves_back().await,
            Control::RollbackTo { name } => self.roll_halves_back_to(name).await,
            _ => {}
        }
        self.wire.clear_results();
        self.pass(frame, Expect::Execute { mode: Mode::Forward });
        self.end_execute();
        self.wire.pump(Until::Answered).await?;
        let ok = self.wire.results.error.is_none();
        if ok {
            // ReadyForQuery will say so, too, but the rest of the batch must know now.
            self.wire.status = match control {
                Control::Begin { .. } | Control::RollbackTo { .. } => b'T',
                Control::Commit { chain } | Control::Rollback { chain } if !chain => b'I',
                Control::Prepare { .. } => b'I',
                _ => self.wire.status,
            };
        }
        self.after_control(control, ok);
        if ok
            && *control == Control::SetConstraints
            && self.wire.status == b'T'
            && let Err(error) = self.set_constraints_effect(text)
        {
            return self.refuse_extended(&error).await;
        }
        Ok(())
    }
}
