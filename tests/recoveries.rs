//! Recoveries that meet each other, and one that takes long: none waits for another without a limit, each says where it is, and clients notice
//! nothing.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test that panics has failed")]

mod common;

use std::process::{Child, Output};

use common::ask::{run, run_all};
use common::fault::{Fault, Towards};
use common::{Cluster, load, text, wait_for};
use pgtandem::sandbox::{Layout, slow};

/// Three nodes; a follower that is lost stays away.
async fn three() -> Cluster {
    let cluster = Cluster::up(&["--nodes", "3"]);
    cluster.stay_away().await;
    cluster
}

/// Its agent and its PostgreSQL are gone, and are known to be; then its agent runs again.
async fn lose(cluster: &Cluster, indexes: &[usize]) {
    for index in indexes {
        cluster.kill_agent(*index);
        cluster.kill_postgres(*index);
    }
    for index in indexes {
        cluster.wait_member(*index, false).await;
        cluster.start_agent(*index);
    }
}

fn begin(cluster: &Cluster, index: usize) -> Child {
    cluster.start(&["recover", &Layout::node_name(index), "--yes"])
}

/// Waits until this `recover` has succeeded.
fn succeeds(cluster: &Cluster, recover: Child) -> Output {
    let output = recover.wait_with_output().unwrap();
    assert!(output.status.success(), "{}\n{}", text(&output), cluster.logs());
    output
}

/// The phases in which the nodes' recoveries are, as `status --json` has them.
fn phases(cluster: &Cluster) -> Vec<String> {
    let output = cluster.command(&["status", "--json"]);
    let status: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap_or_default();
    let phase = |node: &serde_json::Value| node["recovery"]["phase"].as_str().unwrap_or_default().to_owned();
    status["nodes"].as_array().map(|nodes| nodes.iter().map(phase).collect()).unwrap_or_default()
}

async fn wait_phase(cluster: &Cluster, index: usize, phase: &str) {
    let there = async || phases(cluster).get(index).is_some_and(|now| now == phase);
    assert!(common::comes(there).await, "node{index} is not {phase}\n{}\n{}", cluster.status().0, cluster.logs());
}

#[tokio::test(flavor = "multi_thread")]
async fn two_are_recovered_at_once() {
    let cluster = three().await;
    let probe = load::start(&cluster).await;
    lose(&cluster, &[1, 2]).await;
    let recovers = [begin(&cluster, 1), begin(&cluster, 2)];
    let both = async || {
        let phases = phases(&cluster);
        [1, 2].iter().all(|index| phases.get(*index).is_some_and(|phase| !phase.is_empty()))
    };
    wait_for("status says both", both).await;
    for recover in recovers {
        let said = text(&succeeds(&cluster, recover));
        assert!(said.contains("is a member again"), "{said}");
    }
    load::wait_writes(&cluster, &probe, 50).await;
    cluster.wait_well().await;
    let seen = load::finish(&cluster, probe).await;
    load::assert_unharmed(&cluster, &seen);
}

/// While one leaves recovery, another one is filled and joins: neither has to wait for the other.
#[tokio::test(flavor = "multi_thread")]
async fn a_node_is_recovered_while_another_one_is_in_its_cutover() {
    let cluster = three().await;
    let probe = load::start(&cluster).await;
    slow::leave_recovery_slowly(&cluster.layout, 1, 20).unwrap();
    lose(&cluster, &[1, 2]).await;
    let first = begin(&cluster, 1);
    wait_phase(&cluster, 1, "leaving_recovery").await;
    let second = begin(&cluster, 2);
    succeeds(&cluster, second);
    assert_eq!(phases(&cluster)[1], "leaving_recovery", "the first one is where it was");
    load::wait_writes(&cluster, &probe, 50).await;
    succeeds(&cluster, first);
    cluster.wait_well().await;
    let seen = load::finish(&cluster, probe).await;
    load::assert_unharmed(&cluster, &seen);
}

/// Code that runs once on every server waits for a join. It must not have to wait for the next one, and the one after that.
#[tokio::test(flavor = "multi_thread")]
async fn code_that_waits_for_a_join_does_not_wait_for_the_next_one() {
    let cluster = three().await;
    let client = cluster.connect("postgres").await;
    run(&client, "create table t (id int primary key)").await;
    run(&client, "create function f(i int) returns void language plpgsql as 'begin insert into t values (i); end'")
        .await;
    for index in [1, 2] {
        slow::leave_recovery_slowly(&cluster.layout, index, 8).unwrap();
    }
    lose(&cluster, &[1, 2]).await;
    let first = begin(&cluster, 1);
    wait_phase(&cluster, 1, "leaving_recovery").await;
    let called = tokio::spawn(async move {
        run(&client, "select f(1)").await;
        client
    });
    let second = begin(&cluster, 2);
    succeeds(&cluster, first);
    let client = called.await.unwrap();
    assert_ne!(phases(&cluster)[2], "member", "the second one is not through yet");
    succeeds(&cluster, second);
    run(&client, "select f(2)").await;
    cluster.wait_well().await;
    cluster.assert_identical().await;
}

/// One is filled while another one comes back by itself.
#[tokio::test(flavor = "multi_thread")]
async fn a_node_is_recovered_while_another_one_comes_back() {
    let cluster = Cluster::up(&["--nodes", "3"]);
    let probe = load::start(&cluster).await;
    for index in [1, 2] {
        cluster.kill_agent(index);
        cluster.kill_postgres(index);
    }
    for index in [1, 2] {
        cluster.wait_member(index, false).await;
    }
    load::wait_writes(&cluster, &probe, 1000).await;
    cluster.start_agent(2);
    let recover = begin(&cluster, 2);
    wait_phase(&cluster, 2, "seeding").await;
    cluster.start_agent(1);
    succeeds(&cluster, recover);
    cluster.wait_member(1, true).await;
    cluster.wait_well().await;
    let seen = load::finish(&cluster, probe).await;
    load::assert_unharmed(&cluster, &seen);
}

/// The loss of a member is just being recorded, and that takes long: a node that is to be let in waits for it, and says so.
#[tokio::test(flavor = "multi_thread")]
async fn a_join_that_has_to_wait_says_for_what() {
    let cluster = three().await;
    slow::leave_recovery_slowly(&cluster.layout, 1, 5).unwrap();
    lose(&cluster, &[1]).await;
    let recover = begin(&cluster, 1);
    let log = cluster.layout.node_dir(1).join("postgresql.log");
    let promoted = || std::fs::read_to_string(&log).unwrap_or_default().matches("received promote request").count();
    let before = promoted();
    wait_for("it leaves recovery", async || promoted() > before).await;
    // The smaller set is stored on the leader first.
    cluster.signal_agent(0, rustix::process::Signal::STOP);
    cluster.kill_agent(2);
    cluster.kill_postgres(2);
    wait_for("status says for what it waits", async || {
        cluster.status().0.contains("joining  (another change of the member set is made first)")
    })
    .await;
    cluster.signal_agent(0, rustix::process::Signal::CONT);
    succeeds(&cluster, recover);
    cluster.wait_member(2, false).await;
    cluster.start_agent(2);
    cluster.recover(2);
    cluster.wait_well().await;
    cluster.assert_identical().await;
}

/// PostgreSQL of a node stands still when it is to be let in: the loss of another one is recorded all the same, and the recovery ends.
#[tokio::test(flavor = "multi_thread")]
async fn one_that_stands_still_when_it_is_to_be_let_in_holds_nobody_up() {
    let cluster = three().await;
    slow::leave_recovery_slowly(&cluster.layout, 1, 5).unwrap();
    lose(&cluster, &[1]).await;
    let first = begin(&cluster, 1);
    wait_phase(&cluster, 1, "leaving_recovery").await;
    let fault = Fault::interpose(&cluster, 1).await;
    let asked = fault.hold(Towards::Server, b'Q', "pg_control_system");
    asked.reached().await;
    assert_eq!(phases(&cluster)[1], "joining");
    cluster.kill_agent(2);
    cluster.kill_postgres(2);
    cluster.wait_member(2, false).await;
    let client = cluster.connect("postgres").await;
    run(&client, "create table t (id int primary key)").await;
    asked.release();
    let output = first.wait_with_output().unwrap();
    drop(fault);
    if !output.status.success() {
        assert!(text(&output).contains("did not answer in time"), "{}", text(&output));
        cluster.recover(1);
    }
    cluster.start_agent(2);
    cluster.recover(2);
    cluster.wait_well().await;
    cluster.assert_identical().await;
}

/// PostgreSQL takes long to leave recovery: commits go on, what they did waits in the backlog and is applied.
#[tokio::test(flavor = "multi_thread")]
async fn a_node_that_takes_long_to_leave_recovery_is_not_noticed() {
    let cluster = common::cluster();
    cluster.stay_away().await;
    let probe = load::start(&cluster).await;
    slow::leave_recovery_slowly(&cluster.layout, 1, 6).unwrap();
    lose(&cluster, &[1]).await;
    let output = cluster.command(&["recover", "node1", "--json"]);
    assert!(output.status.success(), "{}\n{}", text(&output), cluster.logs());
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    let last: serde_json::Value = serde_json::from_str(said.lines().last().unwrap()).unwrap();
    let recovery = &last["result"]["recovery"];
    assert!(recovery["phase_ms"]["leaving_recovery"].as_f64().unwrap() >= 6000.0, "{recovery}");
    let (peak, applied) = (recovery["backlog_peak"].as_u64().unwrap(), recovery["backlog_applied"].as_u64().unwrap());
    assert!(peak > 100 && applied >= peak, "the backlog grew and was applied: {recovery}");
    cluster.wait_well().await;
    let seen = load::finish(&cluster, probe).await;
    load::assert_unharmed(&cluster, &seen);
}

/// Commits take longer while the files are brought: the leader is read slower, which is said, until they are as fast as before.
#[tokio::test(flavor = "multi_thread")]
async fn a_fill_reads_slower_while_commits_take_too_long() {
    let cluster = common::cluster();
    cluster.stay_away().await;
    cluster.configure("fill_bytes_per_s_max = 0", "fill_bytes_per_s_max = 20971520").await;
    cluster.kill_agent(0);
    cluster.configure("fill_latency_percent_max = 0", "fill_latency_percent_max = 300").await;
    let client = cluster.connect("postgres").await;
    run(&client, "create table wide (id int primary key, v text)").await;
    run(&client, "insert into wide select g, repeat(md5(g::text), 40) from generate_series(1, 150000) g").await;
    let probe = load::start(&cluster).await;
    lose(&cluster, &[1]).await;
    load::wait_writes(&cluster, &probe, 500).await;
    let recover = begin(&cluster, 1);
    wait_for("files are compared", async || cluster.status().0.contains("/s, about")).await;
    let leader = cluster.connect_node(0, "postgres").await;
    run_all(
        &leader,
        &["alter system set commit_delay = 40000", "alter system set commit_siblings = 0", "select pg_reload_conf()"],
    )
    .await;
    wait_for("it is slowed down", async || cluster.status().0.contains("held to ")).await;
    run_all(
        &leader,
        &["alter system reset commit_delay", "alter system reset commit_siblings", "select pg_reload_conf()"],
    )
    .await;
    succeeds(&cluster, recover);
    cluster.wait_well().await;
    let seen = load::finish(&cluster, probe).await;
    load::assert_unharmed(&cluster, &seen);
}
