//! The recovery of a node, from lost to member: the pure state machine and the shell that runs it.
//!
//! `core` decides what comes next, `limits` how long it may stand still, `pace` how fast it moves, `throttle` how fast it may read, `preflight` whether it may start at all,
//! `report` what is told about it. `runner` does the work with the agents (`agents`) and the running proxy
//! (`replication`, a contract that the proxy's hub fulfils); `recoveries` keeps it to one per node. `client` is `agents`
//! over the network; `contact` is the proxy's regular look at every agent.

pub mod agents;
pub mod client;
pub mod contact;
pub mod core;
pub mod limits;
pub mod pace;
pub mod preflight;
pub mod recoveries;
pub mod replication;
pub mod report;
pub mod runner;
pub mod throttle;
