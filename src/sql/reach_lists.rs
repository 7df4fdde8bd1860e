//! Names that [`super::reach`] knows.

/// Functions of PostgreSQL that are not known to be the same everywhere by their class, and that do the same in a half.
pub(super) const SAME_IN_A_HALF: &[&str] = &[
    "current_schemas",
    "current_setting",
    "has_any_column_privilege",
    "has_column_privilege",
    "has_database_privilege",
    "has_function_privilege",
    "has_schema_privilege",
    "has_sequence_privilege",
    "has_table_privilege",
    "pg_advisory_xact_lock",
    "pg_advisory_xact_lock_shared",
    "pg_has_role",
    "pg_sleep",
    "pg_trigger_depth",
    "pg_typeof",
    "row_security_active",
    "tsvector_update_trigger",
    "tsvector_update_trigger_column",
    "set_config",
];

/// Settings that PostgreSQL was built or a cluster was made with, the same in every copy of it.
pub(super) const SAME_SETTINGS: &[&str] = &[
    "block_size",
    "integer_datetimes",
    "lc_collate",
    "lc_ctype",
    "max_function_args",
    "max_identifier_length",
    "max_index_keys",
    "segment_size",
    "server_encoding",
    "wal_block_size",
    "wal_segment_size",
];

/// Operators that a text may mean without their signs: IN, BETWEEN, CASE, LIKE, ORDER BY, USING and the like.
pub(super) const IMPLIED_OPERATORS: &[&str] = &["=", "<>", "<", "<=", ">", ">=", "~~", "!~~", "~~*", "!~~*", "~", "!~"];
