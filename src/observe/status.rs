//! The status of a cluster as a value: what `status --json` prints and what the table is made from.

use pgtandem_proto::membership::{MemberSet, NodeState};
use pgtandem_proto::message::{NodeStatus, PostgresState};
use serde::{Deserialize, Serialize};

use super::explain;
use super::progress::RecoveryView;
use crate::cluster::members;

/// Counters of the running proxy. The proxy fills in what it counts; zero means none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct ProxyCounters {
    /// Clients connected now.
    pub clients: u64,
    /// Commits acknowledged since the proxy started.
    pub commits: u64,
    /// How often the gate was closed.
    pub gate_closed_count: u64,
    pub gate_closed_ms_max: f64,
    /// Statements refused because they can not be replicated exactly.
    pub statements_refused: u64,
}

/// A shape of statements that ran on every server, because they call or fire code. Field names are stable.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct OnceShape {
    pub database: String,
    /// The text, literals as `?`.
    pub shape: String,
    /// How often it ran since the proxy started.
    pub runs: u64,
    /// How often it was undone and tried again, because a lock was not free or it took too long.
    pub again: u64,
    /// Why it is not proven to do the same on every server.
    pub unproven: Option<String>,
    /// Why it is refused from now on.
    pub refused: Option<String>,
}

/// What the running proxy adds to the status. Both have defaults, so that a proxy can start with an empty `impl`.
pub trait StatusSource: Send + Sync + 'static {
    fn counters(&self) -> ProxyCounters {
        ProxyCounters::default()
    }

    /// What ran on every server, by shape.
    fn once(&self) -> Vec<OnceShape> {
        Vec::new()
    }

    /// Why no client is served at the moment, if so: one sentence.
    fn not_served(&self) -> Option<String> {
        None
    }

    /// Members for which commits wait, and why.
    fn missing(&self) -> Vec<(String, String)> {
        Vec::new()
    }

    /// Members that are just taken out, for which commits wait that long, and why.
    fn leaving(&self) -> Vec<(String, String)> {
        Vec::new()
    }

    /// Why this proxy must not serve and what to do about it, if it waits for another node or for a person.
    fn waiting(&self) -> Option<Problem> {
        None
    }

    /// What is kept for a node that was lost.
    fn away(&self, node: &str) -> Option<AwayView> {
        let _ = node;
        None
    }

    /// Why the node left the member set, or the last thing that went wrong with it: one sentence.
    fn last_error(&self, node: &str) -> Option<String> {
        let _ = node;
        None
    }
}

/// Field names are stable.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ClusterStatus {
    pub cluster: String,
    /// False when the status was put together from the agents' records because no proxy answered.
    pub proxy_running: bool,
    pub epoch: Option<u64>,
    pub version: Option<u64>,
    pub leader: Option<String>,
    /// Node whose proxy rules.
    pub proxy: Option<String>,
    pub members: Vec<String>,
    /// Every write is on at least two members.
    pub redundant: bool,
    pub counters: Option<ProxyCounters>,
    pub nodes: Vec<NodeView>,
    /// Statements that call or fire code, by shape: those that are refused first, then by how often they ran.
    #[serde(default)]
    pub once: Vec<OnceShape>,
    /// What is not as it should be with the cluster as a whole, a sentence each.
    pub problems: Vec<Problem>,
}

/// Something abnormal: what it means, and the next command to type.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Problem {
    pub what: String,
    pub hint: String,
}

/// What is kept for a node that was lost, so that it can become a member again without a copy. Field names are stable.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct AwayView {
    /// Why nothing is kept any more: it has to be recovered.
    pub ended: Option<String>,
    /// Why it is not back yet.
    pub doing: Option<String>,
    /// It answers, and is being brought up to date.
    pub is_back: bool,
    /// Transactions that it misses.
    pub transactions: u64,
    pub bytes: u64,
    pub bytes_max: u64,
    /// For how long they are kept still, seconds.
    pub left_s: u64,
}

/// Field names are stable.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct NodeView {
    pub name: String,
    /// Address of its agent.
    pub address: String,
    /// `leader`, `follower`, or `out`.
    pub role: Role,
    pub agent_reachable: bool,
    /// Why the agent could not be asked.
    pub agent_error: Option<String>,
    /// What the node's record says, now or when it was last read.
    pub state: Option<NodeState>,
    pub uncertain: Option<bool>,
    pub promised_epoch: Option<u64>,
    pub record_epoch: Option<u64>,
    pub record_version: Option<u64>,
    pub postgres: Option<PostgresState>,
    pub postgres_detail: Option<String>,
    /// What is wrong with its archive.
    #[serde(default)]
    pub archive_problem: Option<String>,
    /// Why it left the member set, or what went wrong last.
    pub last_error: Option<String>,
    /// What is kept for it while it is away.
    #[serde(default)]
    pub away: Option<AwayView>,
    /// The last recovery of this node in this reign, under way or ended.
    pub recovery: Option<RecoveryView>,
    pub problem: Option<Problem>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    Leader,
    Follower,
    Out,
}

/// What is known about one node when the status is put together.
#[derive(Clone, Debug)]
pub struct NodeFindings {
    pub name: String,
    pub address: String,
    /// Its agent's answer, or why there is none.
    pub answer: Result<NodeStatus, String>,
    /// An earlier answer, used for state and record when there is none now.
    pub earlier: Option<NodeStatus>,
    pub last_error: Option<String>,
    pub away: Option<AwayView>,
    pub recovery: Option<RecoveryView>,
    /// That recovery is under way.
    pub recovering: bool,
}

impl ClusterStatus {
    /// Puts the status together. `set` is the running proxy's, or the newest one found in records.
    #[must_use]
    pub fn new(
        cluster: &str,
        set: Option<&MemberSet>,
        counters: Option<ProxyCounters>,
        proxy_running: bool,
        findings: Vec<NodeFindings>,
    ) -> Self {
        let nodes: Vec<_> = findings.into_iter().map(|finding| node_view(finding, set, proxy_running)).collect();
        let mut status = Self {
            cluster: cluster.into(),
            proxy_running,
            epoch: set.map(|set| set.epoch),
            version: set.map(|set| set.version),
            leader: set.map(|set| set.leader.clone()),
            proxy: set.map(|set| set.proxy.clone()),
            members: set.map(|set| set.nodes.clone()).unwrap_or_default(),
            redundant: set.is_some_and(|set| set.nodes.len() > 1),
            counters,
            nodes,
            once: Vec::new(),
            problems: Vec::new(),
        };
        status.problems = explain::cluster_problems(&status);
        status
    }

    /// A proxy runs on this host and waits.
    pub fn set_waiting(&mut self, why: Problem) {
        self.problems.retain(|problem| *problem != explain::not_running());
        self.problems.insert(0, explain::waiting(why));
    }

    /// Nothing to explain anywhere.
    #[must_use]
    pub fn is_healthy(&self) -> bool {
        self.problems.is_empty() && self.nodes.iter().all(|node| node.problem.is_none())
    }
}

fn node_view(finding: NodeFindings, set: Option<&MemberSet>, proxy_running: bool) -> NodeView {
    let NodeFindings { name, address, answer, earlier, last_error, away, recovery, recovering } = finding;
    let role = match set {
        Some(set) if set.leader == name => Role::Leader,
        Some(set) if members::contains(set, &name) => Role::Follower,
        _ => Role::Out,
    };
    let agent_reachable = answer.is_ok();
    let (now, agent_error) = match answer {
        Ok(status) => (Some(status), None),
        Err(error) => (None, Some(error)),
    };
    let known = now.as_ref().or(earlier.as_ref());
    let record = known.map(|status| &status.record);
    let mut view = NodeView {
        role,
        agent_reachable,
        agent_error,
        state: record.map(|record| record.state),
        uncertain: record.map(|record| record.uncertain),
        promised_epoch: record.map(|record| record.promised),
        record_epoch: record.and_then(|record| record.members.as_ref()).map(|set| set.epoch),
        record_version: record.and_then(|record| record.members.as_ref()).map(|set| set.version),
        postgres: now.as_ref().map(|status| status.postgres),
        archive_problem: now.as_ref().map(|status| status.archive_problem.clone()).filter(|what| !what.is_empty()),
        postgres_detail: now.map(|status| status.postgres_detail).filter(|detail| !detail.is_empty()),
        last_error,
        away,
        recovery,
        problem: None,
        name,
        address,
    };
    view.problem = explain::node_problem(&view, recovering, proxy_running);
    view
}
