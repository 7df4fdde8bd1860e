//! The commands' end of `control.sock`.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use thiserror::Error;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;
use tokio::time::timeout;

use super::message::{ControlAnswer, ControlRequest, LINE_BYTES_MAX};

/// Longest silence of the proxy, seconds: longer than any step of a recovery may stand still.
const SILENCE_SECONDS_MAX: u64 = 300;
/// Longest wait for the socket itself.
const CONNECT_MAX: Duration = Duration::from_secs(5);

#[derive(Debug, Error)]
pub enum ControlClientError {
    /// No socket, or nobody behind it.
    #[error("the proxy is not running: nobody answers on {}", .0.display())]
    NotRunning(PathBuf),
    #[error("no permission to use {}", .0.display())]
    Permission(PathBuf),
    #[error("the proxy ended the connection on {}: {why}", path.display())]
    Ended { path: PathBuf, why: String },
    #[error("the proxy said nothing for {SILENCE_SECONDS_MAX} s")]
    Silent,
    #[error("the answer of the proxy is not understood: {0}")]
    NotUnderstood(String),
}

impl ControlClientError {
    /// The next thing to do or type.
    #[must_use]
    pub fn hint(&self) -> String {
        match self {
            Self::NotRunning(_) => {
                "on the proxy's host: systemctl start pgtandem-proxy, or pgtandem proxy; then the same command again"
                    .into()
            }
            Self::Permission(_) => "run the command as the proxy's user, as a member of its group, or as root".into(),
            Self::Ended { .. } => "look at the proxy's log and at pgtandem status".into(),
            Self::Silent => "look at the proxy's log; what it was doing goes on, pgtandem status shows it".into(),
            Self::NotUnderstood(_) => "use the pgtandem command of the same version as the proxy".into(),
        }
    }
}

/// One connection to the running proxy.
#[derive(Debug)]
pub struct ControlClient {
    path: PathBuf,
    stream: BufReader<UnixStream>,
}

impl ControlClient {
    pub async fn connect(path: &Path) -> Result<Self, ControlClientError> {
        match timeout(CONNECT_MAX, UnixStream::connect(path)).await {
            Ok(Ok(stream)) => Ok(Self { path: path.into(), stream: BufReader::new(stream) }),
            Ok(Err(error)) => Err(match error.kind() {
                io::ErrorKind::PermissionDenied => ControlClientError::Permission(path.into()),
                io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => {
                    ControlClientError::NotRunning(path.into())
                }
                _ => ControlClientError::Ended { path: path.into(), why: error.to_string() },
            }),
            Err(_) => Err(ControlClientError::Silent),
        }
    }

    pub async fn send(&mut self, request: &ControlRequest) -> Result<(), ControlClientError> {
        let mut line = serde_json::to_vec(request).map_err(|error| self.ended(&error))?;
        line.push(b'\n');
        self.stream.get_mut().write_all(&line).await.map_err(|error| self.ended(&error))
    }

    /// The next line: progress, or the last one of a request.
    pub async fn next(&mut self) -> Result<ControlAnswer, ControlClientError> {
        let mut line = Vec::new();
        let mut limited = (&mut self.stream).take(LINE_BYTES_MAX as u64);
        let read = timeout(Duration::from_secs(SILENCE_SECONDS_MAX), limited.read_until(b'\n', &mut line)).await;
        match read {
            Err(_) => return Err(ControlClientError::Silent),
            Ok(Err(error)) => return Err(self.ended(&error)),
            Ok(Ok(0)) => return Err(self.ended(&"it was restarted, or it stops")),
            Ok(Ok(_)) => {}
        }
        serde_json::from_slice(&line).map_err(|error| ControlClientError::NotUnderstood(error.to_string()))
    }

    fn ended(&self, why: &dyn std::fmt::Display) -> ControlClientError {
        ControlClientError::Ended { path: self.path.clone(), why: why.to_string() }
    }
}
