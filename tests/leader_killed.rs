//! The leader's PostgreSQL, or a backend of it, is killed under load: a COMMIT under way is answered only from its mark, and both servers
//! hold exactly what was acknowledged.

mod common;

use common::{Cluster, load};

/// Kills in a row.
const KILLS: usize = 3;
/// Sessions that are ended one by one while they write.
const TERMINATIONS: usize = 60;

async fn epoch(cluster: &Cluster) -> i64 {
    let client = cluster.connect_node(cluster.leader(), "postgres").await;
    client.query_one("select epoch from pgtandem.epoch", &[]).await.expect("the epoch").get(0)
}

/// Process ids of the leader's backends that serve clients of the proxy.
async fn backends(cluster: &Cluster) -> Vec<i32> {
    let client = cluster.connect_node(cluster.leader(), "postgres").await;
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
        cluster.kill_postgres(cluster.leader());
        load::wait_writes(&cluster, &probe, 50).await;
        assert!(epoch(&cluster).await > before, "no new epoch");
        let seen = load::finish(&cluster, probe).await;
        // Transactions of several statements that were open.
        load::assert_errors(&seen, &["ERROR 40001"]);
        assert_eq!(seen.disconnects(), 0, "{:#?}\n{}", seen.first_errors(10), cluster.logs());
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
        let seen = load::finish(&cluster, probe).await;
        load::assert_errors(&seen, &load::LEADER_LOST);
    }
    cluster.wait_well().await;
}

/// There is no other member: its own restart is waited for, and sessions go on at what it is then.
#[tokio::test(flavor = "multi_thread")]
async fn a_lone_leader_comes_back_and_sessions_go_on() {
    let cluster = common::cluster();
    let detached = cluster.command(&["detach", "node1", "--yes"]);
    assert!(detached.status.success(), "{}", common::text(&detached));
    let (idle, open) = (cluster.connect("postgres").await, cluster.connect("postgres").await);
    idle.batch_execute("set work_mem = '7MB'").await.expect("a setting");
    open.batch_execute("begin; create table never (i int)").await.expect("a table");
    let before = epoch(&cluster).await;
    cluster.kill_postgres(0);
    let work_mem: String = idle.query_one("show work_mem", &[]).await.expect("it goes on").get(0);
    assert_eq!(work_mem, "7MB");
    assert!(epoch(&cluster).await > before);
    let error = open.batch_execute("insert into never values (1)").await.expect_err("its transaction is lost");
    assert_eq!(error.code().map(tokio_postgres::error::SqlState::code), Some("40001"), "{error}");
    open.batch_execute("rollback").await.expect("the connection stays");
    let tables: i64 = open
        .query_one("select count(*) from pg_class where relname = 'never'", &[])
        .await
        .expect("the leader serves again")
        .get(0);
    assert_eq!(tables, 0);
    cluster.recover(1);
    cluster.wait_well().await;
}
