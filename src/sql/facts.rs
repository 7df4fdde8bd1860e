//! What the leader's catalog says about the names of a statement: the answer to [`super::catalog::query`].

use std::collections::BTreeMap;

use serde::Deserialize;

use super::needs::Name;
use super::plan::Role;

/// Facts of the catalog, as the session sees it. What is not found is absent.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Facts {
    pub relations: BTreeMap<Name, Relation>,
    pub functions: BTreeMap<Name, Vec<Function>>,
    /// The functions behind operators that are not built in.
    pub operators: BTreeMap<Name, Vec<Function>>,
    pub types: BTreeMap<Name, Type>,
    /// The session's values of [`super::catalog::MIRRORED_SETTINGS`], and `search_path` and `role` among them.
    pub settings: BTreeMap<String, String>,
}

#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(default)]
#[allow(clippy::struct_excessive_bools, reason = "independent facts of the catalog")]
pub struct Relation {
    /// Object identifier on the leader; other nodes may differ.
    pub oid: u32,
    pub schema: String,
    pub name: String,
    /// pg_class.relkind
    pub kind: String,
    /// pg_class.relpersistence: `t` is temporary
    pub persistence: String,
    pub owner: String,
    pub owner_superuser: bool,
    /// The owner has not all rights on it or on its schema.
    pub owner_lacks: bool,
    /// In the order of attnum, without dropped ones.
    pub columns: Vec<Column>,
    /// Columns of the primary key, if it is not deferrable; else empty.
    pub key: Vec<String>,
    /// The equality of the key's index, for each column of `key`.
    pub key_operators: Vec<Operator>,
    /// Columns that an immediate unique or exclusion index depends on, but for the primary key, here or in partitions.
    pub unique_columns: Vec<String>,
    /// The same for deferrable constraints, which are checked at the end of a statement or later.
    pub deferrable_unique_columns: Vec<String>,
    /// Columns that foreign keys reference.
    pub referenced: Vec<String>,
    /// A foreign key of it references itself.
    pub self_referencing: bool,
    /// pg_trigger.tgtype of all enabled user triggers here and in children and partitions, or-ed.
    pub triggers: u32,
    /// Enabled rules here or in children and partitions.
    pub rules: bool,
    /// Row-level security applies to whoever asks: not to its owner, not to superusers; but to all if it is forced, because followers write as
    /// the owner.
    pub rls: bool,
    /// Children by inheritance that are not partitions.
    pub children: bool,
    /// A foreign table among the children or partitions.
    pub foreign: bool,
    /// A table that TRUNCATE ... CASCADE reaches from it and that has triggers for that.
    pub truncate_trigger: Option<String>,
    /// Columns whose change can move a row to another partition; all, if expressions decide.
    pub partition_columns: Vec<String>,
    /// An unlogged one among the children or partitions.
    pub unlogged_child: Option<String>,
    /// Deferrable constraints on it, or of others that reference it.
    pub deferrable: bool,
    /// ON DELETE CASCADE, SET NULL or SET DEFAULT of a table that references it.
    pub cascade_delete: bool,
    /// Columns whose change reaches other tables by ON UPDATE CASCADE, SET NULL or SET DEFAULT.
    pub cascade_update: Vec<String>,
    /// A table that its cascades reach has user triggers for them, rules, or SET DEFAULT of what is no constant.
    pub cascade_opaque: bool,
    /// Functions in CHECK constraints, also of its domains.
    pub check_functions: Vec<Function>,
    /// For a view: functions that reading it can call, through other views too; for a materialized view: refreshing it.
    pub view_functions: Vec<Function>,
    /// For a view: a relation behind it is foreign or has row-level security.
    pub view_opaque: bool,
    /// Columns whose default may take a value of a sequence.
    pub sequences: Vec<SequenceFact>,
}

/// A column whose default, or identity, takes values of a sequence.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
pub struct SequenceFact {
    pub column: String,
    /// The sequence, if the column's value is just its next one; 0: something else that calls nextval, or may.
    pub oid: u32,
}

#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(default)]
#[allow(clippy::struct_excessive_bools, reason = "independent facts of the catalog")]
pub struct Column {
    pub name: String,
    /// As `format_type` writes it.
    pub sql_type: String,
    pub not_null: bool,
    pub generated: bool,
    pub identity: bool,
    /// GENERATED ALWAYS AS IDENTITY: UPDATE can not give it a value.
    pub identity_always: bool,
    /// The current role may SELECT it, so that RETURNING works.
    pub may_select: bool,
    /// How many values of it go to a follower at once.
    pub bulk: Bulk,
    pub default: DefaultKind,
    /// A default that varies, as an expression; None if the role may not evaluate it.
    pub default_sql: Option<String>,
    /// The current role may INSERT it.
    pub may_insert: bool,
    /// The type is or contains a date or time type.
    pub dates: bool,
    /// The type is or contains timestamp with time zone, the only one whose text may have a zone's abbreviation: `time with time
    /// zone` has an offset under every DateStyle (`EncodeTimeOnly` in `datetime.c`).
    pub zones: bool,
    /// The type is or contains real or double precision, or may.
    pub floats: bool,
    /// Values of it may be equal and look different.
    pub loose: bool,
    /// The type is of the string category.
    pub text: bool,
}

/// How values of a type, as text, become a set.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
pub enum Bulk {
    /// Not at all: an array of the type has another delimiter, or there is none, or a cast from text is somebody's function.
    #[default]
    #[serde(rename = "n")]
    No,
    /// As an array of the type.
    #[serde(rename = "a")]
    Array,
    /// The type is an array itself: as an array of text, and each element by the type's own input function.
    #[serde(rename = "t")]
    Text,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
pub struct Operator {
    pub schema: String,
    pub name: String,
}

impl Column {
    /// Left to its default it is the same on every node.
    #[must_use]
    pub fn has_same_default(&self) -> bool {
        self.generated || !self.identity && matches!(self.default, DefaultKind::None | DefaultKind::Immutable)
    }
}

impl Operator {
    /// `OPERATOR(pg_catalog.=)`
    #[must_use]
    pub fn sql(&self) -> String {
        format!("OPERATOR({}.{})", quote_identifier(&self.schema), self.name)
    }
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
pub enum DefaultKind {
    #[default]
    #[serde(rename = "n")]
    None,
    /// The same at every time on every node.
    #[serde(rename = "i")]
    Immutable,
    #[serde(rename = "o")]
    Other,
    /// Calls somebody's function, in another language than C, that may do anything.
    #[serde(rename = "u")]
    Opaque,
}

/// A function that a name can mean.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[allow(clippy::struct_excessive_bools, reason = "independent facts of the catalog")]
pub struct Function {
    pub schema: String,
    pub name: String,
    /// pg_proc.provolatile: i, s or v
    pub volatility: String,
    /// Comes with PostgreSQL (object identifier below 16384).
    pub builtin: bool,
    /// pg_proc.prokind: f, a, w or p
    pub kind: String,
    /// Of an extension that is known not to write by it, although it may give another value on another server.
    #[serde(default)]
    pub harmless: bool,
    /// An aggregate whose functions are all immutable: its own class says nothing of them.
    #[serde(default)]
    pub immutable_parts: bool,
    /// One argument that is a row: `t.f` can call it.
    pub of_row: bool,
    /// Takes or gives a date or time, or takes a type that is not built in and may be one.
    #[serde(default)]
    pub dates: bool,
    /// Gives a floating point number.
    #[serde(default)]
    pub floats: bool,
    /// Gives what may be equal to another value and look different.
    #[serde(default)]
    pub loose: bool,
}

#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(default)]
#[allow(clippy::struct_excessive_bools, reason = "independent facts of the catalog")]
pub struct Type {
    pub schema: String,
    pub name: String,
    pub builtin: bool,
    pub dates: bool,
    pub floats: bool,
    /// Values of it may be equal and look different.
    pub loose: bool,
    pub text: bool,
    /// `regclass` and the like: the text means another number on another node.
    pub reg: bool,
    /// A domain with a default.
    pub has_default: bool,
    pub check_functions: Vec<Function>,
}

#[derive(Debug, thiserror::Error)]
#[error("the catalog's answer can not be read: {0}")]
pub struct FactsError(#[from] serde_json::Error);

#[derive(Deserialize)]
struct Entry<T> {
    schema: Option<String>,
    name: String,
    fact: Option<T>,
}

#[derive(Deserialize)]
struct Answer {
    relations: Option<Vec<Entry<Relation>>>,
    functions: Option<Vec<Entry<Vec<Function>>>>,
    operators: Option<Vec<Entry<Vec<Function>>>>,
    types: Option<Vec<Entry<Type>>>,
    settings: Option<BTreeMap<String, Option<String>>>,
}

fn by_name<T>(entries: Option<Vec<Entry<T>>>) -> BTreeMap<Name, T> {
    let entries = entries.unwrap_or_default().into_iter();
    entries.filter_map(|entry| Some((Name { schema: entry.schema, name: entry.name }, entry.fact?))).collect()
}

impl Facts {
    /// Reads the one value that [`super::catalog::query`] returns.
    pub fn parse(json: &str) -> Result<Self, FactsError> {
        let answer: Answer = serde_json::from_str(json)?;
        let settings = answer.settings.unwrap_or_default().into_iter();
        Ok(Self {
            relations: by_name(answer.relations),
            functions: by_name(answer.functions),
            operators: by_name(answer.operators),
            types: by_name(answer.types),
            settings: settings.filter_map(|(name, value)| Some((name, value?))).collect(),
        })
    }

    #[must_use]
    pub fn relation(&self, schema: &str, name: &str) -> Option<&Relation> {
        self.relations.get(&Name::new(schema, name))
    }
}

impl Relation {
    #[must_use]
    pub fn is_temporary(&self) -> bool {
        self.persistence == "t"
    }

    /// An ordinary or partitioned table.
    #[must_use]
    pub fn is_table(&self) -> bool {
        matches!(self.kind.as_str(), "r" | "p")
    }

    /// Part of the catalog or of information_schema.
    #[must_use]
    pub fn is_system(&self) -> bool {
        self.oid < FIRST_USER_OID
    }

    #[must_use]
    pub fn column(&self, name: &str) -> Option<&Column> {
        self.columns.iter().find(|column| column.name == name)
    }

    #[must_use]
    pub fn owner_role(&self) -> Role {
        Role { name: self.owner.clone(), superuser: self.owner_superuser }
    }

    /// `schema.name`, quoted.
    #[must_use]
    pub fn qualified(&self) -> String {
        format!("{}.{}", quote_identifier(&self.schema), quote_identifier(&self.name))
    }
}

/// FirstNormalObjectId of `access/transam.h`.
pub const FIRST_USER_OID: u32 = 16384;

/// An identifier in double quotes.
#[must_use]
pub fn quote_identifier(name: &str) -> String {
    format!("\"{}\"", name.replace('"', "\"\""))
}

/// A string literal, right under `standard_conforming_strings = on`.
#[must_use]
pub fn quote_literal(text: &str) -> String {
    format!("'{}'", text.replace('\'', "''"))
}
