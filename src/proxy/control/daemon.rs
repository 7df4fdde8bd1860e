//! Everything behind `control.sock` put together for the running proxy: the agents' clients, the recoveries, the
//! contact with every agent, the socket.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use tokio_util::sync::CancellationToken;

use super::SOCKET_NAME;
use super::operations::Operations;
use super::server::{ControlError, serve};
use crate::observe::status::{AwayView, OnceShape, Problem, ProxyCounters, StatusSource};
use crate::recovery::client::AgentClients;
use crate::recovery::contact::{self, Seen};
use crate::recovery::recoveries::Recoveries;
use crate::replicate::hub::{Hub, Reign};
use crate::replicate::shapes::{ShapeCount, ShapeName};

/// Serves commands and keeps contact with the agents until `stop`; then ends the recoveries in order.
/// Returns early, with the reason, if the socket can not be made.
pub async fn run(hub: Arc<Hub>, stop: CancellationToken) -> Result<(), ControlError> {
    let config = hub.config.clone();
    let names: Vec<_> = config.nodes.iter().map(|node| node.name.clone()).collect();
    let agents = Arc::new(AgentClients::new(Arc::new(hub.identity.clone()), config.nodes.clone()));
    let recoveries = Arc::new(Recoveries::new(hub.clone(), agents.clone(), names.clone(), stop.child_token()));
    let seen = Arc::new(Seen::default());
    let operations = Operations {
        cluster: config.cluster.name.clone(),
        nodes: config.nodes.clone(),
        recoveries: recoveries.clone(),
        seen: seen.clone(),
        source: hub.clone(),
    };
    let path = config.proxy.state_dir.join(SOCKET_NAME);
    let ended = stop.child_token();
    let contacts = contact::run(hub, agents, names, seen, ended.clone());
    let socket = async {
        let served = serve(&path, Arc::new(operations), stop).await;
        ended.cancel();
        served
    };
    let ((), served) = tokio::join!(contacts, socket);
    if served.is_ok() {
        recoveries.ended().await;
    }
    served
}

impl StatusSource for Hub {
    fn counters(&self) -> ProxyCounters {
        let gate = self.gate.stats();
        ProxyCounters {
            clients: self.counters.sessions.load(Ordering::Relaxed),
            commits: self.counters.commits.load(Ordering::Relaxed),
            gate_closed_count: gate.closed_count,
            gate_closed_ms_max: gate.closed_ms_max,
            statements_refused: self.counters.refused.load(Ordering::Relaxed),
        }
    }

    fn once(&self) -> Vec<OnceShape> {
        let shape = |(name, count): (ShapeName, ShapeCount)| OnceShape {
            database: name.database.to_string(),
            shape: name.text.to_string(),
            runs: count.runs,
            again: count.again,
            unproven: Some(count.unproven).filter(|why| !why.is_empty()),
            refused: count.refused,
        };
        self.once.list().into_iter().map(shape).collect()
    }

    fn not_served(&self) -> Option<String> {
        self.trouble()
    }

    fn missing(&self) -> Vec<(String, String)> {
        self.missing.list()
    }

    fn leaving(&self) -> Vec<(String, String)> {
        self.leaving.list()
    }

    fn waiting(&self) -> Option<Problem> {
        match &*self.reign.borrow() {
            Reign::Waiting(why) => Some(Problem::clone(why)),
            _ => None,
        }
    }

    fn away(&self, node: &str) -> Option<AwayView> {
        self.away_view(node)
    }

    fn last_error(&self, node: &str) -> Option<String> {
        self.reason(node)
    }
}
