//! The daemon that speaks PostgreSQL's protocol to clients.

pub mod control;
