//! Random transactions of several clients at once, made from a seed, and the servers compared whenever nobody has a transaction open.
//!
//! `make torture SEED=7 SEEDS=100 TRANSACTIONS=10000 NODES=2` runs for hours; by itself it is a minute on seeds that stay the same.
//! A red run is cut down as far as it stays red, and printed as a script. `SEED=n SEEDS=1` plays one again.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test that panics has failed")]

#[path = "../common/mod.rs"]
mod common;
mod generate;
mod judge;
mod run;
mod schedule;
mod shrink;
mod statements;
mod tables;

use std::time::Instant;

use judge::Counts;

/// A number from the environment, as `make torture` gives it.
fn number(name: &str, default: u64) -> u64 {
    let given = std::env::var(name).ok().filter(|text| !text.is_empty());
    given.map_or(default, |text| text.parse().unwrap_or_else(|_| panic!("{name}={text} is no number")))
}

#[tokio::test(flavor = "multi_thread")]
async fn random_transactions_leave_identical_servers() {
    let (first, seeds) = (number("TORTURE_SEED", 1), number("TORTURE_SEEDS", 4));
    let transactions = usize::try_from(number("TORTURE_TRANSACTIONS", 240)).unwrap();
    let nodes = usize::try_from(number("TORTURE_NODES", 2)).unwrap();
    let mut bench = run::Bench::up(nodes);
    let mut all = Counts::default();
    for seed in first..first + seeds {
        let started = Instant::now();
        eprintln!("seed {seed}: {transactions} transactions on {nodes} nodes");
        let schedule = generate::schedule(seed, transactions);
        let outcome = bench.run(&schedule).await;
        let took = started.elapsed().as_secs_f64();
        eprintln!("seed {seed}: {took:.1} s, {} failures\n{}", outcome.failures.len(), outcome.counts);
        if !outcome.failures.is_empty() {
            eprintln!("{}\nlooking for a smaller schedule", outcome.failures.join("\n"));
            let small = shrink::shrink(&mut bench, &schedule, &outcome).await;
            panic!("seed {seed} is red:\n{}\n{}", outcome.failures.join("\n"), small.script());
        }
        all.add(&outcome.counts);
    }
    eprintln!("all seeds\n{all}");
    assert!(all.committed > 0, "nothing was committed");
}

#[test]
fn a_seed_is_always_the_same_schedule() {
    let script = |seed| generate::schedule(seed, 200).script();
    assert_eq!(script(5), script(5));
    assert_ne!(script(5), script(6));
}
