//! Sequences that a transaction used: before it commits, its half moves the followers' far enough.
//!
//! Which they are the leader knows: nextval and setval hold a lock on the sequence to the end of the transaction. It is asked only where
//! the values are not in sight, or past what is known of the followers.

use std::sync::Arc;

use bytes::BytesMut;

use crate::pg::message::Reader;
use crate::replicate::effects::EffectRole;
use crate::replicate::sequences::{Bound, Position};
use crate::session::effect::client_error_frame;
use crate::session::run::Session;
use crate::session::wire::End;
use crate::sql::sequences::SequenceUse;

const SEQUENCES: &str = "SELECT pgtandem.sequences($1)";

/// What a transaction did with sequences so far.
#[derive(Debug, Default)]
pub struct Touched {
    /// The leader must be asked.
    any: bool,
    /// They may have been set back.
    set: bool,
    /// Columns of the statement under way whose values are a sequence's: number, and the sequence.
    columns: Vec<(usize, u32)>,
    /// Smallest and largest values seen, by sequence.
    values: Vec<(u32, i64, i64)>,
}

impl Touched {
    /// Whether a commit has something to do.
    #[must_use]
    pub fn is_used(&self) -> bool {
        self.any || self.set || !self.values.is_empty()
    }

    /// A statement with this plan begins.
    pub fn begin(&mut self, of_plan: &SequenceUse) {
        self.columns.clear();
        match of_plan {
            SequenceUse::None => {}
            SequenceUse::Columns(columns) => self.columns.extend_from_slice(columns),
            SequenceUse::Any => self.any = true,
            SequenceUse::Set => (self.any, self.set) = (true, true),
        }
    }

    /// A row that was written: its values as in `DataRow`, as text.
    pub fn see_row(&mut self, values: &[u8]) {
        for (column, sequence) in &self.columns {
            let mut reader = Reader::new(b'D', values);
            let mut value = None;
            for _ in 0..=*column {
                value = reader.value().ok().flatten();
            }
            let number = value.and_then(|value| std::str::from_utf8(value).ok()?.parse::<i64>().ok());
            let Some(number) = number else {
                self.any |= value.is_some();
                continue;
            };
            match self.values.iter_mut().find(|(known, ..)| known == sequence) {
                Some((_, least, most)) => (*least, *most) = ((*least).min(number), (*most).max(number)),
                None => self.values.push((*sequence, number, number)),
            }
        }
    }
}

impl Session {
    /// Adds to the half what the followers' sequences need. Gives what is known once it is committed: the generation and the bounds.
    ///
    /// # Errors
    /// If the session must end; an error of the leader's as a frame.
    pub(super) async fn carry_sequences(&mut self) -> Result<Result<(u64, Vec<Bound>), BytesMut>, End> {
        let hub = Arc::clone(&self.hub);
        if self.touched.set || self.log.ddl {
            hub.sequences.forget(&self.database);
        }
        let generation = hub.sequences.generation();
        let covered = |(sequence, least, most): &(u32, i64, i64)| {
            hub.sequences.covers(&self.database, *sequence, *least)
                && hub.sequences.covers(&self.database, *sequence, *most)
        };
        if !self.touched.any && self.touched.values.iter().all(covered) {
            return Ok(Ok((generation, Vec::new())));
        }
        let secret = Arc::clone(&self.secret);
        let lines = match self.ask_leader(SEQUENCES, &[Some(secret.as_bytes())]).await? {
            Ok(lines) => lines,
            Err(error) => return Ok(Err(client_error_frame(&error))),
        };
        let mut bounds = Vec::new();
        for position in lines.iter().filter_map(|line| Position::parse(line)) {
            let (text, bound) = if self.touched.set {
                (position.exact(), Bound::exactly(&position))
            } else if !position.called || hub.sequences.covers(&self.database, position.oid, position.last) {
                continue;
            } else {
                (position.advance(), position.bound())
            };
            if let Err(error) = self.push_step(EffectRole::Own, &text) {
                return Ok(Err(client_error_frame(&error)));
            }
            // One that was not called yet gives its last value next.
            if position.called {
                bounds.push(bound);
            }
        }
        Ok(Ok((generation, bounds)))
    }
}
