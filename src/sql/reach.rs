//! Whether a statement provably does the same on every server: all that it can reach is looked at, through the catalog.
//!
//! Functions, triggers, defaults, checks, rules, views, policies: each is a piece of code for [`super::scan`], which finds names; names are
//! asked of the catalog; what the catalog gives is more code. A name means everything that has it, in whatever schema,
//! so a `search_path` can not hide anything. The order of calls: [`Reach::of`], then [`Reach::query`] and [`Reach::answer`] until
//! there is nothing to ask, then [`Reach::verdict`].

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;

use pg_query::NodeEnum;

use super::catalog::MIRRORED_SETTINGS;
use super::facts::{Function, quote_literal};
use super::first_rows::Ordered;
use super::functions::{self, Effect};
use super::lex::{Kind, Lexer};
use super::needs::Name;
use super::parse::{Statement, node_names};
use super::plan::{Proof, Refusal};
pub use super::reach_answer::Answer;
use super::reach_answer::{FunctionFact, RelationFact};
use super::reach_keys::Keys;
use super::reach_lists::{IMPLIED_OPERATORS, SAME_IN_A_HALF, SAME_SETTINGS};
use super::reach_query::{FUNCTION, KEYS, TEMPLATE};
use super::reach_text::{FirstRow, first_row, part_of_query, sql_body};
use super::scan::{Code, Columns, Insert, scan};

mod written;

/// Rounds of questions to the catalog; what is reached by more steps is not proven.
const ROUNDS_MAX: usize = 12;
/// Functions and tables that one statement may reach; past that it is not proven.
const PIECES_MAX: usize = 1000;

/// What is known after all was looked at.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It does something else on another server, or can not be done there: refused.
    Varies(String),
    Known(Proof),
}

#[derive(Debug, Default)]
pub struct Reach {
    asked_functions: BTreeSet<String>,
    /// Those among them that are called for certain, and are no mere fields.
    called: BTreeSet<String>,
    asked_relations: BTreeSet<String>,
    asked_written: BTreeSet<Name>,
    new_functions: BTreeSet<String>,
    new_relations: BTreeSet<String>,
    new_written: BTreeSet<Name>,
    /// Object identifiers of what was looked at.
    seen_functions: BTreeSet<u32>,
    seen_relations: BTreeSet<u32>,
    seen_written: BTreeSet<u32>,
    /// Who called or fired a function is told when it is why the statement is refused.
    inserts: BTreeMap<Name, Vec<Columns>>,
    written_many: BTreeSet<Name>,
    fields: BTreeSet<String>,
    operators: BTreeSet<String>,
    settings: BTreeSet<String>,
    varies: Option<String>,
    unproven: Option<String>,
    catches_errors: bool,
    /// Code is run for one row after the other.
    many: Option<String>,
    /// Code that one row after the other matters for.
    reads: Option<String>,
    has_floats: bool,
    keys: Keys,
    float_code: bool,
    rounds: usize,
    /// It is to be found out whether the statement's own rows are all that it changes, whatever their values are.
    wants_rows: bool,
    /// Why they may not be.
    beside: Option<String>,
    /// What the code of triggers gives NEW; `None` among them: anything.
    assigned: BTreeSet<Option<String>>,
    takes_values: bool,
    odd_somewhere: bool,
    has_parameters: bool,
    /// Code that reads as the query does which calls it.
    reads_as_caller: Option<String>,
    /// There is code whose queries see what the statement has changed.
    has_queries: bool,
    /// What would make the statement's own output unproven, which matters if a function gets it.
    output: Option<String>,
    /// A function of users is called that may do something.
    calls_code: bool,
    /// All is looked at until it is known whether something may stay in the session, and why it may.
    wants_stays: bool,
    stays: bool,
}

impl Reach {
    /// Begins with a statement. `single`: it is known to be about one row. `given`: functions whose values followers get for each call in the
    /// statement's own text.
    #[must_use]
    pub fn of(statement: &Statement, text: &str, single: bool, given: &[String]) -> Self {
        let mut reach = Self::default();
        let outer = text.get(statement.range.clone()).unwrap_or(text);
        reach.has_parameters = Lexer::new(outer).any(|token| token.kind == Kind::Parameter);
        if !single {
            reach.many = Some("it may be about several rows".to_owned());
        }
        if let NodeEnum::DoStmt(code) = &statement.node {
            let mut language = "plpgsql".to_owned();
            let mut body = None;
            for argument in &code.args {
                let Some(NodeEnum::DefElem(argument)) = argument.node.as_ref() else { continue };
                let value = argument.arg.as_ref().and_then(|value| value.node.as_ref());
                let Some(NodeEnum::String(value)) = value else { continue };
                match argument.defname.as_str() {
                    "language" => language.clone_from(&value.sval),
                    _ => body = Some(value.sval.clone()),
                }
            }
            match body {
                Some(body) if language == "plpgsql" => reach.code(&scan(&body, false), "the code"),
                _ => {
                    reach.stays = true;
                    reach.open(format!("the code is in {language}"));
                }
            }
            return reach;
        }
        let mut code = scan(outer, true);
        code.calls.retain(|call| !given.contains(&call.name));
        if let NodeEnum::CopyStmt(copy) = &statement.node
            && let Some(table) = &copy.relation
        {
            let table = Name::new(&table.schemaname, &table.relname);
            let markers = outer.to_lowercase().contains("default");
            let columns = match node_names(&copy.attlist) {
                _ if markers => Columns::Unknown,
                names if names.is_empty() => Columns::First(usize::MAX),
                names => Columns::Named(names.iter().map(|name| (*name).to_owned()).collect()),
            };
            code.inserts.insert(Insert { table: table.clone(), columns });
            code.written_many.insert(table.clone());
            code.written.insert(table);
        }
        reach.output.clone_from(&code.output);
        reach.code(&code, "the statement");
        // Its own reading is done once; only what it calls and fires is done for each row.
        reach.reads = None;
        reach
    }

    fn varies(&mut self, why: String) {
        self.varies.get_or_insert(why);
    }

    fn open(&mut self, why: String) {
        self.unproven.get_or_insert(why);
    }

    /// Not only the statement's own rows are changed, or nobody knows.
    fn beside(&mut self, why: impl Into<String>) {
        self.beside.get_or_insert(why.into());
    }

    /// Looks for whether the rows that the statement itself changes are all that is changed: see [`Self::only_rows`].
    #[must_use]
    pub fn wanting_rows(self) -> Self {
        Self { wants_rows: true, ..self }
    }

    /// Looks for whether something may stay in the session, whatever else is found: see [`Self::stays`].
    #[must_use]
    pub fn wanting_stays(self) -> Self {
        Self { wants_stays: true, ..self }
    }

    /// Whether the code that the statement calls and fires, known by now, may leave something in the session. Functions that their owners call
    /// immutable are believed.
    #[must_use]
    pub fn stays(&self) -> bool {
        self.stays
    }

    /// Whether the code that the statement calls and fires, known by now, changes nothing but the rows of the statement, and of those
    /// none of the columns in `fixed`. Then it does not matter what else it does: the leader alone needs to run it.
    #[must_use]
    pub fn only_rows(&self, fixed: &[String]) -> bool {
        let is_fixed = |column: &Option<String>| column.as_ref().is_none_or(|column| fixed.contains(column));
        // The type of a parameter is the client's choice, and stands in no text.
        let odd_parameters = self.odd_somewhere && self.has_parameters;
        self.beside.is_none() && !odd_parameters && (fixed.is_empty() || !self.assigned.iter().any(is_fixed))
    }

    /// A refusal for want of another way, with why the rows are not all.
    #[must_use]
    pub fn not_rows(&self, refusal: &Refusal) -> Refusal {
        let why = self.beside.as_deref().unwrap_or("the type of a parameter is not known");
        Refusal { message: format!("{}, and {why}", refusal.message), hint: refusal.hint.clone() }
    }

    /// Whether that code may take values of sequences.
    #[must_use]
    pub fn takes_values(&self) -> bool {
        self.takes_values
    }

    /// Code that is not the statement itself: what it does beside giving values.
    fn called(&mut self, code: &Code, place: &str) {
        if let Some(why) = &code.acts {
            self.beside(format!("{place}: {why}"));
        }
        if let Some(table) = code.written.iter().next() {
            self.beside(format!("{place}: it writes to {}", table.name));
        }
        let calls = |name: &str| code.calls.iter().any(|call| call.name == name);
        if calls("setval") {
            self.beside(format!("{place}: it sets a sequence"));
        }
        self.takes_values |= calls("nextval");
        self.assigned.extend(code.assigned.iter().cloned().map(Some));
        if code.assigns_all {
            self.assigned.insert(None);
        }
        self.code(code, place);
    }

    /// Takes in a piece of code; `place` names it for a person.
    fn code(&mut self, code: &Code, place: &str) {
        self.stays |= code.stays.is_some();
        if let Some(why) = &code.varies {
            self.varies(format!("{place}: {why}"));
        }
        if let Some(why) = &code.unproven {
            self.open(format!("{place}: {why}"));
        }
        for query in &code.ordered {
            let mut query = query.clone();
            query.know(&code.typed);
            self.order_matters(query, place);
        }
        if code.words.contains("variable_conflict") {
            self.keys.distrust();
        }
        if code.takes_first {
            self.keys.first_of(code.calls.iter().map(|call| &call.name));
        }
        let own = |name: &&Name| name.schema.as_deref() == Some("pgtandem");
        if code.calls.iter().chain(&code.written).any(|name| own(&name)) {
            self.varies(format!("{place}: it uses the schema pgtandem, which belongs to pgtandem itself"));
        }
        for name in &code.calls {
            // Asked again if it was only a field so far.
            if self.called.insert(name.name.clone()) {
                self.asked_functions.insert(name.name.clone());
                self.new_functions.insert(name.name.clone());
            }
        }
        for field in &code.fields {
            // Any function of a row may be meant.
            if self.asked_functions.insert(field.clone()) {
                self.new_functions.insert(field.clone());
            }
        }
        self.fields.extend(code.fields.iter().cloned());
        for word in &code.words {
            if self.asked_relations.insert(word.clone()) {
                self.new_relations.insert(word.clone());
            }
        }
        for insert in &code.inserts {
            self.inserts.entry(insert.table.clone()).or_default().push(insert.columns.clone());
        }
        for name in &code.written {
            // Asked again if the columns that it needs are others now.
            self.asked_written.insert(name.clone());
            self.new_written.insert(name.clone());
        }
        self.written_many.extend(code.written_many.iter().cloned());
        self.operators.extend(code.operators.iter().cloned());
        self.settings.extend(code.settings.iter().cloned());
        self.catches_errors |= code.catches_errors;
        if code.reads {
            self.reads.get_or_insert(place.to_owned());
        }
        let mut probe = code.clone();
        probe.unproven = None;
        probe.has_floats();
        self.float_code |= probe.unproven.is_some();
        for name in &code.called_many {
            if self.many.is_none() && !functions::is_float_aggregate(&name.name) {
                self.fields_many(name);
            }
        }
    }

    /// The order of rows matters: it is certain if the table has a key for it.
    fn order_matters(&mut self, query: Ordered, place: &str) {
        let table = query.table.name.clone();
        if self.keys.want(query, place) {
            self.new_relations.insert(table.clone());
            self.asked_relations.insert(table);
        }
    }

    /// A call for one row after the other matters if it is a function of users, which the catalog will say.
    fn fields_many(&mut self, name: &Name) {
        self.written_many.insert(Name { schema: Some("()".to_owned()), name: name.name.clone() });
    }

    /// The next question to the catalog; `None`: all is known.
    #[must_use]
    pub fn query(&mut self) -> Option<String> {
        let nothing = self.new_functions.is_empty() && self.new_relations.is_empty() && self.new_written.is_empty();
        let is_known =
            self.varies.is_some() && (!self.wants_rows || self.beside.is_some()) && (!self.wants_stays || self.stays);
        if nothing || is_known {
            return None;
        }
        self.rounds += 1;
        if self.rounds > ROUNDS_MAX || self.seen_functions.len() + self.seen_relations.len() > PIECES_MAX {
            let why = "it reaches more functions and tables than pgtandem looks at";
            self.open(why.to_owned());
            self.beside(why);
            self.stays = true;
            return None;
        }
        let texts = |names: BTreeSet<String>| {
            let mut list = names.iter().map(|name| quote_literal(name)).collect::<Vec<_>>().join(", ");
            if list.is_empty() {
                list.push_str("NULL");
            }
            list
        };
        let mut written = "(NULL::pg_catalog.name, NULL::pg_catalog.name)".to_owned();
        for name in std::mem::take(&mut self.new_written) {
            let schema = name.schema.as_deref().map_or_else(|| "NULL".to_owned(), quote_literal);
            let _ = write!(written, ", ({schema}, {})", quote_literal(&name.name));
        }
        let text = TEMPLATE
            .replace("$functions", &texts(std::mem::take(&mut self.new_functions)))
            .replace("$relations", &texts(std::mem::take(&mut self.new_relations)))
            .replace("$ordered", &texts(self.keys.names()))
            .replace("$written", &written)
            .replace("@function", FUNCTION)
            .replace("@keys", KEYS);
        Some(super::catalog::qualify(&text))
    }

    /// Takes in the catalog's answer.
    pub fn answer(&mut self, answer: Answer) {
        for function in answer.functions.unwrap_or_default() {
            self.function(&function, None);
        }
        for relation in answer.relations.unwrap_or_default() {
            self.relation(&relation);
        }
        if let Some(name) = answer.temporary {
            self.varies(format!("{name} is a temporary type, which followers do not have"));
        }
        self.odd_somewhere |= answer.odd_somewhere;
        if let Some(name) = answer.odd {
            self.odd_type(&format!("the type {name} is met"));
        }
        for operator in answer.odd_operators.unwrap_or_default() {
            if IMPLIED_OPERATORS.contains(&operator.as_str())
                || self.operators.iter().any(|run| run.contains(&operator))
            {
                self.odd_type(&format!("the operator {operator} may be meant"));
            }
        }
        for operator in answer.operators.unwrap_or_default() {
            // Runs of operators are not cut apart here: `a<-b` may be `<` and `-`.
            if self.operators.iter().any(|run| run.contains(&operator)) {
                self.stays = true;
                self.beside(format!("the operator {operator} calls a function of users"));
                self.open(format!("the operator {operator} calls a function of users"));
            }
        }
    }

    /// Nothing in a text says that a value is cast or that the check of a domain looks at it, so the types alone are judged.
    fn odd_type(&mut self, met: &str) {
        let why = format!("{met}, and a cast or a domain's check of it calls a function that is not immutable");
        self.stays = true;
        self.beside(why.clone());
        self.open(why);
    }

    fn function(&mut self, fact: &FunctionFact, fired_by: Option<&str>) {
        let function = &fact.function;
        let name = function.name.as_str();
        let called = self.fields.contains(name) && function.of_row || !self.fields.contains(name);
        if function.builtin {
            if !SAME_IN_A_HALF.contains(&name) && called {
                self.builtin(function);
            }
            return;
        }
        // `t.f` calls a function of the row, which has an argument.
        if fired_by.is_none() && fact.no_arguments && !self.called.contains(name) {
            return;
        }
        if !self.seen_functions.insert(fact.oid) {
            return;
        }
        let place = match fired_by {
            Some(table) => format!("the trigger function {name} of {table}"),
            None => format!("the function {name}"),
        };
        if fact.temporary {
            self.stays = true;
            self.beside(format!("{place} is temporary"));
            return self.varies(format!("{place} is temporary, which followers do not have"));
        }
        if fact.config.as_deref().is_some_and(|config| {
            ["role=", "session_authorization=", "session_replication_role="]
                .iter()
                .any(|closed| config.contains(closed))
        }) {
            self.stays = true;
            self.beside(format!("{place}: it changes a setting"));
            return self.varies(format!("{place}: it changes a setting that followers must keep"));
        }
        if fired_by.is_none()
            && self.written_many.iter().any(|call| call.schema.as_deref() == Some("()") && call.name == name)
        {
            self.many.get_or_insert(format!("{name} is called for one row after the other"));
        }
        self.keys.called(&function.name, fact.returns_set);
        if fact.config.as_deref().is_some_and(|config| config.contains("variable_conflict")) {
            self.keys.distrust();
        }
        // They are evaluated where it is called.
        if let Some(defaults) = &fact.defaults {
            self.called(&scan(defaults, false), &format!("a default of an argument of {name}"));
        }
        // As everywhere: a function that its owner calls immutable is.
        if function.volatility == "i" && function.kind == "f" {
            return;
        }
        self.calls_code |= fired_by.is_none();
        if !matches!(function.kind.as_str(), "f" | "p") {
            self.stays = true;
            self.beside(format!("{name} is an aggregate of users"));
            return self.open(format!("{name} is an aggregate of users"));
        }
        let sees_snapshot = function.volatility == "s" && fired_by.is_none();
        let varies = name.starts_with("uuid_generate") || matches!(name, "gen_salt" | "gen_random_bytes");
        match (&fact.body, fact.language.as_str()) {
            _ if varies => self.varies(format!("{name}() gives another value on another server")),
            (Some(body), "sql") => {
                let body = sql_body(body, fact.has_head);
                let code = scan(body, false);
                if !fact.returns_set {
                    self.keys.first_of(code.calls.iter().map(|call| &call.name));
                }
                self.body(code, &place, sees_snapshot);
                match first_row(body) {
                    _ if fact.returns_set => {}
                    FirstRow::Certain => {}
                    FirstRow::Ordered(mut query) => {
                        query.know(fact.typed.as_ref().unwrap_or(&BTreeSet::new()));
                        self.order_matters(query, &place);
                    }
                    FirstRow::Any(why) => self.open(format!("{place}: {why}")),
                }
            }
            (Some(body), "plpgsql") => {
                let mut code = scan(body, false);
                code.type_arguments(fact.arguments.iter().flatten(), fact.typed.iter().flatten());
                self.body(code, &place, sees_snapshot);
            }
            (_, language) => {
                // What C functions do is not seen; those that their owner calls stable are believed.
                self.stays |= language != "c" || function.volatility == "v";
                self.beside(format!("{place} is written in {language}"));
                self.open(format!("{place} is written in {language}"));
            }
        }
    }

    /// The body of a function. One that is not volatile reads with the snapshot of the query that calls it, so not what that query has
    /// changed; that query is the statement, if no code is reached that has queries of its own.
    fn body(&mut self, mut code: Code, place: &str, sees_snapshot: bool) {
        if sees_snapshot && std::mem::take(&mut code.reads) {
            self.reads_as_caller.get_or_insert(place.to_owned());
        }
        self.has_queries |= !sees_snapshot;
        self.called(&code, place);
    }

    fn builtin(&mut self, function: &Function) {
        let (name, one) = (&function.name, std::slice::from_ref(function));
        // set_config() is judged where it is called.
        self.stays |= functions::stays(name).is_some();
        let effect = functions::effect(one, Some(2));
        if effect >= Some(Effect::Unknown) && name != "pg_notify" {
            self.beside(format!("{name}() may write"));
        }
        match effect {
            Some(Effect::Pure) | None => {}
            // Without a parenthesis-free form these are put in as literals, in the client's own text alone.
            _ if name == "pg_notify" => {
                self.varies(
                    "pg_notify() is used, which a transaction on a follower can not be prepared with".to_owned(),
                );
            }
            Some(Effect::Writes) => self.varies(format!("{name}() writes what followers can not get")),
            Some(_) => self.varies(format!("{name}() gives another value on another server")),
        }
    }

    fn relation(&mut self, fact: &RelationFact) {
        let name = format!("{}.{}", fact.schema, fact.name);
        let kind = fact.kind.as_str();
        if fact.builtin {
            if fact.written {
                return self.varies(format!("it writes to the system table {name}"));
            }
            return self.open(format!("it may read {name}, whose rows differ from server to server"));
        }
        match (kind, fact.persistence.as_str()) {
            ("S", _) => return self.varies(format!("it reads or writes the sequence {name}")),
            ("f", _) if fact.written => return self.varies(format!("it writes to the foreign table {name}")),
            ("f", _) => return self.open(format!("it reads the foreign table {name}")),
            (_, "t") => return self.varies(format!("{name} is a temporary table, which followers do not have")),
            (_, "u") => return self.varies(format!("{name} is unlogged: a node that is filled gets it empty")),
            _ => {}
        }
        self.has_floats |= fact.floats;
        self.keys.learn(fact);
        if self.seen_relations.insert(fact.oid) {
            if let Some(view) = &fact.view {
                self.called(&part_of_query(view), &format!("the view {name}"));
            }
            for policy in fact.policies.iter().flatten() {
                self.called(&part_of_query(policy), &format!("a policy of {name}"));
            }
        }
        if fact.written {
            self.written(fact, &name);
        }
    }

    /// What is known now.
    #[must_use]
    pub fn verdict(mut self) -> Verdict {
        if self.has_floats && self.float_code {
            self.open(
                "an aggregate over floating point numbers depends on the order in which a server finds rows".into(),
            );
        }
        if let Some(why) = self.keys.missing() {
            self.open(why);
        }
        if self.has_queries && self.reads.is_none() {
            self.reads = self.reads_as_caller.take();
        }
        if let (Some(many), Some(reads)) = (self.many.take(), self.reads.take()) {
            self.open(format!("{many}, and {reads} reads what the rows before may have changed"));
        }
        if let (true, Some(why)) = (self.calls_code, self.output.take()) {
            self.open(format!("the statement: {why}"));
        }
        let mut settings = Vec::new();
        for setting in std::mem::take(&mut self.settings) {
            if setting.contains('.') {
                settings.push(setting);
            } else if SAME_SETTINGS.contains(&setting.to_ascii_lowercase().as_str()) {
                // A follower is a copy of its leader's files.
            } else if !MIRRORED_SETTINGS.iter().any(|known| known.eq_ignore_ascii_case(&setting)) {
                self.varies(format!("it reads the setting {setting}, which is each server's own"));
            }
        }
        match self.varies {
            Some(why) => Verdict::Varies(why),
            None => {
                let (catches_errors, tables) = (self.catches_errors, !self.seen_relations.is_empty());
                Verdict::Known(Proof {
                    unproven: self.unproven,
                    settings,
                    catches_errors,
                    tables,
                    odd_types: self.odd_somewhere,
                })
            }
        }
    }
}
