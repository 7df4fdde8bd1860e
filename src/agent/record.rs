//! The node's record on disk: JSON and a line with its BLAKE3, replaced whole, durable before anybody acts on it.
//!
//! What a change may be is judged in `cluster::record`. A torn, lost or foreign record means Blank, never `InSync`;
//! the bad file is kept beside it as `record.bad`.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use pgtandem_proto::membership::Record;

use crate::cluster::record as rules;

pub const FILE: &str = "record";
/// Longest record that is read, bytes.
const RECORD_BYTES_MAX: u64 = 4 << 20;

#[derive(Debug, thiserror::Error)]
pub enum RecordFileError {
    #[error("the record {path} can not be {doing}: {source}")]
    Io { path: PathBuf, doing: &'static str, source: io::Error },
    #[error("the record {path} is of node {found}, this is {expected}; restore the right state_dir")]
    OtherNode { path: PathBuf, found: String, expected: String },
}

/// The record in memory, which is always the one on disk.
pub struct RecordStore {
    folder: PathBuf,
    record: Record,
}

impl RecordStore {
    /// Reads it. What can not be believed is moved to `record.bad`, and the node is Blank.
    pub fn open(folder: &Path, cluster: &str, node: &str) -> Result<RecordStore, RecordFileError> {
        let path = folder.join(FILE);
        let blank = || RecordStore { folder: folder.to_owned(), record: rules::blank(cluster, node) };
        let bytes = match read(&path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(blank()),
            Err(source) => return Err(RecordFileError::Io { path, doing: "read", source }),
        };
        let Some(record) = decode(&bytes) else {
            tracing::error!(path = %path.display(), "the record is damaged: this node is Blank and has to be filled; kept as record.bad");
            fs::rename(&path, folder.join("record.bad")).map_err(|source| RecordFileError::Io {
                path,
                doing: "moved away",
                source,
            })?;
            return Ok(blank());
        };
        if record.cluster != cluster || record.node != node {
            return Err(RecordFileError::OtherNode {
                path,
                found: format!("{} of cluster {}", record.node, record.cluster),
                expected: format!("{node} of cluster {cluster}"),
            });
        }
        Ok(RecordStore { folder: folder.to_owned(), record })
    }

    #[must_use]
    pub fn record(&self) -> &Record {
        &self.record
    }

    /// Makes `record` durable, then current. On an error the old one stays current. Blocks for two fsyncs.
    pub fn replace(&mut self, record: Record) -> Result<(), RecordFileError> {
        let new = self.folder.join("record.new");
        let path = self.folder.join(FILE);
        let write = || -> io::Result<()> {
            let mut file = File::create(&new)?;
            file.write_all(&encode(&record)?)?;
            file.sync_all()?;
            fs::rename(&new, &path)?;
            File::open(&self.folder)?.sync_all()
        };
        write().map_err(|source| RecordFileError::Io { path: path.clone(), doing: "written", source })?;
        self.record = record;
        Ok(())
    }
}

/// The record in `folder`, for a process that is not its agent. `None`: there is none, or it can not be believed.
#[must_use]
pub fn peek(folder: &Path) -> Option<Record> {
    decode(&read(&folder.join(FILE)).ok()?)
}

fn read(path: &Path) -> io::Result<Vec<u8>> {
    use std::io::Read;
    let mut bytes = Vec::new();
    File::open(path)?.take(RECORD_BYTES_MAX).read_to_end(&mut bytes)?;
    Ok(bytes)
}

fn encode(record: &Record) -> io::Result<Vec<u8>> {
    let mut bytes = serde_json::to_vec_pretty(record)?;
    bytes.push(b'\n');
    let line = format!("blake3 {}\n", blake3::hash(&bytes).to_hex());
    bytes.extend_from_slice(line.as_bytes());
    Ok(bytes)
}

fn decode(bytes: &[u8]) -> Option<Record> {
    let text = bytes.strip_suffix(b"\n")?;
    let line = text.iter().rposition(|byte| *byte == b'\n')? + 1;
    let (body, line) = text.split_at_checked(line)?;
    let expected = format!("blake3 {}", blake3::hash(body).to_hex());
    if line != expected.as_bytes() {
        return None;
    }
    serde_json::from_slice(body).ok()
}

#[cfg(test)]
mod tests {
    use pgtandem_proto::membership::NodeState;

    use super::*;

    fn stored(folder: &Path) -> Record {
        let mut store = RecordStore::open(folder, "shop", "a").unwrap();
        let mut record = store.record().clone();
        record.promised = 7;
        record.state = NodeState::InSync;
        store.replace(record.clone()).unwrap();
        record
    }

    #[test]
    fn what_was_stored_is_there_after_a_restart() {
        let folder = tempfile::tempdir().unwrap();
        let record = stored(folder.path());
        assert_eq!(RecordStore::open(folder.path(), "shop", "a").unwrap().record(), &record);
    }

    #[test]
    fn every_torn_record_means_blank_and_is_kept() {
        let folder = tempfile::tempdir().unwrap();
        stored(folder.path());
        let path = folder.path().join(FILE);
        let whole = fs::read(&path).unwrap();
        for length in (0..whole.len()).step_by(7).chain([whole.len() - 1]) {
            fs::write(&path, &whole[..length]).unwrap();
            let store = RecordStore::open(folder.path(), "shop", "a").unwrap();
            assert_eq!(store.record().state, NodeState::Blank, "{length} bytes");
            assert!(folder.path().join("record.bad").exists());
        }
        let mut changed = whole;
        changed[20] ^= 1;
        fs::write(&path, &changed).unwrap();
        assert_eq!(RecordStore::open(folder.path(), "shop", "a").unwrap().record().state, NodeState::Blank);
    }

    #[test]
    fn the_record_of_another_node_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        stored(folder.path());
        assert!(matches!(RecordStore::open(folder.path(), "shop", "b"), Err(RecordFileError::OtherNode { .. })));
    }
}
