//! Statements by name, in SQL: PREPARE, EXECUTE, DEALLOCATE.
//!
//! They share their names with the statements of the protocol, so they stand in the same table ([`Statements`]) and are planned
//! again by the same rules. The leader prepares the client's text with the hidden RETURNING that its lane needs. The arguments of
//! EXECUTE are evaluated once, by the leader, through a statement of ours with the same parameter types: so the same coercions and
//! errors; their values then are the literals of its EXECUTE and the parameters of the followers' statement.
//!
//! [`Statements`]: crate::session::statements::Statements

use std::sync::Arc;

use bytes::{BufMut, Bytes, BytesMut};

use crate::pg::build::{self, ClientError};
use crate::pg::frame::FrameError;
use crate::pg::message::Reader;
use crate::session::planning::{Planned, mode_of, schema_changed};
use crate::session::renew::Failure;
use crate::session::rewrite::{self, OwnRow};
use crate::session::run::Session;
use crate::session::simple::refused;
use crate::session::statements::Prepared;
use crate::session::wire::{End, Expect, Mode, Until};
use crate::sql::named::{Arguments, Named};
use crate::sql::plan::{EffectPlan, Lane, Plan, Write};
use crate::sql::shape::Shape;

/// What stands before the arguments in the text that evaluates them.
const EVALUATE: &str = "EXECUTE pgtandem_v(";

/// How an EXECUTE is sent and answered.
struct Call<'a> {
    text: &'a str,
    shape: &'a Shape,
    arguments: &'a Arguments,
    /// As in `Bind`; of no use in the simple protocol.
    formats: &'a [u8],
    /// The command tag waits for the commit.
    hold_tag: bool,
}

impl Session {
    /// As the only statement of a text. `own`: outside a block.
    pub async fn named_alone(
        &mut self,
        plan: &Plan,
        named: &Named,
        shape: &Shape,
        text: &str,
        own: bool,
    ) -> Result<(), End> {
        self.touched.begin(&plan.sequences);
        self.note_stays(plan, text, true);
        let ok = self.named_simple(named, shape, text, own).await?;
        self.end_simple(own, ok).await
    }

    /// In the simple protocol. `alone`: outside a block, and no other statement in the text. False: it failed, and the client has
    /// the error. `ReadyForQuery` is held back.
    pub async fn named_simple(&mut self, named: &Named, shape: &Shape, text: &str, alone: bool) -> Result<bool, End> {
        self.wire.hold_ready = true;
        let done = self.run_named(named, shape, text, alone).await;
        self.wire.hold_ready = false;
        match done? {
            Ok(()) => Ok(true),
            Err(failure) => self.tell_failure(failure).await.map(|()| false),
        }
    }

    async fn run_named(
        &mut self,
        named: &Named,
        shape: &Shape,
        text: &str,
        alone: bool,
    ) -> Result<Result<(), Failure>, End> {
        let (name, arguments) = match named {
            Named::Prepare { name, query } => return self.prepare_named(name, text, *query).await,
            Named::Deallocate { name } => {
                let done = self.send_and_wait(text).await?;
                if done.is_ok() {
                    let name = self.encoded(name);
                    self.statements.deallocate(&name);
                }
                return Ok(done);
            }
            Named::Execute { name, arguments } => (name, arguments),
        };
        let prepared = match self.resolve(name).await? {
            Ok(prepared) => prepared,
            Err(failure) => return Ok(Err(failure)),
        };
        if let Some(prepared) = &prepared
            && let Lane::Write(write) = &prepared.plan.lane
        {
            if arguments.missing {
                self.note_unknown();
                let told = self.guarded_simple(text, alone).await?;
                return Ok(if told { Ok(()) } else { Err(Failure::Told) });
            }
            if !self.in_block() {
                self.open_own_block();
            }
            let call = Call { text, shape, arguments, formats: &[], hold_tag: alone };
            return self.write_named(write, prepared, &call).await;
        }
        let guard = match reads_behind_guard(prepared.as_deref(), arguments) {
            Ok(guard) => guard,
            Err(failure) => return Ok(Err(failure)),
        };
        let done = if guard && self.wire.status != b'E' {
            if self.guarded_simple(text, alone && !self.in_block()).await? { Ok(()) } else { Err(Failure::Told) }
        } else {
            if self.note_sequences(prepared.as_deref()) && !self.in_block() {
                self.open_own_block();
            }
            self.send_and_wait(text).await?
        };
        self.after_named(prepared.as_deref(), done.is_ok());
        Ok(done)
    }

    /// Whether reading by name takes values of sequences, which are given once followers can not give them, too.
    fn note_sequences(&mut self, prepared: Option<&Prepared>) -> bool {
        if let Some(prepared) = prepared.filter(|_| self.wire.status != b'E') {
            self.touched.begin(&prepared.plan.sequences);
        }
        self.touched.is_used()
    }

    /// In the extended protocol: `statement` is the PREPARE, EXECUTE or DEALLOCATE itself, `formats` as its Bind has them.
    pub async fn named_extended(
        &mut self,
        frame: &Bytes,
        named: &Named,
        statement: &Prepared,
        formats: &[u8],
        rows_max: u32,
    ) -> Result<(), End> {
        self.catch_up().await?;
        if self.wire.is_skipping() {
            return Ok(());
        }
        self.touched.begin(&statement.plan.sequences);
        let done = match named {
            Named::Prepare { name, query } => self.prepare_named(name, &statement.text, *query).await?,
            Named::Deallocate { name } => {
                let done = self.pass_and_wait(frame).await?;
                if done.is_ok() {
                    let name = self.encoded(name);
                    self.statements.deallocate(&name);
                }
                done
            }
            Named::Execute { name, arguments } => {
                let (text, shape) = (&*statement.text, &statement.shape);
                let call = Call { text, shape, arguments, formats, hold_tag: false };
                self.execute_in_batch(frame, name, &call, rows_max).await?
            }
        };
        match done {
            Ok(()) => Ok(()),
            Err(failure) => self.tell_failure(failure).await,
        }
    }

    async fn execute_in_batch(
        &mut self,
        frame: &Bytes,
        name: &str,
        call: &Call<'_>,
        rows_max: u32,
    ) -> Result<Result<(), Failure>, End> {
        let prepared = match self.resolve(name).await? {
            Ok(prepared) => prepared,
            Err(failure) => return Ok(Err(failure)),
        };
        if let Some(prepared) = &prepared
            && let Lane::Write(write) = &prepared.plan.lane
        {
            if rows_max > 0 && write.client_returning {
                return Ok(Err(Failure::Ours(ClientError::error(
                    "0A000",
                    "the rows of an EXECUTE of a statement that writes can not be fetched in parts",
                    "Fetch all rows at once, or prepare the statement through the driver.",
                ))));
            }
            if !self.know_context().await? {
                return Ok(Err(Failure::Told));
            }
            if call.arguments.missing {
                self.note_unknown();
                return self.execute_guarded(frame, None).await.map(Ok);
            }
            self.open_block_in_batch();
            return self.write_named(write, prepared, call).await;
        }
        let guard = match reads_behind_guard(prepared.as_deref(), call.arguments) {
            Ok(guard) => guard,
            Err(failure) => return Ok(Err(failure)),
        };
        let done = if guard && self.wire.status != b'E' {
            self.execute_guarded(frame, None).await?;
            Ok(())
        } else {
            if self.note_sequences(prepared.as_deref()) && self.wire.status != b'E' {
                self.open_block_in_batch();
            }
            self.pass_and_wait(frame).await?
        };
        self.after_named(prepared.as_deref(), done.is_ok());
        Ok(done)
    }

    /// What the name stands for now; `None`: nothing that we know of, the leader will say.
    async fn resolve(&mut self, name: &str) -> Result<Result<Option<Arc<Prepared>>, Failure>, End> {
        let name = Bytes::copy_from_slice(&self.encoded(name));
        let known = self.statements.prepared(&name).filter(|prepared| !matches!(prepared.plan.lane, Lane::Admin(_)));
        let Some(old) = known.cloned() else { return Ok(Ok(None)) };
        let renewed = match self.renew(name.clone(), old).await? {
            Ok(renewed) => renewed,
            Err(failure) => return Ok(Err(failure)),
        };
        if renewed.types_known || !matches!(renewed.plan.lane, Lane::Write(_)) {
            return Ok(Ok(Some(renewed)));
        }
        let Some((types, _)) = self.describe_named(&name, 0).await? else { return Ok(Err(Failure::Told)) };
        let known = Arc::new(Prepared { types, types_known: true, ..(*renewed).clone() });
        self.statements.set_statement(name, Arc::clone(&known));
        Ok(Ok(Some(known)))
    }

    /// Whether what is prepared under this name may be part of a statement whose rows are carried: it must not write.
    ///
    /// # Errors
    /// If the connection to the leader ends.
    pub(super) async fn only_reads(&mut self, name: &str) -> Result<Result<(), ClientError>, End> {
        Ok(match self.resolve(name).await? {
            Ok(Some(prepared)) => match &prepared.plan.lane {
                Lane::Read { guard: false, .. } => Ok(()),
                // The leader says that it is no query.
                Lane::Write(write) if !matches!(write.effect, EffectPlan::LargeObject(_)) => Ok(()),
                _ => Err(ClientError::error(
                    "0A000",
                    "CREATE TABLE AS EXECUTE of a query that calls a function which may write is not supported",
                    "Call the function first, then use its result.",
                )),
            },
            Ok(None) => Err(ClientError::error("26000", format!("prepared statement \"{name}\" does not exist"), "")),
            Err(Failure::Ours(error)) => Err(error),
            Err(_) => Err(schema_changed()),
        })
    }

    fn after_named(&mut self, prepared: Option<&Prepared>, ok: bool) {
        match prepared {
            Some(prepared) => self.after(&prepared.plan, &prepared.text, ok),
            None => {
                self.facts = None;
                self.settings_touched = true;
                self.note_unknown();
            }
        }
    }

    async fn prepare_named(&mut self, name: &str, text: &str, query: usize) -> Result<Result<(), Failure>, End> {
        let inner = text.get(query..).unwrap_or_default();
        let (plan, shape, inner) = match self.plan(&self.encoded(inner)).await? {
            Planned::One { plan, shape, text } => (plan, shape, text),
            Planned::Nothing | Planned::Several(_) => return self.send_and_wait(text).await,
            Planned::Refused(error) => return Ok(Err(Failure::Ours(error))),
            Planned::Failed(error) => return Ok(Err(Failure::Server(error))),
            Planned::Skipped => return Ok(Err(Failure::Told)),
        };
        let leader_text = match &plan.lane {
            Lane::Read { .. } => None,
            Lane::Write(write) => write.leader_text(&inner, &shape),
            Lane::Refused(refusal) => return Ok(Err(Failure::Ours(refused(refusal)))),
            _ => return Ok(Err(Failure::Ours(by_driver()))),
        };
        if self.statements.is_full() {
            let error = ClientError::error("53400", "too many prepared statements in one session", "Close some.");
            return Ok(Err(Failure::Ours(error)));
        }
        let leader_text = leader_text.map(|inner| format!("{}{inner}", text.get(..query).unwrap_or_default()));
        let (schema_number, facts) = (self.planned_at, self.facts.clone());
        if let Err(failure) = self.send_and_wait(leader_text.as_deref().unwrap_or(text)).await? {
            return Ok(Err(failure));
        }
        let name = Bytes::copy_from_slice(&self.encoded(name));
        let hidden = match &plan.lane {
            Lane::Write(write) => write.hidden_returning.len(),
            _ => 0,
        };
        let Some((types, own_row)) = self.describe_named(&name, hidden).await? else { return Ok(Err(Failure::Told)) };
        let indent = usize::try_from(self.characters(text.get(..query).unwrap_or_default())).unwrap_or(0);
        let (text, types_known) = (inner, true);
        let prepared = Prepared { text, indent, shape, plan, types, types_known, own_row, schema_number, facts };
        self.statements.set_statement(name, Arc::new(prepared));
        Ok(Ok(()))
    }

    /// Parameter types, as in `Parse`, and the columns before the hidden ones of a statement that the leader has. `None`: it failed,
    /// and the client has the error.
    async fn describe_named(&mut self, name: &[u8], hidden: usize) -> Result<Option<(Arc<[u8]>, OwnRow)>, End> {
        self.wire.clear_results();
        build::describe(&mut self.wire.to_server, b'S', name);
        self.wire.expects.push_back(Expect::Describe { mode: Mode::Hidden });
        self.end_hidden();
        self.wire.pump(Until::Answered).await?;
        if self.wire.results.error.is_some() {
            return Ok(None);
        }
        let own_row = OwnRow::of(&self.wire.results.description, hidden).map_err(End::ServerProtocol)?;
        Ok(Some((Arc::from(&self.wire.results.parameter_types[..]), own_row)))
    }

    /// Runs an EXECUTE of a write on the leader and keeps its effect. A block is open, or opens with it.
    async fn write_named(
        &mut self,
        write: &Write,
        prepared: &Arc<Prepared>,
        call: &Call<'_>,
    ) -> Result<Result<(), Failure>, End> {
        if let Some(refusal) = self.refuses_write(write) {
            return Ok(Err(Failure::Ours(refusal)));
        }
        self.note_stays(&prepared.plan, &prepared.text, true);
        if call.arguments.guard {
            return Ok(Err(Failure::Ours(ClientError::error(
                "0A000",
                "EXECUTE with a function among its arguments that may write is not supported",
                "SELECT the function first and use its result.",
            ))));
        }
        let count = call.arguments.count;
        // With another number of arguments the server says what is wrong.
        let complete = count > 0 && count == count_of(&prepared.types);
        let needed = !call.arguments.constant || !matches!(write.effect, EffectPlan::Rows { .. });
        let values = if complete && needed {
            match self.evaluate(call, &prepared.types).await? {
                Some(values) => Some(values),
                None => return Ok(Err(Failure::Told)),
            }
        } else {
            None
        };
        let parameters = values.as_deref().map_or_else(BytesMut::new, |values| parameters(count, values));
        if let Some(refusal) = self.refuse_execution(write, prepared, &parameters)? {
            return Ok(Err(Failure::Ours(refusal)));
        }
        if !self.lock_tables(write).await? {
            return Ok(Err(Failure::Told));
        }
        let text = match (values.as_deref(), call.arguments.range(call.shape)) {
            (Some(values), Some(range)) if !call.arguments.constant => {
                let before = self.encoded(call.text.get(..range.start).unwrap_or_default());
                let after = self.encoded(call.text.get(range.end..).unwrap_or_default());
                with_literals(&before, values, &after).map_err(End::ServerProtocol)?
            }
            _ => self.encoded(call.text).into_owned(),
        };
        let hidden = write.hidden_returning.len();
        let formats = rewrite::result_formats(call.formats, write.client_returning, prepared.own_row.columns, hidden);
        let position = self.log.position();
        self.wire.clear_results();
        self.wire.hold_tag = true;
        self.touched.begin(&prepared.plan.sequences);
        self.send(&text, &formats, mode_of(write));
        let types = Arc::clone(&prepared.types);
        let taken = self.take_write(write, &prepared.shape, &prepared.text, &parameters, types).await;
        self.wire.hold_tag = false;
        let effect = taken?;
        if self.wire.results.error.is_some() {
            self.log.truncate(position);
            return Ok(Err(Failure::Told));
        }
        let tag = self.wire.results.tag.clone();
        let effect = match effect {
            Ok(()) if !self.still_planned(&prepared.text, &prepared.plan, prepared.schema_number).await? => {
                Err(schema_changed())
            }
            effect => effect,
        };
        if let Err(error) = effect {
            self.log.truncate(position);
            return Ok(Err(Failure::Ours(error)));
        }
        self.tell_tag(tag, call.hold_tag);
        Ok(Ok(()))
    }

    /// The values of the arguments, as in `DataRow`: evaluated once, with the types of the parameters. `None`: the client has the error.
    async fn evaluate(&mut self, call: &Call<'_>, types: &[u8]) -> Result<Option<Bytes>, End> {
        let Some(range) = call.arguments.range(call.shape) else { return Ok(Some(Bytes::new())) };
        let inside = call.text.get(range.clone()).unwrap_or_default();
        let evaluate = self.encoded(&format!("{EVALUATE}{inside})")).into_owned();
        let columns: Vec<String> = (1..=call.arguments.count).map(|n| format!("${n}")).collect();
        let out = &mut self.wire.to_server;
        // An error before may have made the server skip the Close at the end.
        build::close(out, b'S', b"pgtandem_v");
        build::close(out, b'S', b"pgtandem_x");
        build::parse(out, b"pgtandem_v", format!("SELECT {}", columns.join(", ")).as_bytes(), types);
        build::parse(out, b"pgtandem_x", &evaluate, &[]);
        build::bind_raw(out, b"pgtandem_p", b"pgtandem_x", &[], &[]);
        build::execute(out, b"pgtandem_p", 0);
        build::close(out, b'P', b"pgtandem_p");
        build::close(out, b'S', b"pgtandem_v");
        let mode = Mode::Strip { hidden: call.arguments.count, client_returning: false };
        self.wire.expects.extend([
            Expect::Close { hidden: true },
            Expect::Close { hidden: true },
            Expect::Parse { hidden: true },
            Expect::Parse { hidden: true },
            Expect::Bind { hidden: true },
            Expect::Execute { mode },
            Expect::Close { hidden: true },
            Expect::Close { hidden: true },
        ]);
        self.end_hidden();
        self.wire.clear_results();
        let before = self.characters(call.text.get(..range.start).unwrap_or_default());
        let base = self.wire.position_offset;
        self.wire.position_offset += before;
        self.wire.position_offset -= isize::try_from(EVALUATE.len()).unwrap_or(0);
        self.wire.hold_tag = true;
        let done = self.wire.pump(Until::Answered).await;
        self.wire.hold_tag = false;
        self.wire.position_offset = base;
        done?;
        Ok(if self.wire.results.error.is_some() { None } else { self.wire.results.rows.pop() })
    }

    /// Sends a text by the protocol that the client uses now.
    fn send(&mut self, text: &[u8], formats: &[u8], mode: Mode) {
        let out = &mut self.wire.to_server;
        if !self.in_batch {
            build::query(out, text);
            self.wire.expects.push_back(Expect::Query { mode });
            return;
        }
        build::close(out, b'S', b"pgtandem_x");
        build::parse(out, b"pgtandem_x", text, &[]);
        build::bind_raw(out, b"pgtandem_p", b"pgtandem_x", &[], formats);
        build::execute(out, b"pgtandem_p", 0);
        build::close(out, b'P', b"pgtandem_p");
        build::close(out, b'S', b"pgtandem_x");
        build::flush(out);
        self.wire.expects.extend([
            Expect::Close { hidden: true },
            Expect::Parse { hidden: true },
            Expect::Bind { hidden: true },
            Expect::Execute { mode },
            Expect::Close { hidden: true },
            Expect::Close { hidden: true },
        ]);
    }

    async fn send_and_wait(&mut self, text: &str) -> Result<Result<(), Failure>, End> {
        self.wire.clear_results();
        let text = self.encoded(text);
        self.send(&text, &[], Mode::Forward);
        self.wire.pump(Until::Answered).await?;
        Ok(self.outcome_told())
    }

    /// The client's own Execute.
    async fn pass_and_wait(&mut self, frame: &[u8]) -> Result<Result<(), Failure>, End> {
        self.wire.clear_results();
        self.pass(frame, Expect::Execute { mode: Mode::Forward });
        self.catch_up().await?;
        Ok(self.outcome_told())
    }

    fn outcome_told(&self) -> Result<(), Failure> {
        if self.wire.results.error.is_none() { Ok(()) } else { Err(Failure::Told) }
    }

    /// How the rows of a statement or portal with this plan are taken.
    pub fn mode_of_lane(&self, lane: &Lane) -> Mode {
        match self.write_behind(lane) {
            Some((write, _)) => mode_of(write),
            None => Mode::Forward,
        }
    }

    /// The write that a lane means, and how many columns the client's RETURNING has if that is known by name.
    fn write_behind<'a>(&'a self, lane: &'a Lane) -> Option<(&'a Write, Option<usize>)> {
        match lane {
            Lane::Write(write) => Some((write, None)),
            Lane::Named(Named::Execute { name, .. }) => {
                let prepared = self.statements.prepared(&self.encoded(name))?;
                match &prepared.plan.lane {
                    Lane::Write(write) => Some((write, Some(prepared.own_row.columns))),
                    _ => None,
                }
            }
            _ => None,
        }
    }

    /// How many columns of its own a statement gives, where hidden ones follow.
    pub fn own_columns_of(&self, prepared: &Prepared) -> usize {
        self.write_behind(&prepared.plan.lane).and_then(|(_, columns)| columns).unwrap_or(prepared.own_row.columns)
    }
}

/// Whether an EXECUTE that is no write needs the read-only guard.
fn reads_behind_guard(prepared: Option<&Prepared>, arguments: &Arguments) -> Result<bool, Failure> {
    match prepared.map(|prepared| &prepared.plan.lane) {
        None => Ok(true),
        Some(Lane::Read { guard, .. }) => Ok(*guard || arguments.guard),
        Some(_) => Err(Failure::Ours(by_driver())),
    }
}

fn by_driver() -> ClientError {
    ClientError::error(
        "0A000",
        "PREPARE and EXECUTE of such a statement are not supported",
        "Prepare it through the driver (the extended protocol), or send the statement itself.",
    )
}

/// How many types there are, as in `Parse`.
fn count_of(types: &[u8]) -> usize {
    types.first_chunk().map_or(0, |bytes| usize::from(u16::from_be_bytes(*bytes)))
}

/// The parameters of a Bind, all in text form, from the values of a row.
fn parameters(count: usize, values: &[u8]) -> BytesMut {
    let mut out = BytesMut::with_capacity(values.len() + 4);
    out.put_u16(0);
    out.put_u16(u16::try_from(count).unwrap_or(u16::MAX));
    out.put_slice(values);
    out
}

/// A text with the values of a row in it, as literals under `standard_conforming_strings = on`.
fn with_literals(before: &[u8], values: &[u8], after: &[u8]) -> Result<Vec<u8>, FrameError> {
    let mut out = Vec::with_capacity(before.len() + values.len() + after.len());
    out.extend_from_slice(before);
    let mut r = Reader::new(b'D', values);
    let mut first = true;
    while !r.rest().is_empty() {
        if !std::mem::take(&mut first) {
            out.extend_from_slice(b", ");
        }
        let Some(value) = r.value()? else {
            out.extend_from_slice(b"NULL");
            continue;
        };
        out.push(b'\'');
        for byte in value {
            if *byte == b'\'' {
                out.push(b'\'');
            }
            out.push(*byte);
        }
        out.push(b'\'');
    }
    out.extend_from_slice(after);
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_become_literals() {
        let row = b"\0\0\0\x01a\xff\xff\xff\xff\0\0\0\x03it'\0\0\0\0";
        assert_eq!(with_literals(b"execute x(", row, b");").unwrap(), b"execute x('a', NULL, 'it''', '');");
        assert!(with_literals(b"", b"\0\0\0\x09a", b"").is_err());
    }
}
