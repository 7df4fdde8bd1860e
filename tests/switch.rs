//! A planned change of the leader, there and back, under load.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test that panics has failed")]

mod common;

use common::{load, text, wait_for};
use pgtandem::sandbox::compare;

#[tokio::test(flavor = "multi_thread")]
async fn the_leader_changes_there_and_back() {
    let cluster = common::cluster();
    let other = cluster.other_proxy(1);
    let refused = cluster.command(&["switch", "node7"]);
    assert!(!refused.status.success() && text(&refused).contains("no node is named node7"), "{}", text(&refused));
    wait_for("the other proxy stands by", async || {
        text(&cluster.command_with(&other.config, &["status"])).contains("the proxy of this cluster runs on node0")
    })
    .await;
    let probe = load::start(&cluster).await;
    let switched = cluster.command(&["switch", "node1"]);
    assert!(switched.status.success(), "{}\n{}", text(&switched), cluster.logs());

    eprintln!("{}", text(&switched));
    // The old one refuses, and every write is on both.
    assert!(compare::connect(cluster.layout.proxy_port(), "postgres").await.is_err());
    let on_new = compare::connect(other.port, "postgres").await.expect("the new proxy serves");
    on_new.batch_execute("create table t (id serial primary key)").await.unwrap();
    for _ in 0..50 {
        on_new.batch_execute("insert into t default values").await.unwrap();
    }
    let status = text(&cluster.command_with(&other.config, &["status"]));
    assert!(status.contains("leader node1") && status.contains("node0"), "{status}");

    let back = cluster.command_with(&other.config, &["switch", "node0"]);
    assert!(back.status.success(), "{}\n{}", text(&back), cluster.logs());
    load::wait_writes(&cluster, &probe, 50).await;
    // Ids go on from where the other leader was.
    cluster.connect("postgres").await.batch_execute("insert into t default values").await.unwrap();
    let seen = load::finish(&cluster, probe).await;
    load::assert_errors(
        &seen,
        &["FATAL 57P01", "FATAL 57P03", "FATAL 40001", "ERROR 40001", "connection closed", "error "],
    );
    cluster.wait_well().await;
}
