//! [`Agents`] over the agent protocol: TLS connections with the identity of the daemon or command that asks.

use std::sync::Arc;

use pgtandem_proto::message::{Failure, FailureCode, Progress, Reply, Request};

use super::agents::{AgentControl, Agents};
use crate::agent::client::Control;
use crate::agent::tls::Identity;
use crate::config::NodeConfig;

/// The agents of the configured nodes.
#[derive(Clone)]
pub struct AgentClients {
    identity: Arc<Identity>,
    nodes: Vec<NodeConfig>,
}

impl AgentClients {
    #[must_use]
    pub fn new(identity: Arc<Identity>, nodes: Vec<NodeConfig>) -> Self {
        Self { identity, nodes }
    }
}

impl Agents for AgentClients {
    type Control = Control;

    async fn connect(&self, node: &str) -> Result<Control, Failure> {
        let Some(config) = self.nodes.iter().find(|config| config.name == node) else {
            return Err(Failure {
                code: FailureCode::Request,
                what: format!("no node named {node} is in the configuration"),
                hint: "look at the [[node]] sections of the configuration file".into(),
            });
        };
        Control::connect(&self.identity, config).await.map_err(|error| error.failure())
    }
}

impl AgentControl for Control {
    async fn request(
        &mut self,
        request: Request,
        on_progress: &mut (dyn FnMut(Progress) + Send),
    ) -> Result<Reply, Failure> {
        self.request_with(&request, on_progress).await.map_err(|error| error.failure())
    }
}
