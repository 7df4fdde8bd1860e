//! Messages that are changed on their way: positions moved, hidden columns cut off.

use bytes::BytesMut;

use crate::pg::build;
use crate::pg::frame::{self, FrameError, HEADER_BYTES};
use crate::pg::message::{self, Reader};
use crate::session::wire;

/// An error or notice with its position moved to where the statement stands in the client's own text.
#[must_use]
pub fn shift_position(frame: &BytesMut, offset: isize) -> BytesMut {
    let body = frame::body(frame);
    if offset == 0 || message::error_field(body, b'P').is_none() {
        return frame.clone();
    }
    let mut out = BytesMut::with_capacity(frame.len() + 8);
    let tag = frame[0];
    build::frame(&mut out, tag, |b| {
        let mut r = Reader::new(tag, body);
        while let Ok(field) = r.u8() {
            if field == 0 {
                break;
            }
            let Ok(value) = r.string() else { break };
            b.extend_from_slice(&[field]);
            let position = std::str::from_utf8(value).ok().and_then(|v| v.parse::<isize>().ok());
            match position {
                Some(n) if field == b'P' => b.extend_from_slice((n + offset).to_string().as_bytes()),
                _ => b.extend_from_slice(value),
            }
            b.extend_from_slice(&[0]);
        }
        b.extend_from_slice(&[0]);
    });
    out
}

/// An error without its context and details, which quote the parameters of statements of ours.
#[must_use]
pub fn without_context(frame: &BytesMut) -> BytesMut {
    let mut out = BytesMut::with_capacity(frame.len());
    build::frame(&mut out, b'E', |b| {
        let mut r = Reader::new(b'E', frame::body(frame));
        while let Ok(field) = r.u8() {
            let Ok(value) = r.string() else { break };
            if !matches!(field, b'W' | b'D' | b'p' | b'q') {
                b.extend_from_slice(&[field]);
                b.extend_from_slice(value);
                b.extend_from_slice(&[0]);
            }
        }
        b.extend_from_slice(&[0]);
    });
    out
}

/// A `RowDescription` without its last `hidden` columns.
///
/// # Errors
/// If the frame is shorter than it says.
pub fn strip_columns(frame: &BytesMut, hidden: usize) -> Result<BytesMut, FrameError> {
    // After its name a column has table, attribute, type, size, modifier, format: 18 bytes.
    const COLUMN_BYTES: usize = 18;
    let body = frame::body(frame);
    let mut r = Reader::new(b'T', body);
    let own = usize::from(r.u16()?).saturating_sub(hidden);
    for _ in 0..own {
        r.string()?;
        r.bytes(COLUMN_BYTES)?;
    }
    let kept = &body[2..body.len() - r.rest().len()];
    let mut out = BytesMut::with_capacity(HEADER_BYTES + 2 + kept.len());
    build::frame(&mut out, b'T', |b| {
        b.extend_from_slice(&u16::try_from(own).unwrap_or(0).to_be_bytes());
        b.extend_from_slice(kept);
    });
    Ok(out)
}

/// What a client knows of the rows that a prepared statement gives it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct OwnRow {
    pub columns: usize,
    /// Name, type and modifier of each: what PostgreSQL's `equalTupleDescs` compares.
    described: Vec<u8>,
}

impl OwnRow {
    /// Of the body of a `RowDescription` whose last columns are ours; an empty one has none.
    ///
    /// # Errors
    /// If it is shorter than it says.
    pub fn of(body: &[u8], hidden: usize) -> Result<Self, FrameError> {
        let mut r = Reader::new(b'T', body);
        let mut row = Self::default();
        if body.is_empty() {
            return Ok(row);
        }
        row.columns = usize::from(r.u16()?).saturating_sub(hidden);
        for _ in 0..row.columns {
            row.described.extend_from_slice(r.string()?);
            // After the name: table, attribute, type, size, modifier, format.
            let rest = r.bytes(18)?;
            row.described.extend_from_slice(&rest[6..10]);
            row.described.extend_from_slice(&rest[12..16]);
        }
        Ok(row)
    }
}

/// Result formats for a statement with hidden columns, which are always text.
#[must_use]
pub fn result_formats(asked: &[u8], client_returning: bool, own: usize, hidden: usize) -> Vec<u8> {
    const TEXT: [u8; 2] = [0, 0];
    if !client_returning || asked.is_empty() || asked == TEXT {
        return Vec::new();
    }
    let mut formats = if asked.len() == 2 { asked.repeat(own) } else { asked.to_vec() };
    formats.extend(TEXT.repeat(hidden));
    formats
}

/// Empties a buffer, and gives its memory back if it has grown large.
pub fn shrink(buffer: &mut BytesMut) {
    if buffer.capacity() > wire::KEEP_BYTES_MAX {
        *buffer = BytesMut::with_capacity(wire::READ_BYTES);
    } else {
        buffer.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hidden_columns_are_text_whatever_the_client_asked_for_its_own() {
        assert_eq!(result_formats(&[0, 1], true, 2, 1), [0, 1, 0, 1, 0, 0]);
        assert_eq!(result_formats(&[0, 1, 0, 0], true, 2, 1), [0, 1, 0, 0, 0, 0]);
        assert!(result_formats(&[0, 1], false, 0, 3).is_empty());
    }
}
