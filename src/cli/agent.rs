//! `pgtandem agent`: the daemon of a node.

use std::path::Path;
use std::process::ExitCode;

use clap::Args;

use crate::config::Config;

#[derive(Debug, Args)]
pub struct Agent {
    /// The node whose PostgreSQL this agent runs, as it is called in the configuration.
    #[arg(long)]
    node: String,
    #[command(flatten)]
    daemon: super::Daemon,
}

impl Agent {
    pub fn run(self, config: &Path) -> anyhow::Result<ExitCode> {
        self.daemon.begin()?;
        let config = Config::load(config)?;
        super::daemon_runtime()?.block_on(crate::agent::daemon::run(config, self.node))?;
        Ok(ExitCode::SUCCESS)
    }
}
