//! The packets before a session: requests for encryption, for a cancel, and the start of a session.
//!
//! They have no tag: a length, a code, a body.

use bytes::{BufMut, Bytes, BytesMut};

use crate::pg::frame::FrameError;
use crate::pg::message::Reader;

/// `MAX_STARTUP_PACKET_LENGTH` of PostgreSQL's `pqcomm.h`.
pub const STARTUP_BYTES_MAX: usize = 10_000;

const CANCEL_REQUEST: u32 = 80_877_102;
pub const SSL_REQUEST: u32 = 80_877_103;
pub const GSSENC_REQUEST: u32 = 80_877_104;

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Startup {
    /// TLS is asked for: one byte answers.
    Tls,
    /// Encryption by GSSAPI is asked for: one byte answers.
    Gssapi,
    /// Process id and secret key as they were in `BackendKeyData`.
    Cancel { key: Bytes },
    /// A session of protocol 3; the packet as it was, to be forwarded.
    Session(SessionStart),
    /// Protocol 1 or 2, or something that is not PostgreSQL's.
    Unsupported { code: u32 },
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SessionStart {
    pub packet: Bytes,
    pub user: String,
    /// As PostgreSQL: the user's name if the client names none.
    pub database: String,
    pub replication: bool,
}

/// The first packet of `buffer`, or `None` while it is not there as a whole.
///
/// # Errors
/// If its length is impossible, or a session's parameters are not pairs of strings.
pub fn take(buffer: &mut BytesMut) -> Result<Option<Startup>, FrameError> {
    let Some(length) = buffer.first_chunk() else { return Ok(None) };
    let length = i32::from_be_bytes(*length);
    let bytes = usize::try_from(length).unwrap_or(0);
    if bytes < 8 {
        return Err(FrameError::TooShort { tag: 0, length });
    }
    if bytes > STARTUP_BYTES_MAX {
        return Err(FrameError::TooLong { tag: 0, bytes, max: STARTUP_BYTES_MAX });
    }
    if buffer.len() < bytes {
        return Ok(None);
    }
    let packet = buffer.split_to(bytes).freeze();
    let mut r = Reader::new(0, &packet[4..]);
    let code = r.u32()?;
    Ok(Some(match code {
        CANCEL_REQUEST => Startup::Cancel { key: packet.slice(8..) },
        SSL_REQUEST => Startup::Tls,
        GSSENC_REQUEST => Startup::Gssapi,
        code if code >> 16 == 3 => Startup::Session(read_session(&packet, r)?),
        code => Startup::Unsupported { code },
    }))
}

fn read_session(packet: &Bytes, mut r: Reader<'_>) -> Result<SessionStart, FrameError> {
    let (mut user, mut database, mut replication) = (String::new(), None, false);
    loop {
        let key = r.string()?;
        if key.is_empty() {
            break;
        }
        let value = String::from_utf8_lossy(r.string()?).into_owned();
        match key {
            b"user" => user = value,
            b"database" => database = Some(value),
            b"replication" => replication = !matches!(value.as_str(), "" | "false" | "off" | "no" | "0"),
            _ => {}
        }
    }
    let database = database.filter(|d| !d.is_empty()).unwrap_or_else(|| user.clone());
    Ok(SessionStart { packet: packet.clone(), user, database, replication })
}

/// The packet that asks a server to cancel what the backend with this key is doing.
#[must_use]
pub fn cancel_request(key: &[u8]) -> BytesMut {
    let mut out = BytesMut::with_capacity(8 + key.len());
    out.put_u32(u32::try_from(8 + key.len()).unwrap_or(u32::MAX));
    out.put_u32(CANCEL_REQUEST);
    out.put_slice(key);
    out
}

/// The packet that starts a session of protocol 3.0 with these parameters.
#[must_use]
pub fn session_request(parameters: &[(&str, &str)]) -> BytesMut {
    let mut out = BytesMut::new();
    out.put_u32(0);
    out.put_u32(3 << 16);
    for (key, value) in parameters {
        out.put_slice(key.as_bytes());
        out.put_u8(0);
        out.put_slice(value.as_bytes());
        out.put_u8(0);
    }
    out.put_u8(0);
    let length = u32::try_from(out.len()).unwrap_or(u32::MAX);
    out[..4].copy_from_slice(&length.to_be_bytes());
    out
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn random_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..64)) {
            let _ = take(&mut BytesMut::from(&bytes[..]));
        }
    }

    #[test]
    fn a_session_without_a_database_gets_the_name_of_its_user() {
        let mut buffer = session_request(&[("user", "ann")]);
        let Ok(Some(Startup::Session(start))) = take(&mut buffer) else { panic!("not a session") };
        assert_eq!((start.user.as_str(), start.database.as_str()), ("ann", "ann"));
    }

    #[test]
    fn http_is_refused_at_once() {
        assert!(take(&mut BytesMut::from(&b"GET / HTTP/1.1\r\n\r\n"[..])).is_err());
    }
}
