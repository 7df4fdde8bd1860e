//! The daemon on every node: runs PostgreSQL, keeps the durable record, serves the agent protocol.

pub mod certificates;
pub mod client;
pub mod connection;
pub mod postgres;
pub mod record;
pub mod tls;
