//! psql as `pg_regress` starts it: src/test/regress/pg_regress.c (`initialize_environment`) and pg_regress_main.c.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use super::suite::Suite;

/// A script that takes longer is ended; what it printed until then is compared.
const SCRIPT_LIMIT: Duration = Duration::from_secs(300);

/// The database in which scripts run.
pub const DATABASE: &str = "postgres";

/// Where a script runs.
pub struct Place {
    pub name: &'static str,
    pub bin_dir: PathBuf,
    pub port: u16,
}

pub struct Psql<'a> {
    pub suite: &'a Suite,
    pub place: &'a Place,
}

impl Psql<'_> {
    /// psql with the environment of pg_regress and no variable of the caller's that would change what it does.
    pub fn command(&self, name: &str, database: &str) -> Command {
        let mut command = Command::new(self.place.bin_dir.join("psql"));
        for (variable, _) in std::env::vars_os() {
            let known = variable.to_string_lossy();
            if known.starts_with("PG") || known.starts_with("LC_") || known.starts_with("LANG") {
                command.env_remove(&variable);
            }
        }
        command.env("LANG", "C").env("LC_MESSAGES", "C").env("PGTZ", "America/Los_Angeles");
        command.env("PGDATESTYLE", "Postgres, MDY").env("PGOPTIONS", "-c intervalstyle=postgres_verbose");
        command.env("PGHOST", "127.0.0.1").env("PGPORT", self.place.port.to_string()).env("PGUSER", "postgres");
        command.env("PGAPPNAME", format!("pg_regress/{name}"));
        command.env("PG_ABS_SRCDIR", &self.suite.source).env("PG_ABS_BUILDDIR", &self.suite.build);
        command.env("PG_LIBDIR", &self.suite.libraries).env("PG_DLSUFFIX", ".so");
        command.args(["-X", "-a", "-q", "-d", database, "-v", "HIDE_TABLEAM=on", "-v", "HIDE_TOAST_COMPRESSION=on"]);
        command.current_dir(&self.suite.build);
        command
    }

    /// Runs a script; standard output and standard error as one, as pg_regress takes them.
    pub async fn run(&self, name: &str, script: &Path) -> Vec<u8> {
        let path = self.suite.build.join("output");
        let output = std::fs::File::create(&path).expect("a file for psql's output");
        let mut command = self.command(name, DATABASE);
        command.stdin(Stdio::from(std::fs::File::open(script).expect("a script")));
        command.stdout(output.try_clone().expect("a file")).stderr(output);
        let mut child = tokio::process::Command::from(command).kill_on_drop(true).spawn().expect("psql");
        let ended = tokio::time::timeout(SCRIPT_LIMIT, child.wait()).await;
        let mut said = std::fs::read(&path).expect("psql's output");
        if ended.is_err() {
            child.kill().await.expect("psql ends");
            let end = format!("\nended after {} s, on {}\n", SCRIPT_LIMIT.as_secs(), self.place.name);
            said.extend_from_slice(end.as_bytes());
            self.finish_prepared();
        }
        said
    }

    /// What an ended script has left prepared would hold up whoever comes next.
    fn finish_prepared(&self) {
        let names = "select format('rollback prepared %L', gid) from pg_prepared_xacts \\gexec";
        let mut command = self.command("finish", DATABASE);
        command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null());
        let mut child = command.spawn().expect("psql");
        child.stdin.take().expect("a pipe").write_all(names.as_bytes()).expect("psql listens");
        child.wait().expect("psql ends");
    }
}
