//! Daemons of a sandbox: started in a session of their own, found again by their pid files, ended.
//!
//! A process counts as ours only if its command line names our configuration (daemons) or it works in our data
//! directory (PostgreSQL): a pid from a file may since belong to somebody else.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal};

use super::SandboxError;

/// Lines of a log that an error shows.
const TAIL_LINES: usize = 12;
/// Bytes of a log that are looked at for them.
const TAIL_BYTES: u64 = 16 << 10;
/// How often a condition is looked at again.
pub const POLL: Duration = Duration::from_millis(20);

/// Starts `program arguments`, output appended to `log`, its pid in `pid_file`.
pub fn start(program: &Path, arguments: &[&str], log: &Path, pid_file: &Path) -> Result<Child, SandboxError> {
    let open = || std::fs::OpenOptions::new().create(true).append(true).open(log);
    let output = open().map_err(SandboxError::file("cannot open", log))?;
    let errors = output.try_clone().map_err(SandboxError::file("cannot open", log))?;
    let child = Command::new(program)
        .args(arguments)
        .arg("--own-session")
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(output)
        .stderr(errors)
        .spawn()
        .map_err(SandboxError::file("cannot start", program))?;
    std::fs::write(pid_file, format!("{}\n", child.id())).map_err(SandboxError::file("cannot write", pid_file))?;
    Ok(child)
}

/// The process that a pid file names, if it runs.
pub fn named_in(pid_file: &Path) -> Option<u32> {
    let text = std::fs::read_to_string(pid_file).ok()?;
    let pid = text.lines().next()?.trim().parse().ok()?;
    is_alive(pid).then_some(pid)
}

/// Whether the process runs; one that ended and was not waited for does not.
#[must_use]
pub fn is_alive(pid: u32) -> bool {
    // proc(5): the state is the first word after the name, which is in parentheses and may contain anything.
    let Ok(stat) = std::fs::read_to_string(format!("/proc/{pid}/stat")) else { return false };
    let main_runs = stat.rsplit_once(") ").is_some_and(|(_, rest)| !rest.starts_with(['Z', 'X']));
    // Its other threads may end a moment later, and hold its files and ports until then.
    main_runs || std::fs::read_dir(format!("/proc/{pid}/task")).is_ok_and(|threads| threads.count() > 1)
}

/// The command line, separated by blanks.
pub fn command_line(pid: u32) -> String {
    let bytes = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    String::from_utf8_lossy(&bytes).replace('\0', " ").trim().to_owned()
}

/// Whether one of the process's arguments is `argument`.
pub fn has_argument(pid: u32, argument: &Path) -> bool {
    use std::os::unix::ffi::OsStrExt;
    std::fs::read(format!("/proc/{pid}/cmdline"))
        .is_ok_and(|bytes| bytes.split(|byte| *byte == 0).any(|part| part == argument.as_os_str().as_bytes()))
}

/// Every process that works in `folder`: PostgreSQL's do, in their data directory.
pub fn working_in(folder: &Path) -> Vec<u32> {
    let Ok(folder) = folder.canonicalize() else { return Vec::new() };
    let Ok(entries) = std::fs::read_dir("/proc") else { return Vec::new() };
    let pids = entries.flatten().filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    pids.filter(|pid| std::fs::read_link(format!("/proc/{pid}/cwd")).is_ok_and(|cwd| cwd == folder))
        .filter(|pid| is_alive(*pid))
        .collect()
}

/// Sends a signal; a process that is gone already is no error.
pub fn signal(pid: u32, signal: Signal) {
    if let Some(pid) = i32::try_from(pid).ok().and_then(Pid::from_raw) {
        // Whoever sent it waits for the end, and tells if that does not come.
        let _ = rustix::process::kill_process(pid, signal);
    }
}

/// Waits until none of `pids` runs; false when `limit` is over before.
pub async fn wait_gone(pids: &[u32], limit: Duration) -> bool {
    let started = Instant::now();
    while pids.iter().any(|pid| is_alive(*pid)) {
        if started.elapsed() > limit {
            return false;
        }
        tokio::time::sleep(POLL).await;
    }
    true
}

/// A daemon that is starting: what to say when it does not come up.
pub struct Starting {
    pub name: String,
    pub child: Child,
    pub log: PathBuf,
}

impl Starting {
    /// Waits until `ready` answers true; fails when the process ends or `limit` is over.
    pub async fn wait<F: Future<Output = bool>>(
        &mut self,
        limit: Duration,
        ready: impl Fn() -> F,
    ) -> Result<(), SandboxError> {
        let started = Instant::now();
        while !ready().await {
            if let Ok(Some(status)) = self.child.try_wait() {
                return Err(self.failed(format!("it ended ({status})")));
            }
            if started.elapsed() > limit {
                return Err(self.failed(format!("it did not answer within {} s", limit.as_secs())));
            }
            tokio::time::sleep(POLL).await;
        }
        Ok(())
    }

    pub fn failed(&self, why: String) -> SandboxError {
        SandboxError::Daemon { name: self.name.clone(), why, log: self.log.clone(), tail: tail(&self.log) }
    }
}

/// The last lines of a log, indented.
pub fn tail(log: &Path) -> String {
    use std::io::{Read, Seek, SeekFrom};
    let read = || -> std::io::Result<Vec<u8>> {
        let mut file = std::fs::File::open(log)?;
        let bytes = file.metadata()?.len();
        file.seek(SeekFrom::Start(bytes.saturating_sub(TAIL_BYTES)))?;
        let mut text = Vec::new();
        file.take(TAIL_BYTES).read_to_end(&mut text)?;
        Ok(text)
    };
    let text = read().unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    let lines: Vec<&str> = text.lines().collect();
    let last = lines.iter().skip(lines.len().saturating_sub(TAIL_LINES));
    last.map(|line| format!("  {line}")).collect::<Vec<_>>().join("\n")
}
