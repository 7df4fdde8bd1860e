//! The calling side of the agent protocol: connect to an agent, say HELLO, then ask, pull files or WAL, or tunnel.
//!
//! Every wait has a limit: for the connection, for HELLO, and for silence. An agent that works sends progress at
//! least once a second, so a long fill is not a timeout but a dead peer is.

use std::time::Duration;

use pgtandem_proto::frame::Message;
use pgtandem_proto::hello::{Channel, Hello, HelloReply};
use pgtandem_proto::membership::Epoch;
use pgtandem_proto::message::{Failure, FailureCode, Progress, Reply, Request};
use socket2::{SockRef, TcpKeepalive};
use tokio::net::TcpStream;
use tokio::time::timeout;

use super::connection::{BoxedCarrier, Connection, ConnectionError};
use super::tls::Identity;
use crate::config::NodeConfig;

/// Longest wait for TCP and TLS, milliseconds.
pub const CONNECT_MS_MAX: u64 = 5_000;
/// Longest wait for the answer to HELLO, milliseconds.
pub const HELLO_MS_MAX: u64 = 5_000;
/// Longest silence of an agent while it works on a request, milliseconds.
pub const SILENCE_MS_MAX: u64 = 15_000;
/// Idle time after which TCP asks whether the peer still lives; then every [`KEEPALIVE_INTERVAL_MS`].
const KEEPALIVE_MS: u64 = 10_000;
const KEEPALIVE_INTERVAL_MS: u64 = 5_000;
/// How long bytes may stay unacknowledged before the connection counts as broken.
const UNACKNOWLEDGED_MS_MAX: u64 = 20_000;

#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    #[error("no connection to agent {node} at {address}: {why}")]
    Connect { node: String, address: String, why: String },
    #[error("the TLS handshake with agent {node} at {address} failed: {why}")]
    Tls { node: String, address: String, why: String },
    #[error("agent {node} refused the connection: {}", .failure.what)]
    Refused { node: String, failure: Failure },
    #[error(transparent)]
    Connection(#[from] ConnectionError),
    #[error("agent {node} was silent for {SILENCE_MS_MAX} ms")]
    Silent { node: String },
    /// It answered that it could not.
    #[error("node {node}: {}", .failure.what)]
    Failed { node: String, failure: Failure },
    /// A request on this channel was given up before its reply came; its reply would be taken for another's.
    #[error("the control channel to agent {node} still waits for the reply to an earlier request")]
    GivenUp { node: String },
    #[error("agent {node} answered {request} with something else: {found}")]
    Unexpected { node: String, request: &'static str, found: String },
}

impl ClientError {
    /// The node obeys a newer epoch, or has stored a newer member set.
    #[must_use]
    pub fn is_old_epoch(&self) -> bool {
        matches!(self, ClientError::Refused { failure, .. } | ClientError::Failed { failure, .. } if failure.code == FailureCode::OldEpoch)
    }

    /// The four parts, for whoever shows it or passes it on.
    #[must_use]
    pub fn failure(&self) -> Failure {
        let hint = match self {
            ClientError::Refused { failure, .. } | ClientError::Failed { failure, .. } => {
                return Failure { code: failure.code, what: self.to_string(), hint: failure.hint.clone() };
            }
            ClientError::Connect { .. } => {
                "check that pgtandem agent runs on that host and that its port is reachable from here"
            }
            ClientError::Tls { .. } => {
                "check that both hosts have certificates of the same cluster, and the right clock"
            }
            ClientError::Connection(_) | ClientError::Silent { .. } | ClientError::GivenUp { .. } => {
                "see the agent's log on that node, then try again"
            }
            ClientError::Unexpected { .. } => "install the same version of pgtandem on all hosts",
        };
        Failure { code: FailureCode::Peer, what: self.to_string(), hint: hint.to_owned() }
    }
}

/// Connects to the agent of `node` and opens a channel as whoever `identity` is.
pub async fn connect(identity: &Identity, node: &NodeConfig, channel: Channel) -> Result<Connection, ClientError> {
    open(identity, node, channel).await.map(|(connection, _)| connection)
}

/// Opens a tunnel: raw bytes to the PostgreSQL of `node`, cut when it promises a higher epoch.
pub async fn tunnel(identity: &Identity, node: &NodeConfig, epoch: Epoch) -> Result<BoxedCarrier, ClientError> {
    let (connection, _) = open(identity, node, Channel::Tunnel { epoch }).await?;
    let (carrier, early) = connection.into_raw();
    if early.is_empty() {
        return Ok(carrier);
    }
    // A PostgreSQL server never speaks first.
    Err(ClientError::Unexpected {
        node: node.name.clone(),
        request: "a tunnel",
        found: format!("{} bytes before the first of ours", early.len()),
    })
}

async fn open(identity: &Identity, node: &NodeConfig, channel: Channel) -> Result<(Connection, Epoch), ClientError> {
    let address = node.agent.to_string();
    let refuse = |why: String| ClientError::Connect { node: node.name.clone(), address: address.clone(), why };
    let limit = Duration::from_millis(CONNECT_MS_MAX);
    let stream = timeout(limit, TcpStream::connect(node.agent))
        .await
        .map_err(|_| refuse(format!("no answer within {CONNECT_MS_MAX} ms")))?
        .map_err(|error| refuse(error.to_string()))?;
    tune(&stream).map_err(|error| refuse(error.to_string()))?;
    let tls = |why: String| ClientError::Tls { node: node.name.clone(), address: address.clone(), why };
    let name = identity
        .server_name(&node.name)
        .ok_or_else(|| tls(format!("{:?} can not be a name in a certificate", node.name)))?;
    let stream = timeout(limit, identity.connector().connect(name, stream))
        .await
        .map_err(|_| tls(format!("no answer within {CONNECT_MS_MAX} ms")))?
        .map_err(|error| tls(error.to_string()))?;
    let mut connection = Connection::new(Box::new(stream), &node.name);
    let hello = Hello::new(identity.cluster(), identity.name(), channel);
    connection.send(&hello).await?;
    let reply = timeout(Duration::from_millis(HELLO_MS_MAX), connection.expect::<HelloReply>())
        .await
        .map_err(|_| tls(format!("no answer to HELLO within {HELLO_MS_MAX} ms")))?
        // With TLS 1.3 a server refuses the client's certificate only after the client has finished.
        .map_err(|error| tls(error.to_string()))?;
    match reply {
        HelloReply::Accepted { promised, .. } => Ok((connection, promised)),
        HelloReply::Refused(failure) => Err(ClientError::Refused { node: node.name.clone(), failure }),
    }
}

/// Settings of every TCP connection between hosts: no delay, and a dead peer is noticed in seconds.
pub(super) fn tune(stream: &TcpStream) -> std::io::Result<()> {
    stream.set_nodelay(true)?;
    let socket = SockRef::from(stream);
    let keepalive = TcpKeepalive::new()
        .with_time(Duration::from_millis(KEEPALIVE_MS))
        .with_interval(Duration::from_millis(KEEPALIVE_INTERVAL_MS));
    socket.set_tcp_keepalive(&keepalive)?;
    socket.set_tcp_user_timeout(Some(Duration::from_millis(UNACKNOWLEDGED_MS_MAX)))
}

/// A control channel: one request at a time. Dropping it ends a recovery that it started and that is not done.
pub struct Control {
    connection: Connection,
    node: String,
    promised: Epoch,
    /// A request was sent and its final reply has not come.
    waiting: bool,
}

impl Control {
    pub async fn connect(identity: &Identity, node: &NodeConfig) -> Result<Control, ClientError> {
        let (connection, promised) = open(identity, node, Channel::Control).await?;
        Ok(Control { connection, node: node.name.clone(), promised, waiting: false })
    }

    /// Name of the node behind it.
    #[must_use]
    pub fn node(&self) -> &str {
        &self.node
    }

    /// What the node had promised when this was opened.
    #[must_use]
    pub fn promised(&self) -> Epoch {
        self.promised
    }

    /// Asks, and waits for the final reply. `Reply::Failed` comes as [`ClientError::Failed`].
    pub async fn request(&mut self, request: &Request) -> Result<Reply, ClientError> {
        self.request_with(request, |_| ()).await
    }

    /// As [`Control::request`], with every progress on the way. A channel whose request was
    /// given up (its future dropped, its peer silent) takes no further one.
    pub async fn request_with(
        &mut self,
        request: &Request,
        mut on_progress: impl FnMut(Progress),
    ) -> Result<Reply, ClientError> {
        if self.waiting {
            return Err(ClientError::GivenUp { node: self.node.clone() });
        }
        self.waiting = true;
        self.connection.send(request).await?;
        let reply = loop {
            match self.next::<Reply>().await? {
                Reply::Progress(progress) => on_progress(progress),
                reply => break reply,
            }
        };
        self.waiting = false;
        match reply {
            Reply::Failed(failure) => Err(ClientError::Failed { node: self.node.clone(), failure }),
            reply => Ok(reply),
        }
    }

    /// The error of an answer of the wrong kind, for callers that match on the reply.
    #[must_use]
    pub fn unexpected(&self, request: &'static str, found: &Reply) -> ClientError {
        let found = format!("{found:?}").chars().take(200).collect();
        ClientError::Unexpected { node: self.node.clone(), request, found }
    }

    async fn next<M: Message>(&mut self) -> Result<M, ClientError> {
        match timeout(Duration::from_millis(SILENCE_MS_MAX), self.connection.expect()).await {
            Ok(message) => Ok(message?),
            Err(_) => Err(ClientError::Silent { node: self.node.clone() }),
        }
    }
}
