//! Which stream of WAL a data directory writes.
//!
//! Every node is a server of its own with WAL of its own, and all of them have one system identifier. A node that is filled goes on, from
//! the cut on, on the timeline after its source's; the next time it is filled it does so again, on a timeline of the same number
//! and with other bytes. So neither the node nor the timeline says whose WAL a segment is, and names of segments repeat. What
//! differs each time is the position at which the server left its source, and that stands in the history file of its timeline, which
//! PostgreSQL keeps in `pg_wal`. System identifier, timeline and history together are the stream.
//!
//! The generation of the node's data would not do: a new one begins with every node that leaves the set, while the leader's WAL
//! goes on without a break. Nor does this need an agent or a record: a push reads the data directory that it is called in.

use std::fs::{self, File};
use std::io::{self, Read};
use std::path::Path;
use std::time::Duration;

use super::error::ArchiveError;
use super::names::{StreamName, WalName};
use crate::sync::control_file::{self, CONTROL_FILE};

/// Reads of `pg_control` until its CRC is right, and the pause between them, milliseconds.
const CONTROL_READS_MAX: u32 = 100;
const CONTROL_PAUSE_MS: u64 = 10;
/// Longest history file, bytes.
pub const HISTORY_BYTES_MAX: u64 = 1 << 20;

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stream {
    pub system_identifier: u64,
    pub timeline: u32,
    /// The timeline's history file; empty for the first.
    pub history: Vec<u8>,
}

impl Stream {
    /// The one that the server in this data directory writes, or wrote last. Blocking.
    pub fn of(pgdata: &Path) -> Result<Stream, ArchiveError> {
        let system_identifier = system_identifier(pgdata)?;
        let pg_wal = pgdata.join("pg_wal");
        let timeline = newest_timeline(&pg_wal)?;
        let mut history = Vec::new();
        if timeline > 1 {
            let path = pg_wal.join(WalName::History(timeline).to_string());
            let mut read =
                || -> io::Result<usize> { File::open(&path)?.take(HISTORY_BYTES_MAX).read_to_end(&mut history) };
            read().map_err(ArchiveError::file("reading", &path))?;
        }
        Ok(Stream { system_identifier, timeline, history })
    }

    #[must_use]
    pub fn name(&self) -> StreamName {
        let mut hasher = blake3::Hasher::new();
        hasher.update(&self.system_identifier.to_be_bytes()).update(&self.timeline.to_be_bytes()).update(&self.history);
        let mut hash = [0; 8];
        hasher.finalize_xof().fill(&mut hash);
        StreamName { timeline: self.timeline, hash }
    }
}

fn system_identifier(pgdata: &Path) -> Result<u64, ArchiveError> {
    let path = pgdata.join(CONTROL_FILE);
    // A running server writes it in place.
    for _ in 0..CONTROL_READS_MAX {
        let bytes = fs::read(&path).map_err(ArchiveError::file("reading", &path))?;
        if let Some(control) = control_file::parse(&bytes) {
            return Ok(control.system_identifier);
        }
        std::thread::park_timeout(Duration::from_millis(CONTROL_PAUSE_MS));
    }
    Err(ArchiveError::damaged(&path, format!("its CRC was wrong in {CONTROL_READS_MAX} reads")))
}

/// As PostgreSQL itself finds it (`findNewestTimeLine`): a server that has changed its timeline has that one's history file, and
/// nothing removes it. Not from `pg_control`, which names the new one only after the next checkpoint.
fn newest_timeline(pg_wal: &Path) -> Result<u32, ArchiveError> {
    let failed = |error: io::Error| ArchiveError::file("listing", pg_wal)(error);
    let mut newest = 1;
    for entry in fs::read_dir(pg_wal).map_err(failed)? {
        let name = entry.map_err(failed)?.file_name();
        if let Some(WalName::History(timeline)) = name.to_str().and_then(WalName::parse) {
            newest = newest.max(timeline);
        }
    }
    Ok(newest)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_lives_of_one_node_are_two_streams() {
        let life = |history: &str| Stream { system_identifier: 7, timeline: 2, history: history.into() }.name();
        let first = life("1\t0/3000110\tno recovery target specified\n");
        assert_ne!(first, life("1\t0/7000110\tno recovery target specified\n"));
        assert_eq!(first, life("1\t0/3000110\tno recovery target specified\n"));
        let leader = Stream { system_identifier: 7, timeline: 1, history: Vec::new() };
        assert_ne!(leader.name(), Stream { system_identifier: 8, ..leader.clone() }.name());
    }

    #[test]
    fn the_newest_history_says_which_timeline_a_server_is_on() {
        let folder = tempfile::tempdir().unwrap();
        assert_eq!(newest_timeline(folder.path()).unwrap(), 1);
        for name in ["00000002.history", "00000003.history", "000000010000000000000001", "0000000A.history.tmp"] {
            fs::write(folder.path().join(name), b"").unwrap();
        }
        assert_eq!(newest_timeline(folder.path()).unwrap(), 3);
    }
}
