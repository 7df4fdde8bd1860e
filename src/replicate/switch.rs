//! A planned change of the leader: everything is finished on all members, then the record of the new leader says that it leads, then everybody
//! else's. The proxy on the new leader's host, which waits for just that, takes over; this one waits from then on.
//!
//! The new leader's record is written first: if it says so and this node's does not, its proxy may begin and this one may not. Whoever is in doubt
//! begins a reign as if it had just started, and asks.

use std::sync::Arc;
use std::time::Duration;

use pgtandem_proto::membership::{MemberSet, NodeState};

use crate::agent::client::{ClientError, Control};
use crate::cluster::members;
use crate::cluster::start::Refusal;
use crate::crash::CrashPoint;
use crate::observe::status::Problem;
use crate::recovery::replication::{ReplicationError, ReplicationErrorKind as Kind};
use crate::replicate::hub::{Hub, Reign, store_on};
use crate::replicate::resolve;

/// How often the gate is tried.
const CLOSE_ATTEMPTS_MAX: usize = 6;
/// How long one agent may take to store the set while the gate is closed.
const STORE_MS_MAX: u64 = 2000;

fn wrong(what: String, hint: impl Into<String>) -> ReplicationError {
    ReplicationError::new(Kind::WrongNode, what, hint)
}

impl Hub {
    /// Makes `node` the leader, under the proxy of its own host. When this returns, this proxy serves nobody any more, unless it is that
    /// one; gives the new set.
    ///
    /// # Errors
    /// If nothing was changed. If it is not known whether it was, the reign ends, and the next one finds out.
    pub async fn switch_leader(&self, node: &str) -> Result<MemberSet, ReplicationError> {
        let _one_at_a_time = self.changing.lock().await;
        let set = self.view().set.clone();
        // One that took over leads through the proxy of another host, and may have its own instead.
        if set.leader == node && self.config.proxy.node == node {
            return Err(wrong(format!("{node} is the leader already"), "nothing needs to be done"));
        }
        if !members::contains(&set, node) {
            return Err(wrong(format!("{node} is not a member: it lacks writes"), format!("pgtandem recover {node}")));
        }
        if let Some(joining) = self.config.nodes.iter().find(|known| self.is_joining(&known.name)) {
            let what = format!("{} is just being recovered, and that would end", joining.name);
            return Err(wrong(what, "wait until it is a member, or pgtandem detach it"));
        }
        let next = members::led_by(&set, node).map_err(|e| wrong(e.to_string(), "pgtandem status"))?;
        let connect = |name: String| async move {
            let config = self.node(&name).map_err(|e| wrong(e.to_string(), "pgtandem status"))?;
            let control = Control::connect(&self.identity, config).await;
            let control = control.map_err(|e| ReplicationError::new(Kind::Node, e.to_string(), e.failure().hint))?;
            Ok::<_, ReplicationError>((name, control))
        };
        let (_, mut new_leader) = connect(node.to_owned()).await?;
        let mut others = Vec::new();
        for name in next.nodes.iter().filter(|name| *name != node) {
            others.push(connect(name.clone()).await?);
        }
        let own = self.leader_connection("postgres").await;
        let mut own = own.map_err(|e| ReplicationError::new(Kind::Leader, e.to_string(), "pgtandem status"))?;
        let closed = self.close_for_switch().await?;
        let stored = store_on(&mut new_leader, &next, NodeState::InSync, None, None);
        match tokio::time::timeout(Duration::from_millis(STORE_MS_MAX), stored).await {
            Ok(Ok(())) => CrashPoint::SwitchStored.reached(node),
            // It has said no: everything is as it was.
            Ok(Err(e @ (ClientError::Failed { .. } | ClientError::Refused { .. }))) => {
                return Err(ReplicationError::new(Kind::Record, e.to_string(), e.failure().hint));
            }
            failed => {
                self.reign.send_replace(Reign::Starting);
                let why = failed.map_or_else(
                    |_| "no answer in time".to_owned(),
                    |r| r.err().map_or_else(String::new, |e| e.to_string()),
                );
                let what = format!("it is not known whether {node} has stored that it leads: {why}");
                return Err(ReplicationError::new(Kind::Record, what, "pgtandem status, here and there"));
            }
        }
        if node == self.config.proxy.node {
            // Back to this host, after another one's PostgreSQL took over: this proxy goes on, and its sessions with it.
            self.leave_leader();
        } else {
            let refusal = Refusal::Elsewhere { node: self.config.proxy.node.clone(), proxy: node.to_owned() };
            let why = Problem { what: refusal.to_string(), hint: refusal.hint() };
            self.reign.send_replace(Reign::Waiting(Arc::new(why)));
        }
        for (name, control) in &mut others {
            let stored = store_on(control, &next, NodeState::InSync, None, None);
            if !matches!(tokio::time::timeout(Duration::from_millis(STORE_MS_MAX), stored).await, Ok(Ok(()))) {
                tracing::warn!(node = %name, "the record was not told of the new leader yet; its reign tells it");
            }
            CrashPoint::SwitchStored.reached(name);
        }
        // Nobody decides anything here any more, whatever becomes of the gate.
        if let Err(error) = resolve::end_sessions(&mut own).await {
            tracing::warn!(%error, "sessions of this reign are left; the next one ends them");
        }
        drop(closed);
        tracing::info!(node, "another node leads from here on");
        Ok(next)
    }

    async fn close_for_switch(&self) -> Result<crate::replicate::gate::Closed<'_>, ReplicationError> {
        let limit = Duration::from_millis(self.config.proxy.gate_ms_max);
        let mut attempt = 1;
        loop {
            match self.gate.close(limit).await {
                Ok(closed) => return Ok(closed),
                Err(error) if attempt >= CLOSE_ATTEMPTS_MAX => {
                    let hint = "a member is slow to finish commits; try again";
                    return Err(ReplicationError::new(Kind::Gate, error.to_string(), hint));
                }
                Err(_) => attempt += 1,
            }
        }
    }
}
