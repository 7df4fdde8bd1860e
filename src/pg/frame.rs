//! Frames of PostgreSQL's protocol after startup: a tag byte, a length, a body.
//!
//! Only headers are read here. Unknown tags pass: the server answers them. Limits are those of PostgreSQL's
//! `src/include/libpq/libpq.h` (`PQ_SMALL_MESSAGE_LIMIT`, `PQ_LARGE_MESSAGE_LIMIT`).

use bytes::BytesMut;

/// Bytes of a frame's header: tag and length.
pub const HEADER_BYTES: usize = 5;
/// `PQ_SMALL_MESSAGE_LIMIT`: messages that hold no user data.
const SMALL_BYTES_MAX: usize = 10_000;
/// `PQ_LARGE_MESSAGE_LIMIT`: `MaxAllocSize - 1`.
const LARGE_BYTES_MAX: usize = 0x3fff_ffff - 1;

/// Who sent the frame; decides which limit holds for a tag.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sender {
    Client,
    Server,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    pub tag: u8,
    /// Bytes of the whole frame, header included.
    pub frame_bytes: usize,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    #[error("a message of type {tag:#04x} announces {bytes} bytes, at most {max} are allowed")]
    TooLong { tag: u8, bytes: usize, max: usize },
    #[error("a message of type {tag:#04x} announces a length of {length}, which is shorter than the length itself")]
    TooShort { tag: u8, length: i32 },
    #[error("the body of a message of type {tag:#04x} ends too early")]
    BodyTooShort { tag: u8 },
}

/// The header at the start of `buffer`, or `None` while fewer than five bytes are there.
///
/// # Errors
/// If the length is impossible or past the limit for that tag.
pub fn peek(buffer: &[u8], sender: Sender) -> Result<Option<Header>, FrameError> {
    let [tag, a, b, c, d, ..] = *buffer else { return Ok(None) };
    let length = i32::from_be_bytes([a, b, c, d]);
    let Some(body) = usize::try_from(length).ok().and_then(|l| l.checked_sub(4)) else {
        return Err(FrameError::TooShort { tag, length });
    };
    let max = match (sender, tag) {
        // Close, CopyDone, Describe, Execute, Flush, Sync, Terminate
        (Sender::Client, b'C' | b'c' | b'D' | b'E' | b'H' | b'S' | b'X') => SMALL_BYTES_MAX,
        _ => LARGE_BYTES_MAX,
    };
    if body > max {
        return Err(FrameError::TooLong { tag, bytes: body, max });
    }
    Ok(Some(Header { tag, frame_bytes: body + HEADER_BYTES }))
}

/// Takes the first frame off `buffer` if it is there as a whole.
///
/// # Errors
/// As [`peek`].
pub fn take(buffer: &mut BytesMut, sender: Sender) -> Result<Option<BytesMut>, FrameError> {
    match peek(buffer, sender)? {
        Some(header) if buffer.len() >= header.frame_bytes => Ok(Some(buffer.split_to(header.frame_bytes))),
        _ => Ok(None),
    }
}

/// The body of a whole frame.
#[must_use]
pub fn body(frame: &[u8]) -> &[u8] {
    frame.get(HEADER_BYTES..).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn random_bytes_never_panic_and_a_frame_is_exactly_as_long_as_it_says(bytes in proptest::collection::vec(any::<u8>(), 0..64)) {
            for sender in [Sender::Client, Sender::Server] {
                let mut buffer = BytesMut::from(&bytes[..]);
                while let Ok(Some(frame)) = take(&mut buffer, sender) {
                    let length = i32::from_be_bytes([frame[1], frame[2], frame[3], frame[4]]);
                    prop_assert_eq!(usize::try_from(length).unwrap() + 1, frame.len());
                }
            }
        }
    }

    #[test]
    fn a_sync_of_a_megabyte_is_refused_before_it_is_read() {
        let mut frame = vec![b'S'];
        frame.extend_from_slice(&1_000_000_i32.to_be_bytes());
        assert!(matches!(peek(&frame, Sender::Client), Err(FrameError::TooLong { tag: b'S', .. })));
    }

    #[test]
    fn a_length_below_four_is_refused() {
        assert!(matches!(peek(&[b'Q', 0, 0, 0, 3], Sender::Client), Err(FrameError::TooShort { .. })));
        assert!(matches!(peek(&[b'Q', 255, 0, 0, 3], Sender::Client), Err(FrameError::TooShort { .. })));
    }
}
