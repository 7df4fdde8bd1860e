//! The one recovery of this node that may be under way, and who owns it.
//!
//! It is owned by the control connection that asked for it: when that ends before the node became a member, the
//! recovery is aborted. The record stays as it is (Seeding, `CatchingUp`), and PostgreSQL is stopped. A newer epoch
//! aborts it, too. What is done in a recovery is `sync::target`.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use pgtandem_proto::membership::Epoch;
use pgtandem_proto::message::{Failure, FailureCode, Progress};
use tokio::sync::{Mutex as AsyncMutex, watch};
use tokio_util::sync::CancellationToken;

use crate::sync::target::{Source, Target};

/// A recovery under way.
#[derive(Clone)]
pub struct Running {
    pub epoch: Epoch,
    /// Number of the control connection.
    owner: u64,
    /// Node that is copied from.
    pub source: String,
    pub channels: Arc<dyn Source>,
    pub progress: watch::Receiver<Progress>,
    /// Ends its work and its connection.
    pub cancel: CancellationToken,
    pub target: Arc<AsyncMutex<Target>>,
}

#[derive(Default)]
pub struct RecoverySlot {
    running: Mutex<Option<Running>>,
}

impl RecoverySlot {
    /// Takes the slot for the connection `owner`, or gives back what it has taken already.
    pub fn begin(
        &self,
        owner: u64,
        epoch: Epoch,
        source: &str,
        channels: Arc<dyn Source>,
        target: Target,
    ) -> Result<Running, Failure> {
        let mut slot = self.lock();
        if let Some(running) = slot.as_ref() {
            if running.owner == owner && running.epoch == epoch && running.source == source {
                return Ok(running.clone());
            }
            return Err(Failure {
                code: FailureCode::WrongState,
                what: format!(
                    "another recovery of this node, from {} in epoch {}, is under way or just being ended",
                    running.source, running.epoch
                ),
                hint: "wait for its end; see pgtandem status".to_owned(),
            });
        }
        let running = Running {
            epoch,
            owner,
            source: source.to_owned(),
            channels,
            progress: target.progress(),
            cancel: CancellationToken::new(),
            target: Arc::new(AsyncMutex::new(target)),
        };
        *slot = Some(running.clone());
        Ok(running)
    }

    /// The recovery of this connection.
    pub fn of(&self, owner: u64) -> Result<Running, Failure> {
        self.lock().as_ref().filter(|running| running.owner == owner).cloned().ok_or_else(|| Failure {
            code: FailureCode::WrongState,
            what: "no recovery was begun on this connection, or it was ended by a newer epoch".to_owned(),
            hint: "start again: pgtandem recover NODE".to_owned(),
        })
    }

    /// Cancelled when the recovery of this connection must end; never, if it has none.
    #[must_use]
    pub fn cancel_of(&self, owner: u64) -> CancellationToken {
        self.of(owner).map_or_else(|_| CancellationToken::new(), |running| running.cancel)
    }

    /// Tells a recovery of an epoch below `epoch` to end.
    pub fn cancel_below(&self, epoch: Epoch) {
        if let Some(running) = self.lock().as_ref().filter(|running| running.epoch < epoch) {
            running.cancel.cancel();
        }
    }

    /// The node became a member: nothing is left to abort.
    pub fn finish(&self) {
        *self.lock() = None;
    }

    /// How far the recovery under way is; None if there is none.
    #[must_use]
    pub fn progress(&self) -> Option<Progress> {
        self.lock().as_ref().map(|running| *running.progress.borrow())
    }

    fn lock(&self) -> MutexGuard<'_, Option<Running>> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
