//! What [`super::reach`] knows of the keys that make the order of rows certain.

use std::collections::{BTreeMap, BTreeSet};

use super::first_rows::{AGGREGATES, Key, Ordered};
use super::reach_answer::RelationFact;

/// A table of that name.
#[derive(Debug)]
struct Table {
    schema: String,
    columns: BTreeSet<String>,
    keys: Vec<Key>,
}

#[derive(Debug, Default)]
pub(super) struct Keys {
    /// Queries, and where they stand.
    queries: BTreeSet<(Ordered, String)>,
    /// By their names, and by their numbers.
    tables: BTreeMap<String, BTreeMap<u32, Table>>,
    /// Called by code that takes the first row of something.
    first_of: BTreeSet<String>,
    /// Functions of users that return sets.
    sets: BTreeSet<String>,
    /// One that has the name of an aggregate.
    like_aggregate: Option<String>,
    /// A name may be a variable's though a column has it.
    distrusted: bool,
}

impl Keys {
    /// Takes in a query. Whether its table has to be asked for.
    pub fn want(&mut self, query: Ordered, place: &str) -> bool {
        let unknown = !self.tables.contains_key(&query.table.name);
        self.queries.insert((query, place.to_owned()));
        unknown
    }

    /// Tables whose keys matter.
    pub fn names(&self) -> BTreeSet<String> {
        self.queries.iter().map(|(query, _)| query.table.name.clone()).collect()
    }

    /// What is called by code that takes the first row of something.
    pub fn first_of<'n>(&mut self, names: impl Iterator<Item = &'n String>) {
        self.first_of.extend(names.cloned());
    }

    /// A function of users is met.
    pub fn called(&mut self, name: &str, returns_set: bool) {
        if returns_set {
            self.sets.insert(name.to_owned());
        }
        if AGGREGATES.contains(&name) {
            self.like_aggregate = Some(name.to_owned());
        }
    }

    pub fn distrust(&mut self) {
        self.distrusted = true;
    }

    /// Takes in what the catalog says of a table, if it was asked for.
    pub fn learn(&mut self, fact: &RelationFact) {
        let Some(columns) = fact.columns.clone() else { return };
        let keys = fact.keys.clone().unwrap_or_default();
        let table = Table { schema: fact.schema.clone(), columns, keys };
        self.tables.entry(fact.name.clone()).or_default().insert(fact.oid, table);
    }

    /// Why the order of rows is not certain somewhere. A name means every table that has it.
    pub fn missing(&self) -> Option<String> {
        let certain = |query: &Ordered| {
            let Some(tables) = self.tables.get(&query.table.name) else { return false };
            let schema = query.table.schema.as_ref();
            let mut meant =
                tables.values().filter(|table| schema.is_none_or(|schema| *schema == table.schema)).peekable();
            meant.peek().is_some() && meant.all(|table| query.holds(&table.columns, &table.keys))
        };
        if let Some(name) = self.sets.intersection(&self.first_of).next() {
            return Some(format!("which row {name}() gives first depends on the order in which a server finds them"));
        }
        if let Some(name) = self.like_aggregate.as_ref().filter(|name| self.first_of.contains(*name)) {
            return Some(format!("{name}() is a function of users, and may be called for each row"));
        }
        let uncertain = self.queries.iter().find(|(query, _)| self.distrusted || !certain(query));
        uncertain.map(|(query, place)| format!("{place}: {}", query.why))
    }
}
