//! UPDATE, DELETE and INSERT ... ON CONFLICT of any form: what the leader decided is what every server holds, with other sessions in
//! between. The letters and numbers are those of the catalogue of anomalies of statement replication.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test that panics has failed")]

mod common;

use std::sync::Arc;

use common::{Cluster, cluster, wait_for};
use tokio::task::JoinHandle;
use tokio_postgres::{Client, Error};

/// Runs a statement in a task of its own and returns when the leader has it wait for a lock.
async fn blocked(cluster: &Cluster, client: &Arc<Client>, text: &'static str) -> JoinHandle<Result<u64, Error>> {
    let leader = cluster.connect_node(0, "postgres").await;
    let client = Arc::clone(client);
    let task = tokio::spawn(async move { client.execute(text, &[]).await });
    wait_for(&format!("it waits for a lock: {text}"), async || {
        let waiting = "select count(*) from pg_stat_activity where wait_event_type = 'Lock'";
        leader.query_one(waiting, &[]).await.unwrap().get::<_, i64>(0) > 0
    })
    .await;
    task
}

async fn rows(client: &Client, query: &str) -> Vec<String> {
    client.query(query, &[]).await.unwrap().iter().map(|row| row.get(0)).collect()
}

/// What the table holds on every server, which must be the same.
async fn content(cluster: &Cluster, table: &str) -> Vec<String> {
    cluster.assert_identical().await;
    rows(&cluster.connect_node(1, "postgres").await, &format!("select t::text from {table} t order by 1")).await
}

async fn sessions(cluster: &Cluster) -> (Arc<Client>, Arc<Client>) {
    (Arc::new(cluster.connect("postgres").await), Arc::new(cluster.connect("postgres").await))
}

const SETUP: &str = "drop table if exists t, log; create table t (id int primary key, grp int, v int); \
     create table log (id serial primary key, n bigint); ";

/// A1, A2, A6, A7, A22: the statement waited for a row lock, or runs in an old snapshot, and touches other rows than the same text
/// would now.
#[tokio::test(flavor = "multi_thread")]
async fn what_a_statement_saw_is_what_followers_change() {
    let cluster = cluster();
    let (one, two) = sessions(&cluster).await;
    // A1
    one.batch_execute(&format!("{SETUP} insert into t values (1, 1, 9), (2, 1, 10)")).await.unwrap();
    one.batch_execute("begin; update t set v = v + 1").await.unwrap();
    let waiting = blocked(&cluster, &two, "delete from t where v = 10").await;
    one.batch_execute("commit").await.unwrap();
    assert_eq!(waiting.await.unwrap().unwrap(), 0);
    assert_eq!(content(&cluster, "t").await, ["(1,1,10)", "(2,1,11)"]);
    // A2
    one.batch_execute("begin; update t set v = 0 where id = 1; insert into t values (5, 1, 0)").await.unwrap();
    let waiting = blocked(&cluster, &two, "update t set v = v + 100 where grp = 1").await;
    one.batch_execute("commit").await.unwrap();
    assert_eq!(waiting.await.unwrap().unwrap(), 2);
    assert_eq!(content(&cluster, "t").await, ["(1,1,100)", "(2,1,111)", "(5,1,0)"]);
    // A6
    one.batch_execute("begin; delete from t where id = 5; insert into t values (5, 2, 0)").await.unwrap();
    let waiting = blocked(&cluster, &two, "update t set v = -1 where id + 0 = 5").await;
    one.batch_execute("commit").await.unwrap();
    assert_eq!(waiting.await.unwrap().unwrap(), 0);
    // A7
    one.batch_execute("begin; insert into t values (7, 2, 0)").await.unwrap();
    assert_eq!(two.execute("update t set v = -1 where id + 0 = 7", &[]).await.unwrap(), 0);
    one.batch_execute("commit").await.unwrap();
    assert_eq!(content(&cluster, "t").await, ["(1,1,100)", "(2,1,111)", "(5,2,0)", "(7,2,0)"]);
    // A22
    two.batch_execute("begin isolation level repeatable read; select count(*) from t").await.unwrap();
    one.batch_execute("insert into t values (8, 2, 0)").await.unwrap();
    assert_eq!(two.execute("update t set v = v + 1 where grp = 2", &[]).await.unwrap(), 2);
    assert_eq!(two.execute("insert into log (n) select sum(v) from t", &[]).await.unwrap(), 1);
    two.batch_execute("commit").await.unwrap();
    assert_eq!(content(&cluster, "t").await, ["(1,1,100)", "(2,1,111)", "(5,2,1)", "(7,2,1)", "(8,2,0)"]);
    assert_eq!(content(&cluster, "log").await, ["(1,213)"]);
    // The same, with a conflict that a lone server has, too.
    two.batch_execute("begin isolation level repeatable read; select count(*) from t").await.unwrap();
    one.batch_execute("update t set v = 5 where id = 8").await.unwrap();
    let error = two.execute("delete from t where grp = 2", &[]).await.unwrap_err();
    assert_eq!(error.code().unwrap().code(), "40001");
    two.batch_execute("rollback").await.unwrap();
    cluster.assert_identical().await;
}

/// A job queue's own statement.
const TAKE: &str = "update jobs set done = true where id = \
     (select id from jobs where not done order by id for update skip locked limit 1)";

/// A3, A14, A16, A17, A18, A20, A21, A28: what a server chooses, and what it computes.
#[tokio::test(flavor = "multi_thread")]
async fn what_the_leader_chose_is_what_followers_change() {
    let cluster = cluster();
    let (one, two) = sessions(&cluster).await;
    one.batch_execute(&format!(
        "{SETUP} insert into t select i, i % 3, i from generate_series(1, 60) i;
         create table jobs (id int primary key, done bool default false, by text, at timestamptz, note text[]);
         insert into jobs (id) select generate_series(1, 20);
         create table pairs (k int, w int); insert into pairs values (1, 10), (1, 20), (2, 30);
         create temp table mine (id int); insert into mine values (11), (12)"
    ))
    .await
    .unwrap();
    // The follower finds rows in another order than the leader.
    let follower = cluster.connect_node(1, "postgres").await;
    follower
        .batch_execute("create index by_v on t (v desc); cluster t using by_v; drop index by_v; analyze t")
        .await
        .unwrap();
    follower.batch_execute("vacuum (full, analyze) jobs").await.unwrap();
    for (count, text) in [
        (5, "delete from t where id in (select id from t where grp = 1 limit 5)"),
        (4, "update t set v = -1 where ctid in (select ctid from t order by grp limit 4)"),
        (10, "update t set v = (random() * 1e9)::int where id in (select id from t order by random() limit 10)"),
        (1, "update t set v = p.w from pairs p where p.k = t.id and t.id = 2"),
        (2, "delete from t using mine where mine.id = t.id"),
        (
            3,
            "update t as x set (grp, v) = (select max(y.id), min(y.v) from t y where y.grp = x.grp) where x.id between 30 and 32",
        ),
        (
            1,
            "with busy as (select id from jobs where not done order by id limit 1 for update skip locked) \
             update jobs j set done = true, by = current_user, at = clock_timestamp(), \
             note = array['a,\"b\"', null, '\\x'] from busy where busy.id = j.id",
        ),
        (19, "update jobs set at = now(), note = array[gen_random_uuid()::text], by = null where not done"),
        (9, "delete from jobs where id > 10 and xmin::text is not null and id <> 20 returning *, random()"),
    ] {
        for extended in [false, true] {
            one.batch_execute("begin").await.unwrap();
            if extended {
                assert_eq!(one.execute(text, &[]).await.unwrap(), count, "{text}");
            } else {
                one.batch_execute(text).await.unwrap();
            }
            one.batch_execute(if extended { "commit" } else { "savepoint s; rollback to s; rollback" }).await.unwrap();
        }
        cluster.assert_identical().await;
    }
    // A20: a job that another session holds is passed over, on the leader and so everywhere.
    one.batch_execute("begin").await.unwrap();
    one.execute(TAKE, &[]).await.unwrap();
    two.execute(TAKE, &[]).await.unwrap();
    one.batch_execute("commit").await.unwrap();
    cluster.assert_identical().await;
    // A21: the lock is the leader's, and so is the error.
    one.batch_execute("begin; update jobs set by = 'one' where id < 5").await.unwrap();
    let error = two.execute("delete from jobs where id in (select id from jobs for update nowait)", &[]).await;
    assert_eq!(error.unwrap_err().code().unwrap().code(), "55P03");
    one.batch_execute("commit").await.unwrap();
    // A28: WHERE CURRENT OF
    one.batch_execute(
        "begin; declare c cursor for select * from t order by v desc for update; move 2 in c;
         update t set v = 4711 where current of c; move 1 in c; delete from t where current of c; commit",
    )
    .await
    .unwrap();
    assert_eq!(rows(&one, "select v::text from t where v = 4711").await, ["4711"]);
    cluster.assert_identical().await;
}

/// A13: INSERT ... ON CONFLICT in all its forms.
#[tokio::test(flavor = "multi_thread")]
async fn decided_rows_of_on_conflict_are_the_same_everywhere() {
    let cluster = cluster();
    let (one, two) = sessions(&cluster).await;
    one.batch_execute(
        "create table u (id serial primary key, mail text unique, n int default 0, at timestamptz default now(),
             twice int generated always as (n * 2) stored);
         create table s (k text primary key, n int, w float8 default random());
         create table i (id int generated always as identity primary key, code text, n int, unique (code));
         create table p (a int, b int, v int, primary key (a, b)) partition by list (b);
         create table p1 partition of p for values in (1); create table p2 (v int, b int not null, a int not null);
         alter table p attach partition p2 for values in (2);
         create table tree (id int primary key, parent int references tree, v int)",
    )
    .await
    .unwrap();
    for text in [
        "insert into u (mail) values ('a'), ('b'), ('c') on conflict (mail) do update set n = u.n + 1",
        "insert into u (mail) values ('b'), ('d'), ('a') on conflict (mail) do update set n = u.n + 1, at = clock_timestamp()",
        "insert into u (mail, n) values ('b', 5), ('e', 6) on conflict do nothing",
        "insert into u (mail) select mail || '' from u on conflict (mail) do update set n = (select count(*) from s) + 7 where u.n > 1",
        "insert into s (k, n) select 'k' || i % 20, i from generate_series(1, 20) i on conflict (k) do update set n = s.n + excluded.n",
        "insert into s (k, n) select 'k' || i % 40, i from generate_series(1, 40) i on conflict (k) do update set n = s.n + excluded.n, w = default",
        "insert into s (k, n) values ('k1', null), ('', 3) on conflict on constraint s_pkey do update set w = 'NaN'",
        "insert into i (code) values ('x'), ('y') on conflict (code) do nothing",
        "insert into i (code, n) values ('y', 2), ('z', 3) on conflict (code) do update set n = excluded.n returning *",
        "insert into i overriding system value values (100, 'q', 1), (1, 'r', 2) on conflict (id) do update set code = excluded.code",
        "insert into p select i, i % 2 + 1, i from generate_series(1, 30) i on conflict (a, b) do update set v = p.v + 1",
        "insert into p select i, i % 2 + 1, i from generate_series(1, 60) i on conflict (a, b) do update set v = p.v + 1",
        "insert into tree values (1, 2, 0), (2, null, 0), (3, 1, 0) on conflict (id) do update set v = tree.v + 1",
        "insert into tree values (4, 5, 0), (2, 4, 0), (5, 1, 0) on conflict (id) do update set parent = excluded.parent, v = 9",
        "insert into tree select i, i + 1, 0 from generate_series(10, 20) i union all select 21, null, 0 on conflict do nothing",
        // the key itself: by table locks
        "insert into s (k, n, w) values ('k2', 1, 1) on conflict (k) do update set k = 'new' || excluded.n",
    ] {
        one.batch_execute(text).await.unwrap_or_else(|error| panic!("{text}: {error}\n{}", cluster.logs()));
        one.execute(text, &[]).await.unwrap_or_else(|error| panic!("{text}: {error}\n{}", cluster.logs()));
        cluster.assert_identical().await;
    }
    // Against a row that is not yet committed, and one that is deleted meanwhile.
    one.batch_execute("begin; insert into u (mail, n) values ('race', 1)").await.unwrap();
    let text = "insert into u (mail) values ('race'), ('other') on conflict (mail) do update set n = u.n + 10";
    let waiting = blocked(&cluster, &two, text).await;
    one.batch_execute("commit").await.unwrap();
    assert_eq!(waiting.await.unwrap().unwrap(), 2);
    assert_eq!(rows(&one, "select n::text from u where mail = 'race'").await, ["11"]);
    one.batch_execute("begin; delete from u where mail = 'race'").await.unwrap();
    let text = "insert into u (mail) values ('race') on conflict (mail) do update set n = u.n + 10";
    let waiting = blocked(&cluster, &two, text).await;
    one.batch_execute("commit").await.unwrap();
    assert_eq!(waiting.await.unwrap().unwrap(), 1);
    assert_eq!(rows(&one, "select n::text from u where mail = 'race'").await, ["0"]);
    let text = "insert into u (mail) values ('race'), ('race') on conflict (mail) do update set n = 0";
    let error = two.execute(text, &[]).await.unwrap_err();
    assert_eq!(error.code().unwrap().code(), "21000");
    cluster.assert_identical().await;
}

/// A19: a change of unique values goes through only in some orders; the leader found one. And constraints that look at the end of
/// a statement.
#[tokio::test(flavor = "multi_thread")]
async fn unique_values_move_in_the_leaders_order() {
    let cluster = cluster();
    let one = cluster.connect("postgres").await;
    one.batch_execute(
        "create table line (id int primary key, place int unique, sub text);
         create unique index on line (lower(sub));
         insert into line select i, 1000 - i, 's' || i from generate_series(1, 500) i;
         create table lazy (id int primary key, place int unique deferrable);
         insert into lazy select i, i from generate_series(1, 500) i;
         create table node (id int primary key, parent int references node, v int);
         insert into node select i, nullif(i - 1, 0), 0 from generate_series(1, 6000) i;
         create table top (id int primary key, v int);
         create table part (id int primary key, top int references top on delete cascade);
         insert into top select generate_series(1, 100); insert into part select i, i % 100 + 1 from generate_series(1, 300) i",
    )
    .await
    .unwrap();
    // The follower finds them the other way round, where each would take its neighbour's place.
    let follower = cluster.connect_node(1, "postgres").await;
    follower.batch_execute("cluster line using line_place_key; cluster lazy using lazy_pkey").await.unwrap();
    for (count, text) in [
        (500, "update line set place = place + 1 where place > 0"),
        (500, "update line set sub = 's' || id - 1"),
        (500, "update lazy set place = place + 1"),
        (500, "update lazy set place = 502 - place where id + 0 > 0"),
        (5999, "update node set v = v + 1, parent = id - 1 where id > 1"),
        (5000, "delete from node where id > 1000"),
        (60, "delete from top where id > 40"),
    ] {
        let done = one.execute(text, &[]).await;
        assert_eq!(done.unwrap_or_else(|error| panic!("{text}: {error}")), count, "{text}");
        cluster.assert_identical().await;
    }
    assert_eq!(rows(&one, "select count(*)::text from part").await, ["120"]);
    cluster.wait_well().await;
}

/// unnest() makes several columns of one of a composite type: such rows go one by one.
#[tokio::test(flavor = "multi_thread")]
async fn composite_columns_stay_whole() {
    let cluster = cluster();
    let one = cluster.connect("postgres").await;
    one.batch_execute(
        "create type pair as (x int, y text); create domain named as pair check ((value).x > 0);
         create table t (id int primary key, v int, c pair, q bool, d named, l pair[]);
         insert into t (id, v) values (1, 1), (2, 2), (3, 3)",
    )
    .await
    .unwrap();
    for text in [
        "insert into t (id, v) select id, v from t on conflict (id) do update set v = excluded.v + 1",
        "update t set c = row(v, 'a,\"b)'), d = row(v, null), l = array[row(1, 'x'), null]::pair[], q = v > 2",
        "update t set (c, q) = (l[1], null) where v > 2",
        "delete from t where (d).x > 3",
    ] {
        one.batch_execute(text).await.unwrap_or_else(|error| panic!("{text}: {error}"));
        cluster.assert_identical().await;
    }
    cluster.wait_well().await;
}

/// A5, A13, A26 and everything at once: nobody is told of an error that a lone server would not have had.
#[tokio::test(flavor = "multi_thread")]
async fn eight_clients_are_disturbed_by_nobody_but_each_other() {
    const CLIENTS: i32 = 8;
    const ROUNDS: i32 = 40;
    let cluster = cluster();
    let one = cluster.connect("postgres").await;
    one.batch_execute(
        "create table acc (id int primary key, grp int, n int, at timestamptz);
         insert into acc select i, i % 8, 0, now() from generate_series(1, 80) i;
         create table seen (k text primary key, n int, last float8)",
    )
    .await
    .unwrap();
    let mut tasks = Vec::new();
    for number in 0..CLIENTS {
        let client = cluster.connect("postgres").await;
        tasks.push(tokio::spawn(async move {
            for round in 0..ROUNDS {
                // Each has rows of its own, so a lone server has no deadlock here; all share the tables.
                client.batch_execute("begin").await?;
                client
                    .execute(
                        "insert into seen values ($1, 1, random()) on conflict (k) do update set n = seen.n + 1, last = random()",
                        &[&format!("{number}-{}", round % 5)],
                    )
                    .await?;
                if round % 4 == 1 {
                    client.batch_execute(&format!("savepoint s; update acc set n = -1 where grp = {number}; rollback to s")).await?;
                }
                client
                    .batch_execute(&format!("update acc set n = n + 1, at = clock_timestamp() where grp = {number} and id % 2 = 0"))
                    .await?;
                client.execute("update acc set n = n + 1 where id = $1", &[&(number + 8)]).await?;
                if round % 3 == 0 {
                    client.batch_execute(&format!("delete from acc where grp = {number} and id > 72")).await?;
                    client.batch_execute(&format!("insert into acc values ({} + 72, {number}, 0, null) on conflict do nothing", if number == 0 { 8 } else { number })).await?;
                }
                client.batch_execute(if round % 7 == 6 { "rollback" } else { "commit" }).await?;
            }
            Ok::<(), Error>(())
        }));
    }
    for task in tasks {
        task.await.unwrap().unwrap_or_else(|error| panic!("{error:?}\n{}", cluster.logs()));
    }
    cluster.assert_identical().await;
    cluster.wait_well().await;
}

/// Foreign keys whose actions need no code: what reaches other tables is the same everywhere. Statements that call or fire code must be
/// the first of a transaction in REPEATABLE READ, which tells the two apart.
#[tokio::test(flavor = "multi_thread")]
async fn actions_of_foreign_keys_are_no_code_unless_they_fire_some() {
    let cluster = cluster();
    let client = cluster.connect("postgres").await;
    client
        .batch_execute(
            "create table parent (id int primary key, v int);
             create table child (id int primary key, p int default 1 references parent on delete set default);
             create table moving (id int primary key, v int);
             create table follows (id int primary key, m int default (random() * 2)::int references moving on delete set default);
             create table node (id int primary key, above int references node on delete set null, at text);
             create table leaf (id int primary key, above int references leaf on delete cascade, at text);
             create function stamp() returns trigger language plpgsql as $$ begin new.at := random()::text; return new; end $$;
             create trigger stamp before update on node for each row execute function stamp();
             create trigger stamp before update on leaf for each row execute function stamp();
             insert into parent select i, i from generate_series(1, 9) i; insert into child select i, i from generate_series(1, 9) i;
             insert into moving select i, i from generate_series(0, 9) i; insert into follows select i, i from generate_series(1, 9) i;
             insert into node select i, nullif(i / 2, 0) from generate_series(1, 9) i;
             insert into leaf select i, nullif(i / 2, 0) from generate_series(1, 9) i;",
        )
        .await
        .unwrap();
    let second = async |text: &str| {
        let done =
            client.batch_execute(&format!("begin isolation level repeatable read; select 1; {text}; commit")).await;
        let _ = client.batch_execute("rollback").await;
        done.map_or_else(|error| error.code().unwrap().code().to_owned(), |()| "ok".to_owned())
    };
    for text in [
        "update parent set v = v + 1 where id > 2",
        "delete from parent where id in (4, 5)",
        "update moving set v = v + 1",
        "delete from leaf where id = 4",
    ] {
        assert_eq!(second(text).await, "ok", "{text}");
    }
    for text in ["delete from moving where id = 4", "delete from node where id = 4"] {
        assert_eq!(second(text).await, "0A000", "{text}");
    }
    assert_eq!(content(&cluster, "child").await[3..5], ["(4,1)", "(5,1)"]);
    assert_eq!(content(&cluster, "leaf").await.len(), 6);
    content(&cluster, "node").await;
}
