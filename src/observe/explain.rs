//! Every abnormal state in one sentence, with the next command to type. Pure.

use std::fmt::Write as _;

use pgtandem_proto::membership::NodeState;
use pgtandem_proto::message::PostgresState;

use super::status::{AwayView, ClusterStatus, NodeView, Problem, Role};
use crate::recovery::report::Phase;

fn problem(what: impl Into<String>, hint: impl Into<String>) -> Problem {
    Problem { what: what.into(), hint: hint.into() }
}

/// What is not as it should be with a node; the gravest thing only.
#[must_use]
pub fn node_problem(node: &NodeView, recovering: bool, proxy_running: bool) -> Option<Problem> {
    let name = &node.name;
    if recovering && node.agent_reachable {
        let phase = node.recovery.as_ref().map_or(Phase::Preflight, |recovery| recovery.phase);
        return Some(problem(
            format!("{name} is being recovered ({}); writes are not on it yet", phase.name()),
            format!("pgtandem recover {name}    # shows the progress of the recovery under way"),
        ));
    }
    if !node.agent_reachable {
        let why = node.agent_error.as_deref().unwrap_or("it does not answer");
        let start = format!("on the host of {name}: systemctl start pgtandem-agent, or pgtandem agent --node {name}");
        return Some(match node.role {
            Role::Leader => problem(format!("the agent of the leader {name} can not be reached: {why}"), start),
            Role::Follower if !proxy_running => problem(
                format!(
                    "{name} is a recorded member and its agent can not be reached: {why}; no proxy starts without it"
                ),
                format!("{start}; or, if {name} is lost: pgtandem detach {name}"),
            ),
            Role::Follower => problem(format!("the agent of {name} can not be reached: {why}"), start),
            Role::Out => {
                let (kept, hint) = match &node.away {
                    Some(away) if away.ended.is_none() => {
                        (format!("; {}", kept(away)), format!("{start}; it joins again by itself"))
                    }
                    Some(AwayView { ended: Some(why), .. }) => {
                        (format!("; {}", not_kept(why)), format!("{start}; then: pgtandem recover {name}"))
                    }
                    _ => (String::new(), format!("{start}; then: pgtandem recover {name}")),
                };
                problem(format!("{name} is out, and its agent can not be reached: {why}{kept}"), hint)
            }
        });
    }
    match node.role {
        Role::Out => Some(outside(node)),
        Role::Leader | Role::Follower => member(node, proxy_running),
    }
}

fn member(node: &NodeView, proxy_running: bool) -> Option<Problem> {
    let name = &node.name;
    if node.state != Some(NodeState::InSync) {
        return Some(problem(
            format!("{name} is in the member set, but its own record says {}", state_name(node.state)),
            format!("pgtandem detach {name}; then: pgtandem recover {name}"),
        ));
    }
    if node.postgres != Some(PostgresState::Running) {
        let detail = node.postgres_detail.as_deref().map(|detail| format!(": {detail}")).unwrap_or_default();
        return Some(problem(
            format!("PostgreSQL on the member {name} is not running{detail}"),
            "its agent starts it again by itself; if it does not, look at postgresql.log in the state folder of its agent",
        ));
    }
    if node.uncertain == Some(true) {
        return Some(if proxy_running {
            problem(
                format!("{name} does not know yet whether it is current"),
                "the proxy clears this within seconds; if it stays: pgtandem status --json",
            )
        } else {
            problem(
                format!("{name} does not know whether it is current, because no proxy has told it"),
                "start the proxy; it clears this by itself",
            )
        });
    }
    node.archive_problem.as_ref().map(|what| {
        problem(
            format!("the archive of {name} needs a look: {what}"),
            format!("on the host of {name}: pgtandem archive; postgresql.log says why, docs/archive.md what to do"),
        )
    })
}

/// What is kept for a node that is away.
fn kept(away: &AwayView) -> String {
    let size = format!(
        "{} transactions, {} of at most {} MiB",
        away.transactions,
        away.bytes.div_ceil(1 << 20),
        away.bytes_max >> 20
    );
    if away.is_back {
        return format!("it answers and is brought what it missed ({size})");
    }
    format!("what it misses is kept for {} s more ({size})", away.left_s)
}

fn not_kept(why: &str) -> String {
    format!("what it misses is not kept: {why}")
}

fn outside(node: &NodeView) -> Problem {
    let name = &node.name;
    let mut why = node.last_error.as_deref().map(|error| format!(" ({error})")).unwrap_or_default();
    let failed = node.recovery.as_ref().and_then(|recovery| recovery.failed.as_ref());
    if let Some(failed) = failed {
        let _ = write!(why, "; its last recovery failed {failed} -- {}", failed.cause.hint);
    }
    let recover = format!("pgtandem recover {name}");
    match &node.away {
        Some(away) if away.ended.is_none() && failed.is_none() => {
            let doing = away.doing.as_deref().map(|doing| format!("; {doing}")).unwrap_or_default();
            return problem(
                format!("{name} is away{why}; {}{doing}", kept(away)),
                format!("nothing, it joins again by itself when its PostgreSQL answers; or, to fill it: {recover}"),
            );
        }
        Some(AwayView { ended: Some(ended), .. }) if failed.is_none() => {
            let _ = write!(why, "; {}", not_kept(ended));
        }
        _ => {}
    }
    match node.state {
        None | Some(NodeState::Blank) => {
            problem(format!("{name} is empty or its data are unknown; writes are not on it{why}"), recover)
        }
        Some(NodeState::Seeding) => problem(
            format!("{name} was being filled and that ended before its files were whole{why}"),
            format!("{recover}    # starts from what is there"),
        ),
        Some(NodeState::CatchingUp) => problem(
            format!("{name} was being recovered and that ended before it became a member{why}"),
            format!("{recover}    # starts from what is there"),
        ),
        // The end of a recovery, and the return of one that was away.
        Some(NodeState::Joining) => problem(
            format!("{name} was just being let in and that ended before it became a member{why}"),
            format!("{recover}    # starts from what is there"),
        ),
        Some(NodeState::InSync) => problem(
            format!("{name} believes that it is a member, and it is not in the set, and writes are not on it{why}"),
            recover,
        ),
        Some(NodeState::Stale) => {
            problem(format!("{name} left the member set, and writes since then are not on it{why}"), recover)
        }
        Some(NodeState::Suspect) => problem(
            format!("{name} is kept out, because rows on it differed from the leader's or its data were replaced{why}"),
            format!("{recover}    # copies what differs from the leader"),
        ),
        Some(NodeState::Forked) => problem(
            format!("{name} went on alone while this side did, too; its data are kept for a person to look at"),
            format!(
                "look at its data first; when nothing in them is needed: pgtandem discard-fork {name}; then: {recover}"
            ),
        ),
    }
}

/// What is not as it should be with the cluster as a whole.
#[must_use]
pub fn cluster_problems(status: &ClusterStatus) -> Vec<Problem> {
    let mut problems = Vec::new();
    if !status.proxy_running {
        problems.push(not_running());
    }
    if status.members.is_empty() {
        problems.push(problem(
            "no member set is known: no agent that holds one could be asked",
            "start the agents; pgtandem agent --node NAME on each host",
        ));
    } else if !status.redundant && status.nodes.len() > 1 {
        let leader = status.leader.as_deref().unwrap_or("one node");
        problems.push(problem(
            format!("writes are on {leader} alone; if it is lost, they are lost"),
            "bring another node back with the command beside it",
        ));
    }
    if let Some(epoch) = status.epoch
        && let Some(node) = status.nodes.iter().find(|node| node.promised_epoch.is_some_and(|theirs| theirs > epoch))
        && status.proxy_running
    {
        problems.push(problem(
            format!("{} obeys a newer epoch than this proxy's epoch {epoch}: another proxy has started", node.name),
            "find out which proxy should run, and stop the other one",
        ));
    }
    problems
}

#[must_use]
pub fn not_running() -> Problem {
    problem(
        "the proxy is not running: clients can not connect",
        "on the proxy's host: systemctl start pgtandem-proxy, or pgtandem proxy; if that host is lost, on the host of a member: pgtandem promote",
    )
}

/// The proxy of this host must not serve.
#[must_use]
pub fn waiting(why: Problem) -> Problem {
    problem(format!("the proxy of this host runs and serves nobody: {}", why.what), why.hint)
}

/// The proxy runs and serves nobody; `why` is a sentence.
#[must_use]
pub fn not_served(why: &str) -> Problem {
    problem(
        format!("no client is served: {why}"),
        "clients that connect wait until the leader is back; if it does not come: postgresql.log in its state folder",
    )
}

/// Commits wait for a member that does not take part.
#[must_use]
pub fn held(node: &str, why: &str) -> Problem {
    problem(
        format!("commits wait for {node}, because the mode is protection: {why}"),
        format!("bring {node} back, and they go on; or, to go on without it: pgtandem detach {node}"),
    )
}

/// Commits wait until a member has left the set: it may read for itself for as long as its last lease runs.
#[must_use]
pub fn leaving(node: &str, why: &str) -> Problem {
    problem(
        format!("commits wait, because {node} is just taken out of the member set: {why}"),
        format!(
            "nothing: they go on when the smaller set is stored and the last lease of {node} has ended, within seconds"
        ),
    )
}

/// The state in the words of the design.
#[must_use]
pub fn state_name(state: Option<NodeState>) -> &'static str {
    match state {
        None => "unknown",
        Some(NodeState::Blank) => "blank",
        Some(NodeState::Seeding) => "seeding",
        Some(NodeState::CatchingUp) => "catching up",
        Some(NodeState::Joining) => "joining",
        Some(NodeState::InSync) => "in sync",
        Some(NodeState::Stale) => "stale",
        Some(NodeState::Suspect) => "suspect",
        Some(NodeState::Forked) => "forked",
    }
}

#[must_use]
pub fn postgres_name(state: Option<PostgresState>) -> &'static str {
    match state {
        None => "unknown",
        Some(PostgresState::Absent) => "absent",
        Some(PostgresState::Stopped) => "stopped",
        Some(PostgresState::Starting) => "starting",
        Some(PostgresState::Standby) => "standby",
        Some(PostgresState::Running) => "running",
    }
}
