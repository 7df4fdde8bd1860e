//! Tunnels to the local PostgreSQL, each opened under an epoch, and how a newer epoch cuts them.
//!
//! Order that makes the cut complete: a tunnel registers, then looks at the promised epoch; a promise is stored,
//! then registered tunnels are cut. Whichever is first, no older tunnel is left.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use pgtandem_proto::membership::Epoch;
use tokio::io::AsyncWriteExt;
use tokio::net::UnixStream;
use tokio::sync::watch;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use super::connection::BoxedCarrier;
use crate::config::NodeConfig;

/// Tunnels of one node at a time.
pub const TUNNELS_MAX: usize = 512;
/// Longest wait until tunnels that were cut are gone, milliseconds. They only have to drop two sockets.
const CUT_MS_MAX: u64 = 5_000;
/// Bytes that a tunnel holds in each direction.
const BUFFER_BYTES: usize = 64 * 1024;

#[derive(Default)]
struct Open {
    tunnels: HashMap<u64, (Epoch, CancellationToken)>,
    next: u64,
}

/// All tunnels of this node. Cheap to clone.
#[derive(Clone)]
pub struct Tunnels {
    open: Arc<Mutex<Open>>,
    /// Changes whenever a tunnel is gone.
    gone: Arc<watch::Sender<()>>,
}

impl Default for Tunnels {
    fn default() -> Tunnels {
        Tunnels { open: Arc::default(), gone: Arc::new(watch::Sender::new(())) }
    }
}

/// A registered tunnel; its end is the drop of this.
pub struct Registered {
    tunnels: Tunnels,
    id: u64,
    cut: CancellationToken,
}

impl Tunnels {
    /// None: there are [`TUNNELS_MAX`] already. The caller looks at the promised epoch next.
    #[must_use]
    pub fn register(&self, epoch: Epoch) -> Option<Registered> {
        let mut open = self.lock();
        if open.tunnels.len() >= TUNNELS_MAX {
            return None;
        }
        let id = open.next;
        open.next += 1;
        let cut = CancellationToken::new();
        open.tunnels.insert(id, (epoch, cut.clone()));
        Some(Registered { tunnels: self.clone(), id, cut })
    }

    /// Ends every tunnel of an epoch below `epoch` (None: every one); returns when they are gone, with their number,
    /// or with how many still are there when the limit is reached.
    pub async fn cut(&self, epoch: Option<Epoch>) -> Result<usize, usize> {
        let mut gone = self.gone.subscribe();
        let below = |tunnel: Epoch| epoch.is_none_or(|epoch| tunnel < epoch);
        let cut = self.lock().tunnels.values().filter(|(of, _)| below(*of)).map(|(_, cut)| cut.cancel()).count();
        let left = || self.lock().tunnels.values().filter(|(of, cut)| below(*of) && cut.is_cancelled()).count();
        let all_gone = gone.wait_for(|()| left() == 0);
        match timeout(Duration::from_millis(CUT_MS_MAX), all_gone).await {
            Ok(_) => Ok(cut),
            Err(_) => Err(left()),
        }
    }

    #[cfg(test)]
    fn count(&self) -> usize {
        self.lock().tunnels.len()
    }

    fn lock(&self) -> MutexGuard<'_, Open> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Registered {
    /// Returns when it is to end.
    pub async fn is_cut(&self) {
        self.cut.cancelled().await;
    }

    /// Forwards both ways until one side ends or the tunnel is cut.
    pub async fn forward(self, mut carrier: BoxedCarrier, early: &[u8], mut server: UnixStream) {
        let copy = async {
            server.write_all(early).await?;
            tokio::io::copy_bidirectional_with_sizes(&mut carrier, &mut server, BUFFER_BYTES, BUFFER_BYTES).await
        };
        tokio::select! {
            biased;
            () = self.cut.cancelled() => tracing::info!("a tunnel was cut"),
            ended = copy => if let Err(error) = ended { tracing::debug!(%error, "a tunnel ended") },
        }
        // Both sockets are closed before `self` says that the tunnel is gone.
        drop(server);
        drop(carrier);
    }
}

impl Drop for Registered {
    fn drop(&mut self) {
        self.tunnels.lock().tunnels.remove(&self.id);
        self.tunnels.gone.send_replace(());
    }
}

/// PostgreSQL's socket of a node.
#[must_use]
pub fn socket_path(node: &NodeConfig) -> PathBuf {
    node.socket_dir.join(format!(".s.PGSQL.{}", node.port))
}

#[cfg(test)]
mod tests {
    use tokio::io::AsyncReadExt;

    use super::*;

    #[tokio::test]
    async fn a_newer_epoch_cuts_older_tunnels_only() {
        let tunnels = Tunnels::default();
        let open = |epoch| {
            let registered = tunnels.register(epoch).unwrap();
            let (near, far) = tokio::io::duplex(64);
            let (server, backend) = UnixStream::pair().unwrap();
            tokio::spawn(registered.forward(Box::new(far), b"early", server));
            (near, backend)
        };
        let (_client, mut backend) = open(3);
        let (mut kept, mut kept_backend) = open(4);
        assert_eq!(tunnels.cut(Some(4)).await, Ok(1));
        let mut received = Vec::new();
        // It ends, with or without what came early.
        backend.read_to_end(&mut received).await.unwrap();
        kept.write_all(b"x").await.unwrap();
        let mut bytes = [0; 6];
        kept_backend.read_exact(&mut bytes).await.unwrap();
        assert_eq!(&bytes, b"earlyx");
        assert_eq!(tunnels.count(), 1);
        assert_eq!(tunnels.cut(None).await, Ok(1));
        assert_eq!(tunnels.count(), 0);
    }
}
