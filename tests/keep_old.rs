//! `recover --keep-old`: what lay on the node before stays beside it, as a server that can be started, and no more is sent than without.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test that panics has failed")]

mod common;

use std::path::{Path, PathBuf};

use common::ask::{run, value};
use common::{Cluster, text, wait_for};
use pgtandem::sandbox::compare;
use tokio_postgres::Client;

/// Rows of the table that is compared: some 30 MiB.
const ROWS: u32 = 60_000;

async fn filled() -> (Cluster, Client) {
    let cluster = common::cluster();
    cluster.stay_away().await;
    let client = cluster.connect("postgres").await;
    run(&client, "create table t (id int primary key, v text)").await;
    run(&client, &format!("insert into t select g, repeat(md5(g::text), 12) from generate_series(1, {ROWS}) g")).await;
    // Followers commit what they have prepared a moment after the client is told.
    cluster.assert_identical().await;
    (cluster, client)
}

/// node1 is lost, and misses this.
async fn lose(cluster: &Cluster, client: &Client, statement: &str) {
    cluster.kill_agent(1);
    cluster.kill_postgres(1);
    cluster.wait_member(1, false).await;
    run(client, statement).await;
    cluster.start_agent(1);
}

/// `recover` with these options, which must succeed: what it says, the last line as JSON.
fn recover(cluster: &Cluster, options: &[&str]) -> serde_json::Value {
    let output = cluster.command(&[&["recover", "node1", "--yes", "--json"], options].concat());
    assert!(output.status.success(), "{}\n{}", text(&output), cluster.logs());
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    let last: serde_json::Value = serde_json::from_str(said.lines().last().unwrap()).unwrap();
    last["result"]["recovery"].clone()
}

/// What is kept beside the data directory of node1.
fn kept(cluster: &Cluster) -> Vec<PathBuf> {
    let pgdata = cluster.layout.pgdata(1);
    let begin = format!("{}.old-", pgdata.file_name().unwrap().to_str().unwrap());
    let entries = std::fs::read_dir(pgdata.parent().unwrap()).unwrap().map(|entry| entry.unwrap().path());
    entries.filter(|path| path.file_name().unwrap().to_str().unwrap().starts_with(&begin)).collect()
}

/// A server that was started on what is kept; ends with the value.
struct Lone<'a> {
    cluster: &'a Cluster,
    folder: &'a Path,
    port: u16,
}

impl<'a> Lone<'a> {
    fn start(cluster: &'a Cluster, folder: &'a Path) -> Self {
        let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let lone = Self { cluster, folder, port: free };
        let sockets = cluster.layout.socket_dir(1);
        lone.pg_ctl(&["start", "-w", "-l", "/dev/null", "-o", &format!("-p {free} -k {}", sockets.display())]);
        lone
    }

    fn pg_ctl(&self, arguments: &[&str]) {
        let mut command = common::running_as_user(&self.cluster.layout.plan.bin_dir.join("pg_ctl"));
        command.arg("-D").arg(self.folder).args(arguments).stdin(std::process::Stdio::null());
        command.stdout(std::process::Stdio::null());
        assert!(command.status().unwrap().success(), "pg_ctl {arguments:?} -D {}", self.folder.display());
    }
}

impl Drop for Lone<'_> {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            self.pg_ctl(&["stop", "-w", "-m", "fast"]);
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_lay_there_is_kept_and_no_more_is_sent() {
    let (cluster, client) = filled().await;
    // What is sent without it, when as much differs.
    lose(&cluster, &client, "update t set v = v || 'x' where id <= 2000").await;
    let without = recover(&cluster, &[]);
    assert_eq!((&without["kept"], kept(&cluster).len()), (&serde_json::Value::Null, 0));

    lose(&cluster, &client, "update t set v = 'after it was lost' where id <= 2000").await;
    let with = recover(&cluster, &["--keep-old", "--verify"]);
    assert_eq!(with["verified"], true);
    let sent = |view: &serde_json::Value| view["bytes_sent"].as_u64().unwrap();
    assert!(sent(&with) < 2 * sent(&without), "{} instead of {}", sent(&with), sent(&without));
    assert!(with["bytes_same"].as_u64().unwrap() > 20 << 20, "{with}");
    let [old] = kept(&cluster).try_into().unwrap();
    assert_eq!(with["kept"]["path"], old.to_str().unwrap());
    assert!(with["kept"]["bytes"].as_u64().unwrap() > 20 << 20, "{with}");

    let lone = Lone::start(&cluster, &old);
    let there = compare::connect(lone.port, "postgres").await.unwrap();
    assert_eq!(value(&there, "select count(*) from t where v like '%x'").await, "2000", "its former state");
    run(&there, "insert into t values (0, 'a server of its own')").await;
    cluster.wait_well().await;
    cluster.assert_identical().await;
}

/// The agent is killed while files are brought: what is kept stays as it is, and is not kept once more.
#[tokio::test(flavor = "multi_thread")]
async fn a_cut_in_the_middle_leaves_it_alone_and_the_next_attempt_goes_on() {
    let (cluster, client) = filled().await;
    lose(&cluster, &client, "update t set v = 'after it was lost'").await;
    // An earlier attempt was cut while it copied.
    let pgdata = cluster.layout.pgdata(1);
    let half = pgdata.with_file_name(format!("{}.old-1.partial", pgdata.file_name().unwrap().to_str().unwrap()));
    std::fs::create_dir(&half).unwrap();
    let first = cluster.start(&["recover", "node1", "--keep-old"]);
    wait_for("pg_control is gone", async || !pgdata.join("global/pg_control").exists()).await;
    cluster.kill_agent(1);
    let output = first.wait_with_output().unwrap();
    assert!(!output.status.success() && text(&output).contains("is kept: "), "{}", text(&output));
    let [old] = kept(&cluster).try_into().unwrap();
    cluster.start_agent(1);
    let second = recover(&cluster, &["--keep-old"]);
    assert_eq!(second["kept"]["path"], old.to_str().unwrap(), "{second}");
    assert_eq!(kept(&cluster), std::slice::from_ref(&old));
    let lone = Lone::start(&cluster, &old);
    let there = compare::connect(lone.port, "postgres").await.unwrap();
    assert_eq!(value(&there, "select count(*) from t where v like '%lost'").await, "0");
    assert_eq!(value(&there, "select count(*) from t").await, ROWS.to_string());
    cluster.wait_well().await;
    cluster.assert_identical().await;
}

/// What can not be kept is refused before anything is touched.
#[tokio::test(flavor = "multi_thread")]
async fn what_leads_out_of_the_directory_is_not_kept() {
    let (cluster, client) = filled().await;
    let elsewhere = common::folder();
    let link = cluster.layout.pgdata(1).join("elsewhere");
    std::os::unix::fs::symlink(elsewhere.path(), &link).unwrap();
    lose(&cluster, &client, "update t set v = '' where id = 1").await;
    let output = cluster.command(&["recover", "node1", "--keep-old"]);
    assert!(!output.status.success() && text(&output).contains("elsewhere is a link"), "{}", text(&output));
    assert_eq!(kept(&cluster).len(), 0);
    wait_for("it runs as before", async || compare::connect(cluster.layout.postgres_port(1), "postgres").await.is_ok())
        .await;
    assert_eq!(recover(&cluster, &[])["kept"], serde_json::Value::Null);
}
