//! Hosts that come back in the wrong order, a record that is damaged, a record that can not be written; and the page for the night, typed as
//! it stands there.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test that panics has failed")]

mod common;

use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Output;

use common::page::commands;
use common::{Cluster, load, text, wait_for};
use pgtandem::sandbox::compare;

async fn is_served(port: u16) -> bool {
    compare::connect(port, "postgres").await.is_ok()
}

fn everything_dies(cluster: &Cluster) {
    cluster.lose_host(0);
    cluster.kill_agent(1);
    cluster.kill_postgres(1);
}

/// H4: the follower's host comes back alone. It can not know whether the leader went on, so nobody is served.
#[tokio::test(flavor = "multi_thread")]
async fn only_the_followers_host_comes_back() {
    let cluster = common::cluster();
    let client = cluster.connect("postgres").await;
    client.batch_execute("create table t (v text primary key); insert into t values ('both')").await.unwrap();
    everything_dies(&cluster);
    cluster.start_agent(1);
    let proxy = cluster.other_proxy(1);
    let status = || text(&cluster.command_with(&proxy.config, &["status"]));
    wait_for("it says why", async || status().contains("the proxy of this cluster runs on node0")).await;
    assert!(!is_served(proxy.port).await);
    assert!(status().contains("pgtandem promote"), "{}", status());
    // A person knows that the other host is gone. The proxy that waits takes over by itself.
    let stated = ["promote", "--node", "node1", "--peer-is-dead", "node0", "--yes"];
    let output = cluster.command_with(&proxy.config, &stated);
    assert!(output.status.success() && text(&output).contains("Its proxy serves clients"), "{}", text(&output));
    let client = compare::connect(proxy.port, "postgres").await.unwrap();
    let found: String = client.query_one("select v from t", &[]).await.unwrap().get(0);
    assert_eq!(found, "both");
}

/// H5: the leader's host comes back alone: its proxy waits for the other one, and serves when that is there.
#[tokio::test(flavor = "multi_thread")]
async fn only_the_leaders_host_comes_back() {
    let cluster = common::cluster();
    everything_dies(&cluster);
    cluster.start_agent(0);
    cluster.start_proxy(0);
    wait_for("it says for whom it waits", async || cluster.status().0.contains("node1 is a member, but its agent"))
        .await;
    assert!(!is_served(cluster.layout.proxy_port()).await);
    assert!(cluster.status().0.contains("pgtandem detach node1 --yes"), "{}", cluster.status().0);
    cluster.start_agent(1);
    wait_for("clients are served", async || is_served(cluster.layout.proxy_port()).await).await;
    cluster.wait_well().await;
}

/// H11: a damaged record means that nothing is known. The node is never promoted, and filled again.
#[tokio::test(flavor = "multi_thread")]
async fn a_record_is_damaged() {
    let cluster = common::cluster();
    cluster.kill_agent(1);
    let record = cluster.layout.node_dir(1).join("record");
    let mut bytes = std::fs::read(&record).unwrap();
    let middle = bytes.len() / 2;
    bytes.truncate(middle);
    std::fs::write(&record, bytes).unwrap();
    cluster.start_agent(1);
    cluster.wait_member(1, false).await;
    wait_for("it is blank", async || cluster.status().0.contains("blank")).await;
    cluster.lose_host(0);
    let output =
        cluster.command(&["promote", "--node", "node1", "--accept-data-loss", "--peer-is-dead", "node0", "--yes"]);
    assert!(!output.status.success() && text(&output).contains("IMPOSSIBLE"), "{}", text(&output));
    cluster.start_again();
    cluster.recover(1);
    cluster.assert_identical().await;
    cluster.wait_well().await;
}

fn set_mode(path: &Path, mode: u32) {
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
}

/// H12: the disk of a follower's agent takes nothing any more. It can not be told that it is left behind, so its lease is waited out;
/// no client sees an error, and it is told later.
#[tokio::test(flavor = "multi_thread")]
async fn a_record_can_not_be_written() {
    let cluster = common::cluster();
    let probe = load::start(&cluster).await;
    let folder = cluster.layout.node_dir(1);
    let mode = std::fs::metadata(&folder).unwrap().permissions().mode();
    set_mode(&folder, 0o555);
    let output = cluster.command(&["detach", "node1"]);
    set_mode(&folder, mode);
    assert!(output.status.success(), "{}", text(&output));
    load::wait_writes(&cluster, &probe, 50).await;
    wait_for("it is told", async || cluster.status().0.contains("stale")).await;
    cluster.recover(1);
    let seen = load::finish(&cluster, probe).await;
    load::assert_unharmed(&cluster, &seen);
}

fn typed(cluster: &Cluster, command: &[String], more: &[&str]) -> Output {
    let words: Vec<&str> = command.iter().map(String::as_str).chain(more.iter().copied()).collect();
    cluster.command(&words)
}

/// The page, line by line. Both hosts are one machine here, so `promote` is told which it is.
#[tokio::test(flavor = "multi_thread")]
async fn the_page_for_the_night() {
    let cluster = common::cluster();
    let client = cluster.connect("postgres").await;
    client.batch_execute("create table t (id serial primary key); insert into t default values").await.unwrap();
    let page = commands(0, "node0", "node1");
    let [status, promote, stated, recover] = page.as_slice() else { panic!("{page:?}") };
    cluster.lose_host(0);
    let here = ["--node", "node1", "--yes"];
    let shown = text(&typed(&cluster, status, &[]));
    assert!(shown.contains("NO PROXY RUNS"), "{shown}");
    let asked = typed(&cluster, promote, &here);
    assert!(!asked.status.success() && text(&asked).contains("--peer-is-dead node0"), "{}", text(&asked));
    let promoted = typed(&cluster, stated, &here);
    assert!(promoted.status.success(), "{}", text(&promoted));
    cluster.start_proxy(1);
    wait_for("clients are served", async || is_served(cluster.layout.proxy_port()).await).await;
    cluster.start_again();
    let recovered = typed(&cluster, recover, &[]);
    assert!(recovered.status.success(), "{}\n{}", text(&recovered), cluster.logs());
    cluster.wait_well().await;

    // And back, as planned: here the old host is b.
    let stands_by = cluster.other_proxy(0);
    let planned = commands(1, "node1", "node0");
    let [switch] = planned.as_slice() else { panic!("{planned:?}") };
    let switched = typed(&cluster, switch, &[]);
    assert!(switched.status.success(), "{}\n{}", text(&switched), cluster.logs());
    let client = compare::connect(stands_by.port, "postgres").await.unwrap();
    client.batch_execute("insert into t default values").await.unwrap();
    cluster.assert_identical().await;
}
