//! The two nodes of a sandbox without its proxy: node0 has the data, node1 is filled through its agent, as the proxy
//! would have it.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use anyhow::{Context as _, bail};
use pgtandem::agent::client::Control;
use pgtandem::agent::tls::Identity;
use pgtandem::config::Config;
use pgtandem::proxy::control::message::ControlRequest;
use pgtandem::sandbox::{self, Layout, compare};
use pgtandem::sync::wal::parse_lsn;
use pgtandem_proto::message::{Progress, Reply, Request};
use rustix::process::{Pid, Signal};

use crate::figures::Run;
use crate::{Before, Options, common, copies, measure};

const LEADER: &str = "node0";
const NODE: &str = "node1";
/// Lag of the standby that is let into the cut; nobody writes.
const LAG_BYTES_MAX: u64 = 1 << 20;
/// Rows that each server changes on its own before a fork is repaired, percent.
const FORK_PERCENT: u32 = 5;

pub struct Nodes {
    pub dir: PathBuf,
    layout: Layout,
    config: Config,
    identity: Identity,
    /// What node1 has promised.
    epoch: u64,
    /// The channel of the last fill: its end would stop node1.
    control: Option<Control>,
    progress: Progress,
}

impl Nodes {
    /// A sandbox whose node1 was detached and whose proxy was ended, with pgbench's tables on node0.
    pub async fn start(options: &Options, dir: &Path) -> anyhow::Result<Nodes> {
        let sandbox = sandbox::Options { dir: common::cluster_dir(dir), nodes: Some(2), ..sandbox::Options::default() };
        let layout = sandbox::up(&sandbox, &|line| eprintln!("{line}")).await?;
        let detach = ControlRequest::Detach { node: NODE.to_owned() };
        sandbox::control::ask(&layout, &detach, |_| {}).await?;
        let config = layout.config();
        let identity = Identity::load(&config.proxy.state_dir)?;
        end_proxy(&layout).await?;
        let leader = compare::connect(layout.postgres_port(0), "postgres").await?;
        // Nobody else changes pages; pg_rewind finds all WAL.
        for setting in
            ["autovacuum = off", "wal_keep_size = '16GB'", "checkpoint_timeout = '1h'", "max_wal_size = '8GB'"]
        {
            leader.batch_execute(&format!("ALTER SYSTEM SET {setting}")).await?;
        }
        let hba = layout.pgdata(0).join("pg_hba.conf");
        std::fs::write(&hba, format!("{}local replication all trust\n", std::fs::read_to_string(&hba)?))?;
        leader.batch_execute("SELECT pg_reload_conf()").await?;
        leader.batch_execute("CREATE DATABASE bench").await?;
        eprintln!("loading pgbench's tables at scale {}", options.common.scale);
        let mut pgbench = Command::new(layout.plan.bin_dir.join("pgbench"));
        pgbench.args(["-i", "-q", "-h", "127.0.0.1", "-U", "postgres", "-p"]).arg(layout.postgres_port(0).to_string());
        pgbench.args(["-s", &options.common.scale.to_string(), "bench"]);
        let output = pgbench.output()?;
        if !output.status.success() {
            bail!("pgbench: {}", String::from_utf8_lossy(&output.stderr));
        }
        let mut nodes = Nodes {
            dir: dir.to_owned(),
            layout,
            config,
            identity,
            epoch: 0,
            control: None,
            progress: Progress::default(),
        };
        let mut control = nodes.connect(1).await?;
        nodes.epoch = control.promised();
        control.request(&Request::StopPostgres { immediate: false }).await?;
        Ok(nodes)
    }

    async fn connect(&self, index: usize) -> anyhow::Result<Control> {
        Ok(Control::connect(&self.identity, &self.config.nodes[index]).await?)
    }

    pub fn leader_pgdata(&self) -> PathBuf {
        self.layout.pgdata(0)
    }

    pub fn bin_dir(&self) -> &Path {
        &self.layout.plan.bin_dir
    }

    pub fn leader_arguments(&self) -> Vec<String> {
        let socket = self.layout.socket_dir(0).display().to_string();
        let port = self.layout.postgres_port(0).to_string();
        ["-h", &socket, "-p", &port, "-U", "postgres"].map(ToOwned::to_owned).to_vec()
    }

    pub fn leader_dsn(&self) -> String {
        let socket = self.layout.socket_dir(0).display().to_string();
        format!("host={socket} port={} user=postgres dbname=postgres", self.layout.postgres_port(0))
    }

    /// Processor seconds of the leader's backends that have ended.
    pub fn leader_cpu(&self) -> anyhow::Result<f64> {
        Ok(measure::cpu(pid_in(&self.layout.postmaster_pid_file(0))?)?.children)
    }

    /// Copies the leader's files to `to`. -> their bytes, and the pages of relations
    pub async fn copy_leader(&self, to: &Path) -> anyhow::Result<(u64, u64)> {
        self.checkpoint(0).await?;
        copies::copy(&self.leader_pgdata(), to)?;
        let (mut bytes, mut pages) = (0, 0);
        for path in copies::files(to)? {
            let size = std::fs::metadata(to.join(&path))?.len();
            bytes += size;
            if copies::is_relation(&path) {
                pages += size / copies::PAGE_BYTES as u64;
            }
        }
        Ok((bytes, pages))
    }

    async fn checkpoint(&self, index: usize) -> anyhow::Result<()> {
        let client = compare::connect(self.layout.postgres_port(index), "postgres").await?;
        Ok(client.batch_execute("CHECKPOINT").await?)
    }

    /// Stops node1 and makes its data directory what is to be filled.
    pub async fn prepare(&mut self, reference: &Path, before: Before) -> anyhow::Result<()> {
        self.end_recovery().await?;
        let pgdata = self.layout.pgdata(1);
        // Where it listens; the agent would write one that is for nobody but itself.
        let own = std::fs::read(pgdata.join("pgtandem.node.conf"))?;
        std::fs::remove_dir_all(&pgdata)?;
        std::fs::create_dir(&pgdata)?;
        let owner_only = std::os::unix::fs::PermissionsExt::from_mode(0o700);
        std::fs::set_permissions(&pgdata, owner_only)?;
        if before != Before::Empty {
            copies::copy(reference, &pgdata)?;
        }
        std::fs::write(pgdata.join("pgtandem.node.conf"), own)?;
        if let Before::Changed(percent) = before {
            copies::change(&pgdata, percent)?;
        }
        Ok(())
    }

    /// Ends the recovery that node1 is in: its channel's end stops its PostgreSQL.
    async fn end_recovery(&mut self) -> anyhow::Result<()> {
        self.control = None;
        loop {
            let mut control = self.connect(1).await?;
            if let Reply::Status(status) = control.request(&Request::Status).await?
                && status.progress.is_none()
            {
                control.request(&Request::StopPostgres { immediate: false }).await?;
                return Ok(());
            }
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        }
    }

    /// Fills node1 from node0, and measures that.
    pub async fn fill(&mut self) -> anyhow::Result<Run> {
        self.checkpoint(0).await?;
        let agents = [pid_in(&self.layout.agent_pid_file(0))?, pid_in(&self.layout.agent_pid_file(1))?];
        let mut control = self.connect(1).await?;
        let mut cpu_before = self.leader_cpu()?;
        for pid in agents {
            measure::forget_peak(pid)?;
            cpu_before += total(measure::cpu(pid)?);
        }
        let started = Instant::now();
        control.request(&Request::Fill { epoch: self.epoch, source: LEADER.to_owned() }).await?;
        let seconds = started.elapsed().as_secs_f64();
        let (mut cpu_after, mut peak_mib) = (self.leader_cpu()?, 0.0_f64);
        for pid in agents {
            cpu_after += total(measure::cpu(pid)?);
            peak_mib = peak_mib.max(measure::peak_mib(pid).unwrap_or_default());
        }
        let Reply::Status(status) = control.request(&Request::Status).await? else { bail!("no status of {NODE}") };
        self.progress = status.progress.unwrap_or_default();
        self.control = Some(control);
        let bytes = self.progress.bytes_sent + self.progress.wal_bytes_received;
        Ok(Run { seconds, bytes: Some(bytes), cpu_s: cpu_after - cpu_before, peak_mib })
    }

    /// Brings node1 to a position of node0, out of recovery, and compares their files. -> what differs
    pub async fn check(&mut self) -> anyhow::Result<Vec<String>> {
        let mut control = self.control.take().context("nothing was filled")?;
        let source = LEADER.to_owned();
        control.request(&Request::CatchUp { epoch: self.epoch, source, lag_bytes_max: LAG_BYTES_MAX }).await?;
        control.request(&Request::HoldRelay).await?;
        let leader = compare::connect(self.layout.postgres_port(0), "postgres").await?;
        let row = leader.query_one("SELECT pg_logical_emit_message(true, 'pgtandem', 'cut')::text", &[]).await?;
        let x = parse_lsn(row.get(0)).context("a position")?;
        control.request(&Request::LeaveRecovery { x }).await?;
        self.control = Some(control);
        self.checkpoint(0).await?;
        self.checkpoint(1).await?;
        Ok(copies::difference(&self.layout.pgdata(0), &self.layout.pgdata(1))?.into_iter().collect())
    }

    /// Both servers change rows, each its own; node1 is stopped then.
    pub async fn go_on_alone(&mut self) -> anyhow::Result<()> {
        for index in 0..2 {
            let client = compare::connect(self.layout.postgres_port(index), "bench").await?;
            let sql = format!(
                "UPDATE pgbench_accounts SET abalance = abalance + 1 WHERE hashint4(aid + {index}) % 100 BETWEEN 0 AND {}",
                FORK_PERCENT - 1
            );
            client.batch_execute(&sql).await?;
            client.batch_execute("CHECKPOINT").await?;
        }
        let mut control = self.control.take().context("nothing was filled")?;
        control.request(&Request::StopPostgres { immediate: false }).await?;
        self.control = Some(control);
        self.end_recovery().await
    }

    /// Copies node1's data directory, with its WAL, for other programs.
    pub fn keep_node(&self, name: &str) -> anyhow::Result<PathBuf> {
        let (pgdata, kept) = (self.layout.pgdata(1), self.dir.join(name));
        copies::copy(&pgdata, &kept)?;
        for path in copies::files(&pgdata.join("pg_wal"))? {
            let target = kept.join("pg_wal").join(&path);
            if let Some(folder) = target.parent() {
                std::fs::create_dir_all(folder)?;
            }
            std::fs::copy(pgdata.join("pg_wal").join(&path), target)?;
        }
        Ok(kept)
    }

    /// Bytes of the pages of node0 that `other` does not have.
    pub fn differing_bytes(&self, other: &Path) -> anyhow::Result<u64> {
        Ok(copies::differing_bytes(&self.layout.pgdata(0), other)?)
    }
}

fn total(cpu: measure::Cpu) -> f64 {
    cpu.own + cpu.children
}

fn pid_in(path: &Path) -> anyhow::Result<u32> {
    let text = std::fs::read_to_string(path).with_context(|| path.display().to_string())?;
    text.lines().next().and_then(|line| line.trim().parse().ok()).with_context(|| path.display().to_string())
}

async fn end_proxy(layout: &Layout) -> anyhow::Result<()> {
    let pid = sandbox::report(layout)?.proxy.pid.and_then(|pid| i32::try_from(pid).ok()).and_then(Pid::from_raw);
    rustix::process::kill_process(pid.context("the proxy runs")?, Signal::TERM)?;
    while sandbox::report(layout)?.proxy.pid.is_some() {
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }
    Ok(())
}
