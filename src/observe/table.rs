//! The status as text, for a person at three in the morning: a table, then every abnormal state in one sentence with
//! the next command to type.

use std::fmt::Write as _;

use super::explain::{postgres_name, state_name};
use super::status::{ClusterStatus, NodeView, OnceShape, Problem, Role};

/// The whole text; ends with a newline.
#[must_use]
pub fn render(status: &ClusterStatus) -> String {
    let mut text = head(status);
    text.push('\n');
    text.push_str(&nodes(&status.nodes));
    if let Some(counters) = &status.counters {
        let _ = writeln!(
            text,
            "\n{} clients; gate closed {} times, {:.1} ms at most; {} statements refused",
            counters.clients, counters.gate_closed_count, counters.gate_closed_ms_max, counters.statements_refused
        );
    }
    text.push_str(&shapes(&status.once));
    text.push('\n');
    if status.is_healthy() {
        let _ = writeln!(text, "All is well: every write is on {}.", status.members.join(", "));
        return text;
    }
    let of_nodes = status.nodes.iter().filter_map(|node| node.problem.as_ref());
    for Problem { what, hint } in status.problems.iter().chain(of_nodes) {
        let _ = writeln!(text, "! {what}.\n  next: {hint}");
    }
    text
}

/// Shapes that are listed; the others are counted.
const SHAPES_SHOWN_MAX: usize = 10;

/// Statements whose sameness is not proven, and those that were found to differ.
fn shapes(once: &[OnceShape]) -> String {
    let mut text = String::new();
    let open: Vec<&OnceShape> =
        once.iter().filter(|shape| shape.unproven.is_some() || shape.refused.is_some()).collect();
    if open.is_empty() {
        return text;
    }
    text.push_str("\nStatements with code that is not proven to do the same on every server:\n");
    for shape in open.iter().take(SHAPES_SHOWN_MAX) {
        let shown: String = shape.shape.split_whitespace().collect::<Vec<_>>().join(" ");
        let _ = match &shape.refused {
            Some(why) => writeln!(text, "! REFUSED in {}: {shown}\n    {why}", shape.database),
            None => {
                let why = shape.unproven.as_deref().unwrap_or_default();
                writeln!(text, "  {} times in {}: {shown}\n    {why}", shape.runs, shape.database)
            }
        };
    }
    if open.len() > SHAPES_SHOWN_MAX {
        let _ = writeln!(text, "  and {} more: pgtandem status --json", open.len() - SHAPES_SHOWN_MAX);
    }
    text
}

fn head(status: &ClusterStatus) -> String {
    let mut text = format!("cluster {}", status.cluster);
    match (status.epoch, status.version, &status.leader, &status.proxy) {
        (Some(epoch), Some(version), Some(leader), Some(proxy)) => {
            let runs = if status.proxy_running { "proxy on" } else { "NO PROXY RUNS; the last one was on" };
            let _ = writeln!(text, "   leader {leader}   {runs} {proxy}   epoch {epoch}, member set {version}");
        }
        _ => text.push_str("   nothing is known about its members\n"),
    }
    text
}

fn nodes(nodes: &[NodeView]) -> String {
    let mut rows = vec![["NODE", "AGENT", "ROLE", "STATE", "POSTGRESQL", "RECOVERY"].map(String::from)];
    rows.extend(nodes.iter().map(row));
    let widths: [usize; 6] =
        std::array::from_fn(|column| rows.iter().filter_map(|row| row.get(column)).map(String::len).max().unwrap_or(0));
    let mut text = String::new();
    for row in rows {
        let mut line = String::new();
        for (cell, width) in row.iter().zip(widths) {
            let _ = write!(line, "{cell:width$}  ");
        }
        text.push_str(line.trim_end());
        text.push('\n');
    }
    text
}

fn row(node: &NodeView) -> [String; 6] {
    let role = match node.role {
        Role::Leader => "leader",
        Role::Follower => "follower",
        Role::Out => "out",
    };
    let mut state = state_name(node.state).to_owned();
    if node.uncertain == Some(true) {
        state.push_str(", uncertain");
    }
    let agent = if node.agent_reachable { node.address.clone() } else { format!("{} (no answer)", node.address) };
    let recovery = node.recovery.as_ref().map_or_else(String::new, |recovery| {
        let line = recovery.line();
        line.strip_prefix(&format!("{}: ", node.name)).unwrap_or(&line).to_owned()
    });
    [node.name.clone(), agent, role.into(), state, postgres_name(node.postgres).into(), recovery]
}

#[cfg(test)]
mod tests {
    use pgtandem_proto::membership::{MemberSet, NodeState, Record};
    use pgtandem_proto::message::NodeStatus;

    use super::super::status::{AwayView, NodeFindings, ProxyCounters};
    use super::*;
    use crate::cluster::members;
    use crate::cluster::record::{blank, running};

    fn answer(node: &str, state: NodeState, set: &MemberSet) -> NodeStatus {
        running(Record {
            promised: set.epoch,
            members: Some(set.clone()),
            state,
            uncertain: false,
            ..blank("shop", node)
        })
    }

    fn finding(node: &str, answer: Result<NodeStatus, String>) -> NodeFindings {
        NodeFindings {
            name: node.into(),
            address: "10.0.0.1:7001".into(),
            answer,
            earlier: None,
            away: None,
            last_error: None,
            recovery: None,
            recovering: false,
        }
    }

    #[test]
    fn a_healthy_cluster_says_so() {
        let set = members::with(&members::first("a"), "b").unwrap();
        let findings = ["a", "b"].map(|node| finding(node, Ok(answer(node, NodeState::InSync, &set)))).into();
        let status = ClusterStatus::new("shop", Some(&set), Some(ProxyCounters::default()), true, findings);
        let text = render(&status);
        assert!(text.contains("All is well: every write is on a, b."), "{text}");
        assert!(text.contains("\na     10.0.0.1:7001  leader    in sync  running\n"), "{text}");
    }

    #[test]
    fn every_state_outside_the_set_has_a_sentence_and_a_command() {
        let set = members::first("a");
        for state in [
            NodeState::Blank,
            NodeState::Seeding,
            NodeState::CatchingUp,
            NodeState::Joining,
            NodeState::InSync,
            NodeState::Stale,
            NodeState::Suspect,
            NodeState::Forked,
        ] {
            let findings = vec![
                finding("a", Ok(answer("a", NodeState::InSync, &set))),
                finding("b", Ok(answer("b", state, &set))),
            ];
            let status = ClusterStatus::new("shop", Some(&set), None, true, findings);
            let text = render(&status);
            assert!(text.contains("pgtandem recover b"), "{state:?}: {text}");
            assert!(text.contains("writes are on a alone"), "{text}");
        }
    }

    #[test]
    fn a_node_that_comes_back_by_itself_asks_for_nothing_and_says_for_how_long() {
        let set = members::first("a");
        let text = |b, ended: Option<&str>| {
            let away = AwayView {
                ended: ended.map(str::to_owned),
                transactions: 7,
                bytes: 3 << 20,
                bytes_max: 256 << 20,
                left_s: 590,
                ..AwayView::default()
            };
            let mut b = finding("b", b);
            b.away = Some(away);
            let findings = vec![finding("a", Ok(answer("a", NodeState::InSync, &set))), b];
            render(&ClusterStatus::new("shop", Some(&set), None, true, findings))
        };
        let stale = || Ok(answer("b", NodeState::Stale, &set));
        let kept = "what it misses is kept for 590 s more (7 transactions, 3 of at most 256 MiB)";
        for shown in [text(stale(), None), text(Err("gone".into()), None)] {
            assert!(shown.contains(kept) && shown.contains("joins again by itself"), "{shown}");
        }
        for shown in [text(stale(), Some("it was promoted")), text(Err("gone".into()), Some("it was promoted"))] {
            assert!(shown.contains("what it misses is not kept: it was promoted"), "{shown}");
            assert!(shown.contains("pgtandem recover b") && !shown.contains("by itself"), "{shown}");
        }
    }

    #[test]
    fn a_member_that_is_gone_tells_the_way_out() {
        let set = members::with(&members::first("a"), "b").unwrap();
        let findings = vec![
            finding("a", Ok(answer("a", NodeState::InSync, &set))),
            finding("b", Err("no answer within 5000 ms".into())),
        ];
        let status = ClusterStatus::new("shop", Some(&set), None, false, findings);
        let text = render(&status);
        assert!(text.contains("NO PROXY RUNS"), "{text}");
        assert!(text.contains("pgtandem detach b"), "{text}");
        assert!(!status.is_healthy());
    }
}
