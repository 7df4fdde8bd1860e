//! B1, B2, B5 to B17: values that differ from server to server, or from run to run.

use crate::stage::Fate::{Exact, Refused};
use crate::stage::{Case, Stage, check, code_of, play, refused, run, value};

pub async fn play(stage: &mut Stage) {
    play!(
        stage,
        b01_the_clock,
        b02_random_values,
        b05_values_of_the_session_and_the_server,
        b06_sums_of_floats,
        b07_aggregates_without_order,
        b08_the_order_of_text,
        b09_a_trigger_before_with_the_clock,
        b10_a_trigger_after_with_a_sequence,
        b11_rules,
        b12_volatile_functions_of_users,
        b13_generated_columns,
        b14_domains,
        b15_row_level_security,
        b16_names_and_numbers_of_objects,
        b17_settings_that_change_how_values_are_read,
    );
}

async fn b01_the_clock(case: &Case<'_>) {
    let a = case.client().await;
    run(
        &a,
        "create table t (id int primary key, a timestamptz default now(), b timestamptz default clock_timestamp(), c date default current_date,
         d timestamp default localtimestamp, e time default current_time, v int default 0)",
    )
    .await;
    run(&a, "insert into t (id) values (1); insert into t (id, a) values (2, now()), (3, statement_timestamp())").await;
    run(&a, "insert into t (id, a, d) select 4, clock_timestamp(), 'now'").await;
    run(&a, "begin; insert into t (id) values (5); select pg_sleep(0.01); insert into t (id) values (6); commit").await;
    assert_eq!(value(&a, "select count(distinct a) from t where id in (5, 6)").await, "1");
    run(&a, "update t set a = now(), c = current_date where id = 1").await;
    run(&a, "update t set v = 1 where id = 1 and a <= now()").await;
    assert_eq!(value(&a, "select v from t where id = 1").await, "1");
    for (fate, text) in [
        (Exact, "update t set a = clock_timestamp() where id = 2"),
        (Exact, "update t set a = now() where v = 0"),
        (Refused, "update t set a = 'now' where id = 3"),
        (Exact, "insert into t (id, v) values (7, extract(epoch from clock_timestamp())::int)"),
        (Exact, "update t set a = default where id = 4"),
        (Exact, "delete from t where b < clock_timestamp() and id = 2"),
    ] {
        check(&a, fate, text).await;
    }
    run(&a, "create table checked (id int primary key, ts timestamptz check (ts <= now()))").await;
    refused(&a, "insert into checked values (1, now())").await;
    a.execute("insert into t (id, a) values ($1, now() - interval '1 day')", &[&20]).await.unwrap();
}

async fn b02_random_values(case: &Case<'_>) {
    let a = case.client().await;
    run(&a, "create table t (id int primary key, r float8 default random(), u uuid default gen_random_uuid(), m text)")
        .await;
    run(&a, "insert into t (id) select generate_series(1, 20)").await;
    run(&a, "insert into t (id, m) values (21, md5(random()::text)), (22, gen_random_uuid()::text)").await;
    assert_eq!(value(&a, "select count(distinct u) from t").await, "22");
    for text in [
        "update t set r = random() where id = 1",
        "update t set u = gen_random_uuid()",
        "delete from t where random() < 0.5",
        "update t set m = 'x' where r > (select random())",
        "update t set u = default where id < 5",
    ] {
        run(&a, text).await;
    }
}

async fn b05_values_of_the_session_and_the_server(case: &Case<'_>) {
    let a = case.client().await;
    run(&a, "create table t (id int primary key, v text)").await;
    for (id, expression) in [
        "pg_backend_pid()::text",
        "txid_current()::text",
        "inet_server_addr()::text",
        "version()",
        "current_setting('work_mem')",
        "current_user::text",
        "session_user::text",
        "current_schema()::text",
        "current_database()::text",
        "pg_postmaster_start_time()::text",
        "pg_current_wal_lsn()::text",
        "inet_client_port()::text",
    ]
    .iter()
    .enumerate()
    {
        run(&a, &format!("insert into t values ({id}, {expression})")).await;
        run(&a, &format!("update t set v = {expression} where id = {id}")).await;
    }
    let pid = value(&a, "select pg_backend_pid()").await;
    assert_eq!(value(&a, "select v from t where id = 0").await, pid, "the value is the leader's");
}

async fn b06_sums_of_floats(case: &Case<'_>) {
    let a = case.client().await;
    run(&a, "create table f (id int primary key, x float8, y float4); create table s (id serial primary key, x float8, y float4, z float8)").await;
    run(&a, "insert into f select 2000 - i, 1e16 / i, i / 3.0 from generate_series(1, 1000) i; analyze f").await;
    case.reorder_followers("f", "f_pkey").await;
    run(&a, "insert into s (x, y, z) select sum(x), sum(y), avg(x) from f").await;
    run(&a, "insert into s (x, y) values (0.1::float8 + 0.2::float8, 1.1), ('NaN', 'Infinity'), ('-0', 1e-40)").await;
    run(&a, "update s set x = (select sum(x) from f)").await;
    run(&a, "update s set z = x * 1.1 where id = 1").await;
}

async fn b07_aggregates_without_order(case: &Case<'_>) {
    let a = case.client().await;
    run(
        &a,
        "create table f (id int primary key, g int, t text); create table s (id serial primary key, t text, a int[])",
    )
    .await;
    run(&a, "insert into f select 100 - i, i % 3, 't' || i from generate_series(1, 60) i").await;
    case.reorder_followers("f", "f_pkey").await;
    run(&a, "insert into s (t, a) select string_agg(t, ','), array_agg(id) from f").await;
    run(&a, "insert into s (t) select distinct on (g) t from f").await;
    run(&a, "insert into s (t) select (array_agg(t))[1] from f group by g").await;
    run(&a, "update s set t = (select string_agg(t, ',') from f)").await;
    run(&a, "update s set t = (select string_agg(t, ',' order by id) from f) where id = 1").await;
    run(&a, "delete from f where t in (select distinct on (g) t from f)").await;
}

async fn b08_the_order_of_text(case: &Case<'_>) {
    let a = case.client().await;
    run(&a, "create table f (t text primary key); create table s (id serial primary key, n int, t text)").await;
    run(&a, "insert into f values ('a'), ('B'), ('ä'), ('-a'), ('a b'), ('ab'), ('Z'), ('z')").await;
    run(&a, "insert into s (n, t) select row_number() over (order by t), t from f").await;
    run(&a, "insert into s (n, t) select row_number() over (order by t collate \"POSIX\"), t from f").await;
    run(&a, "insert into s (t) select max(t) from f").await;
    run(&a, "delete from f where t > 'a'").await;
    run(&a, "update s set t = upper(t) where t < 'b'").await;
    // Both servers must have the same library's order; the proxy compares that before a node joins.
    case.same_on_each_node("select string_agg(t, ',' order by t) from f").await;
}

async fn b09_a_trigger_before_with_the_clock(case: &Case<'_>) {
    let a = case.client().await;
    run(&a, "create table t (id int primary key, v int, updated_at timestamptz); insert into t values (1, 1)").await;
    run(
        &a,
        "create function touch() returns trigger language plpgsql as
         $$ begin new.updated_at := clock_timestamp(); return new; end $$;
         create trigger touch before insert or update on t for each row execute function touch()",
    )
    .await;
    run(&a, "insert into t values (2, 2)").await;
    run(&a, "update t set v = 5").await;
    assert_eq!(value(&a, "select count(distinct updated_at) from t where updated_at < clock_timestamp()").await, "2");
    case.same_on_each_node("select string_agg(t::text, ',' order by t) from t").await;
    run(&a, "delete from t where id = 1").await;
}

async fn b10_a_trigger_after_with_a_sequence(case: &Case<'_>) {
    let a = case.client().await;
    run(
        &a,
        "create table t (id int primary key, v int); create table audit (n bigserial primary key, id int, at timestamptz default now());
         create function note() returns trigger language plpgsql as
         $$ begin insert into audit (id) values (new.id); return null; end $$;
         create trigger note after insert or update on t for each row execute function note();
         create trigger each_statement after delete on t for each statement execute function note()",
    )
    .await;
    refused(&a, "insert into t values (1, 1), (2, 2)").await;
    refused(&a, "update t set v = 0 where id = 1").await;
    refused(&a, "delete from t where id = 77").await;
}

async fn b11_rules(case: &Case<'_>) {
    let a = case.client().await;
    run(
        &a,
        "create table ruled (id int primary key, v int); create table ruled_log (id int, at timestamptz default clock_timestamp());
         create rule also as on insert to ruled do also insert into ruled_log values (new.id);
         create view w as select * from ruled where v > 0",
    )
    .await;
    refused(&a, "insert into ruled values (1, 1)").await;
    refused(&a, "insert into w values (2, 2)").await;
    // The rule is on the table behind it, and its action is read whatever the statement is.
    refused(&a, "update w set v = v + 1").await;
}

async fn b12_volatile_functions_of_users(case: &Case<'_>) {
    let a = case.client().await;
    run(
        &a,
        "create table rolled (id int primary key, v int); insert into rolled values (1, 1), (2, 2);
         create function roll() returns int language sql volatile as 'select (random() * 1000)::int';
         create function grow(i int) returns int language plpgsql as $$ begin update rolled set v = v + 1 where id = i; return i; end $$;
         create table d (id int primary key, v int default roll())",
    )
    .await;
    for (fate, text) in [
        (Refused, "insert into rolled values (3, roll())"),
        (Refused, "update rolled set v = roll() where id = 1"),
        (Refused, "update rolled set v = 0 where v > roll()"),
        (Refused, "delete from rolled where id = roll()"),
        (Refused, "insert into d (id) values (1)"),
        (Refused, "insert into rolled values (4, 4) returning roll()"),
        (Exact, "insert into rolled values (5, grow(1))"),
        (Refused, "update rolled set v = v where id = grow(2)"),
        (Exact, "select grow(1)"),
        (Refused, "select id from rolled where grow(id) > 0"),
    ] {
        check(&a, fate, text).await;
    }
}

async fn b13_generated_columns(case: &Case<'_>) {
    let a = case.client().await;
    run(&a, "create table t (id int primary key, v int, twice int generated always as (v * 2) stored, r float8 default random())").await;
    run(&a, "insert into t (id, v) values (1, 1); insert into t (id, v) select i, i from generate_series(2, 5) i")
        .await;
    run(&a, "update t set v = 50 where id = 1").await;
    run(&a, "update t set v = v + 1 where v > 2").await;
    run(&a, "insert into t (id, v) values (1, 7) on conflict (id) do update set v = excluded.v").await;
    assert_eq!(code_of(&a, "update t set twice = 1 where id = 1").await, "428C9");
}

async fn b14_domains(case: &Case<'_>) {
    let a = case.client().await;
    run(
        &a,
        "create domain small as int check (value < 100); create domain later as timestamptz check (value <= now())",
    )
    .await;
    run(&a, "create table t (id int primary key, s small default 5); create table l (id int primary key, l later)")
        .await;
    run(&a, "insert into t (id) values (1)").await;
    assert_eq!(code_of(&a, "insert into t values (2, 200)").await, "23514");
    refused(&a, "insert into l values (3, now() - interval '1 s')").await;
    run(&a, "update t set s = s + 1 where id = 1").await;
    a.execute("insert into t (id, s) values ($1, 7)", &[&9]).await.unwrap();
}

async fn b15_row_level_security(case: &Case<'_>) {
    let a = case.client().await;
    run(
        &a,
        "create table owned (id int primary key, owner text, v int); insert into owned values (1, 'me', 1), (2, 'you', 2);
         create policy own on owned using (owner = current_setting('app.me', true)); alter table owned enable row level security;
         create role b15_reader; grant usage on schema b15_row_level_security to b15_reader; grant all on owned to b15_reader",
    )
    .await;
    run(&a, "set role b15_reader; set app.me = 'me'").await;
    assert_eq!(value(&a, "select count(*) from owned").await, "1");
    run(&a, "update owned set v = v + 10").await;
    run(&a, "update owned set v = v + 10 where id = 2").await;
    run(&a, "insert into owned values (3, 'me', 3)").await;
    run(&a, "delete from owned").await;
    run(&a, "reset role").await;
    assert_eq!(value(&a, "select v from owned where id = 2").await, "2");
}

async fn b16_names_and_numbers_of_objects(case: &Case<'_>) {
    let a = case.client().await;
    // Numbers of objects differ from here on.
    for index in 1..case.cluster.layout.plan.nodes {
        let client = case.cluster.connect_node(index, "postgres").await;
        run(&client, "create table public.burns_numbers (i int); drop table public.burns_numbers").await;
    }
    run(&a, "create table t (id int primary key, c regclass, o oid, p regproc, y regtype)").await;
    run(&a, "insert into t values (1, 't', 't'::regclass, 'now', 'int')").await;
    run(&a, "insert into t select 2, 't'::regclass, oid, null, null from pg_class where relname = 't' limit 1").await;
    run(&a, "update t set o = 't'::regclass where id = 1").await;
    run(&a, "update t set c = 't' where id = 2").await;
    run(&a, "delete from t where c = 't'::regclass").await;
}

async fn b17_settings_that_change_how_values_are_read(case: &Case<'_>) {
    let a = case.client().await;
    run(&a, "create table t (id int primary key, m money, ts timestamptz, d date, iv interval, b bytea, f float8, t text, a text[])").await;
    run(&a, "set datestyle = 'SQL, DMY'; set timezone = 'Asia/Tokyo'; set intervalstyle = sql_standard; set bytea_output = escape").await;
    run(&a, "insert into t values (1, '12.5', '02/03/2024 10:00', '02/03/2024', '1-2 3 4:05:06', '\\x0001ff', 0.1, 'x', '{NULL}')").await;
    run(&a, "set array_nulls = off; insert into t (id, a) values (2, '{NULL}')").await;
    // The whole row goes to followers, and a NULL in its array would be the word there.
    refused(&a, "insert into t (id, t) select 3, random()::text").await;
    run(&a, "reset array_nulls").await;
    run(&a, "insert into t (id, t, d) select 3, to_char(timestamp '2024-05-06', 'TMMonth TMDay') || 12.5::money, '03/04/2024'").await;
    run(&a, "set extra_float_digits = 0").await;
    refused(&a, "insert into t (id, f) select 4, 1.0 / 3").await;
    refused(&a, "insert into t (id, t) select 5, (1.0::float8 / 3)::text").await;
    run(&a, "update t set ts = '04/05/2024 11:00', iv = '5 6:7' where id = 1").await;
    assert_eq!(
        value(&a, "select to_char(ts at time zone 'UTC', 'YYYY-MM-DD HH24') from t where id = 1").await,
        "2024-05-04 02"
    );
    run(&a, "set xmloption = document; set transform_null_equals = on").await;
    run(&a, "update t set t = 'null' where id = 2 and m = null").await;
    assert_eq!(value(&a, "select t from t where id = 2").await, "null");
}
