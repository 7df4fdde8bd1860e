//! Whether a definition with IF [NOT] EXISTS did anything on the leader. Only then it is an effect.

use std::sync::atomic::Ordering;

use crate::pg::build::ClientError;
use crate::replicate::effects::EffectLog;
use crate::replicate::hub::Hub;
use crate::session::carry::Answered;
use crate::session::run::Session;
use crate::sql::conditional::Depends;
use crate::sql::plan::Write;

/// How many rows of the catalog this transaction has written; empty if nobody counts.
const CATALOG_WRITES: &str = "SELECT CASE WHEN pg_catalog.current_setting('track_counts') OPERATOR(pg_catalog.=) 'on' THEN \
     (SELECT pg_catalog.sum(pg_catalog.pg_stat_get_xact_tuples_inserted(c.oid) OPERATOR(pg_catalog.+) \
      pg_catalog.pg_stat_get_xact_tuples_updated(c.oid) OPERATOR(pg_catalog.+) \
      pg_catalog.pg_stat_get_xact_tuples_deleted(c.oid))::pg_catalog.text FROM pg_catalog.pg_class c \
      WHERE c.relnamespace OPERATOR(pg_catalog.=) 'pg_catalog'::pg_catalog.regnamespace) ELSE '' END";

impl Session {
    /// Before the definition is sent.
    pub(super) async fn before_conditional(&mut self, write: &Write) -> Answered<()> {
        if write.depends == Depends::No {
            return Ok(Ok(()));
        }
        let number = self.planned_at;
        Ok(self.catalog_writes().await?.map(|count| self.catalog_before = (count, number)))
    }

    /// After it was answered without an error. True: it has done something, and is an effect.
    pub(super) async fn after_conditional(&mut self, write: &Write) -> Answered<bool> {
        if write.depends == Depends::No {
            return Ok(Ok(true));
        }
        let results = std::mem::take(&mut self.wire.results);
        let now = self.catalog_writes().await;
        self.wire.results = results;
        let (before, number) = std::mem::take(&mut self.catalog_before);
        Ok(now?.map(|now| {
            let known = !now.is_empty() && !before.is_empty();
            if known && now == before {
                return false;
            }
            if !known || write.depends == Depends::OnMany {
                self.log.schema_bound.get_or_insert(number);
            }
            true
        }))
    }

    async fn catalog_writes(&mut self) -> Answered<String> {
        Ok(self.ask_leader(CATALOG_WRITES, &[]).await?.map(|rows| rows.into_iter().next().unwrap_or_default()))
    }
}

/// Asked while no definition can be committed: whether what the transaction's definitions found is what followers find.
///
/// # Errors
/// If another one was committed since.
pub(super) fn still_there(hub: &Hub, log: &EffectLog) -> Result<(), ClientError> {
    match log.schema_bound {
        Some(number) if hub.schema_number.load(Ordering::Acquire) != number => Err(ClientError::error(
            "40001",
            "another definition was committed since this transaction's, which did something with all objects that were there",
            "Try the transaction again, or name one object in each statement.",
        )),
        _ => Ok(()),
    }
}
