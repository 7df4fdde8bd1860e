//! The extended protocol: Parse, Bind, Describe, Execute, up to a Sync.
//!
//! Reads pass without waiting. A write, transaction control and what runs behind the guard are taken in lock step: a Flush
//! makes the server answer before the next message, because the effect must be known. A write outside a block opens one of
//! ours inside the client's batch; its Sync commits it.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use bytes::Bytes;

use crate::pg::build::{self, ClientError};
use crate::pg::frame;
use crate::pg::message::{self, Bind, Parse};
use crate::session::parameters;
use crate::session::planning::{Planned, mode_of, schema_changed};
use crate::session::rewrite;
use crate::session::run::Session;
use crate::session::simple::{error_frame, refused};
use crate::session::statements::{Portal, Prepared, Rest};
use crate::session::wire::{EXPECTS_MAX, End, Expect, Mode, Until};
use crate::sql::plan::{Admin, Control, EffectPlan, Lane, Plan, Write};

impl Session {
    pub async fn extended(&mut self, tag: u8, frame: Bytes) -> Result<(), End> {
        self.settle();
        if self.wire.expects.len() >= EXPECTS_MAX {
            self.catch_up().await?;
        }
        self.in_batch |= !matches!(tag, b'S' | b'H');
        match tag {
            b'S' => self.sync(&frame).await,
            b'H' => {
                self.wire.to_server.extend_from_slice(&frame);
                Ok(())
            }
            b'P' => self.parse(&frame).await,
            b'B' => self.bind(&frame).await,
            b'D' => self.describe(&frame).await,
            b'E' => self.execute(&frame).await,
            _ => self.close(&frame),
        }
    }

    fn pass(&mut self, frame: &[u8], expect: Expect) {
        self.wire.to_server.extend_from_slice(frame);
        self.wire.expects.push_back(expect);
    }

    /// Makes the server answer all that was sent.
    pub async fn catch_up(&mut self) -> Result<(), End> {
        if !self.wire.expects.is_empty() {
            build::flush(&mut self.wire.to_server);
            self.wire.pump(Until::Answered).await?;
        }
        self.settle();
        Ok(())
    }

    fn settle(&mut self) {
        self.statements.settle(&mut self.wire.outcomes);
    }

    /// Makes sure of a name before it is used: an earlier batch may have failed to define it.
    async fn make_sure(&mut self, name: &[u8]) -> Result<(), End> {
        if self.statements.is_uncertain(name) {
            self.catch_up().await?;
        }
        Ok(())
    }

    /// A Query in the middle of a batch with a block of ours: the batch ends here. False: its commit failed, and the client has
    /// the error.
    pub async fn end_own_block_of_batch(&mut self) -> Result<bool, End> {
        let told = self.commit_batch(None).await?;
        self.in_batch = false;
        Ok(told)
    }

    /// Ends a block of ours at the client's Sync, or at one of ours.
    async fn commit_batch(&mut self, frame: Option<&[u8]>) -> Result<bool, End> {
        match frame {
            Some(frame) => self.wire.to_server.extend_from_slice(frame),
            None => build::sync(&mut self.wire.to_server),
        }
        self.wire.expects.push_back(Expect::Sync { hidden: true });
        self.wire.pump(Until::Answered).await?;
        let mut ok = true;
        if self.wire.status == b'T' {
            if let Err(error) = self.commit(false).await? {
                self.wire.to_client.extend_from_slice(&error);
                ok = false;
            }
        } else if self.wire.status == b'E' {
            self.hidden_query("ROLLBACK").await?;
        }
        self.forget_transaction();
        Ok(ok)
    }

    async fn sync(&mut self, frame: &[u8]) -> Result<(), End> {
        self.skip_until_sync = false;
        self.in_batch = false;
        self.statements.end_batch();
        if self.settings_touched {
            // If the batch failed, its settings are gone.
            self.facts = None;
        }
        if !self.own_block {
            self.pass(frame, Expect::Sync { hidden: false });
            return Ok(());
        }
        self.commit_batch(Some(frame)).await?;
        build::ready_for_query(&mut self.wire.to_client, self.wire.status);
        Ok(())
    }

    async fn parse(&mut self, frame: &Bytes) -> Result<(), End> {
        let parse = Parse::read(frame::body(frame)).map_err(End::ClientProtocol)?;
        if !self.hub.replicates() {
            self.pass(frame, Expect::Parse { hidden: false });
            return Ok(());
        }
        let name = frame.slice_ref(parse.name);
        let types: Arc<[u8]> = parse.types.into();
        let (plan, shape, text) = match self.plan(parse.text).await? {
            Planned::One { plan, shape, text } => (plan, shape, text),
            Planned::Nothing | Planned::Several(_) => {
                self.pass(frame, Expect::Parse { hidden: false });
                self.statements.send_statement(name, None);
                return Ok(());
            }
            Planned::Skipped => return Ok(()),
            Planned::Refused(refusal) => return self.refuse_extended(&refused(&refusal)).await,
            Planned::Failed(error) => {
                self.wire.to_client.extend_from_slice(&error_frame(&error));
                self.skip_until_sync = true;
                return Ok(());
            }
        };
        if self.statements.is_full() {
            let error = ClientError::error("53400", "too many prepared statements in one session", "Close some.");
            return self.refuse_extended(&error).await;
        }
        let is_admin = matches!(plan.lane, Lane::Admin(_));
        match &plan.lane {
            Lane::Refused(refusal) => return self.refuse_extended(&refused(refusal)).await,
            Lane::Admin(_) => {
                self.catch_up().await?;
                build::frame(&mut self.wire.to_client, b'1', |_| {});
            }
            Lane::Write(write) => match write.leader_text(&text, &shape) {
                Some(text) => {
                    build::parse(&mut self.wire.to_server, parse.name, text.as_bytes(), &types);
                    self.wire.expects.push_back(Expect::Parse { hidden: false });
                }
                None => self.pass(frame, Expect::Parse { hidden: false }),
            },
            _ => self.pass(frame, Expect::Parse { hidden: false }),
        }
        let own_columns = self.own_columns(&name, &plan).await?;
        let (schema_number, facts) = (self.planned_at, self.facts.clone());
        let prepared = Arc::new(Prepared { text, shape, plan, types, own_columns, schema_number, facts });
        if is_admin {
            self.statements.set_statement(name, prepared);
        } else {
            self.statements.send_statement(name, Some(prepared));
        }
        Ok(())
    }

    async fn bind(&mut self, frame: &Bytes) -> Result<(), End> {
        let bind = Bind::read(frame::body(frame)).map_err(End::ClientProtocol)?;
        let portal = frame.slice_ref(bind.portal);
        self.make_sure(bind.statement).await?;
        if self.wire.is_skipping() {
            return Ok(());
        }
        let Some(prepared) = self.statements.prepared(bind.statement).cloned() else {
            self.pass(frame, Expect::Bind { hidden: false });
            self.statements.send_portal(portal, None);
            return Ok(());
        };
        let Some(prepared) = self.renew(frame.slice_ref(bind.statement), prepared).await? else { return Ok(()) };
        let mode = match &prepared.plan.lane {
            Lane::Write(write) => mode_of(write),
            _ => Mode::Forward,
        };
        if matches!(prepared.plan.lane, Lane::Admin(_)) {
            self.catch_up().await?;
            build::frame(&mut self.wire.to_client, b'2', |_| {});
            let parameters = frame.slice_ref(bind.parameters);
            self.statements.set_portal(portal, Portal { prepared, parameters, rest: None });
            return Ok(());
        } else if let Mode::Strip { hidden, client_returning } = mode {
            let formats = rewrite::result_formats(bind.result_formats, client_returning, prepared.own_columns, hidden);
            build::bind_raw(&mut self.wire.to_server, bind.portal, bind.statement, bind.parameters, &formats);
            self.wire.expects.push_back(Expect::Bind { hidden: false });
        } else {
            self.pass(frame, Expect::Bind { hidden: false });
        }
        let parameters = frame.slice_ref(bind.parameters);
        self.statements.send_portal(portal, Some(Portal { prepared, parameters, rest: None }));
        Ok(())
    }

    /// Whether a plan made under other settings, or in another catalog, would be the same now.
    fn is_current(&self, prepared: &Prepared) -> bool {
        let same_place = match (&prepared.facts, &self.facts) {
            (Some(then), Some(now)) => Arc::ptr_eq(then, now) || then.is_same_place(now),
            _ => false,
        };
        same_place && !self.has_own_catalog && prepared.schema_number == self.hub.schema_number.load(Ordering::Acquire)
    }

    /// A statement that was prepared before a change of the schema, the role or the search path is planned again, and prepared
    /// again on the leader if its plan is another one now. `None`: it is refused now, and the client has the error.
    async fn renew(&mut self, name: Bytes, old: Arc<Prepared>) -> Result<Option<Arc<Prepared>>, End> {
        let fixed = matches!(old.plan.lane, Lane::Admin(_) | Lane::Control(_));
        // In a failed block nothing is run, and nothing can be known.
        if fixed || self.wire.status == b'E' || self.is_current(&old) {
            return Ok(Some(old));
        }
        let (plan, shape) = match self.plan(old.text.as_bytes()).await? {
            Planned::One { plan, shape, .. } => (plan, shape),
            Planned::Nothing | Planned::Several(_) => return Ok(Some(old)),
            Planned::Skipped => return Ok(None),
            Planned::Refused(refusal) => return self.refuse_extended(&refused(&refusal)).await.map(|()| None),
            Planned::Failed(error) => {
                self.wire.to_client.extend_from_slice(&error_frame(&error));
                self.skip_until_sync = true;
                return Ok(None);
            }
        };
        if let Lane::Refused(refusal) = &plan.lane {
            return self.refuse_extended(&refused(refusal)).await.map(|()| None);
        }
        if self.wire.status == b'E' {
            return Ok(Some(old));
        }
        let mut own_columns = old.own_columns;
        if plan != old.plan {
            let leader_text = match &plan.lane {
                Lane::Write(write) => write.leader_text(&old.text, &shape),
                _ => None,
            };
            build::close(&mut self.wire.to_server, b'S', &name);
            self.wire.expects.push_back(Expect::Close { hidden: true });
            let text = leader_text.as_deref().unwrap_or(&old.text);
            build::parse(&mut self.wire.to_server, &name, text.as_bytes(), &old.types);
            self.wire.expects.push_back(Expect::Parse { hidden: true });
            own_columns = self.own_columns(&name, &plan).await?;
        }
        let (text, types) = (Arc::clone(&old.text), Arc::clone(&old.types));
        let (schema_number, facts) = (self.planned_at, self.facts.clone());
        let prepared = Arc::new(Prepared { text, shape, plan, types, own_columns, schema_number, facts });
        self.statements.set_statement(name, Arc::clone(&prepared));
        Ok(Some(prepared))
    }

    /// How many columns the client's own RETURNING has, where hidden ones follow.
    async fn own_columns(&mut self, name: &[u8], plan: &Plan) -> Result<usize, End> {
        let Lane::Write(write) = &plan.lane else { return Ok(0) };
        let hidden = write.hidden_returning.len();
        if hidden == 0 || !write.client_returning {
            return Ok(0);
        }
        build::describe(&mut self.wire.to_server, b'S', name);
        self.wire.expects.push_back(Expect::Describe { mode: Mode::Hidden });
        self.catch_up().await?;
        Ok(self.wire.results.columns.saturating_sub(hidden))
    }

    fn plan_named(&self, kind: u8, name: &[u8]) -> Option<&Arc<Prepared>> {
        if kind == b'S' { self.statements.prepared(name) } else { self.statements.portal(name).map(|p| &p.prepared) }
    }

    async fn describe(&mut self, frame: &Bytes) -> Result<(), End> {
        let (kind, name) = message::kind_and_name(b'D', frame::body(frame)).map_err(End::ClientProtocol)?;
        self.make_sure(name).await?;
        if self.wire.is_skipping() {
            return Ok(());
        }
        let mode = match self.plan_named(kind, name).map(|p| &p.plan.lane) {
            Some(Lane::Write(write)) => mode_of(write),
            Some(Lane::Admin(Admin::PoolNodes)) => {
                self.catch_up().await?;
                crate::proxy::admin::describe_pool_nodes(&mut self.wire.to_client, kind == b'S');
                return Ok(());
            }
            _ => Mode::Forward,
        };
        self.pass(frame, Expect::Describe { mode });
        Ok(())
    }

    fn close(&mut self, frame: &Bytes) -> Result<(), End> {
        let (kind, name) = message::kind_and_name(b'C', frame::body(frame)).map_err(End::ClientProtocol)?;
        let name = frame.slice_ref(name);
        self.pass(frame, Expect::Close { hidden: false });
        if kind == b'S' {
            self.statements.send_statement(name, None);
        } else {
            self.statements.send_portal(name, None);
        }
        Ok(())
    }

    async fn execute(&mut self, frame: &Bytes) -> Result<(), End> {
        let (name, rows_max) = message::execute(frame::body(frame)).map_err(End::ClientProtocol)?;
        self.make_sure(name).await?;
        if self.wire.is_skipping() {
            return Ok(());
        }
        let Some(portal) = self.statements.portal(name) else {
            if !self.hub.replicates() || self.wire.status == b'E' {
                self.pass(frame, Expect::Execute { mode: Mode::Forward });
                return Ok(());
            }
            // A cursor of SQL, or nothing that we know: whatever it is, it must not write.
            self.facts = None;
            return self.execute_guarded(frame).await;
        };
        if portal.rest.is_some() {
            return self.give_part(name, rows_max).await;
        }
        let (prepared, parameters) = (Arc::clone(&portal.prepared), portal.parameters.clone());
        let plan = Arc::clone(&prepared.plan);
        match &plan.lane {
            Lane::Read { guard: false, copy_in: false } if !plan.drops_prepared => {
                self.pass(frame, Expect::Execute { mode: Mode::Forward });
                self.after(&plan, &prepared.text, true);
                Ok(())
            }
            Lane::Read { guard: true, .. } if self.wire.status != b'E' => {
                let done = self.execute_guarded(frame).await;
                self.after(&plan, &prepared.text, true);
                done
            }
            Lane::Read { copy_in, .. } => {
                self.wire.clear_results();
                self.pass(frame, Expect::Execute { mode: Mode::Forward });
                build::flush(&mut self.wire.to_server);
                self.wire.pump(Until::AnsweredOrCopy).await?;
                if *copy_in && self.wire.results.copy_in {
                    self.pass_copy_data(None).await?;
                    self.wire.pump(Until::Answered).await?;
                }
                self.after(&plan, &prepared.text, self.wire.results.error.is_none());
                Ok(())
            }
            Lane::Maintenance => {
                self.wire.clear_results();
                self.pass(frame, Expect::Execute { mode: Mode::Forward });
                build::flush(&mut self.wire.to_server);
                self.wire.pump(Until::Answered).await?;
                if self.wire.results.error.is_none() {
                    self.maintain_followers(&prepared.text);
                }
                Ok(())
            }
            Lane::Admin(Admin::PoolNodes) => {
                self.catch_up().await?;
                crate::proxy::admin::pool_node_rows(&self.hub, &mut self.wire.to_client);
                Ok(())
            }
            Lane::Control(control) => {
                let done = self.execute_control(frame, control).await;
                self.after(&plan, &prepared.text, true);
                done
            }
            Lane::Refused(refusal) => self.refuse_extended(&refused(refusal)).await,
            Lane::Write(write) => self.execute_write(frame, write, &prepared, &parameters, rows_max).await,
        }
    }

    /// Opens a block of ours inside the client's batch.
    fn open_block_in_batch(&mut self) {
        if !self.in_block() {
            self.hidden("pgtandem_p", "pgtandem_begin", &[]);
            self.own_block = true;
        }
    }

    async fn execute_guarded(&mut self, frame: &Bytes) -> Result<(), End> {
        self.open_block_in_batch();
        self.hidden("pgtandem_p", "pgtandem_guard", &[]);
        self.hidden("pgtandem_p", "pgtandem_guard_on", &[]);
        self.catch_up().await?;
        if self.wire.is_skipping() {
            return Ok(());
        }
        self.wire.clear_results();
        self.wire.hide_errors = true;
        self.pass(frame, Expect::Execute { mode: Mode::Forward });
        let done = self.catch_up().await;
        self.wire.hide_errors = false;
        done?;
        if let Some(error) = self.wire.results.error.take() {
            self.tell_guard_error(&error);
            return Ok(());
        }
        self.hidden("pgtandem_p", "pgtandem_guard_off", &[]);
        self.catch_up().await
    }

    async fn execute_write(
        &mut self,
        frame: &Bytes,
        write: &Write,
        prepared: &Arc<Prepared>,
        parameters: &Bytes,
        rows_max: u32,
    ) -> Result<(), End> {
        if self.facts.is_none() && self.wire.status != b'E' {
            // A setting was changed since Bind: the effect is made under what holds now.
            self.catch_up().await?;
            if self.wire.is_skipping() {
                return Ok(());
            }
            if let Some(error) = self.read_context().await? {
                self.wire.to_client.extend_from_slice(&error_frame(&error));
                self.skip_until_sync = true;
                return Ok(());
            }
        }
        if let Some(refusal) = self.refuse_execution(write, prepared, parameters)? {
            return self.refuse_extended(&refusal).await;
        }
        self.open_block_in_batch();
        if !self.lock_tables(write).await? {
            return Ok(());
        }
        self.catch_up().await?;
        if self.wire.is_skipping() {
            return Ok(());
        }
        let position = self.log.position();
        self.wire.clear_results();
        let mode = mode_of(write);
        let (name, _) = message::execute(frame::body(frame)).map_err(End::ClientProtocol)?;
        // A write runs whole at the first Execute, whatever its limit; the client gets the rows in the parts that it asks for.
        let in_parts = rows_max > 0 && write.client_returning;
        (self.wire.hold_rows, self.wire.hold_tag) = (in_parts, in_parts);
        if rows_max > 0 {
            build::execute(&mut self.wire.to_server, name, 0);
            self.wire.expects.push_back(Expect::Execute { mode });
        } else {
            self.pass(frame, Expect::Execute { mode });
        }
        build::flush(&mut self.wire.to_server);
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
        Ok(())
    }

    /// The next rows of a portal that has run, as many as the client asks for (0: all).
    async fn give_part(&mut self, name: &[u8], rows_max: u32) -> Result<(), End> {
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
            crate::session::effect::put_tag(&mut self.wire.to_client, &tag);
        }
        Ok(())
    }

    /// Why this execution can not be carried to followers.
    fn refuse_execution(
        &self,
        write: &Write,
        prepared: &Prepared,
        parameters: &[u8],
    ) -> Result<Option<ClientError>, End> {
        if let Some(refusal) = self.refuses_write(write) {
            return Ok(Some(refusal));
        }
        if let EffectPlan::Text { dates_matter: true, .. } = &write.effect {
            let texts = parameters::texts(&prepared.types, parameters).map_err(End::ClientProtocol)?;
            if write.reads_clock(&prepared.text, &prepared.shape, &texts) {
                return Ok(Some(refused(&crate::sql::refuse::clock_literal())));
            }
        }
        Ok(None)
    }

    async fn execute_control(&mut self, frame: &Bytes, control: &Control) -> Result<(), End> {
        self.catch_up().await?;
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
            Control::Commit { chain } if !self.log.is_empty() && self.in_block() && self.wire.status != b'E' => {
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
            Control::Savepoint { .. } => {
                if let Err(error) = self.may_savepoint() {
                    return self.refuse_extended(&error).await;
                }
            }
            _ => {}
        }
        self.wire.clear_results();
        self.pass(frame, Expect::Execute { mode: Mode::Forward });
        self.catch_up().await?;
        let ok = self.wire.results.error.is_none();
        if ok {
            // ReadyForQuery will say so, too, but the rest of the batch must know now.
            self.wire.status = match control {
                Control::Begin { .. } | Control::RollbackTo { .. } => b'T',
                Control::Commit { chain } | Control::Rollback { chain } if !chain => b'I',
                _ => self.wire.status,
            };
        }
        self.after_control(control, ok);
        Ok(())
    }

    /// An error of ours in the middle of a batch: what follows is skipped up to the Sync.
    pub async fn refuse_extended(&mut self, error: &ClientError) -> Result<(), End> {
        self.catch_up().await?;
        if self.wire.is_skipping() {
            return Ok(());
        }
        self.refuse_in_text(error).await?;
        self.skip_until_sync = true;
        Ok(())
    }
}
