//! The four cases of a promotion.

use super::*;

fn set(epoch: Epoch, version: u64, nodes: &[&str], leader: &str) -> MemberSet {
    let nodes = nodes.iter().map(ToString::to_string).collect();
    MemberSet { epoch, version, nodes, leader: leader.into(), proxy: leader.into() }
}

fn of(node: &str, state: NodeState, set: MemberSet, generations: &[&str]) -> Record {
    let generations = generations.iter().map(ToString::to_string).collect();
    Record { promised: set.epoch, state, members: Some(set), generations, ..record::blank("shop", node) }
}

fn promote(own: &str, found: &[(&str, Option<&Record>)]) -> Judgement {
    let found: Vec<_> = found
        .iter()
        .map(|(node, record)| Found { node, answer: record.ok_or("no answer"), is_leased: false })
        .collect();
    let judgement = judge(own, &found);
    assert!(!judgement.evidence.is_empty());
    assert_eq!(judgement.plan.is_none(), judgement.case == Case::Impossible);
    assert_eq!(judgement.hint.is_empty(), judgement.case != Case::Impossible);
    judgement
}

#[test]
fn a_current_node_whose_peer_is_silent_needs_a_statement() {
    let b = Record {
        last_contact: Some(1_795_424_701),
        ..of("b", NodeState::InSync, set(3, 2, &["a", "b"], "a"), &["g1"])
    };
    let judgement = promote("b", &[("a", None), ("b", Some(&b))]);
    assert_eq!(judgement.case, Case::Assert);
    assert!(judgement.evidence.iter().any(|line| line.contains("2026-11-23 09:05:01")), "{:?}", judgement.evidence);
    let plan = judgement.plan.clone().unwrap();
    assert_eq!(plan.set, set(5, 1, &["b"], "b"));
    assert_eq!(judgement.missing(&Stated::default()), ["--peer-is-dead a"]);
    assert_eq!(judgement.missing(&Stated { dead: vec!["c".into()], accept_data_loss: true }), ["--peer-is-dead a"]);
    assert!(judgement.missing(&Stated { dead: vec!["a".into()], accept_data_loss: false }).is_empty());
}

#[test]
fn it_is_safe_when_every_other_member_answers() {
    let (a, b) = (
        of("a", NodeState::InSync, set(3, 2, &["a", "b"], "a"), &["g1"]),
        of("b", NodeState::InSync, set(3, 2, &["a", "b"], "a"), &["g1"]),
    );
    let a = Record { promised: 9, ..a };
    let judgement = promote("b", &[("a", Some(&a)), ("b", Some(&b))]);
    assert_eq!(judgement.case, Case::Safe);
    let plan = judgement.plan.clone().unwrap();
    assert_eq!((plan.set, plan.fenced, plan.leaving), (set(11, 1, &["a", "b"], "b"), vec!["a".to_owned()], vec![]));
    assert!(judgement.missing(&Stated::default()).is_empty());
    // With a third one that was left behind, and is no member: it need not answer.
    let c = of("c", NodeState::Stale, set(3, 1, &["a", "b", "c"], "a"), &["g0"]);
    assert_eq!(promote("b", &[("a", Some(&a)), ("b", Some(&b)), ("c", None)]).case, Case::Safe);
    assert_eq!(promote("b", &[("a", Some(&a)), ("b", Some(&b)), ("c", Some(&c))]).plan.unwrap().leaving, vec![]);
}

#[test]
fn a_node_that_was_left_behind_can_only_be_promoted_at_a_loss() {
    let stale = of("b", NodeState::Stale, set(3, 3, &["a"], "a"), &["g1"]);
    let judgement = promote("b", &[("a", None), ("b", Some(&stale))]);
    assert_eq!(judgement.case, Case::Lossy);
    assert_eq!(judgement.missing(&Stated { dead: vec!["a".into()], accept_data_loss: false }), ["--accept-data-loss"]);
    assert!(judgement.missing(&Stated { dead: Vec::new(), accept_data_loss: true }).is_empty());
    // It was not told, but the other one knows. That one's data are the only copy of what was written since.
    let untold = of("b", NodeState::InSync, set(3, 2, &["a", "b"], "a"), &["g1"]);
    let a = of("a", NodeState::InSync, set(3, 3, &["a"], "a"), &["g2", "g1"]);
    let judgement = promote("b", &[("a", Some(&a)), ("b", Some(&untold))]);
    assert_eq!(judgement.case, Case::Lossy);
    assert_eq!(judgement.plan.unwrap().leaving, [("a".to_owned(), NodeState::Forked)]);
}

/// The leader's PostgreSQL was lost, b leads through the proxy of a, and then that host is lost, too.
#[test]
fn a_node_that_leads_through_the_proxy_of_another_host_takes_over_the_proxy() {
    let led = |version, nodes: &[&str]| MemberSet { proxy: "a".into(), ..set(3, version, nodes, "b") };
    // It leads alone: nobody else can have gone on.
    let b = of("b", NodeState::InSync, led(3, &["b"]), &["g2", "g1"]);
    let judgement = promote("b", &[("a", None), ("b", Some(&b))]);
    assert_eq!((judgement.case, judgement.silent.len()), (Case::Safe, 0));
    assert!(judgement.evidence.iter().any(|line| line.contains("led by b, through the proxy of a")));
    assert!(judgement.evidence.iter().any(|line| line.starts_with("a can not be asked; should its proxy live")));
    assert_eq!(judgement.plan.unwrap().set, set(5, 1, &["b"], "b"));
    // a follows again: its proxy may have made it the leader once more.
    let b = of("b", NodeState::InSync, led(4, &["a", "b"]), &["g2", "g1"]);
    let judgement = promote("b", &[("a", None), ("b", Some(&b))]);
    assert_eq!(
        (judgement.case, judgement.missing(&Stated::default())),
        (Case::Assert, vec!["--peer-is-dead a".into()])
    );
    // The proxy alone is lost.
    let a = of("a", NodeState::InSync, led(4, &["a", "b"]), &["g2", "g1"]);
    let judgement = promote("b", &[("a", Some(&a)), ("b", Some(&b))]);
    assert_eq!((judgement.case, judgement.plan.unwrap().staying), (Case::Safe, vec!["a".to_owned()]));
    // The leader's host is lost, while the proxy's waits for it.
    assert_eq!(promote("a", &[("a", Some(&a)), ("b", None)]).missing(&Stated::default()), ["--peer-is-dead b"]);
}

/// The members that stay have stored the set of a promotion, and the command ended before the promoted node had: without this nobody could
/// be served any more, because its proxy goes by its own record.
#[test]
fn a_promotion_that_ended_half_way_is_typed_again() {
    let before = of("b", NodeState::InSync, set(3, 2, &["a", "b", "c"], "a"), &["g1"]);
    let stays = of("c", NodeState::InSync, set(5, 1, &["b", "c"], "b"), &["g2", "g1"]);
    let b = Record { promised: 5, ..before.clone() };
    let judgement = promote("b", &[("a", None), ("b", Some(&b)), ("c", Some(&stays))]);
    assert_eq!(judgement.case, Case::Safe);
    let plan = judgement.plan.unwrap();
    assert_eq!((plan.set, plan.staying), (set(7, 1, &["b", "c"], "b"), vec!["c".to_owned()]));
    let done = of("b", NodeState::InSync, set(5, 1, &["b", "c"], "b"), &["g2", "g1"]);
    assert_eq!(promote("b", &[("a", None), ("b", Some(&done)), ("c", Some(&stays))]).case, Case::Impossible);
}

#[test]
fn what_has_changed_meanwhile_is_not_written() {
    let b = of("b", NodeState::InSync, set(3, 2, &["a", "b"], "a"), &["g1"]);
    let a = of("a", NodeState::InSync, set(3, 2, &["a", "b"], "a"), &["g1"]);
    let first = promote("b", &[("a", Some(&a)), ("b", Some(&b))]).plan.unwrap();
    let confirm = |a: Option<&Record>, promised| {
        let b = Record { promised, ..b.clone() };
        let found = [("a", a), ("b", Some(&b))];
        let found = found.map(|(node, record)| Found { node, answer: record.ok_or("no answer"), is_leased: false });
        confirm("b", &first, &found, &Stated::default())
    };
    let fenced = Record { promised: first.set.epoch, ..a.clone() };
    assert_eq!(confirm(Some(&fenced), first.set.epoch).unwrap().set, first.set);
    assert_eq!(confirm(None, first.set.epoch), None, "it does not answer any more");
    // Its proxy was started in between.
    assert_eq!(confirm(Some(&Record { promised: first.set.epoch + 1, ..a.clone() }), first.set.epoch), None);
}

#[test]
fn nothing_is_promoted_while_a_proxy_serves() {
    let b = of("b", NodeState::InSync, set(3, 2, &["a", "b"], "a"), &["g1"]);
    let found = [
        Found { node: "a", answer: Err("no answer"), is_leased: false },
        Found { node: "b", answer: Ok(&b), is_leased: true },
    ];
    let judgement = judge("b", &found);
    assert_eq!(judgement.case, Case::Impossible);
    assert!(judgement.hint.contains("pgtandem switch b"), "{}", judgement.hint);
}

#[test]
fn a_node_without_whole_data_is_never_promoted() {
    let whole = set(3, 2, &["a", "b"], "a");
    for state in [NodeState::Blank, NodeState::Seeding, NodeState::CatchingUp, NodeState::Joining, NodeState::Forked] {
        let b = of("b", state, whole.clone(), &[]);
        assert_eq!(promote("b", &[("a", None), ("b", Some(&b))]).case, Case::Impossible, "{state:?}");
    }
    let back = of("b", NodeState::Joining, set(3, 2, &["a"], "a"), &["g1"]);
    assert_eq!(promote("b", &[("a", None), ("b", Some(&back))]).case, Case::Lossy, "as if it were stale still");
    assert_eq!(promote("b", &[("a", None), ("b", None)]).case, Case::Impossible);
    let blank = record::blank("shop", "b");
    assert_eq!(promote("b", &[("b", Some(&blank))]).case, Case::Impossible);
    let leader = of("a", NodeState::InSync, whole, &[]);
    let judgement = promote("a", &[("a", Some(&leader)), ("b", None)]);
    assert!(judgement.hint.contains("pgtandem detach b --yes"), "{}", judgement.hint);
}
