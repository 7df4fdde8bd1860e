//! Grants leases: a channel to each agent, over which it asks. What is granted is noted in the hub before it is answered, because a shrink has
//! to wait for it.

use std::sync::Arc;
use std::time::Duration;

use pgtandem_proto::hello::Channel;
use pgtandem_proto::message::{LeaseAsk, LeaseGrant};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::agent::client::{self, ClientError};
use crate::config::NodeConfig;
use crate::replicate::hub::Hub;

/// Pause before a channel that ended is opened again.
const AGAIN_MS: u64 = 200;

/// Serves every node until `stop`.
pub async fn run(hub: Arc<Hub>, stop: CancellationToken) {
    let mut tasks = JoinSet::new();
    for node in hub.config.nodes.clone() {
        let hub = Arc::clone(&hub);
        tasks.spawn(stop.clone().run_until_cancelled_owned(async move {
            loop {
                if let Some(epoch) = hub.reign_epoch()
                    && let Some(Err(error)) = hub.while_serving(epoch, serve(&hub, &node, epoch)).await
                {
                    tracing::debug!(node = node.name, %error, "a lease channel ended");
                }
                tokio::time::sleep(Duration::from_millis(AGAIN_MS)).await;
            }
        }));
    }
    while tasks.join_next().await.is_some() {}
}

async fn serve(hub: &Hub, node: &NodeConfig, epoch: u64) -> Result<(), ClientError> {
    let mut connection = client::connect(&hub.identity, node, Channel::Lease { epoch }).await?;
    while let Some(LeaseAsk { number }) = connection.receive::<LeaseAsk>().await? {
        if let Some((epoch, version)) = hub.grant_lease(&node.name, epoch) {
            connection.send(&LeaseGrant { number, epoch, version }).await?;
        }
    }
    Ok(())
}
