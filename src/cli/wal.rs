//! `pgtandem wal push|fetch|verify`: the first two are for PostgreSQL, the third is for people.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;

use clap::{Args, Subcommand};

use super::Explained;
use super::archive::places;
use crate::agent::archive::send_to;
use crate::agent::record;
use crate::agent::tls::Identity;
use crate::archive::fetch::{self, Fetched};
use crate::archive::names::ArchivePath;
use crate::archive::push;
use crate::archive::verify::{Verified, verify};
use crate::config::{Config, NodeConfig, Peers};

/// To PostgreSQL this means that recovery must not go on; up to 125 it would take the archive to end here (`RestoreArchivedFile`).
const STOP_RECOVERY: u8 = 200;

#[derive(Debug, Subcommand)]
pub enum Wal {
    /// `archive_command`: stores a WAL segment; PostgreSQL may recycle it then.
    Push(Push),
    /// `restore_command`: gives a WAL segment back. Exit code 1: the archive ends before it; 200: it is damaged, or missing in the middle.
    Fetch(Fetch),
    /// Check every file of the archives on this host: content, names, and that nothing is missing. Exit code 1: something is wrong.
    Verify(Verify),
}

#[derive(Debug, Args)]
pub struct Push {
    /// The node that it is called by.
    #[arg(long)]
    node: String,
    /// The segment, as %p of archive_command.
    path: PathBuf,
}

#[derive(Debug, Args)]
pub struct Fetch {
    /// Folder of a stream in an archive.
    #[arg(long, value_name = "DIR")]
    archive: PathBuf,
    /// Data directory of the server that is archived, for what it has not archived yet.
    #[arg(long, value_name = "DIR")]
    live: Option<PathBuf>,
    /// The segment, as %f of restore_command.
    name: String,
    /// Where it is wanted, as %p of restore_command.
    path: PathBuf,
}

#[derive(Debug, Args)]
pub struct Verify {
    /// Only the archive of this node.
    #[arg(long)]
    node: Option<String>,
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
}

impl Wal {
    pub fn run(self, config: &Path) -> anyhow::Result<ExitCode> {
        match self {
            Self::Push(command) => command.run(&Config::load(config)?),
            Self::Fetch(command) => Ok(command.run()),
            Self::Verify(command) => command.run(&Config::load(config)?),
        }
    }
}

impl Push {
    fn run(self, config: &Config) -> anyhow::Result<ExitCode> {
        let Some(node) = config.node(&self.node) else {
            let what = format!("the configuration has no node {:?}", self.node);
            return Err(
                Explained { what, hint: "restart the agent of this host: it writes archive_command".into() }.into()
            );
        };
        let folder = node.archive_dir().join(&node.name);
        let pushed = push::push(&folder, &node.pgdata, &self.path)?;
        if config.archive.as_ref().is_some_and(|archive| archive.peers == Peers::Wait) {
            super::runtime()?.block_on(wait_for_members(config, node, &folder, pushed.path))?;
        }
        Ok(ExitCode::SUCCESS)
    }
}

/// Returns when every other member has the segment, too. A node that is none is not waited for: its agent gets it when it is back, and nothing
/// that is lost must fill the disk of what is left.
async fn wait_for_members(config: &Config, node: &NodeConfig, folder: &Path, path: ArchivePath) -> anyhow::Result<()> {
    let members =
        record::peek(&node.state_dir).and_then(|record| record.members).map(|set| set.nodes).unwrap_or_default();
    let identity = Arc::new(Identity::load(&node.state_dir)?);
    for peer in config.nodes.iter().filter(|peer| peer.name != node.name && members.contains(&peer.name)) {
        send_to(&identity, peer, folder, path).await.map_err(|error| Explained {
            what: format!("{path} is on the own disk, and not on that of {}: {error}", peer.name),
            hint: format!("see the agent of {}; PostgreSQL tries again", peer.name),
        })?;
    }
    Ok(())
}

impl Fetch {
    fn run(self) -> ExitCode {
        match fetch::fetch(&self.archive, self.live.as_deref(), &self.name, &self.path) {
            Ok(Fetched::FromArchive | Fetched::FromServer) => ExitCode::SUCCESS,
            Ok(Fetched::Missing) => ExitCode::FAILURE,
            Err(error) => {
                eprintln!("error: {error}\nnext:  {}", error.hint());
                ExitCode::from(STOP_RECOVERY)
            }
        }
    }
}

impl Verify {
    fn run(self, config: &Config) -> anyhow::Result<ExitCode> {
        let mut verified = Verified::default();
        for place in places(config, self.node.as_deref())? {
            verify(&place.folder, &mut verified)?;
        }
        if self.json {
            println!("{}", serde_json::to_string(&verified)?);
        } else {
            let Verified { wal_files, base_copies, extents, bytes, findings } = &verified;
            for finding in findings {
                println!("{}: {}", finding.folder.display(), finding.what);
            }
            let mib = *bytes as f64 / f64::from(1 << 20);
            println!("{wal_files} WAL files, {base_copies} base copies, {extents} extents: {mib:.1} MiB were read");
            if findings.is_empty() {
                println!("All is well.");
            } else {
                println!("{} things are wrong. docs/archive.md says what to do.", findings.len());
            }
        }
        Ok(if verified.findings.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
    }
}
