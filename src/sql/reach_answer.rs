//! What the catalog answers to the question of [`super::reach`].

use std::collections::BTreeSet;

use serde::Deserialize;

use super::facts::{FactsError, Function};
use super::first_rows::Key;

/// What the catalog says of code and of what it can reach.
#[derive(Debug, Deserialize)]
pub struct Answer {
    pub(super) functions: Option<Vec<FunctionFact>>,
    pub(super) relations: Option<Vec<RelationFact>>,
    /// Operators of users that are not immutable.
    pub(super) operators: Option<Vec<String>>,
    /// A temporary type that is named.
    pub(super) temporary: Option<String>,
    /// A type that was met here, for a person: a cast of it, or the check of a domain in it, calls a function that is not immutable.
    pub(super) odd: Option<String>,
    /// Operators of users that take or give such a type.
    pub(super) odd_operators: Option<Vec<String>>,
    /// There are such types, met or not.
    pub(super) odd_somewhere: bool,
}

impl Answer {
    /// Reads the one value that [`Reach::query`] returns.
    pub fn parse(json: &str) -> Result<Self, FactsError> {
        Ok(serde_json::from_str(json)?)
    }
}

#[derive(Debug, Deserialize)]
pub(super) struct FunctionFact {
    pub(super) oid: u32,
    pub(super) language: String,
    pub(super) config: Option<String>,
    pub(super) body: Option<String>,
    /// The expressions of its arguments' defaults.
    pub(super) defaults: Option<String>,
    pub(super) returns_set: bool,
    /// The catalog gives it with its head, because it has none of its own.
    pub(super) has_head: bool,
    pub(super) arguments: Option<Vec<String>>,
    /// Those among them of types that the catalog compares for certain: see [`super::first_rows`].
    pub(super) typed: Option<BTreeSet<String>>,
    pub(super) no_arguments: bool,
    pub(super) temporary: bool,
    #[serde(flatten)]
    pub(super) function: Function,
}

#[derive(Debug, Deserialize)]
#[allow(clippy::struct_excessive_bools, reason = "independent facts of the catalog")]
pub(super) struct RelationFact {
    pub(super) oid: u32,
    pub(super) schema: String,
    pub(super) name: String,
    pub(super) kind: String,
    pub(super) persistence: String,
    pub(super) builtin: bool,
    /// It is one that the code writes to, or one that is reached from there by inheritance or cascades.
    pub(super) written: bool,
    pub(super) cascade: bool,
    /// It has columns of floating point.
    pub(super) floats: bool,
    /// Its columns and unique keys, if they were asked for.
    pub(super) columns: Option<BTreeSet<String>>,
    pub(super) keys: Option<Vec<Key>>,
    pub(super) view: Option<String>,
    pub(super) policies: Option<Vec<String>>,
    /// Column and its default or generation expression.
    pub(super) defaults: Option<Vec<ColumnFact>>,
    pub(super) checks: Option<Vec<String>>,
    pub(super) rules: Option<Vec<String>>,
    pub(super) triggers: Option<Vec<TriggerFact>>,
}

#[derive(Debug, Deserialize)]
pub(super) struct ColumnFact {
    pub(super) name: String,
    pub(super) position: usize,
    pub(super) expression: Option<String>,
    pub(super) identity: bool,
    pub(super) generated: bool,
}

#[derive(Debug, Deserialize)]
pub(super) struct TriggerFact {
    pub(super) deferrable: bool,
    /// pg_trigger.tgenabled
    pub(super) enabled: String,
    /// As `pg_get_triggerdef` writes it.
    pub(super) definition: String,
    pub(super) function: FunctionFact,
}
