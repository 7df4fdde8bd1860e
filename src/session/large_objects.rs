//! Large objects: the same numbers and contents on all members, through SQL functions and through FunctionCall messages, which is
//! how libpq's `lo_*` work.
//!
//! Descriptors and positions are the leader's backend's. A write is carried as `lo_put` of the bytes at the position where the
//! leader put them; what is made or removed is found by asking the leader's catalog for what this transaction made or removed.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Instant;

use bytes::Bytes;

use crate::pg::build::{self, ClientError};
use crate::pg::frame::{self, FrameError};
use crate::pg::message::Reader;
use crate::replicate::effects::{Effect, EffectRole, StatementText};
use crate::session::parameters;
use crate::session::run::Session;
use crate::session::simple::{error_frame, refused};
use crate::session::wire::{End, Expect, Until};
use crate::sql::large_objects::{self, Argument, Call};
use crate::sql::refuse::refusal;

/// Bytes of an object that are asked of the leader at once.
const PIECE_BYTES: i64 = 1 << 20;

/// A message with one of these as function is passed or carried; others are refused.
type Answered<T> = Result<Result<T, ClientError>, End>;

/// What a transaction did with large objects so far.
#[derive(Debug, Default)]
pub struct Objects {
    /// Open descriptors and their objects.
    open: HashMap<i32, u32>,
    /// Objects that were made (true) or removed in this transaction, as last carried.
    made: HashMap<u32, bool>,
    /// Position of the descriptor that is written to, before the write.
    before: Option<(i32, i64)>,
}

impl Objects {
    /// Effects were taken back: what was carried is found out anew, and carrying it twice changes nothing.
    pub fn forget_made(&mut self) {
        self.made.clear();
    }
}

/// A FunctionCall message.
struct FunctionCall<'m> {
    function: u32,
    /// Value and whether it is binary.
    arguments: Vec<(Option<&'m [u8]>, bool)>,
}

impl<'m> FunctionCall<'m> {
    fn read(body: &'m [u8]) -> Result<Self, FrameError> {
        let mut r = Reader::new(b'F', body);
        let function = r.u32()?;
        let formats = r.u16()?;
        let formats: Vec<bool> = (0..formats).map(|_| r.u16().map(|format| format == 1)).collect::<Result<_, _>>()?;
        let count = r.u16()?;
        let mut arguments = Vec::new();
        for at in 0..usize::from(count) {
            let binary = if formats.len() > 1 { formats.get(at) } else { formats.first() };
            arguments.push((r.value()?, binary.copied().unwrap_or(false)));
        }
        Ok(Self { function, arguments })
    }

    fn number(&self, at: usize) -> Option<i64> {
        let (value, binary) = self.arguments.get(at)?;
        number(value.as_deref()?, *binary)
    }
}

/// An integer in text or binary form. Object identifiers have no sign.
fn number(value: &[u8], binary: bool) -> Option<i64> {
    match (binary, value.len()) {
        (true, 4) => value.try_into().ok().map(|bytes| i64::from(u32::from_be_bytes(bytes))),
        (true, 8) => value.try_into().ok().map(i64::from_be_bytes),
        (true, _) => None,
        (false, _) => std::str::from_utf8(value).ok()?.trim().parse().ok(),
    }
}

impl Session {
    /// A FunctionCall: outside a block inside one of ours. Those of large objects are carried, others refused.
    pub async fn function_call(&mut self, frame: Bytes) -> Result<(), End> {
        self.catch_up().await?;
        if self.wire.is_skipping() {
            return Ok(());
        }
        if !self.hub.replicates() {
            return self.pass_function(&frame).await;
        }
        if self.own_block && !self.end_own_block_of_batch().await? {
            build::ready_for_query(&mut self.wire.to_client, self.wire.status);
            return Ok(());
        }
        self.in_batch = false;
        let message = FunctionCall::read(frame::body(&frame)).map_err(End::ClientProtocol)?;
        let Some(call) = large_objects::call_of_oid(message.function) else {
            let error = ClientError::error(
                "0A000",
                "a FunctionCall message is supported for large objects alone: what other functions do is not known",
                "Call the function with SELECT.",
            );
            return self.refuse_simple(&error).await;
        };
        if self.wire.status == b'E' || call == Call::Reads {
            return self.pass_function(&frame).await;
        }
        if self.facts.is_none()
            && let Some(error) = self.read_context().await?
        {
            self.wire.to_client.extend_from_slice(&error_frame(&error));
            build::ready_for_query(&mut self.wire.to_client, self.wire.status);
            return Ok(());
        }
        let own = self.wire.status == b'I';
        if own {
            self.open_own_block();
        }
        let position = self.log.position();
        self.wire.hold_ready = true;
        let passed = self.pass_function(&frame).await;
        self.wire.hold_ready = false;
        passed?;
        let mut ok = self.wire.results.error.is_none();
        if ok && let Err(error) = self.carry_function(call, &message).await? {
            self.log.truncate(position);
            self.refuse_in_text(&error).await?;
            ok = false;
        }
        self.end_simple(own, ok).await
    }

    async fn pass_function(&mut self, frame: &[u8]) -> Result<(), End> {
        self.wire.clear_results();
        self.wire.to_server.extend_from_slice(frame);
        self.wire.expects.push_back(Expect::Function);
        self.wire.pump(Until::Answered).await
    }

    async fn carry_function(&mut self, call: Call, message: &FunctionCall<'_>) -> Answered<()> {
        let results = std::mem::take(&mut self.wire.results);
        let descriptor = message.number(0).and_then(|number| i32::try_from(number).ok());
        match call {
            Call::Open => {
                let given = results.values.first().cloned().flatten();
                self.opened(message.number(0), given.as_deref());
                Ok(Ok(()))
            }
            Call::Write => {
                let (Some(descriptor), Some((Some(data), true))) = (descriptor, message.arguments.get(1)) else {
                    return Ok(Err(not_known()));
                };
                let length = i64::try_from(data.len()).unwrap_or(i64::MAX);
                match self.object_and_position(descriptor).await? {
                    Ok((object, after)) => Ok(self.put(object, after - length, data)),
                    Err(error) => Ok(Err(error)),
                }
            }
            Call::Put => match (message.number(0), message.number(1), message.arguments.get(2)) {
                (Some(object), Some(offset), Some((Some(data), true))) => {
                    Ok(u32::try_from(object).map_err(|_| not_known()).and_then(|object| self.put(object, offset, data)))
                }
                _ => Ok(Err(not_known())),
            },
            call => self.carry_call(call, descriptor).await,
        }
    }

    /// Before a SELECT of lowrite: where its descriptor stands.
    pub async fn before_large_object(&mut self, call: Call, text: &str, parameters: &[u8]) -> Answered<()> {
        self.objects.before = None;
        let Some(descriptor) = descriptor(text, parameters).filter(|_| call == Call::Write) else { return Ok(Ok(())) };
        if self.objects.open.contains_key(&descriptor) {
            match self.object_and_position(descriptor).await? {
                Ok((_, position)) => self.objects.before = Some((descriptor, position)),
                Err(error) => return Ok(Err(error)),
            }
        }
        Ok(Ok(()))
    }

    /// After a SELECT of a function of large objects: its effect. The rows that it gave are in the results.
    pub async fn take_large_object(&mut self, call: Call, text: &str, parameters: &[u8]) -> Answered<()> {
        self.wire.rows_kept_max = 1;
        let done = self.wire.pump(Until::Answered).await;
        self.wire.rows_kept_max = usize::MAX;
        done?;
        if self.wire.results.error.is_some() {
            return Ok(Ok(()));
        }
        let results = std::mem::take(&mut self.wire.results);
        let carried = self.carry_select(call, text, parameters, results.rows.first()).await;
        self.wire.results = results;
        carried
    }

    async fn carry_select(&mut self, call: Call, text: &str, parameters: &[u8], row: Option<&Bytes>) -> Answered<()> {
        match call {
            Call::Open => {
                let given = row.and_then(|row| Reader::new(b'D', row).value().ok().flatten());
                let object = large_objects::argument(text).and_then(|argument| value(argument, parameters));
                self.opened(object, given);
                Ok(Ok(()))
            }
            Call::Write => {
                let Some((descriptor, from)) = self.objects.before.take() else { return Ok(Err(not_known())) };
                match self.object_and_position(descriptor).await? {
                    Ok((object, after)) => self.carry_content(object, from, after).await,
                    Err(error) => Ok(Err(error)),
                }
            }
            call => self.carry_call(call, descriptor(text, parameters)).await,
        }
    }

    /// What needs nothing but the descriptor, or not even that.
    async fn carry_call(&mut self, call: Call, descriptor: Option<i32>) -> Answered<()> {
        match (call, descriptor) {
            (Call::Close, descriptor) => {
                descriptor.and_then(|descriptor| self.objects.open.remove(&descriptor));
                Ok(Ok(()))
            }
            (Call::Truncate, Some(descriptor)) => {
                let Some(object) = self.objects.open.get(&descriptor).copied() else { return Ok(Err(not_known())) };
                self.carry_size(object).await
            }
            (Call::Makes, _) => self.carry_made().await,
            _ => Ok(Err(not_known())),
        }
    }

    /// A descriptor was opened: the leader's answer, as text or, at four bytes, binary.
    fn opened(&mut self, object: Option<i64>, answer: Option<&[u8]>) {
        let descriptor = answer.and_then(|answer| number(answer, answer.len() == 4));
        let descriptor = descriptor.and_then(|number| i32::try_from(number).ok());
        if let (Some(object), Some(descriptor)) = (object.and_then(|object| u32::try_from(object).ok()), descriptor) {
            self.objects.open.insert(descriptor, object);
        }
    }

    async fn object_and_position(&mut self, descriptor: i32) -> Answered<(u32, i64)> {
        let Some(object) = self.objects.open.get(&descriptor).copied() else { return Ok(Err(not_known())) };
        let text = descriptor.to_string();
        let asked =
            self.ask_leader("SELECT pg_catalog.lo_tell64($1::pg_catalog.int4)", &[Some(text.as_bytes())]).await?;
        Ok(asked.and_then(|rows| {
            let position = rows.first().and_then(|row| row.parse().ok());
            position.map(|position| (object, position)).ok_or_else(not_known)
        }))
    }

    /// Objects that this transaction made or removed since they were last carried.
    async fn carry_made(&mut self) -> Answered<()> {
        let secret = Arc::clone(&self.secret);
        let lines = match self.ask_leader("SELECT pgtandem.large_objects($1)", &[Some(secret.as_bytes())]).await? {
            Ok(lines) => lines,
            Err(error) => return Ok(Err(error)),
        };
        for line in lines {
            let (made, object) = (line.starts_with('C'), line.get(1..).and_then(|oid| oid.parse::<u32>().ok()));
            let Some(object) = object else { continue };
            if self.objects.made.insert(object, made) == Some(made) {
                continue;
            }
            let exists = "EXISTS (SELECT FROM pg_catalog.pg_largeobject_metadata m WHERE m.oid OPERATOR(pg_catalog.=)";
            let (role, text) = if made {
                (EffectRole::Client, format!("SELECT pg_catalog.lo_create({object}) WHERE NOT {exists} {object})"))
            } else {
                (EffectRole::Own, format!("SELECT pg_catalog.lo_unlink({object}) WHERE {exists} {object})"))
            };
            if let Err(error) = self.push_step(role, &text) {
                return Ok(Err(error));
            }
            self.note_objects();
            if made && let Err(error) = self.carry_content(object, 0, i64::MAX).await? {
                return Ok(Err(error));
            }
        }
        Ok(Ok(()))
    }

    /// The bytes of an object between two positions, as the leader has them.
    async fn carry_content(&mut self, object: u32, from: i64, to: i64) -> Answered<()> {
        let secret = Arc::clone(&self.secret);
        let mut at = from;
        while at < to {
            let length = PIECE_BYTES.min(to - at);
            let (oid, start, bytes) = (object.to_string(), at.to_string(), length.to_string());
            let values =
                [Some(secret.as_bytes()), Some(oid.as_bytes()), Some(start.as_bytes()), Some(bytes.as_bytes())];
            let question = "SELECT pgtandem.large_object($1, $2::pg_catalog.oid, $3, $4)";
            let rows = match self.ask_leader(question, &values).await? {
                Ok(rows) => rows,
                Err(error) => return Ok(Err(error)),
            };
            let Some(data) = rows.first().and_then(|row| from_hexadecimal(row)) else { return Ok(Err(not_known())) };
            if data.is_empty() {
                break;
            }
            if let Err(error) = self.put(object, at, &data) {
                return Ok(Err(error));
            }
            at += i64::try_from(data.len()).unwrap_or(i64::MAX - at);
        }
        Ok(Ok(()))
    }

    async fn carry_size(&mut self, object: u32) -> Answered<()> {
        let (secret, oid) = (Arc::clone(&self.secret), object.to_string());
        let question = "SELECT pgtandem.large_object_bytes($1, $2::pg_catalog.oid)";
        let rows = match self.ask_leader(question, &[Some(secret.as_bytes()), Some(oid.as_bytes())]).await? {
            Ok(rows) => rows,
            Err(error) => return Ok(Err(error)),
        };
        let Some(bytes) = rows.first().and_then(|row| row.parse::<i64>().ok()) else { return Ok(Err(not_known())) };
        // 131072 is INV_WRITE (libpq-fs.h).
        let text = format!(
            "SELECT pg_catalog.lo_truncate64(d.d, {bytes}), pg_catalog.lo_close(d.d) \
             FROM (SELECT pg_catalog.lo_open({object}, 131072) AS d OFFSET 0) d"
        );
        let pushed = self.push_step(EffectRole::Own, &text);
        self.note_objects();
        Ok(pushed)
    }

    fn put(&mut self, object: u32, offset: i64, data: &[u8]) -> Result<(), ClientError> {
        // One format for all: binary. Then object, offset and data.
        let mut bound = Vec::with_capacity(data.len() + 32);
        bound.extend_from_slice(&[0, 1, 0, 1, 0, 3, 0, 0, 0, 4]);
        bound.extend_from_slice(&object.to_be_bytes());
        bound.extend_from_slice(&[0, 0, 0, 8]);
        bound.extend_from_slice(&offset.to_be_bytes());
        bound.extend_from_slice(&u32::try_from(data.len()).map_err(|_| not_known())?.to_be_bytes());
        bound.extend_from_slice(data);
        let context = self.effect_context()?;
        let parameters = self.log.append(&bound)?;
        let text = StatementText::Shared("SELECT pg_catalog.lo_put($1, $2, $3)".into());
        // oid, int8, bytea
        let types = Arc::from([0, 3, 0, 0, 0, 26, 0, 0, 0, 20, 0, 0, 0, 17]);
        self.log.push(Effect::Statement { context, role: EffectRole::Own, text, types, parameters })?;
        self.note_objects();
        Ok(())
    }

    /// Two transactions that write one page wait for nobody: PostgreSQL fails the second one, so followers must have finished the first.
    fn note_objects(&mut self) {
        self.effects_since.get_or_insert_with(Instant::now);
        self.log.barrier = Some(self.hub.gate.next_number());
    }
}

fn descriptor(text: &str, parameters: &[u8]) -> Option<i32> {
    let number = large_objects::argument(text).and_then(|argument| value(argument, parameters))?;
    i32::try_from(number).ok()
}

/// The value of an argument; parameters are as in `Bind`.
fn value(argument: Argument, parameters: &[u8]) -> Option<i64> {
    match argument {
        Argument::Number(number) => Some(number),
        Argument::Parameter(at) => {
            let (value, binary) = parameters::value(parameters, usize::try_from(at).ok()?.checked_sub(1)?)?;
            number(value, binary)
        }
    }
}

fn from_hexadecimal(text: &str) -> Option<Vec<u8>> {
    let digits = text.as_bytes();
    let digit = |byte: u8| char::from(byte).to_digit(16).and_then(|digit| u8::try_from(digit).ok());
    digits.chunks(2).map(|pair| Some(digit(*pair.first()?)? << 4 | digit(*pair.get(1)?)?)).collect()
}

fn not_known() -> ClientError {
    refused(&refusal(
        "what this call did to a large object is not known, so it can not be carried to the other servers",
        "Nothing was changed. Open the object in this transaction with lo_open(oid, mode), or use lo_put(oid, offset, data).",
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn function_calls_are_read_in_either_format() {
        let mut body = 955_u32.to_be_bytes().to_vec();
        body.extend_from_slice(&[0, 1, 0, 1, 0, 2, 0, 0, 0, 4, 0, 0, 0, 7, 0, 0, 0, 2, b'h', b'i', 0, 1]);
        let call = FunctionCall::read(&body).unwrap();
        assert_eq!((call.function, call.number(0)), (955, Some(7)));
        assert_eq!(call.arguments[1], (Some(&b"hi"[..]), true));
        assert!(FunctionCall::read(&body[..20]).is_err());
        assert_eq!(number(b"16401", false), Some(16401));
        assert_eq!(number(&[0xff, 0xff, 0xff, 0xff], true), Some(i64::from(u32::MAX)));
    }

    #[test]
    fn bytes_come_as_hexadecimal() {
        assert_eq!(from_hexadecimal("00ff7a"), Some(vec![0, 255, 122]));
        assert_eq!(from_hexadecimal("0"), None);
        assert_eq!(from_hexadecimal("zz"), None);
    }
}
