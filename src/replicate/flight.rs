//! A flight: everything that one follower gets for one transaction, in one go.
//!
//! `BEGIN; effects with their counts asserted inside the SQL; mark; PREPARE TRANSACTION`, without a Sync inside, so that
//! an error keeps the rest from running. COPY needs a round trip of its own: its count is compared before the PREPARE.

use std::borrow::Cow;
use std::sync::Arc;

use bytes::BytesMut;

use crate::pg::build;
use crate::replicate::effects::{Effect, EffectLog, EffectRole, Range, StatementText};
use crate::replicate::follower::{Answer, BATCH_BYTES_MAX, Connection, ServerError};
use crate::replicate::rows::{Arrays, KeptRows, put_copy_line};
use crate::replicate::schema::Context;
use crate::sql::encoding;
use crate::sql::facts::quote_literal;
use crate::sql::rows::{Many, RowTexts};

/// Bytes of one `CopyData` message to a follower.
const COPY_PIECE_BYTES: u64 = 64 * 1024;

/// Rows of one set, unless it has to be whole: its values are together in memory on both sides.
const SET_BYTES: usize = 256 * 1024;
const SET_ROWS: u64 = 5000;
const ONCE: &str = "a statement that runs once on every server can not be applied again";

/// What decides a half: its mark, and the name under which it is prepared.
#[derive(Clone, Debug)]
pub struct Decision {
    pub mark_id: i32,
    pub mark_n: i64,
    /// The n of the mark that was decided to be committed before this one; `None`: not known. A node that was away has exactly that,
    /// or lacks something.
    pub after: Option<i64>,
    pub gid: String,
    /// Whose prepared transaction it is, where that is not the proxy.
    pub owner: Option<String>,
}

/// `pgtandem:<cluster>:<epoch>:<mark>:<n>`
#[must_use]
pub fn gid(cluster: &str, epoch: u64, mark_id: i32, mark_n: i64) -> String {
    format!("pgtandem:{cluster}:{epoch}:{mark_id}:{mark_n}")
}

/// Mark and n of a name that [`gid`] made for this cluster.
#[must_use]
pub fn parse_gid(gid: &str, cluster: &str) -> Option<(i32, i64)> {
    let rest = gid.strip_prefix("pgtandem:")?.strip_prefix(cluster)?.strip_prefix(':')?;
    let mut parts = rest.split(':');
    let (_epoch, mark, n) = (parts.next()?, parts.next()?, parts.next()?);
    if parts.next().is_some() { None } else { Some((mark.parse().ok()?, n.parse().ok()?)) }
}

/// Applies the effects and prepares. After an error nothing of it is left on the follower and the connection is usable,
/// unless the error says that the server is sick.
///
/// # Errors
/// The follower's answer, or the end of the connection.
pub async fn prepare(connection: &mut Connection, log: &EffectLog, decision: &Decision) -> Result<(), ServerError> {
    let result = async {
        let mut writer = Writer::begin(connection);
        writer.effects(log).await?;
        writer.prepare(decision).await
    }
    .await;
    settle(connection, result).await
}

/// Applies several transactions in one, as a node that is joining does, and commits.
///
/// # Errors
/// As [`prepare`].
pub async fn apply(connection: &mut Connection, work: &[(Arc<EffectLog>, Decision)]) -> Result<(), ServerError> {
    let result = async {
        let mut writer = Writer::begin(connection);
        for (log, decision) in work {
            writer.effects(log).await?;
            writer.mark(decision);
        }
        writer.execute("pgtandem_commit", &[]);
        writer.end().await.map(|_| ())
    }
    .await;
    settle(connection, result).await
}

/// Makes the server load what every half needs: the first call of a function in a session costs milliseconds. Leaves nothing.
///
/// # Errors
/// As [`prepare`].
pub async fn warm_up(connection: &mut Connection, secret: &str) -> Result<(), ServerError> {
    // No mark has this number.
    let (id, n) = (Some(&b"0"[..]), Some(&b"0"[..]));
    let mut writer = Writer::begin(connection);
    writer.execute("pgtandem_mark", &[Some(secret.as_bytes()), id, n]);
    writer.execute("pgtandem_rollback", &[]);
    let result = writer.end().await.map(|_| ());
    settle(connection, result).await
}

/// `COMMIT PREPARED` or `ROLLBACK PREPARED` for each name. One that is not there is done already.
///
/// # Errors
/// The follower's answer, or the end of the connection.
pub async fn finish(connection: &mut Connection, gid: &str, commit: bool) -> Result<(), ServerError> {
    let verb = if commit { "COMMIT" } else { "ROLLBACK" };
    build::query(&mut connection.out, format!("{verb} PREPARED {}", quote_literal(gid)).as_bytes());
    match connection.exchange().await?.ok() {
        Ok(_) => Ok(()),
        Err(e) if e.sqlstate() == Some("42704") => Ok(()),
        Err(e) => Err(e),
    }
}

/// Brings a connection back to idle after a batch that failed.
async fn settle(connection: &mut Connection, result: Result<(), ServerError>) -> Result<(), ServerError> {
    let Err(error) = result else { return Ok(()) };
    if !error.is_sick() {
        connection.out.clear();
        // The Close messages of forget() precede the query, outside any batch: they end with it.
        connection.forget();
        build::query(&mut connection.out, b"ROLLBACK");
        connection.exchange().await?;
    }
    Err(error)
}

/// Writes a batch for one follower; what it sends early, because the batch is large, it answers for at the end.
pub(super) struct Writer<'c> {
    pub(super) connection: &'c mut Connection,
    answer: Answer,
    role: Option<Arc<str>>,
    buffer: Vec<u8>,
}

impl<'c> Writer<'c> {
    fn begin(connection: &'c mut Connection) -> Self {
        let mut writer = Self::resume(connection);
        writer.execute("pgtandem_begin", &[]);
        writer
    }

    /// In a transaction that is open already, under the proxy's own role.
    pub(super) fn resume(connection: &'c mut Connection) -> Self {
        Self { connection, answer: Answer::default(), role: None, buffer: Vec::new() }
    }

    /// A text of ours without parameters.
    pub(super) fn statement(&mut self, text: &str) {
        build::parse(&mut self.connection.out, b"", text.as_bytes(), &[]);
        self.execute("", &[]);
    }

    pub(super) fn execute(&mut self, statement: &str, values: &[Option<&[u8]>]) {
        build::bind_text(&mut self.connection.out, b"", statement.as_bytes(), values);
        build::execute(&mut self.connection.out, b"", 0);
    }

    async fn effects(&mut self, log: &EffectLog) -> Result<(), ServerError> {
        self.some_effects(log, 0..log.effects().len()).await
    }

    /// The effects with these numbers.
    pub(super) async fn some_effects(
        &mut self,
        log: &EffectLog,
        which: std::ops::Range<usize>,
    ) -> Result<(), ServerError> {
        for effect in log.effects().get(which).unwrap_or_default() {
            match effect {
                Effect::Once => return Err(ServerError::Other(ONCE.into())),
                Effect::Statement { context, role, text, types, parameters } => {
                    self.enter(context, role);
                    let out_name = match text {
                        StatementText::Shared(text) => self.named(log, context, text, types),
                        StatementText::Once(text) => {
                            self.read(log, *text)?;
                            build::parse(&mut self.connection.out, b"", &self.buffer, types);
                            String::new()
                        }
                    };
                    self.read(log, *parameters)?;
                    build::bind_raw(&mut self.connection.out, b"", out_name.as_bytes(), &self.buffer, &[]);
                    build::execute(&mut self.connection.out, b"", 0);
                    if self.connection.out.len() >= BATCH_BYTES_MAX {
                        self.send_part().await?;
                    }
                }
                Effect::Rows { context, role, texts, data, rows } => {
                    if texts.after_triggers {
                        self.fire_triggers(false);
                    }
                    self.enter(context, role);
                    self.rows(log, context, texts, *data, *rows).await?;
                    if texts.after_triggers {
                        self.fire_triggers(true);
                    }
                }
                Effect::Changed { rows } => self.changed(*rows).await?,
                Effect::Copy { context, role, text, data, rows, after_triggers } => {
                    if *after_triggers {
                        self.fire_triggers(false);
                    }
                    self.enter(context, role);
                    let text = encoding::encode(text, context.client_encoding());
                    self.copy(log, &text, *data, *rows).await?;
                    if *after_triggers {
                        self.fire_triggers(true);
                    }
                }
            }
        }
        self.leave_role();
        Ok(())
    }

    /// The name under which the text is prepared. Texts that are not UTF-8 share none: the same string may be another text. Nor
    /// beside definitions, after which the same text may have parameters of another type.
    fn named(&mut self, log: &EffectLog, context: &Context, text: &Arc<str>, types: &Arc<[u8]>) -> String {
        match encoding::encode(text, context.client_encoding()) {
            Cow::Borrowed(_) if !log.ddl => self.connection.prepare(text, types),
            text => {
                build::parse(&mut self.connection.out, b"", &text, types);
                String::new()
            }
        }
    }

    async fn rows(
        &mut self,
        log: &EffectLog,
        context: &Context,
        texts: &RowTexts,
        data: Range,
        rows: u64,
    ) -> Result<(), ServerError> {
        let no_types = Arc::from([]);
        let kept = KeptRows::new(log, data);
        match &texts.many {
            Many::Copy(text) if rows != 1 => {
                let name = self.named(log, context, text, &no_types);
                self.rows_by_copy(kept, &name).await
            }
            Many::Arrays { text, whole } if rows != 1 => {
                let name = self.named(log, context, text, &no_types);
                self.rows_by_arrays(kept, &name, *whole).await
            }
            _ => {
                let name = self.named(log, context, &texts.one, &no_types);
                self.rows_one_by_one(kept, &name).await
            }
        }
    }

    async fn rows_one_by_one(&mut self, mut kept: KeptRows<'_>, name: &str) -> Result<(), ServerError> {
        while let Some(row) = kept.take().map_err(ServerError::Effects)? {
            build::bind_raw(&mut self.connection.out, b"", name.as_bytes(), row, &[]);
            build::execute(&mut self.connection.out, b"", 0);
            if self.connection.out.len() >= BATCH_BYTES_MAX {
                self.send_part().await?;
            }
        }
        Ok(())
    }

    async fn rows_by_arrays(&mut self, mut kept: KeptRows<'_>, name: &str, whole: bool) -> Result<(), ServerError> {
        loop {
            let (bytes_max, rows_max) = if whole { (usize::MAX, u64::MAX) } else { (SET_BYTES, SET_ROWS) };
            let mut arrays = Arrays::default();
            while arrays.bytes() < bytes_max && arrays.rows() < rows_max {
                match kept.take().map_err(ServerError::Effects)? {
                    Some(row) => arrays.push(row).map_err(ServerError::Frame)?,
                    None => break,
                }
            }
            if arrays.rows() == 0 {
                return Ok(());
            }
            let parameters = arrays.finish();
            build::bind_raw(&mut self.connection.out, b"", name.as_bytes(), &parameters, &[]);
            build::execute(&mut self.connection.out, b"", 0);
            if self.connection.out.len() >= BATCH_BYTES_MAX {
                self.send_part().await?;
            }
        }
    }

    /// A COPY inside the flight: the server reads its data from what follows, and leaves them out if it did not begin. How many
    /// rows there are follows from the data, which are ours.
    async fn rows_by_copy(&mut self, mut kept: KeptRows<'_>, name: &str) -> Result<(), ServerError> {
        build::bind_text(&mut self.connection.out, b"", name.as_bytes(), &[]);
        build::execute(&mut self.connection.out, b"", 0);
        let mut lines = BytesMut::new();
        loop {
            let more = match kept.take() {
                Ok(Some(row)) => {
                    put_copy_line(row, &mut lines).map_err(ServerError::Frame)?;
                    true
                }
                Ok(None) => false,
                Err(error) => {
                    // A server that copies would take a ROLLBACK for data.
                    build::copy_fail(&mut self.connection.out, "the data can not be read");
                    build::sync(&mut self.connection.out);
                    self.connection.exchange().await?;
                    return Err(ServerError::Effects(error));
                }
            };
            if !more || lines.len() >= BATCH_BYTES_MAX {
                build::copy_data(&mut self.connection.out, &lines);
                lines.clear();
                if more {
                    self.send_part().await?;
                } else {
                    build::copy_done(&mut self.connection.out);
                    return Ok(());
                }
            }
        }
    }

    fn read(&mut self, log: &EffectLog, range: Range) -> Result<(), ServerError> {
        log.read(range, &mut self.buffer).map_err(ServerError::Effects)
    }

    /// Brings the session into the context and role of the next effect, if it is not in them.
    pub(super) fn enter(&mut self, context: &Arc<Context>, role: &EffectRole) {
        if self.connection.context.as_ref().is_none_or(|c| **c != **context) {
            self.leave_role();
            let name = context.client_encoding();
            let before = self.connection.context.as_ref().map(|context| context.client_encoding());
            if before != Some(name) && !context.settings.iter().all(|setting| setting.is_ascii()) {
                // The server reads the others in the encoding that it has then.
                self.execute("pgtandem_encoding", &[Some(name.as_bytes())]);
            }
            let values: Vec<_> = context.settings.iter().map(|setting| encoding::encode(setting, name)).collect();
            let values: Vec<Option<&[u8]>> = values.iter().map(|value| Some(&value[..])).collect();
            self.execute("pgtandem_apply", &values);
            self.connection.context = Some(Arc::clone(context));
        }
        let role: Option<Arc<str>> = match role {
            EffectRole::Client => Some(context.role.as_str().into()),
            EffectRole::Named(name) => Some(Arc::clone(name)),
            EffectRole::Own => None,
        };
        if self.role != role {
            match &role {
                Some(name) => {
                    self.execute("pgtandem_role", &[Some(&encoding::encode(name, context.client_encoding()))]);
                }
                None => self.leave_role(),
            }
            self.role = role;
        }
    }

    /// Off: neither the triggers of users nor those of foreign keys, both of which the leader has fired. A superuser's right.
    fn fire_triggers(&mut self, fire: bool) {
        self.leave_role();
        let role: &[u8] = if fire { b"origin" } else { b"replica" };
        self.execute("pgtandem_triggers", &[Some(role)]);
    }

    fn leave_role(&mut self) {
        if self.role.take().is_some() {
            self.execute("pgtandem_role", &[Some(b"none")]);
        }
    }

    pub(super) fn mark(&mut self, decision: &Decision) {
        let (id, n) = (decision.mark_id.to_string(), decision.mark_n.to_string());
        self.execute("pgtandem_mark_here", &[Some(id.as_bytes()), Some(n.as_bytes())]);
    }

    /// Ends the half: mark and PREPARE.
    pub(super) async fn prepare(mut self, decision: &Decision) -> Result<(), ServerError> {
        self.mark(decision);
        if let Some(owner) = &decision.owner {
            self.execute("pgtandem_role", &[Some(owner.as_bytes())]);
        }
        self.statement(&format!("PREPARE TRANSACTION {}", quote_literal(&decision.gid)));
        let answer = self.end().await?;
        match answer.tags.last() {
            Some(tag) if &tag[..] == b"PREPARE TRANSACTION" => Ok(()),
            tag => Err(ServerError::Other(format!("PREPARE TRANSACTION was answered with {tag:?}"))),
        }
    }

    async fn send_part(&mut self) -> Result<(), ServerError> {
        self.connection.send_large(&mut self.answer).await?;
        match self.answer.error.take() {
            // The rest of the batch would be skipped; the Sync makes the server read on.
            Some(error) => {
                build::sync(&mut self.connection.out);
                self.connection.exchange().await?;
                Err(error)
            }
            None => Ok(()),
        }
    }

    /// Ends the batch and reads all its answers.
    pub(super) async fn end(&mut self) -> Result<Answer, ServerError> {
        build::sync(&mut self.connection.out);
        if self.connection.out.len() >= BATCH_BYTES_MAX {
            self.connection.send_large(&mut self.answer).await?;
        }
        let answer = self.connection.exchange().await?;
        match self.answer.error.take() {
            Some(error) => Err(error),
            None => answer.ok(),
        }
    }

    /// Compares the number of rows of the last statement, before anything is prepared.
    async fn changed(&mut self, rows: u64) -> Result<(), ServerError> {
        let answer = self.end().await?;
        let tag = answer.tags.last().or(self.answer.tags.last());
        let changed = tag.and_then(|tag| crate::pg::message::tag_count(tag));
        if changed == Some(rows) {
            return Ok(());
        }
        let message = format!("a statement that changed {rows} rows changed {changed:?} on the follower");
        Err(ServerError::Answer { sqlstate: "22012".into(), message })
    }

    async fn copy(&mut self, log: &EffectLog, text: &[u8], data: Range, rows: u64) -> Result<(), ServerError> {
        self.end().await?;
        build::query(&mut self.connection.out, text);
        let mut answer = Answer::default();
        let mut at = 0;
        while at < data.len && answer.status == 0 {
            let len = COPY_PIECE_BYTES.min(data.len - at);
            self.read(log, Range { start: data.start + at, len })?;
            build::copy_data(&mut self.connection.out, &self.buffer);
            self.connection.send_large(&mut answer).await?;
            at += len;
        }
        // Status is there already if the COPY failed: the server ended it, and ignores what else arrives.
        if answer.status == 0 {
            build::copy_done(&mut self.connection.out);
            let rest = self.connection.exchange().await?;
            answer.error = answer.error.or(rest.error);
            answer.tags.extend(rest.tags);
        }
        let answer = answer.ok()?;
        let copied = answer.tags.last().and_then(|t| crate::pg::message::tag_count(t));
        if copied == Some(rows) {
            Ok(())
        } else {
            Err(ServerError::Answer {
                sqlstate: "22012".into(),
                message: format!("COPY of {rows} rows gave {copied:?} on the follower"),
            })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_prepared_transactions_are_read_back_and_others_are_not_ours() {
        let name = gid("shop", 7, 12, 99);
        assert_eq!(parse_gid(&name, "shop"), Some((12, 99)));
        for foreign in
            ["pgtandem:shop2:7:12:99", "app-1", "pgtandem:shop:7:12", "pgtandem:shop:7:12:99:1", "pgtandem:shop:7:x:9"]
        {
            assert_eq!(parse_gid(foreign, "shop"), None, "{foreign}");
        }
    }
}
