//! COPY FROM STDIN: the client's data go to the leader and, for a replicated table, into the effect list.

use crate::pg::build::{self, ClientError};
use crate::pg::frame::{self, Sender};
use crate::replicate::effects::Range;
use crate::session::effect::Kept;
use crate::session::run::Session;
use crate::session::wire::End;

/// Bytes for the server that are written at once.
const OUT_BYTES_MAX: usize = 64 * 1024;

impl Session {
    /// Passes COPY data and keeps what they were: where, in the effect list.
    pub async fn keep_copy_data(&mut self) -> Result<Kept, End> {
        let mut kept: Result<Range, ClientError> = Ok(Range::default());
        self.pass_copy_data(Some(&mut kept)).await?;
        Ok(kept.map(|range| Some((range, 0))))
    }

    /// Passes COPY data until the client ends them or the server refuses them.
    pub async fn pass_copy_data(&mut self, mut keep: Option<&mut Result<Range, ClientError>>) -> Result<(), End> {
        self.wire.results.copy_in = false;
        self.wire.flush_client().await?;
        loop {
            while let Some(frame) =
                frame::take(&mut self.wire.from_client, Sender::Client).map_err(End::ClientProtocol)?
            {
                match frame[0] {
                    b'd' => {
                        if let Some(kept) = keep.as_deref_mut()
                            && let Ok(range) = kept
                        {
                            match self.log.append(frame::body(&frame)) {
                                Ok(added) if range.len == 0 => *range = added,
                                Ok(added) => range.len += added.len,
                                Err(error) => *kept = Err(error.into()),
                            }
                        }
                        self.wire.to_server.extend_from_slice(&frame);
                        if self.wire.to_server.len() > OUT_BYTES_MAX {
                            self.wire.flush_server().await?;
                        }
                    }
                    b'c' | b'f' => {
                        self.wire.to_server.extend_from_slice(&frame);
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
