//! What must hold in a configuration beyond the types of its values. Pure.

use std::collections::{HashMap, HashSet};
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};

use super::{Config, FenceConfig, NodeConfig, ProxyConfig};

/// Nodes in one cluster.
pub const NODES_MAX: usize = 32;
/// Bytes of a cluster's or a node's name.
pub const NAME_BYTES_MAX: usize = 32;
/// Bytes of a path that ends up in a unix socket's address (`sun_path` has 108, with a zero byte at its end).
pub const SOCKET_PATH_BYTES_MAX: usize = 107;
/// Name of the proxy in certificates; no node can have it.
pub const PROXY_NAME: &str = "proxy";

/// What is wrong with the meaning of a configuration.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Problem {
    #[error("there is no [[node]]")]
    NoNodes,
    #[error("there are {0} nodes, at most {NODES_MAX} are possible")]
    TooManyNodes(usize),
    #[error("{what} is called \"{name}\"; a name has 1 to {NAME_BYTES_MAX} of {allowed}")]
    BadName { what: &'static str, name: String, allowed: &'static str },
    #[error("a node is called \"{PROXY_NAME}\"; the proxy has that name in the certificates")]
    ReservedName,
    #[error("two nodes are called \"{0}\"")]
    DuplicateName(String),
    #[error("proxy.node is \"{node}\", which is no [[node]]; there are: {known}")]
    UnknownProxyNode { node: String, known: String },
    #[error("{first} and {second} both listen on {address}")]
    SameAddress { first: String, second: String, address: SocketAddr },
    #[error("{what} is {address}: port 0 is no port to connect to")]
    NoPort { what: String, address: SocketAddr },
    #[error("agent of node \"{node}\" is {address}: other hosts cannot connect to that")]
    NotReachable { node: String, address: SocketAddr },
    #[error("{first} and {second}, on the same host, both use {}", .path.display())]
    SamePath { first: String, second: String, path: PathBuf },
    #[error("{what} is {}, which is no absolute path", .path.display())]
    Relative { what: String, path: PathBuf },
    #[error("{what}: the socket {} is {bytes} bytes long, PostgreSQL and Linux allow {SOCKET_PATH_BYTES_MAX}", .path.display())]
    SocketPathTooLong { what: String, path: PathBuf, bytes: usize },
    #[error("proxy.{given} is there and proxy.{missing} is not")]
    HalfOfTls { given: &'static str, missing: &'static str },
    #[error("fence.dns is \"{0}\", which is no name of a host")]
    BadServiceName(String),
    #[error("fence.{given} is there and fence.dns is not")]
    NoServiceName { given: &'static str },
    #[error("fence.command begins with \"{0}\", which is no absolute path")]
    RelativeCommand(String),
    #[error("{what} is inside {}, whose content is not kept", .outer.display())]
    Inside { what: String, outer: PathBuf },
    #[error("{what} is {value}; it must be from {min} to {max}")]
    OutOfRange { what: &'static str, value: u64, min: u64, max: u64 },
}

impl Problem {
    /// The next thing to do, one sentence.
    #[must_use]
    pub fn hint(&self) -> String {
        match self {
            Self::NoNodes => "add a [[node]] for each PostgreSQL server".into(),
            Self::TooManyNodes(_) => "remove nodes, or make a second cluster".into(),
            Self::BadName { .. } | Self::ReservedName | Self::DuplicateName(_) => "choose another name".into(),
            Self::UnknownProxyNode { .. } => "write the name of the node on whose host the proxy runs".into(),
            Self::SameAddress { .. } | Self::NoPort { .. } => "choose a free port".into(),
            Self::NotReachable { .. } => "write the address by which the other hosts reach this node".into(),
            Self::SamePath { .. } => "give each its own folder".into(),
            Self::Relative { .. } => "write the whole path, from /".into(),
            Self::Inside { .. } => "choose a folder outside, best on a disk of its own".into(),
            Self::SocketPathTooLong { .. } => "choose a shorter folder, for example below /run".into(),
            Self::BadServiceName(_) => "write the name to which clients connect, for example db.example.org".into(),
            Self::NoServiceName { given } => format!("add fence.dns, or remove fence.{given}"),
            Self::RelativeCommand(_) => "write the whole path of the program, from /".into(),
            Self::HalfOfTls { given, missing } => format!("add proxy.{missing}, or remove proxy.{given}"),
            Self::OutOfRange { .. } => "choose a value within these limits, or remove the line".into(),
        }
    }
}

/// Checks everything that can be known without looking at the machine; the first problem found is returned.
pub fn check(config: &Config) -> Result<(), Problem> {
    names(config)?;
    addresses(config)?;
    paths(config)?;
    tls(&config.proxy)?;
    fence(&config.fence)?;
    limits(config)
}

fn fence(fence: &FenceConfig) -> Result<(), Problem> {
    match &fence.dns {
        Some(name) if !is_host_name(name) => return Err(Problem::BadServiceName(name.clone())),
        None if fence.dns_strict => return Err(Problem::NoServiceName { given: "dns_strict" }),
        None if !fence.dns_servers.is_empty() => return Err(Problem::NoServiceName { given: "dns_servers" }),
        _ => {}
    }
    match fence.command.first() {
        Some(program) if !Path::new(program).is_absolute() => Err(Problem::RelativeCommand(program.clone())),
        _ => Ok(()),
    }
}

/// RFC 1123: labels of letters, digits and `-`; an address is none.
fn is_host_name(name: &str) -> bool {
    let name = name.strip_suffix('.').unwrap_or(name);
    let is_label = |label: &str| {
        (1..=63).contains(&label.len())
            && label.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-')
            && !label.starts_with('-')
            && !label.ends_with('-')
    };
    name.len() <= 253 && name.split('.').all(is_label) && name.parse::<IpAddr>().is_err()
}

fn tls(proxy: &ProxyConfig) -> Result<(), Problem> {
    let half = |given, missing| Err(Problem::HalfOfTls { given, missing });
    match (&proxy.tls_certificate, &proxy.tls_key) {
        (Some(_), None) => half("tls_certificate", "tls_key"),
        (None, Some(_)) => half("tls_key", "tls_certificate"),
        (None, None) if proxy.tls_required => half("tls_required", "tls_certificate"),
        _ => Ok(()),
    }
}

fn names(config: &Config) -> Result<(), Problem> {
    let good = |name: &str, others: &[u8]| {
        (1..=NAME_BYTES_MAX).contains(&name.len())
            && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || others.contains(&byte))
    };
    let cluster = &config.cluster.name;
    if !good(cluster, b"_") {
        let allowed = "A-Z a-z 0-9 _";
        return Err(Problem::BadName { what: "the cluster", name: cluster.clone(), allowed });
    }
    match config.nodes.len() {
        0 => return Err(Problem::NoNodes),
        count if count > NODES_MAX => return Err(Problem::TooManyNodes(count)),
        _ => {}
    }
    let mut seen = HashSet::new();
    for NodeConfig { name, .. } in &config.nodes {
        if !good(name, b"_-") {
            let allowed = "A-Z a-z 0-9 _ -";
            return Err(Problem::BadName { what: "a node", name: name.clone(), allowed });
        }
        if name == PROXY_NAME {
            return Err(Problem::ReservedName);
        }
        // Names of certificates and replication slots do not tell `-` from `_`, nor capitals from small letters.
        let folded = name.to_ascii_lowercase().replace('-', "_");
        if !seen.insert(folded) {
            return Err(Problem::DuplicateName(name.clone()));
        }
    }
    if config.node(&config.proxy.node).is_none() {
        let known = config.nodes.iter().map(|node| node.name.as_str()).collect::<Vec<_>>().join(", ");
        return Err(Problem::UnknownProxyNode { node: config.proxy.node.clone(), known });
    }
    Ok(())
}

fn addresses(config: &Config) -> Result<(), Problem> {
    let mut taken: Vec<(String, SocketAddr)> = Vec::new();
    let proxy = ("proxy.listen".to_owned(), config.proxy.listen);
    let agents = config.nodes.iter().map(|node| (format!("the agent of node \"{}\"", node.name), node.agent));
    for (what, address) in std::iter::once(proxy).chain(agents) {
        if address.port() == 0 {
            return Err(Problem::NoPort { what, address });
        }
        if let Some((first, _)) = taken.iter().find(|(_, other)| collide(*other, address)) {
            return Err(Problem::SameAddress { first: first.clone(), second: what, address });
        }
        taken.push((what, address));
    }
    match config.nodes.iter().find(|node| node.agent.ip().is_unspecified()) {
        Some(node) => Err(Problem::NotReachable { node: node.name.clone(), address: node.agent }),
        None => Ok(()),
    }
}

fn collide(a: SocketAddr, b: SocketAddr) -> bool {
    // A proxy that listens everywhere (0.0.0.0) also listens where an agent does; whether that is on its own host
    // is only known for the agent of the same address family, so equal ports are refused there.
    a.port() == b.port() && (a.ip() == b.ip() || a.ip().is_unspecified() && a.is_ipv4() == b.is_ipv4())
}

fn paths(config: &Config) -> Result<(), Problem> {
    let proxy_host = config.node(&config.proxy.node).map(|node| node.agent.ip());
    let mut taken: HashMap<(IpAddr, PathBuf), String> = HashMap::new();
    let mut take = |host: Option<IpAddr>, what: String, path: &Path, alone: bool| {
        if !path.is_absolute() {
            return Err(Problem::Relative { what, path: path.into() });
        }
        let Some(host) = host.filter(|_| alone) else { return Ok(()) };
        match taken.insert((host, path.into()), what.clone()) {
            Some(first) => Err(Problem::SamePath { first, second: what, path: path.into() }),
            None => Ok(()),
        }
    };
    take(proxy_host, "proxy.state_dir".into(), &config.proxy.state_dir, true)?;
    for (what, path) in
        [("proxy.tls_certificate", &config.proxy.tls_certificate), ("proxy.tls_key", &config.proxy.tls_key)]
    {
        if let Some(path) = path {
            take(proxy_host, what.into(), path, false)?;
        }
    }
    socket("proxy.state_dir".into(), config.proxy.state_dir.join("control.sock"))?;
    for node in &config.nodes {
        let host = Some(node.agent.ip());
        let name = |key: &str| format!("{key} of node \"{}\"", node.name);
        take(host, name("state_dir"), &node.state_dir, true)?;
        take(host, name("pgdata"), &node.pgdata, true)?;
        take(host, name("archive_dir"), &node.archive_dir(), true)?;
        if let Some(outer) =
            [&node.pgdata, &node.socket_dir].into_iter().find(|outer| node.archive_dir().starts_with(outer))
        {
            return Err(Problem::Inside { what: name("archive_dir"), outer: outer.clone() });
        }
        take(host, name("bin_dir"), &node.bin_dir, false)?;
        take(host, name("socket_dir"), &node.socket_dir, false)?;
        let file = node.socket_dir.join(format!(".s.PGSQL.{}", node.port));
        take(host, name("socket_dir and port"), &file, true)?;
        for (theirs, here) in &node.tablespaces {
            take(None, name("tablespaces"), theirs, false)?;
            take(host, name("tablespaces"), here, true)?;
        }
        socket(name("socket_dir"), file)?;
    }
    Ok(())
}

fn socket(what: String, path: PathBuf) -> Result<(), Problem> {
    let bytes = path.as_os_str().len();
    if bytes > SOCKET_PATH_BYTES_MAX { Err(Problem::SocketPathTooLong { what, path, bytes }) } else { Ok(()) }
}

fn limits(config: &Config) -> Result<(), Problem> {
    let proxy = &config.proxy;
    for (what, value, min, max) in [
        ("proxy.threads", proxy.threads as u64, 0, 1024),
        ("proxy.gate_ms_max", proxy.gate_ms_max, 1, 60_000),
        ("proxy.follower_ms_max", proxy.follower_ms_max, 100, 3_600_000),
        ("proxy.leader_ms_max", proxy.leader_ms_max, 500, 3_600_000),
        ("proxy.effects_disk_max", proxy.effects_disk_max, 1 << 20, 1 << 50),
        ("proxy.backlog_bytes_max", proxy.backlog_bytes_max, 1 << 20, 1 << 40),
        ("proxy.away_s_max", proxy.away_s_max, 0, 86_400),
        ("proxy.away_bytes_max", proxy.away_bytes_max, 1 << 20, 1 << 40),
        ("proxy.clients_max", proxy.clients_max as u64, 1, 1_000_000),
        ("cluster.fill_latency_percent_max", config.cluster.fill_latency_percent_max, 0, 100_000),
        ("fence.dns_ms", config.fence.dns_ms, 200, 3_600_000),
        ("fence.command_ms_max", config.fence.command_ms_max, 1, 3_600_000),
    ] {
        if !(min..=max).contains(&value) {
            return Err(Problem::OutOfRange { what, value, min, max });
        }
    }
    let Some(archive) = &config.archive else { return Ok(()) };
    for (what, value, min, max) in [
        ("archive.every_s", archive.every_s, 0, 366 * 86_400),
        ("archive.keep", archive.keep, 1, 10_000),
        ("archive.keep_days", archive.keep_days, 0, 36_500),
        ("archive.segment_s_max", archive.segment_s_max, 0, 86_400),
    ] {
        if !(min..=max).contains(&value) {
            return Err(Problem::OutOfRange { what, value, min, max });
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config() -> Config {
        Config::parse(super::super::tests::GOOD, Path::new("x.toml")).unwrap()
    }

    #[test]
    fn names_are_checked() {
        let mut bad = config();
        bad.nodes[1].name = "A".into();
        assert_eq!(check(&bad), Err(Problem::DuplicateName("A".into())));
        bad.nodes[1].name = "b c".into();
        assert!(matches!(check(&bad), Err(Problem::BadName { .. })));
        bad.nodes[1].name = "proxy".into();
        assert_eq!(check(&bad), Err(Problem::ReservedName));
        bad.nodes[1].name = "b".into();
        bad.proxy.node = "c".into();
        assert_eq!(
            check(&bad).expect_err("unknown").to_string(),
            "proxy.node is \"c\", which is no [[node]]; there are: a, b"
        );
        bad.cluster.name = String::new();
        assert!(matches!(check(&bad), Err(Problem::BadName { what: "the cluster", .. })));
    }

    #[test]
    fn one_port_serves_one_thing() {
        let mut bad = config();
        bad.nodes[1].agent = bad.nodes[0].agent;
        assert!(matches!(check(&bad), Err(Problem::SameAddress { .. })));
        let mut bad = config();
        bad.proxy.listen = "0.0.0.0:6433".parse().unwrap();
        assert!(matches!(check(&bad), Err(Problem::SameAddress { .. })));
        bad.proxy.listen = "0.0.0.0:0".parse().unwrap();
        assert!(matches!(check(&bad), Err(Problem::NoPort { .. })));
    }

    #[test]
    fn an_archive_lies_outside_of_what_it_is_of() {
        let mut bad = config();
        bad.nodes[0].archive_dir = Some(bad.nodes[0].pgdata.join("archive"));
        assert!(matches!(check(&bad), Err(Problem::Inside { .. })));
        bad.nodes[0].archive_dir = Some(bad.nodes[0].state_dir.clone());
        assert!(matches!(check(&bad), Err(Problem::SamePath { .. })));
        bad.nodes[0].archive_dir = Some("/mnt/archive".into());
        bad.archive = Some(super::super::ArchiveConfig { keep: 0, ..Default::default() });
        assert!(matches!(check(&bad), Err(Problem::OutOfRange { what: "archive.keep", .. })));
    }

    #[test]
    fn folders_are_shared_only_between_hosts() {
        let mut bad = config();
        bad.nodes[1].agent = "10.0.0.1:7000".parse().unwrap();
        assert!(matches!(check(&bad), Err(Problem::SamePath { .. })));
        let mut bad = config();
        bad.nodes[0].pgdata = "data".into();
        assert!(matches!(check(&bad), Err(Problem::Relative { .. })));
        let mut bad = config();
        bad.nodes[0].socket_dir = format!("/{}", "x".repeat(100)).into();
        assert!(matches!(check(&bad), Err(Problem::SocketPathTooLong { .. })));
    }

    #[test]
    fn tls_needs_both_files() {
        let mut bad = config();
        bad.proxy.tls_required = true;
        assert!(matches!(check(&bad), Err(Problem::HalfOfTls { missing: "tls_certificate", .. })));
        bad.proxy.tls_certificate = Some("/etc/server.crt".into());
        assert!(matches!(check(&bad), Err(Problem::HalfOfTls { missing: "tls_key", .. })));
        bad.proxy.tls_key = Some("server.key".into());
        assert!(matches!(check(&bad), Err(Problem::Relative { .. })));
        bad.proxy.tls_key = Some("/etc/server.key".into());
        assert_eq!(check(&bad), Ok(()));
    }

    #[test]
    fn a_fence_is_whole() {
        let mut bad = config();
        bad.fence.dns_strict = true;
        assert_eq!(check(&bad), Err(Problem::NoServiceName { given: "dns_strict" }));
        for name in ["", "10.0.0.1", "db..org", "-db.org", "db_1", &"x".repeat(64)] {
            bad.fence.dns = Some(name.to_owned());
            assert_eq!(check(&bad), Err(Problem::BadServiceName(name.to_owned())));
        }
        bad.fence.dns = Some("db.example.org.".into());
        assert_eq!(check(&bad), Ok(()));
        bad.fence.command = vec!["fence-agent".into()];
        assert_eq!(check(&bad), Err(Problem::RelativeCommand("fence-agent".into())));
    }

    #[test]
    fn limits_have_limits() {
        let mut bad = config();
        bad.proxy.gate_ms_max = 0;
        assert!(check(&bad).expect_err("0").to_string().contains("must be from 1 to 60000"));
    }
}
