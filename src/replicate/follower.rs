//! One connection to a follower's PostgreSQL, as role `pgtandem`, through the agent's tunnel.
//!
//! It writes batches and reads answers. What a batch means is in [`crate::replicate::flight`].

use std::collections::HashMap;
use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

use crate::pg::build;
use crate::pg::frame::{self, FrameError, Sender};
use crate::pg::message;
use crate::pg::startup;
use crate::replicate::effects::EffectsError;
use crate::replicate::schema::{self, Context};

/// Statements that one connection keeps prepared for effects; past that all are closed.
const PREPARED_MAX: usize = 1000;
/// Bytes that are written before answers are read: below any socket buffer, so that neither side blocks for ever.
pub const BATCH_BYTES_MAX: usize = 32 * 1024;

/// A byte stream to a server: a tunnel, or a unix socket.
pub trait Stream: AsyncRead + AsyncWrite + Unpin + Send {}
impl<T: AsyncRead + AsyncWrite + Unpin + Send> Stream for T {}

#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    /// The server's answer: SQLSTATE and message.
    #[error("{message} (SQLSTATE {sqlstate})")]
    Answer { sqlstate: String, message: String },
    #[error("the connection ended: {}", io_reason(.0))]
    Io(#[from] std::io::Error),
    #[error("the server broke the protocol: {0}")]
    Frame(#[from] FrameError),
    #[error("the server did not answer within {0} ms")]
    Timeout(u64),
    /// The proxy's own disk, not the server.
    #[error(transparent)]
    Effects(EffectsError),
    #[error("{0}")]
    Other(String),
}

/// TLS says at length that the other end was gone without a goodbye, which is how a process that was killed leaves.
fn io_reason(error: &std::io::Error) -> String {
    match error.kind() {
        std::io::ErrorKind::UnexpectedEof => "the other end closed it".to_owned(),
        _ => error.to_string(),
    }
}

impl ServerError {
    fn from_body(body: &[u8]) -> Self {
        let (sqlstate, message) = message::error_summary(body);
        Self::Answer { sqlstate, message }
    }

    #[must_use]
    pub fn sqlstate(&self) -> Option<&str> {
        match self {
            Self::Answer { sqlstate, .. } => Some(sqlstate),
            _ => None,
        }
    }

    /// The server itself is sick: anything but an answer that is about the statement (`replication.md`, "Still different").
    #[must_use]
    pub fn is_sick(&self) -> bool {
        match self {
            Self::Answer { sqlstate, .. } => ["08", "53", "57P", "58", "XX"].iter().any(|c| sqlstate.starts_with(c)),
            Self::Effects(_) => false,
            _ => true,
        }
    }
}

/// What a batch of messages brought back, up to one `ReadyForQuery`.
#[derive(Debug, Default)]
pub struct Answer {
    /// First columns of all rows, as text.
    pub values: Vec<Option<Bytes>>,
    /// Command tags, in order.
    pub tags: Vec<Bytes>,
    pub error: Option<ServerError>,
    /// `I`, `T` or `E`.
    pub status: u8,
}

impl Answer {
    /// # Errors
    /// The error that the server answered, if it did.
    pub fn ok(mut self) -> Result<Self, ServerError> {
        match self.error.take() {
            Some(error) => Err(error),
            None => Ok(self),
        }
    }
}

pub struct Connection {
    stream: Box<dyn Stream>,
    input: BytesMut,
    pub out: BytesMut,
    prepared: HashMap<(Arc<str>, Arc<[u8]>), String>,
    /// Under which schema number they were prepared.
    schema_number: u64,
    /// The context that the session is in; `None` when it is not known.
    pub context: Option<Arc<Context>>,
}

impl std::fmt::Debug for Connection {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Connection").field("prepared", &self.prepared.len()).finish_non_exhaustive()
    }
}

impl Connection {
    /// When this server was started: it is another one after each start.
    ///
    /// # Errors
    /// If it does not answer.
    pub async fn started_at(&mut self) -> Result<String, ServerError> {
        build::query(&mut self.out, b"SELECT pg_catalog.pg_postmaster_start_time()");
        let answer = self.exchange().await?.ok()?;
        let started = answer.values.into_iter().flatten().next().unwrap_or_default();
        Ok(String::from_utf8_lossy(&started).into_owned())
    }

    /// Logs in as `pgtandem` (no password: `peer` on the other end). With a secret and an epoch: enters it and prepares what
    /// effects need; without, the database may not even have the schema `pgtandem` yet. Bodies of functions are checked by the leader
    /// alone: they may name temporary tables of the client's. No name of ours is looked for where the owner of a database may have put
    /// something by `ALTER DATABASE ... SET search_path`.
    ///
    /// # Errors
    /// If the server refuses, or the connection ends.
    pub async fn open(
        stream: Box<dyn Stream>,
        database: &str,
        application_name: &str,
        enter: Option<(&str, u64)>,
    ) -> Result<Self, ServerError> {
        let out = startup::session_request(&[
            ("user", "pgtandem"),
            ("database", database),
            ("application_name", application_name),
            ("client_encoding", "UTF8"),
            (
                "options",
                "-c statement_timeout=0 -c lock_timeout=0 -c idle_in_transaction_session_timeout=0 \
                 -c default_transaction_isolation=read\\ committed -c default_transaction_read_only=off \
                 -c synchronous_commit=on -c session_replication_role=origin \
                 -c check_function_bodies=off -c search_path=pg_catalog,pg_temp",
            ),
        ]);
        let mut connection = Self {
            stream,
            input: BytesMut::with_capacity(8192),
            out,
            prepared: HashMap::new(),
            schema_number: 0,
            context: None,
        };
        connection.exchange().await?.ok()?;
        let Some((secret, epoch)) = enter else { return Ok(connection) };
        let epoch = epoch.to_string();
        build::parse(&mut connection.out, b"", b"SELECT pgtandem.enter($1, $2)", &[]);
        build::bind_text(&mut connection.out, b"", b"", &[Some(secret.as_bytes()), Some(epoch.as_bytes())]);
        build::execute(&mut connection.out, b"", 0);
        for (name, text) in schema::PREPARED {
            build::parse(&mut connection.out, name.as_bytes(), text.as_bytes(), &[]);
        }
        // These two exist from PostgreSQL 14 and 17 on.
        build::parse(
            &mut connection.out,
            b"",
            b"SELECT pg_catalog.set_config(name, '0', false) FROM pg_catalog.pg_settings \
              WHERE name IN ('idle_session_timeout', 'transaction_timeout')",
            &[],
        );
        build::bind_text(&mut connection.out, b"", b"", &[]);
        build::execute(&mut connection.out, b"", 0);
        let apply = schema::apply_context_text();
        build::parse(&mut connection.out, b"pgtandem_apply", apply.as_bytes(), &[]);
        let encoding = b"SELECT pg_catalog.set_config('client_encoding', $1, false)";
        build::parse(&mut connection.out, b"pgtandem_encoding", encoding, &[]);
        build::parse(&mut connection.out, b"pgtandem_mark_here", schema::MARK_ON_FOLLOWER.as_bytes(), &[]);
        let triggers = b"SELECT pg_catalog.set_config('session_replication_role', $1, true)";
        build::parse(&mut connection.out, b"pgtandem_triggers", triggers, &[]);
        build::parse(&mut connection.out, b"pgtandem_role", b"SELECT pg_catalog.set_config('role', $1, true)", &[]);
        build::sync(&mut connection.out);
        connection.exchange().await?.ok()?;
        Ok(connection)
    }

    /// Sends what is in `out` and reads up to the next `ReadyForQuery`.
    ///
    /// # Errors
    /// If the connection ends or breaks the protocol. An error that the server answers is in the answer.
    pub async fn exchange(&mut self) -> Result<Answer, ServerError> {
        self.send().await?;
        self.receive().await
    }

    /// # Errors
    /// If the connection ends.
    pub async fn send(&mut self) -> Result<(), ServerError> {
        self.stream.write_all(&self.out).await?;
        self.stream.flush().await?;
        self.out.clear();
        Ok(())
    }

    /// Reads up to the next `ReadyForQuery`.
    ///
    /// # Errors
    /// As [`Self::exchange`].
    pub async fn receive(&mut self) -> Result<Answer, ServerError> {
        let mut answer = Answer::default();
        while !self.absorb(&mut answer)? {
            self.fill().await?;
        }
        Ok(answer)
    }

    /// Sends what is in `out` while answers come in, without waiting for their end: for batches that are larger
    /// than what sockets hold.
    ///
    /// # Errors
    /// As [`Self::exchange`].
    pub async fn send_large(&mut self, answer: &mut Answer) -> Result<(), ServerError> {
        let (mut read, mut write) = tokio::io::split(&mut self.stream);
        let mut sent = 0;
        while sent < self.out.len() {
            let end = self.out.len().min(sent + BATCH_BYTES_MAX);
            tokio::select! {
                n = write.write(&self.out[sent..end]) => match n? {
                    0 => return Err(std::io::Error::from(std::io::ErrorKind::WriteZero).into()),
                    n => sent += n,
                },
                n = read.read_buf(&mut self.input) => {
                    if n? == 0 {
                        return Err(std::io::Error::from(std::io::ErrorKind::UnexpectedEof).into());
                    }
                    absorb(&mut self.input, answer)?;
                }
            }
        }
        write.flush().await?;
        self.out.clear();
        Ok(())
    }

    /// Waits until the server ends the connection, without asking anything; never returns while it lives.
    pub async fn ended(&mut self) -> ServerError {
        loop {
            if let Err(e) = self.fill().await {
                return e;
            }
            let mut answer = Answer::default();
            match self.absorb(&mut answer) {
                Err(e) => return e,
                Ok(_) => {
                    if let Some(e) = answer.error {
                        return e;
                    }
                }
            }
        }
    }

    async fn fill(&mut self) -> Result<(), ServerError> {
        self.input.reserve(4096);
        if self.stream.read_buf(&mut self.input).await? == 0 {
            return Err(std::io::Error::from(std::io::ErrorKind::UnexpectedEof).into());
        }
        Ok(())
    }

    fn absorb(&mut self, answer: &mut Answer) -> Result<bool, ServerError> {
        absorb(&mut self.input, answer)
    }

    /// The name under which `text` is prepared; appends its `Parse` if it is not.
    pub fn prepare(&mut self, text: &Arc<str>, types: &Arc<[u8]>) -> String {
        let key = (Arc::clone(text), Arc::clone(types));
        if let Some(name) = self.prepared.get(&key) {
            return name.clone();
        }
        if self.prepared.len() >= PREPARED_MAX {
            for name in self.prepared.values() {
                build::close(&mut self.out, b'S', name.as_bytes());
            }
            self.prepared.clear();
        }
        let name = format!("e{}", self.prepared.len());
        build::parse(&mut self.out, name.as_bytes(), text.as_bytes(), types);
        self.prepared.insert(key, name.clone());
        name
    }

    /// After an error nothing is known of what the failed batch would have prepared or set.
    pub fn forget(&mut self) {
        self.forget_prepared();
        self.context = None;
    }

    /// What follows is of this schema number. PostgreSQL plans a prepared statement again after a change of what it names, but the
    /// types of its parameters stay, and one of them may have been dropped and made again.
    pub fn at_schema(&mut self, number: u64) {
        if self.schema_number != number {
            self.forget_prepared();
            self.schema_number = number;
        }
    }

    fn forget_prepared(&mut self) {
        for name in self.prepared.values() {
            build::close(&mut self.out, b'S', name.as_bytes());
        }
        self.prepared.clear();
    }
}

/// Takes whole frames off `input` up to `ReadyForQuery`; true when it was there.
fn absorb(input: &mut BytesMut, answer: &mut Answer) -> Result<bool, ServerError> {
    while let Some(frame) = frame::take(input, Sender::Server)? {
        let body = frame::body(&frame);
        match frame[0] {
            b'Z' => {
                answer.status = body.first().copied().unwrap_or(b'I');
                return Ok(true);
            }
            b'E' if answer.error.is_none() => answer.error = Some(ServerError::from_body(body)),
            b'C' => {
                let tag = frame.freeze();
                answer.tags.push(tag.slice(frame::HEADER_BYTES..tag.len().saturating_sub(1).max(frame::HEADER_BYTES)));
            }
            b'D' => {
                let mut r = message::Reader::new(b'D', body);
                let value = if r.u16()? == 0 { None } else { r.value()?.map(Bytes::copy_from_slice) };
                answer.values.push(value);
            }
            b'R' if body != [0, 0, 0, 0] => {
                return Err(ServerError::Other(
                    "PostgreSQL asks role pgtandem for a password: pg_hba.conf must begin with \
                         'local all pgtandem peer map=pgtandem'"
                        .into(),
                ));
            }
            _ => {}
        }
    }
    // FATAL during startup ends the connection without ReadyForQuery.
    if let Some(ServerError::Answer { sqlstate, message }) = &answer.error
        && answer.status == 0
        && (sqlstate.starts_with("28") || sqlstate.starts_with("57P") || sqlstate.starts_with("3D"))
    {
        return Err(ServerError::Answer { sqlstate: sqlstate.clone(), message: message.clone() });
    }
    Ok(false)
}
