//! For commands when no proxy runs: the agents asked directly, over TLS with this host's own identity.

use std::sync::Arc;

use pgtandem_proto::membership::MemberSet;
use pgtandem_proto::message::NodeStatus;
use tokio::time::timeout;

use super::Explained;
use crate::agent::tls::Identity;
use crate::cluster::members;
use crate::config::Config;
use crate::recovery::agents::{self, Agents};
use crate::recovery::client::AgentClients;
use crate::recovery::contact::{CONTACT_MAX, silent};

/// What one agent said, or why it did not.
pub struct Found {
    pub node: String,
    pub address: String,
    pub answer: Result<NodeStatus, String>,
}

/// Connects to agents as the proxy or as the node of this host, whichever has certificates here.
pub fn clients(config: &Config) -> Result<AgentClients, Explained> {
    let mut reason = String::new();
    let nodes = config.nodes.iter().map(|node| &node.state_dir);
    for folder in std::iter::once(&config.proxy.state_dir).chain(nodes) {
        match Identity::load(folder) {
            Ok(identity) => return Ok(AgentClients::new(Arc::new(identity), config.nodes.clone())),
            Err(error) if reason.is_empty() => reason = error.to_string(),
            Err(_) => {}
        }
    }
    Err(Explained {
        what: format!("no certificate of this host can be used to ask the agents: {reason}"),
        hint: "run the command on a host of the cluster, as the user of the agent or as root".into(),
    })
}

/// Asks every configured agent, all at once, with a short limit.
pub async fn read(config: &Config, clients: &AgentClients) -> Vec<Found> {
    let asked: Vec<_> = config
        .nodes
        .iter()
        .map(|node| {
            let (clients, name) = (clients.clone(), node.name.clone());
            tokio::spawn(async move {
                let answer = async {
                    let mut control = clients.connect(&name).await?;
                    agents::status(&mut control).await
                };
                timeout(CONTACT_MAX, answer)
                    .await
                    .unwrap_or_else(|_| Err(silent(&name)))
                    .map_err(|failure| failure.what)
            })
        })
        .collect();
    let mut found = Vec::new();
    for (node, answer) in config.nodes.iter().zip(asked) {
        let answer = answer.await.unwrap_or_else(|error| Err(error.to_string()));
        found.push(Found { node: node.name.clone(), address: node.agent.to_string(), answer });
    }
    found
}

/// The newest member set that any agent has stored.
pub fn newest_set(found: &[Found]) -> Result<Option<MemberSet>, Explained> {
    let sets = found.iter().filter_map(|found| found.answer.as_ref().ok()?.record.members.as_ref());
    members::newest(sets).map(Option::<&MemberSet>::cloned).map_err(|both| Explained {
        what: format!(
            "two different member sets have the number ({}, {}): {} and {}",
            both.0.epoch,
            both.0.version,
            both.0.nodes.join(", "),
            both.1.nodes.join(", ")
        ),
        hint: "two proxies have decided alone; look at the data of both sides before anything is started".into(),
    })
}
