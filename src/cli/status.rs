//! `pgtandem status`: the cluster as the running proxy sees it, or, without a proxy, as the agents' records say.

use std::path::Path;
use std::process::ExitCode;

use clap::Args;

use super::records;
use super::recover::explained;
use crate::config::Config;
use crate::observe::status::{ClusterStatus, NodeFindings};
use crate::observe::table;
use crate::proxy::control::SOCKET_NAME;
use crate::proxy::control::client::{ControlClient, ControlClientError};
use crate::proxy::control::message::{ControlAnswer, ControlRequest, Outcome};

/// No proxy runs; the same number as `systemctl status` has for it.
const NOT_RUNNING: u8 = 3;

#[derive(Debug, Args)]
pub struct Status {
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
}

impl Status {
    /// Exit code 0 when a proxy runs, 3 when none does and the agents were asked instead.
    pub fn run(self, config: &Path) -> anyhow::Result<ExitCode> {
        let config = Config::load(config)?;
        let status = super::runtime()?.block_on(find(&config))?;
        if self.json {
            println!("{}", serde_json::to_string(&status)?);
        } else {
            print!("{}", table::render(&status));
        }
        Ok(if status.proxy_running { ExitCode::SUCCESS } else { ExitCode::from(NOT_RUNNING) })
    }
}

pub(super) async fn find(config: &Config) -> anyhow::Result<ClusterStatus> {
    match ask_proxy(config).await {
        // Nobody there, or a proxy that ends at this moment.
        Err(ControlClientError::NotRunning(_) | ControlClientError::Ended { .. }) => ask_agents(config).await,
        Err(error) => Err(explained(&error).into()),
        Ok(ControlAnswer::Result { result: Outcome::Status { status } }) => Ok(*status),
        Ok(ControlAnswer::Error { error }) => Err(super::Explained { what: error.what, hint: error.hint }.into()),
        Ok(_) => anyhow::bail!("the proxy answered status with something else"),
    }
}

async fn ask_proxy(config: &Config) -> Result<ControlAnswer, ControlClientError> {
    let mut client = ControlClient::connect(&config.proxy.state_dir.join(SOCKET_NAME)).await?;
    client.send(&ControlRequest::Status).await?;
    client.next().await
}

async fn ask_agents(config: &Config) -> anyhow::Result<ClusterStatus> {
    let found = records::read(config, &records::clients(config)?).await;
    let set = records::newest_set(&found)?;
    let findings = found.into_iter().map(|found| NodeFindings {
        name: found.node,
        address: found.address,
        answer: found.answer,
        earlier: None,
        away: None,
        last_error: None,
        recovery: None,
        recovering: false,
    });
    Ok(ClusterStatus::new(&config.cluster.name, set.as_ref(), None, false, findings.collect()))
}
