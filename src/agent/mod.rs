//! The daemon on every node: runs PostgreSQL, keeps the durable record, serves the agent protocol.

pub mod connection;
pub mod postgres;
