//! The commands, a file each. Here: what was typed, which command it means, and how an error is told.
//!
//! A command does its work through the library and prints; it holds no logic of its own.

mod agent;
mod archive;
mod base;
mod demo;
mod detach;
mod discard_fork;
mod fence;
mod here;
mod promote;
mod proxy;
mod records;
mod recover;
mod restore;
mod sandbox;
mod status;
mod switch;
mod wal;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

use crate::archive::ArchiveError;
use crate::config::{ConfigError, DEFAULT_PATH};
use crate::sandbox::SandboxError;
use crate::sandbox::control::ControlError;
use crate::sandbox::demo::DemoError;

#[derive(Debug, Parser)]
#[command(
    name = "pgtandem",
    version,
    args_override_self = true,
    about = "Two or more PostgreSQL servers that stay identical, behind one proxy"
)]
struct Arguments {
    /// The configuration file, the same on every host.
    #[arg(long, global = true, env = "PGTANDEM_CONFIG", default_value = DEFAULT_PATH, value_name = "FILE")]
    config: PathBuf,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run the daemon of a node: its PostgreSQL, its durable record, its door to the other hosts.
    Agent(agent::Agent),
    /// Run the daemon that clients connect to.
    Proxy(proxy::Proxy),
    /// Bring a node back: fill it with what differs and make it a member, while clients go on working.
    Recover(recover::Recover),
    /// Take a node out of the member set, or end its recovery.
    Detach(detach::Detach),
    /// Make the node of this host the leader, because the leader's host is lost. Says first whether that is safe.
    Promote(promote::Promote),
    /// Make another node the leader, as planned: its proxy takes over.
    Switch(switch::Switch),
    /// Empty a node that went on alone while the other side did, too; its data are moved aside.
    DiscardFork(discard_fork::DiscardFork),
    /// What the archives on this host hold: WAL, base copies, and whether anything is missing.
    Archive(archive::Archive),
    /// Take a base copy of a node into its archive.
    Base(base::Base),
    /// Make a server of an earlier moment from an archive, in a directory of its own.
    Restore(restore::Restore),
    /// What PostgreSQL calls to archive its WAL and to get it back; and a check of all that was archived.
    #[command(subcommand)]
    Wal(wal::Wal),
    /// Show members, states and what to do about whatever is not as it should be.
    Status(status::Status),
    /// A whole cluster on this machine, for trying out, tests and benchmarks.
    #[command(subcommand)]
    Sandbox(sandbox::Sandbox),
    /// The main job on this machine, with numbers: two servers under load, one killed and recovered.
    Demo(demo::Demo),
}

/// An error of a command that has no type of its own, with the next thing to do.
#[derive(Debug, thiserror::Error)]
#[error("{what}")]
pub struct Explained {
    /// What failed, where and why.
    pub what: String,
    /// The next thing to do or type.
    pub hint: String,
}

/// Reads the command line, runs the command, tells its error on standard error. Exit code 2 is a wrong command
/// line, 1 a command that failed.
#[must_use]
pub fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let result = match arguments.command {
        Command::Agent(command) => command.run(&arguments.config),
        Command::Proxy(command) => command.run(&arguments.config),
        Command::Recover(command) => command.run(&arguments.config),
        Command::Detach(command) => command.run(&arguments.config),
        Command::Promote(command) => command.run(&arguments.config),
        Command::Switch(command) => command.run(&arguments.config),
        Command::DiscardFork(command) => command.run(&arguments.config),
        Command::Archive(command) => command.run(&arguments.config),
        Command::Base(command) => command.run(&arguments.config),
        Command::Restore(command) => command.run(&arguments.config),
        Command::Wal(command) => command.run(&arguments.config),
        Command::Status(command) => command.run(&arguments.config),
        Command::Sandbox(command) => command.run(),
        Command::Demo(command) => command.run(),
    };
    result.unwrap_or_else(|error| {
        eprintln!("error: {}", told(&error));
        if let Some(hint) = hint(&error) {
            eprintln!("next:  {hint}");
        }
        ExitCode::FAILURE
    })
}

/// The error and its causes, each once: many sentences name their cause already.
fn told(error: &anyhow::Error) -> String {
    let mut text = String::new();
    for cause in error.chain().map(ToString::to_string).filter(|cause| !cause.is_empty()) {
        if !text.contains(&cause) {
            if !text.is_empty() {
                text.push_str(": ");
            }
            text.push_str(&cause);
        }
    }
    text
}

/// The hint of the first error in the chain that has one.
fn hint(error: &anyhow::Error) -> Option<String> {
    error.chain().find_map(|cause| {
        let explained = cause.downcast_ref::<Explained>().map(|error| error.hint.clone());
        let config = || cause.downcast_ref::<ConfigError>().map(ConfigError::hint);
        let sandbox = || cause.downcast_ref::<SandboxError>().map(SandboxError::hint);
        let control = || cause.downcast_ref::<ControlError>().map(ControlError::hint);
        let demo = || cause.downcast_ref::<DemoError>().map(DemoError::hint);
        let archive = || cause.downcast_ref::<ArchiveError>().map(ArchiveError::hint);
        explained.or_else(config).or_else(sandbox).or_else(control).or_else(demo).or_else(archive)
    })
}

/// What both daemons take.
#[derive(Debug, clap::Args)]
struct Daemon {
    /// Leave the terminal's session: what the terminal does ends nothing here. A service manager does this by itself.
    #[arg(long)]
    own_session: bool,
}

impl Daemon {
    /// Call first.
    fn begin(&self) -> anyhow::Result<()> {
        start_log();
        if self.own_session {
            rustix::process::setsid()?;
        }
        Ok(())
    }
}

/// Logs of a daemon go to standard error, filtered by `PGTANDEM_LOG` (`info` if it is not set).
fn start_log() {
    let filter = tracing_subscriber::EnvFilter::try_from_env("PGTANDEM_LOG")
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("info"));
    // A second call (in tests) keeps the first subscriber.
    let _ = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_ansi(false).try_init();
}

/// Threads of a daemon's runtime at most. Files are hashed and clients are served by threads of their own.
const DAEMON_THREADS_MAX: usize = 4;

/// A runtime for a command that waits for something.
pub(crate) fn runtime() -> anyhow::Result<tokio::runtime::Runtime> {
    runtime_of(2)
}

/// A daemon's runtime: half of the cores, because PostgreSQL has the rest. On a small host more threads would only wake
/// each other for every message that passes a tunnel.
pub(crate) fn daemon_runtime() -> anyhow::Result<tokio::runtime::Runtime> {
    let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    runtime_of(cores.div_ceil(2).min(DAEMON_THREADS_MAX))
}

fn runtime_of(threads: usize) -> anyhow::Result<tokio::runtime::Runtime> {
    Ok(tokio::runtime::Builder::new_multi_thread().worker_threads(threads).enable_all().build()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        use clap::CommandFactory;
        Arguments::command().debug_assert();
    }
}
