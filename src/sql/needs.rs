//! What of the catalog a statement's classification needs, by the names that the statement uses.

use std::collections::BTreeSet;

use serde_json::{Map, Value};

use super::parse::{Statement, names, tree, walk};

/// A name as the statement has it; without a schema it is found by the search_path.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Name {
    pub schema: Option<String>,
    pub name: String,
}

impl Name {
    #[must_use]
    pub fn new(schema: &str, name: &str) -> Self {
        Self { schema: (!schema.is_empty()).then(|| schema.to_owned()), name: name.to_owned() }
    }

    /// From the parts of a qualified name, the last two counting.
    #[must_use]
    pub fn of_parts(parts: &[&str]) -> Option<Self> {
        match parts {
            [] => None,
            [name] => Some(Self::new("", name)),
            [.., schema, name] => Some(Self::new(schema, name)),
        }
    }
}

impl std::fmt::Display for Name {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if let Some(schema) = &self.schema {
            write!(f, "{schema}.")?;
        }
        write!(f, "{}", self.name)
    }
}

/// What [`super::catalog::query`] asks for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Needs {
    pub relations: BTreeSet<Name>,
    /// Calls, and names after a dot, which may be calls in disguise (`t.f` for `f(t)`).
    pub functions: BTreeSet<Name>,
    pub operators: BTreeSet<Name>,
    pub types: BTreeSet<Name>,
}

impl Needs {
    #[must_use]
    pub fn of(statement: &Statement) -> Self {
        Self::of_tree(&tree(&statement.node))
    }

    /// The same, of a tree that is there already.
    #[must_use]
    pub fn of_tree(tree: &Value) -> Self {
        let mut needs = Self::default();
        walk(tree, &mut |kind, fields| needs.visit(kind, fields));
        needs
    }

    /// The statement can be classified with [`super::facts::Facts::default`].
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.relations.is_empty() && self.functions.is_empty() && self.operators.is_empty() && self.types.is_empty()
    }

    fn visit(&mut self, kind: &str, fields: &Map<String, Value>) {
        if let Some(name) = relation_name(fields) {
            self.relations.insert(name);
        } else if let Some(name) = type_name(fields) {
            self.types.insert(name);
        }
        match kind {
            "FuncCall" => self.functions.extend(Name::of_parts(&names(fields.get("funcname")))),
            // what CALL calls
            "" if fields.contains_key("funcname") => {
                self.functions.extend(Name::of_parts(&names(fields.get("funcname"))));
            }
            "AExpr" => self.operators.extend(Name::of_parts(&names(fields.get("name")))),
            "SubLink" => self.operators.extend(Name::of_parts(&names(fields.get("oper_name")))),
            "SortBy" => self.operators.extend(Name::of_parts(&names(fields.get("use_op")))),
            "ColumnRef" => self.functions.extend(hidden_call(fields)),
            "AIndirection" => {
                self.functions.extend(names(fields.get("indirection")).into_iter().map(|name| Name::new("", name)));
            }
            "DropStmt" | "CommentStmt" | "SecLabelStmt" | "RenameStmt" | "AlterObjectSchemaStmt" => {
                self.relations.extend(object_names(fields));
            }
            _ => {}
        }
    }
}

/// The name of a RangeVar.
#[must_use]
pub fn relation_name(fields: &Map<String, Value>) -> Option<Name> {
    let name = fields.get("relname")?.as_str()?;
    fields.get("relpersistence")?;
    Some(Name::new(fields.get("schemaname").and_then(Value::as_str).unwrap_or_default(), name))
}

/// The name of a TypeName.
#[must_use]
pub fn type_name(fields: &Map<String, Value>) -> Option<Name> {
    fields.get("pct_type")?;
    Name::of_parts(&names(fields.get("names")))
}

/// `t.f`: the last name may be a function of the row.
#[must_use]
pub fn hidden_call(column: &Map<String, Value>) -> Option<Name> {
    let parts = names(column.get("fields"));
    (parts.len() > 1).then(|| parts.last().map(|name| Name::new("", name))).flatten()
}

/// Relations that DROP, COMMENT and the like name by lists of names. What is no relation simply is not found.
fn object_names(fields: &Map<String, Value>) -> Vec<Name> {
    let mut found = Vec::new();
    let mut add = |object: &Value| {
        if let Some(items) = object.pointer("/node/List/items") {
            let parts = names(Some(items));
            found.extend(Name::of_parts(&parts));
            // COMMENT ON COLUMN t.c, DROP TRIGGER x ON t: the relation comes before the last name
            if let Some((_, before)) = parts.split_last() {
                found.extend(Name::of_parts(before));
            }
        }
    };
    if let Some(objects) = fields.get("objects").and_then(Value::as_array) {
        objects.iter().for_each(&mut add);
    }
    if let Some(object) = fields.get("object") {
        add(object);
    }
    found
}
