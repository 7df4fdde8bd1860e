//! Long lives of the same world, drawn from a seed: many transactions, crashes, partitions, lost and late messages, records that are gone
//! after a crash, recoveries and promotions, and after every step the same invariants. The model looks at everything that is near; this
//! looks far.
//!
//! `make simulate SEEDS=100000` goes on from there; `make simulate SEED=7 SEEDS=1` plays one again and shows its steps.
//! A record is on disk before anybody acts on it, so a crash in the middle of storing is a step that did not happen, and one that
//! damages it is `TearRecord`. An answer that never arrives is an `Arrive` that is never drawn.

use std::collections::BTreeMap;
use std::mem::{Discriminant, discriminant};

use crate::model::broken;
use crate::steps::{self, Mutant, Step};
use crate::world::{Budget, Half, World, Write};

/// Seeds in CI; `SIMULATE_SEEDS` and `SIMULATE_SEED` say otherwise.
const SEEDS: u64 = 1000;
/// Steps of one life.
const STEPS: usize = 250;
const LIFE: Budget = Budget {
    writes: 12,
    ticks: 60,
    asks: 60,
    crashes: 12,
    torn: 1,
    partitions: 4,
    suspicions: 6,
    recoveries: 6,
    promotions: 4,
    failures: 4,
    losses: 4,
};

/// SplitMix64: small, and the same on every machine and in every version.
struct Random(u64);

impl Random {
    fn below(&mut self, n: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        usize::try_from((z ^ (z >> 31)) % n as u64).expect("below n")
    }
}

/// How much there was to go wrong, over all lives.
#[derive(Debug, Default)]
struct Seen {
    steps: usize,
    acknowledged: usize,
    told_failed: usize,
    promotions: usize,
    joins: usize,
}

/// Whether a person who tells the truth, and accepts no loss, could take this step.
fn is_honest(world: &World, step: &Step) -> bool {
    match step {
        Step::Promote { accepts_loss: true, .. } => false,
        Step::Promote { node, stated: true, .. } => {
            let has_all = world.writes.iter().zip(&world.nodes[*node].halves);
            let has_all =
                has_all.into_iter().all(|(w, half)| !matches!(w, Write::Acknowledged { .. }) || *half != Half::Nothing);
            has_all && (0..world.nodes.len()).all(|other| world.reaches(*node, other) || world.host_is_down(other))
        }
        _ => true,
    }
}

/// What is rare in life is rare here.
fn weight(step: &Step) -> usize {
    match step {
        Step::KillProxy(_)
        | Step::KillAgent(_)
        | Step::KillHost(_)
        | Step::Partition
        | Step::GiveUp(_)
        | Step::TearRecord(_)
        | Step::LoseReply(_)
        | Step::JoinFailed(_) => 1,
        Step::Suspect { .. } | Step::Promote { .. } | Step::LoseLeader(_) => 2,
        Step::Tick | Step::Ask(_) | Step::Cut { .. } => 4,
        _ => 12,
    }
}

/// One step: first its kind, so that kinds with many variants do not push others out, then which.
fn draw(world: &World, random: &mut Random, honest: bool) -> Option<Step> {
    let mut steps = steps::possible(world, Mutant::None);
    steps.retain(|step| !honest || is_honest(world, step));
    let mut kinds: Vec<(Discriminant<Step>, usize)> = Vec::new();
    for step in &steps {
        if !kinds.iter().any(|(kind, _)| *kind == discriminant(step)) {
            kinds.push((discriminant(step), weight(step)));
        }
    }
    let total: usize = kinds.iter().map(|(_, weight)| weight).sum();
    let mut drawn = random.below(total.max(1));
    let (kind, _) = kinds.into_iter().find(|(_, weight)| {
        let here = drawn < *weight;
        drawn = drawn.wrapping_sub(*weight);
        here
    })?;
    steps.retain(|step| discriminant(step) == kind);
    let which = random.below(steps.len());
    Some(steps.swap_remove(which))
}

fn live(seed: u64, seen: &mut Seen) -> Result<(), String> {
    let mut random = Random(seed);
    let nodes = 2 + random.below(2);
    // Most people tell the truth: what is overridden says nothing about the program.
    let honest = random.below(4) > 0;
    let mut world = World::new(nodes, nodes, LIFE);
    let mut taken: Vec<Step> = Vec::new();
    for _ in 0..STEPS {
        let Some(step) = draw(&world, &mut random, honest) else { break };
        let Some(next) = steps::next(&world, &step, Mutant::None) else { continue };
        seen.joins += usize::from(matches!(step, Step::Joined(_)));
        seen.promotions += usize::from(step == Step::WritePromotion);
        taken.push(step);
        world = next;
        if let Some(broken) = broken(&world) {
            let steps: BTreeMap<usize, String> =
                taken.iter().enumerate().map(|(at, s)| (at, format!("{s:?}"))).collect();
            return Err(format!("seed {seed}, {nodes} nodes: {broken} is broken\n{steps:#?}"));
        }
    }
    seen.steps += taken.len();
    seen.acknowledged += world.writes.iter().filter(|w| matches!(w, Write::Acknowledged { .. })).count();
    seen.told_failed += world.writes.iter().filter(|w| **w == Write::ToldFailed).count();
    Ok(())
}

fn number(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().and_then(|value| value.parse().ok()).unwrap_or(default)
}

#[test]
fn long_lives_from_seeds() {
    let (first, count) = (number("SIMULATE_SEED", 1), number("SIMULATE_SEEDS", SEEDS));
    let mut seen = Seen::default();
    for seed in first..first + count {
        if let Err(trace) = live(seed, &mut seen) {
            panic!("{trace}\nmake simulate SEED={seed} SEEDS=1");
        }
    }
    eprintln!("{count} seeds: {seen:?}");
    if count >= SEEDS {
        let enough = [seen.acknowledged, seen.told_failed, seen.promotions, seen.joins];
        assert!(enough.iter().all(|n| *n > 100), "too little happened: {seen:?}");
    }
}
