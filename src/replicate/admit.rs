//! The last step of a recovery or a return: a node that has all but the rest of its backlog becomes a member.
//!
//! 1. Its connections are opened, and its backlog is short. Nobody waits for that, and another node may be in the same step.
//! 2. Its turn among the changes of the member set comes; its backlog is kept short meanwhile.
//! 3. The agents of all members are reached. The loss of another member waits from here on, so all of it has a limit of seconds.
//! 4. The gate closes, the rest is applied, the larger set is stored, the gate opens.
//!
//! Whatever fails before the first agent is asked to store has changed nothing.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use pgtandem_proto::membership::{MemberSet, NodeState};
use pgtandem_proto::message::{Reply, Request};
use tokio::sync::MutexGuard;
use tokio::time::{Instant, timeout, timeout_at};

use crate::agent::client::{ClientError, Control};
use crate::cluster::members;
use crate::cluster::rejoin::Standing;
use crate::crash::CrashPoint;
use crate::recovery::replication::{Drained, JoinDone, ReplicationError, ReplicationErrorKind as Kind};
use crate::replicate::applier::{Applier, node_error, record_error};
use crate::replicate::backlog::Backlog;
use crate::replicate::follower::Connection;
use crate::replicate::hub::{Hub, HubError, lock, store_on};
use crate::replicate::join::{SHORT_MAX, wrong_node};

/// How long one agent may take to store the larger set while the gate is closed.
const STORE_MS_MAX: u64 = 2000;
/// What a batch under way may take past its limit.
const GRACE_MS: u64 = 500;
/// How long PostgreSQL of the node may take to open its connections, and to say what it is.
const OPENED_MS_MAX: u64 = 30_000;
/// How long one attempt waits for its turn.
const TURN_MS_MAX: u64 = 60_000;
/// How often the backlog is made short while it waits.
const TURN_LOOK_MS: u64 = 200;
/// How long agents may take to be reached, and again the backlog to be short, when it has its turn: losses of others wait for it.
const READY_MS_MAX: u64 = 5_000;

/// What was opened on the node before the gate closes.
struct Opened {
    standing: Standing,
    leaders: HashMap<Arc<str>, Connection>,
    spares: HashMap<Arc<str>, Vec<Connection>>,
}

/// The turn among the changes of the member set.
struct Turn<'a> {
    hub: &'a Hub,
    _one_at_a_time: MutexGuard<'a, ()>,
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        *lock(&self.hub.admitting) = None;
    }
}

fn retriable(what: impl Into<String>) -> ReplicationError {
    ReplicationError::new(Kind::Gate, what, "It is tried again by itself.")
}

impl Hub {
    /// Lets a node in that has all but the rest of its backlog. `on_wait` is told what it waits for.
    pub(super) async fn admit(
        &self,
        mut applier: Applier<'_>,
        backlog: &Backlog,
        on_wait: &(dyn Fn(&str) + Sync),
    ) -> Result<JoinDone, ReplicationError> {
        let node = &applier.node.name.clone();
        let Opened { standing, mut leaders, spares } = self.open_all(&mut applier, backlog).await?;
        let _turn = self.turn(&mut applier, backlog, on_wait).await?;
        if self.reign_epoch() != Some(applier.epoch) {
            let what = "the epoch of this proxy ended while the node was to be let in";
            return Err(ReplicationError::new(Kind::Stopping, what, "Start it again."));
        }
        let larger = members::with(&self.view().set, node).map_err(|e| wrong_node(&e.into()))?;
        let (mut controls, generations) = timeout(Duration::from_millis(READY_MS_MAX), self.reach(node, &larger))
            .await
            .unwrap_or_else(|_| Err(retriable(format!("the agents did not answer within {READY_MS_MAX} ms"))))?;
        let until = Instant::now() + Duration::from_millis(READY_MS_MAX);
        let ready = self.make_ready(&mut applier, backlog, &generations, until);
        let late = || node_error(node, &"it did not answer in time when it was to be let in");
        timeout_at(until + Duration::from_millis(GRACE_MS), ready).await.unwrap_or_else(|_| Err(late()))?;
        CrashPoint::GrowReady.reached(node);
        let ignore = |_: Drained| ();
        let closed = self.close_gate().await?;
        let until = Instant::now() + Duration::from_millis(self.config.proxy.gate_ms_max);
        let rest = async {
            applier.apply(backlog, 0, Some(until), &ignore).await?;
            applier.check_kept()?;
            applier.compare_marks(&mut leaders).await
        };
        // What was under way when the time is over may be half applied, so this attempt is not taken up again.
        let late = || node_error(node, &"it did not apply the rest of the backlog before proxy.gate_ms_max");
        timeout_at(until + Duration::from_millis(GRACE_MS), rest).await.unwrap_or_else(|_| Err(late()))?;
        CrashPoint::GrowDrained.reached(node);
        let mut failure = None;
        for (name, control) in &mut controls {
            let is_new = name == node;
            let store = async {
                if is_new {
                    let request = Request::Join { members: larger.clone(), generations: generations.clone() };
                    return control.request(&request).await.map(|_| ());
                }
                store_on(control, &larger, NodeState::InSync, None, None).await
            };
            failure = match timeout(Duration::from_millis(STORE_MS_MAX), store).await {
                Ok(Ok(())) => {
                    CrashPoint::GrowStored.reached(name);
                    continue;
                }
                Ok(Err(e)) => Some(record_error(name, &e)),
                Err(_) => Some(record_error(name, &"no answer in time")),
            };
            break;
        }
        if let Some(failure) = failure {
            self.shrink_out(&larger, node, &failure.what).await?;
            return Err(failure);
        }
        self.backlogs.lock().unwrap_or_else(std::sync::PoisonError::into_inner).remove(node);
        let version = larger.version;
        self.show(larger);
        CrashPoint::GrowShown.reached(node);
        if let Some(follower) = self.view().followers.iter().find(|f| f.node.name == *node) {
            follower.put_spares(spares);
            follower.note_standing(standing);
        }
        Ok(JoinDone { gate_closed_unix_us: closed.closed_unix_us(), gate_ms: closed.closed_ms(), version })
    }

    /// Opens what the node needs as a member, and makes its backlog short.
    async fn open_all(&self, applier: &mut Applier<'_>, backlog: &Backlog) -> Result<Opened, ReplicationError> {
        let node = applier.node.name.clone();
        let limit = Duration::from_millis(OPENED_MS_MAX);
        let late = || node_error(&node, &format!("its PostgreSQL did not answer within {OPENED_MS_MAX} ms"));
        timeout(limit, applier.connect_everywhere()).await.unwrap_or_else(|_| Err(late()))?;
        // Never dropped half way: it is not known then what became of a batch.
        applier.apply(backlog, SHORT_MAX, None, &|_| ()).await?;
        let opening = async {
            let standing = applier.standing().await?;
            let leaders = if applier.away.is_some() { applier.leaders().await? } else { HashMap::new() };
            let sessions = usize::try_from(self.counters.sessions.load(Ordering::Relaxed)).unwrap_or_default();
            let spares = applier.spares(sessions).await?;
            Ok(Opened { standing, leaders, spares })
        };
        timeout(limit, opening).await.unwrap_or_else(|_| Err(late()))
    }

    /// Waits until no other change of the member set is under way.
    async fn turn(
        &self,
        applier: &mut Applier<'_>,
        backlog: &Backlog,
        on_wait: &(dyn Fn(&str) + Sync),
    ) -> Result<Turn<'_>, ReplicationError> {
        let since = Instant::now();
        loop {
            if let Ok(turn) = timeout(Duration::from_millis(TURN_LOOK_MS), self.changing.lock()).await {
                *lock(&self.admitting) = Some(applier.node.name.clone());
                return Ok(Turn { hub: self, _one_at_a_time: turn });
            }
            let first = match &*lock(&self.admitting) {
                Some(other) => format!("{other} is let in"),
                None => "another change of the member set is made".to_owned(),
            };
            if since.elapsed() >= Duration::from_millis(TURN_MS_MAX) {
                return Err(retriable(format!("{first} first, for longer than {} s", TURN_MS_MAX / 1000)));
            }
            on_wait(&format!("{first} first"));
            applier.apply(backlog, SHORT_MAX, None, &|_| ()).await?;
        }
    }

    /// Connections to the agents of all members, the new one last, and the generations of the leader's data, which are those of a node that
    /// was filled from it.
    async fn reach(
        &self,
        node: &str,
        larger: &MemberSet,
    ) -> Result<(Vec<(String, Control)>, Vec<String>), ReplicationError> {
        let mut controls = Vec::new();
        let mut generations = Vec::new();
        for name in larger.nodes.iter().map(String::as_str).filter(|name| *name != node).chain(std::iter::once(node)) {
            let config = self.node(name).map_err(|e| wrong_node(&e))?;
            let connected = Control::connect(&self.identity, config).await;
            // A member that does not answer has left before the next attempt, or answers again.
            let mut control = connected
                .map_err(|e| if name == node { record_error(name, &e) } else { retriable(unreached(name, &e)) })?;
            if name == larger.leader {
                generations = generations_of(name, &mut control).await?;
            }
            controls.push((name.to_owned(), control));
        }
        Ok((controls, generations))
    }

    /// What is done on the node when its turn has come, before the gate closes.
    async fn make_ready(
        &self,
        applier: &mut Applier<'_>,
        backlog: &Backlog,
        generations: &[String],
        until: Instant,
    ) -> Result<(), ReplicationError> {
        if applier.away.is_some()
            && let Some(generation) = generations.first()
        {
            applier.write_generation(generation).await?;
        }
        applier.apply(backlog, SHORT_MAX, Some(until), &|_| ()).await
    }

    /// The larger set could not be stored everywhere: the next version is without the node again, and is on all that remain before the gate
    /// opens, as at any loss. If that can not be had this reign is over, and the next one asks everybody.
    async fn shrink_out(&self, larger: &MemberSet, node: &str, reason: &str) -> Result<(), ReplicationError> {
        let mut leaving = Vec::new();
        let leader_lost = self.leader_lost();
        let undone = async {
            let smaller = members::without(larger, node)?;
            // It may have stored the larger set, but nobody has granted it a lease under that: there is none to be waited out.
            self.tell_left(&smaller, node, NodeState::Stale, reason).await?;
            self.record_without(smaller, node, &mut leaving).await
        };
        let undone: Result<(), HubError> = tokio::select! {
            biased;
            undone = undone => undone,
            // Whoever leads next asks everybody.
            () = leader_lost.cancelled() => Err(HubError::NotStored {
                node: node.to_owned(),
                why: "the leader was lost meanwhile".to_owned(),
            }),
        };
        self.backlogs.lock().unwrap_or_else(std::sync::PoisonError::into_inner).remove(node);
        self.away.end(node, "it did not become a member when it was to be let in");
        undone.map_err(|e| {
            for name in &leaving {
                self.away.remove(name);
            }
            self.end_reign();
            record_error(node, &e)
        })
    }
}

async fn generations_of(leader: &str, control: &mut Control) -> Result<Vec<String>, ReplicationError> {
    match control.request(&Request::Status).await.map_err(|e| retriable(unreached(leader, &e)))? {
        Reply::Status(status) => Ok(status.record.generations),
        other => Err(record_error(leader, &control.unexpected("Status", &other))),
    }
}

fn unreached(member: &str, e: &ClientError) -> String {
    format!("{member}, which is a member, can not be asked: {e}")
}
