//! Statements that call or fire code: on every server alike, or refused, or found out.

mod common;

use common::ask::run;
use std::time::Duration;

use common::Cluster;
use common::fault::{Fault, Towards};
use tokio_postgres::Client;
use tokio_postgres::error::SqlState;

/// Tables and code that do the same everywhere.
const SCHEMA: &str = "
create table item (id int primary key, v int, note text);
create table audit (item int, old int, new int);
create table total (id int primary key, n int);
insert into total values (1, 0);
create function keep() returns trigger language plpgsql as $$
begin
  if tg_op = 'UPDATE' and new.v is distinct from old.v then insert into audit (item, old, new) values (new.id, old.v, new.v); end if;
  new.note := upper(new.note);
  return new;
end $$;
create trigger keep before insert or update on item for each row execute function keep();
create procedure move(amount int) language plpgsql as $$
begin
  update total set n = n + amount where id = 1;
  insert into item (id, v, note) values (amount, amount, 'moved');
end $$;
create function add_item(i int, w text) returns int language plpgsql as $$
begin
  raise notice 'adding %', i;
  insert into item (id, v, note) values (i, i, w);
  return i * 10;
end $$;
create view items as select id, v from item;
create table ruled (id int primary key, v int);
create rule ruled_log as on insert to ruled do also insert into audit (item, old, new) values (new.id, null, new.v);
create table tenant_row (id int primary key, tenant text);
alter table tenant_row enable row level security;
create policy own on tenant_row using (tenant = current_setting('app.tenant', true));
create role clerk login;
grant all on all tables in schema public to clerk;
";

async fn prepared() -> (Cluster, Client) {
    let cluster = common::cluster();
    let client = cluster.connect("postgres").await;
    run(&client, SCHEMA).await;
    (cluster, client)
}

/// A cluster whose proxy runs what is not proven, too.
async fn allowing(nodes: &str) -> (Cluster, Client) {
    configured(nodes, "unproven = \"refuse\"", "unproven = \"allow\"").await
}

/// A cluster with one line of the configuration changed.
async fn configured(nodes: &str, line: &str, instead: &str) -> (Cluster, Client) {
    let cluster = Cluster::up(&["--nodes", nodes]);
    let path = cluster.config_path();
    let text = std::fs::read_to_string(&path).expect("the configuration");
    assert!(text.contains(line), "{text}");
    std::fs::write(&path, text.replace(line, instead)).expect("the configuration");
    cluster.kill_proxy();
    cluster.start_again();
    let client = cluster.connect("postgres").await;
    run(&client, SCHEMA).await;
    (cluster, client)
}

async fn connect_as(cluster: &Cluster, user: &str) -> Client {
    let settings = format!("host=127.0.0.1 port={} user={user} dbname=postgres", cluster.layout.proxy_port());
    let (client, connection) = tokio_postgres::connect(&settings, tokio_postgres::NoTls).await.expect("a client");
    tokio::spawn(connection);
    client
}

/// SQLSTATE and message of a statement that must fail.
async fn refused(client: &Client, text: &str) -> (SqlState, String) {
    let error = client.batch_execute(text).await.expect_err(text);
    let error = error.as_db_error().unwrap_or_else(|| panic!("{text}: {error}"));
    (error.code().clone(), error.message().to_owned())
}

async fn one(client: &Client, text: &str) -> Option<String> {
    let rows = client.simple_query(text).await.unwrap_or_else(|error| panic!("{text}: {error:?}"));
    rows.iter().find_map(|message| match message {
        tokio_postgres::SimpleQueryMessage::Row(row) => row.get(0).map(str::to_owned),
        _ => None,
    })
}

/// The same value on every server, and no difference anywhere.
async fn everywhere(cluster: &Cluster, text: &str, expected: &str) {
    cluster.assert_identical().await;
    for index in 0..cluster.layout.plan.nodes {
        let node = cluster.connect_node(index, "postgres").await;
        assert_eq!(one(&node, text).await.as_deref(), Some(expected), "{text} on node{index}");
    }
}

const ITEMS: &str = "select string_agg(id || note, ',' order by id) from item";

#[tokio::test(flavor = "multi_thread")]
async fn code_that_is_the_same_everywhere_runs_on_every_server() {
    let (cluster, client) = prepared().await;
    run(&client, "insert into item values (1, 1, 'first')").await;
    run(&client, "update item set v = v + 5 where id = 1").await;
    run(&client, "call move(7)").await;
    assert_eq!(one(&client, "select add_item(8, 'by a function')").await.as_deref(), Some("80"));
    assert_eq!(one(&client, "insert into item values (20, 2, 'back') returning note").await.as_deref(), Some("BACK"));
    run(&client, "do $$ begin update total set n = n * 2 where id = 1; end $$").await;
    run(&client, "insert into items values (9, 9)").await;
    run(&client, "insert into ruled values (30, 10)").await;
    run(&client, "with d as (delete from audit where item = 1 returning new) insert into total select 2, new from d")
        .await;
    run(&client, "select 1; call move(40); insert into total values (5, 5)").await;
    everywhere(&cluster, ITEMS, "1FIRST,7MOVED,8BY A FUNCTION,20BACK,40MOVED").await;
    everywhere(&cluster, "select string_agg(id || ':' || n, ',' order by id) from total", "1:54,2:6,5:5").await;
    everywhere(&cluster, "select string_agg(item || ':' || new, ',' order by item) from audit", "30:10").await;
    cluster.wait_well().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn parameters_notices_and_rows_are_as_on_one_server() {
    let (cluster, _) = prepared().await;
    let port = cluster.layout.proxy_port();
    let settings = format!("host=127.0.0.1 port={port} user=postgres dbname=postgres");
    let (client, mut connection) = tokio_postgres::connect(&settings, tokio_postgres::NoTls).await.expect("a client");
    let (sender, mut notices) = tokio::sync::mpsc::channel(100);
    tokio::spawn(async move {
        while let Some(message) = std::future::poll_fn(|cx| connection.poll_message(cx)).await {
            if let Ok(tokio_postgres::AsyncMessage::Notice(notice)) = message {
                let _ = sender.try_send(notice.message().to_owned());
            }
        }
    });
    // Behind the guard first, then in its own lane, then at once: the notice comes once each time.
    for id in 1..4_i32 {
        let row = client.query_one("select add_item($1, $2)", &[&id, &"text"]).await.expect("a function");
        assert_eq!(row.get::<_, i32>(0), id * 10);
        assert_eq!(notices.recv().await, Some(format!("adding {id}")));
    }
    let call = client.prepare("call move($1)").await.expect("prepare");
    for amount in 10..13_i32 {
        client.execute(&call, &[&amount]).await.expect("call");
    }
    let insert = client.prepare("insert into item values ($1, $2, $3) returning id, note").await.expect("prepare");
    for id in 20..23_i32 {
        let row = client.query_one(&insert, &[&id, &None::<i32>, &"it's"]).await.expect("insert");
        assert_eq!((row.get::<_, i32>(0), row.get::<_, &str>(1)), (id, "IT'S"));
    }
    assert_eq!(client.execute("update item set v = $1 where id = $2", &[&5, &20]).await.expect("update"), 1);
    let error = client.query(&insert, &[&20, &1, &"twice"]).await.expect_err("the row is there");
    assert_eq!(error.code(), Some(&SqlState::UNIQUE_VIOLATION));
    assert!(notices.try_recv().is_err(), "no notice twice");
    // A session's temporary tables are in nobody's way.
    run(&client, "create temp table scratch (i int)").await;
    run(
        &client,
        "create procedure tell(inout words text) language plpgsql as $$ begin raise notice '%', words; end $$",
    )
    .await;
    let row = client.query_one("call tell($1)", &[&"hello"]).await.expect("call");
    assert_eq!((row.get::<_, &str>(0), notices.recv().await.as_deref()), ("hello", Some("hello")));
    run(&client, "call move(13)").await;
    everywhere(&cluster, "select count(*) || ':' || count(v) from item", "10:8").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn savepoints_rollbacks_and_errors_are_the_same_everywhere() {
    let (cluster, client) = prepared().await;
    run(
        &client,
        "begin; insert into total values (3, 3); savepoint a; call move(1); rollback to a; call move(2); commit",
    )
    .await;
    run(&client, "begin; call move(3); rollback").await;
    run(&client, "begin").await;
    run(&client, "insert into total values (4, 4)").await;
    run(&client, "savepoint a").await;
    run(&client, "call move(4)").await;
    run(&client, "savepoint b").await;
    run(&client, "update total set n = 40 where id = 4").await;
    run(&client, "call move(5)").await;
    assert_eq!(refused(&client, "call move(5)").await.0, SqlState::UNIQUE_VIOLATION);
    run(&client, "rollback to b").await;
    run(&client, "release a").await;
    run(&client, "savepoint a").await;
    run(&client, "call move(6)").await;
    run(&client, "update total set n = n + 1 where id = 4").await;
    run(&client, "commit").await;
    // An error ends the half, too; another transaction can use the row at once.
    let other = cluster.connect("postgres").await;
    run(&client, "begin; call move(7)").await;
    assert_eq!(refused(&client, "select 1 / 0").await.0, SqlState::DIVISION_BY_ZERO);
    run(&other, "call move(7)").await;
    run(&client, "rollback").await;
    // A client that leaves in the middle.
    run(&client, "begin; call move(8)").await;
    drop(client);
    common::wait_for("the row is free again", async || other.batch_execute("call move(8)").await.is_ok()).await;
    everywhere(&cluster, ITEMS, "2MOVED,4MOVED,6MOVED,7MOVED,8MOVED").await;
    everywhere(&cluster, "select string_agg(id || ':' || n, ',' order by id) from total", "1:27,3:3,4:5").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_would_differ_is_refused_with_its_reason() {
    let (cluster, client) = prepared().await;
    run(
        &client,
        "create table stamped (id int primary key, at timestamptz default now());
         create table numbered (n serial primary key, v int);
         create table gone (id int primary key);
         create function stamp() returns trigger language plpgsql as $$ begin insert into numbered (v) values (new.id); return new; end $$;
         create trigger stamp after insert on gone for each row execute function stamp();
         create function clock() returns trigger language plpgsql as $$ begin insert into audit (old) values (extract(epoch from clock_timestamp())::int); return new; end $$;
         create trigger clock before insert on stamped for each row execute function clock();
         create function first_one() returns int language plpgsql as $$ declare n int; begin select id into n from total; insert into audit (item) values (n); return n; end $$;
         create function tells() returns void language plpgsql as $$ begin notify x; end $$;
         create function marks() returns void language sql as $$ update pgtandem.mark set n = n where id = 1 $$;
         create function given(a int default (random() * 100)::int) returns int language sql immutable as 'select a';
         create function given_late(a int default extract(epoch from now())::int) returns void language sql as 'insert into total values (8, a)';
         create function who() returns void language plpgsql as $$ begin insert into item (id, note) values (77, session_user); end $$",
    )
    .await;
    for (text, reason) in [
        ("insert into gone values (1)", "nextval"),
        ("insert into stamped values (1)", "now()"),
        ("insert into stamped values (1, null)", "clock_timestamp"),
        ("do $$ begin insert into item (id, v) values (1, (random() * 10)::int); end $$", "random"),
        ("insert into total values (9, given())", "random"),
        ("select given_late()", "now()"),
        ("do $$ begin insert into item (id, note) values (1, txid_current()::text); end $$", "txid_current"),
        ("do $$ begin insert into item (id, note) values (1, gen_random_uuid()::text); end $$", "gen_random_uuid"),
        ("do $$ begin create table x (a int); end $$", "definitions"),
        ("do $$ begin update total set n = 1; commit; end $$", "ends the transaction"),
        ("do $$ begin set local role clerk; update total set n = 1; end $$", "setting"),
        ("do $$ begin execute 'update total set n = 1'; end $$", "put together at run time"),
        ("select first_one()", "first row"),
        ("select who()", "session_user"),
        ("do $$ begin perform pg_notify('a', 'b'); update total set n = 1; end $$", "pg_notify"),
        ("do $$ begin update pgtandem.mark set n = n; end $$", "belongs to pgtandem"),
        ("do $$ begin perform pgtandem.enter('x', 1); update total set n = 1; end $$", "belongs to pgtandem"),
        ("select marks()", "belongs to pgtandem"),
    ] {
        let (code, message) = refused(&client, text).await;
        assert!(code == SqlState::FEATURE_NOT_SUPPORTED && message.contains(reason), "{text}: {code:?} {message}");
    }
    let error = client.execute("insert into item values (1, 1, 'x'), ($1, 2, 'y')", &[&2]).await;
    assert!(error.is_ok(), "rows in a certain order: {error:?}");
    everywhere(
        &cluster,
        "select count(*) || ',' || (select count(*) from audit) || ',' || (select n from total) from item",
        "2,0,0",
    )
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn row_level_security_sees_the_client_s_role_and_settings() {
    let (cluster, client) = prepared().await;
    run(&client, "set role clerk; set app.tenant = 'blue'").await;
    run(&client, "insert into tenant_row values (1, 'blue')").await;
    assert_eq!(refused(&client, "insert into tenant_row values (2, 'red')").await.0, SqlState::INSUFFICIENT_PRIVILEGE);
    run(&client, "begin; set local app.tenant = 'red'; insert into tenant_row values (2, 'red'); commit").await;
    run(&client, "update tenant_row set id = id + 10").await;
    run(&client, "delete from tenant_row where tenant = 'red'").await;
    everywhere(&cluster, "select string_agg(id || tenant, ',' order by id) from tenant_row", "2red,11blue").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lock_that_is_held_keeps_nobody_else_waiting() {
    let (cluster, client) = prepared().await;
    run(&client, "insert into item values (1, 1, 'x')").await;
    let holder = cluster.connect("postgres").await;
    run(&holder, "begin; select * from item where id = 1 for update").await;
    let waiting = tokio::spawn(async move { refused(&client, "update item set v = 2 where id = 1").await });
    let other = cluster.connect("postgres").await;
    let mut commits = 0;
    while !waiting.is_finished() {
        commits += 1;
        run(&other, &format!("insert into total values ({}, 1)", 100 + commits)).await;
    }
    let (code, message) = waiting.await.expect("the client");
    assert_eq!(code, SqlState::T_R_SERIALIZATION_FAILURE, "{message}");
    assert!(commits > 5, "others committed {commits} times meanwhile");
    // The same in a block, by the extended protocol: what has run out of time has left a portal behind.
    let mut client = cluster.connect("postgres").await;
    let block = client.transaction().await.expect("a block");
    let error = block.execute("update item set v = $1::int where id = 1", &[&2_i32]).await.expect_err("it is locked");
    assert_eq!(error.code(), Some(&SqlState::T_R_SERIALIZATION_FAILURE), "{error:?}");
    block.rollback().await.expect("the end of the block");
    // The holder ends while another one tries.
    let waiting = tokio::spawn(async move { client.batch_execute("update item set v = 3 where id = 1").await });
    tokio::time::sleep(Duration::from_millis(50)).await;
    run(&holder, "commit").await;
    waiting.await.expect("the client").expect("the lock is free again");
    everywhere(&cluster, "select v::text from item", "3").await;
}

/// What comes behind a statement in its text, or in its batch, may wait for somebody who calls code next.
#[tokio::test(flavor = "multi_thread")]
async fn nobody_waits_for_a_statement_that_is_done_and_waits_itself() {
    let (cluster, holder) = prepared().await;
    run(&holder, "insert into total values (2, 0); insert into item values (1, 1, 'x')").await;
    let other = cluster.connect("postgres").await;
    for text in ["call move(10); update total set n = 9 where id = 2", "call move(11); truncate total cascade"] {
        run(&holder, "begin; select * from total where id = 2 for update").await;
        let (waiting, other_again) = (cluster.connect("postgres").await, text.to_owned());
        let waiting = tokio::spawn(async move { waiting.batch_execute(&other_again).await });
        common::wait_for("the second statement waits for the holder", async || {
            let sql = "select count(*) from pg_stat_activity where wait_event_type = 'Lock'";
            other.query_one(sql, &[]).await.expect("sessions").get::<_, i64>(0) == 1
        })
        .await;
        run(&holder, "update item set v = v + 1 where id = 1").await;
        run(&holder, "commit").await;
        waiting.await.expect("the client").expect("nothing is in its way");
    }
    everywhere(&cluster, "select string_agg(concat(id, ':', v), ',' order by id) from item", "1:3,10:10,11:11").await;
    everywhere(&cluster, "select count(*)::text from total", "0").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_snapshot_that_is_kept_must_be_taken_by_the_statement_itself() {
    let (cluster, client) = prepared().await;
    for (amount, isolation) in [(1, "repeatable read"), (2, "serializable")] {
        run(&client, &format!("begin isolation level {isolation}")).await;
        run(&client, &format!("call move({amount})")).await;
        run(&client, "insert into audit (item) values (5)").await;
        run(&client, "commit").await;
        run(&client, &format!("begin isolation level {isolation}; select 1")).await;
        let (code, message) = refused(&client, "call move(9)").await;
        assert!(code == SqlState::FEATURE_NOT_SUPPORTED && message.contains("first"), "{message}");
        run(&client, "rollback").await;
    }
    everywhere(&cluster, ITEMS, "1MOVED,2MOVED").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_follower_that_dies_with_open_halves_costs_no_error() {
    let (cluster, client) = prepared().await;
    run(&client, "begin; call move(1)").await;
    cluster.kill_postgres(1);
    run(&client, "call move(2)").await;
    run(&client, "insert into total values (9, 9)").await;
    run(&client, "commit").await;
    cluster.wait_member(1, false).await;
    run(&client, "call move(3)").await;
    cluster.recover(1);
    run(&client, "call move(4)").await;
    everywhere(&cluster, ITEMS, "1MOVED,2MOVED,3MOVED,4MOVED").await;
}

/// The network to a follower stands still while a statement is under way there: nobody waits for it longer than the gate may be closed.
#[tokio::test(flavor = "multi_thread")]
async fn a_follower_that_does_not_answer_keeps_nobody_else_waiting() {
    // What the gate has to do with it would not be seen otherwise.
    let (cluster, client) = configured("3", "follower_ms_max = 30000", "follower_ms_max = 3600000").await;
    for (round, isolation) in ["read committed", "repeatable read"].into_iter().enumerate() {
        let fault = Fault::interpose(&cluster, 1).await;
        let held = fault.hold(Towards::Server, b'P', "SELECT pgtandem.once_");
        run(&client, &format!("begin isolation level {isolation}")).await;
        let calling = async { run(&client, &format!("call move({})", round + 1)).await };
        let other = cluster.connect("postgres").await;
        let meanwhile = async {
            held.reached().await;
            run(&other, &format!("insert into total values ({}, 1)", 100 + round)).await;
        };
        let both = async { tokio::join!(calling, meanwhile) };
        tokio::time::timeout(common::LIMIT, both).await.expect("the gate opens although a follower does not answer");
        run(&client, "insert into audit (item) values (1)").await;
        run(&client, "commit").await;
        cluster.wait_member(1, false).await;
        held.cut();
        drop(fault);
        cluster.recover(1);
    }
    everywhere(&cluster, ITEMS, "1MOVED,2MOVED").await;
    everywhere(&cluster, "select string_agg(id || ':' || n, ',' order by id) from total", "1:3,100:1,101:1").await;
}

/// A follower can not prepare what the code did: its half is ended before the leader gives up its locks.
#[tokio::test(flavor = "multi_thread")]
async fn a_commit_that_fails_ends_open_halves_before_the_leader() {
    let (cluster, client) = allowing("2").await;
    run(
        &client,
        "create procedure odd() language plpgsql as $$ begin
           update total set n = n + 1 where id = 1;
           execute 'create temp table odd (a int)';
         end $$",
    )
    .await;
    let fault = Fault::interpose(&cluster, 1).await;
    run(&client, "begin; call odd()").await;
    let held = fault.hold(Towards::Server, b'P', "ROLLBACK");
    let committing = tokio::spawn(async move { refused(&client, "commit").await });
    held.reached().await;
    let other = cluster.connect("postgres").await;
    let nowait = "select n from total where id = 1 for update nowait";
    assert_eq!(refused(&other, nowait).await.0, SqlState::LOCK_NOT_AVAILABLE, "the leader holds the row");
    held.release();
    let (code, message) = committing.await.expect("a client");
    assert!(code == SqlState::FEATURE_NOT_SUPPORTED && message.contains("can not be prepared"), "{code:?} {message}");
    run(&other, nowait).await;
    run(&other, "call move(1)").await;
    drop(fault);
    cluster.wait_member(1, true).await;
    everywhere(&cluster, "select n::text from total where id = 1", "1").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn code_that_did_something_else_on_a_follower_is_found_and_undone() {
    let (cluster, client) = allowing("3").await;
    let port = cluster.layout.postgres_port(0);
    run(
        &client,
        &format!(
            "create procedure differs() language plpgsql as $$ begin
               insert into audit (item) values (1);
               execute 'insert into audit (item) select 2 where current_setting(''port'') = ''{port}''';
             end $$;
             create procedure alike(n int) language plpgsql as $$ begin execute 'insert into audit (item) values ($1)' using n; end $$"
        ),
    )
    .await;
    run(&client, "call alike(7)").await;
    run(&client, "begin; insert into total values (7, 7)").await;
    let (code, message) = refused(&client, "call differs()").await;
    assert!(code == SqlState::T_R_SERIALIZATION_FAILURE && message.contains("public.audit"), "{code:?} {message}");
    run(&client, "rollback").await;
    let (code, message) = refused(&client, "call differs()").await;
    assert!(code == SqlState::FEATURE_NOT_SUPPORTED && message.contains("not run any more"), "{code:?} {message}");
    run(&client, "call alike(8)").await;
    run(&client, "do $$ begin update total set n = 424242 where id = 1; end $$").await;
    // The proxy's own schema, where no name of it can be read in the code.
    let own = "do $$ begin execute 'update pgtan' || 'dem.mark set n = n'; end $$";
    let (code, message) = refused(&client, own).await;
    assert!(code == SqlState::FEATURE_NOT_SUPPORTED && message.contains("pgtandem.mark"), "{code:?} {message}");
    everywhere(&cluster, "select string_agg(item::text, ',' order by item) from audit", "7,8").await;
    let (text, _) = cluster.status();
    assert!(text.contains("call differs()") && text.contains("call alike(?)"), "{text}");
    let json = cluster.command(&["status", "--json"]);
    assert!(
        !text.contains("424242") && !common::text(&json).contains("424242"),
        "literals are nobody's business: {text}"
    );
    let json: serde_json::Value = serde_json::from_slice(&json.stdout).expect("JSON");
    let shapes = json["once"].as_array().expect("shapes").clone();
    assert!(
        shapes.iter().any(|s| s["shape"] == "do $$ begin update total set n = ? where id = ?; end $$"),
        "{shapes:#?}"
    );
    let shape = |text: &str| shapes.iter().find(|shape| shape["shape"] == text).cloned().unwrap_or_default();
    assert_eq!(shape("call alike(?)")["runs"], 2, "{shapes:#?}");
    assert!(shape("call alike(?)")["unproven"].as_str().expect("a reason").contains("run time"), "{shapes:#?}");
    assert!(shape("call differs()")["refused"].as_str().expect("a reason").contains("public.audit"), "{shapes:#?}");
}

/// Code that a client wrote runs in a session of the proxy's own role on followers: it must not become that role.
#[tokio::test(flavor = "multi_thread")]
async fn code_gains_no_rights_on_a_follower() {
    let (cluster, client) = allowing("2").await;
    run(&client, "create table secret (a text); grant all on audit to clerk; grant create on schema public to clerk")
        .await;
    let client = connect_as(&cluster, "clerk").await;
    run(
        &client,
        "create function steal() returns void language plpgsql as $$ begin
           insert into audit (item) values (1);
           begin execute 'reset role'; exception when others then null; end;
           begin execute 'set session authorization default'; exception when others then null; end;
           begin perform set_config(lower('ROLE'), 'none', true); exception when others then null; end;
           begin execute 'insert into secret values (current_user)'; exception when insufficient_privilege then null; end;
         end $$",
    )
    .await;
    let (code, message) = refused(&client, "select steal()").await;
    assert!(code == SqlState::FEATURE_NOT_SUPPORTED && message.contains("setting"), "{message}");
    run(
        &client,
        "create or replace function steal() returns void language plpgsql as $$ begin
           insert into audit (item) values (1);
           begin execute 'reset role'; exception when others then null; end;
           begin execute 'set session authorization default'; exception when others then null; end;
           begin execute 'insert into secret values (current_user)'; exception when insufficient_privilege then null; end;
         end $$",
    )
    .await;
    run(&client, "select steal()").await;
    everywhere(&cluster, "select count(*) || ',' || (select count(*) from audit) from secret", "0,1").await;
}

/// Recoveries while clients call code: they may have to wait, or to try again, and nothing is lost or done twice.
#[tokio::test(flavor = "multi_thread")]
async fn a_node_joins_while_clients_call_code() {
    let (cluster, client) = prepared().await;
    run(
        &client,
        "create procedure count_up(k int) language plpgsql as $$ begin update total set n = n + 1 where id = k; end $$",
    )
    .await;
    run(&client, "insert into total select k, 0 from generate_series(11, 13) k").await;
    let stop = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
    let mut workers = Vec::new();
    for k in 11..14 {
        let (client, stop) = (cluster.connect("postgres").await, std::sync::Arc::clone(&stop));
        workers.push(tokio::spawn(async move {
            let mut done = 0;
            while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                let text = if done % 2 == 0 {
                    format!("call count_up({k})")
                } else {
                    format!("begin; call count_up({k}); commit")
                };
                match client.batch_execute(&text).await {
                    Ok(()) => done += 1,
                    Err(error) => {
                        assert_eq!(error.code(), Some(&SqlState::T_R_SERIALIZATION_FAILURE), "{error:?}");
                        let _ = client.batch_execute("rollback").await;
                    }
                }
            }
            (k, done)
        }));
    }
    for _ in 0..2 {
        cluster.kill_postgres(1);
        cluster.wait_member(1, false).await;
        cluster.recover(1);
    }
    stop.store(true, std::sync::atomic::Ordering::Relaxed);
    // All have ended before anything is compared.
    let mut ended = Vec::new();
    for worker in workers {
        ended.push(worker.await.expect("a worker"));
    }
    for (k, done) in ended {
        assert!(done > 10, "worker {k} did {done}");
        everywhere(&cluster, &format!("select n::text from total where id = {k}"), &done.to_string()).await;
    }
}

/// What we prepare for such a statement is out of the way for the next one.
#[tokio::test(flavor = "multi_thread")]
async fn a_statement_that_failed_does_not_hinder_the_next() {
    let (cluster, client) = prepared().await;
    let insert = client.prepare("insert into item values ($1, 0, 'x')").await.unwrap();
    let update = client.prepare("update item set v = v + $1 where id = $2").await.unwrap();
    client.execute(&insert, &[&1]).await.unwrap();
    run(&client, "begin read only").await;
    let error = client.execute(&update, &[&1, &1]).await.unwrap_err();
    assert_eq!(error.code(), Some(&SqlState::READ_ONLY_SQL_TRANSACTION), "{error:?}");
    run(&client, "rollback").await;
    assert_eq!(client.execute(&update, &[&1, &1]).await.unwrap(), 1);
    assert_eq!(client.execute(&insert, &[&1]).await.unwrap_err().code(), Some(&SqlState::UNIQUE_VIOLATION));
    assert_eq!(client.execute(&insert, &[&2]).await.unwrap(), 1);
    cluster.assert_identical().await;
}

/// Each of them waits for the others of its kind, but not for those of its own text.
#[tokio::test(flavor = "multi_thread")]
async fn two_statements_of_one_text_do_not_wait_for_each_other() {
    let (cluster, client) = prepared().await;
    let two = "insert into item values (1, 1, 'x'); do $$ begin update total set n = n + 1; end $$; call move(5)";
    let done = tokio::time::timeout(Duration::from_secs(60), client.batch_execute(two)).await;
    assert!(matches!(done, Ok(Ok(()))), "{done:?}");
    everywhere(&cluster, "select (select n from total) || ',' || (select count(*) from item)", "6,2").await;
}

/// Temporary objects matter where they are named, and hide permanent ones only there.
#[tokio::test(flavor = "multi_thread")]
async fn code_runs_in_a_session_that_has_made_temporary_objects() {
    let (cluster, client) = prepared().await;
    let insert = client.prepare("insert into item values ($1, 1, 'x')").await.expect("a statement");
    run(&client, "create domain short as text; create table shorts (id int primary key, n int)").await;
    let code = "do $$ declare s short := 'a'; begin insert into shorts values (1, length(s)); end $$";
    run(&client, code).await;
    run(&client, "delete from shorts; create temp table passing (id int); insert into passing values (1)").await;
    run(&client, code).await;
    client.execute(&insert, &[&5]).await.expect("a trigger that is proven");
    everywhere(&cluster, ITEMS, "5X").await;
    // What was planned before is planned again: the name is another table's now.
    run(&client, "create temp table item (id int, v int, note text)").await;
    client.execute(&insert, &[&6]).await.expect("a temporary table");
    everywhere(&cluster, ITEMS, "5X").await;
    let (state, message) = refused(&client, "do $$ begin insert into item values (7, 7, 'y'); end $$").await;
    assert_eq!(state, SqlState::FEATURE_NOT_SUPPORTED);
    assert!(message.contains("is a temporary table"), "{message}");
    cluster.assert_identical().await;
}
