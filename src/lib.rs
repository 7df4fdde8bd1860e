//! pgtandem: two or more PostgreSQL servers that stay identical, behind one proxy, without a third machine.
//!
//! Arrows point one way: `cli` -> daemons (`proxy`, `agent`) -> `session`, `recovery` -> `replicate`, `sync`,
//! `cluster` -> `sql`, `pg`, and the crate `pgtandem_proto`. See `docs/design.md`.
#![forbid(unsafe_code)]

pub mod agent;
pub mod archive;
pub mod cli;
pub mod cluster;
pub mod config;
pub mod crash;
pub mod observe;
pub mod pg;
pub mod proxy;
pub mod recovery;
pub mod replicate;
pub mod sandbox;
pub mod session;
pub mod sql;
pub mod sync;
