//! PostgreSQL's own checksum of a page, to find damage before it is copied. Pure.
//!
//! The algorithm is that of `storage/checksum_impl.h`: 32 sums side by side over the page's words, folded.

use pgtandem_proto::message::{Lsn, PAGE_BYTES};

const SUMS: usize = 32;
const PRIME: u32 = 16_777_619;
const OFFSETS: [u32; SUMS] = [
    0x5B1F_36E9,
    0xB852_5960,
    0x02AB_50AA,
    0x1DE6_6D2A,
    0x79FF_467A,
    0x9BB9_F8A3,
    0x217E_7CD2,
    0x83E1_3D2C,
    0xF8D4_474F,
    0xE39E_B970,
    0x42C6_AE16,
    0x9932_16FA,
    0x7B09_3B5D,
    0x98DA_FF3C,
    0xF718_902A,
    0x0B1C_9CDB,
    0xE58F_764B,
    0x1876_36BC,
    0x5D7B_3BB1,
    0xE73D_E7DE,
    0x92BE_C979,
    0xCCA6_C0B2,
    0x304A_0979,
    0x85AA_43D4,
    0x7831_25BB,
    0x6CA8_EAA2,
    0xE407_EAC6,
    0x4B5C_FC3E,
    0x9FBF_8C76,
    0x15CA_20BE,
    0xF2CA_9FD3,
    0x959B_D756,
];
/// Where a page header (`PageHeaderData`) has its checksum, and the end of its free space.
const CHECKSUM_AT: usize = 8;
const UPPER_AT: usize = 14;
/// Pages of a segment of a relation (`RELSEG_SIZE`).
const SEGMENT_PAGES: u32 = 131_072;

/// Whether the page is whole, or need not be: it is new, or newer than `start`, so WAL brings it anew.
#[must_use]
pub fn is_sound(page: &[u8], block: u32, start: Lsn) -> bool {
    let word = |at: usize| page.get(at..at + 2).and_then(|bytes| bytes.try_into().ok()).map_or(0, u16::from_le_bytes);
    if page.len() != PAGE_BYTES || word(UPPER_AT) == 0 {
        return true;
    }
    let half = |at: usize| page.get(at..at + 4).and_then(|bytes| bytes.try_into().ok()).map_or(0, u32::from_le_bytes);
    if (u64::from(half(0)) << 32 | u64::from(half(4))) >= start.0 {
        return true;
    }
    word(CHECKSUM_AT) == checksum(page, block)
}

/// The checksum that the page `block` of a relation should have.
fn checksum(page: &[u8], block: u32) -> u16 {
    let mix = |sum: u32, word: u32| {
        let mixed = sum ^ word;
        mixed.wrapping_mul(PRIME) ^ (mixed >> 17)
    };
    let mut sums = OFFSETS;
    let (rows, _) = page.as_chunks::<{ 4 * SUMS }>();
    for (index, row) in rows.iter().enumerate() {
        let (words, _) = row.as_chunks::<4>();
        let mut words: [u32; SUMS] =
            std::array::from_fn(|at| words.get(at).map_or(0, |word| u32::from_le_bytes(*word)));
        if index == 0 {
            // The checksum itself counts as zero.
            words[CHECKSUM_AT / 4] &= 0xFFFF_0000;
        }
        for (sum, word) in sums.iter_mut().zip(words) {
            *sum = mix(*sum, word);
        }
    }
    for _ in 0..2 {
        for sum in &mut sums {
            *sum = mix(*sum, 0);
        }
    }
    let folded = sums.iter().fold(block, |folded, sum| folded ^ sum);
    u16::try_from(folded % 65_535 + 1).unwrap_or(0)
}

/// Number of the first page of a file of a relation; None: the file has no such pages.
#[must_use]
pub fn first_block(path: &str) -> Option<u32> {
    let (folder, name) = path.rsplit_once('/')?;
    if !(folder == "global" || folder.starts_with("base/") || folder.starts_with("pg_tblspc/")) {
        return None;
    }
    let (relation, segment) = name.split_once('.').map_or((name, "0"), |(relation, segment)| (relation, segment));
    let (number, fork) = relation.split_once('_').unwrap_or((relation, "main"));
    let is_number = !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit());
    if !is_number || !matches!(fork, "main" | "fsm" | "vm" | "init") {
        return None;
    }
    segment.parse::<u32>().ok()?.checked_mul(SEGMENT_PAGES)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_files_of_relations_have_pages() {
        assert_eq!(first_block("base/5/1259"), Some(0));
        assert_eq!(first_block("base/5/16384.3"), Some(3 * SEGMENT_PAGES));
        assert_eq!(first_block("base/5/16384_vm.1"), Some(SEGMENT_PAGES));
        assert_eq!(first_block("global/1260_fsm"), Some(0));
        assert_eq!(first_block("pg_tblspc/16400/PG_15_202209061/5/16401_init"), Some(0));
        for path in ["global/pg_control", "base/5/PG_VERSION", "base/5/pg_filenode.map", "pg_xact/0000", "PG_VERSION"] {
            assert_eq!(first_block(path), None, "{path}");
        }
    }

    #[test]
    fn one_changed_bit_is_noticed_and_new_pages_are_not_judged() {
        let mut page = vec![0_u8; PAGE_BYTES];
        assert!(is_sound(&page, 7, Lsn(100)));
        page[UPPER_AT] = 1;
        assert!(!is_sound(&page, 7, Lsn(100)));
        let sum = checksum(&page, 7);
        page[CHECKSUM_AT..CHECKSUM_AT + 2].copy_from_slice(&sum.to_le_bytes());
        assert!(is_sound(&page, 7, Lsn(100)));
        assert!(!is_sound(&page, 8, Lsn(100)));
        page[5000] ^= 1;
        assert!(!is_sound(&page, 7, Lsn(100)));
        page[4] = 100;
        assert!(is_sound(&page, 7, Lsn(100)), "WAL brings it anew");
    }
}
