//! Operations on the member set: who holds every acknowledged write.
//!
//! Pure: a set goes in, its successor comes out, and nothing is stored or sent here. Storing it, and the order in
//! which nodes store it, are the caller's; [`everyone_stored`] and [`is_successor`] are the invariants I3 and I5 that
//! the caller asserts before it acts on a set.

use std::collections::BTreeSet;

use pgtandem_proto::membership::{Epoch, MemberSet};
use thiserror::Error;

/// Members of one cluster at most. A limit of ours: every commit waits for all of them.
pub const MEMBERS_MAX: usize = 16;

/// Why a member set can not be, or can not become, what was asked.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum MembersError {
    #[error("the member set is empty")]
    Empty,
    #[error("the member set has {0} nodes, more than {MEMBERS_MAX}")]
    TooMany(usize),
    #[error("the nodes of the member set are not sorted, or one is named twice")]
    NotSorted,
    #[error("the leader {0} is not in the member set")]
    LeaderMissing(String),
    #[error("{0} is already a member")]
    AlreadyMember(String),
    #[error("{0} is not a member")]
    NotMember(String),
    #[error("{0} is the leader; another node must become the leader before it can leave")]
    IsLeader(String),
    #[error("epoch {wanted} does not follow epoch {now}")]
    EpochNotNewer { now: Epoch, wanted: Epoch },
    #[error("the member set has reached its last version number")]
    VersionsExhausted,
}

/// The set of a new cluster: one node, which leads and runs the proxy, before any proxy has reigned.
#[must_use]
pub fn first(node: &str) -> MemberSet {
    MemberSet { epoch: 0, version: 1, nodes: vec![node.into()], leader: node.into(), proxy: node.into() }
}

/// Whether `node` is in the set.
#[must_use]
pub fn contains(set: &MemberSet, node: &str) -> bool {
    set.nodes.binary_search_by(|member| member.as_str().cmp(node)).is_ok()
}

/// The next version, with `node` in it.
pub fn with(set: &MemberSet, node: &str) -> Result<MemberSet, MembersError> {
    check(set)?;
    let Err(place) = set.nodes.binary_search_by(|member| member.as_str().cmp(node)) else {
        return Err(MembersError::AlreadyMember(node.into()));
    };
    let mut next = next_version(set)?;
    next.nodes.insert(place, node.into());
    check(&next)?;
    debug_assert!(is_successor(set, &next));
    Ok(next)
}

/// The next version, with `node` gone. The leader can not be taken out this way.
pub fn without(set: &MemberSet, node: &str) -> Result<MemberSet, MembersError> {
    check(set)?;
    if !contains(set, node) {
        return Err(MembersError::NotMember(node.into()));
    }
    if set.leader == node {
        return Err(MembersError::IsLeader(node.into()));
    }
    let mut next = next_version(set)?;
    next.nodes.retain(|member| member != node);
    check(&next)?;
    debug_assert!(is_successor(set, &next));
    Ok(next)
}

/// The next version, with another leader, on whose host the proxy runs.
pub fn led_by(set: &MemberSet, node: &str) -> Result<MemberSet, MembersError> {
    check(set)?;
    if !contains(set, node) {
        return Err(MembersError::NotMember(node.into()));
    }
    let next = MemberSet { leader: node.into(), proxy: node.into(), ..next_version(set)? };
    debug_assert!(is_successor(set, &next));
    Ok(next)
}

/// The next version after the leader's PostgreSQL was lost: `node` leads, `leaving` and the old leader are gone. The proxy is where it was:
/// it lives, and nobody else was asked.
pub fn taken_over_by(set: &MemberSet, node: &str, leaving: &[String]) -> Result<MemberSet, MembersError> {
    check(set)?;
    if !contains(set, node) || leaving.iter().any(|name| name == node) {
        return Err(MembersError::NotMember(node.into()));
    }
    if set.leader == node {
        return Err(MembersError::IsLeader(node.into()));
    }
    let mut next = next_version(set)?;
    next.nodes.retain(|member| *member != set.leader && !leaving.contains(member));
    next.leader = node.into();
    check(&next)?;
    debug_assert!(is_successor(set, &next));
    Ok(next)
}

/// The same nodes under a new reign; its versions start at 1.
pub fn in_epoch(set: &MemberSet, epoch: Epoch, proxy: &str) -> Result<MemberSet, MembersError> {
    check(set)?;
    if epoch <= set.epoch {
        return Err(MembersError::EpochNotNewer { now: set.epoch, wanted: epoch });
    }
    let next = MemberSet { epoch, version: 1, proxy: proxy.into(), ..set.clone() };
    debug_assert!(is_successor(set, &next));
    Ok(next)
}

/// The first epoch above `above` that is `node`'s to take: each of the `configured` nodes has numbers of its own, so that two that
/// can not hear of each other never take the same one (I1).
#[must_use]
pub fn next_epoch<'a>(above: Epoch, node: &'a str, configured: impl Iterator<Item = &'a str>) -> Epoch {
    let names: BTreeSet<&str> = configured.chain([node]).collect();
    let (count, place) = (names.len() as u64, names.range(..node).count() as u64);
    let next = above + 1;
    next + (place + count - next % count) % count
}

/// What every set fulfils, wherever it came from.
pub fn check(set: &MemberSet) -> Result<(), MembersError> {
    if set.nodes.is_empty() {
        return Err(MembersError::Empty);
    }
    if set.nodes.len() > MEMBERS_MAX {
        return Err(MembersError::TooMany(set.nodes.len()));
    }
    if !set.nodes.is_sorted_by(|a, b| a < b) {
        return Err(MembersError::NotSorted);
    }
    if !contains(set, &set.leader) {
        return Err(MembersError::LeaderMissing(set.leader.clone()));
    }
    Ok(())
}

/// `(epoch, version)`: what orders two sets.
#[must_use]
pub fn number(set: &MemberSet) -> (Epoch, u64) {
    (set.epoch, set.version)
}

/// I5: `(epoch, version)` only grows.
#[must_use]
pub fn is_successor(old: &MemberSet, new: &MemberSet) -> bool {
    number(new) > number(old)
}

/// I3: nothing is acknowledged under a set before all of its nodes have stored it.
/// `stored` names who has, and which set.
#[must_use]
pub fn everyone_stored(set: &MemberSet, stored: &[(&str, &MemberSet)]) -> bool {
    set.nodes.iter().all(|node| stored.iter().any(|(name, theirs)| name == node && *theirs == set))
}

/// The newest of some sets. Two different sets under one number are a fault that only a person can judge: `Err`
/// with both.
pub fn newest<'a>(
    sets: impl IntoIterator<Item = &'a MemberSet>,
) -> Result<Option<&'a MemberSet>, Box<(MemberSet, MemberSet)>> {
    let mut best: Option<&MemberSet> = None;
    for set in sets {
        match best {
            Some(known) if number(known) > number(set) => {}
            Some(known) if number(known) == number(set) && known != set => {
                return Err(Box::new((known.clone(), set.clone())));
            }
            _ => best = Some(set),
        }
    }
    Ok(best)
}

fn next_version(set: &MemberSet) -> Result<MemberSet, MembersError> {
    let version = set.version.checked_add(1).ok_or(MembersError::VersionsExhausted)?;
    Ok(MemberSet { version, ..set.clone() })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_node_joins_and_leaves() {
        let alone = first("b");
        let two = with(&alone, "a").unwrap();
        assert_eq!(two.nodes, ["a", "b"]);
        assert_eq!(two.version, 2);
        assert_eq!(with(&two, "a"), Err(MembersError::AlreadyMember("a".into())));
        let again = without(&two, "a").unwrap();
        assert_eq!(again.nodes, ["b"]);
        assert_eq!(again.version, 3);
        assert_eq!(without(&again, "a"), Err(MembersError::NotMember("a".into())));
        assert_eq!(without(&again, "b"), Err(MembersError::IsLeader("b".into())));
    }

    #[test]
    fn every_node_has_epochs_of_its_own() {
        let all = ["b", "a", "c"];
        let next = |above, node| next_epoch(above, node, all.into_iter());
        assert_eq!((next(0, "a"), next(0, "b"), next(0, "c")), (3, 1, 2));
        assert_eq!((next(3, "a"), next(3, "b")), (6, 4));
        assert_eq!(next_epoch(7, "a", std::iter::once("a")), 8);
        for above in 0..50 {
            assert!(all.iter().all(|node| next(above, node) > above));
            assert!(next(above, "a") != next(above, "b") && next(above, "b") != next(above, "c"));
        }
    }

    #[test]
    fn only_a_member_can_lead() {
        let two = with(&first("a"), "b").unwrap();
        let led = led_by(&two, "b").unwrap();
        assert_eq!((led.leader.as_str(), led.proxy.as_str(), led.version), ("b", "b", 3));
        assert_eq!(led_by(&two, "c"), Err(MembersError::NotMember("c".into())));
    }

    #[test]
    fn a_member_takes_over_and_the_old_leader_is_gone() {
        let three = with(&with(&first("a"), "b").unwrap(), "c").unwrap();
        let next = taken_over_by(&three, "c", &[]).unwrap();
        assert_eq!((next.nodes.as_slice(), next.version), (["b".to_owned(), "c".to_owned()].as_slice(), 4));
        assert_eq!((next.leader.as_str(), next.proxy.as_str()), ("c", "a"));
        assert_eq!(taken_over_by(&three, "c", &["b".into()]).unwrap().nodes, ["c"]);
        assert_eq!(taken_over_by(&three, "a", &[]), Err(MembersError::IsLeader("a".into())));
        assert!(taken_over_by(&first("a"), "b", &[]).is_err() && taken_over_by(&three, "c", &["c".into()]).is_err());
    }

    #[test]
    fn a_reign_starts_with_version_one_and_never_goes_back() {
        let two = with(&first("a"), "b").unwrap();
        let next = in_epoch(&two, 5, "a").unwrap();
        assert_eq!(number(&next), (5, 1));
        assert!(matches!(in_epoch(&next, 5, "a"), Err(MembersError::EpochNotNewer { .. })));
    }

    #[test]
    fn sets_from_elsewhere_are_checked() {
        let mut set = first("a");
        set.leader = "z".into();
        assert_eq!(check(&set), Err(MembersError::LeaderMissing("z".into())));
        set.nodes = vec!["z".into(), "a".into()];
        assert_eq!(check(&set), Err(MembersError::NotSorted));
        set.nodes.clear();
        assert_eq!(check(&set), Err(MembersError::Empty));
    }

    #[test]
    fn two_sets_with_one_number_are_a_fault() {
        let mine = with(&first("a"), "b").unwrap();
        let theirs = with(&first("a"), "c").unwrap();
        assert!(newest([&mine, &theirs]).is_err());
        assert_eq!(newest([&mine, &first("a")]).unwrap(), Some(&mine));
        assert_eq!(newest([]).unwrap(), None);
    }

    proptest! {
        #[test]
        fn any_order_of_changes_keeps_the_rules(changes in prop::collection::vec((any::<bool>(), 0_u8..8), 0..60)) {
            let mut set = first("n3");
            for (add, node) in changes {
                let node = format!("n{node}");
                let next = if add { with(&set, &node) } else { without(&set, &node) };
                if let Ok(next) = next {
                    prop_assert!(is_successor(&set, &next));
                    prop_assert_eq!(contains(&next, &node), add);
                    prop_assert_eq!(next.nodes.len().abs_diff(set.nodes.len()), 1);
                    set = next;
                }
                prop_assert!(check(&set).is_ok());
                prop_assert!(contains(&set, "n3"));
                let stored: Vec<_> = set.nodes.iter().map(|name| (name.as_str(), &set)).collect();
                prop_assert!(everyone_stored(&set, &stored));
                prop_assert!(!everyone_stored(&set, &stored[1..]));
            }
        }
    }
}
