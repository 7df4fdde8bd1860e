//! INSERT: point if every value is the same everywhere, else pinned; ON CONFLICT pinned, or ordered where it can not be.

use pg_query::NodeEnum;
use pg_query::protobuf::{InsertStmt, Node, OnConflictAction, OverridingKind, SelectStmt};

use super::classify::{Context, read};
use super::conditional::Depends;
use super::expressions::{Look, SessionValue};
use super::facts::{Column, DefaultKind, Relation};
use super::functions::Effect;
use super::once::{once, or_rows};
use super::parse::{tree, walk};
use super::pinned;
use super::plan::{EffectPlan, Lane, Refusal, Write};
use super::refuse::{not_yet, own_schema};
use super::rows::{self, NotRows};
use super::target::{ON_INSERT, ON_UPDATE, Target, behind_triggers, target};
use super::text::Edits;

pub(super) fn lane(statement: &InsertStmt, context: &Context<'_>) -> Lane {
    let updates = is_upsert(statement);
    let events = if updates { ON_INSERT | ON_UPDATE } else { ON_INSERT };
    let inner = context.look(&(&statement.with_clause, &statement.select_stmt, &statement.on_conflict_clause));
    let returning = context.look(&statement.returning_clause);
    if inner.own_schema || returning.own_schema {
        return own_schema();
    }
    let values = values(statement);
    let single = values.as_ref().is_some_and(|rows| rows.len() == 1);
    if inner.writes.is_some() {
        return once(context, false);
    }
    let relation = match target(statement.relation.as_ref(), events, context) {
        Target::Decided(lane) => return lane,
        Target::Once(_) => {
            let lane = once(context, single);
            let Some(relation) = behind_triggers(statement.relation.as_ref(), events, context) else { return lane };
            let rows = if updates {
                pinned::upsert(statement, relation, context)
            } else {
                pinned::insert(statement, relation, context)
            };
            let given_out = relation.sequences.iter().map(|fact| fact.column.clone());
            let fixed = if updates { pinned::fixed(relation) } else { Vec::new() };
            return or_rows(lane, rows.ok().flatten(), fixed.into_iter().chain(given_out).collect());
        }
        Target::Temporary => return read(inner.needs_guard() || returning.needs_guard()),
        Target::Table(relation) => relation,
    };
    if inner.missing || returning.missing {
        return read(true);
    }
    if may_write(&[&inner, &returning]).is_some() {
        return once(context, single);
    }
    if opaque_default(statement, relation).is_some() {
        return once(context, single);
    }
    let readable = relation.columns.iter().all(|column| column.generated || column.may_select);
    let certain = values.as_ref().and_then(|values| certainty(statement, values, relation, context));
    let write = match certain {
        Some(Certainty::Always) if statement.on_conflict_clause.is_none() => point(statement, relation, context),
        certain => {
            let mut made = if updates {
                pinned::upsert(statement, relation, context)
            } else {
                pinned::insert(statement, relation, context)
            };
            // One row only, and nothing that a plan is looked for: no subquery, no index for ON CONFLICT that a constant would have named.
            if let Ok(Some(write)) = &mut made
                && single
                && !inner.subqueries
                && statement.on_conflict_clause.is_none()
            {
                write.edits.share_returning(context.text, context.shape, &write.hidden_returning);
            }
            match (made, certain.filter(|_| statement.on_conflict_clause.is_some())) {
                (Ok(write), _) => Ok(write),
                (Err(why), Some(certain)) => ordered(statement, relation, &inner, &certain, &why, context),
                // Nothing of the row can be read back for followers.
                (Err(_), None) if !readable => return once(context, single),
                (Err(why), None) => Err(rows::refuse(
                    &format!("INSERT into {} with values that the leader chooses", relation.qualified()),
                    &why,
                )),
            }
        }
    };
    write.map_or_else(Lane::Refused, |write| {
        write.map_or_else(|| not_yet("this INSERT"), |write| Lane::Write(Box::new(write)))
    })
}

/// What may write, for a person.
pub(super) fn may_write(looks: &[&Look]) -> Option<String> {
    let bad = looks.iter().find(|look| look.effect >= Some(Effect::Unknown) || look.refused_setting.is_some())?;
    Some(bad.impure.clone().unwrap_or_else(|| "a function".to_owned()))
}

fn is_upsert(statement: &InsertStmt) -> bool {
    statement
        .on_conflict_clause
        .as_ref()
        .is_some_and(|clause| clause.action == OnConflictAction::OnconflictUpdate as i32)
}

/// A column that may be left to a default of which nothing is known.
fn opaque_default<'r>(statement: &InsertStmt, relation: &'r Relation) -> Option<&'r str> {
    let mut named = false;
    walk(&tree(&statement.select_stmt), &mut |kind, _| named |= kind == "SetToDefault");
    let given = columns(statement, relation).filter(|_| !statement.cols.is_empty()).unwrap_or_default();
    let count = values(statement).map(|rows| rows.iter().map(|row| row.len()).min().unwrap_or(0));
    let is_given = |at: usize, column: &Column| match &count {
        _ if !statement.cols.is_empty() => given.iter().any(|given| given.name == column.name),
        Some(count) => at < *count,
        None => false,
    };
    let opaque =
        |(at, column): &(usize, &Column)| column.default == DefaultKind::Opaque && (named || !is_given(*at, column));
    relation.columns.iter().enumerate().find(opaque).map(|(_, column)| column.name.as_str())
}

/// The rows of VALUES, or one row without values for DEFAULT VALUES. None: a query gives the rows.
fn values(statement: &InsertStmt) -> Option<Vec<&[Node]>> {
    let Some(source) = statement.select_stmt.as_ref() else { return Some(vec![&[]]) };
    let NodeEnum::SelectStmt(select) = source.node.as_ref()? else { return None };
    if !is_plain_values(select) || statement.with_clause.is_some() {
        return None;
    }
    let mut rows = Vec::with_capacity(select.values_lists.len());
    for node in &select.values_lists {
        let Some(NodeEnum::List(list)) = node.node.as_ref() else { return None };
        rows.push(list.items.as_slice());
    }
    Some(rows)
}

fn is_plain_values(select: &SelectStmt) -> bool {
    !select.values_lists.is_empty()
        && select.with_clause.is_none()
        && select.sort_clause.is_empty()
        && select.limit_count.is_none()
        && select.limit_offset.is_none()
        && select.larg.is_none()
        && select.locking_clause.is_empty()
}

/// How sure it is that the same text inserts the same rows everywhere.
enum Certainty {
    Always,
    /// If these values of the session are given as literals, and no literal or parameter is `'now'` or the like.
    With {
        session_values: Vec<SessionValue>,
        dates: bool,
    },
}

fn certainty(
    statement: &InsertStmt,
    rows: &[&[Node]],
    relation: &Relation,
    context: &Context<'_>,
) -> Option<Certainty> {
    if statement.r#override > OverridingKind::OverridingNotSet as i32 {
        return None;
    }
    let columns = columns(statement, relation)?;
    let given = rows.iter().map(|row| row.len()).max().unwrap_or(0);
    let filled = columns.get(..given.min(columns.len()))?;
    let omitted = relation.columns.iter().filter(|column| !filled.iter().any(|filled| filled.name == column.name));
    if !omitted.into_iter().all(Column::has_same_default) {
        return None;
    }
    let mut session_values = Vec::new();
    let mut dates = false;
    for row in rows {
        for (node, column) in row.iter().zip(&columns) {
            if matches!(node.node, Some(NodeEnum::SetToDefault(_))) {
                if !column.has_same_default() {
                    return None;
                }
                continue;
            }
            let found = context.look(node);
            if !found.is_pure() || found.subqueries || found.columns > 0 || found.order.is_some() || found.text_to_date
            {
                return None;
            }
            let has_texts = !found.strings.is_empty() || !found.parameters.is_empty();
            dates |= has_texts && (column.dates || found.dates);
            session_values.extend(found.session_values);
        }
    }
    Some(if session_values.is_empty() && !dates {
        Certainty::Always
    } else {
        Certainty::With { session_values, dates }
    })
}

/// The columns that the values are for, in order. None: there is one that the table has not, or a part of a column.
fn columns<'r>(statement: &InsertStmt, relation: &'r Relation) -> Option<Vec<&'r Column>> {
    if statement.cols.is_empty() {
        return Some(relation.columns.iter().collect());
    }
    let column = |node: &Node| match node.node.as_ref() {
        Some(NodeEnum::ResTarget(target)) if target.indirection.is_empty() => relation.column(&target.name),
        _ => None,
    };
    statement.cols.iter().map(column).collect()
}

fn write(statement: &InsertStmt, relation: &Relation, effect: EffectPlan, edits: Edits, hidden: Vec<String>) -> Write {
    Write {
        effect,
        hidden_returning: hidden,
        client_returning: statement.returning_clause.is_some(),
        ddl: false,
        depends: Depends::No,
        barrier: false,
        deferrable_constraints: relation.deferrable,
        edits,
    }
}

type Made = Result<Option<Write>, Refusal>;

#[allow(clippy::unnecessary_wraps, reason = "the same shape as its siblings")]
fn point(statement: &InsertStmt, relation: &Relation, context: &Context<'_>) -> Made {
    let Some((mut edits, hidden)) = Edits::find(context.text, context.shape, &[]) else { return Ok(None) };
    // One row only: the columns of several rows of VALUES are typed together, before they meet the table's.
    edits.share(context.text, context.shape, false);
    let effect = EffectPlan::Text {
        owner: Some(relation.owner_role()),
        counted: false,
        lock_tables: Vec::new(),
        dates_matter: false,
    };
    Ok(Some(write(statement, relation, effect, edits, hidden)))
}

/// ON CONFLICT by text, in an order that table locks give.
fn ordered(
    statement: &InsertStmt,
    relation: &Relation,
    inner: &Look,
    certain: &Certainty,
    why: &NotRows,
    context: &Context<'_>,
) -> Made {
    let clause = context.look(&statement.on_conflict_clause);
    let bad = clause.impure.clone().or_else(|| clause.order.clone()).or_else(|| clause.system_column.clone());
    if let Some(what) = bad {
        return Err(rows::refuse(&format!("INSERT ... ON CONFLICT with {what}"), why));
    }
    let sets = statement.on_conflict_clause.as_ref().map(|clause| clause.target_list.as_slice()).unwrap_or_default();
    if clause.subqueries || clause.text_to_date {
        return Err(rows::refuse("INSERT ... ON CONFLICT with a subquery or a cast of text to a date", why));
    }
    if let Some(column) = super::modify::impure_default(sets, relation) {
        return Err(rows::refuse(&format!("setting the column {column} to its DEFAULT"), why));
    }
    let mut session_values = match certain {
        Certainty::Always => Vec::new(),
        Certainty::With { session_values, .. } => session_values.clone(),
    };
    let mut dates = matches!(certain, Certainty::With { dates: true, .. });
    dates |= clause.dates && !(clause.strings.is_empty() && clause.parameters.is_empty());
    session_values.extend(clause.session_values);
    let Some((mut edits, hidden)) = Edits::find(context.text, context.shape, &session_values) else { return Ok(None) };
    if dates {
        edits.remember_dates(inner, context.text, context.shape);
    }
    let effect = EffectPlan::Text {
        owner: None,
        counted: true,
        lock_tables: vec![relation.oid],
        dates_matter: edits.has_dates(),
    };
    Ok(Some(Write { barrier: true, ..write(statement, relation, effect, edits, hidden) }))
}
