//! Writes of the simple protocol that come again: the leader parses and plans each shape once, as followers do.
//!
//! Only in the point lane and where nothing is added to the client's text, so the answer is the same: a command tag, or an error,
//! whose position is told in the client's own text.

use std::collections::HashMap;
use std::sync::Arc;

use crate::pg::{build, message};
use crate::session::rewrite;
use crate::session::run::Session;
use crate::session::simple::error_frame;
use crate::session::wire::{Expect, Mode};
use crate::sql::plan::{EffectPlan, Write};
use crate::sql::shape::Shape;
use crate::sql::shared::{self, SharedText};

/// Shapes that a session remembers; past that it starts anew.
const SHAPES_MAX: usize = 64;

/// What a session has prepared on the leader out of texts of the simple protocol.
#[derive(Debug, Default)]
pub struct Reused {
    /// By the text that all statements of a shape share. `None`: seen once, which is not yet worth a Parse.
    names: HashMap<Arc<str>, Option<String>>,
    last: u64,
    /// The last execution came with its Parse.
    parsed: bool,
    /// Under which schema number and settings: the server does not look names up again as long as it can avoid it.
    place: (u64, u64),
}

impl Session {
    /// Sends a write to the leader as an execution of its shape. False: nothing was sent, the text has to go as it is.
    pub(super) fn send_reused(&mut self, write: &Write, shape: &Shape, text: &str, mode: Mode) -> bool {
        let Some((shared, values)) = self.reusable(write, shape, text) else { return false };
        let Some(name) = self.reused_name(&shared) else { return false };
        let values: Vec<Option<&[u8]>> = values.iter().map(|value| Some(value.as_bytes())).collect();
        build::bind_text(&mut self.wire.to_server, b"", name.as_bytes(), &values);
        build::execute(&mut self.wire.to_server, b"", 0);
        build::sync(&mut self.wire.to_server);
        let (bind, execute, sync) =
            (Expect::Bind { hidden: true }, Expect::Execute { mode }, Expect::Sync { hidden: true });
        self.wire.expects.extend([bind, execute, sync]);
        true
    }

    /// The execution failed. If it came with its Parse, nobody knows whether the server has it prepared.
    pub(super) fn fail_reused(&mut self, shape: &Shape) {
        if self.reused.parsed {
            self.forget_reused();
        }
        let Some(error) = self.wire.results.error.as_deref() else { return };
        let position = message::error_field(error, b'P').and_then(|p| std::str::from_utf8(p).ok()?.parse().ok());
        let offset = position.map_or(0, |position| shared::position_offset(shape, position));
        let told = rewrite::shift_position(&error_frame(error), offset + self.wire.position_offset);
        self.wire.to_client.extend_from_slice(&told);
    }

    /// None of them is prepared any more, or soon.
    fn forget_reused(&mut self) {
        for name in self.reused.names.drain().filter_map(|(_, name)| name) {
            build::close(&mut self.wire.to_server, b'S', name.as_bytes());
            self.wire.expects.push_back(Expect::Close { hidden: true });
        }
    }

    fn reusable<'t>(&self, write: &Write, shape: &Shape, text: &'t str) -> Option<(SharedText, Vec<&'t str>)> {
        let EffectPlan::Text { lock_tables, .. } = &write.effect else { return None };
        // A Query ends the client's unnamed statement, which a Bind does not.
        let unnamed = self.statements.prepared(b"").is_some();
        if unnamed || !lock_tables.is_empty() || write.ddl || self.has_own_catalog || self.wire.status == b'E' {
            return None;
        }
        if write.client_returning || !write.hidden_returning.is_empty() || !text.is_ascii() {
            return None;
        }
        let shared = write.edits.shared.as_ref()?;
        Some((SharedText { text: Arc::clone(&shared.plain), ..shared.clone() }, shared::values(text, shape)?))
    }

    fn reused_name(&mut self, shared: &SharedText) -> Option<String> {
        self.reused.parsed = false;
        let place = (self.planned_at, self.context_hash);
        if self.reused.place != place || self.reused.names.len() >= SHAPES_MAX {
            self.forget_reused();
            self.reused.place = place;
        }
        match self.reused.names.get(&shared.text) {
            Some(Some(name)) => return Some(name.clone()),
            Some(None) => {}
            None => {
                self.reused.names.insert(Arc::clone(&shared.text), None);
                return None;
            }
        }
        self.reused.last += 1;
        self.reused.parsed = true;
        let name = format!("pgtandem_w{}", self.reused.last);
        build::parse(&mut self.wire.to_server, name.as_bytes(), shared.text.as_bytes(), &shared.types);
        self.wire.expects.push_back(Expect::Parse { hidden: true });
        self.reused.names.insert(Arc::clone(&shared.text), Some(name.clone()));
        Some(name)
    }
}
