//! UPDATE and DELETE: point if one row is named by its whole primary key and the rest depends on that row alone; else pinned, by
//! the rows that the leader changed; where those can not be had, ordered by locks on all tables that are read or written; else refused.

use pg_query::NodeEnum;
use pg_query::protobuf::{
    AExprKind, BoolExprType, DeleteStmt, Node, RangeVar, ReturningClause, UpdateStmt, WithClause,
};

use super::classify::{Context, read};
use super::conditional::Depends;
use super::expressions::Look;
use super::facts::{DefaultKind, Relation};
use super::insert::may_write;
use super::matches;
use super::needs::Name;
use super::once::{once, or_rows};
use super::parse::{node_names, tree, walk};
use super::plan::{EffectPlan, Lane, Refusal, Write};
use super::refuse::{not_yet, own_schema};
use super::rows::NotRows;
use super::target::{ON_DELETE, ON_INSERT, ON_UPDATE, Target, behind_triggers, target};
use super::text::Edits;

/// What UPDATE and DELETE have in common.
pub(super) struct Modify<'s> {
    verb: &'static str,
    pub relation: Option<&'s RangeVar>,
    /// SET; empty for DELETE
    pub sets: &'s [Node],
    condition: Option<&'s Node>,
    /// FROM or USING
    sources: &'s [Node],
    pub returning: Option<&'s ReturningClause>,
    with: Option<&'s WithClause>,
    events: u32,
}

pub(super) fn update(statement: &UpdateStmt, context: &Context<'_>) -> Lane {
    let modify = Modify {
        verb: "UPDATE",
        relation: statement.relation.as_ref(),
        sets: &statement.target_list,
        condition: statement.where_clause.as_deref(),
        sources: &statement.from_clause,
        returning: statement.returning_clause.as_ref(),
        with: statement.with_clause.as_ref(),
        events: update_events(statement.relation.as_ref(), &statement.target_list, context),
    };
    lane(&modify, context)
}

/// The triggers that an UPDATE can fire: one that moves a row to another partition is a DELETE there and an INSERT here.
pub(super) fn update_events(relation: Option<&RangeVar>, sets: &[Node], context: &Context<'_>) -> u32 {
    let relation = relation.and_then(|named| context.facts.relation(&named.schemaname, &named.relname));
    let moves = relation.is_some_and(|relation| {
        set_columns(sets).any(|name| relation.partition_columns.iter().any(|column| column == name))
    });
    if moves { ON_UPDATE | ON_INSERT | ON_DELETE } else { ON_UPDATE }
}

pub(super) fn delete(statement: &DeleteStmt, context: &Context<'_>) -> Lane {
    let modify = Modify {
        verb: "DELETE",
        relation: statement.relation.as_ref(),
        sets: &[],
        condition: statement.where_clause.as_deref(),
        sources: &statement.using_clause,
        returning: statement.returning_clause.as_ref(),
        with: statement.with_clause.as_ref(),
        events: ON_DELETE,
    };
    lane(&modify, context)
}

fn lane(modify: &Modify<'_>, context: &Context<'_>) -> Lane {
    let inner = context.look(&(modify.sets, modify.condition, modify.sources, modify.with));
    let returning = context.look(&modify.returning);
    if inner.own_schema || returning.own_schema {
        return own_schema();
    }
    if inner.writes.is_some() {
        return once(context, false);
    }
    let relation = match target(modify.relation, modify.events, context) {
        Target::Decided(lane) => return lane,
        Target::Once(_) => {
            let facts = modify.relation.and_then(|named| context.facts.relation(&named.schemaname, &named.relname));
            let lane = once(context, facts.is_some_and(|relation| is_point(modify, &inner, relation)));
            let Some(relation) = behind_triggers(modify.relation, modify.events, context) else { return lane };
            let known = set_columns(modify.sets).all(|name| relation.column(name).is_some());
            let rows = known.then(|| super::pinned::modify_behind_triggers(modify, relation, context)).flatten();
            return match rows {
                Some((write, fixed)) => or_rows(lane, Some(write), fixed),
                None => lane,
            };
        }
        Target::Temporary => return read(inner.needs_guard() || returning.needs_guard()),
        Target::Table(relation) => relation,
    };
    if inner.missing || returning.missing {
        return read(true);
    }
    if may_write(&[&inner, &returning]).is_some() {
        return once(context, is_point(modify, &inner, relation));
    }
    if set_columns(modify.sets).any(|name| relation.column(name).is_none()) {
        // the server says so, and better before it meets the hidden RETURNING
        return read(true);
    }
    let opaque = |name: &str| relation.column(name).is_some_and(|column| column.default == DefaultKind::Opaque);
    if impure_default(modify.sets, relation).is_some_and(opaque) {
        return once(context, is_point(modify, &inner, relation));
    }
    let varies = what_varies(modify, &inner, relation);
    let made = if varies.is_none() && is_point(modify, &inner, relation) {
        text(modify, &inner, relation, None, context)
    } else {
        match super::pinned::modify(modify, relation, context) {
            Ok(write) => write,
            Err(why) => match ordered(modify, &inner, relation, varies.as_deref(), &why, context) {
                Ok(write) => write,
                Err(refusal) => return Lane::Refused(refusal),
            },
        }
    };
    made.map_or_else(|| not_yet("this statement"), |write| Lane::Write(Box::new(write)))
}

/// By text, in an order that table locks give.
fn ordered(
    modify: &Modify<'_>,
    inner: &Look,
    relation: &Relation,
    varies: Option<&str>,
    why: &NotRows,
    context: &Context<'_>,
) -> Result<Option<Write>, Refusal> {
    if let Some(varies) = varies {
        return Err(super::rows::refuse(&format!("{} with {varies}", modify.verb), why));
    }
    if let Some(column) = depends_on_row_order(modify, relation) {
        return Err(Refusal {
            message: format!(
                "{} is not replicated by this version of pgtandem: it moves {column}, which is unique, from row to row, and whether that \
                 works depends on the order in which a server finds the rows",
                modify.verb
            ),
            hint: "Change one row at a time, by its whole primary key, or set constants.".to_owned(),
        });
    }
    let tables = tables_to_lock(modify, inner, relation, why, context)?;
    Ok(text(modify, inner, relation, Some(tables), context).map(|mut write| {
        write.edits.ask_matches = may_match_several(modify, relation, context);
        write
    }))
}

/// The statement's own text, for one row or with the tables to be locked.
fn text(
    modify: &Modify<'_>,
    inner: &Look,
    relation: &Relation,
    lock_tables: Option<Vec<u32>>,
    context: &Context<'_>,
) -> Option<Write> {
    let point = lock_tables.is_none();
    let (mut edits, hidden) = Edits::find(context.text, context.shape, &inner.session_values)?;
    remember_dates(&mut edits, modify, relation, context);
    if point {
        edits.share(context.text, context.shape, true);
    }
    let effect = EffectPlan::Text {
        owner: point.then(|| relation.owner_role()),
        counted: true,
        lock_tables: lock_tables.unwrap_or_default(),
        dates_matter: edits.has_dates(),
    };
    let cascades = if modify.sets.is_empty() {
        relation.cascade_delete
    } else {
        set_columns(modify.sets).any(|name| relation.cascade_update.iter().any(|column| column == name))
    };
    Some(Write {
        effect,
        hidden_returning: hidden,
        client_returning: modify.returning.is_some(),
        ddl: false,
        depends: Depends::No,
        barrier: !point || cascades,
        deferrable_constraints: relation.deferrable,
        edits,
    })
}

/// Notes the strings and parameters that may be read as dates. Each SET and each condition is judged on its own, so that
/// `SET note = 'now', at = $1` minds only `$1`.
fn remember_dates(edits: &mut Edits, modify: &Modify<'_>, relation: &Relation, context: &Context<'_>) {
    let mut remember = |part: &Look, dates: bool| {
        if dates || part.dates {
            edits.remember_dates(part, context.text, context.shape);
        }
    };
    for set in modify.sets {
        let column = match set.node.as_ref() {
            Some(NodeEnum::ResTarget(target)) => relation.column(&target.name),
            _ => None,
        };
        remember(&context.look(set), column.is_none_or(|column| column.dates));
    }
    let mut conditions = Vec::new();
    modify.condition.iter().for_each(|condition| conjuncts(condition, &mut conditions));
    for condition in conditions {
        remember(&context.look(condition), false);
    }
    remember(&context.look(&(modify.sources, modify.with)), false);
}

/// The parts of a condition that AND joins.
fn conjuncts<'n>(condition: &'n Node, found: &mut Vec<&'n Node>) {
    match condition.node.as_ref() {
        Some(NodeEnum::BoolExpr(both)) if both.boolop == BoolExprType::AndExpr as i32 => {
            both.args.iter().for_each(|part| conjuncts(part, found));
        }
        _ => found.push(condition),
    }
}

pub(super) fn set_columns(sets: &[Node]) -> impl Iterator<Item = &str> {
    sets.iter().filter_map(|node| match node.node.as_ref() {
        Some(NodeEnum::ResTarget(target)) => Some(target.name.as_str()),
        _ => None,
    })
}

/// A column that is set to its DEFAULT, which is not immutable.
pub(super) fn impure_default<'r>(sets: &[Node], relation: &'r Relation) -> Option<&'r str> {
    let targets = sets.iter().filter_map(|node| match node.node.as_ref() {
        Some(NodeEnum::ResTarget(target)) => Some(target),
        _ => None,
    });
    for target in targets {
        let mut default = false;
        walk(&tree(&target.val), &mut |kind, _| default |= kind == "SetToDefault");
        let column = relation.column(&target.name);
        if let Some(column) = column.filter(|column| default && !column.has_same_default()) {
            return Some(&column.name);
        }
    }
    None
}

/// What neither the point nor the ordered lane carries, for a person.
fn what_varies(modify: &Modify<'_>, inner: &Look, relation: &Relation) -> Option<String> {
    let reason = if let Some(what) = inner.impure.as_ref().filter(|_| !inner.is_pure()) {
        format!("{what}, whose result is another one on another server")
    } else if let Some(what) = &inner.order {
        format!("{what}: which rows are meant depends on the order in which a server finds them")
    } else if let Some(column) = &inner.system_column {
        format!("the system column {column}, which differs from server to server")
    } else if inner.locks_rows {
        "FOR UPDATE or FOR SHARE inside it".to_owned()
    } else if inner.text_to_date {
        "a cast of text from a table to a date or time type, where the text may be 'now'".to_owned()
    } else if let Some(column) = impure_default(modify.sets, relation) {
        format!("DEFAULT for the column {column}, which is another value on another server")
    } else {
        return None;
    };
    Some(reason)
}

/// The whole primary key is given by constants, and the rest depends on the row alone.
fn is_point(modify: &Modify<'_>, inner: &Look, relation: &Relation) -> bool {
    let inherits = relation.children && modify.relation.is_none_or(|relation| relation.inh);
    if relation.key.is_empty()
        || inherits
        || !modify.sources.is_empty()
        || modify.with.is_some()
        || inner.subqueries
        || set_columns(modify.sets).any(|name| relation.key.iter().any(|key| key == name))
    {
        return false;
    }
    names_whole_key(modify, relation)
}

/// A column whose values several rows may take from each other: one row may succeed only after another one has moved on, so the
/// order of rows counts, which is another one on another server. Not if all get the same constant, or if one row is named.
fn depends_on_row_order<'m>(modify: &Modify<'m>, relation: &Relation) -> Option<&'m str> {
    let moved = |set: &'m Node| match set.node.as_ref() {
        Some(NodeEnum::ResTarget(set)) => {
            let is_unique = relation.key.iter().chain(&relation.unique_columns).any(|column| *column == set.name);
            (is_unique && !set.val.as_deref().is_some_and(is_value)).then_some(set.name.as_str())
        }
        _ => None,
    };
    let column = modify.sets.iter().find_map(moved)?;
    (!names_whole_key(modify, relation)).then_some(column)
}

/// Each column of the primary key is compared with a constant.
fn names_whole_key(modify: &Modify<'_>, relation: &Relation) -> bool {
    is_one_row(modify.condition, relation)
}

/// The same of any condition on the table's rows.
pub(super) fn is_one_row(condition: Option<&Node>, relation: &Relation) -> bool {
    let mut keys = Vec::new();
    if let Some(condition) = condition {
        equalities(condition, &mut |column, value| {
            if is_constant(value) {
                keys.extend(node_names(column).last().map(|name| (*name).to_owned()));
            }
        });
    }
    !relation.key.is_empty() && relation.key.iter().all(|key| keys.contains(key))
}

/// Calls `found` with column and other side of each `column = other side` that must hold.
fn equalities<'n>(condition: &'n Node, found: &mut impl FnMut(&'n [Node], &'n Node)) {
    let mut parts = Vec::new();
    conjuncts(condition, &mut parts);
    for part in parts {
        let Some(NodeEnum::AExpr(equal)) = part.node.as_ref() else { continue };
        let plain = equal.kind == AExprKind::AexprOp as i32
            && matches!(node_names(&equal.name).as_slice(), ["="] | ["pg_catalog", "="]);
        let (true, Some(left), Some(right)) = (plain, equal.lexpr.as_deref(), equal.rexpr.as_deref()) else { continue };
        if let Some(NodeEnum::ColumnRef(column)) = left.node.as_ref() {
            found(&column.fields, right);
        }
        if let Some(NodeEnum::ColumnRef(column)) = right.node.as_ref() {
            found(&column.fields, left);
        }
    }
}

/// One value of a type that no key column has to be rounded for: a literal, a parameter, or a cast of one that is not to a
/// floating point type (several large integers equal one float).
fn is_constant(node: &Node) -> bool {
    match node.node.as_ref() {
        Some(NodeEnum::AConst(_) | NodeEnum::ParamRef(_)) => true,
        Some(NodeEnum::TypeCast(cast)) => {
            let names = cast.type_name.as_ref().map(|name| node_names(&name.names)).unwrap_or_default();
            !names.iter().any(|name| matches!(*name, "float4" | "float8"))
                && cast.arg.as_deref().is_some_and(is_constant)
        }
        _ => false,
    }
}

/// The same of whatever type: a value that is the same for every row.
fn is_value(node: &Node) -> bool {
    match node.node.as_ref() {
        Some(NodeEnum::TypeCast(cast)) => cast.arg.as_deref().is_some_and(is_value),
        _ => is_constant(node),
    }
}

/// All tables that the statement reads or writes, for their locks; or why the ordered lane does not carry it.
fn tables_to_lock(
    modify: &Modify<'_>,
    inner: &Look,
    relation: &Relation,
    why: &NotRows,
    context: &Context<'_>,
) -> Result<Vec<u32>, Refusal> {
    let mut tables = vec![relation.oid];
    for name in &inner.relations {
        let Some(read) = context.facts.relations.get(name) else { continue };
        let reason = if read.is_temporary() {
            "is a temporary table, which the other servers do not have"
        } else if !read.is_table() || read.is_system() || read.foreign {
            "is no ordinary table"
        } else if read.rls {
            "has row-level security"
        } else {
            tables.push(read.oid);
            continue;
        };
        return Err(super::rows::refuse(&format!("{} that reads {name}, which {reason},", modify.verb), why));
    }
    if may_match_several(modify, relation, context) && !inner.parameters.is_empty() {
        return Err(super::rows::refuse("UPDATE ... FROM where a row may match more than once", why));
    }
    tables.sort_unstable();
    tables.dedup();
    Ok(tables)
}

/// UPDATE ... FROM that may find several rows whose values a row could get.
fn may_match_several(modify: &Modify<'_>, relation: &Relation, context: &Context<'_>) -> bool {
    !modify.sets.is_empty()
        && !modify.sources.is_empty()
        && !matches_once(modify, relation, context)
        && !matches::values_are_the_rows_own(modify, relation)
}

/// The one table in FROM is bound by its primary key to the updated row.
fn matches_once(modify: &Modify<'_>, relation: &Relation, context: &Context<'_>) -> bool {
    let [source] = modify.sources else { return false };
    let Some(NodeEnum::RangeVar(source)) = source.node.as_ref() else { return false };
    let name = Name::new(&source.schemaname, &source.relname);
    let Some(table) = context.facts.relations.get(&name) else { return false };
    let alias = source.alias.as_ref().map_or(&source.relname, |alias| &alias.aliasname);
    let of_source = |fields: &[Node]| match node_names(fields).as_slice() {
        [column] => relation.column(column).is_none() && table.column(column).is_some(),
        [qualifier, _] => qualifier == alias,
        _ => false,
    };
    let mut bound = Vec::new();
    if let Some(condition) = modify.condition {
        equalities(condition, &mut |column, other| {
            let independent = is_constant(other)
                || matches!(other.node.as_ref(), Some(NodeEnum::ColumnRef(other)) if !of_source(&other.fields) && !node_names(&other.fields).is_empty());
            if of_source(column) && independent {
                bound.extend(node_names(column).last().map(|name| (*name).to_owned()));
            }
        });
    }
    let inherits = table.children && source.inh;
    !table.key.is_empty() && !inherits && table.key.iter().all(|key| bound.contains(key))
}
