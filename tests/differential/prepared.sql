-- Statements prepared by SQL, and what the extended protocol makes of errors and types (\gdesc, \bind where psql has it).
create table item (id int primary key, name text, price numeric(8, 2));
insert into item values (1, 'tea', 2.50), (2, 'rum', 30), (3, 'oil', 7.25);
prepare by_id (int) as select name, price from item where id = $1;
execute by_id (1);
execute by_id ('2');
execute by_id (1, 2);
execute by_id ('x');
prepare by_id as select 1;
prepare untyped as select $1 || ' and ' || $2 as both;
execute untyped ('a', 'b');
prepare wrong as select $1 + nix from item;
prepare ambiguous as select $1;
select name, parameter_types, from_sql from pg_prepared_statements where from_sql order by name;
explain (costs off) execute by_id (1);
begin;
prepare inside as values (1), (2);
rollback;
execute inside;
deallocate by_id;
execute by_id (1);
deallocate nix;
deallocate prepare inside;
deallocate all;
select count(*) from pg_prepared_statements where from_sql;
prepare q as select id from item order by id;
alter table item add column extra int;
execute q;
prepare w as select * from item order by id;
alter table item drop column extra;
execute w;
discard plans;
execute q;
discard all;
execute q;
select * from item \gdesc
insert into item values (4, 'ink', 1) returning id, name \gdesc
update item set price = price + 1 where id = 1 returning * \gdesc
insert into item values (5, 'jam', 2) \gdesc
select nix from item \gdesc
select * from item order by id;
