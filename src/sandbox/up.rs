//! Makes a sandbox, or starts of one that is there whatever does not run.
//!
//! Order: ports and folder are checked before anything is made; node0 by initdb, its record, the certificates; the
//! agents; the proxy; the data, through the proxy; the other nodes, by the ordinary `recover`. Whatever fails, no
//! process is left behind; the folder stays for its logs, and the next `up` begins anew in it.

use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use super::layout::{CLUSTER, NODES_MAX, Plan};
use super::process::Starting;
use super::{Layout, SandboxError, control, first, initdb, ports, process, report, stop, user};
use crate::agent::record::RecordStore;
use crate::cluster::members;

/// How long an agent may take until it listens.
const AGENT_LIMIT: Duration = Duration::from_secs(20);
/// How long the proxy may take until it answers; crash recovery of a PostgreSQL before it included.
const PROXY_LIMIT: Duration = Duration::from_secs(120);
/// How long processes that were killed may take until their ports are free.
const PORTS_LIMIT: Duration = Duration::from_secs(5);
const PORTS_POLL: Duration = Duration::from_millis(50);
const NODES_DEFAULT: usize = 2;

/// What was asked for; what is None is chosen, or taken from the sandbox that is there.
#[derive(Clone, Debug, Default)]
pub struct Options {
    pub dir: PathBuf,
    pub nodes: Option<usize>,
    pub base_port: Option<u16>,
    pub scale: Option<u32>,
    /// Clients may use TLS; false: as the sandbox that is there.
    pub tls: bool,
    /// Every node archives its WAL; false: as the sandbox that is there.
    pub archive: bool,
}

/// Returns when the cluster is up. `say` gets a line for each step.
pub async fn up(options: &Options, say: &dyn Fn(&str)) -> Result<Layout, SandboxError> {
    let layout = plan(options)?;
    wait_for_ports(&layout).await?;
    let ran = report(&layout)?.runs();
    let work = async { if layout.plan.complete { start(&layout, say).await } else { make(&layout, say).await } };
    let result = tokio::select! {
        result = work => result,
        () = user::interrupted() => Err(SandboxError::Interrupted),
    };
    match result {
        Ok(plan) => Ok(Layout { plan, ..layout }),
        Err(error) => {
            if !ran {
                // The first error is the one to tell.
                let _ = stop::down(&layout).await;
            }
            Err(error)
        }
    }
}

/// Decides what to make or start; writes nothing but the plan of a new sandbox and its short folder.
fn plan(options: &Options) -> Result<Layout, SandboxError> {
    let dir = &options.dir;
    let nodes = options.nodes.unwrap_or(NODES_DEFAULT);
    if !(1..=NODES_MAX).contains(&nodes) {
        return Err(SandboxError::Nodes { nodes });
    }
    match Layout::load(dir) {
        Ok(existing) if existing.plan.complete => {
            same(&existing, options)?;
            return Ok(existing);
        }
        Ok(existing) if report(&existing)?.runs() => {
            return Err(SandboxError::Running { path: existing.dir.clone(), what: report(&existing)?.text() });
        }
        // Unfinished: made anew below.
        Ok(existing) => stop::clear_folder(&existing)?,
        Err(SandboxError::NotASandbox { path }) => refuse_unless_empty(&path)?,
        Err(error) => return Err(error),
    }
    let dir = std::path::absolute(dir).map_err(SandboxError::file("cannot find", dir))?;
    let plan = Plan {
        nodes,
        base_port: options.base_port.unwrap_or_default(),
        scale: options.scale.unwrap_or_default(),
        tls: options.tls,
        archive: options.archive,
        bin_dir: initdb::find_bin_dir()?,
        short_dir: None,
        complete: false,
    };
    let mut layout = Layout { dir, plan };
    if options.base_port.is_none() {
        layout.plan.base_port = ports::find_base(&layout)?;
    }
    ports::check(&layout, &[])?;
    make_dir(&layout.dir, 0o755)?;
    if layout.is_too_deep() {
        let short = PathBuf::from(format!("/tmp/pgtandem-{:08x}", rand::random::<u32>()));
        make_dir(&short, 0o700)?;
        layout.plan.short_dir = Some(short);
    }
    layout.store()?;
    Ok(layout)
}

/// The ports of a sandbox that is there: what was killed a moment ago holds its own until its last process is gone.
async fn wait_for_ports(layout: &Layout) -> Result<(), SandboxError> {
    if !layout.plan.complete {
        return Ok(());
    }
    let started = std::time::Instant::now();
    loop {
        match ports::check(layout, &report(layout)?.running_ports()) {
            Err(SandboxError::PortInUse { .. }) if started.elapsed() < PORTS_LIMIT => {
                tokio::time::sleep(PORTS_POLL).await;
            }
            checked => return checked,
        }
    }
}

/// A new sandbox gets a folder that is not there or empty; `bin`, where root puts the program first, does not count.
pub fn refuse_unless_empty(dir: &Path) -> Result<(), SandboxError> {
    let mut entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
    match entries.find(|entry| entry.file_name() != "bin") {
        Some(_) => Err(SandboxError::NotEmpty { path: dir.into() }),
        None => Ok(()),
    }
}

/// A sandbox is started again as it was made.
fn same(layout: &Layout, options: &Options) -> Result<(), SandboxError> {
    let Plan { nodes, base_port, scale, tls, archive, .. } = layout.plan;
    let differs = options.nodes.is_some_and(|asked| asked != nodes)
        || options.base_port.is_some_and(|asked| asked != base_port)
        || options.scale.is_some_and(|asked| asked != scale)
        || (options.tls && !tls)
        || (options.archive && !archive);
    if !differs {
        return Ok(());
    }
    let text = |nodes, base_port, scale, tls, archive| {
        let (tls, archive) = (if tls { " --tls" } else { "" }, if archive { " --archive" } else { "" });
        format!("--nodes {nodes} --base-port {base_port} --scale {scale}{tls}{archive}")
    };
    let asked = text(
        options.nodes.unwrap_or(nodes),
        options.base_port.unwrap_or(base_port),
        options.scale.unwrap_or(scale),
        options.tls || tls,
        options.archive || archive,
    );
    Err(SandboxError::OtherPlan { path: layout.dir.clone(), made: text(nodes, base_port, scale, tls, archive), asked })
}

async fn make(layout: &Layout, say: &dyn Fn(&str)) -> Result<Plan, SandboxError> {
    for index in 0..layout.plan.nodes {
        make_dir(&layout.pgdata(index), 0o700)?;
        make_dir(&layout.socket_dir(index), 0o700)?;
        if index > 0 {
            initdb::node_conf(layout, index)?;
        }
    }
    make_dir(&layout.proxy_dir(), 0o700)?;
    make_dir(&layout.ca_dir(), 0o700)?;
    let config = layout.config_path();
    let text = toml::to_string(&layout.config()).map_err(|error| SandboxError::Program {
        program: "the configuration's writer".into(),
        output: error.to_string(),
    })?;
    std::fs::write(&config, text).map_err(SandboxError::file("cannot write", &config))?;
    say("node0: initdb");
    initdb::initdb(layout).await?;
    first::certificates(layout)?;
    first::record(layout)?;

    for index in 0..layout.plan.nodes {
        start_agent(layout, index).await?;
    }
    say("agents are up");
    start_proxy(layout).await?;
    say(&format!("proxy is up on port {}", layout.proxy_port()));
    if layout.plan.scale > 0 {
        say(&format!("loading pgbench's tables at scale {} through the proxy", layout.plan.scale));
        load(layout).await?;
    }
    for index in 1..layout.plan.nodes {
        say(&format!("recover node{index}"));
        recover(layout, index).await?;
    }
    let plan = Plan { complete: true, ..layout.plan.clone() };
    Layout { dir: layout.dir.clone(), plan: plan.clone() }.store()?;
    Ok(plan)
}

/// Starts the daemons that do not run. A node that had left the member set stays out until the proxy lets it
/// in again, or until `recover`.
async fn start(layout: &Layout, say: &dyn Fn(&str)) -> Result<Plan, SandboxError> {
    let running = report(layout)?;
    for (index, node) in running.nodes.iter().enumerate().filter(|(_, node)| node.agent.pid.is_none()) {
        start_agent(layout, index).await?;
        say(&format!("agent of {} is up", node.name));
    }
    if running.proxy.pid.is_none() {
        start_proxy(layout).await?;
        say(&format!("proxy is up on port {}", layout.proxy_port()));
    }
    Ok(layout.plan.clone())
}

/// Returns when the agent listens.
async fn start_agent(layout: &Layout, index: usize) -> Result<(), SandboxError> {
    let (name, log) = (Layout::node_name(index), layout.agent_log(index));
    let child = daemon(layout, &["agent", "--node", &name], &log, &layout.agent_pid_file(index))?;
    let port = layout.agent_port(index);
    let mut starting = Starting { name: format!("the agent of {name}"), child, log };
    starting.wait(AGENT_LIMIT, async || ports::is_listening(port)).await
}

/// Returns when the proxy answers a query, and commands.
async fn start_proxy(layout: &Layout) -> Result<(), SandboxError> {
    let log = layout.proxy_log();
    let child = daemon(layout, &["proxy", "--node", &proxy_node(layout)], &log, &layout.proxy_pid_file())?;
    let port = layout.proxy_port();
    let mut starting = Starting { name: "the proxy".into(), child, log };
    let served = starting.wait(PROXY_LIMIT, async || answers(port).await && control::members(layout).await.is_ok());
    let why = tokio::select! {
        served = served => return served,
        why = control::until_waiting(layout) => why,
    };
    // One that stands by for other hosts is no use to anybody here.
    process::signal(starting.child.id(), rustix::process::Signal::TERM);
    let _ = starting.child.wait();
    Err(starting.failed(format!("{}. Next: {}", why.what, why.hint)))
}

/// The node on which the proxy of the newest member set runs, by the records on this machine.
fn proxy_node(layout: &Layout) -> String {
    let record = |index| RecordStore::open(&layout.node_dir(index), CLUSTER, &Layout::node_name(index)).ok();
    let sets = (0..layout.plan.nodes).filter_map(|index| record(index)?.record().members.clone());
    sets.max_by_key(members::number).map_or_else(|| Layout::node_name(0), |set| set.proxy)
}

fn daemon(layout: &Layout, command: &[&str], log: &Path, pid_file: &Path) -> Result<std::process::Child, SandboxError> {
    let config = layout.config_path();
    let mut arguments = command.to_vec();
    let config = config.to_str().ok_or_else(|| {
        SandboxError::file("cannot use", &config)(std::io::Error::other("the path is not valid UTF-8"))
    })?;
    arguments.extend(["--config", config]);
    process::start(&program(layout)?, &arguments, log, pid_file)
}

/// The program to run daemons and commands with: the copy, if there is one.
fn program(layout: &Layout) -> Result<PathBuf, SandboxError> {
    let copy = layout.dir.join("bin/pgtandem");
    if copy.exists() {
        return Ok(copy);
    }
    std::env::current_exe().map_err(SandboxError::file("cannot find", Path::new("/proc/self/exe")))
}

/// Whether a PostgreSQL server (or our proxy) answers a query on this port.
async fn answers(port: u16) -> bool {
    let limit = Duration::from_secs(5);
    let ask = async {
        let settings = format!("host=127.0.0.1 port={port} user=postgres dbname=postgres");
        let (client, connection) = tokio_postgres::connect(&settings, tokio_postgres::NoTls).await?;
        let task = tokio::spawn(connection);
        let result = client.simple_query("select 1").await;
        task.abort();
        result
    };
    matches!(tokio::time::timeout(limit, ask).await, Ok(Ok(_)))
}

async fn load(layout: &Layout) -> Result<(), SandboxError> {
    let mut command = Command::new(layout.plan.bin_dir.join("pgbench"));
    command.args(["--initialize", "--quiet", "--host=127.0.0.1", "--username=postgres"]);
    command.arg(format!("--port={}", layout.proxy_port())).arg(format!("--scale={}", layout.plan.scale)).arg("bench");
    initdb::run("pgbench --initialize", command, "").await
}

/// Runs `pgtandem recover node<index>`, the ordinary command; its output goes to our standard error.
async fn recover(layout: &Layout, index: usize) -> Result<(), SandboxError> {
    let name = Layout::node_name(index);
    let mut command = tokio::process::Command::new(program(layout)?);
    command.args(["recover", &name, "--config"]).arg(layout.config_path());
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true);
    let failed = |output: String| SandboxError::Program { program: format!("pgtandem recover {name}"), output };
    let output = command.output().await.map_err(|error| failed(error.to_string()))?;
    if output.status.success() {
        return Ok(());
    }
    let text = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    let log = process::tail(&layout.agent_log(index));
    Err(failed(format!("{}\nlast lines of {}:\n{log}", text.trim(), layout.agent_log(index).display())))
}

fn make_dir(dir: &Path, mode: u32) -> Result<(), SandboxError> {
    let mut builder = std::fs::DirBuilder::new();
    builder.recursive(true).mode(mode).create(dir).map_err(SandboxError::file("cannot make", dir))
}
