//! The main job, shown on this machine: two servers behind the proxy under load, one of them killed and recovered.
//!
//! [`run`] makes a sandbox in a fresh folder, looks at it through the probe all the while, and returns what was seen.
//! Whether everything held is [`Outcome::problems`]; the caller prints and takes down.

use std::path::PathBuf;
use std::time::Duration;

use rustix::process::Signal;
use serde::Serialize;

use super::compare::{self, CompareError};
use super::control::{self, ControlError};
use super::probe::{self, Gap, Probe, Seen, Settings};
use super::{Layout, Options, SandboxError, process, up};
use crate::observe::progress::bytes;

const SCALE: u32 = 5;
const WRITERS: usize = 4;
const READERS: usize = 2;
const DATABASE: &str = "bench";
const HEALTH_CHECK: Duration = Duration::from_millis(100);
/// How long the load runs before, between and after what happens.
const STEADY: Duration = Duration::from_millis(1500);
/// How long a node that was killed may take to leave the member set.
const LEAVE_LIMIT: Duration = Duration::from_secs(30);
/// How long the followers may take to finish what was decided.
const FINISH_LIMIT: Duration = Duration::from_secs(20);
/// Errors that the table shows.
const ERRORS_SHOWN: usize = 5;

#[derive(Debug, thiserror::Error)]
pub enum DemoError {
    #[error(transparent)]
    Sandbox(#[from] SandboxError),
    #[error(transparent)]
    Compare(#[from] CompareError),
    #[error("recover node1: {0}")]
    Recover(#[from] ControlError),
    #[error("the clients did not get a single write acknowledged within {seconds} s")]
    NoWrites { seconds: u64 },
    #[error("PostgreSQL of node1 does not run, so it cannot be killed")]
    NothingToKill,
    #[error("node1 did not leave the member set within {seconds} s after its PostgreSQL was killed")]
    DidNotLeave { seconds: u64 },
    #[error("node1 did not come back by itself within {seconds} s: pgtandem status says why")]
    DidNotReturn { seconds: u64 },
    #[error("the transaction that was open across the recovery: {0}")]
    OpenTransaction(tokio_postgres::Error),
}

impl DemoError {
    /// The next thing to do, one sentence.
    #[must_use]
    pub fn hint(&self) -> String {
        match self {
            Self::Sandbox(error) => error.hint(),
            Self::Recover(error) => error.hint(),
            _ => "`pgtandem demo --keep` leaves everything up, with the logs, to be looked at".into(),
        }
    }
}

/// What was seen; field names are those of `--json`.
#[derive(Clone, Debug, Serialize)]
pub struct Outcome {
    pub held: bool,
    /// One sentence each; none if everything held.
    pub problems: Vec<String>,
    pub duration_s: f64,
    pub writes: u64,
    pub reads: u64,
    pub client_errors: u64,
    pub disconnects: u64,
    pub first_errors: Vec<String>,
    /// Longest time in which no writer (no reader) got an answer: over all, after the kill, in the recovery.
    pub write_gap_ms_max: f64,
    pub read_gap_ms_max: f64,
    pub kill_write_gap_ms: f64,
    /// From the moment it left the member set to its return.
    pub away_ms: f64,
    pub recovery_write_gap_ms: f64,
    pub recovery_read_gap_ms: f64,
    /// How long commits were held at the cut and at the join.
    pub cut_gate_ms: Option<f64>,
    pub join_gate_ms: Option<f64>,
    pub recovery_s: f64,
    pub bytes_compared: u64,
    pub bytes_sent: u64,
    pub open_transaction_committed: bool,
    /// Increments that the clients were told had been committed, and what each server has.
    pub acknowledged: u64,
    pub increments: Vec<(String, i64)>,
    pub tables_compared: usize,
    pub rows_compared: i64,
    pub identical: bool,
    pub dir: String,
    pub proxy_port: u16,
}

/// Makes the sandbox in `dir` and runs everything. The sandbox is left up, also when this fails.
pub async fn run(dir: PathBuf, say: &dyn Fn(&str)) -> Result<(Layout, Outcome), DemoError> {
    let options = Options { dir, nodes: Some(2), base_port: None, scale: Some(SCALE), tls: false, archive: false };
    let layout = up(&options, say).await?;
    let port = layout.proxy_port();

    probe::prepare(port, DATABASE, WRITERS).await?;
    let settings = Settings {
        port,
        database: DATABASE.into(),
        writers: WRITERS,
        readers: READERS,
        health_check: Some(HEALTH_CHECK),
    };
    let probe = Probe::start(&settings).await?;
    say(&format!("{WRITERS} clients write, {READERS} read, one checks the health, all without a pause"));
    if !probe.wait_writes(1, LEAVE_LIMIT).await {
        return Err(DemoError::NoWrites { seconds: LEAVE_LIMIT.as_secs() });
    }
    tokio::time::sleep(STEADY).await;

    say("kill -9 of node1's PostgreSQL");
    let killed_at = probe.now();
    let postmaster = process::named_in(&layout.postmaster_pid_file(1)).ok_or(DemoError::NothingToKill)?;
    process::signal(postmaster, Signal::KILL);
    if !control::wait_member(&layout, "node1", false, LEAVE_LIMIT).await {
        return Err(DemoError::DidNotLeave { seconds: LEAVE_LIMIT.as_secs() });
    }
    let left_at = probe.now();
    say(&format!("node1 left the member set after {:.0} ms", ms(left_at.saturating_sub(killed_at))));
    if !control::wait_member(&layout, "node1", true, LEAVE_LIMIT).await {
        return Err(DemoError::DidNotReturn { seconds: LEAVE_LIMIT.as_secs() });
    }
    let away = probe.now().saturating_sub(left_at);
    say(&format!("node1 is a member again by itself after {:.0} ms: it was brought what it missed", ms(away)));
    tokio::time::sleep(STEADY).await;

    let open = compare::connect(port, DATABASE).await?;
    let failed = DemoError::OpenTransaction;
    open.simple_query("begin; insert into probe_open values (1, 'begun before the recovery')").await.map_err(failed)?;
    say("recover node1, as if its disk were lost, with a transaction left open across it");
    let recovery_from = probe.now();
    let recovered = control::recover(&layout, "node1").await?;
    let recovery_to = probe.now();
    open.simple_query("insert into probe_open values (2, 'committed after it'); commit").await.map_err(failed)?;
    tokio::time::sleep(STEADY).await;
    let seen = probe.finish().await;

    say("comparing the servers");
    let mut problems = Vec::new();
    problems.extend(wait_finished(&layout).await?);
    let comparison = compare::compare(&layout).await?;
    problems.extend(comparison.differences.iter().cloned());
    let mut increments = Vec::new();
    let mut open_transaction_committed = true;
    for index in 0..layout.plan.nodes {
        let name = Layout::node_name(index);
        let counters = counters(&layout, index).await?;
        problems.extend(seen.check_counters(&name, &counters.n));
        open_transaction_committed &= counters.open == 2;
        increments.push((name, counters.n.iter().sum()));
    }
    if !open_transaction_committed {
        problems.push("the transaction that was open across the recovery is not on every server".into());
    }
    if seen.errors() > 0 {
        problems.push(format!("{} errors were seen by clients", seen.errors()));
    }
    let end = seen.duration;
    let gap_ms = |gap: Gap| ms(gap.length);
    let outcome = Outcome {
        held: problems.is_empty(),
        problems,
        duration_s: end.as_secs_f64(),
        writes: seen.writes(),
        reads: seen.reads(),
        client_errors: seen.errors(),
        disconnects: seen.disconnects(),
        first_errors: first_errors(&seen),
        write_gap_ms_max: gap_ms(seen.write_gap(Duration::ZERO, end)),
        read_gap_ms_max: gap_ms(seen.read_gap(Duration::ZERO, end)),
        away_ms: ms(away),
        kill_write_gap_ms: gap_ms(seen.write_gap(killed_at, recovery_from)),
        recovery_write_gap_ms: gap_ms(seen.write_gap(recovery_from, recovery_to)),
        recovery_read_gap_ms: gap_ms(seen.read_gap(recovery_from, recovery_to)),
        cut_gate_ms: recovered.view.cut_gate_ms,
        join_gate_ms: recovered.view.join_gate_ms,
        recovery_s: recovered.took.as_secs_f64(),
        bytes_compared: recovered.view.bytes_compared,
        bytes_sent: recovered.view.bytes_sent,
        open_transaction_committed,
        acknowledged: seen.acknowledged().iter().sum(),
        increments,
        tables_compared: comparison.tables,
        rows_compared: comparison.rows,
        identical: comparison.is_identical(),
        dir: layout.dir.display().to_string(),
        proxy_port: port,
    };
    Ok((layout, outcome))
}

fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1000.0
}

fn first_errors(seen: &Seen) -> Vec<String> {
    let errors = seen.first_errors(ERRORS_SHOWN).into_iter();
    errors.map(|(at, text)| format!("after {:.2} s: {text}", at.as_secs_f64())).collect()
}

struct Counters {
    /// By writer.
    n: Vec<i64>,
    /// Rows of the transaction that was open across the recovery.
    open: i64,
}

async fn counters(layout: &Layout, index: usize) -> Result<Counters, CompareError> {
    let port = layout.postgres_port(index);
    let client = compare::connect(port, DATABASE).await?;
    let failed = |source| CompareError::Postgres { what: "reading the counters".into(), port, source };
    let rows = client.query("select n from probe_counter order by id", &[]).await.map_err(failed)?;
    let open = client.query_one("select count(*) from probe_open", &[]).await.map_err(failed)?;
    Ok(Counters { n: rows.iter().map(|row| row.get(0)).collect(), open: open.get(0) })
}

/// Followers finish off the clients' path; returns a sentence for each that did not in time.
pub async fn wait_finished(layout: &Layout) -> Result<Vec<String>, CompareError> {
    let started = std::time::Instant::now();
    let mut unfinished = Vec::new();
    for index in 0..layout.plan.nodes {
        let port = layout.postgres_port(index);
        let client = compare::connect(port, "postgres").await?;
        let failed = |source| CompareError::Postgres { what: "reading pg_prepared_xacts".into(), port, source };
        loop {
            let sql = "select count(*) from pg_prepared_xacts";
            let left: i64 = client.query_one(sql, &[]).await.map_err(failed)?.get(0);
            if left == 0 {
                break;
            }
            if started.elapsed() > FINISH_LIMIT {
                unfinished.push(format!("{left} transactions are still prepared on node{index}"));
                break;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
    Ok(unfinished)
}

impl Outcome {
    /// One table, for people.
    #[must_use]
    pub fn table(&self) -> String {
        let number = |value: Option<f64>, unit: &str| {
            value.map_or_else(|| "not reported".to_owned(), |value| format!("{value:.1} {unit}"))
        };
        let yes = |value: bool| if value { "yes" } else { "NO" }.to_owned();
        let increments: Vec<String> = self.increments.iter().map(|(name, n)| format!("{name} {n}")).collect();
        let rows = [
            ("writes acknowledged, reads answered", format!("{}, {}", self.writes, self.reads)),
            ("errors seen by clients", self.client_errors.to_string()),
            ("connections lost", self.disconnects.to_string()),
            ("longest time without an answer to a write", format!("{:.1} ms", self.write_gap_ms_max)),
            ("  after kill -9 of node1's PostgreSQL", format!("{:.1} ms", self.kill_write_gap_ms)),
            ("  while node1 was recovered", format!("{:.1} ms", self.recovery_write_gap_ms)),
            ("longest time without an answer to a read", format!("{:.1} ms", self.read_gap_ms_max)),
            ("  while node1 was recovered", format!("{:.1} ms", self.recovery_read_gap_ms)),
            ("until node1 was a member again by itself", format!("{:.1} s", self.away_ms / 1000.0)),
            ("pause of commits at the cut", number(self.cut_gate_ms, "ms")),
            ("pause of commits at the join", number(self.join_gate_ms, "ms")),
            ("recovery, from the command to member", format!("{:.1} s", self.recovery_s)),
            ("compared with what node1 still had", bytes(self.bytes_compared)),
            ("sent because it differed", bytes(self.bytes_sent)),
            ("transaction open across the recovery committed", yes(self.open_transaction_committed)),
            ("increments acknowledged", self.acknowledged.to_string()),
            ("increments on the servers", increments.join(", ")),
            ("tables compared, rows", format!("{}, {}", self.tables_compared, self.rows_compared)),
            ("servers identical", yes(self.identical)),
        ];
        let mut lines: Vec<String> = rows.iter().map(|(what, value)| format!("  {what:<48} {value}")).collect();
        lines.extend(self.problems.iter().map(|problem| format!("  problem: {problem}")));
        lines.extend(self.first_errors.iter().map(|error| format!("  client error {error}")));
        lines.join("\n")
    }
}
