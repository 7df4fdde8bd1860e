//! A follower's PostgreSQL is killed under load, and recovered again and again: no client notices.

mod common;

use std::time::Duration;

use common::{Cluster, LIMIT};
use pgtandem::sandbox::control;
use pgtandem::sandbox::probe::{self, Probe, Seen, Settings};

const WRITERS: usize = 4;
/// Recoveries in a row.
const RECOVERIES: i64 = 3;

async fn start_probe(cluster: &Cluster) -> Probe {
    let port = cluster.layout.proxy_port();
    probe::prepare(port, "postgres", WRITERS).await.expect("the probe's tables");
    let settings = Settings {
        port,
        database: "postgres".into(),
        writers: WRITERS,
        readers: 2,
        health_check: Some(Duration::from_millis(100)),
    };
    Probe::start(&settings).await.expect("the probe connects")
}

/// Nobody saw an error, and every server has exactly what was acknowledged.
async fn assert_unharmed(cluster: &Cluster, seen: &Seen) {
    assert_eq!(seen.errors(), 0, "{:#?}\n{}", seen.first_errors(10), cluster.logs());
    assert_eq!(seen.disconnects(), 0);
    cluster.assert_identical().await;
    for index in 0..2 {
        let client = cluster.connect_node(index, "postgres").await;
        let rows = client.query("select n from probe_counter order by id", &[]).await.expect("counters");
        let counters: Vec<i64> = rows.iter().map(|row| row.get(0)).collect();
        assert_eq!(seen.check_counters(&format!("node{index}"), &counters), Vec::<String>::new());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn no_client_notices_a_kill_and_the_recoveries() {
    let cluster = common::cluster();
    let probe = start_probe(&cluster).await;
    assert!(probe.wait_writes(100, LIMIT).await, "no writes\n{}", cluster.logs());

    cluster.kill_postgres(1);
    cluster.wait_member(1, false).await;
    assert!(probe.wait_writes(100, LIMIT).await, "no writes without node1\n{}", cluster.logs());

    for round in 0..RECOVERIES {
        let open = cluster.connect("postgres").await;
        let insert = |id: i64, what: &str| format!("insert into probe_open values ({id}, '{what}')");
        open.simple_query(&format!("begin; {}", insert(2 * round, "before"))).await.expect("begin");
        control::recover(&cluster.layout, "node1")
            .await
            .unwrap_or_else(|error| panic!("recovery {round}: {error}\n{}", cluster.logs()));
        open.simple_query(&format!("{}; commit", insert(2 * round + 1, "after"))).await.expect("commit");
        assert!(probe.wait_writes(50, LIMIT).await, "no writes after recovery {round}\n{}", cluster.logs());
    }
    let seen = probe.finish().await;
    assert_unharmed(&cluster, &seen).await;
    for index in 0..2 {
        let client = cluster.connect_node(index, "postgres").await;
        let rows: i64 = client.query_one("select count(*) from probe_open", &[]).await.expect("rows").get(0);
        assert_eq!(rows, 2 * RECOVERIES, "transactions open across a recovery on node{index}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_that_is_killed_is_a_node_that_left() {
    let cluster = common::cluster();
    let probe = start_probe(&cluster).await;
    assert!(probe.wait_writes(50, LIMIT).await);
    cluster.kill_agent(1);
    assert!(probe.wait_writes(200, LIMIT).await, "no writes without node1's agent\n{}", cluster.logs());
    cluster.start_again();
    cluster.recover(1);
    assert!(probe.wait_writes(50, LIMIT).await);
    let seen = probe.finish().await;
    assert_unharmed(&cluster, &seen).await;
}
