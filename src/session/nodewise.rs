//! Statements outside transactions: the client's text to the leader, and its answer held until every follower has done the same.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use bytes::Bytes;

use crate::pg::build::{self, ClientError};
use crate::replicate::exclusion::{Conflict, Flight, Statement};
use crate::replicate::hub::HubError;
use crate::replicate::nodewise::{self, Intent, Leader, Place, Servers};
use crate::replicate::resolve;
use crate::session::effect::put_tag;
use crate::session::run::Session;
use crate::session::simple::{error_frame, refused};
use crate::session::wire::{End, Expect, Mode, Until};
use crate::sql::nodewise::{Work, read};

/// How long a statement waits for its turn: for another one of its kind, or for a node that is joining.
pub const TURN_MS_MAX: u64 = 120_000;
/// How long a DDL commit waits for a statement that followers are doing.
const DDL_MS_MAX: u64 = 120_000;
const LOCKS_POLL_MS: u64 = 1;

/// A statement whose intent is stored, before the leader has its text.
struct Begun {
    statement: Statement,
    intent: Intent,
    work: Work,
    at: Instant,
}

impl Session {
    pub async fn simple_nodewise(&mut self, frame: &[u8], text: &str) -> Result<(), End> {
        if self.in_block() {
            return self.forward(frame).await;
        }
        let begun = match self.begin_nodewise(text).await? {
            Ok(begun) => begun,
            Err(error) => return self.refuse_simple(&error).await,
        };
        self.wire.hold_ready = true;
        self.wire.clear_results();
        self.wire.to_server.extend_from_slice(frame);
        self.wire.expects.push_back(Expect::Query { mode: Mode::Forward });
        let done = self.finish_nodewise(begun).await;
        self.wire.hold_ready = false;
        if let Err(error) = done? {
            error.write(&mut self.wire.to_client);
        }
        build::ready_for_query(&mut self.wire.to_client, self.wire.status);
        Ok(())
    }

    pub async fn execute_nodewise(&mut self, frame: &Bytes, text: &str) -> Result<(), End> {
        self.catch_up().await?;
        if self.wire.is_skipping() {
            return Ok(());
        }
        if self.in_block() {
            self.wire.clear_results();
            self.pass(frame, Expect::Execute { mode: Mode::Forward });
            build::flush(&mut self.wire.to_server);
            return self.wire.pump(Until::Answered).await;
        }
        if self.facts.is_none()
            && let Some(error) = self.read_context().await?
        {
            self.wire.to_client.extend_from_slice(&error_frame(&error));
            self.skip_until_sync = true;
            return Ok(());
        }
        let begun = match self.begin_nodewise(text).await? {
            Ok(begun) => begun,
            Err(error) => return self.refuse_extended(&error).await,
        };
        self.wire.clear_results();
        self.pass(frame, Expect::Execute { mode: Mode::Forward });
        self.end_execute();
        let done = self.finish_nodewise(begun).await?;
        if let Err(error) = done {
            error.write(&mut self.wire.to_client);
            self.skip_until_sync = !self.synced_early;
        }
        self.end_early_sync();
        Ok(())
    }

    pub(super) fn servers(&self) -> Servers<'_> {
        Servers { hub: &self.hub, epoch: self.epoch, secret: &self.secret }
    }

    /// Waits for its turn and stores the intent on every member. An error: nothing was changed anywhere.
    async fn begin_nodewise(&mut self, text: &str) -> Result<Result<Begun, ClientError>, End> {
        let work = match read(text) {
            Ok(work) => work,
            Err(refusal) => return Ok(Err(refused(&refusal))),
        };
        self.cycle.is_special = true;
        let (Some(facts), Some(context)) = (self.facts.clone(), self.context.clone()) else {
            let what = "the settings of the session are not known";
            return Ok(Err(ClientError::error("XX000", what, "Report this as a bug of pgtandem.")));
        };
        if !facts.standard_conforming_strings {
            let what = "standard_conforming_strings = off is not supported";
            return Ok(Err(ClientError::error("0A000", what, "SET standard_conforming_strings = on.")));
        }
        self.wire.flush_client().await?;
        let databases = work.databases();
        let turn = self.hub.nodewise.begin(self.pid, &databases);
        let Ok(statement) = tokio::time::timeout(Duration::from_millis(TURN_MS_MAX), turn).await else {
            let what = format!(
                "no turn within {TURN_MS_MAX} ms: another statement that runs node by node, or the join of a node, is under way"
            );
            return Ok(Err(ClientError::error("40001", what, "Try it again.")));
        };
        let mut intent = Intent {
            id: format!("{:032x}", rand::random::<u128>()),
            database: self.database.to_string(),
            context: (*context).clone(),
            text: text.to_owned(),
            before: Vec::new(),
        };
        if let Err(e) = self.intend(&mut intent, &work).await {
            let what = format!("the statement could not be noted down on every member, and was not begun: {e}");
            return Ok(Err(ClientError::error("40001", what, "Try it again; see: pgtandem status")));
        }
        // A database that is made of another one has the numbers of its sequences.
        self.hub.sequences.forget_all();
        Ok(Ok(Begun { statement, intent, work, at: Instant::now() }))
    }

    async fn intend(&self, intent: &mut Intent, work: &Work) -> Result<(), HubError> {
        let servers = self.servers();
        nodewise::finish_all(&servers, &servers.intents().await?).await?;
        intent.before = servers.before(&self.database, work).await?;
        for follower in &self.hub.view().followers {
            servers.store(Place::Follower(&follower.node), intent).await?;
        }
        servers.store(Place::Leader, intent).await
    }

    /// Takes the leader's answer and has the followers do the same. Gives an error of ours; one of the leader's the client has.
    async fn finish_nodewise(&mut self, begun: Begun) -> Result<Result<(), ClientError>, End> {
        self.wire.hold_tag = true;
        let answered = self.wire.pump(Until::Answered).await;
        self.wire.hold_tag = false;
        let Begun { statement, intent, work, at } = begun;
        let ms = u64::try_from(at.elapsed().as_millis()).unwrap_or(u64::MAX).min(24 * 3_600_000);
        if let Err(end) = answered {
            self.finish_without_client(Begun { statement, intent, work, at });
            return Err(end);
        }
        let ok = self.wire.results.error.is_none();
        let tag = self.wire.results.tag.take();
        self.hub.schema_number.fetch_add(2, Ordering::AcqRel);
        let leader = Leader { ms, again: ok && work == Work::Reindex };
        let finished = match self.hub.while_serving(self.epoch, statement.follow()).await {
            Some(()) => nodewise::finish(&self.servers(), &intent, &work, leader).await,
            None => Err(HubError::Other("a new epoch began".to_owned())),
        };
        drop(statement);
        self.own_plans.clear();
        match finished {
            Ok(()) => {
                if let (true, Some(tag)) = (ok, tag) {
                    put_tag(&mut self.wire.to_client, &tag);
                }
                Ok(Ok(()))
            }
            // The client has an error already.
            Err(_) if !ok => Ok(Ok(())),
            Err(e) => {
                let what = format!("the leader has done it, and it is not known to be done on every member: {e}");
                let hint = "It is gone on with by itself, before the next statement of this kind or at the next start.";
                Ok(Err(ClientError::error("55000", what, hint)))
            }
        }
    }

    /// The connection to the leader ended with the statement under way: what became of it is seen when the backend is gone.
    fn finish_without_client(&self, begun: Begun) {
        let (hub, epoch, secret, pid) = (Arc::clone(&self.hub), self.epoch, Arc::clone(&self.secret), self.pid);
        tokio::task::spawn_local(async move {
            let Begun { statement, intent, work, .. } = begun;
            let finish = async {
                let mut leader = hub.leader_connection_of(nodewise::HOME, &secret, epoch).await?;
                resolve::backend_gone(&mut leader, pid).await?;
                let followed = hub.while_serving(epoch, statement.follow()).await;
                followed.ok_or_else(|| HubError::Other("a new epoch began".to_owned()))?;
                let servers = Servers { hub: &hub, epoch, secret: &secret };
                nodewise::finish(&servers, &intent, &work, Leader::default()).await
            };
            if let Err(error) = finish.await {
                tracing::warn!(%error, text = intent.text, "not done on every member yet; it is gone on with by itself");
            }
        });
    }

    /// Lets a DDL commit reach followers: before a statement that the leader still works on, or after all have done it.
    pub async fn ddl_flight(&mut self) -> Result<Result<Flight, ClientError>, End> {
        let limit = Duration::from_millis(DDL_MS_MAX);
        let since = Instant::now();
        while since.elapsed() < limit {
            match self.hub.nodewise.fly() {
                Ok(flight) => return Ok(Ok(flight)),
                Err(Conflict::Following) => {
                    let followed = self.hub.nodewise.followed();
                    let _in_time = tokio::time::timeout(limit.saturating_sub(since.elapsed()), followed).await;
                }
                Err(Conflict::Leading(pid)) => {
                    // It holds its locks to its end. What this transaction did meanwhile did not need them.
                    let held = format!(
                        "SELECT 1 FROM pg_catalog.pg_locks WHERE pid = {pid} AND locktype <> 'virtualxid' LIMIT 1"
                    );
                    self.hidden_query(&held).await?;
                    if !self.wire.results.values.is_empty()
                        && let Ok(flight) = self.hub.nodewise.fly_before()
                    {
                        return Ok(Ok(flight));
                    }
                    tokio::time::sleep(Duration::from_millis(LOCKS_POLL_MS)).await;
                }
            }
        }
        let what = format!("a statement that runs node by node was not done on every member within {DDL_MS_MAX} ms");
        Ok(Err(ClientError::error("40001", what, "Try the transaction again.")))
    }
}
