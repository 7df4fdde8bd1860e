//! A follower that was away briefly becomes a member again by itself: without a copy, and without a person.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test that panics has failed")]

mod common;

use std::path::Path;

use common::ask::{run, run_all, same, state, value};
use common::fault::{Fault, Towards};
use common::{Cluster, load, text, wait_for};

/// How often a server is killed in a row: once more, and it is kept out for a while.
const KILLS: usize = pgtandem::replicate::flapping::FREE + 1;

fn log(cluster: &Cluster) -> String {
    std::fs::read_to_string(cluster.layout.proxy_log()).unwrap_or_default()
}

/// Waits until nodes have become members again that often, without a copy.
async fn wait_again(cluster: &Cluster, count: usize) {
    let came = async || log(cluster).matches("is a member again, without a copy").count() >= count;
    assert!(common::comes(came).await, "not in time\n{}\n{}", cluster.status().0, cluster.logs());
}

/// Waits until the status has all of this.
async fn wait_status(cluster: &Cluster, parts: &[&str]) {
    let says = async || {
        let status = cluster.status().0;
        parts.iter().all(|part| status.contains(part))
    };
    assert!(common::comes(says).await, "{parts:?} not in\n{}\n{}", cluster.status().0, cluster.logs());
}

/// The node is filled as ever, and then everything is the same.
async fn recovers(cluster: &Cluster) {
    cluster.recover(1);
    cluster.wait_well().await;
    cluster.assert_identical().await;
    assert!(!log(cluster).contains("without a copy"), "{}", log(cluster));
}

/// Its agent and its PostgreSQL are gone, and are known to be.
async fn lose(cluster: &Cluster) {
    cluster.kill_agent(1);
    cluster.end_postgres(1).await;
    cluster.wait_member(1, false).await;
}

/// Runs something in a server of the node that nobody looks after: what happened there while it was away.
async fn meddle(cluster: &Cluster, sql: &str) {
    let pg_ctl = |arguments: &[&str]| {
        let mut command = common::running_as_user(&cluster.layout.plan.bin_dir.join("pg_ctl"));
        let log = cluster.layout.pgdata(1).join("by_hand.log");
        command.arg("-D").arg(cluster.layout.pgdata(1)).arg("-w").arg("-l").arg(&log).args(arguments);
        let output = command.stdin(std::process::Stdio::null()).output().unwrap();
        let log = std::fs::read_to_string(log).unwrap_or_default();
        assert!(output.status.success(), "{}\n{log}", text(&output));
    };
    pg_ctl(&["start"]);
    run(&cluster.connect_node(1, "postgres").await, sql).await;
    pg_ctl(&["stop", "-m", "fast"]);
}

fn copy(from: &Path, to: &Path) {
    let _ = std::fs::remove_dir_all(to);
    let output = std::process::Command::new("cp").arg("-a").arg(from).arg(to).output().unwrap();
    assert!(output.status.success(), "{}", text(&output));
}

#[tokio::test(flavor = "multi_thread")]
async fn its_postgresql_is_killed_again_and_again() {
    let cluster = common::cluster();
    let probe = load::start(&cluster).await;
    for round in 1..=KILLS {
        cluster.kill_postgres(1);
        wait_again(&cluster, round).await;
        load::wait_writes(&cluster, &probe, 50).await;
    }
    cluster.kill_postgres(1);
    wait_status(&cluster, &["it came back 6 times within 10 minutes and was lost again: it is kept out for 10 s"])
        .await;
    wait_again(&cluster, KILLS + 1).await;
    cluster.wait_well().await;
    let seen = load::finish(&cluster, probe).await;
    load::assert_unharmed(&cluster, &seen);
}

#[tokio::test(flavor = "multi_thread")]
async fn its_postgresql_is_restarted_by_hand() {
    let cluster = common::cluster();
    let probe = load::start(&cluster).await;
    // Its agent starts it, too: one of both does.
    let mut command = common::running_as_user(&cluster.layout.plan.bin_dir.join("pg_ctl"));
    command.arg("-D").arg(cluster.layout.pgdata(1)).args(["restart", "-w", "-m", "fast", "-l", "/dev/null"]);
    let restarted = command.stdin(std::process::Stdio::null()).spawn().unwrap();
    wait_again(&cluster, 1).await;
    cluster.wait_well().await;
    drop(restarted.wait_with_output());
    let seen = load::finish(&cluster, probe).await;
    load::assert_unharmed(&cluster, &seen);
}

/// The network between proxy and follower is cut: nothing is answered, and nothing ends.
#[tokio::test(flavor = "multi_thread")]
async fn nothing_comes_through_to_it_for_a_while() {
    let cluster = common::cluster();
    cluster.configure("follower_ms_max = 30000", "follower_ms_max = 1000").await;
    let probe = load::start(&cluster).await;
    cluster.signal_agent(1, rustix::process::Signal::STOP);
    cluster.wait_member(1, false).await;
    load::wait_writes(&cluster, &probe, 100).await;
    wait_status(&cluster, &["node1 is out", "what it misses is kept", "it joins again by itself"]).await;
    cluster.signal_agent(1, rustix::process::Signal::CONT);
    wait_again(&cluster, 1).await;
    cluster.wait_well().await;
    let seen = load::finish(&cluster, probe).await;
    load::assert_unharmed(&cluster, &seen);
}

/// Its agent is killed and started again; meanwhile everything is done that a backlog can have.
#[tokio::test(flavor = "multi_thread")]
async fn all_kinds_of_changes_are_made_while_it_is_away() {
    let cluster = common::cluster();
    let client = cluster.connect("postgres").await;
    run(&client, "create database other").await;
    let other = cluster.connect("other").await;
    let open = cluster.connect("postgres").await;
    run(&client, "create table t (id serial primary key, v text, at timestamptz default clock_timestamp())").await;
    run(&client, "insert into t (v) select 'before ' || g from generate_series(1, 50) g").await;
    run(&other, "create table o (id int primary key)").await;
    run(&open, "create table kept (v text primary key)").await;
    run(&open, "begin; insert into kept values ('open all the while')").await;
    cluster.kill_agent(1);
    cluster.wait_member(1, false).await;
    run_all(
        &client,
        &[
            "create schema s; create table s.child (id int generated always as identity primary key, t int references t)",
            "insert into s.child (t) select id from t where id > 10",
            "alter table t add column u uuid default gen_random_uuid()",
            "delete from t where id < 10 and id not in (select t from s.child)",
            "update t set v = v || random()::text where id % 2 = 0",
            "select lo_from_bytea(4711, 'a large object')",
            "select setval('t_id_seq', 5000)",
            "insert into t (v) values ('after setval')",
            "create role away_role; grant select on t to away_role",
            "truncate s.child; drop schema s cascade",
            "begin isolation level serializable; insert into t (v) select max(v) from t; commit",
            "begin; insert into t (v) values ('undone'); rollback",
            // Too much for one message, and for one set of rows.
            "create table large (id int primary key, v text)",
            "insert into large select g, repeat(md5(g::text), 40) from generate_series(1, 20000) g",
            "vacuum t",
        ],
    )
    .await;
    run(&other, "insert into o select generate_series(1, 300)").await;
    run(&open, "insert into kept values ('still open'); commit").await;
    wait_status(&cluster, &["node1 is out", "what it misses is kept", "pgtandem agent --node node1"]).await;
    cluster.start_agent(1);
    wait_again(&cluster, 1).await;
    cluster.wait_well().await;
    run(&client, "insert into t (v) values ('a member again')").await;
    cluster.assert_identical().await;
    assert_eq!(same(&cluster, "other", "select count(*) from o").await, "300");
    assert_eq!(same(&cluster, "postgres", "select count(*) from large").await, "20000");
    assert_eq!(same(&cluster, "postgres", "select count(*) from kept").await, "2");
    same(&cluster, "postgres", "select md5(string_agg(t::text, ',' order by id)) from t").await;
}

/// Transactions are brought many in one, and what one of them leaves to the end of its own would be in the way of another.
#[tokio::test(flavor = "multi_thread")]
async fn a_constraint_is_checked_at_the_end_of_a_transaction_and_the_table_truncated_in_the_next() {
    let cluster = common::cluster();
    let client = cluster.connect("postgres").await;
    run(&client, "create table t (id int primary key deferrable initially deferred, v text)").await;
    run(&client, "insert into t select g, g from generate_series(1, 9) g").await;
    cluster.kill_agent(1);
    cluster.wait_member(1, false).await;
    run_all(&client, &["update t set id = id + 1", "truncate t", "insert into t values (1, 'after it')"]).await;
    cluster.start_agent(1);
    wait_again(&cluster, 1).await;
    assert_eq!(same(&cluster, "postgres", "select v from t").await, "after it");
    cluster.assert_identical().await;
}

/// It is killed while it is brought what it missed, its PostgreSQL and its agent in turn: what was applied and what was not is told by its
/// marks.
#[tokio::test(flavor = "multi_thread")]
async fn it_is_killed_on_its_way_back() {
    let cluster = common::cluster();
    let probe = load::start(&cluster).await;
    let begun = async || log(&cluster).matches("is brought what it missed").count();
    lose(&cluster).await;
    load::wait_writes(&cluster, &probe, 2000).await;
    cluster.start_agent(1);
    for round in 1..=4 {
        assert!(common::comes(async || begun().await >= round).await, "{}\n{}", cluster.status().0, cluster.logs());
        if round % 2 == 0 {
            cluster.kill_agent(1);
            load::wait_writes(&cluster, &probe, 500).await;
            cluster.start_agent(1);
        } else {
            cluster.kill_postgres(1);
        }
    }
    wait_again(&cluster, 1).await;
    cluster.wait_well().await;
    let seen = load::finish(&cluster, probe).await;
    load::assert_unharmed(&cluster, &seen);
}

/// A person is impatient: the recovery goes before what is under way, and nothing half done is left by that.
#[tokio::test(flavor = "multi_thread")]
async fn a_recovery_goes_before_a_return_that_is_under_way() {
    let cluster = common::cluster();
    let client = cluster.connect("postgres").await;
    client.batch_execute("create table wide (id int primary key, v text); insert into wide select i, i from generate_series(1, 60000) i").await.unwrap();
    lose(&cluster).await;
    let statements = "update wide set v = v || 'x';".repeat(4);
    client.batch_execute(&format!("begin; {statements} commit")).await.unwrap();
    cluster.start_agent(1);
    let begun = async || log(&cluster).contains("is brought what it missed");
    assert!(common::comes(begun).await, "{}\n{}", cluster.status().0, cluster.logs());
    cluster.recover(1);
    cluster.wait_well().await;
    cluster.assert_identical().await;
}

/// Its PostgreSQL stands still when it is just let in: what becomes of others is not kept waiting by that.
#[tokio::test(flavor = "multi_thread")]
async fn one_that_stands_still_on_its_way_back_holds_nobody_up() {
    let cluster = Cluster::up(&["--nodes", "3"]);
    let client = cluster.connect("postgres").await;
    client.batch_execute("create table wide (id int primary key, v text); insert into wide select i, i from generate_series(1, 60000) i").await.unwrap();
    cluster.kill_agent(2);
    cluster.kill_postgres(2);
    cluster.wait_member(2, false).await;
    let statements = "update wide set v = v || 'x';".repeat(4);
    client.batch_execute(&format!("begin; {statements} commit")).await.unwrap();
    cluster.start_agent(2);
    let begun = async || log(&cluster).contains("is brought what it missed");
    assert!(common::comes(begun).await, "{}\n{}", cluster.status().0, cluster.logs());
    let stopped = cluster.signal_postgres(2, rustix::process::Signal::STOP);
    cluster.kill_agent(1);
    cluster.kill_postgres(1);
    cluster.wait_member(1, false).await;
    client.batch_execute("update wide set v = 'y' where id = 1").await.unwrap();
    for pid in stopped {
        // What still ran has ended meanwhile, perhaps.
        let _ = rustix::process::kill_process(pid, rustix::process::Signal::CONT);
    }
    cluster.start_agent(1);
    wait_again(&cluster, 2).await;
    cluster.wait_well().await;
    cluster.assert_identical().await;
}

/// Both followers are lost at once; each comes back.
#[tokio::test(flavor = "multi_thread")]
async fn two_come_back() {
    let cluster = Cluster::up(&["--nodes", "3"]);
    let probe = load::start(&cluster).await;
    for index in [1, 2] {
        cluster.kill_agent(index);
        cluster.kill_postgres(index);
    }
    for index in [1, 2] {
        cluster.wait_member(index, false).await;
    }
    load::wait_writes(&cluster, &probe, 50).await;
    for index in [2, 1] {
        cluster.start_agent(index);
    }
    wait_again(&cluster, 2).await;
    cluster.wait_well().await;
    let seen = load::finish(&cluster, probe).await;
    load::assert_unharmed(&cluster, &seen);
    // Its record and its database must agree on the generation when it starts the next time.
    cluster.kill_postgres(1);
    wait_again(&cluster, 3).await;
    cluster.wait_well().await;
}

/// It holds a transaction prepared that was decided without it, and another one that nobody committed.
#[tokio::test(flavor = "multi_thread")]
async fn what_it_held_prepared_is_decided() {
    let cluster = common::cluster();
    let fault = Fault::interpose(&cluster, 1).await;
    let client = cluster.connect("postgres").await;
    run(&client, "create table t (v text primary key)").await;
    cluster.assert_identical().await;
    let finish = fault.hold(Towards::Server, b'Q', "COMMIT PREPARED");
    run(&client, "insert into t values ('committed')").await;
    finish.reached().await;
    // A gid of ours that no mark has reached: as if its COMMIT had failed on the leader.
    let node = cluster.connect_node(1, "postgres").await;
    let gid: String = value(&node, "select gid from pg_prepared_xacts").await;
    let (begin, _) = gid.rsplit_once(':').unwrap();
    let (begin, _) = begin.rsplit_once(':').unwrap();
    run(&node, &format!("begin; create table never (); prepare transaction '{begin}:99:7'")).await;
    cluster.kill_postgres(1);
    drop(node);
    wait_again(&cluster, 1).await;
    run(&client, "insert into t values ('later')").await;
    cluster.assert_identical().await;
    assert_eq!(same(&cluster, "postgres", "select string_agg(v, ' ' order by v) from t").await, "committed later");
    assert_eq!(same(&cluster, "postgres", "select to_regclass('never') is null").await, "t");
}

#[tokio::test(flavor = "multi_thread")]
async fn after_its_time_it_has_to_be_recovered() {
    let cluster = common::cluster();
    cluster.configure("away_s_max = 600", "away_s_max = 1").await;
    let client = cluster.connect("postgres").await;
    run(&client, "create table t (id int primary key)").await;
    cluster.kill_agent(1);
    // Until then it may read for itself, as its last lease says.
    wait_status(&cluster, &["commits wait, because node1 is just taken out of the member set"]).await;
    cluster.wait_member(1, false).await;
    assert!(!cluster.status().0.contains("just taken out"));
    run(&client, "insert into t values (1)").await;
    wait_status(&cluster, &["it was away for longer than 1 s (proxy.away_s_max)", "then: pgtandem recover node1"])
        .await;
    cluster.start_agent(1);
    wait_status(&cluster, &["node1 left the member set", "away_s_max", "next: pgtandem recover node1"]).await;
    recovers(&cluster).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn past_its_size_it_has_to_be_recovered() {
    let cluster = common::cluster();
    cluster.configure("away_bytes_max = 268435456", "away_bytes_max = 1048576").await;
    let client = cluster.connect("postgres").await;
    run(&client, "create table t (id int primary key, v text)").await;
    cluster.kill_agent(1);
    cluster.wait_member(1, false).await;
    run(&client, "insert into t select g, repeat('x', 1000) from generate_series(1, 2000) g").await;
    wait_status(&cluster, &["more than 1 MiB were written meanwhile (proxy.away_bytes_max)"]).await;
    cluster.start_agent(1);
    wait_status(&cluster, &["node1 left the member set", "next: pgtandem recover node1"]).await;
    recovers(&cluster).await;
}

/// What no backlog has.
#[tokio::test(flavor = "multi_thread")]
async fn a_database_is_made_while_it_is_away() {
    let cluster = common::cluster();
    let client = cluster.connect("postgres").await;
    cluster.kill_agent(1);
    cluster.wait_member(1, false).await;
    run(&client, "create database other").await;
    wait_status(&cluster, &["a statement outside transactions"]).await;
    cluster.start_agent(1);
    wait_status(&cluster, &["node1 left the member set", "next: pgtandem recover node1"]).await;
    recovers(&cluster).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_prepares_a_transaction_while_it_is_away() {
    let cluster = common::cluster();
    let client = cluster.connect("postgres").await;
    run(&client, "create table t (id int primary key)").await;
    cluster.kill_agent(1);
    cluster.wait_member(1, false).await;
    run(&client, "begin; insert into t values (1); prepare transaction 'mine'").await;
    assert_eq!(state(&client, "commit prepared 'mine'").await, "ok");
    cluster.start_agent(1);
    wait_status(&cluster, &["node1 left the member set", "PREPARE TRANSACTION", "next: pgtandem recover node1"]).await;
    recovers(&cluster).await;
}

/// It runs once on every server, and can not be done again.
#[tokio::test(flavor = "multi_thread")]
async fn code_is_called_while_it_is_away() {
    let cluster = common::cluster();
    cluster.configure("unproven = \"refuse\"", "unproven = \"allow\"").await;
    let client = cluster.connect("postgres").await;
    run(&client, "create table t (id int primary key, v int); insert into t values (1, 1)").await;
    let change = "create procedure change() language plpgsql as $$ begin execute 'update t set v = v + 1'; end $$";
    run(&client, change).await;
    cluster.kill_agent(1);
    cluster.wait_member(1, false).await;
    run(&client, "call change()").await;
    wait_status(&cluster, &["a statement that calls or fires code came meanwhile"]).await;
    cluster.start_agent(1);
    wait_status(&cluster, &["node1 left the member set", "next: pgtandem recover node1"]).await;
    recovers(&cluster).await;
    assert_eq!(same(&cluster, "postgres", "select v from t").await, "2");
}

/// Its server lost a transaction that it had committed, as with `fsync = off`.
#[tokio::test(flavor = "multi_thread")]
async fn one_that_lost_a_transaction_stays_out() {
    let cluster = common::cluster();
    let client = cluster.connect("postgres").await;
    run(&client, "create table t (id int primary key)").await;
    run(&client, "insert into t values (1)").await;
    cluster.assert_identical().await;
    lose(&cluster).await;
    meddle(&cluster, "update pgtandem.mark set n = n - 1 where n = (select max(n) from pgtandem.mark)").await;
    run(&client, "insert into t values (2)").await;
    run(&client, "insert into t values (3)").await;
    cluster.start_agent(1);
    wait_status(&cluster, &["what it misses is not kept", "node1 left the member set", "next: pgtandem recover"]).await;
    recovers(&cluster).await;
}

/// The same, and nothing comes after it that would have to follow: the marks as a whole are compared.
#[tokio::test(flavor = "multi_thread")]
async fn one_that_lost_the_last_transaction_stays_out() {
    let cluster = common::cluster();
    let client = cluster.connect("postgres").await;
    run(&client, "create table t (id int primary key)").await;
    cluster.assert_identical().await;
    lose(&cluster).await;
    meddle(&cluster, "update pgtandem.mark set n = n - 1 where n = (select max(n) from pgtandem.mark)").await;
    cluster.start_agent(1);
    wait_status(&cluster, &["its marks in database postgres are not the leader's", "next: pgtandem recover"]).await;
    recovers(&cluster).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn one_that_has_what_the_leader_has_not_stays_out() {
    let cluster = common::cluster();
    let client = cluster.connect("postgres").await;
    run(&client, "create table t (id int primary key)").await;
    cluster.assert_identical().await;
    lose(&cluster).await;
    meddle(&cluster, "update pgtandem.mark set n = n + 1 where n = (select max(n) from pgtandem.mark)").await;
    cluster.start_agent(1);
    wait_status(&cluster, &["that the leader does not know", "next: pgtandem recover node1"]).await;
    recovers(&cluster).await;
}

/// Its data directory is that of a backup, of the same reign.
#[tokio::test(flavor = "multi_thread")]
async fn a_restored_one_stays_out() {
    let cluster = common::cluster();
    let client = cluster.connect("postgres").await;
    run(&client, "create table t (id int primary key)").await;
    let (pgdata, backup) = (cluster.layout.pgdata(1), cluster.dir().join("backup"));
    lose(&cluster).await;
    copy(&pgdata, &backup);
    cluster.start_agent(1);
    wait_again(&cluster, 1).await;
    run(&client, "insert into t values (1)").await;
    cluster.assert_identical().await;
    lose(&cluster).await;
    copy(&backup, &pgdata);
    let _ = std::fs::remove_file(pgdata.join("postmaster.pid"));
    cluster.start_agent(1);
    wait_status(&cluster, &["what it misses is not kept", "next: pgtandem recover node1"]).await;
    cluster.recover(1);
    cluster.assert_identical().await;
    assert_eq!(same(&cluster, "postgres", "select count(*) from t").await, "1");
}

#[tokio::test(flavor = "multi_thread")]
async fn unlogged_tables_may_be_empty_after_its_restart() {
    let cluster = common::cluster();
    let client = cluster.connect("postgres").await;
    run(&client, "create unlogged table u (id int primary key)").await;
    cluster.kill_postgres(1);
    wait_status(&cluster, &["has unlogged tables", "next: pgtandem recover node1"]).await;
    run(&client, "drop table u").await;
    recovers(&cluster).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn one_that_a_person_detaches_or_recovers_does_not_come_back_by_itself() {
    let cluster = common::cluster();
    cluster.kill_agent(1);
    cluster.wait_member(1, false).await;
    let detached = cluster.command(&["detach", "node1"]);
    assert!(detached.status.success(), "{}", text(&detached));
    cluster.start_agent(1);
    wait_status(&cluster, &["node1 left the member set", "it was detached", "next: pgtandem recover node1"]).await;
    cluster.recover(1);
    cluster.kill_agent(1);
    cluster.wait_member(1, false).await;
    // Its agent answers from now on, and both want it: whoever is first, it is filled.
    cluster.start_agent(1);
    cluster.recover(1);
    cluster.wait_well().await;
    cluster.assert_identical().await;
}

/// A new reign has nothing of what the old one kept.
#[tokio::test(flavor = "multi_thread")]
async fn the_proxy_is_started_again_while_it_is_away() {
    let cluster = common::cluster();
    cluster.kill_agent(1);
    cluster.wait_member(1, false).await;
    cluster.kill_proxy();
    cluster.start_proxy(0);
    wait_for("the proxy answers", async || cluster.status().0.contains("node1 is out")).await;
    cluster.start_agent(1);
    wait_status(&cluster, &["node1 left the member set", "next: pgtandem recover node1"]).await;
    recovers(&cluster).await;
}
