//! The current generation of the data stands in the database, too: data that were put in the place of those which the record is about (a
//! restored backup, a disk that was rolled back) are found out when their PostgreSQL starts, and the node is Suspect then: it neither serves nor
//! is promoted without the loss being accepted.

use std::time::Duration;

use pgtandem_proto::membership::{NodeState, Record};
use pgtandem_proto::message::PostgresState;
use tokio::time::{sleep, timeout};

use super::node::{ChangeError, Node};
use super::postgres::{PostgresError, describe};
use crate::cluster::record::{self as rules, Generation};

/// How often it is looked whether another PostgreSQL runs, milliseconds.
const LOOK_MS: u64 = 500;
/// How long the database may take to read or write its generation, milliseconds: commits may wait for that.
const WRITE_MS_MAX: u64 = 2_000;

const READ: &str = "SELECT id FROM pgtandem.generation WHERE one";
const WRITE: &str = "INSERT INTO pgtandem.generation AS g (one, id) VALUES (true, $1) \
     ON CONFLICT (one) DO UPDATE SET id = excluded.id WHERE g.id <> excluded.id";
/// The table comes with the first reign after an update.
const IS_THERE: &str = "SELECT pg_catalog.to_regclass('pgtandem.generation') IS NOT NULL";

#[derive(Debug, thiserror::Error)]
enum GenerationError {
    #[error(transparent)]
    Postgres(#[from] PostgresError),
    #[error("{}", describe(.0))]
    Server(#[from] tokio_postgres::Error),
    #[error(transparent)]
    Change(#[from] ChangeError),
}

/// Writes the record's generation into the database, if this node is in sync. One that could not be written is by the next change
/// of the record, or when PostgreSQL starts.
pub(super) async fn write(node: &Node, record: &Record) {
    let (NodeState::InSync, Some(generation)) = (record.state, record.generations.first()) else { return };
    if node.postgres().state() != PostgresState::Running {
        return;
    }
    let work = async {
        let client = node.postgres().connect("postgres").await?;
        if client.query_one(IS_THERE, &[]).await?.get(0) {
            client.execute(WRITE, &[generation]).await?;
        }
        Ok::<_, GenerationError>(())
    };
    match timeout(Duration::from_millis(WRITE_MS_MAX), work).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => tracing::warn!(%error, "the generation was not written into the database; it will be"),
        Err(_) => tracing::warn!("the generation was not written into the database in time; it will be"),
    }
}

/// Compares once for each PostgreSQL that starts, until the runtime ends.
pub(super) async fn watch(node: &Node) {
    let mut compared = None;
    loop {
        sleep(Duration::from_millis(LOOK_MS)).await;
        let running = node.postgres().postmaster_pid().ok().flatten();
        let is_due = running.is_some() && running != compared && node.record().state == NodeState::InSync;
        if !is_due || node.postgres().state() != PostgresState::Running {
            continue;
        }
        // Changes of the record wait for it.
        match timeout(Duration::from_millis(WRITE_MS_MAX), compare(node)).await {
            Ok(Ok(true)) => compared = running,
            Ok(Ok(false)) => {}
            Ok(Err(error)) => tracing::info!(%error, "the generation in the database could not be compared yet"),
            Err(_) => tracing::info!("the generation in the database could not be compared in time yet"),
        }
    }
}

/// False: the first reign has not made the table yet.
async fn compare(node: &Node) -> Result<bool, GenerationError> {
    // No change of the record comes between what is read here and there.
    let _changing = node.generation.lock().await;
    let client = node.postgres().connect("postgres").await?;
    if !client.query_one(IS_THERE, &[]).await?.get::<_, bool>(0) {
        return Ok(false);
    }
    let found: Option<String> = client.query_opt(READ, &[]).await?.map(|row| row.get(0));
    let record = node.record();
    match rules::compare_generation(&record, found.as_deref()) {
        Generation::Same => {}
        Generation::NotWritten => write(node, &record).await,
        Generation::Other => {
            tracing::error!(
                found,
                recorded = ?record.generations.first(),
                "the data are not those that the record is about, as after a restored backup: this node is suspect"
            );
            node.change_record(|record| Ok(rules::replaced(record))).await?;
        }
    }
    Ok(true)
}
