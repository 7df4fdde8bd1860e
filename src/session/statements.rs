//! What a session has prepared and bound, by name, as the server knows it.
//!
//! Messages are passed before the server has answered, so an entry may turn out not to be there: the message failed, or an
//! error before it made the server skip it. Every change is remembered until its outcome is known, and is undone if it was
//! lost. An entry that is wrong would let a write pass as a read.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;

use bytes::{Bytes, BytesMut};

use crate::replicate::schema::SessionFacts;
use crate::session::rewrite::OwnRow;
use crate::sql::plan::Plan;
use crate::sql::shape::Shape;

/// Prepared statements and portals that a session remembers.
pub const REMEMBERED_MAX: usize = 100_000;

/// A statement that the client prepared.
#[derive(Clone, Debug)]
pub struct Prepared {
    pub text: Arc<str>,
    /// Characters of the client's PREPARE before this text: positions in the server's errors count them.
    pub indent: usize,
    pub shape: Shape,
    pub plan: Arc<Plan>,
    /// As in `Parse`.
    pub types: Arc<[u8]>,
    /// They are the leader's answer: all of them, none left to be found.
    pub types_known: bool,
    /// Columns of the client's own RETURNING, if there are hidden ones, too.
    pub own_row: OwnRow,
    pub schema_number: u64,
    /// Under which role and settings it was planned; `None`: not known.
    pub facts: Option<Arc<SessionFacts>>,
}

#[derive(Debug)]
pub struct Portal {
    pub prepared: Arc<Prepared>,
    /// As in `Bind`.
    pub parameters: Bytes,
    /// As in `Bind`.
    pub result_formats: Bytes,
    /// It has run, and the client fetches its rows in parts.
    pub rest: Option<Rest>,
}

/// Rows of a write that the client has not asked for yet.
#[derive(Debug)]
pub struct Rest {
    /// As frames.
    pub rows: VecDeque<BytesMut>,
    /// The command tag.
    pub tag: Bytes,
}

/// A change that was sent to the server.
#[derive(Debug)]
struct Change {
    /// Number of Syncs before it.
    batch: u64,
    name: Bytes,
    before: Before,
}

#[derive(Debug)]
enum Before {
    Statement(Option<Arc<Prepared>>),
    Portal(Option<Portal>),
}

/// What a session has prepared and bound, by name.
#[derive(Debug, Default)]
pub struct Statements {
    prepared: HashMap<Bytes, Arc<Prepared>>,
    portals: HashMap<Bytes, Portal>,
    changes: VecDeque<Change>,
    batch: u64,
    /// What the client had prepared when the cycle under way began, where that is another thing now.
    before_cycle: HashMap<Bytes, Option<Arc<Prepared>>>,
}

impl Statements {
    /// All prepared statements are gone; everything that was sent has been answered.
    pub fn clear(&mut self) {
        let mut before_cycle = std::mem::take(&mut self.before_cycle);
        for (name, prepared) in self.prepared.drain() {
            before_cycle.entry(name).or_insert(Some(prepared));
        }
        *self = Self { batch: self.batch, before_cycle, ..Self::default() };
    }

    /// All that was sent has been answered; what comes from here on may have to be done once more.
    pub fn begin_cycle(&mut self) {
        if !self.before_cycle.is_empty() {
            self.before_cycle.clear();
        }
    }

    fn remember(&mut self, name: &Bytes) {
        if !self.before_cycle.contains_key(name) {
            self.before_cycle.insert(name.clone(), self.prepared.get(name).cloned());
        }
    }

    /// The server is gone: what it had not answered was never done. `repeats`: nor is anything of the cycle, which begins again.
    pub fn end_server(&mut self, repeats: bool) {
        while let Some(change) = self.changes.pop_front() {
            self.undo(change);
        }
        self.portals.clear();
        for (name, before) in std::mem::take(&mut self.before_cycle).into_iter().filter(|_| repeats) {
            match before {
                Some(prepared) => drop(self.prepared.insert(name, prepared)),
                None => drop(self.prepared.remove(&name)),
            }
        }
    }

    /// All prepared statements, by name.
    #[must_use]
    pub fn all(&self) -> Vec<(Bytes, Arc<Prepared>)> {
        self.prepared.iter().map(|(name, prepared)| (name.clone(), Arc::clone(prepared))).collect()
    }

    #[must_use]
    pub fn is_full(&self) -> bool {
        self.prepared.len() >= REMEMBERED_MAX
    }

    /// A Sync was sent.
    pub fn end_batch(&mut self) {
        self.batch += 1;
    }

    #[must_use]
    pub fn prepared(&self, name: &[u8]) -> Option<&Arc<Prepared>> {
        self.prepared.get(name)
    }

    #[must_use]
    pub fn portal(&self, name: &[u8]) -> Option<&Portal> {
        self.portals.get(name)
    }

    pub fn portal_mut(&mut self, name: &[u8]) -> Option<&mut Portal> {
        self.portals.get_mut(name)
    }

    /// `Parse` or `Close` of a statement was sent to the server.
    pub fn send_statement(&mut self, name: Bytes, prepared: Option<Arc<Prepared>>) {
        self.remember(&name);
        let before = match prepared {
            Some(prepared) => self.prepared.insert(name.clone(), prepared),
            None => self.prepared.remove(&name),
        };
        self.changes.push_back(Change { batch: self.batch, name, before: Before::Statement(before) });
    }

    /// `Bind` or `Close` of a portal was sent to the server.
    pub fn send_portal(&mut self, name: Bytes, portal: Option<Portal>) {
        let before = match portal {
            Some(portal) => self.portals.insert(name.clone(), portal),
            None => self.portals.remove(&name),
        };
        self.changes.push_back(Change { batch: self.batch, name, before: Before::Portal(before) });
    }

    /// The server has it already, or never will.
    pub fn set_statement(&mut self, name: Bytes, prepared: Arc<Prepared>) {
        self.remember(&name);
        self.prepared.insert(name, prepared);
    }

    /// The server never will have it.
    pub fn set_portal(&mut self, name: Bytes, portal: Portal) {
        self.portals.insert(name, portal);
    }

    /// `DEALLOCATE name`, by SQL.
    pub fn deallocate(&mut self, name: &[u8]) {
        self.remember(&Bytes::copy_from_slice(name));
        self.prepared.remove(name);
    }

    /// Portals end with their transaction. What was bound outside of one and not executed yet is then not known, which is safe.
    pub fn forget_portals(&mut self) {
        if self.changes.is_empty() {
            self.portals.clear();
        }
    }

    /// Takes the outcomes of what was sent, in order.
    pub fn settle(&mut self, outcomes: &mut VecDeque<bool>) {
        for done in outcomes.drain(..) {
            let Some(change) = self.changes.pop_front() else { continue };
            if !done {
                self.undo(change);
            }
        }
    }

    fn undo(&mut self, lost: Change) {
        // A later change of the same name stays, and what it would fall back to is what was before this one.
        for later in &mut self.changes {
            if later.name != lost.name {
                continue;
            }
            match (&mut later.before, &lost.before) {
                (Before::Statement(_), Before::Statement(_)) | (Before::Portal(_), Before::Portal(_)) => {
                    later.before = lost.before;
                    return;
                }
                _ => {}
            }
        }
        match lost.before {
            Before::Statement(Some(prepared)) => drop(self.prepared.insert(lost.name, prepared)),
            Before::Statement(None) => drop(self.prepared.remove(&lost.name)),
            Before::Portal(Some(portal)) => drop(self.portals.insert(lost.name, portal)),
            Before::Portal(None) => drop(self.portals.remove(&lost.name)),
        }
    }

    /// Whether what is known of a name hangs on an answer to an earlier batch, so that an error there would not keep a message of
    /// this batch from running.
    #[must_use]
    pub fn is_uncertain(&self, name: &[u8]) -> bool {
        self.changes.iter().take_while(|change| change.batch < self.batch).any(|change| change.name == name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sql::{classify, shape};

    fn prepared(text: &str) -> Arc<Prepared> {
        Arc::new(Prepared {
            text: text.into(),
            indent: 0,
            shape: shape::mask(text),
            plan: Arc::new(classify::unparsed()),
            types: Arc::from([]),
            types_known: false,
            own_row: OwnRow::default(),
            schema_number: 0,
            facts: None,
        })
    }

    fn text<'s>(statements: &'s Statements, name: &'static str) -> Option<&'s str> {
        statements.prepared(name.as_bytes()).map(|p| &*p.text)
    }

    #[test]
    fn a_cycle_that_is_repeated_finds_what_was_there_before_it() {
        let mut all = Statements::default();
        let name = |name: &'static str| Bytes::from_static(name.as_bytes());
        all.set_statement(name("kept"), prepared("kept"));
        all.set_statement(name("gone"), prepared("gone"));
        all.begin_cycle();
        all.send_statement(name("new"), Some(prepared("new")));
        all.settle(&mut VecDeque::from([true]));
        all.deallocate(b"gone");
        all.send_statement(name("kept"), Some(prepared("never answered")));
        all.end_server(true);
        assert_eq!((text(&all, "kept"), text(&all, "gone"), text(&all, "new")), (Some("kept"), Some("gone"), None));
        all.begin_cycle();
        all.send_statement(name("new"), Some(prepared("new")));
        all.settle(&mut VecDeque::from([true]));
        all.send_statement(name("kept"), None);
        all.end_server(false);
        assert_eq!((text(&all, "kept"), text(&all, "new")), (Some("kept"), Some("new")));
    }

    #[test]
    fn a_lost_change_is_undone_and_later_ones_stay() {
        let mut all = Statements::default();
        let name = || Bytes::from_static(b"s");
        all.send_statement(name(), Some(prepared("first")));
        all.end_batch();
        assert!(all.is_uncertain(b"s") && !all.is_uncertain(b"t"));
        all.settle(&mut VecDeque::from([true]));
        assert!(!all.is_uncertain(b"s"));
        all.send_statement(name(), Some(prepared("second")));
        all.send_statement(name(), None);
        all.settle(&mut VecDeque::from([false, false]));
        assert_eq!(text(&all, "s"), Some("first"));
        all.send_statement(name(), Some(prepared("third")));
        all.send_statement(name(), Some(prepared("fourth")));
        all.settle(&mut VecDeque::from([false]));
        assert_eq!(text(&all, "s"), Some("fourth"));
        all.settle(&mut VecDeque::from([false]));
        assert_eq!(text(&all, "s"), Some("first"));
    }
}
