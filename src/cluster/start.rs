//! May the proxy of this node begin a reign, and with whom? Pure.
//!
//! It may only if its own record says so and nobody who can be asked knows better: every other member has to answer, and whoever
//! answers of the other nodes is heard, too, because a node that went on alone is no member of anything newer.
//!
//! The leader is normally this node. After the leader's PostgreSQL was lost under a living proxy it is another member, and the proxy stays
//! where it was; who that is, is judged by [`successor`].

use pgtandem_proto::membership::{Epoch, MemberSet, NodeState, Record};
use thiserror::Error;

use super::members;

/// Why an epoch is raised.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Occasion<'a> {
    /// The proxy starts. What happened while none ran is not known, so every recorded member must be asked.
    Start,
    /// The leader's PostgreSQL came back under the same proxy. Nobody else has served, so a member that does not answer
    /// leaves the set, as it would have at the next commit. Unless the node has promised more than this epoch meanwhile. `set`: the newest
    /// that this proxy has decided; a record that is older says nothing.
    LeaderBack { epoch: Epoch, set: &'a MemberSet },
}

/// Another configured node, and its record, if its agent answered.
#[derive(Clone, Copy, Debug)]
pub struct Other<'a> {
    pub node: &'a str,
    pub record: Option<&'a Record>,
}

/// Why this proxy must not serve. Each is a matter of waiting: for another node, or for a person.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum Refusal {
    #[error(
        "node {node} has no member set in its record: it was never set up as the first node, or its record was lost"
    )]
    NoMembers { node: String },
    #[error("node {node} is {state:?}, not in sync: it must not serve")]
    State { node: String, state: NodeState },
    #[error("the record of node {node} says that the proxy of this cluster runs on {proxy}")]
    Elsewhere { node: String, proxy: String },
    #[error("node {node} is a member, but its agent does not answer, and what it knows is not known here")]
    Silent { node: String },
    #[error("node {node} leads, but its agent does not answer, and what it knows is not known here")]
    SilentLeader { node: String },
    #[error(
        "node {node} knows a newer member set (epoch {epoch}, version {version}), whose proxy runs on {proxy}: this host was \
         left behind"
    )]
    Newer { node: String, epoch: Epoch, version: u64, proxy: String },
    #[error("nodes {nodes} have different member sets under one number: two proxies have decided alone")]
    TwoSets { nodes: String },
}

impl Refusal {
    /// The next command to type.
    #[must_use]
    pub fn hint(&self) -> String {
        match self {
            Self::NoMembers { node } => {
                format!("recover it from another one, on the proxy's host: pgtandem recover {node}")
            }
            Self::State { node, state: NodeState::Forked } => format!(
                "its data are kept; look at them, and when nothing in them is needed: pgtandem discard-fork {node}"
            ),
            Self::State { node, .. } => format!("on the host whose proxy serves: pgtandem recover {node}"),
            Self::Elsewhere { proxy, .. } => format!(
                "nothing, if {proxy} serves; if its host is lost: pgtandem promote; for a planned change, on {proxy}: pgtandem switch NODE"
            ),
            Self::Silent { node } => format!(
                "start it, on its host: pgtandem agent --node {node}; or, if that host is lost: pgtandem detach {node} --yes"
            ),
            // Who leads is not detached: another one has to be made the leader.
            Self::SilentLeader { node } => {
                format!(
                    "start it, on its host: pgtandem agent --node {node}; or, if that host is lost: pgtandem promote"
                )
            }
            Self::Newer { proxy, .. } => format!("on {proxy}: pgtandem status"),
            Self::TwoSets { .. } => {
                "look at the data of both before anything is started; pgtandem status --json".into()
            }
        }
    }
}

/// How a reign may begin.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Start {
    /// Above everything that anybody who answered has promised or stored.
    pub epoch: Epoch,
    /// The set that it goes on from, with the leader of the reign.
    pub set: MemberSet,
    /// Members that go on, the leader left out. This node is among them if it follows.
    pub followers: Vec<String>,
    /// Members that leave, with what their own record says.
    pub leaving: Vec<(String, NodeState)>,
    /// Members that leave because they do not answer.
    pub silent: Vec<String>,
}

/// Whether the data get a new generation with this set: what is acknowledged under it is not on everybody who was recorded, so whoever
/// went on from the older one went another way.
#[must_use]
pub fn shrinks(record: &Record, next: &MemberSet) -> bool {
    record.members.as_ref().is_some_and(|recorded| recorded.nodes.iter().any(|node| !members::contains(next, node)))
}

/// Judges. `others`: every other node of the configuration.
pub fn judge(record: &Record, others: &[Other<'_>], occasion: Occasion<'_>) -> Result<Start, Refusal> {
    let own = &record.node;
    let stored = record.members.as_ref().ok_or_else(|| Refusal::NoMembers { node: own.clone() })?;
    let answers = || others.iter().filter_map(|other| Some((other.node, other.record?)));
    let sets = || answers().filter_map(|(node, record)| Some((node, record.members.as_ref()?)));
    // Before anything else: whoever knows more than this node says where the proxy belongs.
    let ahead = sets().filter(|(_, set)| members::number(set) > members::number(stored) && set.proxy != *own);
    if let Some((node, set)) = ahead.max_by_key(|(_, set)| members::number(set)) {
        let (epoch, version, proxy) = (set.epoch, set.version, set.proxy.clone());
        return Err(Refusal::Newer { node: node.to_owned(), epoch, version, proxy });
    }
    if record.state == NodeState::Forked {
        return Err(Refusal::State { node: own.clone(), state: record.state });
    }
    if stored.proxy != *own {
        if record.state != NodeState::InSync {
            return Err(Refusal::State { node: own.clone(), state: record.state });
        }
        return Err(Refusal::Elsewhere { node: own.clone(), proxy: stored.proxy.clone() });
    }
    if let Some((node, _)) = sets().find(|(_, set)| members::number(set) == members::number(stored) && *set != stored) {
        return Err(Refusal::TwoSets { nodes: format!("{own} and {node}") });
    }
    // A newer set of this node's own reign that did not get everywhere: it was decided, and nothing acknowledged under it.
    let decided = match occasion {
        Occasion::LeaderBack { set, .. } if set.proxy == *own => Some(set),
        _ => None,
    };
    let known = sets().map(|(_, set)| set).chain([stored]).chain(decided);
    let set = known.max_by_key(|set| members::number(set)).unwrap_or(stored);
    let record_of = |name: &str| {
        if name == own { Some(record) } else { others.iter().find(|other| other.node == name).and_then(|o| o.record) }
    };
    match record_of(&set.leader) {
        Some(leader) if leader.state == NodeState::InSync => {}
        Some(leader) => return Err(Refusal::State { node: set.leader.clone(), state: leader.state }),
        None => return Err(Refusal::SilentLeader { node: set.leader.clone() }),
    }
    let nobody_else_served = matches!(occasion, Occasion::LeaderBack { epoch, .. } if epoch == record.promised)
        && set.epoch == record.promised;
    let (mut followers, mut leaving, mut silent) = (Vec::new(), Vec::new(), Vec::new());
    for name in set.nodes.iter().filter(|name| **name != set.leader) {
        match record_of(name) {
            Some(theirs) if theirs.state == NodeState::InSync => followers.push(name.clone()),
            Some(theirs) => leaving.push((name.clone(), theirs.state)),
            None if nobody_else_served => silent.push(name.clone()),
            None => return Err(Refusal::Silent { node: name.clone() }),
        }
    }
    let promised = answers().map(|(_, theirs)| theirs.promised).chain([record.promised]);
    let stored = sets().map(|(_, set)| set.epoch).chain([set.epoch]);
    let above = promised.chain(stored).fold(0, Epoch::max);
    let epoch = members::next_epoch(above, own, others.iter().map(|other| other.node));
    Ok(Start { epoch, set: set.clone(), followers, leaving, silent })
}

/// A node, its record, and whether its PostgreSQL runs, if its agent answered.
#[derive(Clone, Copy, Debug)]
pub struct Candidate<'a> {
    pub node: &'a str,
    pub answer: Option<(&'a Record, bool)>,
}

/// The leader's PostgreSQL is lost, this proxy lives and reigns in `epoch` under `set`: the next version, with a member that leads instead.
/// Nobody need be asked, because no other proxy can have served; but a node that has promised more, this one too, obeys somebody else. `None`:
/// no member can; the leader's own restart is waited for. `nodes`: every configured node.
#[must_use]
pub fn successor(own: &str, set: &MemberSet, epoch: Epoch, nodes: &[Candidate<'_>]) -> Option<MemberSet> {
    let of = |name: &str| nodes.iter().find(|node| node.node == name).and_then(|node| node.answer);
    if set.epoch != epoch || set.proxy != own || of(own).is_none_or(|(record, _)| record.promised > epoch) {
        return None;
    }
    // A version of this reign that did not get everywhere was decided, and nothing was acknowledged under it.
    let newer = nodes.iter().filter_map(|node| node.answer?.0.members.as_ref());
    let newer =
        newer.filter(|theirs| members::number(theirs) > members::number(set)).max_by_key(|s| members::number(s));
    let set = match newer {
        Some(newer) if newer.epoch == epoch && newer.proxy == own => newer,
        Some(_) => return None,
        None => set,
    };
    let stays = |name: &str| {
        let fits = |record: &Record| {
            record.state == NodeState::InSync
                && record.promised == epoch
                && record.members.as_ref().is_some_and(|m| m.epoch == epoch)
        };
        of(name).is_some_and(|(record, runs)| fits(record) && runs)
    };
    let (staying, leaving): (Vec<_>, Vec<_>) =
        set.nodes.iter().filter(|name| **name != set.leader).cloned().partition(|name| stays(name));
    let next = staying.iter().find(|name| *name == own).or(staying.first())?;
    members::taken_over_by(set, next, &leaving).ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cluster::record;

    fn set(epoch: Epoch, version: u64, nodes: &[&str], leader: &str) -> MemberSet {
        let nodes = nodes.iter().map(ToString::to_string).collect();
        MemberSet { epoch, version, nodes, leader: leader.into(), proxy: leader.into() }
    }

    fn of(node: &str, state: NodeState, set: MemberSet) -> Record {
        Record { promised: set.epoch, state, members: Some(set), ..record::blank("shop", node) }
    }

    fn start(own: &Record, others: &[(&str, Option<&Record>)]) -> Result<Start, Refusal> {
        let others: Vec<_> = others.iter().map(|(node, record)| Other { node, record: *record }).collect();
        judge(own, &others, Occasion::Start)
    }

    #[test]
    fn a_proxy_starts_with_every_member_that_agrees() {
        let a = of("a", NodeState::InSync, set(3, 2, &["a", "b"], "a"));
        let b = Record { promised: 6, ..of("b", NodeState::InSync, set(3, 2, &["a", "b"], "a")) };
        let started = start(&a, &[("b", Some(&b))]).unwrap();
        assert_eq!((started.epoch, started.followers), (8, vec!["b".to_owned()]));
        let silent = start(&a, &[("b", None)]);
        assert_eq!(silent, Err(Refusal::Silent { node: "b".into() }));
        let silent = [Other { node: "b", record: None }];
        let both = set(3, 2, &["a", "b"], "a");
        let back = judge(&a, &silent, Occasion::LeaderBack { epoch: 3, set: &both }).unwrap();
        assert_eq!(back.silent, ["b"]);
        let superseded = judge(&Record { promised: 4, ..a }, &silent, Occasion::LeaderBack { epoch: 3, set: &both });
        assert_eq!(superseded, Err(Refusal::Silent { node: "b".into() }), "somebody else may have served meanwhile");
    }

    #[test]
    fn an_old_leader_is_told_who_has_gone_on() {
        let a = of("a", NodeState::InSync, set(3, 2, &["a", "b"], "a"));
        let b = of("b", NodeState::InSync, set(5, 1, &["b"], "b"));
        assert!(matches!(start(&a, &[("b", Some(&b))]), Err(Refusal::Newer { epoch: 5, .. })));
        // Alone in its set it would need to ask nobody; whoever answers is heard all the same.
        let alone = of("a", NodeState::InSync, set(3, 3, &["a"], "a"));
        assert!(matches!(start(&alone, &[("b", Some(&b))]), Err(Refusal::Newer { .. })));
        assert!(start(&alone, &[("b", None)]).is_ok());
        // A node that was left behind in that newer reign proves it, too.
        let c = of("c", NodeState::Stale, set(5, 1, &["b"], "b"));
        assert!(matches!(start(&alone, &[("b", None), ("c", Some(&c))]), Err(Refusal::Newer { .. })));
    }

    #[test]
    fn a_smaller_set_of_its_own_that_did_not_get_everywhere_is_gone_on_with() {
        let a = of("a", NodeState::InSync, set(3, 2, &["a", "b", "c"], "a"));
        let b = of("b", NodeState::InSync, set(3, 3, &["a", "b"], "a"));
        let c = of("c", NodeState::Stale, set(3, 3, &["a", "b"], "a"));
        let started = start(&a, &[("b", Some(&b)), ("c", Some(&c))]).unwrap();
        assert!(shrinks(&a, &started.set) && !shrinks(&b, &started.set));
        assert_eq!((started.set.version, started.followers), (3, vec!["b".to_owned()]));
        // It was told, and nobody else: whoever starts finds it out of sync.
        let b = of("b", NodeState::InSync, set(3, 2, &["a", "b", "c"], "a"));
        let started = start(&a, &[("b", Some(&b)), ("c", Some(&c))]).unwrap();
        assert_eq!((started.followers, started.leaving), (vec!["b".to_owned()], vec![]));
    }

    #[test]
    fn a_node_that_does_not_lead_or_is_not_in_sync_does_not_serve() {
        let b = of("b", NodeState::InSync, set(3, 2, &["a", "b"], "a"));
        assert!(matches!(start(&b, &[("a", None)]), Err(Refusal::Elsewhere { .. })));
        let stale = of("a", NodeState::Stale, set(5, 1, &["b"], "b"));
        assert!(matches!(start(&stale, &[("b", None)]), Err(Refusal::State { .. })));
        assert!(matches!(start(&record::blank("shop", "a"), &[]), Err(Refusal::NoMembers { .. })));
        let theirs = of("b", NodeState::InSync, set(3, 2, &["b"], "b"));
        let mine = of("a", NodeState::InSync, set(3, 2, &["a"], "a"));
        assert!(matches!(start(&mine, &[("b", Some(&theirs))]), Err(Refusal::TwoSets { .. })));
    }

    /// `set`, led by `leader` under the proxy of a.
    fn led(version: u64, nodes: &[&str], leader: &str) -> MemberSet {
        MemberSet { proxy: "a".into(), ..set(3, version, nodes, leader) }
    }

    #[test]
    fn the_proxy_goes_on_with_another_leader_and_starts_again_with_it() {
        let (two, alone) = (set(3, 2, &["a", "b"], "a"), led(3, &["b"], "b"));
        let a = of("a", NodeState::Stale, alone.clone());
        let b = of("b", NodeState::InSync, alone.clone());
        let started = start(&a, &[("b", Some(&b))]).unwrap();
        assert_eq!((started.set.leader.as_str(), started.followers), ("b", vec![]));
        assert_eq!(start(&a, &[("b", None)]), Err(Refusal::SilentLeader { node: "b".into() }));
        // Its own record was not told.
        let untold = of("a", NodeState::InSync, two.clone());
        assert_eq!(start(&untold, &[("b", Some(&b))]).unwrap().set, alone);
        let silent = [Other { node: "b", record: None }];
        let back = judge(&untold, &silent, Occasion::LeaderBack { epoch: 3, set: &alone });
        assert_eq!(
            back,
            Err(Refusal::SilentLeader { node: "b".into() }),
            "the proxy knows more than its node's record"
        );
        // Filled again, it follows.
        let both = led(4, &["a", "b"], "b");
        let (a, b) = (of("a", NodeState::InSync, both.clone()), of("b", NodeState::InSync, both));
        assert_eq!(start(&a, &[("b", Some(&b))]).unwrap().followers, ["a"]);
        assert!(matches!(start(&b, &[("a", Some(&a))]), Err(Refusal::Elsewhere { .. })), "its proxy is not here");
    }

    #[test]
    fn a_member_that_runs_and_obeys_takes_over() {
        let three = set(3, 2, &["a", "b", "c"], "a");
        let all: Vec<Record> = ["a", "b", "c"].iter().map(|node| of(node, NodeState::InSync, three.clone())).collect();
        let next = |records: &[(&Record, bool)], known: &MemberSet| {
            let nodes: Vec<_> = records
                .iter()
                .map(|(record, runs)| Candidate { node: &record.node, answer: Some((record, *runs)) })
                .collect();
            successor("a", known, 3, &nodes)
        };
        let [a, b, c] = &all[..] else { unreachable!() };
        assert_eq!(next(&[(a, false), (b, true), (c, true)], &three), Some(led(3, &["b", "c"], "b")));
        // Whoever does not run, or is not heard, leaves with the old leader.
        assert_eq!(next(&[(a, false), (b, false), (c, true)], &three), Some(led(3, &["c"], "c")));
        assert_eq!(next(&[(a, false), (c, true)], &three), Some(led(3, &["c"], "c")));
        assert_eq!(next(&[(a, false), (b, false)], &three), None);
        assert_eq!(next(&[(b, true), (c, true)], &three), None, "without its own agent a proxy decides nothing");
        let elsewhere = Record { promised: 4, ..b.clone() };
        assert_eq!(next(&[(a, false), (&elsewhere, true)], &three), None);
        assert_eq!(next(&[(&Record { promised: 4, ..a.clone() }, false), (b, true)], &three), None);
        // A version that did not get everywhere is gone on from.
        let smaller = set(3, 3, &["a", "c"], "a");
        let told = of("c", NodeState::InSync, smaller);
        assert_eq!(next(&[(a, false), (b, true), (&told, true)], &three), Some(led(4, &["c"], "c")));
        // Its own node, when it follows, is preferred.
        let following = led(5, &["a", "b", "c"], "b");
        let [a, c] = [a, c].map(|record| Record { members: Some(following.clone()), ..record.clone() });
        assert_eq!(next(&[(&a, true), (&c, true)], &following), Some(led(6, &["a", "c"], "a")));
    }
}
