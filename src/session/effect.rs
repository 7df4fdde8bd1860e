//! From what a statement did on the leader to its effect.

use std::sync::Arc;
use std::time::Instant;

use bytes::Bytes;

use crate::pg::build::{self, ClientError};
use crate::pg::message::{self, Reader};
use crate::replicate::effects::{Effect, EffectRole, EffectsError, Range, StatementText};
use crate::replicate::schema::Context;
use crate::session::parameters;
use crate::session::run::Session;
use crate::session::simple::refused;
use crate::session::wire::{End, Until};
use crate::sql::conditional::Depends;
use crate::sql::encoding;
use crate::sql::plan::{EffectPlan, Role, Write};
use crate::sql::refuse::several_matches;
use crate::sql::rows::{Many, WHOLE_BYTES_MAX};
use crate::sql::shape::Shape;

/// What became of the rows or the data of a statement: where they are in the effect list, and how many.
pub type Kept = Result<Option<(Range, u64)>, ClientError>;

impl From<EffectsError> for ClientError {
    fn from(error: EffectsError) -> Self {
        let hint = match error {
            EffectsError::TooLarge(_) => "Split the transaction, or raise proxy.effects_disk_max.",
            EffectsError::TooMany => "Split the transaction.",
            EffectsError::Io { .. } => "Make room in the proxy's state_dir.",
        };
        ClientError::error("53400", error.to_string(), hint)
    }
}

pub(super) fn effect_role(owner: Option<&Role>) -> EffectRole {
    match owner {
        Some(role) if role.superuser => EffectRole::Own,
        Some(role) => EffectRole::Named(role.name.as_str().into()),
        None => EffectRole::Client,
    }
}

impl Session {
    /// What some statements need before the leader gets them ([`Write::asks_first`]), for both protocols. All that was sent before is answered:
    /// an error of that would be taken for one of ours.
    ///
    /// # Errors
    /// If the connection to the leader ends.
    pub async fn before_write(
        &mut self,
        write: &Write,
        text: &str,
        parameters: &[u8],
    ) -> Result<Result<(), ClientError>, End> {
        if let Some(name) = &write.edits.executes
            && let Err(error) = self.only_reads(name).await?
        {
            return Ok(Err(error));
        }
        if let Err(error) = self.before_conditional(write).await? {
            return Ok(Err(error));
        }
        match &write.effect {
            EffectPlan::LargeObject(call) => self.before_large_object(*call, text, parameters).await,
            EffectPlan::CopiedRows(rows) => self.before_copied_rows(rows).await,
            EffectPlan::Text { .. } if write.edits.ask_matches => self.ask_matches(text).await,
            _ => Ok(Ok(())),
        }
    }

    /// Whether a row would get its new values from one of several others. The tables are locked, so it stays as it is.
    async fn ask_matches(&mut self, text: &str) -> Result<Result<(), ClientError>, End> {
        let several = match crate::sql::matches::question(text) {
            Some(question) => self.ask_leader(&question, &[]).await?,
            None => Ok(vec![String::new()]),
        };
        Ok(several.and_then(|rows| if rows.is_empty() { Ok(()) } else { Err(refused(&several_matches())) }))
    }

    /// Takes the answer of a write, for both protocols, and keeps its effect; its command tag is held, in the results. If the server
    /// had an error, it is in the results, too; an
    /// error given is ours.
    pub async fn take_write(
        &mut self,
        write: &Write,
        shape: &Shape,
        text: &str,
        parameters: &[u8],
        types: Arc<[u8]>,
    ) -> Result<Result<(), ClientError>, End> {
        if write.depends != Depends::No {
            self.wire.pump(Until::Answered).await?;
            if self.wire.results.error.is_some() {
                return Ok(Ok(()));
            }
            match self.after_conditional(write).await? {
                Ok(true) => {}
                Ok(false) => return Ok(Ok(())),
                Err(error) => return Ok(Err(error)),
            }
        }
        match &write.effect {
            EffectPlan::Copy { dates, fill: Some(fill), .. } => {
                self.take_filled_copy(write, fill, dates.as_ref(), shape, text).await
            }
            EffectPlan::Copy { dates, .. } => {
                self.wire.pump(Until::AnsweredOrCopy).await?;
                if !self.wire.results.copy_in {
                    return Ok(Ok(()));
                }
                let kept = self.keep_copy_data(dates.as_ref()).await?;
                let done = self.wire.pump(Until::Answered).await;
                if std::mem::take(&mut self.wire.hide_errors) {
                    // The COPY was made to fail: the client hears why.
                    self.wire.results.error = None;
                }
                done?;
                if self.wire.results.error.is_some() {
                    return Ok(Ok(()));
                }
                Ok(kept.and_then(|data| self.copy_effect(write, shape, text, data)))
            }
            EffectPlan::Rows { .. } => {
                let kept = self.keep_rows().await?;
                if self.wire.results.error.is_some() {
                    return Ok(Ok(()));
                }
                Ok(kept.and_then(|rows| self.rows_effect(write, rows)))
            }
            EffectPlan::CopiedRows(rows) => self.take_copied_rows(rows, write).await,
            EffectPlan::LargeObject(call) => self.take_large_object(*call, text, parameters).await,
            EffectPlan::Carried { rows, sequences } => self.take_carried(rows, sequences, write, shape, text).await,
            EffectPlan::Text { .. } => {
                // The session's values are the same in every row.
                self.wire.rows_kept_max = 1;
                let done = self.wire.pump(Until::Answered).await;
                self.wire.rows_kept_max = usize::MAX;
                done?;
                if self.wire.results.error.is_some() {
                    return Ok(Ok(()));
                }
                let text = match self.with_verifier(write, text).await? {
                    Ok(text) => text,
                    Err(error) => return Ok(Err(error)),
                };
                if let Err(error) = self.ask_values(write).await? {
                    return Ok(Err(error));
                }
                Ok(self.text_effect_with(write, shape, &text, parameters, types))
            }
        }
    }

    pub(super) fn effect_context(&self) -> Result<Arc<Context>, ClientError> {
        self.context.clone().ok_or_else(|| {
            ClientError::error(
                "XX000",
                "the settings of the session are not known",
                "Report this as a bug of pgtandem.",
            )
        })
    }

    /// Takes locks for a statement that relation locks order. False: it failed, and the client has the error.
    pub async fn lock_tables(&mut self, write: &Write) -> Result<bool, End> {
        let EffectPlan::Text { lock_tables, .. } = &write.effect else { return Ok(true) };
        if lock_tables.is_empty() {
            return Ok(true);
        }
        let list: Vec<String> = lock_tables.iter().map(u32::to_string).collect();
        let list = format!("{{{}}}", list.join(","));
        let secret = Arc::clone(&self.secret);
        self.wire.clear_results();
        self.hidden("pgtandem_p", "pgtandem_lock", &[Some(secret.as_bytes()), Some(list.as_bytes())]);
        self.end_hidden();
        self.wire.pump(Until::Answered).await?;
        Ok(self.wire.results.error.is_none())
    }

    /// What every effect brings with it.
    pub(super) fn note(&mut self, write: &Write) {
        self.effects_since.get_or_insert_with(Instant::now);
        self.log.deferrable_constraints |= write.deferrable_constraints;
        if write.ddl {
            self.log.ddl = true;
            self.ddl_under_way = true;
            // From here to the end of the transaction the catalog is this session's alone.
            self.has_own_catalog = true;
            self.own_plans.clear();
        }
        if write.barrier {
            self.log.barrier = Some(self.hub.gate.next_number());
        }
    }

    /// An effect of text: the client's statement, with its session's values as literals. Types and values of parameters are as in
    /// `Parse` and `Bind`.
    pub fn text_effect_with(
        &mut self,
        write: &Write,
        shape: &Shape,
        text: &str,
        parameters: &[u8],
        types: Arc<[u8]>,
    ) -> Result<(), ClientError> {
        let EffectPlan::Text { owner, counted, .. } = &write.effect else { return Ok(()) };
        let count = self.wire.results.tag.as_deref().and_then(message::tag_count);
        // No rows, no effect: an INSERT that was run to its end before answers so, too.
        if count == Some(0) || (*counted && count.is_none()) {
            return Ok(());
        }
        let context = self.effect_context()?;
        let values = self.wire.results.rows.first();
        let values = values.map(|row| values_of(row, context.client_encoding())).unwrap_or_default();
        let shared = if parameters.is_empty() { write.shared_text(text, shape, count) } else { None };
        if let Some((shared, literals)) = shared {
            let bound: Vec<Option<&[u8]>> = literals.iter().map(|v| Some(v.as_bytes())).collect();
            let effect = Effect::Statement {
                context,
                role: effect_role(owner.as_ref()),
                text: StatementText::Shared(Arc::clone(&shared.text)),
                types: Arc::clone(&shared.types),
                parameters: self.log.append(&build::text_values(&bound))?,
            };
            self.log.push(effect)?;
            self.note(write);
            return Ok(());
        }
        let follower_text: Arc<str> =
            write.follower_text(text, shape, &values, if *counted { count } else { None }).into();
        let (mut parameters, mut types) = (std::borrow::Cow::Borrowed(parameters), types);
        if !parameters.is_empty() && (write.client_returning || parameters::has_user_types(&types)) {
            let made = parameters::for_text(&follower_text, &types, &parameters);
            let (new_types, new_parameters) =
                made.map_err(|error| ClientError::error("08P01", error.to_string(), ""))?;
            types = Arc::from(&new_types[..]);
            parameters = new_parameters.to_vec().into();
        }
        let parameters = if parameters.is_empty() { Range::default() } else { self.log.append(&parameters)? };
        let text = if parameters.len > 0 {
            StatementText::Shared(self.intern(follower_text))
        } else {
            StatementText::Once(self.log.append(&encoding::encode(&follower_text, context.client_encoding()))?)
        };
        let effect = Effect::Statement { context, role: effect_role(owner.as_ref()), text, types, parameters };
        self.log.push(effect)?;
        if let Some(rows) = count.filter(|_| write.edits.compare_count) {
            self.log.push(Effect::Changed { rows })?;
        }
        self.note(write);
        Ok(())
    }

    /// SET CONSTRAINTS that the leader has done inside a transaction: followers do the same before what comes after it.
    ///
    /// # Errors
    /// If the list is full.
    pub fn set_constraints_effect(&mut self, text: &str) -> Result<(), ClientError> {
        let context = self.effect_context()?;
        let text = encoding::encode(text, context.client_encoding());
        let text = StatementText::Once(self.log.append(&text)?);
        let (types, parameters) = (Arc::from([]), Range::default());
        self.log.push(Effect::Statement { context, role: EffectRole::Own, text, types, parameters })?;
        self.effects_since.get_or_insert_with(Instant::now);
        Ok(())
    }

    /// The session's values of a statement that can not return them: put where a RETURNING would have brought them.
    async fn ask_values(&mut self, write: &Write) -> Result<Result<(), ClientError>, End> {
        if write.edits.asked.is_empty() {
            return Ok(Ok(()));
        }
        let results = std::mem::take(&mut self.wire.results);
        let given = self.ask_session(&write.edits.asked).await;
        self.wire.results = results;
        Ok(given?.map(|values| {
            let mut row = Vec::new();
            for value in values {
                row.extend_from_slice(&u32::try_from(value.len()).unwrap_or(0).to_be_bytes());
                row.extend_from_slice(value.as_bytes());
            }
            self.wire.results.rows = vec![row.into()];
        }))
    }

    /// The same text for many executions is kept once.
    fn intern(&mut self, text: Arc<str>) -> Arc<str> {
        match &self.last_text {
            Some(last) if *last == text => Arc::clone(last),
            _ => {
                self.last_text = Some(Arc::clone(&text));
                text
            }
        }
    }

    /// Takes the hidden columns of a statement's rows into the effect list, as they come.
    pub async fn keep_rows(&mut self) -> Result<Kept, End> {
        let mut kept: Result<(Range, u64), ClientError> = Ok((Range::default(), 0));
        loop {
            self.wire.pump(Until::Rows).await?;
            for row in std::mem::take(&mut self.wire.results.rows) {
                self.touched.see_row(&row);
                if let Ok((range, count)) = &mut kept {
                    match self.keep_row(&row) {
                        Ok(added) => {
                            *range = if *count == 0 { added } else { Range { len: range.len + added.len, ..*range } };
                            *count += 1;
                        }
                        Err(error) => kept = Err(error),
                    }
                }
            }
            self.wire.results.row_bytes = 0;
            if self.wire.expects.is_empty() {
                return Ok(kept.map(|(range, count)| (count > 0).then_some((range, count))));
            }
            self.wire.flush_client().await?;
        }
    }

    /// The values of a row are coded in `DataRow` as in `Bind`: a length and bytes each.
    fn keep_row(&mut self, values: &Bytes) -> Result<Range, ClientError> {
        let mut r = Reader::new(b'D', values);
        let mut columns = 0_u16;
        while !r.rest().is_empty() && r.value().is_ok() {
            columns += 1;
        }
        let mut entry = Vec::with_capacity(values.len() + 8);
        let len = u32::try_from(values.len() + 4).unwrap_or(u32::MAX);
        entry.extend_from_slice(&len.to_be_bytes());
        entry.extend_from_slice(&[0, 0]);
        entry.extend_from_slice(&columns.to_be_bytes());
        entry.extend_from_slice(values);
        Ok(self.log.append(&entry)?)
    }

    /// The effect of a statement whose rows were kept.
    pub fn rows_effect(&mut self, write: &Write, kept: Option<(Range, u64)>) -> Result<(), ClientError> {
        let (EffectPlan::Rows { owner, texts }, Some((data, rows))) = (&write.effect, kept) else { return Ok(()) };
        if matches!(texts.many, Many::Arrays { whole: true, .. }) && data.len > WHOLE_BYTES_MAX {
            return Err(ClientError::error(
                "54000",
                format!(
                    "the rows of one statement are more than {} MB, and constraints need them all at once",
                    WHOLE_BYTES_MAX >> 20
                ),
                "Change fewer rows in one statement.",
            ));
        }
        let context = self.effect_context()?;
        let role = effect_role(owner.as_ref());
        self.log.push(Effect::Rows { context, role, texts: Arc::clone(texts), data, rows })?;
        self.note(write);
        Ok(())
    }

    /// The effect of a COPY whose data were kept.
    pub fn copy_effect(
        &mut self,
        write: &Write,
        shape: &Shape,
        text: &str,
        kept: Option<(Range, u64)>,
    ) -> Result<(), ClientError> {
        let (EffectPlan::Copy { owner, .. }, Some((data, _))) = (&write.effect, kept) else { return Ok(()) };
        let rows = self.wire.results.tag.as_deref().and_then(message::tag_count).unwrap_or(0);
        if rows == 0 {
            return Ok(());
        }
        let context = self.effect_context()?;
        let role = effect_role(owner.as_ref());
        let text = write.follower_text(text, shape, &[], None).into();
        self.log.push(Effect::Copy { context, role, text, data, rows, after_triggers: false })?;
        self.note(write);
        Ok(())
    }
}

/// Values of one row, as text.
fn values_of(row: &[u8], encoding: &str) -> Vec<Option<String>> {
    let mut r = Reader::new(b'D', row);
    let mut values = Vec::new();
    while !r.rest().is_empty() {
        match r.value() {
            Ok(value) => values.push(
                value.map(|v| encoding::decode(v, encoding).unwrap_or_else(|| String::from_utf8_lossy(v)).into_owned()),
            ),
            Err(_) => break,
        }
    }
    values
}

/// Makes a message of ours out of an error, as a frame.
#[must_use]
pub fn client_error_frame(error: &ClientError) -> bytes::BytesMut {
    let mut out = bytes::BytesMut::new();
    error.write(&mut out);
    out
}

/// Ends a frame list with the client's own tag.
pub fn put_tag(out: &mut bytes::BytesMut, tag: &[u8]) {
    build::frame(out, b'C', |b| {
        b.extend_from_slice(tag);
        b.extend_from_slice(&[0]);
    });
}
