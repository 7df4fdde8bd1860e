//! Names and arithmetic of the write-ahead log: positions as text, segment files, page headers.
//!
//! Pure. Reads no file and knows no server; `source` and `target` do.

use pgtandem_proto::message::Lsn;

/// Bytes of a WAL page, `XLOG_BLCKSZ`. Other sizes need a rebuilt PostgreSQL and are refused where pages are checked.
pub const WAL_PAGE_BYTES: usize = 8192;

/// A position as PostgreSQL writes it: `16/B374D848`.
#[must_use]
pub fn format_lsn(lsn: Lsn) -> String {
    format!("{:X}/{:X}", lsn.0 >> 32, lsn.0 & 0xFFFF_FFFF)
}

/// The position in `text`, if it is one.
#[must_use]
pub fn parse_lsn(text: &str) -> Option<Lsn> {
    let (high, low) = text.trim().split_once('/')?;
    let high = u32::from_str_radix(high, 16).ok()?;
    let low = u32::from_str_radix(low, 16).ok()?;
    Some(Lsn((u64::from(high) << 32) | u64::from(low)))
}

/// Sizes that `initdb --wal-segsize` accepts: powers of two from 1 MiB to 1 GiB.
#[must_use]
pub fn segment_bytes_valid(bytes: u32) -> bool {
    bytes.is_power_of_two() && (1 << 20..=1 << 30).contains(&bytes)
}

/// First position of the segment that contains `lsn`.
#[must_use]
pub fn segment_start(lsn: Lsn, segment_bytes: u32) -> Lsn {
    Lsn(lsn.0 - lsn.0 % u64::from(segment_bytes))
}

/// Name of the segment file that contains `lsn`, as `XLogFileName` makes it.
#[must_use]
pub fn segment_name(timeline: u32, lsn: Lsn, segment_bytes: u32) -> String {
    let number = lsn.0 / u64::from(segment_bytes);
    let per_id = 0x1_0000_0000_u64 / u64::from(segment_bytes);
    format!("{timeline:08X}{:08X}{:08X}", number / per_id, number % per_id)
}

/// Name of the history file of a timeline.
#[must_use]
pub fn history_name(timeline: u32) -> String {
    format!("{timeline:08X}.history")
}

/// The timeline in the name of a segment, as `pg_walfile_name` returns it.
#[must_use]
pub fn timeline_of_segment(name: &str) -> Option<u32> {
    if name.len() != 24 {
        return None;
    }
    u32::from_str_radix(name.get(..8)?, 16).ok()
}

/// Whether each whole page header in `bytes`, which begin at the page boundary `start`, says the position that it
/// is at. A segment that was recycled under the reader carries the positions of its former life.
#[must_use]
pub fn pages_belong(start: Lsn, bytes: &[u8]) -> bool {
    let mut at = start.0;
    for page in bytes.chunks(WAL_PAGE_BYTES) {
        let Some(address) = page.get(8..16).and_then(|raw| raw.try_into().ok()).map(u64::from_le_bytes) else {
            // A header that is cut off is not yet to be read by anyone.
            return true;
        };
        let empty = page.iter().take(SHORT_HEADER_BYTES as usize).all(|byte| *byte == 0);
        if address != at && !empty {
            return false;
        }
        at += WAL_PAGE_BYTES as u64;
    }
    true
}

/// Where replay stands when everything before `x` is replayed, for an `x` that PostgreSQL gave as its insert position.
///
/// Behind a record that fills its page, the insert position is behind the header of the next page
/// (`XLogBytePosToRecPtr`), while replay reports the end of the record, which is the page boundary. No record ends
/// right behind a header, so the two can be told apart.
#[must_use]
pub fn record_end(x: Lsn, segment_bytes: u32) -> Lsn {
    let in_segment = x.0 % u64::from(segment_bytes);
    let in_page = x.0 % WAL_PAGE_BYTES as u64;
    if in_segment == LONG_HEADER_BYTES || (in_page == SHORT_HEADER_BYTES && in_segment > WAL_PAGE_BYTES as u64) {
        Lsn(x.0 - in_page)
    } else {
        x
    }
}

/// `SizeOfXLogLongPHD` and `SizeOfXLogShortPHD`: the header of a segment's first page, and of the others.
const LONG_HEADER_BYTES: u64 = 40;
const SHORT_HEADER_BYTES: u64 = 24;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn positions_are_read_as_they_are_written() {
        for lsn in [0, 1, 0xFFFF_FFFF, 0x1_0000_0000, 0x16_B374_D848, u64::MAX] {
            assert_eq!(parse_lsn(&format_lsn(Lsn(lsn))), Some(Lsn(lsn)));
        }
        assert_eq!(format_lsn(Lsn(0x16_B374_D848)), "16/B374D848");
        assert_eq!(parse_lsn("16"), None);
        assert_eq!(parse_lsn("1FFFFFFFF/0"), None);
    }

    #[test]
    fn segments_are_named_as_postgresql_names_them() {
        assert_eq!(segment_name(1, Lsn(0x0100_0000), 16 << 20), "000000010000000000000001");
        assert_eq!(segment_name(2, Lsn(0x1_FFFF_FFFF), 16 << 20), "0000000200000001000000FF");
        assert_eq!(segment_name(1, Lsn(0x1_4000_0000), 1 << 30), "000000010000000100000001");
        assert_eq!(timeline_of_segment("0000000200000001000000FF"), Some(2));
        assert_eq!(segment_start(Lsn(0x0123_4567), 16 << 20), Lsn(0x0100_0000));
    }

    #[test]
    fn a_position_behind_a_page_header_means_the_end_of_the_page_before() {
        let segment = 16 << 20;
        let start = u64::from(segment) * 3;
        for (x, end) in [
            (start + 40, start),
            (start + 24, start + 24),
            (start + 8192 + 24, start + 8192),
            (start + 8192 + 32, start + 8192 + 32),
            (start + 8192, start + 8192),
            (start, start),
        ] {
            assert_eq!(record_end(Lsn(x), segment), Lsn(end));
        }
    }

    #[test]
    fn recycled_pages_are_recognised() {
        let mut bytes = vec![0; 2 * WAL_PAGE_BYTES + 100];
        for (index, page) in bytes.chunks_mut(WAL_PAGE_BYTES).enumerate() {
            page[8..16].copy_from_slice(&(0x0100_0000 + (index * WAL_PAGE_BYTES) as u64).to_le_bytes());
        }
        assert!(pages_belong(Lsn(0x0100_0000), &bytes));
        assert!(!pages_belong(Lsn(0x0200_0000), &bytes));
        assert!(pages_belong(Lsn(0x0100_0000), &bytes[..WAL_PAGE_BYTES + 10]));
        bytes[WAL_PAGE_BYTES..WAL_PAGE_BYTES + 24].fill(0);
        assert!(pages_belong(Lsn(0x0100_0000), &bytes));
    }
}
