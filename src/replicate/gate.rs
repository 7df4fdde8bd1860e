//! The gate: lets commits through; closed for a few milliseconds when all nodes must agree on one point.
//!
//! A commit passes before the leader's COMMIT is sent and leaves when every follower has finished it. Closing waits
//! until all that passed have left. Reads, statements and PREPAREs do not pass the gate.
//!
//! Passes carry numbers in the order of sending. A [`Gate::barrier`] waits for all that passed before a number:
//! half-committed transactions are the only reason why a follower may not yet hold what the leader showed.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use tokio::sync::{Semaphore, SemaphorePermit};

use super::watched::Watched;

#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("the gate did not close within {0:?}: commits that passed it are not finished on every member")]
pub struct GateTimeout(pub Duration);

#[derive(Debug)]
pub struct Gate {
    state: Watched<State>,
    /// One closer at a time.
    closers: Semaphore,
}

#[derive(Debug, Default)]
struct State {
    closed: bool,
    next: u64,
    /// Numbers of the commits that passed and are not finished everywhere.
    inside: BTreeSet<u64>,
    stats: GateStats,
}

#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct GateStats {
    pub closed_count: u64,
    pub closed_ms_max: f64,
}

/// One commit inside the gate. Dropped when it is finished on every member, or the member left.
#[derive(Debug)]
pub struct Pass {
    gate: Arc<Gate>,
    pub number: u64,
}

/// The closed gate; dropping it opens.
#[derive(Debug)]
pub struct Closed<'a> {
    gate: &'a Gate,
    since: Instant,
    since_clock: SystemTime,
    _turn: SemaphorePermit<'a>,
}

impl Default for Gate {
    fn default() -> Self {
        Self { state: Watched::default(), closers: Semaphore::new(1) }
    }
}

impl Gate {
    /// Waits until the gate is open and enters it.
    pub async fn pass(self: &Arc<Self>) -> Pass {
        let number = self.state.wait_for(|s| (!s.closed).then(|| s.enter())).await;
        Pass { gate: Arc::clone(self), number }
    }

    /// Enters the gate although it is closed: for the one who closed it.
    #[must_use]
    pub fn pass_closed(self: &Arc<Self>, _closed: &Closed<'_>) -> Pass {
        Pass { gate: Arc::clone(self), number: self.state.lock().enter() }
    }

    /// The number that the next commit will get: everything sent so far is below it.
    #[must_use]
    pub fn next_number(&self) -> u64 {
        self.state.lock().next
    }

    /// Waits until all commits with numbers below `number` are finished on every member.
    pub async fn barrier(&self, number: u64) {
        self.state.wait_for(|s| s.inside.first().is_none_or(|first| *first >= number).then_some(())).await;
    }

    /// Closes the gate and waits until all that passed are finished.
    ///
    /// # Errors
    /// If that takes longer than `limit`; the gate is open again.
    pub async fn close(&self, limit: Duration) -> Result<Closed<'_>, GateTimeout> {
        let attempt = async {
            // The semaphore is never closed, so acquiring can not fail.
            let turn = self.closers.acquire().await.map_err(|_| GateTimeout(limit))?;
            let closed = Closed { gate: self, since: Instant::now(), since_clock: SystemTime::now(), _turn: turn };
            self.state.lock().closed = true;
            self.state.wait_for(|s| s.inside.is_empty().then_some(())).await;
            Ok(closed)
        };
        tokio::time::timeout(limit, attempt).await.unwrap_or(Err(GateTimeout(limit)))
    }

    #[must_use]
    pub fn stats(&self) -> GateStats {
        self.state.lock().stats
    }
}

impl State {
    fn enter(&mut self) -> u64 {
        let number = self.next;
        self.next += 1;
        self.inside.insert(number);
        number
    }
}

impl Closed<'_> {
    /// When the gate began to close, microseconds since 1970 by this host's clock.
    #[must_use]
    pub fn closed_unix_us(&self) -> u64 {
        let since = self.since_clock.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        u64::try_from(since.as_micros()).unwrap_or(u64::MAX)
    }

    /// When it began to close.
    #[must_use]
    pub fn since(&self) -> Instant {
        self.since
    }

    /// For how long the gate has been closed, milliseconds.
    #[must_use]
    pub fn closed_ms(&self) -> f64 {
        self.since.elapsed().as_secs_f64() * 1000.0
    }
}

impl Drop for Pass {
    fn drop(&mut self) {
        self.gate.state.change(|state| state.inside.remove(&self.number));
    }
}

impl Drop for Closed<'_> {
    fn drop(&mut self) {
        let closed_ms = self.closed_ms();
        self.gate.state.change(|state| {
            state.closed = false;
            state.stats.closed_count += 1;
            state.stats.closed_ms_max = state.stats.closed_ms_max.max(closed_ms);
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LONG: Duration = Duration::from_secs(20);

    #[tokio::test]
    async fn closing_waits_for_what_passed_and_keeps_out_what_comes() {
        let gate = Arc::new(Gate::default());
        let pass = gate.pass().await;
        let mut closing = Box::pin(gate.close(LONG));
        assert!(futures_util::FutureExt::now_or_never(&mut closing).is_none());
        let mut second = Box::pin(gate.pass());
        assert!(futures_util::FutureExt::now_or_never(&mut second).is_none());
        drop(pass);
        let closed = closing.await.unwrap();
        assert!(futures_util::FutureExt::now_or_never(&mut second).is_none());
        drop(closed);
        assert_eq!(second.await.number, 1);
    }

    #[tokio::test]
    async fn a_gate_that_can_not_close_is_open_again() {
        let gate = Arc::new(Gate::default());
        let pass = gate.pass().await;
        assert!(gate.close(Duration::from_millis(5)).await.is_err());
        drop(gate.pass().await);
        drop(pass);
        gate.close(LONG).await.unwrap();
        assert_eq!(gate.stats().closed_count, 2);
    }

    #[tokio::test]
    async fn a_barrier_waits_only_for_what_was_sent_before() {
        let gate = Arc::new(Gate::default());
        let first = gate.pass().await;
        let number = gate.next_number();
        let _later = gate.pass().await;
        let mut barrier = Box::pin(gate.barrier(number));
        assert!(futures_util::FutureExt::now_or_never(&mut barrier).is_none());
        drop(first);
        barrier.await;
    }
}
