//! UPDATE ... FROM on a table whose rows can not be named: if a row is joined with several of the others, any of them may give the new
//! values, and each server takes the first that it finds. So either the values do not come from the others, or the leader is asked
//! whether there is such a row, when all tables are locked.

use pg_query::protobuf::{RangeVar, SelectStmt, UpdateStmt};
use pg_query::{DeparseOptions, NodeEnum};
use serde_json::Value;

use super::facts::{Relation, quote_identifier};
use super::modify::Modify;
use super::parse::{names, parse_one, tree, walk};

/// The new values are made of the row itself and of constants.
pub(super) fn values_are_the_rows_own(modify: &Modify<'_>, relation: &Relation) -> bool {
    let Some(target) = modify.relation else { return false };
    let own_name = name_of(target);
    let mut own = true;
    walk(&tree(&modify.sets), &mut |kind, fields| match kind {
        "SubLink" => own = false,
        "ColumnRef" => {
            let count = fields.get("fields").and_then(Value::as_array).map_or(0, Vec::len);
            let parts = names(fields.get("fields"));
            own &= parts.len() == count
                && match parts.as_slice() {
                    [column] => relation.column(column).is_some(),
                    [qualifier, column] => *qualifier == own_name && relation.column(column).is_some(),
                    _ => false,
                };
        }
        _ => {}
    });
    own
}

fn name_of(target: &RangeVar) -> &str {
    target.alias.as_ref().map_or(&target.relname, |alias| &alias.aliasname)
}

/// Asks whether a row would be joined with several: one row of one text if so.
#[must_use]
pub fn question(update: &str) -> Option<String> {
    let NodeEnum::UpdateStmt(update) = parse_one(update).ok()?.node else { return None };
    let UpdateStmt { relation: Some(target), from_clause, where_clause, with_clause, .. } = *update else {
        return None;
    };
    let name = quote_identifier(name_of(&target));
    let template = format!(
        "SELECT 'several'::pg_catalog.text FROM t GROUP BY {name}.tableoid, {name}.ctid \
         HAVING pg_catalog.count(*) OPERATOR(pg_catalog.>) 1::pg_catalog.int8 LIMIT 1"
    );
    let NodeEnum::SelectStmt(template) = parse_one(&template).ok()?.node else { return None };
    let mut sources = vec![NodeEnum::RangeVar(target).into_node()];
    sources.extend(from_clause);
    let query = SelectStmt { from_clause: sources, where_clause, with_clause, ..*template };
    NodeEnum::SelectStmt(Box::new(query)).deparse(DeparseOptions::default()).ok()
}

/// A node of a list.
trait IntoNode {
    fn into_node(self) -> pg_query::protobuf::Node;
}

impl IntoNode for NodeEnum {
    fn into_node(self) -> pg_query::protobuf::Node {
        pg_query::protobuf::Node { node: Some(self) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_question_joins_the_same_rows() {
        let asked = question(
            "WITH w AS (SELECT 1 AS a) UPDATE ONLY s.t AS x SET v = w.a FROM w, (VALUES (1, 'it''s')) AS y (i, j) WHERE x.id = y.i \
             RETURNING *",
        )
        .unwrap();
        assert!(
            asked.starts_with("WITH w AS (SELECT 1 AS a) SELECT 'several'::pg_catalog.text FROM ONLY s.t x, w,"),
            "{asked}"
        );
        assert!(asked.contains("(VALUES (1, 'it''s')) y(i, j) WHERE x.id = y.i GROUP BY"), "{asked}");
        assert!(asked.contains("tableoid") && asked.ends_with("LIMIT 1"), "{asked}");
        assert!(question("SELECT 1").is_none());
    }
}
