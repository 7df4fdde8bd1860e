//! `fence.command`: switches a host off, or cuts it from its network, by whatever means there are. `promote` runs it before it writes anything,
//! with the members that do not answer as its arguments; if it fails nothing is promoted.

use std::process::Stdio;
use std::time::Duration;

use tokio::process::Command;

use super::Explained;
use crate::config::Config;

/// Bytes of what it says that an error repeats.
const SAID_BYTES_MAX: usize = 1000;

/// Whether it would be run.
pub fn is_run(config: &Config, silent: &[String]) -> bool {
    !config.fence.command.is_empty() && !silent.is_empty()
}

/// Runs it for these members. Gives what the record is to say about it.
///
/// # Errors
/// If it does not end with 0 in time.
pub async fn run(config: &Config, own: &str, silent: &[String]) -> Result<String, Explained> {
    let [program, arguments @ ..] = config.fence.command.as_slice() else { return Ok(String::new()) };
    if !is_run(config, silent) {
        return Ok(String::new());
    }
    let who = silent.join(", ");
    let failed = |why: String| Explained {
        what: format!("nothing was promoted: fence.command, {program}, for {who}: {why}"),
        hint: format!(
            "make sure that {who} is off, and correct {program} or remove fence.command; then the same command again"
        ),
    };
    let mut command = Command::new(program);
    command.args(arguments).args(silent).kill_on_drop(true).stdin(Stdio::null());
    command.env("PGTANDEM_CLUSTER", &config.cluster.name).env("PGTANDEM_NODE", own);
    let limit = Duration::from_millis(config.fence.command_ms_max);
    let output = match tokio::time::timeout(limit, command.output()).await {
        Ok(output) => output.map_err(|error| failed(error.to_string()))?,
        Err(_) => return Err(failed(format!("it did not end within {} ms", limit.as_millis()))),
    };
    if output.status.success() {
        return Ok(format!(", after fence.command for {who}"));
    }
    let said = [output.stdout, output.stderr].concat();
    let said = String::from_utf8_lossy(&said[said.len().saturating_sub(SAID_BYTES_MAX)..]).trim().to_owned();
    Err(failed(format!("it ended with {}: {said}", output.status)))
}
