//! May this node be recovered? Pure: the judgement over records and facts, before anything is touched.

use pgtandem_proto::membership::{Epoch, MemberSet, NodeState, Record};
use pgtandem_proto::message::{NodeFacts, NodeStatus, OldData, PostgresState};

use super::report::{Cause, CauseKind};
use crate::cluster::{members, record};
use crate::sync::facts::{Finding, SPARE_BYTES, compare};

/// What the records say: refuses, or tells whether the node is a member now.
pub fn judge_record(node: &str, set: &MemberSet, epoch: Epoch, target: &NodeStatus) -> Result<bool, Cause> {
    judge_leader(node, set)?;
    if target.record.promised > epoch {
        return Err(refused(
            format!("{node} obeys epoch {}, and this proxy reigns in the older epoch {epoch}", target.record.promised),
            "another proxy has started since; stop this one and run the recovery from there",
        ));
    }
    match target.record.state {
        NodeState::Forked => Err(fork(node)),
        NodeState::Blank
        | NodeState::Seeding
        | NodeState::CatchingUp
        | NodeState::Joining
        | NodeState::InSync
        | NodeState::Stale
        | NodeState::Suspect => Ok(members::contains(set, node)),
    }
}

/// Data that went another way than the leader's are not overwritten, although the node does not know it yet: they may be the only copy
/// of an acknowledged write.
pub fn judge_fork(node: &str, leader: &Record, target: &Record) -> Result<(), Cause> {
    if record::left_behind(target, &leader.generations) == NodeState::Forked {
        return Err(fork(node));
    }
    Ok(())
}

fn fork(node: &str) -> Cause {
    refused(
        format!("{node} went on alone while this side did, too; its data may hold the only copy of writes"),
        format!("look at the data of {node} first; when nothing in them is needed: pgtandem discard-fork {node}"),
    )
}

/// The leader is never the target of a recovery.
pub fn judge_leader(node: &str, set: &MemberSet) -> Result<(), Cause> {
    if set.leader == node {
        return Err(refused(
            format!("{node} is the leader: it is what the other nodes are filled from"),
            "name another node; `pgtandem status` lists them",
        ));
    }
    Ok(())
}

/// Between two reigns nobody is served, and nothing may be copied.
pub fn judge_reign(epoch: Epoch) -> Result<(), Cause> {
    if epoch == 0 {
        return Err(Cause::new(
            CauseKind::Leader,
            "the proxy does not serve yet: it is taking a new epoch",
            "wait until `pgtandem status` shows an epoch, then run the recovery again",
        ));
    }
    Ok(())
}

/// The source must be the leader that runs and is what its record says.
pub fn judge_source(set: &MemberSet, source: &NodeStatus) -> Result<(), Cause> {
    if source.postgres != PostgresState::Running {
        let detail = &source.postgres_detail;
        let detail = if detail.is_empty() { String::new() } else { format!(": {detail}") };
        return Err(Cause::new(
            CauseKind::Source,
            format!("PostgreSQL on the leader {} is not running{detail}", set.leader),
            "its agent starts it again by itself; wait until `pgtandem status` shows it running",
        ));
    }
    if source.record.state != NodeState::InSync {
        return Err(Cause::new(
            CauseKind::Source,
            format!("the leader {} is recorded as {:?}, not as in sync", set.leader, source.record.state),
            "look at `pgtandem status`; nothing is copied from a node that is not proven current",
        ));
    }
    Ok(())
}

/// What the facts say: refuses with every reason, or gives the warnings.
pub fn judge_facts(node: &str, leader: &str, source: &NodeFacts, target: &NodeFacts) -> Result<Vec<String>, Cause> {
    let (refusals, warnings): (Vec<_>, Vec<_>) =
        compare(source, target).into_iter().partition(|finding| finding.refused);
    if refusals.is_empty() {
        return Ok(warnings.into_iter().map(|finding| format!("{} {}", finding.what, finding.hint)).collect());
    }
    let join = |part: fn(&Finding) -> &str| refusals.iter().map(part).collect::<Vec<_>>().join(" ");
    Err(refused(
        format!("{node} can not be filled from {leader}: {}", join(|finding| &finding.what).trim_end_matches('.')),
        join(|finding| &finding.hint),
    ))
}

/// Whether the node has the programs that are to look at its files.
pub fn judge_programs(node: &str, target: &NodeFacts) -> Result<(), Cause> {
    if target.programs_missing.is_empty() {
        return Ok(());
    }
    Err(refused(
        format!("the bin_dir of {node} has no {}, which --verify needs", target.programs_missing.join(" and no ")),
        "install PostgreSQL's own programs there, or leave --verify out",
    ))
}

/// Whether what lies on the node can be kept while it is filled with `data_bytes`: refuses, or says what room that takes.
pub fn judge_room(node: &str, data_bytes: u64, old: &OldData) -> Result<Option<String>, Cause> {
    if old.bytes == 0 {
        return Ok(None);
    }
    if !old.link.is_empty() {
        return Err(refused(
            format!(
                "the old data of {node} can not be kept: {} is a link, and what it leads to would be overwritten",
                old.link
            ),
            "copy both by hand and leave --keep-old out",
        ));
    }
    // Every block may come to differ, and the new files may be larger.
    let needs = old.bytes.saturating_add(data_bytes.saturating_sub(old.bytes));
    let (needs_mib, free_mib) = (needs.div_ceil(1 << 20), old.free_bytes >> 20);
    if old.free_bytes < needs.saturating_add(SPARE_BYTES) {
        return Err(refused(
            format!(
                "keeping the old data of {node} needs up to {needs_mib} MiB, besides {} MiB for WAL, and {free_mib} MiB are free there",
                SPARE_BYTES >> 20
            ),
            "make room there, or leave --keep-old out",
        ));
    }
    Ok(Some(format!("Keeping the old data of {node} needs up to {needs_mib} MiB; {free_mib} MiB are free.")))
}

fn refused(what: impl Into<String>, hint: impl Into<String>) -> Cause {
    Cause::new(CauseKind::Refused, what, hint)
}

#[cfg(test)]
mod tests {

    use super::*;
    use crate::cluster::record::{blank, running};

    fn status(node: &str, state: NodeState) -> NodeStatus {
        running(Record { promised: 3, state, uncertain: false, ..blank("shop", node) })
    }

    #[test]
    fn a_lost_node_may_come_back_whatever_it_was_doing() {
        let set = members::first("a");
        for state in [NodeState::Blank, NodeState::Seeding, NodeState::CatchingUp, NodeState::Stale, NodeState::InSync]
        {
            assert_eq!(judge_record("b", &set, 3, &status("b", state)), Ok(false));
        }
        let two = members::with(&set, "b").unwrap();
        assert_eq!(judge_record("b", &two, 3, &status("b", NodeState::InSync)), Ok(true));
    }

    #[test]
    fn the_leader_a_forked_node_and_an_old_proxy_are_refused() {
        let set = members::first("a");
        let refused = |result: Result<bool, Cause>| result.unwrap_err().kind == CauseKind::Refused;
        assert!(refused(judge_record("a", &set, 3, &status("a", NodeState::InSync))));
        assert!(refused(judge_record("b", &set, 3, &status("b", NodeState::Forked))));
        assert!(refused(judge_record("b", &set, 2, &status("b", NodeState::Stale))));
    }

    #[test]
    fn every_reason_against_a_fill_is_told_at_once() {
        let source = NodeFacts { binaries_version_num: 150_018, architecture: "x86_64".into(), ..NodeFacts::default() };
        let target = NodeFacts {
            binaries_version_num: 160_004,
            architecture: "aarch64".into(),
            foreign_server: true,
            ..NodeFacts::default()
        };
        let cause = judge_facts("b", "a", &source, &target).unwrap_err();
        assert_eq!(cause.kind, CauseKind::Refused);
        for part in ["b can not be filled from a", "15", "16", "aarch64", "did not start"] {
            assert!(cause.what.contains(part), "{part} is not in {cause}");
        }
    }

    #[test]
    fn a_check_that_nobody_can_make_is_refused_before_anything_is_touched() {
        assert_eq!(judge_programs("b", &NodeFacts::default()), Ok(()));
        let target = NodeFacts { programs_missing: vec!["pg_verifybackup".into()], ..NodeFacts::default() };
        let cause = judge_programs("b", &target).unwrap_err();
        assert_eq!(cause.what, "the bin_dir of b has no pg_verifybackup, which --verify needs");
    }

    #[test]
    fn old_data_are_kept_only_where_there_is_room_for_both() {
        let old = |bytes: u64, free_bytes: u64| OldData { bytes, free_bytes, link: String::new() };
        assert_eq!(judge_room("b", 5 << 30, &old(0, 0)), Ok(None), "there is nothing to keep");
        let said = judge_room("b", 4 << 30, &old(3 << 30, 9 << 30)).unwrap().unwrap();
        assert_eq!(said, "Keeping the old data of b needs up to 4096 MiB; 9216 MiB are free.");
        let cause = judge_room("b", 1 << 30, &old(3 << 30, (4 << 30) - 1)).unwrap_err();
        assert!(
            cause.what.contains("needs up to 3072 MiB, besides 1024 MiB for WAL, and 4095 MiB are free"),
            "{cause}"
        );
        assert!(judge_room("b", 1 << 30, &old(3 << 30, 4 << 30)).is_ok());
        let linked = OldData { link: "pg_tblspc/5".into(), ..old(1, 9 << 30) };
        assert!(judge_room("b", 1, &linked).unwrap_err().what.contains("pg_tblspc/5 is a link"));
    }

    #[test]
    fn nothing_is_copied_from_a_source_that_is_not_current() {
        let set = members::first("a");
        assert_eq!(judge_source(&set, &status("a", NodeState::InSync)), Ok(()));
        assert!(judge_source(&set, &status("a", NodeState::Stale)).is_err());
        let mut stopped = status("a", NodeState::InSync);
        stopped.postgres = PostgresState::Stopped;
        assert!(judge_source(&set, &stopped).is_err());
    }
}
