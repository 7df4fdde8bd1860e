//! Queries of the simple protocol that come again are executed from what the leader has prepared. A definition that is committed
//! meanwhile must not be seen in that: a lone server answers a text by what the table is now.

mod common;

use common::ask::{run, same, state};
use tokio_postgres::error::SqlState;
use tokio_postgres::{Client, SimpleQueryMessage};

const QUERY: &str = "select * from t where id = 1";

/// The columns of the only row.
async fn row(client: &Client) -> Result<String, tokio_postgres::Error> {
    let messages = client.simple_query(QUERY).await?;
    let row = messages.iter().find_map(|m| if let SimpleQueryMessage::Row(row) = m { Some(row) } else { None });
    let row = row.expect("one row");
    Ok((0..row.len()).map(|i| row.get(i).unwrap_or("null")).collect::<Vec<_>>().join(","))
}

/// The definition holds the table when the queries come, and is committed before they are answered.
#[tokio::test(flavor = "multi_thread")]
async fn a_query_prepared_before_a_definition_is_answered_by_the_table_as_it_is() {
    let cluster = common::cluster();
    let definer = cluster.connect("postgres").await;
    run(&definer, "create table t (id int primary key, v text); insert into t values (1, 'old')").await;
    let (alone, reader, writer) =
        (cluster.connect("postgres").await, cluster.connect("postgres").await, cluster.connect("postgres").await);
    for client in [&alone, &reader, &writer] {
        for _ in 0..3 {
            assert_eq!(row(client).await.expect("a row"), "1,old");
        }
        let prepared = "select count(*) from pg_prepared_statements where name like 'pgtandem_w%'";
        let count = client.query_one(prepared, &[]).await.expect("a count").get::<_, i64>(0);
        assert_eq!(count, 1, "the query is prepared, or this test shows nothing");
    }

    run(&definer, "begin; alter table t add column w text default 'new'").await;
    run(&reader, "begin; select 1").await;
    let waiting = tokio::spawn(async move {
        let (alone, in_block) = tokio::join!(row(&alone), row(&reader));
        assert_eq!(alone.expect("outside a block"), "1,old,new");
        assert_eq!(in_block.expect("in a block"), "1,old,new");
        run(&reader, "commit").await;
    });
    let leader = cluster.connect_node(0, "postgres").await;
    common::wait_for("both queries wait for the definition", async || {
        let sql = "select count(*) from pg_locks where not granted";
        leader.query_one(sql, &[]).await.expect("locks").get::<_, i64>(0) == 2
    })
    .await;
    run(&definer, "commit").await;
    waiting.await.expect("no error");

    // What has the table locked executes what is prepared; what was rolled back to before it, not.
    for _ in 0..2 {
        assert_eq!(row(&writer).await.expect("a row"), "1,old,new");
    }
    run(&writer, "begin").await;
    run(&writer, "savepoint s").await;
    run(&writer, "update t set v = 'mine' where id = 1").await;
    assert_eq!(row(&writer).await.expect("the own row"), "1,mine,new");
    run(&writer, "rollback to s").await;
    run(&definer, "begin; alter table t drop column w").await;
    let waiting = tokio::spawn(async move {
        assert_eq!(row(&writer).await.expect("the lock was given up"), "1,old");
        run(&writer, "commit").await;
    });
    common::wait_for("the query waits for the definition", async || {
        let sql = "select count(*) from pg_locks where not granted";
        leader.query_one(sql, &[]).await.expect("locks").get::<_, i64>(0) == 1
    })
    .await;
    run(&definer, "commit").await;
    waiting.await.expect("no error");
    cluster.assert_identical().await;
}

/// What the leader chooses in it comes back as columns of the table, which are others after the definition.
#[tokio::test(flavor = "multi_thread")]
async fn an_insert_prepared_before_a_definition_is_tried_again() {
    let cluster = common::cluster();
    let (definer, writer) = (cluster.connect("postgres").await, cluster.connect("postgres").await);
    run(&definer, "create table h (n int, r numeric(9, 2), at timestamptz default clock_timestamp())").await;
    for n in 0..4 {
        run(&writer, &format!("insert into h values ({n}, -{n}.5, now())")).await;
        run(&writer, &format!("insert into h (n) values ({n})")).await;
    }
    let prepared = "select count(*) from pg_prepared_statements where name like 'pgtandem_w%'";
    let count = writer.query_one(prepared, &[]).await.expect("a count").get::<_, i64>(0);
    assert_eq!(count, 2, "both are prepared, or this test shows nothing");

    run(&definer, "begin; alter table h add column w text default 'new'").await;
    let waiting = tokio::spawn(async move {
        let error = writer.batch_execute("insert into h values (7, 7.5, now())").await.expect_err("it is planned anew");
        assert_eq!(error.code(), Some(&SqlState::T_R_SERIALIZATION_FAILURE), "{error:?}");
        writer
    });
    let leader = cluster.connect_node(0, "postgres").await;
    common::wait_for("the insert waits for the definition", async || {
        let sql = "select count(*) from pg_locks where not granted";
        leader.query_one(sql, &[]).await.expect("locks").get::<_, i64>(0) == 1
    })
    .await;
    run(&definer, "commit").await;
    let writer = waiting.await.expect("the error");
    for _ in 0..3 {
        run(&writer, "insert into h values (8, 8.5, now())").await;
    }
    // Errors are told in the client's own text.
    let error = writer.batch_execute("insert into h values (8, 123456789.5, now())").await.expect_err("too large");
    assert_eq!(error.code(), Some(&SqlState::NUMERIC_VALUE_OUT_OF_RANGE), "{error:?}");
    let kept = "select count(*) from h where w = 'new'";
    assert_eq!(writer.query_one(kept, &[]).await.expect("a count").get::<_, i64>(0), 11);
    cluster.assert_identical().await;
}

/// One text with parameters stands for several shapes, by the types of their numbers.
#[tokio::test(flavor = "multi_thread")]
async fn numbers_of_several_types_stand_in_the_same_text() {
    let cluster = common::cluster();
    let client = cluster.connect("postgres").await;
    run(&client, "create table n (id int primary key, i int, b bigint); insert into n values (1, 0, 0)").await;
    for b in ["0", "9223372036854775807", "-9223372036854775808", "2147483648", "7", "1.5"].repeat(3) {
        run(&client, &format!("update n set b = {b} where id = 1")).await;
    }
    // An integer is divided by 2 otherwise than by 2.0.
    for (divisor, quotient) in [("2.0", "3"), ("2", "2")].repeat(3) {
        run(&client, "update n set i = 5 where id = 1").await;
        run(&client, &format!("update n set i = i / {divisor} where id = 1")).await;
        assert_eq!(same(&cluster, "postgres", "select i from n").await, quotient, "5 / {divisor}");
    }
    cluster.assert_identical().await;
}

/// What PostgreSQL computes when it plans a text is an error then, also where no row comes to it; and a sign decides the type of a number.
#[tokio::test(flavor = "multi_thread")]
async fn constants_are_computed_when_a_text_is_planned() {
    let cluster = common::cluster();
    let client = cluster.connect("postgres").await;
    run(&client, "create table n (id int primary key, b bigint); insert into n values (1, 0)").await;
    for _ in 0..3 {
        run(&client, "update n set b = b + 10 / 1 where id = 999").await;
        run(&client, "update n set b = -9223372036854775808 / 10 where id = 1").await;
        assert_eq!(same(&cluster, "postgres", "select b from n").await, "-922337203685477580");
    }
    assert_eq!(state(&client, "update n set b = b + 10 / 0 where id = 999").await, "22012");
    run(&client, "set plan_cache_mode = force_generic_plan").await;
    let folded = |divisor: u8| format!("update n set b = case when b > 0 then 10 / {divisor} else 1 end where id = 1");
    run(&client, &folded(5)).await;
    run(&client, &folded(5)).await;
    assert_eq!(state(&client, &folded(0)).await, "22012");
    cluster.wait_member(1, true).await;
    cluster.assert_identical().await;
}
