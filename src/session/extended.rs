//! The extended protocol: Parse, Bind, Describe, Execute, up to a Sync.
//!
//! Reads pass without waiting. A write, transaction control and what runs behind the guard are taken in lock step: a Flush
//! makes the server answer before the next message, because the effect must be known. A write outside a block opens one of
//! ours inside the client's batch; its Sync commits it.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use bytes::Bytes;

use crate::pg::build::{self, ClientError};
use crate::pg::frame;
use crate::pg::message::{self, Bind, Parse};
use crate::session::planning::{Planned, mode_of, schema_changed};
use crate::session::run::Session;
use crate::session::simple::{error_frame, refused};
use crate::session::wire::{EXPECTS_MAX, End, Expect, Mode, Until};
use crate::sql::plan::{Admin, Control, EffectPlan, Lane, Plan, Write};
use crate::sql::shape::Shape;

/// Prepared statements and portals that a session remembers.
const REMEMBERED_MAX: usize = 100_000;

/// A statement that the client prepared.
#[derive(Debug)]
pub struct Prepared {
    pub text: Arc<str>,
    pub shape: Shape,
    pub plan: Arc<Plan>,
    /// As in `Parse`.
    pub types: Arc<[u8]>,
    /// Columns of the client's own RETURNING, if there are hidden ones, too.
    own_columns: usize,
    schema_number: u64,
}

#[derive(Clone, Debug)]
struct Portal {
    prepared: Arc<Prepared>,
    parameters: Bytes,
}

/// What a session has prepared and bound, by name.
#[derive(Debug, Default)]
pub struct Statements {
    prepared: HashMap<Bytes, Arc<Prepared>>,
    portals: HashMap<Bytes, Portal>,
}

impl Statements {
    pub fn clear(&mut self) {
        self.prepared.clear();
        self.portals.clear();
    }
}

impl Session {
    pub async fn extended(&mut self, tag: u8, frame: Bytes) -> Result<(), End> {
        if self.wire.is_skipping() && tag != b'S' {
            return Ok(());
        }
        if self.wire.expects.len() >= EXPECTS_MAX {
            self.catch_up().await?;
        }
        self.in_batch = tag != b'S';
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
    async fn catch_up(&mut self) -> Result<(), End> {
        if !self.wire.expects.is_empty() {
            build::flush(&mut self.wire.to_server);
            self.wire.pump(Until::Answered).await?;
        }
        Ok(())
    }

    async fn sync(&mut self, frame: &[u8]) -> Result<(), End> {
        self.skip_until_sync = false;
        self.in_batch = false;
        if !self.own_block {
            self.pass(frame, Expect::Sync { hidden: false });
            return Ok(());
        }
        self.pass(frame, Expect::Sync { hidden: true });
        self.wire.pump(Until::Answered).await?;
        if self.wire.status == b'T' {
            if let Err(error) = self.commit(false).await? {
                self.wire.to_client.extend_from_slice(&error);
            }
        } else if self.wire.status == b'E' {
            self.hidden_query("ROLLBACK").await?;
        }
        self.forget_transaction();
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
                self.statements.prepared.remove(&name);
                self.pass(frame, Expect::Parse { hidden: false });
                return Ok(());
            }
            Planned::Refused(refusal) => return self.refuse_extended(&refused(&refusal)).await,
            Planned::Failed(error) => {
                self.wire.to_client.extend_from_slice(&error_frame(&error));
                self.skip_until_sync = true;
                return Ok(());
            }
        };
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
        if self.statements.prepared.len() >= REMEMBERED_MAX {
            let error = ClientError::error("53400", "too many prepared statements in one session", "Close some.");
            return self.refuse_extended(&error).await;
        }
        let schema_number = self.hub.schema_number.load(Ordering::Acquire);
        let prepared = Arc::new(Prepared { text, shape, plan, types, own_columns, schema_number });
        // A second Parse of the same name is an error of the server's, and the first stays.
        if name.is_empty() || !self.statements.prepared.contains_key(&name) {
            self.statements.prepared.insert(name, prepared);
        }
        Ok(())
    }

    async fn bind(&mut self, frame: &Bytes) -> Result<(), End> {
        let bind = Bind::read(frame::body(frame)).map_err(End::ClientProtocol)?;
        let portal = frame.slice_ref(bind.portal);
        let Some(prepared) = self.statements.prepared.get(bind.statement).cloned() else {
            self.statements.portals.remove(&portal);
            self.pass(frame, Expect::Bind { hidden: false });
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
        } else if let Mode::Strip { hidden, client_returning } = mode {
            let formats = result_formats(bind.result_formats, client_returning, prepared.own_columns, hidden);
            build::bind_raw(&mut self.wire.to_server, bind.portal, bind.statement, bind.parameters, &formats);
            self.wire.expects.push_back(Expect::Bind { hidden: false });
        } else {
            self.pass(frame, Expect::Bind { hidden: false });
        }
        if self.statements.portals.len() >= REMEMBERED_MAX {
            self.statements.portals.clear();
        }
        let parameters = frame.slice_ref(bind.parameters);
        self.statements.portals.insert(portal, Portal { prepared, parameters });
        Ok(())
    }

    /// A statement that was prepared before a change of the schema is planned again, and prepared again on the leader if its
    /// plan is another one now. `None`: it is refused now, and the client has the error.
    async fn renew(&mut self, name: Bytes, old: Arc<Prepared>) -> Result<Option<Arc<Prepared>>, End> {
        let schema_number = self.hub.schema_number.load(Ordering::Acquire);
        if old.schema_number == schema_number || matches!(old.plan.lane, Lane::Admin(_)) {
            return Ok(Some(old));
        }
        let (plan, shape) = match self.plan(old.text.as_bytes()).await? {
            Planned::One { plan, shape, .. } => (plan, shape),
            Planned::Nothing | Planned::Several(_) => return Ok(Some(old)),
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
        let types = Arc::clone(&old.types);
        let prepared =
            Arc::new(Prepared { text: Arc::clone(&old.text), shape, plan, types, own_columns, schema_number });
        self.statements.prepared.insert(name, Arc::clone(&prepared));
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
        if kind == b'S' {
            self.statements.prepared.get(name)
        } else {
            self.statements.portals.get(name).map(|p| &p.prepared)
        }
    }

    async fn describe(&mut self, frame: &Bytes) -> Result<(), End> {
        let (kind, name) = message::kind_and_name(b'D', frame::body(frame)).map_err(End::ClientProtocol)?;
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
        if kind == b'S' {
            self.statements.prepared.remove(name);
        } else {
            self.statements.portals.remove(name);
        }
        self.pass(frame, Expect::Close { hidden: false });
        Ok(())
    }

    async fn execute(&mut self, frame: &Bytes) -> Result<(), End> {
        let (name, rows_max) = message::execute(frame::body(frame)).map_err(End::ClientProtocol)?;
        let Some(portal) = self.statements.portals.get(name).cloned() else {
            self.pass(frame, Expect::Execute { mode: Mode::Forward });
            return Ok(());
        };
        let plan = Arc::clone(&portal.prepared.plan);
        match &plan.lane {
            Lane::Read { guard: false, copy_in: false } if !plan.drops_prepared => {
                self.pass(frame, Expect::Execute { mode: Mode::Forward });
                self.after(&plan);
                Ok(())
            }
            Lane::Read { guard: true, .. } if self.wire.status != b'E' => self.execute_guarded(frame).await,
            Lane::Read { copy_in, .. } => {
                self.wire.clear_results();
                self.pass(frame, Expect::Execute { mode: Mode::Forward });
                build::flush(&mut self.wire.to_server);
                self.wire.pump(Until::AnsweredOrCopy).await?;
                if *copy_in && self.wire.results.copy_in {
                    self.pass_copy_data(None).await?;
                    self.wire.pump(Until::Answered).await?;
                }
                self.after(&plan);
                Ok(())
            }
            Lane::Maintenance => {
                self.wire.clear_results();
                self.pass(frame, Expect::Execute { mode: Mode::Forward });
                build::flush(&mut self.wire.to_server);
                self.wire.pump(Until::Answered).await?;
                if self.wire.results.error.is_none() {
                    self.maintain_followers(&portal.prepared.text);
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
                self.after(&plan);
                done
            }
            Lane::Refused(refusal) => self.refuse_extended(&refused(refusal)).await,
            Lane::Write(write) => self.execute_write(frame, write, &portal, rows_max).await,
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

    async fn execute_write(&mut self, frame: &Bytes, write: &Write, portal: &Portal, rows_max: u32) -> Result<(), End> {
        let prepared = &portal.prepared;
        if let Some(refusal) = self.refuse_execution(write, portal, rows_max)? {
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
        if rows_max > 0 && matches!(mode, Mode::Strip { client_returning: false, .. }) {
            let (name, _) = message::execute(frame::body(frame)).map_err(End::ClientProtocol)?;
            build::execute(&mut self.wire.to_server, name, 0);
            self.wire.expects.push_back(Expect::Execute { mode });
        } else {
            self.pass(frame, Expect::Execute { mode });
        }
        build::flush(&mut self.wire.to_server);
        let types = Arc::clone(&prepared.types);
        let effect = self.take_write(write, &prepared.shape, &prepared.text, &portal.parameters, types).await?;
        if self.wire.results.error.is_some() {
            self.log.truncate(position);
            return Ok(());
        }
        let text = Arc::clone(&prepared.text);
        let effect = match effect {
            Ok(()) if !self.still_planned(&text, &prepared.plan, prepared.schema_number).await? => {
                Err(schema_changed())
            }
            effect => effect,
        };
        if let Err(error) = effect {
            self.log.truncate(position);
            return self.refuse_extended(&error).await;
        }
        Ok(())
    }

    /// Why this execution can not be carried to followers.
    fn refuse_execution(&self, write: &Write, portal: &Portal, rows_max: u32) -> Result<Option<ClientError>, End> {
        if let Some(refusal) = self.refuses_write(write) {
            return Ok(Some(refusal));
        }
        if rows_max > 0 && write.client_returning && !write.hidden_returning.is_empty() {
            return Ok(Some(ClientError::error(
                "0A000",
                "INSERT ... RETURNING in parts (Execute with a row limit) is not supported",
                "Fetch all rows at once.",
            )));
        }
        if let EffectPlan::Text { dates_matter: true, .. } = &write.effect {
            let values = message::text_parameters(&portal.parameters).map_err(End::ClientProtocol)?;
            let texts: Vec<Option<&str>> = values.iter().map(|v| std::str::from_utf8(v).ok()).collect();
            if write.reads_clock(&portal.prepared.text, &portal.prepared.shape, &texts) {
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
            Control::Savepoint { name } => {
                if let Err(error) = self.savepoint(name) {
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

/// Result formats for a statement with hidden columns, which are always text.
fn result_formats(asked: &[u8], client_returning: bool, own: usize, hidden: usize) -> Vec<u8> {
    const TEXT: [u8; 2] = [0, 0];
    if !client_returning || asked.is_empty() || asked == TEXT {
        return Vec::new();
    }
    let mut formats = if asked.len() == 2 { asked.repeat(own) } else { asked.to_vec() };
    formats.extend(TEXT.repeat(hidden));
    formats
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hidden_columns_are_text_whatever_the_client_asked_for_its_own() {
        assert_eq!(result_formats(&[0, 1], true, 2, 1), [0, 1, 0, 1, 0, 0]);
        assert_eq!(result_formats(&[0, 1, 0, 0], true, 2, 1), [0, 1, 0, 0, 0, 0]);
        assert!(result_formats(&[0, 1], false, 0, 3).is_empty());
    }
}
