//! Looking into the few messages that the proxy must understand, by slices of their body.
//!
//! Every reader is confined to the body that it is given and fails on a short one.

use crate::pg::frame::FrameError;

/// A cursor over the body of one message.
#[derive(Clone, Copy, Debug)]
pub struct Reader<'a> {
    tag: u8,
    rest: &'a [u8],
}

impl<'a> Reader<'a> {
    #[must_use]
    pub fn new(tag: u8, body: &'a [u8]) -> Self {
        Self { tag, rest: body }
    }

    fn short(&self) -> FrameError {
        FrameError::BodyTooShort { tag: self.tag }
    }

    /// The next `n` bytes.
    ///
    /// # Errors
    /// If fewer are left; so for all readers below.
    pub fn bytes(&mut self, n: usize) -> Result<&'a [u8], FrameError> {
        let (head, rest) = self.rest.split_at_checked(n).ok_or(FrameError::BodyTooShort { tag: self.tag })?;
        self.rest = rest;
        Ok(head)
    }

    /// A string that ends with a zero byte, without it.
    ///
    /// # Errors
    /// If there is no zero byte.
    pub fn string(&mut self) -> Result<&'a [u8], FrameError> {
        let end = self.rest.iter().position(|b| *b == 0).ok_or_else(|| self.short())?;
        let text = self.bytes(end)?;
        self.bytes(1)?;
        Ok(text)
    }

    /// # Errors
    /// If the body ends.
    pub fn u8(&mut self) -> Result<u8, FrameError> {
        Ok(self.bytes(1)?[0])
    }

    /// # Errors
    /// If the body ends.
    pub fn u16(&mut self) -> Result<u16, FrameError> {
        let b = self.bytes(2)?;
        Ok(u16::from_be_bytes([b[0], b[1]]))
    }

    /// # Errors
    /// If the body ends.
    pub fn i32(&mut self) -> Result<i32, FrameError> {
        let b = self.bytes(4)?;
        Ok(i32::from_be_bytes([b[0], b[1], b[2], b[3]]))
    }

    /// # Errors
    /// If the body ends.
    pub fn u32(&mut self) -> Result<u32, FrameError> {
        let b = self.bytes(4)?;
        Ok(u32::from_be_bytes([b[0], b[1], b[2], b[3]]))
    }

    /// A value of `DataRow` or `Bind`: a length and that many bytes; -1 is NULL.
    ///
    /// # Errors
    /// If the body ends.
    pub fn value(&mut self) -> Result<Option<&'a [u8]>, FrameError> {
        match usize::try_from(self.i32()?) {
            Ok(n) => Ok(Some(self.bytes(n)?)),
            Err(_) => Ok(None),
        }
    }

    #[must_use]
    pub fn rest(&self) -> &'a [u8] {
        self.rest
    }
}

/// `Parse`: name, text and the parameter types that the client prescribes (0: to be inferred).
#[derive(Clone, Copy, Debug)]
pub struct Parse<'a> {
    pub name: &'a [u8],
    pub text: &'a [u8],
    /// Number of types, then four bytes each: as in the message.
    pub types: &'a [u8],
}

impl<'a> Parse<'a> {
    /// # Errors
    /// If the body is shorter than it says.
    pub fn read(body: &'a [u8]) -> Result<Self, FrameError> {
        let mut r = Reader::new(b'P', body);
        let (name, text) = (r.string()?, r.string()?);
        let types = r.rest();
        let n = usize::from(r.u16()?);
        r.bytes(n * 4)?;
        Ok(Self { name, text, types })
    }
}

/// `Bind`, cut where the proxy needs it.
#[derive(Clone, Copy, Debug)]
pub struct Bind<'a> {
    pub portal: &'a [u8],
    pub statement: &'a [u8],
    /// Parameter formats and values: as in the message, from the number of formats to the last value.
    pub parameters: &'a [u8],
    /// Result formats, two bytes each, without their number.
    pub result_formats: &'a [u8],
}

impl<'a> Bind<'a> {
    /// # Errors
    /// If the body is shorter than it says.
    pub fn read(body: &'a [u8]) -> Result<Self, FrameError> {
        let mut r = Reader::new(b'B', body);
        let (portal, statement) = (r.string()?, r.string()?);
        let start = r.rest();
        let formats = usize::from(r.u16()?);
        r.bytes(formats * 2)?;
        for _ in 0..r.u16()? {
            r.value()?;
        }
        let parameters = &start[..start.len() - r.rest().len()];
        let n = usize::from(r.u16()?);
        Ok(Self { portal, statement, parameters, result_formats: r.bytes(n * 2)? })
    }
}

/// `'S'` or `'P'` and a name: `Describe` and `Close`.
///
/// # Errors
/// If the body is shorter than it says.
pub fn kind_and_name(tag: u8, body: &[u8]) -> Result<(u8, &[u8]), FrameError> {
    let mut r = Reader::new(tag, body);
    Ok((r.u8()?, r.string()?))
}

/// `Execute`: portal and greatest number of rows (0: all).
///
/// # Errors
/// If the body is shorter than it says.
pub fn execute(body: &[u8]) -> Result<(&[u8], u32), FrameError> {
    let mut r = Reader::new(b'E', body);
    Ok((r.string()?, r.u32()?))
}

/// One field of an `ErrorResponse` or `NoticeResponse`.
#[must_use]
pub fn error_field(body: &[u8], field: u8) -> Option<&[u8]> {
    let mut r = Reader::new(b'E', body);
    loop {
        match r.u8() {
            Ok(0) | Err(_) => return None,
            Ok(f) => {
                let value = r.string().ok()?;
                if f == field {
                    return Some(value);
                }
            }
        }
    }
}

/// Whether an `ErrorResponse` says that the server ends the session. Field `V`: the severity in English (PostgreSQL 9.6).
#[must_use]
pub fn is_fatal(body: &[u8]) -> bool {
    matches!(error_field(body, b'V'), Some(b"FATAL" | b"PANIC"))
}

/// SQLSTATE and message of an `ErrorResponse`, for logs and decisions of our own.
#[must_use]
pub fn error_summary(body: &[u8]) -> (String, String) {
    let text = |f| String::from_utf8_lossy(error_field(body, f).unwrap_or_default()).into_owned();
    (text(b'C'), text(b'M'))
}

/// Rows of a command tag: the last number of `INSERT 0 5`, `UPDATE 3`, `COPY 7`; `None` for `BEGIN`.
#[must_use]
pub fn tag_count(body: &[u8]) -> Option<u64> {
    let tag = body.strip_suffix(b"\0").unwrap_or(body);
    let digits = tag.rsplit(|b| *b == b' ').next()?;
    std::str::from_utf8(digits).ok()?.parse().ok()
}

/// Whether a notice is of the levels DEBUG1 to DEBUG5.
#[must_use]
pub fn is_debug(body: &[u8]) -> bool {
    error_field(body, b'V').is_some_and(|severity| severity.starts_with(b"DEBUG"))
}

/// The value of a `ParameterStatus` of this name.
#[must_use]
pub fn parameter<'b>(body: &'b [u8], name: &[u8]) -> Option<&'b str> {
    let mut r = Reader::new(b'S', body);
    let value = (r.string().ok()? == name).then(|| r.string().ok())??;
    std::str::from_utf8(value).ok()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn random_bodies_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..96)) {
            let _ = Parse::read(&bytes);
            let _ = Bind::read(&bytes);
            let _ = (kind_and_name(b'D', &bytes), execute(&bytes));
            let _ = (error_summary(&bytes), tag_count(&bytes));
        }
    }

    #[test]
    fn the_count_of_a_tag_is_its_last_word() {
        assert_eq!(tag_count(b"INSERT 0 5\0"), Some(5));
        assert_eq!(tag_count(b"UPDATE 3\0"), Some(3));
        assert_eq!(tag_count(b"BEGIN\0"), None);
    }
}
