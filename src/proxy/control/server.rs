//! The socket: who may connect (its mode), how much they may send, how many at once. Knows nothing of the commands.

use std::fs;
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use serde::Serialize;
use thiserror::Error;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::unix::OwnedWriteHalf;
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};

use super::message::{ControlAnswer, ControlFailure, ControlRequest, LINE_BYTES_MAX};
use crate::recovery::report::CauseKind;

/// Commands connected at once.
const CONNECTIONS_MAX: usize = 32;
/// Longest wait for the next request on a connection.
const REQUEST_WAIT_MAX: Duration = Duration::from_secs(60);
/// Longest wait until a command takes a line.
const WRITE_MAX: Duration = Duration::from_secs(10);
/// Owner and group may connect: whoever may connect may detach nodes.
const MODE: u32 = 0o660;

#[derive(Debug, Error)]
pub enum ControlError {
    #[error("another proxy answers on {}", .0.display())]
    InUse(PathBuf),
    #[error("{} is in the way: it is not a socket", .0.display())]
    NotASocket(PathBuf),
    #[error("{} is too long for a unix socket (107 bytes at most)", .0.display())]
    TooLong(PathBuf),
    #[error("cannot make {}: {source}", path.display())]
    Io { path: PathBuf, source: io::Error },
}

impl ControlError {
    /// The next thing to do.
    #[must_use]
    pub fn hint(&self) -> String {
        match self {
            Self::InUse(_) => "stop the other proxy first; one proxy serves a state folder".into(),
            Self::NotASocket(path) => format!("move {} away", path.display()),
            Self::TooLong(_) => "set proxy.state_dir to a shorter path".into(),
            Self::Io { .. } => "check that the proxy's user may write to proxy.state_dir".into(),
        }
    }
}

/// Answers requests. Each gets any number of progress lines and one last line.
pub trait Handler: Send + Sync + 'static {
    /// Answers with a last line; writes progress before it through `answers`. An error of `answers` means that the
    /// command is gone, and is handed back with `?`.
    fn handle(
        &self,
        request: ControlRequest,
        answers: &mut Answers,
    ) -> impl Future<Output = io::Result<ControlAnswer>> + Send;
}

/// The way back to one command.
#[derive(Debug)]
pub struct Answers {
    stream: OwnedWriteHalf,
}

impl Answers {
    pub async fn send<T: Serialize + Sync>(&mut self, line: &T) -> io::Result<()> {
        let mut text = serde_json::to_vec(line)?;
        text.push(b'\n');
        timeout(WRITE_MAX, self.stream.write_all(&text)).await.map_err(|_| io::Error::from(io::ErrorKind::TimedOut))?
    }
}

/// Serves the socket at `path` until `stop`, then ends every connection and removes the socket.
/// A socket that a dead proxy left is replaced; one that answers is not.
pub async fn serve<H: Handler>(path: &Path, handler: Arc<H>, stop: CancellationToken) -> Result<(), ControlError> {
    let listener = bind(path).await?;
    let mine = fs::metadata(path).map(|meta| (meta.dev(), meta.ino())).ok();
    let permits = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    let mut connections = JoinSet::new();
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            Some(_) = connections.join_next() => continue,
            () = stop.cancelled() => break,
        };
        match accepted {
            Ok((stream, _)) => {
                let (handler, permits) = (handler.clone(), permits.clone());
                connections.spawn(async move {
                    let result = match permits.try_acquire() {
                        Ok(_permit) => answer(stream, &*handler).await,
                        Err(_) => refuse(stream).await,
                    };
                    if let Err(error) = result {
                        debug!(%error, "a command on control.sock went away");
                    }
                });
            }
            Err(error) => {
                warn!(%error, "control.sock can not accept");
                // Out of file descriptors, say: not in a tight loop.
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
    connections.shutdown().await;
    if fs::metadata(path).map(|meta| (meta.dev(), meta.ino())).ok() == mine {
        let _ = fs::remove_file(path);
    }
    Ok(())
}

async fn bind(path: &Path) -> Result<UnixListener, ControlError> {
    let failed = |source| ControlError::Io { path: path.into(), source };
    match fs::symlink_metadata(path) {
        Ok(meta) if !meta.file_type().is_socket() => return Err(ControlError::NotASocket(path.into())),
        Ok(_) => {
            if UnixStream::connect(path).await.is_ok() {
                return Err(ControlError::InUse(path.into()));
            }
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(failed(error)),
    }
    // Made under another name, so that nobody meets it before it has its mode, and moved over a stale one at once.
    let mut name = path.as_os_str().to_owned();
    name.push("~");
    let new = PathBuf::from(name);
    match fs::remove_file(&new) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(failed(error)),
        _ => {}
    }
    let listener = UnixListener::bind(&new).map_err(|error| match error.kind() {
        io::ErrorKind::InvalidInput => ControlError::TooLong(path.into()),
        _ => failed(error),
    })?;
    fs::set_permissions(&new, fs::Permissions::from_mode(MODE)).map_err(failed)?;
    fs::rename(&new, path).map_err(failed)?;
    Ok(listener)
}

async fn answer<H: Handler>(stream: UnixStream, handler: &H) -> io::Result<()> {
    let (read, write) = stream.into_split();
    let mut answers = Answers { stream: write };
    let mut reader = BufReader::new(read);
    let mut line = Vec::new();
    loop {
        line.clear();
        let mut limited = (&mut reader).take(LINE_BYTES_MAX as u64);
        let Ok(read) = timeout(REQUEST_WAIT_MAX, limited.read_until(b'\n', &mut line)).await else {
            return Ok(());
        };
        if read? == 0 {
            return Ok(());
        }
        if line.last() != Some(&b'\n') {
            let what = format!("a request is one line of JSON of at most {LINE_BYTES_MAX} bytes");
            return answers.send(&failure(what, "use the pgtandem command of the same version")).await;
        }
        let last = match serde_json::from_slice(&line) {
            Ok(request) => handler.handle(request, &mut answers).await?,
            Err(error) => failure(
                format!("the request is not understood: {error}"),
                "use the pgtandem command of the same version",
            ),
        };
        answers.send(&last).await?;
    }
}

async fn refuse(stream: UnixStream) -> io::Result<()> {
    let (_, write) = stream.into_split();
    let what = format!("{CONNECTIONS_MAX} commands are connected to the proxy already");
    Answers { stream: write }.send(&failure(what, "end some of them, then try again")).await
}

fn failure(what: impl Into<String>, hint: impl Into<String>) -> ControlAnswer {
    ControlAnswer::Error {
        error: ControlFailure { kind: CauseKind::Refused, phase: None, what: what.into(), hint: hint.into() },
    }
}

#[cfg(test)]
#[path = "server_tests.rs"]
mod tests;
