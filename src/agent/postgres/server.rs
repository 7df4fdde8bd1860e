//! How a PostgreSQL process comes into being: by `pg_ctl` now; a service manager can take its place.

use std::future::Future;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::process::Stdio;

use crate::config::NodeConfig;

/// Seconds that one `pg_ctl start` waits; the caller goes on waiting while the process lives.
const PG_CTL_WAIT_SECONDS: u64 = 60;
/// How much of the end of a log is ever read, bytes.
pub(super) const LOG_TAIL_BYTES: u64 = 64 * 1024;

/// Starts the server of a node. Stopping is a signal, whoever started it.
pub trait Server: Send + Sync {
    /// Starts PostgreSQL so that it outlives this process. Ok: it accepts connections or still tries to; Err: what
    /// the starter said. The caller looks at `postmaster.pid` in both cases.
    fn start<'a>(&'a self, node: &'a NodeConfig) -> Pin<Box<dyn Future<Output = Result<(), String>> + Send + 'a>>;
}

/// `pg_ctl start`: it makes PostgreSQL the leader of a session of its own.
pub struct PgCtl;

impl Server for PgCtl {
    fn start<'a>(&'a self, node: &'a NodeConfig) -> Pin<Box<dyn Future<Output = Result<(), String>> + Send + 'a>> {
        Box::pin(async move {
            let program = node.bin_dir.join("pg_ctl");
            let output = tokio::process::Command::new(&program)
                .arg("start")
                .arg("--silent")
                .arg("--wait")
                .arg(format!("--timeout={PG_CTL_WAIT_SECONDS}"))
                .arg("--pgdata")
                .arg(&node.pgdata)
                .arg("--log")
                .arg(log_path(node))
                // What a person has set for psql is not meant for the server.
                .env_remove("PGDATA")
                .env_remove("PGPORT")
                .env_remove("PGOPTIONS")
                .stdin(Stdio::null())
                .stdout(Stdio::null())
                .stderr(Stdio::piped())
                .process_group(0)
                .output()
                .await
                .map_err(|error| format!("{} can not be run: {error}", program.display()))?;
            if output.status.success() {
                return Ok(());
            }
            Err(String::from_utf8_lossy(&output.stderr).trim().replace('\n', " "))
        })
    }
}

/// Where PostgreSQL's first and last words go; the rest too, if it has no logging collector.
#[must_use]
pub fn log_path(node: &NodeConfig) -> PathBuf {
    node.state_dir.join("postgresql.log")
}

/// What was written to a log behind `start`, at most the last [`LOG_TAIL_BYTES`]. Empty if it can not be read.
pub(super) fn log_since(path: &Path, start: u64) -> String {
    let read = || -> std::io::Result<Vec<u8>> {
        let mut file = std::fs::File::open(path)?;
        let end = file.metadata()?.len();
        file.seek(SeekFrom::Start(start.max(end.saturating_sub(LOG_TAIL_BYTES))))?;
        let mut bytes = Vec::new();
        file.take(LOG_TAIL_BYTES).read_to_end(&mut bytes)?;
        Ok(bytes)
    };
    String::from_utf8_lossy(&read().unwrap_or_default()).into_owned()
}
