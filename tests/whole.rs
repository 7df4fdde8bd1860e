//! A node that was filled is whole, and not only we say so: `pg_verifybackup` finds the source's bytes on its disk, every
//! table is what it was at X, every index agrees with its table (`pg_amcheck`), every page has its checksum. After a plain
//! fill, after one that was cut again and again, under load, with tablespaces.
//!
//! On PostgreSQL 15; `make versions` runs it on 16, 17 and 18, too, with those programs of 15 that these have not got.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test that panics has failed")]

mod sync_engine_support;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use pgtandem::sync::target::Target;
use sync_engine_support::{BIN_DIR, Cluster, Cut, LocalSource, run_as_postgres};
use tokio_postgres::Client;

const LAG_BYTES_MAX: u64 = 1 << 20;

/// Folders with the programs of other versions, one each, as `make versions` fetches them.
fn versions() -> Vec<PathBuf> {
    let mut found = vec![PathBuf::from(BIN_DIR)];
    match std::env::var_os("PGTANDEM_VERSIONS_DIR") {
        Some(folder) => {
            let folders = std::fs::read_dir(&folder).unwrap().map(|item| item.unwrap().path().join("bin"));
            found.extend(folders.filter(|folder| folder.join("postgres").exists()));
            assert!(found.len() > 1, "no version in {}", Path::new(&folder).display());
        }
        None => eprintln!("only {BIN_DIR} is tested; make versions tests others"),
    }
    found
}

/// A server with checksums, large WAL segments, and something of everything in it.
async fn start(bin_dir: &Path) -> Cluster {
    eprintln!("with {}", bin_dir.display());
    let cluster = Cluster::start_with(bin_dir, &["-k", "--wal-segsize=64"]).await;
    cluster.pgbench_init(1).await;
    let a = cluster.a.connect("postgres").await.unwrap();
    a.batch_execute(
        "CREATE EXTENSION amcheck;
         CREATE TABLE texts AS SELECT n AS id, repeat(md5(n::text), 3) AS t FROM generate_series(1, 8000) n;
         CREATE INDEX ON texts (t); CREATE INDEX ON texts USING gist (point(id, id)); CREATE INDEX ON texts USING hash (t);
         CREATE TABLE large AS SELECT n AS id, string_agg(md5((n * m)::text), '') AS t
         FROM generate_series(1, 200) n, generate_series(1, 400) m GROUP BY n;
         CREATE TABLE empty (id int PRIMARY KEY);
         CREATE UNLOGGED TABLE fleeting AS SELECT generate_series(1, 1000) n;
         CREATE MATERIALIZED VIEW seen AS SELECT count(*) FROM texts;
         SELECT lo_from_bytea(0, repeat('large object ', 10000)::bytea)",
    )
    .await
    .unwrap();
    cluster
}

/// Catches up, is cut, leaves recovery, and is compared with A at X.
async fn finish(cluster: &Cluster, target: &mut Target, source: &Arc<LocalSource>) {
    target.catch_up(source.clone(), LAG_BYTES_MAX).await.unwrap();
    target.hold().unwrap();
    let Cut { x, snapshot } = cluster.cut().await;
    target.leave_recovery(x).await.unwrap();
    let b = cluster.b.connect("postgres").await.unwrap();
    let (expected, found) = (tables(&snapshot).await, tables(&b).await);
    assert!(expected.len() > 8, "{expected:?}");
    assert_eq!(expected, found, "every table is what it was at X");
    check_indexes(cluster).await;
    drop(b);
    // What is read after a start comes from the disk, and the server checks each page.
    cluster.b.stop(false).await.unwrap();
    checksums(cluster).await;
    cluster.b.start().await.unwrap();
    let b = cluster.b.connect("postgres").await.unwrap();
    assert_eq!(expected, tables(&b).await);
    let fleeting: i64 = b.query_one("SELECT count(*) FROM fleeting", &[]).await.unwrap().get(0);
    assert_eq!(fleeting, 0, "unlogged tables arrive empty");
}

/// Every table with its number of rows and a sum over them, unlogged ones left out.
async fn tables(client: &Client) -> Vec<(String, i64, String)> {
    let names = "SELECT oid::regclass::text FROM pg_class WHERE relkind IN ('r', 'm') AND relpersistence = 'p'
                 AND (relnamespace = 'public'::regnamespace OR relname = 'pg_largeobject') ORDER BY 1";
    let mut found = Vec::new();
    for row in client.query(names, &[]).await.unwrap() {
        let name: String = row.get(0);
        let sql = format!("SELECT count(*), coalesce(sum(hashtextextended(t::text, 0)), 0)::text FROM {name} t");
        let row = client.query_one(&sql, &[]).await.unwrap();
        found.push((name, row.get(0), row.get(1)));
    }
    found
}

/// A program of this version, or of the other one, which can do it, too.
fn program(bin_dir: &Path, name: &str) -> PathBuf {
    let own = bin_dir.join(name);
    if own.exists() { own } else { Path::new(BIN_DIR).join(name) }
}

async fn run(program: &Path, arguments: &[&str], folder: &Path) -> (bool, String) {
    let output = tokio::process::Command::new(program).args(arguments).arg(folder).output().await.unwrap();
    let said = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    (output.status.success(), said)
}

/// What `pg_verifybackup` says about the filled node, before its first start.
async fn verified(cluster: &Cluster) -> (bool, String) {
    let node = cluster.b.node();
    let program = program(&node.bin_dir, "pg_verifybackup");
    if program.starts_with(&node.bin_dir) {
        return run(&program, &[], &node.pgdata).await;
    }
    eprintln!("{} has no pg_verifybackup: that of {BIN_DIR}, without the WAL", node.bin_dir.display());
    // It knows the first version of the format only, which is the second one without the name of the cluster.
    let text = std::fs::read_to_string(node.pgdata.join("backup_manifest")).unwrap();
    let (body, _) = text.rsplit_once("\"Manifest-Checksum\"").unwrap();
    let mut lines: Vec<&str> = body.lines().collect();
    if lines[1].starts_with("\"System-Identifier\"") {
        lines[0] = "{ \"PostgreSQL-Backup-Manifest-Version\": 1,";
        lines.remove(1);
    }
    let body = lines.join("\n") + "\n";
    let sum = ring::digest::digest(&ring::digest::SHA256, body.as_bytes());
    let sum = sum.as_ref().iter().fold(String::new(), |text, byte| format!("{text}{byte:02x}"));
    let copy = node.state_dir.join("manifest");
    std::fs::write(&copy, format!("{body}\"Manifest-Checksum\": \"{sum}\"}}\n")).unwrap();
    run(&program, &["-n", "-m", copy.to_str().unwrap()], &node.pgdata).await
}

/// Fills B; a program that knows nothing of us finds on its disk what was read from A's.
async fn fill(cluster: &Cluster, target: &mut Target, source: &Arc<LocalSource>) {
    target.fill(source.clone()).await.unwrap();
    let (good, said) = verified(cluster).await;
    assert!(good && said.contains("backup successfully verified"), "{said}");
}

async fn check_indexes(cluster: &Cluster) {
    let node = cluster.b.node();
    let port = node.port.to_string();
    let arguments = ["-v", "--heapallindexed", "-U", "pgtandem", "-d", "postgres", "-p", &port, "-h"];
    let (good, said) = run(&program(&node.bin_dir, "pg_amcheck"), &arguments, &node.socket_dir).await;
    let checked = |what: &str| said.lines().filter(|line| line.contains(what)).count();
    assert!(good && checked("checking btree index") > 100 && checked("checking heap table") > 60, "{said}");
}

/// `pg_checksums`, where that version has it.
async fn checksums(cluster: &Cluster) {
    let node = cluster.b.node();
    let program = node.bin_dir.join("pg_checksums");
    if !program.exists() {
        eprintln!("there is no {}", program.display());
        return;
    }
    let output =
        tokio::process::Command::new(program).arg("--check").arg("-D").arg(&node.pgdata).output().await.unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success() && text.contains("Bad checksums:  0"), "{text}");
}

#[test]
fn a_node_is_whole_after_a_plain_fill() {
    run_as_postgres("a_node_is_whole_after_a_plain_fill", async {
        for bin_dir in versions() {
            let cluster = start(&bin_dir).await;
            let source = cluster.source();
            let mut target = Target::new(cluster.b.clone());
            fill(&cluster, &mut target, &source).await;
            finish(&cluster, &mut target, &source).await;
            cluster.stop().await;
        }
    });
}

#[test]
fn what_the_disk_changes_after_a_fill_is_seen_by_others() {
    run_as_postgres("what_the_disk_changes_after_a_fill_is_seen_by_others", async {
        let cluster = start(Path::new(BIN_DIR)).await;
        let source = cluster.source();
        let mut target = Target::new(cluster.b.clone());
        let a = cluster.a.connect("postgres").await.unwrap();
        let relation: String = a.query_one("SELECT pg_relation_filepath('texts')", &[]).await.unwrap().get(0);
        fill(&cluster, &mut target, &source).await;
        // The second time it is not sent any more: what is compared is what the source read, all the same.
        fill(&cluster, &mut target, &source).await;
        let path = cluster.b.node().pgdata.join(&relation);
        let mut content = std::fs::read(&path).unwrap();
        content[5000] ^= 1;
        std::fs::write(&path, &content).unwrap();
        let (good, said) = verified(&cluster).await;
        assert!(!good && said.contains("checksum mismatch") && said.contains(&relation), "{said}");
        // The same in our own words, and the next fill mends it.
        let failure = target.verify().await.unwrap_err().failure();
        assert!(failure.what.starts_with("pg_verifybackup says of the files that were just brought: "), "{failure:?}");
        assert!(failure.what.contains("checksum mismatch") && failure.what.contains(&relation), "{failure:?}");
        fill(&cluster, &mut target, &source).await;
        target.verify().await.unwrap();
        assert!(target.progress().borrow().bytes_verified > 20 << 20);
        let wal = cluster.b.node().pgdata.join("pg_wal");
        let segment = std::fs::read_dir(&wal).unwrap().map(|item| item.unwrap().path()).find(|path| path.is_file());
        std::fs::remove_file(segment.unwrap()).unwrap();
        let failure = target.verify().await.unwrap_err().failure();
        assert!(failure.what.starts_with("pg_waldump says"), "{failure:?}");
        fill(&cluster, &mut target, &source).await;
        finish(&cluster, &mut target, &source).await;
        cluster.stop().await;
    });
}

#[test]
fn a_node_is_whole_after_ten_cuts_and_never_starts_before() {
    run_as_postgres("a_node_is_whole_after_ten_cuts_and_never_starts_before", async {
        for bin_dir in versions() {
            let cluster = start(&bin_dir).await;
            let source = cluster.source();
            let mut target = Target::new(cluster.b.clone());
            for cut in 0..10 {
                source.break_files_after(3 + cut * 2);
                target.fill(source.clone()).await.unwrap_err();
                assert!(!cluster.b.node().pgdata.join("global/pg_control").exists(), "cut {cut}");
                assert!(cluster.b.start().await.is_err(), "cut {cut}");
            }
            source.repair();
            fill(&cluster, &mut target, &source).await;
            let progress = *target.progress().borrow();
            assert!(progress.bytes_same > 0, "what had come was not sent again: {progress:?}");
            finish(&cluster, &mut target, &source).await;
            cluster.stop().await;
        }
    });
}

#[test]
fn a_node_is_whole_after_a_fill_under_load_and_again() {
    run_as_postgres("a_node_is_whole_after_a_fill_under_load_and_again", async {
        for bin_dir in versions() {
            let cluster = start(&bin_dir).await;
            let mut load = cluster.pgbench_load();
            let source = cluster.source();
            let mut target = Target::new(cluster.b.clone());
            for _ in 0..2 {
                fill(&cluster, &mut target, &source).await;
                finish(&cluster, &mut target, &source).await;
            }
            load.stop().await;
            cluster.stop().await;
        }
    });
}

#[test]
fn a_node_is_whole_with_tablespaces() {
    run_as_postgres("a_node_is_whole_with_tablespaces", async {
        for bin_dir in versions() {
            let cluster = start(&bin_dir).await;
            cluster.create_tablespaces().await;
            let a = cluster.a.connect("postgres").await.unwrap();
            a.batch_execute(
                "CREATE TABLE elsewhere TABLESPACE t0 AS SELECT n AS id, repeat('e', 100) AS t FROM generate_series(1, 30000) n;
                 CREATE INDEX elsewhere_id ON elsewhere (id) TABLESPACE t1;
                 CREATE UNLOGGED TABLE fleeting_there TABLESPACE t1 AS SELECT 1 AS n",
            )
            .await
            .unwrap();
            let source = cluster.source();
            let mut target = Target::new(cluster.b.clone());
            fill(&cluster, &mut target, &source).await;
            finish(&cluster, &mut target, &source).await;
            let sent = target.progress().borrow().bytes_sent;

            // Both go on; the second fill finds most of it there, and removes what only B has.
            a.batch_execute("UPDATE elsewhere SET t = 'changed' WHERE id % 1000 = 0").await.unwrap();
            let b = cluster.b.connect("postgres").await.unwrap();
            b.batch_execute("CREATE TABLE only_here TABLESPACE t1 AS SELECT generate_series(1, 50000)").await.unwrap();
            drop(b);
            fill(&cluster, &mut target, &source).await;
            finish(&cluster, &mut target, &source).await;
            let again = target.progress().borrow().bytes_sent;
            assert!(again < sent / 2, "{again} bytes after {sent}");
            let (on_a, on_b) = (places(&cluster.a).await, places(&cluster.b).await);
            assert_eq!(on_a.len(), 2);
            assert!(on_a.iter().all(|place| !on_b.contains(place)), "{on_a:?} {on_b:?}");
            cluster.stop().await;
        }
    });
}

async fn places(postgres: &pgtandem::agent::postgres::Postgres) -> Vec<String> {
    let client = postgres.connect("postgres").await.unwrap();
    let sql = "SELECT pg_tablespace_location(oid) FROM pg_tablespace WHERE spcname LIKE 't_'";
    client.query(sql, &[]).await.unwrap().iter().map(|row| row.get(0)).collect()
}
