//! `pgtandem recover NODE --verify`: PostgreSQL's own programs look at the files of a node before its first start.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test that panics has failed")]

mod common;

use common::text;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_recovery_says_what_pg_verifybackup_said() {
    let cluster = common::Cluster::up(&["--scale", "1"]);
    let manifest = cluster.layout.pgdata(1).join("backup_manifest");
    let output = cluster.command(&["recover", "node1", "--yes", "--verify"]);
    assert!(output.status.success(), "{}", text(&output));
    let said = text(&output);
    assert!(said.contains("pg_verifybackup and pg_waldump found nothing wrong before the first start"), "{said}");
    assert!(manifest.exists(), "it stays, as after pg_basebackup");
    cluster.assert_identical().await;

    let output = cluster.command(&["recover", "node1", "--yes", "--json", "--verify"]);
    let said = text(&output);
    let last = said.lines().last().unwrap();
    assert!(last.contains("\"verified\":true") && !last.contains("\"bytes_verified\":0,"), "{last}");
    // Nobody asked: nobody looked.
    let output = cluster.command(&["recover", "node1", "--yes", "--json"]);
    assert!(text(&output).lines().last().unwrap().contains("\"verified\":false"), "{}", text(&output));
}

/// The agent's own file in the data directory belongs to what is told, also where there was no directory before.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_empty_node_that_archives_is_verified_too() {
    let cluster = common::Cluster::up(&["--archive"]);
    cluster.kill_postgres(1);
    cluster.wait_member(1, false).await;
    std::fs::remove_dir_all(cluster.layout.pgdata(1)).unwrap();
    let output = cluster.command(&["recover", "node1", "--verify"]);
    assert!(output.status.success(), "{}\n{}", text(&output), cluster.logs());
    assert!(cluster.layout.pgdata(1).join("pgtandem.archive.conf").exists());
    // Its settings are the agent's by now, which lets nobody in over TCP.
    cluster.wait_member(1, true).await;
}
