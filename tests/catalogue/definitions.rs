//! C2 to C6, C9, C11, C15, C16, C17: definitions, constraints at the end, and several statements at once. C1, C7, C8: tests/half_committed.rs.

use futures_util::TryStreamExt;

use crate::stage::{Case, Stage, code, code_of, play, refused, run, start, value};

pub async fn play(stage: &mut Stage) {
    play!(
        stage,
        c02_a_column_with_a_default_that_varies,
        c03_tables_made_of_queries,
        c04_truncate_and_writers,
        c05_what_no_transaction_can_hold,
        c06_a_definition_between_plan_and_execution,
        c09_constraints_that_fail_at_commit,
        c11_unlogged_tables,
        c15_several_statements_in_one_message,
        c16_a_pipeline_with_an_error,
        c17_a_portal_that_is_fetched_in_parts,
    );
}

async fn c02_a_column_with_a_default_that_varies(case: &Case<'_>) {
    let a = case.client().await;
    run(&a, "create table t (id int primary key); insert into t select generate_series(1, 20); create sequence s")
        .await;
    for (number, default) in
        ["random()", "nextval('s')", "clock_timestamp()", "now()", "gen_random_uuid()", "7"].iter().enumerate()
    {
        run(&a, &format!("alter table t add column c{number} text default ({default})::text")).await;
    }
    run(&a, "alter table t add column n serial").await;
    run(&a, "alter table t add column i int generated always as identity").await;
    run(&a, "alter table t alter column id type bigint using id + (random() * 0)::int").await;
    run(&a, "insert into t (id) values (100)").await;
}

async fn c03_tables_made_of_queries(case: &Case<'_>) {
    let a = case.client().await;
    run(&a, "create table t (id int primary key, v int); insert into t select 50 - i, i from generate_series(1, 30) i")
        .await;
    case.reorder_followers("t", "t_pkey").await;
    for text in [
        "create table made as select *, random() as r, clock_timestamp() as c from t",
        "create table limited as select * from t limit 5",
        "select *, random() as r into into_made from t",
        "create materialized view seen as select id, v, random() as r from t",
        "refresh materialized view seen",
        "create table empty as select * from t with no data",
        "create table if not exists limited as select 1",
        "begin; create table in_block as select * from t limit 3; insert into in_block values (1, 1); commit",
    ] {
        run(&a, text).await;
    }
}

async fn c04_truncate_and_writers(case: &Case<'_>) {
    let (a, b) = case.clients().await;
    run(&a, "create table t (id serial primary key, v int); insert into t (v) values (1), (2)").await;
    run(&b, "begin; insert into t (v) values (3)").await;
    let truncate = start(a, "truncate t");
    case.blocked_or_done(&truncate).await;
    run(&b, "commit").await;
    let (a, done) = truncate.await.unwrap();
    done.unwrap();
    assert_eq!(value(&a, "select count(*) from t").await, "0");
    run(&a, "begin; truncate t").await;
    let insert = start(b, "insert into t (v) values (4)");
    case.blocked_or_done(&insert).await;
    run(&a, "insert into t (v) values (5); commit").await;
    insert.await.unwrap().1.unwrap();
    assert_eq!(value(&a, "select string_agg(v::text, ',' order by v) from t").await, "4,5");
    run(&a, "truncate t restart identity").await;
    run(&a, "insert into t (v) values (6)").await;
    run(&a, "begin; truncate t; rollback").await;
}

async fn c05_what_no_transaction_can_hold(case: &Case<'_>) {
    let a = case.client().await;
    run(&a, "create table t (id int primary key, v int); insert into t select i, i % 9 from generate_series(1, 500) i")
        .await;
    for text in [
        "create index concurrently t_v on t (v)",
        "reindex index concurrently t_v",
        "drop index concurrently t_v",
        "vacuum t",
        "vacuum (analyze) t",
        "analyze t",
        "vacuum full t",
        "create database c05_other",
        "drop database if exists c05_other",
        "alter system set work_mem = '8MB'",
        "alter system reset work_mem",
    ] {
        run(&a, text).await;
    }
    case.same_on_each_node("select count(*) from pg_indexes where schemaname = 'c05_what_no_transaction_can_hold'")
        .await;
    case.same_on_each_node("select string_agg(datname, ',' order by datname) from pg_database").await;
}

async fn c06_a_definition_between_plan_and_execution(case: &Case<'_>) {
    let (a, b) = case.clients().await;
    run(&a, "create table t (id int primary key, v int)").await;
    let insert = b.prepare("insert into t (id, v) values ($1, 1)").await.unwrap();
    b.execute(&insert, &[&1]).await.unwrap();
    for (id, definition) in [
        (2, "alter table t add column r float8 default random()"),
        (3, "alter table t add column w int default 7"),
        (4, "alter table t alter column v set default 9"),
    ] {
        run(&a, &format!("begin; {definition}")).await;
        let (b2, insert) = (&b, &insert);
        let waiting = async {
            match b2.execute(insert, &[&id]).await {
                Ok(_) => {}
                Err(error) => assert_eq!(code(&error), "40001", "{error:?}"),
            }
        };
        let commit = async {
            let watch = case.cluster.connect_node(0, "postgres").await;
            crate::common::wait_for("the INSERT waits", async || {
                value(&watch, "select count(*) from pg_locks where not granted").await != "0"
            })
            .await;
            run(&a, "commit").await;
        };
        tokio::join!(waiting, commit);
    }
    b.execute(&insert, &[&10]).await.unwrap();
    assert_eq!(value(&a, "select w || '/' || (r is null) from t where id = 10").await, "7/false");
}

async fn c09_constraints_that_fail_at_commit(case: &Case<'_>) {
    let (a, b) = case.clients().await;
    run(
        &a,
        "create table p (id int primary key);
         create table c (id int primary key, p int references p deferrable initially deferred,
                         u int unique deferrable initially deferred);
         create table e (id int primary key, r int4range, exclude using gist (r with &&) deferrable initially deferred)",
    )
    .await;
    assert_eq!(code_of(&a, "begin; insert into c values (1, 1, 1); commit").await, "23503");
    run(&a, "rollback; begin; insert into c values (1, 1, 1); insert into p values (1); commit").await;
    assert_eq!(code_of(&a, "begin; insert into c values (2, 1, 1); commit").await, "23505");
    run(&a, "rollback; begin; insert into c values (2, 1, 1); update c set u = 2 where id = 2; commit").await;
    // Two keys change places.
    run(&a, "begin; update c set u = 2 where id = 1; update c set u = 1 where id = 2; commit").await;
    assert_eq!(code_of(&a, "begin; insert into e values (1, '[1,5)'), (2, '[3,8)'); commit").await, "23P01");
    run(&a, "rollback").await;
    // Two clients with the same deferred value.
    run(&a, "begin; insert into c values (5, 1, 50)").await;
    run(&b, "begin; insert into c values (6, 1, 50)").await;
    run(&a, "commit").await;
    assert_eq!(code_of(&b, "commit").await, "23505");
    run(&b, "begin; set constraints all immediate; insert into c values (7, 1, 70); commit").await;
    assert_eq!(value(&a, "select string_agg(id || ':' || u, ',' order by id) from c").await, "1:2,2:1,5:50,7:70");
    // The constraint is found by a search_path that was set in the same transaction.
    let other = format!("{}_other", case.schema);
    let only_here =
        format!("create table {other}.d (id int primary key, p int constraint only_here references p deferrable)");
    run(&a, &format!("create schema {other}; {only_here}")).await;
    for text in [
        "begin",
        &format!("set local search_path = {other}, {}", case.schema),
        "set constraints only_here deferred",
        "insert into d values (1, 77)",
        "insert into p values (77)",
        "commit",
    ] {
        run(&a, text).await;
    }
    assert_eq!(value(&a, &format!("select count(*) from {other}.d")).await, "1");
}

async fn c11_unlogged_tables(case: &Case<'_>) {
    let a = case.client().await;
    run(&a, "create unlogged table u (id int primary key)").await;
    refused(&a, "insert into u values (1)").await;
    run(&a, "alter table u set logged").await;
    run(&a, "insert into u values (2)").await;
}

async fn c15_several_statements_in_one_message(case: &Case<'_>) {
    let a = case.client().await;
    run(&a, "create table t (id int primary key, v int)").await;
    assert_eq!(
        code_of(
            &a,
            "insert into t values (1, 1); insert into t values (2, 2); select 1 / 0; insert into t values (3, 3)"
        )
        .await,
        "22012"
    );
    assert_eq!(value(&a, "select count(*) from t").await, "0");
    assert_eq!(
        code_of(&a, "insert into t values (1, 1); commit; insert into t values (2, 2); select 1 / 0").await,
        "22012"
    );
    assert_eq!(value(&a, "select count(*) from t").await, "1");
    assert_eq!(
        code_of(
            &a,
            "insert into t values (5, 5); begin; insert into t values (6, 6); savepoint s; insert into t values (5, 5)"
        )
        .await,
        "23505"
    );
    run(&a, "rollback to s; commit").await;
    assert_eq!(value(&a, "select string_agg(id::text, ',' order by id) from t").await, "1,5,6");
}

async fn c16_a_pipeline_with_an_error(case: &Case<'_>) {
    let a = case.client().await;
    run(&a, "create table t (id int primary key, v int)").await;
    let insert = a.prepare("insert into t values ($1, $2)").await.unwrap();
    let params: [[i32; 2]; 4] = [[1, 1], [2, 2], [1, 3], [4, 4]];
    let all = params.iter().map(|p| {
        let (a, insert) = (&a, &insert);
        async move { a.execute(insert, &[&p[0], &p[1]]).await }
    });
    let done = futures_util::future::join_all(all).await;
    let codes: Vec<String> = done.iter().map(|r| r.as_ref().map_or_else(code, |_| "00000".to_owned())).collect();
    assert_eq!(codes, ["00000", "00000", "23505", "00000"]);
    run(&a, "begin").await;
    let all = [[8, 8], [8, 9], [10, 10]].map(|p: [i32; 2]| {
        let (a, insert) = (&a, &insert);
        async move { a.execute(insert, &[&p[0], &p[1]]).await }
    });
    let done = futures_util::future::join_all(all).await;
    let codes: Vec<String> = done.iter().map(|r| r.as_ref().map_or_else(code, |_| "00000".to_owned())).collect();
    assert_eq!(codes, ["00000", "23505", "25P02"]);
    run(&a, "rollback").await;
    assert_eq!(value(&a, "select count(*) from t").await, "3");
}

async fn c17_a_portal_that_is_fetched_in_parts(case: &Case<'_>) {
    let mut a = case.client().await;
    run(&a, "create table t (id serial primary key, v int)").await;
    let transaction = a.transaction().await.unwrap();
    let insert = "insert into t (v) select g from generate_series(1, 10) g returning id";
    let portal = transaction.bind(insert, &[]).await.unwrap();
    let mut seen = 0;
    for expected in [4, 4, 2] {
        let rows: Vec<_> = transaction.query_portal_raw(&portal, 4).await.unwrap().try_collect().await.unwrap();
        assert_eq!(rows.len(), expected);
        seen += rows.len();
    }
    assert_eq!(seen, 10);
    let half = transaction.bind(insert, &[]).await.unwrap();
    assert_eq!(transaction.query_portal(&half, 3).await.unwrap().len(), 3);
    transaction.commit().await.unwrap();
    assert_eq!(value(&a, "select count(*) from t").await, "20");
}
