//! pgbench in all three query modes: the servers are identical after each.

mod common;

use std::process::Command;

use common::{Cluster, text};

/// Transactions per client.
const TRANSACTIONS: &str = "150";

fn pgbench(cluster: &Cluster, arguments: &[&str]) -> String {
    let mut command = Command::new(cluster.layout.plan.bin_dir.join("pgbench"));
    command.args(["-h", "127.0.0.1", "-U", "postgres", "-p", &cluster.layout.proxy_port().to_string()]);
    let output = command.args(arguments).arg("bench").output().expect("pgbench");
    assert!(output.status.success(), "pgbench {arguments:?}: {}\n{}", text(&output), cluster.logs());
    text(&output)
}

#[tokio::test(flavor = "multi_thread")]
async fn every_query_mode_leaves_identical_servers() {
    let cluster = Cluster::up(&["--scale", "1"]);
    cluster.assert_identical().await;
    for mode in ["simple", "extended", "prepared"] {
        let said = pgbench(&cluster, &["-n", "-M", mode, "-c", "4", "-j", "2", "-t", TRANSACTIONS]);
        assert!(said.contains("number of failed transactions: 0"), "{said}");
        cluster.assert_identical().await;
        pgbench(&cluster, &["-n", "-S", "-M", mode, "-c", "4", "-t", TRANSACTIONS]);
    }
    // Every transaction is there, once.
    let client = cluster.connect_node(1, "bench").await;
    let rows: i64 = client.query_one("select count(*) from pgbench_history", &[]).await.unwrap().get(0);
    assert_eq!(rows, 3 * 4 * 150);
    // Initialised again, over what is there, with both nodes members.
    pgbench(&cluster, &["-i", "-q", "-s", "2"]);
    cluster.assert_identical().await;
}
