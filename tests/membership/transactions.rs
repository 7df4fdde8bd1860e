//! Effects on members, acknowledgements, and changes of the member set under a reign.

use std::collections::BTreeSet;

use pgtandem::cluster::{members, record};
use pgtandem_proto::membership::NodeState;

use crate::steps::Mutant;
use crate::world::{Half, Join, NAMES, Shrink, World, Write};

/// A PREPARE or its end on a follower. I6: nothing of an epoch below the promised one.
pub fn effect(w: &mut World, write: usize, node: usize, half: Half) {
    let (Write::Open { epoch, .. } | Write::Failing { epoch, .. } | Write::Acknowledged { epoch, .. }) =
        w.writes[write]
    else {
        return;
    };
    if epoch < w.nodes[node].record.promised {
        w.fault = Some("I6");
    }
    w.nodes[node].halves[write] = half;
}

/// The client is told. I2, I3 and I4 must hold at this moment.
pub fn acknowledge(w: &mut World, write: usize, mutant: Mutant) -> Option<()> {
    let Write::Sent { by, epoch } = w.writes[write] else { return None };
    let p = w.proxies[by].as_ref()?;
    for name in &p.set.nodes {
        let node = &w.nodes[World::index(name)];
        if node.halves[write] == Half::Nothing {
            w.fault = Some("I2");
        }
        let stored = node.record.members.as_ref().map_or((0, 0), members::number);
        if stored < members::number(&p.set) && !node.is_torn {
            w.fault = Some("I3");
        }
    }
    for (index, node) in w.nodes.iter().enumerate() {
        let sure = node.record.state == NodeState::InSync && !node.record.uncertain && node.lease.is_valid(w.now);
        if sure && node.agent_runs && !members::contains(&p.set, NAMES[index]) && node.halves[write] == Half::Nothing {
            w.fault = Some("I4");
        }
    }
    let alone = p.set.nodes.len() == 1;
    if mutant == Mutant::BacklogAtReply
        && let Some(join) = w.proxies[by].as_mut()?.join.as_mut()
    {
        join.backlog.insert(write);
    }
    w.writes[write] = Write::Acknowledged { by, epoch, finished: alone };
    Some(())
}

pub fn suspect(w: &mut World, proxy: usize, node: usize, mutant: Mutant) -> Option<()> {
    w.left.suspicions -= 1;
    let set = w.proxies[proxy].as_ref()?.set.clone();
    let smaller = members::without(&set, NAMES[node]).ok()?;
    let mut is_told = false;
    if w.reaches(proxy, node) {
        let next = record::store(&w.nodes[node].record, &smaller, NodeState::Stale, false, None, Some("left"));
        is_told = w.change(node, next);
    }
    let p = w.proxies[proxy].as_mut()?;
    p.grants.stop(NAMES[node]);
    if mutant == Mutant::LeaseNotWaitedOut {
        is_told = true;
    }
    if mutant == Mutant::AcknowledgedBeforeRecorded {
        // The commits that wait go on at once; the records are written behind them.
        p.set = smaller;
        return Some(());
    }
    p.shrink = Some(Shrink { node, is_told });
    Some(())
}

pub fn store_smaller(w: &mut World, proxy: usize) -> Option<()> {
    let p = w.proxies[proxy].as_ref()?;
    let smaller = members::without(&p.set, NAMES[p.shrink.as_ref()?.node]).ok()?;
    let generation = w.new_generation();
    for name in &smaller.nodes {
        let at = World::index(name);
        if !w.reaches(proxy, at) {
            return None;
        }
        let next = record::store(&w.nodes[at].record, &smaller, NodeState::InSync, true, Some(&generation), None);
        w.change(at, next).then_some(())?;
    }
    let p = w.proxies[proxy].as_mut()?;
    p.set = smaller;
    p.shrink = None;
    // What was acknowledged and waited for that node alone is finished.
    let set = p.set.clone();
    for write in 0..w.writes.len() {
        if let Write::Acknowledged { by, epoch, finished: false } = w.writes[write]
            && by == proxy
        {
            let finished = set.nodes.iter().all(|name| w.nodes[World::index(name)].halves[write].is_committed());
            w.writes[write] = Write::Acknowledged { by, epoch, finished };
        }
    }
    Some(())
}

/// The node is filled up to the cut; from here what is committed goes to its backlog. I12: nothing that was acknowledged is lost.
pub fn cut(w: &mut World, proxy: usize, node: usize) -> Option<()> {
    let p = w.proxies[proxy].as_ref()?;
    let (epoch, leader) = (p.epoch, p.leader());
    if !w.reaches(proxy, leader) || w.nodes[node].record.promised > epoch {
        return None;
    }
    if record::left_behind(&w.nodes[node].record, &w.nodes[leader].record.generations) == NodeState::Forked {
        return None;
    }
    // Whoever lost its record does not know what its data are.
    let knows = w.nodes[node].record.state != NodeState::Blank;
    let seeding = record::enter(&w.nodes[node].record, epoch, NodeState::Seeding);
    w.change(node, seeding).then_some(())?;
    let follows = record::enter(&w.nodes[node].record, epoch, NodeState::CatchingUp);
    w.change(node, follows).then_some(())?;
    w.left.recoveries -= 1;
    for write in 0..w.writes.len() {
        let only = w.nodes[node].halves[write].is_committed()
            && !w.nodes.iter().enumerate().any(|(other, n)| other != node && n.halves[write] != Half::Nothing);
        if matches!(w.writes[write], Write::Acknowledged { .. }) && only && knows {
            w.fault = Some("I12");
        }
        let leader = w.nodes[leader].halves[write];
        w.nodes[node].halves[write] = if leader.is_committed() { leader } else { Half::Nothing };
    }
    w.nodes[node].epoch = epoch;
    // Its PostgreSQL was stopped, and with it the sessions of a proxy on its host.
    let leads = w.proxies[node].as_ref().is_none_or(|p| p.leader() == node);
    for write in w.writes.iter_mut().filter(|_| leads) {
        if matches!(*write, Write::Open { by, .. } | Write::Failing { by, .. } | Write::Sent { by, .. } if by == node) {
            *write = Write::Unknown;
        }
    }
    let join = Join { node, backlog: BTreeSet::new(), is_spoilt: false, stored_here: false, stored_there: false };
    w.proxies[proxy].as_mut()?.join = Some(join);
    Some(())
}

pub fn store_joined(w: &mut World, proxy: usize, mutant: Mutant) -> Option<()> {
    let p = w.proxies[proxy].as_ref()?;
    let join = p.join.clone()?;
    let reversed = mutant == Mutant::GrowOrderReversed;
    if join.stored_there || (!join.stored_here && !reversed) || !w.reaches(proxy, join.node) {
        return None;
    }
    let larger = members::with(&p.set, NAMES[join.node]).ok()?;
    let generations = w.nodes[p.leader()].record.generations.clone();
    for write in &join.backlog {
        w.nodes[join.node].halves[*write] = Half::Committed;
    }
    let next = record::join(&w.nodes[join.node].record, &larger, &generations);
    w.change(join.node, next).then_some(())?;
    w.nodes[join.node].lease.forget();
    w.proxies[proxy].as_mut()?.join.as_mut()?.stored_there = true;
    Some(())
}

/// The gate opens. I7: the node has everything that the leader has committed.
pub fn joined(w: &mut World, proxy: usize) -> Option<()> {
    let p = w.proxies[proxy].as_ref()?;
    let join = p.join.clone()?;
    if !(join.stored_here && join.stored_there) {
        return None;
    }
    let (larger, leader) = (members::with(&p.set, NAMES[join.node]).ok()?, p.leader());
    for write in 0..w.writes.len() {
        if w.nodes[leader].halves[write].is_committed() && !w.nodes[join.node].halves[write].is_committed() {
            w.fault = Some("I7");
        }
    }
    let p = w.proxies[proxy].as_mut()?;
    p.grants.resume(NAMES[join.node]);
    p.set = larger;
    p.join = None;
    w.rejoined = true;
    Some(())
}

/// The set goes on without the node, before the gate opens.
pub fn join_failed(w: &mut World, proxy: usize, mutant: Mutant) -> Option<()> {
    let p = w.proxies[proxy].as_ref()?;
    let join = p.join.clone()?;
    let mut set = p.set.clone();
    if join.stored_here || join.stored_there {
        let larger = members::with(&set, NAMES[join.node]).ok()?;
        set = members::without(&larger, NAMES[join.node]).ok()?;
        if w.reaches(proxy, join.node) {
            let next = record::store(&w.nodes[join.node].record, &set, NodeState::Stale, false, None, None);
            w.change(join.node, next);
        }
        let generation = (mutant != Mutant::SameGenerationAlone).then(|| w.new_generation());
        for name in set.nodes.clone() {
            let at = World::index(&name);
            if !w.reaches(proxy, at) {
                return None;
            }
            let next = record::store(&w.nodes[at].record, &set, NodeState::InSync, true, generation.as_deref(), None);
            w.change(at, next).then_some(())?;
        }
    }
    let p = w.proxies[proxy].as_mut()?;
    p.set = set;
    p.join = None;
    Some(())
}
