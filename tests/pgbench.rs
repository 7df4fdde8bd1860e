//! pgbench in all three query modes: the servers are identical after each.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test that panics has failed")]

mod common;

use std::process::Command;

use common::{Cluster, text};

/// Transactions per client.
const TRANSACTIONS: &str = "150";

fn pgbench(cluster: &Cluster, arguments: &[&str]) -> String {
    let mut command = Command::new(cluster.layout.plan.bin_dir.join("pgbench"));
    command.args(["-h", "127.0.0.1", "-U", "postgres", "-p", &cluster.layout.proxy_port().to_string()]);
    let output = command.args(arguments).arg("bench").output().expect("pgbench");
    assert!(output.status.success(), "pgbench {arguments:?}: {}\n{}", text(&output), cluster.logs());
    text(&output)
}

#[tokio::test(flavor = "multi_thread")]
async fn every_query_mode_leaves_identical_servers() {
    let cluster = Cluster::up(&["--scale", "1"]);
    cluster.assert_identical().await;
    for mode in ["simple", "extended", "prepared"] {
        let said = pgbench(&cluster, &["-n", "-M", mode, "-c", "4", "-j", "2", "-t", TRANSACTIONS]);
        assert!(said.contains("number of failed transactions: 0"), "{said}");
        cluster.assert_identical().await;
        pgbench(&cluster, &["-n", "-S", "-M", mode, "-c", "4", "-t", TRANSACTIONS]);
    }
    // Every transaction is there, once.
    let client = cluster.connect_node(1, "bench").await;
    let rows: i64 = client.query_one("select count(*) from pgbench_history", &[]).await.unwrap().get(0);
    assert_eq!(rows, 3 * 4 * 150);
    // A script of its own, as one pipeline per transaction.
    client_pipeline(&cluster).await;
    // Initialised again, over what is there, with both nodes members.
    pgbench(&cluster, &["-i", "-q", "-s", "2"]);
    cluster.assert_identical().await;
}

const PIPELINE: &str = "\\set i random(1, 1000000)
\\set j random(1, 50)
\\startpipeline
insert into piped (b) values (:i);
select count(*) from piped where a = :i;
update piped set b = b + 1 where a = :j;
insert into piped (b) select :i + 1;
\\endpipeline
";

async fn client_pipeline(cluster: &Cluster) {
    let client = cluster.connect("bench").await;
    client
        .batch_execute("create table piped (a serial primary key, b int, at timestamptz default now())")
        .await
        .expect("a table");
    let script = common::folder();
    let file = script.path().join("pipeline.sql");
    std::fs::write(&file, PIPELINE).expect("a file");
    let file = file.display().to_string();
    for mode in ["extended", "prepared"] {
        let said = pgbench(cluster, &["-n", "-M", mode, "-f", &file, "-c", "4", "-t", "25"]);
        assert!(said.contains("number of failed transactions: 0"), "{said}");
        cluster.assert_identical().await;
    }
    let rows: i64 = client.query_one("select count(*) from piped", &[]).await.unwrap().get(0);
    assert_eq!(rows, 2 * 4 * 25 * 2);
}
