//! A cluster as the model sees it: records, leases and who may serve are the program's own pure functions; the databases are a
//! few transactions that are prepared, committed or not there; proxies, agents, network and the person are a few flags.
//!
//! One tick is half a lease. A record is stored whole or not at all; a torn one is Blank.

use std::collections::BTreeSet;

use pgtandem::cluster::lease::{Grants, Lease};
use pgtandem::cluster::{members, promote, record};
use pgtandem_proto::membership::{Epoch, MemberSet, NodeState, Record};
use pgtandem_proto::message::LeaseGrant;

pub const NAMES: [&str; 3] = ["a", "b", "c"];
pub const TICK_MS: u64 = 1_500;
/// Generations of the model have numbers instead of random names.
const FIRST_GENERATION: &str = "g0";

/// What a node's PostgreSQL has of a transaction.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Half {
    Nothing,
    Prepared,
    Committed,
    /// Prepared or committed with other rows than the leader's.
    Wrong {
        committed: bool,
    },
}

impl Half {
    pub fn is_prepared(self) -> bool {
        matches!(self, Self::Prepared | Self::Wrong { committed: false })
    }

    pub fn is_committed(self) -> bool {
        matches!(self, Self::Committed | Self::Wrong { committed: true })
    }

    pub fn finished(self, commit: bool) -> Self {
        match (self, commit) {
            (Self::Prepared, true) => Self::Committed,
            (Self::Wrong { .. }, true) => Self::Wrong { committed: true },
            _ => Self::Nothing,
        }
    }
}

/// One transaction, from its client's point of view and its proxy's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Write {
    New,
    /// Executed on the leader of this proxy's reign, not decided.
    Open {
        by: usize,
        epoch: Epoch,
    },
    /// The leader refused it at COMMIT, or the proxy gave it up: to be rolled back.
    Failing {
        by: usize,
        epoch: Epoch,
    },
    /// The leader has committed it; it is inside the gate.
    Sent {
        by: usize,
        epoch: Epoch,
    },
    Acknowledged {
        by: usize,
        epoch: Epoch,
        finished: bool,
    },
    ToldFailed,
    /// The client lost its connection.
    Unknown,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Node {
    pub record: Record,
    /// Its record was lost once: what it says since then is no witness of what had been stored.
    pub is_torn: bool,
    pub agent_runs: bool,
    pub lease: Lease,
    /// The row in its databases: sessions of older epochs can do nothing.
    pub epoch: Epoch,
    pub halves: Vec<Half>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Phase {
    /// The leader's PostgreSQL is lost: another member has stored that it leads, and these have still to be told.
    TakingOver {
        next: MemberSet,
        left: Vec<String>,
        generation: String,
    },
    /// Everybody has promised; nothing is resolved.
    Promised {
        leaving: BTreeSet<String>,
    },
    /// Resolved everywhere; these have still to store the set.
    Storing {
        next: MemberSet,
        left: Vec<String>,
        generation: Option<String>,
    },
    Serving,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Shrink {
    pub node: usize,
    pub is_told: bool,
}

/// A recovery behind its cut.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Join {
    pub node: usize,
    pub backlog: BTreeSet<usize>,
    /// A transaction of the backlog whose outcome is not known.
    pub is_spoilt: bool,
    pub stored_here: bool,
    pub stored_there: bool,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Proxy {
    pub epoch: Epoch,
    pub set: MemberSet,
    pub grants: Grants,
    pub phase: Phase,
    pub shrink: Option<Shrink>,
    pub join: Option<Join>,
}

impl Proxy {
    pub fn serves(&self) -> bool {
        self.phase == Phase::Serving
    }

    pub fn leader(&self) -> usize {
        World::index(&self.set.leader)
    }
}

/// A person's promotion between its two steps.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Promotion {
    pub node: usize,
    pub plan: Vec<String>,
    pub set: MemberSet,
    pub stated: bool,
    pub accepts_loss: bool,
}

/// How often what may still happen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Budget {
    pub writes: usize,
    pub ticks: u8,
    pub asks: u8,
    pub crashes: u8,
    pub torn: u8,
    pub partitions: u8,
    pub suspicions: u8,
    pub recoveries: u8,
    pub promotions: u8,
    pub failures: u8,
    /// Of the leader's PostgreSQL, under a living proxy.
    pub losses: u8,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct World {
    pub now: u64,
    pub nodes: Vec<Node>,
    pub proxies: Vec<Option<Proxy>>,
    pub writes: Vec<Write>,
    pub partitioned: bool,
    /// Asked and not yet answered: node and number.
    pub asks: BTreeSet<(usize, u64)>,
    /// Answered and not yet arrived.
    pub grants: Vec<(usize, LeaseGrant)>,
    pub promotion: Option<Promotion>,
    pub left: Budget,
    pub generations: u8,
    /// A person has accepted a loss, or has stated what was not true.
    pub is_overridden: bool,
    pub promoted: bool,
    pub rejoined: bool,
    /// A proxy serves with another leader than its own node.
    pub taken_over: bool,
    /// The invariant that was broken.
    pub fault: Option<&'static str>,
}

impl World {
    /// Node a leads and serves; `members` of the nodes are in its set, the others are blank.
    pub fn new(nodes: usize, members: usize, left: Budget) -> Self {
        let names: Vec<String> = NAMES[..members].iter().map(ToString::to_string).collect();
        let set = MemberSet { epoch: 1, version: 1, nodes: names, leader: "a".into(), proxy: "a".into() };
        let node = |index: usize| {
            let blank = record::blank("shop", NAMES[index]);
            let record = if index < members {
                Record {
                    promised: 1,
                    members: Some(set.clone()),
                    state: NodeState::InSync,
                    generations: vec![FIRST_GENERATION.into()],
                    ..blank
                }
            } else {
                blank
            };
            let halves = vec![Half::Nothing; left.writes];
            Node { record, is_torn: false, agent_runs: true, lease: Lease::default(), epoch: 1, halves }
        };
        let proxy = Proxy {
            epoch: 1,
            set: set.clone(),
            grants: Grants::default(),
            phase: Phase::Serving,
            shrink: None,
            join: None,
        };
        let mut proxies = vec![None; nodes];
        proxies[0] = Some(proxy);
        Self {
            now: 0,
            nodes: (0..nodes).map(node).collect(),
            proxies,
            writes: vec![Write::New; left.writes],
            partitioned: false,
            asks: BTreeSet::new(),
            grants: Vec::new(),
            promotion: None,
            left,
            generations: 0,
            is_overridden: false,
            promoted: false,
            rejoined: false,
            taken_over: false,
            fault: None,
        }
    }

    pub fn index(name: &str) -> usize {
        NAMES.iter().position(|known| *known == name).expect("a node of the model")
    }

    /// Whether something on the host of `from` reaches the agent of `to`. A partition cuts node a off.
    pub fn reaches(&self, from: usize, to: usize) -> bool {
        let cut = self.partitioned && from != to && (from == 0 || to == 0);
        self.nodes[to].agent_runs && !cut
    }

    pub fn host_is_down(&self, node: usize) -> bool {
        self.proxies[node].is_none() && !self.nodes[node].agent_runs
    }

    pub fn new_generation(&mut self) -> String {
        self.generations += 1;
        format!("g{}", self.generations)
    }

    /// What the program's record rules say; an error leaves the record as it was. Checks I5.
    pub fn change<E>(&mut self, node: usize, next: Result<Record, E>) -> bool {
        let Ok(next) = next else { return false };
        let number = |record: &Record| record.members.as_ref().map_or((0, 0), members::number);
        let now = &self.nodes[node].record;
        if number(&next) < number(now) || next.promised < now.promised {
            self.fault = Some("I5");
        }
        self.nodes[node].record = next;
        true
    }

    /// The records that somebody on the host of `from` can read.
    pub fn found(&self, from: usize) -> Vec<promote::Found<'_>> {
        let found = |(index, node): (usize, &Node)| promote::Found {
            node: NAMES[index],
            answer: if self.reaches(from, index) { Ok(&self.nodes[index].record) } else { Err("no answer") },
            is_leased: self.reaches(from, index) && node.lease.is_valid(self.now),
        };
        self.nodes.iter().enumerate().map(found).collect()
    }

    pub fn is_inside_gate(&self, proxy: usize) -> bool {
        self.writes.iter().any(|write| match write {
            Write::Sent { by, .. } | Write::Acknowledged { by, finished: false, .. } => *by == proxy,
            _ => false,
        })
    }
}
