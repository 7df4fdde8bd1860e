//! MERGE: in the order of table locks, as text, because it can not return what it changed before PostgreSQL 17. All that it reads
//! and writes is locked first, so the same text finds the same rows on a follower; the number of rows is compared.

use pg_query::NodeEnum;
use pg_query::protobuf::{CmdType, MergeStmt, MergeWhenClause, Node};

use super::classify::{Context, read};
use super::conditional::Depends;
use super::expressions::Look;
use super::facts::{Column, DefaultKind, Relation};
use super::insert::may_write;
use super::modify::{impure_default, update_events};
use super::once::once;
use super::plan::{EffectPlan, Lane, Refusal, Write};
use super::refuse::{not_yet, own_schema, refusal, refused};
use super::target::{ON_DELETE, ON_INSERT, Target, target};
use super::text::Edits;

const INSTEAD: &str = "Use INSERT ... ON CONFLICT, or UPDATE and INSERT in one transaction.";

pub(super) fn lane(statement: &MergeStmt, context: &Context<'_>) -> Lane {
    let found = context.look(&(
        &statement.source_relation,
        &statement.join_condition,
        &statement.merge_when_clauses,
        &statement.with_clause,
        &statement.returning_clause,
    ));
    if found.own_schema {
        return own_schema();
    }
    if found.writes.is_some() {
        return once(context, false);
    }
    let clauses: Vec<&MergeWhenClause> = statement
        .merge_when_clauses
        .iter()
        .filter_map(|node| match node.node.as_ref() {
            Some(NodeEnum::MergeWhenClause(clause)) => Some(clause.as_ref()),
            _ => None,
        })
        .collect();
    let relation = match target(statement.relation.as_ref(), events(statement, &clauses, context), context) {
        Target::Decided(lane) => return lane,
        Target::Once(_) => return once(context, false),
        Target::Temporary => return read(found.needs_guard()),
        Target::Table(relation) => relation,
    };
    if found.missing {
        return read(true);
    }
    if may_write(&[&found]).is_some() {
        return once(context, false);
    }
    if statement.returning_clause.is_some() {
        return refused("MERGE ... RETURNING is not replicated by this version of pgtandem", INSTEAD);
    }
    let lock_tables = match judge(&clauses, &found, relation, context) {
        Ok(tables) => tables,
        Err(refusal) => return Lane::Refused(refusal),
    };
    let Some((mut edits, asked)) = Edits::find(context.text, context.shape, &found.session_values) else {
        return not_yet("this MERGE");
    };
    edits.remember_dates(&found, context.text, context.shape);
    (edits.asked, edits.compare_count) = (asked, true);
    Lane::Write(Box::new(Write {
        effect: EffectPlan::Text { owner: None, counted: false, lock_tables, dates_matter: edits.has_dates() },
        hidden_returning: Vec::new(),
        client_returning: false,
        ddl: false,
        depends: Depends::No,
        barrier: true,
        deferrable_constraints: relation.deferrable,
        edits,
    }))
}

fn command(clause: &MergeWhenClause) -> Option<CmdType> {
    CmdType::try_from(clause.command_type).ok()
}

fn events(statement: &MergeStmt, clauses: &[&MergeWhenClause], context: &Context<'_>) -> u32 {
    clauses.iter().fold(0, |events, clause| {
        events
            | match command(clause) {
                Some(CmdType::CmdInsert) => ON_INSERT,
                Some(CmdType::CmdUpdate) => update_events(statement.relation.as_ref(), &clause.target_list, context),
                Some(CmdType::CmdDelete) => ON_DELETE,
                _ => 0,
            }
    })
}

/// The tables to lock, or why the same text could do something else on a follower.
fn judge(
    clauses: &[&MergeWhenClause],
    found: &Look,
    relation: &Relation,
    context: &Context<'_>,
) -> Result<Vec<u32>, Refusal> {
    let differs = found.impure.as_ref().filter(|_| !found.is_pure()).or(found.order.as_ref());
    let differs = differs.or(found.system_column.as_ref()).cloned();
    let differs = differs.or_else(|| found.locks_rows.then(|| "FOR UPDATE".to_owned()));
    let differs = differs.or_else(|| found.text_to_date.then(|| "a cast of text to a date".to_owned()));
    let clock = found.session_values.iter().any(|value| value.hidden.contains("statement_timestamp"));
    let differs = differs.or_else(|| clock.then(|| "statement_timestamp()".to_owned()));
    if let Some(what) = differs {
        return Err(refusal(
            format!(
                "MERGE with {what} is not replicated by this version of pgtandem: it may find or give others on another server"
            ),
            INSTEAD,
        ));
    }
    for clause in clauses {
        let column = match command(clause) {
            Some(CmdType::CmdInsert) => varying_default(clause, relation),
            _ => impure_default(&clause.target_list, relation),
        };
        if let Some(column) = column {
            return Err(refusal(
                format!(
                    "MERGE that sets the column {column} to its default is not replicated by this version of pgtandem: it varies"
                ),
                "Give the value.",
            ));
        }
    }
    let mut tables = vec![relation.oid];
    for name in &found.relations {
        let Some(source) = context.facts.relations.get(name) else { continue };
        if source.is_temporary() || !source.is_table() || source.is_system() || source.foreign || source.rls {
            return Err(refusal(
                format!(
                    "MERGE that reads {name}, which is no ordinary permanent table, is not replicated by this version of pgtandem"
                ),
                INSTEAD,
            ));
        }
        tables.push(source.oid);
    }
    tables.sort_unstable();
    tables.dedup();
    Ok(tables)
}

/// A column that an INSERT leaves to a default which varies.
fn varying_default<'r>(clause: &MergeWhenClause, relation: &'r Relation) -> Option<&'r str> {
    let is_default = |node: &Node| matches!(node.node, Some(NodeEnum::SetToDefault(_)));
    let named: Vec<&str> = clause
        .target_list
        .iter()
        .filter_map(|node| match node.node.as_ref() {
            Some(NodeEnum::ResTarget(target)) => Some(target.name.as_str()),
            _ => None,
        })
        .collect();
    let all = relation.columns.iter().map(|column| column.name.as_str());
    let names: Vec<&str> = if named.is_empty() { all.collect() } else { named };
    let given = |column: &Column| {
        names.iter().zip(&clause.values).any(|(name, value)| *name == column.name && !is_default(value))
    };
    let varies = |column: &&Column| {
        !column.generated && (column.identity || column.default == DefaultKind::Other) && !given(column)
    };
    relation.columns.iter().find(varies).map(|column| column.name.as_str())
}
