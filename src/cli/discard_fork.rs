//! `pgtandem discard-fork NODE`: a person has looked at the data of a node that went on alone, and needs none of them.
//!
//! Nothing is deleted: its agent moves the data directory aside, and the node is empty.

use std::io::IsTerminal;
use std::path::Path;
use std::process::ExitCode;
use std::time::SystemTime;

use clap::Args;
use pgtandem_proto::membership::NodeState;
use pgtandem_proto::message::Request;

use super::recover::ask;
use super::{Explained, records};
use crate::config::Config;
use crate::observe::time;
use crate::recovery::agents::{self, Agents};

#[derive(Debug, Args)]
pub struct DiscardFork {
    /// Name of the node.
    node: String,
    /// Do not ask.
    #[arg(long)]
    yes: bool,
}

impl DiscardFork {
    pub fn run(self, config: &Path) -> anyhow::Result<ExitCode> {
        let config = Config::load(config)?;
        let Some(node) = super::here::node(&config, Some(&self.node))? else { anyhow::bail!("no node was named") };
        super::runtime()?.block_on(self.discard(&config, &node))
    }

    async fn discard(&self, config: &Config, node: &str) -> anyhow::Result<ExitCode> {
        let clients = records::clients(config)?;
        let failed = |failure: pgtandem_proto::message::Failure| Explained { what: failure.what, hint: failure.hint };
        let mut control = clients.connect(node).await.map_err(failed)?;
        let status = agents::status(&mut control).await.map_err(failed)?;
        if status.record.state != NodeState::Forked {
            let what = format!("{node} is {:?}, not forked: there is nothing to discard", status.record.state);
            return Err(Explained { what, hint: format!("pgtandem recover {node}") }.into());
        }
        if !self.yes {
            let what = format!(
                "{node} went on alone while the other side did, too: its data may hold the only copy of acknowledged writes. They \
                 are moved aside, not deleted, and {node} is empty then"
            );
            if !std::io::stdin().is_terminal() {
                let hint = format!("when nothing in them is needed: pgtandem discard-fork {node} --yes");
                return Err(Explained { what, hint }.into());
            }
            println!("{what}.");
            if !ask("Go on?")? {
                println!("Nothing was done.");
                return Ok(ExitCode::FAILURE);
            }
        }
        let seconds = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |since| since.as_secs());
        let note = format!("{} UTC: an operator discarded the fork of {node}", time::utc(seconds));
        agents::order(&mut control, Request::DiscardFork { note }, &mut |_| {}).await.map_err(failed)?;
        let status = agents::status(&mut control).await.map_err(failed)?;
        println!("{node} is empty. {}", status.record.overrides.last().map_or("", String::as_str));
        println!("To bring it back, on the host whose proxy serves: pgtandem recover {node}");
        Ok(ExitCode::SUCCESS)
    }
}
