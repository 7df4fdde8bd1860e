//! The backlog: the effects of committed transactions, in the order of sending, for a node that is joining.
//!
//! An entry is put in before the leader's COMMIT is sent, because that is the order that counts, and settled when the
//! leader has answered. In memory; past its limit the recovery fails and the node stays out: clients never pay.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::replicate::cuts::Cutting;
use crate::replicate::effects::EffectLog;
use crate::replicate::exclusion::Cut;
use crate::replicate::flight::Decision;

/// Transactions that one batch of the applier holds at most.
pub const BATCH_MAX: usize = 100;
/// Memory that an entry costs besides its data.
const ENTRY_BYTES: u64 = 1024;

const PENDING: u8 = 0;
const COMMITTED: u8 = 1;
const DROPPED: u8 = 2;
const UNKNOWN: u8 = 3;

/// One transaction. Its effects may still turn out to be rolled back.
#[derive(Debug)]
pub struct Entry {
    pub database: Arc<str>,
    pub log: Arc<EffectLog>,
    pub decision: Decision,
    outcome: AtomicU8,
}

impl Entry {
    #[must_use]
    pub fn new(database: Arc<str>, log: Arc<EffectLog>, decision: Decision) -> Self {
        Self { database, log, decision, outcome: AtomicU8::new(PENDING) }
    }

    /// Nobody knows what became of it.
    pub fn give_up(&self) {
        self.outcome.store(UNKNOWN, Ordering::Release);
    }

    /// The leader has answered.
    pub fn settle(&self, committed: bool) {
        self.outcome.store(if committed { COMMITTED } else { DROPPED }, Ordering::Release);
    }
}

#[derive(Debug)]
pub struct Backlog {
    state: Mutex<State>,
    bytes_max: u64,
    /// While there is a backlog nothing begins that could not be in it: no statement that runs node by node, no code.
    _cuts: Option<(Cut, Cutting)>,
}

#[derive(Debug, Default)]
struct State {
    entries: VecDeque<Arc<Entry>>,
    bytes: u64,
    /// It holds nothing any more, and takes nothing.
    given_up: Option<GivenUp>,
    peak: u64,
    applied: u64,
}

/// Why the recovery fails, so that clients do not.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GivenUp {
    /// Past its limit.
    Overflowed,
    /// Its memory is needed, because the disk takes nothing.
    NoDisk,
}

/// What the applier gets next.
#[derive(Debug)]
pub enum Next {
    /// Transactions of one database, to be applied in one; DDL comes alone.
    Batch(Vec<Arc<Entry>>),
    /// The first one is not settled yet.
    Unsettled,
    Empty,
    /// The outcome of a transaction is not known to this proxy: the recovery has failed.
    Unknown,
    /// The recovery has failed.
    GivenUp(GivenUp),
}

impl Backlog {
    #[must_use]
    pub fn new(bytes_max: u64, cuts: Option<(Cut, Cutting)>) -> Self {
        Self { state: Mutex::default(), bytes_max, _cuts: cuts }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn push(&self, entry: Arc<Entry>) {
        let mut state = self.state();
        if state.given_up.is_some() {
            return;
        }
        state.bytes += cost(&entry);
        let given_up = if entry.log.is_without_disk() {
            Some(GivenUp::NoDisk)
        } else {
            (state.bytes > self.bytes_max).then_some(GivenUp::Overflowed)
        };
        if given_up.is_some() {
            *state = State { given_up, ..State::default() };
            return;
        }
        state.entries.push_back(entry);
        state.peak = state.peak.max(state.entries.len() as u64);
    }

    /// Takes what can be applied next.
    pub fn next(&self) -> Next {
        let mut state = self.state();
        if let Some(why) = state.given_up {
            return Next::GivenUp(why);
        }
        let mut batch: Vec<Arc<Entry>> = Vec::new();
        while let Some(first) = state.entries.front() {
            match first.outcome.load(Ordering::Acquire) {
                PENDING if batch.is_empty() => return Next::Unsettled,
                PENDING => break,
                UNKNOWN => return Next::Unknown,
                DROPPED => {}
                _ => {
                    let fits =
                        batch.first().is_none_or(|b| b.database == first.database && !b.log.ddl && !first.log.ddl);
                    if !fits || batch.len() >= BATCH_MAX {
                        break;
                    }
                    batch.push(Arc::clone(first));
                }
            }
            let taken = state.entries.pop_front();
            state.bytes -= taken.map_or(0, |e| cost(&e)).min(state.bytes);
        }
        state.applied += batch.len() as u64;
        if batch.is_empty() { Next::Empty } else { Next::Batch(batch) }
    }

    /// Waiting now, largest number that waited at once, applied so far.
    #[must_use]
    pub fn progress(&self) -> (u64, u64, u64) {
        let state = self.state();
        (state.entries.len() as u64, state.peak, state.applied)
    }
}

fn cost(entry: &Entry) -> u64 {
    ENTRY_BYTES + entry.log.bytes() + entry.log.effects().len() as u64 * 128
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::replicate::effects::SpillBudget;

    fn entry(database: &str, ddl: bool) -> Arc<Entry> {
        let mut log = EffectLog::new(Arc::new(SpillBudget::new(std::env::temp_dir(), 0)));
        log.ddl = ddl;
        let decision = Decision { mark_id: 1, mark_n: 1, gid: "g".into(), owner: None };
        Arc::new(Entry::new(database.into(), Arc::new(log), decision))
    }

    #[test]
    fn order_is_kept_and_nothing_overtakes_what_is_not_settled() {
        let backlog = Backlog::new(1 << 20, None);
        let entries = [entry("a", false), entry("a", false), entry("a", true), entry("b", false)];
        for e in &entries {
            backlog.push(Arc::clone(e));
        }
        assert!(matches!(backlog.next(), Next::Unsettled));
        entries[0].settle(true);
        assert!(matches!(backlog.next(), Next::Batch(b) if b.len() == 1));
        assert!(matches!(backlog.next(), Next::Unsettled));
        entries[1].settle(false);
        entries[2].settle(true);
        entries[3].settle(true);
        assert!(matches!(backlog.next(), Next::Batch(b) if b.len() == 1 && b[0].log.ddl));
        assert!(matches!(backlog.next(), Next::Batch(b) if &*b[0].database == "b"));
        assert!(matches!(backlog.next(), Next::Empty));
    }

    #[test]
    fn past_its_limit_it_says_so_and_holds_nothing() {
        let backlog = Backlog::new(2 * ENTRY_BYTES, None);
        (0..3).for_each(|_| backlog.push(entry("a", false)));
        assert!(matches!(backlog.next(), Next::GivenUp(GivenUp::Overflowed)));
        assert_eq!(backlog.progress().0, 0);
    }
    #[test]
    fn it_gives_its_memory_back_when_the_disk_takes_nothing() {
        let backlog = Backlog::new(1 << 30, None);
        backlog.push(entry("a", false));
        let budget = Arc::new(SpillBudget::new("/nowhere/at/all".into(), 1 << 30));
        // Whatever is in memory already, the last of these is past what all lists may have there.
        let mut logs: Vec<EffectLog> = (0..18).map(|_| EffectLog::new(Arc::clone(&budget))).collect();
        for log in &mut logs {
            log.append(&vec![0; 15 << 20]).unwrap();
        }
        let decision = Decision { mark_id: 1, mark_n: 1, gid: "g".into(), owner: None };
        let last = logs.pop().unwrap();
        assert!(last.is_without_disk() && !logs[0].is_without_disk());
        backlog.push(Arc::new(Entry::new("a".into(), Arc::new(last), decision)));
        assert!(matches!(backlog.next(), Next::GivenUp(GivenUp::NoDisk)));
        assert_eq!(backlog.progress().0, 0);
    }
}
