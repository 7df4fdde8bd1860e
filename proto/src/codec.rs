//! Cuts a stream of bytes into [`Frame`]s and checks each: magic, CRC, length, sequence, hash.
//!
//! Lengths are checked before anything is allocated. Frames of unknown optional kinds are skipped here, so that
//! nobody above sees them. The first error ends the connection: there is no way to find the next frame.

use std::io;

use bytes::{Buf, BytesMut};
use tokio_util::codec::{Decoder, Encoder};

use crate::frame::{Frame, FrameError, HASH_BYTES, HEADER_BYTES, Header, payload_hash};

/// One end of a connection: its own numbering of frames in each direction.
#[derive(Debug, Default)]
pub struct FrameCodec {
    /// The frame whose header was read already.
    pending: Option<Header>,
    /// Number that the next received frame must have.
    expected: u32,
}

/// Why a connection can not go on.
#[derive(Debug, thiserror::Error)]
pub enum CodecError {
    #[error(transparent)]
    Frame(#[from] FrameError),
    #[error("the connection broke: {0}")]
    Io(#[from] io::Error),
}

impl Decoder for FrameCodec {
    type Item = Frame;
    type Error = CodecError;

    fn decode(&mut self, source: &mut BytesMut) -> Result<Option<Frame>, CodecError> {
        loop {
            let header = if let Some(header) = self.pending {
                header
            } else {
                let Some(bytes) = source.first_chunk::<HEADER_BYTES>() else {
                    check_magic_prefix(source)?;
                    return Ok(None);
                };
                let header = Header::decode(bytes)?;
                if header.sequence != self.expected {
                    return Err(FrameError::Sequence { expected: self.expected, found: header.sequence }.into());
                }
                source.advance(HEADER_BYTES);
                self.pending = Some(header);
                header
            };
            let rest = header.rest_bytes();
            if source.len() < rest {
                // At most PAYLOAD_BYTES_MAX and a hash: Header::decode checked it.
                source.reserve(rest - source.len());
                return Ok(None);
            }
            let mut payload = source.split_to(rest);
            self.pending = None;
            self.expected = self.expected.wrapping_add(1);
            if header.bulk_bytes > 0 {
                let hash = payload.split_off(rest - HASH_BYTES);
                if hash[..] != payload_hash(&payload) {
                    return Err(FrameError::Hash.into());
                }
            }
            // An unknown optional kind is skipped.
            let Some(kind) = header.kind else { continue };
            let bulk = payload.split_off(header.head_bytes).freeze();
            return Ok(Some(Frame {
                kind,
                flags: header.flags,
                stream: header.stream,
                sequence: header.sequence,
                head: payload.freeze(),
                bulk,
            }));
        }
    }

    fn decode_eof(&mut self, source: &mut BytesMut) -> Result<Option<Frame>, CodecError> {
        match self.decode(source)? {
            Some(frame) => Ok(Some(frame)),
            None if source.is_empty() && self.pending.is_none() => Ok(None),
            None => {
                let header = if self.pending.is_some() { HEADER_BYTES } else { 0 };
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
