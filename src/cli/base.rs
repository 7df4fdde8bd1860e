//! `pgtandem base`: asks a node's agent for a base copy.

use std::path::Path;
use std::process::ExitCode;

use clap::Args;
use pgtandem_proto::message::{Failure, Reply, Request};

use super::{Explained, records};
use crate::config::Config;
use crate::recovery::agents::Agents;

#[derive(Debug, Args)]
pub struct Base {
    /// Name of the node; without it the one of this host.
    #[arg(long)]
    node: Option<String>,
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
}

impl Base {
    pub fn run(self, config: &Path) -> anyhow::Result<ExitCode> {
        let config = Config::load(config)?;
        let Some(node) = super::here::node(&config, self.node.as_deref())? else {
            let what = "it is not clear which node this host is".to_owned();
            return Err(Explained { what, hint: "pgtandem base --node NODE".into() }.into());
        };
        super::runtime()?.block_on(self.take(&config, &node))
    }

    async fn take(&self, config: &Config, node: &str) -> anyhow::Result<ExitCode> {
        let failed = |failure: Failure| Explained { what: failure.what, hint: failure.hint };
        let mut control = records::clients(config)?.connect(node).await.map_err(failed)?;
        let reply = control.request(&Request::BaseCopy).await.map_err(|error| failed(error.failure()))?;
        let Reply::BaseCopy(copy) = reply else { anyhow::bail!("the agent answered with something else") };
        if self.json {
            println!("{}", serde_json::to_string(&copy)?);
            return Ok(ExitCode::SUCCESS);
        }
        let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
        println!(
            "Base copy {} of {node}: {} files, {:.1} MiB, of which {:.1} MiB were new.",
            copy.name,
            copy.files,
            mib(copy.bytes),
            mib(copy.bytes_new)
        );
        if copy.damaged_count > 0 {
            println!("{} pages of the server have wrong checksums: {}", copy.damaged_count, copy.damaged.join("; "));
            println!(
                "They were copied as they are. pgtandem recover {node} brings good ones from the leader, if {node} is a follower."
            );
        }
        Ok(ExitCode::SUCCESS)
    }
}
