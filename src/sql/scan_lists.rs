//! Words that [`super::scan`] knows, and why they matter.

/// Values of the clock and the session without a parenthesis.
pub(super) const CLOCK: &[&str] = &["current_date", "current_time", "current_timestamp", "localtime", "localtimestamp"];
pub(super) const CLOSED: &str = "it changes a setting that followers must keep";
/// At the start of a statement: what must not happen inside of functions, and why.
pub(super) const FORBIDDEN: &[(&str, &str)] = &[
    ("alter", "it changes definitions"),
    ("cluster", "it changes definitions"),
    ("comment", "it changes definitions"),
    ("create", "it changes definitions"),
    ("drop", "it changes definitions"),
    ("grant", "it changes rights"),
    ("import", "it changes definitions"),
    ("refresh", "it changes definitions"),
    ("reindex", "it changes definitions"),
    ("revoke", "it changes rights"),
    ("commit", "it ends the transaction"),
    ("rollback", "it ends the transaction"),
    ("listen", "it uses LISTEN, which a transaction on a follower can not be prepared with"),
    ("notify", "it uses NOTIFY, which a transaction on a follower can not be prepared with"),
    ("unlisten", "it uses UNLISTEN, which a transaction on a follower can not be prepared with"),
    ("copy", "it uses COPY"),
    ("discard", "it discards the session's state"),
    ("load", "it loads a library"),
    ("vacuum", "it uses VACUUM"),
];
/// Anywhere: what is done, or which rows are meant, is not in the text.
pub(super) const OPEN: &[(&str, &str)] = &[
    ("execute", "it runs text that is put together at run time"),
    ("prepare", "it runs text that is put together at run time"),
    ("do", "it runs code inside of code"),
    ("limit", "which rows LIMIT gives depends on the order in which a server finds them"),
    ("offset", "which rows OFFSET gives depends on the order in which a server finds them"),
    ("fetch", "which rows FETCH gives depends on the order in which a server finds them"),
    ("move", "it moves a cursor, whose rows have no certain order"),
    ("over", "a window function depends on the order in which a server finds rows"),
    ("tablesample", "TABLESAMPLE chooses rows"),
    ("truncate", "it uses TRUNCATE inside of code"),
    ("information_schema", "it reads the catalog"),
    ("ctid", "it reads the system column ctid"),
    ("xmin", "it reads the system column xmin"),
    ("xmax", "it reads the system column xmax"),
    ("cmin", "it reads the system column cmin"),
    ("cmax", "it reads the system column cmax"),
    ("tableoid", "it reads the system column tableoid"),
    ("oid", "it uses object identifiers"),
    ("regclass", "it uses object identifiers"),
    ("regproc", "it uses object identifiers"),
    ("regprocedure", "it uses object identifiers"),
    ("regtype", "it uses object identifiers"),
    ("regrole", "it uses object identifiers"),
    ("regnamespace", "it uses object identifiers"),
];
/// Settings that code must not change.
pub(super) const CLOSED_SETTINGS: &[&str] = &[
    "role",
    "session_authorization",
    "session_replication_role",
    "standard_conforming_strings",
    "client_encoding",
    "lock_timeout",
    "statement_timeout",
];
/// They go through rows.
pub(super) const MANY: &[&str] = &["from", "update", "delete", "merge", "using"];
/// Wherever they stand, quoted or behind a dot, too.
pub(super) const SYSTEM_COLUMNS: &[&str] = &["ctid", "xmin", "xmax", "cmin", "cmax", "tableoid"];
/// Of a name that PostgreSQL does not cut: `NAMEDATALEN` less the end.
pub(super) const NAME_BYTES_MAX: usize = 63;
