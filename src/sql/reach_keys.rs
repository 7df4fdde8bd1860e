//! What [`super::reach`] knows of the keys that make the order of rows certain.

use std::collections::{BTreeMap, BTreeSet};

use super::first_rows::{Blurs, Key, Ordered};
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
    blurs: Blurs,
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

    /// There may be values of floating point, or of type `character`.
    pub fn note(&mut self, floats: bool, blanks: bool) {
        self.blurs.floats |= floats;
        self.blurs.blanks |= blanks;
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
            meant.peek().is_some() && meant.all(|table| query.holds(&table.columns, &table.keys, self.blurs))
        };
        let uncertain = self.queries.iter().find(|(query, _)| self.distrusted || !certain(query));
        uncertain.map(|(query, place)| format!("{place}: {}", query.why))
    }
}
