//! Casts and checks of domains that call functions which are not immutable: no text says that they do. They leave unproven what can meet
//! their types, and nothing else.

mod common;

use bytes::BytesMut;
use common::ask::run;
use tokio_postgres::error::SqlState;
use tokio_postgres::types::{IsNull, ToSql, Type};
use tokio_postgres::{Client, SimpleQueryMessage};

/// `word` is a domain with a check that is volatile; `int` and `box` have a cast to `weight` that is.
const SCHEMA: &str = "
create function is_word(text) returns boolean language plpgsql as $$ begin return $1 <> ''; end $$;
create domain word as text check (is_word(value));
create domain long_word as word check (length(value) > 3);
create type entry as (n int, w word);
create type words as range (subtype = word);
create type weight as (grams int);
create function to_weight(int) returns weight language plpgsql as $$ begin return row($1)::weight; end $$;
create cast (int as weight) with function to_weight(int) as implicit;
create function from_weight(weight) returns int language plpgsql as $$ begin return $1.grams; end $$;
create cast (weight as int) with function from_weight(weight) as assignment;
create function heavy(weight) returns boolean language sql immutable as 'select $1.grams > 10';
create operator !!! (function = heavy, rightarg = weight);
create function entries() returns setof entry language sql immutable as 'select row(1, null::word)::entry';
create function out_word(out int, out word) language sql immutable as 'select 1, null::word';
create function table_of() returns table (n int, ww long_word[]) language sql immutable as 'select 1, null::long_word[]';

create table item (id int primary key, v int);
create table log (id int primary key, v int);
create function note() returns trigger language plpgsql as $$ begin insert into log values (new.id, new.v); return new; end $$;
create trigger note after insert on item for each row execute function note();
create table plain (id int primary key, v int);
create table holder (id int primary key, w word);
create table of_arrays (id int primary key, w long_word[]);
create table of_entries (id int primary key, e entry[]);
create table of_ranges (id int primary key, r words);
create table of_weights (id int primary key, g weight);
create view view_of as select id, w from holder;
create table child (id int primary key, p word references holder_key on update cascade);
";

/// Code that meets none of these types.
const PROVEN: &[&str] = &[
    "insert into item values (1, 1), (2, 2)",
    "do $$ begin insert into plain values (1, 1); update plain set v = v + 1 where id = 1; end $$",
    "do $$ declare t text := 'x'; n int; begin select v into strict n from plain where id = 1; update log set v = n where id = 1; end $$",
];

/// Code that may, each in another way.
const UNPROVEN: &[&str] = &[
    "do $$ declare w word := 'x'; begin insert into plain values (10, 1); end $$",
    "do $$ begin insert into plain values (10, length('abc'::word)); end $$",
    "do $$ declare w long_word; begin insert into plain values (10, 1); end $$",
    "do $$ declare w word[]; begin insert into plain values (10, 1); end $$",
    "do $$ declare e entry; begin insert into plain values (10, 1); end $$",
    "do $$ declare w holder.w%type; begin insert into plain values (10, 1); end $$",
    "do $$ declare h holder; begin insert into plain values (10, 1); end $$",
    "do $$ begin insert into holder values (10, 'x'); end $$",
    "do $$ begin insert into of_arrays values (10, '{long}'); end $$",
    "do $$ begin insert into of_entries values (10, null); end $$",
    "do $$ begin insert into of_ranges values (10, '[a,b]'); end $$",
    "do $$ begin insert into of_weights values (10, 5); end $$",
    "do $$ begin insert into plain select id, length(w) from view_of; end $$",
    "do $$ begin insert into plain select n, 1 from entries(); end $$",
    "do $$ begin insert into plain select 10, column1 from out_word(); end $$",
    "do $$ begin insert into plain select n, 1 from table_of(); end $$",
    "do $$ begin if heavy(5) then insert into plain values (10, 1); end if; end $$",
    "do $$ begin if !!! 5 then insert into plain values (10, 1); end if; end $$",
    "do $$ begin update holder_key set id = 'z' where id = 'a'; end $$",
];

/// NULL of whatever type.
#[derive(Debug)]
struct Null;

impl ToSql for Null {
    fn to_sql(&self, _: &Type, _: &mut BytesMut) -> Result<IsNull, Box<dyn std::error::Error + Sync + Send>> {
        Ok(IsNull::Yes)
    }

    fn accepts(_: &Type) -> bool {
        true
    }

    tokio_postgres::types::to_sql_checked!();
}

/// SQLSTATE and message of a statement that must fail.
async fn refused(client: &Client, text: &str) -> String {
    let error = client.batch_execute(text).await.expect_err(text);
    let error = error.as_db_error().unwrap_or_else(|| panic!("{text}: {error}"));
    assert_eq!(error.code(), &SqlState::FEATURE_NOT_SUPPORTED, "{text}: {error}");
    error.message().to_owned()
}

async fn count(client: &Client, table: &str) -> String {
    let rows = client.simple_query(&format!("select count(*) from {table}")).await.expect(table);
    let value = rows.iter().find_map(|message| match message {
        SimpleQueryMessage::Row(row) => row.get(0).map(str::to_owned),
        _ => None,
    });
    value.expect(table)
}

#[tokio::test(flavor = "multi_thread")]
async fn only_what_meets_a_type_with_such_a_cast_or_check_is_unproven() {
    let cluster = common::cluster();
    let client = cluster.connect("postgres").await;
    run(&client, "create domain key_text as text").await;
    run(&client, "create table holder_key (id key_text primary key); insert into holder_key values ('a')").await;
    run(&client, SCHEMA).await;
    for text in PROVEN {
        run(&client, text).await;
    }
    cluster.assert_identical().await;
    for index in [0, 1] {
        let node = cluster.connect_node(index, "postgres").await;
        assert_eq!((count(&node, "log").await, count(&node, "plain").await), ("2".to_owned(), "1".to_owned()));
    }
    for text in UNPROVEN {
        let message = refused(&client, text).await;
        assert!(message.contains("calls a function that is not immutable"), "{text}: {message}");
    }
    // The type of a parameter stands in no text.
    let weight: Type = {
        let statement = client.prepare("select g from of_weights").await.expect("a type");
        statement.columns()[0].type_().clone()
    };
    let insert = client.prepare_typed("insert into item values (20, $1)", &[weight]).await.expect("a cast");
    let error = client.execute_raw(&insert, [Null]).await.expect_err("a cast of a parameter");
    assert_eq!(error.code(), Some(&SqlState::FEATURE_NOT_SUPPORTED), "{error}");
    cluster.assert_identical().await;
}

/// An operator that needs no sign, and a cast that needs no type of a user's, can be meant anywhere.
#[tokio::test(flavor = "multi_thread")]
async fn what_can_be_meant_anywhere_leaves_nothing_proven() {
    let cluster = common::cluster();
    let client = cluster.connect("postgres").await;
    run(&client, "create table plain (id int primary key, v int)").await;
    let code = "do $$ begin insert into plain values (1, 1); end $$";
    run(
        &client,
        "create type weight as (grams int);
         create function to_weight(int) returns weight language plpgsql as $$ begin return row($1)::weight; end $$;
         create cast (int as weight) with function to_weight(int) as implicit;
         create function same(weight, weight) returns boolean language sql immutable as 'select $1.grams = $2.grams'",
    )
    .await;
    run(&client, "do $$ begin insert into plain values (0, 1); end $$").await;
    run(&client, "create operator = (function = same, leftarg = weight, rightarg = weight)").await;
    let message = refused(&client, code).await;
    assert!(message.contains("the operator = may be meant"), "{message}");
    run(&client, "drop operator = (weight, weight); drop type weight cascade").await;
    run(
        &client,
        "create function length_of(point) returns int language plpgsql as $$ begin return 1; end $$;
         create cast (point as int) with function length_of(point) as assignment",
    )
    .await;
    let message = refused(&client, code).await;
    assert!(message.contains("between types of PostgreSQL"), "{message}");
    run(&client, "drop cast (point as int)").await;
    run(&client, code).await;
    cluster.assert_identical().await;
}
