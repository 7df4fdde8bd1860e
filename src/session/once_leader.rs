//! What a statement of the `once` lane needs of the leader's session: its limits, its answer held back, what it changed.

use std::time::{Duration, Instant};

use crate::pg::build;
use crate::pg::message;
use crate::replicate::deltas::{self, Delta};
use crate::session::limits::{Limits, OwnLimits};
use crate::session::once::{Attempt, Ended, How, OnceCall, refused};
use crate::session::run::Session;
use crate::session::simple::error_frame;
use crate::session::wire::{End, Expect, Mode, Until};

/// Out of time, or a lock that was not free.
const CANCELLED: &[u8] = b"57014";
const LOCK_NOT_AVAILABLE: &[u8] = b"55P03";
const DEADLOCK: &[u8] = b"40P01";

/// What the leader said of a statement that ended.
pub(super) struct OnLeader {
    pub rows: Option<u64>,
    pub deltas: Vec<Delta>,
}

impl Session {
    /// Sends statements of ours and waits. False: one failed; its error is in the results.
    pub(super) async fn ours(&mut self, statements: &[(&str, &[Option<&[u8]>])]) -> Result<bool, End> {
        self.wire.clear_results();
        self.wire.hide_errors = true;
        for (statement, values) in statements {
            self.hidden("pgtandem_p", statement, values);
        }
        build::sync(&mut self.wire.to_server);
        self.wire.expects.push_back(Expect::Sync { hidden: true });
        let done = self.wire.pump(Until::Answered).await;
        self.wire.hide_errors = false;
        done?;
        Ok(self.wire.results.error.is_none())
    }

    pub(super) fn value(&self, at: usize) -> String {
        let value = self.wire.results.values.get(at).and_then(Option::as_ref);
        value.map(|value| String::from_utf8_lossy(value).into_owned()).unwrap_or_default()
    }

    /// An error of the server's to a statement of ours, told to the client.
    pub(super) fn told(&mut self) -> Attempt {
        let error = self.wire.results.error.take().unwrap_or_default();
        self.wire.to_client.extend_from_slice(&error_frame(&error));
        Attempt::Ended(Ended::Failed)
    }

    /// The values of expressions as text. `None`: the server had an error.
    pub(super) async fn ask_each(&mut self, expressions: &[String]) -> Result<Option<Vec<Option<String>>>, End> {
        if expressions.is_empty() {
            return Ok(Some(Vec::new()));
        }
        let rows: Vec<String> =
            expressions.iter().enumerate().map(|(at, e)| format!("({at}, ({e})::pg_catalog.text)")).collect();
        let text = format!("SELECT v.x FROM (VALUES {}) AS v(i, x) ORDER BY v.i", rows.join(", "));
        self.wire.clear_results();
        self.wire.hide_errors = true;
        self.parse_ours(text.as_bytes(), &[]);
        self.hidden("pgtandem_p", "pgtandem_q", &[]);
        self.close_statement("pgtandem_q");
        let done = self.end_ours().await;
        self.wire.hide_errors = false;
        done?;
        if self.wire.results.error.is_some() {
            return Ok(None);
        }
        let values = std::mem::take(&mut self.wire.results.values).into_iter();
        Ok(Some(values.map(|v| v.map(|v| String::from_utf8_lossy(&v).into_owned())).collect()))
    }

    /// Prepares a text that is needed this once, as `pgtandem_q`. The last one is still there if it failed, because the server
    /// skipped the Close behind it.
    pub(super) fn parse_ours(&mut self, text: &[u8], types: &[u8]) {
        self.close_statement("pgtandem_q");
        build::parse(&mut self.wire.to_server, b"pgtandem_q", text, types);
        self.wire.expects.push_back(Expect::Parse { hidden: true });
    }

    fn close_statement(&mut self, name: &str) {
        build::close(&mut self.wire.to_server, b'S', name.as_bytes());
        self.wire.expects.push_back(Expect::Close { hidden: true });
    }

    async fn end_ours(&mut self) -> Result<(), End> {
        build::sync(&mut self.wire.to_server);
        self.wire.expects.push_back(Expect::Sync { hidden: true });
        self.wire.pump(Until::Answered).await
    }

    /// SQL names of the types of the statement's parameters, as the server has found them.
    pub(super) async fn parameter_types(&mut self, text: &str, types: &[u8]) -> Result<Option<Vec<String>>, End> {
        self.wire.clear_results();
        self.wire.hide_errors = true;
        self.parse_ours(text.as_bytes(), types);
        build::describe(&mut self.wire.to_server, b'S', b"pgtandem_q");
        self.wire.expects.push_back(Expect::Describe { mode: Mode::Hidden });
        self.close_statement("pgtandem_q");
        let done = self.end_ours().await;
        self.wire.hide_errors = false;
        done?;
        if self.wire.results.error.is_some() {
            return Ok(None);
        }
        // A count of two bytes, then four for each type.
        let types = std::mem::take(&mut self.wire.results.parameter_types);
        let oids = types.get(2..).unwrap_or_default().chunks_exact(4).filter_map(|oid| oid.first_chunk());
        let types: Vec<u32> = oids.map(|oid| u32::from_be_bytes(*oid)).collect();
        let names: Vec<String> = types.iter().map(|oid| format!("pg_catalog.format_type({oid}, NULL)")).collect();
        let names = self.ask_each(&names).await?;
        Ok(names.map(|names| names.into_iter().map(Option::unwrap_or_default).collect()))
    }

    /// The statement on the leader, its answer held back. An error is told to the client, unless it is that of a limit of ours.
    pub(super) async fn on_leader(
        &mut self,
        call: &OnceCall<'_>,
        limits: Option<&Limits>,
    ) -> Result<Result<OnLeader, Attempt>, End> {
        if !self.ours(&[("pgtandem_limits", &[]), ("pgtandem_deltas", &[])]).await? {
            return Ok(Err(self.told()));
        }
        let (before_limits, before) = (self.value(0), self.value(1));
        let own = OwnLimits::read(&before_limits);
        let mut waited_ms = u64::MAX;
        if let Some(limits) = limits {
            waited_ms = limits.statement_ms;
            let statement =
                own.statement_ms.map_or(limits.statement_ms, |own| own.min(limits.statement_ms)).to_string();
            let lock = match limits.lock_ms {
                Some(ours) => own.lock_ms.map_or(ours, |own| own.min(ours)),
                None => 0,
            };
            let lock = lock.to_string();
            let values = [Some(statement.as_bytes()), Some(lock.as_bytes())];
            if !self.ours(&[("pgtandem_limit", &values)]).await? {
                return Ok(Err(self.told()));
            }
        }
        let started = Instant::now();
        self.send_once(call).await?;
        if let Some(error) = self.wire.results.error.take() {
            let sqlstate = message::error_field(&error, b'C').unwrap_or_default();
            let ours = limits.is_some()
                && match sqlstate {
                    CANCELLED => started.elapsed() >= Duration::from_millis(waited_ms),
                    LOCK_NOT_AVAILABLE => {
                        own.lock_ms.is_none_or(|own| limits.and_then(|l| l.lock_ms).is_some_and(|ours| ours <= own))
                    }
                    DEADLOCK => true,
                    _ => false,
                };
            if ours {
                return Ok(Err(Attempt::OutOfTime));
            }
            self.wire.to_client.extend_from_slice(&error_frame(&error));
            return Ok(Err(Attempt::Ended(Ended::Failed)));
        }
        let tag = self.wire.results.tag.clone();
        let rows = tag.as_deref().filter(|tag| counts(tag)).and_then(message::tag_count);
        self.last_tag = tag;
        let restore = [Some(own.statement.as_bytes()), Some(own.lock.as_bytes())];
        let mut last: Vec<(&str, &[Option<&[u8]>])> = vec![("pgtandem_deltas", &[])];
        if limits.is_some() {
            last.push(("pgtandem_limit", &restore));
        }
        if !self.ours(&last).await? {
            return Ok(Err(self.told()));
        }
        let after = self.value(0);
        match deltas::between(&before, &after) {
            Some(deltas) => Ok(Ok(OnLeader { rows, deltas })),
            None => Ok(Err(Attempt::Ended(refused(
                "code is called or fired only while track_counts is on: what it did is compared by these counts",
                "Set track_counts = on on every server.",
            )))),
        }
    }

    async fn send_once(&mut self, call: &OnceCall<'_>) -> Result<(), End> {
        self.wire.clear_results();
        self.wire.hide_errors = true;
        match call.how {
            How::Simple => {
                self.wire.hold_ready = true;
                self.wire.hold_tag = call.hold_tag;
                build::query(&mut self.wire.to_server, call.text.as_bytes());
                self.wire.expects.push_back(Expect::Query { mode: Mode::Forward });
            }
            How::Extended { types, parameters, formats, in_parts } => {
                (self.wire.hold_rows, self.wire.hold_tag) = (in_parts, in_parts);
                self.parse_ours(call.text.as_bytes(), types);
                build::bind_raw(&mut self.wire.to_server, b"pgtandem_p", b"pgtandem_q", parameters, formats);
                build::execute(&mut self.wire.to_server, b"pgtandem_p", 0);
                self.wire.expects.extend([Expect::Bind { hidden: true }, Expect::Execute { mode: Mode::Forward }]);
                build::close(&mut self.wire.to_server, b'P', b"pgtandem_p");
                self.wire.expects.push_back(Expect::Close { hidden: true });
                self.close_statement("pgtandem_q");
                build::sync(&mut self.wire.to_server);
                self.wire.expects.push_back(Expect::Sync { hidden: true });
            }
        }
        let done = self.wire.pump(Until::Answered).await;
        (self.wire.hold_ready, self.wire.hold_tag, self.wire.hide_errors) = (false, false, false);
        self.wire.hold_rows = false;
        done
    }
}

/// Whether a command tag tells the rows that a statement processed.
fn counts(tag: &[u8]) -> bool {
    [&b"SELECT "[..], b"INSERT ", b"UPDATE ", b"DELETE ", b"MERGE "].iter().any(|verb| tag.starts_with(verb))
}
