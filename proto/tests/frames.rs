//! Frames as bytes: golden files, round trips, and decoders that are fed anything.
//!
//! `PGTANDEM_BLESS=1 cargo test -p pgtandem-proto` writes the golden files anew; a change of an existing one is a
//! change of the protocol and needs a new version.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test that panics has failed")]

use std::fs;
use std::path::PathBuf;

use bytes::{Bytes, BytesMut};
use pgtandem_proto::codec::{CodecError, FrameCodec};
use pgtandem_proto::frame::{
    FLAG_OPTIONAL, FLAG_OWN_HASH, Frame, FrameError, HEADER_BYTES, Kind, Message, PAYLOAD_BYTES_MAX,
};
use pgtandem_proto::hello::{Channel, Hello, HelloReply};
use pgtandem_proto::membership::{MemberSet, NodeState, Record};
use pgtandem_proto::message::*;
use proptest::prelude::*;
use tokio_util::codec::{Decoder, Encoder};

fn encode<M: Message>(message: &M, sequence: u32) -> BytesMut {
    let mut out = BytesMut::new();
    FrameCodec::default().encode(&Frame::encode(message, sequence).unwrap(), &mut out).unwrap();
    out
}

fn decode<M: Message>(bytes: &[u8]) -> M {
    let mut source = BytesMut::from(bytes);
    let frame = FrameCodec::default().decode(&mut source).unwrap().unwrap();
    assert!(source.is_empty());
    frame.decode().unwrap()
}

fn check<M: Message + PartialEq + std::fmt::Debug>(name: &str, message: &M) {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("golden").join(format!("v1_{name}.bin"));
    let bytes = encode(message, 0);
    if std::env::var_os("PGTANDEM_BLESS").is_some() {
        fs::write(&path, &bytes).unwrap();
    }
    let golden = fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    assert_eq!(&decode::<M>(&golden), message, "{name}");
    assert_eq!(bytes[..], golden[..], "{name} is encoded differently from version 1");
}

fn record() -> Record {
    Record {
        cluster: "shop".into(),
        node: "b".into(),
        promised: 7,
        members: Some(MemberSet {
            epoch: 7,
            version: 3,
            nodes: vec!["a".into(), "b".into()],
            leader: "a".into(),
            proxy: "a".into(),
        }),
        state: NodeState::InSync,
        uncertain: true,
        generations: vec!["g2".into(), "g1".into()],
        verified_at: Some(1_700_000_000),
        overrides: vec!["by hand".into()],
        taking_over: false,
        last_contact: Some(1_700_000_100),
    }
}

fn failure() -> Failure {
    Failure { code: FailureCode::OldEpoch, what: "epoch 3 is over".into(), hint: "stop the old proxy".into() }
}

#[test]
fn hello_is_as_it_always_was() {
    for (name, channel) in [
        ("hello_control", Channel::Control),
        ("hello_tunnel", Channel::Tunnel { epoch: 7 }),
        ("hello_files", Channel::Files),
        ("hello_wal", Channel::Wal),
        ("hello_lease", Channel::Lease { epoch: 7 }),
        ("hello_archive", Channel::Archive),
    ] {
        check(name, &Hello::new("shop", "proxy", channel));
    }
    check("hello_accepted", &HelloReply::Accepted { version: 1, features: 0, node: "b".into(), promised: 7 });
    check("hello_refused", &HelloReply::Refused(failure()));
}

#[test]
fn control_is_as_it_always_was() {
    check("request_status", &Request::Status);
    check("request_promise", &Request::Promise { epoch: 300 });
    check(
        "request_store",
        &Request::Store {
            members: record().members.unwrap(),
            state: NodeState::Stale,
            uncertain: false,
            new_generation: Some("g3".into()),
            note: None,
        },
    );
    check("request_start_postgres", &Request::StartPostgres);
    check("request_stop_postgres", &Request::StopPostgres { immediate: true });
    check("request_facts", &Request::Facts);
    check("request_fill", &Request::Fill { epoch: 7, source: "a".into() });
    check("request_catch_up", &Request::CatchUp { epoch: 7, source: "a".into(), lag_bytes_max: 1 << 24 });
    check("request_hold_relay", &Request::HoldRelay);
    check("request_leave_recovery", &Request::LeaveRecovery { x: Lsn(0x2_0000_0028) });
    check("request_drop_slot", &Request::DropSlot { node: "b".into() });
    check("request_cut_tunnels", &Request::CutTunnels);
    check("request_fence", &Request::Fence { epoch: 8 });
    let members = record().members.unwrap();
    check("request_join", &Request::Join { members, generations: vec!["g2".into(), "g1".into()] });
    check("request_discard_fork", &Request::DiscardFork { note: "nothing in it is needed".into() });
    check(
        "reply_status",
        &Reply::Status(Box::new(NodeStatus {
            record: record(),
            postgres: PostgresState::Standby,
            postgres_detail: "starting".into(),
            progress: Some(Progress { files: 3, wal_replayed: 9, ..Progress::default() }),
            lease_ms: None,
            archive_problem: "no base copy could be taken".into(),
        })),
    );
    check("reply_record", &Reply::Record(Box::new(record())));
    check(
        "reply_facts",
        &Reply::Facts(Box::new(NodeFacts {
            binaries_version_num: 150_018,
            data_major: Some(15),
            settings: vec![("max_connections".into(), "100".into())],
            ..NodeFacts::default()
        })),
    );
    check("reply_lsn", &Reply::Lsn(Lsn(1)));
    check("reply_done", &Reply::Done);
    check("lease_ask", &LeaseAsk { number: 9 });
    check("lease_grant", &LeaseGrant { number: 9, epoch: 7, version: 3 });
    check("reply_failed", &Reply::Failed(failure()));
    check("request_base_copy", &Request::BaseCopy);
    check("request_verify_fill", &Request::VerifyFill);
    check("request_old_data", &Request::OldData);
    check("request_pace", &Request::Pace { node: "b".into(), bytes_per_s_max: 8 << 20 });
    check("request_keep_old", &Request::KeepOld { epoch: 7, source: "a".into() });
    check(
        "reply_old_data",
        &Reply::OldData(Box::new(OldData { bytes: 30 << 20, free_bytes: 9 << 30, link: "base/link".into() })),
    );
    let path = "/srv/data.old-1795424701".into();
    check("reply_kept", &Reply::Kept(Box::new(Kept { path, bytes: 30 << 20, shared: true, earlier: false })));
    check(
        "reply_base_copy",
        &Reply::BaseCopy(Box::new(BaseCopy {
            stream: "00000001-0011223344556677".into(),
            name: "20261127T141500Z-000000010000000000000002".into(),
            files: 900,
            bytes: 30 << 20,
            bytes_new: 5,
            damaged: vec!["base/5/1259, block 3".into()],
            damaged_count: 1,
        })),
    );
}

#[test]
fn archives_are_as_they_always_were() {
    let path = "00000001-0011223344556677/wal/000000010000000000000002.zst";
    check("archive_request_list", &ArchiveRequest::List);
    check("archive_request_missing", &ArchiveRequest::Missing { extents: vec![[5; 32], [6; 32]] });
    check("archive_request_put", &ArchiveRequest::Put { path: path.into(), bytes: 300 });
    check("archive_request_data", &ArchiveRequest::Data { bytes: Bytes::from_static(b"a file") });
    check("archive_request_remove", &ArchiveRequest::Remove { paths: vec![path.into()] });
    check("archive_reply_names", &ArchiveReply::Names { paths: vec![path.into()], last: true });
    check("archive_reply_missing", &ArchiveReply::Missing { places: vec![1] });
    check("archive_reply_stored", &ArchiveReply::Stored);
    check("archive_reply_removed", &ArchiveReply::Removed);
    check("archive_reply_failed", &ArchiveReply::Failed(failure()));
}

#[test]
fn files_and_wal_are_as_they_always_were() {
    check("files_request_begin", &FilesRequest::Begin);
    check(
        "files_request_extents",
        &FilesRequest::Extents {
            file: 9,
            first: 2,
            have: vec![None, Some(Held { hash: [5; 32], pages: vec![[6; 16]] })],
        },
    );
    check("files_request_end", &FilesRequest::End);
    check(
        "files_reply_begun",
        &FilesReply::Begun {
            start: Lsn(0x200_0028),
            timeline: 1,
            system_identifier: 7_123_456_789_012_345_678,
            wal_segment_bytes: 16 << 20,
            version_num: 150_018,
        },
    );
    check("files_request_attach", &FilesRequest::Attach { start: Lsn(0x200_0028) });
    check("files_request_small", &FilesRequest::Small { files: vec![(9, None), (10, Some([5; 32]))] });
    check("files_request_check", &FilesRequest::Check);
    let entry =
        FileEntry { id: 9, path: "base/5/1259".into(), directory: false, bytes: 98_304, mode: 0o600, tablespace: None };
    let tablespace = Tablespace { path: "/mnt/fast".into(), identity: "boot 1 2".into() };
    let linked = FileEntry {
        id: 10,
        path: "pg_tblspc/16384".into(),
        directory: true,
        bytes: 0,
        mode: 0o700,
        tablespace: Some(tablespace),
    };
    check("files_reply_table", &FilesReply::Table { entries: vec![entry, linked], last: true });
    check(
        "files_reply_ended",
        &FilesReply::Ended {
            stop: Lsn(0x200_0100),
            backup_label: b"START WAL LOCATION".to_vec(),
            tablespace_map: Vec::new(),
            damaged: vec!["base/5/1259, block 3".into()],
            damaged_count: 1,
        },
    );
    check("files_reply_failed", &FilesReply::Failed(failure()));
    let extent = |content| FilesReply::Extent(Extent { file: 9, index: 2, hash: [4; 32], crc: 0xE306_9283, content });
    let packed = |unpacked, data| Packed { unpacked, data: Bytes::from_static(data) };
    check("files_reply_same", &extent(ExtentContent::Same { bytes: 8192 }));
    check("files_reply_zeros", &extent(ExtentContent::Zeros { bytes: 8192 }));
    check("files_reply_data", &extent(ExtentContent::Data(packed(None, b"a page"))));
    check("files_reply_data_packed", &extent(ExtentContent::Data(packed(Some(8192), b"a page"))));
    check("files_reply_vanished", &extent(ExtentContent::Vanished));
    let pages = ExtentContent::Pages { bytes: 16_384, changed: vec![0b10], data: packed(None, b"page 1") };
    check("files_reply_pages", &extent(pages));
    check("files_reply_attached", &FilesReply::Attached);
    let small = |file, content| SmallFile { file, hash: [4; 32], crc: 0xE306_9283, content };
    let files = vec![
        small(9, SmallContent::Same { bytes: 5 }),
        small(10, SmallContent::Data { bytes: 4 }),
        small(11, SmallContent::Vanished),
    ];
    check("files_reply_small", &FilesReply::Small(SmallFiles { files, data: packed(None, b"text") }));
    check("files_reply_sum", &FilesReply::Sum { answers: 3, sum: [1, 2, 3, 4] });
    check("wal_request_start", &WalRequest::Start { from: Lsn(0x100_0000), timeline: 2 });
    check("wal_request_acknowledge", &WalRequest::Acknowledge { flushed: Lsn(0x100_0100) });
    check("wal_reply_data", &WalReply::Data { start: Lsn(1), flushed: Lsn(2), bytes: Bytes::from_static(b"some WAL") });
    check(
        "wal_reply_started",
        &WalReply::Started {
            timeline: 2,
            system_identifier: 7_123_456_789_012_345_678,
            wal_segment_bytes: 16 << 20,
            history: b"1\t0/2000100\tno recovery target specified\n".to_vec(),
            flushed: Lsn(0x200_0100),
        },
    );
    check("wal_reply_flushed", &WalReply::Flushed { flushed: Lsn(2) });
    check("wal_reply_failed", &WalReply::Failed(failure()));
}

/// The error of decoding `bytes` as a stream that ends behind them.
fn error(bytes: &[u8]) -> FrameError {
    let mut source = BytesMut::from(bytes);
    match FrameCodec::default().decode_eof(&mut source) {
        Err(CodecError::Frame(error)) => error,
        other => panic!("{other:?}"),
    }
}

/// A header with one thing changed and its CRC made right again.
fn with_header(mut bytes: BytesMut, at: usize, value: &[u8]) -> BytesMut {
    bytes[at..at + value.len()].copy_from_slice(value);
    let crc = crc32c::crc32c(&bytes[..HEADER_BYTES - 4]);
    bytes[HEADER_BYTES - 4..HEADER_BYTES].copy_from_slice(&crc.to_be_bytes());
    bytes
}

#[test]
fn each_fault_is_named() {
    let good = encode(&Request::Status, 0);
    assert!(matches!(error(b"GET / HTTP/1.1"), FrameError::Magic(_)));
    assert!(matches!(error(&with_header(good.clone(), 4, &[9])), FrameError::HeaderVersion(9)));
    let mut torn = good.clone();
    torn[13] ^= 1;
    assert!(matches!(error(&torn), FrameError::HeaderCrc { .. }));
    let long = u32::try_from(PAYLOAD_BYTES_MAX).unwrap() + 1;
    assert!(matches!(error(&with_header(good.clone(), 16, &long.to_be_bytes())), FrameError::Length { .. }));
    assert!(matches!(error(&with_header(good.clone(), 16, &[0xff; 8])), FrameError::Length { .. }));
    assert!(matches!(error(&with_header(good.clone(), 5, &[200])), FrameError::UnknownKind(200)));
    assert!(matches!(error(&with_header(good.clone(), 6, &[0x80, 0])), FrameError::Flags(0x8000)));
    assert!(matches!(error(&with_header(good.clone(), 12, &[0, 0, 0, 5])), FrameError::Sequence { .. }));
    assert!(matches!(error(&good[..HEADER_BYTES]), FrameError::Truncated { .. }));
    assert!(matches!(error(&good[..5]), FrameError::Truncated { .. }));
    let data = WalReply::Data { start: Lsn(1), flushed: Lsn(2), bytes: Bytes::from_static(b"some WAL") };
    let mut flipped = encode(&data, 0);
    flipped[HEADER_BYTES + 5] ^= 1;
    assert!(matches!(error(&flipped), FrameError::Hash));

    let frame = Frame::encode(&Request::Status, 0).unwrap();
    assert!(matches!(frame.clone().decode::<Reply>(), Err(FrameError::Kind { .. })));
    let trailing = Frame { head: Bytes::from_static(&[0, 0]), ..frame.clone() };
    assert!(matches!(trailing.decode::<Request>(), Err(FrameError::Content { .. })));
    let bulk = Frame { bulk: Bytes::from_static(b"x"), ..frame };
    assert!(matches!(bulk.decode::<Request>(), Err(FrameError::Content { .. })));
    // Only a message that has hashes of its own may come without one behind it.
    let bare = Frame { flags: FLAG_OWN_HASH, ..Frame::encode(&data, 0).unwrap() };
    assert!(matches!(bare.decode::<WalReply>(), Err(FrameError::Content { .. })));
}

#[test]
fn unknown_frames_are_skipped_if_they_are_optional() {
    let optional = with_header(encode(&Request::Status, 0), 5, &[200]);
    let mut bytes = with_header(optional, 6, &FLAG_OPTIONAL.to_be_bytes());
    bytes.extend_from_slice(&encode(&Request::Facts, 1));
    let frame = FrameCodec::default().decode(&mut bytes).unwrap().unwrap();
    assert_eq!(frame.decode::<Request>().unwrap(), Request::Facts);
}

#[test]
fn an_extent_and_its_head_fit_into_a_frame_and_not_much_more() {
    let extent = |bytes| {
        FilesReply::Extent(Extent {
            file: u32::MAX,
            index: u32::MAX,
            hash: [255; 32],
            crc: u32::MAX,
            content: ExtentContent::Data(Packed { unpacked: None, data: Bytes::from(vec![1; bytes]) }),
        })
    };
    let largest = extent(EXTENT_BYTES);
    assert_eq!(decode::<FilesReply>(&encode(&largest, 0)), largest);
    assert!(matches!(Frame::encode(&extent(2 * EXTENT_BYTES), 0), Err(FrameError::TooLargeToSend { .. })));
}

/// Every decoder of a message.
fn decode_as_everything(frame: &Frame) {
    fn one<M: Message>(frame: &Frame) {
        let _ = Frame { kind: M::KIND, ..frame.clone() }.decode::<M>();
    }
    one::<Hello>(frame);
    one::<HelloReply>(frame);
    one::<Request>(frame);
    one::<Reply>(frame);
    one::<FilesRequest>(frame);
    one::<FilesReply>(frame);
    one::<WalRequest>(frame);
    one::<WalReply>(frame);
    one::<ArchiveRequest>(frame);
    one::<ArchiveReply>(frame);
}

proptest! {
    #[test]
    fn no_bytes_make_the_codec_panic(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
        let mut source = BytesMut::from(&bytes[..]);
        let _ = FrameCodec::default().decode_eof(&mut source);
    }

    #[test]
    fn no_payload_makes_a_decoder_panic(
        head in prop::collection::vec(any::<u8>(), 0..200),
        bulk in prop::collection::vec(any::<u8>(), 0..20),
    ) {
        let frame = Frame { kind: Kind::Hello, flags: 0, stream: 0, sequence: 0, head: head.into(), bulk: bulk.into() };
        decode_as_everything(&frame);
    }

    #[test]
    fn one_changed_byte_of_a_data_frame_is_noticed(at in 0_usize..100, change in 1_u8..) {
        let data = WalReply::Data { start: Lsn(1), flushed: Lsn(2), bytes: Bytes::from(vec![7; 80]) };
        let mut bytes = encode(&data, 0);
        let at = at % bytes.len();
        bytes[at] ^= change;
        prop_assert!(FrameCodec::default().decode_eof(&mut bytes).is_err());
    }

    #[test]
    fn what_is_asked_of_an_archive_arrives_as_it_was_sent(
        extents in prop::collection::vec(any::<[u8; 32]>(), 0..50),
        places in prop::collection::vec(any::<u32>(), 0..50),
        paths in prop::collection::vec("\\PC{0,80}", 0..20),
        bytes in prop::collection::vec(any::<u8>(), 0..500),
        length in any::<u64>(),
    ) {
        let path = paths.first().cloned().unwrap_or_default();
        for request in [
            ArchiveRequest::Missing { extents },
            ArchiveRequest::Put { path, bytes: length },
            ArchiveRequest::Data { bytes: bytes.into() },
            ArchiveRequest::Remove { paths: paths.clone() },
        ] {
            prop_assert_eq!(decode::<ArchiveRequest>(&encode(&request, 0)), request);
        }
        for reply in [ArchiveReply::Names { paths, last: false }, ArchiveReply::Missing { places }] {
            prop_assert_eq!(decode::<ArchiveReply>(&encode(&reply, 0)), reply);
        }
    }

    #[test]
    fn frames_survive_any_cut_of_the_stream(
        messages in prop::collection::vec((any::<u64>(), any::<u64>(), prop::collection::vec(any::<u8>(), 0..500)), 0..8),
        piece in 1_usize..200,
    ) {
        let sent: Vec<WalReply> = messages
            .into_iter()
            .map(|(start, flushed, bytes)| WalReply::Data { start: Lsn(start), flushed: Lsn(flushed), bytes: bytes.into() })
            .collect();
        let mut stream = BytesMut::new();
        for (sequence, message) in (0..).zip(&sent) {
            stream.extend_from_slice(&encode(message, sequence));
        }
        let (mut codec, mut source, mut received) = (FrameCodec::default(), BytesMut::new(), Vec::new());
        for piece in stream.chunks(piece) {
            source.extend_from_slice(piece);
            while let Some(frame) = codec.decode(&mut source).unwrap() {
                received.push(frame.decode::<WalReply>().unwrap());
            }
        }
        prop_assert!(codec.decode_eof(&mut source).unwrap().is_none());
        prop_assert_eq!(received, sent);
    }
}
