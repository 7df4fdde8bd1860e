//! The person at the keyboards: looks at what runs and at what `pgtandem status` says on each host, and does the next thing that it
//! asks for. Pure.

use pgtandem::observe::status::{ClusterStatus, NodeView, Role};
use pgtandem_proto::membership::NodeState;

/// What can be seen of one host.
#[derive(Clone, Debug, Default)]
pub struct Seen {
    pub agent_runs: bool,
    pub proxy_runs: bool,
    /// What `pgtandem status` said there.
    pub status: Option<ClusterStatus>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    StartAgent(usize),
    StartProxy(usize),
    /// A command, typed on that host.
    Type(usize, Vec<String>),
    /// Nothing can be done yet, because of this.
    Wait(String),
    /// All is well, says that host, whose proxy serves.
    Done(usize),
}

/// The host whose proxy serves, as its own status says; one that just starts knows no epoch yet.
pub fn serving(hosts: &[Seen]) -> Option<(usize, &ClusterStatus)> {
    let said = hosts.iter().enumerate().filter_map(|(host, seen)| Some((host, seen.status.as_ref()?)));
    let serve = said.filter(|(_, status)| status.proxy_running && status.epoch > Some(0));
    serve.max_by_key(|(_, status)| status.epoch)
}

fn words(line: &str) -> Vec<String> {
    line.split_whitespace().map(str::to_owned).collect()
}

/// The next thing to do.
pub fn next(hosts: &[Seen]) -> Step {
    if let Some(host) = hosts.iter().position(|seen| !seen.agent_runs) {
        return Step::StartAgent(host);
    }
    if let Some(host) = hosts.iter().position(|seen| !seen.proxy_runs) {
        return Step::StartProxy(host);
    }
    let Some((host, status)) = serving(hosts) else { return Step::Wait("no proxy serves".into()) };
    if status.is_healthy() && status.members.len() == hosts.len() {
        return Step::Done(host);
    }
    let step = |node: &NodeView| {
        let name = &node.name;
        let typed = |line: String| Some(Step::Type(host, words(&line)));
        match (node.role, node.state) {
            _ if !node.agent_reachable => None,
            (Role::Out, Some(NodeState::Forked)) => typed(format!("discard-fork {name} --yes")),
            // It comes back by itself.
            (Role::Out, _) if node.away.as_ref().is_some_and(|away| away.ended.is_none()) => None,
            (Role::Out, _) => typed(format!("recover {name} --yes")),
            (_, Some(NodeState::InSync)) => None,
            // It can not be taken out; another one has to lead first.
            (Role::Leader, _) => {
                let is_well =
                    |other: &&NodeView| other.role == Role::Follower && other.state == Some(NodeState::InSync);
                let other = status.nodes.iter().find(is_well)?;
                typed(format!("switch {}", other.name))
            }
            (Role::Follower, _) => typed(format!("detach {name}")),
        }
    };
    status.nodes.iter().find_map(step).unwrap_or_else(|| {
        let problems = status.problems.iter().chain(status.nodes.iter().filter_map(|node| node.problem.as_ref()));
        Step::Wait(problems.map(|problem| problem.what.clone()).collect::<Vec<_>>().join("; "))
    })
}

#[cfg(test)]
mod tests {
    use pgtandem::cluster::{members, record};
    use pgtandem::observe::status::NodeFindings;
    use pgtandem_proto::membership::{MemberSet, Record};
    use pgtandem_proto::message::{NodeStatus, PostgresState};

    use super::*;

    fn finding(node: &str, state: NodeState, set: &MemberSet) -> NodeFindings {
        let record = Record { state, uncertain: false, members: Some(set.clone()), ..record::blank("shop", node) };
        let postgres = PostgresState::Running;
        let answer = NodeStatus {
            record,
            postgres,
            postgres_detail: String::new(),
            progress: None,
            lease_ms: None,
            archive_problem: String::new(),
        };
        NodeFindings {
            name: node.into(),
            address: String::new(),
            answer: Ok(answer),
            earlier: None,
            away: None,
            last_error: None,
            recovery: None,
            recovering: false,
        }
    }

    fn hosts(set: &MemberSet, a: NodeState, b: NodeState) -> Vec<Seen> {
        let status = |serves| {
            ClusterStatus::new("shop", Some(set), None, serves, vec![finding("a", a, set), finding("b", b, set)])
        };
        let seen = |serves| Seen { agent_runs: true, proxy_runs: true, status: Some(status(serves)) };
        vec![seen(true), seen(false)]
    }

    #[test]
    fn the_next_thing_is_what_the_status_asks_for() {
        let alone = members::in_epoch(&members::first("a"), 3, "a").unwrap();
        let both = members::with(&alone, "b").unwrap();
        let typed = |line: &str| Step::Type(0, words(line));
        let (sync, stale) = (NodeState::InSync, NodeState::Stale);
        assert_eq!(next(&hosts(&both, sync, sync)), Step::Done(0));
        assert_eq!(next(&hosts(&alone, sync, stale)), typed("recover b --yes"));
        let mut away = hosts(&alone, sync, stale);
        let kept = pgtandem::observe::status::AwayView::default();
        away[0].status.as_mut().unwrap().nodes[1].away = Some(kept.clone());
        assert!(matches!(next(&away), Step::Wait(_)), "it comes back by itself");
        let ended = Some("it was away for too long".into());
        away[0].status.as_mut().unwrap().nodes[1].away = Some(pgtandem::observe::status::AwayView { ended, ..kept });
        assert_eq!(next(&away), typed("recover b --yes"));
        assert_eq!(next(&hosts(&alone, sync, NodeState::Forked)), typed("discard-fork b --yes"));
        assert_eq!(next(&hosts(&both, NodeState::Blank, sync)), typed("switch b"));
        assert_eq!(next(&hosts(&both, sync, NodeState::Blank)), typed("detach b"));
        let mut down = hosts(&both, sync, sync);
        down[1].proxy_runs = false;
        assert_eq!(next(&down), Step::StartProxy(1));
        down[1].agent_runs = false;
        assert_eq!(next(&down), Step::StartAgent(1));
        down = hosts(&both, sync, sync);
        down[0].status = None;
        assert!(matches!(next(&down), Step::Wait(_)));
    }
}
