//! Ends what an older epoch can still do on this node's PostgreSQL: the sessions of a proxy on the same host do not come
//! through the agent, so no cut of tunnels reaches them.
//!
//! The epoch is written into every database with a secret that nobody knows, then every client session is ended. Whoever connects
//! afterwards can not enter an older epoch; the proxy of the new one writes its own secret over this one.

use pgtandem_proto::membership::Epoch;
use pgtandem_proto::message::PostgresState;
use tokio::net::UnixStream;
use tokio::time::{Duration, Instant, sleep};

use super::node::Node;
use super::tunnels;
use crate::replicate::follower::{Connection, ServerError};
use crate::replicate::resolve;

/// How long a PostgreSQL that is just starting may take until it can be told, milliseconds.
const STARTING_MS_MAX: u64 = 10_000;
const STARTING_POLL_MS: u64 = 50;

/// # Errors
/// PostgreSQL's answer. One that does not run has no sessions, and nothing to be ended.
pub async fn fence(node: &Node, epoch: Epoch) -> Result<(), ServerError> {
    let began = Instant::now();
    while node.postgres().state() == PostgresState::Starting && began.elapsed() < Duration::from_millis(STARTING_MS_MAX)
    {
        sleep(Duration::from_millis(STARTING_POLL_MS)).await;
    }
    if node.postgres().state() != PostgresState::Running {
        return Ok(());
    }
    let secret = format!("{:032x}{:032x}", rand::random::<u128>(), rand::random::<u128>());
    let databases = resolve::databases(&mut connect(node, "postgres").await?).await?;
    for database in &databases {
        let mut connection = connect(node, database).await?;
        resolve::install(&mut connection).await?;
        resolve::raise_epoch(&mut connection, epoch, &secret).await?;
    }
    resolve::end_sessions(&mut connect(node, "postgres").await?).await?;
    tracing::warn!(epoch, "sessions of older epochs were ended: another node becomes the leader");
    Ok(())
}

async fn connect(node: &Node, database: &str) -> Result<Connection, ServerError> {
    let stream = UnixStream::connect(tunnels::socket_path(&node.config)).await.map_err(ServerError::Io)?;
    Connection::open(Box::new(stream), database, "pgtandem agent", None).await
}
