//! Triggers that change nothing but the rows of their statement: only the leader fires them, and followers get the rows as they became,
//! whatever the code reads: the clock, sequences, other tables.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test that panics has failed")]

mod common;

use common::Cluster;
use common::ask::{run, same};
use futures_util::StreamExt;
use tokio_postgres::error::SqlState;
use tokio_postgres::{AsyncMessage, Client};

const SCHEMA: &str = "
create table parent (id int primary key, name text);
insert into parent values (1, 'one'), (2, 'two');
create sequence numbers;
create table item (id serial primary key, parent int references parent on delete cascade, v int not null default 0, slug text,
    number bigint, made_at timestamptz default now(), updated_at timestamptz, seen int);
create function touch() returns trigger language plpgsql as $$
begin
  if tg_op = 'INSERT' then
    new.number := nextval('numbers');
  elsif new.v = 13 then
    return null;
  elsif new.v < 0 then
    raise exception 'v is %', new.v using errcode = '23514', hint = 'Take another one.';
  end if;
  new.updated_at = clock_timestamp();
  new.slug := lower(regexp_replace(coalesce(new.slug, 'none'), '\\W+', '-', 'g')) || '-' || (random() * 1000)::int;
  select count(*) into new.seen from parent;
  return new;
end $$;
create trigger touch before insert or update on item for each row execute function touch();
create function tell() returns trigger language plpgsql as $$
begin
  perform pg_notify('items', tg_op);
  return null;
end $$;
create trigger tell after insert or update or delete on item for each statement execute function tell();
";

async fn code(client: &Client, text: &str) -> SqlState {
    client.batch_execute(text).await.expect_err(text).code().cloned().expect(text)
}

/// What every server holds, which must be the same.
async fn held(cluster: &Cluster, query: &str) -> String {
    cluster.wait_member(1, true).await;
    cluster.assert_identical().await;
    let mut values = Vec::new();
    for index in [0, 1] {
        let node = cluster.connect_node(index, "postgres").await;
        values.push(node.query_one(query, &[]).await.unwrap().get::<_, Option<String>>(0).unwrap_or_default());
    }
    assert_eq!(values[0], values[1], "{query}");
    values.remove(0)
}

#[tokio::test(flavor = "multi_thread")]
async fn rows_are_as_the_leaders_triggers_left_them() {
    let cluster = common::cluster();
    let client = cluster.connect("postgres").await;
    run(&client, SCHEMA).await;
    run(&client, "insert into item (parent, slug) values (1, 'Hello World'), (2, 'B')").await;
    let insert =
        client.prepare("insert into item (parent, v, slug) values ($1, $2, $3) returning number").await.unwrap();
    let number: i64 = client.query_one(&insert, &[&1, &5, &"Third one"]).await.unwrap().get(0);
    assert_eq!(number, 3);
    assert_eq!(
        held(&cluster, "select string_agg(number::text, ',' order by id) from item where slug is not null").await,
        "1,2,3"
    );
    // One row is left out by the trigger, and the count is the leader's.
    assert_eq!(client.execute("update item set v = case id when 2 then 13 else 7 end", &[]).await.unwrap(), 2);
    assert_eq!(held(&cluster, "select string_agg(v::text, ',' order by id) from item").await, "7,0,7");
    let update =
        client.prepare("update item set v = v + $1 where id = $2 returning updated_at > made_at").await.unwrap();
    assert!(client.query_one(&update, &[&1, &3]).await.unwrap().get::<_, bool>(0));
    run(
        &client,
        "insert into item (id, parent, v, slug) values (3, 1, 20, 'x') on conflict (id) do update set v = excluded.v",
    )
    .await;
    assert_eq!(held(&cluster, "select v::text || seen from item where id = 3").await, "202");
    // Its error is the client's, with everything that it says.
    let error = client.batch_execute("update item set v = -1 where id = 1").await.unwrap_err();
    let error = error.as_db_error().unwrap();
    assert_eq!((error.message(), error.hint()), ("v is -1", Some("Take another one.")));
    assert_eq!(code(&client, "insert into item (parent) values (77)").await, SqlState::FOREIGN_KEY_VIOLATION);
    run(
        &client,
        "begin; update item set v = 30 where id = 1; savepoint s; delete from item where id = 2; rollback to s; commit",
    )
    .await;
    run(&client, "delete from item where id = 1 or parent = 2").await;
    // A cascade brings no rows of its own, and its triggers read the clock.
    assert_eq!(code(&client, "delete from parent where id = 2").await, SqlState::FEATURE_NOT_SUPPORTED);
    assert_eq!(held(&cluster, "select string_agg(id::text, ',' order by id) from item").await, "3");
    // Values of sequences that a trigger took are not given again by the other server.
    let other = cluster.connect_node(1, "postgres").await;
    let ahead: bool = other.query_one("select last_value > 4 from numbers", &[]).await.unwrap().get(0);
    assert!(ahead);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_trigger_does_besides_is_not_lost() {
    let cluster = common::cluster();
    let client = cluster.connect("postgres").await;
    run(&client, SCHEMA).await;
    run(
        &client,
        "create table t (id int primary key, u int unique, v int); create table log (id int primary key, at timestamptz);
         create table part (id int, v int, at timestamptz, primary key (id, v)) partition by list (v);
         create table part_1 partition of part for values in (1); create table part_2 partition of part for values in (2);
         create function writes() returns trigger language plpgsql as
           $$ begin insert into log values (new.id, now()); return new; end $$;
         create function moves() returns trigger language plpgsql as
           $$ begin new.id := new.id + (random() * 0)::int + 1000; return new; end $$;
         create function other() returns trigger language plpgsql as
           $$ declare r t; begin r := new; r.id := r.id + (random() * 0)::int + 1000; return r; end $$;
         create function builds() returns trigger language plpgsql as
           $$ begin execute 'insert into log values (random() * 1000, now())'; return new; end $$;
         create function calls() returns trigger language plpgsql as $$ begin perform helper(new.id); return new; end $$;
         create function helper(i int) returns void language plpgsql as $$ begin insert into log values (i, now()); end $$;
         create function adds(int, int) returns boolean language plpgsql as
           $$ begin insert into log values ($1, now()); return true; end $$;
         create operator ==> (leftarg = int, rightarg = int, function = adds);
         create function operates() returns trigger language plpgsql as
           $$ begin if new.v ==> 1 then new.v := random(); end if; return new; end $$;
         create function stamps() returns trigger language plpgsql as $$ begin new.at := now(); return new; end $$;
         insert into t values (1, 1, 1), (2, 2, 2)",
    )
    .await;
    for function in ["writes", "moves", "other", "builds", "calls", "operates"] {
        run(&client, &format!("create trigger x before update on t for each row execute function {function}()")).await;
        assert_eq!(
            code(&client, "update t set v = v + 1 where id = 1").await,
            SqlState::FEATURE_NOT_SUPPORTED,
            "{function}"
        );
        run(&client, "drop trigger x on t").await;
    }
    // A new row has whatever key the trigger gives it.
    run(&client, "create trigger x before insert on t for each row execute function moves()").await;
    run(&client, "insert into t values (5, 5, 5)").await;
    assert_eq!(held(&cluster, "select string_agg(id::text, ',' order by id) from t").await, "1,2,1005");
    run(&client, "drop trigger x on t; create trigger x before update on t for each row execute function stamps()")
        .await;
    // The leader says what is wrong with it.
    assert_eq!(code(&client, "update t set v = 3 where id = 1").await, SqlState::UNDEFINED_COLUMN);
    // On a follower that fires it, it would come twice.
    run(&client, "create trigger y before insert or update on log for each row execute function stamps()").await;
    run(&client, "alter table log enable always trigger y").await;
    assert_eq!(code(&client, "insert into log values (1)").await, SqlState::FEATURE_NOT_SUPPORTED);
    run(&client, "create trigger z before insert or update on part for each row execute function stamps()").await;
    run(&client, "insert into part values (1, 1), (2, 1), (3, 2); update part set at = null where id < 3").await;
    run(&client, "delete from part where id = 2").await;
    assert_eq!(held(&cluster, "select count(at)::text from part").await, "2");
}

/// Other clients write meanwhile: such a statement closes no gate and needs no turn.
#[tokio::test(flavor = "multi_thread")]
async fn two_open_transactions_fire_triggers_and_a_listener_hears_each_once() {
    let cluster = common::cluster();
    let client = cluster.connect("postgres").await;
    run(&client, SCHEMA).await;
    run(&client, "insert into item (parent) values (1), (2)").await;
    let config = format!("host=127.0.0.1 port={} user=postgres dbname=postgres", cluster.layout.proxy_port());
    let (listener, mut connection) = tokio_postgres::connect(&config, tokio_postgres::NoTls).await.unwrap();
    let (sender, mut heard) = tokio::sync::mpsc::channel(100);
    let mut messages = futures_util::stream::poll_fn(move |context| connection.poll_message(context));
    tokio::spawn(async move {
        while let Some(Ok(message)) = messages.next().await {
            if let AsyncMessage::Notification(notification) = message {
                let _ = sender.send(notification.payload().to_owned()).await;
            }
        }
    });
    run(&listener, "listen items").await;
    let second = cluster.connect("postgres").await;
    for (client, id) in [(&client, 1), (&second, 2)] {
        run(client, &format!("begin; update item set v = 3 where id = {id}")).await;
    }
    run(&second, "commit").await;
    run(&client, "delete from item where id = 1; commit").await;
    let mut said = Vec::new();
    for _ in 0..3 {
        said.push(heard.recv().await.unwrap());
    }
    said.sort();
    assert_eq!(said, ["DELETE", "UPDATE", "UPDATE"]);
    run(&listener, "unlisten *").await;
    assert!(heard.try_recv().is_err());
    assert_eq!(held(&cluster, "select string_agg(v::text, ',') from item").await, "3");
}

/// A function that is not volatile sees what its caller sees: the statement's snapshot, or what a trigger sees meanwhile.
#[tokio::test(flavor = "multi_thread")]
async fn what_a_stable_function_reads_depends_on_who_calls_it() {
    let cluster = common::cluster();
    let client = cluster.connect("postgres").await;
    run(
        &client,
        "create table few (id int primary key, v int); create table few_log (id int, top int);
         create function top_of() returns int stable language sql as 'select max(v) from few';
         create function logs_top() returns trigger language plpgsql as
           $$ begin insert into few_log values (new.id, top_of()); return new; end $$",
    )
    .await;
    run(&client, "insert into few values (1, 1), (2, 2), (3, 3)").await;
    run(&client, "update few set v = top_of() + 1").await;
    assert_eq!(same(&cluster, "postgres", "select string_agg(v::text, ',') from few").await, "4,4,4");
    run(&client, "create trigger logs before update on few for each row execute function logs_top()").await;
    let error = client.batch_execute("update few set v = v + 1").await.expect_err("a refusal");
    let error = error.as_db_error().expect("an answer");
    assert_eq!(error.code(), &SqlState::FEATURE_NOT_SUPPORTED);
    assert!(error.message().contains("top_of reads what the rows before may have changed"), "{error}");
    cluster.assert_identical().await;
}

/// TRUNCATE ... CASCADE fires triggers of the tables that it reaches.
#[tokio::test(flavor = "multi_thread")]
async fn truncate_with_cascade_is_looked_at_where_it_ends() {
    let cluster = common::cluster();
    let client = cluster.connect("postgres").await;
    run(
        &client,
        "create table top (id int primary key); create table middle (id int primary key, t int references top);
         create table low (id int primary key, m int references middle); create table log (n serial primary key, what text);
         create function note() returns trigger language plpgsql as $$ begin insert into log (what) values (random()::text); return null; end $$;
         create trigger note after truncate on low execute function note();
         insert into top values (1); insert into middle values (1, 1); insert into low values (1, 1)",
    )
    .await;
    for text in ["truncate top cascade", "truncate middle, top cascade", "truncate low"] {
        let error = client.batch_execute(text).await.expect_err(text);
        assert_eq!(error.code(), Some(&SqlState::FEATURE_NOT_SUPPORTED), "{text}: {error}");
    }
    run(&client, "alter table low disable trigger note; truncate top cascade").await;
    assert_eq!(same(&cluster, "postgres", "select count(*) from low").await, "0");
    cluster.assert_identical().await;
}

/// An UPDATE that moves a row to another partition fires the triggers of DELETE and INSERT.
#[tokio::test(flavor = "multi_thread")]
async fn a_row_that_moves_to_another_partition_fires_what_insert_and_delete_fire() {
    let cluster = common::cluster();
    let client = cluster.connect("postgres").await;
    run(
        &client,
        "create table p (id int, grp int, at text, primary key (id, grp)) partition by list (grp);
         create table p1 partition of p for values in (1); create table p2 partition of p for values in (2);
         create table q (id int, grp int, at text, primary key (id, grp)) partition by range (id);
         create table q1 partition of q for values from (0) to (10) partition by list (grp);
         create table q1_1 partition of q1 for values in (1); create table q1_2 partition of q1 for values in (2);
         create table log (id int primary key, what text);
         create function stamp() returns trigger language plpgsql as $$ begin new.at := random()::text; return new; end $$;
         create function bye() returns trigger language plpgsql as $$ begin insert into log values (old.id, random()::text); return old; end $$;
         insert into p select i, 1 from generate_series(1, 4) i; insert into q select i, 1 from generate_series(1, 4) i;
         create trigger stamp before insert on p2 for each row execute function stamp();
         create trigger bye after delete on q for each row execute function bye()",
    )
    .await;
    for text in [
        "update p set grp = 2 where id = 1 and grp = 1",
        "update p set grp = 2 where id = 2",
        "update q set grp = 2 where id = 2",
        "update q set grp = 2 where grp = 1 and id = 4",
    ] {
        let error = client.batch_execute(text).await.expect_err(text);
        assert_eq!(error.code(), Some(&SqlState::FEATURE_NOT_SUPPORTED), "{text}: {error}");
    }
    run(&client, "update p set at = 'stays' where id in (1, 3)").await;
    run(&client, "drop trigger stamp on p2; update p set grp = 2 where id = 1 and grp = 1").await;
    run(&client, "update q set at = 'stays' where id = 2").await;
    cluster.assert_identical().await;
}
