-- psql as people use it: several statements in one message, \copy, variables, describe.
create table ps (id int generated always as identity primary key, t text default 'x');
insert into ps (t) values ('a'); insert into ps default values; insert into ps (t) select 'c';
\d ps
begin;
savepoint s;
delete from ps where id = 1;
rollback to s;
commit;
select count(*) as n from ps \gset
\echo three rows: :n
create table ps_copy (a int primary key, b text);
copy ps_copy from stdin;
1	one
2	two
\.
truncate ps_copy;
drop table ps_copy;
