//! `postmaster.pid`: who runs on a data directory, and whether that process still lives.

use std::io::Read;
use std::path::Path;
use std::{fs, io};

use crate::config::NodeConfig;

/// Longest `postmaster.pid` that is looked at; real ones have about 100 bytes.
const PIDFILE_BYTES_MAX: usize = 8192;

/// Line 8 of the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PostmasterStatus {
    Starting,
    Stopping,
    /// It accepts connections; a hot standby, too.
    Ready,
    /// A standby that does not accept connections.
    Standby,
}

impl PostmasterStatus {
    #[must_use]
    pub fn accepts(self) -> bool {
        matches!(self, PostmasterStatus::Ready | PostmasterStatus::Standby)
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Postmaster {
    pub pid: i32,
    pub data_dir: String,
    /// Not yet written by a server that has just begun to start; so is `socket_dir`.
    pub port: Option<u16>,
    pub socket_dir: Option<String>,
    pub status: PostmasterStatus,
}

/// None if there is no such file, or none that a postmaster has finished writing its id into.
pub fn read(pgdata: &Path) -> io::Result<Option<Postmaster>> {
    match fs::read(pgdata.join("postmaster.pid")) {
        Ok(bytes) => Ok(parse(&String::from_utf8_lossy(&bytes[..bytes.len().min(PIDFILE_BYTES_MAX)]))),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

fn parse(text: &str) -> Option<Postmaster> {
    let mut lines = text.lines();
    // Negative: a standalone backend (postgres --single).
    let pid: i32 = lines.next()?.trim().parse::<i32>().ok()?.checked_abs()?;
    let data_dir = lines.next()?.to_owned();
    let _start_time = lines.next();
    let port = lines.next().and_then(|line| line.trim().parse().ok());
    let socket_dir = lines.next().map(str::trim).filter(|line| !line.is_empty()).map(str::to_owned);
    let _listen_address = lines.next();
    let _shared_memory = lines.next();
    let status = match lines.next().map_or("", str::trim) {
        "ready" => PostmasterStatus::Ready,
        "standby" => PostmasterStatus::Standby,
        "stopping" => PostmasterStatus::Stopping,
        _ => PostmasterStatus::Starting,
    };
    (pid > 0).then_some(Postmaster { pid, data_dir, port, socket_dir, status })
}

impl Postmaster {
    /// The process exists, is no zombie, and is a PostgreSQL (a number is given out again after a reboot).
    #[must_use]
    pub fn alive(&self) -> bool {
        matches!(process(self.pid), Some((name, state)) if name.starts_with("postgres") && state != 'Z' && state != 'X')
    }

    /// What the configuration says instead, if this is another server.
    pub(super) fn differs_from(&self, node: &NodeConfig) -> Option<String> {
        let same_folder = |found: &str, expected: &Path| {
            Path::new(found) == expected
                || matches!((fs::canonicalize(found), fs::canonicalize(expected)), (Ok(a), Ok(b)) if a == b)
        };
        let differs = !same_folder(&self.data_dir, &node.pgdata)
            || self.port.is_some_and(|port| port != node.port)
            || self.socket_dir.as_deref().is_some_and(|found| !same_folder(found, &node.socket_dir));
        differs.then(|| {
            format!(
                "data directory {}, port {}, socket folder {}",
                node.pgdata.display(),
                node.port,
                node.socket_dir.display()
            )
        })
    }
}

/// Whether `pg_control` says that the server is no standby and accepts writes. Written in the same moment in which
/// `pg_is_in_recovery()` becomes false (`StartupXLOG`).
pub(super) fn in_production(pgdata: &Path) -> bool {
    // `ControlFileData` of 13 to 18: system identifier, two version numbers, then `DBState`.
    const STATE_OFFSET: usize = 16;
    const DB_IN_PRODUCTION: u32 = 6;
    let mut head = [0; STATE_OFFSET + 4];
    let read = fs::File::open(pgdata.join("global/pg_control")).and_then(|mut file| file.read_exact(&mut head));
    let state = head.last_chunk().map_or(0, |state| u32::from_ne_bytes(*state));
    read.is_ok() && state == DB_IN_PRODUCTION
}

/// Removes the file of a postmaster that is a zombie: where nobody collects zombies (process 1 of some containers)
/// its number stays taken, and PostgreSQL would not start. Backends that still live are found by PostgreSQL itself,
/// through their shared memory.
pub(super) fn remove_of_zombie(pgdata: &Path) -> io::Result<()> {
    match read(pgdata)? {
        Some(found) if matches!(process(found.pid), Some((_, 'Z' | 'X'))) => {
            fs::remove_file(pgdata.join("postmaster.pid"))
        }
        _ => Ok(()),
    }
}

/// Name and state letter from /proc/PID/stat.
fn process(pid: i32) -> Option<(String, char)> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let (_, rest) = stat.split_once('(')?;
    // The name itself may hold a parenthesis; the state follows the last one.
    let (name, rest) = rest.rsplit_once(')')?;
    Some((name.to_owned(), rest.trim_start().chars().next()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_whole_file_is_read() {
        let text = "4711\n/data\n1700000000\n5433\n/sock\n\n  123 4\nready   \n";
        let found = parse(text).unwrap();
        assert_eq!((found.pid, found.port, found.status), (4711, Some(5433), PostmasterStatus::Ready));
        assert_eq!(found.socket_dir.as_deref(), Some("/sock"));
    }

    #[test]
    fn a_file_that_is_being_written_means_starting() {
        let found = parse("4711\n/data\n1700000000\n5433\n").unwrap();
        assert_eq!((found.socket_dir, found.status), (None, PostmasterStatus::Starting));
        assert_eq!(parse(""), None);
        assert_eq!(parse("x\n/data\n"), None);
    }

    #[test]
    fn a_process_that_is_not_postgres_is_not_alive() {
        let own = Postmaster {
            pid: i32::try_from(std::process::id()).unwrap(),
            data_dir: String::new(),
            port: None,
            socket_dir: None,
            status: PostmasterStatus::Ready,
        };
        assert!(!own.alive());
    }
}
