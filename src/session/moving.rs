//! The leader is lost and the client's connection stays: the session goes on at the server that leads next, another member's or the old one
//! started again.
//!
//! It logs in there as its client, by the method that needs no secret or by the ClientKey that was seen at its start, and gets back its
//! settings, LISTENs and prepared statements. What was under way is repeated if nothing of it was seen, or answered from the mark if a
//! COMMIT was decided; an open transaction is lost, and the client is told so with 40001 at its next statement. What can not be made again
//! (temporary tables, cursors WITH HOLD, advisory locks of the session) ends it with 57P01.

use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::pg::build::{self, ClientError};
use crate::pg::frame::{self, Sender};
use crate::pg::message::{self, Reader};
use crate::pg::scram::{self, ClientKey, Login};
use crate::pg::startup::SessionStart;
use crate::replicate::effects::EffectLog;
use crate::replicate::hub::Reign;
use crate::replicate::leader::LeaderStream;
use crate::session::parameters;
use crate::session::reused::Reused;
use crate::session::run::Session;
use crate::session::simple::words;
use crate::session::start;
use crate::session::wire::{End, Expect, Mode, READ_BYTES, Until};
use crate::sql::plan::{Control, Lane, Plan};
use crate::sql::stays::Stays;

/// How long a session waits for a server that leads.
const MOVE_MS_MAX: u64 = 60_000;
const AGAIN_MS: u64 = 20;
/// How long one login may take.
const LOGIN_MS_MAX: u64 = 10_000;

/// What a session needs to begin once more.
#[derive(Debug)]
pub struct Origin {
    pub start: SessionStart,
    /// What its client cancels with.
    pub cancel_key: Bytes,
    /// `None`: it did not log in by SCRAM.
    pub client_key: Option<ClientKey>,
}

/// Why a session can not go on.
enum Stuck {
    /// Perhaps at the next attempt.
    Again(String),
    /// Never.
    For(String),
}

/// Another backend of the client's.
struct Entered {
    stream: LeaderStream,
    input: BytesMut,
    pid: i32,
    cancel_key: Bytes,
    /// Bodies of the `ParameterStatus` messages.
    parameters: Vec<Bytes>,
}

impl Session {
    /// A cycle begins when all that the client sent was answered.
    pub(super) fn look_at_cycle(&mut self) {
        // What the server owes may be ours: a BEGIN that was answered at once, and goes to it with what comes next, for example.
        let is_answered = self.wire.expects.iter().all(|expect| expect.is_hidden());
        if is_answered && !self.in_batch && !self.own_block && !self.skip_until_sync {
            let only_begun = self.wire.status == b'T' && self.only_begun;
            self.cycle.begin(self.wire.status, only_begun, self.wire.made_bytes());
            self.statements.begin_cycle();
        }
    }

    /// What a statement leaves behind for the next server.
    pub(super) fn note_stays(&mut self, plan: &Plan, text: &str, ok: bool) {
        self.only_begun &= matches!(plan.lane, Lane::Control(Control::Begin { .. }));
        self.has_temp_objects &= !(ok && plan.stays == Stays::All);
        // A lock that was taken stays when the statement fails later.
        let outlives_failure = matches!(plan.stays, Stays::Unmovable(_)) && plan.stays != Stays::UNREAD;
        if plan.stays != Stays::Nothing && (ok || outlives_failure) {
            self.carried.note(&plan.stays, text, self.open_savepoints());
        }
    }

    /// The server runs something of which nothing is known.
    pub(super) fn note_unknown(&mut self) {
        self.carried.note(&Stays::CODE, "", self.open_savepoints());
    }

    /// Called when the connection to the leader has ended. `Ok`: the session goes on at another server.
    pub(super) async fn move_on(&mut self, end: End) -> Result<(), End> {
        let is_lost = matches!(end, End::ServerGone | End::RolledBack);
        if !is_lost || !self.hub.replicates() || self.cycle.is_special || !self.is_leader_lost().await {
            return Err(end);
        }
        if let Some(why) = self.unmovable() {
            let what = format!("terminating connection: the leader's PostgreSQL was lost, and {why}");
            self.wire.farewell = None;
            self.tell_fatal(&ClientError::fatal("57P01", what, "Connect again; an open transaction was rolled back."))
                .await;
            return Err(End::Told);
        }
        let was_rolled_back = matches!(end, End::RolledBack);
        let repeats = self.cycle.may_be_repeated(self.wire.written_bytes);
        let lost_block = self.lost_block(was_rolled_back);
        // All that was done is committed, and nothing else was asked for.
        let asks = self.wire.expects.iter().any(|expect| !matches!(expect, Expect::Sync { .. }));
        let is_done = self.cycle.committed && self.wire.status == b'I' && !asks && !was_rolled_back;
        let begins_anew = repeats || self.cycle.is_idle();
        if begins_anew {
            let unseen = self.cycle.made_bytes.saturating_sub(self.wire.written_bytes);
            self.wire.to_client.truncate(usize::try_from(unseen).unwrap_or(usize::MAX));
        }
        let (lost_epoch, deadline) = (self.epoch, Instant::now() + Duration::from_millis(MOVE_MS_MAX));
        loop {
            match self.enter_next(lost_epoch).await {
                Ok(()) => break,
                Err(Stuck::Again(why)) if Instant::now() >= deadline => return Err(self.stay_behind(&why).await),
                Err(Stuck::Again(why)) => {
                    tracing::debug!(why, "a session can not move yet");
                    tokio::time::sleep(Duration::from_millis(AGAIN_MS)).await;
                }
                Err(Stuck::For(why)) => return Err(self.stay_behind(&why).await),
            }
        }
        tracing::debug!(repeats, lost_block, "a session goes on at another server");
        let cycle = &mut self.cycle;
        if begins_anew {
            let mut messages = cycle.take_messages();
            let (before, only_begun) = (cycle.status, cycle.only_begun);
            match before {
                b'T' if only_begun => {
                    self.hidden_query("BEGIN").await?;
                    self.only_begun = true;
                }
                b'T' | b'E' => {
                    self.enter_failed_block().await?;
                    self.lost_transaction = before == b'T';
                }
                _ => {}
            }
            messages.extend_from_slice(&self.wire.from_client);
            self.wire.from_client = messages;
            return Ok(());
        }
        let owing = cycle.owing;
        if lost_block {
            self.enter_failed_block().await?;
        }
        if !is_done {
            Self::lost_error().write(&mut self.wire.to_client);
        }
        if owing > 0 {
            build::ready_for_query(&mut self.wire.to_client, self.wire.status);
        } else {
            // The client's Sync is still to come, and ends what was lost.
            self.in_batch = true;
            self.skip_until_sync = !is_done;
        }
        Ok(())
    }

    fn lost_error() -> ClientError {
        ClientError::error(
            "40001",
            "the transaction was rolled back: the leader's PostgreSQL was lost before it was committed",
            "Try the transaction again; this connection is good.",
        )
    }

    /// Whether the client's own block was open when the leader was lost, and is not known to have ended.
    fn lost_block(&self, was_rolled_back: bool) -> bool {
        let by_client = self.wire.status != b'I' && !self.own_block;
        (self.cycle.status != b'I' || by_client) && !was_rolled_back && !self.cycle.committed
    }

    /// The server that was lost is the leader, and not this session's backend alone.
    async fn is_leader_lost(&self) -> bool {
        self.hub.reign_epoch() != Some(self.epoch) || !self.hub.leader_lives(self.epoch).await
    }

    /// Why this session can not be made again at another server.
    fn unmovable(&self) -> Option<&'static str> {
        if self.wire.is_inside_frame() {
            return Some("a row was sent in part");
        }
        if self.has_temp_objects {
            return Some("the session has made temporary objects");
        }
        if let Some(why) = self.carried.unmovable() {
            return Some(why);
        }
        let repeats = self.cycle.is_idle() || self.cycle.may_be_repeated(self.wire.written_bytes);
        // Which of several answers are owed is not known then.
        let one = self.cycle.owing <= 1 && (self.cycle.owing == 0 || matches!(self.cycle.last, b'Q' | b'F' | b'S'));
        (!repeats && !one).then_some("several transactions were under way in one go")
    }

    async fn stay_behind(&mut self, why: &str) -> End {
        let what =
            format!("terminating connection: the leader's PostgreSQL was lost, and the session could not go on: {why}");
        self.wire.farewell = None;
        self.tell_fatal(&ClientError::fatal("57P01", what, "Connect again; an open transaction was rolled back."))
            .await;
        End::Told
    }

    /// One attempt to begin once more, under the reign that serves.
    async fn enter_next(&mut self, lost_epoch: u64) -> Result<(), Stuck> {
        // Before the reign is looked at: its end is not missed.
        let lost = self.hub.leader_lost();
        let (epoch, secret) = self.next_reign(lost_epoch).await?;
        let limit = Duration::from_millis(LOGIN_MS_MAX);
        let again = |e: &dyn std::fmt::Display| Stuck::Again(e.to_string());
        let stream = tokio::time::timeout(limit, self.hub.leader_stream()).await;
        let stream = stream.map_err(|e| again(&e))?.map_err(|e| again(&e))?;
        let entered = tokio::time::timeout(limit, log_in(stream, &self.origin)).await.map_err(|e| again(&e))??;
        self.statements.settle(&mut self.wire.outcomes);
        self.wire.change_server(entered.stream, lost);
        self.wire.from_server = entered.input;
        self.wire.secret = Arc::clone(&secret);
        (self.epoch, self.secret, self.pid) = (epoch, secret, entered.pid);
        self.hub.cancels.move_key(&self.origin.cancel_key, Some(entered.cancel_key));
        self.forget_server();
        let made = self.wire.to_client.len();
        let restored = self.restore(entered.parameters).await;
        restored.map_err(|end| {
            self.wire.to_client.truncate(made);
            Stuck::Again(end.to_string())
        })
    }

    async fn next_reign(&self, lost_epoch: u64) -> Result<(u64, Arc<str>), Stuck> {
        let mut watch = self.hub.reign.subscribe();
        let next = watch.wait_for(|reign| match reign {
            Reign::Serving { epoch, .. } => *epoch != lost_epoch,
            Reign::Starting => false,
            Reign::Waiting(_) | Reign::Stopping => true,
        });
        match tokio::time::timeout(Duration::from_millis(MOVE_MS_MAX), next).await {
            Ok(Ok(reign)) => match &*reign {
                Reign::Serving { epoch, secret } => Ok((*epoch, Arc::clone(secret))),
                Reign::Waiting(why) => Err(Stuck::For(why.what.clone())),
                _ => Err(Stuck::For("pgtandem is stopping".to_owned())),
            },
            _ => Err(Stuck::For(format!("no server has led for {} s", MOVE_MS_MAX / 1000))),
        }
    }

    /// What is known of the backend that is gone.
    fn forget_server(&mut self) {
        (self.halves, self.once_turn, self.server_file, self.held_tag) = (None, None, None, None);
        (self.in_batch, self.synced_early, self.skip_until_sync) = (false, false, false);
        (self.has_own_catalog, self.ddl_under_way, self.settings_touched) = (false, false, false);
        (self.lost_transaction, self.only_begun) = (false, false);
        self.carried.end(false);
        self.reused = Reused::default();
        self.log = EffectLog::new(Arc::clone(&self.hub.spill));
        self.own_plans.clear();
        self.statements.end_server(self.cycle.may_be_repeated(self.wire.written_bytes));
        self.forget_transaction();
        self.facts = None;
        self.last_text = None;
    }

    /// Epoch, marks, settings, LISTENs, prepared statements.
    async fn restore(&mut self, parameters: Vec<Bytes>) -> Result<(), End> {
        start::enter(&mut self.wire, self.epoch, &self.secret.clone(), None).await?;
        self.take_context();
        self.give_marks_back();
        for mark in &mut self.marks {
            *mark = Some(self.hub.marks.take(&self.database).ok_or(End::ServerGone)?);
        }
        let made = self.wire.to_client.len();
        let told = self.wire.told_parameters.clone();
        for body in parameters {
            self.wire.note_parameter(&body);
        }
        for text in self.carried.texts().cloned().collect::<Vec<_>>() {
            // As it was answered before, so it is now; an error, of a role that is gone, say, comes again when it matters.
            let sent = self.encoded(&text).into_owned();
            self.wire.clear_results();
            self.wire.hide_errors = true;
            build::query(&mut self.wire.to_server, &sent);
            self.wire.expects.push_back(Expect::Query { mode: Mode::Hidden });
            let done = self.wire.pump(Until::Answered).await;
            self.wire.hide_errors = false;
            done?;
        }
        // The client hears of what is another value in the end than it was told last.
        self.wire.to_client.truncate(made);
        for (name, value) in &self.wire.told_parameters {
            if told.get(name) != Some(value) {
                build::frame(&mut self.wire.to_client, b'S', |b| {
                    for part in [name, value] {
                        b.extend_from_slice(part);
                        b.extend_from_slice(b"\0");
                    }
                });
            }
        }
        self.facts = None;
        self.prepare_again().await
    }

    /// The client's prepared statements, by the names that it has given them.
    async fn prepare_again(&mut self) -> Result<(), End> {
        for (name, prepared) in self.statements.all() {
            let text = match &prepared.plan.lane {
                Lane::Admin(_) => continue,
                Lane::Write(write) => write.leader_text(&prepared.text, &prepared.shape),
                _ => None,
            };
            let text = text.as_deref().unwrap_or(&prepared.text);
            let text = format!("{:indent$}{text}", "", indent = prepared.indent);
            let text = self.encoded(&text).into_owned();
            // Numbers of types that users have made are each server's own.
            let types: &[u8] = if parameters::has_user_types(&prepared.types) { &[] } else { &prepared.types };
            build::parse(&mut self.wire.to_server, &name, &text, types);
            build::sync(&mut self.wire.to_server);
            self.wire.expects.extend([Expect::Parse { hidden: true }, Expect::Sync { hidden: true }]);
            self.wire.clear_results();
            self.wire.hide_errors = true;
            let done = self.wire.pump(Until::Answered).await;
            self.wire.hide_errors = false;
            done?;
            if self.wire.results.error.take().is_some() {
                self.statements.deallocate(&name);
            }
        }
        Ok(())
    }

    /// A block that has failed, as the client's is: nothing is run in it before its ROLLBACK.
    async fn enter_failed_block(&mut self) -> Result<(), End> {
        self.hidden_query("BEGIN").await?;
        self.fail_block(&Self::lost_error()).await
    }

    /// The first message after a transaction was lost while its client was silent. True: it is answered.
    ///
    /// # Errors
    /// If the connection to the leader ends.
    pub(super) async fn tell_lost_transaction(&mut self, tag: u8, frame: &Bytes) -> Result<bool, End> {
        let body = frame::body(frame);
        let text: &[u8] = match tag {
            b'Q' => body.strip_suffix(b"\0").unwrap_or(body),
            b'P' => message::Parse::read(body).map_err(End::ClientProtocol)?.text,
            b'B' => {
                let bind = message::Bind::read(body).map_err(End::ClientProtocol)?;
                match self.statements.prepared(bind.statement).map(|p| &p.plan.lane) {
                    Some(Lane::Control(Control::Rollback { .. })) => &b"rollback"[..],
                    _ => b"",
                }
            }
            b'D' | b'E' | b'F' => b"",
            _ => return Ok(false),
        };
        let text = String::from_utf8_lossy(text);
        let first = words(&text).next().unwrap_or_default().to_ascii_lowercase();
        self.lost_transaction = false;
        if matches!(first.as_str(), "rollback" | "abort") {
            return Ok(false);
        }
        let error = Self::lost_error();
        if tag != b'Q' && tag != b'F' {
            error.write(&mut self.wire.to_client);
            (self.in_batch, self.skip_until_sync) = (true, true);
            return Ok(true);
        }
        if matches!(first.as_str(), "commit" | "end") {
            self.hidden_query("ROLLBACK").await?;
            self.forget_transaction();
        }
        error.write(&mut self.wire.to_client);
        build::ready_for_query(&mut self.wire.to_client, self.wire.status);
        Ok(true)
    }
}

/// The login, as the client did it.
async fn log_in(mut stream: LeaderStream, origin: &Origin) -> Result<Entered, Stuck> {
    let lost = |e: &dyn std::fmt::Display| Stuck::Again(e.to_string());
    let mut input = BytesMut::with_capacity(READ_BYTES);
    let mut out = BytesMut::from(&origin.start.packet[..]);
    let (mut pid, mut cancel_key, mut parameters) = (0, Bytes::new(), Vec::new());
    let mut login: Option<Login<'_>> = None;
    loop {
        stream.write_all(&out).await.map_err(|e| lost(&e))?;
        stream.flush().await.map_err(|e| lost(&e))?;
        out.clear();
        loop {
            let Some(frame) = frame::take(&mut input, Sender::Server).map_err(|e| lost(&e))? else { break };
            let frame = frame.freeze();
            let body = frame.slice(frame::HEADER_BYTES..);
            match frame[0] {
                b'R' => answer(&body, origin, &mut login, &mut out)?,
                b'S' => parameters.push(body),
                b'K' => {
                    pid = Reader::new(b'K', &body).i32().map_err(|e| lost(&e))?;
                    cancel_key = body;
                }
                b'E' => {
                    let (sqlstate, message) = message::error_summary(&body);
                    let again = sqlstate.starts_with("57P") || sqlstate == "53300";
                    return Err(if again { Stuck::Again(message) } else { Stuck::For(message) });
                }
                b'Z' => return Ok(Entered { stream, input, pid, cancel_key, parameters }),
                _ => {}
            }
        }
        if out.is_empty() {
            match stream.read_buf(&mut input).await {
                Ok(n) if n > 0 => {}
                Ok(_) => return Err(Stuck::Again("the server closed the connection".to_owned())),
                Err(e) => return Err(lost(&e)),
            }
        }
    }
}

/// Answers an authentication message.
fn answer<'k>(body: &[u8], origin: &'k Origin, login: &mut Option<Login<'k>>, out: &mut BytesMut) -> Result<(), Stuck> {
    let code = Reader::new(b'R', body).u32().map_err(|e| Stuck::For(e.to_string()))?;
    match (code, &origin.client_key) {
        // It lets the role in, or has believed the proof.
        (0 | 12, _) => {}
        (10, Some(key)) => {
            let random: [u8; 18] = rand::random();
            let first = login.insert(Login::new(key, random)).first();
            build::frame(out, b'p', |b| {
                b.extend_from_slice(scram::MECHANISM.as_bytes());
                b.extend_from_slice(b"\0");
                b.extend_from_slice(&u32::try_from(first.len()).unwrap_or(0).to_be_bytes());
                b.extend_from_slice(first.as_bytes());
            });
        }
        (11, _) => {
            let last = login.as_ref().and_then(|login| login.last(body));
            let last =
                last.ok_or_else(|| Stuck::For("the server did not answer the login as SCRAM does".to_owned()))?;
            build::frame(out, b'p', |b| b.extend_from_slice(last.as_bytes()));
        }
        _ => {
            let what = "the server asks for a password in a way that only its client can answer (use scram-sha-256)";
            return Err(Stuck::For(what.to_owned()));
        }
    }
    Ok(())
}
