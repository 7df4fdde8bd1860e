//! The leader's host is lost, and another one takes over: every acknowledged write is there, and the old host never serves again
//! before it is filled.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test that panics has failed")]

mod common;

use common::fault::{Fault, Towards};
use common::{Cluster, load, text, wait_for};
use pgtandem::sandbox::compare;

const STATED: [&str; 6] = ["promote", "--node", "node1", "--peer-is-dead", "node0", "--yes"];

fn promote(cluster: &Cluster) {
    let output = cluster.command(&STATED);
    assert!(output.status.success(), "{}", text(&output));
    assert!(text(&output).contains("node1 is the leader"), "{}", text(&output));
}

async fn wait_served(cluster: &Cluster) {
    wait_for("the proxy serves", async || compare::connect(cluster.layout.proxy_port(), "postgres").await.is_ok())
        .await;
}

/// The SQLSTATE with which a proxy refuses its clients.
async fn refusal(port: u16) -> String {
    let settings = format!("host=127.0.0.1 port={port} user=postgres dbname=postgres");
    let error = tokio_postgres::connect(&settings, tokio_postgres::NoTls).await.err().expect("a refusal");
    error.code().map_or_else(|| error.to_string(), |code| code.code().to_owned())
}

async fn value(client: &tokio_postgres::Client, sql: &str) -> String {
    client.query_one(sql, &[]).await.unwrap_or_else(|error| panic!("{sql}: {error:?}")).get(0)
}

#[tokio::test(flavor = "multi_thread")]
async fn the_host_of_the_leader_is_lost_and_comes_back() {
    let cluster = common::cluster();
    let probe = load::start(&cluster).await;
    cluster.lose_host(0);

    // Nothing is done without a statement about the silent node.
    let asked = cluster.command(&["promote", "--node", "node1", "--yes"]);
    assert_eq!(asked.status.code(), Some(1), "{}", text(&asked));
    assert!(text(&asked).contains("pgtandem promote --node node1 --peer-is-dead node0"), "{}", text(&asked));
    let dry = cluster.command(&["promote", "--node", "node1", "--dry-run"]);
    assert!(dry.status.success() && text(&dry).contains("node1 was in sync"), "{}", text(&dry));
    let (status, _) = cluster.status();
    assert!(status.contains("leader node0"), "nothing was written:\n{status}");

    promote(&cluster);
    cluster.start_proxy(1);
    load::wait_writes(&cluster, &probe, 100).await;

    // The old host comes back: it is told that it was left behind, and its proxy refuses.
    cluster.start_again();
    let status_of = || cluster.status().0;
    wait_for("node0 is told", async || status_of().contains("stale")).await;
    let old = cluster.other_proxy(0);
    wait_for("the old proxy refuses", async || {
        text(&cluster.command_with(&old.config, &["status"])).contains("the proxy of this host runs and serves nobody")
    })
    .await;
    assert_eq!(refusal(old.port).await, "57P03");

    cluster.recover(0);
    cluster.wait_member(0, true).await;
    let seen = load::finish(&cluster, probe).await;
    load::assert_errors(&seen, &load::LOST);
    cluster.wait_well().await;
}

/// What the follower holds prepared when the leader's host is lost: acknowledged, undecided, and never prepared; sequences; and what a
/// client has prepared itself.
#[tokio::test(flavor = "multi_thread")]
async fn transactions_in_doubt_are_resolved_without_the_leader() {
    let cluster = common::cluster();
    // Connections of before do not go through the faults.
    let (leader, follower) = (Fault::interpose(&cluster, 0).await, Fault::interpose(&cluster, 1).await);
    let client = cluster.connect("postgres").await;
    client.batch_execute("create table t (id serial primary key, v text unique)").await.unwrap();
    for _ in 0..40 {
        client.batch_execute("insert into t (v) values (gen_random_uuid())").await.unwrap();
    }
    let write = async |v: &str| (cluster.connect("postgres").await, format!("insert into t (v) values ('{v}')"));
    let send =
        |(client, sql): (tokio_postgres::Client, String)| tokio::spawn(async move { client.batch_execute(&sql).await });
    let prepared = cluster.connect("postgres").await;
    prepared
        .batch_execute("begin; insert into t (v) values ('by the client'); prepare transaction 'shop 1'")
        .await
        .unwrap();

    let acknowledged = follower.hold(Towards::Server, b'Q', "COMMIT PREPARED");
    send(write("acknowledged").await).await.unwrap().unwrap();
    acknowledged.reached().await;
    let undecided = leader.hold(Towards::Server, b'B', "pgtandem_commit");
    let unknown = send(write("undecided").await);
    undecided.reached().await;
    let unprepared = follower.hold(Towards::Server, b'P', "PREPARE TRANSACTION");
    let lost = send(write("unprepared").await);
    unprepared.reached().await;
    cluster.lose_host(0);
    for held in [acknowledged, undecided, unprepared] {
        held.cut();
    }
    assert!(unknown.await.unwrap().is_err() && lost.await.unwrap().is_err());

    promote(&cluster);
    cluster.start_proxy(1);
    wait_served(&cluster).await;
    let client = cluster.connect("postgres").await;
    // Nobody was told that the undecided one failed, and it may have been decided: it is there. The other one can not have been.
    let there = value(
        &client,
        "select string_agg(v, ',' order by v) from t where v in ('acknowledged', 'undecided', 'unprepared')",
    );
    assert_eq!(there.await, "acknowledged,undecided");
    let server = cluster.connect_node(1, "postgres").await;
    assert_eq!(value(&server, "select string_agg(gid, ',') from pg_prepared_xacts").await, "shop 1");
    client.batch_execute("commit prepared 'shop 1'").await.unwrap();
    assert_eq!(value(&client, "select count(*)::text from t where v = 'by the client'").await, "1");
    // No value of the sequence is given twice.
    for _ in 0..40 {
        client.batch_execute("insert into t (v) values (gen_random_uuid())").await.unwrap();
    }
    drop((leader, follower));
    cluster.start_again();
    wait_for("node0 is told", async || cluster.status().0.contains("stale")).await;
    cluster.recover(0);
    cluster.assert_identical().await;
    cluster.wait_well().await;
}

/// H9, and H3 without the fork: the leader's proxy hangs through a takeover and wakes up: it acknowledges nothing more.
#[tokio::test(flavor = "multi_thread")]
async fn a_proxy_that_hung_through_a_takeover_acknowledges_nothing() {
    let cluster = common::cluster();
    let client = cluster.connect("postgres").await;
    client.batch_execute("create table t (v text primary key); insert into t values ('before')").await.unwrap();
    let open = cluster.connect("postgres").await;
    open.batch_execute("begin; insert into t values ('open')").await.unwrap();
    cluster.signal_proxy(rustix::process::Signal::STOP);

    // The leases that it granted run out first.
    let dry = cluster.command(&["promote", "--node", "node1", "--dry-run"]);
    assert!(text(&dry).contains("promote node1: SAFE\n"), "{}", text(&dry));
    let output = cluster.command(&["promote", "--node", "node1", "--yes"]);
    assert!(output.status.success(), "{}", text(&output));
    let new = cluster.other_proxy(1);
    wait_for("the new proxy serves", async || compare::connect(new.port, "postgres").await.is_ok()).await;
    let on_new = compare::connect(new.port, "postgres").await.unwrap();
    on_new.batch_execute("insert into t values ('after')").await.unwrap();

    cluster.signal_proxy(rustix::process::Signal::CONT);
    assert!(open.batch_execute("commit").await.is_err());
    assert!(client.batch_execute("insert into t values ('stale')").await.is_err());
    wait_for("the old proxy serves nobody", async || {
        compare::connect(cluster.layout.proxy_port(), "postgres").await.is_err()
    })
    .await;
    assert_eq!(value(&on_new, "select string_agg(v, ',' order by v) from t").await, "after,before");
    cluster.assert_identical().await;
    let status = text(&cluster.command_with(&new.config, &["status"]));
    assert!(status.contains("All is well: every write is on node0, node1."), "{status}");
}

/// H3: the statement was false. Both sides have writes of their own; neither is lost, and only one serves.
#[tokio::test(flavor = "multi_thread")]
async fn a_false_statement_makes_a_fork_that_is_kept() {
    let cluster = common::cluster();
    let client = cluster.connect("postgres").await;
    client.batch_execute("create table t (v text primary key)").await.unwrap();
    // node1 does not hear that it was left behind.
    cluster.kill_agent(1);
    cluster.wait_member(1, false).await;
    client.batch_execute("insert into t values ('on node0 alone')").await.unwrap();
    cluster.lose_host(0);
    cluster.start_agent(1);
    promote(&cluster);
    cluster.start_proxy(1);
    wait_served(&cluster).await;
    cluster.connect("postgres").await.batch_execute("insert into t values ('on node1 alone')").await.unwrap();

    cluster.start_agent(0);
    let status = || cluster.status().0;
    wait_for("node0 is a fork", async || status().contains("forked") && status().contains("discard-fork node0")).await;
    let recover = cluster.command(&["recover", "node0"]);
    assert!(!recover.status.success() && text(&recover).contains("pgtandem discard-fork node0"), "{}", text(&recover));
    let asked = cluster.command(&["discard-fork", "node0"]);
    assert!(!asked.status.success() && text(&asked).contains("--yes"), "{}", text(&asked));
    let discarded = cluster.command(&["discard-fork", "node0", "--yes"]);
    assert!(discarded.status.success(), "{}", text(&discarded));
    let aside = std::fs::read_dir(cluster.layout.node_dir(0)).unwrap().flatten().map(|entry| entry.path());
    let aside = aside.filter(|path| path.to_string_lossy().contains("pgdata.forked-")).collect::<Vec<_>>();
    assert!(aside.len() == 1 && aside[0].join("PG_VERSION").exists(), "{aside:?}");
    cluster.recover(0);
    cluster.assert_identical().await;
    cluster.wait_well().await;
}

/// H6, H4: a node that is known to be stale is promoted only by somebody who accepts the loss.
#[tokio::test(flavor = "multi_thread")]
async fn a_stale_node_is_promoted_only_at_an_accepted_loss() {
    let cluster = common::cluster();
    let client = cluster.connect("postgres").await;
    client.batch_execute("create table t (v text primary key); insert into t values ('both')").await.unwrap();
    let detach = cluster.command(&["detach", "node1"]);
    assert!(detach.status.success(), "{}", text(&detach));
    client.batch_execute("insert into t values ('lost')").await.unwrap();
    cluster.lose_host(0);
    let refused = cluster.command(&STATED);
    assert_eq!(refused.status.code(), Some(1), "{}", text(&refused));
    assert!(text(&refused).contains("--accept-data-loss"), "{}", text(&refused));
    let lossy = cluster.command(&["promote", "--node", "node1", "--accept-data-loss", "--yes", "--json"]);
    assert!(lossy.status.success(), "{}", text(&lossy));
    let report: serde_json::Value = serde_json::from_slice(&lossy.stdout).unwrap();
    assert_eq!((report["case"].as_str(), report["promoted"].as_bool()), (Some("lossy"), Some(true)), "{report}");
    cluster.start_proxy(1);
    wait_served(&cluster).await;
    let client = cluster.connect("postgres").await;
    assert_eq!(value(&client, "select string_agg(v, ',') from t").await, "both");
    // The other side has the only copy of what was lost.
    cluster.start_agent(0);
    wait_for("node0 is a fork", async || cluster.status().0.contains("forked")).await;
}

/// H1, H2: nobody is promoted while a proxy serves; and a member that is lost with its agent, so that it can not be told, is waited for
/// as long as its lease may run, without an error.
#[tokio::test(flavor = "multi_thread")]
async fn leases_are_believed_and_waited_out() {
    let cluster = common::cluster();
    cluster.wait_well().await;
    let refused = cluster.command(&["promote", "--node", "node1", "--peer-is-dead", "node0", "--yes"]);
    assert_eq!(refused.status.code(), Some(1), "{}", text(&refused));
    assert!(text(&refused).contains("pgtandem switch node1"), "{}", text(&refused));
    let probe = load::start(&cluster).await;
    cluster.kill_agent(1);
    cluster.kill_postgres(1);
    cluster.wait_member(1, false).await;
    load::wait_writes(&cluster, &probe, 50).await;
    // It doubts, is told, and comes back by itself.
    cluster.start_agent(1);
    cluster.wait_member(1, true).await;
    let seen = load::finish(&cluster, probe).await;
    load::assert_unharmed(&cluster, &seen);
    cluster.wait_well().await;
}
