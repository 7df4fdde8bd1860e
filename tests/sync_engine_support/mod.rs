//! Two PostgreSQL servers in a folder of their own, and a source that serves from this process and can break.
#![allow(dead_code, reason = "each test program uses a part")]

use std::future::Future;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, AtomicUsize, Ordering};
use std::time::Duration;

use pgtandem::agent::connection::Connection;
use pgtandem::agent::postgres::Postgres;
use pgtandem::config::NodeConfig;
use pgtandem::sync::link::Link;
use pgtandem::sync::source::{Backups, SourceContext, serve_files, serve_wal};
use pgtandem::sync::target::{Opening, Source};
use pgtandem::sync::wal::parse_lsn;
use pgtandem_proto::frame::Message;
use pgtandem_proto::message::{FilesReply, FilesRequest, Lsn, WalReply, WalRequest};
use tokio::sync::Notify;
use tokio_postgres::Client;

pub const BIN_DIR: &str = "/usr/lib/postgresql/15/bin";
/// Tablespaces that B has a place for.
const TABLESPACES: usize = 2;
/// A test that waits longer than this has failed.
const WAIT_SECONDS_MAX: u64 = 60;

/// PostgreSQL does not run as root: a test that does runs itself again as `postgres`.
pub fn run_as_postgres(test: &str, body: impl Future<Output = ()>) {
    run_as_postgres_with(test, &[], body);
}

/// The same, with these variables in its environment.
pub fn run_as_postgres_with(test: &str, variables: &[(&str, &std::ffi::OsStr)], body: impl Future<Output = ()>) {
    if rustix::process::getuid().is_root() {
        let folder = tempfile::Builder::new().prefix("pgt").tempdir_in("/tmp").unwrap();
        std::fs::set_permissions(folder.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
        let program = folder.path().join("test");
        // The build folder may be one that only root can enter.
        std::fs::copy(std::env::current_exe().unwrap(), &program).unwrap();
        let output = std::process::Command::new("runuser")
            .args(["-u", "postgres", "--"])
            .arg(&program)
            .args(["--exact", test, "--nocapture", "--test-threads=1"])
            .envs(variables.iter().copied())
            .current_dir("/tmp")
            .output()
            .unwrap();
        let said = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        assert!(output.status.success() && said.contains("1 passed"), "as postgres:\n{said}");
        return;
    }
    let _ = tracing_subscriber::fmt().with_env_filter("info").with_writer(std::io::stderr).try_init();
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    runtime.block_on(body);
}

pub async fn wait_for(what: &str, condition: impl Fn() -> bool) {
    let waited = tokio::time::timeout(Duration::from_secs(WAIT_SECONDS_MAX), async {
        while !condition() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    });
    assert!(waited.await.is_ok(), "waited too long for {what}");
}

/// A is a fresh server, B nothing yet. Dropping it kills both.
pub struct Cluster {
    pub a: Postgres,
    pub b: Postgres,
    folder: tempfile::TempDir,
}

/// A's state at X, to be looked at later.
pub struct Cut {
    pub x: Lsn,
    /// Within a transaction whose snapshot is X's.
    pub snapshot: Client,
}

impl Cluster {
    pub async fn start() -> Cluster {
        Cluster::start_with(Path::new(BIN_DIR), &[]).await
    }

    /// With these programs and these options of `initdb`.
    pub async fn start_with(bin_dir: &Path, options: &[&str]) -> Cluster {
        Cluster::start_changed(bin_dir, options, |_| {}).await
    }

    /// With another configuration of B.
    pub async fn start_changed(bin_dir: &Path, options: &[&str], change: impl FnOnce(&mut NodeConfig)) -> Cluster {
        let folder = tempfile::Builder::new().prefix("pgts").tempdir_in("/tmp").unwrap();
        let (a, mut b) = (node(folder.path(), "node-a", bin_dir), node(folder.path(), "node-b", bin_dir));
        for number in 0..TABLESPACES {
            b.tablespaces
                .insert(Self::tablespace(folder.path(), "a", number), Self::tablespace(folder.path(), "b", number));
        }
        change(&mut b);
        init(&a, options).await;
        let cluster = Cluster { a: Postgres::new(a), b: Postgres::new(b), folder };
        cluster.a.start().await.unwrap();
        cluster
    }

    pub async fn init_b_as_another_cluster(&self) {
        init(self.b.node(), &[]).await;
    }

    fn tablespace(folder: &Path, node: &str, number: usize) -> PathBuf {
        folder.join(format!("tablespace-{node}{number}"))
    }

    /// Makes tablespaces `t0` and `t1` on A; B has directories of its own for them.
    pub async fn create_tablespaces(&self) {
        let a = self.a.connect("postgres").await.unwrap();
        for number in 0..TABLESPACES {
            let path = Self::tablespace(self.folder.path(), "a", number);
            std::fs::create_dir(&path).unwrap();
            a.batch_execute(&format!("CREATE TABLESPACE t{number} LOCATION '{}'", path.display())).await.unwrap();
        }
    }

    pub fn source(&self) -> Arc<LocalSource> {
        Arc::new(LocalSource {
            context: SourceContext {
                postgres: self.a.clone(),
                peer: "node-b".into(),
                backups: Backups::default(),
                bytes_per_s_max: 0,
                keeps_wal: true,
            },
            files_left: Arc::new(AtomicI64::new(i64::MAX)),
            corrupt_at: Arc::new(AtomicI64::new(0)),
            cut_wal: Arc::default(),
            wal_opened: AtomicUsize::new(0),
        })
    }

    pub async fn pgbench_init(&self, scale: u32) {
        let scale = scale.to_string();
        run(self.pgbench(&["-i", "-q", "-s", &scale])).await;
    }

    fn pgbench(&self, arguments: &[&str]) -> tokio::process::Command {
        let node = self.a.node();
        // Not every set of programs has it, and it talks to all of them.
        let mut command = tokio::process::Command::new(Path::new(BIN_DIR).join("pgbench"));
        command
            .arg("-h")
            .arg(&node.socket_dir)
            .args(["-p", &node.port.to_string(), "-U", "pgtandem"])
            .args(arguments)
            .arg("postgres");
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).kill_on_drop(true);
        command
    }

    /// Writes on A until it is stopped.
    pub fn pgbench_load(&self) -> Load {
        Load(self.pgbench(&["-n", "-c", "2", "-T", "600"]).spawn().unwrap())
    }

    /// X, read while nobody writes, and A's state at it. Writers wait for that moment only.
    pub async fn cut(&self) -> Cut {
        let fence = self.a.connect("postgres").await.unwrap();
        fence
            .batch_execute(
                "BEGIN; LOCK TABLE pgbench_accounts, pgbench_branches, pgbench_tellers, pgbench_history IN SHARE MODE",
            )
            .await
            .unwrap();
        let marker = self.a.connect("postgres").await.unwrap();
        marker.query_one("SELECT pg_logical_emit_message(true, 'pgtandem', 'cut')", &[]).await.unwrap();
        let row = marker.query_one("SELECT pg_current_wal_insert_lsn()::text", &[]).await.unwrap();
        let x = parse_lsn(row.get(0)).unwrap();
        let snapshot = self.a.connect("postgres").await.unwrap();
        snapshot.batch_execute("BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT 1").await.unwrap();
        fence.batch_execute("COMMIT").await.unwrap();
        Cut { x, snapshot }
    }

    /// Emits marker records until one ends exactly where its page does. -> the insert position behind it
    pub async fn record_that_ends_a_page(&self, client: &Client) -> Lsn {
        let position = async || -> u64 {
            let row = client.query_one("SELECT pg_current_wal_insert_lsn()::text", &[]).await.unwrap();
            parse_lsn(row.get(0)).unwrap().0
        };
        let emit = async |bytes: u64| {
            let sql = "SELECT pg_logical_emit_message(true, 'pad', repeat('x', $1::bigint::int))";
            client.query_one(sql, &[&i64::try_from(bytes).unwrap()]).await.unwrap();
        };
        for _ in 0..2000 {
            let before = position().await;
            emit(1000).await;
            let after = position().await;
            if after / 8192 != before / 8192 {
                continue;
            }
            let overhead = after - before - 1000;
            let left = 8192 - after % 8192;
            if left <= overhead + 16 {
                continue;
            }
            emit(left - overhead).await;
            let x = position().await;
            if x % 8192 == 24 {
                return Lsn(x);
            }
        }
        panic!("no record ended at the end of a page");
    }

    pub async fn fingerprint(&self, postgres: &Postgres) -> String {
        self.fingerprint_of(&postgres.connect("postgres").await.unwrap()).await
    }

    /// Every row of every table that pgbench writes.
    pub async fn fingerprint_of(&self, client: &Client) -> String {
        let mut found = String::new();
        for table in ["pgbench_accounts", "pgbench_branches", "pgbench_tellers", "pgbench_history"] {
            let sql = format!(
                "SELECT count(*)::text || ':' || coalesce(sum(hashtextextended(t::text, 0)), 0)::text FROM {table} t"
            );
            let row = client.query_one(&sql, &[]).await.unwrap();
            found += table;
            found += "=";
            found += row.get(0);
            found += " ";
        }
        found
    }

    pub async fn stop(self) {
        for postgres in [&self.a, &self.b] {
            postgres.stop(true).await.unwrap();
        }
        assert!(self.folder.path().exists());
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        for postgres in [&self.a, &self.b] {
            if let Ok(Some(pid)) = postgres.postmaster_pid()
                && let Some(pid) = rustix::process::Pid::from_raw(pid)
            {
                let _ = rustix::process::kill_process(pid, rustix::process::Signal::QUIT);
            }
        }
    }
}

pub struct Load(tokio::process::Child);

impl Load {
    pub async fn stop(&mut self) {
        self.0.kill().await.unwrap();
    }
}

fn node(folder: &Path, name: &str, bin_dir: &Path) -> NodeConfig {
    let home = folder.join(name);
    let node = NodeConfig {
        name: name.into(),
        agent: ([127, 0, 0, 1], 0).into(),
        state_dir: home.join("state"),
        pgdata: home.join("data"),
        bin_dir: bin_dir.to_owned(),
        socket_dir: home.join("s"),
        port: 5432,
        archive_dir: None,
        tablespaces: std::collections::BTreeMap::new(),
        service_addresses: Vec::new(),
    };
    for folder in [&node.state_dir, &node.socket_dir] {
        std::fs::create_dir_all(folder).unwrap();
        std::fs::set_permissions(folder, std::fs::Permissions::from_mode(0o700)).unwrap();
    }
    node
}

async fn init(node: &NodeConfig, options: &[&str]) {
    let mut initdb = tokio::process::Command::new(node.bin_dir.join("initdb"));
    initdb.arg("-D").arg(&node.pgdata).args([
        "-U",
        "pgtandem",
        "-A",
        "trust",
        "--no-sync",
        "--no-locale",
        "-E",
        "UTF8",
    ]);
    initdb.args(options).stdout(Stdio::null());
    run(initdb).await;
    let conf = node.pgdata.join("postgresql.conf");
    let mut text = std::fs::read_to_string(&conf).unwrap();
    text.push_str("\nmax_prepared_transactions = 20\nshared_buffers = 16MB\nfsync = off\ninclude_if_exists = 'pgtandem.node.conf'\n");
    std::fs::write(&conf, text).unwrap();
    let own = format!(
        "port = {}\nunix_socket_directories = '{}'\nlisten_addresses = ''\n",
        node.port,
        node.socket_dir.display()
    );
    std::fs::write(node.pgdata.join("pgtandem.node.conf"), own).unwrap();
}

async fn run(mut command: tokio::process::Command) {
    let status = command.status().await.unwrap();
    assert!(status.success(), "{command:?}: {status}");
}

/// Serves files and WAL of A over connections in memory; can break them.
pub struct LocalSource {
    context: SourceContext,
    /// Files replies that still pass.
    files_left: Arc<AtomicI64>,
    /// Files replies with bytes until one of them is changed on the way; 0: none is.
    corrupt_at: Arc<AtomicI64>,
    cut_wal: Arc<Notify>,
    pub wal_opened: AtomicUsize,
}

impl LocalSource {
    pub fn break_files_after(&self, messages: i64) {
        self.files_left.store(messages, Ordering::Relaxed);
    }

    /// Changes a byte of the reply with bytes that comes as number `message`, from 1.
    pub fn corrupt_files_at(&self, message: i64) {
        self.corrupt_at.store(message, Ordering::Relaxed);
    }

    pub fn repair(&self) {
        self.files_left.store(i64::MAX, Ordering::Relaxed);
    }

    /// Ends every wal channel that is open now.
    pub fn cut_wal(&self) {
        self.cut_wal.notify_waiters();
    }
}

impl Source for LocalSource {
    fn open_files(&self) -> Opening<'_, Link<FilesRequest, FilesReply>> {
        Box::pin(async {
            let (near, far) = Connection::pair(256 << 10);
            let context = self.context.clone();
            tokio::spawn(async move { serve_files(far, &context).await });
            let Link { outgoing, mut incoming } = Link::<FilesRequest, FilesReply>::over("files", near);
            let (link, mut pump) = Link::new("files");
            let (left, corrupt_at) = (Arc::clone(&self.files_left), Arc::clone(&self.corrupt_at));
            let requests = tokio::spawn(async move {
                while let Some(request) = pump.to_write.recv().await {
                    if outgoing.send(request).await.is_err() {
                        return;
                    }
                }
            });
            tokio::spawn(async move {
                while let Ok(Some(mut reply)) = incoming.receive().await {
                    if let Some(bulk) = reply.bulk_mut().filter(|bulk| !bulk.is_empty())
                        && corrupt_at.fetch_sub(1, Ordering::Relaxed) == 1
                    {
                        let mut changed = bulk.to_vec();
                        let middle = changed.len() / 2;
                        changed[middle] ^= 1;
                        *bulk = changed.into();
                    }
                    if left.fetch_sub(1, Ordering::Relaxed) <= 0 || pump.was_read.send(Ok(reply)).await.is_err() {
                        break;
                    }
                }
                requests.abort();
            });
            Ok(link)
        })
    }

    fn open_wal(&self) -> Opening<'_, Link<WalRequest, WalReply>> {
        Box::pin(async {
            let (near, far) = Connection::pair(256 << 10);
            self.wal_opened.fetch_add(1, Ordering::Relaxed);
            let (context, cut) = (self.context.clone(), Arc::clone(&self.cut_wal));
            tokio::spawn(async move {
                tokio::select! {
                    _ = serve_wal(far, &context) => {}
                    () = cut.notified() => {}
                }
            });
            Ok(Link::over("wal", near))
        })
    }
}
