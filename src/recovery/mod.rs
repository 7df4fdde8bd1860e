//! The recovery of a node, from lost to member: the pure state machine and the shell that runs it.
//!
//! `replication` is the contract with the running proxy.

pub mod replication;
