-- Definitions: partitions, inheritance, generated columns, domains, enums, composites, arrays, ranges, views, indexes.
create schema shop;
set search_path = shop, public;
create type mood as enum ('sad', 'ok', 'glad');
create domain percent as numeric(5, 2) check (value between 0 and 100);
create domain word as text not null check (value !~ '\s');
create type address as (street text, number int);
create type spans as range (subtype = int4);
create table customer (
  id int primary key, name word unique, mood mood default 'ok', share percent, home address, homes address[],
  full_name text generated always as (name || '!') stored, matrix int[][], during spans, born date
);
insert into customer (id, name, mood, share, home, homes, matrix, during)
  values (1, 'ann', 'glad', 12.5, ('High Street', 7), array[('A', 1), ('B', 2)]::address[], '{{1,2},{3,4}}', '[1,5)');
insert into customer (id, name) values (2, 'bob'), (3, 'cid') returning id, full_name;
insert into customer (id, name) values (4, 'two words');
insert into customer (id, name, share) values (4, 'dan', 101);
insert into customer (id, name, mood) values (4, 'dan', 'angry');
insert into customer (id, name, full_name) values (4, 'dan', 'no');
insert into customer (id) values (4);
update customer set home.number = 8, matrix[1][2] = 9, homes[2].street = 'C' where id = 1;
update customer set full_name = 'no' where id = 1;
select * from customer order by id;
select (home).street, matrix[1:2][2:2], homes[1], upper(during), name::text || share from customer where id = 1;
alter type mood add value 'happy' after 'ok';
select enum_range(null::mood);
alter table customer add column note text default 'none', drop column born;
alter table customer rename column note to remark;
alter table customer alter column remark set not null, add constraint remark_short check (length(remark) < 20);
update customer set remark = repeat('x', 30) where id = 2;
\d customer
-- partitions
create table sale (id int, day date, amount numeric, primary key (day, id)) partition by range (day);
create table sale_2020 partition of sale for values from ('2020-01-01') to ('2021-01-01');
create table sale_2021 partition of sale for values from ('2021-01-01') to ('2022-01-01') partition by list (id);
create table sale_2021_one partition of sale_2021 for values in (1);
create table sale_2021_rest partition of sale_2021 default;
insert into sale values (1, '2020-05-05', 10), (1, '2021-05-05', 20), (2, '2021-06-06', 30);
insert into sale values (1, '2022-01-01', 1);
insert into sale_2020 values (1, '2021-01-01', 1);
select tableoid::regclass, * from sale order by day, id;
create table sale_2022 (like sale including all);
insert into sale_2022 values (5, '2022-02-02', 50);
alter table sale attach partition sale_2022 for values from ('2022-01-01') to ('2023-01-01');
alter table sale detach partition sale_2020;
create index on sale (amount);
update sale set amount = amount + 1 where day = '2021-05-05' and id = 1;
delete from sale where day = '2021-06-06' and id = 2;
select tableoid::regclass, * from sale order by day, id;
\d+ sale
-- inheritance
create table animal (id int primary key, name text);
create table dog (breed text, primary key (id)) inherits (animal);
insert into animal values (1, 'cat');
insert into dog values (2, 'rex', 'poodle');
select tableoid::regclass, * from animal order by id;
select * from only animal;
alter table animal add column legs int default 4;
select * from dog;
drop table animal;
-- views and rules of names
create view glad as select id, name from customer where mood = 'glad' with check option;
create or replace view glad as select id, name, mood from customer where mood = 'glad';
select * from glad;
create unique index on customer (lower(name::text)) where id > 1;
insert into customer (id, name) values (5, 'BOB');
comment on table customer is 'people';
select obj_description('customer'::regclass);
create table customer (id int);
create table if not exists customer (id int);
drop table nowhere;
drop table if exists nowhere, customer_nowhere;
drop type mood;
alter table nowhere add column a int;
create index on customer (nowhere);
drop view glad;
create statistics customer_stats on id, mood from customer;
create function twice(n int) returns int language sql immutable as 'select n * 2';
create or replace function twice(n int) returns int language sql immutable as 'select n + n';
select twice(21);
create index on customer (twice(id));
create aggregate total (int) (sfunc = int4pl, stype = int, initcond = '0');
select total(id) from customer;
create operator === (leftarg = int, rightarg = int, function = int4eq);
select 1 === 1;
create cast (int as address) with inout;
create function broken() returns int language sql as 'select nowhere';
reset search_path;
select * from customer;
begin;
create table shop.undone (a int);
insert into shop.undone values (1);
rollback;
select * from shop.undone;
begin;
create table shop.done (a int primary key);
insert into shop.done values (1), (2);
alter table shop.done add column b int;
update shop.done set b = a where a = 1;
commit;
select * from shop.done order by a;
\dt shop.*
