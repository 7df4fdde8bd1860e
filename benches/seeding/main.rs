//! How long it takes to fill a node, what is sent, and what it costs: a node that is empty, the same, or has an older
//! copy, beside pg_basebackup, rsync and pg_rewind where they apply, in one run.
//!
//! Everything is set up in a folder of its own and taken down again. Nothing here fails because it was slow: it fails
//! when a filled node differs from the one that it was filled from.

#[path = "../common/mod.rs"]
mod common;
mod copies;
mod figures;
mod measure;
mod nodes;
mod tools;

use std::path::Path;
use std::process::ExitCode;

use anyhow::Context as _;
use clap::Parser;
use pgtandem::sandbox::{self, Layout};

use common::Common;
use figures::{Figures, Row, Run};
use nodes::Nodes;

/// Fills a node from another one, from nothing, from the same and from older copies.
#[derive(Debug, Parser)]
#[command(name = "seeding")]
struct Options {
    #[command(flatten)]
    common: Common,
    /// Percent of all pages that differ on the node, one measurement each.
    #[arg(long, value_delimiter = ',', default_value = "1,10,37", value_parser = clap::value_parser!(u32).range(1..=100))]
    changed: Vec<u32>,
    /// Measurements of each; the median by time counts.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=99))]
    rounds: u32,
    /// Only pgtandem, without the other programs.
    #[arg(long)]
    alone: bool,
    /// Leave out the node that has gone on alone, which pg_rewind is for.
    #[arg(long)]
    no_fork: bool,
}

/// What lies on the node before it is filled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Before {
    Empty,
    Same,
    /// An older copy, in which this percentage of the pages differ.
    Changed(u32),
    /// It has left recovery, and both servers went on.
    Forked,
}

impl Before {
    fn text(self) -> String {
        match self {
            Before::Empty => "empty".to_owned(),
            Before::Same => "the same".to_owned(),
            Before::Changed(percent) => format!("{percent} % changed"),
            Before::Forked => "gone on alone".to_owned(),
        }
    }
}

fn main() -> anyhow::Result<ExitCode> {
    let options = Options::parse();
    common::run("seeding", &options.common, async |dir| {
        let result = common::until_interrupted(measure_all(&options, &dir)).await;
        if let Ok(layout) = Layout::load(&common::cluster_dir(&dir)) {
            sandbox::down(&layout).await?;
        }
        let figures = result?;
        eprintln!("\n{}\n", figures.table());
        println!("{}", serde_json::to_string(&figures)?);
        Ok(figures.problems.is_empty())
    })
}

async fn measure_all(options: &Options, dir: &Path) -> anyhow::Result<Figures> {
    let mut nodes = Nodes::start(options, dir).await?;
    let reference = dir.join("reference");
    let (data_bytes, pages) = nodes.copy_leader(&reference).await?;
    let mut figures = Figures::new(options.common.scale, data_bytes, pages);

    let changed = options.changed.iter().map(|percent| Before::Changed(*percent));
    for before in [Before::Empty, Before::Same].into_iter().chain(changed) {
        let expected = copies::expected_bytes(&reference, before)?;
        let mut runs = Vec::new();
        for _ in 0..options.rounds {
            nodes.prepare(&reference, before).await?;
            runs.push(nodes.fill().await.with_context(|| before.text())?);
            let problems = nodes.check().await?;
            figures.problems.extend(problems.into_iter().map(|problem| format!("{}: {problem}", before.text())));
        }
        say(figures.add(before, "pgtandem", expected, runs));
        if options.alone {
            continue;
        }
        for tool in tools::for_state(before) {
            let mut runs = Vec::new();
            for _ in 0..options.rounds {
                runs.extend(tool.run(&nodes, &reference, before)?);
            }
            if !runs.is_empty() {
                say(figures.add(before, tool.name(), expected, runs));
            }
        }
    }
    if !options.no_fork {
        fork(options, &mut nodes, &mut figures).await?;
    }
    Ok(figures)
}

/// The node has just left recovery. Both servers change rows on their own; then it is filled again.
async fn fork(options: &Options, nodes: &mut Nodes, figures: &mut Figures) -> anyhow::Result<()> {
    let before = Before::Forked;
    nodes.go_on_alone().await?;
    let forked = nodes.keep_node("forked")?;
    let expected = nodes.differing_bytes(&forked)?;
    let run = nodes.fill().await.context("the node that had gone on alone")?;
    let problems = nodes.check().await?;
    figures.problems.extend(problems.into_iter().map(|problem| format!("{}: {problem}", before.text())));
    say(figures.add(before, "pgtandem", expected, vec![run]));
    if !options.alone {
        for tool in tools::for_state(before) {
            let runs: Vec<Run> = tool.run(nodes, &forked, before)?.into_iter().collect();
            if !runs.is_empty() {
                say(figures.add(before, tool.name(), expected, runs));
            }
        }
    }
    Ok(())
}

fn say(row: &Row) {
    eprintln!("{}: {} {:.2} s", row.before, row.program, row.seconds);
}
