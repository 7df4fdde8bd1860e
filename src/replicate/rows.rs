//! From the rows that an effect list keeps to what a follower gets: the parameters of one statement, arrays with the values of a
//! column each, or lines of COPY.

use bytes::{BufMut, BytesMut};

use crate::pg::frame::FrameError;
use crate::pg::message::Reader;
use crate::replicate::effects::{EffectLog, EffectsError, Range};

/// Bytes of an effect list that are read at once.
const BLOCK_BYTES: u64 = 64 * 1024;
/// Each row has its length before it.
const LENGTH_BYTES: usize = 4;

/// The rows of one effect, one after the other.
#[derive(Debug)]
pub struct KeptRows<'l> {
    log: &'l EffectLog,
    /// Where `buffer` was read from goes up to here.
    read_to: u64,
    end: u64,
    buffer: Vec<u8>,
    /// In `buffer`: before it everything was given out.
    at: usize,
}

impl<'l> KeptRows<'l> {
    #[must_use]
    pub fn new(log: &'l EffectLog, data: Range) -> Self {
        Self { log, read_to: data.start, end: data.start + data.len, buffer: Vec::new(), at: 0 }
    }

    /// The next row, as the parameter section of a `Bind`.
    ///
    /// # Errors
    /// If the effect list can not be read.
    pub fn take(&mut self) -> Result<Option<&[u8]>, EffectsError> {
        self.have(LENGTH_BYTES)?;
        let Some(length) = self.buffer.get(self.at..).and_then(<[u8]>::first_chunk) else { return Ok(None) };
        let length = usize::try_from(u32::from_be_bytes(*length)).unwrap_or(usize::MAX);
        self.have(LENGTH_BYTES.saturating_add(length))?;
        let start = self.at + LENGTH_BYTES;
        self.at = start.saturating_add(length).min(self.buffer.len());
        Ok(self.buffer.get(start..self.at))
    }

    /// Reads on if less than `bytes` are there.
    fn have(&mut self, bytes: usize) -> Result<(), EffectsError> {
        let left = self.buffer.len() - self.at;
        if left >= bytes || self.read_to >= self.end {
            return Ok(());
        }
        let from = self.read_to - left as u64;
        let len = BLOCK_BYTES.max(bytes as u64).min(self.end - from);
        self.log.read(Range { start: from, len }, &mut self.buffer)?;
        self.read_to = from + len;
        self.at = 0;
        Ok(())
    }
}

/// The values of a parameter section whose values are all text.
fn each_value(row: &[u8], mut take: impl FnMut(usize, Option<&[u8]>)) -> Result<usize, FrameError> {
    let mut r = Reader::new(b'B', row);
    r.u16()?;
    let columns = usize::from(r.u16()?);
    for column in 0..columns {
        take(column, r.value()?);
    }
    Ok(columns)
}

/// Appends a row as a line of COPY in text format.
///
/// # Errors
/// If the row is shorter than it says.
pub fn put_copy_line(row: &[u8], out: &mut BytesMut) -> Result<(), FrameError> {
    each_value(row, |column, value| {
        if column > 0 {
            out.put_u8(b'\t');
        }
        let Some(value) = value else { return out.put_slice(b"\\N") };
        for byte in value {
            match byte {
                b'\\' => out.put_slice(b"\\\\"),
                b'\n' => out.put_slice(b"\\n"),
                b'\r' => out.put_slice(b"\\r"),
                b'\t' => out.put_slice(b"\\t"),
                byte => out.put_u8(*byte),
            }
        }
    })?;
    out.put_u8(b'\n');
    Ok(())
}

/// Rows turned into one array literal per column.
#[derive(Debug, Default)]
pub struct Arrays {
    columns: Vec<BytesMut>,
    rows: u64,
}

impl Arrays {
    #[must_use]
    pub fn rows(&self) -> u64 {
        self.rows
    }

    #[must_use]
    pub fn bytes(&self) -> usize {
        self.columns.iter().map(BytesMut::len).sum()
    }

    /// # Errors
    /// If the row is shorter than it says.
    pub fn push(&mut self, row: &[u8]) -> Result<(), FrameError> {
        let columns = &mut self.columns;
        each_value(row, |column, value| {
            if columns.len() <= column {
                columns.resize_with(column + 1, BytesMut::new);
            }
            if let Some(array) = columns.get_mut(column) {
                array.put_u8(if array.is_empty() { b'{' } else { b',' });
                put_element(value, array);
            }
        })?;
        self.rows += 1;
        Ok(())
    }

    /// The parameter section of a `Bind`: the arrays, then the number of rows.
    #[must_use]
    pub fn finish(mut self) -> BytesMut {
        self.columns.iter_mut().for_each(|array| array.put_u8(b'}'));
        let rows = self.rows.to_string();
        let values: Vec<Option<&[u8]>> =
            self.columns.iter().map(|array| Some(&array[..])).chain([Some(rows.as_bytes())]).collect();
        crate::pg::build::text_values(&values)
    }
}

/// Quoted, whatever it is: then only quotes and backslashes mean something else in it.
fn put_element(value: Option<&[u8]>, array: &mut BytesMut) {
    let Some(value) = value else { return array.put_slice(b"NULL") };
    array.put_u8(b'"');
    for byte in value {
        if matches!(byte, b'"' | b'\\') {
            array.put_u8(b'\\');
        }
        array.put_u8(*byte);
    }
    array.put_u8(b'"');
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::pg::build::text_values;
    use crate::replicate::effects::SpillBudget;

    fn row(values: &[Option<&str>]) -> BytesMut {
        text_values(&values.iter().map(|value| value.map(str::as_bytes)).collect::<Vec<_>>())
    }

    #[test]
    fn rows_are_read_back_across_blocks_of_the_list() {
        let mut log = EffectLog::new(Arc::new(SpillBudget::new(std::env::temp_dir(), 1 << 30)));
        log.append(b"something before").unwrap();
        let start = log.bytes();
        let long = "x".repeat(100_000);
        let wanted: Vec<BytesMut> = (0..5000)
            .map(|n| row(&[Some(&n.to_string()), (n % 3 > 0).then_some("y"), (n == 77).then_some(long.as_str())]))
            .collect();
        for row in &wanted {
            log.append(&u32::try_from(row.len()).unwrap().to_be_bytes()).unwrap();
            log.append(row).unwrap();
        }
        let data = Range { start, len: log.bytes() - start };
        log.append(b"something after").unwrap();
        let mut kept = KeptRows::new(&log, data);
        for row in &wanted {
            assert_eq!(kept.take().unwrap(), Some(&row[..]));
        }
        assert_eq!(kept.take().unwrap(), None);
    }

    #[test]
    fn what_means_something_in_copy_or_an_array_is_escaped() {
        let odd = row(&[Some("a\tb\\N\n\r\"{,}"), None, Some("NULL"), Some("")]);
        let mut line = BytesMut::new();
        put_copy_line(&odd, &mut line).unwrap();
        assert_eq!(&line[..], b"a\\tb\\\\N\\n\\r\"{,}\t\\N\tNULL\t\n");
        let mut arrays = Arrays::default();
        arrays.push(&odd).unwrap();
        arrays.push(&row(&[Some("1"), Some("2"), None, Some("\\")])).unwrap();
        assert_eq!(arrays.rows(), 2);
        let first: &[u8] = b"{\"a\tb\\\\N\n\r\\\"{,}\",\"1\"}";
        let expected =
            [Some(first), Some(b"{NULL,\"2\"}"), Some(b"{\"NULL\",NULL}"), Some(b"{\"\",\"\\\\\"}"), Some(b"2")];
        assert_eq!(arrays.finish(), text_values(&expected));
        assert!(put_copy_line(&odd[..9], &mut line).is_err());
    }
}
