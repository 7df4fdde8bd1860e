//! A channel of the agent protocol as sync sees it: typed messages in both directions, each through a short queue.
//!
//! Not a transport: whoever makes a [`Link`] moves the messages between its queues and a connection, or between two
//! links ([`Link::pair`], for tests and for two nodes in one process). The queues are short, so that a slow reader
//! slows its writer; dropping a link ends both directions.

use pgtandem_proto::frame::Message;
use tokio::sync::mpsc;

use super::error::SyncError;
use crate::agent::connection::{Connection, Receiver, Sender};

/// Messages that wait in one direction of a link; extents are 1 MiB each.
pub const LINK_QUEUE_MESSAGES_MAX: usize = 8;

/// One end of a channel: sends `Out`, receives `In`.
#[derive(Debug)]
pub struct Link<Out, In> {
    pub outgoing: Outgoing<Out>,
    pub incoming: Incoming<In>,
}

/// The sending half.
#[derive(Debug)]
pub struct Outgoing<Out> {
    channel: &'static str,
    sender: mpsc::Sender<Out>,
}

/// The receiving half. `Err` is why the transport ended; nothing comes after it.
#[derive(Debug)]
pub struct Incoming<In> {
    channel: &'static str,
    receiver: mpsc::Receiver<Result<In, String>>,
}

/// The other side of a link's queues, for the task that owns the connection.
#[derive(Debug)]
pub struct Pump<Out, In> {
    /// What is to be written to the connection; ends when the link is dropped.
    pub to_write: mpsc::Receiver<Out>,
    /// What was read from it.
    pub was_read: mpsc::Sender<Result<In, String>>,
}

impl<Out, In> Link<Out, In> {
    /// A link named `channel` in errors, and what its transport needs.
    #[must_use]
    pub fn new(channel: &'static str) -> (Link<Out, In>, Pump<Out, In>) {
        let (sender, to_write) = mpsc::channel(LINK_QUEUE_MESSAGES_MAX);
        let (was_read, receiver) = mpsc::channel(LINK_QUEUE_MESSAGES_MAX);
        let link = Link { outgoing: Outgoing { channel, sender }, incoming: Incoming { channel, receiver } };
        (link, Pump { to_write, was_read })
    }
}

impl<Out: Send + 'static, In: Send + 'static> Link<Out, In> {
    /// Both ends of a channel within this process. Must be called within a runtime.
    #[must_use]
    pub fn pair(channel: &'static str) -> (Link<Out, In>, Link<In, Out>) {
        let (near, near_pump) = Link::new(channel);
        let (far, far_pump) = Link::new(channel);
        tokio::spawn(carry(near_pump.to_write, far_pump.was_read));
        tokio::spawn(carry(far_pump.to_write, near_pump.was_read));
        (near, far)
    }
}

async fn carry<M>(mut from: mpsc::Receiver<M>, to: mpsc::Sender<Result<M, String>>) {
    loop {
        let message = tokio::select! {
            message = from.recv() => message,
            () = to.closed() => None,
        };
        let Some(message) = message else { return };
        if to.send(Ok(message)).await.is_err() {
            return;
        }
    }
}

impl<Out> Outgoing<Out> {
    /// Waits until there is room in the queue.
    pub async fn send(&self, message: Out) -> Result<(), SyncError> {
        self.sender.send(message).await.map_err(|_| self.closed())
    }

    /// Room for one message. May be dropped while it waits.
    pub async fn reserve(&self) -> Result<mpsc::Permit<'_, Out>, SyncError> {
        self.sender.reserve().await.map_err(|_| self.closed())
    }

    fn closed(&self) -> SyncError {
        SyncError::Closed { channel: self.channel, reason: "it does not take messages any more".into() }
    }
}

impl<In> Incoming<In> {
    /// The next message; `None` when the peer ended the channel in an orderly way. May be dropped while it waits.
    pub async fn receive(&mut self) -> Result<Option<In>, SyncError> {
        match self.receiver.recv().await {
            Some(Ok(message)) => Ok(Some(message)),
            Some(Err(reason)) => Err(SyncError::Closed { channel: self.channel, reason }),
            None => Ok(None),
        }
    }

    /// The next message; the end of the channel is an error.
    pub async fn expect(&mut self) -> Result<In, SyncError> {
        let message = self.receive().await?;
        message.ok_or(SyncError::Closed { channel: self.channel, reason: "the other node closed it".into() })
    }
}

impl<Out: Message + Send + Sync + 'static, In: Message + Send + 'static> Link<Out, In> {
    /// A link over a connection behind its HELLO. Must be called within a runtime; the connection ends with the link.
    #[must_use]
    pub fn over(channel: &'static str, connection: Connection) -> Link<Out, In> {
        let (link, pump) = Link::new(channel);
        let (sender, receiver) = connection.split();
        tokio::spawn(write_all(pump.to_write, sender));
        tokio::spawn(read_all(receiver, pump.was_read));
        link
    }
}

async fn write_all<M: Message>(mut messages: mpsc::Receiver<M>, mut sender: Sender) {
    while let Some(message) = messages.recv().await {
        let mut written = sender.feed(&message).await;
        // One flush for what waits already.
        while written.is_ok()
            && let Ok(message) = messages.try_recv()
        {
            written = sender.feed(&message).await;
        }
        if written.is_ok() {
            written = sender.flush().await;
        }
        if let Err(error) = written {
            // The reading side reports why the connection ended.
            tracing::debug!(%error, "a channel can not be written any more");
            return;
        }
    }
}

async fn read_all<M: Message>(mut receiver: Receiver, messages: mpsc::Sender<Result<M, String>>) {
    loop {
        let message = tokio::select! {
            message = receiver.receive::<M>() => message,
            () = messages.closed() => return,
        };
        let last = match message {
            Ok(Some(message)) => messages.send(Ok(message)).await,
            Ok(None) => return,
            Err(error) => {
                let _ = messages.send(Err(error.to_string())).await;
                return;
            }
        };
        if last.is_err() {
            return;
        }
    }
}
