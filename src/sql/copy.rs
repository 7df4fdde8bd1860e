//! COPY FROM: the data go to the followers as they are, or with values of the leader's for the columns whose defaults vary. Those
//! of a file of the server are read by the proxy, so that all get the same.

use std::ops::Range;

use pg_query::NodeEnum;
use pg_query::protobuf::{CopyStmt, DefElem};

use super::classify::Context;
use super::conditional::Depends;
use super::copied_rows;
use super::copy_dates::CopyDates;
use super::copy_fill;
use super::ddl::is_on;
use super::facts::{Column, DefaultKind, Relation};
use super::lex::{Kind, Lexer, Token};
use super::once::{once, or_rows};
use super::parse::node_names;
use super::plan::{CopyText, EffectPlan, Lane, Refusal, Write};
use super::refuse::{not_yet, refusal};
use super::target::{ON_INSERT, Target, behind_triggers, target};
use super::text::Edits;

pub(super) fn from(statement: &CopyStmt, context: &Context<'_>) -> Lane {
    let options = options(statement);
    let freeze = options.iter().find(|option| option.defname == "freeze").copied();
    let server_file = !statement.filename.is_empty();
    let relation = match target(statement.relation.as_ref(), ON_INSERT, context) {
        Target::Decided(lane) => return lane,
        Target::Once(why) => {
            return match behind_triggers(statement.relation.as_ref(), ON_INSERT, context) {
                Some(relation) => rows_alone(relation, freeze, why, context),
                None => Lane::Refused(not_rows(why)),
            };
        }
        Target::Temporary => return Lane::Read { guard: false, copy_in: !server_file },
        Target::Table(relation) => relation,
    };
    if statement.where_clause.is_some() {
        let condition = context.look(&statement.where_clause);
        if condition.missing {
            return Lane::Read { guard: true, copy_in: false };
        }
        // the same rows everywhere, by their own values alone
        let clock = condition.dates && !condition.strings.is_empty() || !condition.session_values.is_empty();
        if condition.needs_guard() {
            return rows_alone(relation, freeze, "its condition calls a function that may write", context);
        }
        if !condition.is_pure() || clock || condition.text_to_date || condition.system_column.is_some() {
            return by_rows(relation, freeze);
        }
    }
    if statement.is_program {
        return by_rows(relation, freeze);
    }
    let listed = node_names(&statement.attlist);
    let given = |column: &Column| listed.is_empty() || listed.contains(&column.name.as_str());
    // COPY's own option DEFAULT (PostgreSQL 16) puts defaults in place of a marker in the data
    let markers = options.iter().any(|option| option.defname == "default");
    let varies = |column: &&Column| (markers || !given(column)) && !column.has_same_default();
    let left_out: Vec<&Column> = relation.columns.iter().filter(varies).collect();
    if left_out.iter().any(|column| column.default == DefaultKind::Opaque) {
        return rows_alone(relation, freeze, "a default of it calls a function that may write", context);
    }
    if server_file && !left_out.is_empty() {
        return by_rows(relation, freeze);
    }
    let mut text = context.text.to_owned();
    let mut fill = None;
    if !left_out.is_empty() {
        match copy_fill::fill(relation, &left_out, &listed, &options, context.text) {
            Ok(made) => {
                text.clone_from(&made.leader);
                fill = Some(Box::new(made));
            }
            Err(refusal) => {
                return copied_rows::write(relation, is_frozen(freeze)).map_or(Lane::Refused(refusal), carried);
            }
        }
    }
    let thawed = match freeze {
        None if fill.is_none() => None,
        None => Some(text),
        Some(option) => {
            // the option comes after the list of columns
            let moved = i32::try_from(text.len() - context.text.len()).unwrap_or(0);
            match without_freeze(&text, option, option.location + moved) {
                Some(text) => Some(text),
                None => return not_yet("this COPY"),
            }
        }
    };
    let text = if server_file {
        let text = thawed.as_deref().unwrap_or(context.text);
        match file_token(text) {
            Some(file) => CopyText::Instead(from_stdin(text, &file)),
            None => return not_yet("this COPY"),
        }
    } else {
        thawed.map_or(CopyText::AsIs, CopyText::Instead)
    };
    Lane::Write(Box::new(Write {
        effect: EffectPlan::Copy {
            owner: Some(relation.owner_role()),
            text,
            server_file,
            dates: dates(relation, &listed, &options),
            fill,
        },
        hidden_returning: Vec::new(),
        client_returning: false,
        ddl: false,
        depends: Depends::No,
        barrier: false,
        deferrable_constraints: relation.deferrable,
        edits: Edits::default(),
    }))
}

/// The leader copies, and followers get the rows that it stored.
fn by_rows(relation: &Relation, freeze: Option<&DefElem>) -> Lane {
    copied_rows::write(relation, is_frozen(freeze)).map_or_else(Lane::Refused, carried)
}

fn carried(write: Write) -> Lane {
    Lane::Write(Box::new(write))
}

fn is_frozen(freeze: Option<&DefElem>) -> bool {
    freeze.is_some_and(is_on)
}

/// The same if code that it calls or fires turns out to change nothing but the rows; else there is no way, and `why` is told.
fn rows_alone(relation: &Relation, freeze: Option<&DefElem>, why: &str, context: &Context<'_>) -> Lane {
    let write = match copied_rows::write(relation, is_frozen(freeze)) {
        Ok(write) => write,
        Err(refusal) => return Lane::Refused(refusal),
    };
    let mut lane = or_rows(once(context, false), Some(write), Vec::new());
    if let Lane::Once(once) = &mut lane
        && let Some(rows) = &mut once.rows
    {
        rows.or_refused = Some(not_rows(why));
    }
    lane
}

fn not_rows(why: &str) -> Refusal {
    refusal(
        format!("COPY into this table is not replicated by this version of pgtandem: {why}"),
        "Copy into a temporary table, then INSERT ... SELECT from there into a table without it, or use INSERT.",
    )
}

/// A file of the server that COPY FROM names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServerFile {
    pub path: String,
    /// The statement with STDIN in its place, and as many blanks as keep the positions of what follows.
    pub text: String,
}

/// The file of a COPY FROM. `None`: there is none.
#[must_use]
pub fn server_file(text: &str) -> Option<ServerFile> {
    let statement = super::parse::parse(text).ok()?.pop()?;
    let NodeEnum::CopyStmt(copy) = statement.node else { return None };
    let path = Some(copy.filename).filter(|path| !path.is_empty())?;
    Some(ServerFile { path, text: from_stdin(text, &file_token(text)?) })
}

/// The name of the file stands behind the first FROM outside of parentheses.
fn file_token(text: &str) -> Option<Range<usize>> {
    let mut depth = 0_i32;
    let mut tokens = Lexer::new(text).filter(|token| token.kind.is_significant());
    loop {
        let token = tokens.next()?;
        match (token.kind, text.get(token.range)?) {
            (Kind::Symbol, "(") => depth += 1,
            (Kind::Symbol, ")") => depth -= 1,
            (Kind::Word, word) if depth == 0 && word.eq_ignore_ascii_case("from") => {
                return tokens.next().map(|token| token.range);
            }
            _ => {}
        }
    }
}

fn from_stdin(text: &str, file: &Range<usize>) -> String {
    let length = text.get(file.clone()).map_or(0, |file| file.chars().count());
    let (before, after) = (text.get(..file.start).unwrap_or_default(), text.get(file.end..).unwrap_or_default());
    format!("{before}{:length$}{after}", "STDIN")
}

/// Where dates are in the data. The binary form has no words.
fn dates(relation: &Relation, listed: &[&str], options: &[&DefElem]) -> Option<CopyDates> {
    let text_of = |name: &str| {
        let option = options.iter().find(|option| option.defname == name)?;
        match option.arg.as_ref()?.node.as_ref()? {
            NodeEnum::String(text) => Some(text.sval.as_str()),
            _ => None,
        }
    };
    let byte_of = |name: &str| text_of(name).and_then(|text| text.bytes().next());
    let format = text_of("format").unwrap_or("text").to_ascii_lowercase();
    let is_date = |name: &str| relation.column(name).is_some_and(|column| column.dates);
    let all = relation.columns.iter().filter(|column| !column.generated).map(|column| column.name.as_str());
    let names: Vec<&str> = if listed.is_empty() { all.collect() } else { listed.to_vec() };
    let fields: Vec<usize> = names.iter().enumerate().filter(|(_, name)| is_date(name)).map(|(at, _)| at).collect();
    if fields.is_empty() || format == "binary" {
        return None;
    }
    let csv = format == "csv";
    let quote = byte_of("quote").unwrap_or(b'"');
    Some(CopyDates {
        fields,
        csv,
        delimiter: byte_of("delimiter").unwrap_or(if csv { b',' } else { b'\t' }),
        quote,
        escape: byte_of("escape").unwrap_or(quote),
    })
}

fn options(statement: &CopyStmt) -> Vec<&DefElem> {
    statement
        .options
        .iter()
        .filter_map(|node| match node.node.as_ref() {
            Some(NodeEnum::DefElem(option)) => Some(option.as_ref()),
            _ => None,
        })
        .collect()
}

/// FREEZE needs a table that was made in the same transaction, which a follower may see otherwise; it changes no content.
fn without_freeze(text: &str, option: &DefElem, location: i32) -> Option<String> {
    let start = usize::try_from(location).ok()?;
    let mut tokens = Lexer::new(text)
        .filter(|token| token.kind.is_significant())
        .skip_while(|token| token.range.start < start)
        .peekable();
    let name = tokens.next()?;
    let value =
        tokens.peek().and_then(|token: &Token| Some((token.range.clone(), token.kind, text.get(token.range.clone())?)));
    if !is_on(option) {
        return Some(text.to_owned());
    }
    match value {
        // (FREEZE), (FREEZE, ...)
        Some((_, Kind::Symbol, ")" | ",")) => {
            Some(format!("{} off{}", text.get(..name.range.end)?, text.get(name.range.end..)?))
        }
        Some((range, Kind::Word | Kind::Integer | Kind::String, word)) if is_value(word) => {
            Some(format!("{}off{}", text.get(..range.start)?, text.get(range.end..)?))
        }
        // without parentheses; it may be the last word or before another one
        Some(_) | None => Some(format!("{}{}", text.get(..name.range.start)?, text.get(name.range.end..)?)),
    }
}

fn is_value(word: &str) -> bool {
    let word = word.trim_matches('\'');
    ["on", "true", "1"].iter().any(|known| known.eq_ignore_ascii_case(word))
}
