//! The one configuration file, the same on every host.
//!
//! Unknown keys are refused with the nearest known one.

use std::net::SocketAddr;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    pub cluster: ClusterConfig,
    pub proxy: ProxyConfig,
    /// In the order of `SHOW pool_nodes`.
    #[serde(rename = "node")]
    pub nodes: Vec<NodeConfig>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ClusterConfig {
    /// Name of the cluster: letters, digits, `_`; at most 32.
    pub name: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ProxyConfig {
    /// Node on whose host the proxy runs.
    pub node: String,
    /// Where clients connect.
    pub listen: SocketAddr,
    /// Folder of the proxy: certificate, lock, `control.sock`, spilled effects.
    pub state_dir: PathBuf,
    /// Threads that serve clients; 0: one per core.
    #[serde(default)]
    pub threads: usize,
    /// Longest time that the gate stays closed before it opens again, milliseconds.
    #[serde(default = "default_gate_ms_max")]
    pub gate_ms_max: u64,
    /// How long a follower may take for its half of a transaction, milliseconds, before it counts as lost.
    #[serde(default = "default_follower_ms_max")]
    pub follower_ms_max: u64,
    /// Effects of one transaction on disk, bytes.
    #[serde(default = "default_effects_disk_max")]
    pub effects_disk_max: u64,
    /// Effects in memory for a node that is joining, bytes.
    #[serde(default = "default_backlog_bytes_max")]
    pub backlog_bytes_max: u64,
    #[serde(default = "default_clients_max")]
    pub clients_max: usize,
}

fn default_gate_ms_max() -> u64 {
    1000
}
fn default_follower_ms_max() -> u64 {
    30_000
}
fn default_effects_disk_max() -> u64 {
    16 << 30
}
fn default_backlog_bytes_max() -> u64 {
    256 << 20
}
fn default_clients_max() -> usize {
    1000
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NodeConfig {
    /// Letters, digits, `_`, `-`; at most 32.
    pub name: String,
    /// Address of its agent, as the other hosts reach it.
    pub agent: SocketAddr,
    /// Folder of the agent: record, certificate, `control.sock`.
    pub state_dir: PathBuf,
    pub pgdata: PathBuf,
    /// PostgreSQL's programs, for example /usr/lib/postgresql/15/bin.
    pub bin_dir: PathBuf,
    /// Folder of PostgreSQL's unix socket, 0700; agent and proxy connect here.
    pub socket_dir: PathBuf,
    /// PostgreSQL's port; part of the socket's name.
    pub port: u16,
}
