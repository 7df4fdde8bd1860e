//! The relay: what B's walreceiver believes to be its primary. It passes WAL on and stops at exactly X.
//!
//! Protocol in [`session`], the limit in [`fence`], both pure; here are the socket and the tasks. It stores nothing:
//! when PostgreSQL connects anew, a new wal channel to the source begins where PostgreSQL says.
//!
//! ```text
//! A's agent -- wal channel --> Fence --> Session --> unix socket (folder 0700) --> walreceiver
//!           <-- acknowledge -----------------------------------------------------  feedback
//! ```

pub mod fence;
pub mod session;

use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use pgtandem_proto::message::{Failure, Lsn, WalReply};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::Notify;
use tokio::task::{JoinHandle, JoinSet};

use super::error::SyncError;
use super::target::Source;
use super::wal::segment_start;
use super::wal_stream::WalStream;
use fence::{Fence, FenceError};
use session::{Event, Identity, Session};

/// Longest path of a unix socket that PostgreSQL and Linux take, with room to spare.
pub const SOCKET_PATH_BYTES_MAX: usize = 100;
/// Port in the name of the socket; nothing listens on it.
pub const RELAY_PORT: u16 = 5432;
/// Connections at once. A walreceiver has one; a second may begin while the first one ends.
const CONNECTIONS_MAX: usize = 4;
/// Pause between two signs of life, milliseconds; a walreceiver waits 60 s.
const KEEPALIVE_MS: u64 = 1000;
/// Bytes collected for one write to the socket.
const WRITE_BYTES_MAX: usize = 1 << 20;
const READ_BYTES: usize = 8192;

/// What is known about the stream at this moment.
#[derive(Clone, Debug, Default)]
pub struct RelayStatus {
    /// A walreceiver is streaming.
    pub streaming: bool,
    /// Last flushed position of the source that is known here.
    pub source_flushed: u64,
    /// How far PostgreSQL says that it has written and replayed.
    pub flushed: u64,
    pub applied: u64,
    /// WAL that came through, bytes.
    pub received_bytes: u64,
    /// Why the source can not give WAL, if it said so.
    pub failure: Option<Failure>,
}

/// A running relay. Its socket and connections end when it is dropped.
#[derive(Debug)]
pub struct Relay {
    shared: Arc<Shared>,
    folder: PathBuf,
    task: JoinHandle<()>,
}

struct Shared {
    source: Arc<dyn Source>,
    identity: Identity,
    wal_segment_bytes: u32,
    /// Locked for moments only, never across an await. Handing over happens under it, so that a hold is exact.
    fence: Mutex<Fence>,
    status: Mutex<RelayStatus>,
    /// The limit moved.
    moved: Notify,
}

impl std::fmt::Debug for Shared {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("Shared").field("identity", &self.identity).finish_non_exhaustive()
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Relay {
    /// Listens in `folder`, which gets mode 0700. `known`: PostgreSQL has WAL up to here already.
    pub fn start(
        folder: &Path,
        source: Arc<dyn Source>,
        identity: Identity,
        wal_segment_bytes: u32,
        known: Lsn,
    ) -> Result<Relay, SyncError> {
        let socket = folder.join(format!(".s.PGSQL.{RELAY_PORT}"));
        if socket.as_os_str().len() > SOCKET_PATH_BYTES_MAX {
            return Err(SyncError::refused(
                format!(
                    "the path {} is longer than {SOCKET_PATH_BYTES_MAX} bytes, too long for a socket",
                    socket.display()
                ),
                "Set a shorter socket_dir for this node.",
            ));
        }
        make_folder(folder).map_err(|error| SyncError::file("making", folder, error))?;
        match std::fs::remove_file(&socket) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(SyncError::file("removing", &socket, error));
            }
            _ => {}
        }
        let listener = UnixListener::bind(&socket).map_err(|error| SyncError::file("listening on", &socket, error))?;
        let shared = Arc::new(Shared {
            source,
            identity,
            wal_segment_bytes,
            fence: Mutex::new(Fence::new(known)),
            status: Mutex::new(RelayStatus { source_flushed: known.0, ..RelayStatus::default() }),
            moved: Notify::new(),
        });
        let task = tokio::spawn(accept(listener, Arc::clone(&shared)));
        Ok(Relay { shared, folder: folder.to_path_buf(), task })
    }

    /// The folder of its socket, for `primary_conninfo`.
    #[must_use]
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    #[must_use]
    pub fn status(&self) -> RelayStatus {
        lock(&self.shared.status).clone()
    }

    /// Hands over nothing more. -> the position beyond which nothing was handed over
    #[must_use]
    pub fn hold(&self) -> Lsn {
        lock(&self.shared.fence).hold()
    }

    /// Hands over WAL up to exactly `x`. An error if more was handed over before; then nothing changes.
    pub fn release_to(&self, x: Lsn) -> Result<(), FenceError> {
        lock(&self.shared.fence).release_to(x)?;
        // Whoever is about to wait finds the permit.
        self.shared.moved.notify_one();
        Ok(())
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.task.abort();
        let _ = std::fs::remove_file(self.folder.join(format!(".s.PGSQL.{RELAY_PORT}")));
    }
}

fn make_folder(folder: &Path) -> std::io::Result<()> {
    std::fs::DirBuilder::new().recursive(true).mode(0o700).create(folder)?;
    std::fs::set_permissions(folder, std::fs::Permissions::from_mode(0o700))
}

async fn accept(listener: UnixListener, shared: Arc<Shared>) {
    // Ends its tasks when it is dropped.
    let mut connections = JoinSet::new();
    loop {
        while connections.try_join_next().is_some() {}
        match listener.accept().await {
            Ok((stream, _)) if connections.len() < CONNECTIONS_MAX => {
                let shared = Arc::clone(&shared);
                connections.spawn(async move {
                    if let Err(error) = serve(stream, &shared).await {
                        tracing::info!(%error, "a walreceiver's connection to the relay ended");
                    }
                    lock(&shared.status).streaming = false;
                });
            }
            Ok(_) => tracing::warn!("the relay has {CONNECTIONS_MAX} connections; one more is refused"),
            Err(error) => {
                tracing::warn!(%error, "the relay can not accept a connection");
                tokio::time::sleep(Duration::from_millis(KEEPALIVE_MS)).await;
            }
        }
    }
}

/// One walreceiver, until it or the source goes.
async fn serve(mut stream: UnixStream, shared: &Shared) -> Result<(), SyncError> {
    let mut session = Session::new(shared.identity.clone());
    let mut wal: Option<WalStream> = None;
    let mut buffer = vec![0; READ_BYTES];
    let mut keepalive = tokio::time::interval(Duration::from_millis(KEEPALIVE_MS));
    loop {
        flush(&mut stream, &mut session).await?;
        let room = lock(&shared.fence).has_room();
        tokio::select! {
            read = stream.read(&mut buffer) => {
                let count = read.map_err(socket_error)?;
                if count == 0 {
                    return Ok(());
                }
                session.handle_bytes(buffer.get(..count).unwrap_or_default());
                while let Some(event) = session.poll_event().map_err(|error| SyncError::Protocol(error.to_string()))? {
                    match event {
                        Event::Identify => {
                            shared.ask_position().await;
                            session.handle_position(Lsn(lock(&shared.status).source_flushed));
                        }
                        Event::Start { from } => wal = begin(shared, &mut session, from).await,
                        Event::Feedback { flushed, applied, reply_requested, .. } => {
                            shared.note_feedback(flushed, applied);
                            if let Some(wal) = &mut wal {
                                wal.acknowledge(segment_start(flushed, shared.wal_segment_bytes)).await?;
                            }
                            if reply_requested {
                                session.handle_keepalive(shared.end(), now_us(), false);
                            }
                        }
                        Event::End => wal = None,
                    }
                }
            }
            reply = receive(&mut wal), if wal.is_some() && room => {
                if let Err(error) = shared.note_reply(reply?) {
                    if let SyncError::Peer(failure) = &error {
                        lock(&shared.status).failure = Some(failure.clone());
                    }
                    return Err(error);
                }
            }
            () = shared.moved.notified(), if wal.is_some() => {}
            _ = keepalive.tick() => session.handle_keepalive(shared.end(), now_us(), false),
        }
        if wal.is_some() {
            hand_over(&mut stream, &mut session, shared).await?;
        }
    }
}

/// Everything that the limit lets through now.
async fn hand_over(stream: &mut UnixStream, session: &mut Session, shared: &Shared) -> Result<(), SyncError> {
    let mut collected = 0;
    loop {
        let next = lock(&shared.fence).poll_wal();
        let Some((start, bytes)) = next else { return Ok(()) };
        session.handle_wal(start, &bytes, shared.end(), now_us());
        collected += bytes.len();
        if collected >= WRITE_BYTES_MAX {
            flush(stream, session).await?;
            collected = 0;
        }
    }
}

async fn flush(stream: &mut UnixStream, session: &mut Session) -> Result<(), SyncError> {
    let output = session.take_output();
    if output.is_empty() { Ok(()) } else { stream.write_all(&output).await.map_err(socket_error) }
}

#[allow(clippy::needless_pass_by_value, reason = "it is used with map_err")]
fn socket_error(error: std::io::Error) -> SyncError {
    SyncError::Closed { channel: "relay", reason: error.to_string() }
}

async fn receive(wal: &mut Option<WalStream>) -> Result<WalReply, SyncError> {
    match wal {
        Some(wal) => wal.link.incoming.expect().await,
        None => std::future::pending().await,
    }
}

/// Opens a wal channel from `from`; tells the walreceiver if there is none.
async fn begin(shared: &Shared, session: &mut Session, from: Lsn) -> Option<WalStream> {
    match open(shared, from).await {
        Ok(wal) => {
            lock(&shared.fence).handle_restart(from);
            let mut status = lock(&shared.status);
            status.streaming = true;
            status.failure = None;
            drop(status);
            session.handle_started();
            Some(wal)
        }
        Err(error) => {
            tracing::info!(%error, "the relay has no WAL for the walreceiver");
            if matches!(error, SyncError::Peer(_) | SyncError::Refused { .. }) {
                lock(&shared.status).failure = Some(error.failure());
            }
            session.handle_failure(&error.to_string());
            None
        }
    }
}

async fn open(shared: &Shared, from: Lsn) -> Result<WalStream, SyncError> {
    let wal = WalStream::open(shared.source.as_ref(), from, shared.identity.timeline).await?;
    if wal.system_identifier != shared.identity.system_identifier {
        return Err(SyncError::refused(
            "the source is another cluster than the one that this node was filled from",
            "Fill this node again.",
        ));
    }
    shared.note_flushed(wal.flushed);
    Ok(wal)
}

impl Shared {
    /// How far WAL may be had from us: what the source has flushed, up to the limit.
    fn end(&self) -> Lsn {
        let flushed = lock(&self.status).source_flushed;
        let limit = lock(&self.fence).limit();
        Lsn(limit.map_or(flushed, |limit| limit.0.min(flushed)))
    }

    /// Asks the source how far it has flushed by now. If it can not be asked, what is known stands.
    async fn ask_position(&self) {
        let known = Lsn(lock(&self.status).source_flushed);
        match open(self, segment_start(known, self.wal_segment_bytes)).await {
            Ok(_) => {}
            Err(error) => tracing::info!(%error, "the relay could not ask the source for its position"),
        }
    }

    fn note_flushed(&self, flushed: Lsn) {
        let mut status = lock(&self.status);
        status.source_flushed = status.source_flushed.max(flushed.0);
    }

    fn note_feedback(&self, flushed: Lsn, applied: Lsn) {
        let mut status = lock(&self.status);
        status.flushed = status.flushed.max(flushed.0);
        status.applied = status.applied.max(applied.0);
    }

    fn note_reply(&self, reply: WalReply) -> Result<(), SyncError> {
        match reply {
            WalReply::Data { start, flushed, bytes } => {
                lock(&self.status).received_bytes += bytes.len() as u64;
                self.note_flushed(flushed);
                lock(&self.fence).handle_wal(start, bytes).map_err(|error| SyncError::Protocol(error.to_string()))
            }
            WalReply::Flushed { flushed } => {
                self.note_flushed(flushed);
                Ok(())
            }
            WalReply::Failed(failure) => Err(SyncError::Peer(failure)),
            WalReply::Started { .. } => Err(SyncError::Protocol("a wal channel started twice".into())),
        }
    }
}

fn now_us() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_micros()).unwrap_or(i64::MAX)
}
