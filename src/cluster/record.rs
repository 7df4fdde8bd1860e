//! What may become of a node's durable record: every change that its agent is asked for is judged here.
//!
//! Pure: the record goes in, its successor or the reason against it comes out. Storing it is `agent::record`.

use pgtandem_proto::membership::{Epoch, MemberSet, NodeState, Record};
use thiserror::Error;

use super::members;

/// Generations that a record keeps, the newest first.
pub const GENERATIONS_MAX: usize = 64;
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
    // A record that was lost is Blank, too: only a cluster's first node is current without having been filled.
    let first = record.state == NodeState::Blank && set.nodes == [record.node.as_str()];
    if !may_be_told(record.state, state, first, note.is_some()) {
        return Err(RecordError::Transition { from: record.state, to: state });
    }
    let mut next = Record {
        promised: record.promised.max(set.epoch),
        members: Some(set.clone()),
        state,
        uncertain,
        ..record.clone()
    };
    if let Some(generation) = new_generation
        && next.generations.first().is_none_or(|current| current != generation)
    {
        next.generations.insert(0, generation.to_owned());
        next.generations.truncate(GENERATIONS_MAX);
    }
    if let Some(note) = note {
        if next.overrides.len() >= OVERRIDES_MAX {
            return Err(RecordError::TooManyOverrides);
        }
        next.overrides.push(note.to_owned());
    }
    Ok(next)
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
    Ok(Record { promised: record.promised.max(epoch), state, ..record.clone() })
}

/// Which state a node may be told that it is in. What it lacks it cannot be told away: a way back to `InSync` leads
/// through a fill, or through an operator.
fn may_be_told(from: NodeState, to: NodeState, first: bool, overridden: bool) -> bool {
    use NodeState::{Blank, CatchingUp, Forked, InSync, Joining, Seeding, Stale, Suspect};
    if from == to {
        return true;
    }
    match from {
        // By `discard-fork`, which renames the data first.
        Forked => to == Blank && overridden,
        // A fill is gone on with by its own agent only.
        Seeding => matches!(to, Stale | Suspect | Forked | Blank),
        CatchingUp => to != Seeding,
        Joining | InSync => !matches!(to, Seeding | CatchingUp | Joining),
        Blank => matches!(to, Stale | Suspect | Forked) || (to == InSync && (first || overridden)),
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
        let record = promise(&blank("shop", "a"), 3).unwrap();
        let first = store(&record, &set(3, 0, &["a"]), NodeState::InSync, false, Some("g1"), None).unwrap();
        store(&first, &set(3, 1, &["a", "b"]), NodeState::InSync, false, None, None).unwrap()
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
    fn a_node_that_lost_its_record_is_not_told_back_into_the_set() {
        let lost = blank("shop", "a");
        assert!(store(&lost, &set(3, 5, &["a", "b"]), NodeState::InSync, false, None, None).is_err());
    }

    #[test]
    fn a_member_and_a_fork_are_not_filled() {
        assert!(enter(&member(), 3, NodeState::Seeding).is_err());
        let forked = store(&member(), &set(3, 2, &["b"]), NodeState::Forked, false, None, None).unwrap();
        assert!(enter(&forked, 3, NodeState::Seeding).is_err());
        assert!(store(&forked, &set(3, 2, &["b"]), NodeState::Stale, false, None, None).is_err());
    }

    #[test]
    fn who_is_not_in_the_set_is_not_in_sync() {
        assert!(matches!(
            store(&member(), &set(3, 2, &["b"]), NodeState::InSync, false, None, None),
            Err(RecordError::NotMember { .. })
        ));
    }
}
