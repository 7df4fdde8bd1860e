//! Messages that the proxy writes itself.
//!
//! Query, Parse, Bind, Execute towards servers; errors and the end of a statement towards clients. They are
//! appended to a buffer, so that a batch leaves in one write.

use std::borrow::Cow;

use bytes::{BufMut, BytesMut};

/// Appends one frame whose body `fill` writes.
pub fn frame(out: &mut BytesMut, tag: u8, fill: impl FnOnce(&mut BytesMut)) {
    out.put_u8(tag);
    let at = out.len();
    out.put_u32(0);
    fill(out);
    // A body of more than i32::MAX bytes can not come from frames that were themselves bounded by `frame::peek`.
    let length = u32::try_from(out.len() - at).unwrap_or(u32::MAX);
    out[at..at + 4].copy_from_slice(&length.to_be_bytes());
}

fn put_string(out: &mut BytesMut, text: &[u8]) {
    out.put_slice(text);
    out.put_u8(0);
}

pub fn query(out: &mut BytesMut, text: &[u8]) {
    frame(out, b'Q', |b| put_string(b, text));
}

/// `types`: number and types as in the message; empty for none.
pub fn parse(out: &mut BytesMut, name: &[u8], text: &[u8], types: &[u8]) {
    frame(out, b'P', |b| {
        put_string(b, name);
        put_string(b, text);
        if types.is_empty() { b.put_u16(0) } else { b.put_slice(types) }
    });
}

/// A `Bind` whose parameter section (formats and values) is given as bytes; results in text.
pub fn bind_raw(out: &mut BytesMut, portal: &[u8], statement: &[u8], parameters: &[u8], result_formats: &[u8]) {
    frame(out, b'B', |b| {
        put_string(b, portal);
        put_string(b, statement);
        if parameters.is_empty() {
            b.put_u32(0);
        } else {
            b.put_slice(parameters);
        }
        b.put_u16(u16::try_from(result_formats.len() / 2).unwrap_or(0));
        b.put_slice(result_formats);
    });
}

/// The parameter section of a `Bind` with all values in text format.
#[must_use]
pub fn text_values(values: &[Option<&[u8]>]) -> BytesMut {
    let mut b = BytesMut::with_capacity(16 + values.len() * 16);
    b.put_u16(0);
    b.put_u16(u16::try_from(values.len()).unwrap_or(u16::MAX));
    for value in values {
        match value {
            Some(v) => {
                b.put_u32(u32::try_from(v.len()).unwrap_or(u32::MAX));
                b.put_slice(v);
            }
            None => b.put_i32(-1),
        }
    }
    b
}

pub fn bind_text(out: &mut BytesMut, portal: &[u8], statement: &[u8], values: &[Option<&[u8]>]) {
    bind_raw(out, portal, statement, &text_values(values), &[]);
}

pub fn execute(out: &mut BytesMut, portal: &[u8], rows_max: u32) {
    frame(out, b'E', |b| {
        put_string(b, portal);
        b.put_u32(rows_max);
    });
}

/// `kind`: `b'S'` statement, `b'P'` portal.
pub fn describe(out: &mut BytesMut, kind: u8, name: &[u8]) {
    frame(out, b'D', |b| {
        b.put_u8(kind);
        put_string(b, name);
    });
}

pub fn close(out: &mut BytesMut, kind: u8, name: &[u8]) {
    frame(out, b'C', |b| {
        b.put_u8(kind);
        put_string(b, name);
    });
}

pub fn sync(out: &mut BytesMut) {
    frame(out, b'S', |_| {});
}

pub fn flush(out: &mut BytesMut) {
    frame(out, b'H', |_| {});
}

pub fn copy_data(out: &mut BytesMut, data: &[u8]) {
    frame(out, b'd', |b| b.put_slice(data));
}

pub fn copy_done(out: &mut BytesMut) {
    frame(out, b'c', |_| {});
}

pub fn copy_fail(out: &mut BytesMut, why: &str) {
    frame(out, b'f', |b| put_string(b, why.as_bytes()));
}

/// `status`: `b'I'` idle, `b'T'` in a block, `b'E'` in a failed block.
pub fn ready_for_query(out: &mut BytesMut, status: u8) {
    frame(out, b'Z', |b| b.put_u8(status));
}

pub fn command_complete(out: &mut BytesMut, tag: &str) {
    frame(out, b'C', |b| put_string(b, tag.as_bytes()));
}

/// A WARNING, as PostgreSQL itself says it.
pub fn warning(out: &mut BytesMut, sqlstate: &str, message: &str) {
    frame(out, b'N', |b| {
        for (field, value) in [(b'S', "WARNING"), (b'V', "WARNING"), (b'C', sqlstate), (b'M', message)] {
            b.put_u8(field);
            put_string(b, value.as_bytes());
        }
        b.put_u8(0);
    });
}

/// What a client may see of an error: SQLSTATE, one sentence, details, and what to do next.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClientError {
    pub fatal: bool,
    pub sqlstate: &'static str,
    pub message: String,
    pub detail: String,
    pub hint: String,
}

impl ClientError {
    #[must_use]
    pub fn error(sqlstate: &'static str, message: impl Into<String>, hint: impl Into<String>) -> Self {
        Self { fatal: false, sqlstate, message: message.into(), detail: String::new(), hint: hint.into() }
    }

    #[must_use]
    pub fn fatal(sqlstate: &'static str, message: impl Into<String>, hint: impl Into<String>) -> Self {
        Self { fatal: true, ..Self::error(sqlstate, message, hint) }
    }

    #[must_use]
    pub fn with_detail(mut self, detail: impl Into<String>) -> Self {
        self.detail = detail.into();
        self
    }

    pub fn write(&self, out: &mut BytesMut) {
        self.write_as(out, |text| Cow::Borrowed(text.as_bytes()));
    }

    /// The same in another encoding than UTF-8.
    pub fn write_as<'t>(&'t self, out: &mut BytesMut, encode: impl Fn(&'t str) -> Cow<'t, [u8]>) {
        let severity: &[u8] = if self.fatal { b"FATAL" } else { b"ERROR" };
        frame(out, b'E', |b| {
            let fields: [(u8, Cow<'_, [u8]>); 6] = [
                (b'S', Cow::Borrowed(severity)),
                (b'V', Cow::Borrowed(severity)),
                (b'C', Cow::Borrowed(self.sqlstate.as_bytes())),
                (b'M', encode(&self.message)),
                (b'D', encode(&self.detail)),
                (b'H', encode(&self.hint)),
            ];
            for (field, value) in fields {
                if !value.is_empty() {
                    b.put_u8(field);
                    put_string(b, &value);
                }
            }
            b.put_u8(0);
        });
    }
}
