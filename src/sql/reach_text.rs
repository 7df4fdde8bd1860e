//! Texts of the catalog, as [`super::reach`] has them scanned.

use super::scan::{Code, scan};

/// Views, policies and rules become parts of a query: what they read they read once, with its snapshot, and not for one row after the
/// other. What they call is.
pub(super) fn part_of_query(text: &str) -> Code {
    let mut code = scan(text, false);
    code.reads = false;
    code
}

/// The statements of a function in SQL, also of one with BEGIN ATOMIC or RETURN, which the catalog gives with its head. An empty body is
/// given so, too.
pub(super) fn sql_body(body: &str) -> &str {
    if !body.starts_with("CREATE OR REPLACE") {
        return body;
    }
    ["\nBEGIN ATOMIC", "\nRETURN "].iter().find_map(|head| body.split_once(head)).map_or("", |(_, rest)| rest)
}

/// Whether a query may give several rows, of which a function would take the first.
pub(super) fn first_row(query: &str) -> bool {
    let words: Vec<String> = query.split_whitespace().map(str::to_lowercase).collect();
    let aggregate = words.get(1).is_some_and(|word| {
        ["count(", "sum(", "max(", "min(", "exists", "bool_or(", "bool_and("].iter().any(|head| word.starts_with(head))
    });
    words.iter().any(|word| word == "from" || word == "returning") && !aggregate
}
