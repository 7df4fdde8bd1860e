//! Code that takes the first row of a query, or goes through rows: it runs on every server where a key makes these the same rows, and is
//! refused where the order in which a server finds them would decide.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test that panics has failed")]

mod common;

use common::Cluster;
use common::ask::{run, same, state};
use tokio_postgres::Client;

const SCHEMA: &str = "
create table account (id bigint primary key, email text unique, grp int not null, level varchar unique, balance int default 0);
insert into account select i, 'a' || i, i % 3, 'l' || i from generate_series(1, 30) i;
create table rate (grp int, day date, percent int, primary key (grp, day));
insert into rate select g, date '2026-01-01' + d, g * 10 + d from generate_series(0, 2) g, generate_series(0, 9) d;
create table late (id int primary key deferrable, v int);
insert into late values (1, 1);
create table base (id int primary key, v int);
create table child () inherits (base);
insert into base values (1, 1);
create table loud (id int, v int);
create unique index on loud (id) where v > 0;
insert into loud values (1, 1);
create table log (n serial primary key, account bigint, what text);
";

/// Each is called once; what it wrote must be the same on every server, whose rows lie in another order there.
const CERTAIN: &[(&str, &str)] = &[
    (
        "by_key(p bigint)",
        "declare b int; begin select grp into b from account where id = p; insert into log values (1, p, b); end",
    ),
    (
        "by_email(p text)",
        "declare a account; begin select * into a from account where email = lower(p) for update;
         if found then update account set balance = balance + 1 where id = a.id; end if; end",
    ),
    (
        "latest(p int)",
        "declare r int; begin select percent into r from rate where grp = p order by day desc limit 1;
         insert into log values (3, p, r); end",
    ),
    (
        "each_one(p int)",
        "declare a record; n int := 100; begin for a in select * from account where grp = p order by id loop
         n := n + 1; insert into log values (n, a.id, 'loop'); end loop; end",
    ),
    (
        "oldest(p int)",
        "begin delete from account where id in (select id from account where grp = p order by id limit 2); end",
    ),
];

/// The order of rows would decide, though it may look as if it did not.
const UNCERTAIN: &[(&str, &str)] = &[
    (
        "by_group(p int)",
        "declare b bigint; begin select id into b from account where grp = p; insert into log values (9, b, ''); end",
    ),
    (
        "deferred(p int)",
        "declare b int; begin select v into b from late where id = p; insert into log values (9, b, ''); end",
    ),
    (
        "inherited(p int)",
        "declare b int; begin select v into b from base where id = p; insert into log values (9, b, ''); end",
    ),
    (
        "partial(p int)",
        "declare b int; begin select v into b from loud where id = p; insert into log values (9, b, ''); end",
    ),
    (
        "itself(p int)",
        "declare b bigint; begin select id into b from account where id = grp; insert into log values (9, b, ''); end",
    ),
    (
        "blurred(p float8)",
        "declare b int; begin select grp into b from account where id = p; insert into log values (9, b, ''); end",
    ),
    (
        "blank(p char(9))",
        "declare b int; begin select grp into b from account where level = p; insert into log values (9, b, ''); end",
    ),
    ("sets(p int)", "declare b bigint; begin select every_id() into b; insert into log values (9, b, ''); end"),
    (
        "queue(p int)",
        "declare r record; begin for r in delete from account where id in (select id from account order by id limit 3) returning id
         loop insert into log values (9, r.id, ''); end loop; end",
    ),
    (
        "record(p int)",
        "declare r record; b int; begin select power(2, 3) as f into r; select grp into b from account where id = r.f;
         insert into log values (9, b, ''); end",
    ),
    ("joined(p int)", "begin update account set balance = r.percent from rate r where r.grp = account.grp; end"),
    (
        "beside(p int)",
        "declare b bigint; n int; begin select id, (select count(*) from rate) into b, n from account where grp = p;
         insert into log values (9, b, ''); end",
    ),
    (
        "nulls(p int)",
        "declare b bigint; begin select id into b from account order by email limit 1; insert into log values (9, b, ''); end",
    ),
];

async fn create(client: &Client, functions: &[(&str, &str)]) {
    for (head, body) in functions {
        run(client, &format!("create function {head} returns void language plpgsql as $${body}$$")).await;
    }
}

/// Rows lie on the followers in another order than on the leader.
async fn reorder(cluster: &Cluster) {
    for node in 1..cluster.layout.plan.nodes {
        let client = cluster.connect_node(node, "postgres").await;
        run(&client, "create index turned on account ((-id)); cluster account using turned; drop index turned").await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn first_rows_run_where_a_key_makes_them_certain() {
    let cluster = common::cluster();
    let client = cluster.connect("postgres").await;
    run(&client, SCHEMA).await;
    create(&client, CERTAIN).await;
    create(&client, UNCERTAIN).await;
    run(
        &client,
        "create function every_id() returns setof bigint language sql as 'select id from account';
         create function headless(p int) returns int language sql as 'create or replace view one as select 1 as x; select (random() * 9)::int';
         create function group_of(p bigint) returns int language sql stable as 'select grp from account where id = p';
         create function any_of(p int) returns bigint language sql stable as 'select id from account where grp = p';
         create function groups() returns bigint language sql stable as 'select count(*) from account group by grp';
         create function atomic(p int) returns bigint language sql stable begin atomic select id from account where grp = p; end",
    )
    .await;
    reorder(&cluster).await;
    for text in [
        "select by_key(7)",
        "select by_email('A8')",
        "select latest(2)",
        "select each_one(1)",
        "select oldest(0)",
        "update account set balance = group_of(11) where id = 12",
        "do $$ declare b int; begin select grp into b from account where id = 5; update account set balance = b where id = 6; end $$",
    ] {
        assert_eq!(state(&client, text).await, "ok", "{text}");
    }
    for text in [
        "select by_group(1)",
        "select deferred(1)",
        "select inherited(1)",
        "select partial(1)",
        "select itself(1)",
        "select blurred(1)",
        "select blank('l1')",
        "select nulls(1)",
        "select sets(1)",
        "select queue(1)",
        "select record(1)",
        "select joined(1)",
        "select beside(1)",
        "update account set balance = headless(1) where grp = 2",
        "update account set balance = any_of(1) where grp = 2",
        "update account set balance = groups() where grp = 2",
        "update account set balance = atomic(1) where grp = 2",
    ] {
        assert_eq!(state(&client, text).await, "0A000", "{text}");
    }
    let log = same(&cluster, "postgres", "select string_agg(concat(n, account, what), ' ' order by n) from log").await;
    assert!(log.starts_with("171 3229 1011loop 1024loop"), "{log}");
    // A key that is gone, or comes, is known with the next statement.
    run(&client, "alter table rate drop constraint rate_pkey").await;
    assert_eq!(state(&client, "select latest(1)").await, "0A000");
    run(&client, "create unique index on rate (day, grp)").await;
    assert_eq!(state(&client, "delete from log; select latest(1)").await, "ok", "the columns are not null still");
    // Two texts can be equal to one that has such a collation.
    assert_eq!(state(&client, "select by_email('a9')").await, "ok");
    run(&client, "create collation loose (provider = icu, locale = 'und-u-ks-level2', deterministic = false)").await;
    assert_eq!(state(&client, "select by_email('a9')").await, "0A000");
    cluster.assert_identical().await;
}
