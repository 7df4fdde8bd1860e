//! What pgtandem keeps inside every database: the schema `pgtandem`, and the texts that use it.
//!
//! `pgtandem.epoch`: one row, local to the node: the epoch that may use the database and the hash of its secret.
//! `pgtandem.mark`: a row per mark: the last of its transactions that is decided.
//! `pgtandem.prepared`, used in database `postgres`: transactions that clients have prepared, and their marks.
//! `pgtandem.intent`, used in database `postgres`: a statement that runs node by node and is not finished everywhere.
//! The functions run with the rights of their owner, and a fixed `search_path` or whole names of all that they use; they take the
//! secret of the epoch, always as a bound parameter, so no client can call them although they are callable by everybody.
//! `pgtandem.catalog` runs a query of the proxy's with the caller's rights and search_path, but without the settings of the session
//! that would change its plan or its answer.
//! `pgtandem.mark` must not scan its table: with `enable_seqscan = off` a plan that has no index costs so much that PostgreSQL
//! would compile it (a tenth of a second for each session), hence a condition on each key. Each setting of a function costs microseconds
//! at each commit, so it has only that one.

use std::fmt::Write;

/// Creates what is missing; run once per database on the leader, before the first fill, as role `pgtandem`.
pub const INSTALL: &str = r"
CREATE SCHEMA IF NOT EXISTS pgtandem;
GRANT USAGE ON SCHEMA pgtandem TO PUBLIC;
CREATE TABLE IF NOT EXISTS pgtandem.epoch (
    one boolean PRIMARY KEY DEFAULT true CHECK (one),
    epoch bigint NOT NULL,
    secret_hash bytea NOT NULL);
CREATE TABLE IF NOT EXISTS pgtandem.generation (one boolean PRIMARY KEY DEFAULT true CHECK (one), id text NOT NULL);
CREATE TABLE IF NOT EXISTS pgtandem.mark (id integer PRIMARY KEY, n bigint NOT NULL) WITH (fillfactor = 50);
CREATE TABLE IF NOT EXISTS pgtandem.intent (
    id text PRIMARY KEY,
    database text NOT NULL,
    role text NOT NULL,
    settings text[] NOT NULL,
    statement text NOT NULL,
    before text[] NOT NULL);
CREATE TABLE IF NOT EXISTS pgtandem.prepared (
    gid text PRIMARY KEY,
    database text NOT NULL,
    mark integer NOT NULL,
    n bigint NOT NULL,
    ddl boolean NOT NULL);
REVOKE ALL ON pgtandem.epoch, pgtandem.generation, pgtandem.mark, pgtandem.intent, pgtandem.prepared FROM PUBLIC;
CREATE OR REPLACE FUNCTION pgtandem.enter(given text, of_epoch bigint) RETURNS void
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    PERFORM 1 FROM pgtandem.epoch e WHERE e.epoch = of_epoch AND e.secret_hash = sha256(convert_to(given, 'UTF8'));
    IF NOT FOUND THEN
        RAISE EXCEPTION 'epoch % of this proxy is over: a newer proxy serves this database', of_epoch
            USING ERRCODE = '57P01', HINT = 'Connect again.';
    END IF;
END $$;
CREATE OR REPLACE FUNCTION pgtandem.mark(given text, mark_id integer, mark_n bigint) RETURNS void
LANGUAGE plpgsql SECURITY DEFINER SET enable_seqscan = off AS $$
DECLARE
    serializable CONSTANT boolean :=
        pg_catalog.current_setting('transaction_isolation') OPERATOR(pg_catalog.=) 'serializable'::pg_catalog.text;
BEGIN
    IF NOT serializable THEN
        UPDATE pgtandem.mark m SET n = mark_n
            WHERE m.id OPERATOR(pg_catalog.=) mark_id AND m.n OPERATOR(pg_catalog.<) mark_n
            AND (SELECT e.secret_hash FROM pgtandem.epoch e WHERE e.one)
                OPERATOR(pg_catalog.=) pg_catalog.sha256(pg_catalog.convert_to(given, 'UTF8'));
    END IF;
    IF serializable OR NOT FOUND THEN
        PERFORM 1 FROM pgtandem.epoch e
            WHERE e.one AND e.secret_hash OPERATOR(pg_catalog.=) pg_catalog.sha256(pg_catalog.convert_to(given, 'UTF8'));
        IF NOT FOUND THEN
            RAISE EXCEPTION 'pgtandem.mark is for the proxy alone' USING ERRCODE = '42501';
        END IF;
        -- Marks must not make transactions depend on each other. An arbiter index is searched without predicate locks.
        INSERT INTO pgtandem.mark AS m (id, n) VALUES (mark_id, mark_n)
            ON CONFLICT (id) DO UPDATE SET n = excluded.n WHERE m.n OPERATOR(pg_catalog.<) excluded.n;
        IF NOT FOUND THEN
            RAISE EXCEPTION 'mark % has reached % already', mark_id, mark_n USING ERRCODE = '23505';
        END IF;
    END IF;
    IF pg_catalog.current_setting('synchronous_commit') OPERATOR(pg_catalog.=) 'off'::pg_catalog.text THEN
        PERFORM pg_catalog.set_config('synchronous_commit', 'local', true);
    END IF;
END $$;
CREATE OR REPLACE FUNCTION pgtandem.catalog(query text) RETURNS text
LANGUAGE plpgsql STABLE SET jit = off SET max_parallel_workers_per_gather = 0 SET enable_seqscan = on
SET enable_indexscan = on SET enable_bitmapscan = on SET enable_nestloop = on SET enable_hashjoin = on SET enable_sort = on
SET enable_material = on SET quote_all_identifiers = off AS $$
DECLARE answer text;
BEGIN
    EXECUTE query INTO answer;
    RETURN answer;
END $$;
CREATE OR REPLACE FUNCTION pgtandem.verifier(given text, of_role text) RETURNS text
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    PERFORM 1 FROM pgtandem.epoch e WHERE e.secret_hash = sha256(convert_to(given, 'UTF8'));
    IF NOT FOUND THEN
        RAISE EXCEPTION 'pgtandem.verifier is for the proxy alone' USING ERRCODE = '42501';
    END IF;
    RETURN (SELECT a.rolpassword FROM pg_authid a WHERE a.rolname = of_role);
END $$;
CREATE OR REPLACE FUNCTION pgtandem.refuse(given text, message text, hint text) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    RAISE EXCEPTION USING ERRCODE = given, MESSAGE = message, HINT = hint;
END $$;
";

/// Functions that say what followers do instead of a definition; after [`INSTALL`].
pub const INSTALL_DEFINITIONS: &str = include_str!("definitions.sql");

/// Databases that allow connections, by name. One whose DROP was interrupted (limit -2) does not.
pub const DATABASES: &str =
    "SELECT datname FROM pg_catalog.pg_database WHERE datallowconn AND datconnlimit <> -2 ORDER BY datname";

/// `$1` epoch, `$2` the secret, of which only the hash is kept. Run before old sessions are ended.
pub const RAISE_EPOCH: &str = "INSERT INTO pgtandem.epoch AS e (one, epoch, secret_hash) \
     VALUES (true, $1, pg_catalog.sha256(pg_catalog.convert_to($2, 'UTF8'))) \
     ON CONFLICT (one) DO UPDATE SET epoch = excluded.epoch, secret_hash = excluded.secret_hash \
     WHERE e.epoch <= excluded.epoch";

/// Ends every client backend of this server but the caller's own; gives how many were still there.
pub const END_SESSIONS: &str = "SELECT count(pg_catalog.pg_terminate_backend(pid)) FROM pg_catalog.pg_stat_activity \
     WHERE backend_type = 'client backend' AND pid <> pg_catalog.pg_backend_pid()";

/// Statements that every session of ours has prepared, by name.
pub const PREPARED: &[(&str, &str)] = &[
    ("pgtandem_begin", "BEGIN"),
    ("pgtandem_commit", "COMMIT"),
    ("pgtandem_commit_chain", "COMMIT AND CHAIN"),
    ("pgtandem_rollback", "ROLLBACK"),
    ("pgtandem_mark", "SELECT pgtandem.mark($1, $2, $3)"),
    ("pgtandem_lock", "SELECT pgtandem.lock($1, $2)"),
    ("pgtandem_catalog", "SELECT pgtandem.catalog($1)"),
    ("pgtandem_verifier", "SELECT pgtandem.verifier($1, $2)"),
    ("pgtandem_refuse", "SELECT pgtandem.refuse($1, $2, $3)"),
    ("pgtandem_snapshot", "SELECT 1"),
    ("pgtandem_guard", "SAVEPOINT pgtandem_guard"),
    ("pgtandem_guard_on", "SET TRANSACTION READ ONLY"),
    ("pgtandem_guard_off", "RELEASE SAVEPOINT pgtandem_guard"),
    ("pgtandem_immediate", "SET CONSTRAINTS ALL IMMEDIATE"),
    ("pgtandem_context", CONTEXT_QUERY),
    ("pgtandem_deltas", crate::replicate::deltas::QUERY),
    ("pgtandem_once", "SAVEPOINT pgtandem_once"),
    ("pgtandem_once_undo", "ROLLBACK TO SAVEPOINT pgtandem_once"),
    ("pgtandem_once_keep", "RELEASE SAVEPOINT pgtandem_once"),
    ("pgtandem_guard_undo", "ROLLBACK TO SAVEPOINT pgtandem_guard"),
    ("pgtandem_chain", "ROLLBACK AND CHAIN"),
    (
        "pgtandem_limits",
        "SELECT pg_catalog.concat_ws(E'\\x1f', pg_catalog.current_setting('statement_timeout'), \
         pg_catalog.current_setting('lock_timeout'))",
    ),
    (
        "pgtandem_limit",
        "SELECT pg_catalog.concat(pg_catalog.set_config('statement_timeout', $1, true), \
         pg_catalog.set_config('lock_timeout', $2, true))",
    ),
];

/// The mark of a half: followers' sessions are the proxy's own role, so they need no function and no secret for it.
/// A half that was made already fails here, with a division by zero: n only grows. Operators have their schema, because the session has
/// a client's `search_path` and the rights of a superuser.
pub const MARK_ON_FOLLOWER: &str = "INSERT INTO pgtandem.mark AS k (id, n) VALUES ($1, $2) \
     ON CONFLICT (id) DO UPDATE SET n = excluded.n OPERATOR(pg_catalog./) \
     (k.n OPERATOR(pg_catalog.<) excluded.n)::pg_catalog.int4";

/// Settings of a client's session under which the text of an effect means the same on a follower.
pub const MIRRORED: &[&str] = &[
    "search_path",
    "client_encoding",
    "TimeZone",
    "DateStyle",
    "IntervalStyle",
    "bytea_output",
    "extra_float_digits",
    "array_nulls",
    "transform_null_equals",
    "xmloption",
    "lc_monetary",
    "lc_numeric",
    "lc_time",
    "timezone_abbreviations",
    "default_tablespace",
    "default_table_access_method",
    "default_toast_compression",
    "default_text_search_config",
    "backslash_quote",
    "quote_all_identifiers",
    "xmlbinary",
];

/// What is read of a leader's session when it may have changed: one row, one column, parts separated by U+001F.
/// Role, isolation, standard_conforming_strings, session_replication_role, then [`MIRRORED`] in order.
const CONTEXT_QUERY: &str = "SELECT pg_catalog.concat_ws(E'\\x1f', current_user, \
     pg_catalog.current_setting('transaction_isolation'), pg_catalog.current_setting('standard_conforming_strings'), \
     pg_catalog.current_setting('session_replication_role'), \
     pg_catalog.current_setting('search_path'), pg_catalog.current_setting('client_encoding'), \
     pg_catalog.current_setting('TimeZone'), pg_catalog.current_setting('DateStyle'), \
     pg_catalog.current_setting('IntervalStyle'), pg_catalog.current_setting('bytea_output'), \
     pg_catalog.current_setting('extra_float_digits'), pg_catalog.current_setting('array_nulls'), \
     pg_catalog.current_setting('transform_null_equals'), pg_catalog.current_setting('xmloption'), \
     pg_catalog.current_setting('lc_monetary'), pg_catalog.current_setting('lc_numeric'), \
     pg_catalog.current_setting('lc_time'), pg_catalog.current_setting('timezone_abbreviations'), \
     pg_catalog.current_setting('default_tablespace'), pg_catalog.current_setting('default_table_access_method'), \
     COALESCE(pg_catalog.current_setting('default_toast_compression', true), ''), \
     pg_catalog.current_setting('default_text_search_config'), \
     pg_catalog.current_setting('backslash_quote'), pg_catalog.current_setting('quote_all_identifiers'), \
     pg_catalog.current_setting('xmlbinary'))";

/// What a client's session was like when it made an effect.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Context {
    pub role: String,
    /// Values of [`MIRRORED`], in order.
    pub settings: Vec<String>,
}

impl Context {
    #[must_use]
    pub fn client_encoding(&self) -> &str {
        let at = MIRRORED.iter().position(|name| *name == "client_encoding");
        at.and_then(|at| self.settings.get(at)).map_or("", String::as_str)
    }
}

/// A leader's session, as the context query gives it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SessionFacts {
    pub context: Context,
    pub isolation: String,
    pub standard_conforming_strings: bool,
    pub replication_role_origin: bool,
}

impl SessionFacts {
    /// Whether names mean the same: role and `search_path` are.
    #[must_use]
    pub fn is_same_place(&self, other: &Self) -> bool {
        self.context.role == other.context.role && self.context.settings.first() == other.context.settings.first()
    }

    /// `None` if the row does not have the parts that the query gives.
    #[must_use]
    pub fn parse(row: &str) -> Option<Self> {
        let mut parts = row.split('\x1f').map(str::to_owned);
        let (role, isolation, conforming, replication) = (parts.next()?, parts.next()?, parts.next()?, parts.next()?);
        let settings: Vec<String> = parts.collect();
        (settings.len() == MIRRORED.len()).then(|| Self {
            context: Context { role, settings },
            isolation,
            standard_conforming_strings: conforming == "on",
            replication_role_origin: replication == "origin",
        })
    }
}

/// The statement that brings a follower's session into a context: `$1`.. are the values of [`MIRRORED`], then the role
/// (`none` for the proxy's own). Empty values are left alone where PostgreSQL has no such setting.
#[must_use]
pub fn apply_context_text() -> String {
    let mut text = String::from("SELECT ");
    for (i, name) in MIRRORED.iter().enumerate() {
        let n = i + 1;
        if *name == "default_toast_compression" {
            let _ = write!(text, "CASE WHEN ${n} <> '' THEN pg_catalog.set_config('{name}', ${n}, false) END, ");
        } else {
            let _ = write!(text, "pg_catalog.set_config('{name}', ${n}, false), ");
        }
    }
    text.truncate(text.len() - 2);
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_context_query_names_every_mirrored_setting_in_order() {
        let mut at = 0;
        for name in MIRRORED {
            let found = CONTEXT_QUERY[at..].find(&format!("current_setting('{name}'"));
            at += found.unwrap_or_else(|| panic!("{name} is missing or out of order"));
        }
    }
}
