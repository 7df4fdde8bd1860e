//! Looks at the data of a COPY for dates and times that are the clock's, such as `now`. Only the columns of such types are
//! looked at, so a text with the word in it passes.

use super::dates::looks_like_now;

/// Which fields of the data go to date and time columns, and how fields are told apart.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CopyDates {
    /// Positions in a row, from 0, ascending.
    pub fields: Vec<usize>,
    pub csv: bool,
    pub delimiter: u8,
    /// For CSV.
    pub quote: u8,
    /// For CSV.
    pub escape: u8,
}

/// Bytes of a field that are kept; no date is longer, and a longer array that begins with harmless dates counts by its beginning.
const FIELD_BYTES_MAX: usize = 4096;

/// Reads the data of one COPY, block by block; blocks may end anywhere.
#[derive(Clone, Debug)]
pub struct CopyScanner {
    dates: CopyDates,
    field: usize,
    value: Vec<u8>,
    quoted: bool,
    escaped: bool,
    found: bool,
}

impl CopyDates {
    #[must_use]
    pub fn scanner(&self) -> CopyScanner {
        CopyScanner { dates: self.clone(), field: 0, value: Vec::new(), quoted: false, escaped: false, found: false }
    }
}

impl CopyScanner {
    /// Takes the next block. True as soon as a date or time field depends on the clock.
    pub fn feed(&mut self, block: &[u8]) -> bool {
        for byte in block {
            if self.dates.csv {
                self.csv(*byte);
            } else {
                self.text(*byte);
            }
            if self.found {
                return true;
            }
        }
        false
    }

    /// The data are at their end; the last row may have no newline.
    pub fn finish(&mut self) -> bool {
        self.end_field(true);
        self.found
    }

    fn text(&mut self, byte: u8) {
        if self.escaped {
            self.escaped = false;
            // \N is NULL; any other escape in a date may spell a word (\156ow), so it counts
            self.found |= byte != b'N' && self.is_date();
        } else if byte == b'\\' {
            self.escaped = true;
        } else {
            self.plain(byte);
        }
    }

    fn csv(&mut self, byte: u8) {
        if self.escaped {
            self.escaped = false;
            self.keep(byte);
        } else if self.quoted && byte == self.dates.escape && self.dates.escape != self.dates.quote {
            self.escaped = true;
        } else if byte == self.dates.quote {
            // a doubled quote ends and begins the quotes: the fields come out the same
            self.quoted = !self.quoted;
        } else if self.quoted {
            self.keep(byte);
        } else {
            self.plain(byte);
        }
    }

    fn plain(&mut self, byte: u8) {
        if byte == self.dates.delimiter {
            self.end_field(false);
        } else if byte == b'\n' || byte == b'\r' {
            self.end_field(true);
        } else {
            self.keep(byte);
        }
    }

    fn is_date(&self) -> bool {
        self.dates.fields.binary_search(&self.field).is_ok()
    }

    fn keep(&mut self, byte: u8) {
        if self.value.len() < FIELD_BYTES_MAX && self.is_date() {
            self.value.push(byte);
        }
    }

    fn end_field(&mut self, row: bool) {
        self.found |= !self.value.is_empty() && looks_like_now(&String::from_utf8_lossy(&self.value));
        // an array too long to keep is not looked through
        self.found |= self.value.len() >= FIELD_BYTES_MAX;
        self.value.clear();
        self.field = if row { 0 } else { self.field + 1 };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn finds(dates: &CopyDates, data: &str) -> bool {
        // byte by byte, as blocks may end anywhere
        let mut scanner = dates.scanner();
        data.bytes().any(|byte| scanner.feed(&[byte])) || scanner.finish()
    }

    #[test]
    fn only_date_fields_count() {
        let text = CopyDates { fields: vec![1], csv: false, delimiter: b'\t', quote: b'"', escape: b'"' };
        assert!(finds(&text, "1\tnow\n"));
        assert!(finds(&text, "1\t2020-01-01\tx\n2\tToday"));
        assert!(finds(&text, "1\t\\156ow\n"));
        assert!(!finds(&text, "now\t2020-01-01\tnow\n2\t\\N\tnow\n\\.\n"));
        assert!(!finds(&text, "a\\\tb\t2020-01-01\tnow\n"));
        let csv = CopyDates { csv: true, delimiter: b',', ..text };
        assert!(finds(&csv, "\"a,\n\"\"b\",\"now\"\n"));
        assert!(!finds(&csv, "\"a,now\",2020-01-01,now\n"));
    }
}
