//! Extents: up to 1 MiB of a file, read at its place, hashed with BLAKE3, told apart from zeros.
//!
//! Blocking; callers run it on blocking threads. Files are read, never mapped: they may be truncated meanwhile.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use bytes::Bytes;
use pgtandem_proto::message::{EXTENT_BYTES, Held, PAGE_BYTES, PAGE_HASH_BYTES};

/// BLAKE3 of an extent.
pub type ExtentHash = [u8; 32];

/// Number of extents of a file of `bytes`.
#[must_use]
pub fn extent_count(bytes: u64) -> u64 {
    bytes.div_ceil(EXTENT_BYTES as u64)
}

/// Bytes of extent `index` of a file of `bytes`; 0 behind its end.
#[must_use]
pub fn extent_bytes(bytes: u64, index: u32) -> usize {
    let start = u64::from(index) * EXTENT_BYTES as u64;
    usize::try_from(bytes.saturating_sub(start)).unwrap_or(usize::MAX).min(EXTENT_BYTES)
}

/// Reads up to `length` bytes at `offset`; fewer if the file ends before.
pub fn read_at(file: &File, offset: u64, length: usize) -> io::Result<Bytes> {
    let mut buffer = vec![0; length];
    let mut filled = 0;
    while let Some(rest) = buffer.get_mut(filled..).filter(|rest| !rest.is_empty()) {
        match file.read_at(rest, offset + filled as u64) {
            Ok(0) => break,
            Ok(count) => filled += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    buffer.truncate(filled);
    Ok(Bytes::from(buffer))
}

#[must_use]
pub fn hash(bytes: &[u8]) -> ExtentHash {
    *blake3::hash(bytes).as_bytes()
}

fn page_hash(page: &[u8]) -> [u8; PAGE_HASH_BYTES] {
    let mut cut = [0; PAGE_HASH_BYTES];
    cut.iter_mut().zip(blake3::hash(page).as_bytes()).for_each(|(to, from)| *to = *from);
    cut
}

/// What is told about an extent that is held: its hash, and one for each of its pages.
#[must_use]
pub fn describe(bytes: &[u8]) -> Held {
    Held { hash: hash(bytes), pages: bytes.chunks(PAGE_BYTES).map(page_hash).collect() }
}

/// Pages of an extent that differ from what is held elsewhere.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Delta {
    /// Bit n of byte n / 8: page n.
    pub changed: Vec<u8>,
    /// Those pages, one behind the other.
    pub data: Bytes,
}

/// The pages of `bytes` that differ from `held`; `None` if sending all of it is as good.
#[must_use]
pub fn delta(bytes: &[u8], held: &Held) -> Option<Delta> {
    if held.pages.is_empty() {
        return None;
    }
    let mut changed = vec![0; bytes.len().div_ceil(PAGE_BYTES).div_ceil(8)];
    let mut data = Vec::new();
    for (index, page) in bytes.chunks(PAGE_BYTES).enumerate() {
        if held.pages.get(index) == Some(&page_hash(page)) {
            continue;
        }
        if data.len() + page.len() > bytes.len() / 4 * 3 {
            return None;
        }
        if let Some(bits) = changed.get_mut(index / 8) {
            *bits |= 1 << (index % 8);
        }
        data.extend_from_slice(page);
    }
    Some(Delta { changed, data: Bytes::from(data) })
}

/// Where the pages of a delta belong: offset within an extent of `bytes`, and content. `None` if it does not add up.
#[must_use]
pub fn delta_pages(bytes: usize, changed: &[u8], data: &Bytes) -> Option<Vec<(usize, Bytes)>> {
    let pages = bytes.div_ceil(PAGE_BYTES);
    if changed.len() != pages.div_ceil(8) {
        return None;
    }
    let mut rest = data.clone();
    let mut found = Vec::new();
    for index in 0..changed.len() * 8 {
        if changed.get(index / 8).is_some_and(|bits| bits & (1 << (index % 8)) != 0) {
            let offset = index * PAGE_BYTES;
            let length = bytes.checked_sub(offset)?.min(PAGE_BYTES);
            if length == 0 || rest.len() < length {
                return None;
            }
            found.push((offset, rest.split_to(length)));
        }
    }
    rest.is_empty().then_some(found)
}

/// Whether there is nothing but zeros in a whole extent.
#[must_use]
pub fn all_zeros(bytes: &[u8]) -> bool {
    let (before, words, after) = split_words(bytes);
    before.iter().chain(after).all(|byte| *byte == 0) && words.iter().all(|word| word == &[0_u8; 64])
}

fn split_words(bytes: &[u8]) -> (&[u8], &[[u8; 64]], &[u8]) {
    let (words, after) = bytes.as_chunks::<64>();
    (&[], words, after)
}

/// The root over a file: BLAKE3 over the concatenation of the hashes of its extents, in order.
#[derive(Clone, Debug, Default)]
pub struct RootHasher {
    hasher: blake3::Hasher,
    bytes: u64,
}

impl RootHasher {
    /// Takes the next extent, which has `bytes`; an empty one behind the end of the file changes nothing.
    pub fn add(&mut self, hash: &ExtentHash, bytes: usize) {
        if bytes > 0 {
            self.hasher.update(hash);
            self.bytes += bytes as u64;
        }
    }

    /// The root, and the bytes that it stands for.
    #[must_use]
    pub fn finish(&self) -> ([u8; 32], u64) {
        (*self.hasher.finalize().as_bytes(), self.bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn extents_cover_a_file_exactly() {
        for bytes in [0, 1, EXTENT_BYTES as u64 - 1, EXTENT_BYTES as u64, EXTENT_BYTES as u64 + 1, 5 << 20] {
            let count = extent_count(bytes);
            let sum: u64 = (0..count).map(|index| extent_bytes(bytes, u32::try_from(index).unwrap()) as u64).sum();
            assert_eq!(sum, bytes);
            assert_eq!(extent_bytes(bytes, u32::try_from(count).unwrap()), 0);
        }
    }

    proptest::proptest! {
        #[test]
        fn a_delta_makes_the_old_into_the_new(
            pages in 1_usize..9, tail in 0_usize..8192, shorter in 0_usize..9000,
            flips in proptest::collection::vec(0_usize..70_000, 0..6),
        ) {
            let old: Vec<u8> = (0..pages * PAGE_BYTES + tail).map(|at| u8::try_from(at / 7 % 251).unwrap_or(0)).collect();
            let mut new = old[..old.len() - shorter.min(old.len() - 1)].to_vec();
            for flip in flips {
                if let Some(byte) = new.get_mut(flip) {
                    *byte ^= 1;
                }
            }
            if let Some(delta) = delta(&new, &describe(&old)) {
                let mut made = old.clone();
                for (offset, page) in delta_pages(new.len(), &delta.changed, &delta.data).expect("it adds up") {
                    made[offset..offset + page.len()].copy_from_slice(&page);
                }
                made.truncate(new.len());
                assert_eq!(made, new);
            }
        }

        #[test]
        fn a_delta_from_a_stranger_stays_within_its_extent(
            bytes in 0_usize..40_000,
            changed in proptest::collection::vec(proptest::num::u8::ANY, 0..3),
            data in 0_usize..40_000,
        ) {
            for (offset, page) in delta_pages(bytes, &changed, &Bytes::from(vec![0; data])).unwrap_or_default() {
                assert!(offset + page.len() <= bytes);
            }
        }
    }

    #[test]
    fn one_byte_is_enough_not_to_be_zeros() {
        let mut bytes = vec![0; 8195];
        assert!(all_zeros(&bytes));
        for place in [0, 64, 4000, 8194] {
            bytes[place] = 1;
            assert!(!all_zeros(&bytes));
            bytes[place] = 0;
        }
    }
}
