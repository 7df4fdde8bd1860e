//! What Preflight must know about a node before it is filled, and what speaks against it.
//!
//! [`gather`] asks the programs, the data directory and, if it runs, PostgreSQL; it changes nothing. [`compare`] is
//! pure. What can not be found out is left empty and speaks against nothing.

mod compare;

use std::path::Path;

use pgtandem_proto::message::NodeFacts;
use tokio_postgres::Client;

pub(crate) use compare::SPARE_BYTES;
pub use compare::{Finding, compare};

use super::error::SyncError;
use super::target::control_of;
use crate::agent::postgres::Postgres;
use crate::config::NodeConfig;

/// Settings that a standby must have at least as large as its source (`CheckRequiredParameterValues`).
pub const AT_LEAST_SETTINGS: [&str; 5] = [
    "max_connections",
    "max_worker_processes",
    "max_wal_senders",
    "max_prepared_transactions",
    "max_locks_per_transaction",
];

/// Settings that decide whether a source can be copied and followed at all.
const SOURCE_SETTINGS: [&str; 6] = [
    "wal_level",
    "max_replication_slots",
    "max_slot_wal_keep_size",
    "wal_segment_size",
    "data_checksums",
    "block_size",
];

/// Most names in one list of the facts.
const NAMES_MAX: i64 = 1000;
/// Programs that look at a filled directory.
const VERIFYING: [&str; 2] = ["pg_verifybackup", "pg_waldump"];

/// Everything about this node that matters to a fill, with PostgreSQL running, stopped or absent.
pub async fn gather(postgres: &Postgres) -> Result<NodeFacts, SyncError> {
    let node = postgres.node();
    let mut facts = NodeFacts {
        binaries_version_num: binaries_version_num(&node.bin_dir).await?,
        data_major: read_major(&node.pgdata),
        system_identifier: control_of(&node.pgdata).map(|control| control.system_identifier),
        architecture: std::env::consts::ARCH.to_owned(),
        libc_version: libc_version().await,
        free_bytes: free_bytes(&node.pgdata),
        foreign_server: postgres.is_foreign(),
        programs_missing: missing_programs(&node.bin_dir),
        ..NodeFacts::default()
    };
    let running = !facts.foreign_server && matches!(postgres.postmaster(), Ok(Some(found)) if found.status.accepts());
    if running {
        let connected = postgres.connect("postgres").await;
        let client =
            connected.map_err(|source| SyncError::Server { action: "asking PostgreSQL for its settings", source })?;
        ask(&client, &mut facts).await?;
        let databases =
            names(&client, "SELECT datname::text FROM pg_database WHERE datallowconn ORDER BY 1 LIMIT $1").await?;
        for database in databases {
            // A database that was dropped meanwhile has nothing to say.
            let Ok(client) = postgres.connect(&database).await else { continue };
            ask_database(&client, &database, &mut facts).await?;
        }
        facts.extensions.sort_unstable();
        facts.extensions.dedup();
    } else {
        facts.settings = settings_of_stopped(node).await;
        facts.extensions = available_extensions(node).await;
    }
    Ok(facts)
}

async fn ask(client: &Client, facts: &mut NodeFacts) -> Result<(), SyncError> {
    let wanted: Vec<&str> = AT_LEAST_SETTINGS.iter().chain(&SOURCE_SETTINGS).copied().collect();
    let rows =
        client.query("SELECT name, setting FROM pg_settings WHERE name = ANY($1) ORDER BY name", &[&wanted]).await;
    for row in rows.map_err(sql)? {
        facts.settings.push((row.try_get(0).map_err(sql)?, row.try_get(1).map_err(sql)?));
    }
    let row = client
        .query_one("SELECT sum(pg_database_size(oid))::bigint, (SELECT system_identifier FROM pg_control_system()) FROM pg_database", &[])
        .await
        .map_err(sql)?;
    let (bytes, system_identifier): (i64, i64) = (row.try_get(0).map_err(sql)?, row.try_get(1).map_err(sql)?);
    facts.data_bytes = u64::try_from(bytes).ok();
    facts.system_identifier = Some(system_identifier.cast_unsigned());
    facts.tablespaces = names(
        client,
        "SELECT spcname::text FROM pg_tablespace WHERE spcname NOT IN ('pg_default', 'pg_global') ORDER BY 1 LIMIT $1",
    )
    .await?;
    facts.foreign_prepared =
        names(client, "SELECT gid FROM pg_prepared_xacts WHERE gid NOT LIKE 'pgtandem:%' ORDER BY 1 LIMIT $1").await?;
    Ok(())
}

async fn ask_database(client: &Client, database: &str, facts: &mut NodeFacts) -> Result<(), SyncError> {
    let unlogged = names(
        client,
        "SELECT c.oid::regclass::text FROM pg_class c WHERE c.relpersistence = 'u' AND c.relkind IN ('r', 'S') ORDER BY 1 LIMIT $1",
    );
    facts.unlogged_tables.extend(unlogged.await?.into_iter().map(|table| format!("{database}.{table}")));
    facts.extensions.extend(names(client, "SELECT extname::text FROM pg_extension ORDER BY 1 LIMIT $1").await?);
    Ok(())
}

async fn names(client: &Client, query: &str) -> Result<Vec<String>, SyncError> {
    let rows = client.query(query, &[&NAMES_MAX]).await.map_err(sql)?;
    rows.iter().map(|row| row.try_get(0).map_err(sql)).collect()
}

fn sql(source: tokio_postgres::Error) -> SyncError {
    SyncError::Sql { action: "asking PostgreSQL for its settings", source }
}

/// Version of the server programs, as `server_version_num`.
pub async fn binaries_version_num(bin_dir: &Path) -> Result<u32, SyncError> {
    let program = bin_dir.join("postgres");
    let output = tokio::process::Command::new(&program).arg("--version").output().await;
    let output = output.map_err(|error| SyncError::file("running", &program, error))?;
    let text = String::from_utf8_lossy(&output.stdout);
    parse_version(&text).ok_or_else(|| {
        SyncError::refused(
            format!("{} --version answered {:?}, which is not understood", program.display(), text.trim()),
            "Check bin_dir of this node.",
        )
    })
}

/// `postgres (PostgreSQL) 15.18 (Debian 15.18-0+deb12u1)` -> 150018
fn parse_version(text: &str) -> Option<u32> {
    let version = text.split(") ").nth(1)?.split_ascii_whitespace().next()?;
    let mut parts = version.split('.');
    let major: u32 = parts.next()?.trim_end_matches(|c: char| !c.is_ascii_digit()).parse().ok()?;
    // "19beta1" and the like have no minor number.
    let minor: u32 = parts.next().and_then(|minor| minor.parse().ok()).unwrap_or(0);
    major.checked_mul(10_000)?.checked_add(minor)
}

fn read_major(pgdata: &Path) -> Option<u32> {
    std::fs::read_to_string(pgdata.join("PG_VERSION")).ok()?.trim().parse().ok()
}

/// `glibc 2.36`; empty where it is another library.
async fn libc_version() -> String {
    let output = tokio::process::Command::new("getconf").arg("GNU_LIBC_VERSION").output().await;
    match output {
        Ok(output) if output.status.success() => String::from_utf8_lossy(&output.stdout).trim().to_owned(),
        _ => String::new(),
    }
}

/// What a check of a filled directory needs and `bin_dir` has not got.
fn missing_programs(bin_dir: &Path) -> Vec<String> {
    VERIFYING.iter().filter(|program| !bin_dir.join(program).exists()).map(|program| (*program).to_owned()).collect()
}

/// Free bytes of the file system that holds, or would hold, `pgdata`.
fn free_bytes(pgdata: &Path) -> u64 {
    let there = pgdata.ancestors().find(|folder| folder.exists()).unwrap_or(Path::new("/"));
    rustix::fs::statvfs(there).map_or(0, |stat| stat.f_bavail.saturating_mul(stat.f_frsize))
}

/// What `postgres -C` says about a directory with a configuration of its own; nothing if it has none: then it takes
/// the source's.
async fn settings_of_stopped(node: &NodeConfig) -> Vec<(String, String)> {
    let mut settings = Vec::new();
    if !node.pgdata.join("postgresql.conf").exists() {
        return settings;
    }
    for name in AT_LEAST_SETTINGS {
        let asked = tokio::process::Command::new(node.bin_dir.join("postgres"))
            .args(["-C", name, "-D"])
            .arg(&node.pgdata)
            .output()
            .await;
        if let Ok(output) = asked
            && output.status.success()
        {
            settings.push((name.to_owned(), String::from_utf8_lossy(&output.stdout).trim().to_owned()));
        }
    }
    settings
}

/// Names of the extensions whose control files are installed here.
async fn available_extensions(node: &NodeConfig) -> Vec<String> {
    let asked = tokio::process::Command::new(node.bin_dir.join("pg_config")).arg("--sharedir").output().await;
    let Ok(output) = asked else { return Vec::new() };
    let folder = Path::new(String::from_utf8_lossy(&output.stdout).trim()).join("extension");
    let Ok(files) = std::fs::read_dir(folder) else { return Vec::new() };
    let mut names: Vec<String> =
        files.filter_map(|file| Some(file.ok()?.file_name().to_str()?.strip_suffix(".control")?.to_owned())).collect();
    names.sort_unstable();
    names
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_read_from_what_postgres_says() {
        assert_eq!(parse_version("postgres (PostgreSQL) 15.18 (Debian 15.18-0+deb12u1)\n"), Some(150_018));
        assert_eq!(parse_version("postgres (PostgreSQL) 13.0\n"), Some(130_000));
        assert_eq!(parse_version("postgres (PostgreSQL) 19beta1\n"), None);
        assert_eq!(parse_version("something else"), None);
    }
}
