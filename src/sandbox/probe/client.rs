//! One client of the probe: does its operation again and again, notes each answer, connects again after a loss.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use tokio_postgres::{SimpleQueryMessage, Statement};
use tokio_util::sync::CancellationToken;

use super::seen::ClientSeen;
use super::{CompareError, Settings, connect};

/// Every so many writes one is a transaction of several statements.
const TRANSACTION_EVERY: u64 = 8;
/// Pause before a lost client connects again.
const RECONNECT_PAUSE: Duration = Duration::from_millis(20);

/// What a client does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Increments counter i. Those with an even number use the simple protocol, the others prepared statements.
    Writer(usize),
    /// Reads a counter.
    Reader(usize),
    /// Connects, asks `select 1`, leaves, in this interval.
    HealthCheck(Duration),
}

/// A connection, with what this kind of client prepared on it.
struct Session {
    client: tokio_postgres::Client,
    statement: Option<Statement>,
}

pub struct Client {
    port: u16,
    database: String,
    kind: Kind,
    stop: CancellationToken,
    writes: Arc<AtomicU64>,
    session: Option<Session>,
    seen: ClientSeen,
}

/// Why an operation did not succeed.
enum Trouble {
    Postgres(tokio_postgres::Error),
    /// An answer came, and it was wrong.
    Wrong(String),
}

impl From<tokio_postgres::Error> for Trouble {
    fn from(error: tokio_postgres::Error) -> Self {
        Self::Postgres(error)
    }
}

impl Client {
    pub async fn new(
        settings: &Settings,
        kind: Kind,
        stop: CancellationToken,
        writes: Arc<AtomicU64>,
    ) -> Result<Self, CompareError> {
        let (port, database, seen) = (settings.port, settings.database.clone(), ClientSeen::new(kind));
        let mut client = Self { port, database, kind, stop, writes, session: None, seen };
        if !matches!(kind, Kind::HealthCheck(_)) {
            client.session = Some(client.open().await?);
        }
        Ok(client)
    }

    async fn open(&self) -> Result<Session, CompareError> {
        let client = connect(self.port, &self.database).await?;
        let sql = match self.kind {
            Kind::Writer(index) if index % 2 == 1 => "update probe_counter set n = n + 1 where id = $1",
            Kind::Reader(_) => "select n from probe_counter where id = $1",
            Kind::Writer(_) | Kind::HealthCheck(_) => return Ok(Session { client, statement: None }),
        };
        let failed = |source| CompareError::Postgres { what: sql.to_owned(), port: self.port, source };
        let statement = Some(client.prepare(sql).await.map_err(failed)?);
        Ok(Session { client, statement })
    }

    /// Works until it is told to stop.
    pub async fn run(mut self, started: Instant) -> ClientSeen {
        while !self.stop.is_cancelled() {
            if self.session.is_none() && !matches!(self.kind, Kind::HealthCheck(_)) {
                match self.open().await {
                    Ok(session) => self.session = Some(session),
                    Err(CompareError::Postgres { source, .. }) => {
                        self.seen.error(started.elapsed(), text_of(&source));
                        tokio::time::sleep(RECONNECT_PAUSE).await;
                        continue;
                    }
                }
            }
            let began = Instant::now();
            match self.operate().await {
                Ok(()) => {
                    self.seen.answer(started.elapsed(), began.elapsed());
                    if matches!(self.kind, Kind::Writer(_)) {
                        self.writes.fetch_add(1, Ordering::Relaxed);
                    }
                }
                Err(trouble) => self.note(&trouble, started).await,
            }
            if let Kind::HealthCheck(interval) = self.kind {
                tokio::select! {
                    () = tokio::time::sleep(interval) => {}
                    () = self.stop.cancelled() => {}
                }
            }
        }
        self.seen
    }

    async fn note(&mut self, trouble: &Trouble, started: Instant) {
        let text = match trouble {
            Trouble::Wrong(text) => text.clone(),
            Trouble::Postgres(error) => text_of(error),
        };
        self.seen.error(started.elapsed(), text);
        // What a client without an answer wrote may or may not be there; one with an error knows that it is not.
        let told = matches!(trouble, Trouble::Postgres(error) if error.as_db_error().is_some());
        if matches!(self.kind, Kind::Writer(_)) && !told {
            self.seen.unknown += 1;
        }
        let Some(session) = &self.session else { return };
        if session.client.is_closed() || session.client.simple_query("rollback").await.is_err() {
            self.seen.disconnects += 1;
            self.session = None;
        }
    }

    async fn operate(&self) -> Result<(), Trouble> {
        match (self.kind, &self.session) {
            (Kind::Writer(index), Some(session)) => self.write(index, session).await,
            (Kind::Reader(_), Some(Session { client, statement: Some(statement) })) => {
                let rows = client.query(statement, &[&0]).await?;
                if rows.len() == 1 { Ok(()) } else { Err(Trouble::Wrong(format!("a read found {} rows", rows.len()))) }
            }
            (Kind::HealthCheck(_), _) => {
                let session = match connect(self.port, &self.database).await {
                    Ok(client) => client,
                    Err(CompareError::Postgres { source, .. }) => return Err(source.into()),
                };
                session.simple_query("select 1").await?;
                Ok(())
            }
            _ => Err(Trouble::Wrong("the client has no session".into())),
        }
    }

    async fn write(&self, index: usize, Session { client, statement }: &Session) -> Result<(), Trouble> {
        let number = self.seen.answers() + self.seen.errors + 1;
        let block = number.is_multiple_of(TRANSACTION_EVERY);
        if block {
            client.simple_query("begin").await?;
            // The number is unique however often the client was told nothing.
            let log = format!("insert into probe_log (writer, n) values ({index}, {number})");
            client.simple_query(&log).await?;
        }
        let rows = if let Some(statement) = statement {
            client.execute(statement, &[&i32::try_from(index).unwrap_or_default()]).await?
        } else {
            let sql = format!("update probe_counter set n = n + 1 where id = {index}");
            let complete = |message: &SimpleQueryMessage| match message {
                SimpleQueryMessage::CommandComplete(rows) => Some(*rows),
                _ => None,
            };
            client.simple_query(&sql).await?.iter().find_map(complete).unwrap_or_default()
        };
        if block {
            client.simple_query("commit").await?;
        }
        if rows == 1 { Ok(()) } else { Err(Trouble::Wrong(format!("an increment changed {rows} rows"))) }
    }
}

/// Severity, SQLSTATE and message if the server said them.
fn text_of(error: &tokio_postgres::Error) -> String {
    match error.as_db_error() {
        Some(error) => format!("{} {}: {}", error.severity(), error.code().code(), error.message()),
        None => error.to_string(),
    }
}
