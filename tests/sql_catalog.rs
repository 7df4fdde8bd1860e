//! What the catalog query reads on a real server is enough to give statements their lanes.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use pgtandem::sql::catalog;
use pgtandem::sql::classify::classify;
use pgtandem::sql::facts::Facts;
use pgtandem::sql::needs::Needs;
use pgtandem::sql::parse::parse_one;
use pgtandem::sql::plan::{CopyText, EffectPlan, Lane, Plan, Write};
use pgtandem::sql::rows::Many;
use pgtandem::sql::shape::mask;
use tokio_postgres::{Client, NoTls};

/// A PostgreSQL server in a temporary folder; ends with the value.
struct Server {
    process: Child,
    folder: tempfile::TempDir,
}

fn program(name: &str) -> PathBuf {
    let folder =
        std::env::var_os("PGTANDEM_BIN_DIR").map_or_else(|| PathBuf::from("/usr/lib/postgresql/15/bin"), PathBuf::from);
    folder.join(name)
}

/// A command as the user postgres if the test runs as root, which PostgreSQL refuses.
fn as_postgres(path: &Path) -> Command {
    if rustix::process::getuid().is_root() {
        let mut command = Command::new("runuser");
        command.args(["-u", "postgres", "--"]).arg(path);
        command
    } else {
        Command::new(path)
    }
}

impl Server {
    fn start() -> Self {
        let folder = tempfile::Builder::new().prefix("pgtandem-sql").tempdir().expect("temporary folder");
        if rustix::process::getuid().is_root() {
            let done = Command::new("chown").arg("postgres").arg(folder.path()).status().expect("chown");
            assert!(done.success());
        }
        let data = folder.path().join("data");
        let made = as_postgres(&program("initdb"))
            .args(["--no-sync", "--auth=trust", "--encoding=UTF8", "--locale=C", "-U", "postgres", "-D"])
            .arg(&data)
            .current_dir(folder.path())
            .stdout(Stdio::null())
            .status()
            .expect("initdb");
        assert!(made.success());
        let process = as_postgres(&program("postgres"))
            .arg("-D")
            .arg(&data)
            .args(["-c", "listen_addresses=", "-c", "fsync=off", "-c", "logging_collector=off", "-k"])
            .arg(folder.path())
            .current_dir(folder.path())
            .stdout(Stdio::null())
            .stderr(fs::File::create(folder.path().join("log")).expect("log"))
            .spawn()
            .expect("postgres");
        Self { process, folder }
    }

    async fn connect(&self) -> Client {
        let deadline = Instant::now() + Duration::from_secs(60);
        let configuration = format!("host={} user=postgres dbname=postgres", self.folder.path().display());
        loop {
            match tokio_postgres::connect(&configuration, NoTls).await {
                Ok((client, connection)) => {
                    tokio::spawn(connection);
                    return client;
                }
                Err(error) if Instant::now() > deadline => panic!("the server does not start: {error}"),
                Err(_) => tokio::time::sleep(Duration::from_millis(20)).await,
            }
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // runuser does not pass signals on reliably, so the server itself is asked by its pid
        let pid = fs::read_to_string(self.folder.path().join("data/postmaster.pid")).ok();
        if let Some(pid) = pid.as_deref().and_then(|text| text.lines().next()) {
            let _ = Command::new("kill").args(["-INT", pid]).status();
        } else {
            let _ = self.process.kill();
        }
        let _ = self.process.wait();
    }
}

async fn facts(client: &Client, text: &str) -> Facts {
    let statement = parse_one(text).unwrap_or_else(|error| panic!("{text}: {error}"));
    let query = catalog::query(&Needs::of(&statement));
    let row = client.query_one(&query, &[]).await.unwrap_or_else(|error| panic!("{text}: {error:?}\n{query}"));
    let json: String = row.get(0);
    Facts::parse(&json).unwrap_or_else(|error| panic!("{text}: {error}\n{json}"))
}

async fn plan(client: &Client, text: &str) -> Plan {
    let statement = parse_one(text).expect("parsed before");
    let facts = facts(client, text).await;
    classify(&statement, text, &mask(text), &facts)
}

async fn write(client: &Client, text: &str) -> Write {
    match plan(client, text).await.lane {
        Lane::Write(write) => *write,
        other => panic!("{text}: {other:?}"),
    }
}

fn is_point(write: &Write) -> bool {
    matches!(&write.effect, EffectPlan::Text { lock_tables, .. } if lock_tables.is_empty())
        && !write.barrier
        && !write.ddl
}

#[tokio::test]
async fn pgbench_takes_the_fast_lanes() {
    let server = Server::start();
    let client = server.connect().await;
    let drop =
        write(&client, "drop table if exists pgbench_accounts, pgbench_branches, pgbench_history, pgbench_tellers")
            .await;
    assert!(drop.ddl);
    let tables = [
        "create table pgbench_history(tid int,bid int,aid    int,delta int,mtime timestamp,filler char(22))",
        "create table pgbench_tellers(tid int not null,bid int,tbalance int,filler char(84)) with (fillfactor=100)",
        "create table pgbench_accounts(aid    int not null,bid int,abalance int,filler char(84)) with (fillfactor=100)",
        "create table pgbench_branches(bid int not null,bbalance int,filler char(88)) with (fillfactor=100)",
    ];
    for text in tables {
        assert!(write(&client, text).await.ddl, "{text}");
        client.batch_execute(text).await.expect(text);
    }
    let truncate =
        write(&client, "truncate table pgbench_accounts, pgbench_branches, pgbench_history, pgbench_tellers").await;
    assert!(truncate.barrier && !truncate.ddl);
    assert!(is_point(&write(&client, "insert into pgbench_branches(bid,bbalance) values(1,0)").await));
    let copy = write(&client, "copy pgbench_accounts from stdin with (freeze on)").await;
    let EffectPlan::Copy { text: CopyText::Instead(text), .. } = &copy.effect else { panic!("{copy:?}") };
    assert_eq!(text, "copy pgbench_accounts from stdin with (freeze off)");
    assert_eq!(plan(&client, "vacuum analyze pgbench_branches").await.lane, Lane::Maintenance { exclusive: false });
    for (table, key) in [("branches", "bid"), ("tellers", "tid"), ("accounts", "aid")] {
        let text = format!("alter table pgbench_{table} add primary key ({key})");
        assert!(write(&client, &text).await.ddl);
        client.batch_execute(&text).await.expect("primary key");
    }
    let update = "UPDATE pgbench_accounts SET abalance = abalance + -1234 WHERE aid = 5;";
    let point = write(&client, update).await;
    assert!(is_point(&point), "{point:?}");
    assert_eq!(point.leader_text(update, &mask(update)), None);
    assert!(is_point(&write(&client, "UPDATE pgbench_tellers SET tbalance = tbalance + $1 WHERE tid = $2").await));
    assert!(is_point(&write(&client, "UPDATE pgbench_branches SET bbalance = bbalance + 5 WHERE bid = 1").await));
    let read = plan(&client, "SELECT abalance FROM pgbench_accounts WHERE aid = 5;").await;
    assert_eq!(read.lane, Lane::Read { guard: false, copy_in: false });
    assert!(!read.changes_settings);
    let insert = "INSERT INTO pgbench_history (tid, bid, aid, delta, mtime) VALUES (1, 2, 3, 4, CURRENT_TIMESTAMP);";
    let pinned = write(&client, insert).await;
    let EffectPlan::Rows { texts, .. } = &pinned.effect else { panic!("{pinned:?}") };
    assert!(texts.one.starts_with("INSERT INTO \"public\".\"pgbench_history\" (\"tid\", "));
    let leader = pinned.leader_text(insert, &mask(insert)).expect("hidden RETURNING");
    assert!(leader.ends_with(" RETURNING \"tid\", \"bid\", \"aid\", \"delta\", \"mtime\", \"filler\";"), "{leader}");
    client.batch_execute(&leader).await.expect(&leader);
}

#[tokio::test]
async fn the_catalog_says_what_a_text_can_not() {
    let server = Server::start();
    let client = server.connect().await;
    client
        .batch_execute(
            r#"
            CREATE SCHEMA "Odd ""name""";
            CREATE TABLE "Odd ""name"""."T'1" (a int PRIMARY KEY);
            CREATE TABLE plain (id int PRIMARY KEY, v int DEFAULT 7, note text, at timestamptz, d float8);
            CREATE TABLE serials (id serial PRIMARY KEY, v int);
            CREATE TABLE identities (id int GENERATED ALWAYS AS IDENTITY PRIMARY KEY, v int, twice int GENERATED ALWAYS AS (v * 2) STORED);
            CREATE TABLE stamped (id int PRIMARY KEY, at timestamptz DEFAULT now(), by text DEFAULT current_user);
            CREATE TABLE keyless (v int);
            CREATE TABLE excluded (id int PRIMARY KEY, v int);
            CREATE FUNCTION noisy() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NEW; END';
            CREATE TABLE triggered (id int PRIMARY KEY, v int);
            CREATE TRIGGER t BEFORE UPDATE ON triggered FOR EACH ROW EXECUTE FUNCTION noisy();
            CREATE TABLE parts (id int, region int, v int, PRIMARY KEY (id, region)) PARTITION BY LIST (region);
            CREATE TABLE parts_1 PARTITION OF parts FOR VALUES IN (1);
            CREATE TABLE parent (id int PRIMARY KEY);
            CREATE TABLE child (id int PRIMARY KEY, parent int REFERENCES parent ON DELETE CASCADE DEFERRABLE);
            CREATE FUNCTION writes() RETURNS int LANGUAGE sql AS 'INSERT INTO plain VALUES (999) RETURNING id';
            CREATE FUNCTION doubles(int) RETURNS int LANGUAGE sql IMMUTABLE AS 'SELECT $1 * 2';
            CREATE FUNCTION audit(plain) RETURNS int LANGUAGE sql AS 'SELECT 1';
            CREATE VIEW quiet AS SELECT id, lower(note) AS note FROM plain;
            CREATE VIEW loud AS SELECT writes() FROM plain;
            CREATE VIEW over AS SELECT * FROM loud;
            CREATE DOMAIN checked AS int CHECK (VALUE > 0);
            CREATE TABLE secured (id int PRIMARY KEY);
            ALTER TABLE secured ENABLE ROW LEVEL SECURITY;
            CREATE TABLE owned (id int PRIMARY KEY);
            ALTER TABLE owned ENABLE ROW LEVEL SECURITY;
            ALTER TABLE secured FORCE ROW LEVEL SECURITY;
            CREATE TABLE clocked (id int PRIMARY KEY, at timestamptz CHECK (at <= now()));
            CREATE TEMP TABLE scratch (id int);
            "#,
        )
        .await
        .expect("schema");
    for text in [
        "UPDATE plain SET v = doubles(v) WHERE id = 1",
        "INSERT INTO plain (id, note) VALUES (1, 'x')",
        "UPDATE parts SET v = 1 WHERE id = 1 AND region = 1",
        "DELETE FROM child WHERE id = 1",
        "INSERT INTO triggered VALUES (1, 2)",
        "UPDATE stamped SET at = now(), by = current_user WHERE id = $1",
        r#"INSERT INTO "Odd ""name"""."T'1" VALUES (1)"#,
    ] {
        let write = write(&client, text).await;
        assert!(is_point(&write), "{text}: {write:?}");
    }
    for text in [
        "INSERT INTO serials (v) VALUES (1)",
        "INSERT INTO identities (v) VALUES (1)",
        "INSERT INTO stamped (id) VALUES (1)",
        "INSERT INTO plain (id) SELECT 1",
        "INSERT INTO plain (id, v) VALUES (1, (random() * 5)::int)",
        "INSERT INTO plain (id, at) VALUES (1, $1)",
    ] {
        let write = write(&client, text).await;
        assert!(matches!(write.effect, EffectPlan::Rows { .. }), "{text}: {write:?}");
    }
    let identity = write(&client, "INSERT INTO identities (v) VALUES (1)").await;
    assert_eq!(identity.hidden_returning, ["\"id\"", "\"v\""]);
    for text in [
        "DELETE FROM plain WHERE v > 3",
        "UPDATE plain SET v = (SELECT count(*) FROM keyless)",
        "UPDATE plain AS p SET at = clock_timestamp(), d = random() FROM keyless k WHERE k.v = p.v RETURNING p.*",
        "UPDATE parts SET v = 1 WHERE region = 1",
        "DELETE FROM serials USING scratch WHERE scratch.id = serials.id",
        "INSERT INTO plain (id, v) VALUES (1, 2) ON CONFLICT (id) DO UPDATE SET v = excluded.v",
        "INSERT INTO identities (v) VALUES (1), (2) ON CONFLICT (id) DO UPDATE SET v = excluded.v",
        "INSERT INTO excluded AS e (id, v) VALUES (1, 2) ON CONFLICT (id) DO UPDATE SET v = excluded.v + e.v",
    ] {
        let write = write(&client, text).await;
        let EffectPlan::Rows { texts, .. } = &write.effect else { panic!("{text}: {write:?}") };
        let leader = write.leader_text(text, &mask(text)).expect("a hidden RETURNING");
        let many = match &texts.many {
            Many::Arrays { text, .. } | Many::Copy(text) => text,
            Many::OneByOne => panic!("{text}: {texts:?}"),
        };
        // The servers take all of it.
        for made in [leader.as_str(), &texts.one, many] {
            client.prepare(made).await.unwrap_or_else(|error| panic!("{made}: {error:?}"));
        }
    }
    for text in ["UPDATE keyless SET v = 1"] {
        let write = write(&client, text).await;
        assert!(
            matches!(&write.effect, EffectPlan::Text { lock_tables, .. } if !lock_tables.is_empty()),
            "{text}: {write:?}"
        );
    }
    assert!(write(&client, "DELETE FROM parent WHERE id = 1").await.barrier);
    assert!(write(&client, "INSERT INTO child VALUES (1, 1)").await.deferrable_constraints);
    for (text, guard) in [
        ("SELECT writes()", true),
        ("SELECT doubles(2)", false),
        ("SELECT * FROM quiet", false),
        ("SELECT * FROM over", true),
        ("SELECT p.audit FROM plain p", true),
        ("SELECT p.note FROM plain p", false),
        ("SELECT * FROM secured", true),
        // It does not apply to whoever owns the table.
        ("SELECT * FROM owned", false),
        ("SELECT nextval('serials_id_seq')", false),
        ("SELECT now(), pg_sleep(0), random()", false),
        ("SELECT * FROM pg_stat_activity", false),
        ("SELECT * FROM nowhere", true),
        ("INSERT INTO scratch VALUES (1)", false),
        ("INSERT INTO scratch SELECT writes()", true),
        ("DROP TABLE scratch", false),
    ] {
        assert_eq!(plan(&client, text).await.lane, Lane::Read { guard, copy_in: false }, "{text}");
    }
    assert_eq!(plan(&client, "COPY scratch FROM STDIN").await.lane, Lane::Read { guard: false, copy_in: true });
    for text in [
        "UPDATE triggered SET v = 1 WHERE id = 1",
        "INSERT INTO clocked VALUES (1, now())",
        "INSERT INTO secured VALUES (1)",
        "INSERT INTO quiet VALUES (1)",
        "INSERT INTO plain (id) SELECT writes()",
        "INSERT INTO plain SELECT id FROM loud",
    ] {
        let lane = plan(&client, text).await.lane;
        assert!(matches!(lane, Lane::Once(_)), "{text}: {lane:?}");
    }
    for text in [
        "UPDATE pg_class SET relname = 'x'",
        "CREATE FUNCTION first() RETURNS scratch LANGUAGE sql AS 'SELECT * FROM scratch'",
        "CREATE FUNCTION all_of() RETURNS SETOF scratch LANGUAGE sql AS 'SELECT * FROM scratch'",
        "CREATE DOMAIN over_scratch AS scratch",
    ] {
        let lane = plan(&client, text).await.lane;
        assert!(matches!(lane, Lane::Refused(_)), "{text}: {lane:?}");
    }
}

#[tokio::test]
async fn a_hostile_search_path_does_not_lead_the_query_astray() {
    let server = Server::start();
    let client = server.connect().await;
    client
        .batch_execute(
            "CREATE TABLE t (id int PRIMARY KEY);
             CREATE SCHEMA evil;
             CREATE FUNCTION evil.trap(name, name) RETURNS bool LANGUAGE plpgsql AS 'BEGIN RAISE EXCEPTION ''trapped''; END';
             CREATE OPERATOR evil.= (LEFTARG = name, RIGHTARG = name, FUNCTION = evil.trap);
             CREATE FUNCTION evil.current_schemas(bool) RETURNS name[] LANGUAGE plpgsql AS 'BEGIN RAISE EXCEPTION ''trapped''; END';
             CREATE FUNCTION evil.json_build_object(VARIADIC \"any\") RETURNS json LANGUAGE internal AS 'json_build_object';
             CREATE TYPE evil.text AS (a int);
             CREATE TYPE evil.oid AS (a int);
             SET search_path = evil, public, pg_catalog",
        )
        .await
        .expect("traps");
    let facts = facts(&client, "UPDATE t SET id = id").await;
    assert_eq!(facts.relation("", "t").map(|table| table.key.clone()), Some(vec!["id".to_owned()]));
    assert_eq!(facts.settings.get("search_path").map(String::as_str), Some("evil, public, pg_catalog"));
}

#[tokio::test]
async fn the_texts_for_followers_do_what_the_leaders_did() {
    let server = Server::start();
    let client = server.connect().await;
    client
        .batch_execute("CREATE TABLE t (id int PRIMARY KEY, v int, at timestamptz, day date, by text); INSERT INTO t VALUES (1, 1), (2, 2); CREATE TABLE k AS SELECT id FROM t")
        .await
        .expect("table");
    let shape_of = "UPDATE t SET at = CURRENT_TIMESTAMP(3), day = current_date, by = current_user, v = 5 WHERE id = 1 RETURNING id, now() -- end";
    let planned = write(&client, shape_of).await;
    assert!(is_point(&planned));
    // the plan of one text serves another of the same shape
    let text = "UPDATE t SET at = CURRENT_TIMESTAMP(6), day = current_date, by = current_user, v = 12345 WHERE id = 2 RETURNING id, now() -- end";
    let shape = mask(text);
    assert_eq!(shape.key, mask(shape_of).key);
    let leader = planned.leader_text(text, &shape).expect("values to return");
    let row = client.query_one(&leader, &[]).await.expect(&leader);
    assert_eq!(row.get::<_, i32>(0), 2);
    let values: Vec<Option<String>> = (0..planned.hidden_returning.len()).map(|at| row.get(2 + at)).collect();
    let state = "SELECT string_agg(t::text, ';' ORDER BY id) FROM t";
    let after: String = client.query_one(state, &[]).await.expect("state").get(0);
    client.batch_execute("UPDATE t SET at = NULL, day = NULL, by = NULL, v = 2 WHERE id = 2").await.expect("as before");
    let follower = planned.follower_text(text, &shape, &values, Some(1));
    client.batch_execute("SET TimeZone = 'Asia/Tokyo'; SET DateStyle = 'SQL, DMY'").await.expect("settings");
    client.batch_execute(&follower).await.expect(&follower);
    client.batch_execute("RESET TimeZone; RESET DateStyle").await.expect("settings");
    let again: String = client.query_one(state, &[]).await.expect("state").get(0);
    assert_eq!(after, again, "{follower}");
    // a count that differs makes the text fail
    let wrong = planned.follower_text(text, &shape, &values, Some(2));
    let error = client.batch_execute(&wrong).await.expect_err("the count differs");
    assert_eq!(error.code().map(tokio_postgres::error::SqlState::code), Some("22012"));
    // WITH stays where it may be
    let text = "WITH x AS (SELECT id FROM t WHERE v > 100) DELETE FROM k USING x WHERE k.id = x.id";
    let planned = write(&client, text).await;
    let follower = planned.follower_text(text, &mask(text), &[], Some(1));
    client.batch_execute(&follower).await.expect(&follower);
}

#[tokio::test]
async fn time_zones_are_found_inside_types() {
    let server = Server::start();
    let client = server.connect().await;
    client
        .batch_execute(
            "CREATE TYPE spans AS RANGE (subtype = timestamptz, multirange_type_name = many_spans);
             CREATE DOMAIN moment AS timestamptz;
             CREATE TYPE pair AS (a int, b moment);
             CREATE TYPE plain_pair AS (a int, b tsrange);
             CREATE TABLE zoned (z1 timestamptz, z2 tstzrange, z3 timestamptz[], z4 tstzmultirange, z5 spans, z6 many_spans, z7 pair,
                 z8 moment[], d1 date, d2 tsrange, d3 timestamp[], d4 datemultirange, d5 plain_pair, d6 timetz, n1 int4multirange, n2 text)",
        )
        .await
        .expect("types");
    let facts = facts(&client, "SELECT * FROM zoned").await;
    let relation = facts.relations.values().next().expect("the table");
    for column in &relation.columns {
        assert_eq!(column.zones, column.name.starts_with('z'), "{}", column.name);
        assert_eq!(column.dates, !column.name.starts_with('n'), "{}", column.name);
    }
}
