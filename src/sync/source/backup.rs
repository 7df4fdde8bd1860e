//! A backup as all of its channels see it: what is copied, how fast, and what was found damaged.
//!
//! The channel that began it owns it: with that one it ends, for the others, too.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use pgtandem_proto::message::{DAMAGED_NAMED_MAX, FileEntry, Lsn};
use tokio::time::Instant;
use tokio_util::sync::{CancellationToken, DropGuard};

/// What is read ahead of the limit after a pause, milliseconds' worth.
const BURST_MS: u64 = 200;

/// The node that a backup is for, and where it begins, which is another position for each (`do_pg_backup_start` in `xlog.c`).
type Key = (String, Lsn);

/// The backups that this node serves. A node may have several for a moment: an attempt that it has given up can begin here after the next one.
#[derive(Clone, Debug, Default)]
pub struct Backups(Arc<Mutex<HashMap<Key, Arc<Backup>>>>);

/// One backup.
#[derive(Debug)]
pub struct Backup {
    pub pgdata: PathBuf,
    pub table: Vec<FileEntry>,
    pub start: Lsn,
    /// Whether pages have checksums.
    pub checksums: bool,
    pub throttle: Throttle,
    /// Channels that work for it now.
    pub channels: AtomicUsize,
    damaged: Mutex<Vec<String>>,
    damaged_count: AtomicU64,
    ended: CancellationToken,
}

/// Ends the backup when it is dropped.
pub struct Owned {
    pub backup: Arc<Backup>,
    key: Key,
    backups: Backups,
    _end: DropGuard,
}

impl Backups {
    /// Makes it known to channels of `peer` that will attach.
    #[must_use]
    pub fn begin(&self, peer: &str, backup: Backup) -> Owned {
        let backup = Arc::new(backup);
        let key = (peer.to_owned(), backup.start);
        self.lock().insert(key.clone(), Arc::clone(&backup));
        let end = backup.ended.clone().drop_guard();
        Owned { backup, key, backups: self.clone(), _end: end }
    }

    /// The backup that `peer` began at `start`, if it goes on.
    #[must_use]
    pub fn find(&self, peer: &str, start: Lsn) -> Option<Arc<Backup>> {
        self.lock().get(&(peer.to_owned(), start)).filter(|backup| !backup.ended.is_cancelled()).cloned()
    }

    /// What is read for `peer` is at most so much in a second from now on; 0: as much as the configuration lets.
    pub fn pace(&self, peer: &str, bytes_per_s_max: u64) {
        for (_, backup) in self.lock().iter().filter(|((node, _), _)| node == peer) {
            backup.throttle.paced.store(bytes_per_s_max, Ordering::Relaxed);
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<Key, Arc<Backup>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Owned {
    fn drop(&mut self) {
        self.backups.lock().remove(&self.key);
    }
}

impl Backup {
    #[must_use]
    pub fn new(pgdata: PathBuf, table: Vec<FileEntry>, start: Lsn, checksums: bool, bytes_per_s_max: u64) -> Backup {
        Backup {
            pgdata,
            table,
            start,
            checksums,
            throttle: Throttle::new(bytes_per_s_max),
            channels: AtomicUsize::new(0),
            damaged: Mutex::default(),
            damaged_count: AtomicU64::new(0),
            ended: CancellationToken::new(),
        }
    }

    /// Returns when the channel that owns it has ended.
    pub async fn ended(&self) {
        self.ended.cancelled().await;
    }

    /// Notes a page whose checksum was wrong in every read.
    pub fn damage(&self, path: &str, block: u32) {
        tracing::error!(path, block, "a page of this server has a wrong checksum; it is copied as it is");
        self.damaged_count.fetch_add(1, Ordering::Relaxed);
        let mut damaged = self.damaged.lock().unwrap_or_else(PoisonError::into_inner);
        if damaged.len() < DAMAGED_NAMED_MAX {
            damaged.push(format!("{path}, block {block}"));
        }
    }

    /// Some of the damaged pages, and how many there are.
    #[must_use]
    pub fn damaged(&self) -> (Vec<String>, u64) {
        let named = self.damaged.lock().unwrap_or_else(PoisonError::into_inner).clone();
        (named, self.damaged_count.load(Ordering::Relaxed))
    }
}

/// Lets so many bytes pass in a second, over all channels of a backup.
#[derive(Debug)]
pub struct Throttle {
    /// 0: no limit.
    bytes_per_s_max: u64,
    /// A lower limit for the time being; 0: none.
    paced: AtomicU64,
    /// When the next bytes are due.
    due: Mutex<Instant>,
}

impl Throttle {
    fn new(bytes_per_s_max: u64) -> Throttle {
        Throttle { bytes_per_s_max, paced: AtomicU64::new(0), due: Mutex::new(Instant::now()) }
    }

    /// Waits until `bytes` more may be read.
    pub async fn pass(&self, bytes: u64) {
        if let Some(due) = self.reserve(bytes, Instant::now()) {
            tokio::time::sleep_until(due).await;
        }
    }

    fn reserve(&self, bytes: u64, now: Instant) -> Option<Instant> {
        let limits = [self.bytes_per_s_max, self.paced.load(Ordering::Relaxed)];
        let bytes_per_s_max = limits.into_iter().filter(|limit| *limit > 0).min()?;
        let takes = Duration::from_secs_f64(bytes as f64 / bytes_per_s_max as f64);
        let mut due = self.due.lock().unwrap_or_else(PoisonError::into_inner);
        let earliest = now.checked_sub(Duration::from_millis(BURST_MS)).unwrap_or(now);
        let mine = (*due).max(earliest);
        *due = mine + takes;
        Some(mine)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_throttle_lets_no_more_pass_than_its_limit_whoever_asks() {
        let (throttle, now) = (Throttle::new(1 << 20), Instant::now());
        let mut last = now;
        for _ in 0..10 {
            last = throttle.reserve(1 << 20, now).unwrap();
        }
        assert!(last >= now + Duration::from_millis(8500), "ten seconds' worth, the last of it at its beginning");
        assert_eq!(Throttle::new(0).reserve(1 << 40, now), None);
        // The lower one of two limits counts, and none is left behind.
        for (configured, paced) in [(0, 5), (9, 5), (5, 9), (5, 0)] {
            let throttle = Throttle::new(configured << 20);
            throttle.paced.store(paced << 20, Ordering::Relaxed);
            let first = throttle.reserve(10 << 20, now).unwrap();
            let next = throttle.reserve(1, now).unwrap() - first;
            assert!((next.as_secs_f64() - 2.0).abs() < 0.01, "{next:?}");
        }
    }

    #[test]
    fn a_backup_is_found_until_its_owner_ends() {
        let backups = Backups::default();
        let make = |start| Backup::new(PathBuf::new(), Vec::new(), Lsn(start), true, 0);
        let first = backups.begin("b", make(1));
        assert!(backups.find("b", Lsn(1)).is_some() && backups.find("c", Lsn(1)).is_none());
        let second = backups.begin("b", make(3));
        drop(first);
        assert!(backups.find("b", Lsn(1)).is_none() && backups.find("b", Lsn(3)).is_some());
        // Of an attempt that was given up before it had begun.
        let late = backups.begin("b", make(2));
        assert!(backups.find("b", Lsn(3)).is_some(), "the attempt that goes on keeps its backup");
        drop(late);
        assert!(backups.find("b", Lsn(2)).is_none() && backups.find("b", Lsn(3)).is_some());
        drop(second);
        assert!(backups.find("b", Lsn(3)).is_none());
    }
}
