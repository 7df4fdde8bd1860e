//! Texts of the catalog, as [`super::reach`] has them scanned.

use super::first_rows::{self, Ordered};
use super::scan::{Code, Word, scan, tokens};

/// Views, policies and rules become parts of a query: what they read they read once, with its snapshot, and not for one row after the
/// other. What they call is.
pub(super) fn part_of_query(text: &str) -> Code {
    let mut code = scan(text, false);
    code.reads = false;
    code
}

/// The statements of a function in SQL, also of one with BEGIN ATOMIC or RETURN, which the catalog gives with its head, as an empty one.
pub(super) fn sql_body(body: &str, has_head: bool) -> &str {
    if !has_head {
        return body;
    }
    ["\nBEGIN ATOMIC", "\nRETURN "].iter().find_map(|head| body.split_once(head)).map_or("", |(_, rest)| rest)
}

/// Which row a function in SQL gives that does not return a set.
pub(super) enum FirstRow {
    /// The only one, or none.
    Certain,
    /// The same everywhere if the table of its last query has a key for it.
    Ordered(Ordered),
    /// The first that its last query finds.
    Any(&'static str),
}

pub(super) fn first_row(body: &str) -> FirstRow {
    let why = "it takes the first row that its last query finds";
    let Some(words) = tokens(body) else { return FirstRow::Any(why) };
    let last = words.split(|word| *word == Word::Symbol(b';')).rfind(|part| !matches!(part, [] | [Word::Plain(_)]));
    let last = last.unwrap_or_default();
    let words = ["from", "returning", "table", "with", "union", "intersect", "except"];
    // Without RETURNING it gives none, and runs to its end (`init_execution_state` in functions.c).
    let changes = last.first().is_some_and(|word| word.is(&["insert", "update", "delete"]));
    if changes && !last.iter().any(|word| word.is(&["returning"])) {
        return FirstRow::Certain;
    }
    let reads = last.iter().any(|word| word.is(&words));
    if !reads || first_rows::is_one_row(last, 0) {
        return FirstRow::Certain;
    }
    first_rows::whole(last, why).map_or(FirstRow::Any(why), FirstRow::Ordered)
}
