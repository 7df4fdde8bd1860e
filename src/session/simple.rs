//! The simple protocol: a text with one statement or several, answered up to one `ReadyForQuery`.
//!
//! Several statements are cut apart and run one by one, inside a block of ours where the client opened none, because
//! each needs its own lane. Errors keep their position in the client's own text.

use std::sync::Arc;

use bytes::Bytes;

use crate::pg::build::{self, ClientError};
use crate::pg::frame;
use crate::session::copy_file::FromFile;
use crate::session::effect::put_tag;
use crate::session::once::{How, OnceCall};
use crate::session::planning::{Planned, mode_of, schema_changed};
use crate::session::reused::Reused;
use crate::session::run::Session;
use crate::session::wire::{End, Expect, Mode, Until};
use crate::sql::encoding;
use crate::sql::lex::{Kind, Lexer};
use crate::sql::plan::{Admin, Control, Lane, Plan, Refusal, Write};
use crate::sql::shape::Shape;

impl Session {
    pub async fn simple_query(&mut self, frame: Bytes) -> Result<(), End> {
        let body = frame::body(&frame);
        let text = body.strip_suffix(b"\0").unwrap_or(body);
        // Answers to earlier messages of the extended protocol come first; a Query ends their batch.
        self.catch_up().await?;
        if self.wire.is_skipping() {
            return Ok(());
        }
        if !self.hub.replicates() {
            self.in_batch = false;
            return self.forward(&frame).await;
        }
        if self.own_block && !self.end_own_block_of_batch().await? {
            build::ready_for_query(&mut self.wire.to_client, self.wire.status);
            return Ok(());
        }
        self.in_batch = false;
        match self.plan(text).await? {
            Planned::One { plan, shape, text } => self.only_statement(&frame, &plan, &shape, &text).await,
            Planned::Several(parts) => self.several(&parts).await,
            Planned::Nothing => self.forward(&frame).await,
            Planned::Skipped => Ok(()),
            Planned::Refused(error) => self.refuse_simple(&error).await,
            Planned::Failed(error) => {
                self.wire.to_client.extend_from_slice(&error_frame(&error));
                build::ready_for_query(&mut self.wire.to_client, self.wire.status);
                Ok(())
            }
        }
    }

    /// Sends the client's frame as it is and passes the answer.
    pub async fn forward(&mut self, frame: &[u8]) -> Result<(), End> {
        self.wire.clear_results();
        self.wire.to_server.extend_from_slice(frame);
        self.wire.expects.push_back(Expect::Query { mode: Mode::Forward });
        self.pump_with_copy().await
    }

    /// Passes answers, and the client's data where the server asks for it.
    pub(super) async fn pump_with_copy(&mut self) -> Result<(), End> {
        self.wire.pump(Until::AnsweredOrCopy).await?;
        while self.wire.results.copy_in {
            self.pass_copy_data(None).await?;
            self.wire.pump(Until::AnsweredOrCopy).await?;
        }
        Ok(())
    }

    async fn only_statement(&mut self, frame: &[u8], plan: &Plan, shape: &Shape, text: &str) -> Result<(), End> {
        let was_block = self.wire.status != b'I';
        match &plan.lane {
            Lane::Read { guard: true, .. } if self.wire.status != b'E' => {
                let own = !was_block;
                let ok = self.guarded_simple(text, own).await?;
                self.after(plan, text, ok);
                self.end_simple(own, ok).await
            }
            Lane::Read { .. } if !plan.sequences.is_none() && !was_block => {
                // Its values are given once followers can not give them, too.
                self.open_own_block();
                let ok = self.run_part(plan, text).await?;
                self.after(plan, text, ok);
                self.end_simple(true, ok).await
            }
            Lane::Read { .. } => {
                self.touched.begin(&plan.sequences);
                if !self.read_reused(plan, shape, text).await? {
                    self.forward(frame).await?;
                }
                self.after(plan, text, self.wire.results.error.is_none());
                Ok(())
            }
            Lane::Named(named) => self.named_alone(plan, named, shape, text, !was_block).await,
            Lane::Maintenance { exclusive } => {
                self.forward(frame).await?;
                if self.wire.results.error.is_none() {
                    self.maintain_followers(text, *exclusive);
                }
                Ok(())
            }
            Lane::Nodewise => self.simple_nodewise(frame, text).await,
            Lane::Finish(finish) => self.simple_finish(frame, finish).await,
            Lane::Admin(admin) => {
                self.answer_admin(*admin);
                build::ready_for_query(&mut self.wire.to_client, self.wire.status);
                Ok(())
            }
            Lane::Refused(refusal) => self.refuse_simple(&refused(refusal)).await,
            Lane::Control(Control::Begin { with_modes: false }) if self.may_begin_at_once(text) => {
                self.begin_at_once(frame);
                Ok(())
            }
            Lane::Control(control) => {
                self.wire.hold_ready = true;
                let done = self.control(control, text).await;
                self.wire.hold_ready = false;
                let ok = done?;
                self.after(plan, text, ok);
                build::ready_for_query(&mut self.wire.to_client, self.wire.status);
                Ok(())
            }
            Lane::Once(_) if self.wire.status == b'E' => self.forward(frame).await,
            Lane::Once(once) => {
                let own = !was_block;
                if own {
                    self.open_own_block();
                }
                let planned_at = self.planned_at;
                let how = How::Simple;
                let call = OnceCall { plan, once, shape, text, planned_at, how, hold_tag: own };
                let ok = self.once_simple(&call).await?;
                self.after(plan, text, ok);
                self.end_simple(own, ok).await
            }
            Lane::Write(write) => {
                let own = !was_block;
                if own {
                    self.open_own_block();
                }
                let ok = self.write_simple(plan, write, shape, text, own).await?;
                self.after(plan, text, ok);
                self.end_simple(own, ok).await
            }
        }
    }

    /// What must be known differently after a statement. `ok`: it is not known to have failed.
    pub fn after(&mut self, plan: &Plan, text: &str, ok: bool) {
        self.is_first &= matches!(plan.lane, Lane::Control(Control::Begin { .. } | Control::Other));
        self.note_stays(plan, text, ok);
        if plan.changes_settings {
            self.facts = None;
            self.settings_touched = true;
        }
        if ok && self.wire.status == b'T' {
            self.reused.keep_locked(plan.locks);
        }
        if plan.drops_prepared && ok {
            self.statements.clear();
            self.reused = Reused::default();
            self.reprepare();
        }
        if matches!(plan.lane, Lane::Read { .. }) {
            // Definitions in this lane are of temp objects, which hide permanent ones from this session alone.
            if let Some("create" | "alter" | "drop") = words(text).next().map(str::to_ascii_lowercase).as_deref() {
                self.has_temp_objects = true;
                self.has_own_catalog = true;
                self.own_plans.clear();
            }
        }
    }

    /// Opens a block of ours; its answer is swallowed together with the next statement's.
    pub(super) fn open_own_block(&mut self) {
        build::query(&mut self.wire.to_server, b"BEGIN");
        self.wire.expects.push_back(Expect::Query { mode: Mode::Hidden });
        self.own_block = true;
        self.is_first = true;
        self.note_begin();
    }

    /// Ends a statement or text of the simple protocol: commits or rolls back what was ours, and says ready.
    pub(super) async fn end_simple(&mut self, own: bool, ok: bool) -> Result<(), End> {
        if own && self.own_block {
            if ok && self.wire.status == b'T' {
                if let Err(error) = self.commit(false).await? {
                    self.wire.to_client.extend_from_slice(&error);
                } else {
                    self.release_held_tag();
                }
            } else {
                self.roll_back_everywhere().await?;
            }
            self.forget_transaction();
        }
        build::ready_for_query(&mut self.wire.to_client, self.wire.status);
        Ok(())
    }

    /// The command tag of a write whose effect is kept: to the client, or held until the commit is decided. Not before: after it a
    /// client looks for no error of this statement.
    pub(super) fn tell_tag(&mut self, tag: Option<Bytes>, hold: bool) {
        if hold {
            self.held_tag = tag;
        } else if let Some(tag) = tag {
            put_tag(&mut self.wire.to_client, &tag);
        }
    }

    /// The command tag that was held until the commit was decided.
    fn release_held_tag(&mut self) {
        if let Some(tag) = self.held_tag.take() {
            put_tag(&mut self.wire.to_client, &tag);
        }
    }

    /// Runs one write on the leader and keeps its effect. False: it failed, and the client has the error.
    pub(super) async fn write_simple(
        &mut self,
        plan: &Plan,
        write: &Write,
        shape: &Shape,
        text: &str,
        hold_tag: bool,
    ) -> Result<bool, End> {
        let planned_at = self.planned_at;
        if let Some(refusal) = self.refuses_write(write) {
            return self.refuse_in_text(&refusal).await.map(|()| false);
        }
        if write.reads_clock(text, shape, &[]) {
            return self.refuse_in_text(&refused(&crate::sql::refuse::clock_literal())).await.map(|()| false);
        }
        if !self.lock_tables(write).await? {
            return Ok(false);
        }
        if let Err(error) = self.before_write(write, text, &[]).await? {
            return self.refuse_in_text(&error).await.map(|()| false);
        }
        let mode = mode_of(write);
        let file = self.server_file_of(write, text).await?;
        let position = self.log.position();
        self.touched.begin(&plan.sequences);
        self.wire.clear_results();
        let reused = self.send_reused(write, shape, text, mode);
        if !reused {
            let leader_text = match &file {
                FromFile::Read(text) => Some(text.clone()),
                _ => write.leader_text(text, shape),
            };
            let leader_text = self.encoded(leader_text.as_deref().unwrap_or(text));
            build::query(&mut self.wire.to_server, &leader_text);
            self.wire.expects.push_back(Expect::Query { mode });
        }
        self.wire.hold_ready = true;
        self.wire.hold_tag = true;
        let done = self.run_write(write, shape, text, reused).await;
        self.wire.hold_ready = false;
        self.wire.hold_tag = false;
        let mut ok = self.end_server_file(&file, done?).await?;
        if ok && !self.still_planned(text, plan, planned_at).await? {
            self.refuse_in_text(&schema_changed()).await?;
            ok = false;
        }
        if ok {
            self.tell_tag(self.wire.results.tag.clone(), hold_tag);
        } else {
            self.log.truncate(position);
        }
        Ok(ok)
    }

    /// Takes the answer of a write, with its rows or its COPY data, and keeps the effect. False: the client has an error.
    async fn run_write(&mut self, write: &Write, shape: &Shape, text: &str, reused: bool) -> Result<bool, End> {
        self.wire.hide_errors = reused;
        let effect = self.take_write(write, shape, text, &[], Arc::from([])).await;
        if reused {
            self.wire.hide_errors = false;
        }
        let effect = effect?;
        if self.wire.results.error.is_some() {
            if reused {
                self.fail_reused(shape);
            }
            return Ok(false);
        }
        match effect {
            Ok(()) => Ok(true),
            // The leader did it and we can not keep it: the transaction must not commit.
            Err(error) => {
                self.wire.results.tag = None;
                self.refuse_in_text(&error).await?;
                Ok(false)
            }
        }
    }

    /// BEGIN, COMMIT and the like. The command tag goes to the client, `ReadyForQuery` does not.
    pub async fn control(&mut self, control: &Control, text: &str) -> Result<bool, End> {
        match control {
            Control::Commit { chain } if self.has_to_decide() && self.wire.status == b'T' => {
                match self.commit(*chain).await? {
                    Ok(()) => build::command_complete(&mut self.wire.to_client, "COMMIT"),
                    Err(error) => {
                        self.wire.to_client.extend_from_slice(&error);
                        self.forget_transaction();
                        return Ok(false);
                    }
                }
                self.forget_transaction();
                return Ok(true);
            }
            Control::Prepare { gid } if self.wire.status == b'T' => {
                let told = self.prepare_transaction(gid).await?;
                self.forget_transaction();
                return match told {
                    Ok(()) => {
                        build::command_complete(&mut self.wire.to_client, "PREPARE TRANSACTION");
                        Ok(true)
                    }
                    Err(error) => {
                        self.wire.to_client.extend_from_slice(&error);
                        Ok(false)
                    }
                };
            }
            Control::Savepoint { .. } if self.wire.status == b'T' => {
                if let Err(error) = self.may_savepoint() {
                    self.refuse_in_text(&error).await?;
                    return Ok(false);
                }
            }
            // Names of constraints are found by the search_path, which may have been set since it was last read.
            Control::SetConstraints if self.facts.is_none() && self.wire.status == b'T' => {
                if let Some(error) = self.read_context().await? {
                    self.wire.to_client.extend_from_slice(&error_frame(&error));
                    return Ok(false);
                }
            }
            _ => {}
        }
        match control {
            Control::Rollback { .. } => self.roll_halves_back().await,
            Control::RollbackTo { name } => self.roll_halves_back_to(name).await,
            _ => {}
        }
        self.wire.clear_results();
        let sent = self.encoded(text);
        build::query(&mut self.wire.to_server, &sent);
        self.wire.expects.push_back(Expect::Query { mode: Mode::Forward });
        self.wire.pump(Until::Answered).await?;
        let ok = self.wire.results.error.is_none();
        self.after_control(control, ok);
        if ok && *control == Control::SetConstraints && self.wire.status == b'T' {
            let kept = self.set_constraints_effect(text);
            if let Err(error) = kept {
                self.refuse_in_text(&error).await?;
                return Ok(false);
            }
        }
        Ok(ok)
    }

    /// What the session knows after transaction control that the server has answered.
    pub fn after_control(&mut self, control: &Control, ok: bool) {
        match control {
            Control::Begin { with_modes: true } | Control::Other => {
                if ok && matches!(control, Control::Begin { .. }) {
                    self.is_first = true;
                    self.note_begin_once();
                }
                // The modes are of this transaction alone: its end brings back the session's own.
                self.facts = None;
                self.settings_touched = true;
            }
            Control::Begin { .. } => {
                (self.is_first, self.only_begun) = (ok, ok);
                self.note_begin_once();
            }
            Control::Commit { .. } | Control::Rollback { .. } | Control::Prepare { .. }
                if self.wire.status == b'I' || ok =>
            {
                self.carried.end(ok && self.wire.results.tag.as_deref() == Some(b"COMMIT"));
                self.forget_transaction();
            }
            Control::Savepoint { name } if ok => self.remember_savepoint(name),
            Control::Release { name } if ok => self.release(name),
            Control::RollbackTo { name } if ok => {
                self.facts = None;
                self.roll_back_to(name);
            }
            _ => {}
        }
    }

    pub(super) fn tell_hidden_error(&mut self) {
        if let Some(error) = self.wire.results.error.take() {
            self.wire.to_client.extend_from_slice(&error_frame(&error));
        }
    }

    /// Several statements in one text: one by one, in one transaction unless they say otherwise.
    /// A statement that the leader alone runs, without `ReadyForQuery`.
    pub(super) async fn run_part(&mut self, plan: &Plan, text: &str) -> Result<bool, End> {
        self.touched.begin(&plan.sequences);
        self.wire.clear_results();
        let sent = self.encoded(text);
        build::query(&mut self.wire.to_server, &sent);
        self.wire.expects.push_back(Expect::Query { mode: Mode::Forward });
        self.wire.hold_ready = true;
        let done = self.pump_with_copy().await;
        self.wire.hold_ready = false;
        done?;
        let ok = self.wire.results.error.is_none();
        if let (true, Lane::Maintenance { exclusive }) = (ok, &plan.lane) {
            self.maintain_followers(text, *exclusive);
        }
        Ok(ok)
    }

    /// Whether the end of the transaction concerns followers.
    pub fn has_to_decide(&self) -> bool {
        !self.log.is_empty() || self.touched.is_used()
    }

    /// A refusal as the whole answer to a message. In a block the server itself raises it, so that the block fails.
    pub async fn refuse_simple(&mut self, error: &ClientError) -> Result<(), End> {
        self.refuse_in_text(error).await?;
        build::ready_for_query(&mut self.wire.to_client, self.wire.status);
        Ok(())
    }

    /// A refusal in the place of a statement's answer, without `ReadyForQuery`.
    pub async fn refuse_in_text(&mut self, error: &ClientError) -> Result<(), End> {
        self.hub.counters.refused.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let encoding = &self.encoding().to_owned();
        error.write_as(&mut self.wire.to_client, |text| encoding::encode(text, encoding));
        if self.wire.status == b'T' || self.own_block {
            self.fail_block(error).await?;
        }
        Ok(())
    }

    /// Makes the server's transaction fail, as it would have if the error had been its own.
    pub(super) async fn fail_block(&mut self, error: &ClientError) -> Result<(), End> {
        self.wire.hide_errors = true;
        let (message, hint) = (self.encoded(&error.message), self.encoded(&error.hint));
        self.hidden("", "pgtandem_refuse", &[Some(error.sqlstate.as_bytes()), Some(&message), Some(&hint)]);
        build::sync(&mut self.wire.to_server);
        self.wire.expects.push_back(Expect::Sync { hidden: true });
        let done = self.wire.pump(Until::Answered).await;
        self.wire.hide_errors = false;
        done
    }

    pub(super) fn answer_admin(&mut self, admin: Admin) {
        match admin {
            Admin::PoolNodes => crate::proxy::admin::pool_nodes(&self.hub, &mut self.wire.to_client),
        }
    }

    /// VACUUM and the like on the followers, off the client's path: they change no content, so nothing waits for them.
    pub fn maintain_followers(&self, text: &str, exclusive: bool) {
        let (hub, database, text) = (Arc::clone(&self.hub), Arc::clone(&self.database), text.to_owned());
        let context = self.context.clone();
        tokio::task::spawn_local(async move {
            crate::replicate::maintain::run(&hub, &database, context.as_deref(), &text, exclusive).await;
        });
    }
}

/// The words of a statement, identifiers without their quotes.
pub(super) fn words(text: &str) -> impl Iterator<Item = &str> {
    let kept = |kind| matches!(kind, Kind::Word | Kind::QuotedIdentifier);
    let tokens = Lexer::new(text).filter(move |token| kept(token.kind));
    tokens.filter_map(|token| text.get(token.range)).map(|word| word.trim_matches('"'))
}

#[must_use]
pub fn refused(refusal: &Refusal) -> ClientError {
    ClientError::error("0A000", refusal.message.clone(), refusal.hint.clone())
}

/// An `ErrorResponse` with this body.
#[must_use]
pub fn error_frame(body: &[u8]) -> bytes::BytesMut {
    let mut out = bytes::BytesMut::with_capacity(body.len() + frame::HEADER_BYTES);
    build::frame(&mut out, b'E', |b| b.extend_from_slice(body));
    out
}
