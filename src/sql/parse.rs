//! From a text to statements, with PostgreSQL's own parser. The texts of the statements stay byte ranges of the client's
//! text; nothing is ever printed back from the tree.

use std::ops::Range;

use pg_query::NodeEnum;
use serde_json::Value;

/// One statement of a text.
#[derive(Clone, Debug)]
pub struct Statement {
    /// Where it is in the text, in bytes, without the semicolon; may begin with white space and comments.
    pub range: Range<usize>,
    /// PostgreSQL's raw parse tree. Locations in it are bytes of the whole text.
    pub node: NodeEnum,
}

#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum ParseError {
    /// The server says it better: send the text to the leader, behind the guard.
    #[error("PostgreSQL's parser does not take the statement: {0}")]
    Syntax(String),
    /// A tree deeper than the decoder's limit, or a bug of the parser's binding.
    #[error("the statement's tree can not be read")]
    Tree,
    #[error("expected one statement, found {0}")]
    NotOne(usize),
}

/// The statements of a text in their order; none if there is nothing but white space, comments and semicolons.
pub fn parse(text: &str) -> Result<Vec<Statement>, ParseError> {
    // the binding indexes into trees that a client made up; a panic of it must not end a session
    let parsed =
        std::panic::catch_unwind(|| pg_query::parse(text, 0)).map_err(|_| ParseError::Tree)?.map_err(|error| {
            match error {
                pg_query::Error::Decode(_) => ParseError::Tree,
                other => ParseError::Syntax(other.to_string()),
            }
        })?;
    let mut statements = Vec::with_capacity(parsed.protobuf.stmts.len());
    for raw in parsed.protobuf.stmts {
        let start = usize::try_from(raw.stmt_location).map_err(|_| ParseError::Tree)?;
        let length = usize::try_from(raw.stmt_len).map_err(|_| ParseError::Tree)?;
        let end = if length == 0 { text.len() } else { start + length };
        if !text.is_char_boundary(start) || !text.is_char_boundary(end) {
            return Err(ParseError::Tree);
        }
        let node = raw.stmt.and_then(|node| node.node).ok_or(ParseError::Tree)?;
        statements.push(Statement { range: start..end, node });
    }
    Ok(statements)
}

/// The only statement of a text.
pub fn parse_one(text: &str) -> Result<Statement, ParseError> {
    let mut statements = parse(text)?;
    match (statements.len(), statements.pop()) {
        (1, Some(statement)) => Ok(statement),
        (count, _) => Err(ParseError::NotOne(count)),
    }
}

/// A part of the tree in a form that can be walked completely: pg_query's own walks miss calls in VALUES lists and elsewhere,
/// the derived serialization misses nothing.
#[must_use]
pub fn tree(part: &impl serde::Serialize) -> Value {
    // a tree of plain structs always serializes; if it did not, Null makes every caller refuse or guard
    serde_json::to_value(part).unwrap_or(Value::Null)
}

/// Calls `visit` for every object of the tree: with its node kind where it is a node, else with an empty one (structs that
/// are fields of their own kind, such as RangeVar and TypeName, are known by their fields).
pub fn walk<'t>(value: &'t Value, visit: &mut impl FnMut(&'t str, &'t serde_json::Map<String, Value>)) {
    match value {
        Value::Array(items) => items.iter().for_each(|item| walk(item, visit)),
        Value::Object(fields) => {
            for (name, field) in fields {
                let kind =
                    if name.starts_with(|letter: char| letter.is_ascii_uppercase()) { name.as_str() } else { "" };
                if let Value::Object(inner) = field {
                    visit(kind, inner);
                }
                walk(field, visit);
            }
            // objects in lists are nodes: {"node": {"FuncCall": {..}}}, met above
        }
        _ => {}
    }
}

/// The strings of a list of String nodes: a qualified name.
#[must_use]
pub fn names(list: Option<&Value>) -> Vec<&str> {
    let items = list.and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default();
    items.iter().filter_map(|item| item.pointer("/node/String/sval").and_then(Value::as_str)).collect()
}

/// The strings of a list of String nodes: a qualified name.
#[must_use]
pub fn node_names(list: &[pg_query::Node]) -> Vec<&str> {
    list.iter()
        .filter_map(|node| match node.node.as_ref() {
            Some(NodeEnum::String(string)) => Some(string.sval.as_str()),
            _ => None,
        })
        .collect()
}
