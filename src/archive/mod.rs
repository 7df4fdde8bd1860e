//! The archive of a node: every finished WAL segment and, now and then, a base copy of its data directory, from which a
//! server of any moment between can be made again.
//!
//! Layout, below the node's `archive_dir`, which may hold the archives of its peers, too:
//!
//! ```text
//! <node>/extents/<2 digits>/<BLAKE3>.zst          pieces of base copies, at most 1 MiB each, named by their content
//! <node>/<stream>/wal/<name PostgreSQL gave>.zst  segments, histories
//! <node>/<stream>/base/<end>-<first segment>.zst  what a base copy consists of
//! ```
//!
//! What holds:
//! - A file under its final name is whole: written beside it, synced, linked to its name, the folder synced. No file is ever
//!   written over. Each says its length and BLAKE3 ([`file`]), and is what `zstd -d` reads.
//! - WAL of two servers, or of two lives of one server, never lies in one folder: [`stream`] says why that needs care here.
//! - A base copy is there only when all that it needs is: its extents and the WAL from its start to its stop.
//! - [`retention`] never takes away the last good base copy, nor WAL behind one that is kept.
//!
//! Who writes: `pgtandem wal push`, which PostgreSQL calls ([`push`]), for WAL; the node's agent for everything else. Pushing needs
//! no agent, so an agent that is away or hangs can not make WAL pile up in PostgreSQL's own folder, and the two meet in the file system
//! only, where links are atomic.

pub mod base;
pub mod error;
pub mod fetch;
pub mod file;
pub mod health;
pub mod inventory;
pub mod manifest;
pub mod moment;
pub mod names;
pub mod push;
pub mod restore;
pub mod retention;
pub mod schedule;
pub mod settings;
pub mod stream;
pub mod verify;

pub use error::ArchiveError;
