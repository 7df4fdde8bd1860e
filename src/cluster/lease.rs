//! Leases: what lets a node know that nothing was acknowledged without it. Pure; times are milliseconds of a clock that goes on
//! during suspend and knows no time of day.
//!
//! The agent asks the proxy every [`ASK_MS`]; what it is granted runs [`LEASE_MS`] *from its asking*, so a grant that was held up on the
//! way arrives already over. The proxy notes when it granted last. To go on without a node that it can not tell so, it stops granting and
//! waits until [`WAIT_OUT_MS`] after that: it noted its grant later than the node asked, and the surplus covers clocks that drift.
//!
//! Order of calls, agent: [`Lease::ask`], then [`Lease::granted`] for the answer; [`Lease::is_valid`] at any time; [`Lease::forget`] when it
//! promises an epoch. Proxy: [`Grants::grant`] for each asking, [`Grants::stop`] then [`Grants::free_at`] before a shrink.

use std::collections::{BTreeMap, VecDeque};

use pgtandem_proto::membership::{Epoch, MemberSet, NodeState, Record};
use pgtandem_proto::message::LeaseGrant;

use super::members;

/// Between two askings.
pub const ASK_MS: u64 = 500;
/// How long a grant runs, from its asking.
pub const LEASE_MS: u64 = 3_000;
/// How long the proxy waits after its last grant: clocks may differ by a tenth.
pub const WAIT_OUT_MS: u64 = LEASE_MS + LEASE_MS / 10;
/// Askings that may be under way; the oldest is forgotten.
const ASKED_MAX: usize = 16;

/// The agent's side.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Lease {
    /// Number and time of askings that were not answered.
    asked: VecDeque<(u64, u64)>,
    next: u64,
    until: Option<u64>,
}

impl Lease {
    /// Notes that the proxy is asked now, under the number that this gives.
    pub fn ask(&mut self, now: u64) -> u64 {
        let number = self.next;
        self.next += 1;
        self.asked.push_back((number, now));
        if self.asked.len() > ASKED_MAX {
            self.asked.pop_front();
        }
        number
    }

    /// The proxy's answer. True: the lease runs, and `uncertain` may be cleared.
    pub fn granted(&mut self, now: u64, grant: &LeaseGrant, record: &Record) -> bool {
        let Some(at) = self.asked.iter().position(|(number, _)| *number == grant.number) else { return false };
        let Some((_, asked)) = self.asked.remove(at) else { return false };
        if !applies(record, grant.epoch, grant.version) {
            return false;
        }
        self.until = self.until.max(Some(asked + LEASE_MS));
        self.is_valid(now)
    }

    #[must_use]
    pub fn is_valid(&self, now: u64) -> bool {
        self.left_ms(now).is_some()
    }

    /// How long it still runs.
    #[must_use]
    pub fn left_ms(&self, now: u64) -> Option<u64> {
        self.until.and_then(|until| until.checked_sub(now)).filter(|left| *left > 0)
    }

    /// Another epoch was promised: whoever granted this one can acknowledge nothing here any more, and vouches for nothing.
    pub fn forget(&mut self) {
        self.asked.clear();
        self.until = None;
    }
}

/// Whether a grant under this number is about the set that this node has stored, and is in.
fn applies(record: &Record, epoch: Epoch, version: u64) -> bool {
    let in_set = |set: &MemberSet| members::number(set) == (epoch, version) && members::contains(set, &record.node);
    record.promised == epoch && record.state == NodeState::InSync && record.members.as_ref().is_some_and(in_set)
}

/// The record of a node that a proxy has just vouched for; `None`: nothing changes. `at`: seconds since 1970.
#[must_use]
pub fn vouched(record: &Record, epoch: Epoch, version: u64, at: u64) -> Option<Record> {
    (record.uncertain && applies(record, epoch, version)).then(|| Record {
        uncertain: false,
        last_contact: Some(at),
        ..record.clone()
    })
}

/// The record of a node whose lease has ended: it may have been left behind without being told. `last_contact`: seconds since 1970.
#[must_use]
pub fn doubted(record: &Record, last_contact: Option<u64>) -> Option<Record> {
    (!record.uncertain && record.state == NodeState::InSync).then(|| Record {
        uncertain: true,
        last_contact: record.last_contact.max(last_contact),
        ..record.clone()
    })
}

/// The proxy's side: when each node was granted a lease last, and who gets none any more.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Grants {
    nodes: BTreeMap<String, Granted>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
struct Granted {
    last: Option<u64>,
    stopped: bool,
}

impl Grants {
    /// Whether `node`, which has asked, gets a lease under `set` now. Noted before it is answered.
    pub fn grant(&mut self, now: u64, node: &str, set: &MemberSet) -> bool {
        if !members::contains(set, node) {
            return false;
        }
        let granted = self.nodes.entry(node.to_owned()).or_default();
        if granted.stopped {
            return false;
        }
        granted.last = granted.last.max(Some(now));
        true
    }

    /// From now on this node gets none, until it joins again.
    pub fn stop(&mut self, node: &str) {
        self.nodes.entry(node.to_owned()).or_default().stopped = true;
    }

    /// It is a member, anew or still.
    pub fn resume(&mut self, node: &str) {
        self.nodes.entry(node.to_owned()).or_default().stopped = false;
    }

    /// When no lease of this node can run any more; `None`: it never had one.
    #[must_use]
    pub fn free_at(&self, node: &str) -> Option<u64> {
        self.nodes.get(node)?.last.map(|last| last + WAIT_OUT_MS)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cluster::record;

    fn member() -> Record {
        let set = members::in_epoch(&members::with(&members::first("a"), "b").unwrap(), 3, "a").unwrap();
        Record { promised: 3, state: NodeState::InSync, members: Some(set), ..record::blank("shop", "b") }
    }

    fn grant(number: u64) -> LeaseGrant {
        LeaseGrant { number, epoch: 3, version: 1 }
    }

    #[test]
    fn a_lease_runs_from_its_asking_not_from_the_answer() {
        let mut lease = Lease::default();
        let number = lease.ask(1_000);
        assert!(!lease.is_valid(1_000));
        assert!(lease.granted(1_400, &grant(number), &member()));
        assert!(lease.is_valid(1_000 + LEASE_MS - 1));
        assert!(!lease.is_valid(1_000 + LEASE_MS));
        let held_up = lease.ask(5_000);
        assert!(!lease.granted(5_000 + LEASE_MS, &grant(held_up), &member()), "it arrives already over");
        assert!(!lease.granted(9_000, &grant(held_up), &member()), "an answer counts once");
    }

    #[test]
    fn a_grant_counts_only_for_the_set_that_the_node_has_stored() {
        let mut lease = Lease::default();
        for record in [
            Record { promised: 4, ..member() },
            Record { state: NodeState::Stale, ..member() },
            Record { node: "c".into(), ..member() },
        ] {
            let number = lease.ask(0);
            assert!(!lease.granted(1, &grant(number), &record));
        }
        let number = lease.ask(0);
        assert!(!lease.granted(1, &LeaseGrant { version: 2, ..grant(number) }, &member()));
        let number = lease.ask(0);
        assert!(lease.granted(1, &grant(number), &member()));
        lease.forget();
        assert!(!lease.is_valid(1));
    }

    #[test]
    fn a_node_doubts_when_its_lease_ends_and_is_sure_again_when_it_is_vouched_for() {
        let uncertain = member();
        assert_eq!(vouched(&uncertain, 3, 2, 50), None);
        let sure = vouched(&uncertain, 3, 1, 50).unwrap();
        assert!(!sure.uncertain);
        assert_eq!(vouched(&sure, 3, 1, 60), None);
        let doubts = doubted(&sure, Some(70)).unwrap();
        assert_eq!((doubts.uncertain, doubts.last_contact), (true, Some(70)));
        assert_eq!(doubted(&doubts, None), None);
    }

    #[test]
    fn the_proxy_waits_longer_than_any_lease_that_it_granted() {
        let set = members::with(&members::first("a"), "b").unwrap();
        let mut grants = Grants::default();
        assert_eq!(grants.free_at("b"), None);
        let mut lease = Lease::default();
        let number = lease.ask(1_000);
        assert!(grants.grant(1_200, "b", &set));
        assert!(!grants.grant(1_200, "c", &set), "it is no member");
        assert!(lease.granted(1_300, &grant(number), &member()));
        grants.stop("b");
        assert!(!grants.grant(1_700, "b", &set));
        assert!(!lease.is_valid(grants.free_at("b").unwrap()));
        grants.resume("b");
        assert!(grants.grant(9_000, "b", &set));
    }
}
