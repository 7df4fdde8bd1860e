//! SERIALIZABLE, and what else depends on the moment of the first snapshot: what a client sees is what a lone server would show,
//! and the servers stay identical, whoever is killed.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test that panics has failed")]

mod common;

use common::ask::{run, same, value};
use common::{Cluster, load};
use futures_util::{SinkExt as _, TryStreamExt as _};
use tokio_postgres::{Client, Error};

const WRITERS: usize = 16;
const TRANSACTIONS: usize = 25;

fn sqlstate(error: &Error) -> &str {
    error.code().unwrap_or_else(|| panic!("no SQLSTATE: {error}")).code()
}

async fn refused(client: &Client, text: &str, expected: &str) -> String {
    let error = client.batch_execute(text).await.expect_err("an error");
    assert_eq!(sqlstate(&error), expected, "{text}: {error:?}");
    error.as_db_error().unwrap().message().to_owned()
}

/// What a test left behind is the same everywhere.
async fn prepared_on(cluster: &Cluster, index: usize) -> String {
    let client = cluster.connect_node(index, "postgres").await;
    value(&client, "select count(*) from pg_prepared_xacts").await
}

#[tokio::test(flavor = "multi_thread")]
async fn writers_of_disjoint_tables_never_hinder_each_other() {
    let cluster = common::cluster();
    let setup = cluster.connect("postgres").await;
    for table in 0..WRITERS {
        run(
            &setup,
            &format!("create table own{table} (id int primary key, v int); insert into own{table} values (1, 0)"),
        )
        .await;
    }
    let writers: Vec<_> = (0..WRITERS)
        .map(|table| {
            let port = cluster.layout.proxy_port();
            tokio::spawn(async move {
                let client = pgtandem::sandbox::compare::connect(port, "postgres").await.unwrap();
                for n in 0..TRANSACTIONS {
                    run(&client, "begin isolation level serializable").await;
                    run(&client, &format!("select sum(v) from own{table}")).await;
                    client.execute(&format!("update own{table} set v = v + 1 where id = $1"), &[&1]).await.unwrap();
                    run(&client, &format!("insert into own{table} values ({}, {n})", n + 2)).await;
                    run(&client, "commit").await;
                }
            })
        })
        .collect();
    for writer in writers {
        writer.await.expect("no error");
    }
    assert_eq!(value(&setup, "select v from own7 where id = 1").await, TRANSACTIONS.to_string());
    cluster.assert_identical().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn as_on_one_server() {
    let cluster = common::cluster();
    let (a, b) = (cluster.connect("postgres").await, cluster.connect("postgres").await);
    run(&a, "create table t (id int primary key, v int); insert into t values (1, 10), (2, 10), (3, 0)").await;

    // Write skew: each reads both and changes one.
    for client in [&a, &b] {
        run(client, "begin isolation level serializable").await;
        assert_eq!(value(client, "select sum(v) from t where id < 3").await, "20");
    }
    run(&a, "update t set v = v - 15 where id = 1").await;
    run(&b, "update t set v = v - 15 where id = 2").await;
    let results = [a.batch_execute("commit").await, b.batch_execute("commit").await];
    let failed: Vec<_> = results.iter().filter_map(|r| r.as_ref().err()).map(sqlstate).collect();
    assert_eq!(failed, ["40001"]);
    assert_eq!(value(&a, "select sum(v) from t where id < 3").await, "5");
    cluster.assert_identical().await;

    // By default, and single statements, too.
    run(&a, "set default_transaction_isolation = 'serializable'").await;
    run(&a, "update t set v = 1 where id = 1").await;
    a.execute("update t set v = $1 where id = 1", &[&2]).await.unwrap();
    run(&a, "begin isolation level read committed; update t set v = 3 where id = 1; commit").await;
    // Back at the default: what can not be prepared is refused, and nothing of it is left.
    let message = refused(&a, "update t set v = 4 where id = 1; notify news", "0A000").await;
    assert!(message.contains("SERIALIZABLE"), "{message}");
    assert_eq!(value(&a, "select v from t where id = 1").await, "3");
    run(&a, "begin; create temp table mine (i int); insert into mine values (1); insert into t values (100, 1)").await;
    refused(&a, "commit", "0A000").await;
    assert_eq!(value(&a, "select count(*) from t").await, "3");
    run(&a, "reset default_transaction_isolation").await;
    run(&a, "update t set v = 5 where id = 1; notify news").await;

    // A role that was local to the transaction prepared it.
    run(&a, "create role helper; grant all on t to helper").await;
    run(&a, "begin isolation level serializable; set local role helper; update t set v = 6 where id = 1; commit").await;
    assert_eq!(value(&a, "select current_user || v from t where id = 1").await, "postgres6");

    // AND CHAIN keeps the modes.
    run(&a, "begin isolation level serializable, deferrable; update t set v = 7 where id = 1; commit and chain").await;
    assert_eq!(value(&a, "show transaction_isolation").await, "serializable");
    assert_eq!(value(&a, "show transaction_deferrable").await, "on");
    run(&a, "update t set v = 8 where id = 1").await;
    run(&a, "rollback and chain").await;
    assert_eq!(value(&a, "show transaction_isolation").await, "serializable");
    run(&a, "commit").await;
    assert_eq!(
        value(&a, "select v || current_setting('transaction_isolation') from t where id = 1").await,
        "7read committed"
    );

    // Only reads: waits for a snapshot that is safe.
    run(&b, "begin isolation level serializable; update t set v = 9 where id = 3").await;
    let port = cluster.layout.proxy_port();
    let reader = tokio::spawn(async move {
        let client = pgtandem::sandbox::compare::connect(port, "postgres").await.unwrap();
        run(&client, "begin isolation level serializable read only deferrable").await;
        let seen = value(&client, "select v from t where id = 3").await;
        run(&client, "commit").await;
        seen
    });
    let watch = cluster.connect_node(0, "postgres").await;
    common::wait_for("the reader waits for a safe snapshot", async || {
        value(&watch, "select count(*) from pg_stat_activity where wait_event = 'SafeSnapshot'").await == "1"
    })
    .await;
    run(&b, "commit").await;
    // It keeps the snapshot that has become safe.
    assert_eq!(reader.await.unwrap(), "0");

    // Constraints that are checked at the end, and definitions.
    run(&a, "begin isolation level serializable; create table child (id int primary key, t int references t deferrable initially deferred)").await;
    run(&a, "insert into child values (1, 1); commit").await;
    run(&a, "begin isolation level serializable; insert into child values (2, 77)").await;
    refused(&a, "commit", "23503").await;
    assert_eq!(value(&a, "select count(*) from child").await, "1");
    cluster.assert_identical().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_first_snapshot_is_taken_when_a_lone_server_would() {
    let cluster = common::cluster();
    let (a, b) = (cluster.connect("postgres").await, cluster.connect("postgres").await);
    run(&a, "create table t (id int primary key, v int); insert into t values (1, 10), (2, 10)").await;
    let watch = cluster.connect_node(0, "postgres").await;

    // Modes may be set until the first query; settings are none.
    for before in
        ["set local work_mem = '8MB'", "set local role postgres", "show work_mem", "lock table t in share mode"]
    {
        for modes in ["", " read write"] {
            run(&a, &format!("begin{modes}")).await;
            run(&a, before).await;
            run(&a, "set transaction isolation level serializable").await;
            assert_eq!(value(&a, "select current_setting('transaction_isolation')").await, "serializable");
            run(&a, "update t set v = v + 1 where id = 1").await;
            run(&a, "commit").await;
        }
    }

    // LOCK TABLE waits, and what is read then is what its holder left.
    for level in ["repeatable read", "serializable"] {
        run(&b, "begin; lock table t in exclusive mode").await;
        let old = value(&b, "select v from t where id = 2").await;
        let port = cluster.layout.proxy_port();
        let reader = tokio::spawn(async move {
            let client = pgtandem::sandbox::compare::connect(port, "postgres").await.unwrap();
            run(&client, &format!("begin isolation level {level}")).await;
            run(&client, "lock table t in share row exclusive mode").await;
            let seen = value(&client, "select v from t where id = 2").await;
            run(&client, "update t set v = v + 1 where id = 2; commit").await;
            seen
        });
        common::wait_for("the reader waits for the lock", async || {
            value(&watch, "select count(*) from pg_locks where not granted").await == "1"
        })
        .await;
        run(&b, "update t set v = v + 1 where id = 2; commit").await;
        assert_eq!(reader.await.unwrap(), (old.parse::<i32>().unwrap() + 1).to_string(), "{level}");
    }

    // A function that is not known runs read only, which must not make the transaction itself read only in the eyes of the server.
    run(&a, "create function opaque() returns int language sql volatile as 'select sum(v)::int from t'").await;
    for client in [&a, &b] {
        run(client, "set default_transaction_isolation = 'serializable'; prepare seen as select opaque()").await;
    }
    for by_execute in [false, true] {
        run(&a, "update t set v = 10").await;
        for client in [&a, &b] {
            // What is known of it is known before the transaction begins.
            let execute = client.prepare("execute seen").await.unwrap();
            run(client, "select opaque()").await;
            run(client, "select v from t").await;
            run(client, "begin").await;
            if by_execute {
                assert_eq!(client.query_one(&execute, &[]).await.unwrap().get::<_, i32>(0), 20);
            } else {
                assert_eq!(value(client, "select opaque()").await, "20");
            }
        }
        run(&a, "update t set v = v - 15 where id = 1").await;
        run(&b, "update t set v = v - 15 where id = 2").await;
        let results = [a.batch_execute("commit").await, b.batch_execute("commit").await];
        let failed: Vec<_> = results.iter().filter_map(|r| r.as_ref().err()).map(sqlstate).collect();
        assert_eq!(failed, ["40001"], "by EXECUTE: {by_execute}");
    }
    cluster.assert_identical().await;
}

/// A DEFERRABLE snapshot waits for writers; commits of others must not wait for it.
#[tokio::test(flavor = "multi_thread")]
async fn a_deferrable_transaction_that_calls_code_does_not_hold_commits_back() {
    let cluster = common::cluster();
    let (first, second) = (cluster.connect("postgres").await, cluster.connect("postgres").await);
    let reader = cluster.connect("postgres").await;
    run(&first, "create table t (id int primary key, v int); insert into t values (1, 10), (2, 10)").await;
    run(
        &first,
        "create function writes() returns int language plpgsql as $$ begin update t set v = 0 where id = 1; return 1; end $$",
    )
    .await;
    let watch = cluster.connect_node(0, "postgres").await;
    run(&first, "begin isolation level serializable; update t set v = v + 1 where id = 1").await;
    let waiting = tokio::spawn(async move {
        run(&reader, "begin isolation level serializable read only deferrable").await;
        refused(&reader, "select writes()", "0A000").await
    });
    common::wait_for("the snapshot waits", async || {
        value(&watch, "select count(*) from pg_stat_activity where wait_event = 'SafeSnapshot'").await == "1"
    })
    .await;
    // A snapshot that is taken again from here on waits for the second.
    run(&second, "begin isolation level serializable; update t set v = v + 1 where id = 2").await;
    run(&first, "commit").await;
    let refusal = tokio::time::timeout(common::LIMIT, waiting).await.expect("an answer").unwrap();
    assert!(refusal.contains("DEFERRABLE"), "{refusal}");
    run(&second, "commit").await;
    cluster.assert_identical().await;
}

/// What the leader only holds prepared was never decided, whatever followers hold.
#[tokio::test(flavor = "multi_thread")]
async fn what_the_leader_had_only_prepared_is_rolled_back_everywhere() {
    let cluster = common::cluster();
    let client = cluster.connect("postgres").await;
    run(&client, "create table t (id int primary key, v int); insert into t values (1, 1)").await;
    cluster.assert_identical().await;
    for round in 1..=2 {
        cluster.kill_proxy();
        let half = format!("begin; update t set v = 99; prepare transaction 'pgtandem:sandbox:1:1:{}'", 1000 + round);
        for index in 0..2 {
            run(&cluster.connect_node(index, "postgres").await, &half).await;
        }
        if round == 2 {
            cluster.kill_postgres(0);
        }
        cluster.start_again();
        cluster.wait_well().await;
        for index in 0..2 {
            assert_eq!(prepared_on(&cluster, index).await, "0");
        }
        cluster.assert_identical().await;
        assert_eq!(value(&cluster.connect("postgres").await, "select v from t").await, "1");
    }
}

/// The crash tests again, with all clients SERIALIZABLE.
#[tokio::test(flavor = "multi_thread")]
async fn kills_under_load() {
    let cluster = common::cluster();
    run(&cluster.connect("postgres").await, "alter role postgres set default_transaction_isolation = 'serializable'")
        .await;
    let serialization = "ERROR 40001: could not serialize access";
    for kill in ["proxy", "leader", "a backend", "leader and follower"] {
        let probe = load::start(&cluster).await;
        match kill {
            "proxy" => {
                cluster.kill_proxy();
                cluster.start_again();
            }
            "leader" => cluster.kill_postgres(cluster.leader()),
            "a backend" => {
                let client = cluster.connect_node(cluster.leader(), "postgres").await;
                for _ in 0..20 {
                    run(
                        &client,
                        "select pg_terminate_backend(pid) from pg_stat_activity where backend_type = 'client backend'
                         and usename = 'postgres' and client_addr is null and query ~ 'probe_|PREPARE' order by random() limit 1",
                    )
                    .await;
                    load::wait_writes(&cluster, &probe, 3).await;
                }
            }
            _ => {
                cluster.kill_postgres(0);
                cluster.kill_postgres(1);
            }
        }
        load::wait_writes(&cluster, &probe, 50).await;
        let seen = load::finish(&cluster, probe).await;
        let allowed: Vec<_> = load::LOST.iter().chain(&load::LEADER_LOST).copied().chain([serialization]).collect();
        load::assert_errors(&seen, &allowed);
    }
    cluster.wait_well().await;
}

/// The catalog is read with the snapshot, statements run with the definitions of their moment: a default that varies, or a trigger,
/// that was made in between must not be taken for absent.
#[tokio::test(flavor = "multi_thread")]
async fn definitions_that_are_newer_than_the_snapshot_are_not_missed() {
    let cluster = common::cluster();
    let (owner, late, other) =
        (cluster.connect("postgres").await, cluster.connect("postgres").await, cluster.connect("postgres").await);
    run(&owner, "create table t (id int primary key, v int); create table before_it (id int)").await;
    run(
        &owner,
        "create function f() returns trigger language plpgsql as 'begin new.v := random() * 1000000; return new; end'",
    )
    .await;
    let definitions = [
        "alter table t add column w float default random()",
        "create trigger tr before insert on t for each row execute function f()",
        "drop trigger tr on t",
    ];
    for (n, definition) in definitions.iter().enumerate() {
        for (m, level) in ["repeatable read", "serializable"].iter().enumerate() {
            let id = 10 * n + m;
            // The snapshot is that of a statement which was prepared, and so planned, long before.
            let count = late.prepare("select count(*) from before_it").await.unwrap();
            run(&late, &format!("begin isolation level {level}")).await;
            late.query(&count, &[]).await.unwrap();
            run(&late, &format!("insert into before_it values ({id})")).await;
            if m == 0 {
                run(&owner, definition).await;
            } else {
                run(&owner, &format!("comment on table t is '{n}'")).await;
            }
            // What only reads goes on: a dump is such a transaction.
            assert_eq!(value(&late, "select count(*) >= 0 and now() <= clock_timestamp() from t").await, "t");
            let rows = late.copy_out("copy t (id, v) to stdout").await.expect("a COPY");
            rows.try_collect::<Vec<_>>().await.expect("its rows");
            let insert = format!("insert into t (id, v) values ({id}, 0)");
            // A server before 16 lets large objects be written behind the guard.
            let statement = if n == 2 { "select lo_create(0)" } else { &insert };
            refused(&late, statement, "40001").await;
            run(&late, "rollback").await;
            // Nobody else has got the plan, and it works at the next attempt.
            run(&other, &format!("insert into t (id, v) values ({}, 0)", 100 + id)).await;
            run(&late, &format!("begin isolation level {level}")).await;
            run(&late, &insert).await;
            run(&late, "commit and chain").await;
            run(&late, &format!("insert into t (id, v) values ({}, 0)", 200 + id)).await;
            run(&late, "commit").await;
            cluster.assert_identical().await;
        }
    }
    assert_eq!(same(&cluster, "postgres", "select count(*) from pg_largeobject_metadata").await, "0");
    // READ COMMITTED sees each definition as it comes.
    run(&late, "begin; select 1").await;
    run(&owner, "alter table t add column x float default random()").await;
    run(&late, "insert into t (id, v) values (1000, 0)").await;
    run(&late, "commit").await;
    cluster.assert_identical().await;
}

/// A client takes the command tag for success, whatever comes behind it: nothing may.
#[tokio::test(flavor = "multi_thread")]
async fn a_copy_that_the_schema_overtook_does_not_tell_success_first() {
    let cluster = common::cluster();
    let (owner, late) = (cluster.connect("postgres").await, cluster.connect("postgres").await);
    run(&owner, "create table stamped (id int, at timestamptz default clock_timestamp()); create table t (id int)")
        .await;
    for (n, copy) in ["copy stamped (id) from stdin", "copy t (id) from stdin"].iter().enumerate() {
        run(&late, "begin isolation level serializable; select count(*) from t").await;
        let mut sink = Box::pin(late.copy_in(*copy).await.expect("a COPY"));
        sink.send(bytes::Bytes::from_static(b"1\n")).await.expect("a row");
        run(&owner, &format!("create table other{n} (id int)")).await;
        let error = sink.as_mut().finish().await.expect_err("an error instead of the tag");
        assert_eq!(sqlstate(&error), "40001", "{error:?}");
        run(&late, "rollback").await;
        // Nothing is left of it in the session.
        run(&late, "insert into t values (2)").await;
    }
    assert_eq!(same(&cluster, "postgres", "select count(*) from t").await, "2");
    assert_eq!(same(&cluster, "postgres", "select count(*) from stamped").await, "0");
}
