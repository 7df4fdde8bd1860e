//! What a proxy costs: pgbench directly at a lone PostgreSQL, through pgtandem with two nodes, and, when they are
//! installed, through pgbouncer and through pgpool with two nodes. All are set up here, and measured in turns.
//!
//! ```text
//! make bench BENCH=proxy                                            3 rounds of 5 s each, release build
//! TMPDIR=/dev/shm make bench BENCH=proxy BENCH_ARGS='--seconds 10'          on tmpfs
//! make bench BENCH=proxy BENCH_ARGS='--targets direct,pgtandem --clients 16 --scripts tpcb'
//! make bench BENCH=proxy BENCH_ARGS='--targets direct,pgtandem-alone,pgbouncer'   pgtandem without a follower
//! cargo bench --profile dev --bench proxy -- --scale 1 --rounds 1 --seconds 1     a look at the benchmark itself
//! ```
//!
//! The table goes to standard error, one line of JSON to standard output. Ends with 1 if pgbench failed through
//! pgtandem or its servers differ afterwards; never because something was slow. Only ratios within one run count:
//! servers, proxies and pgbench share the machine's cores.

#[path = "../common/mod.rs"]
mod common;
mod figures;
mod servers;

use std::path::Path;
use std::process::ExitCode;

use anyhow::{Context as _, bail};
use clap::{Parser, ValueEnum};
use pgtandem::sandbox::{self, Layout, compare, demo};

use common::Common;
use figures::{Figures, Measured};
use servers::Servers;

const DATABASE: &str = "bench";

/// Measures pgbench through several proxies side by side.
#[derive(Debug, Parser)]
#[command(name = "proxy")]
struct Options {
    #[command(flatten)]
    common: Common,
    /// How long each measurement takes.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=3600))]
    seconds: u32,
    /// How often each is repeated, in turns; the median counts.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=100))]
    rounds: u32,
    #[arg(long, value_enum, value_delimiter = ',', default_value = "select,tpcb")]
    scripts: Vec<Script>,
    #[arg(long, value_enum, value_delimiter = ',', default_value = "simple,prepared")]
    protocols: Vec<Protocol>,
    #[arg(long, value_delimiter = ',', default_value = "1,16", value_parser = clap::value_parser!(u16).range(1..=50))]
    clients: Vec<u16>,
    /// What is measured; what is not installed is left out.
    #[arg(long, value_enum, value_delimiter = ',', default_value = "direct,pgtandem,pgbouncer,pgpool")]
    targets: Vec<Target>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, ValueEnum)]
enum Target {
    Direct,
    Pgtandem,
    /// One node only, so nothing is replicated.
    PgtandemAlone,
    Pgbouncer,
    Pgpool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Script {
    Select,
    Tpcb,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Protocol {
    Simple,
    Extended,
    Prepared,
}

impl Target {
    fn name(self) -> &'static str {
        match self {
            Self::Direct => "direct",
            Self::Pgtandem => "pgtandem",
            Self::PgtandemAlone => "pgtandem_alone",
            Self::Pgbouncer => "pgbouncer",
            Self::Pgpool => "pgpool",
        }
    }

    fn is_ours(self) -> bool {
        matches!(self, Self::Pgtandem | Self::PgtandemAlone)
    }
}

/// One line of the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Case {
    script: Script,
    protocol: Protocol,
    clients: u16,
}

/// What was started.
#[derive(Default)]
struct Started {
    servers: Servers,
    sandboxes: Vec<Layout>,
    /// With their ports.
    targets: Vec<(Target, u16)>,
}

fn main() -> anyhow::Result<ExitCode> {
    let options = Options::parse();
    common::run("proxy", &options.common, async |dir| {
        let mut started = Started::default();
        let result = common::until_interrupted(run(&options, &dir, &mut started)).await;
        started.servers.stop().await;
        for name in [Target::Pgtandem, Target::PgtandemAlone].map(|target| sandbox_dir(&dir, target)) {
            if let Ok(layout) = Layout::load(&name) {
                sandbox::down(&layout).await?;
            }
        }
        let figures = result?;
        eprintln!("\n{}\n", figures.table());
        println!("{}", serde_json::to_string(&figures)?);
        Ok(figures.problems.is_empty())
    })
}

fn sandbox_dir(dir: &Path, target: Target) -> std::path::PathBuf {
    let cluster = common::cluster_dir(dir);
    if target == Target::Pgtandem { cluster } else { dir.join("alone") }
}

async fn run(options: &Options, dir: &Path, started: &mut Started) -> anyhow::Result<Figures> {
    let bin_dir = start(options, dir, started).await?;
    let cases: Vec<Case> = options
        .scripts
        .iter()
        .flat_map(|script| options.protocols.iter().map(move |protocol| (*script, *protocol)))
        .flat_map(|(script, protocol)| {
            options.clients.iter().map(move |clients| Case { script, protocol, clients: *clients })
        })
        .collect();
    let mut measured = Vec::new();
    for case in cases {
        for round in 0..options.rounds {
            // Whoever comes first in a round is another one each time.
            let targets = started.targets.iter().cycle().skip(round as usize).take(started.targets.len());
            for (target, port) in targets {
                let result = pgbench(&bin_dir, *port, case, options.seconds).await;
                let shown = result.as_ref().map_or_else(ToString::to_string, |one| format!("{:.0} tps", one.tps));
                eprintln!("{case} {:<14} {shown}", target.name());
                measured.push(Measured { case, target: *target, result: result.map_err(|error| error.to_string()) });
            }
        }
    }
    let mut problems = Vec::new();
    for layout in &started.sandboxes {
        eprintln!("comparing the servers");
        problems.extend(demo::wait_finished(layout).await?);
        problems.extend(compare::compare(layout).await?.differences);
    }
    problems.extend(started.servers.pgpool_problem().await?);
    let targets: Vec<Target> = started.targets.iter().map(|(target, _)| *target).collect();
    Ok(Figures::new(options, &targets, &measured, problems))
}

/// Starts every target; returns the folder of PostgreSQL's programs.
async fn start(options: &Options, dir: &Path, started: &mut Started) -> anyhow::Result<std::path::PathBuf> {
    let scale = options.common.scale;
    let bin_dir = sandbox::find_bin_dir()?;
    let mut wanted = options.targets.clone();
    wanted.sort_unstable();
    wanted.dedup();
    let mut direct = None;
    for target in wanted {
        eprintln!("starting {}", target.name());
        let port = match target {
            Target::Direct => *direct.insert(started.servers.postgres(&bin_dir, &dir.join("direct"), scale).await?),
            Target::Pgtandem | Target::PgtandemAlone => {
                let sandbox_dir = sandbox_dir(dir, target);
                if target == Target::PgtandemAlone {
                    let program = common::cluster_dir(dir).join("bin/pgtandem");
                    let user = sandbox::user::find(&sandbox::user::current()?)?;
                    sandbox::user::copy_as(&program, &sandbox_dir, "pgtandem", &user)?;
                }
                let nodes = Some(if target == Target::Pgtandem { 2 } else { 1 });
                let cluster = sandbox::Options {
                    dir: sandbox_dir,
                    nodes,
                    base_port: None,
                    scale: Some(scale),
                    tls: false,
                    archive: false,
                };
                let layout = sandbox::up(&cluster, &|line| eprintln!("  {line}")).await?;
                let port = layout.proxy_port();
                started.sandboxes.push(layout);
                port
            }
            Target::Pgbouncer => {
                let Some(program) = servers::installed("pgbouncer") else {
                    eprintln!("  pgbouncer is not installed, left out");
                    continue;
                };
                let behind = direct.context("pgbouncer is measured in front of `direct`: add it to --targets")?;
                started.servers.pgbouncer(&program, &dir.join("pgbouncer"), behind).await?
            }
            Target::Pgpool => {
                let Some(program) = servers::installed("pgpool") else {
                    eprintln!("  pgpool is not installed, left out");
                    continue;
                };
                started.servers.pgpool(&program, &bin_dir, &dir.join("pgpool"), scale).await?
            }
        };
        started.targets.push((target, port));
    }
    Ok(bin_dir)
}

/// What one run of pgbench said.
struct Rate {
    tps: f64,
    latency_ms: f64,
}

async fn pgbench(bin_dir: &Path, port: u16, case: Case, seconds: u32) -> anyhow::Result<Rate> {
    let (port, clients, seconds) = (port.to_string(), case.clients.to_string(), seconds.to_string());
    let script = match case.script {
        Script::Select => "select-only",
        Script::Tpcb => "tpcb-like",
    };
    let arguments = [
        ["-h", "127.0.0.1"],
        ["-U", "postgres"],
        ["-p", &port],
        ["-M", case.protocol.name()],
        ["-c", &clients],
        ["-T", &seconds],
        ["-b", script],
        ["-n", DATABASE],
    ];
    let said = servers::output(&bin_dir.join("pgbench"), arguments.as_flattened()).await?;
    let number = |start: &str| -> anyhow::Result<f64> {
        let line = said.lines().find_map(|line| line.strip_prefix(start));
        let word = line.and_then(|rest| rest.split_whitespace().next());
        word.and_then(|word| word.parse().ok()).with_context(|| format!("pgbench does not say \"{start}\": {said}"))
    };
    // PostgreSQL 13 and 14 do not count them: there, a failure ends the client and pgbench fails.
    if number("number of failed transactions: ").is_ok_and(|failed| failed > 0.0) {
        bail!("transactions failed: {said}");
    }
    Ok(Rate { tps: number("tps = ")?, latency_ms: number("latency average = ")? })
}

impl Script {
    fn name(self) -> &'static str {
        match self {
            Self::Select => "select",
            Self::Tpcb => "tpcb",
        }
    }
}

impl Protocol {
    fn name(self) -> &'static str {
        match self {
            Self::Simple => "simple",
            Self::Extended => "extended",
            Self::Prepared => "prepared",
        }
    }
}

impl std::fmt::Display for Case {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:<6} {:<8} {:>2}", self.script.name(), self.protocol.name(), self.clients)
    }
}
