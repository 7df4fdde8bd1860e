//! A new epoch: at each start of the proxy, when the leader's PostgreSQL came back, and when another member leads instead.
//!
//! Whether it may be begun is judged in `cluster::start`. Everybody promises it first; every session of older epochs is ended; then the
//! leader's marks decide what is still prepared on followers ([`settle`]); then the member set of the new epoch is stored on all
//! of them, and only then clients are served.

use std::sync::Arc;
use std::time::Duration;

use pgtandem_proto::membership::{MemberSet, NodeState};
use pgtandem_proto::message::{NodeStatus, PostgresState, Reply, Request};

use crate::agent::client::{ClientError, Control};
use crate::cluster::members::{self, MembersError};
use crate::cluster::start::{self, Occasion, Other, Refusal};
use crate::config::NodeConfig;
use crate::crash::CrashPoint;
use crate::observe::status::Problem;
use crate::proxy::settle::{self, Found};
use crate::replicate::follower::ServerError;
use crate::replicate::hub::{Hub, HubError, Reign, store_on};
use crate::replicate::nodewise::{self, Intent, Place, Servers};
use crate::replicate::resolve::Verdict;
use crate::replicate::two_phase::{self, Fate, Transaction};

/// How long the leader's agent and its PostgreSQL may take to be there.
const LEADER_MS_MAX: u64 = 120_000;
const POLL_MS: u64 = 100;
/// How long another member's agent may take to answer.
const MEMBER_MS_MAX: u64 = 10_000;
/// How long the agent of a node that is no member may take: it need not answer, but it may know better.
const OTHER_MS_MAX: u64 = 2_000;
/// How long the PostgreSQL of another member may take to start (crash recovery included) once the leader's runs; clients wait.
const MEMBER_START_MS_MAX: u64 = 10_000;

#[derive(Debug, thiserror::Error)]
pub enum ReignError {
    #[error("the agent of this host (node {node}) does not answer: {source}. Start it: pgtandem agent --node {node}")]
    OwnAgent { node: String, source: ClientError },
    #[error("{0}. Next: {hint}", hint = .0.hint())]
    Refused(Refusal),
    #[error("{node} is a member and {why}; in mode protection nothing is acknowledged without it")]
    Protected { node: String, why: String },
    #[error("{what}. Next: {hint}", what = .0.what, hint = .0.hint)]
    Fenced(Arc<Problem>),
    #[error("PostgreSQL on {node} did not start within {LEADER_MS_MAX} ms: {why}. See postgresql.log of that node")]
    LeaderDown { node: String, why: String },
    #[error("the agent of {node}, which leads, was not asked. Next: pgtandem status")]
    NotAsked { node: String },
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

impl ReignError {
    /// What another node, or a person, has to do: the proxy waits for it.
    #[must_use]
    pub fn waits_for(&self) -> Option<Problem> {
        match self {
            Self::Refused(refusal) => Some(Problem { what: refusal.to_string(), hint: refusal.hint() }),
            Self::Fenced(why) => Some(Problem::clone(why)),
            Self::Protected { node, .. } => Some(Problem {
                what: self.to_string(),
                hint: format!("bring it back; or, to go on without it: pgtandem detach {node} --yes"),
            }),
            _ => None,
        }
    }
}

/// A node, and what its agent said.
pub(super) struct Member {
    node: NodeConfig,
    pub control: Control,
    pub status: Box<NodeStatus>,
}

/// Raises a new epoch and begins to serve.
///
/// # Errors
/// If it must not: somebody does not agree, or does not answer.
pub async fn raise(hub: &Arc<Hub>, occasion: Occasion<'_>) -> Result<(), ReignError> {
    let fenced = hub.fenced.borrow().clone();
    if let Some(why) = fenced {
        return Err(ReignError::Fenced(why));
    }
    // One that waits goes on saying why until it serves.
    hub.leave_leader();
    // A change of the member set that is under way ends first; the next one finds the new epoch's followers.
    let _one_at_a_time = hub.changing.lock().await;
    hub.forget_followers();
    hub.marks.reset();
    let own = hub.node(&hub.config.proxy.node)?.clone();
    let here = own_agent(hub, &own).await?;
    let recorded = here.status.record.members.as_ref().map_or(&[][..], |set| &set.nodes);
    let mut answers = ask_others(hub, &own.name, recorded).await;
    let someone_is_silent = answers.iter().any(|(_, answer)| answer.is_err());
    let start = {
        let others: Vec<Other<'_>> = answers
            .iter()
            .map(|(node, answer)| Other { node, record: answer.as_ref().ok().map(|m| &m.status.record) })
            .collect();
        start::judge(&here.status.record, &others, occasion).map_err(ReignError::Refused)?
    };
    if hub.protects() {
        let leaving = start.leaving.iter().map(|(node, state)| (node, format!("{state:?} by its own record")));
        let silent = start.silent.iter().map(|node| (node, "its agent does not answer".to_owned()));
        if let Some((node, why)) = leaving.chain(silent).next() {
            return Err(ReignError::Protected { node: node.clone(), why });
        }
    }
    answers.push((own.name.clone(), Ok(here)));
    for (node, state) in &start.leaving {
        leaves(hub, node, &format!("its own record said {state:?} at a new epoch"));
    }
    for node in &start.silent {
        leaves(hub, node, "its agent did not answer when the leader came back");
    }
    let mut take = |name: &String| {
        let at = answers.iter().position(|(node, answer)| node == name && answer.is_ok())?;
        answers.swap_remove(at).1.ok()
    };
    let leads = &start.set.leader;
    let mut leader = take(leads).ok_or_else(|| ReignError::NotAsked { node: leads.clone() })?;
    let mut promising: Vec<Member> = start.followers.iter().filter_map(&mut take).collect();
    let mut dropped: Vec<Member> = start.leaving.iter().filter_map(|(name, _)| take(name)).collect();
    // The proxy's own node, if it is no member: its agent obeys the new epoch, too, and knows where the proxy is.
    let mut bystander = take(&own.name);
    let epoch = start.epoch;
    promise(&mut leader, epoch).await?;
    for member in
        promising.iter_mut().chain(dropped.iter_mut().filter(|m| m.node.name == own.name)).chain(&mut bystander)
    {
        promise(member, epoch).await?;
    }
    // Whoever does not answer could hold a lease: of this proxy, or of one before it.
    for name in &start.silent {
        hub.wait_lease_out(name).await;
    }
    if someone_is_silent {
        hub.wait_older_leases_out().await;
    }
    hub.expect(start.set.clone(), epoch);
    wait_for_leader(hub, &leader.node).await?;
    let nodes: Vec<NodeConfig> = promising.iter().map(|member| member.node.clone()).collect();
    for node in &nodes {
        wait_for_start(hub, node).await;
    }
    let secret: Arc<str> = format!("{:032x}{:032x}", rand::random::<u128>(), rand::random::<u128>()).into();
    let (mut followers, mut survivors) = (Vec::new(), None);
    // It may not even have heard yet that it leads.
    let leads_already = leader.status.record.members.as_ref().is_some_and(|set| set.leader == leader.node.name);
    if leader.status.record.taking_over || !leads_already {
        let mut found = Vec::new();
        for member in promising {
            match settle::ask_survivor(hub, &member.node, epoch, &secret).await {
                Ok(survivor) => {
                    found.push(survivor);
                    followers.push(member);
                }
                Err(e) => {
                    leaves(hub, &member.node.name, &format!("it could not be asked when the leader changed: {e}"));
                    dropped.push(member);
                }
            }
        }
        survivors = Some(found);
    } else {
        followers = promising;
    }
    let found = settle::leader(hub, epoch, &secret, survivors.as_deref()).await?;
    CrashPoint::ReignSettled.reached(&leader.node.name);
    let mut staying = Vec::new();
    for follower in followers {
        match settle::follower(hub, &follower.node, epoch, &secret, &found).await {
            Ok(None) => {
                CrashPoint::ReignSettled.reached(&follower.node.name);
                staying.push(follower);
            }
            Ok(Some((database, Verdict::Ahead { mark, leader: ours, follower: theirs }))) => {
                let (leader, follower) = (leader.node.name, follower.node.name);
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
    if let Some(lost) = dropped.first().filter(|_| hub.protects()) {
        let node = lost.node.name.clone();
        let why = hub.reason(&node).unwrap_or_else(|| "can not be settled".into());
        return Err(ReignError::Protected { node, why });
    }
    let mut new = start.set;
    for name in dropped.iter().map(|member| &member.node.name).chain(&start.silent) {
        if members::contains(&new, name) {
            new = members::without(&new, name)?;
        }
    }
    let new = members::in_epoch(&new, epoch, &own.name)?;
    let generation = start::shrinks(&leader.status.record, &new).then(|| format!("{:032x}", rand::random::<u128>()));
    for member in std::iter::once(&mut leader).chain(&mut staying) {
        store_on(&mut member.control, &new, NodeState::InSync, generation.as_deref(), None)
            .await
            .map_err(|source| ReignError::Store { node: member.node.name.clone(), source })?;
        CrashPoint::ReignStored.reached(&member.node.name);
    }
    for member in &mut dropped {
        if let Err(e) =
            store_on(&mut member.control, &new, NodeState::Stale, None, Some("left behind at a new epoch")).await
        {
            tracing::info!(node = %member.node.name, error = %e, "could not be told that it is stale; it will be");
        }
    }
    if let Some(member) = &mut bystander {
        let state =
            if member.status.record.state == NodeState::InSync { NodeState::Stale } else { member.status.record.state };
        if let Err(e) = store_on(&mut member.control, &new, state, None, None).await {
            tracing::info!(node = %member.node.name, error = %e, "the proxy's own node was not told of the new set; it will be");
        }
    }
    begin(hub, epoch, secret, found, new).await?;
    tracing::info!(epoch, "a new epoch serves");
    Ok(())
}

/// Asks every other configured node at once; whoever is recorded as a member has longer to answer.
async fn ask_others(hub: &Hub, own: &str, recorded: &[String]) -> Vec<(String, Result<Member, ClientError>)> {
    let others = hub.config.nodes.iter().filter(|node| node.name != own);
    let asked = others.map(|node| async {
        let ms_max = if recorded.contains(&node.name) { MEMBER_MS_MAX } else { OTHER_MS_MAX };
        let answer = tokio::time::timeout(Duration::from_millis(ms_max + POLL_MS), ask(hub, node, ms_max)).await;
        let silent = || ClientError::Silent { node: node.name.clone() };
        (node.name.clone(), answer.unwrap_or_else(|_| Err(silent())))
    });
    futures_util::future::join_all(asked).await
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

pub(super) async fn ask_once(hub: &Hub, node: &NodeConfig) -> Result<Member, ClientError> {
    let mut control = Control::connect(&hub.identity, node).await?;
    match control.request(&Request::Status).await? {
        Reply::Status(status) => Ok(Member { node: node.clone(), control, status }),
        other => Err(control.unexpected("Status", &other)),
    }
}

async fn own_agent(hub: &Hub, own: &NodeConfig) -> Result<Member, ReignError> {
    ask(hub, own, LEADER_MS_MAX).await.map_err(|source| ReignError::OwnAgent { node: own.name.clone(), source })
}

fn leaves(hub: &Hub, node: &str, reason: &str) {
    tracing::warn!(node, reason, "member leaves the set at a new epoch");
    hub.note_reason(node, reason);
}

async fn promise(member: &mut Member, epoch: u64) -> Result<(), ReignError> {
    let promised = member.control.request(&Request::Promise { epoch }).await;
    promised.map_err(|source| ReignError::Store { node: member.node.name.clone(), source })?;
    CrashPoint::ReignPromised.reached(&member.node.name);
    Ok(())
}

/// Waits until the leader's PostgreSQL, which its agent starts, accepts connections.
async fn wait_for_leader(hub: &Hub, leader: &NodeConfig) -> Result<(), ReignError> {
    let deadline = tokio::time::Instant::now() + Duration::from_millis(LEADER_MS_MAX);
    loop {
        let why = match ask_once(hub, leader).await {
            Ok(member) if member.status.postgres == PostgresState::Running => {
                let started = async { Ok::<_, HubError>(hub.leader_connection("postgres").await?.started_at().await?) };
                match started.await {
                    Ok(started) => {
                        hub.note_leader_started(&started);
                        return Ok(());
                    }
                    Err(e) => e.to_string(),
                }
            }
            Ok(member) => format!("{:?} {}", member.status.postgres, member.status.postgres_detail),
            Err(e) => e.to_string(),
        };
        if tokio::time::Instant::now() >= deadline {
            return Err(ReignError::LeaderDown { node: leader.name.clone(), why });
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
