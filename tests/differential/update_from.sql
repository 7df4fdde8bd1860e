-- UPDATE ... FROM on tables whose rows have no name.
create table keyless (a int, b int, c text);
create table source (a int, v int);
insert into keyless select i % 5, i, 'c' || i from generate_series(1, 20) i;
insert into source values (1, 100), (2, 200), (2, 200), (3, 300);
-- constants and own values, whichever row is found
update keyless set c = 'seen', b = keyless.b + 1 from source where keyless.a = source.a;
update keyless k set c = k.c || '!' from source s, generate_series(1, 2) g where k.a = s.a returning k.a, k.c;
-- one row each
update keyless set b = v.j from (values (0, 7), (4, 9)) as v (i, j) where keyless.a = v.i;
update only public.keyless as k set b = s.v, c = null from (select distinct a, v from source) s where k.a = s.a and k.b > 5 returning *;
update keyless set (b, c) = (w.v, w.c) from (with w as (select 1 as a, -1 as v, 'w' as c) select * from w) w where keyless.a = w.a;
update keyless set (a, b) = row(v.*) from (values (21, 100)) as v (i, j) where keyless.a = v.i;
-- errors of the statement's own
update keyless set a = v.* from (values (100, 20)) as v (i, j) where keyless.b = v.j;
update keyless set a = v.nothing from (values (100, 20)) as v (i, j) where keyless.b = v.j;
select a, b, c from keyless order by a, b, c;
create table parted (a int, b text) partition by list (a);
create table parted1 partition of parted for values in (1);
create table parted2 partition of parted for values in (2);
insert into parted values (1, 'a'), (2, 'a');
update parted set b = 'b' from (select a from source union all select a + 1 from source) ss (a) where parted.a = ss.a;
select tableoid::regclass::text, * from parted order by a;
