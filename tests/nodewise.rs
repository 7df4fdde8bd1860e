//! Statements outside transactions: databases, indexes built beside the clients' work, settings. The same on every server, also
//! when the proxy or a follower is killed in the middle.

mod common;

use common::ask::{run_all, same, state, value};
use common::{Cluster, wait_for};
use tokio_postgres::Client;
use tokio_postgres::error::SqlState;

/// All databases with what a client can see of them.
const DATABASES: &str =
    "select string_agg(concat_ws(' ', datname, pg_get_userbyid(datdba), pg_encoding_to_char(encoding),
    datcollate, datistemplate, datallowconn, datconnlimit, datacl::text), E'\n' order by datname) from pg_database";
/// All indexes of a database but those of the system, and whether they are valid.
const INDEXES: &str = "select coalesce(string_agg(d || indisvalid, E'\n' order by d), '')
    from (select pg_get_indexdef(indexrelid) d, indisvalid from pg_index where indexrelid >= 16384) i where d !~ 'pg_toast'";

#[tokio::test(flavor = "multi_thread")]
async fn databases_come_and_go_on_three_servers() {
    let cluster = Cluster::up(&["--nodes", "3"]);
    let client = cluster.connect("postgres").await;
    run_all(&client, &["create role bob createdb login", "create database shop owner bob encoding 'UTF8'"]).await;
    let shop = cluster.connect("shop").await;
    run_all(
        &shop,
        &[
            "create table t (id int primary key, v text)",
            "insert into t select i, 'v' || i from generate_series(1, 100) i",
        ],
    )
    .await;
    drop(shop);
    // A copy of a database that has been written to, then both are written to: no mark of the one is taken for one of the other.
    wait_for("the template is left", async || state(&client, "create database copy template shop").await == "ok").await;
    for name in ["shop", "copy"] {
        let client = cluster.connect(name).await;
        for id in 101..120 {
            client.execute("insert into t values ($1, $2)", &[&id, &name]).await.expect("a write");
        }
    }
    run_all(
        &client,
        &[
            "alter database copy connection limit 7",
            "alter database copy set work_mem = '1MB'",
            "create database bare template template0",
        ],
    )
    .await;
    run_all(&cluster.connect("bare").await, &["create table t (id int primary key)", "insert into t values (1)"]).await;
    wait_for("nobody is there", async || state(&client, "alter database copy rename to second").await == "ok").await;
    run_all(&cluster.connect("second").await, &["update t set v = 'renamed' where id = 1"]).await;
    assert!(same(&cluster, "postgres", DATABASES).await.contains("second postgres UTF8"));
    cluster.assert_identical().await;

    // As the owner, and with the errors of a lone server.
    let bob = "set role bob";
    run_all(&client, &[bob, "create database of_bob", "reset role"]).await;
    assert!(same(&cluster, "postgres", DATABASES).await.contains("of_bob bob"));
    assert_eq!(state(&client, "create database shop").await, "42P04");
    assert_eq!(state(&client, "drop database missing").await, "3D000");
    assert_eq!(state(&client, "drop database if exists missing").await, "ok");
    let busy = cluster.connect("shop").await;
    run_all(&busy, &["insert into t values (1000, 'x')"]).await;
    assert_eq!(state(&client, "drop database shop").await, "55006");
    run_all(&client, &["drop database shop with (force)"]).await;
    assert!(busy.batch_execute("select 1").await.is_err());
    wait_for("nobody is there", async || state(&client, "drop database second").await == "ok").await;
    run_all(&client, &["drop database of_bob", "create database shop"]).await;
    assert!(!same(&cluster, "postgres", DATABASES).await.contains("second"));
    run_all(&cluster.connect("shop").await, &["create table t (id int primary key)", "insert into t values (1)"]).await;
    cluster.assert_identical().await;
    cluster.wait_well().await;
    // Everything that is new goes through a new epoch, too.
    cluster.kill_proxy();
    cluster.start_again();
    run_all(&cluster.connect("shop").await, &["insert into t values (2)"]).await;
    cluster.assert_identical().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn in_a_block_the_server_says_that_it_can_not_be() {
    let cluster = common::cluster();
    let client = cluster.connect("postgres").await;
    run_all(&client, &["create table t (id int primary key)", "create index i on t (id)"]).await;
    let outside = SqlState::ACTIVE_SQL_TRANSACTION;
    for sql in [
        "create database x",
        "drop database x",
        "create index concurrently j on t (id)",
        "drop index concurrently i",
        "reindex table concurrently t",
        "reindex schema public",
        "alter system set work_mem = '1MB'",
        "vacuum t",
        "vacuum full t",
        "cluster",
    ] {
        for text in [format!("begin; {sql}; commit"), format!("select 1; {sql}"), format!("{sql}; select 1")] {
            let error = client.batch_execute(&text).await.expect_err(&text);
            assert_eq!(error.code(), Some(&outside), "{text}: {error:?}");
            run_all(&client, &["rollback"]).await;
        }
    }
    // Refused with a sentence, and nothing is left of it.
    for sql in [
        "create database x tablespace fast",
        "create database x template postgres",
        "drop database postgres",
        "create tablespace fast location '/fast'",
        "alter system set port = 1",
        "alter database postgres rename to x",
        "commit prepared 'pgtandem:x:1:1:1'",
    ] {
        assert_eq!(state(&client, sql).await, "0A000", "{sql}");
    }
    run_all(&client, &["insert into t values (1)"]).await;
    same(&cluster, "postgres", DATABASES).await;
    cluster.assert_identical().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn indexes_are_built_and_dropped_beside_the_clients_work() {
    let cluster = common::cluster();
    let client = cluster.connect("postgres").await;
    run_all(
        &client,
        &[
            "create table t (id int primary key, k int, v text)",
            "insert into t select i, i, 'v' from generate_series(1, 2000) i",
            "create schema s",
            "create table s.u (id int)",
            "set search_path = s, public",
        ],
    )
    .await;
    let port = cluster.layout.proxy_port();
    let writer = pgtandem::sandbox::compare::connect(port, "postgres").await.expect("a client");
    let stop = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
    let stopped = std::sync::Arc::clone(&stop);
    let writing = tokio::spawn(async move {
        let mut n = 0;
        while !stopped.load(std::sync::atomic::Ordering::Relaxed) {
            n += 1;
            let sql = format!(
                "insert into t values ({0}, {0}, 'new'); update t set v = 'x' where id = {1}; delete from t where id = {0}",
                10_000 + n,
                1 + n % 2000
            );
            writer.batch_execute(&sql).await.expect("a write beside it");
        }
        n
    });
    run_all(
        &client,
        &[
            "create index concurrently on u (id)",
            "create unique index concurrently by_k on t (k)",
            "create index concurrently if not exists by_k on t (k)",
            "create index concurrently part on t (v) where k > 100",
            "reindex index concurrently by_k",
            "reindex table concurrently t",
            "drop index concurrently part",
            "vacuum full t",
            "reindex table t",
        ],
    )
    .await;
    // By the extended protocol, as drivers do.
    client.execute("create index concurrently by_v on t (v)", &[]).await.expect("an index");
    client
        .execute("insert into t values (1, 1, 'y') on conflict (k) do update set v = excluded.v", &[])
        .await
        .expect("an arbiter");
    stop.store(true, std::sync::atomic::Ordering::Relaxed);
    assert!(writing.await.expect("the writer") > 0);
    // What fails leaves no invalid index, on no server.
    run_all(&client, &["insert into u values (1), (1)"]).await;
    assert_eq!(state(&client, "create unique index concurrently twice on u (id)").await, "23505");
    let indexes = same(&cluster, "postgres", INDEXES).await;
    for name in ["by_k", "by_v", "u_id_idx"] {
        assert!(indexes.contains(name), "{name} is not in {indexes}");
    }
    assert!(!indexes.contains("twice") && !indexes.contains("part") && !indexes.contains("ccnew"), "{indexes}");
    assert_eq!(same(&cluster, "postgres", "select count(*) from pg_index where not indisvalid").await, "0");
    cluster.assert_identical().await;
    cluster.wait_well().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn settings_of_the_server_are_set_on_every_server() {
    let cluster = common::cluster();
    let client = cluster.connect("postgres").await;
    let setting = "select setting from pg_settings where name = 'work_mem'";
    let before = same(&cluster, "postgres", setting).await;
    run_all(
        &client,
        &["alter system set work_mem = '7MB'", "alter system set log_statement to 'ddl'", "select pg_reload_conf()"],
    )
    .await;
    for index in 0..2 {
        wait_for("the server has read it", async || {
            value(&cluster.connect_node(index, "postgres").await, setting).await == "7168"
        })
        .await;
    }
    let files =
        "select string_agg(name || setting, ' ' order by name) from pg_file_settings where sourcefile ~ 'auto.conf'";
    assert_eq!(same(&cluster, "postgres", files).await, "log_statementddl work_mem7MB");
    assert_eq!(state(&client, "alter system set work_mem = 'much'").await, "22023");
    run_all(&client, &["alter system reset all", "select pg_reload_conf()"]).await;
    assert_eq!(same(&cluster, "postgres", files).await, "");
    for index in 0..2 {
        wait_for("the server has read it", async || {
            value(&cluster.connect_node(index, "postgres").await, setting).await == before
        })
        .await;
    }
    cluster.wait_well().await;
}

fn spawn(client: Client, sql: &'static str) -> tokio::task::JoinHandle<Result<(), tokio_postgres::Error>> {
    tokio::spawn(async move { client.batch_execute(sql).await })
}

/// A statement that the leader has done and the follower waits with, for a lock that somebody holds there.
struct Halfway {
    statement: tokio::task::JoinHandle<Result<(), tokio_postgres::Error>>,
    lock: Client,
}

async fn halfway(cluster: &Cluster, lock: &str, statement: &'static str) -> Halfway {
    let locker = cluster.connect_node(1, "postgres").await;
    run_all(&locker, &["begin", lock]).await;
    let statement = spawn(cluster.connect("postgres").await, statement);
    wait_for("the follower waits for the lock", async || {
        let waits = "select count(*) from pg_stat_activity where wait_event_type = 'Lock' and usename = 'pgtandem'";
        value(&cluster.connect_node(1, "postgres").await, waits).await == "1"
    })
    .await;
    Halfway { statement, lock: locker }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_builds_on_it_waits_until_followers_have_it() {
    let cluster = common::cluster();
    let client = cluster.connect("postgres").await;
    run_all(&client, &["create table t (id int primary key, k int, v int)", "insert into t values (1, 1, 1)"]).await;
    let lock = "lock table t in share update exclusive mode";
    let halfway = halfway(&cluster, lock, "create unique index concurrently by_k on t (k)").await;
    // The leader has the index, the follower does not: an arbiter, whose row goes to the follower by its key, a definition
    // on top of it, and a write that needs none.
    let upsert =
        spawn(cluster.connect("postgres").await, "insert into t values (2, 1, 2) on conflict (k) do update set v = 2");
    let drop_index = spawn(
        cluster.connect("postgres").await,
        "begin; alter index by_k rename to kept; create table after (id int); commit",
    );
    run_all(&client, &["insert into t values (3, 3, 3)"]).await;
    assert!(!halfway.statement.is_finished(), "the index");
    assert!(!drop_index.is_finished(), "what builds on the index");
    run_all(&halfway.lock, &["commit"]).await;
    for task in [halfway.statement, upsert, drop_index] {
        task.await.expect("a task").unwrap_or_else(|error| panic!("{error:?}\n{}", cluster.logs()));
    }
    assert!(same(&cluster, "postgres", INDEXES).await.contains("kept"));
    cluster.assert_identical().await;
    cluster.wait_well().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_proxy_is_killed_between_the_leader_and_a_follower() {
    let cluster = common::cluster();
    let client = cluster.connect("postgres").await;
    run_all(
        &client,
        &["create table t (id int primary key, v int)", "insert into t values (1, 1)", "create database old"],
    )
    .await;
    run_all(&cluster.connect("old").await, &["create table t (id int primary key)", "insert into t values (1)"]).await;
    let databases = "lock table pg_database in exclusive mode";
    let table = "lock table t in share update exclusive mode";
    for (lock, statement) in [
        (databases, "create database fresh template old"),
        (databases, "alter database old rename to older"),
        (databases, "drop database older"),
        (table, "create index concurrently by_v on t (v)"),
        (table, "drop index concurrently by_v"),
    ] {
        let halfway = halfway(&cluster, lock, statement).await;
        cluster.kill_proxy();
        assert!(halfway.statement.await.expect("a task").is_err(), "{statement}");
        drop(halfway.lock);
        cluster.start_again();
        cluster.wait_member(1, true).await;
        cluster.connect("postgres").await.batch_execute("update t set v = v + 1 where id = 1").await.expect("a write");
        // Indexes are gone on with beside the clients: a definition waits for them.
        run_all(&cluster.connect("postgres").await, &["create table x (id int)", "drop table x"]).await;
        same(&cluster, "postgres", DATABASES).await;
        same(&cluster, "postgres", INDEXES).await;
        assert_eq!(same(&cluster, "postgres", "select count(*) from pgtandem.intent").await, "0");
        cluster.assert_identical().await;
    }
    let databases = same(&cluster, "postgres", DATABASES).await;
    assert!(databases.contains("fresh") && !databases.contains("old"), "{databases}");
    run_all(&cluster.connect("fresh").await, &["insert into t values (2)"]).await;
    cluster.assert_identical().await;
    cluster.wait_well().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_follower_that_is_killed_in_the_middle_leaves_and_comes_back() {
    let cluster = common::cluster();
    let client = cluster.connect("postgres").await;
    run_all(&client, &["create table t (id int primary key, v int)", "insert into t values (1, 1)"]).await;
    for (lock, statement) in [
        ("lock table pg_database in exclusive mode", "create database fresh"),
        ("lock table t in share update exclusive mode", "create index concurrently by_v on t (v)"),
    ] {
        let halfway = halfway(&cluster, lock, statement).await;
        cluster.kill_postgres(1);
        halfway.statement.await.expect("a task").unwrap_or_else(|error| panic!("{statement}: {error:?}"));
        drop(halfway.lock);
        cluster.wait_member(1, false).await;
        run_all(&client, &["update t set v = v + 1 where id = 1"]).await;
        cluster.recover(1);
        same(&cluster, "postgres", DATABASES).await;
        same(&cluster, "postgres", INDEXES).await;
        run_all(&cluster.connect("fresh").await, &["create table if not exists u (id int)"]).await;
        cluster.assert_identical().await;
    }
    cluster.wait_well().await;
}
