//! Several statements in one text: cut apart and run one by one, inside a block of ours where the client opened none.

use crate::pg::build::{self, ClientError};
use crate::session::once::{How, OnceCall};
use crate::session::planning::{Parts, Planned};
use crate::session::run::Session;
use crate::session::simple::{error_frame, refused};
use crate::session::wire::End;
use crate::sql::plan::{Control, Lane};

impl Session {
    pub(super) async fn several(&mut self, Parts { text, ranges }: &Parts) -> Result<(), End> {
        let mut own = self.wire.status == b'I';
        let mut ok = true;
        for range in ranges {
            let Some(part) = text.get(range.clone()) else { break };
            self.wire.position_offset = self.characters(text.get(..range.start).unwrap_or_default());
            let part = self.encoded(part).into_owned();
            let step = self.one_of_several(&part, &mut own).await;
            self.wire.position_offset = 0;
            ok = step?;
            if !ok {
                break;
            }
        }
        let own = own && self.own_block;
        self.end_simple(own, ok).await
    }

    async fn one_of_several(&mut self, part: &[u8], own: &mut bool) -> Result<bool, End> {
        let (plan, shape, text) = match self.plan(part).await? {
            Planned::One { plan, shape, text } => (plan, shape, text),
            Planned::Nothing | Planned::Several(_) | Planned::Skipped => return Ok(true),
            Planned::Refused(error) => return self.refuse_in_text(&error).await.map(|()| false),
            Planned::Failed(error) => {
                self.wire.to_client.extend_from_slice(&error_frame(&error));
                return Ok(false);
            }
        };
        if let Lane::Control(control) = &plan.lane {
            let done = self.control_in_text(control, &text, own).await?;
            self.after(&plan, &text, done);
            return Ok(done);
        }
        // What can not run in a transaction gets one, too: the server says so, as it does for a text of several statements.
        if self.wire.status == b'I' && !self.own_block && !matches!(plan.lane, Lane::Admin(_)) {
            self.open_own_block();
            *own = true;
        }
        let ok = match &plan.lane {
            Lane::Write(write) => self.write_simple(&plan, write, &shape, &text, false).await?,
            Lane::Refused(refusal) => {
                self.refuse_in_text(&refused(refusal)).await?;
                false
            }
            Lane::Admin(admin) => {
                self.answer_admin(*admin);
                true
            }
            Lane::Named(named) => {
                self.touched.begin(&plan.sequences);
                self.named_simple(named, &shape, &text, false).await?
            }
            Lane::Read { guard: true, .. } if self.wire.status != b'E' => self.guarded_simple(&text, false).await?,
            Lane::Once(once) if self.wire.status != b'E' => {
                let planned_at = self.planned_at;
                let how = How::Simple;
                let call = OnceCall { plan: &plan, once, shape: &shape, text: &text, planned_at, how, hold_tag: false };
                self.once_simple(&call).await?
            }
            Lane::Read { .. }
            | Lane::Maintenance { .. }
            | Lane::Nodewise
            | Lane::Finish(_)
            | Lane::Control(_)
            | Lane::Once(_) => self.run_part(&plan, &text).await?,
        };
        self.after(&plan, &text, ok);
        Ok(ok)
    }

    /// Transaction control inside a text of several statements. BEGIN turns a block of ours into the client's.
    async fn control_in_text(&mut self, control: &Control, text: &str, own: &mut bool) -> Result<bool, End> {
        if self.own_block {
            match control {
                Control::Begin { with_modes: false } => {
                    (self.own_block, *own) = (false, false);
                    build::command_complete(&mut self.wire.to_client, "BEGIN");
                    return Ok(true);
                }
                Control::Begin { with_modes: true } => {
                    let error = ClientError::error(
                        "0A000",
                        "BEGIN with transaction modes after other statements in one message is not supported",
                        "Send BEGIN first, or in a message of its own.",
                    );
                    return self.refuse_in_text(&error).await.map(|()| false);
                }
                Control::Prepare { .. } => {
                    let what = "PREPARE TRANSACTION of a transaction that no BEGIN has opened is not supported";
                    let error = ClientError::error("0A000", what, "BEGIN first.");
                    return self.refuse_in_text(&error).await.map(|()| false);
                }
                Control::Commit { chain: true } => return self.refuse_outside_block("COMMIT AND CHAIN").await,
                Control::Rollback { chain: true } => return self.refuse_outside_block("ROLLBACK AND CHAIN").await,
                Control::Savepoint { .. } => return self.refuse_outside_block("SAVEPOINT").await,
                Control::Release { .. } => return self.refuse_outside_block("RELEASE SAVEPOINT").await,
                Control::RollbackTo { .. } => return self.refuse_outside_block("ROLLBACK TO SAVEPOINT").await,
                Control::Commit { .. } | Control::Rollback { .. } => {
                    let warning = "there is no transaction in progress";
                    build::warning(&mut self.wire.to_client, "25P01", warning);
                    self.own_block = false;
                    // The next statement opens a block of ours again.
                }
                Control::SetConstraints | Control::Other => {}
            }
        } else if self.wire.status == b'I' && matches!(control, Control::SetConstraints | Control::Other) {
            self.open_own_block();
            *own = true;
        }
        self.wire.hold_ready = true;
        let done = self.control(control, text).await;
        self.wire.hold_ready = false;
        let ok = done?;
        if self.wire.status != b'I' && matches!(control, Control::Begin { .. }) {
            *own = false;
        }
        Ok(ok)
    }

    /// The block of ours is none of the client's: PostgreSQL says so of the statements of one text.
    async fn refuse_outside_block(&mut self, what: &str) -> Result<bool, End> {
        let error = ClientError::error("25P01", format!("{what} can only be used in transaction blocks"), "");
        self.refuse_in_text(&error).await.map(|()| false)
    }
}
