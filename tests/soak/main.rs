//! Rounds on real hosts, each with a load and a fault drawn from a seed. Whatever dies, whenever: every acknowledged write is on every member, none
//! twice, no half transaction, nothing that was told to have failed, and nobody serves who is stale.
//!
//! `make soak ROUNDS=1000 SEED=7` plays until so many rounds of the seed are done in all runs together; `ROUND=12` plays one again, on
//! a fresh cluster. By itself it is each fault once, on two nodes and on three.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test that panics has failed")]

#[path = "../common/mod.rs"]
mod common;
mod disk;
mod hosts;
mod judge;
mod links;
mod load;
mod person;
mod play;
mod schedule;
mod state;

use std::fmt::Write as _;
use std::ops::Range;
use std::path::PathBuf;
use std::time::Instant;

use judge::Told;
use play::{Outcome, Stage};
use schedule::{LIFE, Round};
use state::State;

/// The seed of the rounds that run with every test.
const SEED: u64 = 1;

fn number(name: &str) -> Option<u64> {
    let given = std::env::var(name).ok().filter(|text| !text.is_empty());
    given.map(|text| text.parse().unwrap_or_else(|_| panic!("{name}={text} is no number")))
}

/// Where the state and the logs of red rounds are.
fn folder() -> Option<PathBuf> {
    std::env::var_os("SOAK_DIR").filter(|folder| !folder.is_empty()).map(PathBuf::from)
}

/// Plays these rounds; panics with the first red one.
async fn play(seed: u64, numbers: Range<u64>, state: &mut State) {
    let mut stage: Option<(u64, Stage)> = None;
    for number in numbers {
        let round = schedule::round(seed, number);
        let life = number / LIFE;
        if stage.as_ref().is_none_or(|(of, _)| *of != life) {
            // The old cluster goes first.
            drop(stage.take());
            stage = Some((life, Stage::new(round.nodes).await));
        }
        let (_, on) = stage.as_mut().unwrap();
        let began = Instant::now();
        let outcome = on.play(&round).await;
        let took = began.elapsed().as_secs_f64();
        eprintln!("{}", line(&round, &outcome, took));
        let rounds = state.of(seed);
        rounds.next = number + 1;
        match (&outcome.skipped, outcome.wrong.is_empty()) {
            (Some(_), _) => rounds.skipped += 1,
            (None, true) => rounds.green += 1,
            (None, false) => rounds.red.push(number),
        }
        state.store();
        if !outcome.wrong.is_empty() {
            let kept = folder().map(|folder| folder.join(format!("red-{seed}-{number}")));
            let told = story(&round, &outcome);
            if let Some(kept) = &kept {
                on.site.keep(kept);
                std::fs::write(kept.join("round.txt"), format!("{told}\n{:#?}", outcome.ledger)).unwrap();
            }
            let kept = kept.map_or_else(|| on.site.cluster.logs(), |kept| format!("kept in {}", kept.display()));
            panic!("{told}\n{kept}\nplay it again: make soak SEED={seed} ROUND={number}");
        }
    }
    eprintln!("{}", state.summary());
}

fn line(round: &Round, outcome: &Outcome, took: f64) -> String {
    let end = match (&outcome.skipped, outcome.wrong.is_empty()) {
        (Some(why), _) => format!("skipped: {why}"),
        (None, true) => "green".to_owned(),
        (None, false) => "RED".to_owned(),
    };
    let count = |told| outcome.told(told);
    format!(
        "seed {}, round {} on {} nodes: {end}, {took:.1} s; {} committed, {} failed, {} unknown; {:?}",
        round.seed,
        round.number,
        round.nodes,
        count(Told::Committed),
        count(Told::Failed),
        count(Told::Unknown),
        round.fault
    )
}

fn story(round: &Round, outcome: &Outcome) -> String {
    let mut told =
        format!("seed {}, round {} is red:\n{}\n{round:#?}\n", round.seed, round.number, outcome.wrong.join("\n"));
    for typed in &outcome.typed {
        let _ = writeln!(told, "{typed}");
    }
    told
}

/// As many rounds as `make soak` asks for.
#[tokio::test(flavor = "multi_thread")]
async fn rounds_of_a_seed() {
    let seed = number("SOAK_SEED").unwrap_or(SEED);
    if let Some(round) = number("SOAK_ROUND") {
        // One that is played again does not count.
        return play(seed, round..round + 1, &mut State::default()).await;
    }
    assert_eq!(schedule::nodes(0), 2);
    let mut state = State::load(folder().as_deref());
    let next = state.of(seed).next;
    play(seed, next..number("SOAK_ROUNDS").unwrap_or(LIFE), &mut state).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_life_on_three_nodes() {
    assert_eq!(schedule::nodes(LIFE), 3);
    play(SEED, LIFE..2 * LIFE, &mut State::default()).await;
}
