//! Sequences: whatever was committed, no member would give a value again if it became the leader, and none is far ahead.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test that panics has failed")]

mod common;

use std::collections::BTreeMap;

use common::Cluster;
use common::ask::{run_all, same};
use tokio_postgres::{Client, SimpleQueryMessage};

/// Statements, one after the other through one session; after each all sequences are looked at. `=`: they must be equal afterwards.
const STATEMENTS: &[&str] = &[
    "create table t (id serial primary key, other int generated always as identity (increment by 5), v int)",
    "insert into t (v) values (1)",
    "insert into t (v) select g from generate_series(1, 5000) g",
    "insert into t (v) values (1), (2) returning id",
    "insert into t (id, v) values (4000000, 1)",
    "insert into t (id, v) values (default, random() * 10)",
    "create sequence plain",
    "select nextval('plain')",
    "select nextval('plain') from generate_series(1, 2500)",
    "begin; select nextval('plain') from generate_series(1, 3000); insert into t (v) values (3); commit",
    "begin; savepoint a; select nextval('plain') from generate_series(1, 3000); rollback to a; commit",
    "= select setval('plain', 7)",
    "select nextval('plain')",
    "= select setval('plain', 100000, false)",
    "select nextval('plain')",
    "begin; select nextval('plain'); select setval('plain', 3); select nextval('plain'); commit",
    "= alter sequence plain restart with 50",
    "select nextval('plain')",
    "select nextval('plain') from generate_series(1, 1500)",
    "alter sequence plain maxvalue 1600",
    "alter sequence plain no maxvalue increment by 3",
    "select nextval('plain') from generate_series(1, 1500)",
    "create sequence down increment by -2 start with -10",
    "select nextval('down')",
    "select nextval('down') from generate_series(1, 3000)",
    "create sequence cached cache 50",
    "select nextval('cached')",
    "select nextval('cached') from generate_series(1, 2020)",
    "create sequence wide minvalue 1 maxvalue 20000 cycle start with 19900",
    "select nextval('wide') from generate_series(1, 50)",
    "select nextval('wide') from generate_series(1, 100)",
    "select nextval('wide') from generate_series(1, 15000)",
    "create sequence short minvalue 1 maxvalue 5 cycle",
    "select nextval('short') from generate_series(1, 8)",
    "= truncate t restart identity",
    "insert into t (v) values (1)",
    "begin; truncate t restart identity; insert into t (v) select g from generate_series(1, 10) g; commit",
    "begin; create sequence passing; select nextval('passing') from generate_series(1, 2000); drop sequence passing; commit",
    "begin; create sequence made; select nextval('made') from generate_series(1, 2000); commit",
    "begin; alter sequence made rename to renamed; select nextval('renamed') from generate_series(1, 1200); commit",
    "alter sequence renamed owned by t.v",
    "create table stamped (id text primary key default 'n' || nextval('renamed'), v int)",
    "insert into stamped (v) select g from generate_series(1, 1500) g",
    "alter table t add column more bigserial",
    "insert into t (v) select g from generate_series(1, 1500) g",
    "alter table t alter column more type int",
    "alter table t alter column other set maxvalue 9000 set increment by 2",
    "alter table t alter column other restart with 20",
    "create sequence tiny as smallint maxvalue 10",
    "select nextval('tiny') from generate_series(1, 10)",
    "create temp sequence if not exists scratch",
    "select nextval('scratch')",
    "create materialized view drawn as select nextval('plain') as n from generate_series(1, 1300)",
    "refresh materialized view drawn",
];

#[derive(Debug, PartialEq)]
struct Stand {
    last: Option<i64>,
    increment: i64,
    min: i64,
    max: i64,
    cycle: bool,
}

async fn stands(client: &Client) -> BTreeMap<String, Stand> {
    let query = "select schemaname || '.' || sequencename, last_value, increment_by, min_value, max_value, cycle
        from pg_sequences where schemaname !~ '^pg_temp'";
    let row = |row: tokio_postgres::Row| {
        let stand =
            Stand { last: row.get(1), increment: row.get(2), min: row.get(3), max: row.get(4), cycle: row.get(5) };
        (row.get(0), stand)
    };
    client.query(query, &[]).await.unwrap().into_iter().map(row).collect()
}

/// Steps that the follower is ahead; negative: it would give a value again.
fn ahead(leader: &Stand, follower: &Stand) -> i64 {
    let Some(last) = leader.last else { return if follower.last.is_none() { 0 } else { -1 } };
    let Some(other) = follower.last else { return -1 };
    let steps = (other - last) / leader.increment;
    if leader.cycle && steps < 0 {
        // once around
        let (room, start) =
            if leader.increment > 0 { (leader.max - last, leader.min) } else { (last - leader.min, leader.max) };
        return room / leader.increment.abs() + 1 + (other - start) / leader.increment;
    }
    steps
}

async fn judge(leader: &Client, follower: &Client, equal: bool, rolled_back: bool) -> Vec<String> {
    let (first, second) = (stands(leader).await, stands(follower).await);
    let mut wrong = Vec::new();
    if first.keys().ne(second.keys()) {
        wrong.push(format!("other sequences: {:?} and {:?}", first.keys(), second.keys()));
    }
    for (name, stand) in &first {
        let Some(other) = second.get(name) else { continue };
        if (stand.increment, stand.min, stand.max, stand.cycle) != (other.increment, other.min, other.max, other.cycle)
        {
            wrong.push(format!("{name} is {stand:?} and {other:?}"));
        }
        let steps = ahead(stand, other);
        if !((0..=1000).contains(&steps) || rolled_back && steps < 0) {
            wrong.push(format!("the follower is {steps} steps ahead with {name}: {stand:?} and {other:?}"));
        }
        if equal && !name.contains(".t_") && stand.last != other.last && steps > 1000 {
            wrong.push(format!("{name} differs: {stand:?} and {other:?}"));
        }
    }
    wrong
}

async fn run(client: &Client, text: &str, extended: bool) -> Result<(), tokio_postgres::Error> {
    if extended && !text.contains(';') {
        client.query(text, &[]).await.map(|_| ())
    } else {
        client.simple_query(text).await.map(|_| ())
    }
}

async fn settle(cluster: &Cluster) {
    let unfinished = pgtandem::sandbox::demo::wait_finished(&cluster.layout).await.unwrap();
    assert_eq!(unfinished, Vec::<String>::new());
}

#[tokio::test]
async fn followers_are_at_or_a_little_ahead_after_every_commit() {
    let cluster = common::cluster();
    let (leader, follower) = (cluster.connect_node(0, "postgres").await, cluster.connect_node(1, "postgres").await);
    let client = cluster.connect("postgres").await;
    let mut wrong = Vec::new();
    for extended in [false, true] {
        let schema = if extended { "extended" } else { "simple" };
        client.simple_query(&format!("create schema {schema}; set search_path = {schema}")).await.unwrap();
        for text in STATEMENTS {
            let (equal, text) = text.strip_prefix("= ").map_or((false, *text), |text| (true, text));
            if let Err(error) = run(&client, text, extended).await {
                wrong.push(format!("{text}: {error:?}"));
                continue;
            }
            settle(&cluster).await;
            let rolled_back = text.contains("rollback");
            wrong.extend(
                judge(&leader, &follower, equal, rolled_back).await.into_iter().map(|what| format!("{text}: {what}")),
            );
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    cluster.wait_well().await;
    cluster.assert_identical().await;
}

async fn value(client: &Client, text: &str) -> i64 {
    let rows = client.simple_query(text).await.unwrap();
    let row = rows.into_iter().find_map(|message| match message {
        SimpleQueryMessage::Row(row) => Some(row),
        _ => None,
    });
    row.unwrap().get(0).unwrap().parse().unwrap()
}

#[tokio::test]
async fn a_value_is_told_only_when_no_member_would_give_it_again() {
    let cluster = common::cluster();
    let follower = cluster.connect_node(1, "postgres").await;
    let client = cluster.connect("postgres").await;
    client.batch_execute("create sequence s; create table t (id serial primary key, v int)").await.unwrap();
    client.simple_query("select nextval('s') from generate_series(1, 980)").await.unwrap();
    client.simple_query("insert into t (v) select g from generate_series(1, 980) g").await.unwrap();
    for _ in 0..40 {
        let given = value(&client, "select nextval('s')").await;
        let stands = value(&follower, "select last_value from s").await;
        assert!(stands >= given, "{given} was given, the follower stands at {stands}");
        let given = value(&client, "insert into t (v) values (1) returning id").await;
        let stands = value(&follower, "select last_value from t_id_seq").await;
        assert!(stands >= given, "{given} was given, the follower stands at {stands}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_that_joins_does_not_give_a_value_again() {
    let cluster = common::cluster();
    let client = cluster.connect("postgres").await;
    client.batch_execute("create sequence s; create table t (id serial primary key, v int)").await.unwrap();
    client.simple_query("select nextval('s') from generate_series(1, 1700)").await.unwrap();
    cluster.command(&["detach", "node1", "--yes"]);
    cluster.wait_member(1, false).await;
    let working = tokio::spawn(async move {
        let mut given = 0;
        for _ in 0..150 {
            given = value(&client, "select nextval('s') from generate_series(1, 20) order by 1 desc").await;
            client.simple_query("insert into t (v) select g from generate_series(1, 15) g").await.unwrap();
        }
        (client, given)
    });
    cluster.recover(1);
    let (client, given) = working.await.unwrap();
    cluster.wait_member(1, true).await;
    let follower = cluster.connect_node(1, "postgres").await;
    assert!(value(&follower, "select last_value from s").await >= given);
    let last = value(&client, "select max(id) from t").await;
    assert!(value(&follower, "select last_value from t_id_seq").await >= last);
    cluster.wait_well().await;
    cluster.assert_identical().await;
}

/// An extension such as citext brings aggregates of its own with the names of PostgreSQL's.
#[tokio::test(flavor = "multi_thread")]
async fn a_sequence_is_set_to_an_aggregate_of_which_users_have_another_one() {
    let cluster = common::cluster();
    let client = cluster.connect("postgres").await;
    run_all(
        &client,
        &[
            "create table t (id serial primary key, v text); insert into t values (7), (9)",
            "create function larger(text[], text[]) returns text[] immutable language sql as 'select greatest($1, $2)'",
            "create aggregate max (text[]) (sfunc = larger, stype = text[])",
            // What Django, Rails and many a migration write.
            "select setval(pg_get_serial_sequence('t', 'id'), coalesce(max(id), 1), max(id) is not null) from t",
            "insert into t (v) select (max(string_to_array(v, ','))) [1] from t",
        ],
    )
    .await;
    assert_eq!(same(&cluster, "postgres", "select max(id) from t").await, "10");
    cluster.assert_identical().await;
}
