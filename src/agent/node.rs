//! What all connections of one agent share: its record, its PostgreSQL, its tunnels, the recovery under way.

use std::path::PathBuf;
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use pgtandem_proto::membership::{NodeState, Record};
use pgtandem_proto::message::{Failure, FailureCode, NodeStatus};
use tokio::sync::Notify;

use super::postgres::Postgres;
use super::record::{RecordFileError, RecordStore};
use super::recovery::RecoverySlot;
use super::supervisor::Supervisor;
use super::tls::Identity;
use super::tunnels::Tunnels;
use crate::cluster::lease::Lease;
use crate::cluster::record::RecordError;
use crate::config::{Config, NodeConfig};
use crate::sync::source::Backups;

/// Why a change of the record was not made.
#[derive(Debug, thiserror::Error)]
pub enum ChangeError {
    #[error(transparent)]
    Rule(#[from] RecordError),
    #[error(transparent)]
    File(#[from] RecordFileError),
    #[error("the task that writes the record ended: {0}")]
    Task(#[from] tokio::task::JoinError),
}

impl ChangeError {
    #[must_use]
    pub fn failure(&self) -> Failure {
        let (code, hint) = match self {
            ChangeError::Rule(
                RecordError::OldEpoch { .. } | RecordError::OldMembers { .. } | RecordError::TwoSets { .. },
            ) => (FailureCode::OldEpoch, "a newer proxy rules this node: stop the old one; see pgtandem status"),
            ChangeError::Rule(RecordError::Transition { .. }) => {
                (FailureCode::WrongState, "fill this node: pgtandem recover NODE; a member is detached first")
            }
            ChangeError::Rule(RecordError::NotForked(_)) => {
                (FailureCode::WrongState, "a node that is not forked is simply filled again: pgtandem recover NODE")
            }
            ChangeError::Rule(_) => (FailureCode::Request, "see pgtandem status"),
            ChangeError::File(_) => (FailureCode::Internal, "check the disk of the node's state_dir"),
            ChangeError::Task(_) => (FailureCode::Internal, "see the agent's log"),
        };
        Failure { code, what: self.to_string(), hint: hint.to_owned() }
    }
}

/// The state of an agent. Shared by all of its tasks.
pub struct Node {
    /// The whole configuration.
    pub cluster: Config,
    /// This node's part of it.
    pub config: NodeConfig,
    pub identity: Identity,
    pub supervisor: Supervisor,
    pub tunnels: Tunnels,
    pub recovery: RecoverySlot,
    /// What the proxy has granted last. Volatile: an agent that starts has none.
    pub(super) lease: Mutex<Lease>,
    /// When a proxy vouched for this node last, seconds since 1970; 0: not since the agent runs.
    pub(super) last_contact: AtomicU64,
    /// Wakes the asking for leases.
    pub(super) record_changed: Notify,
    /// Held while the generation in the record and in the database change together, and while they are compared.
    pub(super) generation: tokio::sync::Mutex<()>,
    /// What other nodes are being filled with from here.
    pub backups: Backups,
    /// Who works on the archive.
    pub(super) archive_work: super::archive::Work,
    /// The file. Locked by blocking tasks only.
    store: Arc<Mutex<RecordStore>>,
    /// What the file says; read by everybody.
    record: Arc<RwLock<Arc<Record>>>,
}

impl Node {
    #[must_use]
    pub fn new(cluster: Config, config: NodeConfig, identity: Identity, store: RecordStore) -> Node {
        let record = Arc::new(RwLock::new(Arc::new(store.record().clone())));
        Node {
            supervisor: Supervisor::new(Postgres::new(config.clone())),
            backups: Backups::default(),
            archive_work: super::archive::Work::default(),
            cluster,
            config,
            identity,
            tunnels: Tunnels::default(),
            recovery: RecoverySlot::default(),
            lease: Mutex::default(),
            last_contact: AtomicU64::new(0),
            record_changed: Notify::new(),
            generation: tokio::sync::Mutex::default(),
            store: Arc::new(Mutex::new(store)),
            record,
        }
    }

    #[must_use]
    pub fn postgres(&self) -> &Postgres {
        self.supervisor.postgres()
    }

    /// The record as it is on disk.
    #[must_use]
    pub fn record(&self) -> Arc<Record> {
        self.record.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Changes the record; durable when this returns. Happens whole even if the future is dropped.
    pub async fn change_record(
        &self,
        change: impl FnOnce(&Record) -> Result<Record, RecordError> + Send + 'static,
    ) -> Result<Arc<Record>, ChangeError> {
        let (store, current) = (self.store.clone(), self.record.clone());
        let changed = tokio::task::spawn_blocking(move || {
            let mut store = store.lock().unwrap_or_else(PoisonError::into_inner);
            let next = change(store.record())?;
            if &next != store.record() {
                store.replace(next)?;
                let next = Arc::new(store.record().clone());
                tracing::info!(promised = next.promised, state = ?next.state, uncertain = next.uncertain, members = ?next.members, "record stored");
                *current.write().unwrap_or_else(PoisonError::into_inner) = next;
            }
            let current = current.read().unwrap_or_else(PoisonError::into_inner).clone();
            Ok(current)
        })
        .await?;
        self.record_changed.notify_one();
        changed
    }

    #[must_use]
    pub fn status(&self) -> NodeStatus {
        NodeStatus {
            record: Record::clone(&self.record()),
            postgres: self.postgres().state(),
            postgres_detail: self.supervisor.detail(),
            progress: self.recovery.progress(),
            lease_ms: self.lease_ms(),
            archive_problem: self.archive_work.problem(),
        }
    }

    /// The configuration of another node, to copy from or to serve.
    #[must_use]
    pub fn other(&self, name: &str) -> Option<&NodeConfig> {
        self.cluster.nodes.iter().find(|node| node.name == name && node.name != self.config.name)
    }

    /// Whether the proxy may use this node's PostgreSQL in this state: a member, or one that is about to be.
    #[must_use]
    pub fn state_serves(state: NodeState) -> bool {
        matches!(state, NodeState::InSync | NodeState::Joining | NodeState::CatchingUp)
    }

    #[must_use]
    pub fn lock_path(node: &NodeConfig) -> PathBuf {
        node.state_dir.join("agent.lock")
    }
}
