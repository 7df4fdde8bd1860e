//! A client's first packets: requests for encryption, then a cancel or the start of a session.
//!
//! What came before a TLS handshake is never taken for what came inside it (CVE-2021-23222): a request for TLS must be the last
//! byte that was sent, and nothing is read between our answer to it and the handshake.

use std::sync::atomic::Ordering;

use bytes::BytesMut;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::pg::build::ClientError;
use crate::pg::startup::{self, SessionStart, Startup};
use crate::replicate::hub::Hub;
use crate::session::cancel;
use crate::session::tls::{ALPN, ClientTls};
use crate::session::transport::ClientStream;

/// Requests for encryption before the session: TLS and GSSAPI, each once.
const ENCRYPTION_REQUESTS_MAX: usize = 2;
/// First byte of a TLS handshake, and of no packet of PostgreSQL's: their lengths begin with a zero (`backend_startup.c`).
const TLS_HANDSHAKE: u8 = 0x16;

/// A client that wants a session.
pub struct Greeted {
    pub client: ClientStream,
    pub start: SessionStart,
    /// What it sent after its first packet.
    pub rest: BytesMut,
}

/// Why there is no session.
enum Refused {
    /// Nothing more to say: the client left, or its handshake failed and it knows why.
    Gone,
    Told(ClientStream, ClientError),
}

/// Reads up to the start of a session. `None`: nothing more to do; a client that was refused has been told.
pub async fn greet(client: TcpStream, hub: &Hub, tls: Option<&ClientTls>) -> Option<Greeted> {
    let refused = match encrypt(client, tls).await {
        Ok((client, packet, rest)) => match start_of(packet, &client, hub).await {
            Ok(start) => return start.map(|start| Greeted { client, start, rest }),
            Err(error) => Refused::Told(client, error),
        },
        Err(refused) => refused,
    };
    if let Refused::Told(mut client, error) = refused {
        tell(&mut client, &error).await;
    }
    None
}

/// Says why, as the last thing.
pub async fn tell(client: &mut ClientStream, error: &ClientError) {
    let mut out = BytesMut::new();
    error.write(&mut out);
    if client.write_all(&out).await.is_ok() && client.flush().await.is_ok() {
        client.close().await;
    }
}

/// The stream as the session will have it, the first packet that does not ask for encryption, and what follows it.
async fn encrypt(mut client: TcpStream, tls: Option<&ClientTls>) -> Result<(ClientStream, Startup, BytesMut), Refused> {
    let mut input = BytesMut::with_capacity(1024);
    if let Some(tls) = tls {
        let mut first = [0];
        if !matches!(client.peek(&mut first).await, Ok(1)) {
            return Err(Refused::Gone);
        }
        if first[0] == TLS_HANDSHAKE {
            return first_inside(handshake(client, tls, true).await?).await;
        }
    }
    for _ in 0..=ENCRYPTION_REQUESTS_MAX {
        let packet = match packet(&mut client, &mut input).await {
            Ok(packet) => packet.ok_or(Refused::Gone)?,
            Err(error) => return Err(Refused::Told(ClientStream::Plain(client), error)),
        };
        match (packet, tls) {
            (Startup::Tls, Some(_)) if !input.is_empty() => {
                let error = ClientError::fatal(
                    "08P01",
                    "received unencrypted data after SSL request",
                    "This is a bug of the client, or somebody between it and the proxy changes what it sends.",
                );
                return Err(Refused::Told(ClientStream::Plain(client), error));
            }
            (Startup::Tls, Some(tls)) => {
                client.write_all(b"S").await.map_err(|_| Refused::Gone)?;
                return first_inside(handshake(client, tls, false).await?).await;
            }
            (Startup::Tls | Startup::Gssapi, _) => client.write_all(b"N").await.map_err(|_| Refused::Gone)?,
            (packet, _) => return Ok((ClientStream::Plain(client), packet, input)),
        }
    }
    Err(Refused::Gone)
}

/// `direct`: without a request before it, for which the client must name the protocol in ALPN, as PostgreSQL 17 wants it.
async fn handshake(client: TcpStream, tls: &ClientTls, direct: bool) -> Result<ClientStream, Refused> {
    match tls.acceptor().accept(client).await {
        Ok(stream) if direct && stream.get_ref().1.alpn_protocol() != Some(ALPN) => {
            tracing::info!("a client began with TLS and did not ask for PostgreSQL's protocol in ALPN");
            Err(Refused::Gone)
        }
        Ok(stream) => Ok(ClientStream::Tls(Box::new(stream))),
        Err(error) => {
            tracing::info!(%error, "a TLS handshake with a client failed");
            Err(Refused::Gone)
        }
    }
}

/// The first packet inside TLS; a request for encryption has no place there.
async fn first_inside(mut client: ClientStream) -> Result<(ClientStream, Startup, BytesMut), Refused> {
    let mut input = BytesMut::with_capacity(1024);
    match packet(&mut client, &mut input).await {
        Ok(Some(packet)) => Ok((client, packet, input)),
        Ok(None) => Err(Refused::Gone),
        Err(error) => Err(Refused::Told(client, error)),
    }
}

/// `None`: the client left.
async fn packet(client: &mut (impl AsyncRead + Unpin), input: &mut BytesMut) -> Result<Option<Startup>, ClientError> {
    loop {
        let packet = startup::take(input).map_err(|e| {
            tracing::info!(error = %e, "a client did not speak PostgreSQL's protocol");
            ClientError::fatal("08P01", format!("invalid startup packet: {e}"), "Connect with a PostgreSQL client.")
        })?;
        if packet.is_some() {
            return Ok(packet);
        }
        if !matches!(client.read_buf(input).await, Ok(n) if n > 0) {
            return Ok(None);
        }
    }
}

/// What the packet asks for. `None`: a cancel, which is done.
async fn start_of(packet: Startup, client: &ClientStream, hub: &Hub) -> Result<Option<SessionStart>, ClientError> {
    let start = match packet {
        Startup::Session(start) => start,
        Startup::Cancel { key } => {
            if let Err(e) = cancel::forward(hub, &key).await {
                tracing::info!(error = %e, "a cancel request could not be passed on");
            }
            return Ok(None);
        }
        Startup::Unsupported { code } => return Err(unsupported(code)),
        Startup::Tls => return Err(unsupported(startup::SSL_REQUEST)),
        Startup::Gssapi => return Err(unsupported(startup::GSSENC_REQUEST)),
    };
    if hub.config.proxy.tls_required && matches!(client, ClientStream::Plain(_)) {
        return Err(ClientError::fatal(
            "28000",
            "connections without TLS are not accepted (proxy.tls_required)",
            "Connect with sslmode=require, or better verify-full.",
        ));
    }
    if start.replication {
        return Err(ClientError::fatal(
            "0A000",
            "replication connections do not go through pgtandem",
            "Connect to the PostgreSQL server of a node directly.",
        ));
    }
    if start.user == "pgtandem" {
        return Err(ClientError::fatal("42501", "role pgtandem is for the proxy alone", "Connect as another role."));
    }
    if hub.counters.sessions.load(Ordering::Relaxed) >= hub.config.proxy.clients_max as u64 {
        let what = format!("sorry, too many clients already: {}", hub.config.proxy.clients_max);
        return Err(ClientError::fatal("53300", what, "Raise proxy.clients_max, or close connections."));
    }
    Ok(Some(start))
}

fn unsupported(code: u32) -> ClientError {
    let what = format!("unsupported frontend protocol {}.{}", code >> 16, code & 0xffff);
    ClientError::fatal("0A000", what, "Use protocol 3, as every client since PostgreSQL 7.4 does.")
}
