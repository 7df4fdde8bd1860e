//! What clients notice of a recovery: N recoveries of node1 of a sandbox under load, and the pause that each caused.
//!
//! ```text
//! make bench BENCH=cutover                                        20 recoveries, 4 writers, 2 readers, release build
//! TMPDIR=/dev/shm make bench BENCH=cutover BENCH_ARGS='--scale 5'          on tmpfs
//! TMPDIR=/dev/shm make bench BENCH=cutover BENCH_ARGS='--load pgbench'     16 clients of pgbench's TPC-B write
//! make bench BENCH=cutover BENCH_ARGS='--leave-recovery-s 60 --recoveries 3'    node1 takes a minute to leave recovery
//! cargo bench --profile dev --bench cutover -- --recoveries 2 --scale 1    a look at the benchmark itself
//! ```
//!
//! The table goes to standard error, one line of JSON to standard output. Ends with 1 if a client saw an error, lost its
//! connection, or the servers differ afterwards; never because something took long.
//!
//! How a pause is counted: the longest time between two acknowledged writes of all writers, from 100 ms before the
//! gate closes to 100 ms after it opens, at the cut and at the join; minus the median of the same over windows of the
//! same length in which no recovery ran; the larger of the two. A transaction is left open across each recovery.

#[path = "../common/mod.rs"]
mod common;
mod figures;
mod load;

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context as _, bail};
use clap::Parser;
use pgtandem::observe::progress::RecoveryView;
use pgtandem::sandbox::{self, Layout, compare, control, demo, slow};

use common::Common;
use figures::{Figures, Span};
use load::{Kind, Load};

const DATABASE: &str = "bench";
/// How long the load runs before the first recovery is counted: connections, caches, plans.
const WARM_UP: Duration = Duration::from_secs(1);

/// Recovers a node again and again under load and tells what clients noticed.
#[derive(Debug, Parser)]
#[command(name = "cutover")]
struct Options {
    #[command(flatten)]
    common: Common,
    /// How often node1 is recovered.
    #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..=1000))]
    recoveries: u32,
    /// Clients that write, by default 4 of the probe, 16 of pgbench.
    #[arg(long, value_parser = clap::value_parser!(u16).range(1..=100))]
    writers: Option<u16>,
    /// Clients that read.
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u16).range(1..=40))]
    readers: u16,
    /// Who writes and reads: the probe (increments; every counter is checked afterwards) or pgbench (TPC-B).
    #[arg(long, value_enum, default_value_t = Kind::Probe)]
    load: Kind,
    /// How long PostgreSQL of node1 takes at the end of its recovery, by a `recovery_end_command` that does nothing else.
    #[arg(long, default_value_t = 0, value_parser = clap::value_parser!(u32).range(0..=100))]
    leave_recovery_s: u32,
    /// How long the load runs undisturbed before each recovery and after the last one.
    #[arg(long, default_value_t = 2000, value_parser = clap::value_parser!(u64).range(500..=600_000))]
    steady_ms: u64,
}

impl Options {
    fn writers(&self) -> usize {
        usize::from(self.writers.unwrap_or(match self.load {
            Kind::Probe => 4,
            Kind::Pgbench => 16,
        }))
    }
}

/// What happened, before anything is concluded from it.
struct Recovered {
    /// From the command to the end, since the load's start.
    span: Span,
    view: RecoveryView,
}

fn main() -> anyhow::Result<ExitCode> {
    let options = Options::parse();
    common::run("cutover", &options.common, async |dir| {
        let result = common::until_interrupted(measure(&options, &dir)).await;
        if let Ok(layout) = Layout::load(&common::cluster_dir(&dir)) {
            sandbox::down(&layout).await?;
        }
        let figures = result?;
        eprintln!("\n{}\n", figures.table());
        println!("{}", serde_json::to_string(&figures)?);
        Ok(figures.problems.is_empty())
    })
}

async fn measure(options: &Options, dir: &Path) -> anyhow::Result<Figures> {
    let cluster = sandbox::Options {
        dir: common::cluster_dir(dir),
        nodes: Some(2),
        base_port: None,
        scale: Some(options.common.scale),
        tls: false,
        archive: false,
    };
    let mut layout = sandbox::up(&cluster, &|line| eprintln!("{line}")).await?;
    if options.leave_recovery_s > 0 {
        // The configuration is read when daemons start.
        sandbox::down(&layout).await?;
        slow::leave_recovery_slowly(&layout, 1, options.leave_recovery_s)?;
        layout = sandbox::up(&cluster, &|line| eprintln!("{line}")).await?;
    }
    let (writers, readers) = (options.writers(), usize::from(options.readers));
    let load = Load::start(options.load, &layout, DATABASE, writers, readers, dir).await?;
    if !load.wait_until_it_works().await {
        bail!("no client got a write acknowledged; the logs are in {}", layout.dir.display());
    }
    tokio::time::sleep(WARM_UP).await;

    let (mut steady, mut recovered) = (Vec::new(), Vec::new());
    for number in 1..=options.recoveries {
        let from = load.now();
        tokio::time::sleep(Duration::from_millis(options.steady_ms)).await;
        steady.push(Span { from, to: load.now() });
        let one = recover(&layout, &load, number).await.with_context(|| format!("recovery {number}"))?;
        let gate = |ms: Option<f64>| ms.unwrap_or(f64::NAN);
        eprintln!(
            "recovery {number} of {}: {:.1} s, gate closed {:.1} ms at the cut, {:.1} ms at the join, backlog of {}",
            options.recoveries,
            (one.span.to.saturating_sub(one.span.from)).as_secs_f64(),
            gate(one.view.cut_gate_ms),
            gate(one.view.join_gate_ms),
            one.view.backlog_peak,
        );
        recovered.push(one);
    }
    tokio::time::sleep(Duration::from_millis(options.steady_ms)).await;
    let origin_unix_us = load.origin_unix_us();
    let seen = load.finish().await?;

    eprintln!("comparing the servers");
    let mut problems = demo::wait_finished(&layout).await?;
    let comparison = compare::compare(&layout).await?;
    problems.extend(comparison.differences);
    for index in 0..layout.plan.nodes {
        let client = compare::connect(layout.postgres_port(index), DATABASE).await?;
        let open: i64 = client.query_one("select count(*) from probe_open", &[]).await?.get(0);
        if open != 2 * i64::from(options.recoveries) {
            problems.push(format!("node{index} has {open} rows of the transactions that were open across a recovery"));
        }
        if options.load == Kind::Probe {
            let rows = client.query("select n from probe_counter order by id", &[]).await?;
            let counters: Vec<i64> = rows.iter().map(|row| row.get(0)).collect();
            problems.extend(seen.check_counters(&Layout::node_name(index), &counters));
        }
    }
    Figures::new(options, &seen, &steady, &recovered, origin_unix_us, problems)
}

/// Recovers node1 with a transaction open across it.
async fn recover(layout: &Layout, load: &Load, number: u32) -> anyhow::Result<Recovered> {
    let open = compare::connect(layout.proxy_port(), DATABASE).await?;
    let insert = |id: u32| format!("insert into probe_open values ({id}, 'open across recovery {number}')");
    open.simple_query(&format!("begin; {}", insert(2 * number))).await?;
    let from = load.now();
    let recovered = control::recover(layout, "node1").await?;
    let span = Span { from, to: load.now() };
    open.simple_query(&format!("{}; commit", insert(2 * number + 1)))
        .await
        .context("the transaction that was open across the recovery")?;
    Ok(Recovered { span, view: recovered.view })
}

/// Where the load keeps what it must write down.
fn log_prefix(dir: &Path, what: &str) -> PathBuf {
    dir.join(format!("pgbench-{what}"))
}
