//! What an error tells: a lone server would give it too, it is a refusal, it is of our own locks and counted, or it is wrong.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use tokio_postgres::error::DbError;

use crate::schedule::Kind;

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Verdict {
    Done,
    /// As on one server.
    Natural,
    /// 0A000 with a reason.
    Refused,
    /// 40P01, 40001 or 55P03 that a lone server would not have given.
    Ours,
    Wrong,
}

/// What one statement ran under.
#[derive(Clone, Copy, Debug)]
pub struct Situation<'a> {
    pub kind: Kind,
    /// REPEATABLE READ or above.
    pub fixed_snapshot: bool,
    pub changes_schema: bool,
    /// Numbers of the tables that nothing of ours may lock: row locks order all that is done to them.
    pub row_locked: &'a BTreeSet<u32>,
}

/// Statements by kind and outcome, errors by code.
#[derive(Clone, Debug, Default)]
pub struct Counts {
    pub statements: BTreeMap<(Kind, Verdict), u64>,
    /// 40P01, 40001, 55P03 by verdict and kind.
    pub conflicts: BTreeMap<(String, Verdict, Kind), u64>,
    pub refusals: BTreeMap<String, u64>,
    pub committed: u64,
    pub rolled_back: u64,
}

impl Counts {
    pub fn add(&mut self, other: &Self) {
        for (key, count) in &other.statements {
            *self.statements.entry(*key).or_default() += count;
        }
        for (key, count) in &other.conflicts {
            *self.conflicts.entry(key.clone()).or_default() += count;
        }
        for (key, count) in &other.refusals {
            *self.refusals.entry(key.clone()).or_default() += count;
        }
        self.committed += other.committed;
        self.rolled_back += other.rolled_back;
    }

    /// Judges an error and counts it.
    pub fn judge(&mut self, situation: Situation<'_>, error: &DbError) -> Verdict {
        let verdict = judge(situation, error);
        let code = error.code().code();
        *self.statements.entry((situation.kind, verdict)).or_default() += 1;
        if matches!(code, "40P01" | "40001" | "55P03") {
            *self.conflicts.entry((code.to_owned(), verdict, situation.kind)).or_default() += 1;
        }
        if verdict == Verdict::Refused {
            *self.refusals.entry(error.message().chars().take(90).collect()).or_default() += 1;
        }
        verdict
    }
}

impl fmt::Display for Counts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "transactions: {} committed, {} rolled back", self.committed, self.rolled_back)?;
        for ((kind, verdict), count) in &self.statements {
            writeln!(f, "  {kind:?}: {verdict:?} {count}")?;
        }
        for ((code, verdict, kind), count) in &self.conflicts {
            writeln!(f, "  {code} {verdict:?} {kind:?}: {count}")?;
        }
        for (message, count) in &self.refusals {
            writeln!(f, "  refused {count}: {message}")?;
        }
        Ok(())
    }
}

fn judge(situation: Situation<'_>, error: &DbError) -> Verdict {
    let message = error.message();
    match error.code().code() {
        "0A000" if error.hint().is_some_and(|hint| !hint.is_empty()) => Verdict::Refused,
        "40P01" => match relations(error.detail().unwrap_or_default()) {
            // In a circle of rows alone.
            tables if tables.is_empty() => Verdict::Natural,
            // Definitions and TRUNCATE lock tables on any server.
            tables if situation.changes_schema || tables.is_disjoint(situation.row_locked) => Verdict::Ours,
            _ => Verdict::Wrong,
        },
        "40001" if message.contains("moved to another partition") => Verdict::Natural,
        "40001" if message.starts_with("could not serialize access") => natural_if(situation.fixed_snapshot),
        "40001" => ours_unless(false, situation),
        "55P03" => ours_unless(message.starts_with("could not obtain lock on row"), situation),
        // A generated column; a transaction that only reads; a savepoint that an error took away.
        "428C9" | "25006" | "3B001" => Verdict::Natural,
        "22012" | "42601" => natural_if(situation.kind == Kind::Mistake),
        "42P01" | "42703" | "42P07" | "42701" | "42P10" | "42883" | "XX000" => natural_if(
            situation.kind == Kind::Mistake || situation.changes_schema && !message.starts_with("cache lookup"),
        ),
        code if code.starts_with("22") || code.starts_with("23") => Verdict::Natural,
        // Two clients made or dropped the same thing; a snapshot older than a definition; pending trigger events.
        "42710" | "42704" | "2BP01" | "55006" | "0A000" => natural_if(situation.changes_schema),
        _ => Verdict::Wrong,
    }
}

fn natural_if(natural: bool) -> Verdict {
    if natural { Verdict::Natural } else { Verdict::Wrong }
}

/// Row locks give nothing that a lone server would not; table locks of ours may, and are counted apart.
fn ours_unless(natural: bool, situation: Situation<'_>) -> Verdict {
    match natural {
        true => Verdict::Natural,
        false if situation.changes_schema || !situation.kind.takes_row_locks_only() => Verdict::Ours,
        false => Verdict::Wrong,
    }
}

/// The tables whose locks somebody in a deadlock waited for: `... waits for RowExclusiveLock on relation 16524 of database 5; ...`
fn relations(detail: &str) -> BTreeSet<u32> {
    let after = detail.split("on relation ").skip(1);
    after.filter_map(|rest| rest.split(' ').next()?.parse().ok()).collect()
}

/// A transaction's COMMIT is judged as its most demanding statement.
pub fn most_demanding(kinds: impl Iterator<Item = Kind>) -> Kind {
    kinds.max().unwrap_or(Kind::Control)
}
