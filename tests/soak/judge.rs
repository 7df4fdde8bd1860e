//! Whether a round kept the promise: from what every client was told, and what every node holds in the end. Pure.

use std::collections::{BTreeMap, BTreeSet};

/// What a client knows of a write of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Told {
    Committed,
    /// An error, a rollback, or a connection that ended before COMMIT was sent.
    Failed,
    /// The connection ended, or nobody answered, with the COMMIT under way.
    Unknown,
}

/// A write: so many rows, and so many counters raised by one, all in one transaction.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    pub client: i32,
    pub n: i32,
    pub rows: i32,
    /// 0: none; 1: the client's own; 2: the one of all clients, too.
    pub counters: i32,
    pub told: Told,
}

/// What a node holds of a write: how many rows, and how many that differ.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Found {
    pub client: i32,
    pub n: i32,
    pub rows: i64,
    pub parts: i64,
}

/// What a node holds in the end.
#[derive(Clone, Debug, Default)]
pub struct Held {
    pub node: String,
    pub found: Vec<Found>,
    /// By client; 0 is the counter of all.
    pub counters: BTreeMap<i32, i64>,
    /// Rows of earlier rounds.
    pub older: i64,
    /// Names of prepared transactions.
    pub prepared: Vec<String>,
}

/// Sentences, each a broken promise. `older`: rows of earlier rounds that must be there.
pub fn judge(ledger: &[Entry], older: i64, nodes: &[Held]) -> Vec<String> {
    let mut wrong = Vec::new();
    for held in nodes {
        let node = &held.node;
        let found: BTreeMap<(i32, i32), &Found> =
            held.found.iter().map(|found| ((found.client, found.n), found)).collect();
        let known: BTreeSet<(i32, i32)> = ledger.iter().map(|entry| (entry.client, entry.n)).collect();
        for entry in ledger {
            let what = format!("{node}: write {} of client {}", entry.n, entry.client);
            match (entry.told, found.get(&(entry.client, entry.n))) {
                (Told::Committed, None) => wrong.push(format!("{what} was acknowledged and is not there")),
                (Told::Failed, Some(_)) => wrong.push(format!("{what} was told to have failed and is there")),
                (_, Some(found)) if found.rows > found.parts => {
                    wrong.push(format!("{what} is there twice: {} rows, {} different", found.rows, found.parts));
                }
                (_, Some(found)) if found.parts != i64::from(entry.rows) => {
                    wrong.push(format!("{what} is there in half: {} of {} rows", found.parts, entry.rows));
                }
                _ => {}
            }
        }
        for (client, n) in found.keys().filter(|key| !known.contains(*key)) {
            wrong.push(format!("{node}: write {n} of client {client} is there and nobody sent it"));
        }
        wrong.extend(counters(ledger, held, &found));
        if held.older != older {
            wrong.push(format!("{node}: {} rows of earlier rounds, and there were {older}", held.older));
        }
        for name in &held.prepared {
            wrong.push(format!("{node}: {name} is still prepared"));
        }
    }
    for pair in nodes.windows(2) {
        let sorted = |held: &Held| held.found.iter().cloned().collect::<BTreeSet<_>>();
        let (one, other) = (sorted(&pair[0]), sorted(&pair[1]));
        if let Some(differs) = one.symmetric_difference(&other).next() {
            wrong.push(format!("{} and {} differ, for example in {differs:?}", pair[0].node, pair[1].node));
        }
    }
    wrong
}

/// A counter was raised once by each write that is there, and by no other.
fn counters(ledger: &[Entry], held: &Held, found: &BTreeMap<(i32, i32), &Found>) -> Vec<String> {
    let mut expected: BTreeMap<i32, i64> = held.counters.keys().map(|client| (*client, 0)).collect();
    for entry in ledger.iter().filter(|entry| found.contains_key(&(entry.client, entry.n))) {
        if entry.counters > 0 {
            *expected.entry(entry.client).or_default() += 1;
        }
        if entry.counters > 1 {
            *expected.entry(0).or_default() += 1;
        }
    }
    let differs = |(client, value): (i32, i64)| {
        let there = held.counters.get(&client).copied();
        let says = there.map_or_else(|| "is not there".to_owned(), |there| format!("says {there}"));
        (there != Some(value)).then(|| {
            format!("{}: the counter of client {client} {says}, and {value} writes that are there raised it", held.node)
        })
    };
    expected.into_iter().filter_map(differs).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ledger() -> Vec<Entry> {
        let entry = |n, rows, counters, told| Entry { client: 1, n, rows, counters, told };
        vec![
            entry(1, 1, 0, Told::Committed),
            entry(2, 3, 2, Told::Committed),
            entry(3, 2, 1, Told::Failed),
            entry(4, 2, 1, Told::Unknown),
        ]
    }

    fn found(n: i32, rows: i64, parts: i64) -> Found {
        Found { client: 1, n, rows, parts }
    }

    fn held(node: &str) -> Held {
        Held {
            node: node.into(),
            found: vec![found(1, 1, 1), found(2, 3, 3)],
            counters: BTreeMap::from([(0, 1), (1, 1)]),
            older: 7,
            prepared: Vec::new(),
        }
    }

    #[test]
    fn what_was_promised_is_good_with_the_unknown_write_or_without() {
        assert_eq!(judge(&ledger(), 7, &[held("a"), held("b")]), Vec::<String>::new());
        let with = |node| {
            let mut held = held(node);
            held.found.push(found(4, 2, 2));
            held.counters.insert(1, 2);
            held
        };
        assert_eq!(judge(&ledger(), 7, &[with("a"), with("b")]), Vec::<String>::new());
        let differs = judge(&ledger(), 7, &[with("a"), held("b")]);
        assert_eq!(differs.len(), 1, "{differs:?}");
        assert!(differs[0].starts_with("a and b differ"));
    }

    /// Each way to break the promise, on one node.
    #[test]
    fn every_broken_promise_is_told() {
        let broken = |change: &dyn Fn(&mut Held), word: &str| {
            let mut b = held("b");
            change(&mut b);
            let wrong = judge(&ledger(), 7, &[held("a"), b]);
            assert!(wrong.iter().any(|wrong| wrong.starts_with("b: ") && wrong.contains(word)), "{word}: {wrong:?}");
        };
        broken(&|b| b.found.retain(|found| found.n != 1), "acknowledged and is not there");
        broken(&|b| b.found.push(found(3, 2, 2)), "told to have failed");
        broken(&|b| b.found[0] = found(1, 2, 1), "twice");
        broken(&|b| b.found[1] = found(2, 2, 2), "in half");
        broken(&|b| b.found.push(found(9, 1, 1)), "nobody sent it");
        broken(&|b| *b.counters.entry(1).or_default() = 2, "the counter of client 1 says 2");
        broken(&|b| b.counters.retain(|client, _| *client != 0), "the counter of client 0 is not there");
        broken(&|b| b.older = 6, "earlier rounds");
        broken(&|b| b.prepared.push("pgtandem:1".into()), "still prepared");
    }
}
