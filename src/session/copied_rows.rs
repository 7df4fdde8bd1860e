//! COPY FROM whose rows are read from the leader after it has stored them: [`crate::sql::copied_rows`].

use crate::pg::build::ClientError;
use crate::pg::message;
use crate::replicate::effects::Effect;
use crate::session::carry::Answered;
use crate::session::effect::effect_role;
use crate::session::run::Session;
use crate::session::simple::refused;
use crate::session::wire::Until;
use crate::sql::copied_rows::CopiedRows;
use crate::sql::plan::Write;
use crate::sql::refuse::refusal;

/// Blocks before the end of the table that are looked at first: a COPY fills the last one up, and some that have room.
const BLOCKS_BEFORE: u64 = 16;

impl Session {
    /// Before such a COPY: the savepoint by which its rows are known.
    ///
    /// # Errors
    /// If the connection to the leader ends.
    pub(super) async fn before_copied_rows(&mut self, rows: &CopiedRows) -> Answered<()> {
        self.copied_from = None;
        if rows.has_blocks {
            match self.ask_leader(&rows.blocks(), &[]).await? {
                Ok(blocks) => {
                    let blocks: Option<u64> = blocks.first().and_then(|blocks| blocks.parse().ok());
                    self.copied_from = blocks.map(|blocks| blocks.saturating_sub(BLOCKS_BEFORE));
                }
                Err(error) => return Ok(Err(error)),
            }
        }
        Ok(self.ask_leader("SAVEPOINT pgtandem_copied", &[]).await?.map(drop))
    }

    /// Takes the answer of such a COPY and keeps its rows. If the server had an error, it is in the results.
    pub(super) async fn take_copied_rows(&mut self, rows: &CopiedRows, write: &Write) -> Answered<()> {
        self.wire.pump(Until::AnsweredOrCopy).await?;
        if self.wire.results.copy_in {
            self.pass_copy_data(None).await?;
            self.wire.pump(Until::Answered).await?;
        }
        if self.wire.results.error.is_some() {
            return Ok(Ok(()));
        }
        let results = std::mem::take(&mut self.wire.results);
        let count = results.tag.as_deref().and_then(message::tag_count).unwrap_or(0);
        let kept = self.keep_copied_rows(rows, write, count).await;
        self.wire.results = results;
        kept
    }

    async fn keep_copied_rows(&mut self, rows: &CopiedRows, write: &Write, count: u64) -> Answered<()> {
        if count > 0 {
            if let Err(error) = self.read_copied_rows(rows, count).await? {
                return Ok(Err(error));
            }
            self.note(write);
        }
        Ok(self.ask_leader("RELEASE SAVEPOINT pgtandem_copied", &[]).await?.map(drop))
    }

    async fn read_copied_rows(&mut self, rows: &CopiedRows, count: u64) -> Answered<()> {
        let mut found = 0;
        for from in [self.copied_from.take().filter(|from| *from > 0), None] {
            let position = self.log.position();
            let (data, kept) = match self.copy_from_leader(&rows.read(from)).await? {
                Ok(kept) => kept,
                Err(error) => return Ok(Err(error)),
            };
            if kept == count {
                let context = match self.effect_context() {
                    Ok(context) => context,
                    Err(error) => return Ok(Err(error)),
                };
                let (role, text) = (effect_role(Some(&rows.owner)), rows.write.as_str().into());
                let after_triggers = rows.after_triggers;
                let pushed = self.log.push(Effect::Copy { context, role, text, data, rows: count, after_triggers });
                return Ok(pushed.map_err(ClientError::from));
            }
            self.log.truncate(position);
            found = kept;
        }
        Ok(Err(refused(&refusal(
            format!(
                "this COPY is not replicated: it stored {count} rows, of which {found} could be read for the other servers"
            ),
            "Nothing was changed. Use INSERT.",
        ))))
    }
}
