//! Who is a member, and what a node durably knows about itself.

use serde::{Deserialize, Serialize};

/// Number of a proxy's reign. A new one at each start of a proxy; it only grows.
pub type Epoch = u64;

/// The set of nodes that hold every acknowledged write, as one proxy decided it.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct MemberSet {
    pub epoch: Epoch,
    /// Number of this set within its epoch. `(epoch, version)` only grows.
    pub version: u64,
    /// Names of the members, sorted, without duplicates; the leader is one of them.
    pub nodes: Vec<String>,
    /// The member whose PostgreSQL executes first and decides.
    pub leader: String,
    /// The node whose proxy rules in this epoch.
    pub proxy: String,
}

/// What a node knows about its own data.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum NodeState {
    /// Nothing is known about the data; also what a torn or lost record means.
    Blank,
    /// Files are being brought; the data directory can not be started.
    Seeding,
    /// Files are whole; WAL and the backlog are being worked off.
    CatchingUp,
    /// Everything is applied; the member set that contains this node is being written.
    Joining,
    /// A member.
    InSync,
    /// Left the member set: writes were acknowledged without this node.
    Stale,
    /// Its rows differed from the leader's.
    Suspect,
    /// Went on alone while the other side did, too. Its data are kept for a person.
    Forked,
}

/// The durable record of a node, kept by its agent outside PGDATA.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Record {
    pub cluster: String,
    pub node: String,
    /// The highest epoch that this node will obey.
    pub promised: Epoch,
    pub members: Option<MemberSet>,
    pub state: NodeState,
    /// "I may have been left behind without being told."
    pub uncertain: bool,
    /// Generations of the data, the current one first; a new one at every shrink and every promotion.
    pub generations: Vec<String>,
    /// When the content was last compared with the leader's, seconds since 1970.
    pub verified_at: Option<u64>,
    /// What operators overrode, one sentence each, oldest first; only appended to.
    pub overrides: Vec<String>,
    /// This node was made the leader, and its proxy has not settled yet what the one before left undecided here.
    #[serde(default)]
    pub taking_over: bool,
    /// When a proxy last vouched for this node, seconds since 1970; written when `uncertain` is. For people.
    #[serde(default)]
    pub last_contact: Option<u64>,
}
