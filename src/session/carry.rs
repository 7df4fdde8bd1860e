//! Definitions that give rows values: the leader is asked what followers do instead, and its rows are read for them.
//!
//! The steps come from `pgtandem.followers_do` (`replicate/definitions.sql`), which runs with fixed rights and search_path, so that no
//! name of the client's can lead them astray.

use std::sync::Arc;

use bytes::Bytes;

use crate::pg::build::{self, ClientError};
use crate::replicate::effects::{Effect, EffectRole, Range, StatementText};
use crate::session::run::Session;
use crate::session::simple::refused;
use crate::session::wire::{End, Expect, Mode, Until};
use crate::sql::plan::{Carried, Write};
use crate::sql::refuse::refusal;
use crate::sql::shape::Shape;

/// How values are written and read whatever the client's settings are, and row-level security hides nothing: it fails.
const SETTINGS: &str = "SELECT pg_catalog.set_config('datestyle', 'ISO', true), \
     pg_catalog.set_config('extra_float_digits', '3', true), pg_catalog.set_config('row_security', 'off', true), \
     pg_catalog.set_config('search_path', 'pg_catalog', true)";

const FOLLOWERS_DO: &str = "SELECT pgtandem.followers_do($1, $2, $3::pg_catalog.int8::pg_catalog.oid, \
     COALESCE($4, pg_catalog.current_schema()::pg_catalog.text), $5, $6::pg_catalog.text[], $7::pg_catalog.int8[]::pg_catalog.oid[])";

/// Asks the leader's session for one column of text.
pub(super) type Answered<T> = Result<Result<T, ClientError>, End>;

impl Session {
    /// Takes the answer of such a statement and keeps its effects. If the server had an error, it is in the results.
    pub async fn take_carried(
        &mut self,
        carried: &Carried,
        sequences: &[u32],
        write: &Write,
        shape: &Shape,
        text: &str,
    ) -> Answered<()> {
        self.wire.pump(Until::Answered).await?;
        if self.wire.results.error.is_some() {
            return Ok(Ok(()));
        }
        let results = std::mem::take(&mut self.wire.results);
        let with_rows = results.tag.as_deref().and_then(crate::pg::message::tag_count).is_some();
        let kept = self.carry(carried, sequences, with_rows, write, shape, text).await;
        self.wire.results = results;
        kept
    }

    async fn carry(
        &mut self,
        carried: &Carried,
        sequences: &[u32],
        with_rows: bool,
        write: &Write,
        shape: &Shape,
        text: &str,
    ) -> Answered<()> {
        let secret = Arc::clone(&self.secret);
        let mut values: [Option<String>; 7] = [const { None }; 7];
        values[0] = Some(secret.to_string());
        values[6] = Some(array(&sequences.iter().map(u32::to_string).collect::<Vec<_>>()));
        match carried {
            // IF NOT EXISTS, and it did exist.
            Carried::New { no_data: false, .. } if !with_rows => return Ok(Ok(())),
            Carried::New { schema, name, view, .. } => {
                let kind = match (view, with_rows) {
                    (true, _) => "view",
                    (false, true) => "table with rows",
                    (false, false) => "table",
                };
                values[1] = Some(kind.to_owned());
                values[3].clone_from(schema);
                values[4] = Some(name.clone());
            }
            Carried::Text { relation } => {
                values[1] = Some("text".to_owned());
                values[2] = Some(relation.to_string());
            }
            Carried::Refresh { view } => {
                values[1] = Some("refresh".to_owned());
                values[2] = Some(view.to_string());
            }
            Carried::Rows { table, retyped } => {
                values[1] = Some("rows".to_owned());
                values[2] = Some(table.to_string());
                values[5] = Some(array(retyped));
            }
            Carried::Defaults { table, columns, .. } => {
                values[1] = Some("defaults".to_owned());
                values[2] = Some(table.to_string());
                values[5] = Some(array(columns));
            }
        }
        let values: Vec<Option<&[u8]>> = values.iter().map(|value| value.as_deref().map(str::as_bytes)).collect();
        let steps = match self.ask_leader(FOLLOWERS_DO, &values).await? {
            Ok(steps) => steps,
            Err(error) => return Ok(Err(error)),
        };
        let mut literals = Vec::new();
        if let Carried::Defaults { values, .. } = carried {
            match self.ask_session(values).await? {
                Ok(given) => literals = given.into_iter().map(Some).collect(),
                Err(error) => return Ok(Err(error)),
            }
        }
        let mut rows = (Range::default(), 0);
        let mut owner = EffectRole::Client;
        for step in steps {
            let body = step.get(1..).unwrap_or_default();
            let pushed = match step.as_bytes().first() {
                Some(b'C') => self.push_step(EffectRole::Client, body),
                Some(b'O') => self.push_step(EffectRole::Own, body),
                Some(b'K') => {
                    let own = write.follower_text(text, shape, &literals, None);
                    self.push_step(EffectRole::Client, &own)
                }
                Some(b'L') => {
                    rows = match self.copy_from_leader(body).await? {
                        Ok(rows) => rows,
                        Err(error) => return Ok(Err(error)),
                    };
                    Ok(())
                }
                Some(b'F') if rows.1 == 0 => Ok(()),
                Some(b'F') => self.push_rows(owner.clone(), body, rows),
                Some(b'D') => self.push_step(owner.clone(), body),
                Some(b'W') => {
                    owner = if body.is_empty() { EffectRole::Own } else { EffectRole::Named(body.into()) };
                    Ok(())
                }
                Some(b'T') => {
                    self.has_temp_objects = true;
                    self.has_own_catalog = true;
                    self.own_plans.clear();
                    return Ok(Ok(()));
                }
                _ => Err(not_carried(body)),
            };
            if let Err(error) = pushed {
                return Ok(Err(error));
            }
        }
        self.note(write);
        Ok(Ok(()))
    }

    /// A statement for followers, after those before it.
    pub fn push_step(&mut self, role: EffectRole, text: &str) -> Result<(), ClientError> {
        let context = self.effect_context()?;
        let text = StatementText::Once(self.log.append(&self.encoded(text))?);
        let effect = Effect::Statement { context, role, text, types: Arc::from([]), parameters: Range::default() };
        Ok(self.log.push(effect)?)
    }

    fn push_rows(&mut self, role: EffectRole, text: &str, (data, rows): (Range, u64)) -> Result<(), ClientError> {
        let context = self.effect_context()?;
        Ok(self.log.push(Effect::Copy { context, role, text: text.into(), data, rows, after_triggers: false })?)
    }

    /// Texts of these expressions, as the client's transaction on the leader has them.
    pub async fn ask_session(&mut self, expressions: &[String]) -> Answered<Vec<String>> {
        let rows: Vec<String> = expressions.iter().enumerate().map(|(at, value)| format!("({at}, {value})")).collect();
        let query = format!("SELECT v FROM (VALUES {}) AS x(at, v) ORDER BY at", rows.join(", "));
        self.ask_leader(&query, &[]).await
    }

    /// Rows of one column of text, from the client's own session and transaction on the leader.
    pub async fn ask_leader(&mut self, text: &str, values: &[Option<&[u8]>]) -> Answered<Vec<String>> {
        let utf8 = self.context.as_ref().is_some_and(|context| context.client_encoding() == "UTF8");
        self.wire.clear_results();
        self.wire.hide_errors = true;
        self.hidden_text(text, values, Mode::Hidden);
        self.end_hidden();
        let done = self.wire.pump(Until::Answered).await;
        self.wire.hide_errors = false;
        done?;
        if let Some(error) = self.wire.results.error.take() {
            return Ok(Err(of_server(&error)));
        }
        let mut rows = Vec::with_capacity(self.wire.results.values.len());
        for value in std::mem::take(&mut self.wire.results.values) {
            match String::from_utf8(value.unwrap_or_default().to_vec()) {
                Ok(row) if utf8 || row.is_ascii() => rows.push(row),
                _ => {
                    let reason = "its names have characters that are not ASCII, and client_encoding is not UTF8";
                    return Ok(Err(not_carried(reason)));
                }
            }
        }
        Ok(Ok(rows))
    }

    /// A statement of ours that is parsed for this once.
    fn hidden_text(&mut self, text: &str, values: &[Option<&[u8]>], mode: Mode) {
        let (statement, portal) = (b"pgtandem_q", b"pgtandem_p");
        let text = self.encoded(text).into_owned();
        self.parse_ours(&text, &[]);
        build::bind_text(&mut self.wire.to_server, portal, statement, values);
        build::execute(&mut self.wire.to_server, portal, 0);
        build::close(&mut self.wire.to_server, b'P', portal);
        build::close(&mut self.wire.to_server, b'S', statement);
        self.wire.expects.extend([
            Expect::Bind { hidden: true },
            Expect::Execute { mode },
            Expect::Close { hidden: true },
            Expect::Close { hidden: true },
        ]);
    }

    /// The data of a COPY TO STDOUT, kept with the effects: where they are, and how many rows.
    pub(super) async fn copy_from_leader(&mut self, text: &str) -> Answered<(Range, u64)> {
        self.wire.clear_results();
        self.wire.hide_errors = true;
        let taken = self.take_copy(text).await;
        self.wire.hide_errors = false;
        let kept = taken?;
        if let Some(error) = self.wire.results.error.take() {
            return Ok(Err(of_server(&error)));
        }
        Ok(kept)
    }

    async fn take_copy(&mut self, text: &str) -> Answered<(Range, u64)> {
        // The settings end with the savepoint.
        for before in ["SAVEPOINT pgtandem_rows", SETTINGS] {
            self.hidden_text(before, &[], Mode::Hidden);
        }
        self.hidden_text(text, &[], Mode::Keep);
        for after in ["ROLLBACK TO SAVEPOINT pgtandem_rows", "RELEASE SAVEPOINT pgtandem_rows"] {
            self.hidden_text(after, &[], Mode::Hidden);
        }
        self.end_hidden();
        let mut kept: Result<(Range, u64), ClientError> = Ok((Range::default(), 0));
        loop {
            self.wire.pump(Until::Rows).await?;
            for row in std::mem::take(&mut self.wire.results.rows) {
                if let Ok((range, count)) = &mut kept {
                    match self.log.append(&row) {
                        Ok(added) => {
                            *range = if *count == 0 { added } else { Range { len: range.len + added.len, ..*range } };
                            *count += 1;
                        }
                        Err(error) => kept = Err(error.into()),
                    }
                }
            }
            self.wire.results.row_bytes = 0;
            if self.wire.expects.is_empty() {
                return Ok(kept);
            }
        }
    }
}

/// Why a statement's rows can not be carried; the leader has run it, so the transaction fails.
fn not_carried(reason: &str) -> ClientError {
    refused(&refusal(
        format!("what this statement did can not be carried to the other servers: {reason}"),
        "Nothing was changed. Create the table first, then fill it with INSERT or UPDATE.",
    ))
}

/// What the leader answered to a question of ours.
fn of_server(error: &Bytes) -> ClientError {
    let (_, message) = crate::pg::message::error_summary(error);
    not_carried(&message)
}

/// A text array.
fn array(items: &[String]) -> String {
    let quoted: Vec<String> =
        items.iter().map(|item| format!("\"{}\"", item.replace('\\', "\\\\").replace('"', "\\\""))).collect();
    format!("{{{}}}", quoted.join(","))
}
