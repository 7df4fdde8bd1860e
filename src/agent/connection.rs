//! One connection of the agent protocol behind its HELLO: typed messages in, typed messages out.
//!
//! It does not know what is under it (TLS in production, memory in tests) nor which channel it is.

use bytes::{Bytes, BytesMut};
use futures_util::{SinkExt, StreamExt};
use pgtandem_proto::codec::{CodecError, FrameCodec, Started};
use pgtandem_proto::frame::{Frame, FrameError, Message, PAYLOAD_BYTES_MAX};
use pgtandem_proto::message::{Failure, FailureCode};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadHalf, WriteHalf, split};
use tokio_util::codec::{Framed, FramedParts};

use super::buffers::{Buffer, Buffers};

/// What carries frames.
pub trait Carrier: AsyncRead + AsyncWrite + Unpin + Send {}
impl<T: AsyncRead + AsyncWrite + Unpin + Send> Carrier for T {}

pub type BoxedCarrier = Box<dyn Carrier>;

/// Why a connection ended, with the name of the other end.
#[derive(Debug, thiserror::Error)]
pub enum ConnectionError {
    #[error("connection with {peer}: {source}")]
    Codec { peer: String, source: CodecError },
    #[error("{peer} ended the connection before its answer")]
    Closed { peer: String },
}

impl ConnectionError {
    /// The same as it crosses the network.
    #[must_use]
    pub fn failure(&self) -> Failure {
        Failure {
            code: FailureCode::Peer,
            what: self.to_string(),
            hint: "see the agent's log on that node; a broken connection is made again by itself".to_owned(),
        }
    }
}

/// Both directions. [`Connection::split`] when they must go on independently.
pub struct Connection {
    framed: Framed<BoxedCarrier, FrameCodec>,
    sequence: u32,
    peer: String,
}

impl Connection {
    #[must_use]
    pub fn new(carrier: BoxedCarrier, peer: &str) -> Connection {
        Connection { framed: Framed::new(carrier, FrameCodec::default()), sequence: 0, peer: peer.to_owned() }
    }

    /// Two ends in memory, with `bytes` of buffer in each direction. For tests.
    #[must_use]
    pub fn pair(bytes: usize) -> (Connection, Connection) {
        let (one, other) = tokio::io::duplex(bytes);
        (Connection::new(Box::new(one), "the other end"), Connection::new(Box::new(other), "the other end"))
    }

    /// Name of the other end.
    #[must_use]
    pub fn peer(&self) -> &str {
        &self.peer
    }

    pub(super) fn set_peer(&mut self, peer: &str) {
        peer.clone_into(&mut self.peer);
    }

    /// Sends a message and everything fed before it.
    pub async fn send<M: Message>(&mut self, message: &M) -> Result<(), ConnectionError> {
        let frame = number(message, &mut self.sequence).map_err(|error| codec(&self.peer, error.into()))?;
        self.framed.send(&frame).await.map_err(|error| codec(&self.peer, error))
    }

    /// The next message, which must be an `M`; None when the other end closed in order. Cancel safe.
    pub async fn receive<M: Message>(&mut self) -> Result<Option<M>, ConnectionError> {
        read(self.framed.next().await, &self.peer)
    }

    /// As [`Connection::receive`], where an end of the connection is an error.
    pub async fn expect<M: Message>(&mut self) -> Result<M, ConnectionError> {
        self.receive().await?.ok_or_else(|| ConnectionError::Closed { peer: self.peer.clone() })
    }

    #[must_use]
    pub fn split(self) -> (Sender, Receiver) {
        let FramedParts { io, codec, read_buf, .. } = self.framed.into_parts();
        let (read_half, write_half) = split(io);
        (
            Sender { carrier: write_half, waiting: BytesMut::new(), sequence: self.sequence, peer: self.peer.clone() },
            Receiver {
                carrier: read_half,
                codec,
                read: read_buf,
                started: None,
                buffers: Buffers::new(PAYLOAD_BYTES_MAX),
                peer: self.peer,
            },
        )
    }

    /// The carrier below and the bytes that were read from it already, for a channel that is no longer frames.
    #[must_use]
    pub fn into_raw(self) -> (BoxedCarrier, BytesMut) {
        let parts = self.framed.into_parts();
        (parts.io, parts.read_buf)
    }
}

/// Bulk bytes from this length on are written from where they lie, and read to where they are used.
const LARGE_BULK_BYTES: usize = 32 << 10;
/// What waits to be written is written when it is this long.
const WAITING_BYTES: usize = 16 << 10;
/// Read at once where no bulk bytes are expected: little, because it is copied once more if they come after all.
const READ_BYTES: usize = 8 << 10;

/// The sending half of a connection. A future of its methods that is dropped half way leaves a connection that can
/// not be used any more.
pub struct Sender {
    carrier: WriteHalf<BoxedCarrier>,
    waiting: BytesMut,
    sequence: u32,
    peer: String,
}

impl Sender {
    /// Sends a message and everything fed before it.
    pub async fn send<M: Message>(&mut self, message: &M) -> Result<(), ConnectionError> {
        self.feed(message).await?;
        self.flush().await
    }

    /// Puts a message behind what waits, which is written when it is long enough.
    pub async fn feed<M: Message>(&mut self, message: &M) -> Result<(), ConnectionError> {
        let frame = number(message, &mut self.sequence).map_err(|error| codec(&self.peer, error.into()))?;
        let tail = frame.write_before_bulk(&mut self.waiting).map_err(|error| codec(&self.peer, error.into()))?;
        if frame.bulk.len() >= LARGE_BULK_BYTES {
            self.write_waiting().await?;
            self.carrier.write_all(&frame.bulk).await.map_err(|error| codec(&self.peer, error.into()))?;
        } else {
            self.waiting.extend_from_slice(&frame.bulk);
        }
        self.waiting.extend_from_slice(&tail);
        if self.waiting.len() >= WAITING_BYTES { self.write_waiting().await } else { Ok(()) }
    }

    pub async fn flush(&mut self) -> Result<(), ConnectionError> {
        self.write_waiting().await?;
        self.carrier.flush().await.map_err(|error| codec(&self.peer, error.into()))
    }

    async fn write_waiting(&mut self) -> Result<(), ConnectionError> {
        let written = self.carrier.write_all_buf(&mut self.waiting).await;
        self.waiting.clear();
        written.map_err(|error| codec(&self.peer, error.into()))
    }
}

/// The receiving half of a connection.
pub struct Receiver {
    carrier: ReadHalf<BoxedCarrier>,
    codec: FrameCodec,
    /// Read and not yet understood.
    read: BytesMut,
    /// A frame whose bulk bytes are coming.
    started: Option<(Started, Bulk)>,
    buffers: Buffers,
    peer: String,
}

/// Bulk bytes that are being read, `filled` of them so far.
struct Bulk {
    buffer: Buffer,
    filled: usize,
}

impl Receiver {
    /// The next message, which must be an `M`; None when the other end closed in order. Cancel safe.
    pub async fn receive<M: Message>(&mut self) -> Result<Option<M>, ConnectionError> {
        read(self.next().await.transpose(), &self.peer)
    }

    /// As [`Receiver::receive`], where an end of the connection is an error.
    pub async fn expect<M: Message>(&mut self) -> Result<M, ConnectionError> {
        self.receive().await?.ok_or_else(|| ConnectionError::Closed { peer: self.peer.clone() })
    }

    /// Every await is one read, and what it read is kept: that is what makes it cancel safe.
    async fn next(&mut self) -> Result<Option<Frame>, CodecError> {
        loop {
            if self.started.is_none() {
                match self.codec.start(&mut self.read)? {
                    Some(started) if started.bulk_bytes() == 0 => {
                        if let Some(frame) = started.finish(Bytes::new(), &[])? {
                            return Ok(Some(frame));
                        }
                        continue;
                    }
                    Some(started) => self.started = Some((started, Bulk { buffer: self.buffers.take(), filled: 0 })),
                    None => {
                        self.read.reserve(READ_BYTES);
                        let inside = self.codec.is_inside() || !self.read.is_empty();
                        if self.carrier.read_buf(&mut self.read).await? == 0 {
                            return if inside { Err(truncated(self.read.len())) } else { Ok(None) };
                        }
                        continue;
                    }
                }
            }
            let Some((started, bulk)) = &mut self.started else { continue };
            let missing = bulk.buffer.content().get_mut(bulk.filled..started.bulk_bytes()).unwrap_or_default();
            if !missing.is_empty() {
                let early = self.read.len().min(missing.len());
                let count = if early > 0 {
                    let early = self.read.split_to(early);
                    missing.iter_mut().zip(&early).for_each(|(to, from)| *to = *from);
                    early.len()
                } else {
                    self.carrier.read(missing).await?
                };
                if count == 0 {
                    return Err(truncated(bulk.filled));
                }
                bulk.filled += count;
                continue;
            }
            if self.read.len() < started.hash_bytes() {
                self.read.reserve(READ_BYTES);
                if self.carrier.read_buf(&mut self.read).await? == 0 {
                    return Err(truncated(bulk.filled));
                }
                continue;
            }
            let Some((started, bulk)) = self.started.take() else { continue };
            let hash = self.read.split_to(started.hash_bytes());
            let bytes = bulk.buffer.freeze(started.bulk_bytes());
            // A small part of a large buffer would keep all of it.
            let bytes = if bytes.len() < LARGE_BULK_BYTES { Bytes::copy_from_slice(&bytes) } else { bytes };
            if let Some(frame) = started.finish(bytes, &hash)? {
                return Ok(Some(frame));
            }
        }
    }
}

fn truncated(bytes: usize) -> CodecError {
    FrameError::Truncated { bytes }.into()
}

fn number<M: Message>(message: &M, sequence: &mut u32) -> Result<Frame, FrameError> {
    let frame = Frame::encode(message, *sequence)?;
    *sequence = sequence.wrapping_add(1);
    Ok(frame)
}

fn read<M: Message>(next: Option<Result<Frame, CodecError>>, peer: &str) -> Result<Option<M>, ConnectionError> {
    match next {
        None => Ok(None),
        Some(Ok(frame)) => frame.decode().map(Some).map_err(|error| codec(peer, error.into())),
        Some(Err(error)) => Err(codec(peer, error)),
    }
}

fn codec(peer: &str, source: CodecError) -> ConnectionError {
    // TLS says at length that the other end was gone without a goodbye, which is how a process that was killed leaves.
    let source = match source {
        CodecError::Io(error) if error.kind() == std::io::ErrorKind::UnexpectedEof => {
            CodecError::Io(std::io::Error::new(error.kind(), "the other end closed it"))
        }
        other => other,
    };
    ConnectionError::Codec { peer: peer.to_owned(), source }
}
