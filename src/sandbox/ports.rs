//! Ports on this machine: which are free, and who holds one that is not.

use std::collections::HashSet;
use std::net::{Ipv4Addr, TcpListener};

use super::SandboxError;
use super::layout::{AGENT_PORTS_OFFSET, Layout};

/// Blocks of ports that are tried before giving up.
const TRIES_MAX: u32 = 200;
/// Base ports are chosen from here: below the ephemeral ports (`ip_local_port_range` begins at 32768), so that no
/// outgoing connection takes one meanwhile.
const BASES: std::ops::Range<u16> = 11_000..32_000;

/// A base port whose whole block is free at this moment.
pub fn find_base(layout: &Layout) -> Result<u16, SandboxError> {
    let mut layout = layout.clone();
    for _ in 0..TRIES_MAX {
        layout.plan.base_port = rand::random_range(BASES);
        if layout.ports().iter().all(|(port, _)| is_free(*port)) {
            return Ok(layout.plan.base_port);
        }
    }
    Err(SandboxError::NoFreePorts { tries: TRIES_MAX })
}

/// Fails with the first port of the sandbox that is in use, other than by what of it runs already.
pub fn check(layout: &Layout, running: &[u16]) -> Result<(), SandboxError> {
    let span = AGENT_PORTS_OFFSET + u16::try_from(layout.plan.nodes).unwrap_or(u16::MAX);
    if layout.plan.base_port == 0 || layout.plan.base_port.checked_add(span).is_none() {
        return Err(SandboxError::BasePort { base: layout.plan.base_port, span });
    }
    match layout.ports().into_iter().find(|(port, _)| !running.contains(port) && !is_free(*port)) {
        Some((port, what)) => Err(SandboxError::PortInUse { port, what, holder: holder(port) }),
        None => Ok(()),
    }
}

fn is_free(port: u16) -> bool {
    TcpListener::bind((Ipv4Addr::LOCALHOST, port)).is_ok()
}

/// Whether something on this machine listens on `port`; without a connection, which a daemon would have to log.
pub fn is_listening(port: u16) -> bool {
    !inodes(port).is_empty()
}

/// The sockets that listen on `port`, as they appear in `/proc/<pid>/fd`.
fn inodes(port: u16) -> HashSet<String> {
    let tables = ["/proc/net/tcp", "/proc/net/tcp6"].iter().filter_map(|table| std::fs::read_to_string(table).ok());
    tables.flat_map(|table| listeners(&table, port)).map(|inode| format!("socket:[{inode}]")).collect()
}

/// The process that listens on `port`, as "process 17 (postgres)"; nothing if it belongs to another user.
fn holder(port: u16) -> Option<String> {
    let inodes = inodes(port);
    let processes = std::fs::read_dir("/proc").ok()?.flatten();
    processes.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok()).find_map(|pid| {
        let mut files = std::fs::read_dir(format!("/proc/{pid}/fd")).ok()?.flatten();
        files.find(|file| {
            std::fs::read_link(file.path()).is_ok_and(|link| link.to_str().is_some_and(|link| inodes.contains(link)))
        })?;
        let name = std::fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
        Some(format!("process {pid} ({})", name.trim()))
    })
}

/// Inodes of the sockets that listen on `port`, from the text of `/proc/net/tcp` (proc(5): local address in column
/// 1, state in column 3 with 0A for LISTEN, inode in column 9).
fn listeners(table: &str, port: u16) -> Vec<String> {
    let end = format!(":{port:04X}");
    let line = |line: &str| {
        let columns: Vec<&str> = line.split_whitespace().collect();
        let listens = columns.get(1)?.ends_with(&end) && *columns.get(3)? == "0A";
        listens.then(|| columns.get(9).map(|inode| (*inode).to_owned()))?
    };
    table.lines().skip(1).filter_map(line).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_port_in_use_is_told_with_its_holder() {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let port = listener.local_addr().unwrap().port();
        assert!(!is_free(port));
        let holder = holder(port).unwrap();
        assert!(holder.starts_with(&format!("process {} (", std::process::id())), "{holder}");
    }
}
