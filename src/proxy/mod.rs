//! The daemon that speaks PostgreSQL's protocol to clients.
//!
//! It takes its folder's lock, binds its port, raises a new epoch ([`reign`]) or waits until it may ([`wait`]), then serves: sessions on threads of their own
//! ([`threads`]), commands on `control.sock` ([`control`]), and a watch over the servers ([`keeper`]).

use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;

use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

use crate::agent::tls::{Identity, TlsError};
use crate::cluster::members;
use crate::config::Config;
use crate::proxy::service_name::ServiceName;
use crate::replicate::hub::{Hub, Reign};
use crate::session::tls::{ClientTls, ClientTlsError};

pub mod admin;
pub mod control;
pub mod keeper;
mod leases;
pub mod local_rules;
pub mod reign;
mod service_name;
mod settle;
mod takeover;
pub mod threads;
mod wait;

/// Name of the lock in the proxy's folder.
const LOCK_NAME: &str = "proxy.lock";

#[derive(Debug, thiserror::Error)]
pub enum ProxyError {
    #[error("the proxy's certificate can not be used: {0}")]
    Tls(#[from] TlsError),
    #[error("the proxy can not speak TLS with clients: {0}")]
    ClientTls(#[from] ClientTlsError),
    #[error(
        "the proxy can not listen on {address}: {source}. Another program uses the port: find it with \
         'ss -ltnp sport = :{port}', or change proxy.listen",
        port = .address.port()
    )]
    Listen { address: SocketAddr, source: io::Error },
    #[error("another proxy runs with the folder {dir}: stop it first ({source})")]
    Locked { dir: PathBuf, source: io::Error },
    #[error(transparent)]
    Reign(#[from] reign::ReignError),
    #[error("control.sock can not be served: {0}")]
    Control(#[from] control::server::ControlError),
    #[error("fence.dns can not be asked for: {0}. Look at /etc/resolv.conf, or set fence.dns_servers")]
    ServiceName(#[from] hickory_resolver::net::NetError),
    #[error("{what}: {source}")]
    Io { what: &'static str, source: io::Error },
    #[error(
        "the proxy listens on {listen}, beyond this host, while pg_hba.conf lets clients in without a password over the unix \
         socket: {line}. Change that line to scram-sha-256, or listen on 127.0.0.1"
    )]
    OpenDoor { listen: SocketAddr, line: String },
}

/// Runs the proxy until SIGTERM or SIGINT.
///
/// # Errors
/// If it can not start: port, certificate, another proxy, or a member that does not agree.
pub async fn run(config: Config) -> Result<(), ProxyError> {
    let config = Arc::new(config);
    let identity = identity(&config)?;
    let tls = ClientTls::load(&config.proxy)?.map(Arc::new);
    let _lock = lock(&config.proxy.state_dir)?;
    let address = config.proxy.listen;
    let listener = TcpListener::bind(address).await.map_err(|source| ProxyError::Listen { address, source })?;
    let io = |what| move |source| ProxyError::Io { what, source };
    let mut terminate = signal(SignalKind::terminate()).map_err(io("signals can not be watched"))?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(io("signals can not be watched"))?;
    let hub = Arc::new(Hub::new(Arc::clone(&config), identity, members::first(&config.proxy.node)));
    let stop = CancellationToken::new();
    let name = ServiceName::new(&config)?.map(|name| {
        name.begin(&hub);
        tokio::spawn(name.watch(Arc::clone(&hub), stop.clone()))
    });
    // Before anything is served: a proxy that waits says why.
    let control = tokio::spawn(control::daemon::run(Arc::clone(&hub), stop.clone()));
    let mut control = std::pin::pin!(control);
    let waited = tokio::select! {
        waited = wait::until_served(&hub, &listener, tls.as_ref()) => waited.map(|()| true).map_err(ProxyError::from),
        _ = terminate.recv() => Ok(false),
        _ = interrupt.recv() => Ok(false),
        ended = &mut control => control_ended(ended).map(|()| false),
    };
    if !waited? {
        return Ok(());
    }
    local_rules::check(&hub).await?;
    let threads = threads::start(&hub, tls.as_ref(), &stop).map_err(io("threads can not be started"))?;
    let leases = tokio::spawn(leases::run(Arc::clone(&hub), stop.clone()));
    let keeper = tokio::spawn(keeper::run(Arc::clone(&hub), stop.clone()));
    tracing::info!(%address, set = ?hub.view().set, "serving");
    let result = loop {
        tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok((client, _)) => threads.give(client),
                Err(e) => {
                    // Out of file descriptors, for example: clients wait in the queue of the kernel meanwhile.
                    tracing::warn!(error = %e, "a client could not be accepted");
                    tokio::time::sleep(std::time::Duration::from_millis(10)).await;
                }
            },
            _ = terminate.recv() => break Ok(()),
            _ = interrupt.recv() => break Ok(()),
            ended = &mut control => break control_ended(ended),
        }
    };
    hub.reign.send_replace(Reign::Stopping);
    stop.cancel();
    let _ = tokio::join!(keeper, leases);
    if let Some(name) = name {
        let _ = name.await;
    }
    if result.is_ok() {
        // Recoveries end in order: their nodes are told, their backlogs dropped.
        let _ = control.await;
    }
    threads.join();
    result
}

fn control_ended(
    ended: Result<Result<(), control::server::ControlError>, tokio::task::JoinError>,
) -> Result<(), ProxyError> {
    Ok(ended.map_err(|e| ProxyError::Io { what: "control.sock", source: e.into() })??)
}

/// The proxy's own certificate, or that of the node on whose host it runs: either may ask every agent.
fn identity(config: &Config) -> Result<Identity, TlsError> {
    Identity::load(&config.proxy.state_dir).or_else(|error| {
        let node = config.node(&config.proxy.node).ok_or(error)?;
        Identity::load(&node.state_dir)
    })
}

/// One proxy per folder. The lock ends with the process, however that ends.
fn lock(dir: &std::path::Path) -> Result<std::fs::File, ProxyError> {
    let refused = |source| ProxyError::Locked { dir: dir.to_owned(), source };
    let file = std::fs::OpenOptions::new()
        .create(true)
        .truncate(false)
        .write(true)
        .open(dir.join(LOCK_NAME))
        .map_err(|source| ProxyError::Io { what: "the proxy's lock can not be opened", source })?;
    rustix::fs::flock(&file, rustix::fs::FlockOperation::NonBlockingLockExclusive).map_err(|e| refused(e.into()))?;
    Ok(file)
}
