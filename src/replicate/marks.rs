//! Marks: a row per proxy session in each database that says which of its transactions is decided.
//!
//! A session holds two and alternates, because transaction n+1 of a mark starts only when n is finished everywhere.

use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::sql::nodewise::Work;

/// More sessions than half of that are refused at their start.
const MARKS_MAX: i32 = 100_000;
/// Reigns of which it is kept what was decided when they began. A session that slept through more is told nothing.
const BEGINNINGS_MAX: usize = 8;

/// All marks of a proxy. Numbers are unique over all databases, because the names of prepared transactions are.
#[derive(Debug, Default)]
pub struct MarkPool {
    marks: Mutex<Marks>,
}

#[derive(Debug, Default)]
struct Marks {
    /// By database: marks that nobody holds.
    free: HashMap<String, Vec<Free>>,
    last_id: i32,
    /// Grows when all is loaded anew: marks of sessions of before are not given back.
    generation: u64,
    /// What was decided when each reign began, the oldest first.
    beginnings: VecDeque<Beginning>,
}

#[derive(Debug)]
struct Free {
    id: i32,
    n: i64,
    decided: Option<i64>,
}

/// Marks as the leader held them when a reign began: after all sessions of older ones had ended, before any of its own.
#[derive(Debug)]
struct Beginning {
    epoch: u64,
    decided: HashMap<String, HashMap<i32, i64>>,
}

/// A mark that a session holds.
#[derive(Debug)]
pub struct Mark {
    pub id: i32,
    /// n of the last transaction that used it.
    pub n: i64,
    /// n of the last one that was committed; `None`: not known.
    pub decided: Option<i64>,
    /// Its one permit is out while a transaction of this mark is not finished everywhere.
    idle: Arc<Semaphore>,
    generation: u64,
}

impl Mark {
    /// Waits until the last transaction of this mark is finished everywhere, and takes the next n.
    pub async fn begin(&mut self) -> (i64, Option<OwnedSemaphorePermit>) {
        // The semaphore is never closed: the permit is always there in the end.
        let permit = Arc::clone(&self.idle).acquire_owned().await.ok();
        self.n += 1;
        (self.n, permit)
    }

    /// The last n that was begun is decided. One that was rolled back leaves no trace in the databases.
    pub fn decide(&mut self, committed: bool) {
        if committed {
            self.decided = Some(self.n);
        }
    }
}

impl MarkPool {
    /// Forgets everything: a new epoch loads it again.
    pub fn reset(&self) {
        let mut marks = self.marks.lock().unwrap_or_else(PoisonError::into_inner);
        let generation = marks.generation + 1;
        let beginnings = std::mem::take(&mut marks.beginnings);
        *marks = Marks { generation, beginnings, ..Marks::default() };
    }

    /// A reign begins: from now on sessions take these marks, and what older sessions left undecided is decided by them.
    pub fn begin(&self, epoch: u64, decided: HashMap<String, HashMap<i32, i64>>) {
        // A database that was copied past the proxy has marks of the one that it was copied from: their numbers, and so the names
        // of prepared transactions, must be used by one of the two alone.
        let mut used = HashSet::new();
        for (database, rows) in &decided {
            let own = rows.iter().filter(|(id, _)| used.insert(**id)).map(|(id, n)| (*id, *n)).collect();
            self.load(database, own);
        }
        let mut marks = self.marks.lock().unwrap_or_else(PoisonError::into_inner);
        marks.beginnings.push_back(Beginning { epoch, decided });
        if marks.beginnings.len() > BEGINNINGS_MAX {
            marks.beginnings.pop_front();
        }
    }

    /// The last n that a mark had decided when the reign after `epoch` began. The leader's own row must not be asked for
    /// that: sessions of the new reign count it on. `None`: no reign has begun since, or too many have.
    #[must_use]
    pub fn decided_after(&self, epoch: u64, database: &str, id: i32) -> Option<i64> {
        let marks = self.marks.lock().unwrap_or_else(PoisonError::into_inner);
        let own = marks.beginnings.iter().position(|b| b.epoch == epoch)?;
        let next = marks.beginnings.get(own + 1)?;
        Some(next.decided.get(database).and_then(|rows| rows.get(&id)).copied().unwrap_or(0))
    }

    /// Starts from what the leader says: `(id, n)` of one database.
    pub fn load(&self, database: &str, rows: Vec<(i32, i64)>) {
        let mut marks = self.marks.lock().unwrap_or_else(PoisonError::into_inner);
        marks.last_id = rows.iter().map(|(id, _)| *id).fold(marks.last_id, i32::max);
        let free = rows.into_iter().map(|(id, n)| Free { id, n, decided: Some(n) });
        marks.free.insert(database.to_owned(), free.collect());
    }

    /// After a statement about databases: what is gone is forgotten, what is new has no marks yet, and a renamed one keeps its own.
    /// `there`: databases that are there now; `before`: those of the statement that were there before it.
    pub fn rename(&self, work: &Work, there: &[String], before: &[String]) {
        let is_there = |name: &String| there.contains(name);
        let mut marks = self.marks.lock().unwrap_or_else(PoisonError::into_inner);
        match work {
            Work::CreateDatabase { name, .. } if is_there(name) && !before.contains(name) => {
                marks.free.entry(name.clone()).or_default();
            }
            Work::DropDatabase { name } if !is_there(name) => {
                marks.free.remove(name);
            }
            Work::RenameDatabase { from, to } if is_there(to) && !is_there(from) => {
                if let Some(free) = marks.free.remove(from) {
                    marks.free.insert(to.clone(), free);
                }
            }
            _ => {}
        }
    }

    /// Whether sessions may use this database.
    #[must_use]
    pub fn knows(&self, database: &str) -> bool {
        self.marks.lock().unwrap_or_else(PoisonError::into_inner).free.contains_key(database)
    }

    /// Takes the mark of a transaction that a client has prepared, so that nothing else uses it.
    pub fn take_known(&self, database: &str, id: i32, n: i64) -> Mark {
        let mut marks = self.marks.lock().unwrap_or_else(PoisonError::into_inner);
        marks.last_id = marks.last_id.max(id);
        if let Some(free) = marks.free.get_mut(database) {
            free.retain(|free| free.id != id);
        }
        Mark { id, n, decided: None, idle: Arc::new(Semaphore::new(1)), generation: marks.generation }
    }

    /// A mark for a session, or `None` past the limit or for a database that is not known.
    pub fn take(&self, database: &str) -> Option<Mark> {
        let mut marks = self.marks.lock().unwrap_or_else(PoisonError::into_inner);
        let Free { id, n, decided } = match marks.free.get_mut(database)?.pop() {
            Some(free) => free,
            None if marks.last_id < MARKS_MAX => {
                marks.last_id += 1;
                Free { id: marks.last_id, n: 0, decided: Some(0) }
            }
            None => return None,
        };
        Some(Mark { id, n, decided, idle: Arc::new(Semaphore::new(1)), generation: marks.generation })
    }

    /// Gives a mark back, if its last transaction is finished; otherwise when it is.
    pub fn give_back(self: &Arc<Self>, database: &str, mark: Mark) {
        let Mark { id, n, decided, idle, generation } = mark;
        let pool = Arc::clone(self);
        let database = database.to_owned();
        let put = move || {
            let mut marks = pool.marks.lock().unwrap_or_else(PoisonError::into_inner);
            if marks.generation != generation {
                return;
            }
            if let Some(free) = marks.free.get_mut(&database) {
                free.push(Free { id, n, decided });
            }
        };
        if idle.available_permits() > 0 {
            put();
        } else {
            tokio::task::spawn_local(async move {
                let _finished = idle.acquire().await;
                put();
            });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_sessions_never_hold_the_same_mark_and_a_mark_goes_on_counting() {
        let pool = Arc::new(MarkPool::default());
        pool.load("shop", vec![(1, 40)]);
        let (first, second) = (pool.take("shop").unwrap(), pool.take("shop").unwrap());
        assert_eq!((first.id, first.n), (1, 40));
        assert_ne!(first.id, second.id);
        pool.give_back("shop", first);
        assert_eq!(pool.take("shop").unwrap().n, 40);
        assert!(pool.take("other").is_none());
    }

    #[tokio::test]
    async fn a_mark_knows_what_was_committed_last_and_not_only_what_was_begun() {
        let pool = Arc::new(MarkPool::default());
        pool.load("shop", vec![(1, 40)]);
        let mut mark = pool.take("shop").unwrap();
        assert_eq!(mark.begin().await.0, 41);
        mark.decide(false);
        assert_eq!(mark.begin().await.0, 42);
        assert_eq!(mark.decided, Some(40));
        mark.decide(true);
        pool.give_back("shop", mark);
        let mark = pool.take("shop").unwrap();
        assert_eq!((mark.n, mark.decided), (42, Some(42)));
        assert_eq!(pool.take_known("shop", 9, 5).decided, None);
    }

    #[test]
    fn what_the_next_reign_does_with_a_mark_says_nothing_about_a_commit_of_the_last_one() {
        let pool = Arc::new(MarkPool::default());
        let shop = |rows: &[(i32, i64)]| HashMap::from([("shop".to_owned(), rows.iter().copied().collect())]);
        pool.begin(3, shop(&[(1, 40)]));
        // Transaction 41 of mark 1 is under way when the leader is lost, and was not committed.
        assert_eq!(pool.take("shop").unwrap().n, 40);
        assert_eq!(pool.decided_after(3, "shop", 1), None);
        pool.reset();
        assert_eq!(pool.decided_after(3, "shop", 1), None);
        pool.begin(4, shop(&[(1, 40)]));
        assert_eq!(pool.take("shop").unwrap().n, 40);
        pool.reset();
        // The session of epoch 4 has committed 41 and 42 with that mark meanwhile.
        pool.begin(5, shop(&[(1, 42)]));
        assert_eq!(pool.decided_after(3, "shop", 1), Some(40));
        assert_eq!(pool.decided_after(4, "shop", 1), Some(42));
        assert_eq!(pool.decided_after(3, "shop", 7), Some(0));
        for epoch in 6..6 + BEGINNINGS_MAX as u64 {
            pool.begin(epoch, shop(&[]));
        }
        assert_eq!(pool.decided_after(3, "shop", 1), None);
    }
}
