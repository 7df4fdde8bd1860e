//! The scripts of a folder, in the order in which they run, and the files that they read.
//!
//! A folder with a `parallel_schedule` is PostgreSQL's `src/test/regress`: its scripts are in `sql`, they read `data`,
//! and some need `regress.so`, which is built from `regress.c` if the server's headers are installed. Any other folder: its
//! `*.sql` by name. Everything is copied to where the servers' user can read it.

use std::path::{Path, PathBuf};
use std::process::Command;

use super::lone::give;
use super::psql::{DATABASE, Place, Psql};
use crate::common::text;

pub struct Script {
    pub name: String,
    /// `None`: the schedule names it, but it is not there.
    pub file: Option<PathBuf>,
}

pub struct Suite {
    pub scripts: Vec<Script>,
    /// `PG_ABS_SRCDIR`, `PG_ABS_BUILDDIR` (the servers write there, too), `PG_LIBDIR`
    pub source: PathBuf,
    pub build: PathBuf,
    pub libraries: PathBuf,
}

impl Suite {
    /// Copies what is needed into `work`. `only`: these scripts alone, and what makes the tables for them.
    pub fn open(dir: &Path, only: &[&str], work: &Path) -> Self {
        let (source, build, libraries) = (work.join("source"), work.join("build"), work.join("libraries"));
        let schedule = dir.join("parallel_schedule");
        let is_regress = schedule.exists();
        let names = if is_regress { scheduled(&schedule) } else { sorted(dir) };
        for folder in ["sql", "data"] {
            let from = if is_regress { dir.join(folder) } else { dir.to_owned() };
            copy_files(&from, &source.join(folder));
        }
        give(&build);
        for folder in ["results", "sql", "expected"] {
            give(&build.join(folder));
        }
        std::fs::create_dir_all(&libraries).expect("a folder");
        let wanted = |name: &String| only.is_empty() || only.contains(&name.as_str()) || name == "test_setup";
        let script = |name: String| {
            let file = source.join(format!("sql/{name}.sql"));
            Script { name, file: file.exists().then_some(file) }
        };
        let scripts = names.into_iter().filter(wanted).map(script).collect();
        let suite = Self { scripts, source, build, libraries };
        if is_regress {
            suite.libraries(dir);
        }
        suite
    }

    /// What `pg_regress` does with a database before the first script (`create_database` in pg_regress.c).
    pub fn prepare(&self, place: &Place) {
        let settings = ["lc_messages", "lc_monetary", "lc_numeric", "lc_time"].map(|name| (name, "C"));
        for (name, value) in
            settings.into_iter().chain([("bytea_output", "hex"), ("timezone_abbreviations", "Default")])
        {
            let mut command = Psql { suite: self, place }.command("prepare", DATABASE);
            let statement = format!("ALTER DATABASE {DATABASE} SET {name} TO '{value}'");
            let output = command.args(["-v", "ON_ERROR_STOP=1", "-c", &statement]).output().expect("psql");
            assert!(output.status.success(), "{statement}: {}", text(&output));
        }
    }

    /// `regress.so` and the two modules of contrib/spi that scripts load.
    fn libraries(&self, dir: &Path) {
        let bin_dir = pgtandem::sandbox::find_bin_dir().expect("PostgreSQL is installed");
        let folder = |option: &str| {
            let output = Command::new(bin_dir.join("pg_config")).arg(option).output().expect("pg_config");
            PathBuf::from(String::from_utf8_lossy(&output.stdout).trim())
        };
        for module in ["autoinc.so", "refint.so"] {
            let _ = std::fs::copy(folder("--pkglibdir").join(module), self.libraries.join(module));
        }
        let mut compiler = Command::new("cc");
        compiler.args(["-shared", "-fPIC", "-O2", "-I"]).arg(folder("--includedir-server"));
        compiler.arg("-o").arg(self.libraries.join("regress.so")).arg(dir.join("regress.c"));
        let output = compiler.output().expect("a C compiler");
        if !output.status.success() {
            println!(
                "regress.so could not be built, so functions in C are missing on both sides: {}",
                text(&output).lines().next().unwrap_or_default()
            );
        }
    }
}

/// Names in the order of a schedule; groups that pg_regress runs at the same time run one after the other here.
fn scheduled(schedule: &Path) -> Vec<String> {
    let text = std::fs::read_to_string(schedule).expect("a schedule");
    let lines = text.lines().filter_map(|line| line.strip_prefix("test:"));
    lines.flat_map(str::split_whitespace).map(str::to_owned).collect()
}

fn sorted(dir: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(dir).unwrap_or_else(|error| panic!("{}: {error}", dir.display()));
    let paths = entries.map(|entry| entry.expect("a file").path());
    let scripts = paths.filter(|path| path.extension().is_some_and(|extension| extension == "sql"));
    let mut names: Vec<String> = scripts.filter_map(|path| Some(path.file_stem()?.to_str()?.to_owned())).collect();
    names.sort();
    assert!(!names.is_empty(), "{} has no *.sql", dir.display());
    names
}

fn copy_files(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).expect("a folder");
    for entry in std::fs::read_dir(from).unwrap_or_else(|error| panic!("{}: {error}", from.display())) {
        let path = entry.expect("a file").path();
        if path.is_file() {
            std::fs::copy(&path, to.join(path.file_name().expect("a name"))).expect("a copy");
        }
    }
}
