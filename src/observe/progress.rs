//! The progress of a recovery as it is shown: one JSON object with stable field names, or one line of text.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::time::Duration;

use pgtandem_proto::message::Kept;
use serde::{Deserialize, Serialize};

use crate::recovery::report::{Failed, Phase, Report};

/// A longer rest is not told: it is a guess.
const SECONDS_LEFT_MAX: f64 = 1e7;

/// One moment of a recovery. Field names are stable; counters only grow within one recovery.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RecoveryView {
    pub node: String,
    pub phase: Phase,
    /// Files found on the source, and how many of them are done.
    pub files_total: u64,
    pub files: u64,
    pub bytes_total: u64,
    pub bytes_compared: u64,
    /// Of those compared: the same on both, so not sent.
    pub bytes_same: u64,
    pub bytes_sent: u64,
    pub wal_bytes_received: u64,
    /// WAL that the source has made since the backup began, and how much of it the node has replayed; once known.
    pub wal_bytes_made: u64,
    pub wal_bytes_replayed: u64,
    /// How fast it goes, over the last seconds: files compared and sent, WAL made on the source and replayed on the node.
    pub compared_bytes_per_s: u64,
    pub sent_bytes_per_s: u64,
    pub wal_made_bytes_per_s: u64,
    pub wal_replayed_bytes_per_s: u64,
    /// Of the phase, at this speed; None: not known, or never.
    pub seconds_left: Option<u64>,
    /// Pages of the source whose checksum is wrong; they were copied as they are.
    pub damaged_pages: u64,
    /// What `pg_verifybackup` has read, where that was asked for, and whether it found nothing wrong.
    pub bytes_verified: u64,
    pub verified: bool,
    /// While the files are brought slower than they could be: the limit, and how long a commit takes in the median, before the recovery and now.
    #[serde(default)]
    pub slowed_to_bytes_per_s: Option<u64>,
    #[serde(default)]
    pub commit_usual_ms: Option<f64>,
    #[serde(default)]
    pub commit_now_ms: Option<f64>,
    /// Whether what lay on the node is to be kept, how much that is, how much of it is copied, and where it is in the end.
    #[serde(default)]
    pub keeps_old: bool,
    #[serde(default)]
    pub bytes_to_keep: u64,
    #[serde(default)]
    pub bytes_kept: u64,
    #[serde(default)]
    pub kept: Option<Kept>,
    /// How far the node's replay is behind the source, bytes of WAL; while it is a standby.
    pub lag_bytes: Option<u64>,
    /// Where the cut was made, as PostgreSQL writes positions.
    pub cut_lsn: Option<String>,
    pub backlog_applied: u64,
    pub backlog_left: u64,
    pub backlog_peak: u64,
    pub cut_attempts: u32,
    pub join_attempts: u32,
    /// Why the cut or the join is not made yet.
    #[serde(default)]
    pub waits: Option<String>,
    /// How long the gate was closed: for that time commits waited, and nothing else.
    pub cut_gate_ms: Option<f64>,
    pub join_gate_ms: Option<f64>,
    /// When the gate began to close and when it was open again, microseconds since 1970 by the proxy's clock.
    pub cut_gate_closed_unix_us: Option<u64>,
    pub cut_gate_opened_unix_us: Option<u64>,
    pub join_gate_closed_unix_us: Option<u64>,
    pub join_gate_opened_unix_us: Option<u64>,
    /// Version of the member set that contains the node.
    pub version: Option<u64>,
    /// Time spent in each phase that has ended.
    pub phase_ms: BTreeMap<String, f64>,
    pub warnings: Vec<String>,
    /// Why it failed, if it did.
    pub failed: Option<Failed>,
}

impl RecoveryView {
    #[must_use]
    pub fn new(node: &str, report: &Report) -> Self {
        let progress = report.progress;
        let standby = matches!(report.phase, Phase::CatchingUp | Phase::Cut | Phase::LeavingRecovery);
        let phase_ms = report
            .phases
            .iter()
            .map(|(phase, spent)| (phase.name().replace(' ', "_"), spent.as_secs_f64() * 1000.0))
            .collect();
        Self {
            node: node.into(),
            phase: report.phase,
            files_total: progress.files_total,
            files: progress.files,
            bytes_total: progress.bytes_total,
            bytes_compared: progress.bytes_compared,
            bytes_same: progress.bytes_same,
            bytes_sent: progress.bytes_sent,
            wal_bytes_received: progress.wal_bytes_received,
            wal_bytes_made: progress.wal_source.saturating_sub(progress.wal_start),
            wal_bytes_replayed: progress.wal_replayed.saturating_sub(progress.wal_start),
            compared_bytes_per_s: whole(report.rates.compared),
            sent_bytes_per_s: whole(report.rates.sent),
            wal_made_bytes_per_s: whole(report.rates.wal_made),
            wal_replayed_bytes_per_s: whole(report.rates.wal_replayed),
            seconds_left: seconds_left(report),
            damaged_pages: progress.damaged_pages,
            bytes_verified: progress.bytes_verified,
            verified: report.verified,
            slowed_to_bytes_per_s: report.slowed.map(|slowed| slowed.bytes_per_s_max),
            commit_usual_ms: report.slowed.map(|slowed| slowed.usual.as_secs_f64() * 1000.0),
            commit_now_ms: report.slowed.map(|slowed| slowed.now.as_secs_f64() * 1000.0),
            keeps_old: report.keeps_old,
            bytes_to_keep: progress.bytes_to_keep,
            bytes_kept: progress.bytes_kept,
            kept: report.kept.clone(),
            lag_bytes: (standby && progress.wal_replayed > 0)
                .then(|| progress.wal_source.saturating_sub(progress.wal_replayed)),
            cut_lsn: report.x.map(|x| format!("{:X}/{:X}", x.0 >> 32, x.0 & 0xFFFF_FFFF)),
            backlog_applied: report.drained.applied,
            backlog_left: report.drained.left,
            backlog_peak: report.drained.peak,
            cut_attempts: report.cut_attempts,
            join_attempts: report.join_attempts,
            waits: report.waits.clone(),
            cut_gate_ms: report.cut_gate_ms,
            join_gate_ms: report.join_gate_ms,
            cut_gate_closed_unix_us: report.cut_gate_closed_unix_us,
            cut_gate_opened_unix_us: opened(report.cut_gate_closed_unix_us, report.cut_gate_ms),
            join_gate_closed_unix_us: report.join_gate_closed_unix_us,
            join_gate_opened_unix_us: opened(report.join_gate_closed_unix_us, report.join_gate_ms),
            version: report.version,
            phase_ms,
            warnings: report.warnings.clone(),
            failed: report.failed.clone(),
        }
    }

    /// One line for a person: where it is, and the counters that matter there.
    #[must_use]
    pub fn line(&self) -> String {
        let mut line = format!("{}: {}", self.node, self.phase.name());
        match self.phase {
            Phase::Seeding if self.bytes_total == 0 && self.bytes_to_keep > 0 => {
                let (kept, old) = (bytes(self.bytes_kept), bytes(self.bytes_to_keep));
                let _ = write!(line, "  {kept} of {old} of the old files kept");
            }
            Phase::Seeding => {
                let percent = self.bytes_compared.saturating_mul(100).checked_div(self.bytes_total).unwrap_or(0);
                let _ = write!(
                    line,
                    "  {} of {} compared ({}%), {} sent",
                    bytes(self.bytes_compared),
                    bytes(self.bytes_total),
                    percent.min(100),
                    bytes(self.bytes_sent)
                );
                if self.bytes_verified > 0 {
                    let _ = write!(line, ", {} verified", bytes(self.bytes_verified));
                } else if self.compared_bytes_per_s > 0 {
                    let _ = write!(line, ", {}/s", bytes(self.compared_bytes_per_s));
                }
                if let (Some(limit), Some(usual), Some(now)) =
                    (self.slowed_to_bytes_per_s, self.commit_usual_ms, self.commit_now_ms)
                {
                    let limit = bytes(limit);
                    let _ = write!(line, ", held to {limit}/s: a commit takes {now:.1} ms instead of {usual:.1} ms");
                }
            }
            Phase::CatchingUp => {
                if let Some(lag) = self.lag_bytes {
                    let _ = write!(line, "  {} of WAL behind", bytes(lag));
                    if self.wal_replayed_bytes_per_s > 0 {
                        let (replayed, made) = (self.wal_replayed_bytes_per_s, self.wal_made_bytes_per_s);
                        let _ = write!(line, ", {}/s replayed, {}/s made", bytes(replayed), bytes(made));
                    }
                }
            }
            Phase::Cut if self.cut_attempts > 1 => {
                let _ = write!(line, "  attempt {}", self.cut_attempts);
            }
            Phase::LeavingRecovery => {
                if let (Some(gate_ms), Some(x)) = (self.cut_gate_ms, &self.cut_lsn) {
                    let _ = write!(line, "  cut at {x}, gate closed for {gate_ms:.1} ms");
                }
            }
            Phase::Draining => {
                let _ = write!(line, "  {} transactions applied, {} left", self.backlog_applied, self.backlog_left);
            }
            Phase::Joining if self.join_attempts > 1 => {
                let _ = write!(line, "  attempt {}", self.join_attempts);
            }
            _ => {}
        }
        if let Some(waits) = &self.waits {
            let _ = write!(line, "  ({waits})");
        }
        if let Some(seconds) = self.seconds_left {
            let (minutes, rest) = (seconds / 60, seconds % 60);
            let _ = match minutes {
                0 => write!(line, ", about {rest} s left"),
                _ => write!(line, ", about {minutes} min {rest} s left"),
            };
        }
        line
    }

    /// The part of the files that was compared, as a bar of so many characters; nothing in other phases.
    #[must_use]
    pub fn bar(&self, characters: usize) -> String {
        if self.phase != Phase::Seeding || self.bytes_total == 0 {
            return String::new();
        }
        let part = self.bytes_compared.min(self.bytes_total) as f64 / self.bytes_total as f64;
        let done = usize::try_from(whole(part * characters as f64)).unwrap_or(0).min(characters);
        format!("[{}{}] ", "#".repeat(done), ".".repeat(characters - done))
    }

    /// The last word on a recovery that succeeded, several lines.
    #[must_use]
    pub fn summary(&self) -> String {
        let total_ms: f64 = self.phase_ms.values().sum();
        let mut text = format!("{} is a member again after {:.1} s.\n", self.node, total_ms / 1000.0);
        let _ = writeln!(
            text,
            "  files      {} compared, {} the same, {} sent; {} of WAL",
            bytes(self.bytes_compared),
            bytes(self.bytes_same),
            bytes(self.bytes_sent),
            bytes(self.wal_bytes_received)
        );
        if self.verified {
            text.push_str("  verified   pg_verifybackup and pg_waldump found nothing wrong before the first start\n");
        }
        if let Some(Kept { path, bytes: size, shared, .. }) = &self.kept {
            let shared = if *shared { ", which share their blocks with the new files where both agree" } else { "" };
            let _ = writeln!(
                text,
                "  kept       the old files, {}{shared}; to remove them there: rm -r {path}",
                bytes(*size)
            );
        }
        if self.damaged_pages > 0 {
            let _ = writeln!(
                text,
                "  DAMAGED    {} pages of the leader have wrong checksums, and so have those of the node; agent.log names them",
                self.damaged_pages
            );
        }
        let _ = writeln!(
            text,
            "  backlog    {} transactions applied, at most {} waiting",
            self.backlog_applied, self.backlog_peak
        );
        let _ = writeln!(
            text,
            "  pauses     commits waited {} at the cut and {} at the join; reads did not wait",
            milliseconds(self.cut_gate_ms),
            milliseconds(self.join_gate_ms)
        );
        text
    }
}

/// A rate without its fraction.
#[allow(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "a rate is not negative, and as casts saturates"
)]
fn whole(rate: f64) -> u64 {
    rate as u64
}

/// What is left of the phase, at the speed of the last seconds.
fn seconds_left(report: &Report) -> Option<u64> {
    let progress = report.progress;
    let (left, per_s) = match report.phase {
        Phase::Seeding => (progress.bytes_total.saturating_sub(progress.bytes_compared), report.rates.compared),
        Phase::CatchingUp if progress.wal_replayed > 0 => (
            progress.wal_source.saturating_sub(progress.wal_replayed),
            report.rates.wal_replayed - report.rates.wal_made,
        ),
        _ => return None,
    };
    let seconds = left as f64 / per_s;
    (left > 0 && per_s >= 1.0 && seconds < SECONDS_LEFT_MAX).then(|| whole(seconds.ceil()))
}

/// When a gate that closed at `closed_unix_us` and stayed closed for `gate_ms` was open again.
fn opened(closed_unix_us: Option<u64>, gate_ms: Option<f64>) -> Option<u64> {
    let gate = Duration::try_from_secs_f64(gate_ms? / 1000.0).ok()?;
    closed_unix_us?.checked_add(u64::try_from(gate.as_micros()).ok()?)
}

fn milliseconds(ms: Option<f64>) -> String {
    ms.map_or_else(|| "an unknown time".into(), |ms| format!("{ms:.1} ms"))
}

/// Bytes for people: three digits and a binary unit.
#[must_use]
pub fn bytes(count: u64) -> String {
    const UNITS: [&str; 6] = ["B", "KiB", "MiB", "GiB", "TiB", "PiB"];
    let mut scaled = count;
    let mut tenths = 0;
    let mut unit = "B";
    for name in UNITS.iter().skip(1) {
        if scaled < 1024 {
            break;
        }
        tenths = (scaled % 1024) * 10 / 1024;
        scaled /= 1024;
        unit = name;
    }
    if unit == "B" || scaled >= 100 { format!("{scaled} {unit}") } else { format!("{scaled}.{tenths} {unit}") }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::recovery::throttle::Slowed;

    #[test]
    fn bytes_are_readable() {
        assert_eq!(bytes(0), "0 B");
        assert_eq!(bytes(1023), "1023 B");
        assert_eq!(bytes(1536), "1.5 KiB");
        assert_eq!(bytes(250 << 20), "250 MiB");
        assert_eq!(bytes(u64::MAX), "16383 PiB");
    }

    #[test]
    fn a_line_says_what_matters_in_its_phase() {
        let mut report = Report::new();
        report.progress.bytes_total = 4 << 30;
        report.progress.bytes_compared = 1 << 30;
        report.phase = Phase::Seeding;
        let line = RecoveryView::new("b", &report).line();
        assert_eq!(line, "b: seeding  1.0 GiB of 4.0 GiB compared (25%), 0 B sent");
        assert_eq!(RecoveryView::new("b", &report).bar(8), "[##......] ");
        (report.progress.bytes_total, report.progress.bytes_to_keep, report.progress.bytes_kept) =
            (0, 4 << 30, 3 << 30);
        let line = RecoveryView::new("b", &report).line();
        assert_eq!(line, "b: seeding  3.0 GiB of 4.0 GiB of the old files kept");
        report.progress.bytes_total = 4 << 30;
        report.rates.compared = f64::from(1 << 24);
        let line = RecoveryView::new("b", &report).line();
        assert!(line.ends_with("0 B sent, 16.0 MiB/s, about 3 min 12 s left"), "{line}");
        report.slowed = Some(Slowed {
            bytes_per_s_max: 8 << 20,
            usual: Duration::from_millis(2),
            now: Duration::from_micros(9500),
        });
        let line = RecoveryView::new("b", &report).line();
        assert!(line.contains(", held to 8.0 MiB/s: a commit takes 9.5 ms instead of 2.0 ms"), "{line}");
        report.phase = Phase::CatchingUp;
        (report.progress.wal_source, report.progress.wal_replayed) = (101 << 20, 1 << 20);
        (report.rates.wal_replayed, report.rates.wal_made) = (f64::from(30 << 20), f64::from(10 << 20));
        let line = RecoveryView::new("b", &report).line();
        assert!(
            line.ends_with("100 MiB of WAL behind, 30.0 MiB/s replayed, 10.0 MiB/s made, about 5 s left"),
            "{line}"
        );
        (report.rates.wal_replayed, report.rates.wal_made) = (f64::from(10 << 20), f64::from(30 << 20));
        let line = RecoveryView::new("b", &report).line();
        assert!(line.ends_with("30.0 MiB/s made"), "it never comes: {line}");
        report.phase = Phase::Draining;
        report.drained.left = 7;
        assert!(RecoveryView::new("b", &report).line().ends_with("0 transactions applied, 7 left"));
        (report.phase, report.waits) = (Phase::Joining, Some("it waits until c is let in".into()));
        assert_eq!(RecoveryView::new("b", &report).line(), "b: joining  (it waits until c is let in)");
    }

    #[test]
    fn field_names_are_stable() {
        let value = serde_json::to_value(RecoveryView::new("b", &Report::new())).unwrap();
        let gate = ["cut_gate_closed_unix_us", "cut_gate_opened_unix_us", "join_gate_closed_unix_us"];
        for name in gate.into_iter().chain([
            "phase",
            "bytes_compared",
            "bytes_sent",
            "backlog_peak",
            "cut_gate_ms",
            "join_gate_ms",
        ]) {
            assert!(value.get(name).is_some(), "{name} is gone");
        }
        assert_eq!(value["phase"], "preflight");
    }

    #[test]
    fn the_gate_opens_as_long_after_it_closed_as_it_was_closed() {
        let mut report = Report::new();
        report.cut_gate_closed_unix_us = Some(1_000_000);
        assert_eq!(RecoveryView::new("b", &report).cut_gate_opened_unix_us, None);
        report.cut_gate_ms = Some(2.5);
        assert_eq!(RecoveryView::new("b", &report).cut_gate_opened_unix_us, Some(1_002_500));
    }
}
