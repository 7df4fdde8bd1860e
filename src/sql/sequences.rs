//! What a statement does with sequences: their values are the leader's, and followers' sequences must not fall behind.

use pg_query::NodeEnum;
use pg_query::protobuf::RangeVar;

use super::facts::{Facts, Relation, quote_identifier};
use super::needs::{Name, Needs};
use super::parse::{node_names, tree, walk};
use super::plan::{EffectPlan, Lane, Write};

/// What is known of it before the statement runs.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum SequenceUse {
    #[default]
    None,
    /// These hidden columns hold values of these sequences (object identifiers of the leader).
    Columns(Vec<(usize, u32)>),
    /// Some are used; the leader knows which.
    Any,
    /// Some may be set, back too.
    Set,
}

impl SequenceUse {
    #[must_use]
    pub fn is_none(&self) -> bool {
        *self == Self::None
    }
}

pub(super) fn of(node: &NodeEnum, needs: &Needs, lane: &Lane, facts: &Facts) -> SequenceUse {
    let calls = |name: &str| needs.functions.iter().any(|function| function.name == name);
    match lane {
        Lane::Read { .. } | Lane::Named(_) | Lane::Write(_) if calls("setval") => SequenceUse::Set,
        Lane::Read { .. } | Lane::Named(_) if calls("nextval") => SequenceUse::Any,
        Lane::Write(write) => of_write(node, write, calls("nextval"), facts),
        _ => SequenceUse::None,
    }
}

/// The same of a statement that becomes a write once its triggers are known.
pub(super) fn of_rows(node: &NodeEnum, needs: &Needs, write: &Write, facts: &Facts) -> SequenceUse {
    of_write(node, write, needs.functions.iter().any(|function| function.name == "nextval"), facts)
}

fn of_write(node: &NodeEnum, write: &Write, calls: bool, facts: &Facts) -> SequenceUse {
    let relation = |named: Option<&RangeVar>| {
        named.and_then(|named| facts.relations.get(&Name::new(&named.schemaname, &named.relname)))
    };
    let any_if = |condition: bool| if condition { SequenceUse::Any } else { SequenceUse::None };
    match node {
        NodeEnum::TruncateStmt(statement) if statement.restart_seqs => SequenceUse::Set,
        _ if calls || matches!(write.effect, EffectPlan::Carried { .. }) => SequenceUse::Any,
        NodeEnum::InsertStmt(statement) => {
            let updates = statement.on_conflict_clause.as_ref().is_some_and(|clause| !clause.target_list.is_empty());
            relation(statement.relation.as_ref())
                .map_or(SequenceUse::None, |relation| inserted(relation, write, updates))
        }
        NodeEnum::UpdateStmt(statement) => {
            let mut default = false;
            walk(&tree(&statement.target_list), &mut |kind, _| default |= kind == "SetToDefault");
            let has = relation(statement.relation.as_ref()).is_some_and(|relation| !relation.sequences.is_empty());
            any_if(default && has)
        }
        NodeEnum::CopyStmt(statement) => {
            let listed = node_names(&statement.attlist);
            let given = |column: &str| listed.is_empty() || listed.contains(&column);
            any_if(
                relation(statement.relation.as_ref())
                    .is_some_and(|relation| relation.sequences.iter().any(|fact| !given(&fact.column))),
            )
        }
        NodeEnum::MergeStmt(statement) => {
            any_if(relation(statement.relation.as_ref()).is_some_and(|relation| !relation.sequences.is_empty()))
        }
        _ => SequenceUse::None,
    }
}

/// `updates`: ON CONFLICT DO UPDATE, which may put a value into another column.
fn inserted(relation: &Relation, write: &Write, updates: bool) -> SequenceUse {
    match &write.effect {
        _ if relation.sequences.is_empty() => SequenceUse::None,
        // every value is in the text
        EffectPlan::Text { lock_tables, .. } if lock_tables.is_empty() => SequenceUse::None,
        EffectPlan::Rows { .. } if !updates => {
            let column = |name: &str| {
                let quoted = quote_identifier(name);
                write.hidden_returning.iter().position(|hidden| *hidden == quoted)
            };
            let columns: Option<Vec<_>> = relation
                .sequences
                .iter()
                .map(|fact| Some((column(&fact.column)?, fact.oid)).filter(|(_, oid)| *oid != 0))
                .collect();
            columns.map_or(SequenceUse::Any, SequenceUse::Columns)
        }
        _ => SequenceUse::Any,
    }
}
