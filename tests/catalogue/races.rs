//! A10, A11, A20 to A28: races, locks without waiting, ends that nobody asked for.

use std::time::Duration;

use crate::stage::{Case, Stage, code, code_of, play, run, start, value};

const T: &str =
    "create table t (id int primary key, grp int, v int); insert into t values (1, 1, 1), (2, 1, 2), (3, 2, 3)";

pub async fn play(stage: &mut Stage) {
    play!(
        stage,
        a10_blind_writes_of_one_row,
        a11_no_deadlock_across_servers,
        a20_a_queue_with_skip_locked,
        a21_nowait_and_lock_timeout,
        a22_a_range_under_an_old_snapshot,
        a23_write_skew,
        a24_a_timeout_and_a_cancel,
        a25_the_victim_of_a_deadlock,
        a26_rollback_to_a_savepoint_lets_others_in,
        a27_an_involuntary_abort_lets_others_in,
        a28_addresses_of_rows,
    );
}

async fn a10_blind_writes_of_one_row(case: &Case<'_>) {
    let a = case.client().await;
    run(&a, T).await;
    let mut writers = Vec::new();
    for value in 0..4 {
        let client = case.client().await;
        writers.push(tokio::spawn(async move {
            for n in 0..30 {
                client.execute("update t set v = $1 where id = 1", &[&(value * 100 + n)]).await.unwrap();
            }
        }));
    }
    for writer in writers {
        writer.await.unwrap();
    }
}

async fn a11_no_deadlock_across_servers(case: &Case<'_>) {
    let a = case.client().await;
    run(&a, T).await;
    let mut writers = Vec::new();
    for first in [1, 2, 1, 2] {
        let client = case.client().await;
        writers.push(tokio::spawn(async move {
            for _ in 0..15 {
                let text = format!(
                    "begin; update t set v = v + 1 where id = {first}; update t set v = v + 1 where id = {}; commit",
                    3 - first
                );
                if let Err(error) = client.batch_execute(&text).await {
                    assert_eq!(code(&error), "40P01");
                    run(&client, "rollback").await;
                }
            }
        }));
    }
    for writer in writers {
        writer.await.unwrap();
    }
    for index in 1..case.cluster.layout.plan.nodes {
        let log = case.cluster.layout.node_dir(index).join("postgresql.log");
        let log = String::from_utf8_lossy(&std::fs::read(log).unwrap()).into_owned();
        assert!(!log.contains("deadlock detected"), "a deadlock on node{index}");
    }
}

async fn a20_a_queue_with_skip_locked(case: &Case<'_>) {
    let (a, b) = case.clients().await;
    run(
        &a,
        "create table job (id int primary key, done bool default false); insert into job select generate_series(1, 9)",
    )
    .await;
    run(&a, "begin; select id from job where not done order by id limit 1 for update skip locked").await;
    let take = "update job set done = true where id = (select id from job where not done order by id limit 1 for update skip locked)";
    run(&b, take).await;
    run(
        &b,
        "delete from job where id in (select id from job where not done order by id for update skip locked limit 2)",
    )
    .await;
    run(&b, "begin").await;
    let id = value(&b, "select id from job where not done order by id limit 1 for update skip locked").await;
    assert_ne!(id, "1");
    run(&b, &format!("update job set done = true where id = {id}; commit")).await;
    run(&a, "update job set done = true where id = 1; commit").await;
    assert_eq!(value(&a, "select done from job where id = 1").await, "t");
}

async fn a21_nowait_and_lock_timeout(case: &Case<'_>) {
    let (a, b) = case.clients().await;
    run(&a, T).await;
    run(&a, "begin; update t set v = 0 where id = 1").await;
    assert_eq!(code_of(&b, "select * from t where id = 1 for update nowait").await, "55P03");
    run(&b, "set lock_timeout = '50ms'").await;
    assert_eq!(code_of(&b, "update t set v = 1 where id = 1").await, "55P03");
    assert_eq!(code_of(&b, "begin; update t set v = 1 where id = 2; update t set v = 1 where id = 1").await, "55P03");
    run(&b, "rollback").await;
    run(&a, "commit").await;
    run(&b, "update t set v = v + 5 where id = 1").await;
    assert_eq!(value(&a, "select string_agg(v::text, ',' order by id) from t").await, "5,2,3");
}

async fn a22_a_range_under_an_old_snapshot(case: &Case<'_>) {
    let (a, b) = case.clients().await;
    run(&a, T).await;
    run(&a, "begin isolation level repeatable read; select count(*) from t").await;
    run(&b, "insert into t values (8, 1, 8)").await;
    run(&a, "update t set v = v + 100 where grp = 1; commit").await;
    assert_eq!(value(&a, "select count(*) from t where v > 100").await, "2");
    run(&a, "begin isolation level repeatable read; select count(*) from t").await;
    run(&b, "update t set v = 0 where id = 1").await;
    assert_eq!(code_of(&a, "update t set v = 1 where id = 1").await, "40001");
    run(&a, "rollback").await;
}

async fn a23_write_skew(case: &Case<'_>) {
    let (a, b) = case.clients().await;
    run(&a, T).await;
    for client in [&a, &b] {
        run(client, "begin isolation level serializable; select sum(v) from t").await;
    }
    run(&a, "update t set v = v - 1 where id = 1").await;
    run(&b, "update t set v = v - 1 where id = 2").await;
    let mut codes = [code_of(&a, "commit").await, code_of(&b, "commit").await];
    codes.sort();
    assert_eq!(codes, ["00000", "40001"]);
}

async fn a24_a_timeout_and_a_cancel(case: &Case<'_>) {
    let (a, b) = case.clients().await;
    run(&a, T).await;
    run(&a, "begin; update t set v = 0 where id = 1").await;
    run(&b, "set statement_timeout = '100ms'").await;
    assert_eq!(code_of(&b, "begin; update t set v = 9 where id = 2; update t set v = 9 where id = 1").await, "57014");
    run(&b, "rollback; set statement_timeout = 0").await;
    let token = b.cancel_token();
    let waiting = start(b, "update t set v = 8 where id = 1");
    case.blocked_or_done(&waiting).await;
    token.cancel_query(tokio_postgres::NoTls).await.unwrap();
    let (b, done) = waiting.await.unwrap();
    assert_eq!(code(&done.unwrap_err()), "57014");
    run(&a, "commit").await;
    run(&b, "update t set v = v + 1 where id = 1").await;
    assert_eq!(value(&a, "select string_agg(v::text, ',' order by id) from t").await, "1,2,3");
}

async fn a25_the_victim_of_a_deadlock(case: &Case<'_>) {
    let (a, b) = case.clients().await;
    run(&a, T).await;
    run(&a, "begin; update t set v = v + 10 where id = 1").await;
    run(&b, "begin; update t set v = v + 100 where id = 2").await;
    let first = start(a, "update t set v = v + 10 where id = 2");
    let second = start(b, "update t set v = v + 100 where id = 1");
    let mut lost = 0;
    for task in [first, second] {
        let (client, done) = task.await.unwrap();
        let end = match done {
            Ok(_) => "commit",
            Err(error) => {
                assert_eq!(code(&error), "40P01");
                lost += 1;
                "rollback"
            }
        };
        run(&client, end).await;
    }
    assert_eq!(lost, 1);
}

async fn a26_rollback_to_a_savepoint_lets_others_in(case: &Case<'_>) {
    let (a, b) = case.clients().await;
    run(&a, T).await;
    run(&a, "begin; update t set v = 33 where id = 3; savepoint s; update t set v = 11 where id = 1; rollback to s")
        .await;
    run(&b, "begin; update t set v = 111 where id = 1").await;
    let waits = start(b, "update t set v = 333 where id = 3");
    case.blocked_or_done(&waits).await;
    run(&a, "update t set v = 22 where id = 2; commit").await;
    let (b, done) = waits.await.unwrap();
    done.unwrap();
    run(&b, "commit").await;
    assert_eq!(value(&b, "select string_agg(v::text, ',' order by id) from t").await, "111,22,333");
}

async fn a27_an_involuntary_abort_lets_others_in(case: &Case<'_>) {
    let (a, b) = case.clients().await;
    run(&a, T).await;
    run(&a, "begin; update t set v = 11 where id = 1").await;
    assert_eq!(code_of(&a, "select 1 / 0").await, "22012");
    // It has not said ROLLBACK yet.
    let done = tokio::time::timeout(Duration::from_secs(20), b.execute("update t set v = 111 where id = 1", &[])).await;
    assert_eq!(done.expect("no lock is left").unwrap(), 1);
    run(&a, "rollback").await;
    assert_eq!(value(&a, "select v from t where id = 1").await, "111");
}

async fn a28_addresses_of_rows(case: &Case<'_>) {
    let a = case.client().await;
    run(&a, T).await;
    case.reorder_followers("t", "t_pkey").await;
    run(&a, "insert into t select i, 5, i from generate_series(10, 20) i; delete from t where id = 12").await;
    for text in [
        "begin; declare c cursor for select * from t where grp = 1; fetch 2 from c; update t set v = -1 where current of c; commit",
        "update t set v = 0 where ctid = '(0,5)'",
        "delete from t where ctid = any (array(select ctid from t limit 2))",
        "update t set v = 0 where xmin = '1'",
        "delete from t where tableoid = 't'::regclass and id = 20",
        "insert into t select 1000 + (random() * 1000)::int, tableoid::int, xmin::text::int from t where id = 1",
    ] {
        run(&a, text).await;
    }
}
