//! A1 to A19: snapshots, locks and the order of rows.

use crate::common;
use crate::stage::{Case, Stage, code, code_of, play, refused, run, start, value};

const T: &str =
    "create table t (id int primary key, grp int, v int); insert into t values (1, 1, 9), (2, 1, 10), (3, 2, 5)";

pub async fn play(stage: &mut Stage) {
    play!(
        stage,
        a01_an_old_snapshot_and_a_new_one,
        a02_a_phantom_behind_a_lock,
        a03_a_commit_in_between,
        a04_an_aggregate_and_a_commit_in_between,
        a06_a_key_that_was_deleted_and_inserted_again,
        a07_an_insert_that_is_not_committed_yet,
        a12_two_inserts_of_one_key,
        a13_on_conflict_against_what_is_under_way,
        a14_on_conflict_with_subquery_and_condition,
        a15_merge_and_data_modifying_with,
        a16_update_from_with_several_matches,
        a17_limit_without_order,
        a18_limit_with_an_order_that_is_not_unique,
        a19_a_key_change_that_depends_on_the_order_of_rows,
    );
}

async fn a01_an_old_snapshot_and_a_new_one(case: &Case<'_>) {
    let (a, b) = case.clients().await;
    run(&a, T).await;
    run(&a, "begin; update t set v = v + 1 where id = 1; update t set v = v + 1 where id = 2").await;
    let delete = start(b, "delete from t where v = 10");
    case.blocked_or_done(&delete).await;
    run(&a, "commit").await;
    let deleted = delete.await.unwrap().1.unwrap();
    // Its snapshot was from before (nothing), or it waited before it took one (id 1).
    assert!(deleted <= 1);
    assert_eq!(value(&a, "select count(*) from t").await, (3 - deleted).to_string());
}

async fn a02_a_phantom_behind_a_lock(case: &Case<'_>) {
    let (a, b) = case.clients().await;
    run(&a, T).await;
    run(&a, "begin; update t set v = 0 where id = 1; insert into t values (5, 1, 50)").await;
    let update = start(b, "update t set v = v + 100 where grp = 1");
    case.blocked_or_done(&update).await;
    run(&a, "commit").await;
    let changed = update.await.unwrap().1.unwrap();
    assert_eq!(value(&a, "select count(*) from t where v >= 100").await, changed.to_string());
}

async fn a03_a_commit_in_between(case: &Case<'_>) {
    let (a, b) = case.clients().await;
    run(&a, T).await;
    run(&a, "begin").await;
    assert_eq!(a.execute("update t set v = v + 100 where grp = 1", &[]).await.unwrap(), 2);
    let insert = start(b, "insert into t values (6, 1, 60)");
    case.blocked_or_done(&insert).await;
    run(&a, "commit").await;
    insert.await.unwrap().1.unwrap();
    assert_eq!(value(&a, "select v from t where id = 6").await, "60");
}

async fn a04_an_aggregate_and_a_commit_in_between(case: &Case<'_>) {
    let (a, b) = case.clients().await;
    run(&a, T).await;
    run(&a, "create table log (id serial primary key, n bigint, s bigint, m int)").await;
    run(&a, "begin; insert into log (n, s, m) select count(*), sum(v), max(v) from t").await;
    run(&b, "insert into t values (7, 1, 70)").await;
    run(&a, "commit").await;
    assert_eq!(value(&a, "select n || '/' || s || '/' || m from log").await, "3/24/10");
}

async fn a06_a_key_that_was_deleted_and_inserted_again(case: &Case<'_>) {
    let (a, b) = case.clients().await;
    run(&a, T).await;
    run(&a, "begin; delete from t where id = 1; insert into t values (1, 1, 77)").await;
    let update = start(b, "update t set v = 0 where id = 1");
    case.blocked_or_done(&update).await;
    run(&a, "commit").await;
    assert_eq!(update.await.unwrap().1.unwrap(), 0);
    assert_eq!(value(&a, "select v from t where id = 1").await, "77");
}

async fn a07_an_insert_that_is_not_committed_yet(case: &Case<'_>) {
    let (a, b) = case.clients().await;
    run(&a, T).await;
    run(&a, "begin; insert into t values (7, 1, 7)").await;
    assert_eq!(b.execute("update t set v = 0 where id = 7", &[]).await.unwrap(), 0);
    run(&b, "begin; update t set v = 0 where id = 7; update t set v = 0 where id = 3").await;
    run(&a, "commit").await;
    // Followers have finished it, too: the same text would find the row there.
    common::wait_for("the row on every node", async || {
        case.on_each_node("select count(*) from t where id = 7").await.iter().all(|count| count == "1")
    })
    .await;
    run(&b, "commit").await;
    assert_eq!(value(&a, "select v from t where id = 7").await, "7");
}

async fn a12_two_inserts_of_one_key(case: &Case<'_>) {
    let (a, mut b) = case.clients().await;
    run(&a, T).await;
    for (id, end, expected) in [(7, "commit", "23505"), (8, "rollback", "00000")] {
        run(&a, &format!("begin; insert into t values ({id}, 1, 1)")).await;
        let second = start(b, &format!("insert into t values ({id}, 2, 2)"));
        case.blocked_or_done(&second).await;
        run(&a, end).await;
        let (client, done) = second.await.unwrap();
        assert_eq!(done.map_or_else(|error| code(&error), |_| "00000".to_owned()), expected);
        b = client;
    }
    assert_eq!(value(&a, "select string_agg(grp::text, '' order by id) from t where id > 6").await, "12");
}

async fn a13_on_conflict_against_what_is_under_way(case: &Case<'_>) {
    let (a, mut b) = case.clients().await;
    run(&a, "create table t (id int primary key, u int unique, v int); insert into t values (1, 11, 1)").await;
    for (id, end) in [(7, "commit"), (8, "rollback")] {
        for action in ["nothing", "update set v = t.v + excluded.v"] {
            let target = if action == "nothing" { "" } else { "(id)" };
            run(&a, &format!("delete from t where id = {id}")).await;
            run(&a, &format!("begin; insert into t values ({id}, {id}0, 1)")).await;
            let second = start(b, &format!("insert into t values ({id}, {id}0, 5) on conflict {target} do {action}"));
            case.blocked_or_done(&second).await;
            run(&a, end).await;
            let (client, done) = second.await.unwrap();
            let expected = match (end, action) {
                ("commit", "nothing") => "1",
                ("commit", _) => "6",
                _ => "5",
            };
            done.unwrap();
            assert_eq!(value(&a, &format!("select v from t where id = {id}")).await, expected, "{end} {action}");
            b = client;
        }
    }
    // The other unique index decides.
    run(&a, "insert into t values (20, 11, 9) on conflict do nothing").await;
    assert_eq!(code_of(&a, "insert into t values (21, 11, 9) on conflict (id) do update set v = 0").await, "23505");
}

async fn a14_on_conflict_with_subquery_and_condition(case: &Case<'_>) {
    let a = case.client().await;
    run(&a, T).await;
    run(&a, "insert into t values (1, 1, 1) on conflict (id) do update set v = (select sum(v) from t)").await;
    run(&a, "insert into t values (1, 1, 1), (2, 1, 1) on conflict (id) do update set v = 0 where t.v > 9 returning *")
        .await;
    run(&a, "insert into t values (3, 1, 1) on conflict (id) do update set v = 0 where false").await;
    assert_eq!(value(&a, "select v from t where id = 3").await, "5");
    run(&a, "insert into t select id + 1, grp, v from t on conflict (id) do update set v = excluded.v * 2").await;
}

async fn a15_merge_and_data_modifying_with(case: &Case<'_>) {
    let a = case.client().await;
    run(&a, T).await;
    run(&a, "create table gone_for_good (id int, v int)").await;
    run(
        &a,
        "merge into t using (values (1, 5), (9, 6)) s (id, v) on t.id = s.id
         when matched then update set v = s.v when not matched then insert values (s.id, 0, s.v)",
    )
    .await;
    run(&a, "with gone as (delete from t where grp = 2 returning *) insert into gone_for_good select id, v from gone")
        .await;
}

async fn a16_update_from_with_several_matches(case: &Case<'_>) {
    let a = case.client().await;
    run(&a, T).await;
    run(&a, "create table s (id int primary key, grp int, v int); insert into s select i, 1, i from generate_series(1, 9) i").await;
    case.reorder_followers("s", "s_pkey").await;
    run(&a, "update t set v = s.v from s where s.grp = t.grp").await;
    assert_eq!(value(&a, "select count(*) from t where v < 10 and grp = 1").await, "2");
}

async fn a17_limit_without_order(case: &Case<'_>) {
    let a = case.client().await;
    run(&a, "create table t (id int primary key, grp int, v int)").await;
    run(&a, "insert into t select 100 - i, 1, i from generate_series(1, 50) i; analyze t").await;
    case.reorder_followers("t", "t_pkey").await;
    run(&a, "delete from t where id in (select id from t where grp = 1 limit 5)").await;
    run(&a, "update t set v = 0 where id in (select id from t where grp = 1 limit 5)").await;
    run(&a, "create index on t (grp); analyze t").await;
    run(&a, "delete from t where id = any (array(select id from t where grp = 1 limit 5))").await;
    run(&a, "insert into t select id + 1000, grp, v from t limit 7").await;
    assert_eq!(value(&a, "select count(*) filter (where id < 1000) || '/' || count(*) from t").await, "40/47");
}

async fn a18_limit_with_an_order_that_is_not_unique(case: &Case<'_>) {
    let a = case.client().await;
    run(&a, "create table t (id int primary key, grp int, v int)").await;
    run(&a, "insert into t select 100 - i, 1, i % 2 from generate_series(1, 50) i").await;
    case.reorder_followers("t", "t_pkey").await;
    run(&a, "delete from t where id in (select id from t order by v limit 5)").await;
    run(&a, "update t set grp = 9 where id in (select id from t order by v offset 3 limit 5)").await;
    run(&a, "insert into t select id + 1000, row_number() over (order by v), v from t").await;
    assert_eq!(value(&a, "select count(*) filter (where id < 1000) || '/' || count(*) from t").await, "45/90");
}

async fn a19_a_key_change_that_depends_on_the_order_of_rows(case: &Case<'_>) {
    let a = case.client().await;
    run(&a, "create table t (id int primary key, v int); insert into t select 50 - i, i from generate_series(1, 40) i")
        .await;
    case.reorder_followers("t", "t_pkey").await;
    // From the highest down no two rows ever meet on the leader.
    refused(&a, "update t set id = id + 1").await;
    assert_eq!(value(&a, "select count(*) from t").await, "40");
}
