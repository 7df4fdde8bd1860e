//! Cuts a stream of bytes into [`Frame`]s and checks each: magic, CRC, length, sequence, hash.
//!
//! Lengths are checked before anything is allocated. Frames of unknown optional kinds are skipped here, so that
//! nobody above sees them. The first error ends the connection: there is no way to find the next frame.

use std::io;

use bytes::{Buf, Bytes, BytesMut};
use tokio_util::codec::{Decoder, Encoder};

use crate::frame::{FLAG_BULK, Frame, FrameError, HEADER_BYTES, Header, payload_hash};

/// One end of a connection: its own numbering of frames in each direction.
#[derive(Debug, Default)]
pub struct FrameCodec {
    /// The frame whose header was read already.
    pending: Option<Header>,
    /// The frame of which only bulk bytes and their hash are missing.
    started: Option<Started>,
    /// Number that the next received frame must have.
    expected: u32,
}

/// A frame without its bulk bytes, for receivers that read those to a place of their own.
#[derive(Clone, Debug)]
pub struct Started {
    header: Header,
    head: Bytes,
}

impl Started {
    /// Bulk bytes that follow; at most [`crate::frame::PAYLOAD_BYTES_MAX`].
    #[must_use]
    pub fn bulk_bytes(&self) -> usize {
        self.header.bulk_bytes
    }

    /// Bytes of their hash, behind them.
    #[must_use]
    pub fn hash_bytes(&self) -> usize {
        self.header.hash_bytes()
    }

    /// The frame, if its hash is right; None for one of an unknown optional kind.
    pub fn finish(self, bulk: Bytes, hash: &[u8]) -> Result<Option<Frame>, FrameError> {
        if self.hash_bytes() > 0 && hash != payload_hash(&self.head, &bulk) {
            return Err(FrameError::Hash);
        }
        Ok(self.header.kind.map(|kind| Frame {
            kind,
            flags: self.header.flags & !FLAG_BULK,
            stream: self.header.stream,
            sequence: self.header.sequence,
            head: self.head,
            bulk,
        }))
    }
}

/// Why a connection can not go on.
#[derive(Debug, thiserror::Error)]
pub enum CodecError {
    #[error(transparent)]
    Frame(#[from] FrameError),
    #[error("the connection broke: {0}")]
    Io(#[from] io::Error),
}

impl FrameCodec {
    /// Cuts off header and head of the next frame; None: not all of them are there. The caller takes bulk bytes and
    /// hash from behind them before it calls this again.
    pub fn start(&mut self, source: &mut BytesMut) -> Result<Option<Started>, FrameError> {
        let header = if let Some(header) = self.pending {
            header
        } else {
            let Some(bytes) = source.first_chunk::<HEADER_BYTES>() else {
                check_magic_prefix(source)?;
                return Ok(None);
            };
            let header = Header::decode(bytes)?;
            if header.sequence != self.expected {
                return Err(FrameError::Sequence { expected: self.expected, found: header.sequence });
            }
            source.advance(HEADER_BYTES);
            self.pending = Some(header);
            header
        };
        if source.len() < header.head_bytes {
            // At most PAYLOAD_BYTES_MAX: Header::decode checked it.
            source.reserve(header.head_bytes - source.len());
            return Ok(None);
        }
        self.pending = None;
        self.expected = self.expected.wrapping_add(1);
        Ok(Some(Started { header, head: source.split_to(header.head_bytes).freeze() }))
    }

    /// Whether a frame has begun and not ended.
    #[must_use]
    pub fn is_inside(&self) -> bool {
        self.pending.is_some() || self.started.is_some()
    }
}

impl Decoder for FrameCodec {
    type Item = Frame;
    type Error = CodecError;

    fn decode(&mut self, source: &mut BytesMut) -> Result<Option<Frame>, CodecError> {
        loop {
            let started = match self.started.take() {
                Some(started) => started,
                None => match self.start(source)? {
                    Some(started) => started,
                    None => return Ok(None),
                },
            };
            let rest = started.bulk_bytes() + started.hash_bytes();
            if source.len() < rest {
                source.reserve(rest - source.len());
                self.started = Some(started);
                return Ok(None);
            }
            let bulk = source.split_to(started.bulk_bytes()).freeze();
            let hash = source.split_to(started.hash_bytes());
            // An unknown optional kind is skipped.
            if let Some(frame) = started.finish(bulk, &hash)? {
                return Ok(Some(frame));
            }
        }
    }

    fn decode_eof(&mut self, source: &mut BytesMut) -> Result<Option<Frame>, CodecError> {
        match self.decode(source)? {
            Some(frame) => Ok(Some(frame)),
            None if source.is_empty() && !self.is_inside() => Ok(None),
            None => {
                let header = if self.is_inside() { HEADER_BYTES } else { 0 };
                Err(FrameError::Truncated { bytes: header + source.len() }.into())
            }
        }
    }
}

/// Refuses a stranger at its first wrong byte instead of waiting for the rest of a header that never comes.
fn check_magic_prefix(source: &BytesMut) -> Result<(), FrameError> {
    let known = source.len().min(crate::frame::MAGIC.len());
    if source[..known] == crate::frame::MAGIC[..known] {
        return Ok(());
    }
    let mut found = [0; 4];
    found[..known].copy_from_slice(&source[..known]);
    Err(FrameError::Magic(found))
}

impl Encoder<&Frame> for FrameCodec {
    type Error = CodecError;

    fn encode(&mut self, frame: &Frame, out: &mut BytesMut) -> Result<(), CodecError> {
        Ok(frame.write(out)?)
    }
}
