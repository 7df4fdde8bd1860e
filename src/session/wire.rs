//! Frames between a client and its connection to the leader.
//!
//! Every message to the server that brings an answer has an [`Expect`] in a queue; what the server sends belongs to the
//! first of them. Hidden ones are ours: their answers are kept for the session and never reach the client. Runs of frames
//! that are only forwarded move as one piece, without a copy, and leave in one write.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use tokio_util::sync::CancellationToken;

use crate::pg::build;
use crate::pg::frame::{self, FrameError, HEADER_BYTES, Header, Sender};
use crate::pg::message::{self, Reader};
use crate::replicate::cancels::Cancels;
use crate::replicate::leader::LeaderStream;
pub use crate::session::expect::{Expect, Mode, Results, Until};
use crate::session::rewrite;
use crate::session::transport::ClientStream;

/// Bytes that wait for a client before they are written, although the statement goes on.
pub(super) const OUT_BYTES_MAX: usize = 64 * 1024;
/// Reads of that many bytes at once.
pub const READ_BYTES: usize = 16 * 1024;
/// Buffers above this are given back when they are empty.
pub const KEEP_BYTES_MAX: usize = 256 * 1024;
/// Answers that are expected at once; a client that sends more has its messages wait.
pub const EXPECTS_MAX: usize = 100_000;

/// Why a session ends.
#[derive(Debug, thiserror::Error)]
pub enum End {
    #[error("the client left")]
    ClientGone,
    #[error("the connection to the leader's PostgreSQL ended")]
    ServerGone,
    /// The same, with a transaction under way of which it is known that it is rolled back everywhere.
    #[error("the leader's PostgreSQL ended before the transaction was committed")]
    RolledBack,
    #[error("the client broke the protocol: {0}")]
    ClientProtocol(FrameError),
    #[error("the leader's PostgreSQL broke the protocol: {0}")]
    ServerProtocol(FrameError),
    /// The client was told why; nothing is left to say.
    #[error("the session was ended")]
    Told,
    /// The outcome of a COMMIT is not known: the connection ends without an answer.
    #[error("the outcome of the last COMMIT is not known")]
    Unknown,
}

/// Rows of one portal that wait for a client which fetches in parts.
const HELD_BYTES_MAX: usize = 16 << 20;
/// Stripped rows are handed over at this many bytes.
const ROWS_BYTES_MAX: usize = 256 * 1024;

#[derive(Debug)]
pub struct Wire {
    pub client: ClientStream,
    pub server: LeaderStream,
    /// Cancelled when the leader counts as lost: it may never answer.
    pub lost: CancellationToken,
    /// Requests to cancel that are on their way, and the key that they have for this session.
    pub cancels: Option<(Arc<Cancels>, Bytes)>,
    pub from_client: BytesMut,
    pub from_server: BytesMut,
    pub to_client: BytesMut,
    pub to_server: BytesMut,
    pub expects: VecDeque<Expect>,
    pub results: Results,
    /// Transaction status of the last `ReadyForQuery`: `I`, `T`, `E`.
    pub status: u8,
    /// Bytes of the frame that is being passed to the client and has not come yet.
    pub(super) passing: usize,
    /// A statement failed and the server skips until the next Sync.
    pub(super) skipping: bool,
    /// `ReadyForQuery` for the client is held back, as is the command tag of a statement whose commit is not decided.
    pub hold_ready: bool,
    pub hold_tag: bool,
    /// Added to positions in errors: the statement was cut out of a longer text that many characters in.
    pub position_offset: isize,
    /// The data of the COPY under way are not the client's: it is not asked for them.
    pub hide_copy: bool,
    /// Errors of the statement under way are kept in `results` alone, not shown.
    pub hide_errors: bool,
    /// Whether each `Parse`, `Bind` and `Close` of the client's was done (or lost to an error before it), in order. Taken by
    /// the session before every message of the extended protocol.
    pub outcomes: VecDeque<bool>,
    /// Rows for the client go to `held_rows`: it fetches in parts.
    pub hold_rows: bool,
    pub held_rows: VecDeque<BytesMut>,
    pub(super) held_bytes: usize,
    /// A BEGIN that the client has been told of waits in `to_server` to leave together with what comes next.
    pub begin_waits: bool,
    /// How often something was written to the client, and how many bytes in all.
    pub flushes: u64,
    pub written_bytes: u64,
    /// Parameters of the session as the client was told them last.
    pub told_parameters: HashMap<Box<[u8]>, Box<[u8]>>,
    /// Nothing is written to the client now: it must not hold up a commit under way.
    pub mute: bool,
    /// Rows of a statement that are kept at most; the rest are only counted by the server.
    pub rows_kept_max: usize,
    /// The secret of the session's epoch: an error that quotes it is told without its context.
    pub secret: Arc<str>,
    /// The FATAL with which the server ends the session. It is no answer to any statement, so it is told last, after the
    /// answers that came before it: a COMMIT that it overtook may have been decided.
    pub farewell: Option<BytesMut>,
    /// As the server reported it last.
    pub client_encoding: Option<Box<str>>,
}

impl Wire {
    #[must_use]
    pub fn new(client: ClientStream, server: LeaderStream, lost: CancellationToken, from_client: BytesMut) -> Self {
        Self {
            client,
            server,
            lost,
            cancels: None,
            from_client,
            from_server: BytesMut::new(),
            to_client: BytesMut::with_capacity(READ_BYTES),
            to_server: BytesMut::with_capacity(READ_BYTES),
            expects: VecDeque::new(),
            results: Results::default(),
            status: b'I',
            passing: 0,
            skipping: false,
            hold_ready: false,
            hold_tag: false,
            position_offset: 0,
            hide_copy: false,
            hide_errors: false,
            outcomes: VecDeque::new(),
            hold_rows: false,
            held_rows: VecDeque::new(),
            held_bytes: 0,
            begin_waits: false,
            flushes: 0,
            written_bytes: 0,
            told_parameters: HashMap::new(),
            mute: false,
            rows_kept_max: usize::MAX,
            secret: Arc::from(""),
            farewell: None,
            client_encoding: None,
        }
    }

    /// The rows that were held back; `None`: there were more than are kept.
    pub fn take_held_rows(&mut self) -> Option<VecDeque<BytesMut>> {
        self.hold_rows = false;
        let rows = std::mem::take(&mut self.held_rows);
        let all = self.held_bytes <= HELD_BYTES_MAX;
        self.held_bytes = 0;
        all.then_some(rows)
    }

    /// Sends what waits for the server and takes answers until `until` holds. The client gets what is its own; it is
    /// flushed only when much has gathered, so that the last of it leaves together with what follows.
    ///
    /// # Errors
    /// If one of both sides is gone or breaks the protocol.
    pub async fn pump(&mut self, until: Until) -> Result<(), End> {
        self.flush_server().await?;
        loop {
            self.absorb()?;
            if self.is_done(until) {
                return Ok(());
            }
            if self.to_client.len() > OUT_BYTES_MAX {
                self.flush_client().await?;
            }
            self.fill_from_server().await?;
        }
    }

    fn is_done(&self, until: Until) -> bool {
        if self.passing > 0 {
            return false;
        }
        self.expects.is_empty()
            || match until {
                Until::Answered => false,
                Until::AnsweredOrCopy => self.results.copy_in,
                Until::Rows => self.results.row_bytes >= ROWS_BYTES_MAX || self.results.copy_in,
            }
    }

    /// Looks at all that has come from the server.
    ///
    /// # Errors
    /// If it breaks the protocol.
    pub fn absorb(&mut self) -> Result<(), End> {
        loop {
            if self.passing > 0 {
                let n = self.passing.min(self.from_server.len());
                if n == 0 {
                    return Ok(());
                }
                let part = self.from_server.split_to(n);
                self.to_client.extend_from_slice(&part);
                self.passing -= n;
                continue;
            }
            if self.forward_run()? {
                continue;
            }
            let Some(header) = frame::peek(&self.from_server, Sender::Server).map_err(End::ServerProtocol)? else {
                return Ok(());
            };
            if self.from_server.len() < header.frame_bytes {
                return Ok(());
            }
            let frame = self.from_server.split_to(header.frame_bytes);
            self.take(header.tag, &frame)?;
        }
    }

    /// Whether rows and the like of the statement under way go to the client as they are.
    fn forwards(&self) -> bool {
        !self.hold_rows
            && matches!(
                self.expects.front(),
                Some(Expect::Execute { mode: Mode::Forward } | Expect::Query { mode: Mode::Forward })
            )
    }

    /// Moves the run of frames at the start that need no look to the client. Large frames pass before they are whole.
    fn forward_run(&mut self) -> Result<bool, End> {
        if !self.forwards() {
            return Ok(false);
        }
        let mut run = 0;
        loop {
            let rest = self.from_server.get(run..).unwrap_or_default();
            match frame::peek(rest, Sender::Server).map_err(End::ServerProtocol)? {
                Some(Header { tag: b'D' | b'd' | b'T', frame_bytes }) => {
                    if rest.len() >= frame_bytes {
                        run += frame_bytes;
                        continue;
                    }
                    if frame_bytes > READ_BYTES {
                        self.passing = frame_bytes - rest.len();
                        run += rest.len();
                    }
                    break;
                }
                _ => break,
            }
        }
        if run == 0 {
            return Ok(false);
        }
        if self.to_client.is_empty() && self.to_client.capacity() <= KEEP_BYTES_MAX {
            self.to_client = self.from_server.split_to(run);
        } else {
            let part = self.from_server.split_to(run);
            self.to_client.extend_from_slice(&part);
        }
        Ok(true)
    }

    fn take(&mut self, tag: u8, frame: &BytesMut) -> Result<(), End> {
        match tag {
            // Not an answer to anything.
            // What the server says about statements of ours on the way is not the client's.
            b'N' if self.is_ours() && message::is_debug(frame::body(frame)) => {}
            b'N' if self.position_offset != 0 => {
                let shifted = rewrite::shift_position(frame, self.position_offset);
                self.to_client.extend_from_slice(&shifted);
            }
            b'N' | b'A' => self.to_client.extend_from_slice(frame),
            b'S' => {
                if self.note_parameter(frame::body(frame)) {
                    self.to_client.extend_from_slice(frame);
                }
            }
            b'E' => self.take_error(frame),
            b'Z' => self.take_ready(frame)?,
            _ => self.take_answer(tag, frame)?,
        }
        Ok(())
    }

    /// Keeps what the server said of a parameter. True: the client has not been told just that.
    pub fn note_parameter(&mut self, body: &[u8]) -> bool {
        if let Some(name) = message::parameter(body, b"client_encoding") {
            self.client_encoding = Some(name.into());
        }
        let mut r = Reader::new(b'S', body);
        let (Ok(name), Ok(value)) = (r.string(), r.string()) else { return true };
        let before = self.told_parameters.insert(name.into(), value.into());
        before.is_none_or(|before| *before != *value)
    }

    /// Whether what the server does now is a statement of the proxy's own.
    fn is_ours(&self) -> bool {
        self.expects.front().is_some_and(|expect| expect.is_hidden())
    }

    fn take_error(&mut self, frame: &BytesMut) {
        let quotes = |needle: &[u8]| !needle.is_empty() && frame.windows(needle.len()).any(|part| part == needle);
        if quotes(self.secret.as_bytes()) {
            return self.take_error(&rewrite::without_context(frame));
        }
        if message::is_fatal(frame::body(frame)) {
            self.farewell = Some(frame.clone());
            self.results.copy_in = false;
            return;
        }
        if self.results.error.is_none() {
            self.results.error = Some(Bytes::copy_from_slice(frame::body(frame)));
        }
        let hidden = self.hide_errors;
        if !hidden {
            let shifted = rewrite::shift_position(frame, self.position_offset);
            self.to_client.extend_from_slice(&shifted);
        }
        self.results.copy_in = false;
        match self.expects.front() {
            // The end of a simple query, or of the batch, still comes.
            Some(Expect::Query { .. } | Expect::Function | Expect::Sync { .. }) | None => {}
            Some(_) => {
                while let Some(lost) = self.expects.front() {
                    match lost {
                        Expect::Sync { .. } | Expect::Query { .. } => break,
                        Expect::Parse { hidden: false }
                        | Expect::Bind { hidden: false }
                        | Expect::Close { hidden: false } => self.outcomes.push_back(false),
                        _ => {}
                    }
                    self.expects.pop_front();
                }
                self.skipping = self.expects.is_empty();
            }
        }
    }

    fn take_ready(&mut self, frame: &BytesMut) -> Result<(), End> {
        self.status = frame::body(frame).first().copied().unwrap_or(b'I');
        let hidden = match self.expects.pop_front() {
            Some(Expect::Sync { hidden }) => hidden,
            Some(Expect::Query { mode }) => mode == Mode::Hidden,
            Some(Expect::Function) => false,
            _ => return Err(End::ServerProtocol(FrameError::BodyTooShort { tag: b'Z' })),
        };
        self.skipping = false;
        self.results.copy_in = false;
        if !hidden && !self.hold_ready {
            self.to_client.extend_from_slice(frame);
        }
        Ok(())
    }

    fn take_answer(&mut self, tag: u8, frame: &BytesMut) -> Result<(), End> {
        let Some(expect) = self.expects.front().copied() else {
            // An answer that nobody waits for: only what the client's own message outside our sight brought.
            self.to_client.extend_from_slice(frame);
            return Ok(());
        };
        let hidden = match expect {
            Expect::Parse { hidden } | Expect::Bind { hidden } | Expect::Close { hidden } => {
                self.expects.pop_front();
                if !hidden {
                    self.outcomes.push_back(true);
                }
                hidden
            }
            Expect::Describe { mode } => {
                return self.take_description(tag, frame, mode);
            }
            Expect::Execute { mode } => {
                if matches!(tag, b'C' | b'I' | b's') {
                    self.expects.pop_front();
                }
                return self.take_result(tag, frame, mode);
            }
            Expect::Query { mode } => return self.take_result(tag, frame, mode),
            Expect::Function => {
                let value = Reader::new(b'V', frame::body(frame)).value().map_err(End::ServerProtocol)?;
                self.results.values.push(value.map(Bytes::copy_from_slice));
                false
            }
            Expect::Sync { .. } => false,
        };
        if !hidden {
            self.to_client.extend_from_slice(frame);
        }
        Ok(())
    }

    fn take_description(&mut self, tag: u8, frame: &BytesMut, mode: Mode) -> Result<(), End> {
        if matches!(tag, b'T' | b'n') {
            self.expects.pop_front();
        }
        match (tag, mode) {
            (b'T', Mode::Strip { hidden, client_returning }) => {
                if client_returning {
                    let cut = rewrite::strip_columns(frame, hidden).map_err(End::ServerProtocol)?;
                    self.to_client.extend_from_slice(&cut);
                } else {
                    build::frame(&mut self.to_client, b'n', |_| {});
                }
            }
            (b'T', Mode::Hidden) => self.results.description = Bytes::copy_from_slice(frame::body(frame)),
            (b't', Mode::Hidden) => self.results.parameter_types = Bytes::copy_from_slice(frame::body(frame)),
            (_, Mode::Hidden) => {}
            _ => self.to_client.extend_from_slice(frame),
        }
        Ok(())
    }

    fn take_result(&mut self, tag: u8, frame: &BytesMut, mode: Mode) -> Result<(), End> {
        match (tag, mode) {
            (b'D', Mode::Strip { hidden, client_returning }) => {
                self.take_stripped_row(frame, hidden, client_returning).map_err(End::ServerProtocol)?;
                return Ok(());
            }
            (b'T', Mode::Strip { hidden, client_returning }) => {
                if client_returning {
                    let cut = rewrite::strip_columns(frame, hidden).map_err(End::ServerProtocol)?;
                    self.to_client.extend_from_slice(&cut);
                }
                return Ok(());
            }
            (b'D', Mode::Hidden) => {
                let mut r = Reader::new(b'D', frame::body(frame));
                let columns = r.u16().map_err(End::ServerProtocol)?;
                let value = if columns == 0 { None } else { r.value().map_err(End::ServerProtocol)? };
                self.results.values.push(value.map(Bytes::copy_from_slice));
                return Ok(());
            }
            (b'D', Mode::Both) if self.results.rows.len() < self.rows_kept_max => {
                self.results.rows.push(Bytes::copy_from_slice(frame::body(frame).get(2..).unwrap_or_default()));
            }
            (b'd', Mode::Keep) => {
                let data = frame::body(frame);
                self.results.row_bytes += data.len() + size_of::<Bytes>();
                self.results.rows.push(Bytes::copy_from_slice(data));
                return Ok(());
            }
            _ => {}
        }
        match tag {
            b'C' => {
                let body = frame::body(frame);
                self.results.tag = Some(Bytes::copy_from_slice(body.strip_suffix(b"\0").unwrap_or(body)));
                if self.hold_tag {
                    return Ok(());
                }
            }
            b'D' if self.hold_rows => {
                self.give_row(frame.clone());
                return Ok(());
            }
            b's' => self.results.suspended = true,
            b'G' => {
                self.results.copy_in = true;
                // The Sync that the client sent with its Execute is ignored by a server that copies.
                if matches!(self.expects.get(1), Some(Expect::Sync { .. })) {
                    self.expects.remove(1);
                }
                if self.hide_copy {
                    return Ok(());
                }
            }
            _ => {}
        }
        if !matches!(mode, Mode::Hidden | Mode::Keep) {
            self.to_client.extend_from_slice(frame);
        }
        Ok(())
    }

    /// A row for the client: now, or in the part that it will ask for.
    fn give_row(&mut self, row: BytesMut) {
        if !self.hold_rows {
            self.to_client.extend_from_slice(&row);
            return;
        }
        self.held_bytes = self.held_bytes.saturating_add(row.len() + size_of::<BytesMut>());
        if self.held_bytes <= HELD_BYTES_MAX {
            self.held_rows.push_back(row);
        }
    }

    fn take_stripped_row(&mut self, frame: &BytesMut, hidden: usize, client_returning: bool) -> Result<(), FrameError> {
        let body = frame::body(frame);
        let mut r = Reader::new(b'D', body);
        let all = usize::from(r.u16()?);
        let own = all.saturating_sub(hidden);
        for _ in 0..own {
            r.value()?;
        }
        let ours = r.rest();
        if client_returning {
            let kept = &body[2..body.len() - ours.len()];
            let mut row = BytesMut::with_capacity(HEADER_BYTES + 2 + kept.len());
            build::frame(&mut row, b'D', |b| {
                b.extend_from_slice(&u16::try_from(own).unwrap_or(0).to_be_bytes());
                b.extend_from_slice(kept);
            });
            self.give_row(row);
        }
        if self.results.rows.len() >= self.rows_kept_max {
            return Ok(());
        }
        self.results.row_bytes += ours.len() + size_of::<Bytes>();
        self.results.rows.push(Bytes::copy_from_slice(ours));
        Ok(())
    }

    /// The server skips messages until a Sync.
    #[must_use]
    pub fn is_skipping(&self) -> bool {
        self.skipping
    }

    /// A Sync was sent: the server goes on from there.
    pub fn end_skipping(&mut self) {
        self.skipping = false;
    }

    pub fn clear_results(&mut self) {
        self.results = Results::default();
    }
}
