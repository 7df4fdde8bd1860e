//! A request to cancel: the client's key is the leader's own, so the leader checks it.

use bytes::Bytes;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::pg::startup;
use crate::replicate::hub::Hub;

/// Passes the request on, and waits until the leader has taken it: the server closes the connection.
///
/// # Errors
/// If the leader is not there.
pub async fn forward(hub: &Hub, key: &Bytes) -> std::io::Result<()> {
    // A session that has moved is another backend's now.
    let key = hub.key_of_moved(key).unwrap_or_else(|| key.clone());
    let mut server = hub.leader_stream().await.map_err(std::io::Error::other)?;
    server.write_all(&startup::cancel_request(&key)).await?;
    server.flush().await?;
    let mut end = [0; 1];
    let _closed = server.read(&mut end).await?;
    Ok(())
}
