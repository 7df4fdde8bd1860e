//! May this node be made the leader, and what would be lost? Pure: everything that could be found out goes in, one of four cases
//! and what to write come out. Nobody is asked here and nothing is stored.
//!
//! Two nodes can not have both: going on alone, and certainty that the other one did not. So a promotion says first what it knows:
//! *safe*, if whoever could have served has been asked and will obey; *assert*, if a person has to state that a silent node is dead;
//! *lossy*, if this node is known to lack acknowledged writes; *impossible*.

use pgtandem_proto::membership::{Epoch, MemberSet, NodeState, Record};
use serde::Serialize;

use super::{members, record};

/// A configured node, and what its agent said, or why it said nothing.
#[derive(Clone, Copy, Debug)]
pub struct Found<'a> {
    pub node: &'a str,
    pub answer: Result<&'a Record, &'a str>,
    /// Its lease runs: a proxy vouched for it a moment ago, and serves.
    pub is_leased: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Case {
    Safe,
    Assert,
    Lossy,
    Impossible,
}

/// What a promotion of one node would be.
#[derive(Clone, Debug, PartialEq)]
pub struct Judgement {
    pub case: Case,
    /// What is known and what follows from it, a sentence each.
    pub evidence: Vec<String>,
    /// Members that do not answer: a person must state that each is dead.
    pub silent: Vec<String>,
    /// None: impossible; the hint says what to do instead.
    pub plan: Option<Plan>,
    /// The next command to type, if it is impossible.
    pub hint: String,
}

/// What a promotion writes.
#[derive(Clone, Debug, PartialEq)]
pub struct Plan {
    /// Above everything that anybody who answered has promised or stored.
    pub set: MemberSet,
    /// Nodes that answer, this one left out: they promise the new epoch and end what is older.
    pub fenced: Vec<String>,
    /// Members that stay, this one left out.
    pub staying: Vec<String>,
    /// Nodes that believe that they are members and will be none, and what each is then.
    pub leaving: Vec<(String, NodeState)>,
}

/// What the person has stated on the command line.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Stated {
    pub dead: Vec<String>,
    pub accept_data_loss: bool,
}

impl Judgement {
    /// Options that are missing before this may be done; empty: none.
    #[must_use]
    pub fn missing(&self, stated: &Stated) -> Vec<String> {
        let mut missing = Vec::new();
        if self.case == Case::Assert {
            let silent = self.silent.iter().filter(|node| !stated.dead.contains(node));
            missing.extend(silent.map(|node| format!("--peer-is-dead {node}")));
        }
        if self.case == Case::Lossy && !stated.accept_data_loss {
            missing.push("--accept-data-loss".to_owned());
        }
        missing
    }
}

/// Judges the promotion of `own`. `found`: every configured node, `own` included.
#[must_use]
pub fn judge(own: &str, found: &[Found<'_>]) -> Judgement {
    let record = match found.iter().find(|found| found.node == own).map(|found| found.answer) {
        Some(Ok(record)) => record,
        Some(Err(why)) => {
            let what = format!("the agent of {own} does not answer, and without its record nothing is known: {why}");
            return impossible(what, format!("pgtandem agent --node {own}"));
        }
        None => return impossible(format!("no node is named {own}"), "give a name of the configuration".into()),
    };
    if let Some(leased) = found.iter().find(|found| found.is_leased) {
        let what = format!("a proxy serves this cluster: it has vouched for {} a moment ago", leased.node);
        let hint =
            format!("for a planned change, on its host: pgtandem switch {own}; if that proxy is to go, stop it first");
        return impossible(what, hint);
    }
    let answers: Vec<(&str, &Record)> =
        found.iter().filter_map(|found| Some((found.node, found.answer.ok()?))).collect();
    let newest = match members::newest(answers.iter().filter_map(|(_, record)| record.members.as_ref())) {
        Ok(Some(newest)) => newest,
        Ok(None) => {
            let what = format!("neither {own} nor any node that answers knows a member set");
            return impossible(what, "look at the data; a cluster is set up from its first node".into());
        }
        Err(both) => {
            let what = format!(
                "two different member sets have the number ({}, {}): {} and {}",
                both.0.epoch,
                both.0.version,
                both.0.nodes.join(", "),
                both.1.nodes.join(", ")
            );
            return impossible(what, "look at the data of both sides; pgtandem status --json".into());
        }
    };
    if let Some(judgement) = unfit(own, record, newest) {
        return judgement;
    }
    let is_current = record.state == NodeState::InSync && members::contains(newest, own);
    let said = |node: &str| answers.iter().find(|(name, _)| *name == node).map(|(_, record)| *record);
    let silent: Vec<String> =
        newest.nodes.iter().filter(|node| *node != own && said(node).is_none()).cloned().collect();
    let case = match (is_current, silent.is_empty()) {
        (false, _) => Case::Lossy,
        (true, false) => Case::Assert,
        (true, true) => Case::Safe,
    };
    let plan = plan(own, record, newest, &answers, found.iter().map(|found| found.node), is_current);
    let proxy_is_silent = newest.proxy != own && said(&newest.proxy).is_none();
    let evidence = evidence(own, record, newest, (&silent, proxy_is_silent), case, &plan);
    Judgement { case, evidence, silent, plan: Some(plan), hint: String::new() }
}

/// Judges once more when everybody who answered has promised the epoch of `first`, and ended what is older: nothing below it can
/// change any more. Gives what is to be written; `None`: something has changed meanwhile, or a newer epoch was taken.
#[must_use]
pub fn confirm(own: &str, first: &Plan, found: &[Found<'_>], stated: &Stated) -> Option<Plan> {
    let judgement = judge(own, found);
    let nobody_is_ahead =
        found.iter().filter_map(|found| found.answer.ok()).all(|record| record.promised <= first.set.epoch);
    let missing = judgement.missing(stated);
    let plan = judgement.plan.filter(|plan| plan.fenced == first.fenced && nobody_is_ahead && missing.is_empty())?;
    Some(Plan { set: MemberSet { epoch: first.set.epoch, ..plan.set }, ..plan })
}

fn impossible(what: String, hint: String) -> Judgement {
    Judgement { case: Case::Impossible, evidence: vec![what], silent: Vec::new(), plan: None, hint }
}

/// States from which nothing can be served, whatever a person is ready to lose.
fn unfit(own: &str, record: &Record, newest: &MemberSet) -> Option<Judgement> {
    let recover = || format!("start the proxy on {}, then: pgtandem recover {own}", newest.proxy);
    match record.state {
        // What only others have stored is a promotion that ended before it came to this node's own record: it is typed again.
        NodeState::InSync
            if newest.leader == own
                && newest.proxy == own
                && record.members.as_ref().is_some_and(|recorded| recorded.epoch == newest.epoch) =>
        {
            let lost: Vec<_> = newest.nodes.iter().filter(|node| *node != own).map(String::as_str).collect();
            let what = format!("{own} is the leader already (member set of epoch {})", newest.epoch);
            let hint = match lost.first() {
                None => format!("pgtandem proxy --node {own}"),
                Some(node) => {
                    format!(
                        "pgtandem proxy --node {own}; if {} is lost and keeps it from starting: pgtandem detach {node} --yes",
                        lost.join(", ")
                    )
                }
            };
            Some(impossible(what, hint))
        }
        NodeState::InSync | NodeState::Suspect => None,
        // A fill begins with no generation, so whoever has one was a member. Just being brought what it missed, in the order of the commits, it
        // is as stale as before, or less.
        NodeState::Stale | NodeState::Joining if !record.generations.is_empty() => None,
        NodeState::Blank => {
            Some(impossible(format!("{own} is empty, or its record was lost: nothing is known of its data"), recover()))
        }
        NodeState::Seeding | NodeState::CatchingUp | NodeState::Joining | NodeState::Stale => Some(impossible(
            format!("{own} was being filled and never became a member: its data are of no one moment"),
            recover(),
        )),
        NodeState::Forked => Some(impossible(
            format!("{own} went on alone while the other side did, too; its data are kept for a person to look at"),
            format!("pgtandem discard-fork {own}"),
        )),
    }
}

fn plan<'a>(
    own: &'a str,
    record: &Record,
    newest: &MemberSet,
    answers: &[(&str, &Record)],
    configured: impl Iterator<Item = &'a str>,
    is_current: bool,
) -> Plan {
    let others = || answers.iter().filter(|(node, _)| *node != own);
    let stays = |node: &str, theirs: &Record| {
        is_current
            && theirs.state == NodeState::InSync
            && members::contains(newest, node)
            && theirs.members.as_ref() == Some(newest)
    };
    let staying: Vec<String> =
        others().filter(|(node, theirs)| stays(node, theirs)).map(|(node, _)| (*node).to_owned()).collect();
    let leaving = others().filter(|(node, theirs)| theirs.state == NodeState::InSync && !stays(node, theirs));
    // A member of the newest set that is left behind by a lossy promotion has the only copy of what this node lacks.
    let leaving = leaving.map(|(node, theirs)| ((*node).to_owned(), record::left_behind(theirs, &record.generations)));
    let promised = answers.iter().map(|(_, theirs)| theirs.promised);
    let stored = answers.iter().filter_map(|(_, theirs)| theirs.members.as_ref()).map(|set| set.epoch);
    let epoch = members::next_epoch(promised.chain(stored).fold(0, Epoch::max), own, configured);
    let mut nodes: Vec<String> = staying.iter().cloned().chain([own.to_owned()]).collect();
    nodes.sort();
    Plan {
        set: MemberSet { epoch, version: 1, nodes, leader: own.to_owned(), proxy: own.to_owned() },
        fenced: others().map(|(node, _)| (*node).to_owned()).collect(),
        staying,
        leaving: leaving.collect(),
    }
}

/// `silent`: members that do not answer, and whether the host of the proxy does not.
fn evidence(
    own: &str,
    record: &Record,
    newest: &MemberSet,
    (silent, proxy_is_silent): (&[String], bool),
    case: Case,
    plan: &Plan,
) -> Vec<String> {
    let number = format!("epoch {}, version {}", newest.epoch, newest.version);
    let (nodes, leader, proxy) = (newest.nodes.join(", "), &newest.leader, &newest.proxy);
    let mut under = String::new();
    if leader != proxy {
        under = format!(", through the proxy of {proxy}");
    }
    let mut said = vec![format!("the newest member set that is known ({number}) is {nodes}, led by {leader}{under}")];
    let contact =
        record.last_contact.map_or_else(|| "at last contact".into(), |at| format!("at last contact, {}", utc(at)));
    match case {
        Case::Safe => {
            let others: Vec<_> = newest.nodes.iter().filter(|node| *node != own).map(String::as_str).collect();
            said.push(format!("{own} is in sync under it"));
            if !others.is_empty() {
                said.push(format!(
                    "every other member answers ({}) and will obey the new epoch: nothing acknowledged is lost",
                    others.join(", ")
                ));
            }
            if proxy_is_silent {
                // It is no member, or this would not be safe.
                said.push(format!(
                    "{proxy} can not be asked; should its proxy live, it can acknowledge nothing without the members, and \
                     they obey it no more"
                ));
            }
        }
        Case::Assert => {
            said.push(format!("{own} was in sync under it {contact}"));
            said.push(format!(
                "{} can not be asked: if one of them went on serving after that contact, its later writes are lost",
                silent.join(", ")
            ));
            said.push(format!(
                "if {} {} dead since then, nothing acknowledged is lost",
                silent.join(", "),
                if silent.len() == 1 { "is" } else { "are" }
            ));
        }
        Case::Lossy => {
            let since = match &record.members {
                Some(own_set) => format!("since epoch {}, version {}", own_set.epoch, own_set.version),
                None => "for a time that is not known".to_owned(),
            };
            said.push(format!(
                "{own} is {:?} {since} ({contact}): writes that were acknowledged since then are not on it",
                record.state
            ));
            if !silent.is_empty() {
                said.push(format!("{} can not be asked; if it serves, both sides go on alone", silent.join(", ")));
            }
        }
        Case::Impossible => {}
    }
    for (node, state) in &plan.leaving {
        said.push(match state {
            NodeState::Forked => format!("{node} has writes that {own} does not have; its data are kept as forked"),
            _ => format!("{node} leaves the member set and has to be filled again"),
        });
    }
    said
}

/// `2026-11-27 03:12:09 UTC`, of seconds since 1970.
fn utc(seconds: u64) -> String {
    format!("{} UTC", crate::observe::time::utc(seconds))
}

#[cfg(test)]
#[path = "promote_tests.rs"]
mod tests;
