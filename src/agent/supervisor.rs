//! Keeps this node's PostgreSQL as it is wanted: running, and started again when it died, or stopped.
//!
//! One start or stop at a time. A stop interrupts a start that takes long (crash recovery).

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use pgtandem_proto::message::{Failure, FailureCode, PostgresState};
use tokio::sync::{Mutex as AsyncMutex, watch};
use tokio::time::sleep;

use super::postgres::{Postgres, PostgresError};

/// How often it is looked whether PostgreSQL lives, milliseconds.
const WATCH_MS: u64 = 100;
/// Longest pause between two attempts to start it, milliseconds; the first is [`WATCH_MS`].
const RETRY_MS_MAX: u64 = 5_000;

#[derive(Debug, thiserror::Error)]
pub enum SupervisorError {
    #[error(transparent)]
    Postgres(#[from] PostgresError),
    #[error("the start of PostgreSQL was given up because it was told to stop")]
    Stopped,
}

impl SupervisorError {
    #[must_use]
    pub fn failure(&self) -> Failure {
        match self {
            SupervisorError::Postgres(error) => error.failure(),
            SupervisorError::Stopped => Failure {
                code: FailureCode::WrongState,
                what: self.to_string(),
                hint: "see who stopped it in the agent's log".to_owned(),
            },
        }
    }
}

/// Cheap to clone; all clones steer the same server.
#[derive(Clone)]
pub struct Supervisor {
    postgres: Postgres,
    wanted: Arc<watch::Sender<bool>>,
    /// Held by whoever starts or stops.
    work: Arc<AsyncMutex<()>>,
    /// Why it does not run.
    detail: Arc<Mutex<String>>,
}

impl Supervisor {
    #[must_use]
    pub fn new(postgres: Postgres) -> Supervisor {
        Supervisor {
            postgres,
            wanted: Arc::new(watch::Sender::new(false)),
            work: Arc::default(),
            detail: Arc::default(),
        }
    }

    #[must_use]
    pub fn postgres(&self) -> &Postgres {
        &self.postgres
    }

    /// Why PostgreSQL is not running; empty if it runs.
    #[must_use]
    pub fn detail(&self) -> String {
        self.detail.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// From now on it is kept running; the watch starts it if it does not run. Does not wait.
    pub fn keep_running(&self) {
        self.wanted.send_replace(true);
    }

    /// Starts it and keeps it running; returns when it accepts connections.
    pub async fn start(&self) -> Result<(), SupervisorError> {
        self.keep_running();
        self.start_if_wanted().await
    }

    async fn start_if_wanted(&self) -> Result<(), SupervisorError> {
        let _work = self.work.lock().await;
        let mut wanted = self.wanted.subscribe();
        let outcome = tokio::select! {
            biased;
            _ = wanted.wait_for(|wanted| !wanted) => Err(SupervisorError::Stopped),
            started = self.postgres.start() => started.map_err(SupervisorError::from),
        };
        self.set_detail(outcome.as_ref().err().map(ToString::to_string).unwrap_or_default());
        outcome
    }

    /// Stops it and leaves it stopped; returns when its process is gone.
    pub async fn stop(&self, immediate: bool, why: &str) -> Result<(), SupervisorError> {
        self.wanted.send_replace(false);
        let _work = self.work.lock().await;
        self.set_detail(why.to_owned());
        Ok(self.postgres.stop(immediate).await?)
    }

    /// Starts it again whenever it died, until the runtime ends.
    pub async fn watch(&self) {
        let mut pause_ms = WATCH_MS;
        loop {
            sleep(Duration::from_millis(pause_ms)).await;
            pause_ms = WATCH_MS;
            let down = matches!(self.postgres.state(), PostgresState::Stopped | PostgresState::Absent);
            if !down || !*self.wanted.borrow() {
                continue;
            }
            tracing::warn!(last_words = self.postgres.last_words(), "PostgreSQL does not run; it is started");
            match self.start_if_wanted().await {
                Ok(()) => tracing::info!("PostgreSQL runs again"),
                Err(SupervisorError::Stopped) => {}
                Err(error) => {
                    tracing::error!(%error, "PostgreSQL could not be started");
                    pause_ms = (pause_ms * 2).clamp(1_000, RETRY_MS_MAX);
                }
            }
        }
    }

    fn set_detail(&self, detail: String) {
        *self.detail.lock().unwrap_or_else(PoisonError::into_inner) = detail;
    }
}
