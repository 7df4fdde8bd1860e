//! kill -9 of an agent, a PostgreSQL or the proxy in a phase of a recovery, while a client writes. Afterwards the node is a
//! whole member, or it is none and can not be taken for one; the same command brings it back. No acknowledged write is lost.
//!
//! `make kill-phases ROUNDS=200 SEED=7` for as long as it takes; a few rounds run with every test.

mod common;

use std::io::BufRead;

use common::Cluster;
use common::writer::Writers;
use pgtandem::agent::client::Control;
use pgtandem::agent::tls::Identity;
use pgtandem_proto::membership::NodeState;
use pgtandem_proto::message::{PostgresState, Reply, Request};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

const PHASES: [&str; 6] = ["seeding", "catching_up", "cut", "leaving_recovery", "draining", "joining"];

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Victim {
    LeadersAgent,
    NodesAgent,
    LeadersPostgres,
    NodesPostgres,
    Proxy,
}

const VICTIMS: [Victim; 5] =
    [Victim::LeadersAgent, Victim::NodesAgent, Victim::LeadersPostgres, Victim::NodesPostgres, Victim::Proxy];

fn number(name: &str, default: u64) -> u64 {
    std::env::var(name).map_or(default, |text| text.parse().unwrap_or_else(|_| panic!("{name} is a number")))
}

/// Starts a recovery and kills the victim as soon as the phase is told. -> whether the phase came
fn recover_and_kill(cluster: &Cluster, phase: &str, victim: Victim) -> bool {
    let mut child = cluster.start(&["recover", "node1", "--yes", "--json"]);
    let stdout = child.stdout.take().expect("standard output");
    let mut came = false;
    for line in std::io::BufReader::new(stdout).lines() {
        let line = line.expect("a line");
        if !came && line.contains(&format!("\"phase\":\"{phase}\"")) {
            came = true;
            kill(cluster, victim);
        }
    }
    child.wait().expect("the command ends");
    came
}

fn kill(cluster: &Cluster, victim: Victim) {
    match victim {
        Victim::LeadersAgent => cluster.kill_agent(0),
        Victim::NodesAgent => cluster.kill_agent(1),
        Victim::LeadersPostgres => cluster.kill_postgres(0),
        // While files are brought it does not run.
        Victim::NodesPostgres if !cluster.layout.postmaster_pid_file(1).exists() => {}
        Victim::NodesPostgres => cluster.kill_postgres(1),
        Victim::Proxy => cluster.kill_proxy(),
    }
}

/// A node that is no member does not say that it is in sync, and what has no `pg_control` does not run.
async fn assert_no_half_member(cluster: &Cluster, what: &str) {
    let Ok(members) = pgtandem::sandbox::control::members(&cluster.layout).await else { return };
    if members.iter().any(|member| member == "node1") {
        return;
    }
    let node = cluster.layout.config().nodes.remove(1);
    let identity = Identity::load(&cluster.layout.proxy_dir()).expect("certificates");
    // Its agent may be what was killed.
    if let Ok(mut control) = Control::connect(&identity, &node).await
        && let Ok(Reply::Status(status)) = control.request(&Request::Status).await
    {
        let sure = status.record.state == NodeState::InSync && !status.record.uncertain;
        assert!(!sure, "{what}: it is no member and does not know it");
        let whole = node.pgdata.join("global/pg_control").exists();
        assert!(whole || status.postgres != PostgresState::Running, "{what}: a half copy runs");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn whoever_is_killed_in_whatever_phase() {
    let (rounds, seed) = (number("KILL_ROUNDS", 3), number("KILL_SEED", 1));
    let mut random = StdRng::seed_from_u64(seed);
    let cluster = Cluster::up(&["--scale", "1"]);
    let mut writer = Writers::start(&cluster, 1).await;
    for round in 0..rounds {
        let phase = PHASES[random.random_range(0..PHASES.len())];
        let victim = VICTIMS[random.random_range(0..VICTIMS.len())];
        let what = format!("seed {seed}, round {round}: {victim:?} in {phase}");
        let came = recover_and_kill(&cluster, phase, victim);
        eprintln!("{what}{}", if came { "" } else { ": the phase was over before it was told" });
        cluster.start_again();
        writer.wait(&cluster, 5).await;
        assert_no_half_member(&cluster, &what).await;
        let members = pgtandem::sandbox::control::members(&cluster.layout).await.expect("the proxy answers");
        if !members.iter().any(|member| member == "node1") {
            cluster.recover(1);
        }
        writer.wait(&cluster, 5).await;
    }
    writer.stop().await;
    cluster.wait_well().await;
    cluster.assert_identical().await;
    writer.check(&cluster, 0..2, "at the end").await;
}
