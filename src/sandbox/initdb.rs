//! The first node's data directory: `initdb`, settings, and the roles and databases that must exist before any
//! server runs. The other nodes are filled from it, never initialised.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use tokio::io::AsyncWriteExt;

use super::{Layout, SandboxError};

/// Settings that all nodes share; they stand in `postgresql.conf`, which an empty node takes from the one that fills it.
pub const SETTINGS: &str = "
# ---- pgtandem sandbox
wal_level = replica
max_wal_senders = 10
max_replication_slots = 10
max_slot_wal_keep_size = 8GB
max_prepared_transactions = 200
max_connections = 200
shared_buffers = 256MB
max_wal_size = 2GB
logging_collector = off
log_line_prefix = '%m [%p] %q%u@%d '
";

/// Last line of `postgresql.conf`. What differs by node stands in that file, which is never copied.
const INCLUDE: &str = "
# What differs by node; never copied.
include_if_exists = 'pgtandem.node.conf'
";

/// Who may connect: the daemons as `pgtandem` over the socket, everybody else as everybody from this machine.
const HBA: &str = "\
# TYPE DATABASE    USER     ADDRESS      METHOD
local  all         pgtandem              peer map=pgtandem
local  all         all                   trust
host   all         pgtandem all          reject
host   all         all      127.0.0.1/32 trust
host   all         all      ::1/128      trust
";

/// Runs as the user that PostgreSQL runs as.
pub async fn initdb(layout: &Layout) -> Result<(), SandboxError> {
    let pgdata = layout.pgdata(0);
    let bin_dir = &layout.plan.bin_dir;
    let mut command = Command::new(bin_dir.join("initdb"));
    command.arg("-D").arg(&pgdata).args(["--username=postgres", "--auth=trust", "--data-checksums"]);
    // The data are for trying out; the daemons sync what they must by themselves.
    command.args(["--encoding=UTF8", "--no-locale", "--no-sync"]);
    run("initdb", command, "").await?;

    let conf = pgdata.join("postgresql.conf");
    let mut file =
        std::fs::OpenOptions::new().append(true).open(&conf).map_err(SandboxError::file("cannot open", &conf))?;
    file.write_all(format!("{SETTINGS}{INCLUDE}").as_bytes()).map_err(SandboxError::file("cannot write", &conf))?;
    write(&pgdata.join("pg_hba.conf"), HBA)?;
    write(&pgdata.join("pg_ident.conf"), &format!("pgtandem {} pgtandem\n", super::user::current()?))?;
    node_conf(layout, 0)?;

    let mut statements = "CREATE ROLE pgtandem SUPERUSER LOGIN;\n".to_owned();
    if layout.plan.scale > 0 {
        statements.push_str("CREATE DATABASE bench;\n");
    }
    // Single-user mode, because a server that clients could reach must not run before an agent rules it.
    let mut command = Command::new(bin_dir.join("postgres"));
    command.args(["--single", "-j", "-D"]).arg(&pgdata).arg("postgres");
    // With -j a statement ends with a semicolon and an empty line.
    run("postgres --single", command, &statements.replace('\n', "\n\n")).await
}

/// Writes what differs by node, also for a node that is still empty.
pub fn node_conf(layout: &Layout, index: usize) -> Result<(), SandboxError> {
    let text = format!(
        "port = {}\nlisten_addresses = '127.0.0.1'\nunix_socket_directories = '{}'\nunix_socket_permissions = 0700\n\
         cluster_name = '{}'\n",
        layout.postgres_port(index),
        layout.socket_dir(index).display().to_string().replace('\'', "''"),
        Layout::node_name(index),
    );
    write(&layout.pgdata(index).join("pgtandem.node.conf"), &text)
}

fn write(path: &Path, text: &str) -> Result<(), SandboxError> {
    std::fs::write(path, text).map_err(SandboxError::file("cannot write", path))
}

/// Runs a program to its end with `input`; its output is the error's text when it fails. It is killed when the
/// caller stops waiting.
pub async fn run(name: &str, command: Command, input: &str) -> Result<(), SandboxError> {
    let failed = |output: String| SandboxError::Program { program: name.to_owned(), output };
    let mut command = tokio::process::Command::from(command);
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true);
    let mut child = command.current_dir("/").env("LC_ALL", "C").spawn().map_err(|error| failed(error.to_string()))?;
    if let Some(mut stdin) = child.stdin.take() {
        // The inputs here are shorter than a pipe's buffer, and a program that does not read them says why below.
        let _ = stdin.write_all(input.as_bytes()).await;
    }
    let output = child.wait_with_output().await.map_err(|error| failed(error.to_string()))?;
    let text = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    // Single-user mode goes on after an error and ends with 0.
    if output.status.success() && !text.contains("ERROR:") && !text.contains("FATAL:") {
        return Ok(());
    }
    Err(failed(format!("{} ({})", text.trim(), output.status)))
}

/// The newest PostgreSQL on this machine: Debian's folders, then PATH.
pub fn find_bin_dir() -> Result<PathBuf, SandboxError> {
    let complete = |dir: &Path| ["initdb", "postgres", "pg_ctl"].iter().all(|program| dir.join(program).is_file());
    let majors = std::fs::read_dir("/usr/lib/postgresql").into_iter().flatten().flatten();
    let newest = majors
        .filter_map(|entry| Some((entry.file_name().to_str()?.parse::<u32>().ok()?, entry.path().join("bin"))))
        .filter(|(_, dir)| complete(dir))
        .max_by_key(|(major, _)| *major);
    if let Some((_, dir)) = newest {
        return Ok(dir);
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).find(|dir| complete(dir)).ok_or(SandboxError::NoPostgres)
}
