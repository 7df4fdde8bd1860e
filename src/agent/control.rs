//! A control channel: requests one at a time, each answered with progress and one final reply.
//!
//! A request that runs is dropped when its connection ends; what must not stay half done is done in tasks or under
//! the record's lock.

use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use pgtandem_proto::membership::{Epoch, NodeState};
use pgtandem_proto::message::{Failure, FailureCode, Lsn, OldData, PostgresState, Reply, Request};
use tokio::time::{Instant, MissedTickBehavior, interval, sleep};

use super::connection::{Connection, ConnectionError};
use super::generation;
use super::node::Node;
use super::recovery::Running;
use super::source::AgentSource;
use crate::cluster::record as rules;
use crate::config::NodeConfig;
use crate::crash::CrashPoint;
use crate::sync::SyncError;
use crate::sync::target::{self, Target};

/// How often a request that runs says how far it is, milliseconds. The caller's limit on silence is longer.
const PROGRESS_MS: u64 = 500;
/// Longest wait from the end of recovery until the postmaster says that it runs, milliseconds.
const LEFT_RECOVERY_MS_MAX: u64 = 10_000;
const LEFT_RECOVERY_POLL_MS: u64 = 1;

/// Serves requests until the connection ends; then ends the recovery that it started.
pub async fn serve(node: Arc<Node>, connection: Connection, owner: u64) -> Result<(), ConnectionError> {
    let served = serve_requests(&node, connection, owner).await;
    if let Ok(running) = node.recovery.of(owner) {
        abandon(&node, running).await;
    }
    served
}

async fn serve_requests(node: &Arc<Node>, connection: Connection, owner: u64) -> Result<(), ConnectionError> {
    let peer = connection.peer().to_owned();
    let (mut sender, mut receiver) = connection.split();
    loop {
        let cancel = node.recovery.cancel_of(owner);
        let request = tokio::select! {
            request = receiver.receive::<Request>() => request?,
            () = cancel.cancelled() => return Ok(()),
        };
        let Some(request) = request else { return Ok(()) };
        tracing::debug!(%peer, ?request, "request");
        let mut work = pin!(handle(node, request, owner));
        let mut tick = interval(Duration::from_millis(PROGRESS_MS));
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        tick.reset();
        let reply = loop {
            let cancel = node.recovery.cancel_of(owner);
            tokio::select! {
                biased;
                () = cancel.cancelled() => break Reply::Failed(cut_off(node)),
                reply = &mut work => break reply.unwrap_or_else(Reply::Failed),
                _ = tick.tick() => {
                    let progress = node.recovery.progress().unwrap_or_default();
                    sender.send(&Reply::Progress(progress)).await?;
                }
                next = receiver.receive::<Request>() => {
                    if next?.is_none() {
                        return Ok(());
                    }
                    let failure = Failure {
                        code: FailureCode::Request,
                        what: "a request came before the last one was answered".to_owned(),
                        hint: "open another control channel".to_owned(),
                    };
                    return sender.send(&Reply::Failed(failure)).await;
                }
            }
        };
        if let Reply::Failed(failure) = &reply {
            tracing::warn!(%peer, what = failure.what, "a request failed");
        }
        sender.send(&reply).await?;
    }
}

fn cut_off(node: &Node) -> Failure {
    Failure {
        code: FailureCode::OldEpoch,
        what: format!("the recovery was ended: this node has promised epoch {}", node.record().promised),
        hint: "start again from the proxy that rules now: pgtandem recover NODE".to_owned(),
    }
}

/// Ends a recovery that did not make a member: PostgreSQL is stopped, the record stays.
async fn abandon(node: &Node, running: Running) {
    tracing::warn!(epoch = running.epoch, source = running.source, "a recovery is aborted");
    running.cancel.cancel();
    node.tunnels.cut(None).await.unwrap_or_default();
    if let Err(error) = running.target.lock().await.abort().await {
        tracing::error!(%error, "a recovery was not aborted in order");
    }
    if let Err(error) = node.supervisor.stop(true, "its recovery was ended before it became a member").await {
        tracing::error!(%error, "PostgreSQL of an aborted recovery could not be stopped");
    }
    node.recovery.finish();
}

async fn handle(node: &Arc<Node>, request: Request, owner: u64) -> Result<Reply, Failure> {
    match request {
        Request::Status => Ok(Reply::Status(Box::new(node.status()))),
        Request::Promise { epoch } => promise(node, epoch).await,
        Request::Store { members, state, uncertain, new_generation, note } => {
            CrashPoint::AgentStores.reached(&node.config.name);
            let record = {
                let _changing = node.generation.lock().await;
                let before = node.record();
                let record = node
                    .change_record(move |record| {
                        rules::store(record, &members, state, uncertain, new_generation.as_deref(), note.as_deref())
                    })
                    .await
                    .map_err(|error| error.failure())?;
                // At a join the gate is closed, and the generation stays.
                if record.generations.first() != before.generations.first() {
                    generation::write(node, &record).await;
                }
                record
            };
            CrashPoint::AgentStored.reached(&node.config.name);
            if state == NodeState::InSync {
                node.recovery.finish();
            }
            if state == NodeState::Forked {
                let why = "this node went on alone while the other side did, too; its data are kept";
                node.supervisor.stop(false, why).await.map_err(|error| error.failure())?;
            }
            if Node::state_serves(state) {
                cut_tunnels(node, Some(record.promised)).await?;
            } else {
                cut_tunnels(node, None).await?;
            }
            Ok(Reply::Record(Box::new((*record).clone())))
        }
        Request::StartPostgres => {
            let state = node.record().state;
            if matches!(state, NodeState::Seeding | NodeState::CatchingUp | NodeState::Joining) {
                return Err(wrong_state(state, "started"));
            }
            node.supervisor.start().await.map_err(|error| error.failure())?;
            Ok(Reply::Done)
        }
        Request::StopPostgres { immediate } => {
            node.supervisor.stop(immediate, "it was told to stop").await.map_err(|error| error.failure())?;
            Ok(Reply::Done)
        }
        Request::Facts => {
            let facts = crate::sync::facts::gather(node.postgres()).await.map_err(|error| error.failure())?;
            Ok(Reply::Facts(Box::new(facts)))
        }
        Request::Fill { epoch, source } => fill(node, owner, epoch, &source).await,
        Request::CatchUp { epoch, source, lag_bytes_max } => catch_up(node, owner, epoch, &source, lag_bytes_max).await,
        Request::VerifyFill => {
            let running = node.recovery.of(owner)?;
            running.target.lock().await.verify().await.map_err(|error| error.failure())?;
            Ok(Reply::Done)
        }
        Request::HoldRelay => {
            let running = node.recovery.of(owner)?;
            let position = running.target.lock().await.hold().map_err(|error| error.failure())?;
            Ok(Reply::Lsn(position))
        }
        Request::LeaveRecovery { x } => leave_recovery(node, owner, x).await,
        Request::DropSlot { node: other } => {
            crate::sync::source::drop_slot(node.postgres(), &other).await.map_err(|error| error.failure())?;
            Ok(Reply::Done)
        }
        Request::CutTunnels => {
            cut_tunnels(node, None).await?;
            Ok(Reply::Done)
        }
        Request::Fence { epoch } => {
            let reply = promise(node, epoch).await?;
            super::fence::fence(node, epoch).await.map_err(|error| Failure {
                code: FailureCode::Postgres,
                what: format!("sessions of older epochs could not be ended: {error}"),
                hint: format!("stop PostgreSQL of {} by hand, then try again", node.config.name),
            })?;
            Ok(reply)
        }
        Request::Join { members, generations } => {
            CrashPoint::AgentJoins.reached(&node.config.name);
            let record = node
                .change_record(move |record| rules::join(record, &members, &generations))
                .await
                .map_err(|error| error.failure())?;
            CrashPoint::AgentJoined.reached(&node.config.name);
            node.recovery.finish();
            cut_tunnels(node, Some(record.promised)).await?;
            Ok(Reply::Record(Box::new((*record).clone())))
        }
        Request::DiscardFork { note } => discard_fork(node, note).await,
        Request::OldData => {
            let old = if is_brought(node) { OldData::default() } else { blocking(node, target::old_data).await? };
            Ok(Reply::OldData(Box::new(old)))
        }
        Request::KeepOld { epoch, source } => keep_old(node, owner, epoch, &source).await,
        Request::Pace { node: peer, bytes_per_s_max } => {
            node.backups.pace(&peer, bytes_per_s_max);
            Ok(Reply::Done)
        }
        Request::BaseCopy => Ok(Reply::BaseCopy(Box::new(super::archive::base_copy(node).await?))),
    }
}

async fn discard_fork(node: &Node, note: String) -> Result<Reply, Failure> {
    rules::discard_fork(&node.record(), &note).map_err(|error| super::node::ChangeError::from(error).failure())?;
    let why = "its data, which are those of a fork, are moved aside";
    node.supervisor.stop(false, why).await.map_err(|error| error.failure())?;
    let pgdata = node.config.pgdata.clone();
    let moved = tokio::task::spawn_blocking(move || super::fork::move_aside(&pgdata)).await;
    let moved = moved.map_err(std::io::Error::other).and_then(|moved| moved).map_err(|error| Failure {
        code: FailureCode::Internal,
        what: format!("{} could not be moved aside: {error}", node.config.pgdata.display()),
        hint: "move its content to a safe place by hand, then the same command again".to_owned(),
    })?;
    let aside = moved.map_or_else(String::new, |aside| format!("; the data are in {}", aside.display()));
    let note = format!("{note}{aside}");
    let record =
        node.change_record(move |record| rules::discard_fork(record, &note)).await.map_err(|error| error.failure())?;
    Ok(Reply::Record(Box::new((*record).clone())))
}

async fn promise(node: &Node, epoch: Epoch) -> Result<Reply, Failure> {
    let record =
        node.change_record(move |record| rules::promise(record, epoch)).await.map_err(|error| error.failure())?;
    CrashPoint::AgentPromised.reached(&node.config.name);
    node.with_lease(crate::cluster::lease::Lease::forget);
    node.recovery.cancel_below(record.promised);
    cut_tunnels(node, Some(record.promised)).await?;
    Ok(Reply::Record(Box::new((*record).clone())))
}

async fn cut_tunnels(node: &Node, below: Option<Epoch>) -> Result<(), Failure> {
    match node.tunnels.cut(below).await {
        Ok(0) => Ok(()),
        Ok(cut) => {
            tracing::info!(cut, "tunnels were cut");
            Ok(())
        }
        Err(left) => Err(Failure {
            code: FailureCode::Limit,
            what: format!("{left} tunnels of an older epoch could not be cut in time"),
            hint: "try again; if it stays so, restart the agent of this node".to_owned(),
        }),
    }
}

/// What lies here was brought by an attempt that did not end.
fn is_brought(node: &Node) -> bool {
    matches!(node.record().state, NodeState::Seeding | NodeState::CatchingUp | NodeState::Joining)
}

async fn blocking<T: Send + 'static>(node: &Node, work: fn(&NodeConfig) -> Result<T, SyncError>) -> Result<T, Failure> {
    let config = node.config.clone();
    let done = tokio::task::spawn_blocking(move || work(&config)).await;
    done.unwrap_or_else(|error| Err(SyncError::Internal(error.to_string()))).map_err(|error| error.failure())
}

async fn keep_old(node: &Node, owner: u64, epoch: Epoch, source: &str) -> Result<Reply, Failure> {
    if is_brought(node) {
        return Ok(Reply::Kept(Box::new(blocking(node, target::kept_before).await?)));
    }
    // As before a fill. The record stays: after a cut in the middle the next attempt must know that nothing was brought.
    rules::enter(&node.record(), epoch, NodeState::Seeding)
        .map_err(|error| super::node::ChangeError::from(error).failure())?;
    node.postgres().postmaster().map_err(|error| error.failure())?;
    let running = begin(node, owner, epoch, source)?;
    node.tunnels.cut(None).await.unwrap_or_default();
    node.supervisor.stop(false, "its data directory is being kept").await.map_err(|error| error.failure())?;
    let kept = running.target.lock().await.keep_old().await.map_err(|error| error.failure())?;
    Ok(Reply::Kept(Box::new(kept)))
}

async fn fill(node: &Node, owner: u64, epoch: Epoch, source: &str) -> Result<Reply, Failure> {
    // Checked before anything happens; stored, which checks again, before anything is touched.
    rules::enter(&node.record(), epoch, NodeState::Seeding)
        .map_err(|error| super::node::ChangeError::from(error).failure())?;
    // A server that is not ours is found before the record changes.
    node.postgres().postmaster().map_err(|error| error.failure())?;
    let running = begin(node, owner, epoch, source)?;
    node.change_record(move |record| rules::enter(record, epoch, NodeState::Seeding))
        .await
        .map_err(|error| error.failure())?;
    node.tunnels.cut(None).await.unwrap_or_default();
    node.supervisor.stop(false, "the node is being filled").await.map_err(|error| error.failure())?;
    // Before the fill, which writes down what lies here at its end; this file stays.
    let made = tokio::fs::DirBuilder::new().recursive(true).mode(0o700).create(&node.config.pgdata).await;
    made.map_err(|error| Failure {
        code: FailureCode::Postgres,
        what: format!("making {} failed: {error}", node.config.pgdata.display()),
        hint: "let the agent's user make this directory, then start the recovery again".to_owned(),
    })?;
    super::archive::configure(node).await.map_err(|error| error.failure())?;
    running.target.lock().await.fill(running.channels.clone()).await.map_err(|error| error.failure())?;
    Ok(Reply::Done)
}

async fn catch_up(node: &Node, owner: u64, epoch: Epoch, source: &str, lag_bytes_max: u64) -> Result<Reply, Failure> {
    let running = node.recovery.of(owner)?;
    if running.epoch != epoch || running.source != source {
        return Err(Failure {
            code: FailureCode::Request,
            what: format!("the fill was from {} in epoch {}", running.source, running.epoch),
            hint: "start again: pgtandem recover NODE".to_owned(),
        });
    }
    node.change_record(move |record| rules::enter(record, epoch, NodeState::CatchingUp))
        .await
        .map_err(|error| error.failure())?;
    running
        .target
        .lock()
        .await
        .catch_up(running.channels.clone(), lag_bytes_max)
        .await
        .map_err(|error| error.failure())?;
    Ok(Reply::Done)
}

async fn leave_recovery(node: &Node, owner: u64, x: Lsn) -> Result<Reply, Failure> {
    let running = node.recovery.of(owner)?;
    running.target.lock().await.leave_recovery(x).await.map_err(|error| error.failure())?;
    // The postmaster says so a moment after its startup process has ended; tunnels wait for that.
    let began = Instant::now();
    while node.postgres().state() != PostgresState::Running {
        if began.elapsed() > Duration::from_millis(LEFT_RECOVERY_MS_MAX) {
            return Err(Failure {
                code: FailureCode::Postgres,
                what: format!("PostgreSQL left recovery and does not run: {}", node.postgres().last_words()),
                hint: "read postgresql.log in the node's state_dir".to_owned(),
            });
        }
        sleep(Duration::from_millis(LEFT_RECOVERY_POLL_MS)).await;
    }
    node.supervisor.keep_running();
    Ok(Reply::Done)
}

fn begin(node: &Node, owner: u64, epoch: Epoch, source: &str) -> Result<Running, Failure> {
    let other = node.other(source).ok_or_else(|| Failure {
        code: FailureCode::Request,
        what: format!("{source:?} is no other node of this node's configuration"),
        hint: "use the same configuration file on all hosts".to_owned(),
    })?;
    let channels = AgentSource::new(node.identity.clone(), other.clone());
    node.recovery.begin(owner, epoch, source, channels, Target::new(node.postgres().clone()))
}

fn wrong_state(state: NodeState, verb: &str) -> Failure {
    Failure {
        code: FailureCode::WrongState,
        what: format!("PostgreSQL of a node in state {state:?} can not be {verb} by itself"),
        hint: "fill this node: pgtandem recover NODE".to_owned(),
    }
}
