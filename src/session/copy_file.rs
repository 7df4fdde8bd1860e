//! COPY FROM a file of the server: the proxy reads it on the leader, and gives the leader and its followers the same bytes, as if
//! the client had sent them.
//!
//! Who may is for PostgreSQL to say: members of `pg_read_server_files` and superusers. Everybody else's statement, and one whose
//! file can not be read, goes to the leader as it is, for its own error.

use std::sync::Arc;

use bytes::Bytes;

use crate::pg::build::{self, ClientError};
use crate::replicate::follower::{Connection, ServerError};
use crate::session::copy::CopyKeeper;
use crate::session::run::Session;
use crate::session::wire::End;
use crate::sql::copy::{self, ServerFile};
use crate::sql::plan::{EffectPlan, Write};

/// Bytes of the file that are read at once.
const PIECE_BYTES: usize = 256 * 1024;

/// A file that is being read, on a connection of the proxy's own.
pub struct OpenFile {
    connection: Connection,
    path: Arc<str>,
    at: u64,
}

impl OpenFile {
    /// The next bytes; none at its end.
    async fn read(&mut self) -> Result<Bytes, ServerError> {
        const BINARY: [u8; 2] = [0, 1];
        let (at, length) = (self.at.to_string(), PIECE_BYTES.to_string());
        let values = [self.path.as_bytes(), at.as_bytes(), length.as_bytes()].map(Some);
        let out = &mut self.connection.out;
        build::parse(out, b"", b"SELECT pg_catalog.pg_read_binary_file($1::pg_catalog.text, $2, $3)", &[]);
        build::bind_raw(out, b"", b"", &build::text_values(&values), &BINARY);
        build::execute(out, b"", 0);
        build::sync(out);
        let mut answer = self.connection.exchange().await?.ok()?;
        let data = answer.values.pop().flatten().unwrap_or_default();
        self.at += data.len() as u64;
        Ok(data)
    }
}

/// Who reads the file of a COPY.
pub(super) enum FromFile {
    /// The statement names none.
    No,
    /// The proxy; the leader gets this text.
    Read(String),
    /// The leader by itself, which has to fail.
    Leader,
}

impl Session {
    /// Opens the file of a COPY that names one.
    ///
    /// # Errors
    /// If the connection to the leader ends.
    pub(super) async fn server_file_of(&mut self, write: &Write, text: &str) -> Result<FromFile, End> {
        if !matches!(write.effect, EffectPlan::Copy { server_file: true, .. }) {
            return Ok(FromFile::No);
        }
        let Some(file) = copy::server_file(text) else { return Ok(FromFile::Leader) };
        self.server_file = self.open_server_file(&file).await?;
        self.wire.hide_copy = self.server_file.is_some();
        Ok(if self.wire.hide_copy { FromFile::Read(file.text) } else { FromFile::Leader })
    }

    /// After the statement: what the leader read by itself is not known, so it must not stay.
    ///
    /// # Errors
    /// If the connection to the leader ends.
    pub(super) async fn end_server_file(&mut self, file: &FromFile, ok: bool) -> Result<bool, End> {
        self.wire.hide_copy = false;
        self.server_file = None;
        if ok && matches!(file, FromFile::Leader) {
            let why = "the file changed while it was opened";
            self.refuse_in_text(&ClientError::error("40001", why, "Try the transaction again.")).await?;
            return Ok(false);
        }
        Ok(ok)
    }

    /// Opens the file for the client. `None`: the leader has to answer the statement by itself.
    ///
    /// # Errors
    /// If the connection to the leader ends.
    async fn open_server_file(&mut self, file: &ServerFile) -> Result<Option<OpenFile>, End> {
        if !file.path.starts_with('/') {
            return Ok(None);
        }
        let may = "SELECT pg_catalog.pg_has_role('pg_read_server_files', 'USAGE')";
        if !self.hidden_query(may).await? || self.wire.results.values.pop().flatten().as_deref() != Some(b"t") {
            return Ok(None);
        }
        let Ok(connection) = self.hub.leader_connection(&self.database).await else { return Ok(None) };
        let mut open = OpenFile { connection, path: file.path.as_str().into(), at: 0 };
        // A file that is not there, a folder: the leader says so.
        if open.read().await.is_err() {
            return Ok(None);
        }
        open.at = 0;
        Ok(Some(open))
    }

    /// Gives the file's bytes to the leader, which waits for COPY data, and to the effect list.
    pub(super) async fn pass_file(&mut self, mut file: OpenFile, keeper: &mut CopyKeeper) -> Result<(), End> {
        self.wire.results.copy_in = false;
        loop {
            let data = match file.read().await {
                Ok(data) => data,
                Err(error) => {
                    keeper.fail(ClientError::error(
                        "58030",
                        format!("could not read file \"{}\": {error}", file.path),
                        "Look at the file on the leader's host.",
                    ));
                    break;
                }
            };
            if data.is_empty() {
                break;
            }
            keeper.keep(&mut self.log, &data);
            build::copy_data(&mut self.wire.to_server, &data);
            self.wire.flush_server().await?;
            self.wire.absorb()?;
            if self.wire.results.error.is_some() {
                return Ok(());
            }
        }
        if keeper.finish() {
            self.wire.hide_errors = true;
            build::copy_fail(&mut self.wire.to_server, "refused by pgtandem");
        } else {
            build::copy_done(&mut self.wire.to_server);
        }
        self.wire.flush_server().await
    }
}
