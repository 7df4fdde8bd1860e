//! What is done with one statement: the result of classification.
//!
//! A [`Plan`] belongs to a *shape* (text with its literals masked), so it holds no literal of the statement that
//! it was made from. Texts for the leader and the followers are made from the plan and the text at hand.

use std::ops::Range;
use std::sync::Arc;

use super::conditional::Depends;
use super::copied_rows::CopiedRows;
use super::copy_dates::CopyDates;
use super::copy_fill::CopyFill;
use super::large_objects::Call;
use super::named::Named;
use super::rows::RowTexts;
use super::sequences::SequenceUse;
use super::shared::SharedText;
use super::stays::Stays;
use super::text::Edits;

/// What is done with every statement of one shape, under one context and schema number.
#[derive(Clone, Debug, PartialEq)]
pub struct Plan {
    pub lane: Lane,
    /// The statement may change settings, role or search_path: what is known of them must be read again.
    pub changes_settings: bool,
    /// What it does with sequences.
    pub sequences: SequenceUse,
    /// `DISCARD ALL` or `DEALLOCATE ALL`: prepared statements of the session are gone.
    pub drops_prepared: bool,
    /// A query for one row by its primary key: the text that the leader may keep prepared for all of this shape.
    pub one_row: Option<SharedText>,
    /// The table that it leaves locked on the leader until its transaction ends: an oid there. Not told of every statement.
    pub locks: Option<u32>,
    /// What it leaves behind in the session.
    pub stays: Stays,
}

#[derive(Clone, Debug, PartialEq)]
pub enum Lane {
    /// The leader alone; nothing for followers.
    Read {
        /// A function that is not known to be harmless is called: run it behind the server's read-only guard.
        guard: bool,
        /// `COPY ... FROM STDIN` into a temp table, whose data the client sends.
        copy_in: bool,
    },
    Control(Control),
    /// Answered by the proxy itself.
    Admin(Admin),
    Write(Box<Write>),
    /// Runs on the leader and on each follower, under the closed gate: what it writes is not in its text.
    Once(Box<Once>),
    /// PREPARE, EXECUTE, DEALLOCATE: what they do depends on what the session has prepared.
    Named(Named),
    /// VACUUM and the like, which change no content: as is on the leader, outside any transaction of ours, then on each follower
    /// with this text.
    Maintenance {
        /// Others may wait long for its locks.
        exclusive: bool,
    },
    /// Outside transactions too, but it changes something: [`super::nodewise`].
    Nodewise,
    /// COMMIT or ROLLBACK PREPARED
    Finish(Finish),
    Refused(Refusal),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Admin {
    PoolNodes,
}

/// Transaction control. The text goes to the leader as is, unless the proxy commits on its own.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Control {
    /// `with_modes`: BEGIN or START TRANSACTION with isolation level or the like
    Begin {
        with_modes: bool,
    },
    Commit {
        chain: bool,
    },
    Rollback {
        chain: bool,
    },
    Savepoint {
        name: String,
    },
    Release {
        name: String,
    },
    RollbackTo {
        name: String,
    },
    /// PREPARE TRANSACTION
    Prepare {
        gid: String,
    },
    /// SET CONSTRAINTS: forwarded, and part of the effects, because what followers apply after it may break a constraint for a while.
    SetConstraints,
    /// SET TRANSACTION, SET SESSION CHARACTERISTICS: forwarded
    Other,
}

/// The end of a transaction that a client has prepared.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finish {
    pub gid: String,
    pub commit: bool,
}

/// 0A000 with a sentence, and what to do instead.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    pub message: String,
    pub hint: String,
}

/// A statement that changes permanent data or definitions.
#[derive(Clone, Debug, PartialEq)]
#[allow(clippy::struct_excessive_bools, reason = "independent properties")]
pub struct Write {
    pub effect: EffectPlan,
    /// Values to be appended to the leader's RETURNING (or a RETURNING of our own), as SQL expressions, in this order.
    /// For pinned: the columns of the row; for point: the stable values that the follower's text needs.
    pub hidden_returning: Vec<String>,
    /// The client's own text has a RETURNING, whose columns come before the hidden ones.
    pub client_returning: bool,
    /// DDL: moves the schema number; its commit closes the gate.
    pub ddl: bool,
    /// A definition that may find nothing to do.
    pub depends: Depends,
    /// Its flight waits for everything that was sent before (ordered text, or cascades).
    pub barrier: bool,
    /// May leave work for deferred constraints until COMMIT.
    pub deferrable_constraints: bool,
    /// Where the texts for leader and followers differ from the client's.
    pub edits: Edits,
}

impl Write {
    /// The leader is asked something before it gets the statement.
    #[must_use]
    pub fn asks_first(&self) -> bool {
        self.depends != Depends::No
            || self.edits.ask_matches
            || self.edits.executes.is_some()
            || matches!(self.effect, EffectPlan::LargeObject(_) | EffectPlan::CopiedRows(_))
    }
}

/// A statement whose writes are not in its text: it calls code, or fires it.
#[derive(Clone, Debug, PartialEq)]
pub struct Once {
    /// Where the followers' text differs from the client's.
    pub edits: Edits,
    /// What gives the session's values, as SQL expressions, in the order of the numbers in [`Edits::splices`].
    pub session_values: Vec<String>,
    /// Functions such as now() of which each call in the text itself is one of these.
    pub given: Vec<String>,
    /// It is about one row at most, or about none.
    pub single: bool,
    pub proof: Proof,
    /// What it is instead, if the code that it fires turns out to change nothing but its own rows.
    pub rows: Option<Box<RowsInstead>>,
}

/// A statement whose triggers the leader alone has to fire: followers get the rows as they became.
#[derive(Clone, Debug, PartialEq)]
pub struct RowsInstead {
    pub write: Write,
    pub sequences: SequenceUse,
    /// Columns that the rows are not carried with, because nothing may change them: no trigger may give them a value.
    pub fixed: Vec<String>,
    /// There is no other way than by rows: else it is refused, with this and the reason.
    pub or_refused: Option<Refusal>,
}

/// What is known of all that a statement can reach.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Proof {
    /// Why it is not proven to do the same on every server.
    pub unproven: Option<String>,
    /// Settings of the client's own that it reads.
    pub settings: Vec<String>,
    /// It catches errors: a lock that is not free must not be one of them.
    pub catches_errors: bool,
    /// It may read or write tables of users.
    pub tables: bool,
    /// There are types whose casts or checks call code, and the text meets none of them. A parameter could still be of one.
    pub odd_types: bool,
}

#[derive(Clone, Debug, PartialEq)]
pub enum EffectPlan {
    /// The client's text, under the client's search_path, stable values as literals.
    Text {
        /// The role to run under, an SQL identifier without quotes; None: as the client's current role.
        owner: Option<Role>,
        /// UPDATE and DELETE: wrapped so that the server itself asserts the count. INSERT of values: false, its count can not differ.
        counted: bool,
        /// Must be the first to lock: tables on which `pgtandem.lock` takes SHARE ROW EXCLUSIVE on the leader before the statement.
        /// Object identifiers of the leader. Empty for the point lane and for DDL, which takes its own locks.
        lock_tables: Vec<u32>,
        /// UPDATE whose string literals and text parameters must not be `now`, `today`, ... (they go to date and time types).
        dates_matter: bool,
    },
    /// Rows by value, from the hidden RETURNING.
    Rows { owner: Option<Role>, texts: Arc<RowTexts> },
    /// `COPY ... FROM STDIN`: the data, under this text (FREEZE dropped).
    Copy {
        owner: Option<Role>,
        text: CopyText,
        /// The data are in a file of the server: [`super::copy::server_file`].
        server_file: bool,
        /// Data go to date and time columns: if the scanner finds one that is the clock's, the statement is refused.
        dates: Option<CopyDates>,
        /// Columns that are left out have defaults that vary: both sides get the leader's values in the data.
        fill: Option<Box<CopyFill>>,
    },
    /// COPY FROM whose rows are read from the leader when they are there.
    CopiedRows(Box<CopiedRows>),
    /// A SELECT that calls this function of large objects.
    LargeObject(Call),
    /// A definition that gives rows values: followers get it without them, and the rows as the leader made them.
    Carried {
        rows: Carried,
        /// Sequences that followers set exactly as the leader's before the statement. Object identifiers of the leader.
        sequences: Vec<u32>,
    },
}

/// Which rows a definition gives values. Object identifiers are the leader's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Carried {
    /// CREATE TABLE AS, SELECT INTO, CREATE MATERIALIZED VIEW. No schema: the first of the search_path.
    New {
        schema: Option<String>,
        name: String,
        view: bool,
        no_data: bool,
    },
    /// No rows: the text, once sequences are in place.
    Text {
        relation: u32,
    },
    Refresh {
        view: u32,
    },
    /// ALTER TABLE after which any row may have another value. `retyped`: columns whose type it changes so.
    Rows {
        table: u32,
        retyped: Vec<String>,
    },
    /// ADD COLUMN whose default has values of the session, the same for every row. `values`: SQL expressions of their text form, for
    /// the splices of the text.
    Defaults {
        table: u32,
        columns: Vec<String>,
        values: Vec<String>,
    },
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CopyText {
    /// The client's own text does.
    AsIs,
    /// This text instead. The options of the client's text are part of the shape, so it holds for every statement of the shape.
    Instead(String),
}

/// A password in the text of CREATE or ALTER ROLE.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Password {
    /// `None`: the current role.
    pub role: Option<String>,
    /// Where its literal is in the text, bytes: plans of definitions belong to one text.
    pub at: Range<usize>,
}

/// A role as a name, unquoted. `superuser`: running under it instead of the proxy's own role gains nothing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Role {
    pub name: String,
    pub superuser: bool,
}
