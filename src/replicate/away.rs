//! Nodes that are away: a follower that was lost is kept what it misses, for a limited time and size, so that it can become a member again
//! without a copy when it answers ([`crate::replicate::rejoin`]).
//!
//! The backlog begins before the smaller member set is shown to sessions. So each transaction is in it, or the node was asked to prepare it
//! before it was lost, or both; and what is neither there nor prepared on the node was never committed.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use pgtandem_proto::membership::NodeState;
use tokio_util::sync::CancellationToken;

use crate::cluster::rejoin::Standing;
use crate::observe::status::AwayView;
use crate::replicate::backlog::{Backlog, Entry, GivenUp, is_repeatable};
use crate::replicate::flapping::{REMEMBERED_S, Returns};
use crate::replicate::hub::Hub;

/// Transactions in files that are kept for one node: each is an open file, and clients need theirs.
const FILES_MAX: usize = 200;

const CODE: &str =
    "a statement that calls or fires code came meanwhile, which runs once on every server and can not be done again";

/// Nodes that are away, by name.
#[derive(Debug, Default)]
pub struct Away {
    nodes: Mutex<HashMap<String, Arc<Kept>>>,
    returns: Mutex<HashMap<String, Returns>>,
}

/// What is kept for one node.
#[derive(Debug)]
pub struct Kept {
    pub backlog: Backlog,
    /// The reign that took it out: no other one may let it in from here.
    pub epoch: u64,
    /// What its server last said about itself as a member.
    pub standing: Option<Standing>,
    since: Instant,
    lasts: Duration,
    /// It came back and was lost so often that it is kept out for this long first.
    pub held_out: Duration,
    bytes_max: u64,
    /// When it was lost.
    begun: Begun,
    state: Mutex<State>,
    /// Cancelled when nothing is kept any more: an attempt to let the node in ends with that.
    pub stopped: CancellationToken,
    /// Held by the attempt that is under way.
    pub attempt: tokio::sync::Mutex<()>,
}

/// How much was ever begun that is in no backlog.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Begun {
    /// Statements outside transactions, and clients' prepared transactions.
    outside: u64,
    /// Transactions with statements that call or fire code which is run on every server.
    code: u64,
}

#[derive(Debug, Default)]
struct State {
    /// Why nothing is kept any more.
    ended: Option<String>,
    /// Why it has not come back yet, or what is done.
    doing: Option<String>,
    /// What it held prepared is decided.
    is_settled: bool,
    /// It is being brought up to date: time no longer counts.
    is_back: bool,
}

impl Away {
    fn nodes(&self) -> MutexGuard<'_, HashMap<String, Arc<Kept>>> {
        // The map is consistent between statements, so a panic elsewhere does not spoil it.
        self.nodes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    #[must_use]
    pub fn get(&self, node: &str) -> Option<Arc<Kept>> {
        self.nodes().get(node).cloned()
    }

    /// Every node that is away.
    #[must_use]
    pub fn all(&self) -> Vec<(String, Arc<Kept>)> {
        self.nodes().iter().map(|(node, kept)| (node.clone(), Arc::clone(kept))).collect()
    }

    fn put(&self, node: &str, kept: Kept) {
        self.nodes().insert(node.to_owned(), Arc::new(kept));
    }

    fn returns<T>(&self, node: &str, ask: impl FnOnce(&mut Returns) -> T) -> T {
        let mut returns = self.returns.lock().unwrap_or_else(PoisonError::into_inner);
        ask(returns.entry(node.to_owned()).or_default())
    }

    /// It became a member again by itself.
    pub fn note_return(&self, node: &str) {
        self.returns(node, |returns| returns.note(Instant::now()));
    }

    /// It is a member, or comes back another way.
    pub fn remove(&self, node: &str) {
        if let Some(kept) = self.nodes().remove(node) {
            kept.end("it is no longer waited for");
        }
    }

    /// Nothing is kept for this node from here on; `status` goes on saying why.
    pub fn end(&self, node: &str, why: &str) {
        if let Some(kept) = self.get(node) {
            kept.end(why);
        }
    }

    /// The same for all: their reign is over.
    pub fn end_all(&self, why: &str) {
        for (_, kept) in self.all() {
            kept.end(why);
        }
    }

    /// Puts a transaction into the backlog of every node that is away.
    pub fn enter(&self, entry: impl Fn() -> Arc<Entry>, entered: &mut Vec<Arc<Entry>>) {
        for kept in self.nodes().values().filter(|kept| !kept.backlog.is_over()) {
            let entry = entry();
            if !is_repeatable(&entry.log) {
                kept.end(CODE);
                continue;
            }
            kept.backlog.push(Arc::clone(&entry));
            entered.push(entry);
        }
    }
}

impl Kept {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Gives up what is kept. The first reason stays.
    pub fn end(&self, why: &str) {
        self.backlog.end();
        self.state().ended.get_or_insert_with(|| why.to_owned());
        self.stopped.cancel();
    }

    /// Why nothing is kept any more, if so.
    pub fn ended(&self, begun: Begun) -> Option<String> {
        let is_late = self.since.elapsed() >= self.lasts && !self.state().is_back;
        match self.backlog.given_up() {
            Some(GivenUp::Overflowed) => self.end(&format!(
                "more than {} MiB were written meanwhile (proxy.away_bytes_max), or {FILES_MAX} transactions too large for memory",
                self.bytes_max >> 20
            )),
            Some(GivenUp::NoDisk) => self.end("the disk of proxy.state_dir takes nothing, and its memory was needed"),
            Some(GivenUp::Ended) | None => {}
        }
        if is_late {
            self.end(&format!("it was away for longer than {} s (proxy.away_s_max)", self.lasts.as_secs()));
        } else if self.begun.outside != begun.outside {
            self.end(
                "a statement outside transactions (CREATE DATABASE, CREATE INDEX CONCURRENTLY or the like) or a PREPARE TRANSACTION came \
                 meanwhile",
            );
        } else if self.begun.code != begun.code {
            self.end(CODE);
        }
        self.state().ended.clone()
    }

    /// Why it has not come back yet.
    pub fn note(&self, doing: &str) {
        self.state().doing = Some(doing.to_owned());
    }

    /// How long it is kept out still.
    #[must_use]
    pub fn held_out_still(&self) -> Duration {
        self.held_out.saturating_sub(self.since.elapsed())
    }

    #[must_use]
    pub fn is_settled(&self) -> bool {
        self.state().is_settled
    }

    pub fn settled(&self) {
        self.state().is_settled = true;
    }

    /// Whether it answers and is being brought up to date.
    pub fn set_back(&self, is_back: bool) {
        let mut state = self.state();
        state.is_back = is_back;
        // What the last attempt ended with is no longer so.
        if is_back {
            state.doing = None;
        }
    }
}

impl Hub {
    /// A node is about to leave the member set because it was lost. Called before the smaller set is shown.
    pub(super) fn keep_for(&self, node: &str, state: NodeState) {
        self.away.remove(node);
        let lasts = Duration::from_secs(self.config.proxy.away_s_max);
        let Some(epoch) = self.reign_epoch() else { return };
        if lasts.is_zero() || state != NodeState::Stale {
            return;
        }
        let view = self.view();
        let follower = view.followers.iter().find(|follower| follower.node.name == node);
        let (begun, is_quiet) = self.begun();
        let bytes_max = self.config.proxy.away_bytes_max;
        let (returns, wait) = self.away.returns(node, |returns| returns.wait(Instant::now()));
        let kept = Kept {
            backlog: Backlog::for_long(bytes_max, FILES_MAX),
            epoch,
            standing: follower.and_then(|follower| follower.standing()),
            since: Instant::now(),
            lasts,
            held_out: wait.min(lasts / 2),
            bytes_max,
            begun,
            state: Mutex::default(),
            stopped: CancellationToken::new(),
            attempt: tokio::sync::Mutex::default(),
        };
        if !kept.held_out.is_zero() {
            let (minutes, held_out) = (REMEMBERED_S / 60, kept.held_out.as_secs());
            kept.note(&format!("it came back {returns} times within {minutes} minutes and was lost again: it is kept out for {held_out} s first"));
        }
        if !is_quiet {
            kept.end(
                "a statement outside transactions, a PREPARE TRANSACTION, or a transaction that calls or fires code was under way when \
                 it was lost",
            );
        } else if kept.standing.is_none() {
            kept.end("it was lost before its server was known well enough");
        }
        self.away.put(node, kept);
        // Members that stay are as far as they were; what this one is moved to comes with its backlog.
        self.sequences.forget_all();
    }

    /// How much was ever begun that is in no backlog, and whether nothing of it is under way.
    fn begun(&self) -> (Begun, bool) {
        let ((outside, is_quiet), (code, is_closed)) = (self.nodewise.begun(), self.cuts.begun());
        (Begun { outside, code }, is_quiet && is_closed)
    }

    /// Why nothing is kept any more for a node that is away.
    #[must_use]
    pub fn why_ended(&self, kept: &Kept) -> Option<String> {
        kept.ended(self.begun().0)
    }

    /// What is kept for this node, as a person sees it.
    #[must_use]
    pub fn away_view(&self, node: &str) -> Option<AwayView> {
        let kept = self.away.get(node)?;
        let ended = self.why_ended(&kept);
        let (transactions, bytes) = kept.backlog.size();
        let state = kept.state();
        let left = kept.lasts.saturating_sub(kept.since.elapsed());
        Some(AwayView {
            ended,
            doing: state.doing.clone(),
            is_back: state.is_back,
            transactions,
            bytes,
            bytes_max: kept.bytes_max,
            left_s: left.as_secs(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BEFORE: Begun = Begun { outside: 1, code: 7 };

    fn kept_for(lasts: Duration) -> Kept {
        Kept {
            backlog: Backlog::new(1 << 20, None),
            epoch: 3,
            standing: None,
            since: Instant::now(),
            lasts,
            held_out: Duration::ZERO,
            bytes_max: 1 << 20,
            begun: BEFORE,
            state: Mutex::default(),
            stopped: CancellationToken::new(),
            attempt: tokio::sync::Mutex::default(),
        }
    }

    #[test]
    fn what_is_kept_ends_with_its_time_unless_the_node_is_back() {
        let long = kept_for(Duration::from_secs(3600));
        assert_eq!(long.ended(BEFORE), None);
        let over = kept_for(Duration::ZERO);
        over.set_back(true);
        assert_eq!(over.ended(BEFORE), None);
        over.set_back(false);
        assert!(over.ended(BEFORE).unwrap().contains("away_s_max"));
    }

    #[test]
    fn what_no_backlog_can_have_ends_it_and_the_first_reason_stays() {
        let kept = kept_for(Duration::from_secs(3600));
        assert!(kept.ended(Begun { outside: 2, ..BEFORE }).unwrap().contains("CREATE DATABASE"));
        kept.end("another reason");
        assert!(kept.ended(Begun { outside: 2, ..BEFORE }).unwrap().contains("CREATE DATABASE"));
        let code = kept_for(Duration::from_secs(3600));
        assert!(code.ended(Begun { code: 8, ..BEFORE }).unwrap().contains("fires code"));
        assert!(matches!(kept.backlog.next(), crate::replicate::backlog::Next::GivenUp(GivenUp::Ended)));
    }
}
