//! Ends every process of a sandbox: the proxy, then the agents (each stops its PostgreSQL), then whatever is left.
//! Can be repeated; touches no process that is not the sandbox's own.

use std::path::Path;
use std::time::Duration;

use rustix::process::Signal;

use super::{Layout, SandboxError, process};

/// How long a daemon may take to end before it is killed.
const DAEMON_LIMIT: Duration = Duration::from_secs(60);
/// How long PostgreSQL may take for a fast shutdown, checkpoint included, before it gets an immediate one.
const POSTGRES_LIMIT: Duration = Duration::from_secs(60);
/// How long killed processes may take to disappear.
const KILL_LIMIT: Duration = Duration::from_secs(10);

/// Ends every process of the sandbox; returns what ran, one entry each.
pub async fn down(layout: &Layout) -> Result<Vec<String>, SandboxError> {
    let mut ended = Vec::new();
    if let Some(pid) = daemon(layout, &layout.proxy_pid_file())? {
        end("the proxy", &[pid], Signal::TERM, DAEMON_LIMIT).await?;
        ended.push("proxy".to_owned());
    }
    remove(&layout.proxy_pid_file())?;
    let mut agents = Vec::new();
    for index in 0..layout.plan.nodes {
        if let Some(pid) = daemon(layout, &layout.agent_pid_file(index))? {
            agents.push(pid);
            ended.push(format!("agent of node{index}"));
        }
        if process::named_in(&layout.postmaster_pid_file(index)).is_some() {
            ended.push(format!("PostgreSQL of node{index}"));
        }
    }
    end("an agent", &agents, Signal::TERM, DAEMON_LIMIT).await?;
    for index in 0..layout.plan.nodes {
        // An agent that was killed has left its PostgreSQL running, and a killed postmaster its backends.
        let pgdata = layout.pgdata(index);
        let postmaster = process::named_in(&layout.postmaster_pid_file(index));
        let postmaster = postmaster.filter(|pid| process::working_in(&pgdata).contains(pid));
        end(&format!("PostgreSQL of node{index}"), postmaster.as_slice(), Signal::INT, POSTGRES_LIMIT).await?;
        end(&format!("PostgreSQL of node{index}"), &process::working_in(&pgdata), Signal::QUIT, KILL_LIMIT).await?;
        remove(&layout.agent_pid_file(index))?;
    }
    Ok(ended)
}

/// Removes what an unfinished sandbox left in its folder; the program that root put there stays.
pub fn clear_folder(layout: &Layout) -> Result<(), SandboxError> {
    if let Some(short) = &layout.plan.short_dir {
        remove_dir(short)?;
    }
    for entry in std::fs::read_dir(&layout.dir).into_iter().flatten().flatten() {
        let path = entry.path();
        // The plan goes last: as long as something is left, the folder must be known as a sandbox.
        if entry.file_name() == "bin" || entry.file_name() == super::layout::PLAN_FILE {
            continue;
        }
        if path.is_dir() { remove_dir(&path)? } else { remove(&path)? }
    }
    remove(&layout.dir.join(super::layout::PLAN_FILE))
}

/// Removes the folder of a sandbox that is down, and its short folder.
pub fn remove_folder(layout: &Layout) -> Result<(), SandboxError> {
    if let Some(short) = &layout.plan.short_dir {
        remove_dir(short)?;
    }
    remove_dir(&layout.dir)
}

fn remove_dir(dir: &Path) -> Result<(), SandboxError> {
    match std::fs::remove_dir_all(dir) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(SandboxError::file("cannot remove", dir)(error))
        }
        _ => Ok(()),
    }
}

/// The daemon that a pid file names, if it runs and is this sandbox's.
pub fn daemon(layout: &Layout, pid_file: &Path) -> Result<Option<u32>, SandboxError> {
    let Some(pid) = process::named_in(pid_file) else { return Ok(None) };
    if process::has_argument(pid, &layout.config_path()) {
        return Ok(Some(pid));
    }
    // A pid is given out again: if another program has it, our daemon is gone.
    let command = process::command_line(pid);
    if command.contains("pgtandem") {
        return Err(SandboxError::ForeignProcess { pid, file: pid_file.into(), command });
    }
    Ok(None)
}

async fn end(what: &str, pids: &[u32], signal: Signal, limit: Duration) -> Result<(), SandboxError> {
    if pids.is_empty() {
        return Ok(());
    }
    for pid in pids {
        process::signal(*pid, signal);
    }
    if process::wait_gone(pids, limit).await {
        return Ok(());
    }
    for pid in pids.iter().filter(|pid| process::is_alive(**pid)) {
        process::signal(*pid, Signal::KILL);
    }
    if process::wait_gone(pids, KILL_LIMIT).await {
        return Ok(());
    }
    Err(SandboxError::DoesNotStop { what: what.to_owned(), seconds: (limit + KILL_LIMIT).as_secs() })
}

fn remove(file: &Path) -> Result<(), SandboxError> {
    match std::fs::remove_file(file) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(SandboxError::file("cannot remove", file)(error))
        }
        _ => Ok(()),
    }
}
