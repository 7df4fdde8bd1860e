//! What INSERT, UPDATE, DELETE, COPY and TRUNCATE need to know of the table that they write.

use pg_query::protobuf::RangeVar;

use super::classify::Context;
use super::expressions::OWN_SCHEMA;
use super::facts::{DefaultKind, Relation, quote_identifier};
use super::functions::{self, Effect};
use super::needs::Name;
use super::plan::Lane;
use super::refuse::{own_schema, refused};

/// Bits of pg_trigger.tgtype.
pub(super) const ON_INSERT: u32 = 4;
pub(super) const ON_DELETE: u32 = 8;
pub(super) const ON_UPDATE: u32 = 16;
pub(super) const ON_TRUNCATE: u32 = 32;

/// What the statement writes.
pub(super) enum Target<'a> {
    /// A permanent table that effects can be made for.
    Table(&'a Relation),
    /// Writing to it runs code, or reaches other tables: for this reason it takes the `once` lane.
    Once(&'static str),
    /// The leader's alone.
    Temporary,
    /// The lane is decided: an error of the leader's, or a refusal.
    Decided(Lane),
}

/// Judges the table for triggers of these events.
pub(super) fn target<'a>(relation: Option<&RangeVar>, events: u32, context: &Context<'a>) -> Target<'a> {
    let missing = || Target::Decided(super::classify::read(true));
    let Some(named) = relation else { return missing() };
    if named.schemaname == OWN_SCHEMA {
        return Target::Decided(own_schema());
    }
    let Some(relation) = context.facts.relations.get(&Name::new(&named.schemaname, &named.relname)) else {
        return missing();
    };
    if relation.is_temporary() {
        return temporary(relation, events);
    }
    match (refuse_table(relation, events), runs_code(relation, events)) {
        (Some(lane), _) => Target::Decided(lane),
        (None, Some(why)) => Target::Once(why),
        (None, None) => Target::Table(relation),
    }
}

/// The leader's alone, unless code that it runs writes elsewhere: then the server's read-only guard, which lets temporary tables
/// be written, says so.
fn temporary(relation: &Relation, events: u32) -> Target<'static> {
    let default = relation.columns.iter().any(|column| column.default == DefaultKind::Opaque);
    if runs_code(relation, events).is_none() && !default {
        return Target::Temporary;
    }
    if relation.triggers & events != 0 && relation.deferrable {
        return Target::Decided(refused(
            format!(
                "writing to the temporary table {} is not supported: a deferrable trigger of it runs as late as COMMIT, where nobody sees \
                 what it writes",
                relation.name
            ),
            "Make the trigger not deferrable.",
        ));
    }
    Target::Decided(super::classify::read(true))
}

fn refuse_table(relation: &Relation, events: u32) -> Option<Lane> {
    let name = relation.qualified();
    if relation.schema == OWN_SCHEMA {
        return Some(own_schema());
    }
    if relation.is_system() {
        return Some(refused(
            format!("writing to the system table {name} is not supported"),
            "Use the commands for it.",
        ));
    }
    let kind = match relation.kind.as_str() {
        "f" => "a foreign table",
        "m" => "a materialized view",
        "S" => "a sequence",
        "v" | "r" | "p" => "",
        _ => "no table",
    };
    if !kind.is_empty() {
        return Some(refused(
            format!("{name} is {kind}: writing to it is not replicated by this version of pgtandem"),
            "Write to the table behind it.",
        ));
    }
    if relation.owner_lacks {
        return Some(refused(
            format!("followers write to {name} as its owner {}, who has not all rights on it", relation.owner),
            format!(
                "Nothing was changed. Type: GRANT USAGE ON SCHEMA {0} TO {1}; GRANT ALL ON {name} TO {1}",
                quote_identifier(&relation.schema),
                quote_identifier(&relation.owner)
            ),
        ));
    }
    let itself = (relation.persistence == "u").then_some(&name);
    if let Some(table) = itself.or(relation.unlogged_child.as_ref()).filter(|_| events & ON_TRUNCATE == 0) {
        return Some(refused(
            format!("writing to the unlogged table {table} is not supported: a node that is filled gets it empty"),
            format!("Nothing was changed. Type: ALTER TABLE {table} SET LOGGED"),
        ));
    }
    relation.foreign.then(|| {
        refused(
            format!(
                "writing to {name} is not replicated by this version of pgtandem: one of its children or partitions is a foreign table"
            ),
            "Nothing was changed. Write to another table.",
        )
    })
}

/// The table, if its triggers are all that makes a statement more than its text says.
pub(super) fn behind_triggers<'a>(
    relation: Option<&RangeVar>,
    events: u32,
    context: &Context<'a>,
) -> Option<&'a Relation> {
    let named = relation?;
    let relation = context.facts.relations.get(&Name::new(&named.schemaname, &named.relname))?;
    let only_triggers = relation.triggers & events != 0 && runs_other_code(relation, events).is_none();
    only_triggers.then_some(relation)
}

/// Why what a statement writes here is more than its text says.
fn runs_code(relation: &Relation, events: u32) -> Option<&'static str> {
    let triggers = (relation.triggers & events != 0).then_some("user triggers fire on it");
    runs_other_code(relation, events).or(triggers)
}

fn runs_other_code(relation: &Relation, events: u32) -> Option<&'static str> {
    if relation.kind == "v" {
        Some("it is a view")
    } else if events == ON_TRUNCATE {
        // which takes no notice of rules, policies and checks
        None
    } else if relation.rules {
        Some("it has rules, which turn a statement into others")
    } else if relation.rls {
        Some("row-level security is enabled on it")
    } else if relation.cascade_opaque && cascades(relation, events) {
        Some(
            "a foreign key's cascade from it reaches a table with user triggers, rules or SET DEFAULT of what is no constant",
        )
    } else if impure_checks(relation) {
        Some("a CHECK constraint of it calls a function that is not immutable")
    } else {
        None
    }
}

/// Whether such statements may reach other tables by foreign keys.
fn cascades(relation: &Relation, events: u32) -> bool {
    events & ON_DELETE != 0 || events & ON_UPDATE != 0 && !relation.cascade_update.is_empty()
}

fn impure_checks(relation: &Relation) -> bool {
    relation
        .check_functions
        .iter()
        .any(|function| functions::effect(std::slice::from_ref(function), Some(2)) != Some(Effect::Pure))
}
