//! The sending end: brings what is in this node's archive, and not in a peer's copy of it, to the peer.
//!
//! Nothing is queued in memory: the archive itself is the queue. After each change of it, and after each new connection, what the peer has
//! is compared with what is here. The peer is asked what it has when connected, after each base copy and from time to time: `wal push` brings
//! segments to it as well, and retention, which works after a base copy, may remove one here before this end has seen it. What the peer has and this node has not is removed there only if retention, looking at both together, has
//! no use for it: an archive that was lost here is not lost there.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use bytes::Bytes;
use pgtandem_proto::hello::Channel;
use pgtandem_proto::message::{
    ARCHIVE_DATA_BYTES_MAX, ARCHIVE_EXTENTS_MAX, ARCHIVE_NAMES_MAX, ArchiveReply, ArchiveRequest,
};
use tokio::io::AsyncReadExt;
use tokio::time::{sleep, timeout};

use super::super::client::{self, ClientError};
use super::super::connection::{Connection, ConnectionError};
use super::super::node::Node;
use super::super::tls::Identity;
use super::{blocking, contents, now_s};
use crate::archive::manifest::Manifest;
use crate::archive::names::{ArchivePath, Hash};
use crate::archive::retention::{self, Copy};
use crate::archive::stream::Stream;
use crate::archive::{ArchiveError, inventory};
use crate::config::NodeConfig;

/// How often it is looked whether something is new, milliseconds.
const LOOK_MS: u64 = 500;
/// From then on the time of a folder's last change tells it from the next one.
const SETTLED_MS: u64 = 1_000;
/// Pause after a failure, milliseconds, doubled each time.
const RETRY_MS: u64 = 1_000;
const RETRY_MS_MAX: u64 = 10_000;
/// The peer is asked what it has after this at the latest, milliseconds: its disk is touched by others too.
const LIST_AGAIN_MS: u64 = 600_000;
/// Longest silence of a peer, milliseconds: it has to sync a file, or to look through a folder.
const SILENCE_MS_MAX: u64 = 60_000;

#[derive(Debug, thiserror::Error)]
pub enum ShipError {
    #[error(transparent)]
    Client(#[from] ClientError),
    #[error(transparent)]
    Connection(#[from] ConnectionError),
    #[error(transparent)]
    Archive(#[from] ArchiveError),
    #[error("{peer} did not keep it: {}", .failure.what)]
    Peer { peer: String, failure: pgtandem_proto::message::Failure },
    #[error("{peer} was silent for {SILENCE_MS_MAX} ms")]
    Silent { peer: String },
    #[error("{peer} answered with something else")]
    Unexpected { peer: String },
}

/// One archive channel to a peer.
struct Shipping {
    connection: Connection,
    folder: PathBuf,
}

/// What the peer is known to have, as of when.
struct Listed {
    there: BTreeSet<ArchivePath>,
    at: Instant,
    /// The base copies that were here then.
    bases: BTreeSet<ArchivePath>,
}

/// Brings one file to a peer, and returns when it is on the peer's disk.
pub async fn send_to(
    identity: &Identity,
    peer: &NodeConfig,
    folder: &Path,
    path: ArchivePath,
) -> Result<(), ShipError> {
    let connection = client::connect(identity, peer, Channel::Archive).await?;
    Shipping { connection, folder: folder.to_owned() }.put(path).await
}

/// Keeps the copy at `peer` complete, for as long as the agent runs.
pub(super) async fn run(node: &Arc<Node>, peer: &NodeConfig) {
    let mut pause_ms = RETRY_MS;
    loop {
        match follow(node, peer, &mut pause_ms).await {
            // Peers are away for many reasons, and that is known from elsewhere.
            Err(ShipError::Client(error)) => tracing::debug!(peer = peer.name, %error, "the archive is not sent"),
            Err(error) => tracing::error!(peer = peer.name, %error, "the archive could not be sent; it is tried again"),
            Ok(never) => match never {},
        }
        sleep(Duration::from_millis(pause_ms)).await;
        pause_ms = (pause_ms * 2).min(RETRY_MS_MAX);
    }
}

async fn follow(
    node: &Arc<Node>,
    peer: &NodeConfig,
    pause_ms: &mut u64,
) -> Result<std::convert::Infallible, ShipError> {
    let folder = node.own_archive();
    let connection = client::connect(&node.identity, peer, Channel::Archive).await?;
    let mut shipping = Shipping { connection, folder: folder.clone() };
    let mut listed = None;
    let mut seen = None;
    loop {
        let looked = folder.clone();
        let now = blocking(move || changed_at(&looked)).await?;
        listed = listed.filter(|listed: &Listed| listed.at.elapsed() < Duration::from_millis(LIST_AGAIN_MS));
        if listed.is_none() || seen.as_ref() != Some(&now) {
            listed = Some(shipping.round(node, listed).await?);
            *pause_ms = RETRY_MS;
            // A change in the same tick of the clock would not show.
            let settled = |at: &SystemTime| at.elapsed().is_ok_and(|since| since > Duration::from_millis(SETTLED_MS));
            seen = Some(now).filter(|times| times.values().all(settled));
        }
        sleep(Duration::from_millis(LOOK_MS)).await;
    }
}

/// When each folder of WAL and base copies changed last. What comes while a round goes on makes another one.
fn changed_at(folder: &Path) -> Result<BTreeMap<PathBuf, SystemTime>, ArchiveError> {
    let mut times = BTreeMap::new();
    for stream in inventory::folders(folder)? {
        for part in [stream.join("wal"), stream.join("base")] {
            if let Ok(modified) = std::fs::metadata(&part).and_then(|metadata| metadata.modified()) {
                times.insert(part, modified);
            }
        }
    }
    Ok(times)
}

impl Shipping {
    async fn ask(&mut self, request: &ArchiveRequest) -> Result<ArchiveReply, ShipError> {
        self.connection.send(request).await?;
        self.answer().await
    }

    async fn answer(&mut self) -> Result<ArchiveReply, ShipError> {
        let peer = self.connection.peer().to_owned();
        match timeout(Duration::from_millis(SILENCE_MS_MAX), self.connection.expect()).await {
            Err(_) => Err(ShipError::Silent { peer }),
            Ok(Ok(ArchiveReply::Failed(failure))) => Err(ShipError::Peer { peer, failure }),
            Ok(reply) => Ok(reply?),
        }
    }

    fn unexpected(&self) -> ShipError {
        ShipError::Unexpected { peer: self.connection.peer().to_owned() }
    }

    async fn list(&mut self) -> Result<BTreeSet<ArchivePath>, ShipError> {
        let mut found = BTreeSet::new();
        self.connection.send(&ArchiveRequest::List).await?;
        loop {
            let ArchiveReply::Names { paths, last } = self.answer().await? else { return Err(self.unexpected()) };
            found.extend(paths.iter().filter_map(|path| ArchivePath::parse(path)));
            if last {
                return Ok(found);
            }
        }
    }

    /// Sends what is missing there, and lets go what nobody needs.
    async fn round(&mut self, node: &Node, listed: Option<Listed>) -> Result<Listed, ShipError> {
        let folder = self.folder.clone();
        let here = blocking(move || {
            let mut here = BTreeSet::new();
            for stream in inventory::streams(&folder)? {
                here.extend(stream.wal.iter().map(|name| ArchivePath::Wal(stream.name, *name)));
                here.extend(stream.bases.iter().map(|name| ArchivePath::Base(stream.name, *name)));
            }
            Ok(here)
        })
        .await?;
        let bases: BTreeSet<_> = here.iter().filter(|path| matches!(path, ArchivePath::Base(..))).copied().collect();
        let mut listed = match listed.filter(|listed| listed.bases == bases) {
            Some(listed) => listed,
            None => Listed { there: self.list().await?, at: Instant::now(), bases },
        };
        let there = &mut listed.there;
        // WAL sorts before the copies, which are of no use without it. What retention removes meanwhile is not sent.
        for path in here.difference(there).copied().collect::<Vec<_>>() {
            if let ArchivePath::Base(..) = path {
                let place = path.below(&self.folder);
                let manifest = match blocking(move || Manifest::load(&place)).await {
                    Ok(manifest) => manifest,
                    // `wal verify` says so; the others go on.
                    Err(error @ ArchiveError::Damaged { .. }) => {
                        tracing::error!(%error, "a base copy is not sent");
                        continue;
                    }
                    Err(error) if is_gone(&error) => continue,
                    Err(error) => return Err(error.into()),
                };
                let hashes: BTreeSet<Hash> = manifest.hashes().collect();
                match self.extents(&hashes.into_iter().collect::<Vec<_>>()).await {
                    Err(ShipError::Archive(error)) if is_gone(&error) => {
                        // The peer lets go the extents that came already, as no copy names them.
                        self.remove(&[path]).await?;
                        continue;
                    }
                    sent => sent?,
                }
            }
            match self.put(path).await {
                Err(ShipError::Archive(error)) if is_gone(&error) => {
                    if let ArchivePath::Base(..) = path {
                        self.remove(&[path]).await?;
                    }
                }
                put => {
                    put?;
                    there.insert(path);
                }
            }
        }
        let extra: BTreeSet<ArchivePath> = there.difference(&here).copied().collect();
        if extra.is_empty() {
            return Ok(listed);
        }
        let (folder, pgdata, keep, both) =
            (self.folder.clone(), node.config.pgdata.clone(), node.keep(), there.clone());
        let goes = blocking(move || Ok(useless(&folder, &pgdata, keep, &extra, &both))).await?;
        for paths in goes.chunks(ARCHIVE_NAMES_MAX) {
            self.remove(paths).await?;
            for path in paths {
                there.remove(path);
            }
        }
        Ok(listed)
    }

    /// Has the peer remove files, and with base copies what only they needed.
    async fn remove(&mut self, paths: &[ArchivePath]) -> Result<(), ShipError> {
        let request = ArchiveRequest::Remove { paths: paths.iter().map(ToString::to_string).collect() };
        match self.ask(&request).await? {
            ArchiveReply::Removed => Ok(()),
            _ => Err(self.unexpected()),
        }
    }

    async fn extents(&mut self, hashes: &[Hash]) -> Result<(), ShipError> {
        for part in hashes.chunks(ARCHIVE_EXTENTS_MAX) {
            let reply = self.ask(&ArchiveRequest::Missing { extents: part.to_vec() }).await?;
            let ArchiveReply::Missing { places } = reply else { return Err(self.unexpected()) };
            for place in places {
                let Some(hash) = part.get(place as usize) else { return Err(self.unexpected()) };
                self.put(ArchivePath::Extent(*hash)).await?;
            }
        }
        Ok(())
    }

    async fn put(&mut self, path: ArchivePath) -> Result<(), ShipError> {
        let place = path.below(&self.folder);
        let reading = || ArchiveError::file("reading", &place);
        let mut file = tokio::fs::File::open(&place).await.map_err(reading())?;
        let mut missing = file.metadata().await.map_err(reading())?.len();
        self.connection.send(&ArchiveRequest::Put { path: path.to_string(), bytes: missing }).await?;
        while missing > 0 {
            let mut buffer = vec![0; ARCHIVE_DATA_BYTES_MAX.min(usize::try_from(missing).unwrap_or(usize::MAX))];
            // Its length does not change once it has its name.
            file.read_exact(&mut buffer).await.map_err(reading())?;
            missing -= buffer.len() as u64;
            let data = ArchiveRequest::Data { bytes: Bytes::from(buffer) };
            let silent = ShipError::Silent { peer: self.connection.peer().to_owned() };
            let sent = self.connection.send(&data);
            timeout(Duration::from_millis(SILENCE_MS_MAX), sent).await.map_err(|_| silent)??;
        }
        match self.answer().await? {
            ArchiveReply::Stored => Ok(()),
            _ => Err(self.unexpected()),
        }
    }
}

fn is_gone(error: &ArchiveError) -> bool {
    matches!(error, ArchiveError::File { source, .. } if source.kind() == std::io::ErrorKind::NotFound)
}

/// Which of `extra`, that only the peer has, retention has no use for.
fn useless(
    folder: &Path,
    pgdata: &Path,
    keep: retention::Keep,
    extra: &BTreeSet<ArchivePath>,
    there: &BTreeSet<ArchivePath>,
) -> Vec<ArchivePath> {
    let Ok(own) = contents(folder) else { return Vec::new() };
    let mut copies = own.copies;
    let mut wal: BTreeMap<_, BTreeSet<_>> =
        own.wal.into_iter().map(|(stream, names)| (stream, names.into_iter().collect())).collect();
    for path in there {
        match path {
            ArchivePath::Base(stream, name) if extra.contains(path) => {
                copies.push(Copy { stream: *stream, name: *name, good: true });
            }
            ArchivePath::Wal(stream, name) => {
                wal.entry(*stream).or_default().insert(*name);
            }
            _ => {}
        }
    }
    let wal: Vec<_> = wal.into_iter().map(|(stream, names)| (stream, names.into_iter().collect())).collect();
    let current = Stream::of(pgdata).ok().map(|stream| stream.name());
    let plan = retention::plan(&copies, &wal, current, keep, now_s());
    let bases = plan.copies.into_iter().map(|(stream, name)| ArchivePath::Base(stream, name));
    let wal = plan.wal.into_iter().map(|(stream, name)| ArchivePath::Wal(stream, name));
    bases.chain(wal).filter(|path| extra.contains(path)).collect()
}
