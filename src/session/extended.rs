//! The extended protocol: Parse, Bind, Describe, Execute, up to a Sync.
//!
//! Reads pass without waiting. A write, transaction control and what runs behind the guard are taken in lock step: a Flush
//! makes the server answer before the next message, because the effect must be known. A write outside a block opens one of
//! ours inside the client's batch; its Sync commits it.

use std::sync::Arc;

use bytes::Bytes;

use crate::pg::build::{self, ClientError};
use crate::pg::frame;
use crate::pg::message::{self, Bind, Parse};
use crate::session::execute::Sent;
use crate::session::planning::Planned;
use crate::session::rewrite::{self, OwnRow};
use crate::session::run::Session;
use crate::session::simple::{error_frame, refused};
use crate::session::statements::{Portal, Prepared};
use crate::session::wire::{EXPECTS_MAX, End, Expect, Mode, Until};
use crate::sql::plan::{Admin, Lane, Plan};
use crate::sql::{classify, shape};

impl Session {
    pub async fn extended(&mut self, tag: u8, frame: Bytes) -> Result<(), End> {
        self.settle();
        if self.wire.expects.len() >= EXPECTS_MAX {
            self.catch_up().await?;
        }
        self.in_batch |= !matches!(tag, b'S' | b'H');
        if names_ours(tag, frame::body(&frame)) {
            return self.refuse_extended(&refused(&crate::sql::refuse::own_name())).await;
        }
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

    pub fn pass(&mut self, frame: &[u8], expect: Expect) {
        self.wire.to_server.extend_from_slice(frame);
        self.wire.expects.push_back(expect);
    }

    /// Makes the server answer all that was sent. A BEGIN that waits was not: it can not fail.
    pub async fn catch_up(&mut self) -> Result<(), End> {
        if !self.wire.expects.is_empty() && !self.wire.begin_waits {
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
            self.roll_back_everywhere().await?;
        }
        self.forget_transaction();
        Ok(ok)
    }

    /// What is known differently after a Sync.
    pub fn end_of_batch(&mut self) {
        self.skip_until_sync = false;
        self.in_batch = false;
        self.statements.end_batch();
        if self.settings_touched {
            // If the batch failed, its settings are gone.
            self.facts = None;
        }
    }

    async fn sync(&mut self, frame: &[u8]) -> Result<(), End> {
        self.end_of_batch();
        if !self.own_block {
            self.pass(frame, Expect::Sync { hidden: false });
            // What the client sends from here on is of another batch, whether or not the answer is there.
            self.wire.end_skipping();
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
            // By which many drivers look whether the server is there.
            Planned::Nothing => {
                let plan = Plan { lane: Lane::Read { guard: false, copy_in: false }, ..classify::unparsed() };
                (Arc::new(plan), shape::mask(""), Arc::from(""))
            }
            Planned::Several(_) => {
                self.pass(frame, Expect::Parse { hidden: false });
                self.statements.send_statement(name, None);
                return Ok(());
            }
            Planned::Skipped => return Ok(()),
            Planned::Refused(error) => return self.refuse_extended(&error).await,
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
                    let text = self.encoded(&text);
                    build::parse(&mut self.wire.to_server, parse.name, &text, &types);
                    self.wire.expects.push_back(Expect::Parse { hidden: false });
                }
                None => self.pass(frame, Expect::Parse { hidden: false }),
            },
            _ => self.pass(frame, Expect::Parse { hidden: false }),
        }
        let (schema_number, facts) = (self.planned_at, self.facts.clone());
        let prepared = Prepared {
            text,
            indent: 0,
            shape,
            plan,
            types,
            types_known: false,
            own_row: OwnRow::default(),
            schema_number,
            facts,
        };
        if is_admin {
            self.statements.set_statement(name, Arc::new(prepared));
            return Ok(());
        }
        // Told before anything else is asked of the server: its answers are counted in the order of sending.
        self.statements.send_statement(name.clone(), Some(Arc::new(prepared.clone())));
        let own_row = self.own_row(&name, &prepared.plan).await?;
        if own_row.columns > 0 && !self.wire.is_skipping() {
            self.statements.set_statement(name, Arc::new(Prepared { own_row, ..prepared }));
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
        let prepared = match self.renew(frame.slice_ref(bind.statement), prepared).await? {
            Ok(prepared) => prepared,
            Err(failure) => return self.tell_failure(failure).await,
        };
        let mode = self.mode_of_lane(&prepared.plan.lane);
        let result_formats = frame.slice_ref(bind.result_formats);
        if matches!(prepared.plan.lane, Lane::Admin(_)) {
            self.catch_up().await?;
            build::frame(&mut self.wire.to_client, b'2', |_| {});
            let parameters = frame.slice_ref(bind.parameters);
            self.statements.set_portal(portal, Portal { prepared, parameters, result_formats, rest: None });
            return Ok(());
        } else if let Mode::Strip { hidden, client_returning } = mode {
            let own_columns = self.own_columns_of(&prepared);
            let formats = rewrite::result_formats(bind.result_formats, client_returning, own_columns, hidden);
            build::bind_raw(&mut self.wire.to_server, bind.portal, bind.statement, bind.parameters, &formats);
            self.wire.expects.push_back(Expect::Bind { hidden: false });
        } else {
            self.pass(frame, Expect::Bind { hidden: false });
        }
        let parameters = frame.slice_ref(bind.parameters);
        self.statements.send_portal(portal, Some(Portal { prepared, parameters, result_formats, rest: None }));
        Ok(())
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
            Some(lane @ (Lane::Write(_) | Lane::Named(_))) => self.mode_of_lane(lane),
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
        let is_first = std::mem::take(&mut self.is_first);
        let Some(portal) = self.statements.portal(name) else {
            if !self.hub.replicates() || self.wire.status == b'E' {
                self.pass(frame, Expect::Execute { mode: Mode::Forward });
                return Ok(());
            }
            // A cursor of SQL, or nothing that we know: whatever it is, it must not write.
            self.facts = None;
            self.note_unknown();
            return self.execute_guarded(frame, None).await;
        };
        if portal.rest.is_some() {
            return self.give_part(name, rows_max).await;
        }
        let (prepared, parameters) = (Arc::clone(&portal.prepared), portal.parameters.clone());
        let formats = portal.result_formats.clone();
        let plan = Arc::clone(&prepared.plan);
        match &plan.lane {
            Lane::Read { guard: false, copy_in: false } if !plan.drops_prepared => {
                if !plan.sequences.is_none() && self.wire.status != b'E' {
                    self.open_block_in_batch();
                    self.touched.begin(&plan.sequences);
                }
                self.pass(frame, Expect::Execute { mode: Mode::Forward });
                self.after(&plan, &prepared.text, true);
                Ok(())
            }
            Lane::Read { guard: true, .. } if self.wire.status != b'E' => {
                self.is_first = is_first;
                let sent = Sent { prepared: &prepared, parameters: &parameters, formats: &formats, name, rows_max };
                let done = self.execute_guarded(frame, Some(&sent)).await;
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
            Lane::Named(named) => {
                let formats = portal.result_formats.clone();
                self.note_stays(&plan, &prepared.text, true);
                self.named_extended(frame, named, &prepared, &formats, rows_max).await
            }
            Lane::Maintenance { exclusive } => {
                self.wire.clear_results();
                self.pass(frame, Expect::Execute { mode: Mode::Forward });
                build::flush(&mut self.wire.to_server);
                self.wire.pump(Until::Answered).await?;
                if self.wire.results.error.is_none() {
                    self.maintain_followers(&prepared.text, *exclusive);
                }
                Ok(())
            }
            Lane::Nodewise => self.execute_nodewise(frame, &prepared.text).await,
            Lane::Finish(finish) => self.execute_finish(frame, finish).await,
            Lane::Admin(Admin::PoolNodes) => {
                self.catch_up().await?;
                crate::proxy::admin::pool_node_rows(&self.hub, &mut self.wire.to_client);
                Ok(())
            }
            Lane::Control(control) => {
                self.is_first = is_first;
                let done = self.execute_control(frame, control, &prepared.text).await;
                self.after(&plan, &prepared.text, true);
                done
            }
            Lane::Once(_) if self.wire.status == b'E' => {
                self.pass(frame, Expect::Execute { mode: Mode::Forward });
                Ok(())
            }
            Lane::Once(once) => {
                self.is_first = is_first;
                let sent = Sent { prepared: &prepared, parameters: &parameters, formats: &formats, name, rows_max };
                let done = self.execute_once(&sent, &plan, once, &prepared.shape, prepared.schema_number).await;
                self.after(&plan, &prepared.text, true);
                done
            }
            Lane::Refused(refusal) => self.refuse_extended(&refused(refusal)).await,
            Lane::Write(write) => {
                self.note_stays(&plan, &prepared.text, true);
                self.execute_write(frame, write, &prepared, &parameters, rows_max).await
            }
        }
    }

    /// An error of ours in the middle of a batch: what follows is skipped up to the Sync.
    pub async fn refuse_extended(&mut self, error: &ClientError) -> Result<(), End> {
        self.catch_up().await?;
        if self.wire.is_skipping() {
            return Ok(());
        }
        self.refuse_in_text(error).await?;
        self.skip_until_sync = !self.synced_early;
        Ok(())
    }
}

/// Whether a message names a statement or portal of the proxy's own.
fn names_ours(tag: u8, body: &[u8]) -> bool {
    let ours = |name: &[u8]| name.starts_with(crate::sql::refuse::OWN_PREFIX.as_bytes());
    match tag {
        b'D' | b'C' => body.get(1..).is_some_and(ours),
        b'P' | b'E' => ours(body),
        b'B' => ours(body) || body.splitn(3, |b| *b == 0).nth(1).is_some_and(ours),
        _ => false,
    }
}
