//! Extents: up to 1 MiB of a file, read at its place, hashed with BLAKE3, told apart from zeros.
//!
//! Blocking; callers run it on blocking threads. Files are read, never mapped: they may be truncated meanwhile.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use bytes::Bytes;
use pgtandem_proto::message::EXTENT_BYTES;

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

/// Whether there is nothing but zeros in a whole extent.
#[must_use]
pub fn all_zeros(bytes: &[u8]) -> bool {
    let (before, words, after) = split_words(bytes);
    before.iter().chain(after).all(|byte| *byte == 0)
        && words.iter().all(|word| word == &[0_u8; 64])
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
