//! The leader's PostgreSQL is lost while the proxy lives: another member leads, and clients keep their connections.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test that panics has failed")]

mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use common::fault::{Fault, Towards};
use common::{Cluster, wait_for};
use tokio::task::JoinHandle;
use tokio_postgres::error::SqlState;
use tokio_postgres::{AsyncMessage, Client, NoTls, SimpleQueryMessage};

const WRITERS: usize = 4;
const READERS: usize = 2;
/// The leader is lost so often, there and back.
const LOSSES: usize = 4;

/// Clients that do one statement after the other, each its own transaction, and never connect again.
struct Load {
    stop: Arc<AtomicBool>,
    done: Arc<AtomicU64>,
    writers: Vec<JoinHandle<Seen>>,
    readers: Vec<JoinHandle<Seen>>,
}

/// What one of them saw.
#[derive(Default)]
struct Seen {
    answers: u64,
    longest: Duration,
}

impl Load {
    async fn start(cluster: &Cluster) -> Self {
        let client = cluster.connect("postgres").await;
        client.batch_execute("create table counter (id int primary key, n int not null)").await.unwrap();
        for id in 0..WRITERS {
            client.batch_execute(&format!("insert into counter values ({id}, 0)")).await.unwrap();
        }
        let (stop, done) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let (mut writers, mut readers) = (Vec::new(), Vec::new());
        for id in 0..WRITERS + READERS {
            let (client, stop, done) = (cluster.connect("postgres").await, Arc::clone(&stop), Arc::clone(&done));
            let task = tokio::spawn(async move {
                let update = client.prepare("update counter set n = n + 1 where id = $1").await.unwrap();
                let read = client.prepare("select n from counter where id = $1").await.unwrap();
                let key = i32::try_from(id).unwrap();
                let mut seen = Seen::default();
                while !stop.load(Ordering::Relaxed) {
                    let began = Instant::now();
                    let what = if id >= WRITERS {
                        client.query(&read, &[&0]).await.map(|rows| rows.len() as u64)
                    } else if id % 2 == 0 {
                        client.execute(&update, &[&key]).await
                    } else {
                        let text = format!("update counter set n = n + 1 where id = {id}");
                        client.simple_query(&text).await.map(|_| 1)
                    };
                    assert_eq!(what.unwrap_or_else(|e| panic!("client {id}: {e:?}")), 1, "client {id}");
                    seen.longest = seen.longest.max(began.elapsed());
                    seen.answers += 1;
                    done.fetch_add(u64::from(id < WRITERS), Ordering::Relaxed);
                }
                seen
            });
            if id < WRITERS { writers.push(task) } else { readers.push(task) }
        }
        Self { stop, done, writers, readers }
    }

    async fn writes(&self, cluster: &Cluster, more: u64) {
        let target = self.done.load(Ordering::Relaxed) + more;
        let began = Instant::now();
        while self.done.load(Ordering::Relaxed) < target {
            let alive = self.writers.iter().chain(&self.readers).all(|task| !task.is_finished());
            assert!(alive && began.elapsed() < common::LIMIT, "writes stand still\n{}", cluster.logs());
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    /// Every write that was acknowledged is on every server, once. Gives the longest time that a statement took.
    async fn finish(self, cluster: &Cluster) -> Duration {
        self.stop.store(true, Ordering::Relaxed);
        let mut longest = Duration::ZERO;
        let mut acknowledged = Vec::new();
        for task in self.writers {
            let seen = task.await.unwrap();
            acknowledged.push(i32::try_from(seen.answers).unwrap());
            longest = longest.max(seen.longest);
        }
        for task in self.readers {
            longest = longest.max(task.await.unwrap().longest);
        }
        cluster.assert_identical().await;
        for index in 0..2 {
            let client = cluster.connect_node(index, "postgres").await;
            let rows = client.query("select n from counter order by id", &[]).await.unwrap();
            let counted: Vec<i32> = rows.iter().map(|row| row.get(0)).collect();
            assert_eq!(counted, acknowledged, "on node{index}");
        }
        longest
    }
}

async fn wait_leader(cluster: &Cluster, index: usize) {
    wait_for(&format!("node{index} leads"), async || {
        let (status, _) = cluster.status();
        // A proxy that has just been started answers questions before it listens for clients.
        let listens = std::net::TcpStream::connect(("127.0.0.1", cluster.layout.proxy_port())).is_ok();
        listens && status.contains(&format!("leader node{index}")) && !status.contains("no client is served")
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn single_statements_see_no_error() {
    let cluster = common::cluster();
    let load = Load::start(&cluster).await;
    load.writes(&cluster, 200).await;
    for _ in 0..LOSSES {
        let old = cluster.leader();
        cluster.kill_postgres(old);
        load.writes(&cluster, 200).await;
        wait_leader(&cluster, 1 - old).await;
        let (status, _) = cluster.status();
        assert!(status.contains(&format!("next: pgtandem recover node{old}")), "{status}");
        cluster.recover(old);
        load.writes(&cluster, 200).await;
    }
    cluster.wait_well().await;
    let longest = load.finish(&cluster).await;
    eprintln!("{LOSSES} losses of the leader; the longest statement took {longest:?}");
}

/// A connection whose messages outside of queries are seen, too.
async fn session(cluster: &Cluster, user: &str, password: &str) -> (Client, tokio::sync::mpsc::Receiver<AsyncMessage>) {
    let port = cluster.layout.proxy_port();
    let mut config = tokio_postgres::Config::new();
    config.host("127.0.0.1").port(port).user(user).password(password).dbname("postgres").application_name("a session");
    let (client, mut connection) = config.connect(NoTls).await.expect("a session");
    let (sender, receiver) = tokio::sync::mpsc::channel(100);
    tokio::spawn(async move {
        while let Some(Ok(message)) = std::future::poll_fn(|cx| connection.poll_message(cx)).await {
            if sender.send(message).await.is_err() {
                break;
            }
        }
    });
    (client, receiver)
}

async fn shown(client: &Client, sql: &str) -> String {
    let rows = client.simple_query(sql).await.unwrap_or_else(|e| panic!("{sql}: {e:?}"));
    let row = |message: SimpleQueryMessage| match message {
        SimpleQueryMessage::Row(row) => row.get(0).map(str::to_owned),
        _ => None,
    };
    rows.into_iter().find_map(row).unwrap_or_default()
}

fn state(error: &tokio_postgres::Error) -> &str {
    error.code().map_or("", SqlState::code)
}

#[tokio::test(flavor = "multi_thread")]
async fn sessions_keep_what_they_had() {
    let cluster = common::cluster();
    let admin = cluster.connect("postgres").await;
    admin
        .batch_execute(
            "create role r login password 'secret'; create table t (id int primary key, v int); grant all on t to r;
             insert into t values (1, 0)",
        )
        .await
        .unwrap();
    // From here on r needs its password, on both servers.
    for index in 0..2 {
        let hba = cluster.layout.pgdata(index).join("pg_hba.conf");
        let text = std::fs::read_to_string(&hba).unwrap();
        std::fs::write(&hba, format!("local all r scram-sha-256\n{text}")).unwrap();
        let node = cluster.connect_node(index, "postgres").await;
        node.batch_execute("select pg_reload_conf()").await.unwrap();
        wait_for("the rule holds", async || {
            let sql = "select count(*) from pg_hba_file_rules where auth_method = 'scram-sha-256'";
            node.query_one(sql, &[]).await.unwrap().get::<_, i64>(0) == 1
        })
        .await;
    }
    let (client, mut messages) = session(&cluster, "r", "secret").await;
    client
        .batch_execute(
            "set work_mem = '7MB'; set app.who = 'x'; set search_path to public, pg_catalog;
             select set_config('TimeZone', 'Asia/Tokyo', false), set_config('app.how', 'y', true)",
        )
        .await
        .unwrap();
    client.batch_execute("begin; set statement_timeout = '77s'; commit").await.unwrap();
    client.batch_execute("begin; set statement_timeout = '88s'; rollback; listen news").await.unwrap();
    client.execute("set timezone = 'Asia/Tokyo'", &[]).await.unwrap();
    let update = client.prepare("update t set v = v + $1 where id = 1 returning v").await.unwrap();
    client.batch_execute("prepare by_sql (int) as update t set v = v + $1 where id = 1").await.unwrap();
    // Ones with nothing done, with a lost transaction, with one that only began.
    let (open, _m1) = session(&cluster, "postgres", "").await;
    open.batch_execute("begin; update t set v = v + 1000 where id = 1").await.unwrap();
    let (committing, _m2) = session(&cluster, "postgres", "").await;
    committing.batch_execute("begin; insert into t values (2, 2)").await.unwrap();
    let (reading, _m3) = session(&cluster, "postgres", "").await;
    reading.batch_execute("begin").await.unwrap();
    reading.query("select v from t", &[]).await.unwrap();
    let (begun, _m4) = session(&cluster, "postgres", "").await;
    begun.batch_execute("begin").await.unwrap();
    let (failed, _m5) = session(&cluster, "postgres", "").await;
    failed.batch_execute("begin").await.unwrap();
    failed.batch_execute("select nonsense").await.unwrap_err();
    let (temporary, _m6) = session(&cluster, "postgres", "").await;
    temporary.batch_execute("create temp table mine (i int)").await.unwrap();
    let (locking, _m7) = session(&cluster, "postgres", "").await;
    locking.batch_execute("select pg_advisory_lock(7)").await.unwrap();

    cluster.kill_postgres(0);
    wait_leader(&cluster, 1).await;

    for (sql, expected) in [
        ("show work_mem", "7MB"),
        ("show app.who", "x"),
        ("show timezone", "Asia/Tokyo"),
        ("show search_path", "public, pg_catalog"),
        ("show statement_timeout", "77s"),
        ("show timezone", "Asia/Tokyo"),
        ("show application_name", "a session"),
        ("select current_user", "r"),
        ("select session_user", "r"),
    ] {
        assert_eq!(shown(&client, sql).await, expected, "{sql}");
    }
    let v: i32 = client.query_one(&update, &[&5]).await.unwrap().get(0);
    assert_eq!(v, 5, "the open transaction is gone");
    client.batch_execute("execute by_sql(3)").await.unwrap();
    // It is another backend's session now, and its client cancels it by the key that it got at its start.
    let cancel = client.cancel_token();
    let watch = cluster.connect_node(1, "postgres").await;
    let sleeping = client.batch_execute("select pg_sleep(600)");
    let cancelled = async {
        wait_for("it sleeps", async || {
            let sql = "select count(*) from pg_stat_activity where wait_event = 'PgSleep'";
            watch.query_one(sql, &[]).await.unwrap().get::<_, i64>(0) == 1
        })
        .await;
        cancel.cancel_query(NoTls).await.unwrap();
    };
    let (slept, ()) = tokio::join!(sleeping, cancelled);
    assert_eq!(state(&slept.unwrap_err()), "57014");
    cluster.connect("postgres").await.batch_execute("notify news, 'is told'").await.unwrap();
    let told = tokio::time::timeout(common::LIMIT, async {
        loop {
            let message = messages.recv().await.expect("the session goes on");
            if let AsyncMessage::Notification(n) = message {
                return n.payload().to_owned();
            }
        }
    });
    assert_eq!(told.await.expect("a notification"), "is told");

    // The statement that comes next is told, and the connection stays.
    let error = open.batch_execute("update t set v = v + 1000 where id = 1").await.unwrap_err();
    assert_eq!(state(&error), "40001", "{error:?}");
    assert_eq!(state(&open.batch_execute("select 1").await.unwrap_err()), "25P02");
    open.batch_execute("rollback; begin; update t set v = v + 100 where id = 1; commit").await.unwrap();
    // A COMMIT is not taken for one that succeeded; no ROLLBACK is needed after it.
    assert_eq!(state(&committing.batch_execute("commit").await.unwrap_err()), "40001");
    committing.batch_execute("insert into t values (3, 3)").await.unwrap();
    let error = reading.query("select v from t", &[]).await.unwrap_err();
    assert_eq!(state(&error), "40001", "by the extended protocol: {error:?}");
    reading.batch_execute("rollback").await.unwrap();
    assert_eq!(reading.query("select v from t where id = 1", &[]).await.unwrap().len(), 1);
    begun.batch_execute("insert into t values (4, 4); commit").await.unwrap();
    assert_eq!(state(&failed.batch_execute("select 1").await.unwrap_err()), "25P02");
    failed.batch_execute("rollback; select 1").await.unwrap();
    for lost in [temporary, locking] {
        let error = lost.batch_execute("select 1").await.unwrap_err();
        assert!(lost.is_closed() || state(&error) == "57P01", "{error:?}");
    }
    let rows = cluster.connect("postgres").await.query("select id, v from t order by id", &[]).await.unwrap();
    let rows: Vec<(i32, i32)> = rows.iter().map(|row| (row.get(0), row.get(1))).collect();
    assert_eq!(rows, [(1, 108), (3, 3), (4, 4)]);

    cluster.recover(0);
    cluster.assert_identical().await;
    // And back, with what it has collected on the way.
    cluster.kill_postgres(1);
    wait_leader(&cluster, 0).await;
    assert_eq!(shown(&client, "show work_mem").await, "7MB");
    let v: i32 = client.query_one(&update, &[&1]).await.unwrap().get(0);
    assert_eq!(v, 109);
    cluster.recover(1);
    cluster.assert_identical().await;
}

/// What code has set for a whole session, or locked, is in the server that was lost: such a session ends, and no other.
#[tokio::test(flavor = "multi_thread")]
async fn what_code_has_set_is_not_lost_without_a_word() {
    let cluster = common::cluster();
    let admin = cluster.connect("postgres").await;
    admin
        .batch_execute(
            "create table t (id int primary key, v int, note text); create table marked (id int primary key);
             create table noted (id int primary key, note text);
             create function tenant(t text) returns void language plpgsql as $$ begin perform set_config('app.tenant', t, false); end $$;
             create function inside(t text) returns text language plpgsql as $$ begin perform tenant(t); return t; end $$;
             create function briefly(t text) returns text language plpgsql as $$
               begin perform set_config('app.tenant', t, true); return current_setting('app.tenant'); end $$;
             create function locks() returns text language sql as 'select pg_advisory_lock_shared(5)::text';
             create function counts() returns bigint language plpgsql as 'begin return (select count(*) from t); end';
             create view tenants as select inside('red') as name;
             create function mark() returns trigger language plpgsql as $$ begin set app.marked = 'yes'; return new; end $$;
             create trigger mark before insert on marked for each row execute function mark();
             create function note() returns trigger language plpgsql as $$ begin new.note := upper(new.note); return new; end $$;
             create trigger note before insert on noted for each row execute function note()",
        )
        .await
        .unwrap();
    let stay = [
        "select briefly('blue')",
        "select counts()",
        "insert into noted values (1, 'a')",
        "select set_config('app.tenant', 'blue', true)",
        "select set_config('app.tenant', 'blue', false)",
        "insert into t values (1, 1, current_setting('app.tenant', true))",
    ];
    let end = [
        "select tenant('blue')",
        "select * from tenants",
        "select locks()",
        "insert into marked values (1)",
        "do $$ begin perform set_config('app.done', 'yes', false); end $$",
        "insert into t select 2, 2, set_config('app.tenant', 'blue', false)",
        "select count(pg_advisory_lock(6)), 1 / 0",
        "begin; select tenant('blue'); rollback",
        "prepare p as select $1::text; execute p(inside('blue'))",
        "alter table noted add check (counts() < 1000)",
    ];
    let mut sessions = Vec::new();
    for (sql, stays) in stay.iter().map(|sql| (sql, true)).chain(end.iter().map(|sql| (sql, false))) {
        let (client, messages) = session(&cluster, "postgres", "").await;
        let done = client.batch_execute(sql).await;
        assert_eq!(done.is_err(), sql.contains("/ 0"), "{sql}: {done:?}");
        sessions.push((format!("{sql}, as text"), client, messages, stays));
    }
    for (sql, stays) in [(stay[0], true), (stay[1], true), (end[0], false), (end[1], false), (end[2], false)] {
        let (client, messages) = session(&cluster, "postgres", "").await;
        client.query(sql, &[]).await.unwrap_or_else(|e| panic!("{sql}: {e:?}"));
        sessions.push((format!("{sql}, prepared"), client, messages, stays));
    }
    // Many drivers look so whether the server is there.
    let (client, messages) = session(&cluster, "postgres", "").await;
    client.execute("", &[]).await.unwrap();
    let nothing = client.prepare("-- nothing").await.unwrap();
    client.execute(&nothing, &[]).await.unwrap();
    client.batch_execute("slect 1").await.unwrap_err();
    sessions.push(("nothing".to_owned(), client, messages, true));
    cluster.kill_postgres(0);
    wait_leader(&cluster, 1).await;
    sessions.last().unwrap().1.execute(&nothing, &[]).await.unwrap();
    for (sql, client, _messages, stays) in &sessions {
        match client.batch_execute("select 1").await {
            Ok(()) => assert!(stays, "{sql}: it has lost something"),
            Err(error) => {
                assert!(!stays && (client.is_closed() || state(&error) == "57P01"), "{sql}: {error:?}");
            }
        }
    }
    cluster.recover(0);
    cluster.assert_identical().await;
}

/// The leader is lost while a COMMIT is at this message of server 0, the leader, or 1: what is told is what the new leader has.
async fn lost_at(isolation: &str, (server, towards, tag, part): (usize, Towards, u8, &str), is_prepared: bool) {
    let what = format!("{isolation}, {towards:?} {server}: {part}");
    eprintln!("{what}");
    let cluster = common::cluster();
    // Before any connection is made that could be used again.
    let fault = Fault::interpose(&cluster, server).await;
    let admin = cluster.connect("postgres").await;
    admin
        .batch_execute("create table t (id int primary key, v int); insert into t values (1, 0), (2, 0)")
        .await
        .unwrap();
    let mut clients = Vec::new();
    for _ in 0..2 {
        let client = cluster.connect("postgres").await;
        client.batch_execute(&format!("set default_transaction_isolation = '{isolation}'")).await.unwrap();
        clients.push(client);
    }
    let (block, single) = (clients.pop().unwrap(), clients.pop().unwrap());
    block.batch_execute("begin; update t set v = v + 1 where id = 2").await.unwrap();
    let held = fault.hold(towards, tag, part);
    let single =
        tokio::spawn(async move { (single.execute("update t set v = v + 1 where id = 1", &[]).await, single) });
    held.reached().await;
    // A member that is not known to be current yet does not take over: the leader's restart would be waited for.
    cluster.wait_well().await;
    let second = fault.hold(towards, tag, part);
    let block = tokio::spawn(async move { (block.batch_execute("commit").await, block) });
    second.reached().await;
    cluster.kill_postgres(0);
    held.cut();
    second.cut();
    wait_leader(&cluster, 1).await;
    let (told, single) = single.await.unwrap();
    assert_eq!(told.unwrap_or_else(|e| panic!("{what}: {e:?}\n{}", cluster.logs())), 1, "{what}");
    let (told, block) = block.await.unwrap();
    let v = async |id: i32| -> i32 { single.query_one("select v from t where id = $1", &[&id]).await.unwrap().get(0) };
    assert_eq!(v(1).await, 1, "{what}: done once");
    match told {
        Ok(()) => assert_eq!(v(2).await, 1, "{what}"),
        Err(error) => {
            assert_eq!((state(&error), v(2).await), ("40001", 0), "{what}: {error:?}");
            assert!(!is_prepared, "{what}: every member held it");
            block.batch_execute("begin; update t set v = v + 1 where id = 2; commit").await.unwrap();
        }
    }
    let left: i64 = cluster
        .connect_node(1, "postgres")
        .await
        .query_one("select count(*) from pg_prepared_xacts", &[])
        .await
        .unwrap()
        .get(0);
    assert_eq!(left, 0, "{what}");
    cluster.recover(0);
    cluster.assert_identical().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_commit_under_way_is_answered() {
    for (message, is_prepared) in [
        ((1, Towards::Server, b'P', "PREPARE TRANSACTION"), false),
        ((1, Towards::Client, b'C', "PREPARE TRANSACTION"), true),
        ((0, Towards::Server, b'B', "pgtandem_commit"), true),
        ((0, Towards::Client, b'C', "COMMIT"), true),
    ] {
        lost_at("read committed", message, is_prepared).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_serializable_commit_under_way_is_answered() {
    for (message, is_prepared) in [
        ((0, Towards::Client, b'C', "PREPARE TRANSACTION"), false),
        ((1, Towards::Client, b'C', "PREPARE TRANSACTION"), true),
        ((0, Towards::Client, b'C', "COMMIT PREPARED"), true),
    ] {
        lost_at("serializable", message, is_prepared).await;
    }
}

/// Every process of the leader's PostgreSQL stands still.
#[tokio::test(flavor = "multi_thread")]
async fn a_leader_that_hangs_counts_as_lost() {
    let cluster = common::cluster();
    cluster.configure("leader_ms_max = 10000", "leader_ms_max = 1000").await;
    let load = Load::start(&cluster).await;
    load.writes(&cluster, 100).await;
    let stopped = cluster.signal_postgres(0, rustix::process::Signal::STOP);
    load.writes(&cluster, 200).await;
    wait_leader(&cluster, 1).await;
    for pid in &stopped {
        // What still ran has ended meanwhile, perhaps.
        let _ = rustix::process::kill_process(*pid, rustix::process::Signal::CONT);
    }
    load.writes(&cluster, 100).await;
    cluster.recover(0);
    cluster.wait_well().await;
    load.finish(&cluster).await;
}

/// The proxy is started again while another host's PostgreSQL leads; both servers are lost one after the other.
#[tokio::test(flavor = "multi_thread")]
async fn the_proxy_starts_again_with_the_leader_elsewhere() {
    let cluster = common::cluster();
    let admin = cluster.connect("postgres").await;
    admin.batch_execute("create table t (id serial primary key, v int); insert into t (v) values (1)").await.unwrap();
    cluster.kill_postgres(0);
    wait_leader(&cluster, 1).await;
    cluster.kill_proxy();
    cluster.start_proxy(0);
    wait_leader(&cluster, 1).await;
    cluster.connect("postgres").await.batch_execute("insert into t (v) values (2)").await.unwrap();
    // Nobody else has everything: its own restart is waited for, and clients with it.
    let client = cluster.connect("postgres").await;
    cluster.kill_postgres(1);
    client.batch_execute("insert into t (v) values (3)").await.unwrap();
    cluster.recover(0);
    cluster.kill_proxy();
    cluster.start_proxy(0);
    cluster.wait_well().await;
    assert_eq!(cluster.leader(), 1);
    let rows = cluster.connect_node(0, "postgres").await.query("select v from t order by v", &[]).await.unwrap();
    assert_eq!(rows.iter().map(|row| row.get::<_, i32>(0)).collect::<Vec<_>>(), [1, 2, 3]);
    cluster.assert_identical().await;
    // A planned change back to the proxy's own host: its sessions go on.
    let client = cluster.connect("postgres").await;
    client.batch_execute("set work_mem = '7MB'").await.unwrap();
    let switched = cluster.command(&["switch", "node0"]);
    assert!(switched.status.success(), "{}\n{}", common::text(&switched), cluster.logs());
    assert_eq!(shown(&client, "show work_mem").await, "7MB");
    client.batch_execute("insert into t (v) values (4)").await.unwrap();
    cluster.wait_well().await;
    assert_eq!(cluster.leader(), 0);
    cluster.assert_identical().await;
}

/// The hosts of the leader and of the other follower are cut off, one shortly after the other: that the first is just being taken out, which the
/// leader is to be told, does not keep the proxy's own host from taking over.
#[tokio::test(flavor = "multi_thread")]
async fn it_is_lost_while_a_follower_is_taken_out() {
    let cluster = Cluster::up(&["--nodes", "3"]);
    cluster.configure("leader_ms_max = 10000", "leader_ms_max = 1000").await;
    cluster.configure("follower_ms_max = 30000", "follower_ms_max = 1000").await;
    let load = Load::start(&cluster).await;
    load.writes(&cluster, 100).await;
    cluster.kill_postgres(0);
    wait_leader(&cluster, 1).await;
    load.writes(&cluster, 100).await;
    cluster.recover(0);
    cluster.wait_well().await;
    cluster.signal_agent(2, rustix::process::Signal::STOP);
    let is_leaving = async || {
        let log = std::fs::read_to_string(cluster.layout.proxy_log()).unwrap_or_default();
        log.lines().any(|line| line.contains("follower leaves the member set") && line.contains("node2"))
    };
    wait_for("node2 is taken out", is_leaving).await;
    cluster.signal_agent(1, rustix::process::Signal::STOP);
    wait_leader(&cluster, 0).await;
    load.writes(&cluster, 100).await;
    for index in [1, 2] {
        cluster.signal_agent(index, rustix::process::Signal::CONT);
        cluster.recover(index);
    }
    cluster.wait_well().await;
    load.finish(&cluster).await;
}
