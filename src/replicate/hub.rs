//! What all sessions of a proxy share: the member set under which commits are acknowledged, the gate, the marks,
//! the backlogs, and the state of the reign.
//!
//! Changes of the member set go one at a time: recorded on the agents first, shown to sessions then.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use pgtandem_proto::membership::{MemberSet, NodeState};
use pgtandem_proto::message::Request;
use tokio::sync::{Semaphore, watch};
use tokio_util::sync::CancellationToken;

use crate::agent::client::{self, ClientError, Control};
use crate::agent::leases::now_ms;
use crate::agent::tls::Identity;
use crate::cluster::lease::{Grants, WAIT_OUT_MS};
use crate::cluster::members::{self, MembersError};
use crate::cluster::rejoin::Standing;
use crate::config::{Config, NodeConfig};
use crate::observe::status::Problem;
use crate::replicate::away::Away;
use crate::replicate::backlog::{Backlog, Entry};
use crate::replicate::cancels::Cancels;
use crate::replicate::cuts::Cuts;
use crate::replicate::effects::{EffectLog, SpillBudget};
use crate::replicate::exclusion::Exclusion;
use crate::replicate::flight::Decision;
use crate::replicate::follower::{Connection, ServerError};
use crate::replicate::gate::Gate;
use crate::replicate::latency::Latencies;
use crate::replicate::leader::AtLeader;
use crate::replicate::marks::MarkPool;
use crate::replicate::protection::Missing;
use crate::replicate::sequences::Sequences;
use crate::replicate::shapes::Shapes;
use crate::replicate::two_phase::TwoPhase;

/// Transactions that are flown to one follower, or prepared there, at once: below its `max_connections` and
/// `max_prepared_transactions` together with the idle connections of all threads.
pub const PLACES: usize = 64;
/// Halves that are open on one follower before their COMMIT, on top of [`PLACES`].
const OPEN_PLACES: usize = PLACES / 4;
/// Limit for opening a connection to a follower's PostgreSQL.
pub(super) const OPEN_MS_MAX: u64 = 10_000;

#[derive(Debug, thiserror::Error)]
pub enum HubError {
    #[error(transparent)]
    Agent(#[from] ClientError),
    #[error(transparent)]
    Members(#[from] MembersError),
    #[error(transparent)]
    Server(#[from] ServerError),
    #[error("the member set without {node} could not be stored: {why}")]
    NotStored { node: String, why: String },
    #[error("{node} can not do the same: {reason}; in mode protection nothing is acknowledged without it")]
    Protected { node: String, reason: String },
    #[error("node {0} is not in the configuration")]
    UnknownNode(String),
    #[error("{0}")]
    Other(String),
}

/// The member set under which commits are acknowledged, and the followers in it.
#[derive(Debug)]
pub struct View {
    pub set: MemberSet,
    pub followers: Vec<Arc<Follower>>,
}

/// A follower for as long as it stays a member; a node that joins again is a new one.
#[derive(Debug)]
pub struct Follower {
    pub id: u64,
    pub node: NodeConfig,
    /// Cancelled when it leaves the member set: whoever waits for it stops waiting.
    pub gone: CancellationToken,
    /// How many transactions may be flown to it, or be prepared there, at once.
    pub places: Arc<Semaphore>,
    /// How many halves may be open there before their COMMIT.
    pub open_places: Arc<Semaphore>,
    /// Something was not finished there, and is only in the next epoch.
    pub is_hurt: AtomicBool,
    /// Connections that were opened before it became a member, by database, so that no commit waits for one then.
    spares: Mutex<HashMap<Arc<str>, Vec<Connection>>>,
    /// What its server last said about itself.
    standing: Mutex<Option<Standing>>,
}

impl Follower {
    /// A connection that nobody has used, if there is one for this database.
    pub fn take_spare(&self, database: &str) -> Option<Connection> {
        lock(&self.spares).get_mut(database)?.pop()
    }

    #[must_use]
    pub fn standing(&self) -> Option<Standing> {
        lock(&self.standing).clone()
    }

    pub fn note_standing(&self, standing: Standing) {
        *lock(&self.standing) = Some(standing);
    }

    pub(crate) fn put_spares(&self, spares: HashMap<Arc<str>, Vec<Connection>>) {
        *lock(&self.spares) = spares;
    }
}

/// Where the reign of this proxy stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reign {
    /// No epoch yet, or a new one is being raised: nobody is served.
    Starting,
    Serving {
        epoch: u64,
        secret: Arc<str>,
    },
    /// This proxy must not serve, and waits for another node or for a person.
    Waiting(Arc<Problem>),
    Stopping,
}

#[derive(Debug, Default)]
pub struct Counters {
    pub commits: AtomicU64,
    pub halves_remade: AtomicU64,
    pub refused: AtomicU64,
    pub sessions: AtomicU64,
}

pub struct Hub {
    pub config: Arc<Config>,
    pub identity: Identity,
    pub gate: Arc<Gate>,
    /// Work that can not be applied again, against the cut of a recovery.
    pub cuts: Arc<Cuts>,
    pub marks: Arc<MarkPool>,
    /// Statements that run node by node, and what must not meet them.
    pub nodewise: Arc<Exclusion>,
    /// What ran once on every server, by shape.
    pub once: Shapes,
    /// What clients have prepared and not finished.
    pub two_phase: TwoPhase,
    pub spill: Arc<SpillBudget>,
    /// Grows by two with each DDL commit; odd while one is under way, so that nothing is planned between two catalogs.
    pub schema_number: AtomicU64,
    pub counters: Counters,
    /// How long commits take.
    latencies: Mutex<Latencies>,
    pub reign: watch::Sender<Reign>,
    /// Why no reign of this proxy may begin, whatever the records say.
    pub fenced: watch::Sender<Option<Arc<Problem>>>,
    pub(super) at_leader: AtLeader,
    pub cancels: Arc<Cancels>,
    view: Mutex<Arc<View>>,
    /// What is kept for nodes that were lost.
    pub away: Away,
    pub(crate) backlogs: Mutex<HashMap<String, Arc<Backlog>>>,
    /// Held while the member set changes.
    pub(crate) changing: tokio::sync::Mutex<()>,
    /// The node that is just let in, by whoever holds `changing`.
    pub(super) admitting: Mutex<Option<String>>,
    /// Why a node left the set, by name.
    reasons: Mutex<HashMap<String, String>>,
    /// When a node joined or left while this proxy ran, by name.
    changes: Mutex<HashMap<String, SystemTime>>,
    next_follower_id: AtomicU64,
    /// Why no client is served at the moment.
    trouble: Mutex<Option<String>>,
    /// What was granted to whom.
    leases: Mutex<Grants>,
    /// A proxy that has just started takes every lease for granted then.
    started_ms: u64,
    /// How far the followers' sequences are.
    pub sequences: Sequences,
    /// Members for which commits wait.
    pub missing: Missing,
    /// Members that are just taken out, and why.
    pub leaving: Missing,
}

impl std::fmt::Debug for Hub {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Hub").field("set", &self.view().set).finish_non_exhaustive()
    }
}

pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // What the mutexes here protect is consistent between statements, so a panic elsewhere does not spoil it.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Hub {
    #[must_use]
    pub fn new(config: Arc<Config>, identity: Identity, set: MemberSet) -> Self {
        let spill = SpillBudget::new(config.proxy.state_dir.clone(), config.proxy.effects_disk_max);
        Self {
            config,
            identity,
            gate: Arc::default(),
            cuts: Arc::default(),
            marks: Arc::default(),
            nodewise: Arc::default(),
            once: Shapes::default(),
            two_phase: TwoPhase::default(),
            spill: Arc::new(spill),
            schema_number: AtomicU64::new(2),
            counters: Counters::default(),
            latencies: Mutex::default(),
            reign: watch::Sender::new(Reign::Starting),
            fenced: watch::Sender::new(None),
            at_leader: AtLeader::default(),
            cancels: Arc::default(),
            view: Mutex::new(Arc::new(View { set, followers: Vec::new() })),
            away: Away::default(),
            backlogs: Mutex::default(),
            changing: tokio::sync::Mutex::new(()),
            admitting: Mutex::default(),
            reasons: Mutex::default(),
            changes: Mutex::default(),
            next_follower_id: AtomicU64::new(1),
            trouble: Mutex::default(),
            leases: Mutex::default(),
            started_ms: now_ms(),
            sequences: Sequences::default(),
            missing: Missing::default(),
            leaving: Missing::default(),
        }
    }

    /// A commit has taken so long, from the client's word to the leader's.
    pub fn note_commit(&self, took: Duration) {
        lock(&self.latencies).handle(Instant::now(), took);
    }

    /// The median of the commits of the last time; `None`: there were too few.
    #[must_use]
    pub fn commit_median(&self, over: Duration) -> Option<Duration> {
        lock(&self.latencies).median(Instant::now(), over)
    }

    /// Whether effects are kept at all: with one node configured everything is forwarded.
    #[must_use]
    pub fn replicates(&self) -> bool {
        self.config.nodes.len() > 1
    }

    #[must_use]
    pub fn view(&self) -> Arc<View> {
        Arc::clone(&lock(&self.view))
    }

    #[must_use]
    pub fn epoch_and_secret(&self) -> Option<(u64, Arc<str>)> {
        match &*self.reign.borrow() {
            Reign::Serving { epoch, secret } => Some((*epoch, Arc::clone(secret))),
            Reign::Starting | Reign::Waiting(_) | Reign::Stopping => None,
        }
    }

    /// The epoch that serves now.
    #[must_use]
    pub fn reign_epoch(&self) -> Option<u64> {
        self.epoch_and_secret().map(|(epoch, _)| epoch)
    }

    /// Waits for `work` for as long as this epoch serves. `None`: it is over, and nothing may be waited for: what waits for the next
    /// one would wait for ever.
    pub async fn while_serving<T>(&self, epoch: u64, work: impl Future<Output = T>) -> Option<T> {
        let mut reign = self.reign.subscribe();
        let over = reign.wait_for(|reign| !matches!(reign, Reign::Serving { epoch: now, .. } if *now == epoch));
        tokio::select! {
            done = work => Some(done),
            _ = over => None,
        }
    }

    /// The schema number, once no DDL commit is under way: those hold the gate.
    pub async fn settled_schema(&self) -> u64 {
        loop {
            let number = self.schema_number.load(Ordering::Acquire);
            if number.is_multiple_of(2) {
                return number;
            }
            drop(self.gate.pass().await);
        }
    }

    /// Puts a transaction that is about to be committed into the backlog of every node that is joining or away. Called inside the
    /// gate, so a cut lies before or after it.
    pub fn enter_backlogs(&self, database: &Arc<str>, log: &Arc<EffectLog>, decision: &Decision) -> Vec<Arc<Entry>> {
        let entry = || Arc::new(Entry::new(Arc::clone(database), Arc::clone(log), decision.clone()));
        let enter = |backlog: &Arc<Backlog>| {
            let entry = entry();
            backlog.push(Arc::clone(&entry));
            entry
        };
        let mut entered = lock(&self.backlogs).values().map(enter).collect();
        self.away.enter(entry, &mut entered);
        entered
    }

    /// The node with this name.
    ///
    /// # Errors
    /// If the configuration has none.
    pub fn node(&self, name: &str) -> Result<&NodeConfig, HubError> {
        self.config.nodes.iter().find(|n| n.name == name).ok_or_else(|| HubError::UnknownNode(name.to_owned()))
    }

    /// The leader's node.
    ///
    /// # Errors
    /// If the configuration does not have it.
    pub fn leader(&self) -> Result<NodeConfig, HubError> {
        let leader = self.view().set.leader.clone();
        self.node(&leader).cloned()
    }

    #[must_use]
    pub fn socket_path(node: &NodeConfig) -> PathBuf {
        node.socket_dir.join(format!(".s.PGSQL.{}", node.port))
    }

    /// Why this node left the member set, if it did while this proxy ran.
    #[must_use]
    pub fn reason(&self, node: &str) -> Option<String> {
        lock(&self.reasons).get(node).cloned()
    }

    /// Why no client is served at the moment; `None`: clients are served.
    #[must_use]
    pub fn trouble(&self) -> Option<String> {
        lock(&self.trouble).clone()
    }

    pub fn set_trouble(&self, why: Option<String>) {
        *lock(&self.trouble) = why;
    }

    /// Keeps why a node leaves the member set.
    pub fn note_reason(&self, node: &str, reason: &str) {
        lock(&self.reasons).insert(node.to_owned(), reason.to_owned());
    }

    /// When this node joined or left, if it did while this proxy ran.
    #[must_use]
    pub fn changed_at(&self, node: &str) -> Option<SystemTime> {
        lock(&self.changes).get(node).copied()
    }

    /// Whether a backlog is kept for this node.
    #[must_use]
    pub fn is_joining(&self, node: &str) -> bool {
        lock(&self.backlogs).contains_key(node)
    }

    /// A connection to a node's PostgreSQL through its agent, as role `pgtandem`.
    ///
    /// # Errors
    /// If the agent or PostgreSQL refuses or is not there.
    pub async fn tunnel_connection(
        &self,
        node: &NodeConfig,
        database: &str,
        epoch: u64,
        secret: Option<&str>,
    ) -> Result<Connection, ServerError> {
        let open = async {
            let stream =
                client::tunnel(&self.identity, node, epoch).await.map_err(|e| ServerError::Other(e.to_string()))?;
            Connection::open(Box::new(stream), database, "pgtandem", secret.map(|s| (s, epoch))).await
        };
        within(OPEN_MS_MAX, open).await
    }

    /// Whether this node, which has asked in this epoch, gets a lease; gives the number of the set. Noted before it is answered.
    pub fn grant_lease(&self, node: &str, epoch: u64) -> Option<(u64, u64)> {
        let set = self.view().set.clone();
        let serves = self.reign_epoch() == Some(epoch) && set.epoch == epoch;
        (serves && lock(&self.leases).grant(now_ms(), node, &set)).then(|| members::number(&set))
    }

    /// Grants this node no further lease, and waits until none that it was granted can run.
    pub async fn wait_lease_out(&self, node: &str) {
        let free_at = {
            let mut leases = lock(&self.leases);
            leases.stop(node);
            leases.free_at(node)
        };
        wait_until(free_at).await;
    }

    /// Waits until no lease can run that was granted before this proxy started.
    pub async fn wait_older_leases_out(&self) {
        wait_until(Some(self.started_ms + WAIT_OUT_MS)).await;
    }

    /// The reign that is being raised: this set's leader is asked from here on, under this epoch. Nobody is served.
    pub fn expect(&self, set: MemberSet, epoch: u64) {
        self.at_leader.reach_under(epoch);
        *lock(&self.view) = Arc::new(View { set, followers: Vec::new() });
    }

    /// Shows a member set to sessions: it is recorded already. Followers that stay keep their identity.
    pub fn show(&self, set: MemberSet) {
        let mut view = lock(&self.view);
        let differs = |n: &&NodeConfig| view.set.nodes.contains(&n.name) != set.nodes.contains(&n.name);
        for node in self.config.nodes.iter().filter(differs) {
            lock(&self.changes).insert(node.name.clone(), SystemTime::now());
        }
        let mut followers = Vec::new();
        for name in set.nodes.iter().filter(|n| **n != set.leader) {
            match view.followers.iter().find(|f| f.node.name == *name && !f.gone.is_cancelled()) {
                Some(follower) => followers.push(Arc::clone(follower)),
                None => {
                    if let Ok(node) = self.node(name) {
                        let id = self.next_follower_id.fetch_add(1, Ordering::Relaxed);
                        let places = Arc::new(Semaphore::new(PLACES));
                        let open_places = Arc::new(Semaphore::new(OPEN_PLACES));
                        let gone = CancellationToken::new();
                        followers.push(Arc::new(Follower {
                            id,
                            node: node.clone(),
                            gone,
                            places,
                            open_places,
                            is_hurt: AtomicBool::new(false),
                            spares: Mutex::default(),
                            standing: Mutex::default(),
                        }));
                        lock(&self.reasons).remove(name);
                        self.away.remove(name);
                        lock(&self.leases).resume(name);
                    }
                }
            }
        }
        for follower in view.followers.iter().filter(|f| !set.nodes.contains(&f.node.name)) {
            follower.gone.cancel();
        }
        *view = Arc::new(View { set, followers });
    }

    /// Ends what is known of followers: a new epoch is being raised, and every connection of the old one is over.
    pub fn forget_followers(&self) {
        self.away.end_all("a new epoch began: the leader or the proxy changed, or was started again");
        let mut view = lock(&self.view);
        for follower in &view.followers {
            follower.gone.cancel();
        }
        *view = Arc::new(View { set: view.set.clone(), followers: Vec::new() });
    }

    /// Stores a member set and the node's state in it, durably, through the node's agent.
    ///
    /// # Errors
    /// If the agent does not answer or refuses.
    pub async fn store(
        &self,
        node: &NodeConfig,
        set: &MemberSet,
        state: NodeState,
        generation: Option<&str>,
        note: Option<&str>,
    ) -> Result<(), ClientError> {
        let mut control = Control::connect(&self.identity, node).await?;
        store_on(&mut control, set, state, generation, note).await
    }
}

/// As [`Hub::store`], on a connection that is open already.
///
/// # Errors
/// If the agent does not answer or refuses.
pub async fn store_on(
    control: &mut Control,
    set: &MemberSet,
    state: NodeState,
    generation: Option<&str>,
    note: Option<&str>,
) -> Result<(), ClientError> {
    let request = Request::Store {
        members: set.clone(),
        state,
        // A member is sure of it from its next lease on.
        uncertain: state == NodeState::InSync,
        new_generation: generation.map(str::to_owned),
        note: note.map(str::to_owned),
    };
    control.request(&request).await.map(|_| ())
}

/// # Errors
/// [`ServerError::Timeout`] past the limit.
pub async fn within<T>(ms_max: u64, work: impl Future<Output = Result<T, ServerError>>) -> Result<T, ServerError> {
    tokio::time::timeout(Duration::from_millis(ms_max), work).await.unwrap_or(Err(ServerError::Timeout(ms_max)))
}

async fn wait_until(free_at_ms: Option<u64>) {
    // Timers stand still while the host is suspended, the leases' clock does not: it is looked at again.
    while let Some(left) = free_at_ms.and_then(|at| at.checked_sub(now_ms())).filter(|left| *left > 0) {
        tokio::time::sleep(Duration::from_millis(left)).await;
    }
}
