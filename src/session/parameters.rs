//! The parameters of a follower's statement, from those that the client bound.
//!
//! A follower's text has no RETURNING of the client's, so it may use fewer parameters than were bound, which the server would not
//! take. Types that users made have other numbers on other servers: there the server finds the type by itself.

use bytes::{BufMut, BytesMut};

use crate::pg::frame::FrameError;
use crate::pg::message::Reader;
use crate::sql::lex::{Kind, Lexer};

/// Types below have the same number on every server.
const FIRST_USER_TYPE: u32 = 16_384;
const TEXT: u32 = 25;
/// Types whose binary form is their text: text, varchar, bpchar, name, and not declared.
const STRINGS: [u32; 5] = [25, 1043, 1042, 19, 0];

/// Types (as in `Parse`) and parameters (as in `Bind`) for a text that may use only some of them: others become NULL.
///
/// # Errors
/// If the bytes are not as in those messages.
pub fn for_text(text: &str, types: &[u8], parameters: &[u8]) -> Result<(BytesMut, BytesMut), FrameError> {
    let mut used = Vec::new();
    for token in Lexer::new(text).filter(|token| token.kind == Kind::Parameter) {
        let number = text.get(token.range).and_then(|t| t.strip_prefix('$')).and_then(|t| t.parse::<usize>().ok());
        if let Some(at) = number.and_then(|n| n.checked_sub(1)).filter(|at| *at < usize::from(u16::MAX)) {
            if used.len() <= at {
                used.resize(at + 1, false);
            }
            used[at] = true;
        }
    }
    let count = u16::try_from(used.len()).unwrap_or(u16::MAX);
    let (mut new_types, mut formats, mut values) = (BytesMut::new(), BytesMut::new(), BytesMut::new());
    new_types.put_u16(count);
    formats.put_u16(count);
    values.put_u16(count);
    let given = each(parameters)?;
    for (at, used) in used.iter().enumerate() {
        let value = given.get(at).filter(|_| *used);
        new_types.put_u32(match value {
            None => TEXT,
            Some(_) => Some(type_at(types, at)).filter(|oid| *oid < FIRST_USER_TYPE).unwrap_or(0),
        });
        formats.put_u16(u16::from(value.is_some_and(|(binary, _)| *binary)));
        match value.and_then(|(_, value)| *value) {
            Some(value) => {
                values.put_u32(u32::try_from(value.len()).unwrap_or(u32::MAX));
                values.put_slice(value);
            }
            None => values.put_i32(-1),
        }
    }
    formats.unsplit(values);
    Ok((new_types, formats))
}

/// One value (0 is `$1`), and whether it is binary. `None` for NULL, and for what is not there.
#[must_use]
pub fn value(parameters: &[u8], at: usize) -> Option<(&[u8], bool)> {
    let (binary, value) = each(parameters).ok()?.into_iter().nth(at)?;
    Some((value?, binary))
}

/// Whether there is a type whose number is this server's own.
#[must_use]
pub fn has_user_types(types: &[u8]) -> bool {
    (0..types.len().saturating_sub(2) / 4).any(|at| type_at(types, at) >= FIRST_USER_TYPE)
}

/// The values that are text, by position (0 is `$1`); `None` for NULL and for binary ones of other types.
///
/// # Errors
/// If the bytes are not as in those messages.
pub fn texts<'p>(types: &[u8], parameters: &'p [u8]) -> Result<Vec<Option<&'p str>>, FrameError> {
    let all = each(parameters)?.into_iter().enumerate();
    let text = |at, binary: bool, value: Option<&'p [u8]>| {
        let is_text = !binary || STRINGS.contains(&type_at(types, at));
        value.filter(|_| is_text).and_then(|value| std::str::from_utf8(value).ok())
    };
    Ok(all.map(|(at, (binary, value))| text(at, binary, value)).collect())
}

/// 0 if the client did not declare it.
fn type_at(types: &[u8], at: usize) -> u32 {
    types.get(2 + at * 4..).and_then(|rest| rest.first_chunk()).map_or(0, |bytes| u32::from_be_bytes(*bytes))
}

/// Whether it is binary, and the value.
type Value<'p> = (bool, Option<&'p [u8]>);

fn each(parameters: &[u8]) -> Result<Vec<Value<'_>>, FrameError> {
    let mut r = Reader::new(b'B', parameters);
    let n = usize::from(r.u16()?);
    let formats = r.bytes(n * 2)?;
    let is_binary = |i: usize| {
        let at = if n == 1 { 0 } else { i * 2 };
        formats.get(at..at + 2).is_some_and(|format| format != [0, 0])
    };
    let count = usize::from(r.u16()?);
    (0..count).map(|i| Ok((is_binary(i), r.value()?))).collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Two binary values and a NULL: int4 7, a value of a type that a user made, NULL.
    const PARAMETERS: &[u8] = b"\0\x01\0\x01\0\x03\0\0\0\x04\0\0\0\x07\0\0\0\x03now\xff\xff\xff\xff";
    const TYPES: &[u8] = b"\0\x02\0\0\0\x17\0\0\x40\x01";

    #[test]
    fn what_the_text_does_not_use_is_dropped_or_null() {
        let (types, parameters) = for_text("update t set a = $1", TYPES, PARAMETERS).unwrap();
        assert_eq!(&types[..], b"\0\x01\0\0\0\x17");
        assert_eq!(&parameters[..], b"\0\x01\0\x01\0\x01\0\0\0\x04\0\0\0\x07");
        let (types, parameters) = for_text("update t set a = $2 -- $3", TYPES, PARAMETERS).unwrap();
        assert_eq!(&types[..], b"\0\x02\0\0\0\x19\0\0\0\0");
        assert_eq!(&parameters[..], b"\0\x02\0\0\0\x01\0\x02\xff\xff\xff\xff\0\0\0\x03now");
        assert!(has_user_types(TYPES) && !has_user_types(b"\0\x01\0\0\0\x17"));
    }

    #[test]
    fn texts_keep_their_positions() {
        let types = b"\0\x02\0\0\0\x17\0\0\0\x19";
        assert_eq!(texts(types, PARAMETERS).unwrap(), [None, Some("now"), None]);
        assert_eq!(texts(b"", b"\0\0\0\x02\xff\xff\xff\xff\0\0\0\x01x").unwrap(), [None, Some("x")]);
    }

    proptest! {
        #[test]
        fn random_bytes_never_panic(types in proptest::collection::vec(any::<u8>(), 0..32),
                                    parameters in proptest::collection::vec(any::<u8>(), 0..64)) {
            let _ = (texts(&types, &parameters), for_text("$2, $3", &types, &parameters), has_user_types(&types));
        }
    }
}
