//! COPY FROM STDIN: the client's data go to the leader and, for a replicated table, into the effect list.

use crate::pg::build::{self, ClientError};
use crate::pg::frame::{self, Sender};
use crate::replicate::effects::{EffectLog, Range};
use crate::session::effect::Kept;
use crate::session::run::Session;
use crate::session::simple::refused;
use crate::session::wire::End;
use crate::sql::copy_dates::{CopyDates, CopyScanner};
use crate::sql::refuse::clock_literal;

/// Bytes for the server that are written at once.
const OUT_BYTES_MAX: usize = 64 * 1024;

/// What becomes of the data of one COPY.
pub struct CopyKeeper {
    kept: Result<Range, ClientError>,
    dates: Option<CopyScanner>,
    reads_clock: bool,
}

impl CopyKeeper {
    pub(super) fn new(dates: Option<&CopyDates>) -> Self {
        Self { kept: Ok(Range::default()), dates: dates.map(CopyDates::scanner), reads_clock: false }
    }

    /// The COPY must fail with this.
    pub(super) fn fail(&mut self, error: ClientError) {
        self.kept = Err(error);
    }

    pub(super) fn keep(&mut self, log: &mut EffectLog, data: &[u8]) {
        self.reads_clock = self.reads_clock || self.dates.as_mut().is_some_and(|dates| dates.feed(data));
        if let (Ok(range), false) = (&mut self.kept, self.reads_clock) {
            match log.append(data) {
                Ok(added) if range.len == 0 => *range = added,
                Ok(added) => range.len += added.len,
                Err(error) => self.kept = Err(error.into()),
            }
        }
    }

    /// True if the COPY must fail: because of its dates, or because its data are not all there.
    pub(super) fn finish(&mut self) -> bool {
        self.reads_clock = self.reads_clock || self.dates.as_mut().is_some_and(CopyScanner::finish);
        if self.reads_clock {
            self.kept = Err(refused(&clock_literal()));
        }
        self.kept.is_err()
    }
}

impl Session {
    /// Passes COPY data and keeps what they were: where, in the effect list.
    ///
    /// Dates that are the clock's, such as `now`, would differ on followers: then the COPY is made to fail, `hide_errors` is left
    /// on for the server's error, and the refusal is given.
    pub async fn keep_copy_data(&mut self, dates: Option<&CopyDates>) -> Result<Kept, End> {
        let mut data = CopyKeeper::new(dates);
        match self.server_file.take() {
            Some(file) => self.pass_file(file, &mut data).await?,
            None => self.pass_copy_data(Some(&mut data)).await?,
        }
        Ok(data.kept.map(|range| Some((range, 0))))
    }

    /// Passes COPY data until the client ends them or the server refuses them.
    pub async fn pass_copy_data(&mut self, mut keep: Option<&mut CopyKeeper>) -> Result<(), End> {
        self.wire.results.copy_in = false;
        self.cycle.cut();
        self.wire.flush_client().await?;
        loop {
            while let Some(frame) =
                frame::take(&mut self.wire.from_client, Sender::Client).map_err(End::ClientProtocol)?
            {
                match frame[0] {
                    b'd' => {
                        if let Some(data) = keep.as_deref_mut() {
                            data.keep(&mut self.log, frame::body(&frame));
                            if data.reads_clock {
                                continue;
                            }
                        }
                        self.wire.to_server.extend_from_slice(&frame);
                        if self.wire.to_server.len() > OUT_BYTES_MAX {
                            self.wire.flush_server().await?;
                        }
                    }
                    b'c' | b'f' => {
                        if keep.as_deref_mut().is_some_and(CopyKeeper::finish) {
                            self.wire.hide_errors = true;
                            build::copy_fail(&mut self.wire.to_server, "refused by pgtandem");
                        } else {
                            self.wire.to_server.extend_from_slice(&frame);
                        }
                        if self.in_batch {
                            build::flush(&mut self.wire.to_server);
                        }
                        return self.wire.flush_server().await;
                    }
                    // The server ignores Flush and Sync while it copies.
                    b'H' | b'S' => {}
                    b'X' => return Err(End::ClientGone),
                    // Anything else ends the COPY with an error of the server's own.
                    _ => {
                        self.wire.to_server.extend_from_slice(&frame);
                        return self.wire.flush_server().await;
                    }
                }
            }
            self.wire.flush_server().await?;
            self.wire.fill_either().await?;
            self.wire.absorb()?;
            if self.wire.results.error.is_some() {
                return Ok(());
            }
            self.wire.flush_client().await?;
        }
    }
}
