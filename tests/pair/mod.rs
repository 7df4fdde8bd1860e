//! Two nodes with agents in this process, and how to talk to them.
#![allow(dead_code, reason = "each test program uses a part")]

use std::fs;
use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use pgtandem::agent::Agent;
use pgtandem::agent::certificates::{Authority, PROXY};
use pgtandem::agent::client::{ClientError, Control};
use pgtandem::agent::postgres::Postgres;
use pgtandem::agent::tls::Identity;
use pgtandem::config::{ClusterConfig, Config, NodeConfig, ProxyConfig};
use pgtandem_proto::membership::{MemberSet, NodeState, Record};
use pgtandem_proto::message::{FailureCode, NodeStatus, Reply, Request};
use rustix::process::{Pid, Signal, kill_process, test_kill_process};
use tempfile::TempDir;
use tokio::time::{sleep, timeout};

pub const BIN_DIR: &str = "/usr/lib/postgresql/15/bin";
/// Longest wait for a condition.
pub const WAIT: Duration = Duration::from_secs(30);

/// Two configured nodes, a and b, with certificates. Their agents run in this process.
pub struct Site {
    pub folder: TempDir,
    pub config: Config,
    listeners: Vec<Option<TcpListener>>,
}

impl Site {
    pub fn new() -> Site {
        let folder = tempfile::Builder::new().prefix("pgtandem-").tempdir().unwrap();
        let listeners = [(); 2].map(|()| TcpListener::bind("127.0.0.1:0").unwrap());
        let free = || TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let node = |name: &str, agent| {
            let home = folder.path().join(name);
            for part in ["state", "socket"] {
                fs::create_dir_all(home.join(part)).unwrap();
            }
            NodeConfig {
                name: name.to_owned(),
                agent,
                state_dir: home.join("state"),
                pgdata: home.join("pgdata"),
                bin_dir: BIN_DIR.into(),
                socket_dir: home.join("socket"),
                port: free().port(),
                archive_dir: None,
                tablespaces: std::collections::BTreeMap::new(),
                service_addresses: Vec::new(),
            }
        };
        let nodes = vec![node("a", listeners[0].local_addr().unwrap()), node("b", listeners[1].local_addr().unwrap())];
        let config = Config {
            cluster: ClusterConfig { name: "shop".to_owned(), ..ClusterConfig::default() },
            proxy: ProxyConfig {
                node: "a".to_owned(),
                listen: free(),
                state_dir: folder.path().join("proxy"),
                threads: 0,
                gate_ms_max: 1000,
                follower_ms_max: 1000,
                leader_ms_max: 1000,
                effects_disk_max: 1 << 20,
                backlog_bytes_max: 1 << 20,
                away_s_max: 0,
                away_bytes_max: 1 << 20,
                unproven: pgtandem::config::Unproven::default(),
                clients_max: 10,
                tls_certificate: None,
                tls_key: None,
                tls_required: false,
            },
            fence: pgtandem::config::FenceConfig::default(),
            archive: None,
            nodes,
            path: folder.path().join("pgtandem.toml"),
        };
        fs::create_dir_all(&config.proxy.state_dir).unwrap();
        let authority = Authority::create("shop").unwrap();
        authority.save(folder.path()).unwrap();
        for node in &config.nodes {
            authority.issue(&node.name).unwrap().save(&node.state_dir).unwrap();
        }
        authority.issue(PROXY).unwrap().save(&config.proxy.state_dir).unwrap();
        Site { folder, config, listeners: listeners.into_iter().map(Some).collect() }
    }

    pub fn node(&self, index: usize) -> &NodeConfig {
        &self.config.nodes[index]
    }

    pub fn proxy(&self) -> Identity {
        Identity::load(&self.config.proxy.state_dir).unwrap()
    }

    pub async fn start(&mut self, index: usize) -> Agent {
        let node = self.config.nodes[index].clone();
        let listener = self.listeners[index].take().unwrap_or_else(|| TcpListener::bind(node.agent).unwrap());
        listener.set_nonblocking(true).unwrap();
        let listener = tokio::net::TcpListener::from_std(listener).unwrap();
        Agent::start(self.config.clone(), &node.name, listener).await.unwrap()
    }

    pub async fn control(&self, index: usize) -> Control {
        Control::connect(&self.proxy(), self.node(index)).await.unwrap()
    }

    /// A data directory for a, as the sandbox makes it.
    pub fn initdb(&self) {
        let node = self.node(0);
        fs::set_permissions(&node.socket_dir, fs::Permissions::from_mode(0o700)).unwrap();
        let output = Command::new(Path::new(BIN_DIR).join("initdb"))
            .args(["--no-sync", "--username=pgtandem", "--auth=trust", "--pgdata"])
            .arg(&node.pgdata)
            .output()
            .unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let settings = format!(
            "port = {}\nlisten_addresses = ''\nunix_socket_directories = '{}'\nmax_prepared_transactions = 10\nfsync = off\n",
            node.port,
            node.socket_dir.display()
        );
        let path = node.pgdata.join("postgresql.conf");
        fs::write(&path, fs::read_to_string(&path).unwrap() + &settings).unwrap();
    }
}

impl Drop for Site {
    /// A test that failed leaves no PostgreSQL behind.
    fn drop(&mut self) {
        for node in &self.config.nodes {
            if let Ok(Some(pid)) = Postgres::new(node.clone()).postmaster_pid()
                && let Some(pid) = Pid::from_raw(pid)
            {
                let _ = kill_process(pid, Signal::QUIT);
                while test_kill_process(pid).is_ok()
                    && Postgres::new(node.clone()).postmaster_pid().is_ok_and(|pid| pid.is_some())
                {
                    std::thread::yield_now();
                }
            }
        }
    }
}

pub async fn status(control: &mut Control) -> NodeStatus {
    match control.request(&Request::Status).await.unwrap() {
        Reply::Status(status) => *status,
        other => panic!("{other:?}"),
    }
}

pub async fn record(control: &mut Control, request: Request) -> Result<Record, FailureCode> {
    match control.request(&request).await {
        Ok(Reply::Record(record)) => Ok(*record),
        Err(ClientError::Failed { failure, .. }) => {
            assert!(!failure.what.is_empty() && !failure.hint.is_empty());
            Err(failure.code)
        }
        other => panic!("{other:?}"),
    }
}

pub fn store(epoch: u64, version: u64, nodes: &[&str], state: NodeState) -> Request {
    Request::Store {
        members: MemberSet {
            epoch,
            version,
            nodes: nodes.iter().map(ToString::to_string).collect(),
            leader: nodes[0].to_owned(),
            proxy: nodes[0].to_owned(),
        },
        state,
        uncertain: false,
        new_generation: None,
        // Only by an override is a node current that was never filled.
        note: (state == NodeState::InSync && nodes.len() == 1).then(|| "made for a test".to_owned()),
    }
}

/// PostgreSQL does not run as root: the test runs once more as user `postgres`, and this returns true there.
pub fn is_postgres_user(test: &str) -> bool {
    if !rustix::process::geteuid().is_root() {
        return true;
    }
    let id = |flag: &str| -> u32 {
        let output = Command::new("id").args([flag, "postgres"]).output().unwrap();
        String::from_utf8_lossy(&output.stdout).trim().parse().expect("a user postgres exists")
    };
    let (uid, gid) = (id("-u"), id("-g"));
    // The program may lie where that user can not reach it.
    let folder = tempfile::tempdir().unwrap();
    fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let program: PathBuf = folder.path().join("test");
    fs::copy(std::env::current_exe().unwrap(), &program).unwrap();
    let output = Command::new(program)
        .args(["--exact", test, "--nocapture"])
        .current_dir("/")
        .env_remove("TMPDIR")
        .uid(uid)
        .gid(gid)
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && text.contains("1 passed"), "as user postgres:\n{text}");
    false
}

pub async fn until(what: &str, mut condition: impl AsyncFnMut() -> bool) {
    let waited = timeout(WAIT, async {
        while !condition().await {
            sleep(Duration::from_millis(20)).await;
        }
    });
    assert!(waited.await.is_ok(), "{what} did not come true");
}

pub fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap()
}
