//! The one configuration file, the same on every host.
//!
//! Here stand its keys, how it is read and what an error about it says. What must hold beyond the types is in
//! [`check`]. Nothing here looks at the machine: whether a folder exists is for the daemon that uses it.

pub mod check;

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

/// Where the file is when neither `--config` nor `PGTANDEM_CONFIG` says otherwise.
pub const DEFAULT_PATH: &str = "/etc/pgtandem/pgtandem.toml";

/// Longest configuration file that is read, bytes.
const FILE_BYTES_MAX: u64 = 1 << 20;

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    pub cluster: ClusterConfig,
    pub proxy: ProxyConfig,
    /// What keeps an old host from serving.
    #[serde(default)]
    pub fence: FenceConfig,
    /// Nothing is archived without it.
    #[serde(default)]
    pub archive: Option<ArchiveConfig>,
    /// In the order of `SHOW pool_nodes`.
    #[serde(rename = "node")]
    pub nodes: Vec<NodeConfig>,
    /// Where it was read, absolute; empty if it did not come from a file.
    #[serde(skip)]
    pub path: PathBuf,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ClusterConfig {
    /// Name of the cluster: letters, digits, `_`; at most 32.
    pub name: String,
    /// What a recovery may read from the leader's disk in a second, bytes; 0: as much as it can.
    #[serde(default)]
    pub fill_bytes_per_s_max: u64,
    /// A fill reads slower on the leader while the median time of a commit is above this part of what it was before, percent; 0: never.
    #[serde(default)]
    pub fill_latency_percent_max: u64,
    /// What becomes of writes when a follower is lost.
    #[serde(default)]
    pub mode: Mode,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    /// They go on without it.
    #[default]
    Availability,
    /// They wait until it is back, or a person has detached it.
    Protection,
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
    /// Threads that serve clients; 0: half as many as cores.
    #[serde(default)]
    pub threads: usize,
    /// Longest time that the gate stays closed before it opens again, milliseconds.
    #[serde(default = "default_gate_ms_max")]
    pub gate_ms_max: u64,
    /// How long a follower may take for its half of a transaction, milliseconds, before it counts as lost.
    #[serde(default = "default_follower_ms_max")]
    pub follower_ms_max: u64,
    /// How long the leader's PostgreSQL may take to answer whether it lives, milliseconds; then it is lost.
    #[serde(default = "default_leader_ms_max")]
    pub leader_ms_max: u64,
    /// Effects of one transaction on disk, bytes.
    #[serde(default = "default_effects_disk_max")]
    pub effects_disk_max: u64,
    /// Effects in memory for a node that is joining, bytes.
    #[serde(default = "default_backlog_bytes_max")]
    pub backlog_bytes_max: u64,
    /// How long what it misses is kept for a follower that was lost, seconds; 0: it has to be recovered.
    #[serde(default = "default_away_s_max")]
    pub away_s_max: u64,
    /// Effects in memory for each follower that was lost, bytes.
    #[serde(default = "default_away_bytes_max")]
    pub away_bytes_max: u64,
    /// What becomes of statements whose code is not proven to do the same on every server.
    #[serde(default)]
    pub unproven: Unproven,
    /// Client connections at once; one more is refused with SQLSTATE 53300.
    #[serde(default = "default_clients_max")]
    pub clients_max: usize,
    /// Certificate that clients see, with what leads to its authority, in PEM form; without it requests for TLS are answered N.
    #[serde(default)]
    pub tls_certificate: Option<PathBuf>,
    /// Its private key, in PEM form without a password; nobody but its owner may read it.
    #[serde(default)]
    pub tls_key: Option<PathBuf>,
    /// Clients without TLS are refused.
    #[serde(default)]
    pub tls_required: bool,
}

/// How every node archives its WAL.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ArchiveConfig {
    /// Whether the other nodes get a copy of everything.
    #[serde(default)]
    pub peers: Peers,
    /// Time from one base copy to the next, seconds; 0: only when a person asks for one.
    #[serde(default = "default_every_s")]
    pub every_s: u64,
    /// Base copies of each node that are kept.
    #[serde(default = "default_keep")]
    pub keep: u64,
    /// Every moment of so many days can be restored, whatever `keep` says; 0: only `keep` counts.
    #[serde(default)]
    pub keep_days: u64,
    /// A segment with something in it is archived after this time, full or not, seconds; 0: when it is full.
    #[serde(default = "default_segment_s_max")]
    pub segment_s_max: u64,
}

impl Default for ArchiveConfig {
    fn default() -> Self {
        Self {
            peers: Peers::default(),
            every_s: default_every_s(),
            keep: default_keep(),
            keep_days: 0,
            segment_s_max: default_segment_s_max(),
        }
    }
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Peers {
    /// They get nothing.
    None,
    /// The agent sends it behind the back of PostgreSQL.
    #[default]
    Send,
    /// PostgreSQL keeps a segment until every other member has it.
    Wait,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Unproven {
    /// They run on every server, are compared by counts, and shown in the status.
    Allow,
    /// They are refused with SQLSTATE 0A000.
    #[default]
    Refuse,
}

fn default_every_s() -> u64 {
    86_400
}
fn default_keep() -> u64 {
    7
}
fn default_segment_s_max() -> u64 {
    60
}
fn default_gate_ms_max() -> u64 {
    1000
}
fn default_follower_ms_max() -> u64 {
    30_000
}
fn default_leader_ms_max() -> u64 {
    10_000
}
fn default_effects_disk_max() -> u64 {
    16 << 30
}
fn default_backlog_bytes_max() -> u64 {
    256 << 20
}
fn default_away_s_max() -> u64 {
    600
}
fn default_away_bytes_max() -> u64 {
    256 << 20
}
fn default_clients_max() -> usize {
    1000
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FenceConfig {
    /// The DNS name that clients connect to: a proxy to whose host it no longer points stops serving.
    #[serde(default)]
    pub dns: Option<String>,
    /// Servers that are asked; none: those of the system.
    #[serde(default)]
    pub dns_servers: Vec<SocketAddr>,
    /// The proxy begins only when the name points here, and stops when that can not be found out.
    #[serde(default)]
    pub dns_strict: bool,
    /// Between two questions, milliseconds.
    #[serde(default = "default_dns_ms")]
    pub dns_ms: u64,
    /// Program and arguments that `promote` runs before it writes anything; members that do not answer are added as arguments.
    #[serde(default)]
    pub command: Vec<String>,
    /// How long it may take, milliseconds.
    #[serde(default = "default_command_ms_max")]
    pub command_ms_max: u64,
}

impl Default for FenceConfig {
    fn default() -> Self {
        Self {
            dns: None,
            dns_servers: Vec::new(),
            dns_strict: false,
            dns_ms: default_dns_ms(),
            command: Vec::new(),
            command_ms_max: default_command_ms_max(),
        }
    }
}

fn default_dns_ms() -> u64 {
    5_000
}
fn default_command_ms_max() -> u64 {
    60_000
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
    /// Folder of the archives that this node keeps, its own and its peers'; without it `archive` in `state_dir`.
    #[serde(default)]
    pub archive_dir: Option<PathBuf>,
    /// Tablespaces that are elsewhere on this node: path on the leader, path here.
    #[serde(default)]
    pub tablespaces: BTreeMap<PathBuf, PathBuf>,
    /// Addresses to which `fence.dns` points when this host serves; none: that of `agent`.
    #[serde(default)]
    pub service_addresses: Vec<IpAddr>,
}

impl NodeConfig {
    /// Where this node keeps archives.
    #[must_use]
    pub fn archive_dir(&self) -> PathBuf {
        self.archive_dir.clone().unwrap_or_else(|| self.state_dir.join("archive"))
    }
}

/// Why a configuration cannot be used: always with the file, and the line where there is one.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    #[error("configuration {path}: {source}")]
    Read { path: PathBuf, source: std::io::Error },
    #[error("configuration {path}: longer than {FILE_BYTES_MAX} bytes")]
    TooLong { path: PathBuf },
    #[error("configuration {path}, line {line}: unknown key \"{key}\"{}", nearest_text(.nearest.as_deref()))]
    UnknownKey { path: PathBuf, line: usize, key: String, nearest: Option<String> },
    #[error("configuration {path}, line {line}: {what}")]
    Syntax { path: PathBuf, line: usize, what: String },
    #[error("configuration {path}: {what}")]
    Meaning { path: PathBuf, what: check::Problem },
}

impl ConfigError {
    /// The next thing to do, one sentence.
    #[must_use]
    pub fn hint(&self) -> String {
        match self {
            Self::Read { source, .. } if source.kind() == std::io::ErrorKind::NotFound => {
                "name the file with --config FILE or PGTANDEM_CONFIG; `pgtandem sandbox up --dir D` makes a cluster \
                 with its configuration in D/pgtandem.toml"
                    .into()
            }
            Self::Read { .. } => {
                "make the file readable for this user, or run the command as the user that owns it".into()
            }
            Self::TooLong { .. } => "this is not a configuration of pgtandem; name the right file with --config".into(),
            Self::UnknownKey { nearest: Some(nearest), .. } => format!("write {nearest}, or remove the line"),
            Self::UnknownKey { .. } => "remove the line; docs/settings.md lists every key".into(),
            Self::Syntax { .. } => "correct the line; docs/settings.md has a complete example".into(),
            Self::Meaning { what, .. } => what.hint(),
        }
    }
}

fn nearest_text(nearest: Option<&str>) -> String {
    nearest.map(|name| format!("; the nearest known one is \"{name}\"")).unwrap_or_default()
}

impl Config {
    /// Reads and checks the file.
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        use std::io::Read;
        let read = |source| ConfigError::Read { path: path.into(), source };
        let mut text = String::new();
        let file = std::fs::File::open(path).map_err(read)?;
        file.take(FILE_BYTES_MAX + 1).read_to_string(&mut text).map_err(read)?;
        if text.len() as u64 > FILE_BYTES_MAX {
            return Err(ConfigError::TooLong { path: path.into() });
        }
        let absolute = std::path::absolute(path).map_err(read)?;
        Self::parse(&text, path).map(|config| Self { path: absolute, ..config })
    }

    /// Understands and checks `text`; `path` is only for errors.
    pub fn parse(text: &str, path: &Path) -> Result<Self, ConfigError> {
        let config: Self = toml::from_str(text).map_err(|error| explain(&error, text, path))?;
        check::check(&config).map_err(|what| ConfigError::Meaning { path: path.into(), what })?;
        Ok(config)
    }

    #[must_use]
    pub fn node(&self, name: &str) -> Option<&NodeConfig> {
        self.nodes.iter().find(|node| node.name == name)
    }
}

/// Turns serde's error into ours. serde names an unknown key and the known ones in its message only, between
/// backquotes: "unknown field `a`, expected one of `b`, `c`" (serde, `de::Error::unknown_field`).
fn explain(error: &toml::de::Error, text: &str, path: &Path) -> ConfigError {
    let start = error.span().map_or(0, |span| span.start.min(text.len()));
    let line = 1 + text.as_bytes().iter().take(start).filter(|byte| **byte == b'\n').count();
    let message = error.message();
    let mut names = message.split('`').skip(1).step_by(2);
    match names.next() {
        Some(key) if message.starts_with("unknown field") => {
            let nearest = names.max_by(|a, b| strsim::jaro_winkler(key, a).total_cmp(&strsim::jaro_winkler(key, b)));
            let (key, nearest) = (key.to_owned(), nearest.map(str::to_owned));
            ConfigError::UnknownKey { path: path.into(), line, key, nearest }
        }
        _ => ConfigError::Syntax { path: path.into(), line, what: message.trim().replace('\n', ", ") },
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) const GOOD: &str = r#"
[cluster]
name = "shop"

[proxy]
node = "a"
listen = "127.0.0.1:6432"
state_dir = "/var/lib/pgtandem/proxy"

[[node]]
name = "a"
agent = "10.0.0.1:6433"
state_dir = "/var/lib/pgtandem/agent"
pgdata = "/var/lib/postgresql/15/main"
bin_dir = "/usr/lib/postgresql/15/bin"
socket_dir = "/run/pgtandem"
port = 5432

[[node]]
name = "b"
agent = "10.0.0.2:6433"
state_dir = "/var/lib/pgtandem/agent"
pgdata = "/var/lib/postgresql/15/main"
bin_dir = "/usr/lib/postgresql/15/bin"
socket_dir = "/run/pgtandem"
port = 5432
"#;

    fn message(text: &str) -> String {
        Config::parse(text, Path::new("x.toml")).expect_err("must be refused").to_string()
    }

    #[test]
    fn reads_two_hosts_and_what_it_writes_itself() {
        let config = Config::parse(GOOD, Path::new("x.toml")).unwrap();
        assert_eq!(config.nodes.len(), 2);
        assert_eq!(config.proxy.gate_ms_max, 1000);
        let again = toml::to_string(&config).unwrap();
        assert_eq!(Config::parse(&again, Path::new("x.toml")).unwrap(), config);
    }

    #[test]
    fn unknown_key_names_the_nearest_and_the_line() {
        let text = GOOD.replace("[[node]]\nname = \"a\"", "[[node]]\npg_data = \"/x\"\nname = \"a\"");
        assert_eq!(
            message(&text),
            "configuration x.toml, line 11: unknown key \"pg_data\"; the nearest known one is \"pgdata\""
        );
        let text = GOOD.replace("listen =", "lisen =");
        assert!(message(&text).contains("line 7: unknown key \"lisen\"; the nearest known one is \"listen\""));
    }

    #[test]
    fn wrong_value_names_the_line() {
        let text = GOOD.replacen("port = 5432", "port = 99999", 1);
        assert!(message(&text).starts_with("configuration x.toml, line 17: "), "{}", message(&text));
        assert!(message("[cluster").starts_with("configuration x.toml, line 1: "));
    }

    #[test]
    fn missing_file_says_how_to_name_one() {
        let error = Config::load(Path::new("/nonexistent/pgtandem.toml")).expect_err("must be refused");
        assert!(error.to_string().contains("/nonexistent/pgtandem.toml"));
        assert!(error.hint().contains("--config"));
    }
}
