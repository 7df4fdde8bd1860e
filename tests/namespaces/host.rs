//! Two hosts: network namespaces with a cable between them. Each has its agent with PostgreSQL, its proxy, and clients, which reach
//! nothing but what is there. All of it goes when the value does.

use std::fs;
use std::net::{Ipv4Addr, SocketAddr};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use pgtandem::sandbox::{Layout, compare, user};
use rustix::process::{Pid, Signal};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use tokio_postgres::Client;

use crate::common::{self, Cluster, comes, text};

/// A network for documentation and nobody else (RFC 5737).
const NETWORK: [u8; 3] = [192, 0, 2];
/// Where clients of a host reach its proxy.
const PROXY_PORT: u16 = 6432;
/// A follower that does not answer is given up after this.
const FOLLOWER_MS_MAX: u64 = 2000;

pub struct Host {
    pub index: usize,
    namespace: String,
    config: PathBuf,
    /// Of the clients on it.
    runtime: Option<tokio::runtime::Runtime>,
}

pub struct Site {
    pub hosts: [Host; 2],
    pub cluster: Cluster,
}

/// A program of the system, which must succeed.
fn system(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).stdin(Stdio::null()).output().unwrap();
    assert!(output.status.success(), "{program} {}: {}", arguments.join(" "), text(&output));
    text(&output)
}

fn ip(arguments: &str) {
    system("ip", &arguments.split(' ').collect::<Vec<_>>());
}

impl Site {
    /// Agents and the proxy of the first host run, and all is well.
    pub async fn up() -> Self {
        assert!(user::is_root(), "network namespaces are made by root: make namespaces");
        let cluster = common::cluster();
        // Its data and certificates are what is wanted of it.
        let output = common::pgtandem().args(["sandbox", "down", "--dir"]).arg(cluster.dir()).output().unwrap();
        assert!(output.status.success(), "{}", text(&output));
        let site = Self { hosts: [0, 1].map(|index| Host::new(&cluster, index)), cluster };
        ip(&format!("link add {} type veth peer name {}", site.hosts[0].cable(), site.hosts[1].cable()));
        for host in &site.hosts {
            let (cable, namespace, address) = (host.cable(), &host.namespace, address(host.index));
            ip(&format!("link set {cable} netns {namespace}"));
            ip(&format!("-n {namespace} address add {address}/24 dev {cable}"));
            ip(&format!("-n {namespace} link set {cable} up"));
        }
        for host in &site.hosts {
            host.start(&site.cluster, "agent");
        }
        site.hosts[0].start(&site.cluster, "proxy");
        site.wait_well(0).await;
        site
    }

    /// The cable of the first host is pulled: nothing goes either way, and nobody is told.
    pub fn pull_cable(&self) {
        ip(&format!("-n {} link set {} down", self.hosts[0].namespace, self.hosts[0].cable()));
    }

    pub fn plug_in_cable(&self) {
        ip(&format!("-n {} link set {} up", self.hosts[0].namespace, self.hosts[0].cable()));
    }

    /// A command, typed on a host.
    pub fn typed(&self, host: usize, words: &[String], more: &[&str]) -> Output {
        let host = &self.hosts[host];
        eprintln!("{} $ pgtandem {} {}", host.name(), words.join(" "), more.join(" "));
        let mut command = host.command(&self.cluster);
        let output = command.args(words).args(more).arg("--config").arg(&host.config).output().unwrap();
        eprint!("{}", text(&output));
        output
    }

    /// The same, and it must succeed.
    pub fn succeeds(&self, host: usize, words: &[String], more: &[&str]) -> String {
        let output = self.typed(host, words, more);
        assert!(output.status.success(), "{words:?}\n{}", self.cluster.logs());
        text(&output)
    }

    pub fn status(&self, host: usize) -> String {
        let host = &self.hosts[host];
        text(&host.command(&self.cluster).arg("status").arg("--config").arg(&host.config).output().unwrap())
    }

    /// Waits until the status on this host has all of these.
    pub async fn wait_status(&self, host: usize, parts: &[&str]) {
        let says = async || {
            let status = self.status(host);
            parts.iter().all(|part| status.contains(part))
        };
        assert!(comes(says).await, "{parts:?} not in {}\n{}", self.status(host), self.cluster.logs());
    }

    pub async fn wait_well(&self, host: usize) {
        self.wait_status(host, &["All is well"]).await;
    }
}

fn address(index: usize) -> Ipv4Addr {
    let [a, b, c] = NETWORK;
    Ipv4Addr::new(a, b, c, u8::try_from(index).unwrap() + 1)
}

impl Host {
    fn new(cluster: &Cluster, index: usize) -> Self {
        let namespace = format!("pgtandem-test-{}-{index}", std::process::id());
        ip(&format!("netns add {namespace}"));
        ip(&format!("-n {namespace} link set lo up"));
        let file = fs::File::open(Path::new("/run/netns").join(&namespace)).unwrap();
        let enter = move || move_into_link_name_space(file.as_fd(), Some(LinkNameSpaceType::Network)).unwrap();
        let mut runtime = tokio::runtime::Builder::new_multi_thread();
        let runtime = runtime.worker_threads(1).enable_all().on_thread_start(enter).build().unwrap();
        Self { index, namespace, config: configuration(&cluster.layout, index), runtime: Some(runtime) }
    }

    pub fn name(&self) -> String {
        Layout::node_name(self.index)
    }

    fn cable(&self) -> String {
        format!("pgt{}-{}", std::process::id() % 1_000_000, self.index)
    }

    /// The program, on this host, as the user that everything runs as.
    fn command(&self, cluster: &Cluster) -> Command {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &self.namespace, "setpriv", "--reuid=postgres", "--regid=postgres"]);
        command.arg("--init-groups").arg(cluster.layout.dir.join("bin/pgtandem"));
        command.current_dir("/").env_remove("PGTANDEM_CONFIG").env_remove("PGTANDEM_LOG").stdin(Stdio::null());
        command
    }

    /// `pgtandem agent` or `pgtandem proxy`.
    pub fn start(&self, cluster: &Cluster, daemon: &str) {
        let log = if daemon == "agent" { cluster.layout.agent_log(self.index) } else { cluster.layout.proxy_log() };
        let open = || fs::OpenOptions::new().create(true).append(true).open(&log).unwrap();
        let mut command = self.command(cluster);
        command.args([daemon, "--node", &self.name(), "--config"]).arg(&self.config);
        let mut child = command.stdout(open()).stderr(open()).spawn().unwrap();
        // Waited for, so that nothing of it is left when it is killed.
        std::thread::spawn(move || child.wait());
    }

    /// Every process on it.
    fn pids(&self) -> Vec<Pid> {
        let output = Command::new("ip").args(["netns", "pids", &self.namespace]).output().unwrap();
        let own = rustix::process::getpid();
        let pids =
            String::from_utf8_lossy(&output.stdout).lines().filter_map(|line| line.trim().parse().ok()).collect();
        // The clients are threads of this process.
        let pids: Vec<i32> = pids;
        pids.into_iter().filter_map(Pid::from_raw).filter(|pid| *pid != own).collect()
    }

    pub fn signal(&self, signal: Signal) {
        for pid in self.pids() {
            // One that is gone needs none.
            let _ = rustix::process::kill_process(pid, signal);
        }
    }

    /// Its power is gone: every process ends as by kill -9.
    pub async fn power_off(&self) {
        assert!(
            comes(async || {
                self.signal(Signal::KILL);
                self.pids().is_empty()
            })
            .await
        );
    }

    /// Where clients of this host are.
    pub fn clients(&self) -> &tokio::runtime::Handle {
        self.runtime.as_ref().unwrap().handle()
    }

    pub const fn proxy_port() -> u16 {
        PROXY_PORT
    }

    /// A client of its proxy: the error's SQLSTATE, if there is one.
    pub async fn connect(&self) -> Result<Client, String> {
        self.connect_to(PROXY_PORT).await
    }

    async fn connect_to(&self, port: u16) -> Result<Client, String> {
        let connect = self.clients().spawn(async move { compare::connect(port, "postgres").await });
        connect.await.unwrap().map_err(|compare::CompareError::Postgres { source, .. }| {
            source.code().map_or_else(|| source.to_string(), |code| code.code().to_owned())
        })
    }

    /// What its PostgreSQL says, past the proxy.
    pub async fn ask(&self, cluster: &Cluster, sql: &str) -> String {
        let client = self.connect_to(cluster.layout.postgres_port(self.index)).await.unwrap();
        client.query_one(sql, &[]).await.unwrap().get(0)
    }
}

/// The configuration of one host: what belongs to the other one is not here.
fn configuration(layout: &Layout, index: usize) -> PathBuf {
    let mut config = layout.config();
    config.proxy.listen = SocketAddr::from((Ipv4Addr::LOCALHOST, PROXY_PORT));
    config.proxy.state_dir = layout.dir.join(format!("proxy{index}"));
    config.proxy.follower_ms_max = FOLLOWER_MS_MAX;
    for (number, node) in config.nodes.iter_mut().enumerate() {
        node.agent = SocketAddr::from((address(number), 6433));
        if number != index {
            for path in [&mut node.state_dir, &mut node.pgdata, &mut node.socket_dir] {
                *path = Path::new("/elsewhere").join(&node.name).join(path.file_name().unwrap_or_default());
            }
        }
    }
    fs::create_dir(&config.proxy.state_dir).unwrap();
    let user = user::find("postgres").unwrap();
    std::os::unix::fs::chown(&config.proxy.state_dir, Some(user.uid), Some(user.gid)).unwrap();
    let path = layout.dir.join(format!("host{index}.toml"));
    fs::write(&path, toml::to_string(&config).unwrap()).unwrap();
    path
}

impl Drop for Host {
    /// Whatever has happened: no process and no namespace is left.
    fn drop(&mut self) {
        let began = std::time::Instant::now();
        while !self.pids().is_empty() && began.elapsed() < common::LIMIT {
            self.signal(Signal::KILL);
            std::thread::yield_now();
        }
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
        let deleted = Command::new("ip").args(["netns", "delete", &self.namespace]).output();
        if let Ok(output) = deleted
            && !output.status.success()
        {
            eprintln!("{} is left: {}", self.namespace, text(&output));
        }
    }
}
