//! A byte stream to the leader's PostgreSQL: its unix socket where it is on the proxy's host, a tunnel through its agent where it is not.
//!
//! The leader is on the proxy's host until its PostgreSQL is lost and another member takes over.

use std::future::poll_fn;
use std::io;
use std::pin::Pin;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::BytesMut;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::UnixStream;
use tokio_util::sync::CancellationToken;

use crate::agent::client;
use crate::agent::connection::BoxedCarrier;
use crate::config::NodeConfig;
use crate::replicate::follower::{Connection, ServerError};
use crate::replicate::hub::{Hub, HubError, OPEN_MS_MAX, Reign, lock, within};

/// How long it may take to say that it lives, to a session whose connection ended.
const LIVES_MS_MAX: u64 = 2_000;

pub enum LeaderStream {
    Local(UnixStream),
    Tunnel(BoxedCarrier),
}

impl std::fmt::Debug for LeaderStream {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Local(_) => "Local",
            Self::Tunnel(_) => "Tunnel",
        })
    }
}

impl AsyncRead for LeaderStream {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Local(stream) => Pin::new(stream).poll_read(cx, buf),
            Self::Tunnel(stream) => Pin::new(stream).poll_read(cx, buf),
        }
    }
}

impl AsyncWrite for LeaderStream {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Local(stream) => Pin::new(stream).poll_write(cx, buf),
            Self::Tunnel(stream) => Pin::new(stream).poll_write(cx, buf),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Local(stream) => Pin::new(stream).poll_flush(cx),
            Self::Tunnel(stream) => Pin::new(stream).poll_flush(cx),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Local(stream) => Pin::new(stream).poll_shutdown(cx),
            Self::Tunnel(stream) => Pin::new(stream).poll_shutdown(cx),
        }
    }
}

/// What is known of the leader's server, beyond its name.
#[derive(Debug, Default)]
pub struct AtLeader {
    /// Under which epoch one on another host is reached: raised as soon as it has promised it.
    epoch: AtomicU64,
    /// When it was started, as it says itself.
    started: Mutex<String>,
    /// One question at a time whether it lives.
    asking: tokio::sync::Mutex<()>,
    /// Cancelled when it is lost: no session waits for a server that may never answer.
    lost: Mutex<CancellationToken>,
}

impl AtLeader {
    pub(super) fn reach_under(&self, epoch: u64) {
        self.epoch.store(epoch, Ordering::Release);
    }
}

impl Hub {
    /// A control connection to the leader's PostgreSQL, as role `pgtandem`.
    ///
    /// # Errors
    /// If PostgreSQL refuses or is not there.
    pub async fn leader_connection(&self, database: &str) -> Result<Connection, HubError> {
        self.connect_leader(database, None).await
    }

    /// The same, inside an epoch: it is refused, or ended, once a newer one is raised, so what it decides is known to that one.
    ///
    /// # Errors
    /// If PostgreSQL refuses, the epoch is over, or PostgreSQL is not there.
    pub async fn leader_connection_of(&self, database: &str, secret: &str, epoch: u64) -> Result<Connection, HubError> {
        let connection = self.connect_leader(database, Some((secret, epoch))).await?;
        // If it still serves now, this is its own leader and not the next one's.
        if self.reign_epoch() != Some(epoch) {
            return Err(HubError::Other(format!("epoch {epoch} is over")));
        }
        Ok(connection)
    }

    async fn connect_leader(&self, database: &str, enter: Option<(&str, u64)>) -> Result<Connection, HubError> {
        let leader = self.leader()?;
        let open = async {
            let stream = self.stream_to(&leader).await?;
            Connection::open(Box::new(stream), database, "pgtandem control", enter).await
        };
        Ok(within(OPEN_MS_MAX, open).await?)
    }

    /// A stream to the leader's PostgreSQL, for a client's session.
    ///
    /// # Errors
    /// If it is not there.
    pub async fn leader_stream(&self) -> Result<LeaderStream, HubError> {
        Ok(self.stream_to(&self.leader()?).await?)
    }

    async fn stream_to(&self, leader: &NodeConfig) -> Result<LeaderStream, ServerError> {
        if leader.name == self.config.proxy.node {
            return Ok(LeaderStream::Local(UnixStream::connect(Self::socket_path(leader)).await?));
        }
        let tunnel = client::tunnel(&self.identity, leader, self.at_leader.epoch.load(Ordering::Acquire)).await;
        tunnel.map(LeaderStream::Tunnel).map_err(|e| ServerError::Other(e.to_string()))
    }

    /// Nobody is served until the next reign: a session that waits for the leader stops waiting, and looks for that one.
    pub fn leave_leader(&self) {
        self.reign.send_if_modified(|reign| {
            let serves = !matches!(reign, Reign::Waiting(_) | Reign::Stopping);
            if serves {
                *reign = Reign::Starting;
            }
            serves
        });
        std::mem::take(&mut *lock(&self.at_leader.lost)).cancel();
    }

    /// Serves nobody from here on, if anybody is served: the next reign asks every member.
    pub fn end_reign(&self) {
        self.reign.send_if_modified(|reign| {
            let serves = matches!(reign, Reign::Serving { .. });
            if serves {
                *reign = Reign::Starting;
            }
            serves
        });
    }

    /// Cancelled when this reign's leader is lost. Taken before the reign is looked at, so that no loss is missed.
    #[must_use]
    pub fn leader_lost(&self) -> CancellationToken {
        lock(&self.at_leader.lost).child_token()
    }

    /// Keeps when the leader's PostgreSQL was started.
    pub fn note_leader_started(&self, at: &str) {
        at.clone_into(&mut lock(&self.at_leader.started));
    }

    /// Whether the leader of this epoch is the server that it was: whoever lost a connection to it lost that alone then.
    pub async fn leader_lives(&self, epoch: u64) -> bool {
        let _one_at_a_time = self.at_leader.asking.lock().await;
        if self.reign_epoch() != Some(epoch) {
            return false;
        }
        let asked = async {
            let mut connection = self.leader_connection("postgres").await?;
            Ok::<_, HubError>(connection.started_at().await?)
        };
        match tokio::time::timeout(Duration::from_millis(LIVES_MS_MAX), asked).await {
            Ok(Ok(started)) => started == *lock(&self.at_leader.started),
            // It answers, that it has no place for one more, say.
            Ok(Err(HubError::Server(ServerError::Answer { sqlstate, .. }))) => !sqlstate.starts_with("57P"),
            _ => false,
        }
    }
}

/// What a stream could do first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Moved {
    Written(usize),
    /// All was written, and nothing waits inside the stream (a tunnel encrypts).
    Flushed,
    Read(usize),
}

/// Bytes that are read while a write waits.
const READ_BYTES: usize = 4096;

/// Writes some of `out`, or what waits inside the stream if it is empty; reads if that has to wait.
///
/// # Errors
/// The stream's.
pub async fn move_bytes(stream: &mut LeaderStream, out: &[u8], input: &mut BytesMut) -> io::Result<Moved> {
    poll_fn(|cx| {
        let mut stream = Pin::new(&mut *stream);
        let out = if out.is_empty() {
            stream.as_mut().poll_flush(cx).map_ok(|()| Moved::Flushed)
        } else {
            stream.as_mut().poll_write(cx, out).map_ok(Moved::Written)
        };
        if out.is_ready() {
            return out;
        }
        let mut bytes = [0; READ_BYTES];
        let mut read = ReadBuf::new(&mut bytes);
        match stream.poll_read(cx, &mut read) {
            Poll::Ready(Ok(())) => {
                input.extend_from_slice(read.filled());
                Poll::Ready(Ok(Moved::Read(read.filled().len())))
            }
            Poll::Ready(Err(error)) => Poll::Ready(Err(error)),
            Poll::Pending => Poll::Pending,
        }
    })
    .await
}
