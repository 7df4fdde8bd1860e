//! The proxy, an agent or the leader's PostgreSQL is killed under load and started again: every acknowledged write is
//! on every member, and nothing is left prepared.

mod common;

use std::time::Duration;

use common::{Cluster, LIMIT, wait_for};
use pgtandem::sandbox::probe::{self, Probe, Settings};

const WRITERS: usize = 4;

async fn start_probe(cluster: &Cluster) -> Probe {
    let port = cluster.layout.proxy_port();
    probe::prepare(port, "postgres", WRITERS).await.expect("the probe's tables");
    let settings = Settings { port, database: "postgres".into(), writers: WRITERS, readers: 1, health_check: None };
    let probe = Probe::start(&settings).await.expect("the probe connects");
    assert!(probe.wait_writes(100, LIMIT).await, "no writes\n{}", cluster.logs());
    probe
}

/// Stops the probe; node1 must be a member, everything acknowledged on both servers.
async fn assert_nothing_lost(cluster: &Cluster, probe: Probe) {
    assert!(probe.wait_writes(50, LIMIT).await, "no writes afterwards\n{}", cluster.logs());
    let seen = probe.finish().await;
    cluster.wait_member(1, true).await;
    cluster.assert_identical().await;
    for index in 0..2 {
        let client = cluster.connect_node(index, "postgres").await;
        let rows = client.query("select n from probe_counter order by id", &[]).await.expect("counters");
        let counters: Vec<i64> = rows.iter().map(|row| row.get(0)).collect();
        assert_eq!(seen.check_counters(&format!("node{index}"), &counters), Vec::<String>::new());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_proxy_is_killed() {
    let cluster = common::cluster();
    let probe = start_probe(&cluster).await;
    cluster.kill_proxy();
    cluster.start_again();
    assert_nothing_lost(&cluster, probe).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_leaders_postgresql_is_killed() {
    let cluster = common::cluster();
    let probe = start_probe(&cluster).await;
    cluster.kill_postgres(0);
    assert_nothing_lost(&cluster, probe).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_leaders_agent_is_killed() {
    let cluster = common::cluster();
    let probe = start_probe(&cluster).await;
    cluster.kill_agent(0);
    cluster.start_again();
    assert_nothing_lost(&cluster, probe).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn everything_is_killed_at_once() {
    let cluster = common::cluster();
    let probe = start_probe(&cluster).await;
    cluster.kill_proxy();
    for index in 0..2 {
        cluster.kill_agent(index);
        cluster.kill_postgres(index);
    }
    cluster.start_again();
    wait_for("clients are served again", async || {
        tokio::time::timeout(Duration::from_secs(5), cluster.connect("postgres")).await.is_ok()
    })
    .await;
    assert_nothing_lost(&cluster, probe).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn taken_down_and_up_again() {
    let cluster = common::cluster();
    let probe = start_probe(&cluster).await;
    let output = common::pgtandem().args(["sandbox", "down", "--dir"]).arg(cluster.dir()).output().expect("pgtandem");
    assert!(output.status.success(), "{}", common::text(&output));
    cluster.start_again();
    assert_nothing_lost(&cluster, probe).await;
}
