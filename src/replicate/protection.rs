//! Mode `protection`: no write is acknowledged on fewer nodes than before unless a person says so.
//!
//! A follower that is lost stays a member, and commits wait for it. `pgtandem detach` takes it out, and they go on. If it answers again and
//! something was not finished there, the reign ends, and the next one resolves what is in doubt with all members, as after a crash.

use std::collections::BTreeMap;
use std::sync::atomic::Ordering;
use std::sync::{Mutex, PoisonError};

use pgtandem_proto::membership::NodeState;

use crate::config::Mode;
use crate::replicate::hub::{Follower, Hub, HubError};

/// Members for which commits wait, and why: until a person decides, or for the moment in which they leave.
#[derive(Debug, Default)]
pub struct Missing(Mutex<BTreeMap<String, String>>);

impl Missing {
    pub fn note(&self, node: &str, why: &str) {
        self.lock().insert(node.to_owned(), why.to_owned());
    }

    pub fn clear(&self, node: &str) {
        self.lock().remove(node);
    }

    #[must_use]
    pub fn list(&self) -> Vec<(String, String)> {
        self.lock().iter().map(|(node, why)| (node.clone(), why.clone())).collect()
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, BTreeMap<String, String>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One of them, until this is dropped.
#[derive(Debug)]
pub struct Listed<'a> {
    list: &'a Missing,
    node: String,
}

impl Missing {
    #[must_use]
    pub fn listed(&self, node: &str, why: &str) -> Listed<'_> {
        self.note(node, why);
        Listed { list: self, node: node.to_owned() }
    }
}

impl Drop for Listed<'_> {
    fn drop(&mut self) {
        self.list.clear(&self.node);
    }
}

impl Hub {
    #[must_use]
    pub fn protects(&self) -> bool {
        self.config.cluster.mode == Mode::Protection
    }

    /// Returns when a person has taken the follower out, or its epoch is over; nothing else ends this wait, because the half may be prepared
    /// there: nobody can be told that it failed.
    ///
    /// # Errors
    /// If the follower refused its half, so that it is not prepared there.
    pub(super) async fn hold(&self, follower: &Follower, state: NodeState, reason: &str) -> Result<(), HubError> {
        let node = &follower.node.name;
        if state == NodeState::Suspect {
            return Err(HubError::Protected { node: node.clone(), reason: reason.to_owned() });
        }
        if !follower.gone.is_cancelled() {
            tracing::warn!(node, reason, "commits wait for a member: the mode is protection");
            self.missing.note(node, reason);
            follower.is_hurt.store(true, Ordering::Release);
        }
        follower.gone.cancelled().await;
        Ok(())
    }
}
