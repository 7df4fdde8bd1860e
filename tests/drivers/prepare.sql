-- PREPARE, EXECUTE and DEALLOCATE of statements that write: what psql prints must be what it prints on a lone server.
\set VERBOSITY verbose
\set SHOW_CONTEXT always
create table p (i int primary key, t text, at timestamptz, n numeric(6,2));
create table s (id serial primary key, t text);
create sequence q;

-- Text and types, given and found.
prepare ins (int, text, timestamptz, numeric) as insert into p values ($1, $2, $3, $4);
execute ins(1, 'one', '2020-01-01', 1.239);
execute ins(1 + 1, 'two' || '''s', now(), 2);
execute ins(nextval('q')::int + 10, NULL, 'now', nextval('q'));
execute ins(3, upper('three'), clock_timestamp(), random()::numeric);
select i, t, n from p where i < 10 and i <> 3 order by i;
select count(*), count(distinct at) from p;
prepare "Upd" as update p set t = $2, n = n + $3 where i = $1 returning i, t, n;
execute "Upd"(1, 'uno', '2.5');
execute "Upd"(99, 'nobody', 0);
execute "Upd"(2, E'back\\slash and ''quote''', -1);
prepare del as delete from p where t like $1;
execute del('uno');
execute del('nothing%');
-- Rows that the leader decides.
prepare ser as insert into s (t) values ($1) returning *;
execute ser('a');
execute ser('b');
prepare sel as insert into s (t) select t from p where i > $1 order by i returning id;
execute sel(1);
-- Without arguments.
prepare none as insert into s default values;
execute none;
execute none ;

-- Errors are the server's: positions, names, nothing written.
execute ins(1, 'x');
execute ins(1, 'x', 'x', 1);
execute ins('x', 'x', now(), 1);
execute ins(1, 'x', now(), 'y'::int);
execute   "Upd" (true, nosuch(1), 1);
execute ins(2, 'duplicate', now(), 1);
execute nobody(1);
prepare ins as select 1;
prepare bad as insert into p values ($1, $2, $3, $4, $5);
prepare worse (int) as insert into nosuch values ($1);
execute ins((select 1), 'x', now(), 1);

-- Blocks, several statements in one message, savepoints.
begin;
execute ins(20, 'in a block', now(), 1);
savepoint a;
execute ins(21, 'undone', now(), 1);
execute ins(20, 'duplicate', now(), 1);
rollback to a;
execute ins(22, 'kept', now(), 1);
commit;
execute ins(30, 'x', now(), 1)\; execute ins(31, 'y', now(), 1)\; select 1;
execute ins(32, 'undone', now(), 1)\; execute ins(31, 'duplicate', now(), 1);
prepare pair as update p set t = $1 where i = 30\; execute pair('zz');
begin;
prepare stays as insert into s (t) values ($1);
rollback;
execute stays('it was not rolled back');
begin;
select 1/0;
execute stays('no');
rollback;
select i, t from p order by i;

-- Reads.
prepare r as select t from s where id = $1;
execute r(1);
prepare w as select set_config('application_name', $1, false);
execute w('prepared');
show application_name;

-- The same name for another table: found again by every change of what names mean.
create schema other;
create table other.s (id serial primary key, t text default 'default', extra int);
set search_path = other;
execute stays('into the other one');
table other.s;
reset search_path;
create temp table s (id int, t text);
execute stays('into the temporary one');
select * from s;
drop table s;
execute stays('into the first one again');
select * from s order by id;
alter table p add column more int default 7;
alter table s add column more text default 'more';
execute "Upd"(30, 'after DDL', 1);
execute stays('after DDL');
execute ser('after DDL');
deallocate ser;
prepare ser as insert into s (t) values ($1) returning *;
execute ser('prepared anew');
alter table p drop column n;
execute "Upd"(30, 'without n', 1);
deallocate "Upd";
prepare "Upd" as update p set t = $2 where i = $1;
execute "Upd"(30, 'without n');
drop table s;
execute stays('no table');

deallocate stays;
execute stays('gone');
deallocate prepare ins;
execute ins(40, 'gone', now(), 1);
deallocate nobody;
discard all;
execute del('all%');
prepare del as delete from p where i = $1;
execute del(30);
deallocate all;
execute del(31);
select name from pg_prepared_statements where name !~ '^pgtandem_' order by name;
select i, t, more from p order by i;
