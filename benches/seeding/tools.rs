//! The programs beside us, each with what it is asked for when somebody fills a node with it by hand.

use std::path::Path;
use std::process::Command;
use std::time::Instant;

use crate::figures::Run;
use crate::nodes::Nodes;
use crate::{Before, copies, measure};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tool {
    /// With WAL, a manifest and an immediate checkpoint, over the unix socket.
    BaseBackup,
    /// Whole files, as to an empty folder; from a folder, without ssh and without a backup.
    RsyncWhole,
    /// Contents compared, in place; as above.
    RsyncChecksum,
    Rewind,
    /// No copy: both folders are read once, at the same time.
    ReadBoth,
}

/// The programs that can do something in this state.
pub fn for_state(before: Before) -> Vec<Tool> {
    match before {
        Before::Empty => vec![Tool::BaseBackup, Tool::RsyncWhole],
        Before::Same => vec![Tool::RsyncChecksum, Tool::ReadBoth],
        Before::Changed(_) => vec![Tool::RsyncChecksum],
        Before::Forked => vec![Tool::Rewind, Tool::RsyncChecksum],
    }
}

impl Tool {
    pub fn name(self) -> &'static str {
        match self {
            Tool::BaseBackup => "pg_basebackup",
            Tool::RsyncWhole => "rsync",
            Tool::RsyncChecksum => "rsync --checksum",
            Tool::Rewind => "pg_rewind",
            Tool::ReadBoth => "(reading both)",
        }
    }

    /// Measures it once; nothing if it is not installed.
    pub fn run(self, nodes: &Nodes, reference: &Path, before: Before) -> anyhow::Result<Option<Run>> {
        let (target, log) = (nodes.dir.join("target"), nodes.dir.join("tool.log"));
        let _ = std::fs::remove_dir_all(&target);
        match before {
            Before::Empty => {}
            Before::Same | Before::Forked => copies::copy(reference, &target)?,
            Before::Changed(percent) => {
                copies::copy(reference, &target)?;
                copies::change(&target, percent)?;
            }
        }
        let leader = nodes.leader_pgdata();
        let mut command = match self {
            Tool::BaseBackup => {
                let mut command = Command::new(nodes.bin_dir().join("pg_basebackup"));
                command.args(nodes.leader_arguments()).args(["-X", "stream", "-c", "fast", "-D"]).arg(&target);
                command
            }
            Tool::RsyncWhole | Tool::RsyncChecksum => {
                if Command::new("rsync").arg("--version").output().is_err() {
                    eprintln!("rsync is not installed, so it is left out");
                    return Ok(None);
                }
                let mut command = Command::new("rsync");
                command.args(["-a", "--stats", "--delete", "--exclude=/pg_wal", "--exclude=/postmaster.pid"]);
                if self == Tool::RsyncChecksum {
                    command.args(["--checksum", "--no-whole-file", "--inplace"]);
                } else {
                    command.arg("--whole-file");
                }
                command.arg(format!("{}/", leader.display())).arg(format!("{}/", target.display()));
                command
            }
            Tool::Rewind => {
                // It wants the node's own WAL.
                copy_wal(reference, &target)?;
                let mut command = Command::new(nodes.bin_dir().join("pg_rewind"));
                command.arg("--target-pgdata").arg(&target).arg("--source-server").arg(nodes.leader_dsn());
                command
            }
            Tool::ReadBoth => return read_both(&leader, &target).map(Some),
        };
        command.env("LC_ALL", "C");
        let server = nodes.leader_cpu()?;
        let ran = measure::run(command, &log)?;
        let cpu_s = ran.cpu_s + nodes.leader_cpu()? - server;
        let bytes = match self {
            Tool::RsyncWhole | Tool::RsyncChecksum => rsync_bytes(&ran.output),
            Tool::BaseBackup => Some(copies::read_all(&target)?),
            Tool::Rewind | Tool::ReadBoth => None,
        };
        std::fs::remove_dir_all(&target)?;
        Ok(Some(Run { seconds: ran.seconds, bytes, cpu_s, peak_mib: ran.peak_mib }))
    }
}

fn copy_wal(from: &Path, to: &Path) -> anyhow::Result<()> {
    std::fs::create_dir_all(to.join("pg_wal/archive_status"))?;
    for path in copies::files(&from.join("pg_wal"))? {
        std::fs::copy(from.join("pg_wal").join(&path), to.join("pg_wal").join(&path))?;
    }
    Ok(())
}

/// `Total bytes sent: 1,234` and the same received.
fn rsync_bytes(output: &str) -> Option<u64> {
    let count = |label: &str| -> Option<u64> {
        let line = output.lines().find_map(|line| line.strip_prefix(label))?;
        line.chars().filter(char::is_ascii_digit).collect::<String>().parse().ok()
    };
    Some(count("Total bytes sent:")? + count("Total bytes received:")?)
}

fn read_both(one: &Path, other: &Path) -> anyhow::Result<Run> {
    let before = measure::cpu(std::process::id())?;
    let started = Instant::now();
    std::thread::scope(|scope| {
        let first = scope.spawn(|| copies::read_all(one));
        let second = scope.spawn(|| copies::read_all(other));
        for read in [first, second] {
            read.join().map_err(|_| anyhow::anyhow!("a reader panicked"))??;
        }
        anyhow::Ok(())
    })?;
    let seconds = started.elapsed().as_secs_f64();
    let cpu_s = measure::cpu(std::process::id())?.own - before.own;
    Ok(Run { seconds, bytes: None, cpu_s, peak_mib: 0.0 })
}
