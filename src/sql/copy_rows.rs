//! The rows of COPY data: where they end, how many fields they have, and the same rows with values appended.
//!
//! Mirrors `CopyReadLineText` and `CopyReadAttributesText`/`CSV` of PostgreSQL's `copyfromparse.c`, as far as ends of rows and fields
//! go. Client encodings whose characters may have such bytes after the first are not let in (`sql/classify.rs`).

use std::ops::Range;

/// How rows and fields are told apart.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CopyFormat {
    Text { delimiter: u8, null: Vec<u8> },
    Csv { delimiter: u8, quote: u8, escape: u8, null: Vec<u8> },
    Binary,
}

/// A part of the data.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Piece {
    /// A row without its end of line, and the end of line; both are positions in [`Rows::bytes`]. The last row may have none.
    Row { content: Range<usize>, end: Range<usize>, fields: usize },
    /// Not a row: head and end of binary data, `\.` and what follows it.
    Other(Range<usize>),
}

/// Cuts data into rows. Data come in by [`Rows::feed`] in blocks of any size, [`Rows::finish`] says that there are no more; after
/// each, [`Rows::take`] gives pieces until it has no whole one.
#[derive(Clone, Debug)]
pub struct Rows {
    format: CopyFormat,
    buffer: Vec<u8>,
    /// The piece under way begins here, and was looked at up to `at`.
    start: usize,
    at: usize,
    fields: usize,
    quoted: bool,
    escaped: bool,
    head_over: bool,
    data_over: bool,
    finished: bool,
}

/// `PGCOPY\n\377\r\n\0`, flags, length of the extension.
const BINARY_HEAD_BYTES: usize = 19;

impl Rows {
    #[must_use]
    pub fn new(format: CopyFormat) -> Self {
        Self {
            format,
            buffer: Vec::new(),
            start: 0,
            at: 0,
            fields: 1,
            quoted: false,
            escaped: false,
            head_over: false,
            data_over: false,
            finished: false,
        }
    }

    pub fn feed(&mut self, block: &[u8]) {
        self.buffer.drain(..self.start);
        self.at -= self.start;
        self.start = 0;
        self.buffer.extend_from_slice(block);
    }

    pub fn finish(&mut self) {
        self.finished = true;
    }

    /// What a piece of [`Self::take`] is in bytes; until the next `feed`.
    #[must_use]
    pub fn bytes(&self, range: Range<usize>) -> &[u8] {
        self.buffer.get(range).unwrap_or_default()
    }

    pub fn take(&mut self) -> Option<Piece> {
        let piece = match self.format {
            _ if self.data_over => {
                (self.start < self.buffer.len()).then_some(Piece::Other(self.start..self.buffer.len()))
            }
            CopyFormat::Text { delimiter, .. } => self.text_row(delimiter),
            CopyFormat::Csv { delimiter, quote, escape, .. } => self.csv_row(delimiter, quote, escape),
            CopyFormat::Binary => self.binary_row(),
        }?;
        let end = match &piece {
            Piece::Row { end, .. } => end.end,
            Piece::Other(range) => range.end,
        };
        (self.start, self.at, self.fields) = (end, end, 1);
        (self.quoted, self.escaped) = (false, false);
        Some(piece)
    }

    fn text_row(&mut self, delimiter: u8) -> Option<Piece> {
        while let Some(byte) = self.buffer.get(self.at).copied() {
            if self.escaped {
                self.escaped = false;
            } else if byte == b'\\' {
                self.escaped = true;
            } else if byte == delimiter {
                self.fields += 1;
            } else if matches!(byte, b'\n' | b'\r') {
                return self.line(byte);
            }
            self.at += 1;
        }
        self.last_line()
    }

    fn csv_row(&mut self, delimiter: u8, quote: u8, escape: u8) -> Option<Piece> {
        while let Some(byte) = self.buffer.get(self.at).copied() {
            if self.quoted && byte == escape && escape != quote {
                self.escaped = !self.escaped;
            }
            if byte == quote && !self.escaped {
                self.quoted = !self.quoted;
            }
            if byte != escape {
                self.escaped = false;
            }
            if !self.quoted {
                if byte == delimiter {
                    self.fields += 1;
                } else if matches!(byte, b'\n' | b'\r') {
                    return self.line(byte);
                }
            }
            self.at += 1;
        }
        self.last_line()
    }

    /// A line ends at `at`.
    fn line(&mut self, byte: u8) -> Option<Piece> {
        let mut end = self.at + 1;
        if byte == b'\r' {
            match self.buffer.get(end) {
                Some(b'\n') => end += 1,
                None if !self.finished => return None,
                _ => {}
            }
        }
        Some(self.line_to(self.at, end))
    }

    /// After the last end of line there may be one more row, without.
    fn last_line(&mut self) -> Option<Piece> {
        let all = self.buffer.len();
        (self.finished && self.start < all).then(|| self.line_to(all, all))
    }

    fn line_to(&mut self, content_end: usize, end: usize) -> Piece {
        if self.buffer.get(self.start..content_end) == Some(b"\\.") {
            self.data_over = true;
            return Piece::Other(self.start..end);
        }
        Piece::Row { content: self.start..content_end, end: content_end..end, fields: self.fields }
    }

    fn binary_row(&mut self) -> Option<Piece> {
        let rest = self.buffer.get(self.start..).unwrap_or_default();
        if !self.head_over {
            let extension = read_u32(rest, BINARY_HEAD_BYTES - 4)?;
            let head = BINARY_HEAD_BYTES.saturating_add(extension);
            rest.get(..head)?;
            self.head_over = true;
            return Some(Piece::Other(self.start..self.start + head));
        }
        let count = rest.first_chunk().map(|bytes| i16::from_be_bytes(*bytes))?;
        // -1 ends the data; what is wrong is the server's to say
        let Ok(fields) = usize::try_from(count) else {
            self.data_over = true;
            return Some(Piece::Other(self.start..self.buffer.len()));
        };
        let mut at = 2_usize;
        for _ in 0..fields {
            let length = read_u32(rest, at)?;
            at = at.saturating_add(4);
            // -1 is NULL
            if length != usize::try_from(u32::MAX).unwrap_or(usize::MAX) {
                at = at.saturating_add(length);
            }
            rest.get(..at)?;
        }
        let end = self.start + at;
        Some(Piece::Row { content: self.start..end, end: end..end, fields })
    }

    /// Bytes that are no piece although the data are at their end: binary data that break off.
    #[must_use]
    pub fn is_broken(&self) -> bool {
        self.start < self.buffer.len()
    }
}

fn read_u32(bytes: &[u8], at: usize) -> Option<usize> {
    let bytes = bytes.get(at..)?.first_chunk()?;
    usize::try_from(u32::from_be_bytes(*bytes)).ok()
}

impl CopyFormat {
    /// Appends a row with these values after its own fields.
    pub fn put_row(&self, content: &[u8], end: &[u8], values: &[Option<&[u8]>], out: &mut Vec<u8>) {
        match self {
            Self::Text { .. } | Self::Csv { .. } => {
                out.extend_from_slice(content);
                for value in values {
                    self.put_field(*value, out);
                }
                out.extend_from_slice(end);
            }
            Self::Binary => {
                let (count, fields) = content.split_at_checked(2).unwrap_or_default();
                let own = count.first_chunk().map_or(0, |bytes| i16::from_be_bytes(*bytes));
                let all = own.saturating_add(i16::try_from(values.len()).unwrap_or(i16::MAX));
                out.extend_from_slice(&all.to_be_bytes());
                out.extend_from_slice(fields);
                for value in values {
                    let length = value.map_or(-1, |value| i32::try_from(value.len()).unwrap_or(i32::MAX));
                    out.extend_from_slice(&length.to_be_bytes());
                    out.extend_from_slice(value.unwrap_or_default());
                }
            }
        }
    }

    /// A delimiter and a value; nothing for binary data.
    pub fn put_field(&self, value: Option<&[u8]>, out: &mut Vec<u8>) {
        match self {
            Self::Text { delimiter, null } => {
                out.push(*delimiter);
                let Some(value) = value else { return out.extend_from_slice(null) };
                let start = out.len();
                for byte in value {
                    put_text_byte(*byte, *delimiter, out);
                }
                // by an octal escape it is no longer the text that stands for NULL
                if let (true, Some(first)) = (out.get(start..) == Some(null.as_slice()), value.first()) {
                    out.truncate(start);
                    out.extend_from_slice(format!("\\{first:03o}").as_bytes());
                    value.iter().skip(1).for_each(|byte| put_text_byte(*byte, *delimiter, out));
                }
            }
            Self::Csv { delimiter, quote, escape, null } => {
                out.push(*delimiter);
                let Some(value) = value else { return out.extend_from_slice(null) };
                out.push(*quote);
                for byte in value {
                    if byte == quote || byte == escape {
                        out.push(*escape);
                    }
                    out.push(*byte);
                }
                out.push(*quote);
            }
            Self::Binary => {}
        }
    }
}

fn put_text_byte(byte: u8, delimiter: u8, out: &mut Vec<u8>) {
    match byte {
        b'\n' => out.extend_from_slice(b"\\n"),
        b'\r' => out.extend_from_slice(b"\\r"),
        b'\t' => out.extend_from_slice(b"\\t"),
        b'\\' => out.extend_from_slice(b"\\\\"),
        byte if byte == delimiter => out.extend_from_slice(&[b'\\', byte]),
        byte => out.push(byte),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text() -> CopyFormat {
        CopyFormat::Text { delimiter: b'\t', null: b"\\N".to_vec() }
    }

    fn csv(quote: u8, escape: u8) -> CopyFormat {
        CopyFormat::Csv { delimiter: b',', quote, escape, null: Vec::new() }
    }

    /// Rows with the value `x` appended, fed in blocks of that many bytes, and the fields of each.
    fn filled(format: &CopyFormat, data: &[u8], block: usize) -> (Vec<u8>, Vec<usize>) {
        let (mut rows, mut out, mut counts) = (Rows::new(format.clone()), Vec::new(), Vec::new());
        let mut drain = |rows: &mut Rows| {
            while let Some(piece) = rows.take() {
                match piece {
                    Piece::Row { content, end, fields } => {
                        format.put_row(rows.bytes(content), rows.bytes(end), &[Some(b"x"), None], &mut out);
                        counts.push(fields);
                    }
                    Piece::Other(range) => out.extend_from_slice(rows.bytes(range)),
                }
            }
        };
        for block in data.chunks(block) {
            rows.feed(block);
            drain(&mut rows);
        }
        rows.finish();
        drain(&mut rows);
        assert!(!rows.is_broken());
        (out, counts)
    }

    fn check(format: &CopyFormat, data: &[u8], expected: &[u8], fields: &[usize]) {
        for block in [1, 2, 3, 1000] {
            let (out, counts) = filled(format, data, block);
            assert_eq!(out.escape_ascii().to_string(), expected.escape_ascii().to_string());
            assert_eq!(counts, fields);
        }
    }

    #[test]
    fn rows_end_where_the_server_ends_them() {
        check(
            &text(),
            b"1\ta\n2\tb\\\nc\\\td\n\n3",
            b"1\ta\tx\t\\N\n2\tb\\\nc\\\td\tx\t\\N\n\tx\t\\N\n3\tx\t\\N",
            &[2, 2, 1, 1],
        );
        check(&text(), b"1\r\n2\r\n", b"1\tx\t\\N\r\n2\tx\t\\N\r\n", &[1, 1]);
        check(&text(), b"1\r2\r", b"1\tx\t\\N\r2\tx\t\\N\r", &[1, 1]);
        check(&text(), b"1\n\\.\nignored\n", b"1\tx\t\\N\n\\.\nignored\n", &[1]);
        check(&csv(b'"', b'"'), b"1,\"a\n\"\"b,\"\n2,3,4\n", b"1,\"a\n\"\"b,\",\"x\",\n2,3,4,\"x\",\n", &[2, 3]);
        check(&csv(b'"', b'\\'), b"\"a\\\"\n,\",\\\n2,3\n", b"\"a\\\"\n,\",\\,\"x\",\n2,3,\"x\",\n", &[2, 2]);
        check(&csv(b'"', b'\\'), b"\"a\\\\\",1\n", b"\"a\\\\\",1,\"x\",\n", &[2]);
    }

    #[test]
    fn binary_rows_get_values_too() {
        let mut data = b"PGCOPY\n\xff\r\n\0\0\0\0\0\0\0\0\x02ee".to_vec();
        let head = data.clone();
        data.extend_from_slice(b"\0\x02\0\0\0\x01a\xff\xff\xff\xff\0\0\xff\xff");
        let mut expected = head;
        expected.extend_from_slice(b"\0\x04\0\0\0\x01a\xff\xff\xff\xff\0\0\0\x01x\xff\xff\xff\xff");
        expected.extend_from_slice(b"\0\x02\0\0\0\x01x\xff\xff\xff\xff\xff\xff");
        check(&CopyFormat::Binary, &data, &expected, &[2, 0]);
        let mut rows = Rows::new(CopyFormat::Binary);
        rows.feed(b"PGCOPY\n\xff\r\n\0\0\0\0\0\xff\xff\xff\xff");
        rows.finish();
        assert!(rows.take().is_none() && rows.is_broken());
    }

    #[test]
    fn values_are_not_taken_for_anything_else() {
        let put = |format: &CopyFormat, value: &[u8]| {
            let mut out = Vec::new();
            format.put_field(Some(value), &mut out);
            out.escape_ascii().to_string()
        };
        assert_eq!(put(&text(), b"a\tb\\N\n"), "\\ta\\\\tb\\\\\\\\N\\\\n");
        let odd = CopyFormat::Text { delimiter: b'|', null: b"none".to_vec() };
        assert_eq!(put(&odd, b"none"), "|\\\\156one");
        assert_eq!(put(&odd, b"a|b"), "|a\\\\|b");
        assert_eq!(put(&csv(b'"', b'\\'), b"a\"\\,"), ",\\\"a\\\\\\\"\\\\\\\\,\\\"");
    }
}
