//! The two ends of a [`Wire`]: what is written to them and read from them, and another server in the place of one that ended.

use bytes::BytesMut;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio_util::sync::CancellationToken;

use crate::replicate::leader::{LeaderStream, Moved, move_bytes};
use crate::session::rewrite;
use crate::session::wire::{End, OUT_BYTES_MAX, READ_BYTES, Results, Wire};

/// What waits from the server while something is written to it; past that it is taken first.
const IN_BYTES_MAX: usize = 256 * 1024;

impl Wire {
    /// Writes what waits for the client.
    ///
    /// # Errors
    /// If it is gone.
    pub async fn flush_client(&mut self) -> Result<(), End> {
        if !self.to_client.is_empty() && !self.mute {
            self.flushes += 1;
            self.client.write_all(&self.to_client).await.map_err(|_| End::ClientGone)?;
            self.client.flush().await.map_err(|_| End::ClientGone)?;
            self.written_bytes += self.to_client.len() as u64;
            rewrite::shrink(&mut self.to_client);
        }
        Ok(())
    }

    /// Writes what waits for the client if it is so much that it would be written soon anyway.
    ///
    /// # Errors
    /// If it is gone.
    pub async fn flush_much_to_client(&mut self) -> Result<(), End> {
        if self.to_client.len() > OUT_BYTES_MAX / 2 { self.flush_client().await } else { Ok(()) }
    }

    /// Where the client is in what was made for it so far.
    #[must_use]
    pub fn made_bytes(&self) -> u64 {
        self.written_bytes + self.to_client.len() as u64
    }

    /// Another server's connection takes the place of one that ended: nothing is under way on it, and nothing of the old one is waited for.
    pub fn change_server(&mut self, server: LeaderStream, lost: CancellationToken) {
        (self.server, self.lost) = (server, lost);
        self.from_server = BytesMut::new();
        self.to_server = BytesMut::with_capacity(READ_BYTES);
        self.expects.clear();
        self.outcomes.clear();
        self.results = Results::default();
        self.status = b'I';
        (self.passing, self.position_offset, self.held_bytes) = (0, 0, 0);
        self.held_rows.clear();
        (self.skipping, self.hold_ready, self.hold_tag, self.hold_rows) = (false, false, false, false);
        (self.hide_copy, self.hide_errors, self.begin_waits, self.mute) = (false, false, false, false);
        self.rows_kept_max = usize::MAX;
        self.farewell = None;
    }

    /// A frame whose rest has not come was passed to the client in part: nothing else can be told any more.
    #[must_use]
    pub fn is_inside_frame(&self) -> bool {
        self.passing > 0
    }

    /// Writes what waits for the server, and reads meanwhile: a server that can not get rid of its answers reads nothing more.
    ///
    /// # Errors
    /// If one of both sides is gone or breaks the protocol.
    pub async fn flush_server(&mut self) -> Result<(), End> {
        self.begin_waits = false;
        if self.to_server.is_empty() {
            return Ok(());
        }
        // What is sent now is not what a request that is on its way is about.
        if let Some((cancels, told)) = &self.cancels {
            tokio::select! {
                biased;
                () = self.lost.cancelled() => return Err(End::ServerGone),
                () = cancels.none_for(told) => {}
            }
        }
        let mut sent = 0;
        loop {
            if self.from_server.len() > IN_BYTES_MAX {
                self.absorb()?;
                self.flush_client().await?;
            }
            let rest = self.to_server.get(sent..).unwrap_or_default();
            let moved = tokio::select! {
                biased;
                () = self.lost.cancelled() => return Err(End::ServerGone),
                moved = move_bytes(&mut self.server, rest, &mut self.from_server) => moved,
            };
            match moved {
                Ok(Moved::Written(n)) if n > 0 => sent += n,
                Ok(Moved::Read(n)) if n > 0 => {}
                Ok(Moved::Flushed) => break,
                _ => return Err(End::ServerGone),
            }
        }
        rewrite::shrink(&mut self.to_server);
        Ok(())
    }

    /// Reads more from the server; what it says is not looked at yet.
    ///
    /// # Errors
    /// If it is gone.
    pub async fn fill_from_server(&mut self) -> Result<(), End> {
        self.from_server.reserve(READ_BYTES);
        tokio::select! {
            biased;
            () = self.lost.cancelled() => Err(End::ServerGone),
            n = self.server.read_buf(&mut self.from_server) => came(&n, End::ServerGone),
        }
    }

    /// Waits for either side.
    ///
    /// # Errors
    /// If one of them is gone.
    pub async fn fill_either(&mut self) -> Result<(), End> {
        self.from_client.reserve(READ_BYTES);
        self.from_server.reserve(READ_BYTES);
        tokio::select! {
            biased;
            () = self.lost.cancelled() => Err(End::ServerGone),
            n = self.server.read_buf(&mut self.from_server) => came(&n, End::ServerGone),
            n = self.client.read_buf(&mut self.from_client) => came(&n, End::ClientGone),
        }
    }
}

/// What a read of that many bytes tells: none are the end.
fn came(read: &std::io::Result<usize>, gone: End) -> Result<(), End> {
    if read.as_ref().is_ok_and(|n| *n > 0) { Ok(()) } else { Err(gone) }
}
