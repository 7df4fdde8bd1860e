//! Queries of code whose first rows count, or whose rows come one after the other: when these are the same rows on every server.
//!
//! They are if the query is over one table and compares all columns of a unique key with values (one row at most), or orders by those that
//! it does not compare. What is read off the tokens here is only what the query says; that there is such a key, and that what looks like a
//! value is no column, is for the catalog to tell: [`Ordered::holds`].

use std::collections::BTreeSet;

use super::needs::Name;
use super::scan::Word;

/// A query over one table whose rows have a certain order, if the table has a key for it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Ordered {
    pub table: Name,
    /// Columns that are compared with a value.
    pub equal: BTreeSet<(String, Value)>,
    /// Columns that the rows are ordered by.
    pub ordered: BTreeSet<String>,
    /// Why the order matters.
    pub why: String,
}

/// What a column is compared with.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Value {
    /// Names in it: none of them may be a column.
    pub names: BTreeSet<String>,
    /// Its type is known: a literal, or cast to such a type by a plain name.
    pub is_typed: bool,
    /// It is nothing but this name: if it is a variable of such a type, its type is known, too.
    pub variable: Option<String>,
}

/// A unique key of a table.
#[derive(Clone, Debug, PartialEq, Eq, serde::Deserialize)]
pub struct Key {
    pub columns: Vec<String>,
    /// No column of it can be NULL, so that there are no equals in an order either.
    pub not_null: bool,
    /// Columns of types of which several values can be equal to one value of another type (`int8` and a float, `varchar` and a `character`): they
    /// are compared only with values whose type is known.
    pub blurred: Vec<String>,
    /// Columns of types of which none can be compared for certain.
    pub unsure: Vec<String>,
}

impl Ordered {
    /// Takes in variables whose type is known.
    pub fn know(&mut self, typed: &BTreeSet<String>) {
        self.equal = std::mem::take(&mut self.equal)
            .into_iter()
            .map(|(column, value)| {
                let is_typed = value.is_typed || value.variable.as_ref().is_some_and(|name| typed.contains(name));
                (column, Value { is_typed, ..value })
            })
            .collect();
    }

    /// Whether one of the keys makes it certain.
    #[must_use]
    pub fn holds(&self, columns: &BTreeSet<String>, keys: &[Key]) -> bool {
        keys.iter().any(|key| {
            let equal = |column: &String| {
                let fits = |value: &Value| {
                    value.names.is_disjoint(columns) && (value.is_typed || !key.blurred.contains(column))
                };
                !key.unsure.contains(column)
                    && self.equal.iter().any(|(compared, value)| compared == column && fits(value))
            };
            let in_order = |column: &String| key.not_null && self.ordered.contains(column);
            key.columns.iter().all(|column| equal(column) || in_order(column))
        })
    }
}

/// A query over one row: aggregates without groups. `select`: where it begins.
pub(super) fn is_one_row(words: &[Word], select: usize) -> bool {
    let query = words.get(select..end(words, select)).unwrap_or_default();
    // Bodies of functions need not be valid: they can begin with anything.
    if !query.first().is_some_and(|word| word.is(&["select"])) {
        return false;
    }
    let aggregate = query.get(1).is_some_and(|word| word.is(AGGREGATES)) && query.get(2) == Some(&Word::Symbol(b'('));
    // Without FROM there is one row, whatever is read inside of parentheses; of functions that return sets the catalog tells.
    let reads = at_depth(query, &["from"]);
    !at_depth(query, &["group", "union", "intersect", "except"]) && (aggregate || !reads)
}

/// Aggregates of PostgreSQL that give one row.
pub(super) const AGGREGATES: &[&str] = &["count", "sum", "max", "min", "bool_and", "bool_or", "every", "avg"];

/// Whether one of these words stands outside of parentheses.
pub(super) fn at_depth(words: &[Word], list: &[&str]) -> bool {
    let mut depth = 0_usize;
    words.iter().any(|word| {
        match word {
            Word::Symbol(b'(') => depth += 1,
            Word::Symbol(b')') => depth = depth.saturating_sub(1),
            _ => {}
        }
        depth == 0 && word.is(list)
    })
}

/// The query that the word at `at` belongs to, if it is one that can be certain. A loop's query comes after its word.
pub(super) fn query(words: &[Word], at: usize, why: &str) -> Option<Ordered> {
    let is_loop = words.get(at)?.is(&["for"]);
    let select = if is_loop {
        let select = at + 2 + words.get(at + 1..)?.iter().position(|word| word.is(&["in"]))?;
        is_names(words.get(at + 1..select - 1)?).then_some(select)?
    } else {
        select_before(words, at)?
    };
    let begins = match select.checked_sub(1).map(|before| &words[before]) {
        None | Some(Word::Symbol(b';' | b'(' | b'>')) => true,
        Some(word) => word.is(&["begin", "then", "else", "loop", "in", "query"]),
    };
    let end = end(words, select);
    // What a WITH calls like the table is another one.
    let is_plain = !words.iter().any(|word| word.is(&["with"]));
    (begins && is_plain && words.get(select)?.is(&["select"]) && (is_loop || at < end))
        .then(|| read(words.get(select..end)?, why))?
}

/// Names with dots and commas.
pub(super) fn is_names(words: &[Word]) -> bool {
    words.iter().all(|word| word.name().is_some() || matches!(word, Word::Symbol(b'.' | b',')))
}

/// The same of a statement that is nothing but a query.
pub(super) fn whole(words: &[Word], why: &str) -> Option<Ordered> {
    (words.first()?.is(&["select"]) && end(words, 0) == words.len()).then(|| read(words, why))?
}

/// The SELECT of the same depth before a word, in its statement.
pub(super) fn select_before(words: &[Word], at: usize) -> Option<usize> {
    let mut depth = 0_usize;
    for at in (0..at).rev() {
        match &words[at] {
            Word::Symbol(b';') => return None,
            Word::Symbol(b')') => depth += 1,
            Word::Symbol(b'(') => depth = depth.checked_sub(1)?,
            word if depth == 0 && word.is(&["select"]) => return Some(at),
            _ => {}
        }
    }
    None
}

/// Where a query ends: at a semicolon, the parenthesis around it, or the body of its loop.
fn end(words: &[Word], select: usize) -> usize {
    let mut depth = 0_usize;
    for (at, word) in words.iter().enumerate().skip(select) {
        match word {
            Word::Symbol(b'(') => depth += 1,
            Word::Symbol(b')') if depth == 0 => return at,
            Word::Symbol(b')') => depth -= 1,
            Word::Symbol(b';') => return at,
            word if depth == 0 && word.is(&["loop"]) => return at,
            _ => {}
        }
    }
    words.len()
}

/// Words that make a query another kind of query, wherever they stand.
const OTHER: &[&str] = &[
    "union",
    "intersect",
    "except",
    "group",
    "having",
    "distinct",
    "window",
    "over",
    "join",
    "tablesample",
    "with",
    "collate",
    "lateral",
    "ties",
    "perform",
    "return",
];
/// Each begins a part.
const PARTS: &[&str] = &["into", "from", "where", "order", "limit", "offset", "fetch", "for"];

fn read(query: &[Word], why: &str) -> Option<Ordered> {
    let has = |list: &[&str]| query.iter().skip(1).any(|word| word.is(list));
    // Without CASE that is another statement, which the query is only the beginning of.
    if has(&["select"]) || has(OTHER) || has(&["then", "else"]) && !has(&["case"]) {
        return None;
    }
    let parts = parts(query);
    let part = |name: &str| {
        let mut found = parts.iter().filter(|part| part[0].is(&[name]));
        let first = found.next();
        if found.next().is_some() { None } else { Some(first.map(|part| &part[1..])) }
    };
    // In the other places of INTO the list of what is selected is not where it is looked for.
    let into = parts.iter().position(|part| part[0].is(&["into"]));
    if into.is_some_and(|at| at != 1 || parts[0].len() < 2 || !is_names(&parts[at][1..])) {
        return None;
    }
    let (table, alias) = table(part("from")??)?;
    let mut ordered = Ordered { equal: BTreeSet::new(), ordered: BTreeSet::new(), why: why.to_owned(), table };
    let names: Vec<&str> = std::iter::once(ordered.table.name.as_str()).chain(alias.as_deref()).collect();
    // Behind an alias the table's own name means something else.
    let prefix = alias.as_deref().unwrap_or(&ordered.table.name).to_owned();
    let prefix = prefix.as_str();
    if let Some(condition) = part("where")? {
        ordered.equal = compared(condition, prefix, &names);
    }
    if let Some(order) = part("order")? {
        let (by, list) = order.split_first()?;
        if !by.is(&["by"]) {
            return None;
        }
        let selected = parts[0].get(1..).unwrap_or_default();
        let columns = split(list, |word| *word == Word::Symbol(b',')).into_iter();
        ordered.ordered = columns
            .filter_map(|item| ordered_by(item, prefix))
            .filter(|column| is_plain(selected, column, prefix))
            .collect();
    }
    part("into")?;
    Some(ordered)
}

/// Cuts at the words that begin parts, outside of parentheses; the first is the list of what is selected.
fn parts(query: &[Word]) -> Vec<&[Word]> {
    let mut depth = 0_usize;
    let mut parts = Vec::new();
    let mut begin = 0;
    for (at, word) in query.iter().enumerate() {
        match word {
            Word::Symbol(b'(') => depth += 1,
            Word::Symbol(b')') => depth = depth.saturating_sub(1),
            word if depth == 0 && word.is(PARTS) => {
                parts.push(&query[begin..at]);
                begin = at;
            }
            _ => {}
        }
    }
    parts.push(&query[begin..]);
    parts
}

/// Cuts at separators outside of parentheses.
fn split(words: &[Word], separates: impl Fn(&Word) -> bool) -> Vec<&[Word]> {
    let mut depth = 0_usize;
    words
        .split(|word| {
            match word {
                Word::Symbol(b'(' | b'[') => depth += 1,
                Word::Symbol(b')' | b']') => depth = depth.saturating_sub(1),
                _ => {}
            }
            depth == 0 && separates(word)
        })
        .collect()
}

/// One table and its alias.
fn table(from: &[Word]) -> Option<(Name, Option<String>)> {
    let from = match from.split_first() {
        Some((only, rest)) if only.is(&["only"]) => rest,
        _ => from,
    };
    let (table, rest) = match from {
        [schema, Word::Symbol(b'.'), name, rest @ ..] => (Name::new(schema.name()?, name.name()?), rest),
        [name, rest @ ..] => (Name::new("", name.name()?), rest),
        [] => return None,
    };
    let alias = match rest {
        [] => None,
        [alias] => Some(alias.name()?.to_owned()),
        [word, alias] if word.is(&["as"]) => Some(alias.name()?.to_owned()),
        _ => return None,
    };
    Some((table, alias))
}

/// A column of the table, by its name alone or behind the table's.
fn column(words: &[Word], table: &str) -> Option<String> {
    match words {
        [column] => column.name().map(str::to_owned),
        [of, Word::Symbol(b'.'), column] if of.name()? == table => column.name().map(str::to_owned),
        _ => None,
    }
}

/// The conditions that must all hold and compare a column with a value.
fn compared(condition: &[Word], prefix: &str, table: &[&str]) -> BTreeSet<(String, Value)> {
    let mut depth = 0_usize;
    let one_of_several = condition.iter().any(|word| {
        match word {
            Word::Symbol(b'(' | b'[') => depth += 1,
            Word::Symbol(b')' | b']') => depth = depth.saturating_sub(1),
            _ => {}
        }
        // AND belongs to BETWEEN there, or does not stand for all.
        depth == 0 && word.is(&["or", "between", "case", "current"])
    });
    if one_of_several {
        return BTreeSet::new();
    }
    let mut found = BTreeSet::new();
    for part in split(condition, |word| word.is(&["and"])) {
        let sides = split(part, |word| *word == Word::Symbol(b'='));
        let [left, right] = sides[..] else { continue };
        // `+=` and `=-` are operators of their own.
        if left.last().is_some_and(is_operator) || right.first().is_some_and(is_operator) {
            continue;
        }
        for (one, other) in [(left, right), (right, left)] {
            if let (Some(column), Some(names)) = (column(one, prefix), value(other, table)) {
                found.insert((column, names));
            }
        }
    }
    found
}

/// A value; `None`: it may be something else.
fn value(words: &[Word], table: &[&str]) -> Option<Value> {
    /// Functions that give the type of their arguments.
    const CALLS: &[&str] = &["coalesce", "lower", "upper", "greatest", "least", "nullif"];
    const RELATED: &[&str] = &[
        "any", "some", "all", "in", "is", "like", "ilike", "similar", "not", "and", "or", "notnull", "isnull", "row",
        "operator",
    ];
    let mut names = BTreeSet::new();
    for (at, word) in words.iter().enumerate() {
        let next = words.get(at + 1);
        let after_dot = at.checked_sub(1).is_some_and(|at| words[at] == Word::Symbol(b'.'));
        match word {
            Word::Text(_) | Word::Integer | Word::Other => {}
            Word::Symbol(symbol) if b"().,:[]+-".contains(symbol) => {}
            Word::Symbol(_) => return None,
            word => {
                let name = word.name()?;
                if word.is(RELATED) || next == Some(&Word::Symbol(b'(')) && !word.is(CALLS) {
                    return None;
                }
                if next == Some(&Word::Symbol(b'.')) {
                    // Of another row.
                    if table.contains(&name) {
                        return None;
                    }
                } else if !after_dot {
                    names.insert(name.to_owned());
                }
            }
        }
    }
    // The row itself is no value either.
    let is_value = !words.is_empty() && !table.iter().any(|name| names.contains(*name));
    let variable = match words {
        [name] => name.name().map(str::to_owned),
        _ => None,
    };
    is_value.then(|| Value { names, is_typed: is_typed(words), variable })
}

/// Their values equal no more than one value of `int8` and of `varchar`.
const TYPES: &[&str] = &["int", "integer", "bigint", "smallint", "int2", "int4", "int8", "text", "varchar"];

/// Variables that plpgsql declares with such a type, and with no other one anywhere; and all others that it declares.
pub(super) fn declared(words: &[Word]) -> (BTreeSet<String>, BTreeSet<String>) {
    let (mut typed, mut others) = (BTreeSet::new(), BTreeSet::new());
    for (at, word) in words.iter().enumerate() {
        let (Some(name), Some(before)) = (word.name(), at.checked_sub(1).map(|at| &words[at])) else { continue };
        if before.is(&["for", "foreach"]) {
            others.insert(name.to_owned());
        }
        let rest = words.get(at + 1..).unwrap_or_default();
        let rest = if rest.first().is_some_and(|word| word.is(&["constant"])) { &rest[1..] } else { rest };
        if !(before.is(&["declare"]) || *before == Word::Symbol(b';'))
            || rest.first().is_none_or(|of| of.name().is_none())
        {
            continue;
        }
        let is_typed = rest[0].is(TYPES)
            && rest
                .get(1)
                .is_some_and(|end| matches!(end, Word::Symbol(b';' | b':' | b'=')) || end.is(&["not", "default"]));
        if is_typed {
            typed.insert(name.to_owned())
        } else {
            others.insert(name.to_owned())
        };
    }
    (typed.difference(&others).cloned().collect(), others)
}

/// A literal without a fraction, or `name::type`.
fn is_typed(words: &[Word]) -> bool {
    match words {
        [Word::Text(text)] => text.starts_with('\''),
        [Word::Integer] => true,
        [value @ .., Word::Symbol(b':'), Word::Symbol(b':'), of] => {
            of.is(TYPES) && matches!(value, [_] | [_, Word::Symbol(b'.'), _])
        }
        _ => false,
    }
}

/// One item of ORDER BY, if it is a column.
fn ordered_by(item: &[Word], table: &str) -> Option<String> {
    let mut item = item;
    if let [rest @ .., nulls, which] = item
        && nulls.is(&["nulls"])
        && which.is(&["first", "last"])
    {
        item = rest;
    }
    if let [rest @ .., direction] = item
        && direction.is(&["asc", "desc"])
    {
        item = rest;
    }
    column(item, table)
}

/// Whether a name in ORDER BY means the column: nothing else that is selected can be called so. What has no name of its own gets one from
/// PostgreSQL.
fn is_plain(selected: &[Word], name: &str, table: &str) -> bool {
    split(selected, |word| *word == Word::Symbol(b',')).into_iter().all(|item| match item {
        [Word::Symbol(b'*')] => true,
        [of, Word::Symbol(b'.'), Word::Symbol(b'*')] => of.name() == Some(table),
        [.., word, alias] if word.is(&["as"]) => alias.name().is_some_and(|alias| alias != name),
        item => column(item, table).is_some(),
    })
}

fn is_operator(word: &Word) -> bool {
    matches!(word, Word::Symbol(byte) if b"+-*/<>=~!@#%^&|`?".contains(byte))
}

#[cfg(test)]
#[path = "first_rows_tests.rs"]
mod tests;
