//! Files and WAL: scan, digests, send, receive, relay.
//!
//! A node is filled by content: its agent says what it has, the source sends what differs, in place. `A` is the node
//! that is copied from, `B` the one that is filled; both names are used throughout this module.
//!
//! ```text
//! B's agent                                              A's agent
//! target::Target::fill        <- files channel ->        source::serve_files     pg_backup_start .. stop, extents
//!                             <- wal channel   ->        source::serve_wal       segment files up to the flushed position
//! target::Target::catch_up    relay <- wal channel ->    source::serve_wal
//! target::Target::hold, leave_recovery(x), abort
//! facts::gather, facts::compare                          facts::gather
//! ```
//!
//! It decides nothing about membership and keeps no record; `agent` calls it and `recovery` decides the order.
//! Transport comes from outside: a [`link::Link`] for what is served, a [`target::Source`] that opens channels for
//! what is fetched.

mod checksum;
pub mod control_file;
pub mod error;
pub mod extent;
pub mod facts;
pub mod link;
pub mod relay;
pub(crate) mod rules;
pub mod scan;
pub mod source;
pub mod target;
pub mod wal;
mod wal_stream;

pub use error::SyncError;
