//! One frame: a fixed header, an encoded message, bulk bytes behind it, and a hash behind those.
//!
//! What a frame means is not known here; [`crate::codec`] cuts a stream of bytes into frames.

use bytes::{Buf, BufMut, Bytes, BytesMut};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::hello::{Hello, HelloReply};
use crate::message::{
    ArchiveReply, ArchiveRequest, Extent, ExtentContent, FilesReply, FilesRequest, LeaseAsk, LeaseGrant, Reply,
    Request, SmallFiles, WalReply, WalRequest,
};

/// First bytes of every frame.
pub const MAGIC: [u8; 4] = *b"pgtD";
/// Version of the layout of the header. What is inside is negotiated in HELLO.
pub const HEADER_VERSION: u8 = 1;
pub const HEADER_BYTES: usize = 28;
/// BLAKE3, cut to 128 bits, at the end of a frame with bulk.
pub const HASH_BYTES: usize = 16;
/// Largest `head` and `bulk` of a frame together: an extent and 64 KiB of slack.
pub const PAYLOAD_BYTES_MAX: usize = (1 << 20) + (64 << 10);

/// A receiver that does not know the kind of this frame skips it instead of ending the connection.
pub const FLAG_OPTIONAL: u16 = 1;
/// The frame has bulk bytes.
pub const FLAG_BULK: u16 = 2;
/// No hash of head and bulk stands at its end: the message has hashes of its own, which its receiver checks.
pub const FLAG_OWN_HASH: u16 = 4;

/// What a frame holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Hello,
    HelloReply,
    Request,
    Reply,
    FilesRequest,
    FilesReply,
    WalRequest,
    WalReply,
    LeaseAsk,
    LeaseGrant,
    ArchiveRequest,
    ArchiveReply,
}

impl Kind {
    #[must_use]
    pub fn code(self) -> u8 {
        match self {
            Kind::Hello => 1,
            Kind::HelloReply => 2,
            Kind::Request => 16,
            Kind::Reply => 17,
            Kind::FilesRequest => 32,
            Kind::FilesReply => 33,
            Kind::WalRequest => 48,
            Kind::WalReply => 49,
            Kind::LeaseAsk => 64,
            Kind::LeaseGrant => 65,
            Kind::ArchiveRequest => 80,
            Kind::ArchiveReply => 81,
        }
    }

    #[must_use]
    pub fn from_code(code: u8) -> Option<Kind> {
        Some(match code {
            1 => Kind::Hello,
            2 => Kind::HelloReply,
            16 => Kind::Request,
            17 => Kind::Reply,
            32 => Kind::FilesRequest,
            33 => Kind::FilesReply,
            48 => Kind::WalRequest,
            49 => Kind::WalReply,
            64 => Kind::LeaseAsk,
            65 => Kind::LeaseGrant,
            80 => Kind::ArchiveRequest,
            81 => Kind::ArchiveReply,
            _ => return None,
        })
    }
}

/// Why bytes are not a frame, or a frame is not the message that is due. The peer is at fault, never the caller.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    #[error("the peer does not speak the agent protocol: its first bytes are {0:02x?}")]
    Magic([u8; 4]),
    #[error("frame header of version {0}; this program reads version {HEADER_VERSION}")]
    HeaderVersion(u8),
    #[error("the CRC of a frame header is {found:08x} instead of {expected:08x}")]
    HeaderCrc { expected: u32, found: u32 },
    #[error("a frame of {bytes} bytes is longer than the limit of {PAYLOAD_BYTES_MAX}")]
    Length { bytes: u64 },
    #[error("a frame of unknown type {0}")]
    UnknownKind(u8),
    #[error("unknown flags {0:#06x} in a frame header")]
    Flags(u16),
    #[error("the BLAKE3 hash of a data frame does not match its bytes")]
    Hash,
    #[error("the connection ended inside a frame: {bytes} bytes of it arrived")]
    Truncated { bytes: usize },
    #[error("frame number {found} came where number {expected} was due")]
    Sequence { expected: u32, found: u32 },
    #[error("a {found:?} frame came where a {expected:?} frame was due")]
    Kind { expected: Kind, found: Kind },
    #[error("the content of a {kind:?} frame can not be read: {why}")]
    Content { kind: Kind, why: String },
    #[error("a message of {bytes} bytes is longer than the limit of {PAYLOAD_BYTES_MAX}; it is not sent")]
    TooLargeToSend { bytes: usize },
}

/// The fixed part, decoded and checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// None: unknown, to be skipped.
    pub kind: Option<Kind>,
    pub flags: u16,
    /// For several conversations on one connection; 0 until a feature needs it.
    pub stream: u32,
    /// Number of the frame in its direction, from 0, wrapping.
    pub sequence: u32,
    pub head_bytes: usize,
    pub bulk_bytes: usize,
}

impl Header {
    /// Reads and checks a header. Lengths are below the limit afterwards, so they may be allocated.
    pub fn decode(bytes: &[u8; HEADER_BYTES]) -> Result<Header, FrameError> {
        let mut rest = &bytes[..];
        let mut magic = [0; 4];
        rest.copy_to_slice(&mut magic);
        if magic != MAGIC {
            return Err(FrameError::Magic(magic));
        }
        let version = rest.get_u8();
        if version != HEADER_VERSION {
            return Err(FrameError::HeaderVersion(version));
        }
        let code = rest.get_u8();
        let flags = rest.get_u16();
        let stream = rest.get_u32();
        let sequence = rest.get_u32();
        let head = rest.get_u32();
        let bulk = rest.get_u32();
        let found = rest.get_u32();
        let expected = crc32c::crc32c(&bytes[..HEADER_BYTES - 4]);
        if found != expected {
            return Err(FrameError::HeaderCrc { expected, found });
        }
        let length = u64::from(head) + u64::from(bulk);
        if length > PAYLOAD_BYTES_MAX as u64 {
            return Err(FrameError::Length { bytes: length });
        }
        let bulk_flags = flags & FLAG_BULK != 0 || flags & FLAG_OWN_HASH == 0;
        if flags & !(FLAG_OPTIONAL | FLAG_BULK | FLAG_OWN_HASH) != 0
            || (flags & FLAG_BULK != 0) != (bulk > 0)
            || !bulk_flags
        {
            return Err(FrameError::Flags(flags));
        }
        let kind = Kind::from_code(code);
        if kind.is_none() && flags & FLAG_OPTIONAL == 0 {
            return Err(FrameError::UnknownKind(code));
        }
        Ok(Header { kind, flags, stream, sequence, head_bytes: head as usize, bulk_bytes: bulk as usize })
    }

    /// Bytes of the hash behind the bulk.
    #[must_use]
    pub fn hash_bytes(&self) -> usize {
        if self.bulk_bytes > 0 && self.flags & FLAG_OWN_HASH == 0 { HASH_BYTES } else { 0 }
    }
}

/// A message, encoded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Frame {
    pub kind: Kind,
    /// [`FLAG_OPTIONAL`] and [`FLAG_OWN_HASH`]; [`FLAG_BULK`] is set by the encoder.
    pub flags: u16,
    pub stream: u32,
    pub sequence: u32,
    /// The message, encoded with postcard.
    pub head: Bytes,
    /// Bulk bytes of the message, as they are.
    pub bulk: Bytes,
}

/// What can be sent in a frame.
pub trait Message: Serialize + DeserializeOwned {
    const KIND: Kind;

    /// The bulk bytes of this message, if its variant has some; serde skips them.
    fn bulk(&self) -> Option<&Bytes> {
        None
    }

    /// Where the bulk bytes of a decoded message go; None if its variant has none.
    fn bulk_mut(&mut self) -> Option<&mut Bytes> {
        None
    }

    /// Whether the message itself has hashes from which its receiver proves its bulk bytes.
    fn has_own_hash(&self) -> bool {
        false
    }
}

impl Frame {
    /// Encodes a message. Only fails if the message is too long, which is the caller's mistake.
    pub fn encode<M: Message>(message: &M, sequence: u32) -> Result<Frame, FrameError> {
        let head = postcard::to_stdvec(message)
            .map_err(|error| FrameError::Content { kind: M::KIND, why: error.to_string() })?;
        let bulk = message.bulk().cloned().unwrap_or_default();
        let bytes = head.len() + bulk.len();
        if bytes > PAYLOAD_BYTES_MAX {
            return Err(FrameError::TooLargeToSend { bytes });
        }
        let own = !bulk.is_empty() && message.has_own_hash();
        let flags = if own { FLAG_OWN_HASH } else { 0 };
        Ok(Frame { kind: M::KIND, flags, stream: 0, sequence, head: head.into(), bulk })
    }

    /// The message in this frame, which must be of the kind of `M` and nothing more.
    pub fn decode<M: Message>(self) -> Result<M, FrameError> {
        if self.kind != M::KIND {
            return Err(FrameError::Kind { expected: M::KIND, found: self.kind });
        }
        let content = |why: String| FrameError::Content { kind: M::KIND, why };
        let (mut message, rest) =
            postcard::take_from_bytes::<M>(&self.head).map_err(|error| content(error.to_string()))?;
        if !rest.is_empty() {
            return Err(content(format!("{} bytes too many", rest.len())));
        }
        if self.flags & FLAG_OWN_HASH != 0 && !message.has_own_hash() {
            return Err(content("bulk bytes without a hash".to_owned()));
        }
        if !self.bulk.is_empty() {
            match message.bulk_mut() {
                Some(place) => *place = self.bulk,
                None => return Err(content("bulk bytes where none belong".to_owned())),
            }
        }
        Ok(message)
    }

    /// Appends the whole frame to `out`.
    pub(crate) fn write(&self, out: &mut BytesMut) -> Result<(), FrameError> {
        let tail = self.write_before_bulk(out)?;
        out.reserve(self.bulk.len() + HASH_BYTES);
        out.put_slice(&self.bulk);
        out.put_slice(&tail);
        Ok(())
    }

    /// Appends what comes before the bulk bytes. -> what comes behind them
    pub fn write_before_bulk(&self, out: &mut BytesMut) -> Result<Bytes, FrameError> {
        let bytes = self.head.len() + self.bulk.len();
        if bytes > PAYLOAD_BYTES_MAX {
            return Err(FrameError::TooLargeToSend { bytes });
        }
        let length = |part: &Bytes| u32::try_from(part.len()).map_err(|_| FrameError::TooLargeToSend { bytes });
        let (head, bulk) = (length(&self.head)?, length(&self.bulk)?);
        let flags = if bulk > 0 { self.flags | FLAG_BULK } else { self.flags & !(FLAG_BULK | FLAG_OWN_HASH) };
        let start = out.len();
        out.reserve(HEADER_BYTES + self.head.len());
        out.put_slice(&MAGIC);
        out.put_u8(HEADER_VERSION);
        out.put_u8(self.kind.code());
        out.put_u16(flags);
        out.put_u32(self.stream);
        out.put_u32(self.sequence);
        out.put_u32(head);
        out.put_u32(bulk);
        let crc = crc32c::crc32c(&out[start..]);
        out.put_u32(crc);
        out.put_slice(&self.head);
        if bulk == 0 || flags & FLAG_OWN_HASH != 0 {
            return Ok(Bytes::new());
        }
        Ok(Bytes::copy_from_slice(&payload_hash(&self.head, &self.bulk)))
    }
}

/// BLAKE3 of head and bulk as they follow each other, cut to 128 bits.
pub(crate) fn payload_hash(head: &[u8], bulk: &[u8]) -> [u8; HASH_BYTES] {
    let mut cut = [0; HASH_BYTES];
    let hash = blake3::Hasher::new().update(head).update(bulk).finalize();
    cut.copy_from_slice(&hash.as_bytes()[..HASH_BYTES]);
    cut
}

macro_rules! message {
    ($($message:ty => $kind:ident),*) => { $(impl Message for $message { const KIND: Kind = Kind::$kind; })* };
}
message!(Hello => Hello, HelloReply => HelloReply, Request => Request, Reply => Reply, FilesRequest => FilesRequest, WalRequest => WalRequest, LeaseAsk => LeaseAsk, LeaseGrant => LeaseGrant, ArchiveReply => ArchiveReply);

impl Message for FilesReply {
    const KIND: Kind = Kind::FilesReply;

    fn bulk(&self) -> Option<&Bytes> {
        match self {
            FilesReply::Extent(Extent {
                content: ExtentContent::Data(packed) | ExtentContent::Pages { data: packed, .. },
                ..
            })
            | FilesReply::Small(SmallFiles { data: packed, .. }) => Some(&packed.data),
            _ => None,
        }
    }

    fn bulk_mut(&mut self) -> Option<&mut Bytes> {
        match self {
            FilesReply::Extent(Extent {
                content: ExtentContent::Data(packed) | ExtentContent::Pages { data: packed, .. },
                ..
            })
            | FilesReply::Small(SmallFiles { data: packed, .. }) => Some(&mut packed.data),
            _ => None,
        }
    }

    fn has_own_hash(&self) -> bool {
        self.bulk().is_some()
    }
}

impl Message for ArchiveRequest {
    const KIND: Kind = Kind::ArchiveRequest;

    fn bulk(&self) -> Option<&Bytes> {
        match self {
            ArchiveRequest::Data { bytes } => Some(bytes),
            _ => None,
        }
    }

    fn bulk_mut(&mut self) -> Option<&mut Bytes> {
        match self {
            ArchiveRequest::Data { bytes } => Some(bytes),
            _ => None,
        }
    }
}

impl Message for WalReply {
    const KIND: Kind = Kind::WalReply;

    fn bulk(&self) -> Option<&Bytes> {
        match self {
            WalReply::Data { bytes, .. } => Some(bytes),
            _ => None,
        }
    }

    fn bulk_mut(&mut self) -> Option<&mut Bytes> {
        match self {
            WalReply::Data { bytes, .. } => Some(bytes),
            _ => None,
        }
    }
}
