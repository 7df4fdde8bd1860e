//! A proxy begins a reign; a person promotes a node; a node that was left behind is told.

use std::collections::{BTreeSet, HashMap, HashSet};

use pgtandem::cluster::lease::Grants;
use pgtandem::cluster::promote::{self, Case, Plan, Stated};
use pgtandem::cluster::start::{self, Occasion, Other};
use pgtandem::cluster::{members, record};
use pgtandem::replicate::resolve::{self, Fate, Survivor};
use pgtandem_proto::membership::{MemberSet, NodeState, Record};

use crate::steps::{Mutant, tunnel};
use crate::world::{Half, NAMES, Phase, Promotion, Proxy, World, Write};

pub fn start_proxy(w: &mut World, own: usize, mutant: Mutant) -> Option<()> {
    let others: Vec<Other<'_>> = (0..w.nodes.len())
        .filter(|other| *other != own)
        .map(|other| Other { node: NAMES[other], record: w.reaches(own, other).then_some(&w.nodes[other].record) })
        .collect();
    let record = &w.nodes[own].record;
    let start = if mutant == Mutant::NobodyAskedAtStart {
        let nobody: Vec<_> = others.iter().map(|other| Other { record: None, ..*other }).collect();
        let set = record.members.as_ref()?;
        start::judge(record, &nobody, Occasion::LeaderBack { epoch: record.promised, set })
    } else {
        start::judge(record, &others, Occasion::Start)
    };
    begin(w, own, start.ok()?)
}

/// Everybody who goes on promises.
fn begin(w: &mut World, own: usize, start: start::Start) -> Option<()> {
    let leaving: BTreeSet<String> = start.leaving.iter().map(|(name, _)| name.clone()).chain(start.silent).collect();
    let leader = World::index(&start.set.leader);
    let promising: BTreeSet<usize> =
        start.followers.iter().map(|name| World::index(name)).chain([own, leader]).collect();
    for node in promising {
        let promised = record::promise(&w.nodes[node].record, start.epoch);
        w.change(node, promised).then_some(())?;
        w.nodes[node].lease.forget();
    }
    w.proxies[own] = Some(Proxy {
        epoch: start.epoch,
        set: start.set,
        grants: Grants::default(),
        phase: Phase::Promised { leaving },
        shrink: None,
        join: None,
    });
    Some(())
}

/// The leader's PostgreSQL ends, or hangs: another member stores that it leads.
pub fn lose_leader(w: &mut World, own: usize) -> Option<()> {
    let p = w.proxies[own].as_ref()?;
    let (epoch, set, leader) = (p.epoch, p.set.clone(), p.leader());
    let candidate = |node: usize| start::Candidate {
        node: NAMES[node],
        answer: w.reaches(own, node).then_some((&w.nodes[node].record, node != leader)),
    };
    let candidates: Vec<_> = (0..w.nodes.len()).map(candidate).collect();
    let next = start::successor(NAMES[own], &set, epoch, &candidates)?;
    w.left.losses -= 1;
    let generation = w.new_generation();
    let at = World::index(&next.leader);
    let stored = record::store(&w.nodes[at].record, &next, NodeState::InSync, true, Some(&generation), None);
    w.change(at, stored).then_some(())?;
    let left = set.nodes.iter().filter(|name| **name != next.leader).cloned().collect();
    let p = w.proxies[own].as_mut()?;
    p.phase = Phase::TakingOver { next, left, generation };
    (p.shrink, p.join) = (None, None);
    Some(())
}

/// Somebody else hears of it; one that leaves and can not be reached has its lease waited out.
pub fn tell_taken(w: &mut World, own: usize, mutant: Mutant) -> Option<()> {
    let p = w.proxies[own].as_mut()?;
    let Phase::TakingOver { next, left, generation } = &mut p.phase else { return None };
    let (next, name, generation) = (next.clone(), left.pop()?, generation.clone());
    let stays = members::contains(&next, &name);
    p.grants.stop(&name);
    let free_at = p.grants.free_at(&name);
    let node = World::index(&name);
    let (state, generation) = if stays { (NodeState::InSync, Some(generation)) } else { (NodeState::Stale, None) };
    let stored = record::store(&w.nodes[node].record, &next, state, stays, generation.as_deref(), None);
    let is_told = w.reaches(own, node) && w.change(node, stored);
    // One that should stay is found out by the reign that follows.
    let is_free = free_at.is_none_or(|at| w.now >= at) || mutant == Mutant::OldLeaderNotWaitedOut;
    (is_told || is_free).then_some(())
}

/// The reign under the new leader begins, as at every return of a leader.
pub fn start_with_taken(w: &mut World, own: usize) -> Option<()> {
    let p = w.proxies[own].as_ref()?;
    let Phase::TakingOver { next, .. } = &p.phase else { return None };
    let others: Vec<Other<'_>> = (0..w.nodes.len())
        .filter(|other| *other != own)
        .map(|other| Other { node: NAMES[other], record: w.reaches(own, other).then_some(&w.nodes[other].record) })
        .collect();
    let occasion = Occasion::LeaderBack { epoch: p.epoch, set: next };
    let start = w.reaches(own, own).then(|| start::judge(&w.nodes[own].record, &others, occasion))?.ok()?;
    let is_free = |name: &String| p.grants.free_at(name).is_none_or(|at| w.now >= at);
    start.silent.iter().all(is_free).then_some(())?;
    begin(w, own, start)
}

/// Every member's databases: older sessions end, what is prepared is decided.
pub fn settle(w: &mut World, own: usize, mutant: Mutant) -> Option<()> {
    let p = w.proxies[own].as_ref()?;
    let (epoch, set, leads) = (p.epoch, p.set.clone(), p.leader());
    let Phase::Promised { leaving } = &p.phase else { return None };
    let mut leaving = leaving.clone();
    let mut staying = Vec::new();
    for name in set.nodes.iter().filter(|name| *name != NAMES[leads] && !leaving.contains(*name)) {
        let node = World::index(name);
        if tunnel(w, own, node, epoch) {
            w.nodes[node].epoch = epoch;
            staying.push(node);
        }
    }
    leaving.extend(
        set.nodes.iter().filter(|name| *name != NAMES[leads] && !staying.contains(&World::index(name))).cloned(),
    );
    if !w.reaches(own, leads) || w.nodes[leads].record.promised != epoch {
        return None;
    }
    w.nodes[leads].epoch = epoch;
    let survivors: Vec<Survivor> = staying.iter().map(|node| survivor(w, *node)).collect();
    let knows = w.nodes[leads].record.members.as_ref().is_some_and(|set| set.leader == NAMES[leads]);
    let takes_over = w.nodes[leads].record.taking_over || !knows;
    for write in 0..w.writes.len() {
        if w.nodes[leads].halves[write].is_prepared() {
            let gid = write.to_string();
            let fate = resolve::without_leader("shop", &gid, i32::try_from(write).ok()?, 1, &survivors);
            let commit = match mutant {
                Mutant::NothingPresumed => false,
                Mutant::PresumedWithoutAsking => takes_over,
                _ => takes_over && fate != Fate::NotEverywhere,
            };
            w.nodes[leads].halves[write] = w.nodes[leads].halves[write].finished(commit);
        }
        let leader = w.nodes[leads].halves[write].is_committed();
        for node in staying.clone() {
            let half = w.nodes[node].halves[write];
            if half.is_prepared() {
                w.nodes[node].halves[write] = half.finished(leader);
            }
            match (leader, w.nodes[node].halves[write].is_committed()) {
                (true, false) => {
                    if takes_over {
                        // It held the same set, and nothing was decided without it.
                        w.fault = Some("needless");
                    }
                    leaving.insert(NAMES[node].to_owned());
                }
                // The leader lost what a follower has: nothing is served.
                (false, true) => w.proxies[own] = None,
                _ => {}
            }
        }
    }
    w.proxies[own].as_ref()?;
    let mut next = set;
    for name in &leaving {
        if members::contains(&next, name) {
            next = members::without(&next, name).ok()?;
        }
    }
    let next = members::in_epoch(&next, epoch, NAMES[own]).ok()?;
    let others = next.nodes.iter().filter(|n| *n != NAMES[leads]).cloned();
    // The proxy's own node knows where its proxy is, although it may be no member.
    let bystander = (!members::contains(&next, NAMES[own])).then(|| NAMES[own].to_owned());
    let left = [NAMES[leads].to_owned()].into_iter().chain(others).chain(bystander).collect();
    let shrinks = start::shrinks(&w.nodes[leads].record, &next) && mutant != Mutant::SameGenerationAlone;
    let generation = shrinks.then(|| w.new_generation());
    w.proxies[own].as_mut()?.phase = Phase::Storing { next, left, generation };
    Some(())
}

pub fn survivor(w: &World, node: usize) -> Survivor {
    let halves = &w.nodes[node].halves;
    let held: HashSet<String> =
        halves.iter().enumerate().filter(|(_, half)| half.is_prepared()).map(|(write, _)| write.to_string()).collect();
    let marks = halves.iter().enumerate().filter(|(_, half)| half.is_committed());
    let marks = marks.filter_map(|(write, _)| Some((i32::try_from(write).ok()?, 1))).collect();
    Survivor { held, marks: HashMap::from([("shop".to_owned(), marks)]) }
}

/// The set of the new epoch, on one member after another, the leader first; when all have it, clients are served.
pub fn store(w: &mut World, own: usize, mutant: Mutant) -> Option<()> {
    let p = w.proxies[own].as_ref()?;
    let Phase::Storing { next, left, generation } = p.phase.clone() else { return None };
    let node = World::index(left.first()?);
    if !w.reaches(own, node) {
        return None;
    }
    let is_member = members::contains(&next, NAMES[node]);
    let state = match w.nodes[node].record.state {
        _ if is_member => NodeState::InSync,
        NodeState::InSync => NodeState::Stale,
        state => state,
    };
    let generation_here = generation.as_deref().filter(|_| is_member);
    let stored = record::store(&w.nodes[node].record, &next, state, true, generation_here, None);
    w.change(node, stored).then_some(())?;
    let left: Vec<String> = left[1..].to_vec();
    if left.is_empty() {
        settle_clients(w, own, &next, mutant);
    }
    let p = w.proxies[own].as_mut()?;
    if left.is_empty() {
        w.taken_over |= next.leader != NAMES[own];
        p.set = next;
        p.phase = Phase::Serving;
    } else {
        p.phase = Phase::Storing { next, left, generation };
    }
    Some(())
}

/// Clients that kept their connections through the loss of the leader: what was under way is as the new leader's marks say.
fn settle_clients(w: &mut World, own: usize, next: &MemberSet, mutant: Mutant) {
    let leader = World::index(&next.leader);
    for write in 0..w.writes.len() {
        let is_committed = w.nodes[leader].halves[write].is_committed();
        w.writes[write] = match w.writes[write] {
            Write::Open { by, epoch } | Write::Failing { by, epoch } if by == own && epoch < next.epoch => {
                if is_committed && mutant != Mutant::MarkNotAskedAfterLoss {
                    Write::Sent { by, epoch: next.epoch }
                } else {
                    Write::ToldFailed
                }
            }
            Write::Sent { by, epoch } if by == own && epoch < next.epoch => {
                if is_committed {
                    Write::Sent { by, epoch: next.epoch }
                } else {
                    Write::ToldFailed
                }
            }
            Write::Acknowledged { by, epoch, .. } if by == own && epoch < next.epoch => {
                Write::Acknowledged { by, epoch: next.epoch, finished: true }
            }
            other => other,
        };
    }
}

/// The first half of `pgtandem promote`: judged, promised here and by whoever answers, who end what is older.
pub fn promote_first(w: &mut World, node: usize, stated: bool, accepts_loss: bool) -> Option<()> {
    let judgement = promote::judge(NAMES[node], &w.found(node));
    let plan = judgement.plan.clone()?;
    let dead = if stated { judgement.silent.clone() } else { Vec::new() };
    // Only what is needed is stated.
    let needed = (judgement.case == Case::Assert, judgement.case == Case::Lossy);
    if (stated && !accepts_loss, accepts_loss) != needed
        || !judgement.missing(&Stated { dead, accept_data_loss: accepts_loss }).is_empty()
    {
        return None;
    }
    w.left.promotions -= 1;
    let epoch = plan.set.epoch;
    for at in plan.fenced.iter().map(|name| World::index(name)).chain([node]) {
        let promised = record::promise(&w.nodes[at].record, epoch);
        w.change(at, promised).then_some(())?;
        w.nodes[at].lease.forget();
        if at != node {
            w.nodes[at].epoch = epoch;
        }
    }
    w.promotion = Some(Promotion { node, plan: plan.fenced, set: plan.set, stated, accepts_loss });
    Some(())
}

/// The second half: judged again, and written.
pub fn promote_second(w: &mut World) {
    let Some(Promotion { node, plan, set, stated, accepts_loss }) = w.promotion.take() else { return };
    let first = Plan { set, fenced: plan, staying: Vec::new(), leaving: Vec::new() };
    let found = w.found(node);
    let judgement = promote::judge(NAMES[node], &found);
    let dead = if stated { judgement.silent.clone() } else { Vec::new() };
    let stated = Stated { dead, accept_data_loss: accepts_loss };
    let Some(plan) = promote::confirm(NAMES[node], &first, &found, &stated) else { return };
    let generation = w.new_generation();
    let is_true = judgement.silent.iter().all(|name| w.host_is_down(World::index(name)))
        && (0..w.writes.len()).all(|write| {
            !matches!(w.writes[write], Write::Acknowledged { .. }) || w.nodes[node].halves[write] != Half::Nothing
        });
    w.is_overridden |= judgement.case == Case::Lossy || (judgement.case == Case::Assert && !is_true);
    for at in plan.staying.iter().map(|name| World::index(name)).chain([node]) {
        let stored = &w.nodes[at].record;
        let next = record::store(stored, &plan.set, NodeState::InSync, true, Some(&generation), Some("promoted"));
        if !w.change(at, next) {
            return;
        }
    }
    for (name, state) in &plan.leaving {
        let at = World::index(name);
        let next = record::store(&w.nodes[at].record, &plan.set, *state, false, None, Some("promoted"));
        w.change(at, next);
    }
    w.promoted = true;
}

/// The serving proxy tells a node what it is.
pub fn contact(w: &mut World, proxy: usize, node: usize) -> Option<()> {
    let p = w.proxies[proxy].as_ref()?;
    let theirs: &Record = &w.nodes[node].record;
    let recorded = theirs.members.as_ref().map_or((0, 0), members::number);
    let state = record::left_behind(theirs, &w.nodes[p.leader()].record.generations);
    let is_news = match theirs.state {
        NodeState::InSync => true,
        NodeState::Stale | NodeState::Suspect => state == NodeState::Forked,
        _ => false,
    };
    if !is_news || recorded > members::number(&p.set) || theirs.promised > p.epoch {
        return None;
    }
    let (set, epoch) = (p.set.clone(), p.epoch);
    let next = record::store(&w.nodes[node].record, &set, state, false, None, None);
    if state == NodeState::Forked {
        // Its PostgreSQL is stopped.
        w.nodes[node].epoch = epoch;
    }
    w.change(node, next).then_some(())
}
