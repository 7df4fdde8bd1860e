//! What follows from what the clients saw and when the gate was closed. Pure.

use std::time::Duration;

use anyhow::Context as _;
use pgtandem::sandbox::probe::Seen;
use serde::Serialize;

use crate::common::{median_and_max, profile};
use crate::{Options, Recovered};

/// What a window holds besides the time that the gate was closed, on each side.
const MARGIN: Duration = Duration::from_millis(100);
/// Errors that are told.
const ERRORS_SHOWN: usize = 5;

/// A piece of the load's time.
#[derive(Clone, Copy, Debug)]
pub struct Span {
    pub from: Duration,
    pub to: Duration,
}

/// Everything; field names are stable.
#[derive(Debug, Serialize)]
pub struct Figures {
    pub bench: &'static str,
    pub profile: &'static str,
    pub load: &'static str,
    pub scale: u32,
    pub writers: usize,
    pub readers: usize,
    /// What node1 is made to take to leave recovery, on top of what it takes.
    pub leave_recovery_s: u32,
    pub recoveries: Vec<Recovery>,
    /// Median and worst over the recoveries of what has the same name there.
    pub write_pause_median_ms: f64,
    pub write_pause_max_ms: f64,
    pub read_pause_median_ms: f64,
    pub read_pause_max_ms: f64,
    pub cut_gate_median_ms: f64,
    pub cut_gate_max_ms: f64,
    pub join_gate_median_ms: f64,
    pub join_gate_max_ms: f64,
    pub copy_write_gap_median_ms: f64,
    pub copy_write_gap_max_ms: f64,
    pub copy_write_p99_median_ms: f64,
    pub copy_write_p99_max_ms: f64,
    pub recovery_median_s: f64,
    pub recovery_max_s: f64,
    /// While no recovery ran.
    pub steady_write_p99_ms: f64,
    pub steady_write_gap_max_ms: f64,
    pub steady_read_gap_max_ms: f64,
    pub steady_writes_per_s: f64,
    pub steady_reads_per_s: f64,
    pub writes: u64,
    pub reads: u64,
    pub duration_s: f64,
    pub client_errors: u64,
    pub disconnects: u64,
    /// Transactions that were left open across a recovery; each must have committed.
    pub open_transactions: u32,
    /// One sentence each; none: everything held.
    pub problems: Vec<String>,
}

/// One recovery. A `gap` is the longest time without an acknowledged write (an answered read) in the window, `usual`
/// is the median of that over windows of the same length without a recovery, a `pause` is what is left of it.
#[derive(Debug, Serialize)]
pub struct Recovery {
    pub write_pause_ms: f64,
    pub read_pause_ms: f64,
    pub cut: Cutover,
    pub join: Cutover,
    /// From the command to the cut: files are compared and brought, the node replays.
    pub copy_write_gap_ms: f64,
    pub copy_write_p99_ms: f64,
    pub recovery_s: f64,
    /// Largest number of transactions that waited in the backlog at once.
    pub backlog_peak: u64,
}

#[derive(Debug, Serialize)]
pub struct Cutover {
    /// 1 when all went well.
    pub attempts: u32,
    pub gate_ms: f64,
    pub write_gap_ms: f64,
    /// When that began, after the gate began to close; negative: before that.
    pub write_gap_from_ms: f64,
    pub write_usual_gap_ms: f64,
    pub write_pause_ms: f64,
    pub read_gap_ms: f64,
    pub read_usual_gap_ms: f64,
    pub read_pause_ms: f64,
}

impl Cutover {
    fn new(seen: &Seen, steady: &[Span], gate: Span, attempts: u32) -> Self {
        let window = Span { from: gate.from.saturating_sub(MARGIN), to: gate.to + MARGIN };
        let length = window.to.saturating_sub(window.from);
        let usual = |gaps: &dyn Fn(&Span) -> Vec<Duration>| {
            let mut gaps: Vec<Duration> = steady.iter().flat_map(gaps).collect();
            gaps.sort_unstable();
            ms(quantile(&gaps, 0.5))
        };
        let write_gap = seen.write_gap(window.from, window.to);
        let write_gap_ms = ms(write_gap.length);
        let read_gap_ms = ms(seen.read_gap(window.from, window.to).length);
        let write_usual_gap_ms = usual(&|span| seen.write_gaps(span.from, span.to, length));
        let read_usual_gap_ms = usual(&|span| seen.read_gaps(span.from, span.to, length));
        Self {
            attempts,
            gate_ms: ms(gate.to.saturating_sub(gate.from)),
            write_gap_ms,
            write_gap_from_ms: (write_gap.from.as_secs_f64() - gate.from.as_secs_f64()) * 1000.0,
            write_usual_gap_ms,
            write_pause_ms: (write_gap_ms - write_usual_gap_ms).max(0.0),
            read_gap_ms,
            read_usual_gap_ms,
            read_pause_ms: (read_gap_ms - read_usual_gap_ms).max(0.0),
        }
    }
}

impl Recovery {
    fn new(seen: &Seen, steady: &[Span], Recovered { span, view }: &Recovered, origin_us: u64) -> anyhow::Result<Self> {
        let gate = |closed_us: Option<u64>, opened_us: Option<u64>| {
            let at = |us: Option<u64>| us.map(|us| Duration::from_micros(us.saturating_sub(origin_us)));
            at(closed_us)
                .zip(at(opened_us))
                .map(|(from, to)| Span { from, to })
                .context("no time of the gate is reported")
        };
        let cut_gate = gate(view.cut_gate_closed_unix_us, view.cut_gate_opened_unix_us)?;
        let join_gate = gate(view.join_gate_closed_unix_us, view.join_gate_opened_unix_us)?;
        let cut = Cutover::new(seen, steady, cut_gate, view.cut_attempts);
        let join = Cutover::new(seen, steady, join_gate, view.join_attempts);
        Ok(Self {
            write_pause_ms: cut.write_pause_ms.max(join.write_pause_ms),
            read_pause_ms: cut.read_pause_ms.max(join.read_pause_ms),
            cut,
            join,
            copy_write_gap_ms: ms(seen.write_gap(span.from, cut_gate.from).length),
            copy_write_p99_ms: ms(quantile(&seen.write_times(span.from, cut_gate.from), 0.99)),
            recovery_s: span.to.saturating_sub(span.from).as_secs_f64(),
            backlog_peak: view.backlog_peak,
        })
    }
}

impl Figures {
    pub fn new(
        options: &Options,
        seen: &Seen,
        steady: &[Span],
        recovered: &[Recovered],
        origin_unix_us: u64,
        mut problems: Vec<String>,
    ) -> anyhow::Result<Self> {
        let recoveries = recovered.iter().map(|one| Recovery::new(seen, steady, one, origin_unix_us));
        let recoveries: Vec<Recovery> = recoveries.collect::<anyhow::Result<_>>()?;
        let of = |value: fn(&Recovery) -> f64| median_and_max(recoveries.iter().map(value));
        let (write_pause_median_ms, write_pause_max_ms) = of(|one| one.write_pause_ms);
        let (read_pause_median_ms, read_pause_max_ms) = of(|one| one.read_pause_ms);
        let (cut_gate_median_ms, cut_gate_max_ms) = of(|one| one.cut.gate_ms);
        let (join_gate_median_ms, join_gate_max_ms) = of(|one| one.join.gate_ms);
        let (copy_write_gap_median_ms, copy_write_gap_max_ms) = of(|one| one.copy_write_gap_ms);
        let (copy_write_p99_median_ms, copy_write_p99_max_ms) = of(|one| one.copy_write_p99_ms);
        let (recovery_median_s, recovery_max_s) = of(|one| one.recovery_s);
        let mut times: Vec<Duration> = steady.iter().flat_map(|span| seen.write_times(span.from, span.to)).collect();
        times.sort_unstable();
        let steady_s: f64 = steady.iter().map(|span| span.to.saturating_sub(span.from).as_secs_f64()).sum();
        let longest = |gap: &dyn Fn(&Span) -> Duration| ms(steady.iter().map(gap).max().unwrap_or_default());
        let count = |counts: &dyn Fn(&Span) -> usize| steady.iter().map(counts).sum::<usize>() as f64 / steady_s;
        if seen.errors() > 0 || seen.disconnects() > 0 {
            let (errors, disconnects) = (seen.errors(), seen.disconnects());
            problems.push(format!("clients saw {errors} errors and lost {disconnects} connections"));
        }
        let texts = seen.first_errors(ERRORS_SHOWN).into_iter();
        problems.extend(texts.map(|(at, text)| format!("after {:.2} s: {text}", at.as_secs_f64())));
        Ok(Self {
            bench: "cutover",
            profile: profile(),
            load: options.load.name(),
            scale: options.common.scale,
            writers: options.writers(),
            readers: usize::from(options.readers),
            leave_recovery_s: options.leave_recovery_s,
            write_pause_median_ms,
            write_pause_max_ms,
            read_pause_median_ms,
            read_pause_max_ms,
            cut_gate_median_ms,
            cut_gate_max_ms,
            join_gate_median_ms,
            join_gate_max_ms,
            copy_write_gap_median_ms,
            copy_write_gap_max_ms,
            copy_write_p99_median_ms,
            copy_write_p99_max_ms,
            recovery_median_s,
            recovery_max_s,
            steady_write_p99_ms: ms(quantile(&times, 0.99)),
            steady_write_gap_max_ms: longest(&|span| seen.write_gap(span.from, span.to).length),
            steady_read_gap_max_ms: longest(&|span| seen.read_gap(span.from, span.to).length),
            steady_writes_per_s: count(&|span| seen.writes_in(span.from, span.to)),
            steady_reads_per_s: count(&|span| seen.reads_in(span.from, span.to)),
            writes: seen.writes(),
            reads: seen.reads(),
            duration_s: seen.duration.as_secs_f64(),
            client_errors: seen.errors(),
            disconnects: seen.disconnects(),
            open_transactions: options.recoveries,
            recoveries,
            problems,
        })
    }

    /// For people.
    pub fn table(&self) -> String {
        let of = |value: fn(&Recovery) -> f64| median_and_max(self.recoveries.iter().map(value));
        let mut lines = vec![
            format!(
                "{} recoveries under {} writers and {} readers ({}, scale {}, {} build), {:.0} s",
                self.recoveries.len(),
                self.writers,
                self.readers,
                self.load,
                self.scale,
                self.profile,
                self.duration_s
            ),
            String::new(),
            format!("  {:<52} {:>10} {:>10}", "milliseconds", "median", "worst"),
        ];
        let rows: [(&str, Value); 17] = [
            ("pause of writes", |one| one.write_pause_ms),
            ("  at the cut", |one| one.cut.write_pause_ms),
            ("    longest time without a write", |one| one.cut.write_gap_ms),
            ("      it began after the gate began to close", |one| one.cut.write_gap_from_ms),
            ("    usual on this machine in so long a window", |one| one.cut.write_usual_gap_ms),
            ("    gate closed", |one| one.cut.gate_ms),
            ("  at the join", |one| one.join.write_pause_ms),
            ("    longest time without a write", |one| one.join.write_gap_ms),
            ("      it began after the gate began to close", |one| one.join.write_gap_from_ms),
            ("    usual on this machine in so long a window", |one| one.join.write_usual_gap_ms),
            ("    gate closed", |one| one.join.gate_ms),
            ("pause of reads", |one| one.read_pause_ms),
            ("while files are brought: longest time without a write", |one| one.copy_write_gap_ms),
            ("while files are brought: a write takes, p99", |one| one.copy_write_p99_ms),
            ("recovery, from the command to member", |one| one.recovery_s * 1000.0),
            ("largest backlog, transactions", |one| one.backlog_peak as f64),
            ("attempts to close the gate, cut and join (2: none failed)", |one| {
                f64::from(one.cut.attempts + one.join.attempts)
            }),
        ];
        for (what, value) in rows {
            let (median, max) = of(value);
            lines.push(format!("  {what:<57} {median:>7.1} {max:>10.1}"));
        }
        lines.push(String::new());
        lines.extend([
            format!("  without a recovery: {:.0} writes/s, {:.0} reads/s", self.steady_writes_per_s, self.steady_reads_per_s),
            format!(
                "  without a recovery: a write takes {:.1} ms (p99); longest time without one {:.1} ms, without a read {:.1} ms",
                self.steady_write_p99_ms, self.steady_write_gap_max_ms, self.steady_read_gap_max_ms
            ),
            format!(
                "  writes {}, reads {}, errors {}, connections lost {}, transactions open across a recovery {}",
                self.writes, self.reads, self.client_errors, self.disconnects, self.open_transactions
            ),
        ]);
        lines.extend(self.problems.iter().map(|problem| format!("  problem: {problem}")));
        lines.join("\n")
    }
}

/// The value below which this part (0 to 1) of the `sorted` values lies; 0 if there is none.
fn quantile(sorted: &[Duration], part: f64) -> Duration {
    #[allow(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "an index of a slice, from 0 to 1 of it"
    )]
    let index = (sorted.len().saturating_sub(1) as f64 * part).round() as usize;
    sorted.get(index).copied().unwrap_or_default()
}

/// What one recovery gives for a line of the table.
type Value = fn(&Recovery) -> f64;

fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1000.0
}
