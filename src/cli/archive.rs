//! `pgtandem archive`: what the archives on this host hold, by the names of their files. Works without any daemon.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Args;
use serde::Serialize;

use super::Explained;
use crate::agent::tls::Identity;
use crate::archive::manifest::Manifest;
use crate::archive::names::gaps;
use crate::archive::restore::Source;
use crate::archive::stream::Stream;
use crate::archive::{ArchiveError, inventory, moment, push, verify};
use crate::config::{Config, NodeConfig};
use crate::observe::time;

/// So many segments wait now and then when a lot is written.
const WAITING_FINE: usize = 4;

#[derive(Debug, Args)]
pub struct Archive {
    /// Only the archive of this node.
    #[arg(long)]
    node: Option<String>,
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
}

/// Field names are stable.
#[derive(Debug, Serialize)]
struct Report {
    archives: Vec<NodeReport>,
}

#[derive(Debug, Serialize)]
struct NodeReport {
    node: String,
    folder: PathBuf,
    streams: Vec<StreamReport>,
}

#[derive(Debug, Serialize)]
struct StreamReport {
    stream: String,
    /// The server of this host writes it now.
    current: bool,
    first_segment: Option<String>,
    last_segment: Option<String>,
    /// When the last segment came, seconds since 1970.
    last_segment_at_s: Option<u64>,
    segments: usize,
    /// Segments of the server that writes it which wait to be archived: a few may, many mean that archive_command fails.
    waiting: usize,
    base_copies: Vec<BaseReport>,
}

#[derive(Debug, Serialize)]
struct BaseReport {
    name: String,
    /// From here on it can be restored, as `restore --target-time` takes it.
    from: Option<String>,
    /// It was the leader's.
    leads: bool,
    bytes: u64,
    damaged_pages: u64,
    /// Why nothing can be restored from it, or not everything behind it.
    problem: Option<String>,
}

/// The nodes of this host, by their certificates; all, where none is to be found.
fn here(config: &Config) -> Vec<&NodeConfig> {
    let own = |node: &&NodeConfig| Identity::load(&node.state_dir).is_ok_and(|identity| identity.name() == node.name);
    let own: Vec<&NodeConfig> = config.nodes.iter().filter(own).collect();
    if own.is_empty() { config.nodes.iter().filter(|node| node.archive_dir().is_dir()).collect() } else { own }
}

/// The archives that lie on this host, those of its own nodes first.
pub(super) fn places(config: &Config, only: Option<&str>) -> anyhow::Result<Vec<Source>> {
    let mut found = Vec::new();
    let here = here(config);
    for keeper in &here {
        let dir = keeper.archive_dir();
        for node in inventory::nodes(&dir)? {
            if only.is_some_and(|only| only != node) {
                continue;
            }
            let own = keeper.name == node;
            let source = Source { folder: dir.join(&node), pgdata: own.then(|| keeper.pgdata.clone()), node };
            // Two nodes of one host keep two copies; the own one is closer to the server.
            found.push((!own, source));
        }
    }
    found.sort_by(|one, other| (one.0, &one.1.node).cmp(&(other.0, &other.1.node)));
    if found.is_empty() {
        let dirs: Vec<String> = here.iter().map(|node| node.archive_dir().display().to_string()).collect();
        let of = only.map_or_else(String::new, |node| format!(" of {node}"));
        let what = format!("there is no archive{of} on this host: {}", dirs.join(", "));
        let hint =
            "add [archive] to the configuration on every host and restart the agents; docs/archive.md".to_owned();
        return Err(Explained { what, hint }.into());
    }
    Ok(found.into_iter().map(|(_, source)| source).collect())
}

impl Archive {
    pub fn run(self, config: &Path) -> anyhow::Result<ExitCode> {
        let config = Config::load(config)?;
        let archives = places(&config, self.node.as_deref())?.iter().map(report).collect::<Result<_, _>>()?;
        let report = Report { archives };
        if self.json {
            println!("{}", serde_json::to_string(&report)?);
        } else {
            report.archives.iter().for_each(NodeReport::print);
        }
        Ok(ExitCode::SUCCESS)
    }
}

fn report(source: &Source) -> Result<NodeReport, ArchiveError> {
    let current = source.pgdata.as_ref().and_then(|pgdata| Stream::of(pgdata).ok()).map(|stream| stream.name());
    let streams = inventory::streams(&source.folder)?.into_iter().map(|stream| {
        let segments = stream.segments();
        let base_copies = stream.bases.iter().map(|base| {
            let name = base.to_string();
            let manifest = match Manifest::load(&stream.base_path(*base)) {
                Ok(manifest) => manifest,
                Err(error) => {
                    let problem = Some(error.to_string());
                    return BaseReport { name, from: None, leads: false, bytes: 0, damaged_pages: 0, problem };
                }
            };
            let gap = gaps(&segments, base.start, manifest.wal_segment_bytes).into_iter().next();
            let problem = verify::incomplete(&stream, *base, &manifest)
                .or_else(|| gap.map(|(first, last)| format!("WAL segments {first} to {last} are missing")));
            BaseReport {
                name,
                from: Some(moment::for_postgres(manifest.ended_us)),
                leads: manifest.leads,
                bytes: manifest.bytes(),
                damaged_pages: manifest.damaged_count,
                problem,
            }
        });
        StreamReport {
            stream: stream.name.to_string(),
            current: current == Some(stream.name),
            first_segment: segments.first().map(ToString::to_string),
            last_segment: segments.last().map(ToString::to_string),
            last_segment_at_s: segments.last().and_then(|last| stream.stored_s(*last)),
            segments: segments.len(),
            waiting: source
                .pgdata
                .as_ref()
                .filter(|_| current == Some(stream.name))
                .map_or(0, |pgdata| push::ready(&pgdata.join("pg_wal")).len()),
            base_copies: base_copies.collect(),
        }
    });
    Ok(NodeReport { node: source.node.clone(), folder: source.folder.clone(), streams: streams.collect() })
}

impl NodeReport {
    fn print(&self) {
        println!("{} in {}", self.node, self.folder.display());
        for stream in &self.streams {
            let current = if stream.current { ", which the server writes now" } else { "" };
            println!("  stream {}{current}", stream.stream);
            let (Some(first), Some(last)) = (&stream.first_segment, &stream.last_segment) else {
                println!("    no WAL yet");
                continue;
            };
            let at = stream.last_segment_at_s.map_or_else(|| "?".to_owned(), time::utc);
            println!("    {} segments, {first} to {last}; the last one came at {at} UTC", stream.segments);
            if stream.waiting > WAITING_FINE {
                println!(
                    "    {} more wait in pg_wal: does archive_command fail? postgresql.log says why",
                    stream.waiting
                );
            }
            for base in &stream.base_copies {
                let leads = if base.leads { ", of the leader" } else { "" };
                let mib = base.bytes as f64 / f64::from(1 << 20);
                match &base.from {
                    Some(from) => println!("    base copy {}: {mib:.1} MiB{leads}; moments from {from} on", base.name),
                    None => println!("    base copy {}", base.name),
                }
                if base.damaged_pages > 0 {
                    println!("      {} pages of the server had wrong checksums", base.damaged_pages);
                }
                if let Some(problem) = &base.problem {
                    println!("      {problem}");
                }
            }
            if stream.base_copies.is_empty() {
                println!("    no base copy: nothing can be restored from this stream yet");
            }
        }
    }
}
