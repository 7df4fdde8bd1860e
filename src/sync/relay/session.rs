//! The server's side of physical streaming replication for one walreceiver. Pure: bytes in, bytes and events out.
//!
//! It knows the five things that PostgreSQL's walreceiver asks (`libpqwalreceiver.c`, 13 to 18) and nothing else of
//! SQL. Order of calls: [`Session::handle_bytes`] with what the socket gave, then [`Session::poll_event`] until it
//! returns `None`, then everything of [`Session::take_output`] to the socket. After [`Event::Start`] the caller calls
//! [`Session::handle_started`] once it has a source, or [`Session::handle_failure`].

use bytes::{Buf, BufMut, Bytes, BytesMut};
use pgtandem_proto::message::Lsn;

use super::super::wal::{format_lsn, history_name, parse_lsn};

/// Longest message of a walreceiver; its feedback has 34 bytes.
const MESSAGE_BYTES_MAX: usize = 64 << 10;
const SSL_REQUEST: u32 = 80_877_103;
const GSSENC_REQUEST: u32 = 80_877_104;
const PROTOCOL_3: u32 = 196_608;
/// Seconds from 1970 to 2000, where PostgreSQL's time begins.
const POSTGRES_EPOCH_SECONDS: i64 = 946_684_800;

/// What a walreceiver is told about the server that it believes to talk to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    pub system_identifier: u64,
    pub timeline: u32,
    /// History file of the timeline; empty for the first.
    pub history: Vec<u8>,
    pub version_num: u32,
}

/// What a walreceiver wants, or says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// It asks how far the source is: [`Session::handle_position`] answers.
    Identify,
    /// Stream from here.
    Start { from: Lsn },
    /// How far it is.
    Feedback { written: Lsn, flushed: Lsn, applied: Lsn, reply_requested: bool },
    /// It goes.
    End,
}

/// What no walreceiver sends.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SessionError {
    #[error("a message of {0} bytes is too long or too short for a walreceiver")]
    Length(usize),
    #[error("a startup packet of protocol {0}")]
    Startup(u32),
    #[error("a message of type {0:?} came out of order")]
    Message(char),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Startup,
    Idle,
    /// START_REPLICATION was asked for; the answer waits for a source.
    Starting,
    Streaming,
    Ended,
}

#[derive(Debug)]
pub struct Session {
    identity: Identity,
    state: State,
    input: BytesMut,
    output: BytesMut,
}

impl Session {
    #[must_use]
    pub fn new(identity: Identity) -> Session {
        Session { identity, state: State::Startup, input: BytesMut::new(), output: BytesMut::new() }
    }

    pub fn handle_bytes(&mut self, bytes: &[u8]) {
        self.input.extend_from_slice(bytes);
    }

    /// What is to be written now.
    #[must_use]
    pub fn take_output(&mut self) -> Bytes {
        self.output.split().freeze()
    }

    /// The next thing that the caller must know about.
    pub fn poll_event(&mut self) -> Result<Option<Event>, SessionError> {
        loop {
            let event = match self.state {
                State::Ended => return Ok(None),
                State::Startup => {
                    if !self.startup()? {
                        return Ok(None);
                    }
                    None
                }
                State::Idle | State::Starting | State::Streaming => match self.message()? {
                    Some((tag, body)) => self.handle_message(tag, body)?,
                    None => return Ok(None),
                },
            };
            if event.is_some() {
                return Ok(event);
            }
        }
    }

    /// There is a source: streaming begins.
    pub fn handle_started(&mut self) {
        if self.state == State::Starting {
            self.state = State::Streaming;
            message(&mut self.output, b'W', |out| {
                out.put_u8(0);
                out.put_i16(0);
            });
        }
    }

    /// There is none; the walreceiver will ask again.
    pub fn handle_failure(&mut self, what: &str) {
        if self.state == State::Starting {
            self.state = State::Idle;
            self.refuse("08006", what);
        }
    }

    /// WAL for the walreceiver; `end` is how far more may be had. `now_us`: microseconds since 1970.
    pub fn handle_wal(&mut self, start: Lsn, bytes: &[u8], end: Lsn, now_us: i64) {
        if self.state == State::Streaming {
            message(&mut self.output, b'd', |out| {
                out.put_u8(b'w');
                out.put_u64(start.0);
                out.put_u64(end.0);
                out.put_i64(postgres_time(now_us));
                out.put_slice(bytes);
            });
        }
    }

    /// A sign of life.
    pub fn handle_keepalive(&mut self, end: Lsn, now_us: i64, reply_requested: bool) {
        if self.state == State::Streaming {
            message(&mut self.output, b'd', |out| {
                out.put_u8(b'k');
                out.put_u64(end.0);
                out.put_i64(postgres_time(now_us));
                out.put_u8(u8::from(reply_requested));
            });
        }
    }

    /// Whether the startup packet, or what stands in its place, was whole.
    fn startup(&mut self) -> Result<bool, SessionError> {
        let Some(length) = self.length(0)? else { return Ok(false) };
        if self.input.len() < length {
            return Ok(false);
        }
        let mut packet = self.input.split_to(length);
        packet.advance(4);
        if packet.len() < 4 {
            return Err(SessionError::Length(length));
        }
        match packet.get_u32() {
            SSL_REQUEST | GSSENC_REQUEST => self.output.put_u8(b'N'),
            PROTOCOL_3..=0x0003_FFFF => {
                message(&mut self.output, b'R', |out| out.put_u32(0));
                let version = self.identity.version_num;
                let text = format!("{}.{}", version / 10_000, version % 10_000);
                for (name, value) in
                    [("server_version", text.as_str()), ("client_encoding", "UTF8"), ("integer_datetimes", "on")]
                {
                    message(&mut self.output, b'S', |out| {
                        put_text(out, name);
                        put_text(out, value);
                    });
                }
                self.ready();
                self.state = State::Idle;
            }
            other => return Err(SessionError::Startup(other)),
        }
        Ok(true)
    }

    /// Length of a message whose length field is at `offset`, without its tag.
    fn length(&self, offset: usize) -> Result<Option<usize>, SessionError> {
        let Some(field) = self.input.get(offset..offset + 4) else { return Ok(None) };
        let length = field.iter().fold(0_usize, |sum, byte| (sum << 8) | usize::from(*byte));
        if (4..=MESSAGE_BYTES_MAX).contains(&length) { Ok(Some(length)) } else { Err(SessionError::Length(length)) }
    }

    fn message(&mut self) -> Result<Option<(u8, BytesMut)>, SessionError> {
        let Some(length) = self.length(1)? else { return Ok(None) };
        if self.input.len() < length + 1 {
            return Ok(None);
        }
        let tag = self.input.get_u8();
        let mut body = self.input.split_to(length);
        body.advance(4);
        Ok(Some((tag, body)))
    }

    fn handle_message(&mut self, tag: u8, mut body: BytesMut) -> Result<Option<Event>, SessionError> {
        match (tag, self.state) {
            (b'X', _) => {
                self.state = State::Ended;
                Ok(Some(Event::End))
            }
            (b'Q', State::Idle) => {
                let end = body.iter().position(|byte| *byte == 0).unwrap_or(body.len());
                body.truncate(end);
                Ok(self.handle_query(&String::from_utf8_lossy(&body)))
            }
            (b'd', State::Streaming) => feedback(body),
            (b'c', State::Streaming) => {
                // The walreceiver ends streaming, for example to go on with another timeline.
                message(&mut self.output, b'c', |_| {});
                message(&mut self.output, b'C', |out| put_text(out, "COPY 0"));
                self.ready();
                self.state = State::Idle;
                Ok(Some(Event::End))
            }
            // What was still on its way when streaming ended.
            (b'd' | b'c', State::Idle) => Ok(None),
            (other, _) => Err(SessionError::Message(char::from(other))),
        }
    }

    fn handle_query(&mut self, query: &str) -> Option<Event> {
        let mut words = query.trim().trim_end_matches(';').split_ascii_whitespace();
        match words.next().map(str::to_ascii_uppercase).as_deref() {
            Some("IDENTIFY_SYSTEM") => return Some(Event::Identify),
            Some("TIMELINE_HISTORY") => match words.next().and_then(|word| word.parse().ok()) {
                Some(timeline) if timeline == self.identity.timeline => self.answer_history(timeline),
                _ => self.refuse("58P01", "the relay has only the history of the source's own timeline"),
            },
            Some("START_REPLICATION") => match start_position(words) {
                Some((from, timeline)) if timeline.is_none_or(|timeline| timeline == self.identity.timeline) => {
                    self.state = State::Starting;
                    return Some(Event::Start { from });
                }
                _ => self.refuse("0A000", &format!("the relay streams only timeline {}", self.identity.timeline)),
            },
            _ => self.refuse("0A000", "the relay of pgtandem only knows what a walreceiver asks"),
        }
        None
    }

    /// Answers IDENTIFY_SYSTEM. `position`: how far the source has flushed. A walreceiver that finds it behind the position that it
    /// wants does not begin (seen in PostgreSQL 15.20, not yet in 15.18; `walreceiver.c`, "is ahead of the upstream server's flush
    /// position"), and it may want the segment after one that it has whole.
    pub fn handle_position(&mut self, position: Lsn) {
        let identity = self.identity.system_identifier.to_string();
        let (timeline, position) = (self.identity.timeline.to_string(), format_lsn(position));
        let columns = [("systemid", 25_u32), ("timeline", 23), ("xlogpos", 25), ("dbname", 25)];
        self.answer_row(
            &columns,
            &[Some(identity.as_bytes()), Some(timeline.as_bytes()), Some(position.as_bytes()), None],
            "IDENTIFY_SYSTEM",
        );
    }

    fn answer_history(&mut self, timeline: u32) {
        let (name, history) = (history_name(timeline), self.identity.history.clone());
        self.answer_row(
            &[("filename", 25), ("content", 25)],
            &[Some(name.as_bytes()), Some(&history)],
            "TIMELINE_HISTORY",
        );
    }

    fn answer_row(&mut self, columns: &[(&str, u32)], values: &[Option<&[u8]>], tag: &str) {
        message(&mut self.output, b'T', |out| {
            out.put_u16(u16::try_from(columns.len()).unwrap_or(u16::MAX));
            for (name, data_type) in columns {
                put_text(out, name);
                out.put_u32(0);
                out.put_u16(0);
                out.put_u32(*data_type);
                out.put_i16(-1);
                out.put_i32(-1);
                out.put_u16(0);
            }
        });
        message(&mut self.output, b'D', |out| {
            out.put_u16(u16::try_from(values.len()).unwrap_or(u16::MAX));
            for value in values {
                match value {
                    Some(bytes) => {
                        out.put_u32(u32::try_from(bytes.len()).unwrap_or(u32::MAX));
                        out.put_slice(bytes);
                    }
                    None => out.put_i32(-1),
                }
            }
        });
        message(&mut self.output, b'C', |out| put_text(out, tag));
        self.ready();
    }

    fn refuse(&mut self, sqlstate: &str, what: &str) {
        message(&mut self.output, b'E', |out| {
            for (field, text) in [(b'S', "ERROR"), (b'V', "ERROR"), (b'C', sqlstate), (b'M', what)] {
                out.put_u8(field);
                put_text(out, text);
            }
            out.put_u8(0);
        });
        self.ready();
    }

    fn ready(&mut self) {
        message(&mut self.output, b'Z', |out| out.put_u8(b'I'));
    }
}

/// `[SLOT name] [PHYSICAL] X/X [TIMELINE n]`
fn start_position<'query>(words: impl Iterator<Item = &'query str>) -> Option<(Lsn, Option<u32>)> {
    let mut words = words.peekable();
    if words.next_if(|word| word.eq_ignore_ascii_case("SLOT")).is_some() {
        words.next()?;
    }
    words.next_if(|word| word.eq_ignore_ascii_case("PHYSICAL"));
    let from = parse_lsn(words.next()?)?;
    match words.next() {
        Some(word) if word.eq_ignore_ascii_case("TIMELINE") => Some((from, Some(words.next()?.parse().ok()?))),
        Some(_) => None,
        None => Some((from, None)),
    }
}

fn feedback(mut body: BytesMut) -> Result<Option<Event>, SessionError> {
    if body.is_empty() {
        return Err(SessionError::Length(0));
    }
    match body.get_u8() {
        b'r' if body.len() >= 33 => {
            let (written, flushed, applied) = (Lsn(body.get_u64()), Lsn(body.get_u64()), Lsn(body.get_u64()));
            let _time = body.get_i64();
            Ok(Some(Event::Feedback { written, flushed, applied, reply_requested: body.get_u8() != 0 }))
        }
        // Hot standby feedback: nothing on the source may wait for B.
        b'h' => Ok(None),
        _ => Err(SessionError::Length(body.len())),
    }
}

fn postgres_time(now_us: i64) -> i64 {
    now_us - POSTGRES_EPOCH_SECONDS * 1_000_000
}

fn put_text(out: &mut BytesMut, text: &str) {
    out.put_slice(text.as_bytes());
    out.put_u8(0);
}

/// Appends a message with its tag and length.
fn message(out: &mut BytesMut, tag: u8, body: impl FnOnce(&mut BytesMut)) {
    out.put_u8(tag);
    let at = out.len();
    out.put_u32(0);
    body(out);
    let length = u32::try_from(out.len() - at).unwrap_or(u32::MAX);
    if let Some(field) = out.get_mut(at..at + 4) {
        field.copy_from_slice(&length.to_be_bytes());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn session() -> Session {
        let identity = Identity {
            system_identifier: 7_100,
            timeline: 2,
            history: b"1\t0/3000000\tx\n".to_vec(),
            version_num: 150_018,
        };
        Session::new(identity)
    }

    fn startup(session: &mut Session) {
        let mut packet = BytesMut::new();
        packet.put_u32(8 + 5);
        packet.put_u32(PROTOCOL_3);
        packet.put_slice(b"a\0b\0\0");
        session.handle_bytes(&packet);
        assert_eq!(session.poll_event(), Ok(None));
        assert!(session.take_output().ends_with(b"Z\0\0\0\x05I"));
    }

    fn ask(session: &mut Session, query: &str) -> Result<Option<Event>, SessionError> {
        let mut packet = BytesMut::new();
        message(&mut packet, b'Q', |out| put_text(out, query));
        // One byte at a time: nothing depends on how the socket cuts.
        for byte in &packet[..packet.len() - 1] {
            session.handle_bytes(&[*byte]);
            assert_eq!(session.poll_event(), Ok(None));
        }
        session.handle_bytes(&packet[packet.len() - 1..]);
        session.poll_event()
    }

    #[test]
    fn a_walreceiver_is_answered() {
        let mut session = session();
        let mut ssl = BytesMut::new();
        ssl.put_u32(8);
        ssl.put_u32(SSL_REQUEST);
        session.handle_bytes(&ssl);
        assert_eq!(session.poll_event(), Ok(None));
        assert_eq!(session.take_output(), "N");
        startup(&mut session);
        assert_eq!(ask(&mut session, "IDENTIFY_SYSTEM"), Ok(Some(Event::Identify)));
        assert!(session.take_output().is_empty());
        session.handle_position(Lsn(0x0300_0100));
        let answer = session.take_output();
        assert!(answer.windows(4).any(|window| window == b"7100"));
        assert!(answer.windows(9).any(|window| window == b"0/3000100"));
        assert_eq!(ask(&mut session, "TIMELINE_HISTORY 2"), Ok(None));
        assert!(session.take_output().windows(16).any(|window| window == b"00000002.history"));
        let started = ask(&mut session, "START_REPLICATION SLOT \"x\" PHYSICAL 0/3000000 TIMELINE 2");
        assert_eq!(started, Ok(Some(Event::Start { from: Lsn(0x0300_0000) })));
        session.handle_started();
        assert_eq!(session.take_output(), &b"W\0\0\0\x07\0\0\0"[..]);
        let mut packet = BytesMut::new();
        message(&mut packet, b'd', |out| {
            out.put_u8(b'r');
            out.put_u64(3);
            out.put_u64(2);
            out.put_u64(1);
            out.put_i64(0);
            out.put_u8(1);
        });
        session.handle_bytes(&packet);
        let expected = Event::Feedback { written: Lsn(3), flushed: Lsn(2), applied: Lsn(1), reply_requested: true };
        assert_eq!(session.poll_event(), Ok(Some(expected)));
    }

    #[test]
    fn another_timeline_is_refused_and_the_session_goes_on() {
        let mut session = session();
        startup(&mut session);
        assert_eq!(ask(&mut session, "START_REPLICATION 0/3000000 TIMELINE 3"), Ok(None));
        assert!(session.take_output().starts_with(b"E"));
        let started = ask(&mut session, "START_REPLICATION 0/3000000");
        assert_eq!(started, Ok(Some(Event::Start { from: Lsn(0x0300_0000) })));
    }

    proptest::proptest! {
        #[test]
        fn random_bytes_never_panic(chunks in proptest::collection::vec(proptest::collection::vec(proptest::num::u8::ANY, 0..64), 0..8)) {
            let mut session = session();
            startup(&mut session);
            for chunk in chunks {
                session.handle_bytes(&chunk);
                while let Ok(Some(_)) = session.poll_event() {}
                let _ = session.take_output();
            }
        }
    }
}
