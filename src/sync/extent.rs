//! Extents: up to 1 MiB of a file, read at its place, hashed with BLAKE3, told apart from zeros.
//!
//! Blocking; callers run it on blocking threads. Files are read, never mapped: they may be truncated meanwhile.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use blake3::hazmat::{self, ChainingValue, HasherExt};
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
    let filled = read_into(file, offset, &mut buffer)?;
    buffer.truncate(filled);
    Ok(Bytes::from(buffer))
}

/// Fills `buffer` from `offset` on. -> how much the file had
pub fn read_into(file: &File, offset: u64, buffer: &mut [u8]) -> io::Result<usize> {
    let mut filled = 0;
    while let Some(rest) = buffer.get_mut(filled..).filter(|rest| !rest.is_empty()) {
        match file.read_at(rest, offset + filled as u64) {
            Ok(0) => break,
            Ok(count) => filled += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(filled)
}

#[must_use]
pub fn hash(bytes: &[u8]) -> ExtentHash {
    *blake3::hash(bytes).as_bytes()
}

/// Hashes of an extent and of its pages, out of one pass: a page of 8 KiB is a subtree of BLAKE3's tree, so the
/// extent's hash is made of theirs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Digest {
    pub hash: ExtentHash,
    pub bytes: usize,
    /// Chaining values of the pages; empty if the extent is one page.
    pages: Vec<ChainingValue>,
}

impl Digest {
    #[must_use]
    pub fn of(bytes: &[u8]) -> Digest {
        if bytes.len() <= PAGE_BYTES {
            return Digest { hash: hash(bytes), bytes: bytes.len(), pages: Vec::new() };
        }
        let pages: Vec<ChainingValue> =
            bytes.chunks(PAGE_BYTES).enumerate().map(|(index, page)| page_value(index, page)).collect();
        Digest { hash: root(&pages, bytes.len()), bytes: bytes.len(), pages }
    }

    /// What is told about an extent that is held.
    #[must_use]
    pub fn held(&self) -> Held {
        Held { hash: self.hash, pages: self.pages.iter().map(cut).collect() }
    }

    /// The hash of an extent of `bytes` that has these pages, given by their offset, and the others of this one; `None`
    /// if this one has not all of the others.
    #[must_use]
    pub fn with_pages(&self, bytes: usize, changed: &[(usize, Bytes)]) -> Option<ExtentHash> {
        let count = bytes.div_ceil(PAGE_BYTES);
        if count < 2 {
            return changed
                .first()
                .filter(|(offset, page)| *offset == 0 && page.len() == bytes)
                .map(|(_, page)| hash(page));
        }
        let mut pages = self.pages.clone();
        pages.resize(count, [0; 32]);
        let mut known = self.pages.len().min(count);
        // A page that was shorter here is another one there.
        if self.bytes < bytes && !self.bytes.is_multiple_of(PAGE_BYTES) {
            known = known.min(self.bytes / PAGE_BYTES);
        }
        let mut missing: usize = count - known;
        for (offset, page) in changed {
            let index = offset / PAGE_BYTES;
            missing -= usize::from(index >= known && missing > 0);
            *pages.get_mut(index)? = page_value(index, page);
        }
        (missing == 0).then(|| root(&pages, bytes))
    }
}

fn page_value(index: usize, page: &[u8]) -> ChainingValue {
    blake3::Hasher::new().set_input_offset((index * PAGE_BYTES) as u64).update(page).finalize_non_root()
}

fn cut(value: &ChainingValue) -> [u8; PAGE_HASH_BYTES] {
    let mut cut = [0; PAGE_HASH_BYTES];
    cut.iter_mut().zip(value).for_each(|(to, from)| *to = *from);
    cut
}

/// The hash of `bytes` that have these pages, of which there are at least two.
fn root(pages: &[ChainingValue], bytes: usize) -> ExtentHash {
    let left_bytes = usize::try_from(hazmat::left_subtree_len(bytes as u64)).unwrap_or(bytes);
    let (left, right) = pages.split_at((left_bytes / PAGE_BYTES).min(pages.len()));
    let (left, right) = (subtree(left, left_bytes), subtree(right, bytes - left_bytes));
    *hazmat::merge_subtrees_root(&left, &right, hazmat::Mode::Hash).as_bytes()
}

fn subtree(pages: &[ChainingValue], bytes: usize) -> ChainingValue {
    match pages {
        [] => [0; 32],
        [page] => *page,
        pages => {
            let left_bytes = usize::try_from(hazmat::left_subtree_len(bytes as u64)).unwrap_or(bytes);
            let (left, right) = pages.split_at((left_bytes / PAGE_BYTES).min(pages.len()));
            let (left, right) = (subtree(left, left_bytes), subtree(right, bytes - left_bytes));
            hazmat::merge_subtrees_non_root(&left, &right, hazmat::Mode::Hash)
        }
    }
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
pub fn delta(bytes: &[u8], digest: &Digest, held: &Held) -> Option<Delta> {
    if held.pages.is_empty() || digest.pages.is_empty() {
        return None;
    }
    let mut changed = vec![0; bytes.len().div_ceil(PAGE_BYTES).div_ceil(8)];
    let mut pages = Vec::new();
    let mut length = 0;
    for (index, (page, value)) in bytes.chunks(PAGE_BYTES).zip(&digest.pages).enumerate() {
        if held.pages.get(index) == Some(&cut(value)) {
            continue;
        }
        length += page.len();
        if length > bytes.len() / 8 * 7 {
            return None;
        }
        if let Some(bits) = changed.get_mut(index / 8) {
            *bits |= 1 << (index % 8);
        }
        pages.push(page);
    }
    Some(Delta { changed, data: Bytes::from(pages.concat()) })
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

/// What both ends of a channel have answered and taken: the sum over all answers, in whatever order they came.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sum {
    pub answers: u64,
    pub sum: [u64; 4],
}

impl Sum {
    /// Adds extent `index` of `file`: `bytes` with this hash; `None`: it vanished.
    pub fn add(&mut self, file: u32, index: u32, content: Option<(usize, &ExtentHash)>) {
        let (bytes, hash) = content.map_or((u64::MAX, &[0; 32]), |(bytes, hash)| (bytes as u64, hash));
        let mut hasher = blake3::Hasher::new();
        hasher.update(&file.to_be_bytes()).update(&index.to_be_bytes()).update(&bytes.to_be_bytes()).update(hash);
        let digest = hasher.finalize();
        let (words, _) = digest.as_bytes().as_chunks::<8>();
        for (sum, word) in self.sum.iter_mut().zip(words) {
            *sum = sum.wrapping_add(u64::from_le_bytes(*word));
        }
        self.answers += 1;
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
            let (before, after) = (Digest::of(&old), Digest::of(&new));
            assert_eq!(after.hash, hash(&new));
            if let Some(delta) = delta(&new, &after, &before.held()) {
                let mut made = old.clone();
                let pages = delta_pages(new.len(), &delta.changed, &delta.data).expect("it adds up");
                for (offset, page) in &pages {
                    made[*offset..offset + page.len()].copy_from_slice(page);
                }
                made.truncate(new.len());
                assert_eq!(made, new);
                assert_eq!(before.with_pages(new.len(), &pages), Some(after.hash));
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

    proptest::proptest! {
        #[test]
        fn an_extent_grows_from_its_pages(
            old in 0_usize..60_000, new in 1_usize..60_000, changed in proptest::collection::vec(0_usize..9, 0..9),
        ) {
            let content = |bytes: usize| -> Vec<u8> { (0..bytes).map(|at| u8::try_from(at / 5 % 251).unwrap_or(0)).collect() };
            let (held, wanted) = (Digest::of(&content(old)), content(new));
            let pages: Vec<(usize, Bytes)> = wanted
                .chunks(PAGE_BYTES)
                .enumerate()
                .filter(|(index, _)| changed.contains(index))
                .map(|(index, page)| (index * PAGE_BYTES, Bytes::copy_from_slice(page)))
                .collect();
            // Whatever is sent, what is taken for right is right.
            if let Some(found) = held.with_pages(new, &pages) {
                let mut made = content(old);
                made.resize(new, 0);
                for (offset, page) in &pages {
                    made[*offset..offset + page.len()].copy_from_slice(page);
                }
                if found == hash(&wanted) {
                    assert_eq!(made, wanted);
                }
            }
        }
    }

    #[test]
    fn a_sum_knows_what_was_taken_and_not_in_which_order() {
        let (mut one, mut other) = (Sum::default(), Sum::default());
        one.add(1, 2, Some((5, &hash(b"hello"))));
        one.add(1, 3, None);
        other.add(1, 3, None);
        assert_ne!(one, other);
        other.add(1, 2, Some((5, &hash(b"hello"))));
        assert_eq!(one, other);
        other.add(1, 2, Some((5, &hash(b"hello"))));
        assert_ne!(one, other);
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
