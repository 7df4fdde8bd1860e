//! The hosts: each with a configuration of its own, in which the other agents are behind the links, its agent, its PostgreSQL, its proxy. Here is
//! what can be done to them; what is done is decided elsewhere.

use std::fs;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;

use pgtandem::observe::status::ClusterStatus;
use pgtandem::sandbox::{self, Layout};
use rustix::process::{Pid, Signal};

use crate::common::{self, Cluster, text};
use crate::disk::Disk;
use crate::links::Links;
use crate::person::Seen;
use crate::schedule::Process;

/// Room for a fresh cluster and what rounds write, twice, and the GiB that must be free before an empty node is filled.
const DISK_MIB: u32 = 1700;

/// The proxies of the hosts listen from here on, after the sandbox's base port: between its servers and its agents.
const PROXY_PORTS_OFFSET: u16 = 40;
/// A follower that hangs is given up after this, so that a round does not take long.
const FOLLOWER_MS_MAX: u64 = 2000;
/// How long a daemon that was told to end may take.
const END_MAX: Duration = Duration::from_secs(20);
/// Little WAL is kept, because the disks are small.
const SETTINGS: &str = "max_wal_size = 64MB\nmin_wal_size = 32MB\n";

pub struct Host {
    pub name: String,
    pub config: PathBuf,
    /// Where its proxy listens.
    pub port: u16,
    pub agent: Option<Child>,
    pub proxy: Option<Child>,
}

pub struct Site {
    pub hosts: Vec<Host>,
    pub links: Links,
    /// One for each host; or why there are none.
    pub disks: Result<Vec<Disk>, String>,
    pub cluster: Cluster,
}

impl Site {
    /// Hosts that are up, all members, with nothing loaded.
    pub async fn up(nodes: usize) -> Self {
        let cluster = Cluster::up(&["--nodes", &nodes.to_string()]);
        let output =
            common::pgtandem().args(["sandbox", "down", "--dir"]).arg(cluster.dir()).output().expect("pgtandem");
        assert!(output.status.success(), "{}", text(&output));
        let layout = cluster.layout.clone();
        let agents: Vec<SocketAddr> =
            (0..nodes).map(|index| SocketAddr::from((Ipv4Addr::LOCALHOST, layout.agent_port(index)))).collect();
        let links = Links::between(&agents).await;
        let disks = (0..nodes).map(|index| Disk::below(&layout.node_dir(index), DISK_MIB)).collect();
        let hosts = (0..nodes).map(|index| host(&layout, &links, index)).collect();
        let mut site = Self { hosts, links, disks, cluster };
        for index in 0..nodes {
            append(&layout.pgdata(index).join("pgtandem.node.conf"), SETTINGS);
            site.start(index, Process::Agent);
        }
        for index in 0..nodes {
            site.start(index, Process::Proxy);
        }
        site
    }

    pub fn layout(&self) -> &Layout {
        &self.cluster.layout
    }

    /// Starts a daemon that does not run.
    pub fn start(&mut self, host: usize, process: Process) {
        let (verb, log) = match process {
            Process::Agent => ("agent", self.layout().agent_log(host)),
            Process::Proxy => ("proxy", self.proxy_log(host)),
            Process::Postgres => return,
        };
        let open = || fs::OpenOptions::new().create(true).append(true).open(&log).expect("a log");
        let mut command = self.cluster.as_user();
        command.arg(verb).args(["--node", &self.hosts[host].name, "--config"]).arg(&self.hosts[host].config);
        let child = command.stdin(Stdio::null()).stdout(open()).stderr(open()).spawn().expect("pgtandem");
        let host = &mut self.hosts[host];
        match process {
            Process::Agent => host.agent = Some(child),
            _ => host.proxy = Some(child),
        }
    }

    fn proxy_log(&self, host: usize) -> PathBuf {
        self.cluster.dir().join(format!("{}-proxy.log", self.hosts[host].name))
    }

    fn postmaster(&self, host: usize) -> Option<Pid> {
        let text = fs::read_to_string(self.layout().postmaster_pid_file(host)).ok()?;
        let pid = Pid::from_raw(text.lines().next()?.trim().parse().ok()?)?;
        let works_in = fs::read_link(format!("/proc/{}/cwd", pid.as_raw_nonzero())).ok()?;
        (works_in == self.layout().pgdata(host)).then_some(pid)
    }

    /// Its processes: of PostgreSQL the postmaster and its children.
    fn pids(&self, host: usize, process: Process) -> Vec<Pid> {
        let of =
            |child: &Option<Child>| child.as_ref().and_then(|child| Pid::from_raw(i32::try_from(child.id()).ok()?));
        match process {
            Process::Agent => of(&self.hosts[host].agent).into_iter().collect(),
            Process::Proxy => of(&self.hosts[host].proxy).into_iter().collect(),
            Process::Postgres => {
                let Some(postmaster) = self.postmaster(host) else { return Vec::new() };
                [postmaster].into_iter().chain(children(postmaster)).collect()
            }
        }
    }

    /// kill -9; returns when it is gone. PostgreSQL's other processes follow their postmaster.
    pub fn kill(&mut self, host: usize, process: Process) {
        match process {
            Process::Postgres => {
                if let Some(postmaster) = self.postmaster(host) {
                    let _ = rustix::process::kill_process(postmaster, Signal::KILL);
                }
            }
            Process::Agent => end(self.hosts[host].agent.take(), Signal::KILL),
            Process::Proxy => end(self.hosts[host].proxy.take(), Signal::KILL),
        }
    }

    /// To every process of it; gives them, for the signal that follows.
    pub fn signal(&self, host: usize, process: Process, signal: Signal) -> Vec<Pid> {
        let pids = self.pids(host, process);
        send(&pids, signal);
        pids
    }

    /// `pg_ctl restart`, as the user of the server. It may fail, when the agent was faster.
    pub fn restart_postgres(&self, host: usize, mode: &str) -> Output {
        let log = self.layout().node_dir(host).join("postgresql.log");
        let mut command = Command::new(self.layout().plan.bin_dir.join("pg_ctl"));
        if sandbox::user::is_root() {
            use std::os::unix::process::CommandExt;
            let user = sandbox::user::find("postgres").expect("user postgres");
            command.uid(user.uid).gid(user.gid);
        }
        command.args(["restart", "-w", "-t", "5", "-m", mode, "-D"]).arg(self.layout().pgdata(host)).arg("-l").arg(log);
        command.current_dir("/").stdin(Stdio::null()).output().expect("pg_ctl")
    }

    /// Leaves so much of the node's record.
    pub fn tear_record(&self, host: usize, percent: u64) {
        let path = self.layout().node_dir(host).join("record");
        let left = fs::metadata(&path).expect("a record").len() * percent / 100;
        fs::OpenOptions::new().write(true).open(&path).and_then(|file| file.set_len(left)).expect("a record");
    }

    /// A command, typed on that host.
    pub fn command(&self, host: usize, words: &[String]) -> Output {
        let mut command = self.cluster.as_user();
        command.args(words).arg("--config").arg(&self.hosts[host].config).stdin(Stdio::null());
        command.output().expect("pgtandem")
    }

    /// What can be seen of each host.
    pub fn look(&mut self) -> Vec<Seen> {
        let words = ["status", "--json"].map(str::to_owned);
        (0..self.hosts.len())
            .map(|host| {
                let runs = |child: &mut Option<Child>| {
                    child.as_mut().is_some_and(|child| matches!(child.try_wait(), Ok(None)))
                };
                let (agent_runs, proxy_runs) = (runs(&mut self.hosts[host].agent), runs(&mut self.hosts[host].proxy));
                let said = self.command(host, &words);
                Seen { agent_runs, proxy_runs, status: serde_json::from_slice::<ClusterStatus>(&said.stdout).ok() }
            })
            .collect()
    }

    /// Data of forks that a person has discarded: they would fill the small disks.
    pub fn forget_forks(&self) {
        for index in 0..self.hosts.len() {
            for entry in fs::read_dir(self.layout().node_dir(index)).expect("a node's folder").flatten() {
                if entry.file_name().to_string_lossy().contains(".forked-") {
                    fs::remove_dir_all(entry.path()).expect("the data of a fork");
                }
            }
        }
    }

    pub fn index(&self, name: &str) -> usize {
        self.hosts.iter().position(|host| host.name == name).expect("a host of that name")
    }

    /// Logs and records, into a folder that is made.
    pub fn keep(&self, folder: &Path) {
        fs::create_dir_all(folder).expect("a folder for the logs");
        let copy = |file: PathBuf, name: String| drop(fs::copy(file, folder.join(name)));
        for (index, host) in self.hosts.iter().enumerate() {
            let node = self.layout().node_dir(index);
            copy(self.proxy_log(index), format!("{}-proxy.log", host.name));
            copy(host.config.clone(), format!("{}.toml", host.name));
            for file in ["agent.log", "postgresql.log", "record", "record.bad"] {
                copy(node.join(file), format!("{}-{file}", host.name));
            }
        }
    }
}

impl Drop for Site {
    /// The daemons are ended here; the sandbox does not know them. Their PostgreSQL it finds by the data directory.
    fn drop(&mut self) {
        self.links.heal();
        for host in 0..self.hosts.len() {
            for process in [Process::Postgres, Process::Agent, Process::Proxy] {
                self.signal(host, process, Signal::CONT);
            }
        }
        for host in &mut self.hosts {
            end(host.proxy.take(), Signal::TERM);
        }
        for host in &mut self.hosts {
            end(host.agent.take(), Signal::TERM);
        }
        if let Ok(disks) = &self.disks {
            for disk in disks {
                disk.free();
            }
            // What is left of PostgreSQL goes before its disk.
            let _ = common::pgtandem().args(["sandbox", "down", "--dir"]).arg(self.cluster.dir()).output();
        }
    }
}

/// Returns when it is gone; one that takes too long is killed.
fn end(child: Option<Child>, signal: Signal) {
    let Some(mut child) = child else { return };
    let pid = Pid::from_raw(i32::try_from(child.id()).unwrap_or(0));
    send(pid.as_slice(), signal);
    let (sender, gone) = std::sync::mpsc::sync_channel(1);
    std::thread::spawn(move || {
        let _ = child.wait();
        let _ = sender.send(());
    });
    if gone.recv_timeout(END_MAX).is_err() {
        send(pid.as_slice(), Signal::KILL);
        let _ = gone.recv_timeout(END_MAX);
    }
}

pub fn send(pids: &[Pid], signal: Signal) {
    for pid in pids {
        // One that is gone needs none.
        let _ = rustix::process::kill_process(*pid, signal);
    }
}

fn children(parent: Pid) -> Vec<Pid> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
    // proc(5): the parent is the second word after the name, which is in parentheses.
    let is_child = |pid: &i32| {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        let parent_of = stat.rsplit_once(") ").and_then(|(_, rest)| rest.split(' ').nth(1)?.parse::<i32>().ok());
        parent_of == Some(parent.as_raw_nonzero().get())
    };
    pids.filter(is_child).filter_map(Pid::from_raw).collect()
}

fn append(path: &Path, text: &str) {
    let before = fs::read_to_string(path).unwrap_or_default();
    fs::write(path, before + text).expect("a file of settings");
}

fn host(layout: &Layout, links: &Links, index: usize) -> Host {
    let name = Layout::node_name(index);
    let mut config = layout.config();
    let offset = u16::try_from(index).expect("few hosts");
    let port = layout.plan.base_port + PROXY_PORTS_OFFSET + offset;
    config.proxy.listen = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
    config.proxy.state_dir = layout.dir.join(format!("proxy{index}"));
    config.proxy.follower_ms_max = FOLLOWER_MS_MAX;
    for (other, node) in config.nodes.iter_mut().enumerate().filter(|(other, _)| *other != index) {
        node.agent = links.address(index, other);
        // Its folders are on another host.
        for path in [&mut node.state_dir, &mut node.pgdata, &mut node.socket_dir] {
            *path = Path::new("/elsewhere").join(&node.name).join(path.file_name().unwrap_or_default());
        }
    }
    fs::create_dir(&config.proxy.state_dir).expect("a folder");
    if sandbox::user::is_root() {
        let user = sandbox::user::find("postgres").expect("user postgres");
        std::os::unix::fs::chown(&config.proxy.state_dir, Some(user.uid), Some(user.gid)).expect("chown");
    }
    let path = layout.dir.join(format!("{name}.toml"));
    fs::write(&path, toml::to_string(&config).expect("a configuration")).expect("a configuration");
    Host { name, config: path, port, agent: None, proxy: None }
}
