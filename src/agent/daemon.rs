//! The agent itself: one per node, its listener, HELLO, and which channel goes where.
//!
//! SIGTERM and SIGINT stop PostgreSQL in fast mode, then the agent. When the agent is killed PostgreSQL goes on, and
//! the next agent finds it again.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use pgtandem_proto::hello::{Channel, Hello, HelloReply};
use pgtandem_proto::membership::{Epoch, NodeState};
use pgtandem_proto::message::{Failure, FailureCode, PostgresState};
use tokio::net::{TcpListener, TcpStream, UnixStream};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::certificates::PROXY;
use super::connection::{Connection, ConnectionError};
use super::node::{ChangeError, Node};
use super::record::{RecordFileError, RecordStore};
use super::supervisor::SupervisorError;
use super::tls::{Identity, TlsError, peer_name};
use super::{archive, client, control, generation, leases, tunnels};
use crate::archive::ArchiveError;
use crate::cluster::record as rules;
use crate::config::{Config, NodeConfig};
use crate::sync::source::{self, SourceContext};

/// Connections at a time, tunnels included. The next one waits in the kernel's queue.
pub const CONNECTIONS_MAX: usize = 1024;
/// Connections at a time that have not said HELLO: strangers can not take the others' places.
pub const HANDSHAKES_MAX: usize = 64;
/// Longest wait for TLS and HELLO together, milliseconds.
pub const HELLO_MS_MAX: u64 = 5_000;
/// Longest wait for the ends of connections when the agent stops, milliseconds.
const STOP_MS_MAX: u64 = 10_000;
/// Pause when connections can not be accepted (out of file descriptors), milliseconds.
const ACCEPT_PAUSE_MS: u64 = 200;

/// Why the agent did not start, or did not end well.
#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    #[error("the configuration has no node {node:?}; it has {known}")]
    UnknownNode { node: String, known: String },
    #[error("another agent runs on {path} already")]
    Locked { path: PathBuf },
    #[error("{path}: {source}")]
    Io { path: PathBuf, source: io::Error },
    #[error("the agent can not listen on {address}: {source}")]
    Listen { address: String, source: io::Error },
    #[error(transparent)]
    Tls(#[from] TlsError),
    #[error("the certificate is of {found}, this is {expected}; put the right one into state_dir")]
    OtherIdentity { found: String, expected: String },
    #[error(transparent)]
    Record(#[from] RecordFileError),
    #[error(transparent)]
    Change(#[from] ChangeError),
    #[error(transparent)]
    Postgres(#[from] SupervisorError),
    #[error(transparent)]
    Archive(#[from] ArchiveError),
}

/// Runs the agent of `node` until SIGTERM or SIGINT.
pub async fn run(config: Config, node: String) -> Result<(), AgentError> {
    let address = find(&config, &node)?.agent;
    let listener = TcpListener::bind(address)
        .await
        .map_err(|source| AgentError::Listen { address: address.to_string(), source })?;
    let signals = || -> io::Result<_> { Ok((signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?)) };
    let (mut terminate, mut interrupt) =
        signals().map_err(|source| AgentError::Io { path: "signal handlers".into(), source })?;
    let agent = Agent::start(config, &node, listener).await?;
    tokio::select! {
        _ = terminate.recv() => tracing::info!("SIGTERM"),
        _ = interrupt.recv() => tracing::info!("SIGINT"),
    }
    agent.stop().await
}

fn find<'a>(config: &'a Config, node: &str) -> Result<&'a NodeConfig, AgentError> {
    config.nodes.iter().find(|candidate| candidate.name == node).ok_or_else(|| AgentError::UnknownNode {
        node: node.to_owned(),
        known: config.nodes.iter().map(|node| node.name.as_str()).collect::<Vec<_>>().join(", "),
    })
}

/// A running agent. Dropping it leaves its tasks to the runtime; [`Agent::stop`] ends it in order.
pub struct Agent {
    node: Arc<Node>,
    stop: CancellationToken,
    tasks: TaskTracker,
    /// Held as long as the agent runs.
    _lock: File,
}

impl Agent {
    /// Starts it on a listener that is bound already, and PostgreSQL if the record's state allows it.
    pub async fn start(config: Config, node: &str, listener: TcpListener) -> Result<Agent, AgentError> {
        let node_config = find(&config, node)?.clone();
        let lock = lock(&node_config)?;
        let identity = Identity::load(&node_config.state_dir)?;
        if identity.name() != node || identity.cluster() != config.cluster.name {
            return Err(AgentError::OtherIdentity {
                found: format!("{} of cluster {}", identity.name(), identity.cluster()),
                expected: format!("{node} of cluster {}", config.cluster.name),
            });
        }
        let store = RecordStore::open(&node_config.state_dir, &config.cluster.name, node)?;
        let node = Arc::new(Node::new(config, node_config, identity, store));
        // It may have been left behind while no agent ran.
        node.change_record(|record| Ok(rules::started(record))).await?;
        // Before PostgreSQL starts: it takes archive_mode over then only.
        archive::configure(&node).await?;
        settle(&node).await?;
        let agent = Agent { node, stop: CancellationToken::new(), tasks: TaskTracker::new(), _lock: lock };
        let (node, stop) = (agent.node.clone(), agent.stop.clone());
        agent.tasks.spawn(async move {
            tokio::select! {
                () = stop.cancelled() => {}
                () = node.supervisor.watch() => {}
            }
        });
        let (node, stop) = (agent.node.clone(), agent.stop.clone());
        agent.tasks.spawn(async move {
            tokio::select! {
                () = stop.cancelled() => {}
                () = leases::watch(&node) => {}
            }
        });
        let (node, stop) = (agent.node.clone(), agent.stop.clone());
        agent.tasks.spawn(async move {
            tokio::select! {
                () = stop.cancelled() => {}
                () = archive::run(&node) => {}
            }
        });
        let (node, stop) = (agent.node.clone(), agent.stop.clone());
        agent.tasks.spawn(async move {
            tokio::select! {
                () = stop.cancelled() => {}
                () = generation::watch(&node) => {}
            }
        });
        agent.tasks.spawn(accept(agent.node.clone(), listener, agent.stop.clone(), agent.tasks.clone()));
        tracing::info!(node = agent.node.config.name, address = %agent.node.config.agent, "agent runs");
        Ok(agent)
    }

    /// Ends all connections, stops PostgreSQL (fast), and returns when it is gone.
    pub async fn stop(self) -> Result<(), AgentError> {
        self.end_connections().await;
        Ok(self.node.supervisor.stop(false, "the agent was stopped").await?)
    }

    /// Ends the agent and leaves PostgreSQL running, as a kill of the agent would.
    pub async fn abandon(self) {
        self.end_connections().await;
    }

    async fn end_connections(&self) {
        self.stop.cancel();
        self.tasks.close();
        if timeout(Duration::from_millis(STOP_MS_MAX), self.tasks.wait()).await.is_err() {
            tracing::warn!(left = self.tasks.len(), "connections did not end in time");
        }
    }
}

/// One agent per `state_dir`. The lock ends with the process.
fn lock(node: &NodeConfig) -> Result<File, AgentError> {
    let path = Node::lock_path(node);
    let io = |source| AgentError::Io { path: path.clone(), source };
    fs::create_dir_all(&node.state_dir).map_err(io)?;
    let file = OpenOptions::new().write(true).create(true).truncate(false).open(&path).map_err(io)?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => Err(AgentError::Locked { path }),
        Err(TryLockError::Error(source)) => Err(io(source)),
    }
}

/// Brings PostgreSQL to where the record says that it belongs. A start goes on behind this.
async fn settle(node: &Node) -> Result<(), AgentError> {
    let state = node.record().state;
    let running = matches!(node.postgres().state(), PostgresState::Running | PostgresState::Standby);
    match state {
        NodeState::InSync | NodeState::Stale | NodeState::Suspect => node.supervisor.keep_running(),
        // A data directory that nobody has vouched for is left as it was found.
        NodeState::Blank if running => node.supervisor.keep_running(),
        NodeState::Blank => {}
        NodeState::Forked => {
            node.supervisor
                .stop(false, "this node went on alone while the other side did, too; its data are kept")
                .await?;
        }
        // The recovery that it belongs to has ended with the agent.
        NodeState::Seeding | NodeState::CatchingUp | NodeState::Joining => {
            node.supervisor.stop(true, "its recovery was ended before it became a member").await?;
        }
    }
    Ok(())
}

async fn accept(node: Arc<Node>, listener: TcpListener, stop: CancellationToken, tasks: TaskTracker) {
    let connections = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    let handshakes = Arc::new(Semaphore::new(HANDSHAKES_MAX));
    let numbers = AtomicU64::new(0);
    loop {
        let next = async {
            // The semaphores are never closed.
            let permit = connections.clone().acquire_owned().await.ok()?;
            let handshake = handshakes.clone().acquire_owned().await.ok()?;
            Some((permit, handshake, listener.accept().await))
        };
        let Some((permit, handshake, accepted)) = (tokio::select! {
            biased;
            () = stop.cancelled() => return,
            next = next => next,
        }) else {
            return;
        };
        match accepted {
            Ok((stream, address)) => {
                let number = numbers.fetch_add(1, Ordering::Relaxed);
                let (node, stop) = (node.clone(), stop.clone());
                tasks.spawn(async move {
                    let _permit = permit;
                    if let Err(error) = serve(node, stream, handshake, number, &stop).await {
                        tracing::warn!(%address, %error, "a connection ended");
                    }
                });
            }
            Err(error) => {
                tracing::error!(%error, "a connection could not be accepted");
                tokio::time::sleep(Duration::from_millis(ACCEPT_PAUSE_MS)).await;
            }
        }
    }
}

/// Why a connection ended before its time.
#[derive(Debug, thiserror::Error)]
enum ServeError {
    #[error("TLS: {0}")]
    Tls(io::Error),
    #[error("no HELLO within {HELLO_MS_MAX} ms")]
    HelloLimit,
    #[error(transparent)]
    Connection(#[from] ConnectionError),
    #[error("refused: {0}")]
    Refused(String),
    #[error(transparent)]
    Sync(#[from] crate::sync::SyncError),
}

async fn serve(
    node: Arc<Node>,
    stream: TcpStream,
    handshake: OwnedSemaphorePermit,
    number: u64,
    stop: &CancellationToken,
) -> Result<(), ServeError> {
    client::tune(&stream).map_err(ServeError::Tls)?;
    let greeted = tokio::select! {
        biased;
        () = stop.cancelled() => return Ok(()),
        greeted = timeout(Duration::from_millis(HELLO_MS_MAX), greet(&node, stream)) => greeted,
    };
    let (mut connection, hello) = greeted.map_err(|_| ServeError::HelloLimit)??;
    drop(handshake);
    let served = async {
        match hello.channel {
            Channel::Control => {
                answer(&node, &mut connection, &hello, Ok(())).await?;
                Ok(control::serve(node.clone(), connection, number).await?)
            }
            Channel::Lease { epoch } => lease(&node, connection, &hello, epoch).await,
            Channel::Tunnel { epoch } => tunnel(&node, connection, &hello, epoch).await,
            Channel::Files => {
                let context = source_context(&node, &hello);
                let checked = context.as_ref().map(|_| ()).map_err(Failure::clone);
                answer(&node, &mut connection, &hello, checked).await?;
                match context {
                    Ok(context) => Ok(source::serve_files(connection, &context).await?),
                    Err(failure) => Err(ServeError::Refused(failure.what)),
                }
            }
            Channel::Archive => {
                let folder = archive::folder(&node, &hello.from);
                answer(&node, &mut connection, &hello, folder.as_ref().map(|_| ()).map_err(Failure::clone)).await?;
                match folder {
                    Ok(folder) => Ok(archive::serve(connection, folder).await?),
                    Err(failure) => Err(ServeError::Refused(failure.what)),
                }
            }
            Channel::Wal => {
                let context = source_context(&node, &hello);
                let checked = context.as_ref().map(|_| ()).map_err(Failure::clone);
                answer(&node, &mut connection, &hello, checked).await?;
                match context {
                    Ok(context) => Ok(source::serve_wal(connection, &context).await?),
                    Err(failure) => Err(ServeError::Refused(failure.what)),
                }
            }
        }
    };
    tokio::select! {
        biased;
        () = stop.cancelled() => {}
        served = served => return served,
    }
    Ok(())
}

/// TLS and HELLO; the name in HELLO is the one in the certificate, and the configuration knows it.
async fn greet(node: &Node, stream: TcpStream) -> Result<(Connection, Hello), ServeError> {
    let stream = node.identity.acceptor().accept(stream).await.map_err(ServeError::Tls)?;
    let certificate = stream.get_ref().1.peer_certificates().and_then(|chain| chain.first()).and_then(peer_name);
    let mut connection = Connection::new(Box::new(stream), "a caller");
    let hello: Hello = connection.expect().await?;
    connection.set_peer(&hello.from);
    if let Err(failure) = check_caller(node, &hello, certificate) {
        let what = failure.what.clone();
        connection.send(&HelloReply::Refused(failure)).await?;
        return Err(ServeError::Refused(what));
    }
    Ok((connection, hello))
}

fn check_caller(node: &Node, hello: &Hello, certificate: Option<(String, String)>) -> Result<(), Failure> {
    let cluster = node.identity.cluster();
    hello.negotiate(cluster)?;
    let refuse = |what: String, hint: &str| Failure { code: FailureCode::Peer, what, hint: hint.to_owned() };
    if certificate.as_ref() != Some(&(hello.from.clone(), cluster.to_owned())) {
        return Err(refuse(
            format!(
                "the caller says that it is {:?} of cluster {cluster:?}, its certificate says {:?}",
                hello.from.chars().take(32).collect::<String>(),
                certificate.unwrap_or_default()
            ),
            "put the caller's own certificate into its state_dir",
        ));
    }
    if hello.from != PROXY && !node.cluster.nodes.iter().any(|known| known.name == hello.from) {
        return Err(refuse(
            format!("{:?} is no node of this node's configuration", hello.from),
            "use the same configuration file on all hosts",
        ));
    }
    Ok(())
}

/// Sends the reply to HELLO.
async fn answer(
    node: &Node,
    connection: &mut Connection,
    hello: &Hello,
    checked: Result<(), Failure>,
) -> Result<(), ServeError> {
    let reply = match checked.and_then(|()| hello.negotiate(node.identity.cluster())) {
        Ok((version, features)) => {
            HelloReply::Accepted { version, features, node: node.config.name.clone(), promised: node.record().promised }
        }
        Err(failure) => HelloReply::Refused(failure),
    };
    Ok(connection.send(&reply).await?)
}

/// Ends with the channel, or when a newer epoch is promised: it is registered among the tunnels, which that cuts.
async fn lease(node: &Node, mut connection: Connection, hello: &Hello, epoch: Epoch) -> Result<(), ServeError> {
    let registered = node.tunnels.register(epoch);
    let promised = node.record().promised;
    let checked = match &registered {
        Some(_) if promised == epoch => Ok(()),
        _ => Err(Failure {
            code: FailureCode::OldEpoch,
            what: format!("a lease of epoch {epoch} is not asked for: this node has promised epoch {promised}"),
            hint: "see pgtandem status".to_owned(),
        }),
    };
    let refused = checked.as_ref().err().map(|failure| failure.what.clone());
    answer(node, &mut connection, hello, checked).await?;
    match (registered, refused) {
        (Some(registered), None) => tokio::select! {
            served = leases::serve(node, connection) => Ok(served?),
            () = registered.is_cut() => Ok(()),
        },
        (_, refused) => Err(ServeError::Refused(refused.unwrap_or_default())),
    }
}

async fn tunnel(node: &Node, mut connection: Connection, hello: &Hello, epoch: Epoch) -> Result<(), ServeError> {
    match open_tunnel(node, epoch).await {
        Ok((registered, server)) => {
            answer(node, &mut connection, hello, Ok(())).await?;
            let (carrier, early) = connection.into_raw();
            registered.forward(carrier, &early, server).await;
            Ok(())
        }
        Err(failure) => {
            let what = failure.what.clone();
            answer(node, &mut connection, hello, Err(failure)).await?;
            Err(ServeError::Refused(what))
        }
    }
}

async fn open_tunnel(node: &Node, epoch: Epoch) -> Result<(tunnels::Registered, UnixStream), Failure> {
    let refuse = |code, what: String, hint: &str| Failure { code, what, hint: hint.to_owned() };
    // Registered first: see `tunnels`.
    let registered = node.tunnels.register(epoch).ok_or_else(|| {
        refuse(
            FailureCode::Limit,
            format!("{} tunnels are open already", tunnels::TUNNELS_MAX),
            "close some; a proxy needs a few dozen",
        )
    })?;
    let record = node.record();
    if epoch != record.promised {
        return Err(refuse(
            FailureCode::OldEpoch,
            format!("a tunnel of epoch {epoch} is refused: this node has promised epoch {}", record.promised),
            "a newer proxy rules this node, or this one has not had its epoch promised; see pgtandem status",
        ));
    }
    let state = node.postgres().state();
    if !Node::state_serves(record.state) || state != PostgresState::Running {
        return Err(refuse(
            FailureCode::WrongState,
            format!("a tunnel is refused: this node is {:?} and its PostgreSQL {state:?}", record.state),
            "fill this node: pgtandem recover NODE",
        ));
    }
    let path = tunnels::socket_path(&node.config);
    let server = UnixStream::connect(&path).await.map_err(|error| {
        refuse(
            FailureCode::Postgres,
            format!("{}: {error}", path.display()),
            "see postgresql.log in the node's state_dir",
        )
    })?;
    Ok((registered, server))
}

/// Files and WAL are given to other nodes only, and only by a member whose PostgreSQL runs.
fn source_context(node: &Node, hello: &Hello) -> Result<SourceContext, Failure> {
    let refuse = |what: String, hint: &str| Failure { code: FailureCode::WrongState, what, hint: hint.to_owned() };
    if node.other(&hello.from).is_none() {
        return Err(refuse(format!("{} is no other node", hello.from), "only nodes fetch files and WAL"));
    }
    let (record, postgres) = (node.record(), node.postgres().state());
    if record.state != NodeState::InSync || postgres != PostgresState::Running {
        return Err(refuse(
            format!(
                "node {} is {:?} and its PostgreSQL {postgres:?}: it can be no source",
                node.config.name, record.state
            ),
            "fill from a member; see pgtandem status",
        ));
    }
    Ok(SourceContext {
        postgres: node.postgres().clone(),
        peer: hello.from.clone(),
        backups: node.backups.clone(),
        bytes_per_s_max: node.cluster.cluster.fill_bytes_per_s_max,
        keeps_wal: true,
    })
}
