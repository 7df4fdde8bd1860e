//! Statements that table locks order: MERGE, and changes of tables without a primary key. Nobody waits for ever, and what waits
//! in vain fails alone.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test that panics has failed")]

mod common;

use common::Cluster;
use tokio_postgres::Client;
use tokio_postgres::error::SqlState;

const TABLES: &str = "
    create table stock (id int primary key, n int, at timestamptz, note text default 'none');
    create table loose (id int, n int);
    create table serials (id serial primary key, n int);
    create table source (id int, n int);
    insert into stock select g, g from generate_series(1, 20) g;
    insert into loose select g % 5, g from generate_series(1, 20) g;
    insert into source select g, g * 10 from generate_series(15, 30) g";

/// Each is run by the simple and by the extended protocol, and changes the same rows everywhere.
const MERGES: &[&str] = &[
    "merge into stock t using source s on t.id = s.id when matched then update set n = t.n + s.n when not matched then insert (id, n) values (s.id, s.n)",
    "merge into stock using (values (1, 5), (100, 6)) as s(id, n) on stock.id = s.id when matched and s.n > 100 then delete \
     when matched then update set n = s.n, at = now() when not matched then insert values (s.id, s.n, current_timestamp)",
    "merge into loose l using source s on l.id = s.id - 15 when matched and l.n > 10 then do nothing when matched and s.id = 16 then delete \
     when not matched then insert values (s.id, s.n)",
    "merge into stock t using source s on t.id = s.id and false when matched then delete",
    "with half as (select id, n / 2 as n from source) merge into stock t using half h on t.id = h.id when matched then update set n = h.n",
    "merge into serials t using source s on t.id = s.id when not matched then insert (id, n) values (s.id, s.n)",
];

const REFUSED: &[&str] = &[
    "merge into stock t using source s on t.id = s.id when matched then update set n = (random() * 10)::int",
    "merge into serials t using source s on t.id = s.id when not matched then insert (n) values (s.n)",
    "merge into stock t using (select * from source limit 3) s on t.id = s.id when matched then delete",
];

async fn prepared() -> (Cluster, Client) {
    let cluster = common::cluster();
    let client = cluster.connect("postgres").await;
    client.batch_execute(TABLES).await.unwrap();
    (cluster, client)
}

#[tokio::test]
async fn merge_changes_the_same_rows_everywhere() {
    let (cluster, client) = prepared().await;
    for text in MERGES {
        client.simple_query(text).await.unwrap_or_else(|error| panic!("{text}: {error:?}"));
        client.execute(*text, &[]).await.unwrap_or_else(|error| panic!("{text}: {error:?}"));
        cluster.assert_identical().await;
    }
    let parameters = "merge into stock t using (select $1::int as id, $2::int as n) s on t.id = s.id \
        when matched then update set n = s.n when not matched then insert (id, n) values (s.id, s.n)";
    let merge = client.prepare(parameters).await.unwrap();
    for id in [3_i32, 300] {
        assert_eq!(client.execute(&merge, &[&id, &7_i32]).await.unwrap(), 1);
    }
    client.batch_execute("create temp table passing (id int, n int); insert into passing values (1, 1)").await.unwrap();
    client
        .batch_execute(
            "merge into passing t using source s on t.id = s.id when not matched then insert values (s.id, s.n)",
        )
        .await
        .unwrap();
    for text in REFUSED {
        let error = client.simple_query(text).await.unwrap_err();
        let told = error.as_db_error().unwrap();
        assert!(told.code() == &SqlState::FEATURE_NOT_SUPPORTED && told.hint().is_some(), "{text}: {told:?}");
    }
    cluster.wait_well().await;
    cluster.assert_identical().await;
}

#[tokio::test]
async fn writers_beside_a_merge_leave_the_servers_identical() {
    let (cluster, client) = prepared().await;
    let writer = cluster.connect("postgres").await;
    let writing = tokio::spawn(async move {
        for round in 0..60 {
            writer
                .simple_query(&format!("update source set n = {round} where id = {}", 15 + round % 16))
                .await
                .unwrap();
            writer.simple_query(&format!("insert into source values ({}, 1)", 100 + round)).await.unwrap();
        }
    });
    for _ in 0..20 {
        client.simple_query(MERGES[0]).await.unwrap();
        client.simple_query("delete from loose where n in (select n from source)").await.unwrap();
    }
    writing.await.unwrap();
    cluster.wait_well().await;
    cluster.assert_identical().await;
}

#[tokio::test]
async fn a_lock_that_does_not_come_fails_the_statement_alone() {
    let (cluster, client) = prepared().await;
    let other = cluster.connect("postgres").await;
    other.batch_execute("begin; insert into loose values (1, 1)").await.unwrap();
    client
        .batch_execute("set lock_timeout = '200ms'; begin; insert into stock (id) values (1000); savepoint a")
        .await
        .unwrap();
    let error = client.simple_query("update loose set n = 0 where id = 2").await.unwrap_err();
    let told = error.as_db_error().unwrap();
    assert!(told.code() == &SqlState::LOCK_NOT_AVAILABLE && told.hint().is_some(), "{told:?}");
    client.batch_execute("rollback to a; commit; reset lock_timeout").await.unwrap();
    // Without a limit of its own it waits for the other one, and then does its work.
    let waiting = tokio::spawn(async move {
        client.simple_query("update loose set n = 0 where id = 2").await.unwrap();
        client
    });
    common::wait_for("the update waits for its lock", async || {
        let leader = cluster.connect_node(0, "postgres").await;
        let query = "select count(*) from pg_locks where not granted and mode = 'ShareRowExclusiveLock'";
        leader.query_one(query, &[]).await.unwrap().get::<_, i64>(0) == 1
    })
    .await;
    other.batch_execute("commit").await.unwrap();
    let client = waiting.await.unwrap();
    let left = client.query_one("select count(*) from loose where id = 2 and n <> 0", &[]).await.unwrap();
    assert_eq!(left.get::<_, i64>(0), 0);
    let kept = client.query_one("select count(*) from stock where id = 1000", &[]).await.unwrap();
    assert_eq!(kept.get::<_, i64>(0), 1);
    cluster.wait_well().await;
    cluster.assert_identical().await;
}

#[tokio::test]
async fn two_that_wrote_before_do_not_wait_for_each_other_for_ever() {
    let (cluster, first) = prepared().await;
    let second = cluster.connect("postgres").await;
    first.batch_execute("begin; insert into loose values (1, 1)").await.unwrap();
    second.batch_execute("begin; insert into loose values (2, 2)").await.unwrap();
    let update = "update loose set n = n + 1 where id = 3";
    let (one, other) = tokio::join!(first.simple_query(update), second.simple_query(update));
    let failed: Vec<_> = [&one, &other].into_iter().filter_map(|result| result.as_ref().err()).collect();
    assert_eq!(failed.len(), 1, "{one:?} {other:?}");
    assert_eq!(failed[0].code(), Some(&SqlState::T_R_DEADLOCK_DETECTED));
    for client in [&first, &second] {
        client.batch_execute("commit").await.unwrap();
    }
    cluster.wait_well().await;
    cluster.assert_identical().await;
}

/// Which of several rows gives the values is each server's own choice; whether there are several is asked when the tables are locked.
#[tokio::test]
async fn update_from_needs_one_row_for_each() {
    let (cluster, client) = prepared().await;
    let from =
        "update loose set n = s.n from (select id % 5 as id, n from source where id < $1) s where loose.id = s.id";
    let of = |limit: i32| from.replace("$1", &limit.to_string());
    assert_eq!(client.execute(&of(20), &[]).await.unwrap(), 20);
    cluster.assert_identical().await;
    for limit in [21, 25] {
        let error = client.execute(&of(limit), &[]).await.unwrap_err();
        assert_eq!(error.code(), Some(&SqlState::FEATURE_NOT_SUPPORTED), "{error:?}");
        let told = error.as_db_error().map_or("", |error| error.message());
        assert!(told.contains("joined with several others"), "{told}");
    }
    // Parameters are not asked about.
    assert_eq!(client.execute(from, &[&20_i32]).await.unwrap_err().code(), Some(&SqlState::FEATURE_NOT_SUPPORTED));
    let own = "update loose set n = loose.n + $1 from source s where loose.id = s.id % 5";
    assert_eq!(client.execute(own, &[&1_i32]).await.unwrap(), 20);
    cluster.assert_identical().await;
}

/// Servers may find rows in another order: what takes one of several values that are equal and look different, or puts rows into a list in
/// the order in which they are found, is not left to each of them.
#[tokio::test(flavor = "multi_thread")]
async fn what_depends_on_the_order_of_rows_is_not_run_by_text() {
    let cluster = common::cluster();
    let client = cluster.connect("postgres").await;
    client
        .batch_execute(
            "create table v (r numeric, fixed numeric(8, 2), i interval, j jsonb, p point, m money, n int);
             insert into v values (1.0, 1, '1 mon', '1.0', '(1,2)', 3, 1);
             insert into v values (1.00, 1, '30 days', '1.00', '(3,4)', 5, 2);
             create table w (fixed numeric(8, 2), n int); insert into w values (1, 1), (1, 2);
             create table t (v text, d numeric); insert into t values ('x', 0)",
        )
        .await
        .unwrap();
    for refused in [
        "select max(r)::text from v",
        "select min(i)::text from v",
        "select distinct j::jsonb::text from v group by j limit 1",
        "select count(*)::text from (select r from v union select 3) x",
        "select sum(p[0])::text from v",
        "select avg(m / 1::money)::text from v",
        "select array(select n from v)::text",
    ] {
        let error = client.batch_execute(&format!("update t set v = ({refused})")).await.expect_err(refused);
        assert_eq!(error.code(), Some(&SqlState::FEATURE_NOT_SUPPORTED), "{refused}");
    }
    for certain in [
        "select max(fixed)::text from w",
        "select min(n)::text from w",
        "select count(distinct n)::text from w",
        "select count(*)::text from (select r from v union all select 3) x",
    ] {
        client.batch_execute(&format!("update t set v = ({certain})")).await.expect(certain);
    }
    client.batch_execute("create table a (id int primary key, a text[]); set array_nulls = off").await.unwrap();
    let nulls =
        client.batch_execute("insert into a select 1, array[null]::text[]").await.expect_err("its text is another");
    assert_eq!(nulls.code(), Some(&SqlState::FEATURE_NOT_SUPPORTED));
    cluster.assert_identical().await;
}
