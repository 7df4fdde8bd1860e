//! Reads that call functions which are not known: behind the server's read-only guard, and what becomes of those that write.

use bytes::Bytes;

use crate::pg::build::{self, ClientError};
use crate::session::effect::put_tag;
use crate::session::once::{Ended, How, OnceCall};
use crate::session::planning::Planned;
use crate::session::rewrite;
use crate::session::run::Session;
use crate::session::simple::{error_frame, refused};
use crate::session::wire::{End, Expect, Mode, Until};
use crate::sql::plan::Lane;

/// SQLSTATE of a statement that writes behind the read-only guard.
const READ_ONLY_VIOLATION: &[u8] = b"25006";

impl Session {
    /// Runs a read that calls functions that are not known, behind the server's read-only guard. `hold_tag`: its tag waits for
    /// the commit.
    /// False: it failed, and the client has the error.
    pub(super) async fn guarded_simple(&mut self, text: &str, hold_tag: bool) -> Result<bool, End> {
        if self.wire.status == b'I' {
            self.open_own_block();
        }
        let guard = if self.needs_snapshot_first() {
            "SELECT 1; SAVEPOINT pgtandem_guard; SET TRANSACTION READ ONLY"
        } else {
            "SAVEPOINT pgtandem_guard; SET TRANSACTION READ ONLY"
        };
        if !self.hidden_query(guard).await? {
            self.tell_hidden_error();
            return Ok(false);
        }
        let (answered, flushes) = (self.wire.to_client.len(), self.wire.flushes);
        self.wire.clear_results();
        let sent = self.encoded(text);
        build::query(&mut self.wire.to_server, &sent);
        self.wire.expects.push_back(Expect::Query { mode: Mode::Forward });
        self.wire.hold_ready = true;
        self.wire.hide_errors = true;
        self.wire.hold_tag = true;
        let done = self.pump_with_copy().await;
        self.wire.hold_ready = false;
        self.wire.hide_errors = false;
        self.wire.hold_tag = false;
        done?;
        if let Some(error) = self.wire.results.error.take() {
            // What the client has seen already can not be taken back.
            if is_write(&error) && self.wire.flushes == flushes {
                self.wire.to_client.truncate(answered);
                return self.writing_simple(text, hold_tag).await;
            }
            self.tell_guard_error(&error);
            return Ok(false);
        }
        // A cancel may still hit the statement here: its tag comes when nothing can fail any more.
        let tag = self.wire.results.tag.take();
        if !self.hidden_query("RELEASE SAVEPOINT pgtandem_guard").await? {
            self.tell_hidden_error();
            return Ok(false);
        }
        match tag {
            Some(tag) if hold_tag => self.held_tag = Some(tag),
            Some(tag) => put_tag(&mut self.wire.to_client, &tag),
            None => {}
        }
        Ok(true)
    }

    /// A query that wrote behind the guard, once more in its own lane.
    async fn writing_simple(&mut self, text: &str, hold_tag: bool) -> Result<bool, End> {
        if !self.leave_guard().await? {
            return Ok(false);
        }
        let (plan, shape) = match self.plan_writing(text).await? {
            Planned::One { plan, shape, .. } => (plan, shape),
            Planned::Failed(error) => {
                self.wire.to_client.extend_from_slice(&error_frame(&error));
                return Ok(false);
            }
            Planned::Refused(error) => return self.refuse_in_text(&error).await.map(|()| false),
            Planned::Several(_) | Planned::Nothing | Planned::Skipped => return Ok(false),
        };
        let once = match &plan.lane {
            Lane::Once(once) => once,
            Lane::Refused(refusal) => return self.refuse_in_text(&refused(refusal)).await.map(|()| false),
            _ => return self.refuse_in_text(&refused(&crate::sql::refuse::guarded_write())).await.map(|()| false),
        };
        let planned_at = self.planned_at;
        let call = OnceCall { plan: &plan, once, shape: &shape, text, planned_at, how: How::Simple, hold_tag };
        self.once_simple(&call).await
    }

    /// Back to before the guard. False: the server had an error, which the client has.
    pub async fn leave_guard(&mut self) -> Result<bool, End> {
        self.wire.hide_errors = true;
        if self.wire.is_skipping() {
            build::sync(&mut self.wire.to_server);
            self.wire.expects.push_back(Expect::Sync { hidden: true });
        }
        self.hidden("pgtandem_p", "pgtandem_guard_undo", &[]);
        self.hidden("pgtandem_p", "pgtandem_guard_off", &[]);
        build::sync(&mut self.wire.to_server);
        self.wire.expects.push_back(Expect::Sync { hidden: true });
        let done = self.wire.pump(Until::Answered).await;
        self.wire.hide_errors = false;
        done?;
        let left = self.wire.results.error.is_none();
        if !left {
            self.tell_hidden_error();
        }
        Ok(left)
    }

    /// Runs a statement of the `once` lane. False: it failed, and the client has the error.
    pub(super) async fn once_simple(&mut self, call: &OnceCall<'_>) -> Result<bool, End> {
        match self.run_once(call).await? {
            Ended::Done => Ok(true),
            Ended::Failed => Ok(false),
            Ended::Refused(error) => self.refuse_in_text(&error).await.map(|()| false),
        }
    }

    /// The error of a guarded statement; one that tells of a write becomes a refusal.
    pub fn tell_guard_error(&mut self, error: &Bytes) {
        if is_write(error) {
            let function_writes = ClientError::error(
                "0A000",
                "the statement calls a function that writes, which pgtandem does not replicate yet",
                "Write with plain INSERT, UPDATE and DELETE statements, or mark the function STABLE if it only reads.",
            );
            function_writes.write(&mut self.wire.to_client);
        } else {
            let shifted = rewrite::shift_position(&error_frame(error), self.wire.position_offset);
            self.wire.to_client.extend_from_slice(&shifted);
        }
    }
}

/// Whether a guarded statement's error tells of a write.
#[must_use]
pub fn is_write(error: &[u8]) -> bool {
    crate::pg::message::error_field(error, b'C') == Some(READ_ONLY_VIOLATION)
}
