//! What PostgreSQL's own functions do beyond their volatility class. Names that are not listed are judged by the class alone.

use super::facts::Function;

/// Volatile functions of PostgreSQL that write nothing permanent that followers must have: they run on the leader without
/// the guard. Sequences are among them, followers' sequences are kept ahead by other means.
const HARMLESS_VOLATILE: &[&str] = &[
    // they tidy an index and change no content
    "brin_desummarize_range",
    "brin_summarize_new_values",
    "brin_summarize_range",
    "gin_clean_pending_list",
    "clock_timestamp",
    "currval",
    "gen_random_uuid",
    "lastval",
    "nextval",
    "pg_advisory_lock",
    "pg_advisory_lock_shared",
    "pg_advisory_unlock",
    "pg_advisory_unlock_all",
    "pg_advisory_unlock_shared",
    "pg_advisory_xact_lock",
    "pg_advisory_xact_lock_shared",
    "pg_available_extensions",
    "pg_available_extension_versions",
    "pg_backend_pid",
    "pg_blocking_pids",
    "pg_cancel_backend",
    "pg_cursor",
    "pg_collation_actual_version",
    "pg_control_checkpoint",
    "pg_control_init",
    "pg_control_recovery",
    "pg_control_system",
    "pg_current_logfile",
    "pg_current_snapshot",
    "pg_current_wal_flush_lsn",
    "pg_current_wal_insert_lsn",
    "pg_current_wal_lsn",
    "pg_current_xact_id",
    "pg_current_xact_id_if_assigned",
    "pg_database_collation_actual_version",
    "pg_database_size",
    "pg_export_snapshot",
    "pg_extension_update_paths",
    "pg_get_backend_memory_contexts",
    "pg_get_replication_slots",
    "pg_get_shmem_allocations",
    "pg_get_wal_summarizer_state",
    "pg_hba_file_rules",
    "pg_ident_file_mappings",
    "pg_indexes_size",
    "pg_is_in_backup",
    "pg_is_in_recovery",
    "pg_is_wal_replay_paused",
    "pg_isolation_test_session_is_blocked",
    "pg_last_committed_xact",
    "pg_last_wal_receive_lsn",
    "pg_last_wal_replay_lsn",
    "pg_last_xact_replay_timestamp",
    "pg_listening_channels",
    "pg_lock_status",
    "pg_log_backend_memory_contexts",
    "pg_ls_dir",
    "pg_ls_logdir",
    "pg_ls_tmpdir",
    "pg_ls_waldir",
    "pg_notification_queue_usage",
    "pg_notify",
    "pg_partition_ancestors",
    "pg_partition_tree",
    "pg_prepared_statement",
    "pg_prepared_xact",
    "pg_read_binary_file",
    "pg_read_file",
    "pg_relation_filepath",
    "pg_relation_size",
    "pg_safe_snapshot_blocking_pids",
    "pg_sequence_last_value",
    "pg_show_all_file_settings",
    "pg_show_all_settings",
    "pg_show_replication_origin_status",
    "pg_sleep",
    "pg_sleep_for",
    "pg_sleep_until",
    "pg_stat_file",
    "pg_stat_get_activity",
    "pg_stat_get_backend_idset",
    "pg_table_size",
    "pg_tablespace_size",
    "pg_terminate_backend",
    "pg_timezone_abbrevs",
    "pg_timezone_names",
    "pg_total_relation_size",
    "pg_try_advisory_lock",
    "pg_try_advisory_lock_shared",
    "pg_try_advisory_xact_lock",
    "pg_try_advisory_xact_lock_shared",
    "pg_typeof",
    "pg_visible_in_snapshot",
    "pg_wait_for_backend_termination",
    "random",
    "random_normal",
    "set_config",
    "setseed",
    "setval",
    "timeofday",
    "txid_current",
    "txid_current_if_assigned",
    "txid_current_snapshot",
    "txid_status",
    "uuidv4",
    "uuidv7",
    "pg_xact_status",
    "pg_xact_commit_timestamp",
];

/// Stable functions of PostgreSQL whose result depends on their arguments and on settings that followers share, but not on the
/// clock, on tables or on the node.
const STABLE_BY_SETTINGS: &[&str] = &[
    "array_to_json",
    "array_to_string",
    "concat",
    "concat_ws",
    "convert",
    "convert_from",
    "convert_to",
    "date",
    "date_add",
    "date_bin",
    "date_part",
    "date_subtract",
    "date_trunc",
    "extract",
    "format",
    "generate_series",
    "interval",
    "isfinite",
    "json_build_array",
    "json_build_object",
    "json_object",
    "json_strip_nulls",
    "jsonb_build_array",
    "jsonb_build_object",
    "jsonb_object",
    "jsonb_path_exists_tz",
    "jsonb_path_match_tz",
    "jsonb_path_query_array_tz",
    "jsonb_path_query_first_tz",
    "jsonb_path_query_tz",
    // of bytea and an encoding; all others of this name are immutable
    "length",
    "make_timestamptz",
    "overlaps",
    "phraseto_tsquery",
    "plainto_tsquery",
    "quote_literal",
    "quote_nullable",
    "record_to_text",
    "row_to_json",
    "text",
    "time",
    "timestamp",
    "timestamptz",
    "timetz",
    "timezone",
    "to_char",
    "to_date",
    "to_json",
    "to_jsonb",
    "to_number",
    "to_timestamp",
    "to_tsquery",
    "to_tsvector",
    "ts_headline",
    "ts_rank",
    "ts_rank_cd",
    "tsrange",
    "tstzrange",
    "websearch_to_tsquery",
    "timestamptz_pl_interval",
    "timestamptz_mi_interval",
    "timestamp_gt_timestamptz",
    "timestamp_lt_timestamptz",
    "textanycat",
    "anytextcat",
    "money",
    "numeric",
    "int8",
    "daterange",
    "regexp_match",
    "string_to_table",
    // comparisons of date, timestamp and timestamptz with each other, as CHECK constraints call them
    "date_eq_timestamptz",
    "date_ne_timestamptz",
    "date_lt_timestamptz",
    "date_le_timestamptz",
    "date_gt_timestamptz",
    "date_ge_timestamptz",
    "timestamptz_eq_date",
    "timestamptz_ne_date",
    "timestamptz_lt_date",
    "timestamptz_le_date",
    "timestamptz_gt_date",
    "timestamptz_ge_date",
    "timestamp_eq_timestamptz",
    "timestamp_ne_timestamptz",
    "timestamp_le_timestamptz",
    "timestamp_ge_timestamptz",
    "timestamptz_eq_timestamp",
    "timestamptz_ne_timestamp",
    "timestamptz_lt_timestamp",
    "timestamptz_le_timestamp",
    "timestamptz_gt_timestamp",
    "timestamptz_ge_timestamp",
];

/// Results that depend on the order in which rows arrive.
const ORDER_DEPENDENT: &[&str] = &[
    "any_value",
    "array_agg",
    "json_agg",
    "json_agg_strict",
    "json_object_agg",
    "json_object_agg_strict",
    "json_object_agg_unique",
    "json_object_agg_unique_strict",
    "jsonb_agg",
    "jsonb_agg_strict",
    "jsonb_object_agg",
    "jsonb_object_agg_strict",
    "jsonb_object_agg_unique",
    "jsonb_object_agg_unique_strict",
    "string_agg",
    "xmlagg",
    "row_number",
    "rank",
    "dense_rank",
    "percent_rank",
    "cume_dist",
    "ntile",
    "lag",
    "lead",
    "first_value",
    "last_value",
    "nth_value",
    "mode",
];

/// Over floating point numbers their results depend on the order in which rows arrive.
const FLOAT_AGGREGATES: &[&str] = &[
    "avg",
    "corr",
    "covar_pop",
    "covar_samp",
    "regr_avgx",
    "regr_avgy",
    "regr_intercept",
    "regr_r2",
    "regr_slope",
    "regr_sxx",
    "regr_sxy",
    "regr_syy",
    "stddev",
    "stddev_pop",
    "stddev_samp",
    "sum",
    "var_pop",
    "var_samp",
    "variance",
    "percentile_cont",
];

/// Values of the session or the transaction that are the same for every row of a statement: name and SQL type.
const SESSION_VALUES: &[(&str, &str)] = &[
    ("now", "pg_catalog.timestamptz"),
    ("transaction_timestamp", "pg_catalog.timestamptz"),
    ("statement_timestamp", "pg_catalog.timestamptz"),
    ("current_schema", "pg_catalog.name"),
    ("current_database", "pg_catalog.name"),
];

/// What a function does to determinism and to other nodes, worst first by the order of the variants.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Effect {
    /// Its value follows from its arguments and from settings that followers share.
    Pure,
    /// Its value differs from node to node or time to time; nothing is written.
    Varies,
    /// It may write; the server's read-only guard tells.
    Unknown,
    /// It writes, and not every version's guard stops it.
    Writes,
}

/// The worst of all functions that a call can mean. None: there is no such function, the leader answers the error.
#[must_use]
pub fn effect(candidates: &[Function], arguments: Option<usize>) -> Option<Effect> {
    candidates.iter().map(|candidate| effect_of(candidate, arguments)).max()
}

#[allow(clippy::match_same_arms, reason = "the order of the arms is the order of the rules")]
fn effect_of(function: &Function, arguments: Option<usize>) -> Effect {
    let name = function.name.as_str();
    match (function.builtin, function.volatility.as_str()) {
        // the class of an aggregate says nothing of the functions that it is made of
        (false, "i") if function.kind == "f" || function.immutable_parts => Effect::Pure,
        (false, _) if function.harmless => Effect::Varies,
        (false, _) => Effect::Unknown,
        (true, _) if WRITERS.contains(&name) => Effect::Writes,
        // age(t) counts from today
        (true, _) if name == "age" && arguments != Some(2) => Effect::Varies,
        (true, "i") => Effect::Pure,
        (true, "s") if name == "age" || STABLE_BY_SETTINGS.contains(&name) => Effect::Pure,
        (true, "s") if !WRITES_ALTHOUGH_STABLE.contains(&name) => Effect::Varies,
        (true, _) if HARMLESS_VOLATILE.contains(&name) || name.starts_with("pg_stat_") => Effect::Varies,
        (true, _) => Effect::Unknown,
    }
}

/// Large objects and the like: servers before 16 let them write in a read-only transaction.
const WRITERS: &[&str] = &[
    "lo_creat",
    "lo_create",
    "lo_export",
    "lo_from_bytea",
    "lo_import",
    "lo_open",
    "lo_put",
    "lo_truncate",
    "lo_truncate64",
    "lo_unlink",
    "lowrite",
    "pg_import_system_collations",
    "pg_replication_origin_advance",
    "pg_replication_origin_create",
    "pg_replication_origin_drop",
];

/// They run a query that is given as text.
const WRITES_ALTHOUGH_STABLE: &[&str] =
    &["cursor_to_xml", "query_to_xml", "query_to_xmlschema", "query_to_xml_and_xmlschema", "ts_stat", "ts_rewrite"];

/// What a function of PostgreSQL with this name leaves in the session when the transaction has ended. `set_config()` depends on how it is called.
#[must_use]
pub fn stays(name: &str) -> Option<&'static str> {
    Some(match name {
        "pg_advisory_lock" | "pg_advisory_lock_shared" | "pg_try_advisory_lock" | "pg_try_advisory_lock_shared" => {
            "it has taken an advisory lock for the whole session"
        }
        "setseed" => "it has used setseed()",
        "set_limit" => "it has set the limit of pg_trgm",
        _ if WRITES_ALTHOUGH_STABLE.contains(&name) => "it has run a query that was given as text",
        _ => return None,
    })
}

/// Whether a function of this name may be one that the guard does not stop on every server.
#[must_use]
pub fn passes_the_guard(name: &str) -> bool {
    WRITERS.contains(&name) || WRITES_ALTHOUGH_STABLE.contains(&name)
}

#[must_use]
pub fn is_order_dependent(name: &str) -> bool {
    ORDER_DEPENDENT.contains(&name)
}

#[must_use]
pub fn is_float_aggregate(name: &str) -> bool {
    FLOAT_AGGREGATES.contains(&name)
}

/// The SQL type of a function without arguments whose value is the same for a whole statement.
#[must_use]
pub fn session_value(name: &str) -> Option<&'static str> {
    SESSION_VALUES.iter().find(|(known, _)| *known == name).map(|(_, sql_type)| *sql_type)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// In the body of a function the name alone is known, and one function of this name is stable.
    #[test]
    fn the_length_of_a_text_is_the_same_everywhere() {
        let length = |volatility: &str| Function {
            schema: "pg_catalog".to_owned(),
            name: "length".to_owned(),
            volatility: volatility.to_owned(),
            builtin: true,
            kind: "f".to_owned(),
            ..Function::default()
        };
        assert_eq!(effect(&[length("i"), length("s")], Some(1)), Some(Effect::Pure));
        let now = Function { name: "now".to_owned(), ..length("s") };
        assert_eq!(effect(&[now], Some(0)), Some(Effect::Varies));
    }
}
