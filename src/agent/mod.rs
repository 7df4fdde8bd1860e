//! The daemon on every node: runs PostgreSQL, keeps the durable record, serves the agent protocol.
//!
//! `daemon` listens and dispatches; `control` answers requests about `record`, `supervisor` (PostgreSQL) and
//! `recovery`; `tunnels` forward the proxy to PostgreSQL; files and WAL are served by `sync`. `client` is the other
//! end, for the proxy, the commands and other agents.

pub mod archive;
pub(crate) mod buffers;
pub mod certificates;
pub mod client;
pub mod connection;
mod control;
pub mod daemon;
mod fence;
mod fork;
mod generation;
pub mod leases;
mod node;
pub mod postgres;
pub mod record;
mod recovery;
mod source;
mod supervisor;
pub mod tls;
mod tunnels;

pub use daemon::{Agent, AgentError, run};
