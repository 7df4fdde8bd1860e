//! What a source asks of its own PostgreSQL: identity, the backup session, the replication slot. SQL only.

use pgtandem_proto::message::Lsn;
use tokio_postgres::{Client, Row};

use super::super::error::SyncError;
use super::super::wal::{format_lsn, parse_lsn, segment_bytes_valid, timeline_of_segment};
use crate::agent::postgres::Postgres;

/// Name of the physical slot that keeps WAL for `node`.
#[must_use]
pub fn slot_name(node: &str) -> String {
    format!("pgtandem_{}", node.to_lowercase().replace('-', "_"))
}

/// Which server this is, as a receiver of its WAL must know it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Identity {
    pub system_identifier: u64,
    pub timeline: u32,
    pub wal_segment_bytes: u32,
    pub version_num: u32,
    pub flushed: Lsn,
    /// Whether pages have checksums.
    pub checksums: bool,
}

/// Reads the identity; refuses a standby.
pub(super) async fn identify(client: &Client) -> Result<Identity, SyncError> {
    let action = "asking PostgreSQL for its identity";
    let recovering: bool =
        query(client, action, "SELECT pg_is_in_recovery()").await.and_then(|row| get(&row, 0, action))?;
    if recovering {
        return Err(SyncError::refused(
            "the source is a standby in recovery; only a server that accepts writes can be copied",
            "Choose a member as the source.",
        ));
    }
    let row = query(
        client,
        action,
        "SELECT (SELECT system_identifier FROM pg_control_system()),
                pg_walfile_name(pg_current_wal_insert_lsn()),
                current_setting('server_version_num')::int,
                (SELECT setting::bigint FROM pg_settings WHERE name = 'wal_segment_size'),
                pg_current_wal_flush_lsn()::text,
                current_setting('data_checksums') = 'on'",
    )
    .await?;
    let system_identifier: i64 = get(&row, 0, action)?;
    let segment: String = get(&row, 1, action)?;
    let version: i32 = get(&row, 2, action)?;
    let segment_bytes: i64 = get(&row, 3, action)?;
    let wal_segment_bytes = u32::try_from(segment_bytes).ok().filter(|bytes| segment_bytes_valid(*bytes));
    Ok(Identity {
        system_identifier: system_identifier.cast_unsigned(),
        timeline: timeline_of_segment(&segment).ok_or_else(|| unexpected(action, &segment))?,
        wal_segment_bytes: wal_segment_bytes.ok_or_else(|| unexpected(action, &segment_bytes.to_string()))?,
        version_num: u32::try_from(version).unwrap_or_default(),
        flushed: lsn(&row, 4, action)?,
        checksums: get(&row, 5, action)?,
    })
}

/// A fresh slot that keeps WAL from now on. A slot of an earlier fill is replaced: what it kept is of no use.
pub(super) async fn reserve_slot(client: &Client, node: &str) -> Result<(), SyncError> {
    drop_slot_with(client, node).await?;
    client
        .query_one("SELECT pg_create_physical_replication_slot($1, true)", &[&slot_name(node)])
        .await
        .map_err(|source| SyncError::Sql { action: "creating the replication slot", source })?;
    Ok(())
}

async fn drop_slot_with(client: &Client, node: &str) -> Result<(), SyncError> {
    client
        .query(
            "SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots WHERE slot_name = $1",
            &[&slot_name(node)],
        )
        .await
        .map_err(|source| SyncError::Sql { action: "removing the replication slot", source })?;
    Ok(())
}

/// Removes the slot that keeps WAL for `node`, if there is one.
pub async fn drop_slot(postgres: &Postgres, node: &str) -> Result<(), SyncError> {
    let client = connect(postgres).await?;
    drop_slot_with(&client, node).await
}

/// Lets the slot forget what is before `flushed`. Only forward; a slot that is gone is no error.
pub(super) async fn advance_slot(client: &Client, node: &str, flushed: Lsn) -> Result<(), SyncError> {
    client
        .query(
            "SELECT pg_replication_slot_advance(slot_name, $2::text::pg_lsn) FROM pg_replication_slots
             WHERE slot_name = $1 AND restart_lsn < $2::text::pg_lsn",
            &[&slot_name(node), &format_lsn(flushed)],
        )
        .await
        .map_err(|source| SyncError::Sql { action: "advancing the replication slot", source })?;
    Ok(())
}

/// Begins a backup on this session: a checkpoint at once, full-page images until the end. -> its start
pub(super) async fn start_backup(client: &Client, node: &str, version_num: u32) -> Result<Lsn, SyncError> {
    let action = "starting the backup";
    let sql = if version_num >= 150_000 {
        "SELECT pg_backup_start($1, true)::text"
    } else {
        "SELECT pg_start_backup($1, true, false)::text"
    };
    let label = format!("pgtandem fills {node}");
    let row = client.query_one(sql, &[&label]).await.map_err(|source| SyncError::Sql { action, source })?;
    lsn(&row, 0, action)
}

/// What `pg_backup_stop` returned.
#[derive(Debug)]
pub(super) struct BackupEnd {
    pub stop: Lsn,
    pub backup_label: String,
    pub tablespace_map: String,
}

/// Ends the backup. Does not wait for an archive: B gets its WAL from us.
pub(super) async fn stop_backup(client: &Client, version_num: u32) -> Result<BackupEnd, SyncError> {
    let action = "ending the backup";
    let sql = if version_num >= 150_000 {
        "SELECT lsn::text, labelfile, spcmapfile FROM pg_backup_stop(false)"
    } else {
        "SELECT lsn::text, labelfile, spcmapfile FROM pg_stop_backup(false, false)"
    };
    let row = query(client, action, sql).await?;
    let tablespace_map: Option<String> = get(&row, 2, action)?;
    Ok(BackupEnd {
        stop: lsn(&row, 0, action)?,
        backup_label: get(&row, 1, action)?,
        tablespace_map: tablespace_map.unwrap_or_default(),
    })
}

/// A control connection to the local PostgreSQL.
pub(super) async fn connect(postgres: &Postgres) -> Result<Client, SyncError> {
    postgres
        .connect("postgres")
        .await
        .map_err(|source| SyncError::Server { action: "connecting to the PostgreSQL that is copied", source })
}

pub(super) async fn query(client: &Client, action: &'static str, sql: &str) -> Result<Row, SyncError> {
    client.query_one(sql, &[]).await.map_err(|source| SyncError::Sql { action, source })
}

pub(super) fn get<'row, T>(row: &'row Row, column: usize, action: &'static str) -> Result<T, SyncError>
where
    T: tokio_postgres::types::FromSql<'row>,
{
    row.try_get(column).map_err(|source| SyncError::Sql { action, source })
}

pub(super) fn lsn(row: &Row, column: usize, action: &'static str) -> Result<Lsn, SyncError> {
    let text: &str = get(row, column, action)?;
    parse_lsn(text).ok_or_else(|| unexpected(action, text))
}

fn unexpected(action: &'static str, text: &str) -> SyncError {
    SyncError::Internal(format!("{action}: PostgreSQL answered {text:?}, which is not understood"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slot_names_hold_only_what_postgresql_takes() {
        assert_eq!(slot_name("node-B_2"), "pgtandem_node_b_2");
    }
}
