//! This node's PostgreSQL as a process: start, stop, promote, look, connect.
//!
//! Whether it should run is decided by the daemon; what is in its data directory is the business of `sync`.
//! The state is read from `postmaster.pid` (format: PostgreSQL's `pidfile.h`) and `/proc`, so that an agent that was
//! killed finds the server again that it had started.

mod pidfile;
mod server;

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};
use std::{fs, io};

use pgtandem_proto::message::{Failure, FailureCode, PostgresState};
use rustix::process::{Pid, Signal};
use tokio::time::{sleep, timeout};
use tokio_postgres::error::SqlState;

use crate::config::NodeConfig;
use crate::sync::rules::RESTORED_MARK;
pub use pidfile::{Postmaster, PostmasterStatus};
pub use server::{PgCtl, Server};

/// Role of agents and proxy: superuser, `peer` with a map in pg_hba.conf.
pub const ROLE: &str = "pgtandem";
/// Longest wait for a connection over the unix socket, milliseconds.
pub const CONNECT_MS_MAX: u64 = 10_000;
/// Longest wait for a starting server (crash recovery included), seconds.
pub const START_SECONDS_MAX: u64 = 3600;
/// Longest wait for old backends to be gone after a postmaster was killed, seconds.
pub const OLD_BACKENDS_SECONDS_MAX: u64 = 60;
/// Longest fast shutdown before it becomes an immediate one, seconds.
pub const FAST_STOP_SECONDS_MAX: u64 = 120;
/// Longest immediate shutdown, seconds. The postmaster itself kills its children after 5.
pub const IMMEDIATE_STOP_SECONDS_MAX: u64 = 30;
const POLL_MS: u64 = 10;

/// Why PostgreSQL could not be brought where it was wanted.
#[derive(Debug, thiserror::Error)]
pub enum PostgresError {
    #[error("{0} is not a data directory of PostgreSQL (no PG_VERSION or no global/pg_control)")]
    Absent(String),
    #[error("{0} holds a server that was restored from an archive, which is no node's")]
    Restored(String),
    #[error(
        "a PostgreSQL that is not this node's runs here: process {pid} on data directory {data_dir}, port {port}, socket folder {socket_dir}; the configuration says {expected}"
    )]
    Foreign { pid: i32, data_dir: String, port: String, socket_dir: String, expected: String },
    #[error("PostgreSQL on {pgdata} did not start: {why}")]
    Start { pgdata: String, why: String },
    #[error(
        "backends of the PostgreSQL that died on {pgdata} are still there after {OLD_BACKENDS_SECONDS_MAX} s: {why}"
    )]
    OldBackends { pgdata: String, why: String },
    #[error("PostgreSQL on {pgdata} was still {doing} after {seconds} s")]
    Limit { pgdata: String, doing: &'static str, seconds: u64 },
    #[error("PostgreSQL on {0} is not running")]
    NotRunning(String),
    #[error("no connection to PostgreSQL at {socket} as role {ROLE}, database {database}: {why}")]
    Connect { socket: String, database: String, why: String, sqlstate: Option<SqlState> },
    #[error("{what}: {source}")]
    Io { what: String, source: io::Error },
}

impl PostgresError {
    /// The same as it crosses the network, with the next thing to do.
    #[must_use]
    pub fn failure(&self) -> Failure {
        let (code, hint) = match self {
            PostgresError::Absent(_) => (FailureCode::WrongState, "fill this node: pgtandem recover NODE".to_owned()),
            PostgresError::Restored(_) => (
                FailureCode::WrongState,
                "move that directory elsewhere and start it by itself; then fill this node: pgtandem recover NODE"
                    .to_owned(),
            ),
            PostgresError::Foreign { pid, .. } => (
                FailureCode::Postgres,
                format!("stop that server (process {pid}), or correct pgdata, port and socket_dir of the node"),
            ),
            PostgresError::Start { .. } | PostgresError::OldBackends { .. } | PostgresError::Limit { .. } => {
                (FailureCode::Postgres, "read the last lines of postgresql.log in the node's state_dir".to_owned())
            }
            PostgresError::NotRunning(_) => (
                FailureCode::Postgres,
                "the agent starts it again by itself unless it was stopped; see pgtandem status".to_owned(),
            ),
            PostgresError::Connect { .. } => (
                FailureCode::Postgres,
                format!(
                    "check that role {ROLE} exists as superuser and that pg_hba.conf has the line: local all {ROLE} peer map={ROLE}"
                ),
            ),
            PostgresError::Io { .. } => {
                (FailureCode::Postgres, "check the owner and mode of that file or folder".to_owned())
            }
        };
        Failure { code, what: self.to_string(), hint }
    }
}

/// This node's PostgreSQL. Cheap to clone; all clones look at the same server.
#[derive(Clone)]
pub struct Postgres {
    node: Arc<NodeConfig>,
    server: Arc<dyn Server>,
    /// Held while a starter runs, whether or not anybody waits for it still.
    starting: Arc<tokio::sync::Mutex<()>>,
}

impl Postgres {
    /// PostgreSQL run by `pg_ctl`, in a session of its own so that it outlives the agent.
    #[must_use]
    pub fn new(node: NodeConfig) -> Postgres {
        Postgres::with_server(node, Arc::new(PgCtl))
    }

    #[must_use]
    pub fn with_server(node: NodeConfig, server: Arc<dyn Server>) -> Postgres {
        Postgres { node: Arc::new(node), server, starting: Arc::default() }
    }

    #[must_use]
    pub fn node(&self) -> &NodeConfig {
        &self.node
    }

    /// The living postmaster on our data directory; None if there is none.
    ///
    /// # Errors
    /// [`PostgresError::Foreign`] if it is not the one that the configuration describes.
    pub fn postmaster(&self) -> Result<Option<Postmaster>, PostgresError> {
        let Some(found) = pidfile::read(&self.node.pgdata).map_err(|source| self.io("postmaster.pid", source))? else {
            return Ok(None);
        };
        if !found.alive() {
            return Ok(None);
        }
        if let Some(why) = found.differs_from(&self.node) {
            return Err(PostgresError::Foreign {
                pid: found.pid,
                data_dir: found.data_dir,
                port: found.port.map_or_else(String::new, |port| port.to_string()),
                socket_dir: found.socket_dir.unwrap_or_default(),
                expected: why,
            });
        }
        Ok(Some(found))
    }

    /// Process id of the living postmaster.
    pub fn postmaster_pid(&self) -> Result<Option<i32>, PostgresError> {
        Ok(self.postmaster()?.map(|postmaster| postmaster.pid))
    }

    /// A PostgreSQL that is not ours runs on our data directory.
    #[must_use]
    pub fn is_foreign(&self) -> bool {
        matches!(self.postmaster(), Err(PostgresError::Foreign { .. }))
    }

    /// What the files and processes say now. Does not connect, never waits.
    #[must_use]
    pub fn state(&self) -> PostgresState {
        match self.postmaster() {
            Ok(Some(postmaster)) => match postmaster.status {
                // The postmaster calls a hot standby ready, too.
                PostmasterStatus::Ready if pidfile::in_production(&self.node.pgdata) => PostgresState::Running,
                PostmasterStatus::Ready | PostmasterStatus::Standby => PostgresState::Standby,
                PostmasterStatus::Starting => PostgresState::Starting,
                PostmasterStatus::Stopping => PostgresState::Stopped,
            },
            Err(PostgresError::Foreign { .. }) => PostgresState::Stopped,
            Ok(None) | Err(_) if self.data_exists() => PostgresState::Stopped,
            Ok(None) | Err(_) => PostgresState::Absent,
        }
    }

    fn data_exists(&self) -> bool {
        self.node.pgdata.join("PG_VERSION").exists() && self.node.pgdata.join("global/pg_control").exists()
    }

    /// Starts it, if it does not run, and returns when it accepts connections, also as a hot standby. Leaves
    /// signal files alone. Dropping the future leaves the server starting.
    pub async fn start(&self) -> Result<(), PostgresError> {
        let began = Instant::now();
        loop {
            match self.postmaster()? {
                Some(postmaster) if postmaster.status.accepts() => return Ok(()),
                Some(_) => self.wait_for_start(began).await?,
                None if !self.data_exists() => return Err(PostgresError::Absent(self.pgdata())),
                // What was committed since that moment would be missing, and nobody would notice.
                None if self.node.pgdata.join(RESTORED_MARK).exists() => {
                    return Err(PostgresError::Restored(self.pgdata()));
                }
                None => {
                    let log_start = self.log_bytes();
                    pidfile::remove_of_zombie(&self.node.pgdata).map_err(|source| self.io("postmaster.pid", source))?;
                    let started = self.run_starter().await;
                    if started.is_ok() || self.postmaster()?.is_some() {
                        continue;
                    }
                    let why = self.why_not_started(log_start, started);
                    let old_backends = why.contains("pre-existing shared memory block")
                        || why.contains("is another postmaster")
                        || why.contains("lock file");
                    if !old_backends {
                        return Err(PostgresError::Start { pgdata: self.pgdata(), why });
                    }
                    if began.elapsed() > Duration::from_secs(OLD_BACKENDS_SECONDS_MAX) {
                        return Err(PostgresError::OldBackends { pgdata: self.pgdata(), why });
                    }
                    sleep(Duration::from_millis(20 * POLL_MS)).await;
                }
            }
        }
    }

    async fn run_starter(&self) -> Result<(), String> {
        let alone = Arc::clone(&self.starting).lock_owned().await;
        let (node, server) = (Arc::clone(&self.node), Arc::clone(&self.server));
        // It goes on when nobody waits any more, and whoever stops the server has to know.
        let starter = tokio::spawn(async move {
            let started = server.start(&node).await;
            drop(alone);
            started
        });
        starter.await.unwrap_or_else(|error| Err(error.to_string()))
    }

    /// Returns when the starting server accepts connections or is gone (the caller looks which).
    async fn wait_for_start(&self, began: Instant) -> Result<(), PostgresError> {
        while let Some(postmaster) = self.postmaster()? {
            if postmaster.status.accepts() {
                return Ok(());
            }
            if began.elapsed() > Duration::from_secs(START_SECONDS_MAX) {
                return Err(self.limit("starting", START_SECONDS_MAX));
            }
            sleep(Duration::from_millis(POLL_MS)).await;
        }
        Ok(())
    }

    /// Stops it; returns when its process is gone, and none is being started any more. A fast stop that takes too long becomes an
    /// immediate one. Nothing to do if it does not run.
    pub async fn stop(&self, immediate: bool) -> Result<(), PostgresError> {
        loop {
            self.stop_running(immediate).await?;
            // A postmaster that is just being started has not written its file yet. The starter ends with it, or in its own time.
            if timeout(Duration::from_millis(10 * POLL_MS), self.starting.lock()).await.is_ok() {
                return self.stop_running(immediate).await;
            }
        }
    }

    async fn stop_running(&self, immediate: bool) -> Result<(), PostgresError> {
        if !immediate && self.signal_and_wait(Signal::INT, FAST_STOP_SECONDS_MAX).await? {
            return Ok(());
        }
        if self.signal_and_wait(Signal::QUIT, IMMEDIATE_STOP_SECONDS_MAX).await? {
            return Ok(());
        }
        Err(self.limit("stopping", IMMEDIATE_STOP_SECONDS_MAX))
    }

    /// True when the postmaster is gone.
    async fn signal_and_wait(&self, signal: Signal, seconds_max: u64) -> Result<bool, PostgresError> {
        let Some(postmaster) = self.postmaster()? else { return Ok(true) };
        Self::signal(&postmaster, signal)?;
        let began = Instant::now();
        while postmaster.alive() {
            if began.elapsed() > Duration::from_secs(seconds_max) {
                return Ok(false);
            }
            sleep(Duration::from_millis(POLL_MS)).await;
        }
        Ok(true)
    }

    fn signal(postmaster: &Postmaster, signal: Signal) -> Result<(), PostgresError> {
        let Some(pid) = Pid::from_raw(postmaster.pid) else { return Ok(()) };
        match rustix::process::kill_process(pid, signal) {
            // Gone in the meantime.
            Ok(()) | Err(rustix::io::Errno::SRCH) => Ok(()),
            Err(error) => Err(PostgresError::Io {
                what: format!("signal to the postmaster, process {}", postmaster.pid),
                source: error.into(),
            }),
        }
    }

    /// Tells a standby to leave recovery; does not wait for it.
    pub fn promote(&self) -> Result<(), PostgresError> {
        let postmaster = self.postmaster()?.ok_or_else(|| PostgresError::NotRunning(self.pgdata()))?;
        // The postmaster removes this file at its start, the startup process looks for it after the signal.
        let file = self.node.pgdata.join("promote");
        fs::write(&file, b"").map_err(|source| self.io("promote", source))?;
        Self::signal(&postmaster, Signal::USR1)
    }

    /// Asks the server to read its configuration again.
    pub fn reload(&self) -> Result<(), PostgresError> {
        let postmaster = self.postmaster()?.ok_or_else(|| PostgresError::NotRunning(self.pgdata()))?;
        Self::signal(&postmaster, Signal::HUP)
    }

    /// A connection over the unix socket as role `pgtandem`. It ends when the client is dropped.
    pub async fn connect(&self, database: &str) -> Result<tokio_postgres::Client, PostgresError> {
        let refuse = |why: String, sqlstate| PostgresError::Connect {
            socket: self.node.socket_dir.join(format!(".s.PGSQL.{}", self.node.port)).display().to_string(),
            database: database.to_owned(),
            why,
            sqlstate,
        };
        let mut settings = tokio_postgres::Config::new();
        settings
            .host_path(&self.node.socket_dir)
            .port(self.node.port)
            .user(ROLE)
            .dbname(database)
            .application_name("pgtandem agent");
        let connected = timeout(Duration::from_millis(CONNECT_MS_MAX), settings.connect(tokio_postgres::NoTls)).await;
        match connected {
            Ok(Ok((client, connection))) => {
                tokio::spawn(async move {
                    if let Err(error) = connection.await {
                        tracing::debug!(%error, "a connection to the local PostgreSQL ended");
                    }
                });
                Ok(client)
            }
            Ok(Err(error)) => Err(refuse(describe(&error), error.code().cloned())),
            Err(_) => Err(refuse(format!("no answer within {CONNECT_MS_MAX} ms"), None)),
        }
    }

    /// The end of postgresql.log since `start`, made fit for one sentence; and pg_ctl's own words if there are none.
    fn why_not_started(&self, log_start: u64, started: Result<(), String>) -> String {
        let log = server::log_since(&self.log_path(), log_start);
        let lines: Vec<&str> = log
            .lines()
            .filter(|line| {
                line.contains("FATAL") || line.contains("PANIC") || line.contains("ERROR") || line.contains("DETAIL")
            })
            .map(str::trim)
            .collect();
        match (lines.is_empty(), started) {
            (false, _) => lines.join("; "),
            (true, Err(words)) => words,
            (true, Ok(())) => "it ended at once and wrote nothing to its log".to_owned(),
        }
    }

    fn log_path(&self) -> std::path::PathBuf {
        server::log_path(&self.node)
    }

    fn log_bytes(&self) -> u64 {
        fs::metadata(self.log_path()).map_or(0, |metadata| metadata.len())
    }

    /// Why it is not running, as far as its log says: the last FATAL or PANIC line.
    #[must_use]
    pub fn last_words(&self) -> String {
        let start = self.log_bytes().saturating_sub(server::LOG_TAIL_BYTES);
        server::log_since(&self.log_path(), start)
            .lines()
            .rfind(|line| line.contains("FATAL") || line.contains("PANIC") || line.contains("was terminated by signal"))
            .map_or_else(String::new, |line| line.trim().to_owned())
    }

    fn limit(&self, doing: &'static str, seconds: u64) -> PostgresError {
        PostgresError::Limit { pgdata: self.pgdata(), doing, seconds }
    }

    fn pgdata(&self) -> String {
        self.node.pgdata.display().to_string()
    }

    fn io(&self, file: &str, source: io::Error) -> PostgresError {
        PostgresError::Io { what: self.node.pgdata.join(Path::new(file)).display().to_string(), source }
    }
}

/// An error of tokio-postgres with its cause: its own text is only "db error".
#[must_use]
pub fn describe(error: &tokio_postgres::Error) -> String {
    if let Some(server) = error.as_db_error() {
        return format!("{} ({})", server.message(), server.code().code());
    }
    let mut text = error.to_string();
    let mut cause = std::error::Error::source(error);
    while let Some(inner) = cause {
        text = format!("{text}: {inner}");
        cause = inner.source();
    }
    text
}
