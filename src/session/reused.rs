//! Statements of the simple protocol that come again: the leader parses and plans each shape once, as followers do.
//!
//! Only writes of the point lane to whose text nothing is added, INSERTs of one row, and queries for one row by its primary key, so that
//! the plan does not depend on the values. The answer is the same; positions in errors are told in the client's own text.

use std::collections::HashMap;
use std::sync::Arc;

use crate::pg::{build, message};
use crate::session::planning::schema_changed;
use crate::session::rewrite;
use crate::session::run::Session;
use crate::session::simple::error_frame;
use crate::session::wire::{End, Expect, Mode, Until};
use crate::sql::plan::{EffectPlan, Plan, Write};
use crate::sql::shape::Shape;
use crate::sql::shared::{self, SharedText};

/// Shapes that a session remembers; past that it starts anew.
const SHAPES_MAX: usize = 256;
/// Tables that a transaction is known to have locked; what is locked past that is not known.
const LOCKED_MAX: usize = 64;

/// The text that all statements of a shape share, and the types of its parameters: shapes that differ in those alone have one text.
type Key = (Arc<str>, Arc<[u8]>);

/// What a session has prepared on the leader out of texts of the simple protocol.
#[derive(Debug, Default)]
pub struct Reused {
    /// `None`: seen once, which is not yet worth a Parse.
    names: HashMap<Key, Option<String>>,
    last: u64,
    /// The last execution came with its Parse.
    parsed: bool,
    /// Under which schema number and settings: the server does not look names up again as long as it can avoid it.
    place: (u64, u64),
    /// Tables whose definition can not change before the transaction under way ends: it has locked them.
    locked: Vec<u32>,
}

impl Reused {
    /// This table is locked for the rest of the block that is open.
    pub(super) fn keep_locked(&mut self, table: Option<u32>) {
        if let Some(table) = table
            && self.locked.len() < LOCKED_MAX
            && !self.locked.contains(&table)
        {
            self.locked.push(table);
        }
    }

    pub(super) fn forget_locks(&mut self) {
        self.locked.clear();
    }
}

impl Session {
    /// Sends a write to the leader as an execution of its shape. False: nothing was sent, the text has to go as it is.
    pub(super) fn send_reused(&mut self, write: &Write, shape: &Shape, text: &str, mode: Mode) -> bool {
        let alike = match &write.effect {
            EffectPlan::Text { lock_tables, .. } => lock_tables.is_empty() && write.hidden_returning.is_empty(),
            EffectPlan::Rows { .. } => true,
            _ => false,
        };
        let shared = write.edits.shared.as_ref().filter(|_| alike && !write.ddl && !write.client_returning);
        shared.is_some_and(|shared| self.send_shape(shared, shape, text, mode, false))
    }

    /// Runs a query for one row by its shape, and tells its answer. False: the client has none, the text has to go as it is.
    ///
    /// A definition that is committed after the query was planned makes the server refuse to execute what is prepared, where it would
    /// have answered the text. Outside a block the text is sent then; in a block, which the error would end, only tables are
    /// read so that this transaction has locked already.
    pub(super) async fn read_reused(&mut self, plan: &Plan, shape: &Shape, text: &str) -> Result<bool, End> {
        let Some(shared) = &plan.one_row else { return Ok(false) };
        let alone = self.wire.status == b'I';
        if !alone && !plan.locks.is_some_and(|table| self.reused.locked.contains(&table)) {
            return Ok(false);
        }
        self.wire.clear_results();
        if !self.send_shape(shared, shape, text, Mode::Forward, true) {
            return Ok(false);
        }
        self.wire.hide_errors = true;
        let done = self.wire.pump(Until::Answered).await;
        self.wire.hide_errors = false;
        done?;
        if alone && self.wire.results.error.as_deref().is_some_and(is_other_result) {
            self.forget_reused();
            return Ok(false);
        }
        self.fail_reused(shape);
        build::ready_for_query(&mut self.wire.to_client, self.wire.status);
        Ok(true)
    }

    fn send_shape(&mut self, shared: &SharedText, shape: &Shape, text: &str, mode: Mode, has_rows: bool) -> bool {
        // A Query ends the client's unnamed statement, which a Bind does not.
        let unnamed = self.statements.prepared(b"").is_some();
        if unnamed || self.has_own_catalog || self.wire.status == b'E' || !text.is_ascii() {
            return false;
        }
        let Some(values) = shared::values(text, shape) else { return false };
        let Some(name) = self.reused_name(shared) else { return false };
        let values: Vec<Option<&[u8]>> = values.iter().map(|value| Some(value.as_bytes())).collect();
        build::bind_text(&mut self.wire.to_server, b"", name.as_bytes(), &values);
        self.wire.expects.push_back(Expect::Bind { hidden: true });
        if has_rows {
            build::describe(&mut self.wire.to_server, b'P', b"");
            self.wire.expects.push_back(Expect::Describe { mode });
        }
        build::execute(&mut self.wire.to_server, b"", 0);
        build::sync(&mut self.wire.to_server);
        self.wire.expects.extend([Expect::Execute { mode }, Expect::Sync { hidden: true }]);
        true
    }

    /// Tells the error, if the execution had one. If it came with its Parse, nobody knows whether the server has it prepared.
    pub(super) fn fail_reused(&mut self, shape: &Shape) {
        let Some(error) = self.wire.results.error.clone() else { return };
        if is_other_result(&error) {
            // The text would have run, with other columns than were planned: that is the same end for it.
            self.forget_reused();
            schema_changed().write(&mut self.wire.to_client);
            return;
        }
        if self.reused.parsed {
            self.forget_reused();
        }
        let position = message::error_field(&error, b'P').and_then(|p| std::str::from_utf8(p).ok()?.parse().ok());
        let offset = position.map_or(0, |position| shared::position_offset(shape, position));
        let told = rewrite::shift_position(&error_frame(&error), offset + self.wire.position_offset);
        self.wire.to_client.extend_from_slice(&told);
    }

    /// None of them is prepared any more, or soon.
    fn forget_reused(&mut self) {
        for name in self.reused.names.drain().filter_map(|(_, name)| name) {
            build::close(&mut self.wire.to_server, b'S', name.as_bytes());
            self.wire.expects.push_back(Expect::Close { hidden: true });
        }
    }

    fn reused_name(&mut self, shared: &SharedText) -> Option<String> {
        self.reused.parsed = false;
        let place = (self.planned_at, self.context_hash);
        if self.reused.place != place || self.reused.names.len() >= SHAPES_MAX {
            self.forget_reused();
            self.reused.place = place;
        }
        let key = (Arc::clone(&shared.plain), Arc::clone(&shared.types));
        match self.reused.names.get(&key) {
            Some(Some(name)) => return Some(name.clone()),
            Some(None) => {}
            None => {
                self.reused.names.insert(key, None);
                return None;
            }
        }
        self.reused.last += 1;
        self.reused.parsed = true;
        let name = format!("pgtandem_w{}", self.reused.last);
        build::parse(&mut self.wire.to_server, name.as_bytes(), shared.plain.as_bytes(), &shared.types);
        self.wire.expects.push_back(Expect::Parse { hidden: true });
        self.reused.names.insert(key, Some(name.clone()));
        Some(name)
    }
}

/// "cached plan must not change result type" (`RevalidateCachedQuery` in plancache.c): nothing was executed.
fn is_other_result(error: &[u8]) -> bool {
    let is = |field, value: &[u8]| message::error_field(error, field) == Some(value);
    is(b'C', b"0A000") && is(b'R', b"RevalidateCachedQuery")
}
