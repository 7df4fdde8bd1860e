//! The commands status, detach and recover as an operator types them: with a running proxy, and without one.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test that panics has failed")]

use std::fs;
use std::net::TcpListener;
use std::process::Output;
use std::sync::{Arc, Mutex};

use pgtandem::agent::Agent;
use pgtandem::agent::certificates::{Authority, PROXY};
use pgtandem::agent::client::Control;
use pgtandem::agent::record::RecordStore;
use pgtandem::agent::tls::Identity;
use pgtandem::cluster::members;
use pgtandem::config::{ClusterConfig, Config, NodeConfig, ProxyConfig};
use pgtandem::observe::status::StatusSource;
use pgtandem::proxy::control::{Operations, serve};
use pgtandem::recovery::client::AgentClients;
use pgtandem::recovery::contact::{self, Seen};
use pgtandem::recovery::recoveries::Recoveries;
use pgtandem::recovery::replication::{CutDone, Drained, JoinDone, Replication, ReplicationError};
use pgtandem_proto::membership::{MemberSet, NodeState, Record};
use pgtandem_proto::message::{NodeStatus, Reply, Request};
use serde_json::Value;
use tempfile::TempDir;
use tokio_util::sync::CancellationToken;

/// Three configured nodes in one cluster. Those that are started have an agent in this process and no PostgreSQL.
struct Site {
    folder: TempDir,
    config: Config,
    listeners: Vec<Option<TcpListener>>,
    agents: Vec<Agent>,
}

impl Site {
    fn new(names: &[&str]) -> Self {
        let folder = tempfile::Builder::new().prefix("pgtandem-").tempdir().unwrap();
        let authority = Authority::create("shop").unwrap();
        let (mut nodes, mut listeners) = (Vec::new(), Vec::new());
        for name in names {
            let listener = TcpListener::bind("127.0.0.1:0").unwrap();
            listener.set_nonblocking(true).unwrap();
            let home = folder.path().join(name);
            let state_dir = home.join("state");
            fs::create_dir_all(&state_dir).unwrap();
            authority.issue(name).unwrap().save(&state_dir).unwrap();
            nodes.push(NodeConfig {
                name: (*name).to_owned(),
                agent: listener.local_addr().unwrap(),
                state_dir,
                pgdata: home.join("pgdata"),
                bin_dir: "/usr/lib/postgresql/15/bin".into(),
                socket_dir: home.join("socket"),
                port: 1024,
                archive_dir: None,
                tablespaces: std::collections::BTreeMap::new(),
                service_addresses: Vec::new(),
            });
            listeners.push(Some(listener));
        }
        let state_dir = folder.path().join("proxy");
        fs::create_dir_all(&state_dir).unwrap();
        authority.issue(PROXY).unwrap().save(&state_dir).unwrap();
        let free = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let proxy = ProxyConfig {
            node: names[0].to_owned(),
            listen: free,
            state_dir,
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
        };
        let config = Config {
            cluster: ClusterConfig { name: "shop".into(), ..ClusterConfig::default() },
            proxy,
            fence: pgtandem::config::FenceConfig::default(),
            archive: None,
            nodes,
            path: std::path::PathBuf::new(),
        };
        fs::write(folder.path().join("pgtandem.toml"), toml::to_string(&config).unwrap()).unwrap();
        Self { folder, config, listeners, agents: Vec::new() }
    }

    /// Starts the agent of a node whose record says `state` under `set`.
    async fn start(&mut self, place: usize, set: &MemberSet, state: NodeState) {
        let node = &self.config.nodes[place];
        let mut store = RecordStore::open(&node.state_dir, "shop", &node.name).unwrap();
        let record = Record { members: Some(set.clone()), promised: set.epoch, state, ..store.record().clone() };
        store.replace(record).unwrap();
        drop(store);
        let listener = tokio::net::TcpListener::from_std(self.listeners[place].take().unwrap()).unwrap();
        self.agents.push(Agent::start(self.config.clone(), &node.name.clone(), listener).await.unwrap());
    }

    /// Nobody listens for the nodes that were not started.
    fn others_are_down(&mut self) {
        self.listeners.clear();
    }

    async fn pgtandem(&self, arguments: &[&str]) -> Output {
        tokio::process::Command::new(env!("CARGO_BIN_EXE_pgtandem"))
            .args(arguments)
            .arg("--config")
            .arg(self.folder.path().join("pgtandem.toml"))
            .stdin(std::process::Stdio::null())
            .output()
            .await
            .unwrap()
    }

    async fn status(&self, place: usize) -> NodeStatus {
        let identity = Identity::load(&self.config.proxy.state_dir).unwrap();
        let mut control = Control::connect(&identity, &self.config.nodes[place]).await.unwrap();
        match control.request(&Request::Status).await.unwrap() {
            Reply::Status(status) => *status,
            other => panic!("{other:?}"),
        }
    }
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// A set of three in the reign of epoch 4.
fn three() -> MemberSet {
    let set = members::with(&members::with(&members::first("a"), "b").unwrap(), "c").unwrap();
    members::in_epoch(&set, 4, "a").unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn status_without_a_proxy_asks_the_agents() {
    let mut site = Site::new(&["a", "b"]);
    let set = members::in_epoch(&members::first("a"), 2, "a").unwrap();
    site.start(0, &set, NodeState::InSync).await;
    site.others_are_down();
    let output = site.pgtandem(&["status"]).await;
    let shown = text(&output.stdout);
    assert_eq!(output.status.code(), Some(3), "{shown}{}", text(&output.stderr));
    for part in ["NO PROXY RUNS", "pgtandem proxy", "b is out", "pgtandem recover b", "epoch 2, member set 1"] {
        assert!(shown.contains(part), "{part} is not in:\n{shown}");
    }
    let json: Value = serde_json::from_slice(&site.pgtandem(&["status", "--json"]).await.stdout).unwrap();
    assert_eq!(json["proxy_running"], false);
    assert_eq!(json["nodes"][0]["role"], "leader");
    assert_eq!(json["nodes"][1]["agent_reachable"], false);
    let recover = site.pgtandem(&["recover", "b"]).await;
    assert_eq!(recover.status.code(), Some(1));
    assert!(text(&recover.stderr).contains("the proxy is not running"), "{}", text(&recover.stderr));
    assert!(text(&recover.stderr).contains("pgtandem proxy"), "{}", text(&recover.stderr));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lost_member_is_detached_without_a_proxy_by_an_operator_who_says_yes() {
    let mut site = Site::new(&["a", "b", "c"]);
    let set = three();
    site.start(0, &set, NodeState::InSync).await;
    site.start(2, &set, NodeState::InSync).await;
    site.others_are_down();

    let asked = site.pgtandem(&["detach", "b"]).await;
    assert_eq!(asked.status.code(), Some(1));
    assert!(text(&asked.stderr).contains("pgtandem detach b --yes"), "{}", text(&asked.stderr));
    assert_eq!(site.status(0).await.record.members, Some(set.clone()), "nothing was written yet");

    let leader = site.pgtandem(&["detach", "a", "--yes"]).await;
    assert!(text(&leader.stderr).contains("leader"), "{}", text(&leader.stderr));

    let done = site.pgtandem(&["detach", "b", "--yes", "--json"]).await;
    assert!(done.status.success(), "{}", text(&done.stderr));
    let json: Value = serde_json::from_slice(&done.stdout).unwrap();
    assert_eq!(json["members"], serde_json::json!(["a", "c"]));
    for place in [0, 2] {
        let record = site.status(place).await.record;
        let stored = record.members.unwrap();
        assert_eq!(stored.nodes, ["a", "c"]);
        assert!(members::is_successor(&set, &stored));
        assert_eq!(record.state, NodeState::InSync);
        assert!(record.overrides.iter().any(|note| note.contains("detached b")), "{:?}", record.overrides);
    }
    let again = site.pgtandem(&["detach", "b", "--yes"]).await;
    assert!(text(&again.stdout).contains("b is not a member"), "{}", text(&again.stdout));
}

#[tokio::test(flavor = "multi_thread")]
async fn no_record_is_overridden_while_something_serves_clients() {
    let mut site = Site::new(&["a", "b"]);
    let set = members::with(&members::first("a"), "b").unwrap();
    site.start(0, &set, NodeState::InSync).await;
    site.others_are_down();
    let _serving = TcpListener::bind(site.config.proxy.listen).unwrap();
    let output = site.pgtandem(&["detach", "b", "--yes"]).await;
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output.stderr).contains("accepts connections"), "{}", text(&output.stderr));
    assert_eq!(site.status(0).await.record.members, Some(set));
}

/// A proxy as far as the commands see it: a member set, and no servers behind it.
struct NoServers {
    set: Mutex<MemberSet>,
}

impl StatusSource for NoServers {
    fn last_error(&self, node: &str) -> Option<String> {
        (node == "b").then(|| "its PostgreSQL died".into())
    }
}

impl Replication for NoServers {
    fn epoch(&self) -> u64 {
        self.set.lock().unwrap().epoch
    }

    fn members(&self) -> MemberSet {
        self.set.lock().unwrap().clone()
    }

    async fn cut(&self, _: &str) -> Result<CutDone, ReplicationError> {
        unreachable!("no fill succeeds here")
    }

    async fn drain(&self, _: &str, _: &(dyn Fn(Drained) + Sync)) -> Result<(), ReplicationError> {
        unreachable!("no fill succeeds here")
    }

    async fn join(&self, _: &str, _: &(dyn Fn(&str) + Sync)) -> Result<JoinDone, ReplicationError> {
        unreachable!("no fill succeeds here")
    }

    async fn abandon(&self, _: &str) {}

    async fn switch(&self, _: &str) -> Result<MemberSet, ReplicationError> {
        unreachable!("nobody asks for it here")
    }

    async fn remove(&self, node: &str, _: &str) -> Result<MemberSet, ReplicationError> {
        let mut set = self.set.lock().unwrap();
        *set = members::without(&set, node).unwrap();
        Ok(set.clone())
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn commands_reach_the_running_proxy() {
    let mut site = Site::new(&["a", "b"]);
    let alone = members::in_epoch(&members::first("a"), 2, "a").unwrap();
    let both = members::with(&alone, "b").unwrap();
    site.start(0, &both, NodeState::InSync).await;
    site.start(1, &both, NodeState::InSync).await;
    let hub = Arc::new(NoServers { set: Mutex::new(both) });
    let identity = Arc::new(Identity::load(&site.config.proxy.state_dir).unwrap());
    let agents = Arc::new(AgentClients::new(identity, site.config.nodes.clone()));
    let names: Vec<_> = site.config.nodes.iter().map(|node| node.name.clone()).collect();
    let stop = CancellationToken::new();
    let seen = Arc::new(Seen::default());
    let operations = Operations {
        cluster: "shop".into(),
        nodes: site.config.nodes.clone(),
        recoveries: Arc::new(Recoveries::new(hub.clone(), agents.clone(), names.clone(), stop.clone())),
        seen: seen.clone(),
        source: hub.clone(),
    };
    let path = site.config.proxy.state_dir.join("control.sock");
    let (socket_stop, socket_path) = (stop.clone(), path.clone());
    let socket = tokio::spawn(async move { serve(&socket_path, Arc::new(operations), socket_stop).await });
    while !path.exists() {
        assert!(!socket.is_finished(), "{:?}", socket.await);
        tokio::task::yield_now().await;
    }

    // A member is not recovered by mistake.
    let recover = site.pgtandem(&["recover", "b"]).await;
    assert_eq!(recover.status.code(), Some(1));
    assert!(text(&recover.stderr).contains("--yes"), "{}", text(&recover.stderr));

    let detach = site.pgtandem(&["detach", "b"]).await;
    assert!(text(&detach.stdout).contains("b is detached. Writes go on, on a."), "{}", text(&detach.stderr));

    // The node was not told; the contact does that.
    assert_eq!(site.status(1).await.record.state, NodeState::InSync);
    let smaller = hub.members();
    let mut leader =
        Control::connect(&Identity::load(&site.config.proxy.state_dir).unwrap(), &site.config.nodes[0]).await.unwrap();
    let (state, uncertain) = (NodeState::InSync, false);
    leader
        .request(&Request::Store { members: smaller, state, uncertain, new_generation: None, note: None })
        .await
        .unwrap();
    let contacts = tokio::spawn(contact::run(hub.clone(), agents, names, seen, stop.clone()));
    while site.status(1).await.record.state != NodeState::Stale {
        assert!(!contacts.is_finished());
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }

    let status = site.pgtandem(&["status"]).await;
    assert!(status.status.success(), "{}", text(&status.stderr));
    let shown = text(&status.stdout);
    assert!(
        shown.contains("b left the member set, and writes since then are not on it (its PostgreSQL died)"),
        "{shown}"
    );
    assert!(shown.contains("next: pgtandem recover b"), "{shown}");

    for (node, part) in [("a", "is the leader"), ("z", "no node is named z")] {
        let output = site.pgtandem(&["recover", node]).await;
        assert_eq!(output.status.code(), Some(1));
        assert!(text(&output.stderr).contains(part), "{}", text(&output.stderr));
    }

    // There is no PostgreSQL to copy from: refused before anything is touched, and said so, in JSON, too.
    let recover = site.pgtandem(&["recover", "b", "--json"]).await;
    assert_eq!(recover.status.code(), Some(1));
    let shown = text(&recover.stdout);
    let last: Value = serde_json::from_str(shown.lines().last().unwrap()).unwrap();
    assert_eq!(last["error"]["phase"], "preflight", "{last}");
    assert_eq!(last["error"]["kind"], "source");
    assert!(!last["error"]["hint"].as_str().unwrap().is_empty());
    assert_eq!(site.status(1).await.record.state, NodeState::Stale);

    stop.cancel();
    socket.await.unwrap().unwrap();
    contacts.await.unwrap();
}
