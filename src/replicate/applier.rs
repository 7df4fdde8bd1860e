//! Brings a node what its backlog has: one session for each database, many transactions in one.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::try_join_all;

use crate::cluster::rejoin::Standing;
use crate::config::NodeConfig;
use crate::pg::build;
use crate::recovery::replication::{Drained, ReplicationError, ReplicationErrorKind as Kind};
use crate::replicate::away::Kept;
use crate::replicate::backlog::{Backlog, GivenUp, Next, Taken};
use crate::replicate::chain::{Chain, Link};
use crate::replicate::effects::EffectLog;
use crate::replicate::flight::{self, Decision};
use crate::replicate::follower::{Answer, Connection, ServerError};
use crate::replicate::hub::{Hub, within};
use crate::replicate::resolve::{self, Verdict};
use crate::sql::facts::quote_literal;

/// Connections that are opened to a node for the sessions before it becomes a member; the rest open their own.
const SPARES_MAX: usize = 32;
/// Pause while the first transaction of the backlog is not decided yet.
const UNSETTLED_POLL_US: u64 = 200;
/// How long the backlog may stand still before the recovery fails.
const STANDSTILL_MS_MAX: u64 = 60_000;

/// The applier's sessions on the node that is joining, one per database.
pub(super) struct Applier<'a> {
    pub hub: &'a Hub,
    pub node: NodeConfig,
    pub epoch: u64,
    pub secret: Arc<str>,
    /// A node that was away: what is kept for it, and where it stands.
    pub away: Option<(Arc<Kept>, Chain)>,
    connections: HashMap<Arc<str>, Connection>,
    /// Databases that had commits since the cut.
    written: HashSet<Arc<str>>,
    /// Definitions applied so far: what was prepared before one is prepared again.
    definitions: u64,
}

pub(super) fn node_error(node: &str, e: &impl std::fmt::Display) -> ReplicationError {
    ReplicationError::new(
        Kind::Node,
        format!("node {node} could not be brought up to date: {e}"),
        format!("See the log of PostgreSQL and of the agent on {node}, then type: pgtandem recover {node}"),
    )
}

pub(super) fn leader_error(e: &impl std::fmt::Display) -> ReplicationError {
    ReplicationError::new(
        Kind::Leader,
        format!("the leader's PostgreSQL did not answer: {e}"),
        "Type: pgtandem status".to_owned(),
    )
}

pub(super) fn record_error(node: &str, e: &impl std::fmt::Display) -> ReplicationError {
    ReplicationError::new(
        Kind::Record,
        format!("the member set could not be stored on {node}: {e}"),
        format!("See the agent's log on {node}, then type: pgtandem status"),
    )
}

/// The node is not what it was, so that nothing may be applied there.
pub(super) fn differs(node: &str, why: impl std::fmt::Display) -> ReplicationError {
    ReplicationError::new(Kind::Differs, why.to_string(), format!("Type: pgtandem recover {node}"))
}

/// Applies the transactions in one; if the server refuses that, each in one of its own, as they were: what one leaves to its end, such as
/// the check of a deferred key, stands in the way of a TRUNCATE behind it.
async fn apply_work(connection: &mut Connection, work: &[(Arc<EffectLog>, Decision)]) -> Result<(), ServerError> {
    match within(STANDSTILL_MS_MAX, flight::apply(connection, work)).await {
        Err(e) if work.len() > 1 && !e.is_sick() => {
            tracing::debug!(error = %e, transactions = work.len(), "they are applied one by one");
            for one in work.chunks(1) {
                within(STANDSTILL_MS_MAX, flight::apply(connection, one)).await?;
            }
            Ok(())
        }
        done => done,
    }
}

impl<'a> Applier<'a> {
    pub fn new(hub: &'a Hub, node: NodeConfig, epoch: u64, secret: Arc<str>) -> Self {
        Self {
            hub,
            node,
            epoch,
            secret,
            away: None,
            connections: HashMap::new(),
            written: HashSet::new(),
            definitions: 0,
        }
    }

    pub async fn connection(&mut self, database: &Arc<str>) -> Result<&mut Connection, ReplicationError> {
        if !self.connections.contains_key(database) {
            let connection = self
                .hub
                .tunnel_connection(&self.node, database, self.epoch, Some(&self.secret))
                .await
                .map_err(|e| node_error(&self.node.name, &e))?;
            self.connections.insert(Arc::clone(database), connection);
        }
        self.connections.get_mut(database).ok_or_else(|| node_error(&self.node.name, &"no connection"))
    }

    /// Opens a session on every database, so that none has to be opened while the gate is closed.
    pub async fn connect_everywhere(&mut self) -> Result<(), ReplicationError> {
        let node = self.node.name.clone();
        let first = self.connection(&Arc::from("postgres")).await?;
        for database in resolve::databases(first).await.map_err(|e| node_error(&node, &e))? {
            self.connection(&Arc::from(database)).await?;
        }
        Ok(())
    }

    /// Opens connections that sessions take when the node is a member: without them every session that writes opens one
    /// in the moment when the gate opens, and all of them wait for that.
    pub async fn spares(&mut self, count: usize) -> Result<HashMap<Arc<str>, Vec<Connection>>, ReplicationError> {
        let failed = |e: ServerError| node_error(&self.node.name, &e);
        let mut spares: HashMap<Arc<str>, Vec<Connection>> = HashMap::new();
        let databases: Vec<_> = self.written.iter().collect();
        for database in databases.iter().cycle().take(count * databases.len()).take(SPARES_MAX) {
            let open = self.hub.tunnel_connection(&self.node, database, self.epoch, Some(&self.secret));
            let mut connection = open.await.map_err(failed)?;
            flight::warm_up(&mut connection, &self.secret).await.map_err(failed)?;
            spares.entry(Arc::clone(database)).or_default().push(connection);
        }
        Ok(spares)
    }

    /// Applies what there is until at most `left_max` transactions are left; gives up, with the rest still there, at `until`.
    pub async fn apply(
        &mut self,
        backlog: &Backlog,
        left_max: u64,
        until: Option<tokio::time::Instant>,
        on_progress: &(dyn Fn(Drained) + Sync),
    ) -> Result<(), ReplicationError> {
        let limit = Duration::from_millis(STANDSTILL_MS_MAX);
        let mut moved = tokio::time::Instant::now();
        loop {
            if until.is_some_and(|until| tokio::time::Instant::now() >= until) {
                let what = format!("the backlog for {} was not applied in time", self.node.name);
                return Err(ReplicationError::new(Kind::Gate, what, "It is tried again by itself."));
            }
            match backlog.next() {
                Next::Batch(batch) => {
                    self.apply_batch(batch).await?;
                    moved = tokio::time::Instant::now();
                    let (left, peak, applied) = backlog.progress();
                    on_progress(Drained { applied, left, peak });
                    if left <= left_max && left_max > 0 {
                        return Ok(());
                    }
                }
                Next::Empty => return Ok(()),
                Next::Unsettled if left_max > 0 && backlog.progress().0 <= left_max => return Ok(()),
                Next::Unsettled if moved.elapsed() > limit => {
                    return Err(node_error(&self.node.name, &"the backlog stands still"));
                }
                Next::Unsettled => tokio::time::sleep(Duration::from_micros(UNSETTLED_POLL_US)).await,
                Next::GivenUp(GivenUp::Ended) => {
                    let why = self.kept().and_then(|kept| self.hub.why_ended(kept));
                    return Err(differs(&self.node.name, why.unwrap_or_else(|| "its backlog was given up".into())));
                }
                Next::Unknown if self.away.is_some() => {
                    let what = "the outcome of a transaction that it missed is not known";
                    return Err(differs(&self.node.name, what));
                }
                Next::Unknown => {
                    return Err(node_error(
                        &self.node.name,
                        &"the outcome of a transaction in the backlog is not known",
                    ));
                }
                Next::GivenUp(GivenUp::NoDisk) => {
                    let folder = self.hub.config.proxy.state_dir.display();
                    return Err(ReplicationError::new(
                        Kind::Backlog,
                        format!(
                            "the backlog for {} was given up, because the disk of {folder} takes nothing and its memory was needed",
                            self.node.name
                        ),
                        "Make room there, on the proxy's host, then run the recovery again.",
                    ));
                }
                Next::GivenUp(GivenUp::Overflowed) => {
                    return Err(ReplicationError::new(
                        Kind::Backlog,
                        format!("the backlog for {} passed proxy.backlog_bytes_max", self.node.name),
                        "Try again when there is less load, or raise proxy.backlog_bytes_max.",
                    ));
                }
            }
        }
    }

    fn kept(&self) -> Option<&Arc<Kept>> {
        self.away.as_ref().map(|(kept, _)| kept)
    }

    /// Why what is kept for a node that was away was given up meanwhile, if it was.
    pub fn check_kept(&self) -> Result<(), ReplicationError> {
        match self.kept().and_then(|kept| self.hub.why_ended(kept)) {
            Some(why) => Err(differs(&self.node.name, why)),
            None => Ok(()),
        }
    }

    async fn apply_batch(&mut self, batch: Taken<'_>) -> Result<(), ReplicationError> {
        let node = self.node.name.clone();
        let mut work = Vec::with_capacity(batch.entries.len());
        let mut database = None;
        for entry in &batch.entries {
            let link = match &mut self.away {
                Some((_, chain)) => chain.link(&entry.database, &entry.decision),
                None => Link::Next,
            };
            match link {
                Link::Next => work.push((Arc::clone(&entry.log), entry.decision.clone())),
                Link::Present => {}
                Link::Torn(why) => {
                    return Err(differs(&node, format!("a transaction is missing on it or in its backlog: {why}")));
                }
            }
            database = Some(Arc::clone(&entry.database));
        }
        if let Some(database) = database.filter(|_| !work.is_empty()) {
            self.written.insert(Arc::clone(&database));
            let (is_away, definitions) = (self.away.is_some(), self.definitions);
            self.definitions += u64::from(work.iter().any(|(log, _)| log.ddl));
            let connection = self.connection(&database).await?;
            connection.at_schema(definitions);
            apply_work(connection, &work).await.map_err(|e| match e {
                e if is_away && !e.is_sick() => {
                    differs(&node, format!("a transaction did something else on it than on the leader: {e}"))
                }
                e => node_error(&node, &e),
            })?;
        }
        batch.applied();
        Ok(())
    }

    /// What the server says about itself.
    pub async fn standing(&mut self) -> Result<Standing, ReplicationError> {
        let node = self.node.name.clone();
        let first = self.connection(&Arc::from("postgres")).await?;
        build::query(&mut first.out, Standing::QUERY.as_bytes());
        let answer = first.exchange().await.and_then(Answer::ok).map_err(|e| node_error(&node, &e))?;
        let value = answer.values.into_iter().flatten().next().unwrap_or_default();
        Standing::parse(&String::from_utf8_lossy(&value))
            .ok_or_else(|| node_error(&node, &"it does not say which server it is"))
    }

    /// The generation that the node's record is about to say; a PostgreSQL that starts with another one is not this node's.
    pub async fn write_generation(&mut self, generation: &str) -> Result<(), ReplicationError> {
        let node = self.node.name.clone();
        let first = self.connection(&Arc::from("postgres")).await?;
        let text = format!(
            "INSERT INTO pgtandem.generation AS g (one, id) VALUES (true, {}) \
             ON CONFLICT (one) DO UPDATE SET id = excluded.id WHERE g.id <> excluded.id",
            quote_literal(generation)
        );
        build::query(&mut first.out, text.as_bytes());
        first.exchange().await.and_then(Answer::ok).map(|_| ()).map_err(|e| node_error(&node, &e))
    }

    /// A connection to the leader for each database that is open here: made before the gate closes.
    pub async fn leaders(&mut self) -> Result<HashMap<Arc<str>, Connection>, ReplicationError> {
        let (hub, epoch) = (self.hub, self.epoch);
        let opening: Vec<_> = self
            .connections
            .keys()
            .map(|database| {
                let (database, secret) = (Arc::clone(database), Arc::clone(&self.secret));
                async move {
                    let connection = hub.leader_connection_of(&database, &secret, epoch).await;
                    Ok((database, connection.map_err(|e| leader_error(&e))?))
                }
            })
            .collect();
        Ok(try_join_all(opening).await?.into_iter().collect())
    }

    /// Whether the node has each transaction that the leader has and none besides, by the marks of all databases. The gate is closed and the
    /// backlog empty.
    pub async fn compare_marks(&mut self, leaders: &mut HashMap<Arc<str>, Connection>) -> Result<(), ReplicationError> {
        let node = self.node.name.clone();
        let mut compared = Vec::new();
        for (database, leader) in leaders.iter_mut() {
            let Some(connection) = self.connections.remove(database) else { continue };
            compared.push(async move {
                let mut connection = connection;
                let (ours, theirs) = tokio::join!(resolve::marks(leader), resolve::marks(&mut connection));
                let verdict = resolve::compare(&ours?, &theirs?);
                Ok::<_, ServerError>((Arc::clone(database), verdict, connection))
            });
        }
        for (database, verdict, connection) in try_join_all(compared).await.map_err(|e| node_error(&node, &e))? {
            if verdict != Verdict::Same {
                return Err(differs(
                    &node,
                    format!("its marks in database {database} are not the leader's: {verdict:?}"),
                ));
            }
            self.connections.insert(database, connection);
        }
        Ok(())
    }
}
