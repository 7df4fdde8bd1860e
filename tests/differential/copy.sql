-- COPY in and out, in every format, of whole tables, columns and queries, with good and bad data.
create table goods (id int primary key, name text, price numeric, at date default date '2020-01-01', tags text[]);
copy goods from stdin;
1	plain	1.5	2021-02-03	{a,b}
2	tab\there	\N	2021-02-04	\N
3	back\\slash and \x41\102	2	2021-02-05	{"with \\"quotes\\""}
\.
copy goods (id, name) from stdin with (format csv, header, null 'NIL', quote '''');
id,name
4,'comma, and ''quote'''
5,NIL
6,'two
lines'
\.
copy goods (id, name, price) from stdin (delimiter '|', null '');
7|pipe|
8||3.25
\.
select * from goods order by id;
copy goods to stdout;
copy goods (name, id) to stdout with (format csv, header, force_quote (name));
copy (select id, price from goods where id < 4 order by id) to stdout (format csv, delimiter ';');
copy (values (1, 'x'), (2, null)) to stdout (null 'nothing');
-- errors, with their line and column
copy goods from stdin;
9	short
\.
copy goods from stdin;
10	dup	1	2021-02-03	{}
1	dup	1	2021-02-03	{}
\.
copy goods from stdin;
11	bad date	1	2021-02-30	{}
\.
copy goods from stdin;
12	too	1	2021-02-03	{}	many
\.
copy goods (nix) from stdin;
copy nowhere from stdin;
copy goods from stdin (format csv, delimiter 'ab');
copy goods (id, id) from stdin;
begin;
copy goods (id, name) from stdin;
20	in a transaction
\.
savepoint s;
copy goods (id, name) from stdin;
21	in a savepoint
20	twice
\.
rollback to s;
copy goods (id, name) from stdin (format csv);
22,after it
\.
commit;
select id, name from goods where id >= 20 order by id;
begin;
create table frozen (a int, b text);
copy frozen from stdin (freeze);
1	ice
2	snow
\.
commit;
select * from frozen order by a;
create temp table scratch (like goods);
copy scratch (id, name) from stdin;
1	only here
\.
select id, name from scratch;
insert into goods (id, name) select id + 30, name from scratch;
-- the same by psql, through files
\copy goods to results/goods.data
delete from goods where id < 20;
\copy goods from results/goods.data
\copy (select * from goods order by id) to results/goods.csv (format csv, header)
truncate goods;
\copy goods from results/goods.csv (format csv, header)
\copy goods to results/goods.bin (format binary)
truncate goods;
\copy goods from results/goods.bin (format binary)
select * from goods order by id;
-- files of the server
\getenv abs_builddir PG_ABS_BUILDDIR
\set served :abs_builddir '/results/served.data'
copy goods to :'served';
truncate goods;
copy goods from :'served';
copy goods from :'served';
copy goods (id, name) from :'served';
copy goods (nix) from :'served';
copy goods from :'served' (format nix);
copy goods from '/nowhere/at/all';
copy goods from '/';
copy goods from 'relative';
copy nowhere from '/nowhere/at/all';
create role d_copier;
grant insert, select on goods to d_copier;
set role d_copier;
copy goods from :'served';
reset role;
grant pg_read_server_files to d_copier;
begin;
delete from goods;
set local role d_copier;
copy goods from :'served';
commit;
revoke all on goods from d_copier;
drop role d_copier;
select count(*) from goods;
copy (select g, 'row ' || g from generate_series(1, 50000) g) to :'served' (format csv);
create table much (id int primary key, t text);
copy much from :'served' csv;
select count(*), sum(id), max(t) from much;
-- several statements, one of them COPY
copy (select 1) to stdout \; select 2 as two \; copy (select 3) to stdout;
