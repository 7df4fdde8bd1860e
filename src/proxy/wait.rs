//! Before this proxy serves: it raises an epoch, or waits until it may, because another node or a person has to do something first.
//! So it takes over by itself after `pgtandem promote`, and stands by on every other host.
//!
//! Clients that come while it waits are told so at once, with the SQLSTATE at which libpq tries its next host.

use std::sync::Arc;
use std::time::Duration;

use tokio::net::TcpListener;
use tokio::sync::Semaphore;

use crate::cluster::start::Occasion;
use crate::observe::status::Problem;
use crate::proxy::reign::{self, ReignError};
use crate::replicate::hub::{Hub, Reign};
use crate::session::start;
use crate::session::tls::ClientTls;

/// Pause between two attempts to begin a reign.
const WAIT_MS: u64 = 500;
/// Clients that are told so at once; more wait in the kernel's queue.
const REFUSED_MAX: usize = 64;

/// Returns when an epoch of this proxy serves.
///
/// # Errors
/// Where waiting does not help.
pub async fn until_served(
    hub: &Arc<Hub>,
    listener: &TcpListener,
    tls: Option<&Arc<ClientTls>>,
) -> Result<(), ReignError> {
    let mut why: Option<Arc<Problem>> = None;
    loop {
        let raised = tokio::select! {
            raised = reign::raise(hub, Occasion::Start) => raised,
            () = refuse(hub, listener, tls, why.as_ref()) => continue,
        };
        let Err(error) = raised else { return Ok(()) };
        let Some(now) = error.waits_for() else { return Err(error) };
        if why.as_deref() != Some(&now) {
            tracing::warn!(next = now.hint, "no client is served here: {}", now.what);
        }
        let now = Arc::new(now);
        hub.reign.send_replace(Reign::Waiting(Arc::clone(&now)));
        tokio::select! {
            () = tokio::time::sleep(Duration::from_millis(WAIT_MS)) => {}
            () = refuse(hub, listener, tls, Some(&now)) => {}
        }
        why = Some(now);
    }
}

/// Tells every client why, for as long as this is polled; without a reason they wait in the kernel's queue.
async fn refuse(hub: &Arc<Hub>, listener: &TcpListener, tls: Option<&Arc<ClientTls>>, why: Option<&Arc<Problem>>) {
    let Some(why) = why else { return std::future::pending().await };
    let places = Arc::new(Semaphore::new(REFUSED_MAX));
    loop {
        // The semaphore is never closed.
        let Ok(place) = Arc::clone(&places).acquire_owned().await else { return };
        let Ok((client, _)) = listener.accept().await else {
            tokio::time::sleep(Duration::from_millis(WAIT_MS)).await;
            continue;
        };
        let (hub, tls, why) = (Arc::clone(hub), tls.cloned(), Arc::clone(why));
        tokio::spawn(async move {
            let _place = place;
            start::refuse(client, &hub, tls.as_deref(), &why).await;
        });
    }
}
