//! The leader's PostgreSQL is lost under load and comes back: sessions end with 57P01, a COMMIT under way is answered only
//! from its mark, and both servers hold exactly what was acknowledged.

mod common;

use common::{Cluster, load};

/// Kills in a row.
const KILLS: usize = 3;
/// Sessions that are ended one by one while they write.
const TERMINATIONS: usize = 60;

async fn epoch(cluster: &Cluster) -> i64 {
    let client = cluster.connect_node(0, "postgres").await;
    client.query_one("select epoch from pgtandem.epoch", &[]).await.expect("the epoch").get(0)
}

/// Process ids of the leader's backends that serve clients of the proxy.
async fn backends(cluster: &Cluster) -> Vec<i32> {
    let client = cluster.connect_node(0, "postgres").await;
    let sql = "select pid from pg_stat_activity where backend_type = 'client backend' and usename = 'postgres'
               and client_addr is null and query like '%probe_%' order by random()";
    client.query(sql, &[]).await.expect("backends").iter().map(|row| row.get(0)).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn its_postmaster_is_killed() {
    let cluster = common::cluster();
    for _ in 0..KILLS {
        let probe = load::start(&cluster).await;
        let before = epoch(&cluster).await;
        cluster.kill_postgres(0);
        load::wait_writes(&cluster, &probe, 50).await;
        assert!(epoch(&cluster).await > before, "no new epoch");
        let seen = load::finish(&cluster, probe).await;
        assert!(seen.disconnects() > 0);
        load::assert_errors(&seen, &load::LEADER_LOST);
    }
    cluster.wait_well().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn one_of_its_backends_is_killed() {
    let cluster = common::cluster();
    for _ in 0..KILLS {
        let probe = load::start(&cluster).await;
        let pid = backends(&cluster).await.into_iter().next().and_then(rustix::process::Pid::from_raw).expect("a pid");
        rustix::process::kill_process(pid, rustix::process::Signal::KILL).expect("kill -9");
        load::wait_writes(&cluster, &probe, 50).await;
        let seen = load::finish(&cluster, probe).await;
        load::assert_errors(&seen, &load::LEADER_LOST);
    }
    cluster.wait_well().await;
}

/// Each termination hits another moment of a commit.
#[tokio::test(flavor = "multi_thread")]
async fn sessions_are_terminated_one_by_one() {
    let cluster = common::cluster();
    let probe = load::start(&cluster).await;
    let before = epoch(&cluster).await;
    let client = cluster.connect_node(0, "postgres").await;
    for _ in 0..TERMINATIONS {
        if let Some(pid) = backends(&cluster).await.first() {
            client.execute("select pg_terminate_backend($1)", &[pid]).await.expect("pg_terminate_backend");
        }
        load::wait_writes(&cluster, &probe, 3).await;
    }
    assert_eq!(epoch(&cluster).await, before, "the leader was never lost");
    let seen = load::finish(&cluster, probe).await;
    load::assert_errors(&seen, &load::LEADER_LOST);
}

#[tokio::test(flavor = "multi_thread")]
async fn it_is_lost_together_with_its_follower() {
    let cluster = common::cluster();
    for _ in 0..KILLS {
        let probe = load::start(&cluster).await;
        cluster.kill_postgres(0);
        cluster.kill_postgres(1);
        load::wait_writes(&cluster, &probe, 50).await;
        if !cluster.status().0.contains("All is well") {
            cluster.recover(1);
        }
        let seen = load::finish(&cluster, probe).await;
        load::assert_errors(&seen, &load::LEADER_LOST);
    }
    cluster.wait_well().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_idle_session_and_one_in_a_transaction_hear_why_they_end() {
    let cluster = common::cluster();
    let settings = format!("host=127.0.0.1 port={} user=postgres dbname=postgres", cluster.layout.proxy_port());
    let mut sessions = Vec::new();
    for first in ["select 1", "begin; create table never (i int)", "select nonsense"] {
        let (client, connection) = tokio_postgres::connect(&settings, tokio_postgres::NoTls).await.expect("a session");
        let connection = tokio::spawn(connection);
        // The last one fails, and goes on.
        let _ = client.simple_query(first).await;
        sessions.push((client, connection));
    }
    cluster.kill_postgres(0);
    common::wait_for("status says that nobody is served, or the leader is back", async || {
        let (status, _) = cluster.status();
        status.contains("no client is served: ") || status.contains("epoch 2,")
    })
    .await;
    for (_client, connection) in sessions {
        let error = connection.await.expect("no panic").expect_err("the session ends");
        assert_eq!(error.code().map(tokio_postgres::error::SqlState::code), Some("57P01"), "{error}");
    }
    let client = cluster.connect("postgres").await;
    let tables: i64 = client
        .query_one("select count(*) from pg_class where relname = 'never'", &[])
        .await
        .expect("the leader serves again")
        .get(0);
    assert_eq!(tables, 0);
    cluster.wait_well().await;
}
