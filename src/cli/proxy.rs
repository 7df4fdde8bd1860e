//! `pgtandem proxy`: the daemon that clients connect to.

use std::path::Path;
use std::process::ExitCode;

use clap::Args;

use crate::config::Config;

#[derive(Debug, Args)]
pub struct Proxy {
    /// The node on whose host this is; needed only where the certificates of several nodes lie on one host.
    #[arg(long)]
    node: Option<String>,
    #[command(flatten)]
    daemon: super::Daemon,
}

impl Proxy {
    pub fn run(self, config: &Path) -> anyhow::Result<ExitCode> {
        self.daemon.begin()?;
        let mut config = Config::load(config)?;
        // proxy.node says where the proxy of a new cluster runs; later the records do, and a proxy on any other host waits.
        if let Some(here) = super::here::node(&config, self.node.as_deref())? {
            config.proxy.node = here;
        }
        super::daemon_runtime()?.block_on(crate::proxy::run(config))?;
        Ok(ExitCode::SUCCESS)
    }
}
