//! Definitions that do something only if there is something to do (IF EXISTS, ALL TABLES), while others make and drop the same things:
//! followers run them at the commit, and what is there then must not decide.

mod common;

use common::ask::{run, same, state};
use tokio_postgres::Client;

/// By the simple or the extended protocol.
async fn send(client: &Client, text: &str, extended: bool) {
    if extended {
        client.execute(text, &[]).await.unwrap_or_else(|error| panic!("{text}: {error:?}"));
    } else {
        run(client, text).await;
    }
}

struct Case {
    before: &'static str,
    /// In a block that stays open.
    late: &'static str,
    /// Committed meanwhile.
    meanwhile: &'static str,
    commit: &'static str,
    /// Tables that are there afterwards.
    tables: &'static str,
}

const CASES: [Case; 8] = [
    Case {
        before: "",
        late: "drop table if exists a",
        meanwhile: "create table a (id int)",
        commit: "ok",
        tables: "a",
    },
    Case {
        before: "create table a (id int)",
        late: "create table if not exists a (id int)",
        meanwhile: "drop table a",
        commit: "ok",
        tables: "",
    },
    Case {
        before: "create table a (id int)",
        late: "create table if not exists a as select 1 as id with no data",
        meanwhile: "drop table a",
        commit: "ok",
        tables: "",
    },
    Case {
        before: "create table a (id int)",
        late: "drop table if exists a, b",
        meanwhile: "create table b (id int)",
        commit: "40001",
        tables: "a,b",
    },
    Case {
        before: "create table a (id int)",
        late: "drop table if exists a, b",
        meanwhile: "insert into kept values (1)",
        commit: "ok",
        tables: "",
    },
    Case {
        before: "create table a (id int)",
        late: "drop table if exists a",
        meanwhile: "create table b (id int)",
        commit: "ok",
        tables: "b",
    },
    Case {
        before: "create table a (id int)",
        late: "grant select on all tables in schema public to reader",
        meanwhile: "create table b (id int)",
        commit: "40001",
        tables: "a,b",
    },
    // Nobody counts what a definition wrote.
    Case {
        before: "set track_counts = off",
        late: "drop table if exists a",
        meanwhile: "create table a (id int)",
        commit: "40001",
        tables: "a",
    },
];

#[tokio::test(flavor = "multi_thread")]
async fn what_a_definition_found_on_the_leader_holds_everywhere() {
    let cluster = common::cluster();
    let other = cluster.connect("postgres").await;
    run(&other, "create role reader; create table kept (id int)").await;
    for case in &CASES {
        for extended in [false, true] {
            let client = cluster.connect("postgres").await;
            run(&client, &format!("select 1; {}", case.before)).await;
            run(&client, "begin").await;
            send(&client, case.late, extended).await;
            run(&client, "insert into kept values (0)").await;
            run(&other, case.meanwhile).await;
            assert_eq!(state(&client, "commit").await, case.commit, "{}", case.late);
            let tables = "select coalesce(string_agg(relname, ',' order by relname), '') from pg_class \
                          where relname in ('a', 'b')";
            assert_eq!(same(&cluster, "postgres", tables).await, case.tables, "{}", case.late);
            let rights = "select coalesce(string_agg(concat(relname, relacl), ',' order by relname), '') from pg_class \
                          where relname in ('a', 'b')";
            same(&cluster, "postgres", rights).await;
            run(&other, "drop table if exists a, b").await;
        }
    }
    // Nothing to do is no reason for an error, nor is a savepoint.
    run(&other, "begin; savepoint s; drop table if exists a, b; rollback to s; create table a (id int); commit").await;
    let client = cluster.connect("postgres").await;
    run(&client, "begin; drop table if exists a, b; rollback; drop table if exists a").await;
    assert_eq!(
        state(&client, "begin; grant select on all tables in schema public to reader; prepare transaction 'x'").await,
        "0A000"
    );
    cluster.assert_identical().await;
}
