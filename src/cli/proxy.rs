//! `pgtandem proxy`: the daemon that clients connect to.

use std::path::Path;
use std::process::ExitCode;

use clap::Args;

use crate::config::Config;

#[derive(Debug, Args)]
pub struct Proxy {
    #[command(flatten)]
    daemon: super::Daemon,
}

impl Proxy {
    pub fn run(self, config: &Path) -> anyhow::Result<ExitCode> {
        self.daemon.begin()?;
        let config = Config::load(config)?;
        super::daemon_runtime()?.block_on(crate::proxy::run(config))?;
        Ok(ExitCode::SUCCESS)
    }
}
