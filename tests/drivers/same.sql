-- Run by psql through the proxy and on a lone server: everything that it prints must be the same.
\set VERBOSITY default
create table p (id int generated always as identity primary key, name text unique, n numeric default 1.5);
insert into p (name) values ('a'), ('b') returning *;
select 1 as one \; insert into p (name) values ('c') \; select count(*) from p \; select nix \; select 2;
select count(*) from p;
insert into p (name) values ('ä'), ('a');
insert into p (name, nix) values ('d', 1);
select 'ümlaut', nix from p;
selec 1;
begin;
savepoint s1;
insert into p (name) values ('in s1') returning name;
savepoint s2;
insert into p (name) values ('in s1');
rollback to s2;
update p set n = n + 1 where name = 'in s1' returning n;
release s1;
commit;
select name, n from p order by name;
select * from p \gdesc
insert into p (name) values ('x') returning id, name \gdesc
delete from p where id = 1 \gdesc
select count(*) as c, 'text' as t from p \gset
\echo :t :c
begin;
declare c scroll cursor for select g, repeat('x', g) from generate_series(1, 5) g;
fetch 2 from c;
fetch backward 1 from c;
move last in c;
fetch all from c;
close c;
rollback;
declare h cursor with hold for select 7 as seven;
fetch all from h;
close h;
\set FETCH_COUNT 3
select g from generate_series(1, 8) g;
\unset FETCH_COUNT
set timezone = 'Asia/Tokyo';
select '2020-01-01 00:00+00'::timestamptz;
reset timezone;
begin; set local datestyle = 'German'; select date '2020-02-03'; commit;
select date '2020-02-03';
show datestyle;
prepare q (int) as select $1 * 2 as doubled;
execute q (21);
deallocate q;
execute q (21);
create table c (a int primary key, b text);
copy c from stdin;
1	one
2	two\twith a tab
\.
copy c from stdin with (format csv, header);
a,b
3,"three, ""quoted"""
4,
\.
copy c from stdin;
5	five
zwei	broken
\.
copy c from stdin;
5	five
1	twice
\.
copy c to stdout;
copy c to stdout with (format csv, header, force_quote *);
copy (select a from c order by a desc limit 2) to stdout;
\copy (select a + 100, b from c) to program 'cat > /dev/null' binary
\copy c (a) from program 'seq 10 15'
select * from c order by a;
begin;
copy c from stdin;
20	kept
\.
savepoint broken;
copy c from stdin;
x	broken
\.
rollback to broken;
commit;
select count(*) from c;
do_nothing;
create temp table t as select 5 as five;
insert into t values (6) returning five;
select * from t;
discard temp;
select * from t;
insert into c values (30, 'after');
create view v as select a from c where a > 20;
select * from v;
explain (costs off) update c set b = 'x' where a = 1;
truncate c;
select count(*) from c;
vacuum c;
begin; vacuum c;
rollback;
commit;
discard all;
insert into c values (1, 'after discard') on conflict (a) do update set b = excluded.b;
select md5(string_agg(g::text, ',')) from generate_series(1, 100000) g;
select repeat('x', 100) || g from generate_series(1, 3000) g \g /dev/null
drop view v;
drop table c, p;
