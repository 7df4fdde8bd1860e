//! A node that was away briefly becomes a member again without a copy. The order:
//!
//! 1. Its record and its server are judged ([`crate::cluster::rejoin`]); from here to the join nothing begins that no backlog can have.
//! 2. Its record says Joining, every session there is ended, so nothing that was sent before can still do anything.
//! 3. What it holds prepared is decided: by its own entry in the backlog, by what came after it, or by the leader's mark.
//! 4. The backlog is applied, each transaction only behind the one that its mark had committed before it ([`chain`](super::chain)).
//! 5. It is let in as after a recovery; while the gate is closed its marks must be the leader's, in every database.
//!
//! Whatever does not fit ends it: the node stays out, and has to be recovered. What only does not answer is tried again.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use pgtandem_proto::membership::{NodeState, Record};
use pgtandem_proto::message::{NodeStatus, Reply, Request};

use crate::agent::client::{ClientError, Control};
use crate::cluster::members;
use crate::cluster::rejoin::{self, Judgement};
use crate::config::NodeConfig;
use crate::crash::CrashPoint;
use crate::pg::build;
use crate::recovery::replication::{JoinDone, ReplicationError, ReplicationErrorKind as Kind};
use crate::replicate::applier::{Applier, differs, leader_error, node_error};
use crate::replicate::away::Kept;
use crate::replicate::backlog::Said;
use crate::replicate::chain::Chain;
use crate::replicate::flight;
use crate::replicate::follower::{Answer, Connection};
use crate::replicate::hub::{Hub, store_on};
use crate::replicate::join::SHORT_MAX;
use crate::replicate::resolve::{self, Marks, Verdict};

/// How long an agent may take to say what its node is, or to store that.
const AGENT_MS_MAX: u64 = 3_000;
/// How long one attempt waits for what must not meet it, and for commits that are not finished on every member.
const QUIET_MS_MAX: u64 = 20_000;

const UNLOGGED: &str = "SELECT count(*) FROM pg_catalog.pg_class WHERE relpersistence = 'u'";
const GENERATION: &str = "SELECT id FROM pgtandem.generation WHERE one";

/// How long its PostgreSQL may take before the backlog is applied: everything else waits for its sessions meanwhile.
const BEGIN_MS_MAX: u64 = 30_000;

/// What became of one attempt.
#[derive(Debug)]
pub enum Attempt {
    Joined(JoinDone),
    /// It may be tried again: why not now, and whether statements of clients had to wait for the attempt.
    Later {
        why: String,
        costs: bool,
    },
    /// It has to be recovered.
    Never(String),
}

impl Attempt {
    /// Clients did not notice the attempt.
    fn later(why: impl Into<String>) -> Self {
        Self::Later { why: why.into(), costs: false }
    }
}

struct Records {
    leader: Record,
    target: Record,
}

impl Hub {
    /// Tries to let a node in again that is away.
    pub async fn rejoin(&self, name: &str, kept: &Arc<Kept>) -> Attempt {
        // A recovery waits for this one's end: its records must not come after.
        let _attempt = kept.attempt.lock().await;
        if let Some(why) = self.why_ended(kept) {
            return Attempt::Never(why);
        }
        if self.reign_epoch() != Some(kept.epoch) || members::contains(&self.view().set, name) {
            return Attempt::later("the member set is just being changed");
        }
        let (node, mut control, records) = match self.judge_return(name, kept).await {
            Ok(begin) => begin,
            Err(attempt) => return attempt,
        };
        let limit = Duration::from_millis(QUIET_MS_MAX);
        let Ok(_cut) = tokio::time::timeout(limit, self.nodewise.cut()).await else {
            return Attempt::later("a statement outside transactions is under way");
        };
        let Some(_cutting) = self.cuts.cut(limit).await else {
            return Attempt::later("a transaction that calls or fires code is open");
        };
        kept.set_back(true);
        let done = self.bring_back(&node, kept, &mut control, &records).await;
        kept.set_back(false);
        let error = match done {
            Ok(done) => return Attempt::Joined(done),
            Err(error) => error,
        };
        // As before: a person may need it as it is, and its agent keeps its PostgreSQL running.
        let set = self.view().set.clone();
        if !members::contains(&set, name) {
            let back = in_time(async {
                // Somebody else's recovery of it may have begun.
                if status(&mut control).await?.record.state == NodeState::Joining {
                    store_on(&mut control, &set, NodeState::Stale, None, None).await?;
                }
                Ok(())
            });
            if let Err(error) = back.await {
                tracing::info!(node = name, error, "its record was not set back to stale");
            }
        }
        match self.why_ended(kept) {
            Some(why) => Attempt::Never(why),
            None if matches!(error.kind, Kind::Differs | Kind::Backlog) => Attempt::Never(error.what),
            None => Attempt::Later { why: error.what, costs: true },
        }
    }

    /// Whether it may come back now, by what its agent says.
    async fn judge_return(&self, name: &str, kept: &Kept) -> Result<(NodeConfig, Control, Records), Attempt> {
        let node = self.node(name).map_err(|e| Attempt::later(e.to_string()))?.clone();
        let leader = self.leader().map_err(|e| Attempt::later(e.to_string()))?;
        let asked = in_time(async {
            let mut control = Control::connect(&self.identity, &node).await?;
            let status = status(&mut control).await?;
            let leader = status_of(self, &leader).await?;
            Ok((control, status, leader.record))
        });
        let (mut control, status, leader) = asked.await.map_err(Attempt::later)?;
        let set = self.view().set.clone();
        let done = match rejoin::judge(name, &set, kept.epoch, &leader, &status) {
            Judgement::Begin => return Ok((node, control, Records { leader, target: status.record })),
            Judgement::Never(why) => return Err(Attempt::Never(why)),
            Judgement::Wait(why) => return Err(Attempt::later(why)),
            Judgement::Tell => in_time(store_on(&mut control, &set, NodeState::Stale, None, None)).await,
            Judgement::StartAgain => {
                in_time(async {
                    store_on(&mut control, &set, NodeState::Stale, None, None).await?;
                    control.request(&Request::StartPostgres).await.map(|_| ())
                })
                .await
            }
        };
        Err(Attempt::later(done.err().unwrap_or_else(|| "it is just told that it was left behind".into())))
    }

    async fn bring_back(
        &self,
        node: &NodeConfig,
        kept: &Arc<Kept>,
        control: &mut Control,
        records: &Records,
    ) -> Result<JoinDone, ReplicationError> {
        let name = &node.name;
        let stopped = || differs(name, "it is no longer waited for");
        let begin =
            tokio::time::timeout(Duration::from_millis(BEGIN_MS_MAX), self.begin_return(node, kept, control, records));
        let begun = tokio::select! {
            biased;
            () = kept.stopped.cancelled() => return Err(stopped()),
            begun = begin => begun,
        };
        let late = || Err(node_error(name, &format!("its PostgreSQL did not answer within {} s", BEGIN_MS_MAX / 1000)));
        let mut applier = begun.unwrap_or_else(|_| late())?;
        tokio::select! {
            biased;
            () = kept.stopped.cancelled() => return Err(stopped()),
            done = applier.apply(&kept.backlog, SHORT_MAX, None, &|_| ()) => done?,
        }
        self.admit(applier, &kept.backlog, &|why| kept.note(why)).await
    }

    /// Judges its server, decides what it holds prepared, and finds out where it stands.
    async fn begin_return(
        &self,
        node: &NodeConfig,
        kept: &Arc<Kept>,
        control: &mut Control,
        records: &Records,
    ) -> Result<Applier<'_>, ReplicationError> {
        let name = &node.name;
        let failed = |e: String| node_error(name, &e);
        let set = self.view().set.clone();
        in_time(store_on(control, &set, NodeState::Joining, None, None)).await.map_err(failed)?;
        CrashPoint::ReturnMarked.reached(name);
        let mut applier = self.applier(name)?;
        // Of the reign that has the backlog, or of none.
        if applier.epoch != kept.epoch {
            return Err(differs(name, "a new epoch began"));
        }
        let first = applier.connection(&Arc::from("postgres")).await?;
        resolve::end_sessions(first).await.map_err(|e| failed(e.to_string()))?;
        self.judge_server(&mut applier, kept, records).await?;
        // Whatever was decided before the backlog began is in the leader's marks behind this.
        let earlier = self.gate.barrier(self.gate.next_number());
        tokio::time::timeout(Duration::from_millis(QUIET_MS_MAX), earlier)
            .await
            .map_err(|_| failed("commits that were under way when it was lost are not finished yet".into()))?;
        let mut at = HashMap::new();
        for database in self.databases_of_both(&mut applier).await? {
            let marks = self.settle_held(&mut applier, kept, &database).await?;
            at.insert(database.to_string(), marks);
        }
        kept.settled();
        CrashPoint::ReturnSettled.reached(name);
        tracing::info!(node = %name, backlog = ?kept.backlog.size(), "a node that was away is brought what it missed");
        applier.away = Some((Arc::clone(kept), Chain::new(at)));
        Ok(applier)
    }

    /// Whether its server is the one that it was, and has lost nothing.
    async fn judge_server(
        &self,
        applier: &mut Applier<'_>,
        kept: &Kept,
        records: &Records,
    ) -> Result<(), ReplicationError> {
        let name = applier.node.name.clone();
        let now = applier.standing().await?;
        let Some(before) = &kept.standing else { return Err(differs(&name, "its server was not known well enough")) };
        if let Some(why) = before.differs(&now) {
            return Err(differs(&name, why));
        }
        let first = applier.connection(&Arc::from("postgres")).await?;
        let found = query(first, GENERATION).await.map_err(|e| node_error(&name, &e))?;
        if !rejoin::fits_generation(&records.leader, &records.target, found.first().map(String::as_str)) {
            return Err(differs(&name, "its data were replaced, as by a restored backup"));
        }
        if before.started == now.started {
            return Ok(());
        }
        let mut leader = self.leader_connection("postgres").await.map_err(|e| leader_error(&e))?;
        for database in resolve::databases(&mut leader).await.map_err(|e| leader_error(&e))? {
            let mut leader = self.leader_connection(&database).await.map_err(|e| leader_error(&e))?;
            let unlogged = query(&mut leader, UNLOGGED).await.map_err(|e| leader_error(&e))?;
            if unlogged.first().is_none_or(|count| count != "0") {
                let what = format!(
                    "database {database} has unlogged tables, and its PostgreSQL, started again, may have emptied them"
                );
                return Err(differs(&name, what));
            }
        }
        Ok(())
    }

    /// The databases that allow connections; the same on the leader and on the node.
    async fn databases_of_both(&self, applier: &mut Applier<'_>) -> Result<Vec<Arc<str>>, ReplicationError> {
        let name = applier.node.name.clone();
        let first = applier.connection(&Arc::from("postgres")).await?;
        let mut theirs = resolve::databases(first).await.map_err(|e| node_error(&name, &e))?;
        let mut leader = self.leader_connection("postgres").await.map_err(|e| leader_error(&e))?;
        let mut ours = resolve::databases(&mut leader).await.map_err(|e| leader_error(&e))?;
        theirs.sort_unstable();
        ours.sort_unstable();
        if ours != theirs {
            return Err(differs(&name, "its databases are not the leader's"));
        }
        Ok(ours.into_iter().map(Arc::from).collect())
    }

    /// Decides what the node holds prepared in one database. Gives its marks then.
    async fn settle_held(
        &self,
        applier: &mut Applier<'_>,
        kept: &Kept,
        database: &Arc<str>,
    ) -> Result<Marks, ReplicationError> {
        let (name, secret) = (applier.node.name.clone(), Arc::clone(&applier.secret));
        let failed = |e: crate::replicate::follower::ServerError| node_error(&name, &e);
        let open = self.leader_connection_of(database, &secret, kept.epoch);
        let mut leader = open.await.map_err(|e| leader_error(&e))?;
        // Read before the backlog is looked at: what it does not name was not decided since.
        let decided = resolve::marks(&mut leader).await.map_err(|e| leader_error(&e))?;
        let connection = applier.connection(database).await?;
        for gid in resolve::held_here(connection).await.map_err(failed)? {
            let Some((mark, n)) = flight::parse_gid(&gid, &self.config.cluster.name) else {
                return Err(differs(
                    &name,
                    format!("it holds the prepared transaction {gid}, which is not the proxy's"),
                ));
            };
            if kept.is_settled() {
                return Err(differs(&name, format!("it holds {gid}, which was decided already")));
            }
            let commit = match kept.backlog.says(database, mark, n) {
                Said::Committed => true,
                Said::NotCommitted => false,
                Said::Nothing => decided.get(&mark).is_some_and(|reached| *reached >= n),
                Said::Unknown => return Err(differs(&name, format!("it is not known what became of {gid}"))),
            };
            tracing::debug!(node = %name, gid, commit, "what it held prepared is decided");
            flight::finish(connection, &gid, commit).await.map_err(failed)?;
        }
        let marks = resolve::marks(connection).await.map_err(failed)?;
        let decided = resolve::marks(&mut leader).await.map_err(|e| leader_error(&e))?;
        if let Verdict::Ahead { mark, .. } = resolve::compare(&decided, &marks) {
            let what =
                format!("in database {database} it has a transaction of mark {mark} that the leader does not know");
            return Err(differs(&name, what));
        }
        Ok(marks)
    }
}

async fn query(
    connection: &mut Connection,
    text: &str,
) -> Result<Vec<String>, crate::replicate::follower::ServerError> {
    build::query(&mut connection.out, text.as_bytes());
    let answer = connection.exchange().await.and_then(Answer::ok)?;
    Ok(answer.values.into_iter().flatten().map(|v| String::from_utf8_lossy(&v).into_owned()).collect())
}

async fn status(control: &mut Control) -> Result<Box<NodeStatus>, ClientError> {
    match control.request(&Request::Status).await? {
        Reply::Status(status) => Ok(status),
        other => Err(control.unexpected("Status", &other)),
    }
}

async fn status_of(hub: &Hub, node: &NodeConfig) -> Result<Box<NodeStatus>, ClientError> {
    status(&mut Control::connect(&hub.identity, node).await?).await
}

/// Within what an agent may take; an error as a sentence.
async fn in_time<T>(work: impl Future<Output = Result<T, ClientError>>) -> Result<T, String> {
    match tokio::time::timeout(Duration::from_millis(AGENT_MS_MAX), work).await {
        Ok(done) => done.map_err(|e| e.to_string()),
        Err(_) => Err(format!("an agent did not answer within {AGENT_MS_MAX} ms")),
    }
}
