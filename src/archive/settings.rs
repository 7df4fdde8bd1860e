//! Texts of configuration files: what makes a node's PostgreSQL archive, and what a restored server starts with. Pure.

use std::fmt::Write;
use std::path::Path;

use super::error::ArchiveError;
use super::moment;
use crate::config::ArchiveConfig;
use crate::sync::wal::format_lsn;

/// Until when a restored server replays.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target {
    /// Microseconds since 1970.
    Time(u64),
    Lsn(pgtandem_proto::message::Lsn),
    /// As far as there is WAL.
    Latest,
}

/// The file with a node's settings of archiving, for the program at `program` with the configuration at `config`.
pub fn archive_conf(
    settings: Option<&ArchiveConfig>,
    program: &Path,
    config: &Path,
    node: &str,
) -> Result<String, ArchiveError> {
    let Some(settings) = settings else {
        return Ok("# The configuration has no [archive]. Written by pgtandem.\n".to_owned());
    };
    let command = format!("{} --config {} wal push --node {node} \"%p\"", word(program)?, word(config)?);
    Ok(format!(
        "# From [archive] of the configuration. Written by pgtandem.\narchive_mode = on\narchive_command = '{}'\narchive_timeout = {}\n",
        command.replace('\'', "''"),
        settings.segment_s_max
    ))
}

/// A path as one word of a shell, within a command in which PostgreSQL looks for `%`.
fn word(path: &Path) -> Result<String, ArchiveError> {
    let text = path.to_str().filter(|text| !text.contains(['\'', '\\', '\n', '%']));
    let text = text.ok_or_else(|| {
        let what = format!(
            "{} has a quote, a backslash or a percent sign in its name, so PostgreSQL can not be told of it",
            path.display()
        );
        ArchiveError::refused(what, "give it a plainer name")
    })?;
    Ok(format!("'{text}'"))
}

/// What a restored server needs to know.
pub struct Restored<'a> {
    pub target: Target,
    pub timeline: u32,
    pub pause: bool,
    pub port: u16,
    pub socket_dir: &'a Path,
    /// This program.
    pub program: &'a Path,
    /// Folder of the stream.
    pub archive: &'a Path,
    /// Data directory of the server that is archived, if it is on this host.
    pub live: Option<&'a Path>,
    /// What the copied server ran with and recovery asks for, if its own `postgresql.conf` is not in its data directory.
    pub settings: &'a [(String, String)],
}

/// Settings of a restored server, which come last.
pub fn restore_conf(restored: &Restored<'_>) -> Result<String, ArchiveError> {
    let mut text = String::from("# A server that pgtandem restored. It is no node of a cluster.\n");
    let mut set = |name: &str, value: &str| {
        // Writing to a string can not fail.
        let _ = writeln!(text, "{name} = '{}'", value.replace('\'', "''"));
    };
    for (name, value) in restored.settings {
        set(name, value);
    }
    set("port", &restored.port.to_string());
    set("listen_addresses", "");
    set("unix_socket_directories", &restored.socket_dir.display().to_string());
    for name in ["archive_command", "primary_conninfo", "primary_slot_name", "cluster_name"] {
        set(name, "");
    }
    for (name, value) in [
        ("archive_mode", "off"),
        ("ssl", "off"),
        ("hot_standby", "on"),
        // A subscription must not take from its publisher what the living server needs.
        ("max_logical_replication_workers", "0"),
    ] {
        set(name, value);
    }
    let mut command = format!("{} wal fetch --archive {}", word(restored.program)?, word(restored.archive)?);
    if let Some(live) = restored.live {
        let _ = write!(command, " --live {}", word(live)?);
    }
    set("restore_command", &format!("{command} %f \"%p\""));
    set("recovery_target_timeline", &restored.timeline.to_string());
    match restored.target {
        // What was committed at that moment is in it, what was committed later is not.
        Target::Time(micros) => {
            set("recovery_target_time", &moment::for_postgres(micros));
            set("recovery_target_inclusive", "on");
        }
        // What ends at that position is in it; inclusive would add the record that begins there.
        Target::Lsn(lsn) => {
            set("recovery_target_lsn", &format_lsn(lsn));
            set("recovery_target_inclusive", "off");
        }
        Target::Latest => {}
    }
    set("recovery_target_action", if restored.pause { "pause" } else { "promote" });
    Ok(text)
}

/// A configuration file without what [`restore_conf`] sets, for `postgresql.auto.conf`, which is read after everything else.
#[must_use]
pub fn without_restored(text: &str) -> String {
    let ours = |name: &str| {
        let name = name.to_ascii_lowercase();
        name.starts_with("recovery_")
            || name.starts_with("archive_")
            || [
                "port",
                "listen_addresses",
                "unix_socket_directories",
                "primary_conninfo",
                "primary_slot_name",
                "restore_command",
                "cluster_name",
                "hot_standby",
                "ssl",
                "max_logical_replication_workers",
                "data_directory",
                "hba_file",
                "ident_file",
            ]
            .contains(&name.as_str())
    };
    let name = |line: &str| {
        line.trim_start().split(|c: char| c == '=' || c.is_whitespace()).next().unwrap_or_default().to_owned()
    };
    text.lines().filter(|line| !ours(&name(line))).fold(String::new(), |text, line| text + line + "\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_stands_in_the_file_as_the_shell_needs_it() {
        let settings = ArchiveConfig::default();
        let text =
            archive_conf(Some(&settings), Path::new("/opt/my tools/pgtandem"), Path::new("/etc/x.toml"), "a").unwrap();
        assert!(
            text.contains(
                "archive_command = '''/opt/my tools/pgtandem'' --config ''/etc/x.toml'' wal push --node a \"%p\"'\n"
            ),
            "{text}"
        );
        assert!(archive_conf(Some(&settings), Path::new("/x'y"), Path::new("/z"), "a").is_err());
        assert!(archive_conf(None, Path::new("/x'y"), Path::new("/z"), "a").unwrap().starts_with('#'));
    }

    #[test]
    fn nothing_of_the_copied_server_overrides_what_is_restored() {
        let text = "# Do not edit\nwork_mem = '4MB'\nPort = 5432\narchive_command='x'\n  recovery_target_time = 'x'\n";
        assert_eq!(without_restored(text), "# Do not edit\nwork_mem = '4MB'\n");
    }
}
