//! Time, processor time and peak memory of programs and daemons, out of `/proc`.

use std::collections::HashMap;
use std::path::Path;
use std::process::{Command, ExitStatus};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};

/// Clock ticks of `/proc/PID/stat` in a second; the same on every Linux that PostgreSQL runs on.
const TICKS_PER_SECOND: f64 = 100.0;
/// How often memory of a program that runs is looked at; what is read is its peak, so only the last moments are lost.
const POLL: Duration = Duration::from_millis(10);

/// Processor seconds of a process: its own, and those of its children that have ended.
#[derive(Clone, Copy, Debug, Default)]
pub struct Cpu {
    pub own: f64,
    pub children: f64,
}

pub fn cpu(pid: u32) -> anyhow::Result<Cpu> {
    let path = format!("/proc/{pid}/stat");
    let text = std::fs::read_to_string(&path).context(path)?;
    // proc(5): fields 14 to 17, counted behind the name, which is in parentheses and may contain anything.
    let rest = text.rsplit_once(") ").map_or("", |(_, rest)| rest);
    let fields: Vec<f64> = rest
        .split(' ')
        .skip(11)
        .take(4)
        .filter_map(|field| field.parse().ok())
        .map(|ticks: f64| ticks / TICKS_PER_SECOND)
        .collect();
    let [user, system, children_user, children_system] = fields[..] else {
        bail!("/proc/{pid}/stat is not understood")
    };
    Ok(Cpu { own: user + system, children: children_user + children_system })
}

/// Lets the peak of a process begin anew.
pub fn forget_peak(pid: u32) -> anyhow::Result<()> {
    let path = format!("/proc/{pid}/clear_refs");
    std::fs::write(&path, "5").context(path)
}

/// Largest resident memory since [`forget_peak`], MiB; None: it does not run any more.
pub fn peak_mib(pid: u32) -> Option<f64> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    let kib: f64 = line.trim().trim_end_matches("kB").trim().parse().ok()?;
    Some(kib / 1024.0)
}

/// What a program took from its start to its end, with everything that it started.
pub struct Ran {
    pub seconds: f64,
    pub cpu_s: f64,
    pub peak_mib: f64,
    pub output: String,
}

/// Runs a program to its end; its output is the error's text when it fails.
pub fn run(mut command: Command, log: &Path) -> anyhow::Result<Ran> {
    let file = std::fs::File::create(log)?;
    command.stdout(file.try_clone()?).stderr(file).stdin(std::process::Stdio::null()).current_dir("/");
    let before = cpu(std::process::id())?;
    let started = Instant::now();
    let mut child = command.spawn().with_context(|| format!("{command:?}"))?;
    let mut peaks: HashMap<u32, f64> = HashMap::new();
    let status: ExitStatus = loop {
        for pid in with_descendants(child.id()) {
            if let Some(now) = peak_mib(pid) {
                peaks.insert(pid, now);
            }
        }
        if let Some(status) = child.try_wait()? {
            break status;
        }
        std::thread::park_timeout(POLL);
    };
    let seconds = started.elapsed().as_secs_f64();
    let cpu_s = cpu(std::process::id())?.children - before.children;
    let output = std::fs::read_to_string(log)?;
    if !status.success() {
        bail!("{command:?} failed ({status}): {output}");
    }
    Ok(Ran { seconds, cpu_s, peak_mib: peaks.values().sum(), output })
}

fn with_descendants(pid: u32) -> Vec<u32> {
    let mut found = vec![pid];
    let mut next = 0;
    while let Some(pid) = found.get(next).copied() {
        next += 1;
        let children = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap_or_default();
        found.extend(children.split_ascii_whitespace().filter_map(|child| child.parse::<u32>().ok()));
    }
    found
}
