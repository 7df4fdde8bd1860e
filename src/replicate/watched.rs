//! A state that tasks wait for until it lets them go on.

use std::sync::{Mutex, MutexGuard, PoisonError};

use tokio::sync::Notify;

#[derive(Debug, Default)]
pub(super) struct Watched<S> {
    state: Mutex<S>,
    changed: Notify,
}

impl<S> Watched<S> {
    /// The state as it is; a change of it wakes nobody.
    pub(super) fn lock(&self) -> MutexGuard<'_, S> {
        // The state is consistent between statements, so a panic elsewhere does not spoil it.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until `ready` gives a value for the state, without losing a wake-up. What it changes wakes nobody.
    pub(super) async fn wait_for<T>(&self, mut ready: impl FnMut(&mut S) -> Option<T>) -> T {
        loop {
            let notified = self.changed.notified();
            tokio::pin!(notified);
            notified.as_mut().enable();
            if let Some(value) = ready(&mut self.lock()) {
                return value;
            }
            notified.await;
        }
    }

    /// Changes the state and wakes all that wait for it.
    pub(super) fn change<T>(&self, change: impl FnOnce(&mut S) -> T) -> T {
        let changed = change(&mut self.lock());
        self.changed.notify_waiters();
        changed
    }
}
