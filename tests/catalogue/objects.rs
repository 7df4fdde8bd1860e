//! C10, C12 to C14, C18 to C21: large objects, temporary tables, foreign servers, COPY, side effects of queries, names and roles, notifications.

use bytes::Bytes;
use futures_util::SinkExt;
use tokio_postgres::Client;

use crate::stage::Fate::{Exact, Refused};
use crate::stage::{Case, Stage, check, code_of, play, refused, run, value};

pub async fn play(stage: &mut Stage) {
    play!(
        stage,
        c10_large_objects,
        c12_temporary_tables,
        c13_foreign_servers,
        c14_copy_with_defaults,
        c18_queries_with_side_effects,
        c19_what_a_name_means,
        c20_roles,
        c21_notifications_once,
    );
}

async fn c10_large_objects(case: &Case<'_>) {
    let a = case.client().await;
    run(&a, "create table t (id int primary key, o oid)").await;
    for (fate, text) in [
        (Exact, "select lo_create(0)"),
        (Refused, "insert into t values (1, lo_from_bytea(0, 'hello'))"),
        (Refused, "select lo_put(o, 0, 'x') from t"),
        (Exact, "select lo_unlink(o) from t"),
    ] {
        check(&a, fate, text).await;
    }
    case.same_on_each_node("select coalesce(string_agg(oid::text, ',' order by oid), '') from pg_largeobject_metadata")
        .await;
}

async fn c12_temporary_tables(case: &Case<'_>) {
    let a = case.client().await;
    run(&a, "create table t (id int primary key, v int)").await;
    run(&a, "create temp table source (id int, v int); insert into source select i, i from generate_series(1, 5) i")
        .await;
    run(&a, "insert into t select * from source").await;
    run(&a, "update t set v = s.v * 10 from source s where s.id = t.id").await;
    run(&a, "delete from t where id in (select id from source where v > 3)").await;
    run(&a, "begin; create temp table gone (i int) on commit drop; insert into gone values (9); insert into t select i, i from gone; commit").await;
    // Hides the permanent one from this session alone.
    run(&a, "create temp table t (id int, v int); insert into t values (77, 77); drop table pg_temp.t").await;
    assert_eq!(value(&a, "select count(*) from t where id = 77").await, "0");
    assert_eq!(value(&a, "select v from t where id = 9").await, "9");
}

async fn c13_foreign_servers(case: &Case<'_>) {
    let a = case.client().await;
    run(&a, "create table t (id int primary key)").await;
    let port = case.cluster.layout.postgres_port(0);
    for (extension, text) in [
        (
            "dblink",
            format!("select dblink_exec('host=127.0.0.1 port={port} dbname=postgres user=postgres', 'select 1')"),
        ),
        (
            "postgres_fdw",
            format!("create server c13 foreign data wrapper postgres_fdw options (host '127.0.0.1', port '{port}')"),
        ),
    ] {
        // The contributed modules may not be installed.
        if value(&a, &format!("select count(*) from pg_available_extensions where name = '{extension}'")).await == "1" {
            run(&a, &format!("create extension if not exists {extension} schema public")).await;
            run(&a, "set search_path = c13_foreign_servers, public").await;
            let worked = code_of(&a, &text).await;
            assert!(["0A000", "00000", "42883", "2F003", "42601"].contains(&worked.as_str()), "{text}: {worked}");
        }
    }
}

/// Sends COPY data; the SQLSTATE if it failed.
async fn copy(client: &Client, text: &str, data: &str) -> String {
    let sink = match client.copy_in::<_, Bytes>(text).await {
        Ok(sink) => sink,
        Err(error) => return crate::stage::code(&error),
    };
    let mut sink = Box::pin(sink);
    sink.send(Bytes::from(data.to_owned())).await.unwrap();
    sink.as_mut().finish().await.map_or_else(|error| crate::stage::code(&error), |_| "00000".to_owned())
}

async fn c14_copy_with_defaults(case: &Case<'_>) {
    let a = case.client().await;
    run(&a, "create table plain (id int primary key, v int default 5, t text); create table s (id serial primary key, v int, u uuid default gen_random_uuid(), ts timestamptz default now())").await;
    assert_eq!(copy(&a, "copy plain (id, t) from stdin", "1\ta\\tb\n2\t\\N\n").await, "00000");
    assert_eq!(copy(&a, "copy plain from stdin (format csv, header)", "id,v,t\n3,3,\"x,\"\"y\"\n").await, "00000");
    assert_eq!(copy(&a, "copy plain (id, t) from stdin", "9\ta\n1\tdouble\n").await, "23505");
    assert_eq!(value(&a, "select count(*) from plain").await, "3");
    assert_eq!(value(&a, "select v from plain where id = 1").await, "5");
    for _ in 0..2 {
        assert_eq!(copy(&a, "copy s (v) from stdin", "1\n2\n3\n").await, "00000");
    }
    assert_eq!(value(&a, "select max(id) || '/' || count(distinct u) from s").await, "6/6");
    run(&a, "begin").await;
    assert_eq!(copy(&a, "copy plain from stdin", "7\t7\tseven\n").await, "00000");
    run(&a, "savepoint s").await;
    assert_eq!(copy(&a, "copy plain from stdin", "8\t8\teight\n").await, "00000");
    run(&a, "rollback to s; commit").await;
    assert_eq!(value(&a, "select string_agg(id::text, ',' order by id) from plain").await, "1,2,3,7");
}

async fn c18_queries_with_side_effects(case: &Case<'_>) {
    let a = case.client().await;
    run(
        &a,
        "create table t (id int primary key, v int); insert into t select i, i from generate_series(1, 9) i; create sequence s;
         create function writes() returns int language plpgsql as $$ begin delete from t where id = 1; return 1; end $$;
         create function stable_lie() returns int language plpgsql stable as $$ begin return 1; end $$",
    )
    .await;
    for (fate, text) in [
        (Exact, "select set_config('work_mem', '2MB', false)"),
        (Exact, "select nextval('s')"),
        (Exact, "select pg_notify('x', 'y')"),
        (Exact, "select writes()"),
        (Refused, "select * from t where writes() = 1"),
        (Exact, "select stable_lie()"),
        (Refused, "explain analyze delete from t where id = 2"),
        (Exact, "explain delete from t where id = 2"),
        (Exact, "prepare p as delete from t where id = 4"),
        (Exact, "prepare q as select 1"),
        (Exact, "execute p"),
        (Exact, "execute q"),
        (Refused, "with w as (select writes()) select * from w"),
        (Refused, "declare c cursor with hold for select writes()"),
        (Exact, "values (writes())"),
    ] {
        check(&a, fate, text).await;
    }
    assert_eq!(value(&a, "select current_setting('work_mem')").await, "2MB");
    assert_eq!(value(&a, "select string_agg(id::text, ',' order by id) from t").await, "2,3,5,6,7,8,9");
}

async fn c19_what_a_name_means(case: &Case<'_>) {
    let a = case.client().await;
    run(&a, "create schema c19_one; create schema c19_two").await;
    for schema in ["c19_one", "c19_two"] {
        run(&a, &format!("create table {schema}.t (id int primary key, v text)")).await;
        run(
            &a,
            &format!(
                "create function {schema}.f(i int) returns text language sql immutable as $$ select '{schema}' || i $$"
            ),
        )
        .await;
    }
    run(&a, "set search_path = c19_one; insert into t values (1, f(1))").await;
    run(&a, "select set_config('search_path', 'c19_two', false)").await;
    run(&a, "insert into t values (1, f(1))").await;
    run(&a, "begin; set local search_path = c19_one; insert into t values (2, f(2)); commit; insert into t values (3, f(3))").await;
    run(
        &a,
        "begin; savepoint s; set local search_path = c19_one; rollback to s; insert into t values (4, f(4)); commit",
    )
    .await;
    run(&a, "create role c19 login; alter role c19 set search_path = c19_one; grant all on schema c19_one to c19; grant all on c19_one.t to c19").await;
    let settings = format!("host=127.0.0.1 port={} user=c19 dbname=postgres", case.cluster.layout.proxy_port());
    let (client, connection) = tokio_postgres::connect(&settings, tokio_postgres::NoTls).await.unwrap();
    tokio::spawn(connection);
    run(&client, "insert into t values (9, f(9))").await;
    let insert = client.prepare("insert into t values ($1, f($1))").await.unwrap();
    client.execute(&insert, &[&10]).await.unwrap();
    assert_eq!(
        value(&a, "select string_agg(v, ',' order by id) from c19_one.t").await,
        "c19_one1,c19_one2,c19_one9,c19_one10"
    );
    assert_eq!(value(&a, "select string_agg(v, ',' order by id) from c19_two.t").await, "c19_two1,c19_two3,c19_two4");
}

async fn c20_roles(case: &Case<'_>) {
    let a = case.client().await;
    run(&a, "create role c20_a; create role c20_b; grant usage, create on schema c20_roles to c20_a, c20_b").await;
    run(&a, "create table t (id int primary key, who text default current_user); grant insert, select on t to c20_a")
        .await;
    run(&a, "set role c20_a; insert into t values (1); create table mine (i int primary key); reset role").await;
    run(&a, "begin; set local role c20_a; insert into t (id) values (2); commit; insert into t (id) values (3)").await;
    run(&a, "set role c20_b").await;
    refused(&a, "insert into t values (4)").await;
    assert_eq!(code_of(&a, "insert into mine values (4)").await, "42501");
    run(&a, "reset role").await;
    run(&a, "set session authorization c20_a").await;
    run(&a, "reset session authorization").await;
    run(&a, "create table security (id int primary key); alter table security owner to c20_a; insert into security values (1)").await;
    assert_eq!(value(&a, "select string_agg(who, ',' order by id) from t").await, "c20_a,c20_a,postgres");
    case.same_on_each_node("select string_agg(relname || ' ' || relowner::regrole, ',' order by relname) from pg_class where relnamespace = 'c20_roles'::regnamespace").await;
}

async fn c21_notifications_once(case: &Case<'_>) {
    let settings = format!("host=127.0.0.1 port={} user=postgres dbname=postgres", case.cluster.layout.proxy_port());
    let (listener, mut connection) = tokio_postgres::connect(&settings, tokio_postgres::NoTls).await.unwrap();
    let (send, mut heard) = tokio::sync::mpsc::channel(100);
    tokio::spawn(async move {
        while let Some(Ok(message)) = std::future::poll_fn(|cx| connection.poll_message(cx)).await {
            if let tokio_postgres::AsyncMessage::Notification(note) = message {
                let _ = send.send(note.payload().to_owned()).await;
            }
        }
    });
    run(&listener, "listen c21").await;
    let a = case.client().await;
    run(&a, "create table t (id int primary key)").await;
    run(&a, "begin; insert into t values (1); notify c21, 'one'; commit; begin; notify c21, 'never'; rollback").await;
    run(&a, "insert into t values (2); select pg_notify('c21', 'two'); notify c21, 'last'").await;
    let mut all = Vec::new();
    while all.last().map(String::as_str) != Some("last") {
        let note = tokio::time::timeout(crate::common::LIMIT, heard.recv()).await.expect("a notification");
        all.push(note.unwrap());
    }
    assert_eq!(all, ["one", "two", "last"]);
}
