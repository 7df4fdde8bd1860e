//! `pgtandem promote`: makes the node of this host the leader, because the leader's host is lost.
//!
//! Gathers every record that can be reached, says which case it is with its evidence (`cluster::promote`), asks, and only then acts: the
//! new epoch is promised here and by everybody who answers, who end what is older; then all is judged once more, since nothing can change
//! any more; then the records are written. The proxy of this host, which waits or is started next, settles what the old leader
//! left undecided and serves.

use std::fmt::Write;
use std::io::IsTerminal;
use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, Instant, SystemTime};

use clap::Args;
use pgtandem_proto::membership::{MemberSet, NodeState};
use pgtandem_proto::message::{Failure, Request};
use serde::Serialize;
use tokio::time::timeout;

use super::records::{self, Found};
use super::recover::ask;
use super::{Explained, fence, here, status};
use crate::cluster::lease::WAIT_OUT_MS;
use crate::cluster::promote::{self, Case, Judgement, Plan, Stated};
use crate::config::Config;
use crate::crash::CrashPoint;
use crate::observe::time;
use crate::proxy::control::SOCKET_NAME;
use crate::proxy::control::client::ControlClient;
use crate::recovery::agents::{self, Agents};
use crate::recovery::client::AgentClients;

/// How long the proxy of this host, if it runs and waits, may take until it serves.
const SERVE_MAX: Duration = Duration::from_secs(120);
/// How long it may take to answer.
const ANSWER_MAX: Duration = Duration::from_secs(10);
const SERVE_POLL: Duration = Duration::from_millis(100);

#[derive(Debug, Args)]
pub struct Promote {
    /// The node of this host; needed only where the certificates of several nodes lie on one host.
    #[arg(long)]
    node: Option<String>,
    /// State that this node, which does not answer, is dead and has not served since it was last in contact. For each of them.
    #[arg(long = "peer-is-dead", value_name = "NODE")]
    dead: Vec<String>,
    /// Promote a node that is known to lack acknowledged writes: they are lost.
    #[arg(long)]
    accept_data_loss: bool,
    /// Say which case it is, and do nothing.
    #[arg(long)]
    dry_run: bool,
    /// Do not ask.
    #[arg(long)]
    yes: bool,
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
}

/// Field names are stable.
#[derive(Debug, Serialize)]
struct Report<'a> {
    node: &'a str,
    case: Case,
    evidence: &'a [String],
    /// Options without which nothing is done.
    missing: Vec<String>,
    /// The member set that was written, or would be.
    epoch: Option<u64>,
    members: &'a [String],
    promoted: bool,
    /// Clients are served on this host.
    serving: bool,
}

impl Promote {
    pub fn run(self, config: &Path) -> anyhow::Result<ExitCode> {
        let config = Config::load(config)?;
        let own = here::node(&config, self.node.as_deref())?.ok_or_else(|| Explained {
            what: "it is not clear which node this host is: the certificates of several lie here, or of none".into(),
            hint: "pgtandem promote --node NODE".into(),
        })?;
        super::runtime()?.block_on(self.promote(&config, &own))
    }

    async fn promote(&self, config: &Config, own: &str) -> anyhow::Result<ExitCode> {
        let clients = records::clients(config)?;
        let found = self.when_leases_have_ended(config, &clients).await;
        let judgement = promote::judge(own, &views(&found));
        let missing = judgement.missing(&self.stated());
        if !self.json {
            print!("{}", told(own, &judgement));
        }
        let Some(plan) = &judgement.plan else {
            if self.json {
                print(own, &judgement, missing, None, false)?;
                return Ok(ExitCode::FAILURE);
            }
            return Err(Explained { what: format!("{own} can not be promoted"), hint: judgement.hint.clone() }.into());
        };
        if self.dry_run {
            if self.json {
                print(own, &judgement, missing, None, false)?;
            } else {
                if fence::is_run(config, &judgement.silent) {
                    println!("fence.command would be run first, for {}.", judgement.silent.join(", "));
                }
                println!("Nothing was done. To do it, on this host: {}", self.command(&missing));
            }
            return Ok(ExitCode::SUCCESS);
        }
        if !missing.is_empty() {
            if self.json {
                print(own, &judgement, missing, None, false)?;
                return Ok(ExitCode::FAILURE);
            }
            let hint = format!("if that is so: {}", self.command(&missing));
            return Err(Explained { what: format!("nothing was done: {} is missing", missing.join(" ")), hint }.into());
        }
        if !self.yes {
            if self.json || !std::io::stdin().is_terminal() {
                let hint = format!("if that is what you want: {} --yes", self.command(&missing));
                return Err(Explained { what: "nothing was done: nobody can be asked here".into(), hint }.into());
            }
            if !ask(&format!("Make {own} the leader?"))? {
                println!("Nothing was done.");
                return Ok(ExitCode::FAILURE);
            }
        }
        let fenced = fence::run(config, own, &judgement.silent).await?;
        let set = self.apply(config, &clients, own, plan, judgement.case, &fenced).await?;
        let serving = self.until_served(config, own).await;
        if self.json {
            print(own, &judgement, Vec::new(), Some(&set), serving)?;
        } else {
            println!("{own} is the leader. Members: {}.", set.nodes.join(", "));
            if serving {
                println!("Its proxy serves clients on {}.", config.proxy.listen);
            } else {
                println!("Next, on this host: systemctl start pgtandem-proxy, or pgtandem proxy --node {own}");
            }
            for node in config.nodes.iter().filter(|node| !set.nodes.contains(&node.name)) {
                println!("When the host of {node} is back, here: pgtandem recover {node}", node = node.name);
            }
        }
        Ok(ExitCode::SUCCESS)
    }

    /// Reads all records. A proxy that was lost a moment ago has left leases that still run; one that lives renews them.
    async fn when_leases_have_ended(&self, config: &Config, clients: &AgentClients) -> Vec<Found> {
        let began = Instant::now();
        let mut found = records::read(config, clients).await;
        if !self.json && found.iter().any(is_leased) {
            println!(
                "A proxy served a moment ago. Whether it still does is known in {} s.",
                WAIT_OUT_MS.div_ceil(1000)
            );
        }
        while found.iter().any(is_leased) && began.elapsed() < Duration::from_millis(WAIT_OUT_MS) {
            tokio::time::sleep(SERVE_POLL).await;
            found = records::read(config, clients).await;
        }
        found
    }

    fn stated(&self) -> Stated {
        Stated { dead: self.dead.clone(), accept_data_loss: self.accept_data_loss }
    }

    /// The same command with what is missing.
    fn command(&self, missing: &[String]) -> String {
        let node = self.node.iter().map(|node| format!("--node {node}"));
        let dead = self.dead.iter().map(|node| format!("--peer-is-dead {node}"));
        let lossy = self.accept_data_loss.then(|| "--accept-data-loss".to_owned());
        let words = node.chain(dead).chain(lossy).chain(missing.iter().cloned());
        ["pgtandem promote".to_owned()].into_iter().chain(words).collect::<Vec<_>>().join(" ")
    }

    /// Fences, judges again, writes; `fenced`: what was done before. Gives the set that was written.
    async fn apply(
        &self,
        config: &Config,
        clients: &AgentClients,
        own: &str,
        plan: &Plan,
        case: Case,
        fenced: &str,
    ) -> anyhow::Result<MemberSet> {
        let epoch = plan.set.epoch;
        let failed = |failure: Failure| Explained {
            what: format!("{own} is not the leader yet: {}", failure.what),
            hint: format!("{}; then the same command again", failure.hint),
        };
        order(clients, own, Request::Promise { epoch }).await.map_err(failed)?;
        CrashPoint::PromotePromised.reached(own);
        for node in &plan.fenced {
            order(clients, node, Request::Fence { epoch }).await.map_err(failed)?;
            CrashPoint::PromotePromised.reached(node);
        }
        let found = records::read(config, clients).await;
        let Some(plan) = promote::confirm(own, plan, &views(&found), &self.stated()) else {
            return Err(Explained {
                what: "what the nodes say has changed meanwhile; nothing was written".into(),
                hint: format!("look again: {}", self.command(&[])),
            }
            .into());
        };
        let set = plan.set;
        let seconds = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |since| since.as_secs());
        let dead = if self.dead.is_empty() {
            String::new()
        } else {
            format!(", stating that {} is dead", self.dead.join(", "))
        };
        let loss = if case == Case::Lossy { ", accepting the loss of acknowledged writes" } else { "" };
        let note = format!("{} UTC: an operator promoted {own} ({case:?}{dead}{loss}{fenced})", time::utc(seconds));
        let generation = format!("{:032x}", rand::random::<u128>());
        let stays = |note: &str| Request::Store {
            members: set.clone(),
            state: NodeState::InSync,
            uncertain: true,
            new_generation: Some(generation.clone()),
            note: Some(note.to_owned()),
        };
        for node in &plan.staying {
            order(clients, node, stays(&note)).await.map_err(failed)?;
            CrashPoint::PromoteStored.reached(node);
        }
        order(clients, own, stays(&note)).await.map_err(failed)?;
        CrashPoint::PromoteStored.reached(own);
        for (node, state) in &plan.leaving {
            let leaves = Request::Store {
                members: set.clone(),
                state: *state,
                uncertain: false,
                new_generation: None,
                note: Some(note.clone()),
            };
            // Whoever could not be told is told by the new proxy.
            if let Err(failure) = order(clients, node, leaves).await {
                eprintln!("note: {node} could not be told: {}", failure.what);
            }
        }
        Ok(set)
    }

    /// Waits until the proxy of this host serves, if it runs.
    async fn until_served(&self, config: &Config, own: &str) -> bool {
        let began = Instant::now();
        if ControlClient::connect(&config.proxy.state_dir.join(SOCKET_NAME)).await.is_err() {
            return false;
        }
        if !self.json {
            println!("The proxy of this host takes over.");
        }
        while began.elapsed() < SERVE_MAX {
            match timeout(ANSWER_MAX, status::find(config)).await {
                Ok(Ok(status)) if status.proxy_running && status.proxy.as_deref() == Some(own) => return true,
                // It hangs: this is not the one that will serve.
                Err(_) => return false,
                _ => tokio::time::sleep(SERVE_POLL).await,
            }
        }
        false
    }
}

fn print(
    own: &str,
    judgement: &Judgement,
    missing: Vec<String>,
    written: Option<&MemberSet>,
    serving: bool,
) -> anyhow::Result<()> {
    let set = written.or(judgement.plan.as_ref().map(|plan| &plan.set));
    let report = Report {
        node: own,
        case: judgement.case,
        evidence: &judgement.evidence,
        missing,
        epoch: set.map(|set| set.epoch),
        members: set.map_or(&[], |set| &set.nodes),
        promoted: written.is_some(),
        serving,
    };
    println!("{}", serde_json::to_string(&report)?);
    Ok(())
}

fn is_leased(found: &Found) -> bool {
    found.answer.as_ref().is_ok_and(|status| status.lease_ms.is_some())
}

fn views(found: &[Found]) -> Vec<promote::Found<'_>> {
    found
        .iter()
        .map(|found| promote::Found {
            node: &found.node,
            answer: found.answer.as_ref().map(|status| &status.record).map_err(String::as_str),
            is_leased: is_leased(found),
        })
        .collect()
}

fn told(own: &str, judgement: &Judgement) -> String {
    let case = match judgement.case {
        Case::Safe => "SAFE",
        Case::Assert => "SAFE ONLY IF WHAT YOU STATE IS TRUE",
        Case::Lossy => "ACKNOWLEDGED WRITES WILL BE LOST",
        Case::Impossible => "IMPOSSIBLE",
    };
    let mut text = format!("promote {own}: {case}\n");
    for line in &judgement.evidence {
        let _ = writeln!(text, "- {line}");
    }
    text
}

async fn order(clients: &AgentClients, node: &str, request: Request) -> Result<(), Failure> {
    let mut control = clients.connect(node).await?;
    agents::order(&mut control, request, &mut |_| {}).await
}
