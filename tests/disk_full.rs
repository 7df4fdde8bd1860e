//! The disk of a node that is filled is full: a sentence says where and how much is missing, nothing half filled can be started,
//! and with room the next fill sends only what is missing. Each part of the node is once the one on the small disk.
//!
//! The disk is a tmpfs, which only root can mount.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test that panics has failed")]

mod sync_engine_support;

use std::fs;
use std::io::Write;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use pgtandem::config::NodeConfig;
use pgtandem::sync::target::Target;
use pgtandem_proto::message::Failure;
use sync_engine_support::{BIN_DIR, Cluster, LocalSource, run_as_postgres_with};

const LAG_BYTES_MAX: u64 = 1 << 20;
/// Tells the test that runs as postgres where the disk is.
const DISK: &str = "PGTANDEM_TEST_DISK";
const DISK_BYTES: u64 = 400 << 20;

/// Runs `body` with a small disk of its own, which is gone afterwards, whatever happens.
fn with_disk(test: &str, body: impl AsyncFnOnce(Disk)) {
    if !rustix::process::getuid().is_root() && std::env::var_os(DISK).is_none() {
        eprintln!("{test}: only root can mount a small disk; not run");
        return;
    }
    let mounted = rustix::process::getuid().is_root().then(Mounted::new);
    let place = mounted.as_ref().map_or_else(PathBuf::new, |mounted| mounted.0.path().to_path_buf());
    run_as_postgres_with(test, &[(DISK, place.as_os_str())], async {
        body(Disk(std::env::var_os(DISK).unwrap().into())).await;
    });
}

struct Mounted(tempfile::TempDir);

impl Mounted {
    fn new() -> Mounted {
        let folder = tempfile::Builder::new().prefix("pgtd").tempdir_in("/tmp").unwrap();
        let size = format!("size={DISK_BYTES},mode=0777");
        let mounted = Command::new("mount").args(["-t", "tmpfs", "-o", &size, "tmpfs"]).arg(folder.path()).status();
        assert!(mounted.unwrap().success(), "a tmpfs can be mounted");
        Mounted(folder)
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        // What a server of a failed test still has open keeps it until that ends; the folder is empty at once.
        let _ = Command::new("umount").arg("--lazy").arg(self.0.path()).status();
    }
}

struct Disk(PathBuf);

impl Disk {
    fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    fn free(&self) -> u64 {
        let stat = rustix::fs::statvfs(&self.0).unwrap();
        stat.f_bavail * stat.f_frsize
    }

    /// Leaves so many bytes.
    fn leave(&self, bytes: u64) {
        self.make_room();
        let mut file = fs::File::create(self.path("filler")).unwrap();
        let piece = vec![1; 64 << 10];
        while self.free() > bytes {
            let length = usize::try_from(self.free() - bytes).unwrap().min(piece.len());
            file.write_all(&piece[..length]).unwrap();
        }
    }

    fn make_room(&self) {
        let _ = fs::remove_file(self.path("filler"));
    }
}

/// A server with some 60 MiB, and B with what `change` puts on the disk.
async fn start(change: impl FnOnce(&mut NodeConfig)) -> Cluster {
    let cluster = Cluster::start_changed(Path::new(BIN_DIR), &["-k"], change).await;
    cluster.pgbench_init(2).await;
    cluster
}

/// The sentence and the hint of a fill for which there was no room.
async fn refused(cluster: &Cluster, target: &mut Target, source: &Arc<LocalSource>) -> Failure {
    let error = target.fill(source.clone()).await.unwrap_err();
    assert_not_startable(cluster).await;
    let failure = error.failure();
    eprintln!("{}\n  {}", failure.what, failure.hint);
    failure
}

async fn assert_not_startable(cluster: &Cluster) {
    assert!(!cluster.b.node().pgdata.join("global/pg_control").exists());
    assert!(cluster.b.start().await.is_err());
}

/// `files`: of those some are missing on that disk.
fn assert_says(failure: &Failure, disk: &Disk, files: bool) {
    let top = disk.0.display().to_string();
    assert!(failure.what.contains("No space left on device"), "{failure:?}");
    assert!(failure.what.contains(&format!("the file system at {top} has ")), "{failure:?}");
    let says = if files { "still to come there need up to " } else { "no file that is still to come lies there" };
    assert!(failure.what.contains(says), "{failure:?}");
    assert!(failure.hint.contains(&top) && failure.hint.contains("pgtandem recover node-b"), "{failure:?}");
}

/// Fills with room enough, and goes on until B is a server of its own.
async fn recovered(cluster: &Cluster, target: &mut Target, source: &Arc<LocalSource>) {
    target.fill(source.clone()).await.unwrap();
    let verified = Command::new(Path::new(BIN_DIR).join("pg_verifybackup")).arg(&cluster.b.node().pgdata).output();
    let verified = verified.unwrap();
    assert!(verified.status.success(), "{}", String::from_utf8_lossy(&verified.stderr));
    target.catch_up(source.clone(), LAG_BYTES_MAX).await.unwrap();
    target.hold().unwrap();
    let cut = cluster.cut().await;
    target.leave_recovery(cut.x).await.unwrap();
    assert_eq!(cluster.fingerprint_of(&cut.snapshot).await, cluster.fingerprint(&cluster.b).await);
}

#[test]
fn files_that_find_no_room_are_told_and_only_the_rest_is_sent_later() {
    with_disk("files_that_find_no_room_are_told_and_only_the_rest_is_sent_later", async |disk| {
        let cluster = start(|b| b.pgdata = disk.path("data")).await;
        let source = cluster.source();
        let mut target = Target::new(cluster.b.clone());
        // Not a byte, then more and more: each step ends in another file, the first one at a directory.
        let mut arrived = 0;
        for mib in [0, 1, 8, 8, 24] {
            disk.leave(mib << 20);
            let failure = refused(&cluster, &mut target, &source).await;
            assert_says(&failure, &disk, true);
            if mib > 0 {
                assert!(failure.hint.contains(" MiB more, and for WAL, at "), "{failure:?}");
            }
            arrived += target.progress().borrow().bytes_sent;
        }
        disk.make_room();
        recovered(&cluster, &mut target, &source).await;
        let progress = *target.progress().borrow();
        assert!(arrived > 30 << 20, "{arrived}");
        assert!(progress.bytes_same > 25 << 20, "what had come is not sent again: {progress:?}");
        cluster.stop().await;
    });
}

/// Half a copy of the old files is not left there, and nothing has happened to the files themselves.
#[test]
fn old_files_that_find_no_room_are_not_kept_and_stay_as_they_are() {
    with_disk("old_files_that_find_no_room_are_not_kept_and_stay_as_they_are", async |disk| {
        let cluster = start(|b| b.pgdata = disk.path("data")).await;
        let source = cluster.source();
        let mut target = Target::new(cluster.b.clone());
        recovered(&cluster, &mut target, &source).await;
        let before = cluster.fingerprint(&cluster.b).await;
        let beside = || {
            let names = fs::read_dir(&disk.0).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
            names.filter(|name| name.starts_with("data.old-")).collect::<Vec<_>>()
        };
        disk.leave(20 << 20);
        let failure = target.keep_old().await.unwrap_err().failure();
        assert!(failure.what.contains("No space left on device"), "{failure:?}");
        assert!(failure.hint.starts_with("Make room"), "{failure:?}");
        assert_eq!(beside(), [""; 0]);
        cluster.b.start().await.unwrap();
        assert_eq!(cluster.fingerprint(&cluster.b).await, before);
        disk.make_room();
        let kept = target.keep_old().await.unwrap();
        assert_eq!((beside().len(), kept.path.starts_with(disk.0.to_str().unwrap())), (1, true), "{kept:?}");
        recovered(&cluster, &mut target, &source).await;
        cluster.stop().await;
    });
}

#[test]
fn wal_that_finds_no_room_ends_the_fill() {
    with_disk("wal_that_finds_no_room_ends_the_fill", async |disk| {
        let cluster = start(|_| {}).await;
        let pgdata = cluster.b.node().pgdata.clone();
        fs::DirBuilder::new().mode(0o700).create(&pgdata).unwrap();
        fs::create_dir(disk.path("wal")).unwrap();
        std::os::unix::fs::symlink(disk.path("wal"), pgdata.join("pg_wal")).unwrap();
        let source = cluster.source();
        let mut target = Target::new(cluster.b.clone());
        disk.leave(0);
        let failure = refused(&cluster, &mut target, &source).await;
        assert_says(&failure, &disk, false);
        disk.make_room();
        recovered(&cluster, &mut target, &source).await;
        cluster.stop().await;
    });
}

#[test]
fn a_tablespace_that_finds_no_room_is_told_by_its_disk() {
    with_disk("a_tablespace_that_finds_no_room_is_told_by_its_disk", async |disk| {
        let place = disk.path("tablespace");
        let cluster = start(|b| {
            let first = b.tablespaces.values_mut().next().unwrap();
            first.clone_from(&place);
        })
        .await;
        cluster.create_tablespaces().await;
        let a = cluster.a.connect("postgres").await.unwrap();
        let table =
            "CREATE TABLE elsewhere TABLESPACE t0 AS SELECT repeat('e', 1000) AS t FROM generate_series(1, 20000)";
        a.batch_execute(table).await.unwrap();
        let source = cluster.source();
        let mut target = Target::new(cluster.b.clone());
        disk.leave(4 << 20);
        let failure = refused(&cluster, &mut target, &source).await;
        assert_says(&failure, &disk, true);
        disk.make_room();
        recovered(&cluster, &mut target, &source).await;
        cluster.stop().await;
    });
}

#[test]
fn the_last_file_of_a_fill_finds_no_room() {
    with_disk("the_last_file_of_a_fill_finds_no_room", async |disk| {
        let state = disk.path("state");
        fs::create_dir(&state).unwrap();
        let cluster = start(|b| b.state_dir.clone_from(&state)).await;
        let source = cluster.source();
        let mut target = Target::new(cluster.b.clone());
        disk.leave(0);
        let failure = refused(&cluster, &mut target, &source).await;
        assert_says(&failure, &disk, false);
        disk.make_room();
        target.fill(source.clone()).await.unwrap();
        let progress = *target.progress().borrow();
        assert!(progress.bytes_same > progress.bytes_total / 10 * 9, "all of it was here: {progress:?}");
        recovered(&cluster, &mut target, &source).await;
        cluster.stop().await;
    });
}

/// A standby whose disk is full, at the moment that `then` is about.
async fn follows(disk: &Disk, then: impl AsyncFnOnce(&Cluster, &mut Target, &Arc<LocalSource>) -> Failure) {
    let cluster = start(|b| b.pgdata = disk.path("data")).await;
    let source = cluster.source();
    let mut target = Target::new(cluster.b.clone());
    target.fill(source.clone()).await.unwrap();
    let failure = then(&cluster, &mut target, &source).await;
    eprintln!("{}\n  {}", failure.what, failure.hint);
    let top = disk.0.display().to_string();
    assert!(failure.what.contains(&format!("the file system at {top} has ")), "{failure:?}");
    assert!(failure.hint.contains(&top) && failure.hint.contains("pgtandem recover node-b"), "{failure:?}");
    target.abort().await.unwrap();
    cluster.b.stop(true).await.unwrap();
    disk.make_room();
    recovered(&cluster, &mut target, &source).await;
    cluster.stop().await;
}

/// More WAL than fits.
async fn write_much(cluster: &Cluster) {
    let a = cluster.a.connect("postgres").await.unwrap();
    a.batch_execute("UPDATE pgbench_accounts SET abalance = abalance + 1").await.unwrap();
}

#[test]
fn a_standby_that_catches_up_finds_no_room() {
    with_disk("a_standby_that_catches_up_finds_no_room", async |disk| {
        follows(&disk, async |cluster, target, source| {
            write_much(cluster).await;
            disk.leave(6 << 20);
            target.catch_up(source.clone(), LAG_BYTES_MAX).await.unwrap_err().failure()
        })
        .await;
    });
}

#[test]
fn a_standby_that_leaves_recovery_finds_no_room() {
    with_disk("a_standby_that_leaves_recovery_finds_no_room", async |disk| {
        follows(&disk, async |cluster, target, source| {
            target.catch_up(source.clone(), LAG_BYTES_MAX).await.unwrap();
            target.hold().unwrap();
            disk.leave(0);
            write_much(cluster).await;
            let cut = cluster.cut().await;
            target.leave_recovery(cut.x).await.unwrap_err().failure()
        })
        .await;
    });
}

#[test]
fn a_disk_of_a_test_is_gone_afterwards() {
    if rustix::process::getuid().is_root() {
        let mounted = Mounted::new();
        let path = mounted.0.path().to_path_buf();
        let mounts = || fs::read_to_string("/proc/self/mounts").unwrap().contains(path.to_str().unwrap());
        assert!(mounts());
        let panicked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            let _mounted = mounted;
            panic!("a test that fails");
        }));
        assert!(panicked.is_err() && !mounts() && !path.exists());
    }
}
