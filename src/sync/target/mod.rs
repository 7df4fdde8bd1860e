//! The node that is filled: files and WAL come in, PostgreSQL follows as a standby and leaves recovery at exactly X.
//!
//! Order of calls on a [`Target`]: [`Target::keep_old`] if that is wanted, [`Target::fill`], [`Target::verify`] if that is wanted, [`Target::catch_up`], [`Target::hold`],
//! [`Target::leave_recovery`]; [`Target::abort`] at any time. It keeps no record: the agent writes the node's state
//! before each call. Whatever is interrupted leaves a data directory that either can not be started or is whole, and
//! the next fill sends only what differs.

mod fill;
mod follow;
mod journal;
mod keep;
mod layout;
mod manifest;
mod plan;
mod pull;
mod room;
mod settings;
mod tablespaces;
mod verify;
mod wal_files;
mod writer;

use std::future::Future;
use std::pin::Pin;
use std::time::Duration;

use pgtandem_proto::message::{FilesReply, FilesRequest, Progress, WalReply, WalRequest};
use tokio::sync::watch;
use tokio_util::task::TaskTracker;

use super::error::SyncError;
use super::link::Link;
use super::relay::Relay;
use crate::agent::postgres::Postgres;

pub use keep::{kept_before, old_data};
pub(in crate::sync) use layout::control_of;

/// Longest silence of the source while something is due from it, seconds.
pub const SILENCE_SECONDS_MAX: u64 = 120;
/// Longest checkpoint at the beginning of a backup, seconds; it is an immediate one.
pub const BEGIN_SECONDS_MAX: u64 = 3600;
/// Longest time without any sign of advance while PostgreSQL follows, seconds.
pub const FOLLOW_SECONDS_MAX: u64 = 300;
/// Longest time from the signal until PostgreSQL accepts writes, seconds.
pub const PROMOTE_SECONDS_MAX: u64 = 120;

/// A future behind a `dyn` trait.
pub type Opening<'a, T> = Pin<Box<dyn Future<Output = Result<T, SyncError>> + Send + 'a>>;

/// Opens channels to the node that is copied from.
pub trait Source: Send + Sync + 'static {
    /// A files channel behind its HELLO.
    fn open_files(&self) -> Opening<'_, Link<FilesRequest, FilesReply>>;
    /// A wal channel behind its HELLO.
    fn open_wal(&self) -> Opening<'_, Link<WalRequest, WalReply>>;
}

/// This node while it is filled and until it is a server of its own.
pub struct Target {
    postgres: Postgres,
    progress: watch::Sender<Progress>,
    /// Threads that write files and WAL. One of a fill that has ended may still be at its last bytes.
    writers: TaskTracker,
    following: Option<follow::Following>,
}

impl Target {
    #[must_use]
    pub fn new(postgres: Postgres) -> Target {
        Target {
            postgres,
            progress: watch::Sender::new(Progress::default()),
            writers: TaskTracker::new(),
            following: None,
        }
    }

    /// Counters of what is under way; they change all the time, look every second or so.
    #[must_use]
    pub fn progress(&self) -> watch::Receiver<Progress> {
        self.progress.subscribe()
    }

    /// Returns when nothing writes here any more that an earlier fill began.
    async fn writers_ended(&self) {
        self.writers.close();
        self.writers.wait().await;
        self.writers.reopen();
    }

    fn relay(&self) -> Result<&Relay, SyncError> {
        let following = self.following.as_ref();
        following.map(|following| &following.relay).ok_or_else(|| {
            SyncError::refused("this node is not following a source", "Start the recovery from its beginning.")
        })
    }
}

/// `work`, or an error if it takes longer than `seconds_max`.
async fn progressing<T>(
    seconds_max: u64,
    what: &'static str,
    work: impl Future<Output = Result<T, SyncError>>,
) -> Result<T, SyncError> {
    match tokio::time::timeout(Duration::from_secs(seconds_max), work).await {
        Ok(done) => done,
        Err(_) => Err(SyncError::Stalled {
            what,
            seconds: seconds_max,
            hint: "Check the source and the network, then start the recovery again: only what differs is sent.".into(),
        }),
    }
}

/// Runs `work` on a blocking thread.
async fn blocking<T: Send + 'static>(
    what: &'static str,
    work: impl FnOnce() -> Result<T, SyncError> + Send + 'static,
) -> Result<T, SyncError> {
    let done = tokio::task::spawn_blocking(work).await;
    done.map_err(|error| SyncError::Internal(format!("{what}: {error}")))?
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;
    use std::task::Poll;

    use super::*;
    use crate::config::NodeConfig;

    /// A node with its data here, and whatever else it has beside them.
    pub fn node(pgdata: PathBuf) -> NodeConfig {
        let place = |name: &str| pgdata.with_file_name(name);
        NodeConfig {
            name: "b".into(),
            agent: ([127, 0, 0, 1], 0).into(),
            state_dir: place("state"),
            bin_dir: place("bin"),
            socket_dir: place("socket"),
            port: 5432,
            archive_dir: None,
            tablespaces: std::collections::BTreeMap::new(),
            service_addresses: Vec::new(),
            pgdata,
        }
    }

    #[tokio::test]
    async fn what_an_ended_fill_still_writes_is_waited_for() {
        let folder = tempfile::tempdir().unwrap();
        let mut target = Target::new(Postgres::new(node(folder.path().join("data"))));
        // A disk that stands still: the thread that writes to it can not be ended.
        let (disk, stands_still) = std::sync::mpsc::sync_channel::<()>(1);
        target.writers.spawn_blocking(move || stands_still.recv());
        let mut ending = std::pin::pin!(target.abort());
        let waits = std::future::poll_fn(|context| Poll::Ready(ending.as_mut().poll(context).is_pending())).await;
        assert!(waits, "the next fill would compare what is about to change");
        drop(disk);
        ending.await.unwrap();
    }
}
