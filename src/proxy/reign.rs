//! A new epoch: at each start of the proxy, and when the leader's PostgreSQL came back.
//!
//! Everybody promises it first; every session of older epochs is ended; then the leader's marks decide what is still
//! prepared on followers; then the member set of the new epoch is stored on all of them, and only then clients are served.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use pgtandem_proto::membership::{MemberSet, NodeState};
use pgtandem_proto::message::{NodeStatus, PostgresState, Reply, Request};

use crate::agent::client::{ClientError, Control};
use crate::cluster::members::{self, MembersError};
use crate::config::NodeConfig;
use crate::replicate::follower::ServerError;
use crate::replicate::hub::{Hub, HubError, Reign, store_on};
use crate::replicate::nodewise::{self, Intent, Place, Servers};
use crate::replicate::resolve::{self, Marks, Verdict};
use crate::replicate::two_phase::{self, Fate, Note, Transaction};

/// How long the leader's agent and its PostgreSQL may take to be there.
const LEADER_MS_MAX: u64 = 120_000;
const POLL_MS: u64 = 100;
/// How long another member's agent may take to answer.
const MEMBER_MS_MAX: u64 = 10_000;
/// How long the PostgreSQL of another member may take to start (crash recovery included) once the leader's runs; clients wait.
const MEMBER_START_MS_MAX: u64 = 10_000;

#[derive(Debug, thiserror::Error)]
pub enum ReignError {
    #[error("the agent of this host (node {node}) does not answer: {source}. Start it: pgtandem agent --node {node}")]
    OwnAgent { node: String, source: ClientError },
    #[error(
        "node {node} is a member, but its agent does not answer: {source}. Start it; or, if that host is lost, type: \
         pgtandem detach {node}"
    )]
    MemberSilent { node: String, source: ClientError },
    #[error(
        "node {node} has no member set in its record: it was never set up as the first node. Recover it from another one"
    )]
    NoMembers { node: String },
    #[error(
        "the record of node {node} says that the proxy of this cluster runs on {proxy}, not on {own}: start it there, or make \
         this host the leader's"
    )]
    NotHere { node: String, proxy: String, own: String },
    #[error(
        "node {node} knows a newer member set (epoch {epoch}, version {version}) than the leader's node: this host was left \
         behind and must not serve. Type on {node}: pgtandem status"
    )]
    Newer { node: String, epoch: u64, version: u64 },
    #[error("the leader {node} is {state:?}, not in sync: it must not serve. Type: pgtandem status")]
    LeaderState { node: String, state: NodeState },
    #[error("PostgreSQL on {node} did not start within {LEADER_MS_MAX} ms: {why}. See postgresql.log of that node")]
    LeaderDown { node: String, why: String },
    #[error(
        "the follower {follower} holds a committed transaction that the leader {leader} does not know (database {database}, mark \
         {mark}: {theirs} against {ours}): the leader lost acknowledged commits, as after a restored disk. Nothing is served; \
         keep both data directories"
    )]
    LeaderSuspect { leader: String, follower: String, database: String, mark: i32, theirs: i64, ours: i64 },
    #[error("the new epoch could not be stored on {node}: {source}")]
    Store { node: String, source: ClientError },
    #[error("PostgreSQL on the leader refused: {0}")]
    Leader(#[from] ServerError),
    #[error(transparent)]
    Hub(#[from] HubError),
    #[error(transparent)]
    Members(#[from] MembersError),
}

/// A follower of the set, and what its agent said.
struct Member {
    node: NodeConfig,
    control: Control,
    status: Box<NodeStatus>,
}

/// Why an epoch is raised.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Occasion {
    /// The proxy starts. What happened while none ran is not known, so every recorded member must be asked.
    Start,
    /// The leader's PostgreSQL came back under the same proxy. Nobody else has served, so a member that does not answer
    /// leaves the set, as it would have at the next commit.
    LeaderBack,
}

/// Raises a new epoch and begins to serve.
///
/// # Errors
/// If it must not: somebody does not agree, or does not answer.
pub async fn raise(hub: &Arc<Hub>, occasion: Occasion) -> Result<(), ReignError> {
    hub.reign.send_replace(Reign::Starting);
    // A change of the member set that is under way ends first; the next one finds the new epoch's followers.
    let _one_at_a_time = hub.changing.lock().await;
    hub.forget_followers();
    hub.marks.reset();
    let own = hub.node(&hub.config.proxy.node)?.clone();
    let mut leader = own_agent(hub, &own).await?;
    let record = &leader.status.record;
    let set = record.members.clone().ok_or_else(|| ReignError::NoMembers { node: own.name.clone() })?;
    if set.proxy != own.name || set.leader != own.name {
        return Err(ReignError::NotHere { node: own.name.clone(), proxy: set.proxy, own: own.name });
    }
    if record.state != NodeState::InSync {
        return Err(ReignError::LeaderState { node: own.name, state: record.state });
    }
    let (mut followers, mut silent) = (Vec::new(), Vec::new());
    for name in set.nodes.iter().filter(|n| **n != own.name) {
        let node = hub.node(name)?.clone();
        match ask(hub, &node, MEMBER_MS_MAX).await {
            Ok(member) => followers.push(member),
            Err(e) if occasion == Occasion::LeaderBack => {
                leaves(hub, name, &format!("its agent did not answer when the leader came back: {e}"));
                silent.push(name.clone());
            }
            Err(source) => return Err(ReignError::MemberSilent { node: name.clone(), source }),
        }
    }
    let (followers, mut dropped) = agree(hub, &set, followers)?;
    let promised = followers.iter().chain(&dropped).chain([&leader]).map(|m| m.status.record.promised);
    let sets = followers.iter().chain(&dropped).filter_map(|m| m.status.record.members.as_ref()).map(|s| s.epoch);
    let epoch = promised.chain(sets).fold(set.epoch, u64::max) + 1;
    promise(&mut leader, epoch).await?;
    let mut promising = Vec::new();
    for mut follower in followers {
        promise(&mut follower, epoch).await?;
        promising.push(follower);
    }
    wait_for_leader(hub, &own).await?;
    let nodes: Vec<NodeConfig> = promising.iter().map(|member| member.node.clone()).collect();
    for node in &nodes {
        wait_for_start(hub, node).await;
    }
    let secret: Arc<str> = format!("{:032x}{:032x}", rand::random::<u128>(), rand::random::<u128>()).into();
    let found = raise_on_leader(hub, epoch, &secret).await?;
    let mut staying = Vec::new();
    for follower in promising {
        match settle_follower(hub, &follower.node, epoch, &secret, &found).await {
            Ok(None) => staying.push(follower),
            Ok(Some((database, Verdict::Ahead { mark, leader: ours, follower: theirs }))) => {
                let (leader, follower) = (own.name, follower.node.name);
                return Err(ReignError::LeaderSuspect { leader, follower, database, mark, theirs, ours });
            }
            Ok(Some((database, verdict))) => {
                leaves(
                    hub,
                    &follower.node.name,
                    &format!("it missed commits of the leader in database {database}: {verdict:?}"),
                );
                dropped.push(follower);
            }
            Err(e) => {
                leaves(hub, &follower.node.name, &format!("it could not go on under a new epoch: {e}"));
                dropped.push(follower);
            }
        }
    }
    let mut new = set;
    for name in dropped.iter().map(|member| &member.node.name).chain(&silent) {
        if members::contains(&new, name) {
            new = members::without(&new, name)?;
        }
    }
    let new = members::in_epoch(&new, epoch, &own.name)?;
    let shrunk = !dropped.is_empty() || !silent.is_empty();
    let generation = shrunk.then(|| format!("{:032x}", rand::random::<u128>()));
    for member in std::iter::once(&mut leader).chain(&mut staying) {
        store_on(&mut member.control, &new, NodeState::InSync, generation.as_deref(), None)
            .await
            .map_err(|source| ReignError::Store { node: member.node.name.clone(), source })?;
    }
    for member in &mut dropped {
        if let Err(e) =
            store_on(&mut member.control, &new, NodeState::Stale, None, Some("left behind at a new epoch")).await
        {
            tracing::info!(node = %member.node.name, error = %e, "could not be told that it is stale; it will be");
        }
    }
    begin(hub, epoch, secret, found, new).await?;
    tracing::info!(epoch, "a new epoch serves");
    Ok(())
}

/// Every member is settled: from here clients are served, with what was found.
async fn begin(hub: &Arc<Hub>, epoch: u64, secret: Arc<str>, found: Found, set: MemberSet) -> Result<(), ReignError> {
    let Found { marks, intents, fates } = found;
    let servers = Servers { hub, epoch, secret: &secret };
    two_phase::forget_decided(&servers, Place::Leader, &fates).await?;
    let later: Vec<Intent> = intents.into_iter().filter(nodewise::may_take_long).collect();
    if later.is_empty() {
        servers.forget(Place::Leader).await?;
    }
    hub.marks.begin(epoch, marks);
    let open = fates.into_iter().filter(|(_, fate)| *fate == Fate::Open).map(|(note, _)| Transaction {
        mark: hub.marks.take_known(&note.database, note.mark_id, note.mark_n),
        hold: hub.nodewise.hold_found(),
        note,
    });
    hub.two_phase.reset(open.collect());
    hub.show(set);
    nodewise::go_on(hub, epoch, &secret, later).await;
    hub.reign.send_replace(Reign::Serving { epoch, secret });
    Ok(())
}

async fn ask(hub: &Hub, node: &NodeConfig, ms_max: u64) -> Result<Member, ClientError> {
    let deadline = tokio::time::Instant::now() + Duration::from_millis(ms_max);
    loop {
        match ask_once(hub, node).await {
            Err(e @ (ClientError::Tls { .. } | ClientError::Refused { .. })) => return Err(e),
            Err(e) if tokio::time::Instant::now() >= deadline => return Err(e),
            Err(_) => tokio::time::sleep(Duration::from_millis(POLL_MS)).await,
            Ok(member) => return Ok(member),
        }
    }
}

async fn ask_once(hub: &Hub, node: &NodeConfig) -> Result<Member, ClientError> {
    let mut control = Control::connect(&hub.identity, node).await?;
    match control.request(&Request::Status).await? {
        Reply::Status(status) => Ok(Member { node: node.clone(), control, status }),
        other => Err(control.unexpected("Status", &other)),
    }
}

async fn own_agent(hub: &Hub, own: &NodeConfig) -> Result<Member, ReignError> {
    ask(hub, own, LEADER_MS_MAX).await.map_err(|source| ReignError::OwnAgent { node: own.name.clone(), source })
}

/// Who goes on as a member. One that is not in sync, or that stored a set without itself, leaves; one that stored a newer set
/// in which it is a member means that this host was left behind.
fn agree(hub: &Hub, set: &MemberSet, followers: Vec<Member>) -> Result<(Vec<Member>, Vec<Member>), ReignError> {
    let (mut staying, mut dropped) = (Vec::new(), Vec::new());
    for member in followers {
        let record = &member.status.record;
        let newer = record.members.as_ref().filter(|s| members::number(s) > members::number(set));
        if record.state == NodeState::InSync {
            if let Some(newer) = newer {
                let (node, epoch, version) = (member.node.name, newer.epoch, newer.version);
                return Err(ReignError::Newer { node, epoch, version });
            }
            staying.push(member);
        } else {
            leaves(hub, &member.node.name, &format!("its own record said {:?} at a new epoch", record.state));
            dropped.push(member);
        }
    }
    Ok((staying, dropped))
}

fn leaves(hub: &Hub, node: &str, reason: &str) {
    tracing::warn!(node, reason, "member leaves the set at a new epoch");
    hub.note_reason(node, reason);
}

async fn promise(member: &mut Member, epoch: u64) -> Result<(), ReignError> {
    let promised = member.control.request(&Request::Promise { epoch }).await;
    promised.map(|_| ()).map_err(|source| ReignError::Store { node: member.node.name.clone(), source })
}

/// Waits until the leader's PostgreSQL, which its agent starts, accepts connections.
async fn wait_for_leader(hub: &Hub, own: &NodeConfig) -> Result<(), ReignError> {
    let deadline = tokio::time::Instant::now() + Duration::from_millis(LEADER_MS_MAX);
    loop {
        let why = match ask_once(hub, own).await {
            Ok(member) if member.status.postgres == PostgresState::Running => {
                match hub.leader_connection("postgres").await {
                    Ok(_) => return Ok(()),
                    Err(e) => e.to_string(),
                }
            }
            Ok(member) => format!("{:?} {}", member.status.postgres, member.status.postgres_detail),
            Err(e) => e.to_string(),
        };
        if tokio::time::Instant::now() >= deadline {
            return Err(ReignError::LeaderDown { node: own.name.clone(), why });
        }
        tokio::time::sleep(Duration::from_millis(POLL_MS)).await;
    }
}

/// Waits until this member's PostgreSQL runs, which its agent starts. One that does not is found out when it is settled.
async fn wait_for_start(hub: &Hub, node: &NodeConfig) {
    let deadline = tokio::time::Instant::now() + Duration::from_millis(MEMBER_START_MS_MAX);
    while tokio::time::Instant::now() < deadline {
        match ask_once(hub, node).await {
            Ok(member) if matches!(member.status.postgres, PostgresState::Stopped | PostgresState::Starting) => {
                tokio::time::sleep(Duration::from_millis(POLL_MS)).await;
            }
            Ok(_) | Err(_) => return,
        }
    }
}

/// What the leader has when all older sessions have ended.
struct Found {
    marks: HashMap<String, Marks>,
    /// Statements outside transactions that are not done everywhere.
    intents: Vec<Intent>,
    /// Transactions that clients have prepared.
    fates: Vec<(Note, Fate)>,
}

/// The epoch in every database of the leader, old sessions ended, its share of what was under way, then its marks.
async fn raise_on_leader(hub: &Hub, epoch: u64, secret: &str) -> Result<Found, ReignError> {
    let mut first = hub.leader_connection("postgres").await?;
    let databases = resolve::databases(&mut first).await?;
    drop(first);
    for database in &databases {
        let mut connection = hub.leader_connection(database).await?;
        resolve::install(&mut connection).await?;
        resolve::raise_epoch(&mut connection, epoch, secret).await?;
    }
    resolve::end_sessions(&mut hub.leader_connection("postgres").await?).await?;
    let servers = Servers { hub, epoch, secret };
    for database in &databases {
        let mut connection = hub.leader_connection(database).await?;
        let marks = resolve::marks(&mut connection).await?;
        // What the leader itself holds prepared was never decided: its mark is inside, so no mark has reached it.
        let undecided = resolve::resolve(&mut connection, &hub.config.cluster.name, Some(&marks)).await?;
        if undecided > 0 {
            tracing::info!(database, undecided, "transactions that the leader had only prepared were rolled back");
        }
    }
    let intents = servers.intents().await?;
    for intent in intents.iter().filter(|intent| !nodewise::may_take_long(intent)) {
        tracing::info!(text = intent.text, "a statement outside transactions is gone on with");
        servers.settle_leader(intent, &intent.work()?).await?;
    }
    let mut marks = HashMap::new();
    for database in resolve::databases(&mut hub.leader_connection("postgres").await?).await? {
        let mut connection = hub.leader_connection(&database).await?;
        let of_database = resolve::marks(&mut connection).await?;
        marks.insert(database, of_database);
    }
    let fates = two_phase::fates(&servers, &marks).await?;
    Ok(Found { marks, intents, fates })
}

/// The same on a follower, and the fate of what it holds prepared. Gives where it differs from the leader, if it does.
async fn settle_follower(
    hub: &Hub,
    node: &NodeConfig,
    epoch: u64,
    secret: &str,
    found: &Found,
) -> Result<Option<(String, Verdict)>, HubError> {
    let Found { marks: leader, intents, fates } = found;
    let mut first = hub.tunnel_connection(node, "postgres", epoch, None).await?;
    let databases = resolve::databases(&mut first).await?;
    drop(first);
    for database in &databases {
        let mut connection = hub.tunnel_connection(node, database, epoch, None).await?;
        resolve::install(&mut connection).await?;
        resolve::raise_epoch(&mut connection, epoch, secret).await?;
    }
    resolve::end_sessions(&mut hub.tunnel_connection(node, "postgres", epoch, None).await?).await?;
    let none = Marks::default();
    for database in &databases {
        let mut connection = hub.tunnel_connection(node, database, epoch, None).await?;
        let marks = nodewise::renamed(database, leader, intents).unwrap_or(&none);
        let resolved = resolve::resolve(&mut connection, &hub.config.cluster.name, Some(marks)).await?;
        if resolved > 0 {
            tracing::info!(node = %node.name, database, resolved, "transactions in doubt were resolved by the leader's marks");
        }
    }
    for (note, _) in fates.iter().filter(|(note, _)| databases.contains(&note.database)) {
        let mut connection = hub.tunnel_connection(node, &note.database, epoch, None).await?;
        two_phase::resolve(&mut connection, &note.database, fates).await?;
    }
    let servers = Servers { hub, epoch, secret };
    for intent in intents.iter().filter(|intent| !nodewise::may_take_long(intent)) {
        servers.follow(node, intent, &intent.work()?, false).await?;
    }
    let mut first = hub.tunnel_connection(node, "postgres", epoch, None).await?;
    let databases = resolve::databases(&mut first).await?;
    drop(first);
    if let Some(missing) = leader.keys().find(|name| !databases.contains(name)) {
        return Err(HubError::Other(format!("it has no database {missing}")));
    }
    for database in &databases {
        let Some(marks) = leader.get(database) else {
            return Err(HubError::Other(format!("it has a database {database} that the leader does not have")));
        };
        let mut connection = hub.tunnel_connection(node, database, epoch, None).await?;
        let verdict = resolve::compare(marks, &resolve::marks(&mut connection).await?);
        if verdict != Verdict::Same {
            return Ok(Some((database.clone(), verdict)));
        }
    }
    two_phase::forget_decided(&servers, Place::Follower(node), fates).await?;
    servers.forget(Place::Follower(node)).await?;
    Ok(None)
}
