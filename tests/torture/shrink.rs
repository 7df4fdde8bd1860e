//! Cuts a red schedule down as far as it stays red, within limits.

use std::time::{Duration, Instant};

use crate::run::{Bench, Outcome};
use crate::schedule::{Round, Schedule};

/// Runs at most, and time at most.
const RUNS_MAX: usize = 60;
const TIME_MAX: Duration = Duration::from_secs(150);
/// A race is not lost every time.
const TRIES: usize = 2;

struct Shrinker<'a> {
    bench: &'a mut Bench,
    best: Schedule,
    runs: usize,
    started: Instant,
}

/// Gives the smallest schedule that was still red; the given one if no run of it was red again.
pub async fn shrink(bench: &mut Bench, schedule: &Schedule, red: &Outcome) -> Schedule {
    let mut first = schedule.clone();
    first.rounds.truncate(red.round + 1);
    let mut shrinker = Shrinker { bench, best: first, runs: 0, started: Instant::now() };
    // The rounds before it often only fill the tables.
    let last = Schedule { rounds: vec![shrinker.best.rounds[red.round].clone()], ..shrinker.best.clone() };
    shrinker.try_one(last).await;
    shrinker.parts(rounds, without_rounds).await;
    shrinker.parts(transactions, without_transactions).await;
    shrinker.parts(statements, without_statements).await;
    shrinker.best
}

impl Shrinker<'_> {
    /// Keeps the candidate if it is red.
    async fn try_one(&mut self, candidate: Schedule) -> bool {
        for _ in 0..TRIES {
            if self.runs >= RUNS_MAX || self.started.elapsed() > TIME_MAX {
                return false;
            }
            self.runs += 1;
            if !self.bench.run(&candidate).await.failures.is_empty() {
                eprintln!("still red with {} transactions", candidate.transactions());
                self.best = candidate;
                return true;
            }
        }
        false
    }

    /// Leaves out halves, quarters, ... of what is counted.
    async fn parts(
        &mut self,
        count: fn(&Schedule) -> usize,
        without: fn(&Schedule, std::ops::Range<usize>) -> Schedule,
    ) {
        let mut size = count(&self.best).div_ceil(2);
        while size > 0 {
            let mut at = 0;
            while at < count(&self.best) {
                let end = (at + size).min(count(&self.best));
                let candidate = without(&self.best, at..end);
                if end - at == count(&self.best) || !self.try_one(candidate).await {
                    at = end;
                }
            }
            size /= 2;
        }
    }
}

fn rounds(schedule: &Schedule) -> usize {
    schedule.rounds.len()
}

fn without_rounds(schedule: &Schedule, range: std::ops::Range<usize>) -> Schedule {
    let mut smaller = schedule.clone();
    smaller.rounds.drain(range);
    smaller
}

fn transactions(schedule: &Schedule) -> usize {
    schedule.transactions()
}

fn without_transactions(schedule: &Schedule, range: std::ops::Range<usize>) -> Schedule {
    let mut number = 0;
    let mut smaller = schedule.clone();
    for list in smaller.rounds.iter_mut().flat_map(|round| &mut round.clients) {
        list.retain(|_| {
            number += 1;
            !range.contains(&(number - 1))
        });
    }
    smaller.rounds.retain(|round: &Round| round.clients.iter().any(|list| !list.is_empty()));
    smaller
}

fn statements(schedule: &Schedule) -> usize {
    let lists = schedule.rounds.iter().flat_map(|round| &round.clients).flatten();
    lists.map(|transaction| transaction.statements.len()).sum()
}

fn without_statements(schedule: &Schedule, range: std::ops::Range<usize>) -> Schedule {
    let mut number = 0;
    let mut smaller = schedule.clone();
    for transaction in smaller.rounds.iter_mut().flat_map(|round| &mut round.clients).flatten() {
        transaction.statements.retain(|_| {
            number += 1;
            !range.contains(&(number - 1))
        });
    }
    smaller
}
