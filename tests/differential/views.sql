-- Statements on several rows through views, rules and policies, also beside temporary objects.
create table base (id int primary key, v int, note text default 'none');
create view plain as select id, v, note from base where v < 1000 with check option;
create view over as select id, v from plain where id > 0;
insert into plain values (1, 10), (2, 20), (3, 30);
insert into over select i, i * 10 from generate_series(4, 8) i;
insert into over values (9, 5000), (10, 1);
update plain set v = v + 1 where id < 4 returning *;
update over set v = over.v + base.v from base where over.id = base.id and base.id > 6;
delete from plain where v in (select v from over where id = 5) returning id;
table base order by id;
create table log (id int, v int, total bigint);
create table ruled (id int primary key, v int);
create rule ruled_log as on insert to ruled do also insert into log select new.id, new.v, (select count(*) from base);
insert into ruled values (1, 1), (2, 2), (3, 3);
update ruled set v = v + 1;
table log order by id;
create temp table scratch (id int, v int);
insert into scratch values (100, 1), (101, 2);
insert into ruled select id, v from base where id < 0;
insert into plain values (200, 2), (201, 3);
do $$ declare n int; begin select count(*) into n from base; insert into log values (0, n, n); end $$;
table base order by id;
table log order by id, v;
create table note_of (id int primary key);
create function note_base() returns trigger language plpgsql as $$ begin insert into note_of values (new.id); return new; end $$;
create trigger note after insert on base for each row execute function note_base();
insert into base values (300, 1), (301, 1);
table note_of order by id;
-- system columns and the order of rows where only the client sees them
create table many (a int, b int) partition by list (a);
create table many1 partition of many for values in (1);
create table many2 partition of many for values in (2);
with ins as (insert into many select i % 2 + 1, i from generate_series(1, 6) i returning tableoid::regclass, *)
  select tableoid::regclass, a, min(b), max(b) from ins group by 1, 2 order by 2 limit 1;
with gone as (delete from many where b = 3 returning tableoid::regclass::text, b) select * from gone;
table many order by b;
-- a function that is not volatile sees the rows as they were before the statement
create function top_of_base() returns int stable language sql as 'select max(v) from base';
update plain set v = top_of_base() + 1 where id in (1, 2, 3) and top_of_base() < 900;
create table owned (id int primary key);
alter table owned enable row level security;
insert into owned values (1), (2);
truncate owned;
select count(*) from owned;
table base order by id;
