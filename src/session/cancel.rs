//! A request to cancel: the client's key is the leader's own, so the leader checks it.

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;

use crate::pg::startup;
use crate::replicate::hub::Hub;

/// Passes the request on, and waits until the leader has taken it: the server closes the connection.
///
/// # Errors
/// If the leader is not there.
pub async fn forward(hub: &Hub, key: &[u8]) -> std::io::Result<()> {
    let leader = hub.leader().map_err(std::io::Error::other)?;
    let mut server = UnixStream::connect(Hub::socket_path(&leader)).await?;
    server.write_all(&startup::cancel_request(key)).await?;
    let mut end = [0; 1];
    let _closed = server.read(&mut end).await?;
    Ok(())
}
