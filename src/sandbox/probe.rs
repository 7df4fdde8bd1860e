//! A probe: clients that write and read through the proxy without a pause and note every answer and every error.
//!
//! It is what demo, tests and benchmarks look through. [`prepare`] makes its tables, [`Probe::start`] connects and
//! starts the clients, [`Probe::finish`] stops them and hands over what they saw. Each writer increments a counter of
//! its own, so afterwards every server must show exactly what was acknowledged (see [`Seen::check_counters`]).

mod client;
mod seen;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use super::compare::{CompareError, connect};
pub use client::Kind;
pub use seen::{ClientSeen, Gap, Seen};

/// What the probe's clients are, and where they go.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Of the proxy, on 127.0.0.1.
    pub port: u16,
    pub database: String,
    pub writers: usize,
    pub readers: usize,
    /// How often a health check connects anew, asks `select 1` and leaves; None: no health check.
    pub health_check: Option<Duration>,
}

/// A probe that runs.
pub struct Probe {
    started: Instant,
    stop: CancellationToken,
    writes: Arc<AtomicU64>,
    clients: Vec<JoinHandle<ClientSeen>>,
}

/// Makes the probe's tables, with the counters of `writers` writers at 0.
pub async fn prepare(port: u16, database: &str, writers: usize) -> Result<(), CompareError> {
    let client = connect(port, database).await?;
    let failed = |source| CompareError::Postgres { what: "making the probe's tables".into(), port, source };
    for sql in [
        "create table if not exists probe_counter (id int primary key, n bigint not null)",
        "create table if not exists probe_log (writer int, n bigint, at timestamptz default clock_timestamp(),
            tag uuid default gen_random_uuid(), primary key (writer, n))",
        "create table if not exists probe_open (id int primary key, what text not null)",
        "truncate probe_counter, probe_log, probe_open",
    ] {
        client.simple_query(sql).await.map_err(failed)?;
    }
    for id in 0..writers {
        client.simple_query(&format!("insert into probe_counter values ({id}, 0)")).await.map_err(failed)?;
    }
    Ok(())
}

impl Probe {
    /// Connects every client, then lets all of them go.
    pub async fn start(settings: &Settings) -> Result<Self, CompareError> {
        let stop = CancellationToken::new();
        let writes = Arc::new(AtomicU64::new(0));
        let mut kinds: Vec<Kind> = (0..settings.writers).map(Kind::Writer).collect();
        kinds.extend((0..settings.readers).map(Kind::Reader));
        kinds.extend(settings.health_check.map(Kind::HealthCheck));
        let mut clients = Vec::new();
        for kind in kinds {
            clients.push(client::Client::new(settings, kind, stop.clone(), Arc::clone(&writes)).await?);
        }
        let started = Instant::now();
        let clients = clients.into_iter().map(|client| tokio::spawn(client.run(started))).collect();
        Ok(Self { started, stop, writes, clients })
    }

    /// Time since the start; the axis of everything in [`Seen`].
    #[must_use]
    pub fn now(&self) -> Duration {
        self.started.elapsed()
    }

    /// Writes acknowledged so far.
    #[must_use]
    pub fn writes(&self) -> u64 {
        self.writes.load(Ordering::Relaxed)
    }

    /// Waits until `more` further writes were acknowledged; false when `limit` is over before.
    pub async fn wait_writes(&self, more: u64, limit: Duration) -> bool {
        let (target, started) = (self.writes() + more, Instant::now());
        while self.writes() < target {
            if started.elapsed() > limit {
                return false;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        true
    }

    /// Stops the clients after the operation that each has under way.
    pub async fn finish(mut self) -> Seen {
        self.stop.cancel();
        let mut clients = Vec::new();
        for client in std::mem::take(&mut self.clients) {
            // A client that panicked has seen nothing that could be told; the panic itself is on standard error.
            clients.extend(client.await.ok());
        }
        Seen::new(clients, self.started.elapsed())
    }
}

impl Drop for Probe {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}
