-- Temporary tables, views, sequences, functions' shadows; as a source for permanent tables; ON COMMIT.
create table kept (id int primary key, t text);
create temp table scratch (id serial primary key, t text);
insert into scratch (t) values ('one'), ('two'), ('three') returning *;
update scratch set t = upper(t) where id > 1;
insert into kept select id, t from scratch;
select * from kept order by id;
create temp view small as select * from scratch where id < 3;
select * from small order by id;
create temporary sequence counter start 10;
select nextval('counter'), currval('counter');
create temp table kept (id int, other int);
insert into kept values (1, 1);
select * from kept;
insert into public.kept values (4, 'by its full name');
drop table kept;
select * from kept order by id;
begin;
create temp table gone (a int) on commit drop;
insert into gone values (1);
insert into kept values (5, 'together with a temporary table');
select * from gone;
commit;
select * from gone;
create temp table empty (a int) on commit delete rows;
begin;
insert into empty values (1), (2);
select count(*) from empty;
commit;
select count(*) from empty;
create temp table made as select id, t from kept where id < 3;
select * from made order by id;
create index on scratch (t);
alter table scratch add column n int default 7;
select * from scratch order by id;
begin;
create temp table undone (a int);
rollback;
select * from undone;
truncate scratch;
select count(*) from scratch;
create function scratched() returns bigint language sql as 'select count(*) from scratch';
select scratched();
drop function scratched();
-- Code that comes near no table is the leader's alone.
do $$ begin raise notice 'hello'; end $$;
create procedure told(in text, inout text) language plpgsql as $$ begin $2 := upper($1); raise notice '%', $2; end $$;
call told('hello', null);
begin isolation level repeatable read;
select count(*) from kept;
do $$ begin raise notice 'hello'; perform set_config('work_mem', '5MB', true); end $$;
show work_mem;
commit;
do $$ begin raise exception 'goodbye'; end $$;
discard temp;
select * from scratch;
select * from kept order by id;
-- code on temporary tables that writes nothing but them
create temp table coded (id serial, v int default 1 check (v > 0), note text);
create temp table seen (id int);
create function mark_seen() returns trigger language plpgsql as $$ begin insert into pg_temp.seen values (new.id); new.note := 'x' || new.id; return new; end $$;
create trigger mark before insert or update on coded for each row execute function mark_seen();
insert into coded (v) values (5), (6) returning *;
update coded set v = v + 1;
copy coded (v) from stdin;
7
8
\.
insert into coded (v) values (0);
create temp view shown as select id, v from coded where v > 6;
insert into shown (v) values (50);
update shown set v = 51 where v = 50;
with gone as (delete from coded where id < 3 returning *), kept as (insert into seen select id + 100 from gone returning id)
  select g.id, k.id from gone g left join kept k on k.id = g.id + 100 order by 1;
select id, v, note from coded order by id;
select count(*) from seen;
