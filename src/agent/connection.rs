//! One connection of the agent protocol behind its HELLO: typed messages in, typed messages out.
//!
//! It does not know what is under it (TLS in production, memory in tests) nor which channel it is.

use futures_util::{SinkExt, StreamExt};
use pgtandem_proto::codec::{CodecError, FrameCodec};
use pgtandem_proto::frame::{Frame, FrameError, Message};
use pgtandem_proto::message::{Failure, FailureCode};
use tokio::io::{AsyncRead, AsyncWrite, ReadHalf, WriteHalf};
use tokio_util::codec::{Framed, FramedParts, FramedRead, FramedWrite};

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
        let (read_half, write_half) = tokio::io::split(io);
        let mut framed = FramedRead::new(read_half, codec);
        *framed.read_buffer_mut() = read_buf;
        (
            Sender {
                framed: FramedWrite::new(write_half, FrameCodec::default()),
                sequence: self.sequence,
                peer: self.peer.clone(),
            },
            Receiver { framed, peer: self.peer },
        )
    }

    /// The carrier below and the bytes that were read from it already, for a channel that is no longer frames.
    #[must_use]
    pub fn into_raw(self) -> (BoxedCarrier, bytes::BytesMut) {
        let parts = self.framed.into_parts();
        (parts.io, parts.read_buf)
    }
}

/// The sending half of a connection.
pub struct Sender {
    framed: FramedWrite<WriteHalf<BoxedCarrier>, FrameCodec>,
    sequence: u32,
    peer: String,
}

impl Sender {
    /// Sends a message and everything fed before it.
    pub async fn send<M: Message>(&mut self, message: &M) -> Result<(), ConnectionError> {
        self.feed(message).await?;
        self.flush().await
    }

    /// Puts a message into the buffer, which is written when it is full.
    pub async fn feed<M: Message>(&mut self, message: &M) -> Result<(), ConnectionError> {
        let frame = number(message, &mut self.sequence).map_err(|error| codec(&self.peer, error.into()))?;
        self.framed.feed(&frame).await.map_err(|error| codec(&self.peer, error))
    }

    pub async fn flush(&mut self) -> Result<(), ConnectionError> {
        SinkExt::<&Frame>::flush(&mut self.framed).await.map_err(|error| codec(&self.peer, error))
    }
}

/// The receiving half of a connection.
pub struct Receiver {
    framed: FramedRead<ReadHalf<BoxedCarrier>, FrameCodec>,
    peer: String,
}

impl Receiver {
    /// The next message, which must be an `M`; None when the other end closed in order. Cancel safe.
    pub async fn receive<M: Message>(&mut self) -> Result<Option<M>, ConnectionError> {
        read(self.framed.next().await, &self.peer)
    }

    /// As [`Receiver::receive`], where an end of the connection is an error.
    pub async fn expect<M: Message>(&mut self) -> Result<M, ConnectionError> {
        self.receive().await?.ok_or_else(|| ConnectionError::Closed { peer: self.peer.clone() })
    }
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
