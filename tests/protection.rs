//! Mode protection: when a follower is lost commits wait, and say for whom, until it is back or a person has detached it.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test that panics has failed")]

mod common;

use common::{Cluster, text, wait_for};
use pgtandem::config::Mode;
use pgtandem::sandbox::compare;
use tokio::task::JoinHandle;

/// A cluster in this mode, with a table.
async fn cluster(nodes: &str) -> Cluster {
    let cluster = Cluster::up(&["--nodes", nodes]);
    cluster.kill_proxy();
    let mut config = cluster.layout.config();
    config.cluster.mode = Mode::Protection;
    std::fs::write(cluster.config_path(), toml::to_string(&config).unwrap()).unwrap();
    cluster.start_again();
    cluster.connect("postgres").await.batch_execute("create table t (v text primary key)").await.unwrap();
    cluster
}

type Told = JoinHandle<Result<(), tokio_postgres::Error>>;

/// Writes, and waits until the status says that this waits for node1.
async fn write_that_waits(cluster: &Cluster, v: &str) -> Told {
    let client = cluster.connect("postgres").await;
    let sql = format!("insert into t values ('{v}')");
    let told = tokio::spawn(async move { client.batch_execute(&sql).await });
    wait_for("status says why", async || {
        let (status, _) = cluster.status();
        status.contains("commits wait for node1, because the mode is protection")
            && status.contains("pgtandem detach node1")
    })
    .await;
    assert!(!told.is_finished(), "it was answered");
    told
}

async fn rows(cluster: &Cluster) -> String {
    let client = cluster.connect("postgres").await;
    client.query_one("select coalesce(string_agg(v, ',' order by v), '') from t", &[]).await.unwrap().get(0)
}

fn lose_follower(cluster: &Cluster, index: usize) {
    cluster.kill_agent(index);
    cluster.kill_postgres(index);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_commit_waits_until_a_person_has_detached_the_follower() {
    let cluster = cluster("2").await;
    lose_follower(&cluster, 1);
    let told = write_that_waits(&cluster, "waits").await;
    // Reads go on.
    assert_eq!(rows(&cluster).await, "");
    let detached = cluster.command(&["detach", "node1"]);
    assert!(detached.status.success(), "{}", text(&detached));
    told.await.unwrap().unwrap();
    assert_eq!(rows(&cluster).await, "waits");
    cluster.start_agent(1);
    cluster.recover(1);
    cluster.assert_identical().await;
    cluster.wait_well().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_commit_waits_until_the_follower_is_back_and_nobody_has_left() {
    let cluster = cluster("2").await;
    lose_follower(&cluster, 1);
    let told = write_that_waits(&cluster, "waits").await;
    cluster.start_agent(1);
    // A new epoch has resolved it; the client was told what became of it, or nothing.
    let told = told.await.unwrap();
    cluster.wait_well().await;
    let there = rows(&cluster).await == "waits";
    match told {
        Ok(()) => assert!(there),
        Err(error) if error.as_db_error().is_some() => assert!(!there, "told that it failed: {error:?}"),
        Err(_) => {}
    }
    cluster.connect("postgres").await.batch_execute("insert into t values ('later')").await.unwrap();
    cluster.assert_identical().await;
}

/// Neither a proxy that starts nor one whose leader is back goes on without a member.
#[tokio::test(flavor = "multi_thread")]
async fn no_epoch_begins_without_a_member() {
    let cluster = cluster("2").await;
    lose_follower(&cluster, 1);
    cluster.kill_postgres(0);
    let says = |word: &str| cluster.status().0.contains(word);
    wait_for("the leader's proxy waits", async || says("in mode protection nothing is acknowledged without it")).await;
    assert!(compare::connect(cluster.layout.proxy_port(), "postgres").await.is_err());
    cluster.kill_proxy();
    cluster.start_proxy(0);
    wait_for("the new proxy waits", async || says("node1 is a member, but its agent does not answer")).await;
    let detached = cluster.command(&["detach", "node1", "--yes"]);
    assert!(detached.status.success(), "{}", text(&detached));
    wait_for("it serves", async || compare::connect(cluster.layout.proxy_port(), "postgres").await.is_ok()).await;
    cluster.connect("postgres").await.batch_execute("insert into t values ('alone')").await.unwrap();
}

/// A person gets out of it, too, when the other members can not even be told.
#[tokio::test(flavor = "multi_thread")]
async fn two_followers_are_detached_one_after_the_other() {
    let cluster = cluster("3").await;
    lose_follower(&cluster, 1);
    lose_follower(&cluster, 2);
    let first = cluster.command(&["detach", "node1"]);
    assert!(first.status.success(), "{}", text(&first));
    let says = |word: &str| cluster.status().0.contains(word);
    wait_for("it waits for the other one", async || says("pgtandem detach node2 --yes")).await;
    let second = cluster.command(&["detach", "node2", "--yes"]);
    assert!(second.status.success(), "{}", text(&second));
    wait_for("it serves", async || compare::connect(cluster.layout.proxy_port(), "postgres").await.is_ok()).await;
    cluster.connect("postgres").await.batch_execute("insert into t values ('alone')").await.unwrap();
}
