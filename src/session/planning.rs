//! From a client's text to its plan: the shape is looked up; only a new shape is parsed and asks the leader's catalog.
//!
//! Plans are kept per thread. A plan holds for one database, role, search_path and schema number; a session with temp
//! objects or uncommitted DDL keeps plans of its own.

use std::cell::RefCell;
use std::collections::HashMap;
use std::hash::{Hash, Hasher};
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use bytes::Bytes;

use crate::config::Unproven;
use crate::pg::build::{self, ClientError};
use crate::pg::frame::HEADER_BYTES;
use crate::replicate::schema::{self, SessionFacts};
use crate::session::rewrite;
use crate::session::run::Session;
use crate::session::simple::{error_frame, refused};
use crate::session::wire::{End, Expect, Mode, Until};
use crate::sql::facts::{Facts, FactsError};
use crate::sql::lex::{Kind, Lexer};
use crate::sql::named::{Arguments, Named};
use crate::sql::parse::Statement;
use crate::sql::plan::{EffectPlan, Lane, Once, Plan, Proof, Write};
use crate::sql::reach::{Answer, Reach, Verdict};
use crate::sql::sequences::SequenceUse;
use crate::sql::shape::{self, Shape};
use crate::sql::stays::Stays;
use crate::sql::{catalog, classify, encoding, needs::Needs, parse};

/// Plans that one thread keeps; past that it starts anew.
const PLANS_MAX: usize = 10_000;
/// Texts longer than this are not kept.
const TEXT_BYTES_MAX: usize = 64 * 1024;
/// How often the catalog is asked again when its answer can not be read.
const AGAIN_MAX: usize = 3;
/// Position of `search_path` and `client_encoding` among [`schema::MIRRORED`].
const SEARCH_PATH: usize = 0;
const CLIENT_ENCODING: usize = 1;

#[derive(Debug, Default)]
pub struct PlanCache {
    plans: RefCell<HashMap<String, Arc<Plan>>>,
}

impl PlanCache {
    fn get(&self, key: &str) -> Option<Arc<Plan>> {
        self.plans.borrow().get(key).cloned()
    }

    fn put(&self, key: String, plan: &Arc<Plan>) {
        if key.len() > TEXT_BYTES_MAX {
            return;
        }
        let mut plans = self.plans.borrow_mut();
        if plans.len() >= PLANS_MAX {
            plans.clear();
        }
        plans.insert(key, Arc::clone(plan));
    }

    pub fn clear(&self) {
        self.plans.borrow_mut().clear();
    }
}

/// What is to be done with a text.
#[derive(Debug)]
pub enum Planned {
    One {
        plan: Arc<Plan>,
        shape: Shape,
        text: Arc<str>,
    },
    Several(Parts),
    /// Nothing but white space and comments.
    Nothing,
    Refused(ClientError),
    /// The leader answered the catalog query with this error.
    Failed(Bytes),
    /// An earlier message of the batch failed: the leader skips to the next Sync.
    Skipped,
}

/// Several statements in one text.
#[derive(Debug)]
pub struct Parts {
    pub text: Arc<str>,
    /// Where each is, in bytes.
    pub ranges: Vec<Range<usize>>,
}

/// Why the catalog's answer is not there.
enum NoAnswer {
    /// The leader's error.
    Server(Bytes),
    /// The transaction sees the catalog as it was before a change that its statements will see.
    OldSnapshot,
    Unreadable(FactsError),
}

impl From<NoAnswer> for Planned {
    fn from(why: NoAnswer) -> Self {
        match why {
            NoAnswer::Server(error) => Self::Failed(error),
            NoAnswer::OldSnapshot => Self::Refused(ClientError::error(
                "40001",
                "the schema was changed after this transaction's snapshot was taken",
                "Try the transaction again.",
            )),
            NoAnswer::Unreadable(error) => {
                tracing::error!(%error, "the catalog's answer can not be read");
                Self::Refused(ClientError::error(
                    "XX000",
                    "the leader's catalog gave an answer that pgtandem can not read",
                    "Report this as a bug of pgtandem; its log says more.",
                ))
            }
        }
    }
}

impl Session {
    /// The plan for a text of the client's.
    ///
    /// # Errors
    /// If the connection to the leader ends.
    pub async fn plan(&mut self, text: &[u8]) -> Result<Planned, End> {
        if !self.in_block() {
            self.schema_at_begin = None;
        } else if self.schema_at_begin.is_none() && self.is_first {
            self.schema_at_begin = Some(self.hub.settled_schema().await);
        }
        let asks_nothing = takes_no_snapshot(&String::from_utf8_lossy(text));
        if self.facts.is_none() && !asks_nothing {
            self.catch_up().await?;
            if self.wire.is_skipping() {
                return Ok(Planned::Skipped);
            }
        }
        let failed = self.wire.status == b'E';
        if !failed
            && !asks_nothing
            && self.facts.is_none()
            && let Some(error) = self.read_context().await?
        {
            return Ok(Planned::Failed(error));
        }
        let Some(text) = self.readable(text) else { return Ok(self.unreadable()) };
        self.planned_at = self.hub.settled_schema().await;
        let shape = shape::mask(&text);
        let key = self.key(&shape.key);
        let cache = if self.has_own_catalog { &self.own_plans } else { &self.thread.plans };
        if let Some(plan) = cache.get(&key) {
            if !matches!(plan.lane, Lane::Once(_)) {
                self.once_turn = None;
            }
            return Ok(Planned::One { plan, shape, text });
        }
        self.once_turn = None;
        let mut statements = match parse::parse(&text) {
            Ok(statements) => statements,
            Err(error) => {
                let plan = Arc::new(classify::unparsable(&error, &text));
                return Ok(Planned::One { plan, shape, text });
            }
        };
        let statement = match (statements.len(), statements.pop()) {
            (0, _) | (_, None) => return Ok(Planned::Nothing),
            (1, Some(statement)) => statement,
            (_, Some(last)) => {
                let mut ranges: Vec<_> = statements.into_iter().map(|s| s.range).collect();
                ranges.push(last.range);
                return Ok(Planned::Several(Parts { text, ranges }));
            }
        };
        let needs = Needs::of(&statement);
        // Answers to what the client sent before come first: an error among them is not the catalog query's.
        self.catch_up().await?;
        if self.wire.is_skipping() {
            return Ok(Planned::Skipped);
        }
        let failed = self.wire.status == b'E';
        let facts = if needs.is_empty() || failed || asks_nothing {
            Facts::default()
        } else {
            match self.ask_catalog(&catalog::query(&needs), Facts::parse).await? {
                Ok(facts) => facts,
                Err(NoAnswer::OldSnapshot) => {
                    let plan = classify::unknown_query(&statement, &text, &shape);
                    return Ok(plan.map_or(NoAnswer::OldSnapshot.into(), |plan| Planned::One {
                        plan: Arc::new(plan),
                        shape,
                        text,
                    }));
                }
                Err(why) => return Ok(why.into()),
            }
        };
        let plan = classify::classify(&statement, &text, &shape, &facts);
        let plan = match self.prove(plan, &statement, &text).await? {
            Ok(plan) => Arc::new(plan),
            Err(why) => return Ok(why.into()),
        };
        if failed {
            // Only what ends the failed block is known without a catalog; the server refuses the rest.
            let plan = match plan.lane {
                Lane::Control(_) => plan,
                _ => Arc::new(Plan { lane: Lane::Read { guard: false, copy_in: false }, ..classify::unparsed() }),
            };
            return Ok(Planned::One { plan, shape, text });
        }
        if !text.is_ascii() && !self.is_carried_in_bytes(&plan.lane) {
            return Ok(self.unreadable());
        }
        let has_password = matches!(&plan.lane, Lane::Write(write) if write.edits.password.is_some());
        if !has_password {
            let cache = if self.has_own_catalog { &self.own_plans } else { &self.thread.plans };
            cache.put(key, &plan);
        }
        Ok(Planned::One { plan, shape, text })
    }

    /// The plan for a query that wrote behind the guard. From now on the shape has this plan.
    ///
    /// # Errors
    /// If the connection to the leader ends.
    pub async fn plan_writing(&mut self, text: &str) -> Result<Planned, End> {
        if self.facts.is_none()
            && let Some(error) = self.read_context().await?
        {
            return Ok(Planned::Failed(error));
        }
        self.planned_at = self.hub.settled_schema().await;
        let shape = shape::mask(text);
        let Ok(statement) = parse::parse_one(text) else {
            return Ok(Planned::Refused(refused(&crate::sql::refuse::guarded_write())));
        };
        let facts = match self.ask_catalog(&catalog::query(&Needs::of(&statement)), Facts::parse).await? {
            Ok(facts) => facts,
            Err(why) => return Ok(why.into()),
        };
        let plan = classify::writing(&statement, text, &shape, &facts);
        let plan = match self.prove(plan, &statement, text).await? {
            Ok(plan) => Arc::new(plan),
            Err(why) => return Ok(why.into()),
        };
        let key = self.key(&shape.key);
        let cache = if self.has_own_catalog { &self.own_plans } else { &self.thread.plans };
        cache.put(key, &plan);
        Ok(Planned::One { plan, shape, text: text.into() })
    }

    /// Looks at all that a statement that calls or fires code can reach: whether it does the same on every server, if it may write, and
    /// whether something may stay in the session.
    async fn prove(&mut self, plan: Plan, statement: &Statement, text: &str) -> Result<Result<Plan, NoAnswer>, End> {
        let calls_code = match &plan.lane {
            Lane::Once(_) => true,
            // In a failed block nothing is called.
            Lane::Read { guard: true, .. }
            | Lane::Named(Named::Execute { arguments: Arguments { guard: true, .. }, .. }) => self.wire.status != b'E',
            _ => false,
        };
        if !calls_code {
            return Ok(Ok(plan));
        }
        let (single, given) = match &plan.lane {
            Lane::Once(once) => (once.single, once.given.as_slice()),
            _ => (false, [].as_slice()),
        };
        let mut reach = Reach::of(statement, text, single, given).wanting_stays();
        if matches!(&plan.lane, Lane::Once(once) if once.rows.is_some()) {
            reach = reach.wanting_rows();
        }
        while let Some(query) = reach.query() {
            match self.ask_catalog(&query, Answer::parse).await? {
                Ok(answer) => reach.answer(answer),
                Err(why) => return Ok(Err(why)),
            }
        }
        let plan = if reach.stays() { Plan { stays: Stays::CODE, ..plan } } else { plan };
        let Lane::Once(once) = plan.lane else { return Ok(Ok(plan)) };
        if let Some(rows) = &once.rows
            && reach.only_rows(&rows.fixed)
        {
            let sequences = if reach.takes_values() { SequenceUse::Any } else { rows.sequences.clone() };
            return Ok(Ok(Plan { lane: Lane::Write(Box::new(rows.write.clone())), sequences, ..plan }));
        }
        if let Some(refusal) = once.rows.as_ref().and_then(|rows| rows.or_refused.as_ref()) {
            return Ok(Ok(Plan { lane: Lane::Refused(reach.not_rows(refusal)), ..plan }));
        }
        let lane = match reach.verdict() {
            Verdict::Varies(why) => Lane::Refused(crate::sql::refuse::varying_code(&why)),
            Verdict::Known(Proof { unproven: Some(why), .. }) if self.hub.config.proxy.unproven == Unproven::Refuse => {
                Lane::Refused(crate::sql::refuse::unproven_code(&why))
            }
            // Followers have no part in it. Behind the guard, because a function that its owner calls immutable is not read.
            Verdict::Known(Proof { unproven: None, tables: false, .. }) => Lane::Read { guard: true, copy_in: false },
            Verdict::Known(proof) => Lane::Once(Box::new(Once { proof, ..*once })),
        };
        Ok(Ok(Plan { lane, ..plan }))
    }

    /// Whether a plan made under the schema number `made_at` is still what would be made now. Asked after the leader ran the
    /// statement: a change of the schema may have been committed in between, while it waited for a lock for example.
    ///
    /// # Errors
    /// If the connection to the leader ends.
    pub async fn still_planned(&mut self, text: &str, plan: &Plan, made_at: u64) -> Result<bool, End> {
        if self.hub.schema_number.load(Ordering::Acquire) == made_at {
            return Ok(true);
        }
        let results = std::mem::take(&mut self.wire.results);
        let now = self.plan(&self.encoded(text)).await?;
        self.wire.results = results;
        Ok(matches!(now, Planned::One { plan: now, .. } if *now == *plan))
    }

    /// Database, role and settings are part of the key: a name or a rule may mean something else under others.
    fn key(&self, masked: &str) -> String {
        let number = self.planned_at;
        format!("{number}\0{}\0{:x}\0{masked}", self.database, self.context_hash)
    }

    /// Reads role and settings of the leader's session again. Gives the error if the server had one.
    pub async fn read_context(&mut self) -> Result<Option<Bytes>, End> {
        self.wire.clear_results();
        self.wire.hide_errors = true;
        self.hidden("pgtandem_p", "pgtandem_context", &[]);
        self.end_hidden();
        let done = self.wire.pump(Until::Answered).await;
        self.wire.hide_errors = false;
        done?;
        if let Some(error) = self.wire.results.error.take() {
            return Ok(Some(error));
        }
        self.take_context();
        Ok(None)
    }

    /// The context from the results of the query that asked for it.
    pub fn take_context(&mut self) {
        let row = self.wire.results.values.pop().flatten().unwrap_or_default();
        // The encoding is among what it says: ASCII in any encoding.
        let parsed = encoding::decode(&row, "SQL_ASCII").and_then(|row| SessionFacts::parse(&row));
        let name = parsed.as_ref().map_or("UTF8", |facts| facts.context.client_encoding());
        let parsed = match encoding::decode(&row, name) {
            Some(row) => SessionFacts::parse(&row),
            // Names in it can not be read; nothing in this encoding is carried.
            None => parsed,
        };
        self.facts = parsed.map(|mut facts| {
            // "$user" means the client's role, whichever role the effect runs under.
            let quoted = format!("\"{}\"", facts.context.role.replace('"', "\"\""));
            if let Some(path) = facts.context.settings.get_mut(SEARCH_PATH) {
                *path = path.replace("\"$user\"", &quoted);
            }
            Arc::new(facts)
        });
        self.context = self.facts.as_ref().map(|f| Arc::new(f.context.clone()));
        let mut hasher = std::hash::DefaultHasher::new();
        self.context.hash(&mut hasher);
        self.context_hash = hasher.finish();
    }

    /// What the catalog says, as it is for statements that run now.
    async fn ask_catalog<T>(
        &mut self,
        query: &str,
        parse: impl Fn(&str) -> Result<T, FactsError>,
    ) -> Result<Result<T, NoAnswer>, End> {
        // The catalog's tables are read with the transaction's snapshot, but a statement runs with the definitions of its moment.
        let keeps_snapshot = self.facts.as_ref().is_none_or(|facts| facts.isolation != "read committed");
        if keeps_snapshot && self.in_block() && self.schema_at_begin != Some(self.planned_at) {
            return Ok(Err(NoAnswer::OldSnapshot));
        }
        let mut attempts = 0;
        loop {
            let json = match self.catalog_query(query).await? {
                Ok(json) => json,
                Err(error) => return Ok(Err(NoAnswer::Server(error))),
            };
            match parse(&json) {
                Ok(answer) => return Ok(Ok(answer)),
                Err(error) if attempts == AGAIN_MAX => return Ok(Err(NoAnswer::Unreadable(error))),
                // Functions like pg_table_is_visible() know nothing of what was dropped since the query's snapshot.
                Err(error) => tracing::debug!(%error, "the catalog is asked once more"),
            }
            attempts += 1;
        }
    }

    /// One row with one text from the catalog, on the session's own connection: it sees its own uncommitted DDL.
    async fn catalog_query(&mut self, text: &str) -> Result<Result<String, Bytes>, End> {
        self.wire.clear_results();
        self.wire.hide_errors = true;
        let text = self.encoded(text);
        self.hidden("pgtandem_p", "pgtandem_catalog", &[Some(&text)]);
        self.end_hidden();
        let done = self.wire.pump(Until::Answered).await;
        self.wire.hide_errors = false;
        done?;
        if let Some(error) = self.wire.results.error.take() {
            // The context would be our function: the client gets what ended its statement, a cancel for example.
            let error = rewrite::without_context(&error_frame(&error)).freeze();
            return Ok(Err(error.slice(HEADER_BYTES..)));
        }
        let value = self.wire.results.values.pop().flatten().unwrap_or_default();
        let text = encoding::decode(&value, self.encoding());
        Ok(Ok(text.unwrap_or_else(|| String::from_utf8_lossy(&value)).into_owned()))
    }

    /// Why this session may not write, whatever the statement.
    pub fn refuses_write(&self, write: &Write) -> Option<ClientError> {
        let facts = self.facts.as_ref()?;
        if let Some(refusal) = self.refuses_session(facts) {
            return Some(refusal);
        }
        let ordered = matches!(&write.effect, EffectPlan::Text { lock_tables, .. } if !lock_tables.is_empty());
        (ordered && matches!(facts.isolation.as_str(), "repeatable read" | "serializable")).then(|| {
            ClientError::error(
                "0A000",
                "this statement must order itself by table locks, which REPEATABLE READ and SERIALIZABLE do not allow after \
                 their snapshot",
                "Use READ COMMITTED for it, or name every primary-key column in its WHERE clause.",
            )
        })
    }

    /// Why this session may not write in any lane.
    pub fn refuses_session(&self, facts: &SessionFacts) -> Option<ClientError> {
        let encoding = facts.context.settings.get(CLIENT_ENCODING).map_or("", String::as_str);
        let error = |message: &str, hint: &str| Some(ClientError::error("0A000", message, hint));
        if !facts.standard_conforming_strings {
            return error(
                "standard_conforming_strings = off is not supported",
                "SET standard_conforming_strings = on; write E'...' for strings with backslashes.",
            );
        }
        if !facts.replication_role_origin {
            return error(
                "session_replication_role must be origin: triggers and constraints would differ on the followers",
                "RESET session_replication_role.",
            );
        }
        if encoding::is_refused(encoding) {
            let what = format!("client_encoding {encoding} is not supported: its texts can not be read safely");
            return error(&what, "SET client_encoding = 'UTF8'.");
        }
        None
    }

    /// Whether a SERIALIZABLE transaction may be under way. The server asks only at its first snapshot whether it is read only, and
    /// keeps no track of what such a transaction reads; so it must have its snapshot before the read-only guard.
    pub fn needs_snapshot_first(&self) -> bool {
        self.facts.as_ref().is_none_or(|facts| facts.isolation == "serializable")
    }

    /// `DISCARD ALL` took our prepared statements with the client's.
    pub fn reprepare(&mut self) {
        for (name, text) in schema::PREPARED {
            build::parse(&mut self.wire.to_server, name.as_bytes(), text.as_bytes(), &[]);
            self.wire.expects.push_back(Expect::Parse { hidden: true });
        }
        self.end_hidden();
    }
}

/// Statements that PostgreSQL runs without a snapshot. No query of ours may run before them: it would take the transaction's
/// snapshot, after which its modes can not be set, and before what a LOCK waits for. What they are is in the text alone.
fn takes_no_snapshot(text: &str) -> bool {
    const FIRST: [&str; 16] = [
        "set",
        "reset",
        "show",
        "lock",
        "begin",
        "start",
        "commit",
        "end",
        "rollback",
        "abort",
        "savepoint",
        "release",
        "fetch",
        "listen",
        "unlisten",
        "notify",
    ];
    let first = Lexer::new(text).find(|token| token.kind == Kind::Word).and_then(|token| text.get(token.range));
    first.is_some_and(|word| FIRST.iter().any(|known| known.eq_ignore_ascii_case(word)))
}

/// The mode in which a statement's rows are taken.
#[must_use]
pub fn mode_of(write: &Write) -> Mode {
    match write.hidden_returning.len() {
        0 if matches!(write.effect, EffectPlan::LargeObject(_)) => Mode::Both,
        0 => Mode::Forward,
        hidden => Mode::Strip { hidden, client_returning: write.client_returning },
    }
}

/// The schema changed while the statement ran, and its plan would be another one now.
#[must_use]
pub fn schema_changed() -> ClientError {
    ClientError::error("40001", "the schema changed while the statement ran", "Try the transaction again.")
}
