//! A follower's PostgreSQL is killed under load, and recovered again and again: no client notices.

mod common;

use common::load;
use pgtandem::sandbox::control;

/// Recoveries in a row.
const RECOVERIES: i64 = 3;

/// A follower that was lost does not come back by itself: these are about recoveries.
async fn cluster_of_those_who_stay_away() -> common::Cluster {
    let cluster = common::cluster();
    cluster.stay_away().await;
    cluster
}

#[tokio::test(flavor = "multi_thread")]
async fn no_client_notices_a_kill_and_the_recoveries() {
    let cluster = cluster_of_those_who_stay_away().await;
    let probe = load::start(&cluster).await;
    cluster.kill_postgres(1);
    cluster.wait_member(1, false).await;
    load::wait_writes(&cluster, &probe, 100).await;
    let (status, _) = cluster.status();
    assert!(status.contains("node1 left the member set"), "{status}");
    assert!(status.contains("next: pgtandem recover node1"), "{status}");

    for round in 0..RECOVERIES {
        let open = cluster.connect("postgres").await;
        let insert = |id: i64, what: &str| format!("insert into probe_open values ({id}, '{what}')");
        open.simple_query(&format!("begin; {}", insert(2 * round, "before"))).await.expect("begin");
        control::recover(&cluster.layout, "node1")
            .await
            .unwrap_or_else(|error| panic!("recovery {round}: {error}\n{}", cluster.logs()));
        open.simple_query(&format!("{}; commit", insert(2 * round + 1, "after"))).await.expect("commit");
        load::wait_writes(&cluster, &probe, 50).await;
    }
    let seen = load::finish(&cluster, probe).await;
    load::assert_unharmed(&cluster, &seen);
    for index in 0..2 {
        let client = cluster.connect_node(index, "postgres").await;
        let rows: i64 = client.query_one("select count(*) from probe_open", &[]).await.expect("rows").get(0);
        assert_eq!(rows, 2 * RECOVERIES, "transactions open across a recovery on node{index}");
    }
    cluster.wait_well().await;
}

/// Kills at another moment of the commits each time.
#[tokio::test(flavor = "multi_thread")]
async fn no_client_notices_kill_after_kill() {
    let cluster = cluster_of_those_who_stay_away().await;
    let probe = load::start(&cluster).await;
    for _ in 0..RECOVERIES {
        cluster.kill_postgres(1);
        load::wait_writes(&cluster, &probe, 50).await;
        cluster.recover(1);
        load::wait_writes(&cluster, &probe, 50).await;
    }
    let seen = load::finish(&cluster, probe).await;
    load::assert_unharmed(&cluster, &seen);
}

/// Each of two that are lost at once would have to be told that the other one has left.
#[tokio::test(flavor = "multi_thread")]
async fn two_followers_are_lost_at_once() {
    let cluster = common::Cluster::up(&["--nodes", "3"]);
    let probe = load::start(&cluster).await;
    for index in [1, 2] {
        cluster.kill_agent(index);
        cluster.kill_postgres(index);
    }
    load::wait_writes(&cluster, &probe, 100).await;
    for index in [1, 2] {
        cluster.wait_member(index, false).await;
        cluster.start_agent(index);
        cluster.recover(index);
    }
    let seen = load::finish(&cluster, probe).await;
    load::assert_unharmed(&cluster, &seen);
    cluster.wait_well().await;
}
