//! What a statement did, by table: rows inserted, updated and deleted, as PostgreSQL's statistics count them in the
//! transaction under way (`pg_stat_get_xact_tuples_*`, pgstatfuncs.c). They count rolled back subtransactions, too, so only the
//! difference between two readings says something.

use std::collections::BTreeMap;

/// Gives a line for each table that the transaction has touched: name, kind, whether it has deferrable triggers of users, the three
/// counts. Tables of the catalog count as one, by the name `pg_catalog`. Names are quoted; a blank separates.
/// Without `track_counts` the line `off`.
pub const QUERY: &str = "SELECT CASE WHEN pg_catalog.current_setting('track_counts') OPERATOR(pg_catalog.=) 'on' \
    THEN pg_catalog.concat('', (SELECT pg_catalog.string_agg(pg_catalog.concat_ws(E'\\x1f', x.name, x.kind, \
        EXISTS (SELECT 1 FROM pg_catalog.pg_trigger g WHERE g.tgrelid OPERATOR(pg_catalog.=) x.oid \
            AND g.tgdeferrable AND NOT g.tgisinternal), x.i, x.u, x.d), E'\\n') \
      FROM (SELECT c.oid, pg_catalog.concat(pg_catalog.quote_ident(n.nspname), '.', pg_catalog.quote_ident(c.relname)) AS name, \
          c.relpersistence AS kind, \
          pg_catalog.pg_stat_get_xact_tuples_inserted(c.oid) AS i, pg_catalog.pg_stat_get_xact_tuples_updated(c.oid) AS u, \
          pg_catalog.pg_stat_get_xact_tuples_deleted(c.oid) AS d \
        FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid OPERATOR(pg_catalog.=) c.relnamespace \
        WHERE c.relkind OPERATOR(pg_catalog.=) ANY ('{r,m}'::pg_catalog.\"char\"[]) \
          AND n.nspname OPERATOR(pg_catalog.!~) '^pg_toast') x \
      WHERE x.i OPERATOR(pg_catalog.<>) 0 OR x.u OPERATOR(pg_catalog.<>) 0 OR x.d OPERATOR(pg_catalog.<>) 0)) \
    ELSE 'off' END";

/// Rows of one table that a statement changed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Delta {
    /// Schema and name, quoted.
    pub table: String,
    pub kind: Kind,
    /// Triggers of users that may run as late as COMMIT.
    pub deferrable_triggers: bool,
    /// Inserted, updated, deleted. TRUNCATE can make them less than before.
    pub rows: [i64; 3],
}

impl Delta {
    /// A table of the proxy's own, which nobody else writes to.
    #[must_use]
    pub fn is_own(&self) -> bool {
        self.table.starts_with("pgtandem.")
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Permanent,
    Temporary,
    Unlogged,
    LargeObject,
    /// Definitions.
    Catalog,
}

impl Kind {
    fn of(table: &str, persistence: &str) -> Self {
        match persistence {
            "t" => Self::Temporary,
            "u" => Self::Unlogged,
            _ if table.starts_with("pg_catalog.pg_largeobject") => Self::LargeObject,
            _ if table.starts_with("pg_catalog.") => Self::Catalog,
            _ => Self::Permanent,
        }
    }
}

type Reading<'t> = BTreeMap<&'t str, (Kind, bool, [i64; 3])>;

fn read(text: &str) -> Option<Reading<'_>> {
    text.lines()
        .map(|line| {
            let mut parts = line.split('\x1f');
            let table = parts.next()?;
            let kind = Kind::of(table, parts.next()?);
            let deferrable = parts.next()? == "t";
            let mut count = || parts.next()?.parse().ok();
            Some((table, (kind, deferrable, [count()?, count()?, count()?])))
        })
        .collect()
}

/// What happened between two readings, by the tables' names. `None`: the statistics are off, or can not be read.
#[must_use]
pub fn between(before: &str, after: &str) -> Option<Vec<Delta>> {
    let (before, after) = (read(before)?, read(after)?);
    let nothing = (Kind::Permanent, false, [0; 3]);
    let mut deltas = Vec::new();
    for (table, (kind, deferrable_triggers, rows)) in after {
        let (_, _, earlier) = before.get(table).copied().unwrap_or(nothing);
        let rows = std::array::from_fn(|i| {
            rows.get(i).copied().unwrap_or(0).saturating_sub(earlier.get(i).copied().unwrap_or(0))
        });
        if rows != [0; 3] {
            deltas.push(Delta { table: table.to_owned(), kind, deferrable_triggers, rows });
        }
    }
    Some(deltas)
}

/// The first difference between two servers, as a sentence; definitions are not compared.
#[must_use]
pub fn difference(leader: &[Delta], follower: &[Delta]) -> Option<String> {
    let rows = |deltas: &[Delta], table: &str| deltas.iter().find(|d| d.table == table).map_or([0; 3], |d| d.rows);
    let tables = leader.iter().chain(follower).filter(|delta| delta.kind != Kind::Catalog);
    tables.map(|delta| &delta.table).find_map(|table| {
        let (here, there) = (rows(leader, table), rows(follower, table));
        (here != there).then(|| {
            format!(
                "in {table} it inserted, updated and deleted {} rows on the leader, {} there",
                here.map(|n| n.to_string()).join("/"),
                there.map(|n| n.to_string()).join("/")
            )
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const BEFORE: &str = "public.t\x1fp\x1ff\x1f1\x1f0\x1f0";

    #[test]
    fn what_a_statement_did_is_the_difference_of_two_readings() {
        let after = "public.\"T x\"\x1fp\x1ft\x1f0\x1f2\x1f0\npublic.t\x1fp\x1ff\x1f1\x1f0\x1f0\npg_catalog.pg_class\x1fp\x1ff\x1f1\x1f0\x1f0";
        let deltas = between(BEFORE, after).unwrap();
        assert_eq!(deltas.len(), 2);
        assert_eq!((deltas[0].table.as_str(), deltas[0].kind), ("pg_catalog.pg_class", Kind::Catalog));
        assert_eq!((deltas[1].rows, deltas[1].deferrable_triggers), ([0, 2, 0], true));
        assert!(between(BEFORE, BEFORE).unwrap().is_empty());
        assert!(between("off", "off").is_none());
        let own = |table: &str| between("", &format!("{table}\x1fp\x1ff\x1f0\x1f1\x1f0")).unwrap()[0].is_own();
        assert!(own("pgtandem.mark") && !own("public.mark") && !own("pgtandem_x.mark"));
    }

    #[test]
    fn a_difference_names_the_table() {
        let of = |rows: &str| between("", &format!("public.t\x1fp\x1ff\x1f{rows}")).unwrap();
        assert_eq!(difference(&of("1\x1f0\x1f0"), &of("1\x1f0\x1f0")), None);
        let told = difference(&of("1\x1f0\x1f0"), &[]).unwrap();
        assert_eq!(told, "in public.t it inserted, updated and deleted 1/0/0 rows on the leader, 0/0/0 there");
    }
}
