//! COPY FROM of which only the leader knows what becomes of the data: triggers, conditions and defaults that vary, files and programs of
//! its host. Followers get the rows that it stored.

mod common;

use common::Cluster;
use common::ask::{run, same, value};
use futures_util::SinkExt;
use tokio_postgres::error::SqlState;
use tokio_postgres::{Client, Error};

const SCHEMA: &str = "
create sequence numbers;
create table item (id serial, v int, note text, made_at timestamptz default clock_timestamp());
create function touch() returns trigger language plpgsql as $$
begin
  if new.v = 13 then return null; end if;
  if new.v < 0 then raise exception 'v is %', new.v; end if;
  new.note := new.note || '-' || nextval('numbers') || '-' || (random() * 1000000)::int;
  return new;
end $$;
create trigger touch before insert on item for each row execute function touch();
create function tell() returns trigger language plpgsql as $$ begin perform count(*) from fresh; return null; end $$;
create trigger tell after insert on item referencing new table as fresh for each statement execute function tell();
create table parted (id int, v int, w float8 default random()) partition by range (id);
create table low partition of parted for values from (0) to (100);
create table high partition of parted for values from (100) to (200);
create function double() returns trigger language plpgsql as $$ begin new.v := new.v * 2; return new; end $$;
create trigger double before insert on high for each row execute function double();
create table plain (id int primary key, v int, r float8 default random());
create function noisy() returns int language plpgsql volatile as $$ begin return (random() * 1000)::int; end $$;
create table opaque (id int primary key, v int default noisy());
create table log (id int);
create table logged (id int primary key);
create function note() returns trigger language plpgsql as $$ begin insert into log values (new.id); return new; end $$;
create trigger note after insert on logged for each row execute function note();
";

async fn copy(client: &Client, text: &str, data: &str) -> Result<u64, Error> {
    let sink = client.copy_in(text).await?;
    futures_util::pin_mut!(sink);
    let sent = sink.send(bytes::Bytes::copy_from_slice(data.as_bytes())).await;
    match sent {
        Ok(()) => sink.finish().await,
        Err(error) => Err(error),
    }
}

async fn prepared() -> (Cluster, Client) {
    let cluster = common::cluster();
    let client = cluster.connect("postgres").await;
    run(&client, SCHEMA).await;
    (cluster, client)
}

#[tokio::test(flavor = "multi_thread")]
async fn followers_get_the_rows_that_the_leaders_triggers_left() {
    let (cluster, client) = prepared().await;
    assert_eq!(copy(&client, "copy item (v, note) from stdin", "1\ta\n13\tb\n2\tc\n").await.expect("rows"), 2);
    assert_eq!(copy(&client, "copy item (v, note) from stdin", "13\tb\n").await.expect("no rows"), 0);
    assert_eq!(
        copy(&client, "copy parted (id, v) from stdin with (format csv)", "1,1\n101,1\n").await.expect("rows"),
        2
    );
    // Rows of the same transaction that are not its own: before, after, and behind a savepoint of the client's.
    run(&client, "begin; insert into item (v, note) values (3, 'd'); savepoint s").await;
    run(&client, "insert into item (v, note) values (4, 'e')").await;
    assert_eq!(copy(&client, "copy item (v, note) from stdin", "5\tf\n6\tg\n").await.expect("rows"), 2);
    assert_eq!(copy(&client, "copy item (v, note) from stdin", "7\th\n").await.expect("rows"), 1);
    let error = copy(&client, "copy item (v, note) from stdin", "8\ti\n-1\tj\n").await.expect_err("the trigger");
    assert!(
        error
            .as_db_error()
            .is_some_and(|error| error.where_().is_some_and(|place| place.contains("COPY item, line 2")))
    );
    run(&client, "rollback to s; insert into item (v, note) values (9, 'k')").await;
    assert_eq!(copy(&client, "copy item (v, note) from stdin", "10\tl\n").await.expect("rows"), 1);
    run(&client, "commit").await;
    assert_eq!(same(&cluster, "postgres", "select string_agg(v::text, ',' order by v) from item").await, "1,2,3,9,10");
    assert_eq!(same(&cluster, "postgres", "select string_agg(v::text, ',' order by v) from parted").await, "1,2");
    run(&client, "begin isolation level repeatable read").await;
    assert_eq!(copy(&client, "copy item (v, note) from stdin", "11\tm\n").await.expect("rows"), 1);
    run(&client, "commit; begin isolation level serializable").await;
    assert_eq!(copy(&client, "copy item (v, note) from stdin", "12\tn\n").await.expect("rows"), 1);
    run(&client, "commit").await;
    cluster.assert_identical().await;
    // Triggers that write elsewhere are not carried so.
    let error = copy(&client, "copy logged from stdin", "1\n").await.expect_err("a trigger that writes");
    assert_eq!(error.code(), Some(&SqlState::FEATURE_NOT_SUPPORTED));
    let told = error.as_db_error().map_or("", |error| error.message());
    assert!(told.contains("it writes to log"), "{told}");
    let error = copy(&client, "copy item (v, note) from stdin with (freeze)", "1\ta\n").await.expect_err("FREEZE");
    assert_eq!(error.code(), Some(&SqlState::FEATURE_NOT_SUPPORTED));
}

/// New rows need not be at the end of their table.
#[tokio::test(flavor = "multi_thread")]
async fn rows_in_the_room_of_deleted_ones_are_found() {
    let (cluster, client) = prepared().await;
    run(&client, "insert into item (v, note) select i, repeat('x', 200) from generate_series(100, 5000) i").await;
    run(&client, "delete from item where v < 4000").await;
    run(&client, "vacuum item").await;
    assert_eq!(copy(&client, "copy item (v, note) from stdin", &"1\ta\n".repeat(50)).await.expect("rows"), 50);
    let first = value(&client, "select count(*) from item where v = 1 and ctid < '(50,0)'").await;
    assert_ne!(first, "0", "the rows were to lie in old blocks");
    assert_eq!(same(&cluster, "postgres", "select count(*)::text from item where v = 1").await, "50");
    cluster.assert_identical().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn conditions_defaults_files_and_programs_are_the_leaders() {
    let (cluster, client) = prepared().await;
    let rows: String = (0..100).map(|id| format!("{id}\t{id}")).collect::<Vec<_>>().join("\n") + "\n";
    copy(&client, "copy plain (id, v) from stdin where random() < 0.5", &rows).await.expect("some rows");
    run(&client, "delete from plain").await;
    copy(&client, "copy plain (id, v) from stdin with (encoding 'latin1')", "1\t1\n").await.expect("rows");
    copy(&client, "copy opaque (id) from stdin", "1\n2\n").await.expect("rows");
    run(&client, "copy plain (id, v) from program 'echo 2,$RANDOM' with (format csv)").await;
    let file = cluster.dir().join("rows.csv");
    std::fs::write(&file, "3,3\n4,4\n").expect("a file");
    run(&client, &format!("copy plain (id, v) from '{}' with (format csv)", file.display())).await;
    assert_eq!(same(&cluster, "postgres", "select string_agg(id::text, ',' order by id) from plain").await, "1,2,3,4");
    cluster.assert_identical().await;
}
