//! All recoveries of one proxy: at most one per node, each in a task of its own that outlives the command that asked.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::agents::Agents;
use super::core::Wishes;
use super::replication::Replication;
use super::report::Report;
use super::runner::{self, Stop};

/// Starts, joins, aborts and remembers recoveries.
///
/// Shared as an `Arc`. Remembers the last recovery of each configured node, so its size is that of the configuration.
#[derive(Debug)]
pub struct Recoveries<R, A> {
    replication: Arc<R>,
    agents: Arc<A>,
    nodes: Vec<String>,
    last: Mutex<HashMap<String, Last>>,
    tasks: TaskTracker,
    proxy: CancellationToken,
}

#[derive(Debug)]
struct Last {
    report: watch::Receiver<Report>,
    aborted: CancellationToken,
}

/// A recovery that was asked for.
#[derive(Clone, Debug)]
pub struct Started {
    pub report: watch::Receiver<Report>,
    /// It was under way already, and this is a second look at it.
    pub was_running: bool,
}

impl<R: Replication + 'static, A: Agents> Recoveries<R, A> {
    /// `proxy` ends all recoveries when the proxy stops.
    #[must_use]
    pub fn new(replication: Arc<R>, agents: Arc<A>, nodes: Vec<String>, proxy: CancellationToken) -> Self {
        Self { replication, agents, nodes, last: Mutex::default(), tasks: TaskTracker::new(), proxy }
    }

    #[must_use]
    pub fn replication(&self) -> &R {
        &self.replication
    }

    #[must_use]
    pub fn agents(&self) -> &Arc<A> {
        &self.agents
    }

    /// Names of the configured nodes, in the order of the configuration.
    #[must_use]
    pub fn nodes(&self) -> &[String] {
        &self.nodes
    }

    /// Starts a recovery of `node`, or joins the one that is under way. `None`: no such node is configured.
    #[must_use]
    pub fn start(&self, node: &str, wishes: Wishes) -> Option<Started> {
        if !self.nodes.iter().any(|known| known == node) {
            return None;
        }
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(running) = last.get(node).filter(|last| is_running(&last.report)) {
            return Some(Started { report: running.report.clone(), was_running: true });
        }
        let (published, report) = watch::channel(Report::new());
        let stop = Stop { aborted: CancellationToken::new(), proxy: self.proxy.clone() };
        last.insert(node.into(), Last { report: report.clone(), aborted: stop.aborted.clone() });
        let (replication, agents, node) = (self.replication.clone(), self.agents.clone(), node.to_owned());
        self.tasks.spawn(async move {
            runner::run(&*replication, &*agents, &node, wishes, &published, &stop).await;
        });
        Some(Started { report, was_running: false })
    }

    /// The last recovery of a node, under way or ended.
    #[must_use]
    pub fn report(&self, node: &str) -> Option<Report> {
        let last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        last.get(node).map(|last| last.report.borrow().clone())
    }

    /// Asks a recovery that is under way to end; the receiver tells when it has. `None`: there is none.
    #[must_use]
    pub fn abort(&self, node: &str) -> Option<watch::Receiver<Report>> {
        let last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        let running = last.get(node).filter(|last| is_running(&last.report))?;
        running.aborted.cancel();
        Some(running.report.clone())
    }

    /// Waits until every recovery has cleaned up, after `proxy` was cancelled.
    pub async fn ended(&self) {
        self.tasks.close();
        self.tasks.wait().await;
    }
}

/// A task that is gone without a last word does not run either.
fn is_running(report: &watch::Receiver<Report>) -> bool {
    !report.borrow().ended && report.has_changed().is_ok()
}
