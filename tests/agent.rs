//! An agent as its peers see it: who may talk to it, what epochs do, and PostgreSQL under it.

use std::fs;
use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use pgtandem::agent::Agent;
use pgtandem::agent::certificates::{Authority, PROXY};
use pgtandem::agent::client::{self, ClientError, Control};
use pgtandem::agent::postgres::Postgres;
use pgtandem::agent::tls::Identity;
use pgtandem::config::{ClusterConfig, Config, NodeConfig, ProxyConfig};
use pgtandem_proto::hello::Channel;
use pgtandem_proto::membership::{MemberSet, NodeState, Record};
use pgtandem_proto::message::{FailureCode, NodeStatus, PostgresState, Reply, Request};
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::time::{sleep, timeout};

const BIN_DIR: &str = "/usr/lib/postgresql/15/bin";
/// Longest wait for a condition.
const WAIT: Duration = Duration::from_secs(30);

/// Two configured nodes, a and b, with certificates; only a's agent runs, in this process.
struct Site {
    folder: TempDir,
    config: Config,
    listener: Option<TcpListener>,
}

impl Site {
    fn new() -> Site {
        let folder = tempfile::Builder::new().prefix("pgtandem-").tempdir().unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        listener.set_nonblocking(true).unwrap();
        let free = || TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let node = |name: &str, agent| {
            let home = folder.path().join(name);
            for part in ["state", "socket"] {
                fs::create_dir_all(home.join(part)).unwrap();
            }
            NodeConfig {
                name: name.to_owned(),
                agent,
                state_dir: home.join("state"),
                pgdata: home.join("pgdata"),
                bin_dir: BIN_DIR.into(),
                socket_dir: home.join("socket"),
                port: free().port(),
            }
        };
        let nodes = vec![node("a", listener.local_addr().unwrap()), node("b", free())];
        let config = Config {
            cluster: ClusterConfig { name: "shop".to_owned() },
            proxy: ProxyConfig {
                node: "a".to_owned(),
                listen: free(),
                state_dir: folder.path().join("proxy"),
                threads: 0,
                gate_ms_max: 1000,
                follower_ms_max: 1000,
                effects_disk_max: 1 << 20,
                backlog_bytes_max: 1 << 20,
                clients_max: 10,
            },
            nodes,
        };
        fs::create_dir_all(&config.proxy.state_dir).unwrap();
        let authority = Authority::create("shop").unwrap();
        authority.save(folder.path()).unwrap();
        for node in &config.nodes {
            authority.issue(&node.name).unwrap().save(&node.state_dir).unwrap();
        }
        authority.issue(PROXY).unwrap().save(&config.proxy.state_dir).unwrap();
        Site { folder, config, listener: Some(listener) }
    }

    fn a(&self) -> &NodeConfig {
        &self.config.nodes[0]
    }

    fn proxy(&self) -> Identity {
        Identity::load(&self.config.proxy.state_dir).unwrap()
    }

    async fn start(&mut self) -> Agent {
        let listener = self.listener.take().unwrap_or_else(|| {
            let listener = TcpListener::bind(self.a().agent).unwrap();
            listener.set_nonblocking(true).unwrap();
            listener
        });
        let listener = tokio::net::TcpListener::from_std(listener).unwrap();
        Agent::start(self.config.clone(), "a", listener).await.unwrap()
    }

    async fn control(&self) -> Control {
        Control::connect(&self.proxy(), self.a()).await.unwrap()
    }

    /// A data directory for a, as the sandbox makes it.
    fn initdb(&self) {
        let node = self.a();
        fs::set_permissions(&node.socket_dir, fs::Permissions::from_mode(0o700)).unwrap();
        let output = Command::new(Path::new(BIN_DIR).join("initdb"))
            .args(["--no-sync", "--username=pgtandem", "--auth=trust", "--pgdata"])
            .arg(&node.pgdata)
            .output()
            .unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let settings = format!(
            "port = {}\nlisten_addresses = ''\nunix_socket_directories = '{}'\nmax_prepared_transactions = 10\nfsync = off\n",
            node.port,
            node.socket_dir.display()
        );
        let path = node.pgdata.join("postgresql.conf");
        fs::write(&path, fs::read_to_string(&path).unwrap() + &settings).unwrap();
    }
}

async fn status(control: &mut Control) -> NodeStatus {
    match control.request(&Request::Status).await.unwrap() {
        Reply::Status(status) => *status,
        other => panic!("{other:?}"),
    }
}

async fn record(control: &mut Control, request: Request) -> Result<Record, FailureCode> {
    match control.request(&request).await {
        Ok(Reply::Record(record)) => Ok(*record),
        Err(ClientError::Failed { failure, .. }) => {
            assert!(!failure.what.is_empty() && !failure.hint.is_empty());
            Err(failure.code)
        }
        other => panic!("{other:?}"),
    }
}

fn store(epoch: u64, version: u64, nodes: &[&str], state: NodeState) -> Request {
    Request::Store {
        members: MemberSet {
            epoch,
            version,
            nodes: nodes.iter().map(ToString::to_string).collect(),
            leader: nodes[0].to_owned(),
            proxy: nodes[0].to_owned(),
        },
        state,
        uncertain: false,
        new_generation: None,
        note: None,
    }
}

/// PostgreSQL does not run as root: the test runs once more as user `postgres`, and this returns true there.
fn is_postgres_user(test: &str) -> bool {
    if !rustix::process::geteuid().is_root() {
        return true;
    }
    let id = |flag: &str| -> u32 {
        let output = Command::new("id").args([flag, "postgres"]).output().unwrap();
        String::from_utf8_lossy(&output.stdout).trim().parse().expect("a user postgres exists")
    };
    let (uid, gid) = (id("-u"), id("-g"));
    // The program may lie where that user can not reach it.
    let folder = tempfile::tempdir().unwrap();
    fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let program: PathBuf = folder.path().join("test");
    fs::copy(std::env::current_exe().unwrap(), &program).unwrap();
    let output = Command::new(program)
        .args(["--exact", test, "--nocapture"])
        .current_dir("/")
        .env_remove("TMPDIR")
        .uid(uid)
        .gid(gid)
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && text.contains("1 passed"), "as user postgres:\n{text}");
    false
}

async fn until<F: Future<Output = bool>>(what: &str, mut condition: impl FnMut() -> F) {
    let waited = timeout(WAIT, async {
        while !condition().await {
            sleep(Duration::from_millis(20)).await;
        }
    });
    assert!(waited.await.is_ok(), "{what} did not come true");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn epochs_and_members_are_kept_over_a_restart() {
    let mut site = Site::new();
    let agent = site.start().await;
    let mut control = site.control().await;
    let first = status(&mut control).await;
    assert_eq!((first.record.state, first.record.promised), (NodeState::Blank, 0));
    assert_eq!(first.postgres, PostgresState::Absent);
    assert_eq!(record(&mut control, Request::Promise { epoch: 5 }).await.unwrap().promised, 5);
    assert_eq!(record(&mut control, Request::Promise { epoch: 4 }).await, Err(FailureCode::OldEpoch));
    let stored = record(&mut control, store(5, 1, &["a"], NodeState::InSync)).await.unwrap();
    assert!(!stored.uncertain);
    assert_eq!(record(&mut control, store(4, 9, &["a"], NodeState::InSync)).await, Err(FailureCode::OldEpoch));
    drop(control);
    agent.stop().await.unwrap();

    let agent = site.start().await;
    let again = status(&mut site.control().await).await.record;
    assert_eq!((again.promised, again.state, again.members), (5, NodeState::InSync, stored.members));
    assert!(again.uncertain, "nobody knows what happened while it did not run");
    agent.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn strangers_are_turned_away_and_do_no_harm() {
    let mut site = Site::new();
    let agent = site.start().await;
    let mut control = site.control().await;

    // Bytes that are no TLS, and a caller that says nothing.
    for bytes in [&b"GET / HTTP/1.1\r\n\r\n"[..], &[0; 5000], &[0xff; 64]] {
        let mut stream = tokio::net::TcpStream::connect(site.a().agent).await.unwrap();
        let _ = stream.write_all(bytes).await;
        let mut rest = Vec::new();
        let ended = timeout(WAIT, stream.read_to_end(&mut rest)).await;
        assert!(ended.is_ok(), "the connection is ended");
    }
    let _silent = tokio::net::TcpStream::connect(site.a().agent).await.unwrap();

    // Another authority with the same names.
    let folder = tempfile::tempdir().unwrap();
    Authority::create("shop").unwrap().issue(PROXY).unwrap().save(folder.path()).unwrap();
    let stranger = Identity::load(folder.path()).unwrap();
    assert!(matches!(Control::connect(&stranger, site.a()).await, Err(ClientError::Tls { .. })));

    // Our authority and the caller's root, but a name that the configuration does not know.
    let unknown = tempfile::tempdir().unwrap();
    let ours = Authority::load(site.folder.path(), "shop").unwrap();
    ours.issue("c").unwrap().save(unknown.path()).unwrap();
    let refused = Control::connect(&Identity::load(unknown.path()).unwrap(), site.a()).await;
    assert!(matches!(refused, Err(ClientError::Refused { .. })), "{:?}", refused.err());

    // A server that is not the node that is wanted.
    let wrong = NodeConfig { agent: site.a().agent, ..site.config.nodes[1].clone() };
    assert!(matches!(Control::connect(&site.proxy(), &wrong).await, Err(ClientError::Tls { .. })));

    // The proxy fetches no files; a node that is not in sync gives none.
    let files = client::connect(&site.proxy(), site.a(), Channel::Files).await;
    assert!(matches!(files, Err(ClientError::Refused { .. })));
    let b = Identity::load(&site.config.nodes[1].state_dir).unwrap();
    let wal = client::connect(&b, site.a(), Channel::Wal).await;
    assert!(matches!(wal, Err(ClientError::Refused { .. })));

    assert_eq!(status(&mut control).await.record.state, NodeState::Blank);
    drop(control);
    agent.stop().await.unwrap();
}

#[test]
fn only_one_agent_runs_on_a_state_dir() {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(async {
        let mut site = Site::new();
        let agent = site.start().await;
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let second = Agent::start(site.config.clone(), "a", listener).await;
        assert!(second.is_err_and(|error| error.to_string().contains("another agent")));
        agent.stop().await.unwrap();
    });
}

#[test]
fn postgresql_is_kept_running_and_tunnels_obey_epochs() {
    if !is_postgres_user("postgresql_is_kept_running_and_tunnels_obey_epochs") {
        return;
    }
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    runtime.block_on(async {
        let mut site = Site::new();
        site.initdb();
        let postgres = Postgres::new(site.a().clone());
        let agent = site.start().await;
        let mut control = site.control().await;
        assert_eq!(status(&mut control).await.postgres, PostgresState::Stopped, "a Blank node is left alone");
        assert_eq!(control.request(&Request::StartPostgres).await.unwrap(), Reply::Done);
        record(&mut control, Request::Promise { epoch: 7 }).await.unwrap();
        record(&mut control, store(7, 1, &["a"], NodeState::InSync)).await.unwrap();

        // A tunnel of the promised epoch reaches PostgreSQL, one of another does not.
        assert!(matches!(client::tunnel(&site.proxy(), site.a(), 6).await, Err(ClientError::Refused { .. })));
        let carrier = client::tunnel(&site.proxy(), site.a(), 7).await.unwrap();
        let (sql, connection) = tokio_postgres::Config::new()
            .user("pgtandem")
            .dbname("postgres")
            .connect_raw(carrier, tokio_postgres::NoTls)
            .await
            .unwrap();
        let connection = tokio::spawn(connection);
        let row = sql.query_one("select count(*) from generate_series(1, 200000)", &[]).await.unwrap();
        assert_eq!(row.get::<_, i64>(0), 200_000);

        // A newer epoch cuts it.
        record(&mut control, Request::Promise { epoch: 8 }).await.unwrap();
        assert!(sql.simple_query("select 1").await.is_err());
        let _ = connection.await;

        // Killed: it comes back. Backends of the dead one hold its shared memory for a while.
        let local = postgres.connect("postgres").await.unwrap();
        let busy = tokio::spawn(async move { local.simple_query("select pg_sleep(2)").await.is_err() });
        let old = postgres.postmaster_pid().unwrap().unwrap();
        rustix::process::kill_process(rustix::process::Pid::from_raw(old).unwrap(), rustix::process::Signal::KILL)
            .unwrap();
        until("PostgreSQL is back", || async {
            matches!(postgres.postmaster_pid(), Ok(Some(pid)) if pid != old)
                && postgres.state() == PostgresState::Running
        })
        .await;
        let _ = busy.await;

        // Told to stop: it stays stopped.
        control.request(&Request::StopPostgres { immediate: false }).await.unwrap();
        assert_eq!(postgres.state(), PostgresState::Stopped);
        sleep(Duration::from_millis(500)).await;
        assert_eq!(postgres.state(), PostgresState::Stopped);
        assert!(!status(&mut control).await.postgres_detail.is_empty());

        // An agent that dies leaves PostgreSQL running; the next one finds it, and its orderly end stops it.
        control.request(&Request::StartPostgres).await.unwrap();
        let pid = postgres.postmaster_pid().unwrap();
        drop(control);
        agent.abandon().await;
        let agent = site.start().await;
        let mut control = site.control().await;
        assert_eq!(status(&mut control).await.postgres, PostgresState::Running);
        assert_eq!(postgres.postmaster_pid().unwrap(), pid);
        agent.stop().await.unwrap();
        assert_eq!(postgres.state(), PostgresState::Stopped);
    });
}

#[test]
fn a_foreign_postgresql_is_named_and_left_alone() {
    if !is_postgres_user("a_foreign_postgresql_is_named_and_left_alone") {
        return;
    }
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    runtime.block_on(async {
        let site = Site::new();
        site.initdb();
        let right = Postgres::new(site.a().clone());
        right.start().await.unwrap();
        let wrong = Postgres::new(NodeConfig { port: site.a().port ^ 1, ..site.a().clone() });
        assert!(wrong.is_foreign());
        let error = wrong.stop(true).await.unwrap_err().to_string();
        assert!(error.contains(&right.postmaster_pid().unwrap().unwrap().to_string()), "{error}");
        assert!(wrong.start().await.is_err());
        assert_eq!(right.state(), PostgresState::Running);
        right.stop(true).await.unwrap();
    });
}
