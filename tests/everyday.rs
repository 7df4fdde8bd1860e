//! What applications and their libraries write every day, and what calls or fires code only at first sight.

mod common;

use common::ask::{run_all, same, state};

/// What applications write every day: now() in the text itself, and tables with referencing ones that have defaults.
#[tokio::test(flavor = "multi_thread")]
async fn the_clock_in_the_text_and_defaults_that_nothing_evaluates_are_no_hindrance() {
    let cluster = common::cluster();
    let client = cluster.connect("postgres").await;
    run_all(
        &client,
        &[
            "create table q (id int primary key, n int, at timestamptz)",
            "create procedure stamp(x timestamptz) language plpgsql as $$ begin update q set at = x where id = 1; end $$",
            "with i as (insert into q values (1, 1, now()) returning id) select * from i",
            "call stamp(now() - interval '1 hour')",
            "with u as (insert into q values (1, 5) on conflict (id) do update set at = transaction_timestamp() returning id) select * from u",
            "create table child (id int primary key, q int references q on delete cascade, at timestamptz default now())",
            "insert into child values (1, 1)",
            "create view shown as select * from q",
            "update shown set n = 2 where id = 1",
            "create function forget(x int) returns void language sql as $$ delete from q where id = x $$",
            "with d as (delete from q where at < now() - interval '1 day' returning *) select count(*) from d",
            "select forget(1)",
        ],
    )
    .await;
    assert_eq!(same(&cluster, "postgres", "select (select count(*) from q) + (select count(*) from child)").await, "0");
    // A default that a foreign key sets is evaluated; and in code of others the clock is each server's own.
    run_all(
        &client,
        &[
            "insert into q values (3, 1, null)",
            "create table moved (id int primary key, at timestamptz default now(), q int default random() * 0 references q on delete set default)",
            "create function clock() returns timestamptz language sql as 'select now()'",
        ],
    )
    .await;
    for text in
        ["select forget(3)", "with i as (insert into q values (4, 1, clock()) returning id) select now() from i"]
    {
        assert_eq!(state(&client, text).await, "0A000", "{text}");
    }
    cluster.assert_identical().await;
}
