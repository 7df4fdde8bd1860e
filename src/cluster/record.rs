//! What may become of a node's durable record: every change that its agent is asked for is judged here.
//!
//! Pure: the record goes in, its successor or the reason against it comes out. Storing it is `agent::record`.

use pgtandem_proto::membership::{Epoch, MemberSet, NodeState, Record};
use thiserror::Error;

use super::members;

/// Generations that a record keeps, the newest first.
pub const GENERATIONS_MAX: usize = 1_000;
/// Operators' overrides that a record keeps; the oldest and the newest are the ones that matter, so further ones
/// are refused rather than dropped.
pub const OVERRIDES_MAX: usize = 1000;

#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum RecordError {
    #[error("epoch {asked} is over: this node has promised to obey none below {promised}")]
    OldEpoch { asked: Epoch, promised: Epoch },
    #[error("member set ({asked_epoch}, {asked_version}) is older than the recorded ({epoch}, {version})")]
    OldMembers { asked_epoch: Epoch, asked_version: u64, epoch: Epoch, version: u64 },
    #[error("two different member sets have the number ({epoch}, {version})")]
    TwoSets { epoch: Epoch, version: u64 },
    #[error(transparent)]
    Members(#[from] members::MembersError),
    #[error("this node can not be {state:?} under a member set that it is not in")]
    NotMember { state: NodeState },
    #[error("this node is {from:?} and can not become {to:?} by being told so")]
    Transition { from: NodeState, to: NodeState },
    #[error("this record has {OVERRIDES_MAX} overrides already")]
    TooManyOverrides,
    #[error("this node is {0:?}, not forked: there is nothing to discard")]
    NotForked(NodeState),
}

/// The record of a node that knows nothing about its data: a new one, or one whose record was lost.
#[must_use]
pub fn blank(cluster: &str, node: &str) -> Record {
    Record {
        cluster: cluster.to_owned(),
        node: node.to_owned(),
        promised: 0,
        members: None,
        state: NodeState::Blank,
        uncertain: true,
        generations: Vec::new(),
        verified_at: None,
        overrides: Vec::new(),
        taking_over: false,
        last_contact: None,
    }
}

/// What an agent says whose PostgreSQL runs and who has this record.
#[cfg(test)]
pub(crate) fn running(record: Record) -> pgtandem_proto::message::NodeStatus {
    pgtandem_proto::message::NodeStatus {
        record,
        postgres: pgtandem_proto::message::PostgresState::Running,
        postgres_detail: String::new(),
        progress: None,
        lease_ms: None,
        archive_problem: String::new(),
    }
}

/// The record as an agent holds it after its start: it may have been left behind while it did not run.
#[must_use]
pub fn started(record: &Record) -> Record {
    Record { uncertain: true, ..record.clone() }
}

/// The promise to obey no epoch below `epoch`. The same one may be promised again.
pub fn promise(record: &Record, epoch: Epoch) -> Result<Record, RecordError> {
    check_epoch(record, epoch)?;
    Ok(Record { promised: epoch, ..record.clone() })
}

/// Whether something of `epoch` may still be done on this node.
pub fn check_epoch(record: &Record, epoch: Epoch) -> Result<(), RecordError> {
    if epoch < record.promised {
        return Err(RecordError::OldEpoch { asked: epoch, promised: record.promised });
    }
    Ok(())
}

/// A member set and this node's state under it. `note` is an operator's override; only with one may a node that
/// was left behind be declared current without having been filled.
pub fn store(
    record: &Record,
    set: &MemberSet,
    state: NodeState,
    uncertain: bool,
    new_generation: Option<&str>,
    note: Option<&str>,
) -> Result<Record, RecordError> {
    check_epoch(record, set.epoch)?;
    members::check(set)?;
    if let Some(recorded) = &record.members {
        let (asked, now) = ((set.epoch, set.version), (recorded.epoch, recorded.version));
        if asked < now {
            return Err(RecordError::OldMembers {
                asked_epoch: asked.0,
                asked_version: asked.1,
                epoch: now.0,
                version: now.1,
            });
        }
        if asked == now && set != recorded {
            return Err(RecordError::TwoSets { epoch: now.0, version: now.1 });
        }
    }
    if state == NodeState::InSync && !members::contains(set, &record.node) {
        return Err(RecordError::NotMember { state });
    }
    // A record that was lost is Blank, too, and has forgotten its promises: only a cluster's first node, before any proxy has reigned, is
    // current without having been filled.
    let first = record.state == NodeState::Blank && *set == members::first(&record.node);
    if !may_be_told(record.state, state, first, note.is_some()) && !comes_back(record, set, state) {
        return Err(RecordError::Transition { from: record.state, to: state });
    }
    let leads = set.leader == record.node;
    let was_led_by_another = record.members.as_ref().is_some_and(|recorded| recorded.leader != record.node);
    // An operator's override settles nothing in the databases: only a set that this node's own reign stores says that it did.
    let still_taking_over = record.taking_over && note.is_some();
    let mut next = Record {
        promised: record.promised.max(set.epoch),
        members: Some(set.clone()),
        state,
        uncertain,
        taking_over: leads && (was_led_by_another || still_taking_over),
        ..record.clone()
    };
    if let Some(generation) = new_generation
        && next.generations.first().is_none_or(|current| current != generation)
    {
        next.generations.insert(0, generation.to_owned());
        next.generations.truncate(GENERATIONS_MAX);
    }
    match note {
        Some(note) => overridden(next, note),
        None => Ok(next),
    }
}

fn overridden(mut record: Record, note: &str) -> Result<Record, RecordError> {
    if record.overrides.len() >= OVERRIDES_MAX {
        return Err(RecordError::TooManyOverrides);
    }
    record.overrides.push(note.to_owned());
    Ok(record)
}

/// The end of a recovery: this node has the leader's data, and with them their generations.
pub fn join(record: &Record, set: &MemberSet, generations: &[String]) -> Result<Record, RecordError> {
    // Sure of it with its first lease.
    let next = store(record, set, NodeState::InSync, true, None, None)?;
    let generations = generations.iter().take(GENERATIONS_MAX).cloned().collect();
    Ok(Record { generations, ..next })
}

/// A person has looked at the data of a fork and needs none of them: the node is empty. Its data are moved aside first.
pub fn discard_fork(record: &Record, note: &str) -> Result<Record, RecordError> {
    if record.state != NodeState::Forked {
        return Err(RecordError::NotForked(record.state));
    }
    let blank = Record { state: NodeState::Blank, generations: Vec::new(), taking_over: false, ..record.clone() };
    overridden(blank, note)
}

/// What a node is that is InSync by its own record and not in the set of a newer reign: left behind, or, if its data have a
/// generation that the leader's do not descend from, one that went on alone. Those may be the only copy of an acknowledged write
/// (I12), so they are kept.
#[must_use]
pub fn left_behind(record: &Record, leader_generations: &[String]) -> NodeState {
    match record.generations.first() {
        Some(current) if !leader_generations.contains(current) => NodeState::Forked,
        _ => NodeState::Stale,
    }
}

/// What the generation in the database says about the data, compared with the record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Generation {
    Same,
    /// The last change of the record did not get there, or none ever did.
    NotWritten,
    /// Other data than those that the record is about.
    Other,
}

/// `found`: what stands in the database. The record is written first, so the database may be one behind.
#[must_use]
pub fn compare_generation(record: &Record, found: Option<&str>) -> Generation {
    let at = found.map(|found| record.generations.iter().position(|generation| generation == found));
    match at {
        Some(Some(0)) => Generation::Same,
        Some(Some(1)) | None => Generation::NotWritten,
        Some(_) => Generation::Other,
    }
}

/// The data of a node in sync were replaced: they may lack what was acknowledged.
#[must_use]
pub fn replaced(record: &Record) -> Record {
    match record.state {
        NodeState::InSync => Record { state: NodeState::Suspect, ..record.clone() },
        _ => record.clone(),
    }
}

/// The agent itself begins to fill this node, or to let it catch up.
pub fn enter(record: &Record, epoch: Epoch, state: NodeState) -> Result<Record, RecordError> {
    check_epoch(record, epoch)?;
    let member = record.state == NodeState::InSync
        && record.members.as_ref().is_some_and(|set| members::contains(set, &record.node));
    let allowed = match state {
        // A member is taken out of the set first; a fork is kept for a person.
        NodeState::Seeding => !member && record.state != NodeState::Forked,
        NodeState::CatchingUp => matches!(record.state, NodeState::Seeding | NodeState::CatchingUp),
        _ => false,
    };
    if !allowed {
        return Err(RecordError::Transition { from: record.state, to: state });
    }
    let promised = record.promised.max(epoch);
    // Other data come now: what was known of the old ones is over.
    let generations = if state == NodeState::Seeding { Vec::new() } else { record.generations.clone() };
    Ok(Record { promised, state, generations, taking_over: false, ..record.clone() })
}

/// The reign that took this node out brings it what it missed: no other one knows what that is. What the node has and what it lacks, that
/// reign judges by its marks.
fn comes_back(record: &Record, set: &MemberSet, to: NodeState) -> bool {
    let same_reign = record.promised == set.epoch && record.members.as_ref().is_some_and(|m| m.epoch == set.epoch);
    to == NodeState::Joining && record.state == NodeState::Stale && same_reign && !record.generations.is_empty()
}

/// Which state a node may be told that it is in. What it lacks it cannot be told away: a way back to `InSync` leads
/// through a fill, through an operator, or through the reign that took it out ([`comes_back`]).
fn may_be_told(from: NodeState, to: NodeState, first: bool, overridden: bool) -> bool {
    use NodeState::{Blank, CatchingUp, Forked, InSync, Joining, Seeding, Stale, Suspect};
    if from == to {
        return true;
    }
    match from {
        // Only `discard-fork` leads out, which moves the data aside first.
        Forked => false,
        // A fill is gone on with by its own agent only.
        Seeding => matches!(to, Stale | Suspect | Forked | Blank),
        CatchingUp => to != Seeding,
        Joining | InSync => !matches!(to, Seeding | CatchingUp | Joining),
        // Nothing is known of its data, and nothing that it is told changes that: as Stale it could be promoted.
        Blank => to == InSync && (first || overridden),
        Stale | Suspect => matches!(to, Stale | Suspect | Forked | Blank) || (to == InSync && overridden),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set(epoch: Epoch, version: u64, nodes: &[&str]) -> MemberSet {
        MemberSet {
            epoch,
            version,
            nodes: nodes.iter().map(ToString::to_string).collect(),
            leader: nodes[0].to_owned(),
            proxy: nodes[0].to_owned(),
        }
    }

    fn member() -> Record {
        let first =
            store(&blank("shop", "a"), &members::first("a"), NodeState::InSync, false, Some("g1"), None).unwrap();
        let record = promise(&first, 3).unwrap();
        store(&record, &set(3, 1, &["a", "b"]), NodeState::InSync, false, None, None).unwrap()
    }

    #[test]
    fn an_old_epoch_is_refused() {
        assert_eq!(promise(&member(), 2), Err(RecordError::OldEpoch { asked: 2, promised: 3 }));
        assert_eq!(promise(&member(), 4).unwrap().promised, 4);
        assert!(store(&member(), &set(2, 9, &["a"]), NodeState::InSync, false, None, None).is_err());
    }

    #[test]
    fn member_sets_only_grow() {
        let record = store(&member(), &set(3, 2, &["a"]), NodeState::InSync, false, Some("g2"), None).unwrap();
        assert_eq!(record.generations, ["g2", "g1"]);
        assert!(matches!(
            store(&record, &set(3, 1, &["a", "b"]), NodeState::InSync, false, None, None),
            Err(RecordError::OldMembers { .. })
        ));
        assert!(matches!(
            store(&record, &set(3, 2, &["a", "b"]), NodeState::InSync, false, None, None),
            Err(RecordError::TwoSets { .. })
        ));
        store(&record, &set(3, 2, &["a"]), NodeState::InSync, true, None, None).unwrap();
    }

    #[test]
    fn a_stale_node_is_current_again_only_after_a_fill_or_by_an_operator() {
        let stale = store(&member(), &set(3, 2, &["b"]), NodeState::Stale, false, None, None).unwrap();
        let again = set(3, 3, &["a", "b"]);
        assert!(store(&stale, &again, NodeState::InSync, false, None, None).is_err());
        let overridden = store(&stale, &again, NodeState::InSync, false, None, Some("by hand")).unwrap();
        assert_eq!(overridden.overrides, ["by hand"]);
        let seeding = enter(&stale, 3, NodeState::Seeding).unwrap();
        assert!(store(&seeding, &again, NodeState::InSync, false, None, None).is_err());
        let caught_up = enter(&seeding, 3, NodeState::CatchingUp).unwrap();
        assert_eq!(store(&caught_up, &again, NodeState::InSync, true, None, None).unwrap().state, NodeState::InSync);
    }

    #[test]
    fn only_the_reign_that_left_it_behind_may_bring_a_stale_node_what_it_missed() {
        let joining = |record: &Record, set: &MemberSet| store(record, set, NodeState::Joining, true, None, None);
        let stale = store(&member(), &set(3, 2, &["b"]), NodeState::Stale, false, None, None).unwrap();
        let back = joining(&stale, &set(3, 2, &["b"])).unwrap();
        assert_eq!(join(&back, &set(3, 3, &["a", "b"]), &["g2".into()]).unwrap().state, NodeState::InSync);
        // It can go back to where it was, and then nothing leads past this again.
        assert_eq!(
            store(&back, &set(3, 2, &["b"]), NodeState::Stale, false, None, None).unwrap().state,
            NodeState::Stale
        );
        assert!(joining(&stale, &set(4, 1, &["b"])).is_err(), "a new reign has no backlog");
        assert!(joining(&promise(&stale, 4).unwrap(), &set(3, 2, &["b"])).is_err());
        let suspect = Record { state: NodeState::Suspect, ..stale };
        assert!(joining(&suspect, &set(3, 2, &["b"])).is_err());
    }

    #[test]
    fn a_node_that_lost_its_record_is_not_told_back_into_the_set() {
        let lost = blank("shop", "a");
        assert!(store(&lost, &set(3, 5, &["a", "b"]), NodeState::InSync, false, None, None).is_err());
        assert!(store(&lost, &set(3, 5, &["b"]), NodeState::Stale, false, None, None).is_err());
        // Not alone either: by a proxy of an epoch that it had promised away, say.
        assert!(store(&lost, &set(3, 5, &["a"]), NodeState::InSync, false, None, None).is_err());
    }

    #[test]
    fn a_member_and_a_fork_are_not_filled() {
        assert!(enter(&member(), 3, NodeState::Seeding).is_err());
        let forked = store(&member(), &set(3, 2, &["b"]), NodeState::Forked, false, None, None).unwrap();
        assert!(enter(&forked, 3, NodeState::Seeding).is_err());
        assert!(store(&forked, &set(3, 2, &["b"]), NodeState::Stale, false, None, None).is_err());
    }

    #[test]
    fn a_fork_is_empty_only_after_a_person_has_discarded_it() {
        let forked = store(&member(), &set(3, 2, &["b"]), NodeState::Forked, false, None, None).unwrap();
        assert!(store(&forked, &set(3, 2, &["b"]), NodeState::Blank, false, None, Some("by hand")).is_err());
        let discarded = discard_fork(&forked, "nothing in it is needed").unwrap();
        assert_eq!((discarded.state, discarded.overrides.len()), (NodeState::Blank, 1));
        assert!(enter(&discarded, 3, NodeState::Seeding).is_ok());
        assert_eq!(discard_fork(&member(), "x"), Err(RecordError::NotForked(NodeState::InSync)));
    }

    #[test]
    fn a_new_leader_takes_over_until_its_own_reign_has_stored_a_set() {
        let follower = Record { node: "b".into(), ..member() };
        let promoted = MemberSet { leader: "b".into(), proxy: "b".into(), ..set(4, 1, &["b"]) };
        let record = store(&follower, &promoted, NodeState::InSync, false, Some("g2"), Some("promoted")).unwrap();
        assert!(record.taking_over);
        let detached = MemberSet { epoch: 5, ..promoted.clone() };
        let record = store(&record, &detached, NodeState::InSync, false, None, Some("by hand")).unwrap();
        assert!(record.taking_over, "an override settles nothing");
        let reign = MemberSet { epoch: 6, ..promoted };
        assert!(!store(&record, &reign, NodeState::InSync, false, None, None).unwrap().taking_over);
    }

    #[test]
    fn a_node_that_went_on_alone_is_told_apart_from_one_that_was_left_behind() {
        let record = member();
        assert_eq!(left_behind(&record, &["g3".into(), "g1".into()]), NodeState::Stale);
        let alone = store(&record, &set(3, 2, &["a"]), NodeState::InSync, false, Some("g2"), None).unwrap();
        assert_eq!(left_behind(&alone, &["g3".into(), "g1".into()]), NodeState::Forked);
        let joined = join(&Record { node: "b".into(), ..record }, &set(3, 3, &["a", "b"]), &["g2".into(), "g1".into()]);
        assert_eq!(joined.unwrap().generations, ["g2", "g1"]);
    }

    #[test]
    fn data_of_another_generation_are_not_those_of_the_record() {
        let record = Record { generations: ["g3", "g2", "g1"].map(String::from).into(), ..member() };
        let found = |found| compare_generation(&record, found);
        assert_eq!((found(Some("g3")), found(Some("g2"))), (Generation::Same, Generation::NotWritten));
        assert_eq!(found(None), Generation::NotWritten);
        assert_eq!((found(Some("g1")), found(Some("g9"))), (Generation::Other, Generation::Other));
        let replaced = replaced(&record);
        assert_eq!(replaced.state, NodeState::Suspect);
        assert!(store(&replaced, &set(3, 1, &["a", "b"]), NodeState::InSync, false, None, None).is_err());
    }

    #[test]
    fn who_is_not_in_the_set_is_not_in_sync() {
        assert!(matches!(
            store(&member(), &set(3, 2, &["b"]), NodeState::InSync, false, None, None),
            Err(RecordError::NotMember { .. })
        ));
    }
}
