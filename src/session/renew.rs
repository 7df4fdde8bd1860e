//! Statements that were prepared before a change of the schema, the role or the search path: planned again before they are used.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use bytes::Bytes;

use crate::pg::build::{self, ClientError};
use crate::session::planning::Planned;
use crate::session::rewrite::OwnRow;
use crate::session::run::Session;
use crate::session::simple::{error_frame, refused};
use crate::session::statements::Prepared;
use crate::session::wire::{End, Expect, Mode, Until};
use crate::sql::plan::{Lane, Plan};

/// Why a prepared statement can not be used now.
pub enum Failure {
    Ours(ClientError),
    /// The server's, and the client has not seen it.
    Server(Bytes),
    /// The client has the error, or what came before has failed.
    Told,
}

impl Session {
    /// Tells the client, and the block if there is one.
    pub async fn tell_failure(&mut self, failure: Failure) -> Result<(), End> {
        match failure {
            Failure::Ours(error) if self.in_batch => self.refuse_extended(&error).await,
            Failure::Ours(error) => self.refuse_in_text(&error).await,
            Failure::Server(error) => {
                self.wire.to_client.extend_from_slice(&error_frame(&error));
                self.skip_until_sync = self.in_batch;
                Ok(())
            }
            Failure::Told => Ok(()),
        }
    }

    /// Whether a plan made under other settings, or in another catalog, would be the same now.
    fn is_current(&self, prepared: &Prepared) -> bool {
        let same_place = match (&prepared.facts, &self.facts) {
            (Some(then), Some(now)) => Arc::ptr_eq(then, now) || then.is_same_place(now),
            _ => false,
        };
        same_place && !self.has_own_catalog && prepared.schema_number == self.hub.schema_number.load(Ordering::Acquire)
    }

    /// A statement that was prepared before a change of the schema, the role or the search path is planned again, and prepared
    /// again on the leader if its plan is another one now.
    ///
    /// # Errors
    /// If the connection to the leader ends.
    pub async fn renew(&mut self, name: Bytes, old: Arc<Prepared>) -> Result<Result<Arc<Prepared>, Failure>, End> {
        let fixed = matches!(old.plan.lane, Lane::Admin(_) | Lane::Control(_) | Lane::Named(_));
        // In a failed block nothing is run, and nothing can be known.
        if fixed || self.wire.status == b'E' || self.is_current(&old) {
            return Ok(Ok(old));
        }
        let (plan, shape) = match self.plan(&self.encoded(&old.text)).await? {
            Planned::One { plan, shape, .. } => (plan, shape),
            Planned::Nothing | Planned::Several(_) => return Ok(Ok(old)),
            Planned::Skipped => return Ok(Err(Failure::Told)),
            Planned::Refused(error) => return Ok(Err(Failure::Ours(error))),
            Planned::Failed(error) => return Ok(Err(Failure::Server(error))),
        };
        if let Lane::Refused(refusal) = &plan.lane {
            return Ok(Err(Failure::Ours(refused(refusal))));
        }
        if self.wire.status == b'E' {
            return Ok(Ok(old));
        }
        let hidden = |lane: &Lane| if let Lane::Write(write) = lane { write.hidden_returning.len() } else { 0 };
        let moved = self.ddl_under_way || old.schema_number != self.planned_at;
        let mut own_row = old.own_row.clone();
        // With hidden columns the leader's own check would be about them, too.
        if plan != old.plan || (moved && hidden(&plan.lane) > 0) {
            if hidden(&old.plan.lane) == 0
                && let Some(error) = self.still_gives_the_same(&name).await?
            {
                return Ok(Err(error));
            }
            let leader_text = match &plan.lane {
                Lane::Write(write) => write.leader_text(&old.text, &shape),
                _ => None,
            };
            self.wire.clear_results();
            let text = format!("{:indent$}{}", "", leader_text.as_deref().unwrap_or(&old.text), indent = old.indent);
            let text = self.encoded(&text).into_owned();
            let out = &mut self.wire.to_server;
            // First by another name: if that fails, what the client prepared stays as it is.
            build::close(out, b'S', b"pgtandem_x");
            build::parse(out, b"pgtandem_x", &text, &old.types);
            build::close(out, b'S', &name);
            build::parse(out, &name, &text, &old.types);
            build::close(out, b'S', b"pgtandem_x");
            let (close, parse) = (Expect::Close { hidden: true }, Expect::Parse { hidden: true });
            self.wire.expects.extend([close, parse, close, parse, close]);
            own_row = self.own_row(&name, &plan).await?;
            if !self.in_batch {
                self.end_hidden();
            }
            self.catch_up().await?;
            if self.wire.results.error.is_some() || self.wire.is_skipping() {
                return Ok(Err(Failure::Told));
            }
            if hidden(&old.plan.lane) > 0 && hidden(&plan.lane) > 0 && own_row != old.own_row {
                // As PostgreSQL says it; its check was lost with the statement that was prepared before.
                let error = ClientError::error("0A000", "cached plan must not change result type", "");
                return Ok(Err(Failure::Ours(error)));
            }
        }
        let (text, types, types_known) = (Arc::clone(&old.text), Arc::clone(&old.types), old.types_known);
        let (schema_number, facts) = (self.planned_at, self.facts.clone());
        let indent = old.indent;
        let prepared =
            Arc::new(Prepared { text, indent, shape, plan, types, types_known, own_row, schema_number, facts });
        self.statements.set_statement(name, Arc::clone(&prepared));
        Ok(Ok(prepared))
    }

    /// Asks the leader whether a statement still gives what it gave when it was prepared: it checks that before it describes one.
    async fn still_gives_the_same(&mut self, name: &[u8]) -> Result<Option<Failure>, End> {
        self.catch_up().await?;
        if self.wire.is_skipping() {
            return Ok(Some(Failure::Told));
        }
        self.wire.clear_results();
        build::describe(&mut self.wire.to_server, b'S', name);
        self.wire.expects.push_back(Expect::Describe { mode: Mode::Hidden });
        self.end_hidden();
        self.wire.pump(Until::Answered).await?;
        Ok(self.wire.results.error.is_some().then_some(Failure::Told))
    }

    /// The columns of the client's own RETURNING, where hidden ones follow.
    pub async fn own_row(&mut self, name: &[u8], plan: &Plan) -> Result<OwnRow, End> {
        let Lane::Write(write) = &plan.lane else { return Ok(OwnRow::default()) };
        let hidden = write.hidden_returning.len();
        if hidden == 0 || !write.client_returning {
            return Ok(OwnRow::default());
        }
        build::describe(&mut self.wire.to_server, b'S', name);
        self.wire.expects.push_back(Expect::Describe { mode: Mode::Hidden });
        self.catch_up().await?;
        OwnRow::of(&self.wire.results.description, hidden).map_err(End::ServerProtocol)
    }
}
