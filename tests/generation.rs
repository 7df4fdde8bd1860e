//! Data that were put in the place of a node's own, as from a backup: its record says that it is in sync, and its database is of an older
//! generation.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test that panics has failed")]

mod common;

use std::process::Command;

use common::{Cluster, text, wait_for};

fn copy(from: &std::path::Path, to: &std::path::Path) {
    let _ = std::fs::remove_dir_all(to);
    let status = Command::new("cp").arg("-a").args([from, to]).status().unwrap();
    assert!(status.success());
}

fn lose_follower(cluster: &Cluster) {
    cluster.kill_agent(1);
    cluster.kill_postgres(1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restored_node_is_not_promoted_for_what_its_record_says() {
    let cluster = common::cluster();
    let client = cluster.connect("postgres").await;
    client.batch_execute("create table t (v text primary key)").await.unwrap();
    // A node that has joined a moment ago has its generation in its record, and soon in its database.
    let node = cluster.connect_node(1, "postgres").await;
    wait_for("the database knows its generation", async || {
        !node.query("select from pgtandem.generation", &[]).await.unwrap().is_empty()
    })
    .await;
    drop(node);
    let (pgdata, backup) = (cluster.layout.pgdata(1), cluster.dir().join("backup"));
    // Taken while nothing runs there; afterwards it leaves and joins twice, each time under a new generation.
    for _ in 0..2 {
        lose_follower(&cluster);
        if !backup.exists() {
            copy(&pgdata, &backup);
        }
        cluster.wait_member(1, false).await;
        cluster.start_agent(1);
        cluster.recover(1);
    }
    client.batch_execute("insert into t values ('after the backup')").await.unwrap();
    cluster.assert_identical().await;
    cluster.lose_host(0);
    lose_follower(&cluster);
    copy(&backup, &pgdata);
    let _ = std::fs::remove_file(pgdata.join("postmaster.pid"));
    cluster.start_agent(1);
    wait_for("it is suspect", async || cluster.status().0.contains("suspect")).await;
    let stated = ["promote", "--node", "node1", "--peer-is-dead", "node0", "--yes"];
    let refused = cluster.command(&stated);
    let said = text(&refused);
    assert!(!refused.status.success() && said.contains("ACKNOWLEDGED WRITES WILL BE LOST"), "{said}");
    assert!(said.contains("--accept-data-loss"), "{said}");
    // The other one has everything.
    cluster.start_again();
    cluster.wait_member(1, false).await;
    cluster.recover(1);
    cluster.assert_identical().await;
    let client = cluster.connect_node(1, "postgres").await;
    let found: String = client.query_one("select v from t", &[]).await.unwrap().get(0);
    assert_eq!(found, "after the backup");
}
