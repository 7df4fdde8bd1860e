//! A plain BEGIN: answered at once, sent with what follows it.
//!
//! It can not fail on the server, so waiting for its answer tells nothing. A round trip of each transaction is saved.

use crate::pg::build;
use crate::session::run::Session;
use crate::session::simple::words;
use crate::session::wire::{Expect, Mode};

impl Session {
    /// Whether a BEGIN can only succeed, with the tag BEGIN and nothing else to tell.
    pub(super) fn may_begin_at_once(&self, text: &str) -> bool {
        let is_begin = words(text).next().is_some_and(|word| word.eq_ignore_ascii_case("begin"));
        is_begin && self.wire.status == b'I' && !self.own_block && self.wire.expects.is_empty()
    }

    /// Tells the client that its transaction has begun. The server gets the BEGIN together with the next message, which
    /// saves a round trip, or after a moment without it.
    pub(super) fn begin_at_once(&mut self, frame: &[u8]) {
        self.wire.to_server.extend_from_slice(frame);
        self.wire.expects.push_back(Expect::Query { mode: Mode::Hidden });
        self.wire.begin_waits = true;
        self.note_begin();
        self.wire.status = b'T';
        (self.is_first, self.only_begun) = (true, true);
        build::command_complete(&mut self.wire.to_client, "BEGIN");
        build::ready_for_query(&mut self.wire.to_client, b'T');
    }
}
