-- Queries: results, notices, error positions with characters of several bytes, psql's own queries of the catalog.
create table word (id int primary key, w text);
insert into word values (1, 'eins'), (2, 'zwei'), (3, 'drei');
select * from word order by id;
select 'ä', 'öäü' as "Spalte ä", nix from word;
select 1 as ä \; select 'ü' \; select nix from word;
selec 1;
select 'unterminated;
';
select 1 +;
select $1;
select '1'::int + 'a'::int;
select * from word w1 join word w2 using (id) order by id limit 1;
with recursive t(n) as (values (1) union all select n + 1 from t where n < 5) select sum(n) from t;
select w, rank() over (order by w) from word order by w;
select id, count(*) filter (where w like '%e%') from word group by rollup (id) order by id;
values (1, 'a'), (2, null);
table word;
select distinct on (length(w)) w from word order by length(w), w;
select id from word union select 7 except select 1 order by 1;
select array(select id from word order by id), row(1, 'a'), exists (select 1);
select g from generate_series(1, 3) g \gx
select 1 as a, 2 as b \gset
\echo :a :b
select 'select ' || id from word order by id \gexec
select id, w, length(w) from word \crosstabview id w
explain (costs off) select * from word where id = 1;
explain (analyze, costs off, timing off, summary off) select 1;
\d word
\dt word
\di word*
\df twice
\dT+ mood
\echo :ROW_COUNT :SQLSTATE :LAST_ERROR_MESSAGE
select 1/0;
\echo :ERROR :SQLSTATE :LAST_ERROR_MESSAGE
\errverbose
select pg_typeof(1), current_database() = 'postgres', version() like 'PostgreSQL%';
select to_tsvector('english', 'the quick brown foxes'), '{"a": {"b": 1}}'::jsonb #> '{a,b}';
show server_version_num \gset
\if :{?server_version_num}
\echo known
\endif
