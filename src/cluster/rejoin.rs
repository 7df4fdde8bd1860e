//! May a node that was away briefly take up what it missed, without a copy? Pure: what its agent and its PostgreSQL say goes in, a
//! judgement comes out.
//!
//! Only the reign that took it out may let it in again, because only that has what it missed; and only if its PostgreSQL is the one that it
//! was: it has lost nothing that was durable there and has gone no way of its own. Whether it has every transaction is told by its marks
//! (`replicate::chain`).

use pgtandem_proto::membership::{Epoch, MemberSet, NodeState, Record};
use pgtandem_proto::message::{NodeStatus, PostgresState};

use super::{members, record};

/// What a node's record and its agent say.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Judgement {
    /// Not yet: its PostgreSQL does not run, say.
    Wait(String),
    /// It is told first that it was left behind.
    Tell,
    /// A recovery of an agent that was started again meanwhile has ended with it: it is stale again, and PostgreSQL is started.
    StartAgain,
    Begin,
    /// It has to be filled.
    Never(String),
}

/// `leader`: the leader's record. `epoch`: that of the reign that took the node out, and that serves now.
#[must_use]
pub fn judge(node: &str, set: &MemberSet, epoch: Epoch, leader: &Record, status: &NodeStatus) -> Judgement {
    let target = &status.record;
    let never = |why: &str| Judgement::Never(why.to_owned());
    if target.promised != epoch {
        return Judgement::Never(format!("its agent has promised epoch {}, and this one is {epoch}", target.promised));
    }
    let Some(recorded) = &target.members else { return never("its record was lost") };
    if recorded.epoch != epoch || members::number(recorded) > members::number(set) || members::contains(set, node) {
        return Judgement::Never(format!(
            "its record is of epoch {} and version {}, and this one is of epoch {} and version {}",
            recorded.epoch, recorded.version, set.epoch, set.version
        ));
    }
    match target.state {
        NodeState::Stale | NodeState::Joining | NodeState::InSync => {}
        NodeState::Suspect => return never("its data were replaced or differ"),
        NodeState::Blank => return never("its record was lost"),
        NodeState::Seeding | NodeState::CatchingUp => return never("a recovery of it was begun"),
        NodeState::Forked => return never("it went on alone"),
    }
    if target.generations.is_empty() || record::left_behind(target, &leader.generations) == NodeState::Forked {
        return never("its data are of another generation than the leader's");
    }
    match (status.postgres, target.state) {
        (_, NodeState::InSync) => Judgement::Tell,
        (PostgresState::Running, _) => Judgement::Begin,
        (PostgresState::Standby, _) => never("its PostgreSQL runs as a standby"),
        (_, NodeState::Joining) => Judgement::StartAgain,
        (state, _) => Judgement::Wait(format!("its PostgreSQL is {state:?}").to_lowercase()),
    }
}

/// Whether the generation in the node's database is that of its record, one before it (the record is written first), or a newer one of
/// the leader's, which an attempt to let it in has written there. `None`: there was none yet.
#[must_use]
pub fn fits_generation(leader: &Record, target: &Record, found: Option<&str>) -> bool {
    let Some(found) = found else { return true };
    let place = |generation: &str| leader.generations.iter().position(|known| known == generation);
    let recorded = target.generations.first().and_then(|generation| place(generation));
    match (place(found), recorded) {
        (Some(found), Some(recorded)) => found <= recorded + 1,
        _ => false,
    }
}

/// What a server says about itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Standing {
    pub system_identifier: String,
    /// Of the WAL that it writes now.
    pub timeline: String,
    /// When its postmaster was started.
    pub started: String,
    /// To where its WAL is durable, bytes.
    pub flushed: u64,
}

impl Standing {
    /// Gives one value for [`Self::parse`].
    pub const QUERY: &str = "SELECT pg_catalog.json_build_array(s.system_identifier::pg_catalog.text, \
         substr(pg_catalog.pg_walfile_name(pg_catalog.pg_current_wal_insert_lsn()), 1, 8), \
         pg_catalog.pg_postmaster_start_time()::pg_catalog.text, \
         (pg_catalog.pg_current_wal_flush_lsn() - '0/0'::pg_catalog.pg_lsn)::pg_catalog.text)::pg_catalog.text \
         FROM pg_catalog.pg_control_system() s";

    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        let (system_identifier, timeline, started, flushed): (String, String, String, String) =
            serde_json::from_str(text).ok()?;
        Some(Self { system_identifier, timeline, started, flushed: flushed.parse().ok()? })
    }

    /// Why the server that says `now` is not the one that said `self`, or not as it was.
    #[must_use]
    pub fn differs(&self, now: &Self) -> Option<String> {
        if self.system_identifier != now.system_identifier {
            return Some("its data directory belongs to another database cluster".into());
        }
        if self.timeline != now.timeline {
            return Some("its PostgreSQL was promoted, or its data come from a backup".into());
        }
        if now.flushed < self.flushed {
            return Some(
                "its WAL ends before what was durable there: it lost writes in its crash, or its data come from a backup"
                    .into(),
            );
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cluster::record::{blank, running};

    fn set(version: u64, nodes: &[&str]) -> MemberSet {
        let nodes = nodes.iter().map(ToString::to_string).collect();
        MemberSet { epoch: 3, version, nodes, leader: "a".into(), proxy: "a".into() }
    }

    fn told(change: impl FnOnce(&mut NodeStatus)) -> Judgement {
        let leader = Record { generations: vec!["g2".into(), "g1".into()], ..blank("shop", "a") };
        let members = Some(set(5, &["a"]));
        let record = Record {
            promised: 3,
            members,
            state: NodeState::Stale,
            generations: vec!["g1".into()],
            ..blank("shop", "b")
        };
        let mut status = running(record);
        change(&mut status);
        judge("b", &set(5, &["a"]), 3, &leader, &status)
    }

    fn is_never(judgement: &Judgement) -> bool {
        matches!(judgement, Judgement::Never(_))
    }

    #[test]
    fn only_the_reign_that_took_it_out_lets_it_in_again() {
        assert_eq!(told(|_| ()), Judgement::Begin);
        assert!(is_never(&told(|status| status.record.promised = 4)));
        assert!(is_never(&told(|status| status.record.members.as_mut().unwrap().epoch = 2)));
        assert!(is_never(&told(|status| status.record.members.as_mut().unwrap().version = 6)));
        assert!(is_never(&told(|status| status.record.members = None)));
    }

    #[test]
    fn one_that_could_not_be_told_that_it_left_is_told_first() {
        let before = set(4, &["a", "b"]);
        assert_eq!(
            told(|status| {
                status.record.state = NodeState::InSync;
                status.record.members = Some(before);
            }),
            Judgement::Tell
        );
    }

    #[test]
    fn data_that_went_another_way_or_are_not_known_are_never_taken_for_the_old_ones() {
        for state in
            [NodeState::Suspect, NodeState::Blank, NodeState::Seeding, NodeState::CatchingUp, NodeState::Forked]
        {
            assert!(is_never(&told(|status| status.record.state = state)), "{state:?}");
        }
        assert!(is_never(&told(|status| status.record.generations.insert(0, "alone".into()))));
        assert!(is_never(&told(|status| status.record.generations.clear())));
        assert!(is_never(&told(|status| {
            status.record.state = NodeState::InSync;
            status.record.members = Some(set(4, &["a", "b"]));
            status.record.generations.insert(0, "alone".into());
        })));
        assert!(is_never(&told(|status| status.postgres = PostgresState::Standby)));
    }

    #[test]
    fn a_server_that_does_not_run_is_waited_for() {
        for state in [PostgresState::Stopped, PostgresState::Starting, PostgresState::Absent] {
            assert!(matches!(told(|status| status.postgres = state), Judgement::Wait(_)));
        }
        let agent_restarted = told(|status| {
            status.record.state = NodeState::Joining;
            status.postgres = PostgresState::Stopped;
        });
        assert_eq!(agent_restarted, Judgement::StartAgain);
    }

    #[test]
    fn an_older_generation_in_the_database_is_that_of_a_restored_backup() {
        let of = |generations: &[&str]| Record {
            generations: generations.iter().map(ToString::to_string).collect(),
            ..blank("shop", "b")
        };
        let (leader, target) = (of(&["g5", "g4", "g3", "g2", "g1"]), of(&["g3", "g2", "g1"]));
        for found in [None, Some("g5"), Some("g4"), Some("g3"), Some("g2")] {
            assert!(fits_generation(&leader, &target, found), "{found:?}");
        }
        for found in ["g1", "alone"] {
            assert!(!fits_generation(&leader, &target, Some(found)), "{found}");
        }
    }

    #[test]
    fn another_server_or_an_older_state_of_the_same_is_found_out() {
        let before = Standing::parse(r#"["77", "00000001", "2026-01-01", "1000"]"#).unwrap();
        let same = Standing { started: "2026-01-02".into(), flushed: 1000, ..before.clone() };
        assert_eq!(before.differs(&same), None);
        assert!(before.differs(&Standing { system_identifier: "78".into(), ..same.clone() }).is_some());
        assert!(before.differs(&Standing { timeline: "00000002".into(), ..same.clone() }).is_some());
        assert!(before.differs(&Standing { flushed: 999, ..same }).is_some());
        assert_eq!(Standing::parse("nonsense"), None);
    }
}
