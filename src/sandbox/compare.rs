//! Are the servers of a sandbox identical? Asked of each server directly, without the proxy.
//!
//! Every table of every database is hashed on every server: its rows as text, ordered, so that neither physical
//! order nor the number of rows per page matters. Sequences are left out (followers may have them ahead), and so is
//! schema `pgtandem`, which keeps what differs by node, and unlogged tables, which arrive empty.

use std::collections::BTreeMap;

use tokio_postgres::{Client, NoTls};

use super::Layout;

/// How many differences a report names.
const DIFFERENCES_MAX: usize = 20;

/// `database.schema.table` with the number of rows and the hash of the ordered rows.
pub type Contents = BTreeMap<String, (i64, String)>;

#[derive(Debug, thiserror::Error)]
pub enum CompareError {
    #[error("{what} on port {port}: {source}")]
    Postgres { what: String, port: u16, source: tokio_postgres::Error },
}

/// What a comparison found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Comparison {
    /// Tables on the first server.
    pub tables: usize,
    pub rows: i64,
    /// One sentence each, at most 20; none: the servers are identical.
    pub differences: Vec<String>,
}

impl Comparison {
    #[must_use]
    pub fn is_identical(&self) -> bool {
        self.differences.is_empty()
    }
}

/// Compares node0 with every other node. Nothing must be written meanwhile.
pub async fn compare(layout: &Layout) -> Result<Comparison, CompareError> {
    let first = contents(layout.postgres_port(0)).await?;
    let mut differences = Vec::new();
    for index in 1..layout.plan.nodes {
        let other = contents(layout.postgres_port(index)).await?;
        differences.extend(differ(&first, &other, &Layout::node_name(0), &Layout::node_name(index)));
    }
    differences.truncate(DIFFERENCES_MAX);
    Ok(Comparison { tables: first.len(), rows: first.values().map(|(rows, _)| rows).sum(), differences })
}

fn differ(a: &Contents, b: &Contents, a_name: &str, b_name: &str) -> Vec<String> {
    let mut found = Vec::new();
    for (table, (rows, hash)) in a {
        match b.get(table) {
            None => found.push(format!("{table} is on {a_name} only")),
            Some((other, _)) if other != rows => {
                found.push(format!("{table} has {rows} rows on {a_name} and {other} on {b_name}"));
            }
            Some((_, other)) if other != hash => {
                found.push(format!("{table} has {rows} rows on both, and different ones"));
            }
            Some(_) => {}
        }
    }
    found.extend(b.keys().filter(|table| !a.contains_key(*table)).map(|table| format!("{table} is on {b_name} only")));
    found
}

/// Hashes every table of the server that listens on `port`.
pub async fn contents(port: u16) -> Result<Contents, CompareError> {
    let databases = "select datname from pg_database where datallowconn and not datistemplate order by 1";
    let tables = "select c.oid::regclass::text, quote_ident(n.nspname) || '.' || quote_ident(c.relname)
         from pg_class c join pg_namespace n on n.oid = c.relnamespace
         where c.relkind in ('r', 'm') and c.relpersistence = 'p' and n.nspname !~ '^pg_'
           and n.nspname not in ('information_schema', 'pgtandem') order by 2";
    let mut contents = Contents::new();
    let postgres = connect(port, "postgres").await?;
    for row in query(&postgres, port, databases).await? {
        let database: String = row.get(0);
        let client = connect(port, &database).await?;
        // Text is compared byte by byte and rows are written alike, whatever the server's settings are.
        let settings =
            "set search_path = ''; set extra_float_digits = 1; set datestyle = 'ISO, YMD'; set timezone = 'UTC';
            set bytea_output = hex; set work_mem = '64MB'";
        let failed = |source| CompareError::Postgres { what: format!("database {database}"), port, source };
        client.batch_execute(settings).await.map_err(failed)?;
        for row in query(&client, port, tables).await? {
            let (table, name): (String, String) = (row.get(0), row.get(1));
            let sql = format!(
                "select count(*), md5(coalesce(string_agg(md5(t::text), '' order by t::text collate \"C\"), '')) from {table} t"
            );
            for row in query(&client, port, &sql).await? {
                contents.insert(format!("{database}.{name}"), (row.get(0), row.get(1)));
            }
        }
    }
    Ok(contents)
}

/// A connection as postgres over TCP.
pub async fn connect(port: u16, database: &str) -> Result<Client, CompareError> {
    let mut config = tokio_postgres::Config::new();
    config.host("127.0.0.1").port(port).user("postgres").dbname(database).application_name("pgtandem sandbox");
    config.connect_timeout(std::time::Duration::from_secs(10));
    let failed = |source| CompareError::Postgres { what: format!("connecting to database {database}"), port, source };
    let (client, connection) = config.connect(NoTls).await.map_err(failed)?;
    // Ends with the client; its error is the client's error, too.
    tokio::spawn(connection);
    Ok(client)
}

async fn query(client: &Client, port: u16, sql: &str) -> Result<Vec<tokio_postgres::Row>, CompareError> {
    let failed = |source| CompareError::Postgres { what: sql.to_owned(), port, source };
    client.query(sql, &[]).await.map_err(failed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn differences_are_named() {
        let contents = |rows: &[(&str, i64, &str)]| -> Contents {
            rows.iter().map(|(table, rows, hash)| ((*table).to_owned(), (*rows, (*hash).to_owned()))).collect()
        };
        let a = contents(&[("b.s.one", 1, "x"), ("b.s.two", 2, "y"), ("b.s.three", 3, "z")]);
        let b = contents(&[("b.s.one", 1, "x"), ("b.s.two", 2, "w"), ("b.s.four", 3, "z")]);
        assert_eq!(
            differ(&a, &b, "node0", "node1"),
            [
                "b.s.three is on node0 only",
                "b.s.two has 2 rows on both, and different ones",
                "b.s.four is on node1 only"
            ]
        );
    }
}
