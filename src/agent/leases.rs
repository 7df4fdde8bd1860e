//! The shell around `cluster::lease` on the agent's side: asks over the channel that the proxy has opened, and writes into the record
//! when a lease has begun or ended.

use std::sync::PoisonError;
use std::time::{Duration, SystemTime};

use pgtandem_proto::message::{LeaseAsk, LeaseGrant, PostgresState};
use tokio::time::{MissedTickBehavior, interval, sleep};

use super::connection::{Connection, ConnectionError};
use super::node::Node;
use crate::cluster::lease;
use crate::cluster::lease::{ASK_MS, Lease};

/// How often it is looked whether the lease has ended, milliseconds.
const LOOK_MS: u64 = 100;

/// Milliseconds of a clock that goes on while the host is suspended: nobody wakes up and believes in an old lease.
#[must_use]
pub fn now_ms() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    let (seconds, nanoseconds) = (u64::try_from(now.tv_sec), u64::try_from(now.tv_nsec));
    seconds.unwrap_or(0) * 1000 + nanoseconds.unwrap_or(0) / 1_000_000
}

fn unix_seconds() -> u64 {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

impl Node {
    pub(super) fn with_lease<T>(&self, work: impl FnOnce(&mut Lease) -> T) -> T {
        work(&mut self.lease.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// How long the lease still runs.
    #[must_use]
    pub fn lease_ms(&self) -> Option<u64> {
        self.with_lease(|lease| lease.left_ms(now_ms()))
    }
}

/// Asks for leases until the connection ends.
pub(super) async fn serve(node: &Node, connection: Connection) -> Result<(), ConnectionError> {
    let (mut sender, mut receiver) = connection.split();
    let mut tick = interval(Duration::from_millis(ASK_MS));
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            _ = tick.tick() => {}
            // A set that was just stored needs its first grant.
            () = node.record_changed.notified() => {}
            grant = receiver.receive::<LeaseGrant>() => {
                let Some(grant) = grant? else { return Ok(()) };
                take(node, grant).await;
                continue;
            }
        }
        let number = node.with_lease(|lease| lease.ask(now_ms()));
        sender.send(&LeaseAsk { number }).await?;
    }
}

async fn take(node: &Node, grant: LeaseGrant) {
    let record = node.record();
    let runs = node.with_lease(|lease| lease.granted(now_ms(), &grant, &record));
    // Its data are vouched for only where they are in use.
    if !runs || node.postgres().state() != PostgresState::Running {
        return;
    }
    node.last_contact.store(unix_seconds(), std::sync::atomic::Ordering::Relaxed);
    if record.uncertain {
        let at = unix_seconds();
        let stored = node.change_record(move |record| {
            Ok(lease::vouched(record, grant.epoch, grant.version, at).unwrap_or_else(|| record.clone()))
        });
        if let Err(error) = stored.await {
            tracing::error!(%error, "it could not be stored that this node is current");
        }
    }
}

/// Looks whether the lease has ended, for as long as the agent runs.
pub(super) async fn watch(node: &Node) {
    loop {
        sleep(Duration::from_millis(LOOK_MS)).await;
        if node.lease_ms().is_some() || lease::doubted(&node.record(), None).is_none() {
            continue;
        }
        let at = Some(node.last_contact.load(std::sync::atomic::Ordering::Relaxed)).filter(|at| *at > 0);
        let stored = node.change_record(move |record| Ok(lease::doubted(record, at).unwrap_or_else(|| record.clone())));
        if let Err(error) = stored.await {
            tracing::error!(%error, "it could not be stored that this node may have been left behind");
        }
    }
}
