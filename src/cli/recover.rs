//! `pgtandem recover NODE`: asks the proxy to recover a node and shows its progress until it is a member.
//!
//! The recovery belongs to the proxy: it goes on when this command ends early, and the same command shows it again.

use std::io::{IsTerminal, Write};
use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use clap::Args;

use super::Explained;
use crate::config::Config;
use crate::observe::progress::RecoveryView;
use crate::proxy::control::SOCKET_NAME;
use crate::proxy::control::client::{ControlClient, ControlClientError};
use crate::proxy::control::message::{ControlAnswer, ControlFailure, ControlRequest, Outcome};
use crate::recovery::report::{CauseKind, Phase};

/// Of the bar on a terminal.
const BAR_CHARACTERS: usize = 20;
/// Where output is not a terminal: a line per phase, and at least one in this time while something moves.
const PLAIN_EVERY: Duration = Duration::from_secs(5);

#[derive(Debug, Args)]
pub struct Recover {
    /// Name of the node.
    node: String,
    /// Detach the node first if it is a member.
    #[arg(long)]
    yes: bool,
    /// Let pg_verifybackup and pg_waldump look at the files and the WAL before the node's first start.
    #[arg(long)]
    verify: bool,
    /// Keep the node's data directory as it was, beside it, as PGDATA.old-SECONDS: a lone PostgreSQL can be started on it. Takes up to the
    /// size of the data again; no more is sent than without.
    #[arg(long)]
    keep_old: bool,
    /// Print a line of JSON for every step of progress, and the result or the error as the last one.
    #[arg(long)]
    json: bool,
}

impl Recover {
    pub fn run(self, config: &Path) -> anyhow::Result<ExitCode> {
        let config = Config::load(config)?;
        super::runtime()?.block_on(async {
            tokio::select! {
                ended = self.follow(&config) => ended,
                _ = tokio::signal::ctrl_c() => {
                    let node = &self.node;
                    eprintln!("\nThe recovery goes on in the proxy.");
                    eprintln!("pgtandem recover {node} shows it again; pgtandem detach {node} ends it.");
                    Ok(ExitCode::FAILURE)
                }
            }
        })
    }

    async fn follow(&self, config: &Config) -> anyhow::Result<ExitCode> {
        let mut yes = self.yes;
        let mut client = ControlClient::connect(&config.proxy.state_dir.join(SOCKET_NAME))
            .await
            .map_err(|error| explained(&error))?;
        loop {
            let request =
                ControlRequest::Recover { node: self.node.clone(), yes, verify: self.verify, keep_old: self.keep_old };
            client.send(&request).await.map_err(|error| explained(&error))?;
            match self.until_last(&mut client).await? {
                Ok(view) => {
                    if !self.json {
                        print!("{}", view.summary());
                    }
                    if self.verify && !view.verified {
                        let node = &self.node;
                        eprintln!(
                            "note: the recovery of {node} was under way already, without --verify: its files were not looked at."
                        );
                    }
                    if self.keep_old && !view.keeps_old {
                        let node = &self.node;
                        eprintln!(
                            "note: the recovery of {node} was under way already, without --keep-old: nothing was kept."
                        );
                    }
                    return Ok(ExitCode::SUCCESS);
                }
                Err(failure) if failure.kind == CauseKind::NeedsConsent && !yes && self.asks() => {
                    yes = confirmed(&self.node)?;
                    if !yes {
                        println!("Nothing was done.");
                        return Ok(ExitCode::FAILURE);
                    }
                }
                // The JSON of it stands on standard output already.
                Err(_) if self.json => return Ok(ExitCode::FAILURE),
                Err(failure) => return Err(self.failed(failure).into()),
            }
        }
    }

    /// Shows progress until the last line.
    async fn until_last(&self, client: &mut ControlClient) -> anyhow::Result<Result<RecoveryView, ControlFailure>> {
        let mut screen = Screen::new(!self.json && std::io::stdout().is_terminal());
        loop {
            let answer = client.next().await.map_err(|error| explained(&error))?;
            let asks_again = matches!(&answer, ControlAnswer::Error { error } if error.kind == CauseKind::NeedsConsent)
                && self.asks();
            if self.json && !asks_again {
                println!("{}", serde_json::to_string(&answer)?);
            }
            match answer {
                ControlAnswer::Progress(view) if !self.json => screen.show(&view)?,
                ControlAnswer::Progress(_) => {}
                ControlAnswer::Error { error } => {
                    screen.end()?;
                    return Ok(Err(error));
                }
                ControlAnswer::Result { result: Outcome::Recover { recovery } } => {
                    screen.end()?;
                    return Ok(Ok(*recovery));
                }
                ControlAnswer::Result { .. } => anyhow::bail!("the proxy answered recover with something else"),
            }
        }
    }

    /// There is somebody who can be asked.
    fn asks(&self) -> bool {
        !self.json && std::io::stdin().is_terminal() && std::io::stdout().is_terminal()
    }

    fn failed(&self, failure: ControlFailure) -> Explained {
        let at = failure.phase.map_or_else(String::new, |phase| format!(" while {}", doing(phase)));
        let touched = failure.phase.is_some_and(|phase| phase > Phase::Preflight);
        let rest = if touched { "; the members serve as before" } else { "" };
        Explained { what: format!("{} was not recovered{at}: {}{rest}", self.node, failure.what), hint: failure.hint }
    }
}

fn doing(phase: Phase) -> &'static str {
    match phase {
        Phase::Preflight => "comparing both nodes",
        Phase::Seeding => "bringing its files",
        Phase::CatchingUp => "letting it catch up",
        Phase::Cut => "making the cut",
        Phase::LeavingRecovery => "letting it leave recovery",
        Phase::Draining => "applying the backlog",
        Phase::Joining | Phase::Member => "letting it join",
        Phase::Failed => "cleaning up",
    }
}

fn confirmed(node: &str) -> anyhow::Result<bool> {
    println!("{node} is a member and in use. It is detached first; until it is back, writes are on one node less.");
    ask("Go on?")
}

/// Asks a question whose plain answer is no.
pub(super) fn ask(question: &str) -> anyhow::Result<bool> {
    print!("{question} [y/N] ");
    std::io::stdout().flush()?;
    let mut answer = String::new();
    std::io::stdin().read_line(&mut answer)?;
    Ok(matches!(answer.trim().to_lowercase().as_str(), "y" | "yes"))
}

/// An error of the connection to the proxy, with its hint.
pub(super) fn explained(error: &ControlClientError) -> Explained {
    Explained { what: error.to_string(), hint: error.hint() }
}

/// One line that is written again and again on a terminal; plain lines elsewhere.
struct Screen {
    terminal: bool,
    shown: Option<(Phase, Instant)>,
    warnings: usize,
}

impl Screen {
    fn new(terminal: bool) -> Self {
        Self { terminal, shown: None, warnings: 0 }
    }

    fn show(&mut self, view: &RecoveryView) -> std::io::Result<()> {
        let mut out = std::io::stdout().lock();
        let clear = if self.terminal { "\r\x1b[K" } else { "" };
        for warning in view.warnings.iter().skip(self.warnings) {
            writeln!(out, "{clear}note: {warning}")?;
        }
        self.warnings = view.warnings.len();
        let bar = if self.terminal { view.bar(BAR_CHARACTERS) } else { String::new() };
        let line = format!("{bar}{}", view.line());
        let new_phase = self.shown.is_none_or(|(phase, _)| phase != view.phase);
        if self.terminal {
            // A phase that has ended keeps its last line.
            let keep = if new_phase && self.shown.is_some() { "\n" } else { "" };
            write!(out, "{keep}{clear}{line}")?;
            self.shown = Some((view.phase, Instant::now()));
        } else if new_phase || self.shown.is_some_and(|(_, at)| at.elapsed() >= PLAIN_EVERY) {
            writeln!(out, "{line}")?;
            self.shown = Some((view.phase, Instant::now()));
        }
        out.flush()
    }

    fn end(&mut self) -> std::io::Result<()> {
        if self.terminal && self.shown.take().is_some() {
            let mut out = std::io::stdout().lock();
            writeln!(out)?;
            out.flush()?;
        }
        Ok(())
    }
}
