//! The world for the checker: what it must never and what it must sometimes be.

use std::fmt::Write as _;
use std::time::Instant;

use pgtandem::cluster::members;
use pgtandem_proto::membership::NodeState;
use stateright::{Checker, Model, Property};

use crate::steps::{self, Mutant, Step};
use crate::world::{Budget, Half, Proxy, World, Write};

/// States that are looked at in CI; `MODEL_STATES` says otherwise.
const STATES: usize = 150_000;

struct Membership {
    nodes: usize,
    members: usize,
    budget: Budget,
    mutant: Mutant,
}

/// A node that clients of this proxy can see.
fn serving(world: &World) -> impl Iterator<Item = (usize, bool)> + '_ {
    let proxies = world.proxies.iter();
    proxies.filter_map(|proxy| proxy.as_ref().filter(|p| p.serves())).flat_map(|proxy| {
        // Sessions of an older epoch than the database's are ended.
        let leader = proxy.leader();
        let lives = world.nodes[leader].epoch == proxy.epoch;
        let nodes = proxy.set.nodes.iter().map(|name| World::index(name));
        nodes.filter(move |_| lives).map(move |node| (node, node == leader))
    })
}

fn told_committed_is_there(world: &World) -> bool {
    let there = |(node, leads): (usize, bool)| {
        world.writes.iter().zip(&world.nodes[node].halves).all(|(write, half)| match write {
            Write::Acknowledged { .. } if leads => *half == Half::Committed,
            Write::Acknowledged { .. } => matches!(half, Half::Committed | Half::Prepared),
            _ => true,
        })
    };
    world.is_overridden || serving(world).all(there)
}

fn told_failed_is_nowhere(world: &World) -> bool {
    let nowhere = |(node, _): (usize, bool)| {
        world
            .writes
            .iter()
            .zip(&world.nodes[node].halves)
            .all(|(w, half)| *w != Write::ToldFailed || !half.is_committed())
    };
    world.is_overridden || serving(world).all(nowhere)
}

/// A half that is committed has the leader's rows.
fn nothing_is_wrong(world: &World) -> bool {
    serving(world).all(|(node, _)| world.nodes[node].halves.iter().all(|half| *half != Half::Wrong { committed: true }))
}

fn one_proxy_an_epoch(world: &World) -> bool {
    let mut epochs: Vec<_> = world.proxies.iter().flatten().map(|proxy| proxy.epoch).collect();
    epochs.sort_unstable();
    epochs.windows(2).all(|pair| pair[0] != pair[1])
}

/// I3 for who joins: nobody believes that it is in a set of which another member knows only an older one without it. That one could
/// start again, ask nobody, and go on alone.
fn members_know_each_other(world: &World) -> bool {
    world.nodes.iter().filter(|node| node.record.state == NodeState::InSync).all(|node| {
        let Some(set) = &node.record.members else { return true };
        let others = set.nodes.iter().map(|name| &world.nodes[World::index(name)].record);
        // One that is only joining, or left, starts nothing.
        let others = others.filter(|other| other.state == NodeState::InSync);
        others.filter_map(|other| other.members.as_ref()).all(|theirs| {
            members::number(theirs) >= members::number(set) || members::contains(theirs, &node.record.node)
        })
    })
}

/// I8 in the records: who serves and lacks something has an operator's note.
fn a_loss_is_written_down(world: &World) -> bool {
    serving(world).all(|(node, leads)| {
        let lacks = world.writes.iter().zip(&world.nodes[node].halves);
        let lacks =
            lacks.into_iter().any(|(w, half)| matches!(w, Write::Acknowledged { .. }) && *half == Half::Nothing);
        // A record that was lost has taken its notes along.
        !(lacks && leads)
            || world.nodes.iter().any(|node| node.is_torn)
            || world.nodes.iter().any(|node| node.record.overrides.iter().any(|note| note == "promoted"))
    })
}

type Invariant = fn(&World) -> bool;

/// The invariant that does not hold in this world.
pub fn broken(world: &World) -> Option<&'static str> {
    let states: [(&str, Invariant); 5] = [
        ("I1", one_proxy_an_epoch),
        ("I3", members_know_each_other),
        ("I8", a_loss_is_written_down),
        ("I9", told_failed_is_nowhere),
        ("I10", |world| told_committed_is_there(world) && nothing_is_wrong(world)),
    ];
    // Those that are about a moment were looked at when it was there.
    let fault = world.fault.filter(|fault| *fault != "needless");
    fault.or_else(|| states.into_iter().find(|(_, holds)| !holds(world)).map(|(name, _)| name))
}

impl Model for Membership {
    type State = World;
    type Action = Step;

    fn init_states(&self) -> Vec<World> {
        vec![World::new(self.nodes, self.members, self.budget)]
    }

    fn actions(&self, world: &World, actions: &mut Vec<Step>) {
        actions.extend(steps::possible(world, self.mutant));
    }

    fn next_state(&self, world: &World, step: Step) -> Option<World> {
        steps::next(world, &step, self.mutant)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        let mut properties: Vec<Property<Self>> = vec![
            Property::always("I1", |_, world: &World| broken(world) != Some("I1")),
            Property::always("I2", |_, world: &World| broken(world) != Some("I2")),
            Property::always("I3", |_, world: &World| broken(world) != Some("I3")),
            Property::always("I4", |_, world: &World| broken(world) != Some("I4")),
            Property::always("I5", |_, world: &World| broken(world) != Some("I5")),
            Property::always("I6", |_, world: &World| broken(world) != Some("I6")),
            Property::always("I7", |_, world: &World| broken(world) != Some("I7")),
            Property::always("I8", |_, world: &World| broken(world) != Some("I8")),
            Property::always("I9", |_, world: &World| broken(world) != Some("I9")),
            Property::always("I10", |_, world: &World| broken(world) != Some("I10")),
            Property::always("I11", |_, world: &World| broken(world) != Some("I11")),
            Property::always("I12", |_, world: &World| broken(world) != Some("I12")),
        ];
        if self.nodes == 3 {
            // With two, a follower that was away while the new leader settled has to leave.
            properties.push(Property::always("I-needless", |_, world: &World| world.fault != Some("needless")));
        }
        if self.mutant == Mutant::None {
            if self.budget.promotions > 0 {
                properties.push(Property::sometimes(
                    "a promoted node serves an acknowledged write",
                    |_, world: &World| {
                        world.promoted
                            && !world.is_overridden
                            && world.proxies[1].as_ref().is_some_and(Proxy::serves)
                            && matches!(world.writes[0], Write::Acknowledged { .. })
                    },
                ));
            }
            if self.budget.losses > 0 {
                properties.push(Property::sometimes("another member leads", |_, world: &World| {
                    world.taken_over && matches!(world.writes[0], Write::Acknowledged { .. })
                }));
            }
            if self.budget.recoveries > 0 {
                properties.push(Property::sometimes("a node joins", |_, world: &World| world.rejoined));
            }
        }
        properties
    }
}

const NOTHING: Budget = Budget {
    writes: 1,
    ticks: 0,
    asks: 0,
    crashes: 0,
    torn: 0,
    partitions: 0,
    suspicions: 0,
    recoveries: 0,
    promotions: 0,
    failures: 0,
    losses: 0,
};

fn states() -> usize {
    std::env::var("MODEL_STATES").ok().and_then(|states| states.parse().ok()).unwrap_or(STATES)
}

/// With `MODEL_DEEP=1` one more of everything that may happen at all.
fn deeper(budget: Budget) -> Budget {
    if std::env::var_os("MODEL_DEEP").is_none() {
        return budget;
    }
    let more = |n: u8| n + u8::from(n > 0);
    Budget {
        writes: budget.writes + 1,
        ticks: more(budget.ticks),
        asks: more(budget.asks),
        crashes: more(budget.crashes),
        torn: budget.torn,
        partitions: more(budget.partitions),
        suspicions: more(budget.suspicions),
        recoveries: more(budget.recoveries),
        promotions: more(budget.promotions),
        failures: more(budget.failures),
        losses: more(budget.losses),
    }
}

/// Explores, and gives the names of what was found: broken invariants, and what must sometimes be so.
fn explore(nodes: usize, members: usize, budget: Budget, mutant: Mutant) -> (Vec<&'static str>, String) {
    let began = Instant::now();
    let model = Membership { nodes, members, budget, mutant };
    let threads = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let checker = model.checker().threads(threads).target_state_count(states()).spawn_bfs().join();
    let mut text =
        format!("{} states, depth {}, {:?}\n", checker.unique_state_count(), checker.max_depth(), began.elapsed());
    let mut found: Vec<&'static str> = Vec::new();
    for (name, path) in checker.discoveries() {
        found.push(name);
        if name.starts_with('I') {
            let _ = writeln!(text, "{name}:");
            for (_, step) in path.into_vec() {
                let _ = writeln!(text, "  {step:?}");
            }
        }
    }
    found.sort_unstable();
    eprintln!("{text}");
    (found, text)
}

fn assert_holds(nodes: usize, members: usize, budget: Budget) {
    let budget = deeper(budget);
    let (found, text) = explore(nodes, members, budget, Mutant::None);
    let broken: Vec<_> = found.iter().filter(|name| name.starts_with('I')).collect();
    assert!(broken.is_empty(), "{broken:?}\n{text}");
    let sometimes = [budget.promotions, budget.recoveries, budget.losses].iter().filter(|n| **n > 0).count();
    assert_eq!(found.len(), sometimes, "what should be possible was not reached: {found:?}\n{text}");
}

fn assert_caught(budget: Budget, mutant: Mutant, by: &[&str]) {
    assert_caught_on(2, 2, budget, mutant, by);
}

fn assert_caught_on(nodes: usize, members: usize, budget: Budget, mutant: Mutant, by: &[&str]) {
    let (found, text) = explore(nodes, members, budget, mutant);
    assert!(found.iter().any(|name| by.contains(name)), "{mutant:?} is not caught: {found:?}\n{text}");
    // The same budget finds nothing without it.
    let (found, text) = explore(nodes, members, budget, Mutant::None);
    let broken: Vec<_> = found.iter().filter(|name| name.starts_with('I')).collect();
    assert!(broken.is_empty(), "{broken:?}\n{text}");
}

const TAKEOVER: Budget = Budget { crashes: 2, promotions: 1, failures: 1, ..NOTHING };
const LEASES: Budget = Budget { ticks: 3, asks: 1, suspicions: 1, partitions: 1, ..NOTHING };
const LOSS: Budget = Budget { losses: 1, failures: 1, ..NOTHING };
const RECOVERY: Budget = Budget { suspicions: 1, recoveries: 1, crashes: 1, promotions: 1, failures: 1, ..NOTHING };

#[test]
fn a_leader_is_lost_and_another_takes_over() {
    assert_holds(2, 2, Budget { partitions: 1, suspicions: 1, ..TAKEOVER });
}

#[test]
fn leases_end_and_nodes_are_left_behind() {
    assert_holds(2, 2, Budget { crashes: 1, ..LEASES });
}

#[test]
fn nodes_are_lost_filled_and_join_again() {
    assert_holds(2, 2, Budget { torn: 1, ..RECOVERY });
}

#[test]
fn the_leader_is_lost_and_the_proxy_lives() {
    assert_holds(2, 2, Budget { crashes: 1, suspicions: 1, ..LOSS });
}

#[test]
fn the_leader_is_lost_filled_and_lost_again() {
    assert_holds(2, 2, Budget { losses: 2, recoveries: 1, failures: 0, ..LOSS });
}

#[test]
fn one_of_three_is_lost_and_the_proxy_lives() {
    assert_holds(3, 3, Budget { crashes: 1, ..LOSS });
}

#[test]
fn a_failure_that_is_told_without_the_new_leaders_marks_is_caught() {
    assert_caught(LOSS, Mutant::MarkNotAskedAfterLoss, &["I9"]);
}

#[test]
fn an_old_leader_with_a_lease_is_caught() {
    let budget = Budget { ticks: 1, asks: 1, crashes: 0, partitions: 1, losses: 2, recoveries: 1, failures: 0, ..LOSS };
    assert_caught(budget, Mutant::OldLeaderNotWaitedOut, &["I4"]);
}

#[test]
fn three_nodes() {
    assert_holds(3, 3, Budget { crashes: 1, promotions: 1, failures: 1, ..NOTHING });
}

#[test]
fn a_grow_in_the_wrong_order_is_caught() {
    assert_caught(RECOVERY, Mutant::GrowOrderReversed, &["I3"]);
}

#[test]
fn an_acknowledgement_before_the_record_is_caught() {
    assert_caught(Budget { suspicions: 1, ..NOTHING }, Mutant::AcknowledgedBeforeRecorded, &["I3"]);
}

#[test]
fn a_lease_from_receipt_is_caught() {
    assert_caught(LEASES, Mutant::LeaseFromReceipt, &["I4"]);
}

#[test]
fn a_lease_that_is_not_waited_out_is_caught() {
    assert_caught(LEASES, Mutant::LeaseNotWaitedOut, &["I4"]);
}

#[test]
fn a_failure_that_is_told_too_early_is_caught() {
    assert_caught(TAKEOVER, Mutant::ToldFailedTooEarly, &["I9"]);
}

#[test]
fn a_presumed_rollback_is_caught() {
    assert_caught(TAKEOVER, Mutant::NothingPresumed, &["I8", "I10"]);
}

#[test]
fn a_commit_that_other_members_do_not_hold_is_caught() {
    let budget = Budget { crashes: 1, promotions: 1, failures: 1, ..NOTHING };
    assert_caught_on(3, 3, budget, Mutant::PresumedWithoutAsking, &["I-needless"]);
}

#[test]
fn a_half_that_is_prepared_with_other_rows_is_caught() {
    assert_caught(TAKEOVER, Mutant::CountsNotAsserted, &["I10"]);
}

#[test]
fn a_serializable_transaction_that_the_leader_did_not_prepare_first_is_caught() {
    assert_caught(TAKEOVER, Mutant::SerializableNotPreparedFirst, &["I9"]);
}

#[test]
fn a_backlog_that_is_filled_at_the_reply_is_caught() {
    assert_caught(RECOVERY, Mutant::BacklogAtReply, &["I7"]);
}

#[test]
fn a_node_alone_that_keeps_its_generation_is_caught() {
    let budget = Budget { failures: 0, ..RECOVERY };
    assert_caught(budget, Mutant::SameGenerationAlone, &["I12"]);
}

#[test]
fn a_start_without_asking_is_caught() {
    let budget = Budget { crashes: 2, promotions: 1, ..NOTHING };
    assert_caught(budget, Mutant::NobodyAskedAtStart, &["I1", "I3", "I8", "I10"]);
}
