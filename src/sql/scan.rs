//! What a piece of code may do, read off its tokens: SQL, the bodies of functions in SQL and plpgsql, expressions of the catalog.
//!
//! Tokens and not a tree, because nothing may be missed: whatever is called, read or written by name has its name in the text, however
//! new or odd the syntax around it is. What is found is more than what happens: a variable with a table's name counts as the
//! table. Only text that is put together at run time escapes, and that is noted.

use std::collections::BTreeSet;

use super::dates;
use super::first_rows::{self, Ordered};
use super::functions;
use super::lex::{Kind, Lexer};
use super::needs::Name;
use super::scan_lists::{CLOCK, CLOSED, CLOSED_SETTINGS, FORBIDDEN, MANY, NAME_BYTES_MAX, OPEN, SYSTEM_COLUMNS};

/// An INSERT: for its defaults.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Insert {
    pub table: Name,
    pub columns: Columns,
}

/// The columns of an INSERT that have a value.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Columns {
    Named(Vec<String>),
    First(usize),
    /// Not known, or DEFAULT is among the values.
    Unknown,
}

/// What was found in one piece of code.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[allow(clippy::struct_excessive_bools, reason = "independent observations")]
pub struct Code {
    /// Names before a parenthesis.
    pub calls: BTreeSet<Name>,
    /// Names after a dot and before no parenthesis: `t.f` can be `f(t)`.
    pub fields: BTreeSet<String>,
    /// All names: each may be a relation's.
    pub words: BTreeSet<String>,
    pub operators: BTreeSet<String>,
    pub inserts: BTreeSet<Insert>,
    /// Tables of UPDATE, DELETE, MERGE, and of INSERT.
    pub written: BTreeSet<Name>,
    /// Those of them that a statement may change several rows of.
    pub written_many: BTreeSet<Name>,
    /// Names that are called by statements that may go through several rows.
    pub called_many: BTreeSet<Name>,
    /// Settings that it reads.
    pub settings: BTreeSet<String>,
    /// Why it does something else on another server, or must not be done there at all.
    pub varies: Option<String>,
    /// Why it may do something else there.
    pub unproven: Option<String>,
    /// The same, unless the table of a query has a key for it.
    pub ordered: BTreeSet<Ordered>,
    /// The same of what only its client sees: it comes behind the RETURNING of the one thing that is written.
    pub output: Option<String>,
    /// It may do something that no name in it tells.
    pub acts: Option<String>,
    /// It may leave something in the session when its transaction has ended. Of code alone: of the client's own statement the tree tells.
    pub stays: Option<&'static str>,
    /// Columns that it gives the row of a trigger, as `NEW.a := ...`.
    pub assigned: BTreeSet<String>,
    /// It may give the row of a trigger any columns, as `NEW := ...` or `RETURN other`.
    pub assigns_all: bool,
    /// It catches errors, which may be those of a lock that was not free.
    pub catches_errors: bool,
    /// Variables of types that are compared for certain, and other ones that it declares.
    pub typed: BTreeSet<String>,
    pub declared: BTreeSet<String>,
    /// It takes the first row of something: what a function gives as a set may come in any order.
    pub takes_first: bool,
    /// What it does to one row depends on what is in tables, so on the rows before.
    pub reads: bool,
    float_aggregate: bool,
    floats: bool,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Word {
    /// In lower case.
    Plain(String),
    Quoted(String),
    Text(String),
    Symbol(u8),
    Integer,
    Other,
}

impl Word {
    fn plain(&self) -> Option<&str> {
        match self {
            Self::Plain(word) => Some(word),
            _ => None,
        }
    }

    pub(super) fn name(&self) -> Option<&str> {
        match self {
            Self::Plain(word) | Self::Quoted(word) => Some(word),
            _ => None,
        }
    }

    pub(super) fn is(&self, words: &[&str]) -> bool {
        self.plain().is_some_and(|word| words.contains(&word))
    }
}

pub(super) fn tokens(text: &str) -> Option<Vec<Word>> {
    let mut words = Vec::new();
    for token in Lexer::new(text).filter(|token| token.kind.is_significant()) {
        let part = text.get(token.range)?;
        // PostgreSQL cuts names at NAMEDATALEN.
        if part.len() > NAME_BYTES_MAX && matches!(token.kind, Kind::Word | Kind::QuotedIdentifier) {
            return None;
        }
        words.push(match token.kind {
            Kind::Word => Word::Plain(part.to_ascii_lowercase()),
            Kind::QuotedIdentifier if part.starts_with('"') => {
                Word::Quoted(part.get(1..part.len() - 1)?.replace("\"\"", "\""))
            }
            // U&"..": its name is not what is written
            Kind::QuotedIdentifier | Kind::Unterminated => return None,
            Kind::String => Word::Text(part.to_owned()),
            Kind::Integer | Kind::BigInteger => Word::Integer,
            Kind::Symbol => Word::Symbol(part.bytes().next().unwrap_or(b' ')),
            _ => Word::Other,
        });
    }
    Some(words)
}

/// Reads a piece of code. `outer`: the client's own statement, where values of the clock are put in as literals for followers.
#[must_use]
pub fn scan(text: &str, outer: bool) -> Code {
    let mut code = Code::default();
    let Some(words) = tokens(text) else {
        let why = "its text can not be read";
        (code.unproven, code.stays) = (Some(why.to_owned()), Some(why));
        return code;
    };
    let output = if outer { output(&words) } else { None };
    for at in 0..words.len() {
        let kept = code.unproven.clone();
        code.visit(&words, at, outer);
        if output.is_some_and(|output| at > output) && code.unproven != kept {
            let found = std::mem::replace(&mut code.unproven, kept);
            code.output = code.output.or(found);
        }
        if !outer {
            code.stays = code.stays.or_else(|| stays(&words, at));
        }
    }
    for statement in words.split(|word| *word == Word::Symbol(b';')) {
        code.statement(statement, outer);
    }
    if code.float_aggregate && code.floats {
        code.float_sum();
    }
    if !outer {
        (code.typed, code.declared) = first_rows::declared(&words);
    }
    if code.words.contains("variable_conflict")
        && let Some(query) = code.ordered.pop_first()
    {
        // What looks like a column may be a variable.
        code.open(query.why);
    }
    code
}

/// Where the part of a client's statement begins that nothing written depends on. With RECURSIVE what is written may read what comes later.
fn output(words: &[Word]) -> Option<usize> {
    let is = |at: usize, list: &[&str]| words.get(at).is_some_and(|word| word.is(list));
    let writes = (0..words.len()).filter(|at| match words[*at].plain() {
        Some("insert" | "merge") => is(at + 1, &["into"]),
        Some("delete") => is(at + 1, &["from"]),
        Some("update") => !at.checked_sub(1).is_some_and(|before| is(before, &["for", "key", "do", "on", "or"])),
        _ => false,
    });
    let write = writes.collect::<Vec<_>>();
    let returning = words.iter().position(|word| word.is(&["returning"]))?;
    let recursive = words.iter().any(|word| word.is(&["recursive"]));
    (write.len() == 1 && write.first()? < &returning && !recursive).then_some(returning)
}

/// The string that a literal stands for, if it is a plain one.
fn plain_text(literal: &str) -> Option<&str> {
    literal.strip_prefix('\'')?.strip_suffix('\'').filter(|text| !text.contains('\''))
}

impl Code {
    fn varies(&mut self, why: impl Into<String>) {
        self.varies.get_or_insert(why.into());
    }

    fn open(&mut self, why: impl Into<String>) {
        self.unproven.get_or_insert(why.into());
    }

    /// The order of a query's rows matters, whose word this is.
    fn order_matters(&mut self, words: &[Word], at: usize, outer: bool, why: &str) {
        self.takes_first = true;
        match first_rows::query(words, at, why).filter(|_| !outer) {
            Some(query) => drop(self.ordered.insert(query)),
            None => self.open(why),
        }
    }

    /// Takes in the arguments of a function, and those of them whose type is compared for certain. A name that is declared, too, is in doubt.
    pub fn type_arguments<'n>(
        &mut self,
        all: impl Iterator<Item = &'n String>,
        typed: impl Iterator<Item = &'n String>,
    ) {
        let all: BTreeSet<&String> = all.collect();
        let typed: Vec<&String> =
            typed.filter(|name| !self.declared.contains(*name) && !self.typed.contains(*name)).collect();
        self.typed.retain(|name| !all.contains(name));
        self.typed.extend(typed.into_iter().cloned());
    }

    fn acts(&mut self, why: impl Into<String>) {
        self.acts.get_or_insert(why.into());
    }

    /// What becomes of NEW. Another name for it, and another row in its place, count as everything.
    fn row_of_trigger(&mut self, words: &[Word], at: usize, word: &str, starts: bool) {
        let after = |n: usize| words.get(at + n);
        match word {
            "new" => {
                let before = at.checked_sub(1).and_then(|at| words.get(at));
                let given = starts
                    || before.is_some_and(|before| {
                        *before == Word::Symbol(b',') || before.is(&["into", "strict", "for", "foreach", "diagnostics"])
                    });
                match (given, after(1), after(2).and_then(Word::name)) {
                    (false, ..) => {}
                    (true, Some(Word::Symbol(b'.')), Some(column)) => drop(self.assigned.insert(column.to_owned())),
                    _ => self.assigns_all = true,
                }
            }
            "alias" => self.assigns_all = true,
            "return" => {
                let whole =
                    after(1).is_some_and(|next| next.is(&["new", "old", "null"]) || *next == Word::Symbol(b';'));
                self.assigns_all |= !(whole && matches!(after(2), None | Some(Word::Symbol(b';'))));
            }
            _ => {}
        }
    }

    fn float_sum(&mut self) {
        self.open("an aggregate over floating point numbers depends on the order in which a server finds rows");
    }

    /// A table that it uses has floating point numbers.
    pub fn has_floats(&mut self) {
        self.floats = true;
        if self.float_aggregate {
            self.float_sum();
        }
    }

    fn visit(&mut self, words: &[Word], at: usize, outer: bool) {
        let word = &words[at];
        let after = |n: usize| words.get(at + n);
        let before = at.checked_sub(1).and_then(|at| words.get(at));
        match word {
            Word::Text(text) if dates::looks_like_now(text) && !outer => {
                self.open(format!("{text} may be read as a time of the clock"));
            }
            Word::Text(_) | Word::Integer | Word::Other => return,
            Word::Symbol(symbol) => return self.operator(words, at, *symbol),
            _ => {}
        }
        let Some(name) = word.name() else { return };
        self.words.insert(name.to_owned());
        let dotted = before == Some(&Word::Symbol(b'.'));
        let schema = dotted.then(|| at.checked_sub(2).and_then(|at| words.get(at)?.name())).flatten();
        if after(1) == Some(&Word::Symbol(b'(')) {
            let name = Name { schema: schema.map(str::to_owned), name: name.to_owned() };
            self.call(&name, words, at);
            self.calls.insert(name);
        } else if dotted {
            self.fields.insert(name.to_owned());
        }
        if (dotted || word.plain().is_none()) && SYSTEM_COLUMNS.contains(&name) {
            self.open(format!("it reads the system column {name}"));
        }
        let Some(word) = word.plain().filter(|_| !dotted) else { return };
        let starts = starts_statement(before);
        if CLOCK.contains(&word) && !outer {
            self.varies(format!("it reads the clock ({word})"));
        }
        if matches!(word, "session_user" | "system_user") && !outer {
            self.varies(format!("{word} is another one on a follower"));
        }
        if matches!(word, "float" | "float4" | "float8" | "real" | "double") {
            self.floats = true;
        }
        if let Some((_, why)) = FORBIDDEN.iter().find(|(known, _)| *known == word).filter(|_| starts && !outer) {
            self.varies(*why);
            self.acts(*why);
        }
        self.row_of_trigger(words, at, word, starts);
        if matches!(word, "set" | "reset") && starts {
            self.set(words, at);
        }
        if let Some((_, why)) = OPEN.iter().find(|(known, _)| *known == word) {
            let harmless = match word {
                // DO NOTHING, DO UPDATE and DO INSTEAD are no code.
                "do" => outer || !starts,
                "move" | "truncate" | "prepare" => !starts,
                "over" => before != Some(&Word::Symbol(b')')),
                _ => false,
            };
            let ends_query = match word {
                "limit" | "offset" => true,
                "fetch" => after(1).is_some_and(|next| next.is(&["first", "next"])) && !starts,
                _ => false,
            };
            if ends_query {
                self.order_matters(words, at, outer, why);
            } else if !harmless {
                self.open(*why);
                if matches!(word, "execute" | "prepare" | "do" | "truncate") {
                    self.acts(*why);
                }
            }
        }
        match word {
            "exception" if after(1).is_some_and(|next| next.is(&["when"])) => self.catches_errors = true,
            "nowait" => self.varies("it uses NOWAIT, and locks are on the leader alone"),
            "skip" if after(1).is_some_and(|next| next.is(&["locked"])) => {
                self.varies("it uses SKIP LOCKED, and locks are on the leader alone");
            }
            "distinct" if after(1).is_some_and(|next| next.is(&["on"])) => {
                self.open("which rows DISTINCT ON gives depends on the order in which a server finds them");
            }
            "for" if starts || before.is_some_and(|before| *before == Word::Symbol(b'>')) => {
                self.for_loop(words, at, outer);
            }
            "open" | "cursor" if !outer => self.open("the rows of a cursor have no certain order"),
            _ => {}
        }
    }

    fn operator(&mut self, words: &[Word], at: usize, symbol: u8) {
        let is_operator = |word: &Word| matches!(word, Word::Symbol(byte) if b"+-*/<>=~!@#%^&|`?".contains(byte));
        if !is_operator(&Word::Symbol(symbol)) || at.checked_sub(1).is_some_and(|at| is_operator(&words[at])) {
            return;
        }
        let run = words.iter().skip(at).map_while(|word| match word {
            Word::Symbol(byte) if is_operator(word) => Some(char::from(*byte)),
            _ => None,
        });
        self.operators.insert(run.collect());
        self.floats |= matches!(symbol, b'^');
    }

    /// `FOR i IN 1..3` counts; `FOR r IN SELECT ...` goes through rows.
    fn for_loop(&mut self, words: &[Word], at: usize, outer: bool) {
        let body = words.iter().skip(at).take_while(|word| !word.is(&["loop"]));
        if body.into_iter().any(|word| word.is(&["select", "with", "values", "insert", "update", "delete", "table"])) {
            self.order_matters(words, at, outer, "a loop over rows depends on the order in which a server finds them");
        }
    }

    fn set(&mut self, words: &[Word], at: usize) {
        let named = words.iter().skip(at + 1).take(3).any(|word| {
            word.name().is_some_and(|name| {
                CLOSED_SETTINGS.contains(&name) || matches!(name, "session" | "all" | "transaction")
            })
        });
        if named {
            self.varies(CLOSED);
            self.acts(CLOSED);
        }
    }

    fn call(&mut self, name: &Name, words: &[Word], at: usize) {
        let first = words.get(at + 2);
        let literal = match first {
            Some(Word::Text(text)) => plain_text(text).map(str::to_lowercase),
            _ => None,
        };
        match (name.name.as_str(), literal) {
            ("current_setting", Some(setting)) => drop(self.settings.insert(setting)),
            ("array", _) => self.open("ARRAY(SELECT ...) depends on the order in which a server finds rows"),
            ("current_setting", None) => self.open("it reads a setting whose name is not in the text"),
            ("set_config", Some(setting)) if !CLOSED_SETTINGS.contains(&setting.as_str()) => {
                let conflict = setting.contains("variable_conflict").then(|| "variable_conflict".to_owned());
                self.words.extend(conflict);
            }
            ("set_config", _) => {
                self.varies(CLOSED);
                self.acts(CLOSED);
            }
            (name, _) if functions::is_order_dependent(name) => {
                self.open(format!("{name}() depends on the order in which a server finds rows"));
            }
            (name, _) if functions::is_float_aggregate(name) => self.float_aggregate = true,
            _ => {}
        }
    }

    /// One statement, up to a semicolon: what it writes, and whether it goes through rows.
    fn statement(&mut self, words: &[Word], outer: bool) {
        let many = words.iter().enumerate().any(|(at, word)| {
            let distinct = at.checked_sub(1).is_some_and(|at| words[at].is(&["distinct"]));
            word.is(MANY) && !(distinct && word.is(&["from"]))
        });
        self.reads |= many || words.iter().any(|word| word.is(&["perform", "call", "found"]));
        for (at, word) in words.iter().enumerate() {
            let next = |n: usize| words.get(at + n);
            let only = |n: usize| n + usize::from(next(n).is_some_and(|word| word.is(&["only"])));
            let previous = |list: &[&str]| at.checked_sub(1).is_some_and(|at| words[at].is(list));
            let place = match word.plain() {
                Some("insert" | "merge") if next(1).is_some_and(|word| word.is(&["into"])) => only(2),
                Some("delete") if next(1).is_some_and(|word| word.is(&["from"])) => only(2),
                Some("update")
                    if !previous(&["for", "key", "do", "on", "or"])
                        && !next(1).is_some_and(|w| w.is(&["set", "of"])) =>
                {
                    only(1)
                }
                Some("into") if !previous(&["insert", "merge"]) => {
                    self.into(words, at);
                    continue;
                }
                _ => {
                    if many && next(1) == Some(&Word::Symbol(b'(')) {
                        self.called_many.extend(word.name().map(|name| Name::new("", name)));
                    }
                    continue;
                }
            };
            let Some((table, rest)) = table_at(words, at + place) else { continue };
            if word.is(&["update"]) && !outer && first_rows::at_depth(words.get(rest..).unwrap_or_default(), &["from"])
            {
                self.open("UPDATE ... FROM takes the first of several rows that it finds for one");
            }
            if word.is(&["insert"]) {
                let columns = columns(words, rest);
                let values = words.iter().skip(rest).any(|word| word.is(&["values"]));
                if !values || many {
                    self.written_many.insert(table.clone());
                }
                self.inserts.insert(Insert { table: table.clone(), columns });
            } else {
                self.written_many.insert(table.clone());
                if words.iter().any(|word| word.is(&["default"])) || word.is(&["merge"]) {
                    self.inserts.insert(Insert { table: table.clone(), columns: Columns::Unknown });
                }
            }
            self.written.insert(table);
        }
    }

    /// `SELECT ... INTO variable` takes the first row that comes. RETURNING ... INTO and STRICT fail with several.
    fn into(&mut self, words: &[Word], at: usize) {
        self.takes_first = true;
        let strict = words.get(at + 1).is_some_and(|word| word.is(&["strict"]));
        let returning =
            first_rows::at_depth(&words[..at], &["returning"]) && !words.iter().any(|word| word.is(&["with"]));
        let one_row = first_rows::select_before(words, at).is_some_and(|select| first_rows::is_one_row(words, select))
            && !words.iter().any(|word| word.is(&["with"]));
        if !(strict || returning || one_row) {
            let why = "SELECT INTO takes the first row that a server finds, unless it is STRICT";
            // plpgsql takes INTO out of the text, wherever it stands: inside of parentheses it is not theirs. Of the client's own
            // statement it makes a table.
            let count = |symbol: u8| words[..at].iter().filter(|word| **word == Word::Symbol(symbol)).count();
            if count(b'(') == count(b')') { self.order_matters(words, at, false, why) } else { self.open(why) }
        }
    }
}

/// Whether a statement may start here.
fn starts_statement(before: Option<&Word>) -> bool {
    match before {
        None => true,
        Some(Word::Symbol(symbol)) => matches!(symbol, b';' | b'>'),
        Some(before) => before.is(&["begin", "then", "else", "loop"]),
    }
}

/// What the word at this place of code may leave in the session.
fn stays(words: &[Word], at: usize) -> Option<&'static str> {
    let after = |n: usize| words.get(at + n);
    let name = words[at].name()?;
    if after(1) == Some(&Word::Symbol(b'(')) {
        return match name {
            "set_config" if is_local(words, at + 1) => None,
            "set_config" => Some("it uses set_config() for the whole session"),
            _ => functions::stays(name),
        };
    }
    let word = words[at].plain()?;
    match word {
        "execute" => Some("it runs text that is put together at run time"),
        "hold" => Some("it declares a cursor WITH HOLD"),
        _ if !starts_statement(at.checked_sub(1).map(|before| &words[before])) => None,
        "set" if after(1).is_some_and(|next| next.is(&["local", "constraints", "transaction"])) => None,
        "set" | "reset" => Some("it uses SET for the whole session"),
        "prepare" => Some("it prepares a statement"),
        "do" => Some("it runs code inside of code"),
        _ => FORBIDDEN.iter().find(|(known, _)| *known == word).map(|(_, why)| *why),
    }
}

/// Whether the last argument of a call is a plain `true`; `open`: its parenthesis.
fn is_local(words: &[Word], open: usize) -> bool {
    let mut depth = 0_i32;
    for (at, word) in words.iter().enumerate().skip(open) {
        match word {
            Word::Symbol(b'(') => depth += 1,
            Word::Symbol(b')') => depth -= 1,
            _ => {}
        }
        if depth == 0 {
            return words[at - 2] == Word::Symbol(b',') && words[at - 1].is(&["true"]);
        }
    }
    false
}

/// A table's name, and where it ends.
fn table_at(words: &[Word], at: usize) -> Option<(Name, usize)> {
    let first = words.get(at)?.name()?;
    if words.get(at + 1) == Some(&Word::Symbol(b'.')) {
        let second = words.get(at + 2)?.name()?;
        return Some((Name::new(first, second), at + 3));
    }
    Some((Name::new("", first), at + 1))
}

/// Which columns an INSERT gives values for; `at`: after the table's name.
fn columns(words: &[Word], at: usize) -> Columns {
    if words.iter().skip(at).any(|word| word.is(&["default"])) {
        return Columns::Unknown;
    }
    let mut at = at;
    if words.get(at).is_some_and(|word| word.is(&["as"])) {
        at += 2;
    }
    let list = |open: usize| {
        let mut depth = 0_i32;
        let mut parts = 1;
        for (n, word) in words.iter().enumerate().skip(open) {
            match word {
                Word::Symbol(b'(') => depth += 1,
                Word::Symbol(b')') => depth -= 1,
                Word::Symbol(b',') if depth == 1 => parts += 1,
                // `NEW.*` is any number of values
                Word::Symbol(b'*') if n.checked_sub(1).is_some_and(|n| words[n] == Word::Symbol(b'.')) => return None,
                _ => {}
            }
            if depth == 0 {
                return Some((parts, n));
            }
        }
        None
    };
    if words.get(at) == Some(&Word::Symbol(b'('))
        && !words.get(at + 1).is_some_and(|word| word.is(&["select", "with", "values"]))
    {
        let Some((_, end)) = list(at) else { return Columns::Unknown };
        let names = words.get(at + 1..end).unwrap_or_default().split(|word| *word == Word::Symbol(b','));
        let names: Option<Vec<String>> = names.map(|name| name.first()?.name().map(str::to_owned)).collect();
        return names.map_or(Columns::Unknown, Columns::Named);
    }
    let values = words.iter().skip(at).position(|word| word.is(&["values"])).map(|n| at + n + 1);
    match values.and_then(list) {
        Some((parts, _)) => Columns::First(parts),
        None => Columns::Unknown,
    }
}

#[cfg(test)]
#[path = "scan_tests.rs"]
mod tests;
