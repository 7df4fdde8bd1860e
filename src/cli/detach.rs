//! `pgtandem detach NODE`: takes a node out of the member set, or ends its recovery.
//!
//! With a running proxy, the proxy does it. Without one, which may be because a lost member keeps it from starting,
//! the records of the remaining members are overridden directly: an operator's decision, written down in them.

use std::io::IsTerminal;
use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, SystemTime};

use clap::Args;
use pgtandem_proto::membership::{MemberSet, NodeState};
use pgtandem_proto::message::{Failure, NodeStatus, Request};
use tokio::net::TcpStream;
use tokio::time::timeout;

use super::Explained;
use super::records::{self, Found};
use super::recover::{ask, explained};
use crate::cluster::members;
use crate::config::Config;
use crate::crash::CrashPoint;
use crate::proxy::control::SOCKET_NAME;
use crate::proxy::control::client::{ControlClient, ControlClientError};
use crate::proxy::control::message::{ControlAnswer, ControlRequest, Detached, Outcome};
use crate::recovery::agents::{self, Agents};
use crate::recovery::client::AgentClients;
use crate::recovery::report::CauseKind;

/// Longest wait for an answer on the port of a proxy that should not run.
const LISTEN_PROBE_MAX: Duration = Duration::from_secs(2);

#[derive(Debug, Args)]
pub struct Detach {
    /// Name of the node.
    node: String,
    /// Without a running proxy: override the records of the remaining members.
    #[arg(long)]
    yes: bool,
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
}

impl Detach {
    pub fn run(self, config: &Path) -> anyhow::Result<ExitCode> {
        let config = Config::load(config)?;
        let detached = super::runtime()?.block_on(async {
            match ControlClient::connect(&config.proxy.state_dir.join(SOCKET_NAME)).await {
                Ok(client) => match self.by_proxy(client).await? {
                    Some(detached) => Ok(Some(detached)),
                    // It waits for what this command writes.
                    None => self.by_override(&config).await,
                },
                Err(ControlClientError::NotRunning(_)) => {
                    refuse_while_somebody_serves(&config).await?;
                    self.by_override(&config).await
                }
                Err(error) => Err(explained(&error).into()),
            }
        })?;
        let Some(detached) = detached else {
            println!("Nothing was done.");
            return Ok(ExitCode::FAILURE);
        };
        if self.json {
            println!("{}", serde_json::to_string(&detached)?);
        } else if detached.was_member {
            println!("{} is detached. Writes go on, on {}.", detached.node, detached.members.join(", "));
            println!("To bring it back: pgtandem recover {}", detached.node);
        } else {
            println!("{} is not a member. Members: {}.", detached.node, detached.members.join(", "));
        }
        Ok(ExitCode::SUCCESS)
    }

    /// `None`: the proxy serves nobody.
    async fn by_proxy(&self, mut client: ControlClient) -> anyhow::Result<Option<Detached>> {
        client.send(&ControlRequest::Detach { node: self.node.clone() }).await.map_err(|error| explained(&error))?;
        match client.next().await.map_err(|error| explained(&error))? {
            ControlAnswer::Result { result: Outcome::Detach(detached) } => Ok(Some(detached)),
            ControlAnswer::Error { error } if error.kind == CauseKind::Waiting => Ok(None),
            ControlAnswer::Error { error } => Err(Explained { what: error.what, hint: error.hint }.into()),
            _ => anyhow::bail!("the proxy answered detach with something else"),
        }
    }

    /// `None`: the operator said no.
    async fn by_override(&self, config: &Config) -> anyhow::Result<Option<Detached>> {
        let clients = records::clients(config)?;
        let found = records::read(config, &clients).await;
        let plan = plan(&self.node, &found)?;
        let Some(plan) = plan else {
            let set = records::newest_set(&found)?;
            let (members, version) = set.map(|set| (set.nodes, set.version)).unwrap_or_default();
            return Ok(Some(Detached { node: self.node.clone(), was_member: false, members, version }));
        };
        if !self.yes {
            let meaning = meaning(&self.node, &plan);
            if self.json || !std::io::stdin().is_terminal() {
                let hint = format!("if that is what you want: pgtandem detach {} --yes", self.node);
                return Err(Explained { what: meaning, hint }.into());
            }
            println!("{meaning}.");
            if !ask("Go on?")? {
                return Ok(None);
            }
        }
        apply(&self.node, &plan, &clients).await.map_err(|failure| Explained {
            what: format!("not every record could be written: {}", failure.what),
            hint: format!("the same command again goes on from there; {}", failure.hint),
        })?;
        Ok(Some(Detached {
            node: self.node.clone(),
            was_member: true,
            members: plan.set.nodes,
            version: plan.set.version,
        }))
    }
}

/// What the override will do.
#[derive(Debug, PartialEq)]
struct Plan {
    /// The smaller set, under a new epoch that no proxy has had.
    set: MemberSet,
    /// Whether each remaining member is uncertain, which an override does not change. The leader is the last.
    remaining: Vec<(String, bool)>,
    /// The node itself answers and can be told.
    node_answers: bool,
}

/// Pure: decides what to write, or why nothing may be written. `None`: the node is not a member.
fn plan(node: &str, found: &[Found]) -> Result<Option<Plan>, Explained> {
    if !found.iter().any(|found| found.node == node) {
        let names: Vec<_> = found.iter().map(|found| found.node.as_str()).collect();
        return Err(Explained {
            what: format!("no node is named {node}; the configuration has {}", names.join(", ")),
            hint: "give one of these names".into(),
        });
    }
    let Some(set) = records::newest_set(found)? else {
        return Err(Explained {
            what: "no agent that could be asked knows a member set".into(),
            hint: "start the agents of the members first: pgtandem agent --node NAME on each host".into(),
        });
    };
    if members::contains(&set, node) && set.proxy == node && set.leader != node {
        // The next proxy would have to start there.
        return Err(Explained {
            what: format!("{node} can not be detached: the cluster's proxy is on its host"),
            hint: format!(
                "if its host is lost, on the host of {}: pgtandem promote; else start the proxy there: pgtandem proxy",
                set.leader
            ),
        });
    }
    let is_behind = |name: &String| {
        let found = found.iter().find(|found| found.node == *name).and_then(|found| found.answer.as_ref().ok());
        found.is_some_and(|status| status.record.members.as_ref() != Some(&set))
    };
    let smaller = if members::contains(&set, node) {
        members::without(&set, node).map_err(|error| Explained {
            what: format!("{node} can not be detached: {error}"),
            hint: "if its host is lost, on the host of another member: pgtandem promote; else start its agent".into(),
        })?
    } else if set.nodes.iter().any(is_behind) {
        // An earlier override, or a proxy, did not get to write all records.
        set.clone()
    } else {
        return Ok(None);
    };
    let status = |name: &str| -> Option<&Result<NodeStatus, String>> {
        found.iter().find(|found| found.node == name).map(|found| &found.answer)
    };
    let mut remaining = Vec::new();
    for name in &smaller.nodes {
        match status(name) {
            Some(Ok(status)) if status.record.state == NodeState::InSync => {
                remaining.push((name.clone(), status.record.uncertain));
            }
            Some(Ok(status)) => {
                return Err(Explained {
                    what: format!("the member {name} is recorded as {:?}, so it may lack writes", status.record.state),
                    hint: format!("pgtandem detach {name} first, if another member is in sync"),
                });
            }
            Some(Err(why)) => {
                return Err(Explained {
                    what: format!("the member {name}, which would remain, can not be asked: {why}"),
                    hint: format!("start its agent first: pgtandem agent --node {name}"),
                });
            }
            None => {
                return Err(Explained {
                    what: format!("the member {name} is not in the configuration"),
                    hint: "put its [[node]] section back".into(),
                });
            }
        }
    }
    remaining.sort_by_key(|(name, _)| *name == smaller.leader);
    let promised = found.iter().filter_map(|found| found.answer.as_ref().ok()).map(|status| status.record.promised);
    let above = promised.max().unwrap_or(0).max(set.epoch);
    let epoch = members::next_epoch(above, &smaller.leader, found.iter().map(|found| found.node.as_str()));
    let proxy = smaller.proxy.clone();
    let set = members::in_epoch(&smaller, epoch, &proxy)
        .map_err(|error| Explained { what: error.to_string(), hint: "look at pgtandem status --json".into() })?;
    Ok(Some(Plan { set, remaining, node_answers: matches!(status(node), Some(Ok(_))) }))
}

fn meaning(node: &str, plan: &Plan) -> String {
    format!(
        "no proxy serves here. This writes into the records of {} that {node} is no member any more, so that a proxy \
         starts without it. It is right if {node} is lost or stays stopped; it is wrong if {node} serves clients \
         through another proxy now, because then both sides go on alone",
        plan.set.nodes.join(", ")
    )
}

async fn apply(node: &str, plan: &Plan, clients: &AgentClients) -> Result<(), Failure> {
    let seconds = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |since| since.as_secs());
    let note = format!("at {seconds} s since 1970: an operator detached {node} while no proxy was running");
    let generation = format!("{:032x}", rand::random::<u128>());
    // No proxy of an older reign does anything on the remaining members from here on.
    for (name, _) in &plan.remaining {
        order(clients, name, Request::Promise { epoch: plan.set.epoch }).await?;
        CrashPoint::DetachPromised.reached(name);
    }
    if plan.node_answers {
        let stale = Request::Store {
            members: plan.set.clone(),
            state: NodeState::Stale,
            uncertain: false,
            new_generation: None,
            note: Some(note.clone()),
        };
        order(clients, node, stale).await?;
    }
    for (name, uncertain) in &plan.remaining {
        let stays = Request::Store {
            members: plan.set.clone(),
            state: NodeState::InSync,
            uncertain: *uncertain,
            new_generation: Some(generation.clone()),
            note: Some(note.clone()),
        };
        order(clients, name, stays).await?;
        CrashPoint::DetachStored.reached(name);
    }
    Ok(())
}

async fn order(clients: &AgentClients, node: &str, request: Request) -> Result<(), Failure> {
    let mut control = clients.connect(node).await?;
    agents::order(&mut control, request, &mut |_| {}).await
}

/// A proxy whose control socket is gone may still serve clients; its reign is not ended behind its back.
async fn refuse_while_somebody_serves(config: &Config) -> Result<(), Explained> {
    let listen = config.proxy.listen;
    match timeout(LISTEN_PROBE_MAX, TcpStream::connect(listen)).await {
        Ok(Ok(_)) => Err(Explained {
            what: format!(
                "something accepts connections on {listen}, where the proxy listens, but does not answer on control.sock"
            ),
            hint: "stop that process first, or run this command on the proxy's host as its user".into(),
        }),
        _ => Ok(()),
    }
}

#[cfg(test)]
#[path = "detach_tests.rs"]
mod tests;
