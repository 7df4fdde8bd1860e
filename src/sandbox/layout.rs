//! Where everything of a sandbox is: its folders, its ports, its configuration. Reads and writes only the plan.
//!
//! ```text
//! D/sandbox.json       the plan: what the sandbox was made with
//! D/pgtandem.toml      the configuration
//! D/bin/pgtandem       the program, when root made the sandbox
//! D/ca/                the cluster's certificate authority
//! D/proxy/  D/proxy.pid  D/proxy.log
//! D/node<i>/           state of the agent: record, certificate; agent.pid, agent.log, postgresql.log
//! D/node<i>/pgdata     PostgreSQL's data directory
//! D/node<i>/socket     PostgreSQL's unix socket, unless that path would be too long
//! ```

use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::SandboxError;
use crate::agent::certificates::{CLIENTS_CERTIFICATE_FILE, CLIENTS_KEY_FILE};
use crate::config::{ArchiveConfig, ClusterConfig, Config, FenceConfig, NodeConfig, ProxyConfig};

/// The plan's file in the sandbox's folder; a folder that has it is a sandbox.
pub const PLAN_FILE: &str = "sandbox.json";
/// Nodes in a sandbox: their PostgreSQL ports end below the agents' ports.
pub const NODES_MAX: usize = 16;
/// The agents' ports begin here, after the base port.
pub const AGENT_PORTS_OFFSET: u16 = 101;
/// Sockets whose path would be longer go to a folder below /tmp. Bytes.
const SOCKET_PATH_BYTES_MAX: usize = 100;
/// Name of the cluster in every sandbox.
pub(super) const CLUSTER: &str = "sandbox";
/// Limits of the proxy that a sandbox sets; everything else is as in production.
const CLIENTS_MAX: usize = 150;

/// What a sandbox was made with; kept in [`PLAN_FILE`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Plan {
    pub nodes: usize,
    pub base_port: u16,
    /// Of pgbench; 0: no database `bench`.
    pub scale: u32,
    /// Clients may use TLS.
    #[serde(default)]
    pub tls: bool,
    /// Every node archives its WAL.
    #[serde(default)]
    pub archive: bool,
    /// PostgreSQL's programs.
    pub bin_dir: PathBuf,
    /// Short folder for sockets, when D is too deep for them; removed with the sandbox.
    pub short_dir: Option<PathBuf>,
    /// Everything was made; without it the next `up` begins anew.
    pub complete: bool,
}

/// A sandbox's folder and plan.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layout {
    /// Absolute.
    pub dir: PathBuf,
    pub plan: Plan,
}

impl Layout {
    /// The plan of the sandbox in `dir`.
    pub fn load(dir: &Path) -> Result<Self, SandboxError> {
        let dir = std::path::absolute(dir).map_err(SandboxError::file("cannot find", dir))?;
        let path = dir.join(PLAN_FILE);
        let text = match std::fs::read(&path) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                return Err(SandboxError::NotASandbox { path: dir });
            }
            other => other.map_err(SandboxError::file("cannot read", &path))?,
        };
        let plan = serde_json::from_slice(&text)
            .map_err(|error| SandboxError::file("cannot understand", &path)(error.into()))?;
        Ok(Self { dir, plan })
    }

    pub(super) fn store(&self) -> Result<(), SandboxError> {
        let (path, new) = (self.dir.join(PLAN_FILE), self.dir.join("sandbox.json.new"));
        let text = serde_json::to_vec_pretty(&self.plan)
            .map_err(|error| SandboxError::file("cannot write", &path)(error.into()))?;
        std::fs::write(&new, text).map_err(SandboxError::file("cannot write", &new))?;
        std::fs::rename(&new, &path).map_err(SandboxError::file("cannot write", &path))
    }

    #[must_use]
    pub fn config_path(&self) -> PathBuf {
        self.dir.join("pgtandem.toml")
    }

    #[must_use]
    pub fn ca_dir(&self) -> PathBuf {
        self.dir.join("ca")
    }

    #[must_use]
    pub fn node_name(index: usize) -> String {
        format!("node{index}")
    }

    #[must_use]
    pub fn node_dir(&self, index: usize) -> PathBuf {
        self.dir.join(Self::node_name(index))
    }

    #[must_use]
    pub fn pgdata(&self, index: usize) -> PathBuf {
        self.node_dir(index).join("pgdata")
    }

    #[must_use]
    pub fn postmaster_pid_file(&self, index: usize) -> PathBuf {
        self.pgdata(index).join("postmaster.pid")
    }

    #[must_use]
    pub fn agent_pid_file(&self, index: usize) -> PathBuf {
        self.node_dir(index).join("agent.pid")
    }

    #[must_use]
    pub fn agent_log(&self, index: usize) -> PathBuf {
        self.node_dir(index).join("agent.log")
    }

    #[must_use]
    pub fn proxy_pid_file(&self) -> PathBuf {
        self.dir.join("proxy.pid")
    }

    #[must_use]
    pub fn proxy_log(&self) -> PathBuf {
        self.dir.join("proxy.log")
    }

    /// Where the proxy listens.
    #[must_use]
    pub fn proxy_port(&self) -> u16 {
        self.plan.base_port
    }

    /// Where node `index`'s PostgreSQL listens.
    #[must_use]
    pub fn postgres_port(&self, index: usize) -> u16 {
        self.plan.base_port + 1 + port_offset(index)
    }

    #[must_use]
    pub fn agent_port(&self, index: usize) -> u16 {
        self.plan.base_port + AGENT_PORTS_OFFSET + port_offset(index)
    }

    /// Every port with what it is for.
    #[must_use]
    pub fn ports(&self) -> Vec<(u16, String)> {
        let mut ports = vec![(self.proxy_port(), "the proxy".to_owned())];
        for index in 0..self.plan.nodes {
            ports.push((self.postgres_port(index), format!("node{index}'s PostgreSQL")));
            ports.push((self.agent_port(index), format!("node{index}'s agent")));
        }
        ports
    }

    /// The folders of sockets, below D or below the short folder.
    fn socket_base(&self) -> &Path {
        self.plan.short_dir.as_deref().unwrap_or(&self.dir)
    }

    /// Whether the sockets' paths would be too long below D.
    pub(super) fn is_too_deep(&self) -> bool {
        let longest = self.dir.join("node00/socket/.s.PGSQL.65535.lock");
        longest.as_os_str().len() > SOCKET_PATH_BYTES_MAX
    }

    #[must_use]
    pub fn socket_dir(&self, index: usize) -> PathBuf {
        self.socket_base().join(Self::node_name(index)).join("socket")
    }

    /// The proxy's folder: it holds `control.sock`, so it is where the sockets are.
    #[must_use]
    pub fn proxy_dir(&self) -> PathBuf {
        self.socket_base().join("proxy")
    }

    /// The configuration that all daemons of the sandbox read.
    #[must_use]
    pub fn config(&self) -> Config {
        let address = |port| SocketAddr::from((Ipv4Addr::LOCALHOST, port));
        let node = |index| NodeConfig {
            name: Self::node_name(index),
            agent: address(self.agent_port(index)),
            state_dir: self.node_dir(index),
            pgdata: self.pgdata(index),
            bin_dir: self.plan.bin_dir.clone(),
            socket_dir: self.socket_dir(index),
            port: self.postgres_port(index),
            archive_dir: None,
            tablespaces: std::collections::BTreeMap::new(),
            service_addresses: Vec::new(),
        };
        Config {
            cluster: ClusterConfig { name: CLUSTER.into(), ..ClusterConfig::default() },
            proxy: ProxyConfig {
                node: Self::node_name(0),
                listen: address(self.proxy_port()),
                state_dir: self.proxy_dir(),
                threads: 0,
                gate_ms_max: 1000,
                follower_ms_max: 30_000,
                leader_ms_max: 10_000,
                effects_disk_max: 16 << 30,
                backlog_bytes_max: 256 << 20,
                away_s_max: 600,
                away_bytes_max: 256 << 20,
                unproven: crate::config::Unproven::default(),
                clients_max: CLIENTS_MAX,
                tls_certificate: self.plan.tls.then(|| self.proxy_dir().join(CLIENTS_CERTIFICATE_FILE)),
                tls_key: self.plan.tls.then(|| self.proxy_dir().join(CLIENTS_KEY_FILE)),
                tls_required: false,
            },
            fence: FenceConfig::default(),
            archive: self.plan.archive.then(ArchiveConfig::default),
            nodes: (0..self.plan.nodes).map(node).collect(),
            path: self.config_path(),
        }
    }
}

/// At most [`NODES_MAX`], so it always fits.
fn port_offset(index: usize) -> u16 {
    u16::try_from(index).unwrap_or(u16::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layout(dir: &str, short_dir: Option<PathBuf>) -> Layout {
        let bin_dir = "/usr/lib/postgresql/15/bin".into();
        let plan = Plan {
            nodes: 2,
            base_port: 15000,
            scale: 0,
            tls: false,
            archive: true,
            bin_dir,
            short_dir,
            complete: false,
        };
        Layout { dir: dir.into(), plan }
    }

    #[test]
    fn ports_are_where_the_manual_says() {
        let layout = layout("/tmp/x", None);
        assert_eq!(layout.proxy_port(), 15000);
        assert_eq!((layout.postgres_port(0), layout.postgres_port(1)), (15001, 15002));
        assert_eq!((layout.agent_port(0), layout.agent_port(1)), (15101, 15102));
    }

    #[test]
    fn the_configuration_passes_its_own_check() {
        let deep = format!("/tmp/{}", "deep/".repeat(40));
        assert!(layout(&deep, None).is_too_deep());
        for layout in [layout("/tmp/x", None), layout(&deep, Some("/tmp/pgtandem-1".into()))] {
            crate::config::check::check(&layout.config()).unwrap();
        }
    }
}
