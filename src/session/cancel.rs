//! A request to cancel: the client's key is the leader's own, so the leader checks it.

use std::time::Duration;

use bytes::Bytes;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::pg::startup;
use crate::replicate::hub::Hub;

/// A server that does not answer for that long does not take the request any more.
const CANCEL_MS_MAX: u64 = 10_000;

/// Passes the request on, and waits until the leader has taken it: the server closes the connection. Its session sends nothing
/// meanwhile.
///
/// # Errors
/// If the leader is not there, or does not answer.
pub async fn forward(hub: &Hub, told: &Bytes) -> std::io::Result<()> {
    let _under_way = hub.cancels.begin(told);
    // A session that has moved is another backend's now.
    let key = hub.cancels.key_of(told);
    tokio::time::timeout(Duration::from_millis(CANCEL_MS_MAX), send(hub, &key)).await?
}

async fn send(hub: &Hub, key: &[u8]) -> std::io::Result<()> {
    let mut server = hub.leader_stream().await.map_err(std::io::Error::other)?;
    server.write_all(&startup::cancel_request(key)).await?;
    server.flush().await?;
    let mut end = [0; 1];
    let _closed = server.read(&mut end).await?;
    Ok(())
}
