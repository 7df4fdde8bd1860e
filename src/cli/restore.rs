//! `pgtandem restore`: a server of an earlier moment, in a directory of its own. Needs no daemon.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use clap::Args;
use serde::Serialize;

use super::Explained;
use super::archive::places;
use crate::agent::postgres::{Postgres, describe};
use crate::archive::moment;
use crate::archive::restore::{self, Chosen, Options};
use crate::archive::settings::Target;
use crate::config::Config;
use crate::sync::wal::parse_lsn;

/// Port of a restored server if nobody says one: part of its socket's name only.
const PORT: u16 = 5499;
/// How long the living server may take to end its present segment.
const NUDGE_MAX: Duration = Duration::from_secs(5);

#[derive(Debug, Args)]
#[command(group = clap::ArgGroup::new("target").required(true))]
pub struct Restore {
    /// Everything that was committed by this moment, and nothing later: "2026-11-27 14:15:00+01". It has to say its time zone.
    #[arg(long, value_name = "T", group = "target")]
    target_time: Option<String>,
    /// Everything before this position in the WAL of one node, which --node names.
    #[arg(long, value_name = "LSN", group = "target", requires = "node")]
    target_lsn: Option<String>,
    /// As far as there is WAL.
    #[arg(long, group = "target")]
    latest: bool,
    /// The new data directory: not there yet, or empty.
    #[arg(long, value_name = "DIR")]
    to: PathBuf,
    /// From the archive of this node; without it from a leader's, if there is one.
    #[arg(long)]
    node: Option<String>,
    /// Stay read-only at the target until a person says pg_wal_replay_resume().
    #[arg(long)]
    pause: bool,
    /// Port of the restored server. It listens on a socket only.
    #[arg(long, default_value_t = PORT)]
    port: u16,
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
}

/// Field names are stable.
#[derive(Debug, Serialize)]
struct Report<'a> {
    node: &'a str,
    stream: String,
    base_copy: String,
    data_directory: &'a Path,
    tablespaces: Option<&'a Path>,
    socket_dir: &'a Path,
    port: u16,
    files: usize,
    bytes: u64,
    start: String,
}

impl Restore {
    pub fn run(self, config: &Path) -> anyhow::Result<ExitCode> {
        let config = Config::load(config)?;
        let target = self.target()?;
        if crate::sandbox::user::is_root() {
            let what = "root can not own a PostgreSQL server".to_owned();
            let hint = "run it as the user that the agent runs as: sudo -u postgres pgtandem restore ...".to_owned();
            return Err(Explained { what, hint }.into());
        }
        let to = std::path::absolute(&self.to)?;
        let chosen = restore::choose(&places(&config, self.node.as_deref())?, target)?;
        if !self.json {
            println!("From base copy {} of {}, stream {}.", chosen.base, chosen.node, chosen.stream.name);
        }
        let nodes: Vec<PathBuf> = config.nodes.iter().map(|node| node.pgdata.clone()).collect();
        let program = std::env::current_exe()?;
        let options = Options { to: &to, target, pause: self.pause, port: self.port, program: &program, nodes: &nodes };
        let made = restore::restore(&chosen, &options)?;
        super::runtime()?.block_on(nudge(&config, &chosen));
        let bin_dir = config.node(&chosen.node).map_or_else(PathBuf::new, |node| node.bin_dir.clone());
        let start = format!(
            "{} start -w -t 86400 -D {} -l {}.log",
            bin_dir.join("pg_ctl").display(),
            to.display(),
            to.display()
        );
        let report = Report {
            node: &chosen.node,
            stream: chosen.stream.name.to_string(),
            base_copy: chosen.base.to_string(),
            data_directory: &to,
            tablespaces: made.tablespaces.as_deref(),
            socket_dir: &made.socket_dir,
            port: self.port,
            files: made.files,
            bytes: made.bytes,
            start,
        };
        if self.json {
            println!("{}", serde_json::to_string(&report)?);
        } else {
            self.tell(&report);
        }
        Ok(ExitCode::SUCCESS)
    }

    fn target(&self) -> anyhow::Result<Target> {
        if let Some(text) = &self.target_time {
            return moment::parse(text).map(Target::Time).map_err(|why| {
                let what = format!("{text:?} is no moment: {why}");
                Explained { what, hint: "write it like 2026-11-27 14:15:00+01, or with Z for UTC".into() }.into()
            });
        }
        if let Some(text) = &self.target_lsn {
            return parse_lsn(text).map(Target::Lsn).ok_or_else(|| {
                let what = format!("{text:?} is no position in the WAL");
                Explained { what, hint: "write it like 1A/60000B0".into() }.into()
            });
        }
        Ok(Target::Latest)
    }

    fn tell(&self, report: &Report<'_>) {
        println!(
            "{} files, {:.1} MiB, are in {}.",
            report.files,
            report.bytes as f64 / f64::from(1 << 20),
            report.data_directory.display()
        );
        if let Some(tablespaces) = report.tablespaces {
            println!("Its tablespaces are in {}.", tablespaces.display());
        }
        println!("\nNow start it; it replays WAL first, up to {}:\n  {}", self.until(), report.start);
        println!("Then look:\n  psql -h {} -p {} -U pgtandem postgres", report.socket_dir.display(), report.port);
        if self.pause {
            println!("It stays read-only. When it is the right moment:\n  select pg_wal_replay_resume();");
        }
        println!(
            "\nIt is a server of its own and no node: nothing that is written to it reaches the cluster. Carry over what is needed with \
             pg_dump and psql, through the proxy."
        );
    }

    fn until(&self) -> String {
        let time = self.target_time.clone();
        time.or_else(|| self.target_lsn.clone()).unwrap_or_else(|| "its end".to_owned())
    }
}

/// Recovery knows that it has come to the target when it sees a commit behind it. On a server where nothing has been committed since, there
/// is none: a transaction without any change makes one, and a new segment brings it into the archive. If the server does not run there is
/// nothing to be done, and PostgreSQL says at its start that the target was not reached.
async fn nudge(config: &Config, chosen: &Chosen) {
    let Some(node) = config.node(&chosen.node).filter(|_| chosen.live.is_some()) else { return };
    let work = async {
        let client = Postgres::new(node.clone()).connect("postgres").await.map_err(|error| error.to_string())?;
        let row = client.query_one("SELECT txid_current() IS NOT NULL", &[]).await.map_err(|error| describe(&error))?;
        let _: bool = row.try_get(0).map_err(|error| describe(&error))?;
        let row = client.query_one("SELECT pg_switch_wal()::text", &[]).await.map_err(|error| describe(&error))?;
        let lsn: String = row.try_get(0).map_err(|error| describe(&error))?;
        Ok::<_, String>(lsn)
    };
    match tokio::time::timeout(NUDGE_MAX, work).await {
        Ok(Ok(lsn)) => tracing::debug!(lsn, "a segment was ended"),
        Ok(Err(why)) => {
            eprintln!("note: the server of {} could not be asked to end its WAL segment: {why}", chosen.node);
        }
        Err(_) => eprintln!("note: the server of {} did not end its WAL segment in time", chosen.node),
    }
}
