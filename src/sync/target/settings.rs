//! Texts of B's configuration: what differs by node, what holds during recovery, what must not come from A. Pure.
//!
//! `postgresql.conf` ends with includes: [`NODE_CONF`] (address of this node; written once, then left to people
//! and the sandbox), [`ARCHIVE_CONF`] (written by the agent) and [`RECOVERY_CONF`] (written for a recovery, emptied after it). `postgresql.auto.conf` is read
//! by PostgreSQL after both, so settings that are ours are taken out of it.

use std::path::Path;

use super::super::error::SyncError;
use super::super::rules::{ARCHIVE_CONF, NODE_CONF, RECOVERY_CONF};
use crate::config::NodeConfig;

/// Settings of a node's own address, and places that would lead out of its data directory.
const NODE_SETTINGS: [&str; 6] =
    ["port", "unix_socket_directories", "listen_addresses", "data_directory", "hba_file", "ident_file"];

/// Settings of a recovery under way, with their values. `primary_conninfo` is added.
const RECOVERY_SETTINGS: [(&str, &str); 20] = [
    ("primary_slot_name", "''"),
    ("restore_command", "''"),
    ("archive_cleanup_command", "''"),
    ("recovery_end_command", "''"),
    ("recovery_target", "''"),
    ("recovery_target_lsn", "''"),
    ("recovery_target_name", "''"),
    ("recovery_target_time", "''"),
    ("recovery_target_xid", "''"),
    ("recovery_target_timeline", "'current'"),
    ("recovery_min_apply_delay", "0"),
    ("hot_standby", "on"),
    ("hot_standby_feedback", "off"),
    // Replay hardly ever waits for a query on B; our own look at its position takes less than this.
    ("max_standby_archive_delay", "1s"),
    ("max_standby_streaming_delay", "1s"),
    ("wal_receiver_create_temp_slot", "off"),
    ("wal_receiver_status_interval", "1s"),
    ("wal_receiver_timeout", "60s"),
    ("wal_retrieve_retry_interval", "100ms"),
    // A's subscriptions must not start on B between leaving recovery and being disabled there.
    ("max_logical_replication_workers", "0"),
];

/// The text of [`NODE_CONF`] for a node that has none.
pub(super) fn node_conf(node: &NodeConfig) -> Result<String, SyncError> {
    Ok(format!(
        "# Address of this node. Written once by pgtandem, never copied to another node.\n\
         port = {}\nunix_socket_directories = '{}'\nlisten_addresses = ''\n",
        node.port,
        plain(&node.socket_dir)?
    ))
}

/// The text of [`RECOVERY_CONF`] for a standby that is fed by the relay in `relay_folder`.
pub(super) fn recovery_conf(
    node: &NodeConfig,
    relay_folder: &Path,
    relay_port: u16,
    version_num: u32,
) -> Result<String, SyncError> {
    use std::fmt::Write;
    let mut text = String::from("# A recovery is under way. Written and emptied by pgtandem.\n");
    let folder = plain(relay_folder)?;
    // Writing to a string can not fail.
    let _ = writeln!(
        text,
        "primary_conninfo = 'host={folder} port={relay_port} user=pgtandem application_name={}'",
        node.name
    );
    for (name, value) in RECOVERY_SETTINGS {
        let _ = writeln!(text, "{name} = {value}");
    }
    if version_num >= 140_000 {
        // The files were synced already.
        text.push_str("recovery_init_sync_method = syncfs\n");
    }
    Ok(text)
}

/// The text of [`RECOVERY_CONF`] of a server that left recovery.
pub(super) const RECOVERY_CONF_EMPTY: &str = "# No recovery is under way. Written by pgtandem.\n";

/// `postgresql.conf` with our includes at its end.
pub(super) fn with_includes(text: &str) -> String {
    let includes: Vec<String> =
        [NODE_CONF, ARCHIVE_CONF, RECOVERY_CONF].iter().map(|name| format!("include_if_exists = '{name}'")).collect();
    let mut kept: Vec<&str> = text.lines().collect();
    while kept.last().is_some_and(|line| line.trim().is_empty()) {
        kept.pop();
    }
    if kept.len() >= includes.len()
        && kept
            .get(kept.len() - includes.len()..)
            .is_some_and(|end| end.iter().zip(&includes).all(|(line, include)| line.trim() == include))
    {
        return text.to_owned();
    }
    kept.retain(|line| !includes.iter().any(|include| line.trim() == include));
    let mut out = kept.join("\n");
    out.push('\n');
    for include in includes {
        out.push_str(&include);
        out.push('\n');
    }
    out
}

/// `postgresql.auto.conf` without the settings that belong to a node or a recovery.
pub(super) fn without_ours(text: &str) -> String {
    let ours = |name: &str| {
        name.eq_ignore_ascii_case("primary_conninfo")
            || name.eq_ignore_ascii_case("promote_trigger_file")
            || NODE_SETTINGS.iter().any(|ours| name.eq_ignore_ascii_case(ours))
            || RECOVERY_SETTINGS.iter().any(|(ours, _)| name.eq_ignore_ascii_case(ours))
    };
    let kept: Vec<&str> = text
        .lines()
        .filter(|line| {
            let name = line.trim_start().split(|c: char| c == '=' || c.is_whitespace()).next().unwrap_or_default();
            !ours(name)
        })
        .collect();
    let mut out = kept.join("\n");
    out.push('\n');
    out
}

/// A path that can stand inside quotes in a configuration file and in a connection string.
fn plain(path: &Path) -> Result<&str, SyncError> {
    let text = path.to_str().filter(|text| !text.contains(['\'', '\\', ' ', '\n', ',']));
    text.ok_or_else(|| {
        SyncError::refused(
            format!("the folder {} has a quote, comma, blank or backslash in its name", path.display()),
            "Choose a plainer socket_dir for this node.",
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn includes_come_last_and_once() {
        let text = with_includes("port = 1\ninclude_if_exists = 'pgtandem.node.conf'\nport = 2\n");
        assert_eq!(
            text,
            "port = 1\nport = 2\ninclude_if_exists = 'pgtandem.node.conf'\n\
             include_if_exists = 'pgtandem.archive.conf'\ninclude_if_exists = 'pgtandem.recovery.conf'\n"
        );
        assert_eq!(with_includes(&text), text);
        assert!(with_includes("").ends_with("include_if_exists = 'pgtandem.recovery.conf'\n"));
    }

    #[test]
    fn what_belongs_to_a_node_does_not_come_from_another() {
        let text = "# Do not edit\nwork_mem = '4MB'\nprimary_conninfo = 'host=a'\nPort=5433\n  restore_command='cp'\nportal = 1\n";
        assert_eq!(without_ours(text), "# Do not edit\nwork_mem = '4MB'\nportal = 1\n");
    }
}
