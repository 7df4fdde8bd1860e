//! The threads that serve clients: each runs many sessions, and a session never leaves its thread.

use std::io;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::JoinHandle;

use tokio::net::TcpStream;
use tokio::sync::mpsc;
use tokio::task::LocalSet;
use tokio_util::sync::CancellationToken;

use crate::config::Config;
use crate::replicate::commit::Pool;
use crate::replicate::hub::Hub;
use crate::session::run::Thread;
use crate::session::start;
use crate::session::tls::ClientTls;

/// Stack of a thread that serves clients: PostgreSQL's parser and the walks over its trees are recursive, and a text may be
/// nested as deep as the parser takes it. Only what is used is ever backed by memory.
pub const STACK_BYTES: usize = 32 << 20;
/// Clients that wait for a thread to take them; more are turned away.
const WAITING_MAX: usize = 1024;

pub struct Threads {
    threads: Vec<(mpsc::Sender<std::net::TcpStream>, JoinHandle<()>)>,
    next: AtomicUsize,
}

/// How many threads serve clients.
#[must_use]
pub fn count(config: &Config) -> usize {
    match config.proxy.threads {
        // The leader's PostgreSQL has the rest of the host: with more threads than that both only switch more often.
        0 => std::thread::available_parallelism().map_or(1, |n| n.get().div_ceil(2)),
        n => n,
    }
}

/// Starts the threads.
///
/// # Errors
/// If the system refuses one.
pub fn start(hub: &Arc<Hub>, tls: Option<&Arc<ClientTls>>, stop: &CancellationToken) -> io::Result<Threads> {
    let count = count(&hub.config);
    let mut threads = Vec::with_capacity(count);
    for i in 0..count {
        let (sender, receiver) = mpsc::channel(WAITING_MAX);
        let (hub, tls, stop) = (Arc::clone(hub), tls.cloned(), stop.clone());
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let body = move || runtime.block_on(serve(hub, tls, count, receiver, stop));
        threads.push((
            sender,
            std::thread::Builder::new().name(format!("clients-{i}")).stack_size(STACK_BYTES).spawn(body)?,
        ));
    }
    Ok(Threads { threads, next: AtomicUsize::new(0) })
}

async fn serve(
    hub: Arc<Hub>,
    tls: Option<Arc<ClientTls>>,
    threads: usize,
    mut clients: mpsc::Receiver<std::net::TcpStream>,
    stop: CancellationToken,
) {
    let local = LocalSet::new();
    let thread = Thread { pool: Pool::of_one_of(threads), plans: Rc::default(), tls };
    let accept = local.run_until(async {
        while let Some(client) = clients.recv().await {
            match TcpStream::from_std(client) {
                Ok(client) => drop(tokio::task::spawn_local(start::serve(client, Arc::clone(&hub), thread.clone()))),
                Err(e) => tracing::warn!(error = %e, "a client could not be taken"),
            }
        }
    });
    tokio::select! {
        () = accept => {}
        () = stop.cancelled() => {}
    }
}

impl Threads {
    /// Gives a client to the next thread.
    pub fn give(&self, client: TcpStream) {
        let i = self.next.fetch_add(1, Ordering::Relaxed) % self.threads.len().max(1);
        let Some((sender, _)) = self.threads.get(i) else { return };
        let sent =
            client.into_std().map_err(|e| e.to_string()).and_then(|c| sender.try_send(c).map_err(|e| e.to_string()));
        if let Err(error) = sent {
            tracing::warn!(error, "a client was turned away");
        }
    }

    /// Waits for the threads after they were told to stop.
    pub fn join(self) {
        for (sender, thread) in self.threads {
            drop(sender);
            if thread.join().is_err() {
                tracing::error!("a thread that served clients ended with a panic");
            }
        }
    }
}
