//! Work that a cut must not fall into: it can not be applied again from an effect list, so for a node that joins it is either
//! before the cut or does not exist.
//!
//! Whoever does such work holds an [`Uncut`]; a recovery holds a [`Cutting`] from its cut to its join. Each waits for the other, with a
//! limit: work that is under way keeps the cut waiting, and from the cut to the join none begins.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::Notify;

#[derive(Debug, Default)]
pub struct Cuts {
    state: Mutex<State>,
    changed: Notify,
}

#[derive(Debug, Default)]
struct State {
    uncut: usize,
    cutting: usize,
    /// Work that waits for a join: the next cut does not overtake it, or several recoveries would keep it waiting one after the other.
    waiting: usize,
    /// Work that was ever begun: none of it is in a backlog.
    begun: u64,
}

/// Held by work that a cut must not fall into, to its end.
#[derive(Debug)]
pub struct Uncut(Arc<Cuts>);

/// Held by a recovery from its cut to its join, or to its end.
#[derive(Debug)]
pub struct Cutting(Arc<Cuts>);

/// Held by work that waits to be begun.
struct Waiting<'a>(&'a Cuts);

impl Cuts {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn wait_for(&self, mut ready: impl FnMut(&mut State) -> bool) {
        loop {
            let notified = self.changed.notified();
            tokio::pin!(notified);
            notified.as_mut().enable();
            if ready(&mut self.state()) {
                return;
            }
            notified.await;
        }
    }

    /// Begins work, once no recovery is between its cut and its join. `None`: that took longer than `limit`.
    pub async fn begin(self: &Arc<Self>, limit: Duration) -> Option<Uncut> {
        self.state().waiting += 1;
        let _waiting = Waiting(self);
        let begun = self.wait_for(|state| {
            let free = state.cutting == 0;
            state.uncut += usize::from(free);
            state.begun += u64::from(free);
            free
        });
        tokio::time::timeout(limit, begun).await.ok()?;
        Some(Uncut(Arc::clone(self)))
    }

    /// How much work was ever begun, and whether none is under way.
    #[must_use]
    pub fn begun(&self) -> (u64, bool) {
        let state = self.state();
        (state.begun, state.uncut == 0)
    }

    /// Keeps new work out, and waits for what is under way, and for what waits for the join of another node. `None`: that took longer
    /// than `limit`, and work may begin again.
    pub async fn cut(self: &Arc<Self>, limit: Duration) -> Option<Cutting> {
        let cut = async {
            let entered = self.wait_for(|state| {
                let free = state.waiting == 0;
                state.cutting += usize::from(free);
                free
            });
            entered.await;
            let cutting = Cutting(Arc::clone(self));
            self.wait_for(|state| state.uncut == 0).await;
            cutting
        };
        tokio::time::timeout(limit, cut).await.ok()
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.state().waiting -= 1;
        self.0.changed.notify_waiters();
    }
}

impl Drop for Uncut {
    fn drop(&mut self) {
        self.0.state().uncut -= 1;
        self.0.changed.notify_waiters();
    }
}

impl Drop for Cutting {
    fn drop(&mut self) {
        self.0.state().cutting -= 1;
        self.0.changed.notify_waiters();
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;

    use super::*;

    const LONG: Duration = Duration::from_secs(20);
    const SHORT: Duration = Duration::from_millis(5);

    #[tokio::test]
    async fn a_cut_waits_for_work_and_work_waits_for_the_join() {
        let cuts = Arc::new(Cuts::default());
        assert_eq!(cuts.begun(), (0, true));
        let first = cuts.begin(LONG).await.unwrap();
        assert_eq!(cuts.begun(), (1, false));
        let mut cutting = Box::pin(cuts.cut(LONG));
        assert!((&mut cutting).now_or_never().is_none());
        let mut second = Box::pin(cuts.begin(LONG));
        assert!((&mut second).now_or_never().is_none(), "a cut that waits is not overtaken");
        drop(first);
        let joining = cutting.await.unwrap();
        assert!((&mut second).now_or_never().is_none());
        drop(joining);
        assert!(second.await.is_some());
    }

    #[tokio::test]
    async fn several_cuts_do_not_keep_work_waiting_one_after_the_other() {
        let cuts = Arc::new(Cuts::default());
        let first = cuts.cut(LONG).await.unwrap();
        let second = cuts.cut(LONG).await.unwrap();
        let mut work = Box::pin(cuts.begin(LONG));
        assert!((&mut work).now_or_never().is_none());
        let mut third = Box::pin(cuts.cut(LONG));
        assert!((&mut third).now_or_never().is_none(), "work waits already");
        drop(first);
        assert!((&mut third).now_or_never().is_none() && (&mut work).now_or_never().is_none());
        drop(second);
        // Whichever of the two looks first.
        assert!((&mut third).now_or_never().is_none());
        let begun = work.await.unwrap();
        assert!((&mut third).now_or_never().is_none());
        drop(begun);
        third.await.unwrap();
        // Nobody waits for work that has stopped waiting.
        let cutting = cuts.cut(LONG).await.unwrap();
        assert!(cuts.begin(SHORT).await.is_none());
        drop(cuts.cut(LONG).await.unwrap());
        drop(cutting);
    }

    #[tokio::test]
    async fn a_cut_that_gave_up_lets_work_begin() {
        let cuts = Arc::new(Cuts::default());
        let open = cuts.begin(LONG).await.unwrap();
        assert!(cuts.cut(SHORT).await.is_none());
        drop(cuts.begin(LONG).await.unwrap());
        drop(open);
        let cutting = cuts.cut(LONG).await.unwrap();
        assert!(cuts.begin(SHORT).await.is_none());
        drop(cutting);
    }
}
