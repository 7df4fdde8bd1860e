-- Definitions that give rows values: the rows are the leader's on every server.
-- A statement ends with ; at the end of a line. "-- refused" before it: SQLSTATE 0A000 with a hint.
create table source (id int primary key, note text, at timestamptz default now(), amount float8);
insert into source select g, 'note ' || g, now(), random() from generate_series(1, 200) g;

-- section: create table as
create table copied as select * from source;
create table drawn as select id, random() as r, gen_random_uuid() as u, clock_timestamp() as c from source;
create table sampled as select * from source limit 7;
create table numbered as select row_number() over () as n, note from source;
create table "Odd Name" ("Col one", "select") with (fillfactor = 70) as select id, note collate "C" from source;
create table nothing as select * from source with no data;
create table if not exists copied as select 1 as other;
create table if not exists nothing as select 1 as other with no data;
create table typed as select 1::numeric(10,2) as n, 'x'::varchar(5) as v, '{1,2}'::int[] as a, '2020-01-01'::date as d,
    interval '-1 day 2 hours' as i, '\xdeadbeef'::bytea as b, null::jsonb as j, 'infinity'::timestamptz as t, 1e-300::float8 as f,
    E'tab\t back\\ line\n' as s;
create table valued as values (1, 'one'), (2, 'two');
create table of_table as table source;
create temp table passing as select id, note from source where id < 10;
create table from_temporary as select * from passing;
select id, random() as r into selected from source;
select id into temp passing_too from source;
create table from_passing_too as select * from passing_too;
begin;
create table inside as select random() as r, id from source;
insert into inside select random(), 1000;
alter table inside add column extra float8 default random();
commit;
begin;
create table undone as select random() as r;
rollback;
begin;
savepoint a;
create table undone as select random() as r;
rollback to savepoint a;
create table kept as select random() as r;
commit;
begin isolation level repeatable read;
create table repeated as select random() as r, count(*) from source;
commit;
set datestyle = 'SQL, DMY';
set intervalstyle = 'sql_standard';
set extra_float_digits = 0;
create table settings as select at, amount, interval '-1 day 2 hours' as i from source;
reset datestyle;
reset intervalstyle;
reset extra_float_digits;
create schema other;
set search_path = other, public;
create table copied as select note from source;
reset search_path;
-- refused
create unlogged table fleeting as select 1 as one;
create unlogged table fleeting as select 1 as one with no data;
create function writes() returns int language sql as 'insert into source values (-1) returning id';
-- refused
create table by_function as select writes() as w;

-- section: materialized views
create materialized view summary as select count(*) as n, random() as r, max(note) as m from source;
create materialized view named (number, words) with (fillfactor = 60) as select id, note from source where id < 5 with no data;
create unique index on named (number);
refresh materialized view named;
refresh materialized view summary;
insert into source values (500, 'later', now(), 1);
refresh materialized view named;
refresh materialized view concurrently named;
create materialized view over_view as select number, random() as r from named;
create materialized view if not exists summary as select 1 as one;
refresh materialized view named with no data;
refresh materialized view named;
select * from named;
begin;
insert into source values (3000, 'in a block', now(), 2);
refresh materialized view summary;
commit;
alter materialized view named rename column words to texts;
refresh materialized view named;
drop materialized view over_view;
-- refused
create materialized view calls as select writes() from source;
create function harmless(int) returns int immutable language sql as 'select $1 + 1';
create materialized view pure as select harmless(id) from source;
refresh materialized view pure;
drop materialized view if exists pure;

-- section: alter table
create table grown (id int primary key, note text);
insert into grown select g, 'n' || g from generate_series(1, 100) g;
alter table grown add column drawn float8 default random();
alter table grown add column u uuid not null default gen_random_uuid();
alter table grown add column n serial;
alter table grown add column i int generated always as identity;
alter table grown add column made timestamptz default now();
alter table grown add column day date default current_date, add column who text default current_user;
alter table grown add column later timestamptz default now() + interval '1 day';
alter table grown add column exact timestamptz default clock_timestamp();
alter table grown add column stated timestamptz default statement_timestamp();
alter table grown add column fixed int default 7;
alter table grown add column if not exists drawn float8 default random();
alter table grown alter column note type int using (random() * 1000)::int;
insert into grown (id) values (1000);
alter table grown add column doubled int generated always as (id * 2) stored;
create domain lot as float8 default random();
alter table grown add column l lot;
create table texts (id int primary key, t text);
insert into texts values (1, 'now'), (2, '2020-01-01');
alter table texts alter column t type timestamptz using t::timestamptz;
create table parent (id int primary key, v int) partition by range (id);
create table part_1 partition of parent for values from (0) to (100);
create table part_2 partition of parent for values from (100) to (200);
insert into parent select g, g from generate_series(1, 150) g;
alter table parent add column r float8 default random();
create table base (id int);
create table child (extra int) inherits (base);
insert into base values (1), (2);
insert into child values (3, 3);
alter table base add column r float8 default random();
create table referenced (id int primary key);
create table refers (id int primary key, r int references referenced on delete cascade);
insert into referenced values (1), (2);
insert into refers values (1, 1), (2, 2);
alter table referenced add column r float8 default random();
alter table refers add column r2 float8 default random();
-- refused
alter table referenced alter column id type bigint using (id + random() * 0)::bigint;
-- refused
alter table grown set unlogged;
-- refused
alter table grown add column w int default writes();
create table loud (id int);
create function noisy() returns trigger language plpgsql as 'begin return new; end';
create trigger loud before insert on loud for each row execute function noisy();
alter table loud enable always trigger loud;
-- refused
alter table loud add column r float8 default random();
begin;
alter table grown add column in_block float8 default random();
update grown set drawn = 1 where id = 5;
commit;
