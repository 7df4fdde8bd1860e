//! What can go wrong with a sandbox, and what to do about it.

use std::path::{Path, PathBuf};

use crate::config::ConfigError;

#[derive(Debug, thiserror::Error)]
pub enum SandboxError {
    #[error("{what} {}: {source}", .path.display())]
    File { what: &'static str, path: PathBuf, source: std::io::Error },
    #[error("folder {} is not empty and is no sandbox", .path.display())]
    NotEmpty { path: PathBuf },
    #[error("folder {} is no sandbox: it has no {}", .path.display(), super::layout::PLAN_FILE)]
    NotASandbox { path: PathBuf },
    #[error("the unfinished sandbox in {} is running:\n{what}", .path.display())]
    Running { path: PathBuf, what: String },
    #[error("the sandbox in {} was made with {made}, not with {asked}", .path.display())]
    OtherPlan { path: PathBuf, made: String, asked: String },
    #[error("user \"{user}\" cannot reach the folder {}: {} is not open to it", .path.display(), .closed.display())]
    Unreachable { user: String, path: PathBuf, closed: PathBuf },
    #[error("there is no user \"{user}\" on this machine")]
    NoUser { user: String },
    #[error("{nodes} nodes: a sandbox has 1 to {max}", max = super::layout::NODES_MAX)]
    Nodes { nodes: usize },
    #[error("port {port}, needed for {what}, is in use{}", holder_text(.holder.as_deref()))]
    PortInUse { port: u16, what: String, holder: Option<String> },
    #[error("base port {base}: a sandbox needs the ports {base} to {base} + {span}, and they end at 65535")]
    BasePort { base: u16, span: u16 },
    #[error("no block of free ports found on 127.0.0.1 after {tries} tries")]
    NoFreePorts { tries: u32 },
    #[error("PostgreSQL is not installed: no initdb in /usr/lib/postgresql/*/bin and none in PATH")]
    NoPostgres,
    #[error("{program} failed: {output}")]
    Program { program: String, output: String },
    #[error("{name} did not start: {why}{}", log_text(.log, .tail))]
    Daemon { name: String, why: String, log: PathBuf, tail: String },
    #[error("process {pid}, named in {}, is not of this sandbox: {command}", .file.display())]
    ForeignProcess { pid: u32, file: PathBuf, command: String },
    #[error("{what} still runs {seconds} s after it was told to stop")]
    DoesNotStop { what: String, seconds: u64 },
    #[error("certificates: {0}")]
    Certificates(String),
    #[error("record of node0: {0}")]
    Record(String),
    #[error(transparent)]
    Config(#[from] ConfigError),
    #[error("interrupted")]
    Interrupted,
}

impl SandboxError {
    /// The next thing to do, one sentence.
    #[must_use]
    pub fn hint(&self) -> String {
        match self {
            Self::File { .. } => "check the folder's permissions and the free space, or choose another --dir".into(),
            Self::NotEmpty { .. } => "choose a folder that is empty or does not exist".into(),
            Self::NotASandbox { .. } => "name the folder that was given to `pgtandem sandbox up --dir`".into(),
            Self::Running { path, .. } => format!("`pgtandem sandbox down --dir {}` ends it", path.display()),
            Self::OtherPlan { path, .. } => {
                format!("leave these options out to start it as it is, or take it down and remove {}", path.display())
            }
            Self::Unreachable { user, closed, .. } => {
                format!(
                    "choose a folder below /tmp or /var/tmp, or `chmod o+x {}`, or name another --user than {user}",
                    closed.display()
                )
            }
            Self::NoUser { .. } => {
                "install PostgreSQL (`make setup`), which makes the user postgres, or name another with --user".into()
            }
            Self::Nodes { .. } | Self::BasePort { .. } => "choose a smaller number".into(),
            Self::PortInUse { .. } => "choose another --base-port, or leave it out: then free ones are found".into(),
            Self::NoFreePorts { .. } => "name free ones with --base-port".into(),
            Self::NoPostgres => "`make setup` installs it".into(),
            Self::Program { .. } => "the text above is that program's own; correct what it says and try again".into(),
            Self::Daemon { log, .. } => format!("the whole log is {}", log.display()),
            Self::ForeignProcess { file, .. } => format!("if that process is no pgtandem, remove {}", file.display()),
            Self::DoesNotStop { .. } => "look at its log; `kill -9` ends it, the data survive that".into(),
            Self::Certificates(_) | Self::Record(_) => "remove the folder and make the sandbox again".into(),
            Self::Config(error) => error.hint(),
            Self::Interrupted => "everything that had been started was ended".into(),
        }
    }

    /// For `map_err` after an operation on a file.
    pub(super) fn file(what: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::File { what, path, source }
    }
}

fn holder_text(holder: Option<&str>) -> String {
    holder.map(|holder| format!(" by {holder}")).unwrap_or_default()
}

fn log_text(log: &Path, tail: &str) -> String {
    if tail.is_empty() { String::new() } else { format!("; the last lines of {}:\n{tail}", log.display()) }
}
