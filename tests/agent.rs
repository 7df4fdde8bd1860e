//! An agent as its peers see it: who may talk to it, what epochs do, and PostgreSQL under it.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test that panics has failed")]

mod pair;

use std::time::Duration;

use pair::{Site, WAIT, is_postgres_user, record, runtime, status, store, until};
use pgtandem::agent::Agent;
use pgtandem::agent::certificates::{Authority, PROXY};
use pgtandem::agent::client::{self, ClientError, Control};
use pgtandem::agent::postgres::Postgres;
use pgtandem::agent::tls::Identity;
use pgtandem::config::NodeConfig;
use pgtandem_proto::hello::Channel;
use pgtandem_proto::membership::NodeState;
use pgtandem_proto::message::{FailureCode, PostgresState, Reply, Request};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::time::{sleep, timeout};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn epochs_and_members_are_kept_over_a_restart() {
    let mut site = Site::new();
    let agent = site.start(0).await;
    let mut control = site.control(0).await;
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

    let agent = site.start(0).await;
    let again = status(&mut site.control(0).await).await.record;
    assert_eq!((again.promised, again.state, again.members), (5, NodeState::InSync, stored.members));
    assert!(again.uncertain, "nobody knows what happened while it did not run");
    agent.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn strangers_are_turned_away_and_do_no_harm() {
    let mut site = Site::new();
    let agent = site.start(0).await;
    let mut control = site.control(0).await;

    // Bytes that are no TLS, and a caller that says nothing.
    for bytes in [&b"GET / HTTP/1.1\r\n\r\n"[..], &[0; 5000], &[0xff; 64]] {
        let mut stream = tokio::net::TcpStream::connect(site.node(0).agent).await.unwrap();
        let _ = stream.write_all(bytes).await;
        let mut rest = Vec::new();
        let ended = timeout(WAIT, stream.read_to_end(&mut rest)).await;
        assert!(ended.is_ok(), "the connection is ended");
    }
    let _silent = tokio::net::TcpStream::connect(site.node(0).agent).await.unwrap();

    // Another authority with the same names.
    let folder = tempfile::tempdir().unwrap();
    Authority::create("shop").unwrap().issue(PROXY).unwrap().save(folder.path()).unwrap();
    let stranger = Identity::load(folder.path()).unwrap();
    assert!(matches!(Control::connect(&stranger, site.node(0)).await, Err(ClientError::Tls { .. })));

    // Our authority and the caller's root, but a name that the configuration does not know.
    let unknown = tempfile::tempdir().unwrap();
    let ours = Authority::load(site.folder.path(), "shop").unwrap();
    ours.issue("c").unwrap().save(unknown.path()).unwrap();
    let refused = Control::connect(&Identity::load(unknown.path()).unwrap(), site.node(0)).await;
    assert!(matches!(refused, Err(ClientError::Refused { .. })), "{:?}", refused.err());

    // A server that is not the node that is wanted.
    let wrong = NodeConfig { agent: site.node(0).agent, ..site.config.nodes[1].clone() };
    assert!(matches!(Control::connect(&site.proxy(), &wrong).await, Err(ClientError::Tls { .. })));

    // The proxy fetches no files; a node that is not in sync gives none.
    let files = client::connect(&site.proxy(), site.node(0), Channel::Files).await;
    assert!(matches!(files, Err(ClientError::Refused { .. })));
    let b = Identity::load(&site.config.nodes[1].state_dir).unwrap();
    let wal = client::connect(&b, site.node(0), Channel::Wal).await;
    assert!(matches!(wal, Err(ClientError::Refused { .. })));

    assert_eq!(status(&mut control).await.record.state, NodeState::Blank);
    drop(control);
    agent.stop().await.unwrap();
}

#[test]
fn only_one_agent_runs_on_a_state_dir() {
    runtime().block_on(async {
        let mut site = Site::new();
        let agent = site.start(0).await;
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
    runtime().block_on(async {
        let mut site = Site::new();
        site.initdb();
        let postgres = Postgres::new(site.node(0).clone());
        let agent = site.start(0).await;
        let mut control = site.control(0).await;
        assert_eq!(status(&mut control).await.postgres, PostgresState::Stopped, "a Blank node is left alone");
        assert_eq!(control.request(&Request::StartPostgres).await.unwrap(), Reply::Done);
        record(&mut control, Request::Promise { epoch: 7 }).await.unwrap();
        record(&mut control, store(7, 1, &["a"], NodeState::InSync)).await.unwrap();

        // A tunnel of the promised epoch reaches PostgreSQL, one of another does not.
        assert!(matches!(client::tunnel(&site.proxy(), site.node(0), 6).await, Err(ClientError::Refused { .. })));
        let carrier = client::tunnel(&site.proxy(), site.node(0), 7).await.unwrap();
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
        until("PostgreSQL is back", async || {
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
        let agent = site.start(0).await;
        let mut control = site.control(0).await;
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
    runtime().block_on(async {
        let site = Site::new();
        site.initdb();
        let right = Postgres::new(site.node(0).clone());
        right.start().await.unwrap();
        let wrong = Postgres::new(NodeConfig { port: site.node(0).port ^ 1, ..site.node(0).clone() });
        assert!(wrong.is_foreign());
        let error = wrong.stop(true).await.unwrap_err().to_string();
        assert!(error.contains(&right.postmaster_pid().unwrap().unwrap().to_string()), "{error}");
        assert!(wrong.start().await.is_err());
        assert_eq!(right.state(), PostgresState::Running);
        right.stop(true).await.unwrap();
    });
}

/// Between the start of a postmaster and the file that names it nobody sees it. A node that is filled would have it among its files.
#[test]
fn a_start_that_was_given_up_leaves_no_postgresql_behind() {
    if !is_postgres_user("a_start_that_was_given_up_leaves_no_postgresql_behind") {
        return;
    }
    runtime().block_on(async {
        let site = Site::new();
        site.initdb();
        let folder = tempfile::tempdir().unwrap();
        let [begun, go, ended] = ["begun", "go", "ended"].map(|name| folder.path().join(name));
        let (pg_ctl, real) = (folder.path().join("pg_ctl"), site.node(0).bin_dir.join("pg_ctl"));
        let script = format!(
            "#!/bin/sh\ntouch {}; while [ ! -e {} ]; do sleep 0.05; done; {} \"$@\"; touch {}\n",
            begun.display(),
            go.display(),
            real.display(),
            ended.display()
        );
        std::fs::write(&pg_ctl, script).unwrap();
        std::fs::set_permissions(&pg_ctl, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
        let slow = Postgres::new(NodeConfig { bin_dir: folder.path().into(), ..site.node(0).clone() });
        let start = {
            let slow = slow.clone();
            tokio::spawn(async move { slow.start().await.is_ok() })
        };
        until("the starter runs", async || begun.exists()).await;
        start.abort();
        let _ = start.await;
        let stop = {
            let slow = slow.clone();
            tokio::spawn(async move { slow.stop(true).await })
        };
        std::fs::write(&go, "").unwrap();
        timeout(WAIT, stop).await.expect("it ends").unwrap().unwrap();
        assert!(ended.exists(), "nothing is started any more");
        assert_eq!(slow.state(), PostgresState::Stopped);
    });
}
