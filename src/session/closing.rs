//! The gate, closed for one attempt of a statement, for at most `proxy.gate_ms_max`: whoever is slow, the leader, a follower or the
//! network, the commits of others go on then.

use std::time::{Duration, Instant};

use crate::replicate::gate::{Closed, Gate, GateTimeout};

/// The gate of one attempt. Where no follower takes part it need not be closed.
#[derive(Debug)]
pub(super) struct Closing<'g> {
    closed: Option<Closed<'g>>,
    /// It opened before the work was done.
    is_over: bool,
    gate_ms: u64,
    opens: Instant,
}

impl<'g> Closing<'g> {
    /// Closes the gate. What passed it before may take half of the time to be finished.
    pub async fn close(gate: &'g Gate, gate_ms: u64) -> Result<Self, GateTimeout> {
        let closed = gate.close(Duration::from_millis((gate_ms / 2).max(1))).await?;
        let opens = closed.since() + Duration::from_millis(gate_ms);
        Ok(Self { closed: Some(closed), is_over: false, gate_ms, opens })
    }

    pub fn not_needed(gate_ms: u64) -> Self {
        Self { closed: None, is_over: false, gate_ms, opens: Instant::now() }
    }

    pub fn is_closed(&self) -> bool {
        self.closed.is_some()
    }

    /// The gate had to open while something was under way, so others may have committed: what was done must be undone.
    pub fn is_over(&self) -> bool {
        self.is_over
    }

    pub fn open(&mut self) {
        self.closed = None;
    }

    /// Goes on with the work to its end, because a session's messages can not be left half answered; but opens the gate when its
    /// time is over.
    pub async fn run<T>(&mut self, work: impl Future<Output = T>) -> T {
        let mut work = std::pin::pin!(work);
        if self.closed.is_some() {
            if let Ok(done) = tokio::time::timeout_at(self.opens.into(), &mut work).await {
                return done;
            }
            self.closed = None;
            self.is_over = true;
        }
        work.await
    }

    fn left_ms(&self) -> u64 {
        if self.closed.is_none() {
            return self.gate_ms;
        }
        u64::try_from(self.opens.saturating_duration_since(Instant::now()).as_millis()).unwrap_or(u64::MAX)
    }

    /// The network's share of the time of a follower: its way there and back.
    fn way_ms(&self) -> u64 {
        self.gate_ms / 5
    }

    /// How long the statement may take on the leader: followers need as long, and their way.
    pub fn leader_ms(&self) -> u64 {
        (self.left_ms().saturating_sub(self.way_ms() + self.gate_ms / 10) / 2).max(1)
    }

    /// How long a follower may take to answer: the rest is for the gate to open by itself no more.
    pub fn answer_ms(&self) -> u64 {
        self.left_ms().saturating_sub(self.gate_ms / 10)
    }

    /// How long the statement may take on a follower's server. `None`: there is no time left to ask it.
    pub fn server_ms(&self) -> Option<u64> {
        self.answer_ms().checked_sub(self.way_ms()).filter(|ms| *ms > 0)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    #[tokio::test]
    async fn the_gate_opens_by_itself_and_the_work_is_done_to_its_end() {
        let gate = Arc::new(Gate::default());
        let mut closing = Closing::close(&gate, 30).await.unwrap();
        assert!(closing.is_closed() && !closing.is_over());
        // Ends only when the gate is open again.
        let pass = closing.run(gate.pass()).await;
        assert!(closing.is_over() && !closing.is_closed());
        drop(pass);
        closing.run(async {}).await;
    }

    #[tokio::test]
    async fn all_shares_together_are_not_more_than_the_time() {
        let gate = Gate::default();
        let closing = Closing::close(&gate, 60_000).await.unwrap();
        let (leader_ms, server_ms) = (closing.leader_ms(), closing.server_ms().unwrap());
        assert!(leader_ms <= server_ms - leader_ms, "a follower has as long as the leader");
        assert!(server_ms + closing.way_ms() <= closing.answer_ms() && closing.answer_ms() < 60_000);
    }
}
