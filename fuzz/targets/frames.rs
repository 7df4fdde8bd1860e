//! Frames: of PostgreSQL's protocol and of the protocol between agents. Cut anywhere they are the same frames; a reader stays inside
//! its body and gives back what is in it; what a decoder takes it can encode.
#![no_main]

use bytes::{Bytes, BytesMut};
use libfuzzer_sys::fuzz_target;
use pgtandem::pg::frame::{self, Sender};
use pgtandem::pg::message::{self, Bind, Parse, Reader};
use pgtandem::pg::startup;
use pgtandem::session::parameters;
use pgtandem_proto::codec::FrameCodec;
use pgtandem_proto::frame::{Frame, HEADER_BYTES, Kind, Message};
use pgtandem_proto::hello::{Hello, HelloReply};
use pgtandem_proto::message::{
    ArchiveReply, ArchiveRequest, FilesReply, FilesRequest, LeaseAsk, LeaseGrant, Reply, Request, WalReply, WalRequest,
};
use tokio_util::codec::{Decoder, Encoder};

fuzz_target!(|data: &[u8]| {
    let [choice, step, data @ ..] = data else { return };
    let step = usize::from(*step).max(1);
    match choice % 4 {
        0 => stream(data, step, Sender::Client),
        1 => stream(data, step, Sender::Server),
        2 => between_agents(data, step),
        _ => message_between_agents(*choice, data),
    }
});

/// Whole or in pieces, the same frames come out, and nothing is lost.
fn stream(data: &[u8], step: usize, sender: Sender) {
    let mut whole = BytesMut::from(data);
    let mut frames = Vec::new();
    let end = loop {
        match frame::take(&mut whole, sender) {
            Ok(Some(frame)) => frames.push(frame),
            Ok(None) => break None,
            Err(error) => break Some(error),
        }
    };
    let taken: usize = frames.iter().map(BytesMut::len).sum();
    assert_eq!(frames.concat(), data[..taken]);
    assert_eq!(whole[..], data[taken..]);
    let (mut pieces, mut again, mut failed) = (BytesMut::new(), Vec::new(), None);
    for piece in data.chunks(step) {
        pieces.extend_from_slice(piece);
        while failed.is_none() {
            match frame::take(&mut pieces, sender) {
                Ok(Some(frame)) => again.push(frame),
                Ok(None) => break,
                Err(error) => failed = Some(error),
            }
        }
    }
    assert_eq!((again, failed), (frames.clone(), end));
    for frame in &frames {
        body(frame[0], frame::body(frame));
    }
    let _ = startup::take(&mut BytesMut::from(data));
}

/// What the readers find is the body again, up to where they stop.
fn body(tag: u8, body: &[u8]) {
    let begins = |parts: &[&[u8]]| assert!(body.starts_with(&parts.concat()), "{tag}: {parts:?}");
    if let Ok(parse) = Parse::read(body) {
        let types = 2 + 4 * usize::from(Reader::new(tag, parse.types).u16().expect("a number of types"));
        begins(&[parse.name, b"\0", parse.text, b"\0", &parse.types[..types]]);
        let _ = parameters::has_user_types(parse.types);
    }
    if let Ok(bind) = Bind::read(body) {
        let formats = u16::try_from(bind.result_formats.len() / 2).expect("two bytes each").to_be_bytes();
        begins(&[bind.portal, b"\0", bind.statement, b"\0", bind.parameters, &formats, bind.result_formats]);
        let texts = parameters::texts(&[0, 0], bind.parameters).expect("Bind has read it");
        for (at, text) in texts.iter().enumerate() {
            let value = parameters::value(bind.parameters, at);
            assert!(text.is_none_or(|text| value.is_some_and(|(bytes, _)| bytes == text.as_bytes())));
        }
        assert!(parameters::value(bind.parameters, texts.len()).is_none());
        let _ = parameters::for_text("select $1, $2", &[0, 0], bind.parameters);
    }
    if let Ok((kind, name)) = message::kind_and_name(tag, body) {
        begins(&[&[kind], name, b"\0"]);
    }
    if let Ok((portal, rows)) = message::execute(body) {
        begins(&[portal, b"\0", &rows.to_be_bytes()]);
    }
    if let Some(value) = message::error_field(body, b'M') {
        let field = [b"M", value, b"\0"].concat();
        assert!(body.windows(field.len()).any(|window| window == field));
    }
    if let Some(value) = message::parameter(body, b"TimeZone") {
        begins(&[b"TimeZone\0", value.as_bytes(), b"\0"]);
    }
    let _ = (message::error_summary(body), message::is_fatal(body), message::is_debug(body), message::tag_count(body));
}

/// Anything at all, from an agent: whole or in pieces the same frames. Those that come out can be encoded again.
fn between_agents(data: &[u8], step: usize) {
    let mut data = data.to_vec();
    // The first header with its checksum, which nobody would guess.
    if let Some(header) = data.first_chunk_mut::<HEADER_BYTES>() {
        let sum = crc32c::crc32c(&header[..HEADER_BYTES - 4]);
        header[HEADER_BYTES - 4..].copy_from_slice(&sum.to_be_bytes());
    }
    let (frames, good) = cut(std::iter::once(&data[..]));
    assert_eq!(cut(data.chunks(step)), (frames.clone(), good));
    for frame in frames {
        message_of(frame);
    }
}

/// The frames of a stream, and whether it is good to its end.
fn cut<'d>(pieces: impl Iterator<Item = &'d [u8]>) -> (Vec<Frame>, bool) {
    let (mut codec, mut source, mut frames) = (FrameCodec::default(), BytesMut::new(), Vec::new());
    for piece in pieces {
        source.extend_from_slice(piece);
        loop {
            match codec.decode(&mut source) {
                Ok(Some(frame)) => frames.push(frame),
                Ok(None) => break,
                Err(_) => return (frames, false),
            }
        }
    }
    (frames, true)
}

/// A frame that is whole around a content that is anything: the decoders of messages are reached.
fn message_between_agents(choice: u8, data: &[u8]) {
    let Some((kind, data)) = data.split_first() else { return };
    let Some(kind) = Kind::from_code(*kind) else { return };
    let bulk = usize::from(choice) % (data.len() + 1);
    let (head, bulk) = data.split_at(data.len() - bulk);
    let frame = Frame {
        kind,
        flags: 0,
        stream: 0,
        sequence: 0,
        head: Bytes::copy_from_slice(head),
        bulk: Bytes::copy_from_slice(bulk),
    };
    let mut encoded = BytesMut::new();
    if FrameCodec::default().encode(&frame, &mut encoded).is_ok() {
        let decoded = FrameCodec::default().decode(&mut encoded).expect("what was encoded").expect("all of it");
        assert!(encoded.is_empty());
        assert_eq!((decoded.kind, &decoded.head, &decoded.bulk), (frame.kind, &frame.head, &frame.bulk));
        message_of(decoded);
    }
}

fn message_of(frame: Frame) {
    match frame.kind {
        Kind::Hello => round_trip::<Hello>(frame),
        Kind::HelloReply => round_trip::<HelloReply>(frame),
        Kind::Request => round_trip::<Request>(frame),
        Kind::Reply => round_trip::<Reply>(frame),
        Kind::FilesRequest => round_trip::<FilesRequest>(frame),
        Kind::FilesReply => round_trip::<FilesReply>(frame),
        Kind::WalRequest => round_trip::<WalRequest>(frame),
        Kind::WalReply => round_trip::<WalReply>(frame),
        Kind::LeaseAsk => round_trip::<LeaseAsk>(frame),
        Kind::LeaseGrant => round_trip::<LeaseGrant>(frame),
        Kind::ArchiveRequest => round_trip::<ArchiveRequest>(frame),
        Kind::ArchiveReply => round_trip::<ArchiveReply>(frame),
    }
}

/// A number may be written in more ways than one, so the bytes are compared from the second time on.
fn round_trip<M: Message>(frame: Frame) {
    let Ok(message) = frame.decode::<M>() else { return };
    let Ok(once) = Frame::encode(&message, 0) else { return };
    let again = once.clone().decode::<M>().expect("what was encoded");
    let twice = Frame::encode(&again, 0).expect("as before");
    assert_eq!((once.head, once.bulk), (twice.head, twice.bulk));
}
