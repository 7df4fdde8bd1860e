//! VACUUM and the like on followers: they change no content, so nothing waits for them and an error is only logged.

use std::sync::Arc;

use crate::pg::build;
use crate::replicate::follower::Answer;
use crate::replicate::hub::Hub;
use crate::replicate::nodewise;
use crate::replicate::schema::Context;

/// Runs the client's text on every follower of the member set, one after the other.
/// `exclusive`: others may have to wait long for its locks.
pub async fn run(hub: &Hub, database: &Arc<str>, context: Option<&Context>, text: &str, exclusive: bool) {
    let _exclusive = exclusive.then(|| hub.nodewise.exclusive());
    let Some((epoch, secret)) = hub.epoch_and_secret() else { return };
    for follower in &hub.view().followers {
        let work = async {
            let mut connection = hub.tunnel_connection(&follower.node, database, epoch, Some(&secret)).await?;
            if let Some(context) = context {
                nodewise::enter(&mut connection, context).await?;
            }
            build::query(&mut connection.out, text.as_bytes());
            connection.exchange().await.and_then(Answer::ok)
        };
        let result = tokio::select! {
            result = work => result,
            () = follower.gone.cancelled() => continue,
        };
        if let Err(e) = result {
            tracing::info!(node = %follower.node.name, error = %e, text, "maintenance failed on a follower");
        }
    }
}
