//! From a filled directory to a server of its own: a standby fed by the relay, held, let run to exactly X, promoted.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use pgtandem_proto::message::Lsn;
use tokio_postgres::Client;
use tokio_postgres::error::SqlState;

use super::super::error::SyncError;
use super::super::relay::session::Identity;
use super::super::relay::{Relay, RelayStatus};
use super::super::rules::RECOVERY_CONF;
use super::super::wal::{format_lsn, parse_lsn, record_end};
use super::journal::{Journal, write_durably};
use super::room::{self, Still};
use super::{FOLLOW_SECONDS_MAX, PROMOTE_SECONDS_MAX, Source, Target, blocking, fill, layout, settings};
use crate::agent::postgres::{Postgres, PostgresError};
use crate::config::NodeConfig;

/// Pause between two looks while the standby catches up, milliseconds.
const CATCH_UP_POLL_MS: u64 = 20;
/// Pause between two looks on the way to X and out of recovery, milliseconds.
const CUT_POLL_MS: u64 = 1;

/// Times in a row that our look at the position may be ended by replay.
const CONFLICTS_MAX: u32 = 20;

/// A standby under way. Dropping it ends the relay.
pub(super) struct Following {
    pub relay: Relay,
    wal_segment_bytes: u32,
    /// Opened while PostgreSQL is a standby; it survives the promotion.
    client: Client,
}

/// Folder of the relay's socket: below the folder of PostgreSQL's own, whose path is known to be short.
pub(super) fn relay_folder(node: &NodeConfig) -> PathBuf {
    node.socket_dir.join("relay")
}

impl Target {
    /// Starts PostgreSQL as a standby that is fed from `source`; returns when it is consistent and less than
    /// `lag_bytes_max` behind what the source has flushed.
    pub async fn catch_up(&mut self, source: Arc<dyn Source>, lag_bytes_max: u64) -> Result<(), SyncError> {
        self.following = None;
        let node = self.postgres.node().clone();
        let journal = blocking("looking at the data directory", move || filled(&node)).await?;
        let wal_segment_bytes = journal.wal_segment_bytes;
        let followed = self.follow(source, journal, lag_bytes_max).await;
        followed.map_err(|error| room::of_standby(error, self.postgres.node(), wal_segment_bytes))
    }

    async fn follow(&mut self, source: Arc<dyn Source>, journal: Journal, lag_bytes_max: u64) -> Result<(), SyncError> {
        let wal_segment_bytes = journal.wal_segment_bytes;
        let identity = Identity {
            system_identifier: journal.system_identifier,
            timeline: journal.timeline,
            history: journal.history,
            version_num: journal.version_num,
        };
        let folder = relay_folder(self.postgres.node());
        let relay = Relay::start(&folder, source, identity, wal_segment_bytes, Lsn(journal.wal_end))?;
        let mut client = self.start(&relay, wal_segment_bytes).await?;
        self.wait_until_near(&relay, &mut client, lag_bytes_max, wal_segment_bytes).await?;
        self.following = Some(Following { relay, wal_segment_bytes, client });
        Ok(())
    }

    /// Starts PostgreSQL and connects to it when it is consistent.
    async fn start(&self, relay: &Relay, wal_segment_bytes: u32) -> Result<Client, SyncError> {
        let (mut watch, mut still) = (Watch::new(), Still::new());
        let starting = self.postgres.start();
        tokio::pin!(starting);
        loop {
            tokio::select! {
                started = &mut starting => {
                    started.map_err(|source| SyncError::Server { action: "starting PostgreSQL as a standby", source })?;
                    break;
                }
                () = tokio::time::sleep(Duration::from_millis(CATCH_UP_POLL_MS)) => {}
            }
            let status = relay.status();
            self.note(&status, status.applied);
            check_source(&status)?;
            // Before it is consistent PostgreSQL shows only in its process titles how far it is.
            let title = startup_title(&self.postgres);
            let behind = status.source_flushed > status.applied;
            still.check((status.applied, title.clone()), behind, self.postgres.node(), wal_segment_bytes)?;
            watch.check((status.applied, status.received_bytes, title))?;
        }
        connect(&self.postgres).await
    }

    async fn wait_until_near(
        &self,
        relay: &Relay,
        client: &mut Client,
        lag_bytes_max: u64,
        wal_segment_bytes: u32,
    ) -> Result<(), SyncError> {
        let (mut watch, mut still) = (Watch::new(), Still::new());
        loop {
            let replayed = self.replayed(client).await?;
            let status = relay.status();
            self.note(&status, replayed.0);
            check_source(&status)?;
            if status.streaming && status.source_flushed.saturating_sub(replayed.0) <= lag_bytes_max {
                return Ok(());
            }
            watch.check((replayed.0, status.received_bytes, String::new()))?;
            let behind = status.source_flushed > replayed.0;
            still.check(replayed, behind, self.postgres.node(), wal_segment_bytes)?;
            tokio::time::sleep(Duration::from_millis(CATCH_UP_POLL_MS)).await;
        }
    }

    fn note(&self, status: &RelayStatus, replayed: u64) {
        self.progress.send_modify(|progress| {
            progress.wal_source = progress.wal_source.max(status.source_flushed);
            progress.wal_replayed = progress.wal_replayed.max(replayed);
        });
    }

    /// Nothing more is handed to PostgreSQL. -> the position beyond which nothing was
    pub fn hold(&self) -> Result<Lsn, SyncError> {
        Ok(self.relay()?.hold())
    }

    /// Lets PostgreSQL replay to exactly `x`, which is where a record of the source ends, and makes it a server that
    /// accepts writes. Needs [`Target::hold`] before.
    pub async fn leave_recovery(&mut self, x: Lsn) -> Result<(), SyncError> {
        let began = Instant::now();
        let released = self.relay()?.release_to(x);
        released.map_err(|error| {
            SyncError::refused(
                format!("this node can not stop at {}: {error}", format_lsn(x)),
                "Start the recovery again; the relay has to be held before X is read.",
            )
        })?;
        let Some(following) = self.following.take() else { return Err(SyncError::Internal("no relay".into())) };
        let wal_segment_bytes = following.wal_segment_bytes;
        let left = self.leave(following, x, began).await;
        left.map_err(|error| room::of_standby(error, self.postgres.node(), wal_segment_bytes))
    }

    async fn leave(&self, mut following: Following, x: Lsn, began: Instant) -> Result<(), SyncError> {
        self.replay_to(&mut following, x).await?;
        let replayed_ms = began.elapsed().as_millis();
        let promoted = self.postgres.promote();
        promoted.map_err(|source| SyncError::Server { action: "leaving recovery", source })?;
        self.wait_for_writes(&following.client).await?;
        tracing::info!(x = %format_lsn(x), %replayed_ms, ms = %began.elapsed().as_millis(), "PostgreSQL left recovery");
        fix_up(&self.postgres, &following.client).await
    }

    async fn replay_to(&self, following: &mut Following, x: Lsn) -> Result<(), SyncError> {
        let wal_segment_bytes = following.wal_segment_bytes;
        let end = record_end(x, wal_segment_bytes);
        let (mut watch, mut still) = (Watch::new(), Still::new());
        loop {
            let replayed = self.replayed(&mut following.client).await?;
            let status = following.relay.status();
            self.note(&status, replayed.0);
            if replayed > x {
                return Err(SyncError::Internal(format!("PostgreSQL replayed {}, past X", format_lsn(replayed))));
            }
            if replayed >= end {
                return Ok(());
            }
            check_source(&status)?;
            watch.check((replayed.0, status.received_bytes, String::new()))?;
            still.check(replayed, true, self.postgres.node(), wal_segment_bytes)?;
            tokio::time::sleep(Duration::from_millis(CUT_POLL_MS)).await;
        }
    }

    /// How far PostgreSQL has replayed. A standby ends queries, and with them our session, that are in the way of
    /// replay; that is no reason to give up.
    async fn replayed(&self, client: &mut Client) -> Result<Lsn, SyncError> {
        let mut tries = 0;
        loop {
            match replayed(client).await {
                Err(error) if tries < CONFLICTS_MAX && in_the_way(&error, client) => {
                    tries += 1;
                    *client = connect(&self.postgres).await.map_err(|error| with_last_words(error, &self.postgres))?;
                }
                done => return done.map_err(|error| with_last_words(error, &self.postgres)),
            }
        }
    }

    async fn wait_for_writes(&self, client: &Client) -> Result<(), SyncError> {
        let began = Instant::now();
        loop {
            let row = client.query_one("SELECT pg_is_in_recovery()", &[]).await;
            let recovering: bool = row.and_then(|row| row.try_get(0)).map_err(|source| {
                with_last_words(SyncError::Sql { action: "leaving recovery", source }, &self.postgres)
            })?;
            if !recovering {
                return Ok(());
            }
            if began.elapsed() > Duration::from_secs(PROMOTE_SECONDS_MAX) {
                return Err(SyncError::Stalled {
                    what: "leaving recovery",
                    seconds: PROMOTE_SECONDS_MAX,
                    hint: "Read PostgreSQL's log on this node, then start the recovery again.".into(),
                });
            }
            tokio::time::sleep(Duration::from_millis(CUT_POLL_MS)).await;
        }
    }

    /// Ends whatever is under way. A PostgreSQL that is still a standby is stopped; its directory stays whole, but it
    /// must be filled again before it can be a member.
    pub async fn abort(&mut self) -> Result<(), SyncError> {
        self.following = None;
        self.writers_ended().await;
        // PostgreSQL removes this file when it leaves recovery; postmaster.pid says "ready" of a hot standby, too.
        if !self.postgres.node().pgdata.join("standby.signal").exists() {
            return Ok(());
        }
        let stopped = self.postgres.stop(false).await;
        stopped.map_err(|source| SyncError::Server { action: "stopping the standby", source })
    }
}

/// The journal of the fill, if the directory is what that fill left or what became of it as a standby.
fn filled(node: &NodeConfig) -> Result<Journal, SyncError> {
    let again = "Start the recovery from its beginning: only what differs is sent.";
    let journal = Journal::load(&node.state_dir)
        .ok_or_else(|| SyncError::refused("no finished fill of this node is known", again))?;
    let control = layout::control_of(&node.pgdata);
    if control.is_none_or(|control| control.system_identifier != journal.system_identifier) {
        return Err(SyncError::refused("the data directory is not what the last fill left", again));
    }
    if !node.pgdata.join("standby.signal").exists() {
        return Err(SyncError::refused("this node left recovery before; it has a history of its own by now", again));
    }
    fill::configure(node, journal.version_num)?;
    Ok(journal)
}

/// An error if the source said that it can not go on.
fn check_source(status: &RelayStatus) -> Result<(), SyncError> {
    match &status.failure {
        Some(failure) => Err(SyncError::Peer(failure.clone())),
        None => Ok(()),
    }
}

/// Replay ends whatever is in its way, a session that begins, too: then it is begun again.
async fn connect(postgres: &Postgres) -> Result<Client, SyncError> {
    let began = Instant::now();
    loop {
        match postgres.connect("postgres").await {
            Err(PostgresError::Connect { why, sqlstate, .. })
                if sqlstate == Some(SqlState::T_R_SERIALIZATION_FAILURE)
                    && began.elapsed() < Duration::from_secs(FOLLOW_SECONDS_MAX) =>
            {
                tracing::debug!(why, "replay was in the way of a session");
            }
            connected => {
                let action = "connecting to the standby";
                return connected.map_err(|source| SyncError::Server { action, source });
            }
        }
        tokio::time::sleep(Duration::from_millis(CATCH_UP_POLL_MS)).await;
    }
}

async fn replayed(client: &Client) -> Result<Lsn, SyncError> {
    let action = "asking the standby for its position";
    let row = client.query_one("SELECT pg_last_wal_replay_lsn()::text", &[]).await;
    let text: Option<String> =
        row.and_then(|row| row.try_get(0)).map_err(|source| SyncError::Sql { action, source })?;
    let position = text.as_deref().map_or(Some(Lsn(0)), parse_lsn);
    position.ok_or_else(|| SyncError::Internal(format!("{action}: an answer that is no position")))
}

/// Whether replay ended our query or session (`ProcessRecoveryConflictInterrupt`).
fn in_the_way(error: &SyncError, client: &Client) -> bool {
    let SyncError::Sql { source, .. } = error else { return false };
    client.is_closed() || source.code() == Some(&SqlState::T_R_SERIALIZATION_FAILURE)
}

/// If PostgreSQL is gone, what its log says instead of a broken connection.
fn with_last_words(error: SyncError, postgres: &Postgres) -> SyncError {
    if !matches!(postgres.postmaster(), Ok(None)) {
        return error;
    }
    let why = match postgres.last_words() {
        words if words.is_empty() => error.to_string(),
        words => words,
    };
    let pgdata = postgres.node().pgdata.display().to_string();
    SyncError::Server { action: "PostgreSQL ended while it followed", source: PostgresError::Start { pgdata, why } }
}

/// Limits the time without advance, whatever advance is.
struct Watch<T> {
    last: Option<T>,
    since: Instant,
}

impl<T: PartialEq> Watch<T> {
    fn new() -> Watch<T> {
        Watch { last: None, since: Instant::now() }
    }

    fn check(&mut self, now: T) -> Result<(), SyncError> {
        if self.last.as_ref() != Some(&now) {
            self.last = Some(now);
            self.since = Instant::now();
        } else if self.since.elapsed() > Duration::from_secs(FOLLOW_SECONDS_MAX) {
            return Err(SyncError::Stalled {
                what: "replay on this node",
                seconds: FOLLOW_SECONDS_MAX,
                hint: "Read PostgreSQL's log on this node, then start the recovery again.".into(),
            });
        }
        Ok(())
    }
}

/// Title of the process that replays, for example `startup recovering 000000010000000000000003`.
fn startup_title(postgres: &Postgres) -> String {
    let Ok(Some(pid)) = postgres.postmaster_pid() else { return String::new() };
    let children = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap_or_default();
    children
        .split_ascii_whitespace()
        .filter_map(|child| std::fs::read(format!("/proc/{child}/cmdline")).ok())
        .map(|title| String::from_utf8_lossy(&title).into_owned())
        .find(|title| title.contains("startup"))
        .unwrap_or_default()
}

/// What a server of its own must not have kept from being a standby of A.
async fn fix_up(postgres: &Postgres, client: &Client) -> Result<(), SyncError> {
    let pgdata = postgres.node().pgdata.clone();
    blocking("writing the configuration", move || {
        write_durably(&pgdata.join(RECOVERY_CONF), settings::RECOVERY_CONF_EMPTY.as_bytes())
    })
    .await?;
    let action = "removing what belongs to the source";
    let sql = |source| SyncError::Sql { action, source };
    client
        .query("SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots WHERE NOT active", &[])
        .await
        .map_err(sql)?;
    let subscriptions = client
        .query(
            "SELECT d.datname::text, format('ALTER SUBSCRIPTION %I DISABLE', s.subname)
             FROM pg_subscription s JOIN pg_database d ON d.oid = s.subdbid WHERE s.subenabled",
            &[],
        )
        .await
        .map_err(sql)?;
    for row in subscriptions {
        let (database, statement): (String, String) = (row.try_get(0).map_err(sql)?, row.try_get(1).map_err(sql)?);
        let connected = postgres.connect(&database).await;
        let there = connected.map_err(|source| SyncError::Server { action: "disabling a subscription", source })?;
        there.batch_execute(&statement).await.map_err(sql)?;
        tracing::info!(%database, %statement, "a subscription stays with the source");
    }
    postgres.reload().map_err(|source| SyncError::Server { action: "reloading the configuration", source })
}
