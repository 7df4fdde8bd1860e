//! The leader's PostgreSQL was lost, another member leads through the proxy where it was, and then the host of the proxy is lost, too, or is to
//! be left: the member that leads takes over the proxy.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test that panics has failed")]

mod common;

use common::{Cluster, text, wait_for};
use pgtandem::sandbox::compare;
use tokio_postgres::Client;

/// node1 leads, the proxy is on node0, and a write is on node1 alone.
async fn led_by_the_other() -> (Cluster, Client) {
    let cluster = common::cluster();
    let client = cluster.connect("postgres").await;
    client.batch_execute("create table t (v text primary key); insert into t values ('both')").await.unwrap();
    cluster.kill_postgres(0);
    client.batch_execute("insert into t values ('on node1')").await.unwrap();
    assert_eq!(cluster.leader(), 1);
    (cluster, client)
}

async fn rows(cluster: &Cluster) -> String {
    wait_for("the proxy serves", async || compare::connect(cluster.layout.proxy_port(), "postgres").await.is_ok())
        .await;
    let client = cluster.connect("postgres").await;
    client.query_one("select string_agg(v, ', ' order by v) from t", &[]).await.unwrap().get(0)
}

/// The old host comes back, was left behind, and is filled.
async fn comes_back(cluster: &Cluster) {
    cluster.start_agent(0);
    wait_for("node0 is told", async || cluster.status().0.contains("next: pgtandem recover node0")).await;
    let old = cluster.other_proxy(0);
    wait_for("the old proxy refuses", async || {
        text(&cluster.command_with(&old.config, &["status"])).contains("the proxy of this host runs and serves nobody")
    })
    .await;
    assert!(compare::connect(old.port, "postgres").await.is_err());
    cluster.recover(0);
    cluster.connect("postgres").await.batch_execute("insert into t values ('again both')").await.unwrap();
    cluster.assert_identical().await;
    cluster.wait_well().await;
}

/// While node0 is no member nobody but node1 can have gone on.
#[tokio::test(flavor = "multi_thread")]
async fn a_member_that_leads_alone_takes_over_from_a_lost_proxy_safely() {
    let (cluster, _client) = led_by_the_other().await;
    // A proxy that lives is believed, as soon as it has vouched for somebody.
    wait_for("the proxy is believed", async || {
        let refused = cluster.command(&["promote", "--node", "node1", "--dry-run"]);
        !refused.status.success() && text(&refused).contains("a proxy serves this cluster")
    })
    .await;
    cluster.lose_host(0);
    let (status, _) = cluster.status();
    assert!(
        status.contains("leader node1") && status.contains("on the host of a member: pgtandem promote"),
        "{status}"
    );
    let promoted = cluster.command(&["promote", "--node", "node1", "--yes"]);
    let said = text(&promoted);
    assert!(promoted.status.success(), "{said}\n{}", cluster.logs());
    for part in
        ["promote node1: SAFE\n", "led by node1, through the proxy of node0", "node1 is the leader. Members: node1."]
    {
        assert!(said.contains(part), "{part}: {said}");
    }
    cluster.start_proxy(1);
    assert_eq!(rows(&cluster).await, "both, on node1");
    comes_back(&cluster).await;
}

/// When node0 is a member again its proxy may have made it the leader once more: that has to be stated.
#[tokio::test(flavor = "multi_thread")]
async fn a_member_that_leads_takes_over_when_the_other_is_said_to_be_dead() {
    let (cluster, _client) = led_by_the_other().await;
    cluster.recover(0);
    cluster.lose_host(0);
    let detach = cluster.command(&["detach", "node0", "--yes"]);
    assert!(!detach.status.success() && text(&detach).contains("pgtandem promote"), "{}", text(&detach));
    let asked = cluster.command(&["promote", "--node", "node1", "--yes"]);
    assert!(!asked.status.success() && text(&asked).contains("--peer-is-dead node0"), "{}", text(&asked));
    let promoted = cluster.command(&["promote", "--node", "node1", "--peer-is-dead", "node0", "--yes"]);
    assert!(promoted.status.success(), "{}\n{}", text(&promoted), cluster.logs());
    cluster.start_proxy(1);
    assert_eq!(rows(&cluster).await, "both, on node1");
    comes_back(&cluster).await;
}

/// The leader's host is lost while the proxy's node is a member: the proxy copes. While it is none, it waits, and a person may accept the loss.
#[tokio::test(flavor = "multi_thread")]
async fn the_proxys_own_node_takes_over_if_it_has_every_write() {
    let (cluster, client) = led_by_the_other().await;
    cluster.kill_agent(1);
    cluster.kill_postgres(1);
    wait_for("it is said who is missing", async || {
        cluster.status().0.contains("node1 leads, but its agent does not answer")
    })
    .await;
    let asked = cluster.command(&["promote", "--node", "node0", "--peer-is-dead", "node1", "--yes"]);
    assert!(!asked.status.success() && text(&asked).contains("--accept-data-loss"), "{}", text(&asked));
    cluster.start_agent(1);
    assert_eq!(rows(&cluster).await, "both, on node1");
    drop(client);
    cluster.recover(0);
    let client = cluster.connect("postgres").await;
    cluster.kill_agent(1);
    cluster.kill_postgres(1);
    client.batch_execute("insert into t values ('on node0')").await.unwrap();
    assert_eq!(cluster.leader(), 0);
    cluster.start_agent(1);
    wait_for("node1 is told", async || cluster.status().0.contains("next: pgtandem recover node1")).await;
    cluster.recover(1);
    assert_eq!(rows(&cluster).await, "both, on node0, on node1");
    cluster.assert_identical().await;
    cluster.wait_well().await;
}

/// Both hosts live, and the one of the proxy is to be left.
#[tokio::test(flavor = "multi_thread")]
async fn the_proxy_follows_the_leader_by_a_switch() {
    let (cluster, _client) = led_by_the_other().await;
    let other = cluster.other_proxy(1);
    wait_for("the other proxy stands by", async || {
        text(&cluster.command_with(&other.config, &["status"])).contains("the proxy of this cluster runs on node0")
    })
    .await;
    let switched = cluster.command(&["switch", "node1"]);
    assert!(switched.status.success(), "{}\n{}", text(&switched), cluster.logs());
    assert!(compare::connect(cluster.layout.proxy_port(), "postgres").await.is_err());
    let on_new = compare::connect(other.port, "postgres").await.expect("the new proxy serves");
    on_new.batch_execute("insert into t values ('by its own proxy')").await.unwrap();
    let again = cluster.command_with(&other.config, &["switch", "node1"]);
    assert!(!again.status.success() && text(&again).contains("is the leader already"), "{}", text(&again));
    let recovered = cluster.command_with(&other.config, &["recover", "node0"]);
    assert!(recovered.status.success(), "{}\n{}", text(&recovered), cluster.logs());
    cluster.assert_identical().await;
}
