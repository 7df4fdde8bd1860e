//! When may a record be overridden, and with what.

use pgtandem_proto::membership::Record;

use super::*;
use crate::cluster::record::{blank, running};

fn found(node: &str, answer: Result<(NodeState, u64, &MemberSet), &str>) -> Found {
    let answer = answer.map_err(String::from).map(|(state, promised, set)| {
        running(Record { promised, members: Some(set.clone()), state, ..blank("shop", node) })
    });
    Found { node: node.into(), address: "10.0.0.1:7001".into(), answer }
}

fn three() -> MemberSet {
    let set = members::with(&members::first("a"), "b").unwrap();
    members::in_epoch(&members::with(&set, "c").unwrap(), 4, "a").unwrap()
}

#[test]
fn a_lost_member_is_taken_out_under_a_new_epoch_and_the_leader_is_told_last() {
    let set = three();
    let all = [
        found("a", Ok((NodeState::InSync, 4, &set))),
        found("b", Err("no answer")),
        found("c", Ok((NodeState::InSync, 6, &set))),
    ];
    let plan = plan("b", &all).unwrap().unwrap();
    assert_eq!(plan.set.nodes, ["a", "c"]);
    assert_eq!(plan.set.epoch, 9);
    assert!(members::is_successor(&set, &plan.set));
    assert_eq!(plan.remaining, [("c".to_owned(), true), ("a".to_owned(), true)]);
    assert!(!plan.node_answers);
}

#[test]
fn nothing_is_written_when_a_remaining_member_can_not_be_asked_or_may_lack_writes() {
    let set = three();
    let lost =
        [found("a", Ok((NodeState::InSync, 4, &set))), found("b", Err("no answer")), found("c", Err("no answer"))];
    assert!(plan("b", &lost).unwrap_err().what.contains('c'));
    let stale = [
        found("a", Ok((NodeState::InSync, 4, &set))),
        found("b", Err("no answer")),
        found("c", Ok((NodeState::Stale, 4, &set))),
    ];
    assert!(plan("b", &stale).unwrap_err().what.contains('c'));
}

#[test]
fn the_leader_and_unknown_nodes_are_refused_and_a_non_member_is_nothing_to_do() {
    let set = members::first("a");
    let all = [found("a", Ok((NodeState::InSync, 4, &set))), found("b", Err("no answer"))];
    assert!(plan("a", &all).unwrap_err().what.contains("leader"));
    assert!(plan("z", &all).is_err());
    assert_eq!(plan("b", &all).unwrap(), None);
    assert!(plan("b", &[found("a", Err("no")), found("b", Err("no"))]).is_err());
}

#[test]
fn the_node_on_whose_host_the_proxy_was_is_left_by_promoting_another_one() {
    // The leader's PostgreSQL was lost, b leads, and a was filled again.
    let set = MemberSet { leader: "b".into(), ..three() };
    let all = [
        found("a", Err("no answer")),
        found("b", Ok((NodeState::InSync, 4, &set))),
        found("c", Ok((NodeState::InSync, 4, &set))),
    ];
    let refused = plan("a", &all).unwrap_err();
    assert!(refused.hint.contains("on the host of b: pgtandem promote"), "{}", refused.hint);
    assert!(plan("b", &all).unwrap_err().hint.contains("pgtandem promote"));
    assert_eq!(plan("c", &all).unwrap_err().what, "the member a, which would remain, can not be asked: no answer");
}

#[test]
fn an_override_that_was_interrupted_is_gone_on_with() {
    let old = three();
    let new = members::in_epoch(&members::without(&old, "b").unwrap(), 7, "a").unwrap();
    let half = [
        found("a", Ok((NodeState::InSync, 7, &old))),
        found("b", Err("no answer")),
        found("c", Ok((NodeState::InSync, 7, &new))),
    ];
    let plan = plan("b", &half).unwrap().unwrap();
    assert_eq!(plan.set.nodes, ["a", "c"]);
    assert_eq!(plan.set.epoch, 9);
    assert_eq!(plan.remaining.len(), 2);
}
