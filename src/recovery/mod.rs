//! The recovery of a node, from lost to member: the pure state machine and the shell that runs it.
//!
//! `core` decides what comes next, `limits` how long it may stand still, `report` what is told about it;
//! `replication` is the contract with the running proxy.

pub mod core;
pub mod limits;
pub mod replication;
pub mod report;
