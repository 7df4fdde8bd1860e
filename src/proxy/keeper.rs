//! The watch over the servers: a follower that does not answer leaves the member set, although nobody writes; when the leader's
//! PostgreSQL ends, or does not answer for `proxy.leader_ms_max`, another member leads from then on ([`takeover`]); if there is none, a new
//! epoch is raised as soon as its agent has started it again.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use pgtandem_proto::membership::NodeState;
use pgtandem_proto::message::{Reply, Request};
use tokio::task::{AbortHandle, JoinSet};
use tokio_util::sync::CancellationToken;

use crate::agent::client::Control;
use crate::cluster::members;
use crate::cluster::rejoin::Standing;
use crate::cluster::start::Occasion;
use crate::pg::build;
use crate::proxy::reign;
use crate::proxy::takeover::{self, Taken};
use crate::replicate::away::Kept;
use crate::replicate::follower::{Answer, Connection, ServerError};
use crate::replicate::hub::{Follower, Hub, HubError, Reign, within};
use crate::replicate::rejoin::Attempt;

/// Time between two questions to a server.
const ASK_MS: u64 = 500;
/// Time between two attempts to let a node in that fail in the same way.
const PAUSE_MS_MAX: u64 = 2_000;
/// The same where the attempt got so far that statements of clients waited for it.
const COSTLY_PAUSE_MS_MAX: u64 = 30_000;
/// How long a follower may take to answer one.
const ANSWER_MS_MAX: u64 = 10_000;
/// Every so many questions the leader is asked on a new connection: a postmaster that hangs lets its backends go on.
const ASKED_ANEW: u32 = 4;
/// Pause between two attempts to raise an epoch.
const RAISE_PAUSE_MS: u64 = 500;

/// Watches until `stop`.
pub async fn run(hub: Arc<Hub>, stop: CancellationToken) {
    tokio::select! {
        () = keep_leader(&hub) => {}
        () = keep_followers(&hub) => {}
        () = keep_away(&hub) => {}
        () = stop.cancelled() => {}
    }
}

async fn ask(connection: &mut Connection, ms_max: u64) -> Result<(), ServerError> {
    build::query(&mut connection.out, b"SELECT 1");
    within(ms_max, connection.exchange()).await.and_then(Answer::ok).map(|_| ())
}

async fn ask_standing(connection: &mut Connection) -> Result<Option<Standing>, ServerError> {
    build::query(&mut connection.out, Standing::QUERY.as_bytes());
    let answer = within(ANSWER_MS_MAX, connection.exchange()).await.and_then(Answer::ok)?;
    let value = answer.values.into_iter().flatten().next().unwrap_or_default();
    Ok(Standing::parse(&String::from_utf8_lossy(&value)))
}

async fn keep_leader(hub: &Arc<Hub>) {
    loop {
        let epoch = hub.reign_epoch().unwrap_or(0);
        let mut set = hub.view().set.clone();
        let mut is_known = true;
        tokio::select! {
            lost = watch_leader(hub) => {
                let leader = &set.leader;
                tracing::error!(leader, error = %lost, "the leader's PostgreSQL is lost");
                match takeover::take_over(hub, epoch).await {
                    Taken::By(next) => set = next,
                    Taken::ByNobody => {
                        let why = format!("the leader's PostgreSQL is lost ({lost}); its agent starts it again");
                        hub.set_trouble(Some(why));
                    }
                    Taken::NotKnown => is_known = false,
                }
            }
            promised = watch_promise(hub, epoch) => {
                tracing::error!(epoch, promised, "this node has promised a newer epoch: this reign is over");
            }
            // Another node was made the leader, or it is not known whether it was.
            () = ended(hub) => is_known = false,
        }
        let occasion = if is_known { Occasion::LeaderBack { epoch, set: &set } } else { Occasion::Start };
        raise_again(hub, occasion).await;
        hub.set_trouble(None);
    }
}

/// Returns when an epoch serves again. Where it must not, clients are told so meanwhile.
async fn raise_again(hub: &Arc<Hub>, occasion: Occasion<'_>) {
    while let Err(error) = reign::raise(hub, occasion).await {
        if let Some(why) = error.waits_for() {
            let is_new = !matches!(&*hub.reign.borrow(), Reign::Waiting(known) if **known == why);
            if is_new {
                tracing::warn!(next = why.hint, "no client is served here: {}", why.what);
                hub.reign.send_replace(Reign::Waiting(Arc::new(why)));
            }
        } else {
            tracing::error!(%error, "no new epoch yet");
            hub.set_trouble(Some(error.to_string()));
        }
        tokio::time::sleep(Duration::from_millis(RAISE_PAUSE_MS)).await;
    }
}

/// Returns when nobody is served any more, by this proxy's own decision.
async fn ended(hub: &Hub) {
    let mut reign = hub.reign.subscribe();
    // The sender lives as long as the hub.
    let _ = reign.wait_for(|reign| matches!(reign, Reign::Starting | Reign::Waiting(_))).await;
}

/// Returns when this host's agent has promised more than `epoch`, with what: whoever asked for that has ended this reign.
async fn watch_promise(hub: &Hub, epoch: u64) -> u64 {
    let mut control: Option<Control> = None;
    loop {
        tokio::time::sleep(Duration::from_millis(ASK_MS)).await;
        let Ok(own) = hub.node(&hub.config.proxy.node) else { continue };
        let mut asked = match control.take() {
            Some(asked) => asked,
            None => match Control::connect(&hub.identity, own).await {
                Ok(asked) => asked,
                Err(_) => continue,
            },
        };
        // An agent that does not answer promises nothing either.
        if let Ok(Reply::Status(status)) = asked.request(&Request::Status).await {
            if status.record.promised > epoch {
                return status.record.promised;
            }
            control = Some(asked);
        }
    }
}

/// Asks the leader for as long as it answers.
async fn watch_leader(hub: &Hub) -> HubError {
    let (mut connection, started) = match connect_leader(hub).await {
        Ok(connected) => connected,
        Err(e) => return e,
    };
    hub.note_leader_started(&started);
    let mut asked = 0;
    loop {
        let error = match ask(&mut connection, hub.config.proxy.leader_ms_max).await {
            Ok(()) => wait_or_end(&mut connection).await,
            Err(e @ ServerError::Timeout(_)) => return e.into(),
            Err(e) => Some(e),
        };
        asked += 1;
        if error.is_none() && asked % ASKED_ANEW > 0 {
            continue;
        }
        // Perhaps a person ended our backend alone: then the server is still the one that it was.
        match connect_leader(hub).await {
            Ok((again, same)) if same == started => connection = again,
            Ok(_) => return error.unwrap_or_else(|| ServerError::Other("it was started again".into())).into(),
            Err(e) => return e,
        }
    }
}

/// A connection, and when that server was started.
async fn connect_leader(hub: &Hub) -> Result<(Connection, String), HubError> {
    let connect = async {
        let mut connection = hub.leader_connection("postgres").await?;
        let started = connection.started_at().await?;
        Ok((connection, started))
    };
    let limit_ms = hub.config.proxy.leader_ms_max;
    let silent = || Err(ServerError::Timeout(limit_ms).into());
    tokio::time::timeout(Duration::from_millis(limit_ms), connect).await.unwrap_or_else(|_| silent())
}

/// The pause between two questions; ends early when the server closes the connection.
async fn wait_or_end(connection: &mut Connection) -> Option<ServerError> {
    tokio::time::timeout(Duration::from_millis(ASK_MS), connection.ended()).await.ok()
}

async fn keep_followers(hub: &Arc<Hub>) {
    let mut watched = JoinSet::new();
    let mut known: Vec<u64> = Vec::new();
    loop {
        for follower in &hub.view().followers {
            if !known.contains(&follower.id) {
                known.push(follower.id);
                let (hub, follower) = (Arc::clone(hub), Arc::clone(follower));
                if hub.protects() {
                    watched.spawn(wait_for_follower(hub, follower));
                } else {
                    watched.spawn(watch_follower(hub, follower));
                }
            }
        }
        while watched.try_join_next().is_some() {}
        let present: Vec<u64> = hub.view().followers.iter().map(|f| f.id).collect();
        known.retain(|id| present.contains(id));
        tokio::time::sleep(Duration::from_millis(ASK_MS)).await;
    }
}

/// Lets followers in again that were lost, when they answer; one task for each, so that none waits for another.
async fn keep_away(hub: &Arc<Hub>) {
    // Dropped with this: what is under way ends.
    let mut tasks = JoinSet::new();
    let mut trying: HashMap<String, AbortHandle> = HashMap::new();
    loop {
        for (node, kept) in hub.away.all() {
            if members::contains(&hub.view().set, &node) {
                // It is just leaving, or it was to leave and whoever wanted that is gone.
                if let Ok(_nobody_changes) = hub.changing.try_lock()
                    && members::contains(&hub.view().set, &node)
                {
                    hub.away.remove(&node);
                }
                continue;
            }
            let is_tried = trying.get(&node).is_some_and(|task| !task.is_finished());
            if !is_tried && hub.why_ended(&kept).is_none() {
                let task = tasks.spawn(let_in_again(Arc::clone(hub), node.clone(), kept));
                trying.insert(node, task);
            }
        }
        while tasks.try_join_next().is_some() {}
        tokio::time::sleep(Duration::from_millis(ASK_MS)).await;
    }
}

/// Returns when it is a member, or has to be recovered.
async fn let_in_again(hub: Arc<Hub>, node: String, kept: Arc<Kept>) {
    let mut said = String::new();
    let mut pause_ms = ASK_MS;
    tokio::select! {
        () = tokio::time::sleep(kept.held_out_still()) => {}
        () = kept.stopped.cancelled() => return,
    }
    loop {
        match hub.rejoin(&node, &kept).await {
            Attempt::Joined(done) => {
                hub.away.note_return(&node);
                let (version, gate_ms) = (done.version, done.gate_ms);
                tracing::info!(node, version, gate_ms, "a node that was away is a member again, without a copy");
                return;
            }
            Attempt::Never(why) => {
                kept.end(&why);
                tracing::warn!(node, why, "what it missed is not kept any more: it has to be recovered");
                return;
            }
            Attempt::Later { why, costs } => {
                // What fails in the same way again and again is tried less often.
                let longest_ms = if costs { COSTLY_PAUSE_MS_MAX } else { PAUSE_MS_MAX };
                pause_ms = if said == why { (pause_ms * 2).min(longest_ms) } else { ASK_MS };
                if said != why {
                    tracing::info!(node, why, "a node that is away is waited for");
                    said.clone_from(&why);
                }
                kept.note(&why);
            }
        }
        tokio::time::sleep(Duration::from_millis(pause_ms)).await;
    }
}

async fn watch_follower(hub: Arc<Hub>, follower: Arc<Follower>) {
    let watch = async {
        loop {
            let Reign::Serving { epoch, secret } = hub.reign.borrow().clone() else {
                tokio::time::sleep(Duration::from_millis(ASK_MS)).await;
                continue;
            };
            let mut connection = match hub.tunnel_connection(&follower.node, "postgres", epoch, Some(&secret)).await {
                Ok(connection) => connection,
                Err(e) => return e,
            };
            loop {
                // What it says about itself tells later whether it is the same one, and has lost nothing.
                match ask_standing(&mut connection).await {
                    Ok(Some(standing)) => follower.note_standing(standing),
                    Ok(None) => {}
                    Err(e) => return e,
                }
                if let Some(e) = wait_or_end(&mut connection).await {
                    return e;
                }
            }
        }
    };
    let error = tokio::select! {
        error = watch => error,
        () = follower.gone.cancelled() => return,
    };
    let reason = format!("its PostgreSQL did not answer: {error}");
    while let Err(e) = hub.lost(&follower, NodeState::Stale, &reason).await {
        if follower.gone.is_cancelled() {
            return;
        }
        tracing::error!(error = %e, "a lost follower could not be taken out of the member set");
        tokio::time::sleep(Duration::from_millis(RAISE_PAUSE_MS)).await;
    }
}

/// Where nobody leaves by himself: says for whom commits wait, and ends the reign when a follower answers on which something was not
/// finished.
async fn wait_for_follower(hub: Arc<Hub>, follower: Arc<Follower>) {
    let name = &follower.node.name;
    let watch = async {
        let mut connection = None;
        loop {
            match ask_follower(&hub, &follower, &mut connection).await {
                Ok(()) if follower.is_hurt.load(Ordering::Acquire) => {
                    tracing::warn!(node = name, "a member answers again: a new epoch resolves what is in doubt there");
                    hub.end_reign();
                }
                Ok(()) => hub.missing.clear(name),
                Err(error) => hub.missing.note(name, &format!("its PostgreSQL does not answer: {error}")),
            }
            tokio::time::sleep(Duration::from_millis(ASK_MS)).await;
        }
    };
    tokio::select! {
        () = watch => {}
        () = follower.gone.cancelled() => hub.missing.clear(name),
    }
}

/// One question, on the connection of the last one if there is one.
async fn ask_follower(hub: &Hub, follower: &Follower, kept: &mut Option<Connection>) -> Result<(), ServerError> {
    let mut connection = match kept.take() {
        Some(connection) => connection,
        None => {
            let over = || ServerError::Other("the epoch is over".into());
            let (epoch, secret) = hub.epoch_and_secret().ok_or_else(over)?;
            hub.tunnel_connection(&follower.node, "postgres", epoch, Some(&secret)).await?
        }
    };
    ask(&mut connection, ANSWER_MS_MAX).await?;
    *kept = Some(connection);
    Ok(())
}
