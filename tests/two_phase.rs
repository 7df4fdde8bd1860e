//! Two-phase commit by clients: the same name on every server, the same end everywhere, whatever dies in between.

mod common;

use common::Cluster;
use common::ask::{run_all, same, state};

const PREPARED: &str = "select coalesce(string_agg(gid || ' ' || owner || ' ' || database, E'\n' order by gid), '') from pg_prepared_xacts";

async fn rows(cluster: &Cluster) -> String {
    same(cluster, "postgres", "select coalesce(string_agg(id || ' ' || v, ', ' order by id), '') from t").await
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_client_prepares_has_its_name_and_its_end_on_every_server() {
    let cluster = Cluster::up(&["--nodes", "3"]);
    let client = cluster.connect("postgres").await;
    run_all(&client, &["create table t (id int primary key, v int)", "create role bob", "insert into t values (1, 1)"])
        .await;
    run_all(
        &client,
        &["begin; update t set v = 2 where id = 1; insert into t values (2, 2); prepare transaction 'it''s one'"],
    )
    .await;
    assert_eq!(same(&cluster, "postgres", PREPARED).await, "it's one postgres postgres");
    assert_eq!(rows(&cluster).await, "1 1");
    // The name is taken, the row is locked; another session, and the same one, go on meanwhile.
    let other = cluster.connect("postgres").await;
    assert_eq!(state(&other, "begin; insert into t values (9, 9); prepare transaction 'it''s one'").await, "42710");
    run_all(&other, &["rollback"]).await;
    assert_eq!(state(&other, "set lock_timeout = 100; update t set v = 3 where id = 1").await, "55P03");
    run_all(&client, &["insert into t values (3, 3)"]).await;
    assert_eq!(state(&other, "begin; commit prepared 'it''s one'").await, "25001");
    run_all(&other, &["rollback", "set role bob"]).await;
    assert_eq!(state(&other, "commit prepared 'it''s one'").await, "42501");
    assert_eq!(state(&other, "rollback prepared 'it''s one'").await, "42501");
    run_all(&other, &["reset role", "commit prepared 'it''s one'"]).await;
    assert_eq!(rows(&cluster).await, "1 2, 2 2, 3 3");
    assert_eq!(state(&other, "commit prepared 'it''s one'").await, "42704");

    // By the extended protocol; the same name again; rolled back.
    for sql in ["begin", "delete from t where id = 1", "prepare transaction 'it''s one'"] {
        client.execute(sql, &[]).await.unwrap_or_else(|error| panic!("{sql}: {error:?}"));
    }
    assert!(same(&cluster, "postgres", PREPARED).await.contains("it's one"));
    client.execute("rollback prepared 'it''s one'", &[]).await.expect("rolled back");
    assert_eq!(rows(&cluster).await, "1 2, 2 2, 3 3");
    for sql in ["begin", "update t set v = 7 where id = 1", "prepare transaction 'x'"] {
        client.execute(sql, &[]).await.unwrap_or_else(|error| panic!("{sql}: {error:?}"));
    }
    client.execute("commit prepared 'x'", &[]).await.expect("committed");
    assert_eq!(rows(&cluster).await, "1 7, 2 2, 3 3");

    // Of a role that is no superuser, who may finish its own.
    run_all(
        &client,
        &["grant all on t to bob; set role bob", "begin; insert into t values (4, 4); prepare transaction 'bob''s'"],
    )
    .await;
    assert_eq!(same(&cluster, "postgres", PREPARED).await, "bob's bob postgres");
    run_all(&client, &["commit prepared 'bob''s'", "delete from t where id = 4", "reset role"]).await;

    // What is in it: nothing, a definition, a serializable transaction.
    run_all(&client, &[
        "begin; select count(*) from t; prepare transaction 'empty'",
        "begin; create table u (id int primary key, v text default 'd'); insert into u values (1); prepare transaction 'ddl'",
        "begin isolation level serializable; update t set v = 8 where id = 2; prepare transaction 'ser'",
    ])
    .await;
    assert_eq!(same(&cluster, "postgres", PREPARED).await.lines().count(), 3);
    run_all(
        &client,
        &[
            "create table n (id serial primary key)",
            "begin; insert into n select from generate_series(1, 5); prepare transaction 'n'",
            "rollback prepared 'n'",
            "insert into n default values",
        ],
    )
    .await;
    assert_eq!(state(&client, "select * from u").await, "42P01");
    run_all(
        &client,
        &["commit prepared 'ddl'", "insert into u values (2)", "commit prepared 'empty'", "commit prepared 'ser'"],
    )
    .await;
    assert_eq!(rows(&cluster).await, "1 7, 2 8, 3 3");

    // What can not be prepared is gone everywhere, with the server's reason.
    for sql in
        ["create temp table w (id int); insert into t values (20, 1)", "listen news; insert into t values (21, 1)"]
    {
        assert_eq!(state(&client, &format!("begin; {sql}; prepare transaction 'not'")).await, "0A000", "{sql}");
        run_all(&client, &["rollback"]).await;
    }
    assert_eq!(state(&client, "begin; insert into t values (1, 1); prepare transaction 'not'").await, "23505");
    run_all(&client, &["rollback", "begin"]).await;
    assert_eq!(state(&client, "insert into t values (1, 1)").await, "23505");
    // PostgreSQL rolls a failed one back, and says so.
    run_all(&client, &["prepare transaction 'not'"]).await;
    for sql in ["begin; prepare transaction 'pgtandem:x:1:1:1'", "commit prepared 'pgtandem:x:1:1:1'"] {
        assert_eq!(state(&client, sql).await, "0A000");
        run_all(&client, &["rollback"]).await;
    }
    assert_eq!(same(&cluster, "postgres", PREPARED).await, "");
    assert_eq!(same(&cluster, "postgres", "select count(*) from pgtandem.prepared").await, "0");
    cluster.assert_identical().await;
    cluster.wait_well().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_open_survives_and_what_was_decided_is_finished() {
    let cluster = common::cluster();
    let client = cluster.connect("postgres").await;
    run_all(&client, &["create table t (id int primary key, v int)"]).await;
    for (id, gid) in [(1, "open"), (2, "committed"), (3, "rolled back"), (4, "later")] {
        run_all(&client, &[&format!("begin; insert into t values ({id}, 0); prepare transaction '{gid}'")]).await;
    }
    let open = same(&cluster, "postgres", PREPARED).await;
    // A recovery would copy it without its end.
    let output = cluster.command(&["recover", "node1", "--yes"]);
    assert!(!output.status.success() && common::text(&output).contains("COMMIT PREPARED"), "{}", common::text(&output));
    cluster.kill_proxy();
    cluster.start_again();
    assert_eq!(same(&cluster, "postgres", PREPARED).await, open);
    // The proxy dies after the leader has decided and before the follower knows.
    cluster.kill_proxy();
    let leader = cluster.connect_node(0, "postgres").await;
    run_all(&leader, &["commit prepared 'committed'", "rollback prepared 'rolled back'"]).await;
    cluster.start_again();
    assert_eq!(same(&cluster, "postgres", PREPARED).await, "later postgres postgres\nopen postgres postgres");
    assert_eq!(rows(&cluster).await, "2 0");
    // So does the leader's PostgreSQL: what is open is open at the next one.
    let client = cluster.connect("postgres").await;
    cluster.kill_postgres(0);
    run_all(&client, &["insert into t values (5, 5)", "commit prepared 'open'", "rollback prepared 'later'"]).await;
    assert_eq!(cluster.leader(), 1);
    cluster.recover_all().await;
    assert_eq!(same(&cluster, "postgres", PREPARED).await, "");
    assert_eq!(rows(&cluster).await, "1 0, 2 0, 5 5");
    assert_eq!(same(&cluster, "postgres", "select count(*) from pgtandem.prepared").await, "0");
    // Their marks are used again, and counted on.
    for id in 10..20 {
        run_all(
            &client,
            &[&format!("begin; insert into t values ({id}, 0); prepare transaction 'g'"), "commit prepared 'g'"],
        )
        .await;
    }
    cluster.assert_identical().await;
    cluster.recover(0);
    cluster.assert_identical().await;
    cluster.wait_well().await;
}
