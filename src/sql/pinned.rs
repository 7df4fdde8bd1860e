//! UPDATE, DELETE and INSERT ... ON CONFLICT by the rows that the leader changed: whatever the statement's condition, sources,
//! order, locks or volatile values are, they are the leader's alone. It returns the keys and the new values of what it changed,
//! and followers change exactly that.

use pg_query::protobuf::InsertStmt;

use super::classify::Context;
use super::conditional::Depends;
use super::facts::{Column, Relation, quote_identifier};
use super::modify::{Modify, set_columns};
use super::plan::{EffectPlan, Write};
use super::rows::{self, NotRows, RowTexts, not_rows};
use super::text::Edits;

/// The statement as rows by primary key.
///
/// # Errors
/// Why it can not be.
pub(super) fn modify(
    modify: &Modify<'_>,
    relation: &Relation,
    context: &Context<'_>,
) -> Result<Option<Write>, NotRows> {
    let key = rows::key_columns(relation)?;
    if relation.children && modify.relation.is_none_or(|relation| relation.inh) {
        return Err(not_rows(
            format!("{} has children by inheritance, and a key says nothing of theirs", relation.qualified()),
            "Name each table of them in a statement of its own, with ONLY.",
        ));
    }
    let changed = changed(set_columns(modify.sets), relation)?;
    let texts = match changed.is_empty() {
        true if modify.sets.is_empty() => rows::delete(relation, context)?,
        // SET of generated columns alone, to their DEFAULT
        true => rows::update(relation, &key, context)?,
        false => rows::update(relation, &changed, context)?,
    };
    let columns: Vec<&Column> = key.iter().chain(&changed).copied().collect();
    let hidden = rows::returning(&columns, &qualifier(modify, relation), relation, context)?;
    let cascades = modify.sets.is_empty() && relation.cascade_delete;
    Ok(write(relation, texts, hidden, modify.returning.is_some(), cascades, context))
}

/// The same on a table with triggers, which may change any column of the rows. Gives the columns that they must not change, too.
pub(super) fn modify_behind_triggers(
    modify: &Modify<'_>,
    relation: &Relation,
    context: &Context<'_>,
) -> Option<(Write, Vec<String>)> {
    // Foreign keys do nothing there while triggers are off.
    if modify.sets.is_empty() && relation.cascade_delete {
        return None;
    }
    let key = rows::key_columns(relation).ok()?;
    if relation.children && modify.relation.is_none_or(|relation| relation.inh) {
        return None;
    }
    changed(set_columns(modify.sets), relation).ok()?;
    let fixed = fixed(relation);
    let free: Vec<&Column> =
        relation.columns.iter().filter(|column| !column.generated && !fixed.contains(&column.name)).collect();
    let texts = match (modify.sets.is_empty(), free.is_empty()) {
        (true, _) => rows::delete(relation, context),
        (false, true) => rows::update(relation, &key, context),
        (false, false) => rows::update(relation, &free, context),
    };
    let columns: Vec<&Column> = if modify.sets.is_empty() { key } else { key.into_iter().chain(free).collect() };
    let hidden = rows::returning(&columns, &qualifier(modify, relation), relation, context).ok()?;
    let made = write(relation, texts.ok()?, hidden, modify.returning.is_some(), false, context)?;
    let fixed = if modify.sets.is_empty() { Vec::new() } else { fixed };
    Some((made, fixed))
}

/// Columns whose change the rows of an UPDATE do not carry.
pub(super) fn fixed(relation: &Relation) -> Vec<String> {
    let always = relation.columns.iter().filter(|column| column.identity_always).map(|column| &column.name);
    relation.key.iter().chain(&relation.referenced).chain(always).cloned().collect()
}

/// INSERT ... ON CONFLICT DO UPDATE: whole rows as they became.
///
/// # Errors
/// Why it can not be.
pub(super) fn upsert(
    statement: &InsertStmt,
    relation: &Relation,
    context: &Context<'_>,
) -> Result<Option<Write>, NotRows> {
    rows::key_columns(relation)?;
    let clause = statement.on_conflict_clause.as_deref();
    changed(set_columns(clause.map(|clause| clause.target_list.as_slice()).unwrap_or_default()), relation)?;
    let columns: Vec<&Column> = relation.columns.iter().filter(|column| !column.generated).collect();
    let texts = rows::upsert(relation, &columns, context)?;
    let hidden = rows::returning(&columns, "", relation, context)?;
    Ok(write(relation, texts, hidden, statement.returning_clause.is_some(), false, context))
}

/// INSERT: whole rows, also with ON CONFLICT DO NOTHING, where the leader returns only those that it inserted.
///
/// # Errors
/// Why it can not be.
pub(super) fn insert(
    statement: &InsertStmt,
    relation: &Relation,
    context: &Context<'_>,
) -> Result<Option<Write>, NotRows> {
    let columns: Vec<&Column> = relation.columns.iter().filter(|column| !column.generated).collect();
    if columns.is_empty() {
        return Err(not_rows("the table has no columns of its own", "Use VALUES or DEFAULT VALUES."));
    }
    let hidden = rows::returning(&columns, "", relation, context)?;
    let texts = rows::insert(relation, &columns);
    Ok(write(relation, texts, hidden, statement.returning_clause.is_some(), false, context))
}

fn write(
    relation: &Relation,
    texts: RowTexts,
    hidden_returning: Vec<String>,
    client_returning: bool,
    barrier: bool,
    context: &Context<'_>,
) -> Option<Write> {
    let (edits, _) = Edits::find(context.text, context.shape, &[])?;
    Some(Write {
        effect: EffectPlan::Rows { owner: Some(relation.owner_role()), texts: texts.into() },
        hidden_returning,
        client_returning,
        ddl: false,
        depends: Depends::No,
        barrier,
        deferrable_constraints: relation.deferrable,
        edits,
    })
}

/// The columns that are set, without those of the key and generated ones.
fn changed<'r, 's>(names: impl Iterator<Item = &'s str>, relation: &'r Relation) -> Result<Vec<&'r Column>, NotRows> {
    let mut columns: Vec<&Column> = Vec::new();
    for name in names {
        let Some(column) = relation.column(name) else { continue };
        if relation.key.iter().any(|key| key == name) {
            return Err(not_rows(
                format!("it changes {name}, a column of the primary key, and RETURNING gives only the new key"),
                "Give the new key as a constant, in a statement for one row.",
            ));
        }
        if relation.referenced.iter().any(|referenced| referenced == name) {
            return Err(not_rows(
                format!("it changes {name}, which a foreign key references"),
                "Change one row at a time, by its primary key.",
            ));
        }
        if column.identity_always {
            return Err(not_rows(
                format!("it changes {name}, which is GENERATED ALWAYS AS IDENTITY"),
                "Make it GENERATED BY DEFAULT.",
            ));
        }
        if !column.generated && !columns.iter().any(|known| known.name == column.name) {
            columns.push(column);
        }
    }
    Ok(columns)
}

/// How RETURNING names the table, however many others the statement reads.
fn qualifier(modify: &Modify<'_>, relation: &Relation) -> String {
    match modify.relation.and_then(|relation| relation.alias.as_ref()) {
        Some(alias) => quote_identifier(&alias.aliasname),
        None => relation.qualified(),
    }
}
