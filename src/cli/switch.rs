//! `pgtandem switch NODE`: a planned change of the leader, typed where the proxy serves. The proxy of the new leader's host takes over.

use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use clap::Args;
use serde::Serialize;

use super::recover::explained;
use super::{Explained, records};
use crate::config::Config;
use crate::proxy::control::SOCKET_NAME;
use crate::proxy::control::client::ControlClient;
use crate::proxy::control::message::{ControlAnswer, ControlRequest, Outcome};

/// How long the new leader's proxy may take until it serves.
const SERVE_MAX: Duration = Duration::from_secs(30);
const SERVE_POLL: Duration = Duration::from_millis(50);

#[derive(Debug, Args)]
pub struct Switch {
    /// The node that is to lead. On its host a proxy has to run, and waits.
    node: String,
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
}

/// Field names are stable.
#[derive(Debug, Serialize)]
struct Report<'a> {
    leader: &'a str,
    members: &'a [String],
    /// From the moment at which the old proxy let no commit through to the one at which the new one was seen to serve.
    took_ms: u128,
}

impl Switch {
    pub fn run(self, config: &Path) -> anyhow::Result<ExitCode> {
        let config = Config::load(config)?;
        super::runtime()?.block_on(self.switch(&config))
    }

    async fn switch(&self, config: &Config) -> anyhow::Result<ExitCode> {
        let node = &self.node;
        let mut client = ControlClient::connect(&config.proxy.state_dir.join(SOCKET_NAME))
            .await
            .map_err(|error| explained(&error))?;
        let began = Instant::now();
        client.send(&ControlRequest::Switch { node: node.clone() }).await.map_err(|error| explained(&error))?;
        let switched = match client.next().await.map_err(|error| explained(&error))? {
            ControlAnswer::Result { result: Outcome::Switch(switched) } => switched,
            ControlAnswer::Error { error } => return Err(Explained { what: error.what, hint: error.hint }.into()),
            _ => anyhow::bail!("the proxy answered switch with something else"),
        };
        if !self.json {
            println!("{node} leads; nobody is served until its proxy takes over.");
        }
        let clients = records::clients(config)?;
        loop {
            let found = records::read(config, &clients).await;
            let serves = found.iter().filter(|found| found.node == *node).any(|found| {
                // It has a lease under a newer epoch than the one that was switched.
                found.answer.as_ref().is_ok_and(|status| {
                    let set = status.record.members.as_ref();
                    status.lease_ms.is_some() && set.is_some_and(|set| set.epoch > switched.epoch && set.proxy == *node)
                })
            });
            if serves {
                break;
            }
            if began.elapsed() > SERVE_MAX {
                let what = format!("{node} leads, and no proxy serves there after {} s", SERVE_MAX.as_secs());
                let hint =
                    format!("on the host of {node}: systemctl start pgtandem-proxy, or pgtandem proxy --node {node}");
                return Err(Explained { what, hint }.into());
            }
            tokio::time::sleep(SERVE_POLL).await;
        }
        let took_ms = began.elapsed().as_millis();
        if self.json {
            let report = Report { leader: node, members: &switched.members, took_ms };
            println!("{}", serde_json::to_string(&report)?);
        } else {
            println!(
                "Its proxy serves. That took {:.1} s; members: {}.",
                began.elapsed().as_secs_f64(),
                switched.members.join(", ")
            );
        }
        Ok(ExitCode::SUCCESS)
    }
}
