//! From a seed and a number to a round: on how many nodes, which load, which fault, when, and who puts it right. Pure: the same seed and number
//! give the same round, whatever was played before.

use rand::rngs::StdRng;
use rand::seq::SliceRandom;
use rand::{RngExt, SeedableRng};

/// What can go wrong, without its particulars.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    KillOnLeadersHost,
    KillOnFollowersHost,
    KillEverything,
    LoseLeadersHost,
    Hang,
    HangThroughTakeover,
    FalseStatement,
    RestartPostgres,
    TornRecord,
    Partition,
    SlowLink,
    FullDisk,
    Switch,
}

const KINDS: [Kind; 13] = [
    Kind::KillOnLeadersHost,
    Kind::KillOnFollowersHost,
    Kind::KillEverything,
    Kind::LoseLeadersHost,
    Kind::Hang,
    Kind::HangThroughTakeover,
    Kind::FalseStatement,
    Kind::RestartPostgres,
    Kind::TornRecord,
    Kind::Partition,
    Kind::SlowLink,
    Kind::FullDisk,
    Kind::Switch,
];

/// Rounds that one cluster lives through: each kind of fault once, in an order of its own.
pub const LIFE: u64 = KINDS.len() as u64;

/// A host, by the part that its node has when the fault comes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    Leader,
    /// The followers in the order of their numbers, from the leader's on.
    Follower(usize),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Process {
    Postgres,
    Agent,
    Proxy,
}

const PROCESSES: [Process; 3] = [Process::Postgres, Process::Agent, Process::Proxy];

/// Which way nothing gets through between a host and all others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    Both,
    ToIt,
    FromIt,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fault {
    /// kill -9, at once. A person starts them again.
    Kill(Vec<(Place, Process)>),
    /// The host of the proxy that serves is gone; a person makes the next host's node the leader; then the host comes back.
    LoseLeadersHost,
    /// SIGSTOP, and SIGCONT later; of PostgreSQL every process.
    Hang {
        place: Place,
        process: Process,
        ms: u64,
    },
    /// The proxy that serves hangs until a person has made the next host's node the leader.
    HangThroughTakeover,
    /// The host of the proxy is cut off and goes on alone; a person states that it is dead, and makes the next host's node the leader.
    FalseStatement,
    /// `pg_ctl restart`, typed by a person who does not know better.
    RestartPostgres {
        place: Place,
        mode: &'static str,
    },
    /// The agent is killed, so much of its record is left, the agent is started.
    TornRecord {
        place: Place,
        percent: u64,
    },
    Partition {
        place: Place,
        way: Way,
        ms: u64,
    },
    /// Everything between this host and the others takes longer.
    SlowLink {
        place: Place,
        delay_ms: u64,
        ms: u64,
    },
    /// No byte is free on the disk with PostgreSQL's data and the agent's folder.
    FullDisk {
        place: Place,
        ms: u64,
    },
    /// `pgtandem switch`.
    Switch {
        to: Place,
    },
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Round {
    pub seed: u64,
    pub number: u64,
    pub nodes: usize,
    pub clients: i32,
    /// Bytes of a row at most.
    pub row_bytes_max: usize,
    /// Writes that are acknowledged before the fault comes, and after it was put right.
    pub before: usize,
    pub after: usize,
    pub fault: Fault,
}

/// Nodes of the clusters on which rounds are played: two and three in turn.
pub fn nodes(number: u64) -> usize {
    if (number / LIFE).is_multiple_of(2) { 2 } else { 3 }
}

pub fn round(seed: u64, number: u64) -> Round {
    let nodes = nodes(number);
    let mut rng = StdRng::seed_from_u64(seed.wrapping_mul(1_000_003).wrapping_add(number));
    Round {
        seed,
        number,
        nodes,
        clients: rng.random_range(3..=6),
        row_bytes_max: if rng.random_bool(0.3) { 8000 } else { 200 },
        before: rng.random_range(20..=80),
        after: rng.random_range(20..=60),
        fault: fault(kind(seed, number), nodes, &mut rng),
    }
}

pub fn kind(seed: u64, number: u64) -> Kind {
    let mut kinds = KINDS;
    kinds.shuffle(&mut StdRng::seed_from_u64(seed.wrapping_mul(999_983).wrapping_add(number / LIFE)));
    kinds[usize::try_from(number % LIFE).expect("small")]
}

fn fault(kind: Kind, nodes: usize, rng: &mut StdRng) -> Fault {
    let follower = Place::Follower(rng.random_range(0..nodes - 1));
    let any = if rng.random_bool(0.5) { Place::Leader } else { follower };
    match kind {
        Kind::KillOnLeadersHost => Fault::Kill(some(Place::Leader, rng)),
        Kind::KillOnFollowersHost => Fault::Kill(some(follower, rng)),
        Kind::KillEverything => {
            let places = (0..nodes - 1).map(Place::Follower).chain([Place::Leader]);
            Fault::Kill(places.flat_map(|place| PROCESSES.map(|process| (place, process))).collect())
        }
        Kind::LoseLeadersHost => Fault::LoseLeadersHost,
        Kind::Hang => Fault::Hang {
            place: any,
            process: PROCESSES[rng.random_range(0..PROCESSES.len())],
            ms: rng.random_range(200..6000),
        },
        Kind::HangThroughTakeover => Fault::HangThroughTakeover,
        Kind::FalseStatement => Fault::FalseStatement,
        Kind::RestartPostgres => {
            let mode = if rng.random_bool(0.7) { "fast" } else { "immediate" };
            Fault::RestartPostgres { place: any, mode }
        }
        Kind::TornRecord => Fault::TornRecord { place: any, percent: rng.random_range(0..100) },
        Kind::Partition => {
            let way = [Way::Both, Way::ToIt, Way::FromIt][rng.random_range(0..3)];
            Fault::Partition { place: any, way, ms: rng.random_range(500..8000) }
        }
        Kind::SlowLink => {
            Fault::SlowLink { place: any, delay_ms: rng.random_range(2..80), ms: rng.random_range(1000..4000) }
        }
        Kind::FullDisk => Fault::FullDisk { place: any, ms: rng.random_range(1000..5000) },
        Kind::Switch => Fault::Switch { to: follower },
    }
}

/// At least one process of the host.
fn some(place: Place, rng: &mut StdRng) -> Vec<(Place, Process)> {
    loop {
        let drawn: Vec<_> = PROCESSES.into_iter().filter(|_| rng.random_bool(0.5)).collect();
        if !drawn.is_empty() {
            return drawn.into_iter().map(|process| (place, process)).collect();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn a_seed_is_always_the_same_rounds() {
        let rounds = |seed| (0..3 * LIFE).map(|number| round(seed, number)).collect::<Vec<_>>();
        assert_eq!(rounds(5), rounds(5));
        assert_ne!(rounds(5), rounds(6));
    }

    #[test]
    fn every_life_has_every_fault_and_lives_are_on_two_and_three_nodes() {
        for life in 0..10 {
            let numbers = life * LIFE..(life + 1) * LIFE;
            let kinds: BTreeSet<Kind> = numbers.clone().map(|number| kind(3, number)).collect();
            assert_eq!(kinds.len(), KINDS.len());
            let nodes: BTreeSet<usize> = numbers.map(|number| round(3, number).nodes).collect();
            assert_eq!(nodes.into_iter().collect::<Vec<_>>(), [if life % 2 == 0 { 2 } else { 3 }]);
        }
    }
}
