//! A node whose PostgreSQL takes long to leave recovery, as one with a slow disk does: for tests and benchmarks.
//!
//! What takes long is PostgreSQL's own `recovery_end_command`: replay has ended, and the server is a standby until the command is done. A
//! recovery empties that setting in the node's files, so it is given on the server's command line, by a `pg_ctl` that stands in front of the
//! real one in a `bin_dir` of the node's own.

use std::io;
use std::os::unix::fs::{PermissionsExt, symlink};

use super::Layout;

/// The end of each recovery of this node takes so many seconds, from the next start of its agent on.
///
/// # Errors
/// If the folder can not be made, or the configuration can not be read or written.
pub fn leave_recovery_slowly(layout: &Layout, index: usize, seconds: u32) -> io::Result<()> {
    let real = &layout.plan.bin_dir;
    let slow = layout.node_dir(index).join("slow-bin");
    let _ = std::fs::remove_dir_all(&slow);
    std::fs::create_dir_all(&slow)?;
    for program in std::fs::read_dir(real)? {
        let program = program?;
        if program.file_name() != "pg_ctl" {
            symlink(program.path(), slow.join(program.file_name()))?;
        }
    }
    let option = format!("-c recovery_end_command='sleep {seconds}'");
    let real = real.join("pg_ctl");
    let text =
        format!("#!/bin/sh\n[ \"$1\" = start ] || exec {0} \"$@\"\nexec {0} \"$@\" -o \"{option}\"\n", real.display());
    let script = slow.join("pg_ctl");
    std::fs::write(&script, text)?;
    std::fs::set_permissions(&script, std::fs::Permissions::from_mode(0o755))?;

    let path = layout.config_path();
    let text = std::fs::read_to_string(&path)?;
    let mut config: toml::Table = text.parse().map_err(io::Error::other)?;
    let name = Layout::node_name(index);
    let nodes = config.get_mut("node").and_then(toml::Value::as_array_mut).into_iter().flatten();
    let node = nodes.filter_map(toml::Value::as_table_mut).find(|node| {
        let named = node.get("name").and_then(toml::Value::as_str);
        named == Some(&name)
    });
    let node = node.ok_or_else(|| io::Error::other(format!("{} has no node {name}", path.display())))?;
    node.insert("bin_dir".into(), slow.display().to_string().into());
    std::fs::write(&path, toml::to_string(&config).map_err(io::Error::other)?)
}
