//! Lets PostgreSQL's own programs look at a filled directory before its first start: `pg_verifybackup` at the files, `pg_waldump`
//! at the WAL. What they have read is the progress; what they say against it is the error.

use std::io;
use std::path::Path;
use std::pin::pin;
use std::process::Stdio;
use std::time::Duration;

use pgtandem_proto::message::Lsn;
use tokio::io::{AsyncBufReadExt, AsyncRead, BufReader};
use tokio::process::Command;

use super::super::error::SyncError;
use super::super::wal::format_lsn;
use super::journal::Journal;
use super::{Target, blocking, manifest};

/// Pause between two looks at how much was read, milliseconds.
const POLL_MS: u64 = 500;
/// Lines of a complaint that are told, and characters of each: a damaged directory has one for each file.
const LINES_MAX: usize = 5;
const LINE_CHARACTERS_MAX: usize = 300;

impl Target {
    /// After [`Target::fill`], before [`Target::catch_up`]: an error if those programs find anything.
    pub async fn verify(&self) -> Result<(), SyncError> {
        let node = self.postgres.node().clone();
        let (pgdata, state_dir) = (node.pgdata.clone(), node.state_dir.clone());
        let journal = blocking("looking at the data directory", move || {
            let found = Journal::load(&state_dir).filter(|_| pgdata.join(manifest::MANIFEST).exists());
            let again = "Start the recovery from its beginning: only what differs is sent.";
            found.ok_or_else(|| SyncError::refused("no finished fill of this node is known", again))
        })
        .await?;
        // The WAL apart, so that both are seen to get on.
        let mut files = Command::new(node.bin_dir.join("pg_verifybackup"));
        files.arg("--no-parse-wal").arg(&node.pgdata);
        let read = self.look("pg_verifybackup", files, 0).await?;
        // Its last bytes were read after the last look.
        self.progress
            .send_modify(|progress| progress.bytes_verified = progress.bytes_verified.max(progress.bytes_total));
        let mut wal = Command::new(node.bin_dir.join("pg_waldump"));
        wal.arg("--quiet").arg("--path").arg(node.pgdata.join("pg_wal"));
        wal.arg(format!("--timeline={}", journal.timeline));
        let (start, stop) = (format_lsn(Lsn(journal.start)), format_lsn(Lsn(journal.stop)));
        wal.args([format!("--start={start}"), format!("--end={stop}")]);
        self.look("pg_waldump", wal, read).await?;
        tracing::info!("pg_verifybackup and pg_waldump find nothing wrong with the files and the WAL of the fill");
        Ok(())
    }

    /// Runs one of them. -> what was read, `before` included
    async fn look(&self, name: &'static str, mut command: Command, before: u64) -> Result<u64, SyncError> {
        let program = Path::new(command.as_std().get_program()).to_path_buf();
        command.env("LC_ALL", "C").stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped()).kill_on_drop(true);
        let mut child = command.spawn().map_err(|error| SyncError::file("starting", &program, error))?;
        let (pid, stderr) = (child.id(), child.stderr.take());
        let complaint = async {
            match stderr {
                Some(stderr) => first_lines(stderr).await,
                None => Ok(Vec::new()),
            }
        };
        let mut ended = pin!(async { tokio::try_join!(complaint, child.wait()) });
        let mut read = before;
        let (said, status) = loop {
            tokio::select! {
                ended = &mut ended => break ended.map_err(|error| SyncError::file("waiting for", &program, error))?,
                () = tokio::time::sleep(Duration::from_millis(POLL_MS)) => {
                    if let Some(bytes) = pid.and_then(bytes_read) {
                        read = before + bytes;
                        self.progress.send_modify(|progress| progress.bytes_verified = read.max(progress.bytes_verified));
                    }
                }
            }
        };
        if status.success() {
            return Ok(read);
        }
        let why = if said.is_empty() { status.to_string() } else { said.join("; ") };
        Err(SyncError::refused(
            format!("{name} says of the files that were just brought: {why}"),
            "Start the recovery again: what differs is sent again. If it says so once more, suspect the disk or the memory of this node.",
        ))
    }
}

/// Bytes that a process has read; `None`: it is gone, or that is not told here.
fn bytes_read(pid: u32) -> Option<u64> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/io")).ok()?;
    text.lines().find_map(|line| line.strip_prefix("rchar: "))?.trim().parse().ok()
}

/// The first lines, and how many more came; everything is read, so that whoever writes it does not wait.
async fn first_lines(from: impl AsyncRead + Unpin) -> io::Result<Vec<String>> {
    let mut reader = BufReader::new(from);
    let (mut lines, mut more, mut line) = (Vec::new(), 0_u64, Vec::new());
    loop {
        line.clear();
        if reader.read_until(b'\n', &mut line).await? == 0 {
            break;
        }
        let text: String = String::from_utf8_lossy(&line).trim().chars().take(LINE_CHARACTERS_MAX).collect();
        match text {
            text if text.is_empty() => {}
            text if lines.len() < LINES_MAX => lines.push(text),
            _ => more += 1,
        }
    }
    if more > 0 {
        lines.push(format!("{more} more"));
    }
    Ok(lines)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_long_complaint_is_cut() {
        let text = "one\n\ntwo\n3\n4\n5\n6\n7";
        assert_eq!(first_lines(text.as_bytes()).await.unwrap(), ["one", "two", "3", "4", "5", "2 more"]);
        assert!(bytes_read(std::process::id()).is_some_and(|bytes| bytes > 0));
    }
}
