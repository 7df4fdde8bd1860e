//! Steps down from root: PostgreSQL refuses to run as root, and nothing in a sandbox needs it.
//!
//! Root makes the folder, gives it to the user, puts a copy of this program into it and runs the same command again
//! as that user. Everything else happens there.

use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus};

use super::SandboxError;

/// An account of this machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct User {
    pub name: String,
    pub uid: u32,
    pub gid: u32,
    pub home: PathBuf,
}

#[must_use]
pub fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

/// Looks an account up, by name or number; `getent` asks whatever the machine keeps its accounts in.
pub fn find(name: &str) -> Result<User, SandboxError> {
    let missing = || SandboxError::NoUser { user: name.to_owned() };
    let output = Command::new("getent").args(["passwd", "--", name]).output();
    let text = match output {
        Ok(output) if output.status.success() => String::from_utf8_lossy(&output.stdout).into_owned(),
        _ => std::fs::read_to_string("/etc/passwd").unwrap_or_default(),
    };
    let parse = |line: &str| {
        let fields: Vec<&str> = line.split(':').collect();
        let [account, _, uid, gid, _, home, ..] = fields.as_slice() else { return None };
        let (uid, gid): (u32, u32) = (uid.parse().ok()?, gid.parse().ok()?);
        (*account == name || uid.to_string() == name).then(|| User {
            name: (*account).to_owned(),
            uid,
            gid,
            home: home.into(),
        })
    };
    text.lines().find_map(parse).ok_or_else(missing)
}

/// Name of the user that this process runs as.
pub fn current() -> Result<String, SandboxError> {
    Ok(find(&rustix::process::geteuid().as_raw().to_string())?.name)
}

/// Makes `dir` (and nothing above it that exists) the user's own, and checks that the user can reach it.
pub fn give(dir: &Path, user: &User) -> Result<(), SandboxError> {
    std::fs::create_dir_all(dir).map_err(SandboxError::file("cannot make", dir))?;
    let dir = dir.canonicalize().map_err(SandboxError::file("cannot find", dir))?;
    for folder in dir.ancestors().skip(1) {
        let metadata = folder.metadata().map_err(SandboxError::file("cannot look at", folder))?;
        let shift = if metadata.uid() == user.uid {
            6
        } else if metadata.gid() == user.gid {
            3
        } else {
            0
        };
        if (metadata.mode() >> shift) & 0o1 == 0 {
            return Err(SandboxError::Unreachable {
                user: user.name.clone(),
                path: dir.clone(),
                closed: folder.into(),
            });
        }
    }
    std::os::unix::fs::chown(&dir, Some(user.uid), Some(user.gid)).map_err(SandboxError::file("cannot chown", &dir))
}

/// Puts a copy of this program into `dir`/bin, where the user can run it.
pub fn copy_program(dir: &Path, user: &User) -> Result<PathBuf, SandboxError> {
    let program = std::env::current_exe().map_err(SandboxError::file("cannot find", Path::new("/proc/self/exe")))?;
    copy_as(&program, dir, "pgtandem", user)
}

/// Puts a copy of `program` into `dir`/bin as `name`, where the user can run it.
pub fn copy_as(program: &Path, dir: &Path, name: &str, user: &User) -> Result<PathBuf, SandboxError> {
    let bin = dir.join("bin");
    std::fs::create_dir_all(&bin).map_err(SandboxError::file("cannot make", &bin))?;
    let (new, path) = (bin.join(format!("{name}.new")), bin.join(name));
    std::fs::copy(program, &new).map_err(SandboxError::file("cannot copy the program to", &new))?;
    let mode = std::fs::Permissions::from_mode(0o755);
    std::fs::set_permissions(&new, mode).map_err(SandboxError::file("cannot chmod", &new))?;
    std::fs::rename(&new, &path).map_err(SandboxError::file("cannot write", &path))?;
    for path in [&bin, &path] {
        // So that the user can remove the folder, too.
        std::os::unix::fs::chown(path, Some(user.uid), Some(user.gid))
            .map_err(SandboxError::file("cannot chown", path))?;
    }
    Ok(path)
}

/// Runs `program` with this process's own arguments, `extra` at their end, as `user`, and waits for it. A signal
/// from the terminal reaches it too; it takes down what it started and ends by itself.
pub async fn run_as(user: &User, program: &Path, extra: &[&str]) -> Result<ExitStatus, SandboxError> {
    let mut command = Command::new(program);
    command.args(std::env::args_os().skip(1)).args(extra);
    command.uid(user.uid).gid(user.gid).env("HOME", &user.home).env("USER", &user.name).env("LOGNAME", &user.name);
    let mut child =
        tokio::process::Command::from(command).spawn().map_err(SandboxError::file("cannot start", program))?;
    loop {
        tokio::select! {
            status = child.wait() => return status.map_err(SandboxError::file("cannot wait for", program)),
            () = interrupted() => {
                if let Some(pid) = child.id() {
                    super::process::signal(pid, rustix::process::Signal::TERM);
                }
            }
        }
    }
}

/// Returns when this process is told to stop: SIGINT or SIGTERM.
pub async fn interrupted() {
    use tokio::signal::unix::{SignalKind, signal};
    match (signal(SignalKind::interrupt()), signal(SignalKind::terminate())) {
        (Ok(mut interrupt), Ok(mut terminate)) => {
            tokio::select! { _ = interrupt.recv() => {}, _ = terminate.recv() => {} }
        }
        // Without handlers the signals end the process as they always do.
        _ => std::future::pending().await,
    }
}
