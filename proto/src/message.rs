//! The messages of each channel. Encoded with postcard inside frames; see `SPEC.md` for types and order.
//!
//! Bulk bytes (file extents, WAL) do not go through serde: they are skipped there and
//! travel raw behind the encoded message in the same frame, see [`crate::frame::Message`].

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use crate::membership::{Epoch, MemberSet, NodeState, Record};

/// A position in the write-ahead log, as PostgreSQL's `pg_lsn`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Lsn(pub u64);

// ---------------------------------------------------------------- control

/// What a proxy, an agent or a command asks of an agent on a control channel. One at a time; each gets
/// any number of [`Reply::Progress`] and exactly one other reply.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum Request {
    /// -> [`Reply::Status`]
    Status,
    /// Promise to obey no epoch below this one: stored durably, older tunnels and recoveries are cut. -> `Record`
    Promise { epoch: Epoch },
    /// Store a member set and this node's state in it. Refused if the epoch is below the promised one
    /// or `(epoch, version)` is below the stored one. -> `Record`
    Store {
        members: MemberSet,
        state: NodeState,
        uncertain: bool,
        new_generation: Option<String>,
        note: Option<String>,
    },
    /// Start PostgreSQL and keep it running (restart it when it dies). -> `Done` when it accepts connections
    StartPostgres,
    /// Stop it, and leave it stopped. -> `Done`
    StopPostgres { immediate: bool },
    /// Facts for the Preflight of a recovery. Works with a stopped or absent data directory, too. -> `Facts`
    Facts,
    /// Fill this node from another one: stop PostgreSQL, bring files and WAL (record: Seeding). Progress all along.
    /// -> `Done` when the files are whole and synced, `pg_control` last
    Fill { epoch: Epoch, source: String },
    /// Start PostgreSQL as a standby fed by the relay (record: CatchingUp). Progress with `replayed` all along.
    /// -> `Done` when it is consistent and less than `lag_bytes_max` behind the source
    CatchUp { epoch: Epoch, source: String, lag_bytes_max: u64 },
    /// The relay hands over nothing more than it has. -> `Lsn` with the position that it stopped at
    HoldRelay,
    /// Hand over WAL up to exactly `x`, wait until it is replayed, leave recovery by signal, wait until
    /// PostgreSQL accepts writes, do the fix-ups. -> `Done`
    LeaveRecovery { x: Lsn },
    /// Remove the replication slot that this node keeps for `node`. -> `Done`
    DropSlot { node: String },
    /// End every tunnel of this epoch and older, without promising anything. -> `Done`
    CutTunnels,
    /// As `Promise`, and no session of an older epoch is left on this node's PostgreSQL, the sessions of a proxy on its own host
    /// included: the epoch stands in every database, and whoever was connected is ended. For a change of the leader. -> `Record`
    Fence { epoch: Epoch },
    /// The last step of a recovery: the data of this node are the leader's, with their generations. -> `Record`
    Join { members: MemberSet, generations: Vec<String> },
    /// Of a node that is Forked: its data directory is moved aside, and it is Blank. -> `Record`
    DiscardFork { note: String },
    /// Take a base copy of this node into its archive. -> `BaseCopy`
    BaseCopy,
    /// Between `Fill` and `CatchUp`: let `pg_verifybackup` and `pg_waldump` look at what was filled. Progress all along. -> `Done`
    VerifyFill,
    /// What lies here that `KeepOld` would keep, and the room for it. -> `OldData`
    OldData,
    /// Before `Fill`: stop PostgreSQL, and keep a copy of its data directory beside it. The record stays. Progress all along. -> `Kept`
    KeepOld { epoch: Epoch, source: String },
    /// Of a node that is copied from: what the fill of `node` reads here is at most so much in a second; 0: as the configuration says. -> `Done`
    Pace { node: String, bytes_per_s_max: u64 },
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum Reply {
    Status(Box<NodeStatus>),
    Record(Box<Record>),
    Facts(Box<NodeFacts>),
    Lsn(Lsn),
    Done,
    Progress(Progress),
    /// What failed, where, why, and what to do next.
    Failed(Failure),
    BaseCopy(Box<BaseCopy>),
    OldData(Box<OldData>),
    Kept(Box<Kept>),
}

/// What lies on a node that is about to be filled.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct OldData {
    /// Of its files; 0: there is nothing that a server could be started on.
    pub bytes: u64,
    /// Beside the data directory.
    pub free_bytes: u64,
    /// A link in it, which makes that it can not be kept; empty: there is none.
    pub link: String,
}

/// A copy of a data directory that was kept.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Kept {
    /// Where it is on the node; empty: there was nothing to keep.
    pub path: String,
    pub bytes: u64,
    /// It shares its blocks with the data directory, as long as they are the same.
    pub shared: bool,
    /// An earlier attempt has kept it.
    pub earlier: bool,
}

/// A base copy that was taken.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct BaseCopy {
    /// Names within the archive.
    pub stream: String,
    pub name: String,
    pub files: u64,
    pub bytes: u64,
    /// Of these the ones that no earlier copy had.
    pub bytes_new: u64,
    /// Pages whose checksum was wrong in every read; at most [`DAMAGED_NAMED_MAX`] of them, and how many there were.
    pub damaged: Vec<String>,
    pub damaged_count: u64,
}

/// An error that crosses the network: the four parts that every error here has.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    pub code: FailureCode,
    /// What failed and why, one sentence, with names.
    pub what: String,
    /// The next thing to do or type, one sentence.
    pub hint: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum FailureCode {
    /// The epoch is below the promised one, or the member set below the stored one.
    OldEpoch,
    /// The node is not in a state in which this can be done.
    WrongState,
    /// PostgreSQL or its files refused.
    Postgres,
    /// The network or the peer.
    Peer,
    /// A limit was reached.
    Limit,
    /// The request itself is wrong.
    Request,
    Internal,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct NodeStatus {
    pub record: Record,
    pub postgres: PostgresState,
    /// Why PostgreSQL is not running, or what it said last; empty if it runs.
    pub postgres_detail: String,
    /// Progress of the fill or recovery under way, if there is one.
    pub progress: Option<Progress>,
    /// How long the node's lease still runs, milliseconds: a proxy has vouched for it a moment ago.
    pub lease_ms: Option<u64>,
    /// What is wrong with its archive, one sentence without its name; empty if nothing is, or nothing is archived.
    pub archive_problem: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum PostgresState {
    Absent,
    Stopped,
    Starting,
    /// A standby in recovery.
    Standby,
    Running,
}

/// What Preflight compares between the source and the node to be filled.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct NodeFacts {
    /// Version of the server binaries, as `server_version_num`: 150018.
    pub binaries_version_num: u32,
    /// Major version in `PG_VERSION` of the data directory, if there is one.
    pub data_major: Option<u32>,
    /// From `pg_control`, if it can be read.
    pub system_identifier: Option<u64>,
    pub architecture: String,
    /// Version of the C library that sorts text.
    pub libc_version: String,
    pub free_bytes: u64,
    /// Only from a running server: bytes of the data directory without WAL.
    pub data_bytes: Option<u64>,
    /// Only from a running server: the settings that a standby must have at least as large, and others that matter.
    pub settings: Vec<(String, String)>,
    /// Only from a running server: names of tablespaces other than pg_default and pg_global.
    pub tablespaces: Vec<String>,
    /// Only from a running server: prepared transactions that are not ours.
    pub foreign_prepared: Vec<String>,
    /// Only from a running server: unlogged tables, `database.schema.table`; they arrive empty.
    pub unlogged_tables: Vec<String>,
    /// Libraries and control files of the extensions in use (source), or available (target).
    pub extensions: Vec<String>,
    /// A PostgreSQL that this agent did not start runs on the data directory.
    pub foreign_server: bool,
    /// Of `pg_verifybackup` and `pg_waldump`, those that are not beside the server's programs.
    pub programs_missing: Vec<String>,
}

/// Counters of a fill and of what follows it. All bytes; only grow within one recovery.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Progress {
    pub files: u64,
    pub bytes_total: u64,
    pub bytes_compared: u64,
    /// Of those compared: already the same, so not sent.
    pub bytes_same: u64,
    pub bytes_sent: u64,
    pub wal_bytes_received: u64,
    /// Last flushed position of the source that is known here.
    pub wal_source: u64,
    pub wal_replayed: u64,
    /// Where the backup began: WAL from here on is needed.
    pub wal_start: u64,
    /// Files that there are; `files` of them are done.
    pub files_total: u64,
    /// Pages of the source whose checksum was wrong in every read; they were copied as they are.
    pub damaged_pages: u64,
    /// What `pg_verifybackup` and `pg_waldump` have read.
    pub bytes_verified: u64,
    /// What is kept of the old files before they are overwritten, and how much of it is copied.
    pub bytes_to_keep: u64,
    pub bytes_kept: u64,
}

// ---------------------------------------------------------------- files

/// What the node that is filled asks of the source on a files channel. It pulls: what it has not asked for is not sent.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum FilesRequest {
    /// Begin a backup. Creates or keeps the slot `pgtandem_<node>`. -> `Begun`, then `Table` frames, the last with `last`
    Begin,
    /// Up to [`EXTENTS_PER_REQUEST_MAX`] consecutive extents of one file, with the hashes of what is there already.
    /// -> one `Extent` each, in order
    Extents { file: u32, first: u32, have: Vec<Option<Held>> },
    /// End the backup. -> `Ended`
    End,
    /// Work for the backup that the same node began at `start` on another channel, which owns it. -> `Attached`
    Attach { start: Lsn },
    /// Up to [`SMALL_FILES_PER_REQUEST_MAX`] files, each of at most [`SMALL_FILE_BYTES_MAX`] in the table, whole, with the
    /// BLAKE3 of what is there already. -> one `Small` for all
    Small { files: Vec<(u32, Option<[u8; 32]>)> },
    /// What was answered on this channel since the last `Check`, all of which was asked for before. -> `Sum`
    Check,
}

pub const EXTENT_BYTES: usize = 1 << 20;
pub const EXTENTS_PER_REQUEST_MAX: usize = 64;
/// A page within an extent, the unit of what is sent where an extent differs.
pub const PAGE_BYTES: usize = 8192;
/// Chaining value of a page within the BLAKE3 tree of its extent, cut to 128 bits. Enough: the extent's whole hash is
/// checked afterwards.
pub const PAGE_HASH_BYTES: usize = 16;
/// Files up to this size are asked for by the dozen.
pub const SMALL_FILE_BYTES_MAX: usize = 64 << 10;
pub const SMALL_FILES_PER_REQUEST_MAX: usize = 256;

/// What a node has of an extent.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Held {
    /// BLAKE3 of the whole extent.
    pub hash: [u8; 32],
    /// One hash per page, the last one may be shorter; empty if only the whole extent will do.
    pub pages: Vec<[u8; PAGE_HASH_BYTES]>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum FilesReply {
    Begun {
        start: Lsn,
        timeline: u32,
        system_identifier: u64,
        wal_segment_bytes: u32,
        version_num: u32,
    },
    Table {
        entries: Vec<FileEntry>,
        last: bool,
    },
    Extent(Extent),
    /// `backup_label` and `tablespace_map` byte for byte as `pg_backup_stop` returned them.
    Ended {
        stop: Lsn,
        backup_label: Vec<u8>,
        tablespace_map: Vec<u8>,
        /// Pages whose checksum was wrong in every read, as `path, block N`; at most [`DAMAGED_NAMED_MAX`] of them.
        damaged: Vec<String>,
        /// How many there were.
        damaged_count: u64,
    },
    Failed(Failure),
    Attached,
    Small(SmallFiles),
    Sum {
        answers: u64,
        sum: [u64; 4],
    },
}

/// Damaged pages that are named.
pub const DAMAGED_NAMED_MAX: usize = 20;

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct FileEntry {
    pub id: u32,
    /// Relative to the data directory, components separated by '/', UTF-8, no "..", not absolute.
    pub path: String,
    pub directory: bool,
    pub bytes: u64,
    pub mode: u32,
    /// Of `pg_tblspc/<oid>`: where the tablespace is.
    pub tablespace: Option<Tablespace>,
}

/// A directory of the source outside its data directory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tablespace {
    /// Absolute.
    pub path: String,
    /// Boot of the host, device and inode: two nodes of one host must not share it.
    pub identity: String,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Extent {
    pub file: u32,
    pub index: u32,
    /// BLAKE3 of all of the extent as it was read; what comes out on the other side must have it.
    pub hash: [u8; 32],
    /// CRC32C of the same bytes, for the manifest of the copy.
    pub crc: u32,
    /// It may be shorter than the table said; its WAL mends that.
    pub content: ExtentContent,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum ExtentContent {
    /// The hash agreed; `bytes` of it.
    Same { bytes: u32 },
    /// That many zero bytes.
    Zeros { bytes: u32 },
    /// At most [`EXTENT_BYTES`].
    Data(Packed),
    /// The file is gone.
    Vanished,
    /// The extent has `bytes`; of its pages only those in `changed` (bit n of byte n / 8: page n) differ from what was
    /// held. They follow each other in `data`.
    Pages { bytes: u32, changed: Vec<u8>, data: Packed },
}

/// Bytes that travel as the bulk of the frame, compressed where the connection is slow.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Packed {
    /// Length after decompression (zstd); None: they are as they are.
    pub unpacked: Option<u32>,
    #[serde(skip)]
    pub data: Bytes,
}

/// The answer to `Small`: all that differs, one behind the other in `data`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SmallFiles {
    /// In the order of the request.
    pub files: Vec<SmallFile>,
    pub data: Packed,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SmallFile {
    pub file: u32,
    /// BLAKE3 of what was read.
    pub hash: [u8; 32],
    /// CRC32C of the same bytes.
    pub crc: u32,
    pub content: SmallContent,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum SmallContent {
    /// The hash agreed; `bytes` of it.
    Same {
        bytes: u32,
    },
    /// The next so many bytes of `data`.
    Data {
        bytes: u32,
    },
    Vanished,
}

// ---------------------------------------------------------------- WAL

/// From the node that receives WAL to its source.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum WalRequest {
    /// -> `Started`, then `Data` and `Flushed` without end
    Start { from: Lsn, timeline: u32 },
    /// What is safe here; the source moves its slot to it.
    Acknowledge { flushed: Lsn },
}

pub const WAL_CHUNK_BYTES_MAX: usize = 128 * 1024;

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum WalReply {
    /// `history` is the timeline history file of `timeline`, empty for timeline 1.
    Started {
        timeline: u32,
        system_identifier: u64,
        wal_segment_bytes: u32,
        history: Vec<u8>,
        flushed: Lsn,
    },
    /// At most [`WAL_CHUNK_BYTES_MAX`] bytes from `start`, all of them flushed on the source. `bytes` travels as the
    /// bulk of the frame.
    Data {
        start: Lsn,
        flushed: Lsn,
        #[serde(skip)]
        bytes: Bytes,
    },
    /// Sent when the flushed position moved and at least once a second.
    Flushed {
        flushed: Lsn,
    },
    Failed(Failure),
}

// ---------------------------------------------------------------- leases

/// From the node to the proxy that opened the channel: is this node still a member?
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct LeaseAsk {
    /// Of this asking; the answer has it, too.
    pub number: u64,
}

/// Until 3 s after the asking nothing is acknowledged without this node. No answer: the node is no member any more, or the proxy
/// is about to go on without it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct LeaseGrant {
    pub number: u64,
    /// The member set under which commits are acknowledged.
    pub epoch: Epoch,
    pub version: u64,
}

// ---------------------------------------------------------------- archives

/// From a node to one that keeps a copy of its archive. One request at a time.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ArchiveRequest {
    /// Which WAL and base copies of the caller are here? -> `Names`, the last with `last`
    List,
    /// Which of these, at most [`ARCHIVE_EXTENTS_MAX`], are not here? -> `Missing`
    Missing { extents: Vec<[u8; 32]> },
    /// A file of an archive, with so many bytes; `Data` frames follow until it is whole. -> `Stored` when it is on the disk
    Put { path: String, bytes: u64 },
    /// The next bytes of the file, at most [`ARCHIVE_DATA_BYTES_MAX`].
    Data {
        #[serde(skip)]
        bytes: Bytes,
    },
    /// The caller's retention has no use for these any more, at most [`ARCHIVE_NAMES_MAX`]. -> `Removed`
    Remove { paths: Vec<String> },
}

/// Hashes of one `Missing`.
pub const ARCHIVE_EXTENTS_MAX: usize = 4096;
/// Paths of one frame.
pub const ARCHIVE_NAMES_MAX: usize = 2048;
/// Bytes of one `Data`.
pub const ARCHIVE_DATA_BYTES_MAX: usize = 1 << 20;

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ArchiveReply {
    /// Paths relative to the archive of the caller; at most [`ARCHIVE_NAMES_MAX`].
    Names {
        paths: Vec<String>,
        last: bool,
    },
    /// Places in the list that was asked about.
    Missing {
        places: Vec<u32>,
    },
    Stored,
    Removed,
    /// The connection ends behind it.
    Failed(Failure),
}
