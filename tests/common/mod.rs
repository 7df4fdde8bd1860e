//! A cluster for a test: `pgtandem sandbox`, as a user would type it, taken down again whatever happens.
#![allow(dead_code, reason = "each test file uses its own part of this")]

pub mod ask;
pub mod clock;
pub mod fault;
pub mod load;
pub mod page;
pub mod writer;

use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::{Duration, Instant};

use pgtandem::crash::CrashPoint;
use pgtandem::sandbox::{self, Layout, control};
use tokio_postgres::Client;

/// How long a test waits for a condition that must come true.
pub const LIMIT: Duration = Duration::from_secs(30);

/// Names the folder in which daemons look for points at which they are to end.
const CRASH: &str = "PGTANDEM_CRASH";

fn crash_dir(dir: &Path) -> PathBuf {
    dir.join("crash")
}

/// A running cluster. Its processes end and its folder goes when this is dropped.
pub struct Cluster {
    pub layout: Layout,
    folder: tempfile::TempDir,
}

/// The program under test.
pub fn pgtandem() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_pgtandem"));
    command.env_remove("PGTANDEM_CONFIG").env_remove("PGTANDEM_LOG");
    command
}

/// Standard output and standard error together.
pub fn text(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

/// A folder that the user postgres can reach, too.
pub fn folder() -> tempfile::TempDir {
    use std::os::unix::fs::PermissionsExt;
    let mode = std::fs::Permissions::from_mode(0o755);
    tempfile::Builder::new().prefix("pgtandem-test-").permissions(mode).tempdir().expect("a temporary folder")
}

/// Two nodes, nothing loaded.
pub fn cluster() -> Cluster {
    Cluster::up(&[])
}

impl Cluster {
    /// `sandbox up` with further arguments, for example `["--scale", "1"]`.
    pub fn up(arguments: &[&str]) -> Self {
        let folder = folder();
        let dir = folder.path().join("d");
        let mut command = pgtandem();
        command.args(["sandbox", "up", "--dir"]).arg(&dir).args(arguments).env(CRASH, crash_dir(&dir));
        let output = command.output().expect("pgtandem");
        let layout = Layout::load(&dir);
        assert!(output.status.success(), "sandbox up failed: {}", text(&output));
        Self { layout: layout.expect("a sandbox"), folder }
    }

    pub fn dir(&self) -> &Path {
        &self.layout.dir
    }

    pub fn config_path(&self) -> PathBuf {
        self.layout.config_path()
    }

    /// A command with this cluster's configuration, run as the user that everything runs as.
    pub fn command(&self, arguments: &[&str]) -> Output {
        self.start(arguments).wait_with_output().expect("pgtandem")
    }

    /// The same, without waiting for its end.
    pub fn start(&self, arguments: &[&str]) -> std::process::Child {
        let mut command = self.as_user();
        command.args(arguments).arg("--config").arg(self.config_path());
        command.stdin(std::process::Stdio::null());
        command.stdout(std::process::Stdio::piped()).stderr(std::process::Stdio::piped()).spawn().expect("pgtandem")
    }

    pub fn as_user(&self) -> Command {
        let mut command =
            if sandbox::user::is_root() { running_as_user(&self.layout.dir.join("bin/pgtandem")) } else { pgtandem() };
        command.env(CRASH, crash_dir(self.dir()));
        command
    }

    /// A client of the proxy.
    pub async fn connect(&self, database: &str) -> Client {
        sandbox::compare::connect(self.layout.proxy_port(), database).await.expect("the proxy lets a client in")
    }

    /// A client of one node's PostgreSQL, past the proxy: to look, not to write.
    pub async fn connect_node(&self, index: usize, database: &str) -> Client {
        sandbox::compare::connect(self.layout.postgres_port(index), database)
            .await
            .expect("PostgreSQL lets a client in")
    }

    /// kill -9 of a node's postmaster; its backends follow.
    pub fn kill_postgres(&self, index: usize) {
        kill(&self.layout.postmaster_pid_file(index));
    }

    /// This signal to every process of a node's PostgreSQL: gives their ids.
    pub fn signal_postgres(&self, index: usize, signal: rustix::process::Signal) -> Vec<rustix::process::Pid> {
        let postmaster = pid_in(&self.layout.postmaster_pid_file(index));
        rustix::process::kill_process(postmaster, signal).expect("a signal");
        let mut signalled = vec![postmaster];
        // The postmaster stands still first, so no child is born meanwhile.
        for entry in std::fs::read_dir("/proc").expect("/proc").flatten() {
            let name = entry.file_name();
            let Some(pid) = name.to_str().and_then(|name| name.parse().ok()).and_then(rustix::process::Pid::from_raw)
            else {
                continue;
            };
            if parent_of(pid) == Some(postmaster) && rustix::process::kill_process(pid, signal).is_ok() {
                signalled.push(pid);
            }
        }
        signalled
    }

    /// kill -9 of every process of a node's PostgreSQL, which can be started by hand then: gone is its shared memory, and the exit status
    /// of its postmaster, without which PostgreSQL takes it for one that runs.
    pub async fn end_postgres(&self, index: usize) {
        let processes = self.signal_postgres(index, rustix::process::Signal::STOP);
        for pid in &processes {
            rustix::process::kill_process(*pid, rustix::process::Signal::KILL).expect("kill -9");
        }
        let are_gone =
            async || processes.iter().all(|pid| !Path::new(&format!("/proc/{}", pid.as_raw_nonzero())).exists());
        wait_for("its processes are gone", are_gone).await;
    }

    /// Another value in the configuration, for whoever is started from here on.
    pub fn write_setting(&self, line: &str, instead: &str) {
        let path = self.config_path();
        let text = std::fs::read_to_string(&path).expect("the configuration");
        assert!(text.contains(line), "{text}");
        std::fs::write(&path, text.replace(line, instead)).expect("the configuration");
    }

    /// The same, and a proxy that has read it.
    pub async fn configure(&self, line: &str, instead: &str) {
        self.write_setting(line, instead);
        self.kill_proxy();
        self.start_again();
        self.wait_well().await;
    }

    /// A follower that was lost does not come back by itself from here on, but only by `recover`.
    pub async fn stay_away(&self) {
        self.configure("away_s_max = 600", "away_s_max = 0").await;
    }

    pub fn kill_agent(&self, index: usize) {
        kill(&self.layout.agent_pid_file(index));
    }

    pub fn kill_proxy(&self) {
        kill(&self.layout.proxy_pid_file());
    }

    /// Everything on the host of the leader's node, the proxy too, is gone at once.
    pub fn lose_host(&self, index: usize) {
        self.kill_proxy();
        self.kill_agent(index);
        self.kill_postgres(index);
    }

    /// This signal to a node's agent, and to nothing else of its host.
    pub fn signal_agent(&self, index: usize, signal: rustix::process::Signal) {
        let pid = pid_in(&self.layout.agent_pid_file(index));
        rustix::process::kill_process(pid, signal).expect("a signal");
    }

    pub fn signal_proxy(&self, signal: rustix::process::Signal) {
        let pid = pid_in(&self.layout.proxy_pid_file());
        rustix::process::kill_process(pid, signal).expect("a signal");
    }

    /// The agent of a node, and nothing else of its host.
    pub fn start_agent(&self, index: usize) {
        self.start_agent_in(index, &[]);
    }

    /// The same, in this environment, which its PostgreSQL inherits.
    pub fn start_agent_in(&self, index: usize, environment: &[(&str, PathBuf)]) {
        let child = self.daemon(&["agent", "--node", &Layout::node_name(index)], &self.config_path(), environment);
        std::fs::write(self.layout.agent_pid_file(index), format!("{}\n", child.id())).expect("a pid file");
        std::thread::spawn(move || child.wait_with_output());
        let started = Instant::now();
        while std::net::TcpStream::connect(("127.0.0.1", self.layout.agent_port(index))).is_err() {
            assert!(started.elapsed() < LIMIT, "the agent does not start\n{}", self.logs());
            std::thread::yield_now();
        }
    }

    /// `pgtandem proxy` of a node, as on its own host; `sandbox down` finds it.
    pub fn start_proxy(&self, index: usize) {
        self.start_proxy_in(index, &[]);
    }

    /// The same, in this environment.
    pub fn start_proxy_in(&self, index: usize, environment: &[(&str, PathBuf)]) {
        let child = self.daemon(&["proxy", "--node", &Layout::node_name(index)], &self.config_path(), environment);
        std::fs::write(self.layout.proxy_pid_file(), format!("{}\n", child.id())).expect("a pid file");
        // It belongs to the sandbox now, and is waited for by whoever starts the test.
        std::thread::spawn(move || child.wait_with_output());
    }

    /// A second proxy beside the first, as on another host: own port, own folder. It ends with the value.
    pub fn other_proxy(&self, index: usize) -> OtherProxy {
        let node = Layout::node_name(index);
        let mut config = self.layout.config();
        let free = std::net::TcpListener::bind("127.0.0.1:0").expect("a port").local_addr().expect("a port");
        config.proxy.listen = free;
        config.proxy.state_dir = self.layout.socket_dir(index).join("p");
        let folder = &config.proxy.state_dir;
        if !folder.exists() {
            std::fs::create_dir(folder).expect("a folder");
            for file in ["ca.pem", "cert.pem", "key.pem"] {
                std::fs::copy(self.layout.proxy_dir().join(file), folder.join(file)).expect("a certificate");
            }
            let user = sandbox::user::find("postgres").expect("user postgres");
            let own = |path: &Path| std::os::unix::fs::chown(path, Some(user.uid), Some(user.gid)).expect("chown");
            if sandbox::user::is_root() {
                own(folder);
                for file in ["ca.pem", "cert.pem", "key.pem"] {
                    own(&folder.join(file));
                }
            }
        }
        let path = self.dir().join(format!("other-{node}.toml"));
        std::fs::write(&path, toml::to_string(&config).expect("a configuration")).expect("a configuration");
        let child = self.daemon(&["proxy", "--node", &node], &path, &[]);
        OtherProxy { child, config: path, port: free.port() }
    }

    fn daemon(&self, arguments: &[&str], config: &Path, environment: &[(&str, PathBuf)]) -> std::process::Child {
        let log = std::fs::OpenOptions::new().create(true).append(true).open(self.layout.proxy_log()).expect("a log");
        let mut command = self.as_user();
        command.args(arguments).arg("--config").arg(config).stdin(std::process::Stdio::null());
        command.envs(environment.iter().map(|(name, value)| (name, value)));
        command.stdout(log.try_clone().expect("a log")).stderr(log).spawn().expect("pgtandem")
    }

    /// A command with another configuration.
    pub fn command_with(&self, config: &Path, arguments: &[&str]) -> Output {
        let mut command = self.as_user();
        command.args(arguments).arg("--config").arg(config).stdin(std::process::Stdio::null());
        command.output().expect("pgtandem")
    }

    /// `sandbox up` once more: starts what was killed; returns when it answers.
    pub fn start_again(&self) {
        let output = self.try_start_again();
        assert!(output.status.success(), "sandbox up: {}\n{}", text(&output), self.logs());
    }

    /// The same, where it may fail.
    pub fn try_start_again(&self) -> Output {
        let mut command = pgtandem();
        command.args(["sandbox", "up", "--dir"]).arg(self.dir()).env(CRASH, crash_dir(self.dir()));
        command.output().expect("pgtandem")
    }

    /// The next process that comes by this point ends there as by kill -9.
    pub fn arm(&self, point: CrashPoint, of: &str) {
        self.put_crash_file(point, of, "KILL");
    }

    /// The next process that comes by this point stands still there.
    pub fn arm_stop(&self, point: CrashPoint, of: &str) {
        self.put_crash_file(point, of, "STOP");
    }

    fn put_crash_file(&self, point: CrashPoint, of: &str, content: &str) {
        use std::os::unix::fs::PermissionsExt;
        let folder = crash_dir(self.dir());
        if !folder.exists() {
            std::fs::create_dir(&folder).expect("a folder");
            // The daemons take files out of it.
            std::fs::set_permissions(&folder, std::fs::Permissions::from_mode(0o777)).expect("a folder");
        }
        std::fs::write(folder.join(point.file_name(of)), content).expect("a file");
    }

    /// Waits until somebody has come by.
    pub async fn wait_reached(&self, point: CrashPoint, of: &str) {
        let file = crash_dir(self.dir()).join(point.file_name(of));
        assert!(comes(async || !file.exists()).await, "nobody came by {point:?} of {of}\n{}", self.logs());
    }

    /// Waits until the proxy stands still.
    pub async fn wait_proxy_stopped(&self) {
        let pid = pid_in(&self.layout.proxy_pid_file());
        wait_for("the proxy stands still", async || state_of(pid) == Some('T')).await;
    }

    /// Waits until the daemon that came by a point is gone.
    pub async fn wait_dead(&self, pid_file: &Path) {
        let pid = pid_in(pid_file);
        wait_for("it is dead", async || !runs(pid)).await;
    }

    /// `pgtandem recover`, which must succeed.
    pub fn recover(&self, index: usize) {
        let output = self.command(&["recover", &Layout::node_name(index), "--yes"]);
        assert!(output.status.success(), "recover: {}\n{}", text(&output), self.logs());
    }

    /// `pgtandem recover` of every node that is no member.
    pub async fn recover_all(&self) {
        let mut members = Vec::new();
        wait_for("the proxy answers", async || control::members(&self.layout).await.is_ok_and(|all| !all.is_empty()))
            .await;
        members.extend(control::members(&self.layout).await.unwrap_or_default());
        for index in 0..self.layout.plan.nodes {
            if !members.contains(&Layout::node_name(index)) {
                // One that was killed may be in its own crash recovery still.
                let port = self.layout.postgres_port(index);
                wait_for("it runs", async || sandbox::compare::connect(port, "postgres").await.is_ok()).await;
                self.recover(index);
            }
        }
    }

    /// The node that leads, as the status has it.
    pub fn leader(&self) -> usize {
        let (status, _) = self.status();
        let leads = |index: &usize| status.contains(&format!("leader {}", Layout::node_name(*index)));
        (0..self.layout.plan.nodes).find(leads).unwrap_or_else(|| panic!("nobody leads: {status}\n{}", self.logs()))
    }

    /// What `pgtandem status` prints, and its exit code.
    pub fn status(&self) -> (String, Option<i32>) {
        let output = self.command(&["status"]);
        (text(&output), output.status.code())
    }

    /// Waits until `status` has nothing to complain about.
    pub async fn wait_well(&self) {
        wait_for("status says that all is well", async || self.status().0.contains("All is well")).await;
    }

    /// Waits until the node is a member, or is none.
    pub async fn wait_member(&self, index: usize, is_member: bool) {
        let node = Layout::node_name(index);
        let came = control::wait_member(&self.layout, &node, is_member, LIMIT).await;
        assert!(came, "{node} did not become {} member\n{}", if is_member { "a" } else { "no" }, self.logs());
    }

    /// Fails unless all servers hold the same rows and none holds a prepared transaction.
    pub async fn assert_identical(&self) {
        let unfinished = sandbox::demo::wait_finished(&self.layout).await.expect("servers answer");
        assert_eq!(unfinished, Vec::<String>::new());
        let comparison = sandbox::compare::compare(&self.layout).await.expect("servers answer");
        assert!(comparison.is_identical(), "servers differ: {:#?}", comparison.differences);
    }

    /// The last lines of the daemons' logs, for a failure's message.
    pub fn logs(&self) -> String {
        let mut files = vec![self.layout.proxy_log()];
        for index in 0..self.layout.plan.nodes {
            files.push(self.layout.agent_log(index));
            files.push(self.layout.node_dir(index).join("postgresql.log"));
        }
        let tail = |file: &PathBuf| {
            let text = std::fs::read(file).unwrap_or_default();
            let text = String::from_utf8_lossy(&text).into_owned();
            let lines: Vec<&str> = text.lines().collect();
            format!("---- {}\n{}", file.display(), lines[lines.len().saturating_sub(15)..].join("\n"))
        };
        files.iter().map(tail).collect::<Vec<_>>().join("\n")
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        let output = pgtandem().args(["sandbox", "down", "--dir"]).arg(&self.layout.dir).output();
        let ended = output.as_ref().is_ok_and(|output| output.status.success());
        if let Some(short) = &self.layout.plan.short_dir {
            // What is left there is only sockets; the folder of the test goes by itself.
            let _ = std::fs::remove_dir_all(short);
        }
        let said = output.map_or_else(|error| error.to_string(), |output| text(&output));
        // A second panic would hide the first one's message.
        assert!(ended || std::thread::panicking(), "sandbox down failed: {said}");
    }
}

/// A program as the user that everything runs as.
pub fn running_as_user(program: &Path) -> Command {
    use std::os::unix::process::CommandExt;
    let mut command = Command::new(program);
    if sandbox::user::is_root() {
        let user = sandbox::user::find("postgres").expect("user postgres");
        command.uid(user.uid).gid(user.gid).current_dir("/").env("HOME", user.home);
    }
    command
}

/// See [`Cluster::other_proxy`].
pub struct OtherProxy {
    pub child: std::process::Child,
    pub config: PathBuf,
    pub port: u16,
}

impl Drop for OtherProxy {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// kill -9 of the process that the file names.
fn kill(pid_file: &Path) {
    let pid = pid_in(pid_file);
    rustix::process::kill_process(pid, rustix::process::Signal::KILL).expect("kill -9");
    // Until it is gone `sandbox up` takes it for one that runs.
    let started = Instant::now();
    while runs(pid) {
        assert!(started.elapsed() < LIMIT, "process {pid:?} does not die");
        std::thread::yield_now();
    }
}

fn pid_in(pid_file: &Path) -> rustix::process::Pid {
    let text = std::fs::read_to_string(pid_file).unwrap_or_else(|error| panic!("{}: {error}", pid_file.display()));
    let pid: i32 = text.lines().next().and_then(|line| line.trim().parse().ok()).expect("a pid");
    rustix::process::Pid::from_raw(pid).expect("a pid")
}

fn parent_of(pid: rustix::process::Pid) -> Option<rustix::process::Pid> {
    let stat = std::fs::read_to_string(format!("/proc/{}/stat", pid.as_raw_nonzero())).ok()?;
    let parent = stat.rsplit_once(") ")?.1.split_whitespace().nth(1)?.parse().ok()?;
    rustix::process::Pid::from_raw(parent)
}

/// Whether there is such a process, and not only its exit status.
fn runs(pid: rustix::process::Pid) -> bool {
    u32::try_from(pid.as_raw_nonzero().get()).is_ok_and(sandbox::is_alive)
}

/// See proc(5).
fn state_of(pid: rustix::process::Pid) -> Option<char> {
    let stat = std::fs::read_to_string(format!("/proc/{}/stat", pid.as_raw_nonzero())).ok()?;
    stat.rsplit_once(") ")?.1.chars().next()
}

/// Waits for a condition; fails with `what` when it does not come true.
pub async fn wait_for(what: &str, condition: impl AsyncFn() -> bool) {
    assert!(comes(condition).await, "not within {} s: {what}", LIMIT.as_secs());
}

/// Whether a condition comes true within the limit.
pub async fn comes(condition: impl AsyncFn() -> bool) -> bool {
    let started = Instant::now();
    while !condition().await {
        if started.elapsed() >= LIMIT {
            return false;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    true
}
