//! What the client has sent since everything was answered: if the leader is lost, and nothing of it was answered or decided, another server gets
//! it as if it were new.

use bytes::BytesMut;

/// Messages that are kept for that, bytes; past that they can not be sent again.
const BYTES_MAX: usize = 1 << 20;
/// Buffers above this are given back.
const KEEP_BYTES_MAX: usize = 64 * 1024;

#[derive(Debug, Default)]
pub struct Cycle {
    /// Transaction status before it.
    pub status: u8,
    /// Nothing was done in that transaction but a plain BEGIN.
    pub only_begun: bool,
    /// How much had been made for the client before it.
    pub made_bytes: u64,
    bytes: BytesMut,
    is_cut: bool,
    /// Messages that a `ReadyForQuery` answers.
    pub owing: usize,
    /// Tag of the last message.
    pub last: u8,
    /// Something of it was committed.
    pub committed: bool,
    /// What it does is finished by other means than a commit: what became of it is not known here.
    pub is_special: bool,
}

impl Cycle {
    /// A new one begins: all that was sent has been answered.
    pub fn begin(&mut self, status: u8, only_begun: bool, made_bytes: u64) {
        let mut bytes = std::mem::take(&mut self.bytes);
        bytes.clear();
        if bytes.capacity() > KEEP_BYTES_MAX {
            bytes = BytesMut::new();
        }
        *self = Self { status, only_begun, made_bytes, bytes, ..Self::default() };
    }

    /// The next message, as it came.
    pub fn keep(&mut self, frame: &[u8]) {
        self.last = frame.first().copied().unwrap_or(0);
        self.owing += usize::from(matches!(self.last, b'Q' | b'F' | b'S'));
        if self.bytes.len() + frame.len() > BYTES_MAX {
            self.is_cut = true;
        } else {
            self.bytes.extend_from_slice(frame);
        }
    }

    /// More was taken from the client than is kept: data of a COPY.
    pub fn cut(&mut self) {
        self.is_cut = true;
    }

    #[must_use]
    pub fn is_idle(&self) -> bool {
        self.last == 0
    }

    /// Whether it can be done anew at another server. `written_bytes`: how much the client has been sent in all.
    #[must_use]
    pub fn may_be_repeated(&self, written_bytes: u64) -> bool {
        let is_unseen = written_bytes <= self.made_bytes;
        let nothing_before = self.status != b'T' || self.only_begun;
        is_unseen && nothing_before && !self.committed && !self.is_special && !self.is_cut
    }

    /// Its messages, to be handled once more.
    pub fn take_messages(&mut self) -> BytesMut {
        std::mem::take(&mut self.bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cycle(status: u8, only_begun: bool) -> Cycle {
        let mut cycle = Cycle::default();
        cycle.begin(status, only_begun, 100);
        assert!(cycle.is_idle());
        cycle.keep(b"Q\0\0\0\x05\0");
        cycle
    }

    #[test]
    fn only_what_nobody_has_seen_is_repeated() {
        assert!(cycle(b'I', false).may_be_repeated(100));
        assert!(!cycle(b'I', false).may_be_repeated(101), "the client has a part of the answer");
        assert!(!cycle(b'T', false).may_be_repeated(100), "its transaction is lost");
        assert!(cycle(b'T', true).may_be_repeated(100) && cycle(b'E', false).may_be_repeated(100));
        let spoils: [fn(&mut Cycle); 3] = [|c| c.committed = true, |c| c.is_special = true, Cycle::cut];
        for spoil in spoils {
            let mut cycle = cycle(b'I', false);
            spoil(&mut cycle);
            assert!(!cycle.may_be_repeated(100));
        }
        let mut large = cycle(b'I', false);
        large.keep(&vec![b'P'; BYTES_MAX]);
        assert!(!large.may_be_repeated(100));
        assert_eq!((large.owing, large.last), (1, b'P'));
    }
}
