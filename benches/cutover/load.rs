//! The load of the cutover benchmark: the sandbox's probe, or pgbench. Either is told as what a probe sees.

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant, SystemTime};

use anyhow::Context as _;
use clap::ValueEnum;
use pgtandem::sandbox::Layout;
use pgtandem::sandbox::probe::{self, ClientSeen, Kind as ClientKind, Probe, Seen, Settings};
use rustix::process::{Pid, Signal};
use tokio::process::{Child, Command};

use crate::log_prefix;

/// How long the first write may take.
const FIRST_WRITE_LIMIT: Duration = Duration::from_secs(30);
/// pgbench ends when it is told to; this is for the case that nobody does.
const PGBENCH_SECONDS_MAX: &str = "36000";

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Kind {
    Probe,
    Pgbench,
}

impl Kind {
    pub fn name(self) -> &'static str {
        match self {
            Self::Probe => "probe",
            Self::Pgbench => "pgbench",
        }
    }
}

pub enum Load {
    Probe(Probe),
    Pgbench(Pgbench),
}

/// Two pgbench that run: one writes, one reads. Each logs every transaction.
pub struct Pgbench {
    started: Instant,
    started_unix_us: u64,
    dir: PathBuf,
    writes: Child,
    reads: Child,
}

impl Load {
    /// Makes the probe's tables (both kinds need that of the open transaction) and lets the clients go.
    pub async fn start(
        kind: Kind,
        layout: &Layout,
        database: &str,
        writers: usize,
        readers: usize,
        dir: &Path,
    ) -> anyhow::Result<Self> {
        let port = layout.proxy_port();
        probe::prepare(port, database, writers).await?;
        if kind == Kind::Probe {
            let settings = Settings { port, database: database.into(), writers, readers, health_check: None };
            return Ok(Self::Probe(Probe::start(&settings).await?));
        }
        let (started, started_unix_us) = (Instant::now(), unix_us());
        let start = |what: &str, clients: usize, script: &str| {
            let errors = log_prefix(dir, &format!("{what}-errors"));
            let errors = std::fs::File::create(&errors).with_context(|| format!("cannot make {}", errors.display()))?;
            let mut command = Command::new(layout.plan.bin_dir.join("pgbench"));
            command.args(["-n", "-M", "prepared", "-h", "127.0.0.1", "-U", "postgres", "-T", PGBENCH_SECONDS_MAX]);
            command.args(["-p", &port.to_string(), "-c", &clients.to_string(), "-b", script, "-l"]);
            command.arg("--log-prefix").arg(log_prefix(dir, what)).arg(database);
            command.current_dir("/").env("LC_ALL", "C").stdin(Stdio::null()).stdout(Stdio::null()).stderr(errors);
            command.kill_on_drop(true).spawn().context("cannot start pgbench")
        };
        Ok(Self::Pgbench(Pgbench {
            started,
            started_unix_us,
            dir: dir.to_owned(),
            writes: start("writes", writers, "tpcb-like")?,
            reads: start("reads", readers, "select-only")?,
        }))
    }

    /// Time since the start; the axis of everything that is seen.
    pub fn now(&self) -> Duration {
        match self {
            Self::Probe(probe) => probe.now(),
            Self::Pgbench(pgbench) => pgbench.started.elapsed(),
        }
    }

    /// When the start was, microseconds since 1970 by this host's clock.
    pub fn origin_unix_us(&self) -> u64 {
        let us = |time: Duration| u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
        match self {
            Self::Probe(probe) => unix_us().saturating_sub(us(probe.now())),
            Self::Pgbench(pgbench) => pgbench.started_unix_us,
        }
    }

    pub async fn wait_until_it_works(&self) -> bool {
        match self {
            Self::Probe(probe) => probe.wait_writes(1, FIRST_WRITE_LIMIT).await,
            Self::Pgbench(pgbench) => {
                let written =
                    || logs(&pgbench.dir, "writes").iter().any(|log| log.metadata().is_ok_and(|m| m.len() > 0));
                while !written() && pgbench.started.elapsed() < FIRST_WRITE_LIMIT {
                    tokio::time::sleep(Duration::from_millis(20)).await;
                }
                written()
            }
        }
    }

    pub async fn finish(self) -> anyhow::Result<Seen> {
        match self {
            Self::Probe(probe) => Ok(probe.finish().await),
            Self::Pgbench(pgbench) => pgbench.finish().await,
        }
    }
}

impl Pgbench {
    async fn finish(mut self) -> anyhow::Result<Seen> {
        for child in [&mut self.writes, &mut self.reads] {
            if let Some(pid) = child.id().and_then(|pid| Pid::from_raw(i32::try_from(pid).ok()?)) {
                // If it has ended already, its errors are told below.
                let _ = rustix::process::kill_process(pid, Signal::TERM);
            }
            child.wait().await?;
        }
        let duration = self.started.elapsed();
        let mut clients = self.seen("writes", ClientKind::Writer)?;
        clients.extend(self.seen("reads", |_| ClientKind::Reader(0))?);
        Ok(Seen::new(clients, duration))
    }

    /// What the clients of one pgbench saw. What it had not written down when it was told to end is missing.
    fn seen(&self, what: &str, kind: impl Fn(usize) -> ClientKind) -> anyhow::Result<Vec<ClientSeen>> {
        let mut clients: Vec<ClientSeen> = Vec::new();
        for log in logs(&self.dir, what) {
            let text = std::fs::read_to_string(&log).with_context(|| format!("cannot read {}", log.display()))?;
            for transaction in text.lines().filter_map(Transaction::parse) {
                while clients.len() <= transaction.client {
                    clients.push(ClientSeen::new(kind(clients.len())));
                }
                let Some(client) = clients.get_mut(transaction.client) else { continue };
                let at = Duration::from_micros(transaction.at_unix_us.saturating_sub(self.started_unix_us));
                match transaction.took {
                    Some(took) => client.answer(at, took),
                    None => client.error(at, "the transaction failed".into()),
                }
            }
        }
        let errors = log_prefix(&self.dir, &format!("{what}-errors"));
        let text = std::fs::read_to_string(&errors).with_context(|| format!("cannot read {}", errors.display()))?;
        if clients.is_empty() {
            clients.push(ClientSeen::new(kind(0)));
        }
        for line in text.lines().filter(|line| line.contains("error:")) {
            if let Some(client) = clients.first_mut() {
                client.error(self.started.elapsed(), line.to_owned());
                client.disconnects += u64::from(line.contains("perhaps the backend died"));
            }
        }
        Ok(clients)
    }
}

/// One line of pgbench's log: client, number, time in microseconds, script, seconds since 1970, microseconds of them.
struct Transaction {
    client: usize,
    /// None: it failed.
    took: Option<Duration>,
    at_unix_us: u64,
}

impl Transaction {
    /// None for a line that is not whole: the last one.
    fn parse(line: &str) -> Option<Self> {
        let fields: Vec<&str> = line.split(' ').collect();
        let [client, _, took, _, seconds, us, ..] = fields.as_slice() else { return None };
        let seconds: u64 = seconds.parse().ok()?;
        Some(Self {
            client: client.parse().ok()?,
            took: took.parse().ok().map(Duration::from_micros),
            at_unix_us: seconds.checked_mul(1_000_000)?.checked_add(us.parse().ok()?)?,
        })
    }
}

/// pgbench writes one log per thread: `<prefix>.<pid>` and `<prefix>.<pid>.<thread>`.
fn logs(dir: &Path, what: &str) -> Vec<PathBuf> {
    let start = format!("pgbench-{what}.");
    let entries = std::fs::read_dir(dir).into_iter().flatten().flatten().map(|entry| entry.path());
    let ours = |path: &PathBuf| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with(&start));
    entries.filter(ours).collect()
}

fn unix_us() -> u64 {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    u64::try_from(now.as_micros()).unwrap_or(u64::MAX)
}
