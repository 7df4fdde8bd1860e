//! The `once` lane: statements whose writes are not in their text, because they call code or fire it.

use std::collections::BTreeSet;

use serde_json::Value;

use super::classify::{Context, read};
use super::expressions::{SessionValue, look};
use super::needs::relation_name;
use super::parse::{names, walk};
use super::plan::{EffectPlan, Lane, Once, Proof, RowsInstead, Write};
use super::refuse::{not_yet, own_schema, refused};
use super::rows::RowTexts;
use super::sequences::SequenceUse;
use super::text::Edits;

/// A statement of this lane. What it can reach is found out later, see [`super::reach`]. `single`: it is about one row at most.
pub(super) fn once(context: &Context<'_>, single: bool) -> Lane {
    let found = look(&context.tree, context.facts);
    if found.own_schema {
        return own_schema();
    }
    if let Some(setting) = &found.refused_setting {
        return refused(format!("set_config() of {setting} is not supported"), "Use SET, which says what is possible.");
    }
    // The server's guard lets temporary tables be written, which are the leader's alone.
    if writes_temporary_alone(context) {
        return read(true);
    }
    // The leader says what is missing.
    if found.missing {
        return read(true);
    }
    match Edits::find(context.text, context.shape, &found.session_values) {
        Some((mut edits, session_values)) => {
            edits.remember_dates(&found, context.text, context.shape);
            let given = given(context, &found.session_values);
            Lane::Once(Box::new(Once { edits, session_values, given, single, proof: Proof::default(), rows: None }))
        }
        None => not_yet("this statement"),
    }
}

/// Functions of which each call in the statement is a value of the session.
fn given(context: &Context<'_>, values: &[SessionValue]) -> Vec<String> {
    let (mut given, mut others) = (BTreeSet::new(), BTreeSet::new());
    walk(&context.tree, &mut |kind, fields| {
        if kind != "FuncCall" {
            return;
        }
        let location = fields.get("location").and_then(Value::as_u64);
        let is_value = values.iter().any(|value| location == u64::try_from(value.location).ok());
        let name = names(fields.get("funcname")).last().map(|name| (*name).to_owned());
        if is_value { given.extend(name) } else { others.extend(name) }
    });
    given.difference(&others).cloned().collect()
}

/// All tables that the statement itself writes are temporary, and there are some.
fn writes_temporary_alone(context: &Context<'_>) -> bool {
    let (mut some, mut all) = (false, true);
    walk(&context.tree, &mut |kind, fields| {
        if matches!(kind, "InsertStmt" | "UpdateStmt" | "DeleteStmt" | "MergeStmt") {
            let name = fields.get("relation").and_then(Value::as_object).and_then(relation_name);
            let relation = name.and_then(|name| context.facts.relations.get(&name));
            some = true;
            all &= relation.is_some_and(|relation| relation.is_temporary() && !relation.deferrable);
        }
    });
    some && all
}

/// A statement on a table with triggers: if their code changes nothing but its own rows, it is `write` instead, whose rows followers
/// get as they became. `fixed`: columns that no trigger may give a value then.
pub(super) fn or_rows(lane: Lane, write: Option<Write>, fixed: Vec<String>) -> Lane {
    match (lane, write) {
        (Lane::Once(once), Some(mut write)) => {
            match &mut write.effect {
                EffectPlan::Rows { texts, .. } => {
                    *texts = RowTexts { after_triggers: true, ..RowTexts::clone(texts) }.into();
                }
                EffectPlan::CopiedRows(rows) => rows.after_triggers = true,
                _ => {}
            }
            let rows = RowsInstead { write, sequences: SequenceUse::None, fixed, or_refused: None };
            Lane::Once(Box::new(Once { rows: Some(Box::new(rows)), ..*once }))
        }
        (lane, _) => lane,
    }
}
