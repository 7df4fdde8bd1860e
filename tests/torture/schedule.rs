//! A schedule: what every client sends, in rounds. After each round nobody has a transaction open, so all servers must hold the same rows.

use std::fmt::Write as _;

/// Everything that one seed makes.
#[derive(Clone, Debug)]
pub struct Schedule {
    pub seed: u64,
    /// Run by one client before the first round.
    pub setup: Vec<String>,
    pub rounds: Vec<Round>,
    /// Definitions, TRUNCATE and the like change under the other clients: statements may fail because of that.
    pub changes_schema: bool,
}

/// A list of transactions for each client; the clients run at the same time.
#[derive(Clone, Debug, Default)]
pub struct Round {
    pub clients: Vec<Vec<Transaction>>,
}

#[derive(Clone, Debug)]
pub struct Transaction {
    /// `BEGIN ...`; none: every statement commits by itself.
    pub begin: Option<String>,
    pub statements: Vec<Statement>,
    pub end: End,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    Commit,
    Rollback,
}

#[derive(Clone, Debug)]
pub struct Statement {
    pub text: String,
    pub kind: Kind,
    pub sent: Sent,
}

/// How a statement goes to the server.
#[derive(Clone, Debug)]
pub enum Sent {
    /// The simple protocol.
    Text,
    /// Parse, Bind, Execute with these values; the statement is prepared once per client.
    Prepared(Vec<Value>),
    /// COPY FROM STDIN with these data.
    Copy(String),
}

#[derive(Clone, Debug)]
pub enum Value {
    Int(i32),
    Text(String),
}

/// What a statement is, for counting and for judging its errors.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    Read,
    /// SAVEPOINT and its kin, SET.
    Control,
    /// LOCK TABLE, row locks and advisory locks.
    Lock,
    Insert,
    /// UPDATE or DELETE on a table with a primary key, key given.
    ByKey,
    /// The same, by condition, join, LIMIT, cursor.
    ByCondition,
    /// UPDATE that changes the key.
    KeyChange,
    OnConflict,
    /// UPDATE or DELETE on a table without primary key.
    WithoutKey,
    Merge,
    Copy,
    /// DO, CALL, a function that writes, a table with a trigger.
    Once,
    Truncate,
    Definition,
    /// Fails on every server.
    Mistake,
}

impl Kind {
    /// UPDATE and DELETE on tables with a primary key: they give nothing that one server would not.
    pub fn takes_row_locks_only(self) -> bool {
        matches!(self, Self::ByKey | Self::ByCondition | Self::Insert | Self::Copy)
    }
}

impl Schedule {
    pub fn transactions(&self) -> usize {
        self.rounds.iter().flat_map(|round| &round.clients).map(Vec::len).sum()
    }

    /// A script that a person can read and play.
    pub fn script(&self) -> String {
        let mut text = format!("-- seed {}\n", self.seed);
        for statement in &self.setup {
            let _ = writeln!(text, "{statement};");
        }
        for (number, round) in self.rounds.iter().enumerate() {
            for (client, transactions) in round.clients.iter().enumerate().filter(|(_, list)| !list.is_empty()) {
                let _ = writeln!(text, "-- round {number}, client {client}");
                for transaction in transactions {
                    transaction.write(&mut text);
                }
            }
        }
        text
    }
}

impl Transaction {
    fn write(&self, text: &mut String) {
        if let Some(begin) = &self.begin {
            let _ = writeln!(text, "{begin};");
        }
        for statement in &self.statements {
            let _ = match &statement.sent {
                Sent::Text => writeln!(text, "{};", statement.text),
                Sent::Prepared(values) => writeln!(text, "{};  -- prepared, {values:?}", statement.text),
                Sent::Copy(data) => write!(text, "{};\n{data}\\.\n", statement.text),
            };
        }
        if self.begin.is_some() {
            let _ = writeln!(text, "{};", self.end.text());
        }
    }
}

impl End {
    pub fn text(self) -> &'static str {
        match self {
            Self::Commit => "commit",
            Self::Rollback => "rollback",
        }
    }
}
