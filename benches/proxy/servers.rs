//! What is measured beside pgtandem: plain PostgreSQL servers, pgbouncer, and pgpool in native replication mode. Each is
//! a child of the benchmark, with its files in one folder and a free port.

use std::ffi::OsStr;
use std::net::{Ipv4Addr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use pgtandem::sandbox::{self, compare};
use rustix::process::{Pid, Signal};
use tokio::process::{Child, Command};

use crate::DATABASE;

/// How long a server may take until it answers.
const START_LIMIT: Duration = Duration::from_secs(60);
/// How long it may take to end before it is killed.
const STOP_LIMIT: Duration = Duration::from_secs(30);

/// A server that runs.
pub struct Server {
    pub port: u16,
    name: String,
    child: Child,
    /// What it ends at quickly, but cleanly.
    stop: Signal,
}

/// Everything that was started.
#[derive(Default)]
pub struct Servers {
    /// In the order of their start.
    running: Vec<Server>,
    /// Ports of the two PostgreSQL behind pgpool, if it runs.
    behind_pgpool: Vec<u16>,
}

impl Servers {
    /// Returns the port.
    fn add(&mut self, server: Server) -> u16 {
        let port = server.port;
        self.running.push(server);
        port
    }

    /// The last one first.
    pub async fn stop(mut self) {
        while let Some(server) = self.running.pop() {
            server.stop().await;
        }
    }

    /// A sentence, if not both servers behind pgpool got the writes: then its figures are those of one server.
    pub async fn pgpool_problem(&self) -> anyhow::Result<Option<String>> {
        let mut rows = Vec::new();
        for port in &self.behind_pgpool {
            let client = compare::connect(*port, DATABASE).await?;
            let count: i64 = client.query_one("select count(*) from pgbench_history", &[]).await?.get(0);
            rows.push(count);
        }
        let differ = rows.windows(2).any(|pair| matches!(pair, [first, second] if first != second));
        Ok(differ
            .then(|| format!("the servers behind pgpool have {rows:?} rows in pgbench_history, so one of them is out")))
    }

    /// A PostgreSQL with the sandbox's settings and pgbench's tables.
    pub async fn postgres(&mut self, bin_dir: &Path, data: &Path, scale: u32) -> anyhow::Result<u16> {
        initdb(bin_dir, data).await?;
        let server = start_postgres(bin_dir, data).await?;
        let port = server.port.to_string();
        self.add(server);
        let address = ["-h", "127.0.0.1", "-U", "postgres", "-p", port.as_str()];
        output(&bin_dir.join("createdb"), &[&address[..], &[DATABASE]].concat()).await?;
        let scale = scale.to_string();
        output(&bin_dir.join("pgbench"), &[&address[..], &["-i", "-q", "-s", scale.as_str(), DATABASE]].concat())
            .await?;
        Ok(port.parse()?)
    }

    /// pgbouncer in front of the server on `port`, session pooling: prepared statements work.
    pub async fn pgbouncer(&mut self, program: &Path, dir: &Path, port: u16) -> anyhow::Result<u16> {
        make_dir(dir)?;
        let own = free_port()?;
        let conf = dir.join("pgbouncer.ini");
        let text = format!(
            "[databases]\n* = host=127.0.0.1 port={port} user=postgres\n[pgbouncer]\nlisten_addr=127.0.0.1\nlisten_port={own}\n\
             auth_type=any\nunix_socket_dir=\npool_mode=session\ndefault_pool_size=60\npidfile={}\n\
             ignore_startup_parameters=extra_float_digits\n",
            dir.join("pid").display(),
        );
        write(&conf, &text)?;
        let mut command = Command::new(program);
        command.arg("-q").arg(&conf);
        let server = start("pgbouncer", command, own, &dir.join("log"), Signal::INT).await?;
        Ok(self.add(server))
    }

    /// pgpool with two PostgreSQL of its own, both up and identical.
    pub async fn pgpool(&mut self, program: &Path, bin_dir: &Path, dir: &Path, scale: u32) -> anyhow::Result<u16> {
        make_dir(dir)?;
        let (first, second) = (dir.join("n0"), dir.join("n1"));
        self.postgres(bin_dir, &first, scale).await?;
        if let Some(server) = self.running.pop() {
            server.stop().await;
        }
        output(Path::new("cp"), &[OsStr::new("-a"), first.as_os_str(), second.as_os_str()]).await?;
        for data in [&first, &second] {
            let server = start_postgres(bin_dir, data).await?;
            let port = self.add(server);
            self.behind_pgpool.push(port);
        }
        let (own, pcp) = (free_port()?, free_port()?);
        let mut text = format!(
            "backend_clustering_mode = 'native_replication'\nlisten_addresses = '127.0.0.1'\nport = {own}\n\
             pcp_port = {pcp}\nsocket_dir = '{dir}'\npcp_socket_dir = '{dir}'\npid_file_name = '{dir}/pid'\n\
             logdir = '{dir}'\nnum_init_children = 60\nmax_pool = 2\nload_balance_mode = off\nhealth_check_period = 0\n\
             health_check_user = 'postgres'\nsr_check_user = 'postgres'\nenable_pool_hba = off\n",
            dir = dir.display(),
        );
        for (index, port) in self.behind_pgpool.iter().enumerate() {
            text.push_str(&format!(
                "backend_hostname{index} = '127.0.0.1'\nbackend_port{index} = {port}\nbackend_weight{index} = 1\n\
                 backend_data_directory{index} = '{}'\nbackend_flag{index} = 'ALLOW_TO_FAILOVER'\n",
                dir.join(format!("n{index}")).display(),
            ));
        }
        let conf = dir.join("pgpool.conf");
        write(&conf, &text)?;
        let mut command = Command::new(program);
        command.arg("-n").arg("-f").arg(&conf).arg("-F").arg(dir.join("pcp.conf")).arg("-a").arg(dir.join("hba.conf"));
        let server = start("pgpool", command, own, &dir.join("log"), Signal::INT).await?;
        Ok(self.add(server))
    }
}

async fn initdb(bin_dir: &Path, data: &Path) -> anyhow::Result<()> {
    let arguments = ["--username=postgres", "--auth=trust", "--data-checksums", "--encoding=UTF8", "--no-locale"];
    let mut all: Vec<&OsStr> = vec![OsStr::new("-D"), data.as_os_str(), OsStr::new("--no-sync")];
    all.extend(arguments.iter().map(OsStr::new));
    output(&bin_dir.join("initdb"), &all).await?;
    let conf = data.join("postgresql.conf");
    let old = std::fs::read_to_string(&conf).with_context(|| format!("cannot read {}", conf.display()))?;
    let settings = format!("{}listen_addresses = '127.0.0.1'\nunix_socket_directories = ''\n", sandbox::SETTINGS);
    write(&conf, &(old + &settings))
}

async fn start_postgres(bin_dir: &Path, data: &Path) -> anyhow::Result<Server> {
    let port = free_port()?;
    let mut command = Command::new(bin_dir.join("postgres"));
    command.arg("-D").arg(data).arg("-p").arg(port.to_string());
    start("PostgreSQL", command, port, &data.with_extension("log"), Signal::INT).await
}

/// Returns when the server answers a query.
async fn start(name: &str, mut command: Command, port: u16, log: &Path, stop: Signal) -> anyhow::Result<Server> {
    let file = std::fs::File::create(log).with_context(|| format!("cannot make {}", log.display()))?;
    command.current_dir("/").stdin(Stdio::null()).stdout(file.try_clone()?).stderr(file).kill_on_drop(true);
    let child = command.spawn().with_context(|| format!("cannot start {name}"))?;
    let mut server = Server { port, name: name.to_owned(), child, stop };
    let started = Instant::now();
    loop {
        if let Ok(client) = compare::connect(port, "postgres").await
            && client.simple_query("select 1").await.is_ok()
        {
            return Ok(server);
        }
        if let Some(status) = server.child.try_wait()? {
            bail!("{name} ended ({status}): {}", std::fs::read_to_string(log).unwrap_or_default().trim());
        }
        if started.elapsed() > START_LIMIT {
            server.stop().await;
            bail!("{name} did not answer within {} s; see {}", START_LIMIT.as_secs(), log.display());
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

impl Server {
    async fn stop(mut self) {
        let pid = self.child.id().and_then(|pid| Pid::from_raw(i32::try_from(pid).ok()?));
        if let Some(pid) = pid {
            // If it has ended already, there is nothing to stop.
            let _ = rustix::process::kill_process(pid, self.stop);
        }
        if tokio::time::timeout(STOP_LIMIT, self.child.wait()).await.is_err() {
            eprintln!("{} on port {} does not stop and is killed", self.name, self.port);
            // Dropping it would do the same.
            let _ = self.child.kill().await;
        }
    }
}

/// Runs a program to its end, as long as the caller waits; its output is the error's text when it fails.
pub async fn output(program: &Path, arguments: &[impl AsRef<OsStr>]) -> anyhow::Result<String> {
    let mut command = Command::new(program);
    command.args(arguments).current_dir("/").env("LC_ALL", "C").stdin(Stdio::null()).kill_on_drop(true);
    let output = command.output().await.with_context(|| format!("cannot start {}", program.display()))?;
    let text = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    if !output.status.success() {
        bail!("{} ({}): {}", program.display(), output.status, text.trim());
    }
    Ok(text)
}

/// Where a program is, if it is installed; /usr/sbin is not in everybody's PATH.
pub fn installed(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let dirs = std::env::split_paths(&path).chain([PathBuf::from("/usr/sbin"), PathBuf::from("/usr/local/sbin")]);
    dirs.map(|dir| dir.join(program)).find(|file| file.is_file())
}

fn free_port() -> anyhow::Result<u16> {
    Ok(TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).context("no free port")?.local_addr()?.port())
}

fn make_dir(dir: &Path) -> anyhow::Result<()> {
    std::fs::create_dir_all(dir).with_context(|| format!("cannot make {}", dir.display()))
}

fn write(path: &Path, text: &str) -> anyhow::Result<()> {
    std::fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))
}
