//! Statement -> lane, with facts written by hand.

use super::super::expressions::Look;
use super::super::facts::{Bulk, Column, DefaultKind, Function, Operator, Type};
use super::super::parse::parse_one;
use super::super::plan::{CopyText, EffectPlan, Write};
use super::super::shape::mask;
use super::*;

fn column(name: &str, sql_type: &str) -> Column {
    Column {
        name: name.to_owned(),
        sql_type: sql_type.to_owned(),
        dates: sql_type.starts_with("timestamp") || sql_type == "date",
        zones: sql_type.ends_with(" with time zone"),
        floats: sql_type == "double precision",
        text: sql_type == "text",
        may_select: true,
        may_insert: true,
        bulk: Bulk::Array,
        ..Column::default()
    }
}

fn table(oid: u32, name: &str, key: &[&str], columns: &[(&str, &str)]) -> (Name, Relation) {
    let relation = Relation {
        oid,
        schema: "public".to_owned(),
        name: name.to_owned(),
        kind: "r".to_owned(),
        persistence: "p".to_owned(),
        owner: "alice".to_owned(),
        columns: columns.iter().map(|(name, sql_type)| column(name, sql_type)).collect(),
        key: key.iter().map(|name| (*name).to_owned()).collect(),
        key_operators: vec![Operator { schema: "pg_catalog".to_owned(), name: "=".to_owned() }; key.len()],
        ..Relation::default()
    };
    (Name::new("", name), relation)
}

fn function(name: &str, volatility: &str, builtin: bool) -> (Name, Vec<Function>) {
    let schema = if builtin { "pg_catalog" } else { "public" };
    let function = Function {
        schema: schema.to_owned(),
        name: name.to_owned(),
        volatility: volatility.to_owned(),
        builtin,
        kind: "f".to_owned(),
        ..Function::default()
    };
    (Name::new("", name), vec![function])
}

fn facts() -> Facts {
    let plain = [
        ("id", "integer"),
        ("v", "integer"),
        ("note", "text"),
        ("at", "timestamp with time zone"),
        ("d", "double precision"),
    ];
    let mut facts = Facts::default();
    let mut add = |(name, relation): (Name, Relation), change: fn(&mut Relation)| {
        let mut relation = relation;
        change(&mut relation);
        facts.relations.insert(name, relation);
    };
    add(table(20001, "t", &["id"], &plain), |_| ());
    add(table(20002, "two", &["a", "b"], &[("a", "integer"), ("b", "integer"), ("v", "integer")]), |_| ());
    add(table(20003, "keyless", &[], &[("v", "integer"), ("w", "text")]), |_| ());
    add(table(20004, "serials", &["id"], &[("id", "integer"), ("v", "integer")]), |relation| {
        relation.columns.iter_mut().filter(|column| column.name == "id").for_each(|column| {
            column.default = DefaultKind::Other;
            column.default_sql = Some("nextval('s')".to_owned());
        });
    });
    add(table(20005, "triggered", &["id"], &plain), |relation| relation.triggers = 4 | 16 | 1);
    add(table(20006, "ruled", &["id"], &plain), |relation| relation.rules = true);
    add(table(20007, "secured", &["id"], &plain), |relation| relation.rls = true);
    add(table(20008, "parent", &["id"], &plain), |relation| {
        relation.cascade_delete = true;
        relation.referenced = vec!["id".to_owned()];
    });
    add(table(20009, "old", &["id"], &plain), |relation| relation.children = true);
    add(table(20010, "scratch", &[], &plain), |relation| relation.persistence = "t".to_owned());
    add(table(20015, "quick", &["id"], &plain), |relation| relation.persistence = "u".to_owned());
    add(table(20011, "seen", &[], &plain), |relation| relation.kind = "v".to_owned());
    add(table(20012, "far", &[], &plain), |relation| relation.kind = "f".to_owned());
    add(table(20013, "parts", &["id"], &plain), |relation| relation.kind = "p".to_owned());
    add(table(20016, "twice", &["id"], &[("id", "integer"), ("v", "integer"), ("code", "text")]), |relation| {
        relation.unique_columns = vec!["code".to_owned(), "v".to_owned()];
        relation.referenced = vec!["code".to_owned(), "id".to_owned()];
    });
    add(table(20017, "counted", &["id"], &[("id", "integer"), ("v", "integer")]), |relation| {
        relation.columns.iter_mut().for_each(|column| column.default = DefaultKind::Opaque);
    });
    add(table(20014, "hidden", &["id"], &plain), |relation| {
        relation.columns.iter_mut().for_each(|column| column.may_select = false);
    });
    for (name, volatility) in [
        ("now", "s"),
        ("clock_timestamp", "v"),
        ("random", "v"),
        ("lower", "i"),
        ("abs", "i"),
        ("nextval", "v"),
        ("pg_sleep", "v"),
        ("count", "i"),
        ("sum", "i"),
        ("array_agg", "i"),
        ("row_number", "i"),
        ("to_char", "s"),
        ("concat", "s"),
        ("current_setting", "s"),
        ("lo_create", "v"),
        ("brin_summarize_new_values", "v"),
        ("set_config", "v"),
        ("gen_random_uuid", "v"),
        ("generate_series", "i"),
        ("age", "s"),
        ("pg_notify", "v"),
        ("date_trunc", "s"),
        ("pg_stat_reset", "v"),
        ("query_to_xml", "s"),
        ("pg_read_file", "v"),
        ("date", "s"),
        ("json_to_recordset", "s"),
    ] {
        facts.functions.extend([function(name, volatility, true)]);
    }
    facts.functions.extend([
        function("mine", "v", false),
        function("steady", "s", false),
        function("fixed", "i", false),
    ]);
    for (name, dates, text) in [
        ("timestamptz", true, false),
        ("date", true, false),
        ("text", false, true),
        ("int4", false, false),
        ("regclass", false, false),
        ("float8", false, false),
        ("numeric", false, false),
    ] {
        let fact = Type {
            name: name.to_owned(),
            builtin: true,
            dates,
            text,
            reg: name == "regclass",
            floats: name == "float8",
            ..Type::default()
        };
        facts.types.insert(Name::new("", name), fact.clone());
        facts.types.insert(Name::new("pg_catalog", name), fact);
    }
    let qualified: Vec<_> =
        facts.functions.iter().map(|(name, found)| (Name::new("pg_catalog", &name.name), found.clone())).collect();
    facts.functions.extend(qualified);
    facts
}

fn planned(text: &str) -> Plan {
    let statement = parse_one(text).unwrap_or_else(|error| panic!("{text}: {error}"));
    classify(&statement, text, &mask(text), &facts())
}

fn written(text: &str) -> Write {
    match planned(text).lane {
        Lane::Write(write) => *write,
        other => panic!("{text}: {other:?}"),
    }
}

/// A short name of the lane.
fn lane_of(text: &str) -> &'static str {
    match planned(text).lane {
        Lane::Read { copy_in: true, .. } => "copy in",
        Lane::Read { guard: true, .. } => "guard",
        Lane::Read { .. } => "read",
        Lane::Control(_) => "control",
        Lane::Admin(_) => "admin",
        Lane::Named(_) => "named",
        Lane::Maintenance { .. } => "maintenance",
        Lane::Nodewise => "nodewise",
        Lane::Finish(_) => "finish",
        Lane::Refused(_) => "refused",
        Lane::Once(_) => "once",
        Lane::Write(write) => match &write.effect {
            EffectPlan::Rows { .. } => "rows",
            EffectPlan::Copy { .. } => "copy",
            EffectPlan::CopiedRows(_) => "copied rows",
            EffectPlan::LargeObject(_) => "large object",
            EffectPlan::Carried { .. } => "carried",
            EffectPlan::Text { .. } if write.ddl => "ddl",
            EffectPlan::Text { lock_tables, .. } if write.barrier && !lock_tables.is_empty() => "ordered",
            EffectPlan::Text { .. } if write.barrier => "barrier",
            EffectPlan::Text { .. } => "point",
        },
    }
}

const LANES: &[(&str, &[&str])] = &[
    (
        "named",
        &["PREPARE p AS SELECT 1", "PREPARE p AS DELETE FROM t", "EXECUTE p", "EXECUTE p(1, now())", "DEALLOCATE p"],
    ),
    (
        "read",
        &[
            "SELECT 1",
            "SELECT * FROM t WHERE id = 1 FOR UPDATE",
            "VALUES (1), (2)",
            "TABLE t",
            "WITH x AS (SELECT 1) SELECT * FROM x",
            "SHOW ALL",
            "SHOW pool_node",
            "SELECT now(), random(), nextval('s'), pg_sleep(1), gen_random_uuid()",
            "SELECT fixed(1)",
            "SELECT pg_notify('a', 'b')",
            "EXPLAIN SELECT 1",
            "EXPLAIN ANALYZE SELECT 1",
            "EXPLAIN UPDATE t SET v = 1",
            "EXPLAIN (ANALYZE off) DELETE FROM t",
            "DECLARE c CURSOR FOR SELECT * FROM t",
            "FETCH 1 FROM c",
            "MOVE c",
            "CLOSE c",
            "LISTEN a",
            "UNLISTEN *",
            "NOTIFY a, 'b'",
            "LOCK TABLE t",
            "SET search_path = a, b",
            "SET LOCAL work_mem = '1MB'",
            "RESET ALL",
            "SET ROLE bob",
            "SET SESSION AUTHORIZATION bob",
            "RESET SESSION AUTHORIZATION",
            "SELECT brin_summarize_new_values('i')",
            "DISCARD ALL",
            "DISCARD PLANS",
            "COPY t TO STDOUT",
            "COPY (SELECT * FROM t) TO STDOUT",
            "CHECKPOINT",
            "SET standard_conforming_strings = on",
            "SET session_replication_role = origin",
            "SET client_encoding = 'UTF8'",
            "SET NAMES 'latin1'",
            "CREATE TEMP TABLE x (a int)",
            "CREATE TABLE pg_temp.x (a int)",
            "INSERT INTO scratch VALUES (1)",
            "UPDATE scratch SET v = random()",
            "DELETE FROM scratch",
            "TRUNCATE scratch",
            "DROP TABLE scratch",
            "CREATE INDEX ON scratch (v)",
            "ALTER TABLE scratch ADD COLUMN z serial",
            "CREATE VIEW x AS SELECT * FROM scratch",
            "CREATE TEMP TABLE x AS SELECT * FROM t",
            "VACUUM scratch",
            "SELECT set_config('search_path', '', false)",
            "(SELECT 1)",
            "SELECT 'now'::timestamptz",
        ],
    ),
    (
        "guard",
        &[
            "SELECT mine()",
            "SELECT * FROM t WHERE steady(v)",
            "SELECT missing()",
            "SELECT * FROM nowhere",
            "SELECT count(*) FROM secured",
            "SELECT * FROM far",
            "SELECT pg_stat_reset(), query_to_xml('x', true, true, '')",
            "UPDATE nowhere SET a = 1",
            "INSERT INTO nowhere VALUES (1)",
            "DELETE FROM nowhere",
            "TRUNCATE nowhere",
            "UPDATE t SET v = missing(v) WHERE id = 1",
            "INSERT INTO scratch SELECT mine()",
            "WITH x AS (SELECT mine()) SELECT * FROM x",
            "SELECT 1 FROM t ORDER BY (SELECT mine())",
            "SELECT (VALUES (mine()))",
            "SELECT CASE WHEN true THEN mine() END",
        ],
    ),
    (
        "control",
        &[
            "BEGIN",
            "START TRANSACTION ISOLATION LEVEL SERIALIZABLE",
            "COMMIT",
            "END",
            "ROLLBACK AND CHAIN",
            "SAVEPOINT a",
            "RELEASE a",
            "ROLLBACK TO a",
            "PREPARE TRANSACTION 'x'",
            "SET TRANSACTION READ ONLY",
            "SET CONSTRAINTS ALL DEFERRED",
            "SET SESSION CHARACTERISTICS AS TRANSACTION READ ONLY",
        ],
    ),
    ("finish", &["COMMIT PREPARED 'x'", "ROLLBACK PREPARED 'x'"]),
    ("admin", &["SHOW pool_nodes", "show POOL_NODES"]),
    (
        "maintenance",
        &[
            "VACUUM",
            "VACUUM (ANALYZE) t",
            "VACUUM FULL t",
            "ANALYZE t (v)",
            "REINDEX SCHEMA s",
            "REINDEX DATABASE x",
            "CLUSTER",
            "SELECT pg_reload_conf()",
        ],
    ),
    (
        "nodewise",
        &[
            "CREATE DATABASE x",
            "CREATE DATABASE x TABLESPACE fast",
            "DROP DATABASE x",
            "ALTER DATABASE x RENAME TO y",
            "CREATE INDEX CONCURRENTLY ON t (v)",
            "DROP INDEX CONCURRENTLY x",
            "REINDEX TABLE CONCURRENTLY t",
            "REINDEX (CONCURRENTLY) TABLE t",
            "ALTER SYSTEM SET work_mem = '1MB'",
        ],
    ),
    ("copy in", &["COPY scratch FROM STDIN"]),
    (
        "copy",
        &[
            "COPY t FROM STDIN",
            "COPY t (id, v) FROM STDIN WITH (FORMAT csv, FREEZE)",
            "COPY serials FROM STDIN",
            "COPY t FROM STDIN WHERE id > 1",
            "COPY serials (v) FROM STDIN",
            "COPY t FROM '/etc/passwd'",
        ],
    ),
    (
        "copied rows",
        &[
            "COPY t FROM PROGRAM 'true'",
            "COPY t FROM STDIN WHERE v > random()",
            "COPY t FROM STDIN WHERE at < now()",
            "COPY t FROM STDIN WHERE at < 'today'",
            "COPY serials (v) FROM STDIN (ENCODING 'LATIN1')",
            "COPY serials (v) FROM '/etc/passwd'",
        ],
    ),
    (
        "point",
        &[
            "INSERT INTO t VALUES (1, 2, 'x', NULL, 3.5)",
            "INSERT INTO t (id, v) VALUES (1, $1), (2, abs(-3)), (3, DEFAULT) RETURNING *",
            "INSERT INTO t DEFAULT VALUES",
            "INSERT INTO serials VALUES (1, 2)",
            "INSERT INTO parts (id) VALUES (1)",
            "INSERT INTO t (id, note) VALUES (1, 'now')",
            "INSERT INTO old (id) VALUES (1)",
            "INSERT INTO t (id, note) VALUES (1, lower('A') || fixed(2))",
            "UPDATE t SET v = v + 1 WHERE id = 1",
            "UPDATE t SET v = $1 WHERE id = $2 AND v > 5",
            "UPDATE t SET at = now(), note = current_user WHERE 5 = t.id",
            "UPDATE ONLY old SET v = 1 WHERE id = 1",
            "UPDATE t SET (v, note) = (1, 'x') WHERE id = '5'::int4",
            "UPDATE two SET v = 1 WHERE a = 1 AND (b = 2 AND v = 3)",
            "DELETE FROM t WHERE id = 1 RETURNING v",
            "DELETE FROM triggered WHERE id = 1",
            "UPDATE t AS x SET v = x.v + 1 WHERE x.id = 3",
            "UPDATE t SET at = $1 WHERE id = 1",
            "UPDATE t SET v = CASE WHEN v > 1 THEN fixed(v) ELSE 0 END WHERE id = 1",
            "UPDATE t SET note = DEFAULT WHERE id = 1",
            "UPDATE t SET note = to_char(at, 'YYYY') WHERE id = 1",
            "UPDATE t SET at = date_trunc('day', at)::timestamptz WHERE id = 1",
            "DELETE FROM parts WHERE id = 1",
            "UPDATE parent SET v = 1 WHERE id = 1",
        ],
    ),
    (
        "barrier",
        &[
            "TRUNCATE secured",
            "DELETE FROM parent WHERE id = 1",
            "TRUNCATE t, keyless",
            "TRUNCATE t RESTART IDENTITY CASCADE",
        ],
    ),
    (
        "rows",
        &[
            "INSERT INTO serials (v) VALUES (1)",
            "INSERT INTO serials VALUES (DEFAULT, 1)",
            "INSERT INTO t (id, at) VALUES (1, now())",
            "INSERT INTO t (id, at) VALUES (1, 'now')",
            "INSERT INTO t (id, at) VALUES (1, $1)",
            "INSERT INTO t (id, v) VALUES (1, random())",
            "INSERT INTO t SELECT * FROM t ORDER BY random() LIMIT 5",
            "INSERT INTO t (id) VALUES ((SELECT max FROM seen))",
            "INSERT INTO t (id) SELECT v FROM scratch",
            "INSERT INTO t (id, v) VALUES (1, 'x'::regclass::int4)",
            "WITH x AS (SELECT 1) INSERT INTO t (id) SELECT * FROM x",
            "INSERT INTO t (id, note) VALUES (1, current_setting('x'))",
            "INSERT INTO t (id, note) VALUES (1, CURRENT_USER)",
            "INSERT INTO keyless (v) TABLE keyless",
            "INSERT INTO t (id) OVERRIDING USER VALUE VALUES (1)",
            "INSERT INTO t (id, v) VALUES (1, age(now()))",
            "INSERT INTO t (id, at) VALUES (1, 'x'::text::timestamptz)",
            "INSERT INTO t (id) VALUES (1), ((SELECT 2))",
            "INSERT INTO t (id, v) VALUES (1, nextval('s'))",
            "UPDATE t SET v = 1",
            "UPDATE t SET v = 1 WHERE id > 5",
            "UPDATE t SET v = 1 WHERE id = 1 OR id = 2",
            "UPDATE t SET v = 1 WHERE id IN (1, 2)",
            "UPDATE two SET v = 1 WHERE a = 1",
            "UPDATE t SET v = (SELECT count(*) FROM keyless) WHERE id = 1",
            "DELETE FROM t USING keyless k WHERE t.v = k.v",
            "UPDATE t SET v = two.v FROM two WHERE two.a = t.v AND two.b = 1",
            "UPDATE t SET v = 1 WHERE id = v",
            "UPDATE t SET v = 1 WHERE id = 5::float8",
            "UPDATE t SET v = sum FROM parts p WHERE p.id = t.v",
            "WITH x AS (SELECT v FROM keyless) DELETE FROM t WHERE v IN (SELECT v FROM x)",
            "INSERT INTO t (id, v) VALUES (1, 2) ON CONFLICT (id) DO UPDATE SET v = excluded.v + t.v",
            "INSERT INTO t (id) VALUES (1) ON CONFLICT DO NOTHING",
            "INSERT INTO t (id, at) VALUES (1, now()) ON CONFLICT (id) DO UPDATE SET at = now()",
            "UPDATE t SET at = now() WHERE v = 1",
            "UPDATE t SET v = 1 WHERE NOT (id = 1)",
            "UPDATE t SET v = 1 WHERE (id = 1) IS NOT FALSE",
            "UPDATE t SET v = (SELECT sum(v) FROM keyless)",
            "UPDATE t SET v = random() WHERE id = 1",
            "UPDATE t SET at = clock_timestamp() WHERE id = 1",
            "UPDATE t SET note = current_setting('app.user') WHERE id = 1",
            "UPDATE t SET v = 1 WHERE ctid = '(0,1)'",
            "UPDATE t SET v = 1 WHERE CURRENT OF c",
            "DELETE FROM t WHERE id IN (SELECT id FROM t LIMIT 1)",
            "DELETE FROM t WHERE id = (SELECT v FROM keyless FOR UPDATE SKIP LOCKED)",
            "UPDATE t SET v = k.v FROM keyless k WHERE k.v = t.v",
            "UPDATE t SET note = (SELECT array_agg(v) FROM keyless)",
            "UPDATE t SET d = (SELECT sum(d) FROM t x)",
            "UPDATE t SET v = (SELECT row_number() OVER () FROM keyless)",
            "UPDATE t SET at = note::timestamptz WHERE id = 1",
            "UPDATE t SET v = 1 WHERE date(note) = '2020-01-01'",
            "UPDATE serials SET v = DEFAULT WHERE v = 1",
            "UPDATE ONLY old SET v = 1 WHERE v = 1",
            "DELETE FROM t WHERE v IN (SELECT v FROM scratch)",
            "DELETE FROM t WHERE v IN (SELECT v FROM seen)",
            "DELETE FROM t WHERE v IN (SELECT DISTINCT ON (v) v FROM keyless)",
            "UPDATE t SET v = x.v FROM (VALUES (1, 2)) x(id, v) WHERE t.id = x.id",
            "UPDATE t SET at = x.a FROM json_to_recordset($1) AS x(a timestamptz)",
            "DELETE FROM t USING keyless TABLESAMPLE bernoulli (10)",
            "INSERT INTO serials (v) VALUES (1) ON CONFLICT (id) DO NOTHING",
            "INSERT INTO t (id, v) VALUES (1, 2) ON CONFLICT (id) DO UPDATE SET v = random()",
            "INSERT INTO t (id, v) VALUES (1, 2) ON CONFLICT (id) DO UPDATE SET v = (SELECT 1)",
            "INSERT INTO t (id) SELECT 1 ON CONFLICT DO NOTHING",
            "INSERT INTO keyless (v) SELECT 1 ON CONFLICT DO NOTHING",
        ],
    ),
    (
        "ordered",
        &[
            "UPDATE keyless SET v = k.v FROM keyless k WHERE k.v = keyless.v",
            "UPDATE keyless SET v = keyless.v + 1 FROM keyless k WHERE k.v = $1",
            "MERGE INTO t USING keyless k ON t.v = k.v WHEN MATCHED THEN UPDATE SET at = now() WHEN NOT MATCHED THEN INSERT (id, v) VALUES (k.v, 1)",
            "UPDATE t SET id = 2 WHERE id = 1",
            "DELETE FROM keyless",
            "UPDATE old SET v = 1 WHERE id = 1",
            "UPDATE keyless SET v = two.v FROM two WHERE two.a = keyless.v AND two.b = 1",
            "UPDATE keyless SET v = 1 WHERE w IN (SELECT w FROM keyless)",
            "UPDATE hidden SET v = 1 WHERE v > 1",
            "UPDATE twice SET code = 'b' WHERE v > 1",
            "INSERT INTO t (id, v) VALUES (1, 2) ON CONFLICT (id) DO UPDATE SET id = excluded.v + t.v",
            "INSERT INTO hidden (id) VALUES (1) ON CONFLICT DO NOTHING",
            "INSERT INTO keyless (v) VALUES (1) ON CONFLICT (v) DO UPDATE SET w = 'x'",
        ],
    ),
    (
        "ddl",
        &[
            "CREATE TABLE x (a serial, b timestamptz DEFAULT now())",
            "CREATE TABLE x PARTITION OF parts FOR VALUES IN (1)",
            "ALTER TABLE t ADD COLUMN x int DEFAULT 5",
            "ALTER TABLE t ADD COLUMN x text DEFAULT lower('A')",
            "ALTER TABLE t DROP COLUMN v",
            "ALTER TABLE t ADD PRIMARY KEY (v)",
            "ALTER TABLE t ALTER v TYPE numeric USING abs(v)",
            "DROP TABLE IF EXISTS nowhere",
            "CREATE INDEX ON t (v)",
            "DROP INDEX x",
            "CREATE VIEW x AS SELECT * FROM t",
            "CREATE SEQUENCE s",
            "ALTER SEQUENCE s RESTART",
            "CREATE SCHEMA s",
            "CREATE TYPE e AS ENUM ('now')",
            "CREATE DOMAIN d AS int",
            "CREATE FUNCTION f() RETURNS int LANGUAGE sql AS 'SELECT 1'",
            "CREATE PROCEDURE p() LANGUAGE sql AS ''",
            "CREATE AGGREGATE a (int) (SFUNC = int4pl, STYPE = int)",
            "CREATE TRIGGER x BEFORE INSERT ON t EXECUTE FUNCTION mine()",
            "CREATE RULE r AS ON INSERT TO t DO NOTHING",
            "CREATE POLICY p ON t",
            "CREATE EXTENSION hstore",
            "CREATE ROLE r",
            "CREATE ROLE r PASSWORD 'SCRAM-SHA-256$4096:x$y:z'",
            "ALTER ROLE r PASSWORD NULL",
            "CREATE ROLE r PASSWORD 'secret'",
            "ALTER ROLE r VALID UNTIL '2040-01-01' PASSWORD 'secret'",
            "CREATE USER u ENCRYPTED PASSWORD $$secret$$",
            "ALTER DATABASE x OWNER TO bob",
            "ALTER DATABASE x CONNECTION LIMIT 5",
            "ALTER DATABASE x SET work_mem = '1MB'",
            "DROP OWNED BY bob",
            "DROP ROLE r",
            "GRANT SELECT ON t TO bob",
            "REVOKE ALL ON t FROM bob",
            "COMMENT ON TABLE t IS 'now'",
            "ALTER TABLE t RENAME TO u",
            "ALTER TABLE t OWNER TO bob",
            "ALTER TABLE t SET SCHEMA s",
            "REINDEX TABLE t",
            "CLUSTER t USING i",
            "ALTER ROLE bob SET work_mem = '1MB'",
            "ALTER TABLE t ALTER v SET DEFAULT random()",
            "CREATE TABLE x (state text CHECK (state IN ('now', 'later')))",
            "ALTER DEFAULT PRIVILEGES GRANT SELECT ON TABLES TO bob",
            "REASSIGN OWNED BY a TO b",
            "CREATE FOREIGN TABLE x (a int) SERVER s",
            "CREATE PUBLICATION p FOR TABLE t",
            "DROP PUBLICATION p",
            "CREATE SERVER s FOREIGN DATA WRAPPER f",
            "DROP SERVER s",
            "CREATE USER MAPPING FOR bob SERVER s",
            "ALTER TABLE t ADD COLUMN IF NOT EXISTS v float8 DEFAULT random()",
        ],
    ),
    (
        "once",
        &[
            "COPY counted (v) FROM STDIN",
            "COPY triggered FROM STDIN",
            "INSERT INTO counted (v) VALUES (1)",
            "INSERT INTO counted VALUES (DEFAULT, 1)",
            "INSERT INTO counted SELECT 1",
            "UPDATE counted SET v = DEFAULT",
            "MERGE INTO triggered t USING keyless k ON t.id = k.v WHEN NOT MATCHED THEN INSERT VALUES (1)",
            "DO 'BEGIN END'",
            "CALL p()",
            "INSERT INTO triggered VALUES (1)",
            "UPDATE triggered SET v = 1 WHERE id = 1",
            "INSERT INTO ruled VALUES (1)",
            "DELETE FROM secured WHERE id = 1",
            "INSERT INTO seen VALUES (1)",
            "WITH x AS (DELETE FROM t RETURNING *) SELECT * FROM x",
            "WITH x AS (DELETE FROM t RETURNING *) INSERT INTO keyless SELECT v FROM x",
            "INSERT INTO t (id) VALUES (mine())",
            "INSERT INTO t (id) VALUES (1) RETURNING mine()",
            "INSERT INTO hidden (id, at) VALUES (1, now())",
            "UPDATE t SET v = steady(v) WHERE id = 1",
        ],
    ),
    (
        "carried",
        &[
            "CREATE TABLE x AS EXECUTE p",
            "SELECT * INTO x FROM t",
            "CREATE TABLE x AS SELECT 1",
            "CREATE MATERIALIZED VIEW x AS SELECT 1",
            "ALTER TABLE t ADD COLUMN x serial",
            "ALTER TABLE t ADD COLUMN x int GENERATED ALWAYS AS IDENTITY",
            "ALTER TABLE t ADD COLUMN x timestamptz DEFAULT now()",
            "ALTER TABLE t ADD COLUMN x float8 DEFAULT random()",
            "ALTER TABLE t ALTER v TYPE int4 USING random()",
            "ALTER TABLE t ALTER note TYPE timestamptz",
            "CREATE TABLE x AS SELECT random()",
            "CREATE TABLE IF NOT EXISTS x AS TABLE t WITH NO DATA",
            "SELECT id INTO TEMP x FROM t",
            "ALTER TABLE t ADD COLUMN x int DEFAULT 5, ADD COLUMN y float8 DEFAULT random()",
        ],
    ),
    (
        "refused",
        &[
            "PREPARE TRANSACTION 'pgtandem:shop:1:2:3'",
            "COMMIT PREPARED 'pgtandem:shop:1:2:3'",
            "CREATE TABLESPACE x LOCATION '/x'",
            "ALTER DATABASE x SET TABLESPACE fast",
            "ALTER DATABASE x ALLOW_CONNECTIONS false",
            "ALTER ROLE bob SET work_mem FROM CURRENT",
            "CREATE FUNCTION f() RETURNS int LANGUAGE sql SET search_path FROM CURRENT AS 'SELECT 1'",
            "GRANT SELECT ON t TO SESSION_USER",
            "CREATE SCHEMA AUTHORIZATION SESSION_USER",
            "CREATE ROLE r VALID UNTIL 'tomorrow'",
            "INSERT INTO quick VALUES (1)",
            "UPDATE far SET v = 1",
            "COPY (DELETE FROM t RETURNING *) TO STDOUT",
            "EXPLAIN ANALYZE UPDATE t SET v = 1",
            "EXPLAIN (ANALYZE) DELETE FROM t",
            "LOAD 'x'",
            "SET standard_conforming_strings = off",
            "SET session_replication_role = replica",
            "SET client_encoding = 'SJIS'",
            "SELECT * FROM pgtandem.mark",
            "SELECT pgtandem.mark(1, 2)",
            "DROP SCHEMA pgtandem",
            "UPDATE pgtandem.mark SET n = 1",
            "SELECT 1::pgtandem.x",
            "SELECT 1 OPERATOR(pgtandem.+) 2",
            "ALTER ROLE pgtandem NOLOGIN",
            "LOCK TABLE pgtandem.mark",
            "GRANT USAGE ON SCHEMA pgtandem TO bob",
            "SELECT lo_create(1)",
            "DECLARE c CURSOR FOR SELECT mine()",
            "SELECT set_config('standard_conforming_strings', 'off', false)",
            "UPDATE keyless SET v = random()",
            "DELETE FROM keyless WHERE v IN (SELECT v FROM keyless LIMIT 1)",
            "DELETE FROM keyless WHERE v IN (SELECT v FROM scratch)",
            "UPDATE keyless SET v = k.v FROM keyless k WHERE k.v = $1",
            "UPDATE t SET id = id + 1",
            "UPDATE t SET id = v WHERE v > 1",
            "UPDATE t SET id = random() WHERE id = 1",
            "UPDATE old SET v = random()",
            "UPDATE hidden SET v = random()",
            "UPDATE keyless SET w = (SELECT sum(v::float8) FROM keyless)",
            "UPDATE serials SET id = DEFAULT WHERE id = 1",
            "ALTER TABLE t ADD COLUMN x timestamptz DEFAULT 'now'",
            "CREATE TABLE x (a timestamptz DEFAULT 'now')",
            "CREATE VIEW x AS SELECT * FROM t WHERE at < 'today'",
            "DROP TABLE t, scratch",
            "CREATE TABLE x (LIKE scratch)",
            "TRUNCATE t, scratch",
            "CREATE EVENT TRIGGER e ON ddl_command_end EXECUTE FUNCTION mine()",
            "CREATE SUBSCRIPTION s CONNECTION '' PUBLICATION p",
            "ALTER DATABASE x SET session_replication_role = replica",
            "ALTER ROLE x SET standard_conforming_strings = off",
            "CREATE TABLE x (a int) TABLESPACE y",
            "ALTER TABLE parts DETACH PARTITION x CONCURRENTLY",
            "CREATE TEMP TABLE x AS SELECT mine()",
            "CREATE TABLE x AS SELECT mine()",
            "CREATE UNLOGGED TABLE x AS SELECT 1",
            "CREATE TABLE x TABLESPACE y AS SELECT 1",
            "ALTER TABLE t SET UNLOGGED",
            "ALTER TABLE t ADD COLUMN x int DEFAULT mine()",
            "ALTER EVENT TRIGGER e DISABLE",
            "IMPORT FOREIGN SCHEMA a FROM SERVER s INTO b",
        ],
    ),
];

#[test]
fn every_statement_takes_its_lane() {
    let mut wrong = Vec::new();
    for (lane, texts) in LANES {
        for text in *texts {
            let found = lane_of(text);
            if found != *lane {
                wrong.push(format!("{text}\n    is {found}, not {lane}: {:?}", planned(text).lane));
            }
        }
    }
    assert!(wrong.is_empty(), "{} wrong:\n{}", wrong.len(), wrong.join("\n"));
}

#[test]
fn refusals_say_why_and_what_to_do() {
    for (lane, texts) in LANES {
        for text in texts.iter().filter(|_| *lane == "refused") {
            let Lane::Refused(refusal) = planned(text).lane else { panic!("{text}") };
            assert!(refusal.message.len() > 20 && !refusal.message.contains("  "), "{text}: {}", refusal.message);
        }
    }
}

#[test]
fn settings_and_prepared_statements_are_noted() {
    for text in [
        "SET a.b = 'c'",
        "RESET ALL",
        "SET ROLE bob",
        "DISCARD ALL",
        "SELECT set_config('a', 'b', false)",
        "SELECT mine()",
    ] {
        assert!(planned(text).changes_settings, "{text}");
    }
    for text in ["SELECT 1", "BEGIN", "UPDATE t SET v = 1 WHERE id = 1", "DISCARD PLANS"] {
        assert!(!planned(text).changes_settings, "{text}");
    }
    assert!(planned("DISCARD ALL").drops_prepared);
    assert!(planned("DEALLOCATE ALL").drops_prepared);
    assert!(!planned("DEALLOCATE p").drops_prepared);
    assert_eq!(planned("BEGIN").lane, Lane::Control(Control::Begin { with_modes: false }));
    assert_eq!(planned("BEGIN READ ONLY").lane, Lane::Control(Control::Begin { with_modes: true }));
    assert_eq!(planned("COMMIT AND CHAIN").lane, Lane::Control(Control::Commit { chain: true }));
    assert_eq!(planned("ROLLBACK TO \"A\"").lane, Lane::Control(Control::RollbackTo { name: "A".to_owned() }));
}

#[test]
fn hidden_columns_come_last_and_comments_stay() {
    let text = "INSERT INTO serials (v) VALUES (1) -- ; RETURNING\n ; -- end";
    let leader = written(text).leader_text(text, &mask(text));
    assert_eq!(
        leader.as_deref(),
        Some("INSERT INTO serials (v) VALUES (1) RETURNING \"id\", \"v\" -- ; RETURNING\n ; -- end")
    );
    let text = "INSERT INTO serials (v) SELECT v AS returning FROM t RETURNING *, 'x' /* c */";
    let leader = written(text).leader_text(text, &mask(text));
    assert_eq!(
        leader.as_deref(),
        Some("INSERT INTO serials (v) SELECT v AS returning FROM t RETURNING *, 'x', \"id\", \"v\" /* c */")
    );
}

#[test]
fn followers_get_the_leaders_values_for_other_literals_of_the_shape() {
    let first = "UPDATE t SET note = 'a', at = CURRENT_TIMESTAMP (0), d = 1 WHERE id = 1 AND at < pg_catalog.now ( ) RETURNING now()";
    let write = written(first);
    assert_eq!(write.hidden_returning.len(), 2);
    let text = "UPDATE t SET note = 'it''s longer', at = CURRENT_TIMESTAMP (3), d = 22 WHERE id = 333 AND at < pg_catalog.now ( ) RETURNING now()";
    let shape = mask(text);
    assert_eq!(shape.key, mask(first).key);
    let values = [Some("2026-11-23T08:00:00.123456Z".to_owned()), Some("o'clock".to_owned())];
    assert_eq!(
        write.follower_text(text, &shape, &values, None),
        "UPDATE t SET note = 'it''s longer', at = ('2026-11-23T08:00:00.123456Z'::pg_catalog.timestamptz (3)), d = 22 WHERE id = 333 \
         AND at < ('o''clock'::pg_catalog.timestamptz) "
    );
    let leader = write.leader_text(text, &shape).expect("values to return");
    assert!(leader.starts_with(&format!("{text}, pg_catalog.to_char(")), "{leader}");
    let counted = write.follower_text(text, &shape, &values, Some(1));
    assert!(
        counted.starts_with("WITH pgtandem_u AS (UPDATE t ") && counted.contains(") = 1)") | counted.contains(" 1)::"),
        "{counted}"
    );
}

#[test]
fn literals_that_are_the_clock_are_found_where_they_matter() {
    let shape_of = |text: &str| (mask(text), written(text));
    let clock = |plan_of: &str, text: &str, parameters: &[Option<&str>]| {
        let (shape, write) = (mask(text), shape_of(plan_of).1);
        assert_eq!(mask(plan_of).key, shape.key);
        write.reads_clock(text, &shape, parameters)
    };
    let plan_of = "UPDATE t SET at = 'x', note = 'y' WHERE id = 1";
    assert!(clock(plan_of, "UPDATE t SET at = 'now', note = 'y' WHERE id = 1", &[]));
    assert!(!clock(plan_of, "UPDATE t SET at = '2020-01-01', note = 'now' WHERE id = 1", &[]));
    assert!(clock("DELETE FROM old WHERE at < 'x'", "DELETE FROM old WHERE at < 'Yesterday'", &[]));
    assert!(clock(
        "UPDATE t SET v = v WHERE id = 1 AND 'x'::date > '2020-01-01'",
        "UPDATE t SET v = v WHERE id = 1 AND 'today'::date > '2020-01-01'",
        &[]
    ));
    let bound = "UPDATE t SET at = $1, note = $2 WHERE id = $3";
    assert!(clock(bound, bound, &[Some("now"), Some("x"), Some("1")]));
    assert!(!clock(bound, bound, &[Some("2020-01-01"), Some("now"), Some("1")]));
    assert!(!clock(bound, bound, &[None, None, None]));
    assert!(clock(
        "UPDATE old SET note = 'now' WHERE now() > 'x'",
        "UPDATE old SET note = 'now' WHERE now() > 'today'",
        &[]
    ));
    let matters = |text: &str| matches!(written(text).effect, EffectPlan::Text { dates_matter: true, .. });
    assert!(matters(bound) && !matters("UPDATE t SET note = 'now' WHERE id = 1"));
}

#[test]
fn freeze_is_dropped_for_followers() {
    for (text, expected) in [
        ("copy t from stdin with (freeze on)", "copy t from stdin with (freeze off)"),
        (
            "COPY t FROM STDIN WITH (FORMAT csv, FREEZE, HEADER)",
            "COPY t FROM STDIN WITH (FORMAT csv, FREEZE off, HEADER)",
        ),
        ("COPY t FROM STDIN (FREEZE 'true')", "COPY t FROM STDIN (FREEZE off)"),
        ("COPY t FROM STDIN FREEZE", "COPY t FROM STDIN "),
        ("COPY t FROM STDIN FREEZE CSV", "COPY t FROM STDIN  CSV"),
        ("COPY t FROM STDIN (FREEZE off)", "COPY t FROM STDIN (FREEZE off)"),
        ("COPY t (id, v) FROM '/a' (FREEZE)", "COPY t (id, v) FROM STDIN (FREEZE off)"),
        ("COPY t FROM E'/äb/\\x41'  CSV", "COPY t FROM STDIN        CSV"),
    ] {
        let EffectPlan::Copy { text: CopyText::Instead(found), .. } = written(text).effect else { panic!("{text}") };
        assert_eq!(found, expected);
        assert!(parse_one(&found).is_ok(), "{found}");
    }
}

#[test]
fn copy_data_are_looked_at_where_they_are_dates() {
    let dates = |text: &str| match written(text).effect {
        EffectPlan::Copy { dates, .. } => dates,
        other => panic!("{text}: {other:?}"),
    };
    assert_eq!(dates("COPY keyless FROM STDIN"), None);
    assert_eq!(dates("COPY t (id, v) FROM STDIN"), None);
    assert_eq!(dates("COPY t FROM STDIN (FORMAT binary)"), None);
    assert_eq!(dates("COPY t FROM STDIN").map(|dates| (dates.fields, dates.delimiter)), Some((vec![3], b'\t')));
    let csv = dates("COPY t (at, id) FROM STDIN WITH (FORMAT csv, DELIMITER ';', QUOTE '|')").expect("a date");
    assert_eq!((csv.fields, csv.csv, csv.delimiter, csv.quote, csv.escape), (vec![0], true, b';', b'|', b'|'));
    assert!(dates("COPY t FROM STDIN CSV").is_some_and(|dates| dates.csv && dates.delimiter == b','));
}

#[test]
fn what_can_not_be_parsed_goes_to_the_leader_behind_the_guard() {
    // On a stack as the threads have that serve clients: a deep text must not end the proxy.
    let deep = std::thread::Builder::new().stack_size(crate::proxy::threads::STACK_BYTES).spawn(deep_texts);
    deep.expect("a thread").join().expect("no panic");
}

fn deep_texts() {
    let of = |text: &str| unparsable(&parse_one(text).expect_err(text), text).lane;
    assert_eq!(of("SELEC 1"), read(true));
    let deep = format!("SELECT {}1{}", "abs(".repeat(300), ")".repeat(300));
    assert_eq!(of(&deep), read(true));
    let deep = format!("/* c */ UPDATE t SET v = {}1{} WHERE id = 1", "abs(".repeat(300), ")".repeat(300));
    assert!(matches!(of(&deep), Lane::Refused(_)));
}

#[test]
fn nothing_that_is_called_is_overlooked() {
    // places where the parser's own walk does not look
    for text in [
        "INSERT INTO t VALUES (mine())",
        "SELECT 1 GROUP BY mine()",
        "SELECT count(*) FILTER (WHERE mine()) FROM t",
        "SELECT sum(v) OVER (ORDER BY mine()) FROM t",
        "SELECT * FROM t LIMIT mine()",
        "SELECT ARRAY[mine()]",
        "SELECT (ARRAY[1])[mine()]",
        "SELECT ROW(mine())",
        "SELECT * FROM mine()",
        "SELECT * FROM t, LATERAL mine(v)",
        "SELECT * FROM ROWS FROM (mine(), now())",
        "SELECT coalesce(1, mine())",
        "SELECT nullif(mine(), 1)",
        "SELECT 1 WHERE mine() BETWEEN 1 AND 2",
        "SELECT 1 FROM t WHERE EXISTS (SELECT mine())",
        "SELECT xmlelement(name a, mine())",
        "SELECT json_object('a': mine())",
        "SELECT * FROM t JOIN keyless k ON mine()",
        "SELECT 1 UNION SELECT mine()",
        "SELECT count(*) FROM t HAVING mine()",
        "SELECT DISTINCT ON (mine()) 1",
        "SELECT lower(VARIADIC mine())",
        "SELECT count(mine() ORDER BY mine()) FROM t",
        "SELECT * FROM t TABLESAMPLE bernoulli (mine())",
        "SELECT mine() COLLATE \"C\"",
        "SELECT mine() IS NULL",
        "SELECT mine()::text",
        "SELECT NOT mine()",
        "WITH RECURSIVE x AS (SELECT 1 UNION ALL SELECT mine() FROM x) SELECT * FROM x",
    ] {
        let statement = parse_one(text).expect(text);
        let found: Look =
            Context { text, shape: &mask(text), facts: &facts(), tree: Value::Null }.look(&statement.node);
        assert_eq!(found.effect, Some(Effect::Unknown), "{text}");
    }
}

#[test]
fn left_out_columns_are_added_to_a_copy() {
    let text = "COPY serials (v) FROM STDIN WITH (FORMAT csv, FREEZE)";
    let EffectPlan::Copy { text: CopyText::Instead(follower), fill: Some(fill), .. } = written(text).effect else {
        panic!("{text}")
    };
    assert_eq!(follower, "COPY serials (v, \"id\") FROM STDIN WITH (FORMAT csv, FREEZE off)");
    assert_eq!(fill.leader, "COPY serials (v, \"id\") FROM STDIN WITH (FORMAT csv, FREEZE)");
    assert!(fill.values.starts_with("SELECT (nextval('s'))::integer FROM "), "{}", fill.values);
    assert_eq!((fill.filled, fill.given), (1, 1));
}
