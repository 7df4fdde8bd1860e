//! A node is filled from another one while that one works, follows it, and leaves recovery at exactly X.
//!
//! Real PostgreSQL servers, everything else in this process: the two agents' parts talk over memory.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test that panics has failed")]

mod sync_engine_support;

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use pgtandem::sync::SyncError;
use pgtandem::sync::target::Target;
use pgtandem_proto::message::{Lsn, NodeFacts};
use sync_engine_support::{Cluster, LocalSource, run_as_postgres, wait_for};

/// A standby may be this far behind before it is held, bytes.
const LAG_BYTES_MAX: u64 = 1 << 20;

#[test]
fn a_node_is_filled_under_load_and_has_exactly_the_state_at_x() {
    run_as_postgres("a_node_is_filled_under_load_and_has_exactly_the_state_at_x", async {
        let cluster = Cluster::start().await;
        cluster.pgbench_init(1).await;
        // Nobody writes to most of a database.
        let a = cluster.a.connect("postgres").await.unwrap();
        a.batch_execute("CREATE TABLE still AS SELECT n, repeat('x', 500) FROM generate_series(1, 60000) n")
            .await
            .unwrap();
        a.batch_execute("VACUUM FREEZE still").await.unwrap();
        let mut load = cluster.pgbench_load();
        let source = cluster.source();
        let mut target = Target::new(cluster.b.clone());

        let first = join(&cluster, &mut target, &source).await;
        assert_eq!(first.at_x, first.on_b, "B has what A had at X, and nothing else");
        assert_ne!(first.at_x, cluster.fingerprint(&cluster.a).await, "A went on meanwhile");
        let sent_first = target.progress().borrow().bytes_sent;
        assert!(sent_first > 0);

        // B is a server of its own now. It is lost, and filled again: most of it is there already.
        let b = cluster.b.connect("postgres").await.unwrap();
        b.batch_execute("CREATE TABLE only_on_b AS SELECT generate_series(1, 1000) AS n").await.unwrap();
        drop(b);
        let second = join(&cluster, &mut target, &source).await;
        assert_eq!(second.at_x, second.on_b);
        let progress = *target.progress().borrow();
        assert!(progress.bytes_same > progress.bytes_total / 2, "{progress:?}");
        eprintln!("sent {sent_first} bytes, then {progress:?}");
        assert!(progress.bytes_sent < sent_first, "{progress:?} after {sent_first}");
        assert_eq!(progress.bytes_compared, progress.bytes_total);
        let b = cluster.b.connect("postgres").await.unwrap();
        assert!(b.query("SELECT 1 FROM only_on_b", &[]).await.is_err(), "B's own writes are gone");

        // A restart of B finds a server of its own, not a standby.
        cluster.b.stop(false).await.unwrap();
        cluster.b.start().await.unwrap();
        let b = cluster.b.connect("postgres").await.unwrap();
        let recovering: bool = b.query_one("SELECT pg_is_in_recovery()", &[]).await.unwrap().get(0);
        assert!(!recovering);
        load.stop().await;
        cluster.stop().await;
    });
}

struct Joined {
    at_x: String,
    on_b: String,
}

/// Fill, catch up, cut, leave recovery; A's state at X against B's.
async fn join(cluster: &Cluster, target: &mut Target, source: &Arc<LocalSource>) -> Joined {
    target.fill(source.clone()).await.unwrap();
    target.catch_up(source.clone(), LAG_BYTES_MAX).await.unwrap();
    let held = target.hold().unwrap();
    let cut = cluster.cut().await;
    assert!(cut.x > held);
    target.leave_recovery(cut.x).await.unwrap();
    let b = cluster.b.connect("postgres").await.unwrap();
    let on_b = cluster.fingerprint_of(&b).await;
    b.batch_execute("CREATE TABLE b_accepts_writes (n int); DROP TABLE b_accepts_writes").await.unwrap();
    let at_x = cluster.fingerprint_of(&cut.snapshot).await;
    Joined { at_x, on_b }
}

#[test]
fn x_at_a_page_boundary_is_reached() {
    run_as_postgres("x_at_a_page_boundary_is_reached", async {
        let cluster = Cluster::start().await;
        let source = cluster.source();
        let mut target = Target::new(cluster.b.clone());
        target.fill(source.clone()).await.unwrap();
        target.catch_up(source.clone(), LAG_BYTES_MAX).await.unwrap();
        target.hold().unwrap();
        let a = cluster.a.connect("postgres").await.unwrap();
        a.batch_execute("CREATE TABLE before_x (n int)").await.unwrap();
        let x = cluster.record_that_ends_a_page(&a).await;
        a.batch_execute("CREATE TABLE after_x (n int)").await.unwrap();
        target.leave_recovery(x).await.unwrap();
        let b = cluster.b.connect("postgres").await.unwrap();
        b.batch_execute("INSERT INTO before_x VALUES (1)").await.unwrap();
        assert!(b.query("SELECT * FROM after_x", &[]).await.is_err());
        cluster.stop().await;
    });
}

#[test]
fn a_fill_that_broke_leaves_nothing_that_starts_and_the_next_one_sends_the_rest() {
    run_as_postgres("a_fill_that_broke_leaves_nothing_that_starts_and_the_next_one_sends_the_rest", async {
        let cluster = Cluster::start().await;
        cluster.pgbench_init(2).await;
        let source = cluster.source();
        let mut target = Target::new(cluster.b.clone());
        source.break_files_after(40);
        let error = target.fill(source.clone()).await.unwrap_err();
        assert!(matches!(error, SyncError::Closed { .. }), "{error}");
        assert!(!cluster.b.node().pgdata.join("global/pg_control").exists());
        assert!(cluster.b.start().await.is_err());
        let error = target.catch_up(source.clone(), LAG_BYTES_MAX).await.unwrap_err();
        assert!(!error.failure().hint.is_empty());

        source.repair();
        target.fill(source.clone()).await.unwrap();
        assert!(target.progress().borrow().bytes_same > 0);
        // The catch-up is interrupted, too; a whole directory that is a standby can go on from where it is.
        target.catch_up(source.clone(), LAG_BYTES_MAX).await.unwrap();
        target.abort().await.unwrap();
        assert_eq!(cluster.b.postmaster_pid().unwrap(), None);
        target.catch_up(source.clone(), LAG_BYTES_MAX).await.unwrap();
        target.hold().unwrap();
        let cut = cluster.cut().await;
        target.leave_recovery(cut.x).await.unwrap();
        assert_eq!(cluster.fingerprint_of(&cut.snapshot).await, cluster.fingerprint(&cluster.b).await);
        cluster.stop().await;
    });
}

#[test]
fn bytes_that_change_on_the_way_end_the_fill_and_nothing_starts() {
    run_as_postgres("bytes_that_change_on_the_way_end_the_fill_and_nothing_starts", async {
        let cluster = Cluster::start().await;
        cluster.pgbench_init(1).await;
        let source = cluster.source();
        let mut target = Target::new(cluster.b.clone());
        for message in [1, 2, 4, 8, 16] {
            // What an earlier attempt has brought would not come again, and the fill could be through before that message.
            let _ = std::fs::remove_dir_all(&cluster.b.node().pgdata);
            source.corrupt_files_at(message);
            let error = target.fill(source.clone()).await.unwrap_err();
            assert!(matches!(error, SyncError::Protocol(_)), "{message}: {error}");
            assert!(error.to_string().contains("another content"), "{message}: {error}");
            assert!(cluster.b.start().await.is_err(), "{message}");
        }
        target.fill(source.clone()).await.unwrap();
        target.catch_up(source.clone(), LAG_BYTES_MAX).await.unwrap();
        cluster.stop().await;
    });
}

#[test]
fn a_damaged_page_of_the_source_is_reported() {
    run_as_postgres("a_damaged_page_of_the_source_is_reported", async {
        let cluster = Cluster::start_with(Path::new(sync_engine_support::BIN_DIR), &["-k"]).await;
        let a = cluster.a.connect("postgres").await.unwrap();
        a.batch_execute("CREATE TABLE t AS SELECT generate_series(1, 20000) n; CHECKPOINT").await.unwrap();
        let path: String = a.query_one("SELECT pg_relation_filepath('t')", &[]).await.unwrap().get(0);
        let file = cluster.a.node().pgdata.join(path);
        let mut content = std::fs::read(&file).unwrap();
        content[3 * 8192 + 5000] ^= 1;
        std::fs::write(&file, content).unwrap();
        let mut target = Target::new(cluster.b.clone());
        target.fill(cluster.source()).await.unwrap();
        assert_eq!(target.progress().borrow().damaged_pages, 1);
        cluster.stop().await;
    });
}

#[test]
fn wal_channels_that_break_while_b_follows_are_taken_up_again() {
    run_as_postgres("wal_channels_that_break_while_b_follows_are_taken_up_again", async {
        let cluster = Cluster::start().await;
        cluster.pgbench_init(1).await;
        let source = cluster.source();
        let mut target = Target::new(cluster.b.clone());
        target.fill(source.clone()).await.unwrap();
        target.catch_up(source.clone(), LAG_BYTES_MAX).await.unwrap();
        let opened = source.wal_opened.load(Ordering::Relaxed);
        source.cut_wal();
        let a = cluster.a.connect("postgres").await.unwrap();
        a.batch_execute("UPDATE pgbench_accounts SET abalance = abalance + 1").await.unwrap();
        wait_for("another wal channel", || source.wal_opened.load(Ordering::Relaxed) > opened).await;
        target.hold().unwrap();
        let cut = cluster.cut().await;
        // Once more while the relay is held: a new connection is held by the same limit.
        source.cut_wal();
        target.leave_recovery(cut.x).await.unwrap();
        assert_eq!(cluster.fingerprint_of(&cut.snapshot).await, cluster.fingerprint(&cluster.b).await);
        cluster.stop().await;
    });
}

#[test]
fn a_relay_that_went_past_x_refuses() {
    run_as_postgres("a_relay_that_went_past_x_refuses", async {
        let cluster = Cluster::start().await;
        let source = cluster.source();
        let mut target = Target::new(cluster.b.clone());
        assert!(target.hold().is_err());
        target.fill(source.clone()).await.unwrap();
        target.catch_up(source.clone(), LAG_BYTES_MAX).await.unwrap();
        let held = target.hold().unwrap();
        let error = target.leave_recovery(Lsn(held.0 - 8192)).await.unwrap_err();
        assert!(error.to_string().contains("past"), "{error}");
        target.abort().await.unwrap();
        cluster.stop().await;
    });
}

#[test]
fn another_clusters_data_are_not_overwritten() {
    run_as_postgres("another_clusters_data_are_not_overwritten", async {
        let cluster = Cluster::start().await;
        cluster.init_b_as_another_cluster().await;
        let mut target = Target::new(cluster.b.clone());
        let error = target.fill(cluster.source()).await.unwrap_err();
        assert!(error.to_string().contains("another cluster"), "{error}");
        cluster.b.start().await.unwrap();

        let (from, to) = (facts(&cluster.a).await, facts(&cluster.b).await);
        let found = pgtandem::sync::facts::compare(&from, &to);
        assert!(found.iter().any(|finding| finding.refused && finding.what.contains("another cluster")), "{found:?}");
        cluster.stop().await;
    });
}

async fn facts(postgres: &pgtandem::agent::postgres::Postgres) -> NodeFacts {
    pgtandem::sync::facts::gather(postgres).await.unwrap()
}

#[test]
fn facts_tell_what_matters_before_a_fill() {
    run_as_postgres("facts_tell_what_matters_before_a_fill", async {
        let cluster = Cluster::start().await;
        let a = cluster.a.connect("postgres").await.unwrap();
        a.batch_execute("CREATE UNLOGGED TABLE fleeting (n int)").await.unwrap();
        let (from, to) = (facts(&cluster.a).await, facts(&cluster.b).await);
        assert_eq!(from.binaries_version_num / 10_000, 15);
        assert!(from.system_identifier.is_some() && to.system_identifier.is_none());
        assert!(from.data_bytes.is_some_and(|bytes| bytes > 1 << 20) && to.free_bytes > 0);
        assert!(from.extensions.contains(&"plpgsql".to_owned()) && to.extensions.contains(&"plpgsql".to_owned()));
        let found = pgtandem::sync::facts::compare(&from, &to);
        assert!(found.iter().all(|finding| !finding.refused), "{found:?}");
        assert!(found.iter().any(|finding| finding.what.contains("postgres.fleeting")), "{found:?}");
        cluster.stop().await;
    });
}
