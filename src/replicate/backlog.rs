//! The backlog: the effects of committed transactions, in the order of sending, for a node that is joining or was away briefly.
//!
//! An entry is put in before the leader's COMMIT is sent, because that is the order that counts, and settled when the
//! leader has answered. In memory; past its limit the recovery fails and the node stays out: clients never pay.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::replicate::cuts::Cutting;
use crate::replicate::effects::{Effect, EffectLog};
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
    files_max: usize,
    /// While there is a backlog nothing begins that could not be in it: no statement that runs node by node, no code.
    _cuts: Option<(Cut, Cutting)>,
}

#[derive(Debug, Default)]
struct State {
    entries: VecDeque<Arc<Entry>>,
    bytes: u64,
    /// It holds nothing any more, and takes nothing.
    given_up: Option<GivenUp>,
    /// Waiting transactions whose data are in files: each is an open one.
    files: usize,
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
    /// For another reason, which whoever keeps it knows.
    Ended,
}

/// What the applier gets next.
#[derive(Debug)]
pub enum Next<'b> {
    /// Transactions of one database, to be applied in one; DDL comes alone.
    Batch(Taken<'b>),
    /// The first one is not settled yet.
    Unsettled,
    Empty,
    /// The outcome of a transaction is not known to this proxy: the recovery has failed.
    Unknown,
    /// The recovery has failed, or the node has to be recovered.
    GivenUp(GivenUp),
}

/// What a backlog knows about a transaction that the node holds prepared.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Said {
    Committed,
    /// Rolled back; or not decided yet, and then it is applied from the backlog when it is.
    NotCommitted,
    /// The mark was not used since the backlog began: the leader's says it.
    Nothing,
    Unknown,
}

/// Transactions that were taken to be applied. Dropped before [`Self::applied`], they are in the backlog again: what became of them on
/// the node is not known, and its marks will tell.
#[derive(Debug)]
pub struct Taken<'b> {
    backlog: &'b Backlog,
    pub entries: Vec<Arc<Entry>>,
}

impl Taken<'_> {
    pub fn applied(mut self) {
        self.entries.clear();
    }
}

impl Drop for Taken<'_> {
    fn drop(&mut self) {
        self.backlog.restore(std::mem::take(&mut self.entries));
    }
}

impl Backlog {
    #[must_use]
    pub fn new(bytes_max: u64, cuts: Option<(Cut, Cutting)>) -> Self {
        Self { state: Mutex::default(), bytes_max, files_max: usize::MAX, _cuts: cuts }
    }

    /// One that may be kept for long, so that the files in it count.
    #[must_use]
    pub fn for_long(bytes_max: u64, files_max: usize) -> Self {
        Self { state: Mutex::default(), bytes_max, files_max, _cuts: None }
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
        state.files += usize::from(entry.log.is_in_file());
        let given_up = if entry.log.is_without_disk() {
            Some(GivenUp::NoDisk)
        } else {
            (state.bytes > self.bytes_max || state.files > self.files_max).then_some(GivenUp::Overflowed)
        };
        if given_up.is_some() {
            *state = State { given_up, ..State::default() };
            return;
        }
        state.entries.push_back(entry);
        state.peak = state.peak.max(state.entries.len() as u64);
    }

    /// Gives it up: it holds nothing from here on.
    pub fn end(&self) {
        let mut state = self.state();
        let given_up = state.given_up.or(Some(GivenUp::Ended));
        *state = State { given_up, ..State::default() };
    }

    /// Nothing goes into it any more.
    #[must_use]
    pub fn is_over(&self) -> bool {
        self.given_up().is_some()
    }

    #[must_use]
    pub fn given_up(&self) -> Option<GivenUp> {
        self.state().given_up
    }

    /// Takes what can be applied next.
    pub fn next(&self) -> Next<'_> {
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
            if let Some(taken) = taken {
                state.bytes -= cost(&taken).min(state.bytes);
                state.files -= usize::from(taken.log.is_in_file()).min(state.files);
            }
        }
        state.applied += batch.len() as u64;
        if batch.is_empty() { Next::Empty } else { Next::Batch(Taken { backlog: self, entries: batch }) }
    }

    fn restore(&self, entries: Vec<Arc<Entry>>) {
        let mut state = self.state();
        if state.given_up.is_some() {
            return;
        }
        state.applied -= (entries.len() as u64).min(state.applied);
        for entry in entries.into_iter().rev() {
            state.bytes += cost(&entry);
            state.files += usize::from(entry.log.is_in_file());
            state.entries.push_front(entry);
        }
    }

    /// What became of transaction `n` of a mark that the node holds prepared since before it was lost. Of one mark it can hold no more
    /// than the last that was begun before, so whatever came after it is here.
    #[must_use]
    pub fn says(&self, database: &str, mark_id: i32, n: i64) -> Said {
        let state = self.state();
        let of_mark = |e: &&Arc<Entry>| *e.database == *database && e.decision.mark_id == mark_id;
        match state.entries.iter().filter(of_mark).find(|e| e.decision.mark_n >= n) {
            None => Said::Nothing,
            Some(e) if e.decision.mark_n > n => match e.decision.after {
                Some(after) if after >= n => Said::Committed,
                Some(_) => Said::NotCommitted,
                None => Said::Unknown,
            },
            Some(e) => match e.outcome.load(Ordering::Acquire) {
                COMMITTED => Said::Committed,
                UNKNOWN => Said::Unknown,
                _ => Said::NotCommitted,
            },
        }
    }

    /// Waiting now: transactions, and bytes.
    #[must_use]
    pub fn size(&self) -> (u64, u64) {
        let state = self.state();
        (state.entries.len() as u64, state.bytes)
    }

    /// Waiting now, largest number that waited at once, applied so far.
    #[must_use]
    pub fn progress(&self) -> (u64, u64, u64) {
        let state = self.state();
        (state.entries.len() as u64, state.peak, state.applied)
    }
}

/// Whether it can be made again from its list.
#[must_use]
pub fn is_repeatable(log: &EffectLog) -> bool {
    !log.effects().iter().any(|effect| matches!(effect, Effect::Once))
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
        let decision = Decision { mark_id: 1, mark_n: 1, after: Some(0), gid: "g".into(), owner: None };
        Arc::new(Entry::new(database.into(), Arc::new(log), decision))
    }

    /// What came, applied.
    fn applied(next: Next<'_>) -> Vec<Arc<Entry>> {
        let Next::Batch(batch) = next else { panic!("{next:?}") };
        let entries = batch.entries.clone();
        batch.applied();
        entries
    }

    fn step(mark_id: i32, mark_n: i64, after: Option<i64>) -> Arc<Entry> {
        let entry = entry("a", false);
        let decision = Decision { mark_id, mark_n, after, gid: String::new(), owner: None };
        Arc::new(Entry::new("a".into(), Arc::clone(&entry.log), decision))
    }

    #[test]
    fn what_was_taken_and_not_applied_is_there_again_in_its_order() {
        let backlog = Backlog::new(1 << 20, None);
        let entries = [step(1, 1, Some(0)), step(1, 2, Some(1)), step(1, 3, Some(2))];
        for e in &entries {
            backlog.push(Arc::clone(e));
        }
        entries[0].settle(true);
        entries[1].settle(true);
        let size = backlog.size();
        let Next::Batch(batch) = backlog.next() else { panic!("nothing") };
        assert_eq!(backlog.progress(), (1, 3, 2));
        drop(batch);
        assert_eq!((backlog.size(), backlog.progress()), (size, (3, 3, 0)));
        let Next::Batch(batch) = backlog.next() else { panic!("nothing") };
        assert_eq!(batch.entries.iter().map(|e| e.decision.mark_n).collect::<Vec<_>>(), [1, 2]);
        backlog.end();
        drop(batch);
        assert_eq!(backlog.size(), (0, 0));
        assert!(matches!(backlog.next(), Next::GivenUp(GivenUp::Ended)));
    }

    #[test]
    fn what_a_node_holds_prepared_is_decided_by_itself_or_by_what_came_after_it() {
        let backlog = Backlog::new(1 << 20, None);
        let entries = [step(1, 7, Some(5)), step(2, 9, Some(8)), step(3, 4, Some(2)), step(4, 6, None)];
        for e in &entries {
            backlog.push(Arc::clone(e));
        }
        // Not decided yet: it is applied from here when it is.
        assert_eq!(backlog.says("a", 1, 7), Said::NotCommitted);
        entries[0].settle(true);
        assert_eq!(backlog.says("a", 1, 7), Said::Committed);
        assert_eq!(backlog.says("a", 1, 6), Said::NotCommitted, "6 was rolled back, or 7 would come after it");
        assert_eq!(backlog.says("a", 2, 8), Said::Committed);
        assert_eq!(backlog.says("a", 3, 3), Said::NotCommitted);
        assert_eq!(backlog.says("a", 4, 5), Said::Unknown);
        entries[1].give_up();
        assert_eq!(backlog.says("a", 2, 9), Said::Unknown);
        for (database, mark) in [("a", 5), ("b", 1)] {
            assert_eq!(backlog.says(database, mark, 1), Said::Nothing);
        }
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
        assert_eq!(applied(backlog.next()).len(), 1);
        assert!(matches!(backlog.next(), Next::Unsettled));
        entries[1].settle(false);
        entries[2].settle(true);
        entries[3].settle(true);
        let alone = applied(backlog.next());
        assert!(alone[0].log.ddl && alone.len() == 1);
        assert_eq!(&*applied(backlog.next())[0].database, "b");
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
        let decision = Decision { mark_id: 1, mark_n: 1, after: Some(0), gid: "g".into(), owner: None };
        let last = logs.pop().unwrap();
        assert!(last.is_without_disk() && !logs[0].is_without_disk());
        backlog.push(Arc::new(Entry::new("a".into(), Arc::new(last), decision)));
        assert!(matches!(backlog.next(), Next::GivenUp(GivenUp::NoDisk)));
        assert_eq!(backlog.progress().0, 0);
    }
}
