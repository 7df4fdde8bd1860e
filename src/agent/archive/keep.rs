//! The receiving end of an archive channel: keeps a copy of a peer's archive in a folder of the peer's name.
//!
//! What arrives is checked whole before it gets its name; what has a name here is never written over. The caller's name is the one in
//! its certificate, so a node can reach its own folder only.

use std::collections::BTreeSet;
use std::path::PathBuf;

use pgtandem_proto::message::{
    ARCHIVE_DATA_BYTES_MAX, ARCHIVE_EXTENTS_MAX, ARCHIVE_NAMES_MAX, ArchiveReply, ArchiveRequest, EXTENT_BYTES,
    Failure, FailureCode,
};

use super::super::connection::{Connection, ConnectionError};
use super::super::node::Node;
use super::blocking;
use crate::archive::file::Arriving;
use crate::archive::manifest::{MANIFEST_BYTES_MAX, Manifest};
use crate::archive::names::ArchivePath;
use crate::archive::push::SEGMENT_BYTES_MAX;
use crate::archive::{ArchiveError, base, inventory};
use crate::config::Peers;

/// What compression may add to a file, bytes, and a part of it as a shift.
const SLACK_BYTES: u64 = 4096;
const SLACK_SHIFT: u32 = 7;

/// The folder for the archive of `peer`, if this node keeps one.
pub(in crate::agent) fn folder(node: &Node, peer: &str) -> Result<PathBuf, Failure> {
    let refuse = |what: String, hint: &str| Failure { code: FailureCode::WrongState, what, hint: hint.to_owned() };
    if node.other(peer).is_none() {
        return Err(refuse(format!("{peer} is no other node"), "only nodes have archives"));
    }
    if node.cluster.archive.as_ref().is_none_or(|settings| settings.peers == Peers::None) {
        let what = format!("node {} keeps no archives of its peers", node.config.name);
        return Err(refuse(what, "use the same configuration on all hosts, and restart its agent"));
    }
    Ok(node.config.archive_dir().join(peer))
}

/// Serves the channel until the caller ends it.
pub(in crate::agent) async fn serve(mut connection: Connection, folder: PathBuf) -> Result<(), ConnectionError> {
    while let Some(request) = connection.receive::<ArchiveRequest>().await? {
        let reply = match request {
            ArchiveRequest::Put { path, bytes } => put(&mut connection, &folder, &path, bytes).await?,
            request => answer(&mut connection, folder.clone(), request).await?,
        };
        let reply = reply.unwrap_or_else(|error| ArchiveReply::Failed(error.failure()));
        connection.send(&reply).await?;
        if let ArchiveReply::Failed(failure) = reply {
            tracing::error!(peer = connection.peer(), what = failure.what, "a peer's archive could not be kept");
            return Ok(());
        }
    }
    Ok(())
}

fn wrong(what: impl Into<String>) -> ArchiveError {
    ArchiveError::refused(
        format!("the peer broke the agent protocol: {}", what.into()),
        "install the same version of pgtandem on all hosts",
    )
}

fn parse(path: &str) -> Result<ArchivePath, ArchiveError> {
    ArchivePath::parse(path)
        .ok_or_else(|| wrong(format!("{:?} is no file of an archive", path.chars().take(100).collect::<String>())))
}

async fn answer(
    connection: &mut Connection,
    folder: PathBuf,
    request: ArchiveRequest,
) -> Result<Result<ArchiveReply, ArchiveError>, ConnectionError> {
    Ok(match request {
        ArchiveRequest::List => match blocking(move || list(&folder)).await {
            Ok(paths) => {
                let mut frames = paths.chunks(ARCHIVE_NAMES_MAX).peekable();
                let mut reply = ArchiveReply::Names { paths: Vec::new(), last: true };
                while let Some(paths) = frames.next() {
                    reply = ArchiveReply::Names { paths: paths.to_vec(), last: frames.peek().is_none() };
                    if frames.peek().is_some() {
                        connection.send(&reply).await?;
                    }
                }
                Ok(reply)
            }
            Err(error) => Err(error),
        },
        ArchiveRequest::Missing { extents } if extents.len() <= ARCHIVE_EXTENTS_MAX => {
            let work = move || {
                let missing: BTreeSet<_> = base::missing(&folder, &extents).into_iter().collect();
                let places =
                    (0_u32..).zip(&extents).filter(|(_, hash)| missing.contains(*hash)).map(|(place, _)| place);
                Ok(places.collect::<Vec<u32>>())
            };
            blocking(work).await.map(|places| ArchiveReply::Missing { places })
        }
        ArchiveRequest::Remove { paths } if paths.len() <= ARCHIVE_NAMES_MAX => {
            let work = move || {
                let paths = paths.iter().map(|path| parse(path)).collect::<Result<Vec<_>, _>>()?;
                // Extents go with the copies that name them.
                if paths.iter().any(|path| matches!(path, ArchivePath::Extent(_))) {
                    return Err(wrong("it removes extents"));
                }
                super::remove(&folder, &paths)
            };
            blocking(work).await.map(|()| ArchiveReply::Removed)
        }
        ArchiveRequest::Missing { .. } | ArchiveRequest::Remove { .. } => Err(wrong("a request is too long")),
        ArchiveRequest::Data { .. } | ArchiveRequest::Put { .. } => Err(wrong("data came that were not announced")),
    })
}

fn list(folder: &std::path::Path) -> Result<Vec<String>, ArchiveError> {
    let mut paths = Vec::new();
    for stream in inventory::streams(folder)? {
        paths.extend(stream.wal.iter().map(|name| ArchivePath::Wal(stream.name, *name).to_string()));
        paths.extend(stream.bases.iter().map(|name| ArchivePath::Base(stream.name, *name).to_string()));
    }
    Ok(paths)
}

/// Takes a file that was announced. The outer error ends the connection: what is left of the file would be taken for requests.
async fn put(
    connection: &mut Connection,
    folder: &std::path::Path,
    path: &str,
    bytes: u64,
) -> Result<Result<ArchiveReply, ArchiveError>, ConnectionError> {
    let begin = || {
        let path = parse(path)?;
        let content_max = match path {
            ArchivePath::Wal(..) => SEGMENT_BYTES_MAX,
            ArchivePath::Base(..) => MANIFEST_BYTES_MAX,
            ArchivePath::Extent(_) => EXTENT_BYTES as u64,
        };
        if bytes > content_max + (content_max >> SLACK_SHIFT) + SLACK_BYTES {
            return Err(wrong(format!("{path} is to have {bytes} bytes")));
        }
        Ok((path, content_max, path.below(folder)))
    };
    let (path, content_max, place) = match begin() {
        Ok(begun) => begun,
        Err(error) => return Ok(Err(error)),
    };
    let mut arriving = match blocking(move || Arriving::begin(&place)).await {
        Ok(arriving) => arriving,
        Err(error) => return Ok(Err(error)),
    };
    let mut missing = bytes;
    while missing > 0 {
        let ArchiveRequest::Data { bytes } = connection.expect().await? else {
            return Ok(Err(wrong("a file was not finished")));
        };
        if bytes.is_empty() || bytes.len() > ARCHIVE_DATA_BYTES_MAX || bytes.len() as u64 > missing {
            return Ok(Err(wrong("a file came in pieces of the wrong length")));
        }
        missing -= bytes.len() as u64;
        let written = blocking(move || {
            arriving.write(&bytes)?;
            Ok(arriving)
        });
        arriving = match written.await {
            Ok(arriving) => arriving,
            Err(error) => return Ok(Err(error)),
        };
    }
    let folder = folder.to_owned();
    let finish = move || {
        match path {
            ArchivePath::Wal(..) => {}
            ArchivePath::Extent(hash) => {
                if arriving.head()?.hash != hash {
                    return Err(wrong(format!("{path} has another content than its name says")));
                }
            }
            // There is no copy here before all of it is.
            ArchivePath::Base(..) => {
                let manifest = Manifest::load(arriving.new_path())?;
                let missing = base::missing(&folder, &manifest.hashes().collect::<Vec<_>>());
                if !missing.is_empty() {
                    return Err(wrong(format!("{path} names {} extents that did not come", missing.len())));
                }
            }
        }
        arriving.finish(content_max)
    };
    Ok(blocking(finish).await.map(|_| ArchiveReply::Stored))
}
