//! What follows from the runs: a table for people, and the same with stable names.

use std::fmt::Write as _;

use serde::Serialize;

use crate::Before;
use crate::common::profile;

/// One measurement.
#[derive(Clone, Copy, Debug)]
pub struct Run {
    pub seconds: f64,
    /// What went over the connection; None: the program does not say.
    pub bytes: Option<u64>,
    pub cpu_s: f64,
    pub peak_mib: f64,
}

/// Everything; field names are stable.
#[derive(Debug, Serialize)]
pub struct Figures {
    pub bench: &'static str,
    pub profile: &'static str,
    pub scale: u32,
    /// Bytes of the leader's files without WAL, and how many pages of tables and indexes are among them.
    pub data_bytes: u64,
    pub pages: u64,
    pub rows: Vec<Row>,
    /// One sentence each; none: every filled node was what it was filled from.
    pub problems: Vec<String>,
}

#[derive(Debug, Serialize)]
pub struct Row {
    pub before: String,
    pub program: &'static str,
    /// Of the median run.
    pub seconds: f64,
    pub bytes: Option<u64>,
    /// What had to be sent at least; None: nothing.
    pub bytes_that_differ: Option<u64>,
    /// Processor time of all processes that took part.
    pub cpu_s: f64,
    /// Peak memory; of pgtandem the larger one of both agents, of others all their processes together.
    pub peak_mib: f64,
    pub rounds: usize,
}

impl Figures {
    pub fn new(scale: u32, data_bytes: u64, pages: u64) -> Self {
        Self { bench: "seeding", profile: profile(), scale, data_bytes, pages, rows: Vec::new(), problems: Vec::new() }
    }

    /// Adds the median of `runs`, of which there is at least one.
    pub fn add(&mut self, before: Before, program: &'static str, differ: u64, mut runs: Vec<Run>) -> &Row {
        runs.sort_by(|one, other| one.seconds.total_cmp(&other.seconds));
        let run = runs[(runs.len() - 1) / 2];
        self.rows.push(Row {
            before: before.text(),
            program,
            seconds: run.seconds,
            bytes: run.bytes,
            bytes_that_differ: (differ > 0).then_some(differ),
            cpu_s: run.cpu_s,
            peak_mib: run.peak_mib,
            rounds: runs.len(),
        });
        self.rows.last().expect("just added")
    }

    pub fn table(&self) -> String {
        let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
        let mut text = format!(
            "{:.0} MiB of files, {} pages of tables and indexes ({} build)\n\n{:<15} {:<18} {:>8} {:>12} {:>10} {:>8} {:>10}\n",
            mib(self.data_bytes),
            self.pages,
            self.profile,
            "the node was",
            "program",
            "seconds",
            "MiB sent",
            "of differ",
            "CPU s",
            "peak MiB"
        );
        for row in &self.rows {
            let bytes = row.bytes.map_or("-".to_owned(), |bytes| format!("{:.1}", mib(bytes)));
            let ratio = match (row.bytes, row.bytes_that_differ) {
                (Some(bytes), Some(differ)) => format!("{:.2}", bytes as f64 / differ as f64),
                _ => "-".to_owned(),
            };
            let _ = writeln!(
                text,
                "{:<15} {:<18} {:>8.2} {:>12} {:>10} {:>8.2} {:>10.0}",
                row.before, row.program, row.seconds, bytes, ratio, row.cpu_s, row.peak_mib
            );
        }
        if self.problems.is_empty() {
            text.push_str("\nEvery filled node was compared with the leader, page by page: the same.");
        }
        for problem in &self.problems {
            let _ = write!(text, "\nPROBLEM: {problem}");
        }
        text
    }
}
