//! Clients that we did not write: psql, psycopg and asyncpg. The Python drivers are installed into an environment of
//! their own below `target/`, once.

mod common;

use std::path::{Path, PathBuf};
use std::process::Command;

use common::{Cluster, text};

/// The environment's python, with the drivers in it.
fn python() -> PathBuf {
    let environment = Path::new(env!("CARGO_TARGET_TMPDIR")).join("drivers");
    let python = environment.join("bin/python");
    let complete = environment.join("complete");
    if !complete.exists() {
        run(Command::new("python3").args(["-m", "venv", "--clear"]).arg(&environment));
        run(Command::new(&python).args([
            "-m",
            "pip",
            "install",
            "--quiet",
            "psycopg[binary]==3.2.*",
            "asyncpg==0.30.*",
        ]));
        std::fs::write(&complete, "").expect("a file below target");
    }
    python
}

fn run(command: &mut Command) -> String {
    let output = command.output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    assert!(output.status.success(), "{command:?}: {}", text(&output));
    text(&output)
}

fn script(cluster: &Cluster, name: &str) {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/drivers").join(name);
    let output =
        Command::new(python()).arg(file).arg(cluster.layout.proxy_port().to_string()).output().expect("python");
    assert!(output.status.success(), "{name}: {}\n{}", text(&output), cluster.logs());
}

#[tokio::test(flavor = "multi_thread")]
async fn drivers_and_psql_leave_identical_servers() {
    let cluster = common::cluster();
    script(&cluster, "psycopg_client.py");
    cluster.assert_identical().await;
    script(&cluster, "asyncpg_client.py");
    cluster.assert_identical().await;

    let mut psql = Command::new(cluster.layout.plan.bin_dir.join("psql"));
    psql.args(["-X", "-v", "ON_ERROR_STOP=1", "-h", "127.0.0.1", "-U", "postgres", "-p"]);
    psql.arg(cluster.layout.proxy_port().to_string()).arg("postgres");
    psql.arg("-f").arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/drivers/psql.sql"));
    let said = run(&mut psql);
    assert!(said.contains("three rows: 3"), "{said}");
    cluster.assert_identical().await;
}

fn psql(cluster: &Cluster, port: u16, file: &str) -> String {
    let mut psql = Command::new(cluster.layout.plan.bin_dir.join("psql"));
    psql.args(["-X", "-h", "127.0.0.1", "-U", "postgres", "-p", &port.to_string(), "postgres"]);
    psql.arg("-f").arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/drivers").join(file));
    run(&mut psql)
}

#[tokio::test(flavor = "multi_thread")]
async fn psql_prints_what_it_prints_on_a_lone_server() {
    let cluster = common::cluster();
    let lone = Cluster::up(&["--nodes", "1"]);
    let expected = psql(&lone, lone.layout.postgres_port(0), "same.sql");
    let found = psql(&cluster, cluster.layout.proxy_port(), "same.sql");
    for (number, (expected, found)) in expected.lines().zip(found.lines()).enumerate() {
        assert_eq!(expected, found, "line {}", number + 1);
    }
    assert_eq!(expected.lines().count(), found.lines().count());
    cluster.wait_member(1, true).await;
    cluster.assert_identical().await;
}
