//! Dumps of a server in a form that can be compared: what `pg_dumpall` writes, large objects included.
//!
//! Left out: positions of sequences (followers are ahead), the schema `pgtandem`. Rows of a table are sorted, because their
//! physical order is not content.

use std::path::Path;
use std::process::Command;

use crate::common::text;

/// Roles, settings and every database of the server that listens on `port`.
pub fn server(bin_dir: &Path, port: u16) -> String {
    let mut all = comparable(&output(bin_dir, "pg_dumpall", port, &["--globals-only"]));
    let databases = "select datname from pg_database where datallowconn and datname <> 'template0' order by 1";
    for database in output(bin_dir, "psql", port, &["-X", "-A", "-t", "-d", "postgres", "-c", databases]).lines() {
        let options = ["--create", "--exclude-schema=pgtandem", "--no-unlogged-table-data", "-d", database];
        all.push_str(&comparable(&output(bin_dir, "pg_dump", port, &options)));
    }
    all
}

fn output(bin_dir: &Path, program: &str, port: u16, arguments: &[&str]) -> String {
    let mut command = Command::new(bin_dir.join(program));
    command.args(["-h", "127.0.0.1", "-U", "postgres", "-p", &port.to_string()]).args(arguments);
    let output = command.output().unwrap_or_else(|error| panic!("{program}: {error}"));
    assert!(output.status.success(), "{program}: {}", text(&output));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn comparable(dump: &str) -> String {
    let mut text = String::with_capacity(dump.len());
    let mut lines = dump.lines();
    while let Some(line) = lines.next() {
        // Newer versions protect their dumps by a random word.
        if line.starts_with("SELECT pg_catalog.setval(")
            || line.starts_with("\\restrict")
            || line.starts_with("\\unrestrict")
        {
            continue;
        }
        text.push_str(line);
        text.push('\n');
        if line.starts_with("COPY ") && line.ends_with(" FROM stdin;") {
            let mut rows: Vec<&str> = lines.by_ref().take_while(|row| *row != "\\.").collect();
            rows.sort_unstable();
            for row in rows {
                text.push_str(row);
                text.push('\n');
            }
            text.push_str("\\.\n");
        }
    }
    text
}

/// `diff -U2`; empty if the files are the same.
pub fn diff(first: &Path, second: &Path) -> String {
    let output = Command::new("diff").args(["-a", "-U2"]).arg(first).arg(second).output().expect("diff");
    assert!(output.status.code().is_some_and(|code| code < 2), "diff: {}", text(&output));
    String::from_utf8_lossy(&output.stdout).into_owned()
}
