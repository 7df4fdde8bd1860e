//! How far the followers' sequences are known to be: no committed value may be given a second time by a member that becomes the leader.
//!
//! Values of sequences reach followers as literals, so their own sequences stand still. A transaction that used a value past what
//! is known of all members moves them a thousand steps ahead, in its own half; the next thousand values cost nothing. What is known
//! ends at each cut, so whatever a joining node does not have from its WAL is in its backlog.

use std::collections::HashMap;
use std::fmt::Write as _;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Steps that followers are set ahead of the leader.
pub const AHEAD_MAX: i128 = 1000;

/// Where a sequence of the leader stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Position {
    /// Object identifier on the leader.
    pub oid: u32,
    pub last: i64,
    /// `last` was given already.
    pub called: bool,
    pub increment: i64,
    pub min: i64,
    pub max: i64,
    pub cycle: bool,
    /// Schema and name, hexadecimal: safe in any encoding.
    place: [String; 2],
}

impl Position {
    /// One line of `pgtandem.sequences`: parts separated by U+001F.
    #[must_use]
    pub fn parse(line: &str) -> Option<Self> {
        let mut parts = line.split('\x1f');
        let mut number = || parts.next()?.parse::<i64>().ok();
        let (oid, last, increment, min, max) = (number()?, number()?, number()?, number()?, number()?);
        let mut flag = || Some(parts.next()? == "t");
        let (called, cycle) = (flag()?, flag()?);
        let place = [parts.next()?.to_owned(), parts.next()?.to_owned()];
        let hexadecimal = place.iter().all(|part| part.bytes().all(|byte| byte.is_ascii_hexdigit()));
        (increment != 0 && hexadecimal).then_some(Self {
            oid: u32::try_from(oid).ok()?,
            last,
            called,
            increment,
            min,
            max,
            cycle,
            place,
        })
    }

    /// How many values come before the limit.
    fn room(&self, from: i64) -> i128 {
        let (from, step) = (i128::from(from), i128::from(self.increment));
        let limit = i128::from(if step > 0 { self.max } else { self.min });
        (limit - from) / step
    }

    /// Where followers are set, and what that covers.
    #[must_use]
    pub fn bound(&self) -> Bound {
        let (step, room) = (i128::from(self.increment), self.room(self.last));
        let period = (i128::from(self.max) - i128::from(self.min)) / step.abs() + 1;
        let steps = match self.cycle {
            // a short cycle leaves no room for being ahead
            true if period <= 2 * AHEAD_MAX => 0,
            true => AHEAD_MAX,
            false => room.clamp(0, AHEAD_MAX),
        };
        let start = i128::from(if step > 0 { self.min } else { self.max });
        let at = if steps <= room { i128::from(self.last) + steps * step } else { start + (steps - room - 1) * step };
        Bound { from: self.clone(), steps, at: i64::try_from(at).unwrap_or(self.last) }
    }

    /// The statement that moves a follower's sequence ahead, never back unless it cycles. It does nothing if there is no such sequence:
    /// one that is gone needs no position. Names are looked up whatever the search_path is.
    #[must_use]
    pub fn advance(&self) -> String {
        let at = self.bound().at;
        let behind = if self.increment > 0 { '<' } else { '>' };
        let set = format!("pg_catalog.setval(c.oid::pg_catalog.regclass, {at}, true)");
        let value = if self.cycle {
            set
        } else {
            format!(
                "CASE WHEN COALESCE(pg_catalog.pg_sequence_last_value(c.oid::pg_catalog.regclass) \
                 OPERATOR(pg_catalog.{behind}) {at}::pg_catalog.int8, true) THEN {set} END"
            )
        };
        self.of_follower(&value)
    }

    /// The statement that sets a follower's sequence exactly as the leader's.
    #[must_use]
    pub fn exact(&self) -> String {
        self.of_follower(&format!("pg_catalog.setval(c.oid::pg_catalog.regclass, {}, {})", self.last, self.called))
    }

    fn of_follower(&self, value: &str) -> String {
        let mut text = format!(
            "SELECT {value} FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n \
             ON n.oid OPERATOR(pg_catalog.=) c.relnamespace WHERE c.relkind OPERATOR(pg_catalog.=) 'S'"
        );
        for (column, hexadecimal) in ["n.nspname", "c.relname"].iter().zip(&self.place) {
            let _ = write!(
                text,
                " AND {column} OPERATOR(pg_catalog.=) \
                 pg_catalog.convert_from(pg_catalog.decode('{hexadecimal}', 'hex'), 'UTF8')::pg_catalog.name"
            );
        }
        text
    }
}

/// What all members are known to have.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bound {
    from: Position,
    steps: i128,
    at: i64,
}

impl Bound {
    /// The same as the leader, and no further.
    #[must_use]
    pub fn exactly(position: &Position) -> Self {
        Self { from: position.clone(), steps: 0, at: position.last }
    }

    /// Whether a member that becomes the leader will not give this value.
    #[must_use]
    pub fn covers(&self, value: i64) -> bool {
        let from = &self.from;
        if !from.cycle {
            return if from.increment > 0 { value <= self.at } else { value >= self.at };
        }
        let step = i128::from(from.increment);
        let ahead = (i128::from(value) - i128::from(from.last)) / step;
        let back = if step > 0 { value < from.last } else { value > from.last };
        let start = if step > 0 { from.min } else { from.max };
        let wrapped = from.room(from.last) + 1 + (i128::from(value) - i128::from(start)) / step;
        (if back { wrapped } else { ahead }) <= self.steps
    }
}

#[derive(Debug, Default)]
struct Known {
    /// Moves on whenever something is forgotten: what was found out before is not remembered after.
    generation: u64,
    bounds: HashMap<(Arc<str>, u32), Bound>,
}

/// The bounds of all databases. Kept in memory alone: a new proxy knows nothing, and so sets followers ahead at the first use.
#[derive(Debug, Default)]
pub struct Sequences {
    known: Mutex<Known>,
}

impl Sequences {
    fn known(&self) -> MutexGuard<'_, Known> {
        // The map is consistent between statements, so a panic elsewhere does not spoil it.
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    #[must_use]
    pub fn generation(&self) -> u64 {
        self.known().generation
    }

    #[must_use]
    pub fn covers(&self, database: &Arc<str>, oid: u32, value: i64) -> bool {
        self.known().bounds.get(&(Arc::clone(database), oid)).is_some_and(|bound| bound.covers(value))
    }

    /// Remembers bounds that a committed transaction brought to every member, if nothing was forgotten since `generation`.
    pub fn raise(&self, generation: u64, database: &Arc<str>, bounds: Vec<Bound>) {
        let mut known = self.known();
        if known.generation == generation {
            let key = |bound: &Bound| (Arc::clone(database), bound.from.oid);
            known.bounds.extend(bounds.into_iter().map(|bound| (key(&bound), bound)));
        }
    }

    /// Sequences of this database may have been set back.
    pub fn forget(&self, database: &str) {
        let mut known = self.known();
        known.generation += 1;
        known.bounds.retain(|(of, _), _| **of != *database);
    }

    /// A node begins to join that has none of this.
    pub fn forget_all(&self) {
        let mut known = self.known();
        known.generation += 1;
        known.bounds.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn position(last: i64, increment: i64, min: i64, max: i64, cycle: bool) -> Position {
        Position { oid: 7, last, called: true, increment, min, max, cycle, place: ["73".into(), "71".into()] }
    }

    #[test]
    fn followers_are_a_thousand_steps_ahead_and_within_the_limits() {
        let at = |position: Position| position.bound().at;
        assert_eq!(at(position(5, 1, 1, i64::MAX, false)), 1005);
        assert_eq!(at(position(5, 10, 1, i64::MAX, false)), 10_005);
        assert_eq!(at(position(-5, -1, i64::MIN, -1, false)), -1005);
        assert_eq!(at(position(95, 1, 1, 100, false)), 100);
        assert_eq!(at(position(i64::MAX, 1, 1, i64::MAX, false)), i64::MAX);
        assert_eq!(at(position(9_500, 1, 1, 10_000, true)), 500);
        assert_eq!(at(position(-9_500, -1, -10_000, -1, true)), -500);
        assert_eq!(at(position(3, 1, 1, 5, true)), 3);
    }

    #[test]
    fn what_was_given_before_and_within_the_bound_is_covered() {
        let up = position(5, 1, 1, i64::MAX, false).bound();
        assert!(up.covers(3) && up.covers(1005) && !up.covers(1006));
        let down = position(-5, -1, i64::MIN, -1, false).bound();
        assert!(down.covers(-3) && down.covers(-1005) && !down.covers(-1006));
        let round = position(9_500, 1, 1, 10_000, true).bound();
        assert!(round.covers(9_500) && round.covers(10_000) && round.covers(500));
        assert!(!round.covers(501) && !round.covers(9_499));
        let short = position(3, 1, 1, 5, true).bound();
        assert!(short.covers(3) && !short.covers(4) && !short.covers(1));
    }

    #[test]
    fn what_was_found_out_before_a_cut_is_not_remembered_after_it() {
        let sequences = Sequences::default();
        let database: Arc<str> = "shop".into();
        let bound = || vec![position(5, 1, 1, i64::MAX, false).bound()];
        let before = sequences.generation();
        sequences.forget_all();
        sequences.raise(before, &database, bound());
        assert!(!sequences.covers(&database, 7, 6));
        sequences.raise(sequences.generation(), &database, bound());
        assert!(sequences.covers(&database, 7, 6) && !sequences.covers(&"other".into(), 7, 6));
        sequences.forget("shop");
        assert!(!sequences.covers(&database, 7, 6));
    }

    #[test]
    fn a_line_of_the_server_is_read_and_nothing_but_hexadecimal_gets_into_a_text() {
        let line = ["7", "5", "1", "1", "100", "t", "f", "7075", "71"].join("\x1f");
        let read = Position::parse(&line).unwrap();
        assert_eq!((read.oid, read.last, read.called, read.cycle), (7, 5, true, false));
        assert!(read.advance().contains("decode('71', 'hex')"));
        assert_eq!(Position::parse(&line.replace("7075", "70'5")), None);
        assert_eq!(Position::parse(&line.replace("\x1f1\x1f100", "\x1f100")), None);
    }
}
