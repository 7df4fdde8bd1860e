//! Points at which a test lets a process end as by kill -9: the steps of a commit and of each change of the member set.
//!
//! Only builds with debug assertions look: `PGTANDEM_CRASH` names a folder, and the process that comes by a point takes the file with the
//! point's name out of it and ends there, or, if `STOP` is in that file, stands still until a test lets it go on. Each file counts once,
//! so whoever is started again goes on. In other builds nothing of this is left.

/// Every point. Behind the name: of which node or database it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CrashPoint {
    /// A transaction with effects is to be committed, and nothing was sent to anybody. Of its database.
    CommitBegun,
    /// Every follower holds it prepared, and the leader does not know of it.
    CommitPrepared,
    /// The leader has committed it, and nobody was told.
    CommitDecided,

    /// A follower is to leave, and nobody was told. Of the one that leaves.
    ShrinkBegun,
    /// It was told that it is left behind.
    ShrinkTold,
    /// It could not be told, and its lease has ended.
    ShrinkLeaseOut,
    /// The smaller set is stored there. Of each that remains.
    ShrinkStored,
    /// It is stored everywhere, and no commit has been acknowledged under it. Of the one that leaves.
    ShrinkShown,

    /// The node is to be let in, the gate is open. Of that node.
    GrowReady,
    /// The gate is closed, and the node has everything.
    GrowDrained,
    /// The larger set is stored there. Of each, the new one last.
    GrowStored,
    /// It is shown to sessions, and the gate is closed still. Of the new one.
    GrowShown,

    /// A node that was away is to come back, and its record says Joining. Of that node.
    ReturnMarked,
    /// What it held prepared is decided.
    ReturnSettled,

    /// The leader was lost, and this one has stored that it leads. Of the new leader.
    TakeoverStored,
    /// It was told who leads. Of each other member of before.
    TakeoverTold,

    /// A new epoch was promised there. Of each member.
    ReignPromised,
    /// Sessions of older epochs have ended there, and what it held prepared is decided. Of each member.
    ReignSettled,
    /// The set of the new epoch is stored there. Of each member.
    ReignStored,

    /// A planned change of the leader is stored there. Of the new leader first, then of each other member.
    SwitchStored,
    /// In the command of a person: the epoch of a promotion was promised there. Of each who is asked to.
    PromotePromised,
    /// The set of the promotion is stored there. Of each member, the promoted one last.
    PromoteStored,
    /// The epoch of a detachment without a proxy was promised there. Of each who remains.
    DetachPromised,
    /// The smaller set is stored there. Of each who remains, the leader last.
    DetachStored,

    /// In the agent: a set is to be stored. Of its node, as in all that follow.
    AgentStores,
    /// It is durable, and whoever asked does not know.
    AgentStored,
    AgentJoins,
    AgentJoined,
    AgentPromised,
}

impl CrashPoint {
    pub const ALL: [CrashPoint; 29] = {
        use CrashPoint as P;
        [
            P::CommitBegun,
            P::CommitPrepared,
            P::CommitDecided,
            P::ShrinkBegun,
            P::ShrinkTold,
            P::ShrinkLeaseOut,
            P::ShrinkStored,
            P::ShrinkShown,
            P::GrowReady,
            P::GrowDrained,
            P::GrowStored,
            P::GrowShown,
            P::ReturnMarked,
            P::ReturnSettled,
            P::TakeoverStored,
            P::TakeoverTold,
            P::ReignPromised,
            P::ReignSettled,
            P::ReignStored,
            P::SwitchStored,
            P::PromotePromised,
            P::PromoteStored,
            P::DetachPromised,
            P::DetachStored,
            P::AgentStores,
            P::AgentStored,
            P::AgentJoins,
            P::AgentJoined,
            P::AgentPromised,
        ]
    };

    /// The file that lets the next process that comes by end here.
    #[must_use]
    pub fn file_name(self, of: &str) -> String {
        format!("{self:?}.{of}")
    }

    /// Ends this process if a test wants it.
    #[cfg(debug_assertions)]
    pub fn reached(self, of: &str) {
        use std::path::PathBuf;
        use std::sync::LazyLock;

        use rustix::process::{Signal, getpid, kill_process};

        static FOLDER: LazyLock<Option<PathBuf>> =
            LazyLock::new(|| std::env::var_os("PGTANDEM_CRASH").map(PathBuf::from));
        let Some(folder) = FOLDER.as_ref() else { return };
        let file = folder.join(self.file_name(of));
        let Ok(content) = std::fs::read_to_string(&file) else { return };
        // Whoever takes the file away is the one that it is for.
        if std::fs::remove_file(&file).is_err() {
            return;
        }
        let signal = if content == "STOP" { Signal::STOP } else { Signal::KILL };
        tracing::error!(point = ?self, of, ?signal, "a test wants this here");
        let _ = kill_process(getpid(), signal);
        // Another thread may be the one that takes the signal: this one goes no further before it has effect.
        std::thread::park_timeout(std::time::Duration::from_millis(200));
    }

    #[cfg(not(debug_assertions))]
    #[inline]
    pub fn reached(self, _of: &str) {}
}
