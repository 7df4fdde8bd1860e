//! Requests to cancel that are on their way to the leader, and the keys of sessions that have moved.
//!
//! A request is done when the server closes its connection. Until then it may still signal: `PostgreSQL`'s postmaster signals a
//! backend twice, itself and its process group (`signal_child` in `postmaster.c`, versions 13 to 17), and the backend can have told the
//! error before the second. So a session sends no statement while a request for it is on its way.

use std::collections::HashMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use bytes::Bytes;
use tokio::sync::Notify;

use crate::replicate::hub::lock;

#[derive(Debug, Default)]
pub struct Cancels {
    /// What clients were told at their start, and what holds now.
    moved: Mutex<HashMap<Bytes, Bytes>>,
    /// How many requests are on their way for a session, by the key that its client was told.
    under_way: Mutex<HashMap<Bytes, usize>>,
    /// All of them: a session looks at this before each message.
    count: AtomicUsize,
    one_ended: Notify,
}

/// A request on its way; dropped when it is done or given up.
#[derive(Debug)]
pub struct UnderWay<'a> {
    cancels: &'a Cancels,
    told: Bytes,
}

impl Cancels {
    /// A session that can be cancelled by `told`, as its client was told, can be by `now` from here on; `None`: it has ended.
    pub fn move_key(&self, told: &Bytes, now: Option<Bytes>) {
        let mut moved = lock(&self.moved);
        match now {
            Some(now) => drop(moved.insert(told.clone(), now)),
            None => drop(moved.remove(told)),
        }
    }

    /// The key that holds now.
    #[must_use]
    pub fn key_of(&self, told: &Bytes) -> Bytes {
        lock(&self.moved).get(told).unwrap_or(told).clone()
    }

    /// A request has come.
    pub fn begin(&self, told: &Bytes) -> UnderWay<'_> {
        *lock(&self.under_way).entry(told.clone()).or_default() += 1;
        self.count.fetch_add(1, Ordering::AcqRel);
        UnderWay { cancels: self, told: told.clone() }
    }

    /// Returns when none is on its way for this session: at once as a rule, else in the time that a request has.
    pub async fn none_for(&self, told: &Bytes) {
        while self.count.load(Ordering::Acquire) > 0 {
            let ended = self.one_ended.notified();
            tokio::pin!(ended);
            // One that ends between the look and the wait is not missed.
            ended.as_mut().enable();
            if !lock(&self.under_way).contains_key(told) {
                return;
            }
            ended.await;
        }
    }
}

impl Drop for UnderWay<'_> {
    fn drop(&mut self) {
        let mut under_way = lock(&self.cancels.under_way);
        if let Some(requests) = under_way.get_mut(&self.told) {
            *requests -= 1;
            if *requests == 0 {
                under_way.remove(&self.told);
            }
        }
        drop(under_way);
        self.cancels.count.fetch_sub(1, Ordering::AcqRel);
        self.cancels.one_ended.notify_waiters();
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;

    use super::*;

    #[test]
    fn a_session_waits_for_its_own_requests() {
        let cancels = Cancels::default();
        let (mine, other) = (Bytes::from_static(b"mine"), Bytes::from_static(b"other"));
        assert!(cancels.none_for(&mine).now_or_never().is_some());
        let first = cancels.begin(&mine);
        let second = cancels.begin(&mine);
        assert!(cancels.none_for(&other).now_or_never().is_some());
        let mut waits = Box::pin(cancels.none_for(&mine));
        assert!(waits.as_mut().now_or_never().is_none());
        drop(first);
        assert!(waits.as_mut().now_or_never().is_none(), "one of two is still on its way");
        drop(second);
        assert!(waits.as_mut().now_or_never().is_some());
        assert!(lock(&cancels.under_way).is_empty());
    }

    #[test]
    fn a_session_that_has_moved_is_another_backend() {
        let cancels = Cancels::default();
        let (told, now) = (Bytes::from_static(b"told"), Bytes::from_static(b"now"));
        assert_eq!(cancels.key_of(&told), told);
        cancels.move_key(&told, Some(now.clone()));
        assert_eq!(cancels.key_of(&told), now);
        cancels.move_key(&told, None);
        assert_eq!(cancels.key_of(&told), told);
    }
}
