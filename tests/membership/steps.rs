//! What can happen next, and what comes of it. [`Mutant`]s are known-bad variants that the properties must catch.

use pgtandem::cluster::lease::{self, Lease};
use pgtandem::cluster::{members, record};
use pgtandem_proto::membership::{Epoch, NodeState};
use pgtandem_proto::message::LeaseGrant;

use crate::reign::{
    contact, lose_leader, promote_first, promote_second, settle, start_proxy, start_with_taken, store, tell_taken,
};
use crate::transactions::{acknowledge, cut, effect, join_failed, joined, store_joined, store_smaller, suspect};
use crate::world::{Half, NAMES, Phase, Proxy, TICK_MS, World, Write};

/// A rule that is broken on purpose.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mutant {
    None,
    /// The node that joins stores the larger set before anybody else.
    GrowOrderReversed,
    /// The smaller set is used before it is recorded.
    AcknowledgedBeforeRecorded,
    /// A lease runs from the arrival of the grant.
    LeaseFromReceipt,
    /// A shrink that can not tell the node does not wait.
    LeaseNotWaitedOut,
    /// "Failed" is told before followers have rolled back.
    ToldFailedTooEarly,
    /// A new leader commits what it holds even where another member never prepared it.
    PresumedWithoutAsking,
    /// A new leader rolls back what it holds.
    NothingPresumed,
    /// A half with other rows can be prepared.
    CountsNotAsserted,
    /// The leader may refuse at COMMIT what followers hold prepared already, and is gone then.
    SerializableNotPreparedFirst,
    /// A transaction enters the backlog when its answer comes, not when it is sent.
    BacklogAtReply,
    /// A node that goes on without another one keeps the generation of its data.
    SameGenerationAlone,
    /// The record of the old leader is not asked for at a start.
    NobodyAskedAtStart,
    /// A client whose leader was lost is told that its transaction failed, and the new leader's marks are not asked.
    MarkNotAskedAfterLoss,
    /// The old leader, which can not be told that it was left behind, has a lease still when another one serves.
    OldLeaderNotWaitedOut,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Step {
    Tick,
    Ask(usize),
    Grant { proxy: usize, node: usize, number: u64 },
    Arrive(usize),
    Begin { proxy: usize, write: usize },
    Prepare { write: usize, node: usize, right: bool },
    Commit(usize),
    Refuse(usize),
    Acknowledge(usize),
    LoseReply(usize),
    Finish { write: usize, node: usize },
    GiveUp(usize),
    RollBack { write: usize, node: usize },
    TellFailed(usize),
    Suspect { proxy: usize, node: usize },
    StoreSmaller(usize),
    Cut { proxy: usize, node: usize },
    StoreLarger(usize),
    StoreJoined(usize),
    Joined(usize),
    JoinFailed(usize),
    KillProxy(usize),
    KillAgent(usize),
    KillHost(usize),
    TearRecord(usize),
    StartAgent(usize),
    StartProxy(usize),
    Settle(usize),
    Store(usize),
    LoseLeader(usize),
    TellTaken(usize),
    StartWithTaken(usize),
    Partition,
    Heal,
    Promote { node: usize, stated: bool, accepts_loss: bool },
    WritePromotion,
    Contact { proxy: usize, node: usize },
}

fn serving(world: &World, proxy: usize, epoch: Epoch) -> Option<&Proxy> {
    world.proxies[proxy].as_ref().filter(|p| p.serves() && p.epoch == epoch)
}

/// Followers of a proxy's set.
fn followers(proxy: &Proxy) -> impl Iterator<Item = usize> + '_ {
    proxy.set.nodes.iter().filter(|name| **name != proxy.set.leader).map(|name| World::index(name))
}

/// A tunnel of this proxy's epoch to a node.
pub fn tunnel(world: &World, proxy: usize, node: usize, epoch: Epoch) -> bool {
    world.reaches(proxy, node) && world.nodes[node].record.promised == epoch
}

pub fn possible(world: &World, mutant: Mutant) -> Vec<Step> {
    let mut steps = Vec::new();
    if world.fault.is_some() {
        return steps;
    }
    let left = &world.left;
    let nodes = 0..world.nodes.len();
    if left.ticks > 0 {
        steps.push(Step::Tick);
    }
    for (write, state) in world.writes.iter().enumerate() {
        writing(world, mutant, write, *state, &mut steps);
    }
    for &(node, number) in &world.asks {
        steps.extend(nodes.clone().map(|proxy| Step::Grant { proxy, node, number }));
    }
    steps.extend((0..world.grants.len()).map(Step::Arrive));
    for node in nodes.clone() {
        let runs = world.nodes[node].agent_runs;
        if left.asks > 0 && runs && world.asks.is_empty() && world.grants.is_empty() {
            steps.push(Step::Ask(node));
        }
        if left.crashes > 0 {
            if world.proxies[node].is_some() {
                steps.push(Step::KillProxy(node));
                steps.push(Step::KillHost(node));
            }
            if runs {
                steps.push(Step::KillAgent(node));
            }
        }
        if !runs {
            steps.push(Step::StartAgent(node));
            if left.torn > 0 {
                steps.push(Step::TearRecord(node));
            }
        }
        if world.proxies[node].is_none() && runs {
            steps.push(Step::StartProxy(node));
        }
        if left.promotions > 0 && world.promotion.is_none() {
            for (stated, accepts_loss) in [(false, false), (true, false), (true, true)] {
                steps.push(Step::Promote { node, stated, accepts_loss });
            }
        }
        if let Some(proxy) = &world.proxies[node] {
            ruling(world, node, proxy, &mut steps);
        }
    }
    if world.promotion.is_some() {
        steps.push(Step::WritePromotion);
    }
    if world.partitioned {
        steps.push(Step::Heal);
    } else if left.partitions > 0 {
        steps.push(Step::Partition);
    }
    steps
}

fn writing(world: &World, mutant: Mutant, write: usize, state: Write, steps: &mut Vec<Step>) {
    let is_joining = |p: &Proxy| p.join.as_ref().is_some_and(|join| join.stored_here || join.stored_there);
    match state {
        Write::New if write == 0 || world.writes[write - 1] != Write::New => {
            let able = |proxy: &usize| world.proxies[*proxy].as_ref().is_some_and(Proxy::serves);
            steps.extend((0..world.nodes.len()).filter(able).map(|proxy| Step::Begin { proxy, write }));
        }
        Write::Open { by, epoch } => {
            let Some(proxy) = serving(world, by, epoch) else { return };
            for node in followers(proxy) {
                if world.nodes[node].halves[write] == Half::Nothing && tunnel(world, by, node, epoch) {
                    steps.push(Step::Prepare { write, node, right: true });
                    if mutant == Mutant::CountsNotAsserted {
                        steps.push(Step::Prepare { write, node, right: false });
                    }
                }
            }
            let all = followers(proxy).all(|node| world.nodes[node].halves[write].is_prepared());
            let leader = proxy.leader();
            let reached = leader == by || tunnel(world, by, leader, epoch);
            if all && proxy.shrink.is_none() && !is_joining(proxy) && reached && world.nodes[leader].epoch == epoch {
                steps.push(Step::Commit(write));
                if mutant == Mutant::SerializableNotPreparedFirst {
                    steps.push(Step::Refuse(write));
                }
            }
            if world.left.failures > 0 {
                steps.push(Step::GiveUp(write));
            }
        }
        Write::Failing { by, epoch } => {
            let Some(proxy) = serving(world, by, epoch) else { return };
            let holds = |node: &usize| world.nodes[*node].halves[write].is_prepared();
            steps.extend(
                followers(proxy)
                    .filter(holds)
                    .filter(|node| tunnel(world, by, *node, epoch))
                    .map(|node| Step::RollBack { write, node }),
            );
            let is_nowhere = followers(proxy).all(|node| world.nodes[node].halves[write] == Half::Nothing);
            if is_nowhere || mutant == Mutant::ToldFailedTooEarly {
                steps.push(Step::TellFailed(write));
            }
        }
        Write::Sent { by, epoch } if serving(world, by, epoch).is_some() => {
            steps.push(Step::Acknowledge(write));
            if world.left.failures > 0 {
                steps.push(Step::LoseReply(write));
            }
        }
        Write::Acknowledged { by, epoch, finished: false } => {
            let Some(proxy) = serving(world, by, epoch) else { return };
            let holds = followers(proxy).filter(|node| world.nodes[*node].halves[write].is_prepared());
            steps.extend(holds.filter(|node| tunnel(world, by, *node, epoch)).map(|node| Step::Finish { write, node }));
        }
        _ => {}
    }
}

fn ruling(world: &World, own: usize, proxy: &Proxy, steps: &mut Vec<Step>) {
    match &proxy.phase {
        Phase::Promised { .. } => return steps.push(Step::Settle(own)),
        Phase::Storing { .. } => return steps.push(Step::Store(own)),
        Phase::TakingOver { left, .. } => {
            return steps.push(if left.is_empty() { Step::StartWithTaken(own) } else { Step::TellTaken(own) });
        }
        Phase::Serving => {}
    }
    if world.left.losses > 0 && proxy.set.nodes.len() > 1 {
        steps.push(Step::LoseLeader(own));
    }
    match (&proxy.shrink, &proxy.join) {
        (Some(shrink), _) => {
            let free_at = proxy.grants.free_at(NAMES[shrink.node]);
            if shrink.is_told || free_at.is_none_or(|at| world.now >= at) {
                steps.push(Step::StoreSmaller(own));
            }
        }
        (None, Some(join)) => {
            if world.is_inside_gate(own) && !(join.stored_here || join.stored_there) {
                return;
            }
            if join.is_spoilt {
                return steps.push(Step::JoinFailed(own));
            }
            steps.extend([Step::StoreLarger(own), Step::StoreJoined(own), Step::Joined(own), Step::JoinFailed(own)]);
        }
        (None, None) => {
            if world.left.suspicions > 0 {
                steps.extend(followers(proxy).map(|node| Step::Suspect { proxy: own, node }));
            }
            for (node, name) in NAMES.iter().enumerate().take(world.nodes.len()) {
                if !members::contains(&proxy.set, name) && world.reaches(own, node) {
                    steps.push(Step::Contact { proxy: own, node });
                    if world.left.recoveries > 0 && !world.is_inside_gate(own) {
                        steps.push(Step::Cut { proxy: own, node });
                    }
                }
            }
        }
    }
}

/// The world after a step; `None`: nothing comes of it.
pub fn next(world: &World, step: &Step, mutant: Mutant) -> Option<World> {
    let mut world = world.clone();
    let w = &mut world;
    match step {
        Step::Tick => {
            w.left.ticks -= 1;
            w.now += TICK_MS;
            for node in 0..w.nodes.len() {
                let Some(doubts) = lease::doubted(&w.nodes[node].record, None) else { continue };
                if w.nodes[node].agent_runs && !w.nodes[node].lease.is_valid(w.now) {
                    w.nodes[node].record = doubts;
                }
            }
        }
        Step::Ask(node) => {
            w.left.asks -= 1;
            let number = w.nodes[*node].lease.ask(w.now);
            w.asks.insert((*node, number));
        }
        Step::Grant { proxy, node, number } => {
            let epoch = w.nodes[*node].record.promised;
            let reaches = w.reaches(*proxy, *node);
            let p = w.proxies[*proxy].as_mut().filter(|p| p.serves() && p.epoch == epoch && reaches)?;
            if !p.grants.grant(w.now, NAMES[*node], &p.set) {
                return None;
            }
            let grant = LeaseGrant { number: *number, epoch, version: p.set.version };
            w.asks.remove(&(*node, *number));
            w.grants.push((*node, grant));
        }
        Step::Arrive(at) => arrive(w, *at, mutant),
        Step::Begin { proxy, write } => {
            let epoch = w.proxies[*proxy].as_ref()?.epoch;
            w.writes[*write] = Write::Open { by: *proxy, epoch };
        }
        Step::Prepare { write, node, right } => {
            let half = if *right { Half::Prepared } else { Half::Wrong { committed: false } };
            effect(w, *write, *node, half);
        }
        Step::Commit(write) => {
            let Write::Open { by, epoch } = w.writes[*write] else { return None };
            let p = w.proxies[by].as_mut()?;
            if let Some(join) = p.join.as_mut().filter(|_| mutant != Mutant::BacklogAtReply) {
                join.backlog.insert(*write);
            }
            let leader = p.leader();
            let own = &w.nodes[leader];
            if matches!(own.record.state, NodeState::Stale | NodeState::Forked | NodeState::Joining) && !own.is_torn {
                w.fault = Some("I11");
            }
            w.nodes[leader].halves[*write] = Half::Committed;
            w.writes[*write] = Write::Sent { by, epoch };
        }
        Step::Refuse(write) => {
            // Told by the leader to a proxy that dies with it.
            let Write::Open { by, .. } = w.writes[*write] else { return None };
            w.writes[*write] = Write::ToldFailed;
            w.proxies[by] = None;
            w.nodes[by].agent_runs = false;
        }
        Step::Acknowledge(write) => acknowledge(w, *write, mutant)?,
        Step::LoseReply(write) => {
            let Write::Sent { by, epoch } = w.writes[*write] else { return None };
            w.left.failures -= 1;
            let p = w.proxies[by].as_mut()?;
            if let Some(join) = p.join.as_mut().filter(|join| join.backlog.contains(write)) {
                join.is_spoilt = true;
            }
            // Its mark says that it was committed: it is finished, and the client is not told.
            for node in followers(p).collect::<Vec<_>>() {
                if tunnel(w, by, node, epoch) {
                    w.nodes[node].halves[*write] = w.nodes[node].halves[*write].finished(true);
                }
            }
            w.writes[*write] = Write::Unknown;
        }
        Step::Finish { write, node } => {
            let half = w.nodes[*node].halves[*write].finished(true);
            effect(w, *write, *node, half);
            let Write::Acknowledged { by, epoch, .. } = w.writes[*write] else { return None };
            let p = w.proxies[by].as_ref()?;
            let finished = followers(p).all(|node| w.nodes[node].halves[*write].is_committed());
            w.writes[*write] = Write::Acknowledged { by, epoch, finished };
        }
        Step::GiveUp(write) => {
            let Write::Open { by, epoch } = w.writes[*write] else { return None };
            w.left.failures -= 1;
            w.writes[*write] = Write::Failing { by, epoch };
        }
        Step::RollBack { write, node } => effect(w, *write, *node, Half::Nothing),
        Step::TellFailed(write) => w.writes[*write] = Write::ToldFailed,
        Step::Suspect { proxy, node } => suspect(w, *proxy, *node, mutant)?,
        Step::StoreSmaller(proxy) => store_smaller(w, *proxy)?,
        Step::Cut { proxy, node } => cut(w, *proxy, *node)?,
        Step::StoreLarger(proxy) => {
            let p = w.proxies[*proxy].as_ref()?;
            let join = p.join.as_ref()?;
            if join.stored_here || (mutant == Mutant::GrowOrderReversed && !join.stored_there) {
                return None;
            }
            let larger = members::with(&p.set, NAMES[join.node]).ok()?;
            for name in p.set.nodes.clone() {
                let at = World::index(&name);
                if !w.reaches(*proxy, at) {
                    return None;
                }
                let next = record::store(&w.nodes[at].record, &larger, NodeState::InSync, true, None, None);
                w.change(at, next).then_some(())?;
            }
            w.proxies[*proxy].as_mut()?.join.as_mut()?.stored_here = true;
        }
        Step::StoreJoined(proxy) => store_joined(w, *proxy, mutant)?,
        Step::Joined(proxy) => joined(w, *proxy)?,
        Step::JoinFailed(proxy) => join_failed(w, *proxy, mutant)?,
        Step::KillProxy(node) => {
            w.left.crashes -= 1;
            kill_proxy(w, *node);
        }
        Step::KillAgent(node) => {
            w.left.crashes -= 1;
            kill_agent(w, *node);
        }
        Step::KillHost(node) => {
            w.left.crashes -= 1;
            kill_proxy(w, *node);
            kill_agent(w, *node);
        }
        Step::TearRecord(node) => {
            w.left.torn -= 1;
            w.nodes[*node].record = record::blank("shop", NAMES[*node]);
            w.nodes[*node].is_torn = true;
        }
        Step::StartAgent(node) => {
            w.nodes[*node].agent_runs = true;
            w.nodes[*node].record = record::started(&w.nodes[*node].record);
        }
        Step::StartProxy(node) => start_proxy(w, *node, mutant)?,
        Step::LoseLeader(proxy) => lose_leader(w, *proxy)?,
        Step::TellTaken(proxy) => tell_taken(w, *proxy, mutant)?,
        Step::StartWithTaken(proxy) => start_with_taken(w, *proxy)?,
        Step::Settle(node) => settle(w, *node, mutant)?,
        Step::Store(node) => store(w, *node, mutant)?,
        Step::Partition => {
            w.left.partitions -= 1;
            w.partitioned = true;
        }
        Step::Heal => w.partitioned = false,
        Step::Promote { node, stated, accepts_loss } => promote_first(w, *node, *stated, *accepts_loss)?,
        Step::WritePromotion => promote_second(w),
        Step::Contact { proxy, node } => contact(w, *proxy, *node)?,
    }
    Some(world)
}

fn arrive(w: &mut World, at: usize, mutant: Mutant) {
    let (node, grant) = w.grants.remove(at);
    let here = &mut w.nodes[node];
    if !here.agent_runs {
        return;
    }
    if mutant == Mutant::LeaseFromReceipt {
        let mut late = Lease::default();
        let number = late.ask(w.now);
        if late.granted(w.now, &LeaseGrant { number, ..grant }, &here.record) {
            here.lease = late;
            here.record = lease::vouched(&here.record, grant.epoch, grant.version, 0).unwrap_or(here.record.clone());
        }
        return;
    }
    if here.lease.granted(w.now, &grant, &here.record) {
        here.record = lease::vouched(&here.record, grant.epoch, grant.version, 0).unwrap_or(here.record.clone());
    }
}

fn kill_proxy(w: &mut World, node: usize) {
    w.proxies[node] = None;
    for write in &mut w.writes {
        match *write {
            Write::Open { by, .. } | Write::Failing { by, .. } | Write::Sent { by, .. } if by == node => {
                *write = Write::Unknown;
            }
            Write::Acknowledged { by, epoch, .. } if by == node => {
                *write = Write::Acknowledged { by, epoch, finished: true };
            }
            _ => {}
        }
    }
}

fn kill_agent(w: &mut World, node: usize) {
    w.nodes[node].agent_runs = false;
    w.nodes[node].lease = Lease::default();
    w.asks.retain(|(asking, _)| *asking != node);
    w.grants.retain(|(asking, _)| *asking != node);
}
