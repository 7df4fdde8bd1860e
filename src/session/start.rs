//! The start of a session: the login at the leader, and what we add to it. The client's first packets are [`greet`]'s.
//!
//! The authentication exchange is passed through. Before the client hears that it is in, the session enters the epoch,
//! prepares the statements that the proxy needs, and reads its own context.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use tokio::net::TcpStream;
use tokio_util::sync::CancellationToken;

use crate::observe::status::Problem;
use crate::pg::build::{self, ClientError};
use crate::pg::frame::{self, Sender};
use crate::pg::message::{self, Reader};
use crate::pg::scram::Observed;
use crate::pg::startup::SessionStart;
use crate::replicate::effects::EffectLog;
use crate::replicate::hub::{Hub, Reign};
use crate::replicate::leader::LeaderStream;
use crate::replicate::schema;
use crate::session::greet::{self, Greeted};
use crate::session::moving::Origin;
use crate::session::run::{Session, Thread};
use crate::session::tls::ClientTls;
use crate::session::wire::{End, Expect, Mode, Until, Wire};

/// From connect to login.
const LOGIN_MS_MAX: u64 = 60_000;
/// How long a new client waits while the leader's PostgreSQL comes back.
const REIGN_MS_MAX: u64 = 30_000;
const CONNECT_POLL_MS: u64 = 50;
/// Leaders that end during one login before the client is told.
const LOGINS_MAX: u32 = 10;

/// Serves one client to its end.
pub async fn serve(client: TcpStream, hub: Arc<Hub>, thread: Thread) {
    let _ = client.set_nodelay(true);
    let limit = Duration::from_millis(LOGIN_MS_MAX);
    let tls = thread.tls.clone();
    let Ok(Some(mut greeted)) = tokio::time::timeout(limit, greet::greet(client, &hub, tls.as_deref())).await else {
        return;
    };
    for attempt in 1.. {
        let leader = match tokio::time::timeout(limit, connect_leader(&hub, &greeted.start.database)).await {
            Ok(Ok(leader)) => leader,
            Ok(Err(error)) => return greet::tell(&mut greeted.client, &error).await,
            Err(_) => return,
        };
        match log_in(&hub, thread.clone(), greeted, leader).await {
            Login::In(session) => {
                hub.counters.sessions.fetch_add(1, Ordering::Relaxed);
                session.run().await;
                hub.counters.sessions.fetch_sub(1, Ordering::Relaxed);
                return;
            }
            Login::Unheard(again) if attempt < LOGINS_MAX => greeted = again,
            Login::Unheard(mut last) => return greet::tell(&mut last.client, &not_yet()).await,
            Login::Ended => return,
        }
        tokio::time::sleep(Duration::from_millis(CONNECT_POLL_MS)).await;
    }
}

/// What came of a login.
enum Login {
    In(Box<Session>),
    /// The leader ended before the client heard anything: another one is asked.
    Unheard(Greeted),
    /// The client was told why, or has left.
    Ended,
}

/// Tells a client that this proxy must not serve. libpq tries its next host then.
pub async fn refuse(client: TcpStream, hub: &Hub, tls: Option<&ClientTls>, why: &Problem) {
    let limit = Duration::from_millis(LOGIN_MS_MAX);
    if let Ok(Some(mut greeted)) = tokio::time::timeout(limit, greet::greet(client, hub, tls)).await {
        greet::tell(&mut greeted.client, &not_here(why)).await;
    }
}

fn not_here(why: &Problem) -> ClientError {
    let Problem { what, hint } = why;
    let hint = format!("Connect to the host whose proxy serves. To see it, and what to type: pgtandem status ({hint})");
    ClientError::fatal("57P03", format!("no client is served on this host: {what}"), hint)
}

/// A connection to the leader's PostgreSQL, and the reign under which it was made.
struct Leader {
    server: LeaderStream,
    lost: CancellationToken,
    epoch: u64,
    secret: Arc<str>,
}

/// Waits while the database is created, copied, renamed or dropped.
async fn may_connect(hub: &Hub, database: &str) -> Result<(), ClientError> {
    let wait = hub.nodewise.may_connect(database);
    tokio::time::timeout(Duration::from_millis(REIGN_MS_MAX), wait).await.map_err(|_| {
        let what = format!("database \"{database}\" is being created, copied, renamed or dropped");
        ClientError::fatal("57P03", what, "Connect again in a moment.")
    })
}

/// A connection to the leader's PostgreSQL, which its agent may just be starting again.
async fn connect_leader(hub: &Hub, database: &str) -> Result<Leader, ClientError> {
    may_connect(hub, database).await?;
    let deadline = Instant::now() + Duration::from_millis(REIGN_MS_MAX);
    loop {
        // Before the reign is looked at: its end is not missed.
        let lost = hub.leader_lost();
        let (epoch, secret) = reign(hub).await?;
        match hub.leader_stream().await {
            Ok(server) => return Ok(Leader { server, lost, epoch, secret }),
            Err(_) if Instant::now() < deadline => tokio::time::sleep(Duration::from_millis(CONNECT_POLL_MS)).await,
            Err(e) => {
                let what = format!("the leader's PostgreSQL does not accept connections: {e}");
                return Err(ClientError::fatal("57P03", what, "Try again in a moment, or type: pgtandem status"));
            }
        }
    }
}

async fn reign(hub: &Hub) -> Result<(u64, Arc<str>), ClientError> {
    let mut watch = hub.reign.subscribe();
    let serving = watch.wait_for(|r| matches!(r, Reign::Serving { .. } | Reign::Waiting(_) | Reign::Stopping));
    match tokio::time::timeout(Duration::from_millis(REIGN_MS_MAX), serving).await {
        Ok(Ok(reign)) => {
            if let Reign::Serving { epoch, secret } = &*reign {
                return Ok((*epoch, Arc::clone(secret)));
            }
            Err(match &*reign {
                Reign::Waiting(why) => not_here(why),
                _ => ClientError::fatal("57P03", "pgtandem is stopping", "Connect again when it is started."),
            })
        }
        _ => Err(ClientError::fatal(
            "57P03",
            "the leader's PostgreSQL is not there yet",
            "Try again in a moment, or type: pgtandem status",
        )),
    }
}

async fn log_in(hub: &Arc<Hub>, thread: Thread, greeted: Greeted, leader: Leader) -> Login {
    let Greeted { client, start, rest } = greeted;
    let Leader { server, lost, epoch, secret } = leader;
    let mut wire = Wire::new(client, server, lost, rest);
    let limit = Duration::from_millis(LOGIN_MS_MAX);
    let LoggedIn { pid, cancel_key, scram, ready } =
        match tokio::time::timeout(limit, authenticate(&mut wire, &start)).await {
            Ok(Ok(done)) => done,
            Ok(Err(End::ServerGone)) => return tell_not_yet(wire, start).await,
            Ok(Err(_)) | Err(_) => return Login::Ended,
        };
    let database: Arc<str> = start.database.as_str().into();
    let verifier_of = scram.is_whole().then_some(start.user.as_str());
    let client_key = match enter(&mut wire, epoch, &secret, verifier_of).await {
        Ok(verifier) => verifier.and_then(|verifier| scram.client_key(std::str::from_utf8(&verifier).ok()?)),
        Err(End::ServerGone) => return tell_not_yet(wire, start).await,
        // Not the database's fault: a new epoch was raised meanwhile.
        Err(End::Told) if hub.reign_epoch() != Some(epoch) => return tell_not_yet(wire, start).await,
        Err(End::Told) => {
            let (sqlstate, message) = message::error_summary(wire.results.error.as_deref().unwrap_or_default());
            tracing::warn!(database = &*database, sqlstate, message, "a session could not enter the database");
            let what = format!("database \"{database}\" can not be used through pgtandem: {message}");
            let hint = "It has no schema pgtandem of this epoch: restart the proxy, which creates it.";
            ClientError::fatal("55000", what, hint).write(&mut wire.to_client);
            let _ = wire.flush_client().await;
            return Login::Ended;
        }
        Err(_) => return Login::Ended,
    };
    // It may have become a database while the client logged in.
    if !hub.replicates() && !hub.marks.knows(&database) {
        // It was created since the proxy started, and no mark of it is ever used.
        hub.marks.load(&database, Vec::new());
    }
    let known = hub.marks.knows(&database) || may_connect(hub, &database).await.is_ok();
    let (Some(first), Some(second)) = (hub.marks.take(&database).filter(|_| known), hub.marks.take(&database)) else {
        // While an epoch is raised no marks are known.
        if hub.reign_epoch() != Some(epoch) {
            return tell_not_yet(wire, start).await;
        }
        let what = format!("database \"{database}\" has no free mark");
        ClientError::fatal("53300", what, "Close connections, or restart the proxy if the database is new.")
            .write(&mut wire.to_client);
        let _ = wire.flush_client().await;
        return Login::Ended;
    };
    let origin = Origin { start, cancel_key, client_key };
    let mut session = Session::new(Arc::clone(hub), thread, wire, origin, pid, secret, [first, second]);
    session.epoch = epoch;
    session.take_context();
    session.log = EffectLog::new(Arc::clone(&hub.spill));
    session.wire.to_client.extend_from_slice(&ready);
    match session.wire.flush_client().await {
        Ok(()) => Login::In(Box::new(session)),
        Err(_) => {
            session.leave();
            Login::Ended
        }
    }
}

fn not_yet() -> ClientError {
    ClientError::fatal(
        "57P03",
        "the leader's PostgreSQL ended during the login",
        "Connect again in a moment, or type: pgtandem status",
    )
}

/// The leader's PostgreSQL ended during the login. What it said itself, if it did, is the last word; if that is only that it ends, or nothing,
/// and the client has heard nothing either, it may begin again elsewhere.
async fn tell_not_yet(mut wire: Wire, start: SessionStart) -> Login {
    let farewell = wire.farewell.take();
    let only_ends = farewell.as_ref().is_none_or(|said| message::error_summary(frame::body(said)).0.starts_with("57P"));
    if only_ends && wire.written_bytes == 0 {
        return Login::Unheard(Greeted { client: wire.client, start, rest: wire.from_client });
    }
    match farewell {
        Some(farewell) => wire.to_client.extend_from_slice(&farewell),
        None => not_yet().write(&mut wire.to_client),
    }
    let _ = wire.flush_client().await;
    Login::Ended
}

/// A login that was passed through.
struct LoggedIn {
    /// The backend's process id.
    pid: i32,
    /// What the client cancels with.
    cancel_key: Bytes,
    scram: Observed,
    /// The `ReadyForQuery` that the client does not have yet.
    ready: BytesMut,
}

async fn authenticate(wire: &mut Wire, start: &SessionStart) -> Result<LoggedIn, End> {
    wire.to_server.extend_from_slice(&start.packet);
    wire.flush_server().await?;
    let (mut pid, mut cancel_key, mut scram) = (0, Bytes::new(), Observed::default());
    loop {
        while let Some(frame) = frame::take(&mut wire.from_server, Sender::Server).map_err(End::ServerProtocol)? {
            match frame[0] {
                b'Z' => return Ok(LoggedIn { pid, cancel_key, scram, ready: frame }),
                // Passed on when the connection has ended: nobody is told twice.
                b'E' if message::is_fatal(frame::body(&frame)) => {
                    wire.farewell = Some(frame);
                    continue;
                }
                b'K' => {
                    pid = Reader::new(b'K', frame::body(&frame)).i32().map_err(End::ServerProtocol)?;
                    cancel_key = Bytes::copy_from_slice(frame::body(&frame));
                }
                b'R' => scram.server(frame::body(&frame)),
                b'S' => drop(wire.note_parameter(frame::body(&frame))),
                _ => {}
            }
            wire.to_client.extend_from_slice(&frame);
        }
        wire.flush_client().await?;
        while let Some(frame) = frame::take(&mut wire.from_client, Sender::Client).map_err(End::ClientProtocol)? {
            // Passwords, SASL and GSS answers are all of this type; nothing else belongs here.
            if frame[0] != b'p' {
                return Err(End::ClientGone);
            }
            scram.client(frame::body(&frame));
            wire.to_server.extend_from_slice(&frame);
        }
        wire.flush_server().await?;
        wire.fill_either().await?;
    }
}

/// Enters the epoch, prepares our statements and reads the context, all in one flight. Gives the verifier of this role, if it is asked for.
pub(super) async fn enter(
    wire: &mut Wire,
    epoch: u64,
    secret: &str,
    verifier_of: Option<&str>,
) -> Result<Option<Bytes>, End> {
    wire.hide_errors = true;
    let out = &mut wire.to_server;
    let epoch = epoch.to_string();
    build::parse(out, b"pgtandem_enter", b"SELECT pgtandem.enter($1, $2)", &[]);
    build::bind_text(out, b"", b"pgtandem_enter", &[Some(secret.as_bytes()), Some(epoch.as_bytes())]);
    build::execute(out, b"", 0);
    let (bind, execute) = (Expect::Bind { hidden: true }, Expect::Execute { mode: Mode::Hidden });
    wire.expects.extend([Expect::Parse { hidden: true }, bind, execute]);
    for (name, text) in schema::PREPARED {
        build::parse(out, name.as_bytes(), text.as_bytes(), &[]);
        wire.expects.push_back(Expect::Parse { hidden: true });
    }
    if let Some(role) = verifier_of {
        build::bind_text(out, b"", b"pgtandem_verifier", &[Some(secret.as_bytes()), Some(role.as_bytes())]);
        build::execute(out, b"", 0);
        wire.expects.extend([bind, execute]);
    }
    build::bind_text(out, b"", b"pgtandem_context", &[]);
    build::execute(out, b"", 0);
    build::sync(out);
    wire.expects.extend([bind, execute, Expect::Sync { hidden: true }]);
    wire.pump(Until::Answered).await?;
    wire.hide_errors = false;
    if wire.results.error.is_some() {
        return Err(End::Told);
    }
    // The context is taken by the session.
    let verifier = if verifier_of.is_some() { wire.results.values.get(1).cloned().flatten() } else { None };
    Ok(verifier)
}
