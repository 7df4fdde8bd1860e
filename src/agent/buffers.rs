//! Buffers of an extent's size that are used again and again: allocating a fresh one for each extent costs more than
//! hashing it, because the kernel gives its memory page by page.

use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;

/// Buffers that wait for their next use; more are given back to the allocator.
const WAITING_MAX: usize = 16;

/// Gives out buffers of one size. Clones share what waits.
#[derive(Clone, Debug)]
pub struct Buffers {
    bytes: usize,
    waiting: Arc<Mutex<Vec<Vec<u8>>>>,
}

/// A buffer in use; its content is whatever was in it before.
#[derive(Debug)]
pub struct Buffer {
    content: Vec<u8>,
    home: Buffers,
}

impl Buffers {
    #[must_use]
    pub fn new(bytes: usize) -> Buffers {
        Buffers { bytes, waiting: Arc::default() }
    }

    #[must_use]
    pub fn take(&self) -> Buffer {
        let waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner).pop();
        Buffer { content: waiting.unwrap_or_else(|| vec![0; self.bytes]), home: self.clone() }
    }
}

impl Buffer {
    pub fn content(&mut self) -> &mut [u8] {
        &mut self.content
    }

    /// The first `bytes` of it; the buffer is used again when the last part of them is dropped.
    #[must_use]
    pub fn freeze(self, bytes: usize) -> Bytes {
        let bytes = bytes.min(self.content.len());
        Bytes::from_owner(self).slice(..bytes)
    }
}

impl AsRef<[u8]> for Buffer {
    fn as_ref(&self) -> &[u8] {
        &self.content
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        let mut waiting = self.home.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        if waiting.len() < WAITING_MAX {
            waiting.push(std::mem::take(&mut self.content));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_buffer_is_used_again_when_nobody_has_a_part_of_it() {
        let buffers = Buffers::new(8);
        let mut buffer = buffers.take();
        buffer.content().copy_from_slice(b"12345678");
        let place = buffer.content.as_ptr();
        let bytes = buffer.freeze(5);
        assert_eq!(&bytes[..], b"12345");
        let part = bytes.slice(2..);
        drop(bytes);
        assert_ne!(buffers.take().content.as_ptr(), place);
        drop(part);
        let taken = [buffers.take(), buffers.take()];
        assert!(taken.iter().any(|buffer| buffer.content.as_ptr() == place));
    }
}
