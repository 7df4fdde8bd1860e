//! Clients that write and read while something is killed, and what must hold afterwards.

use std::time::Duration;

use pgtandem::sandbox::probe::{self, Probe, Seen, Settings};

use super::{Cluster, LIMIT};

pub const WRITERS: usize = 4;
pub const READERS: usize = 2;

/// Starts the clients; returns when they write.
pub async fn start(cluster: &Cluster) -> Probe {
    let port = cluster.layout.proxy_port();
    probe::prepare(port, "postgres", WRITERS).await.expect("the probe's tables");
    let health_check = Some(Duration::from_millis(100));
    let settings = Settings { port, database: "postgres".into(), writers: WRITERS, readers: READERS, health_check };
    let probe = Probe::start(&settings).await.expect("the probe connects");
    wait_writes(cluster, &probe, 100).await;
    probe
}

pub async fn wait_writes(cluster: &Cluster, probe: &Probe, more: u64) {
    assert!(probe.wait_writes(more, LIMIT).await, "no writes\n{}", cluster.logs());
}

/// Stops the clients. Both servers must hold the same rows, every acknowledged write, none that was told to have failed, and
/// nothing prepared.
pub async fn finish(cluster: &Cluster, probe: Probe) -> Seen {
    let seen = probe.finish().await;
    cluster.recover_all().await;
    cluster.assert_identical().await;
    for index in 0..2 {
        let client = cluster.connect_node(index, "postgres").await;
        let rows = client.query("select n from probe_counter order by id", &[]).await.expect("counters");
        let counters: Vec<i64> = rows.iter().map(|row| row.get(0)).collect();
        let wrong = seen.check_counters(&format!("node{index}"), &counters);
        assert_eq!(wrong, Vec::<String>::new(), "{:#?}\n{}", seen.first_errors(40), cluster.logs());
    }
    seen
}

pub fn assert_unharmed(cluster: &Cluster, seen: &Seen) {
    assert_eq!(seen.errors(), 0, "{:#?}\n{}", seen.first_errors(10), cluster.logs());
    assert_eq!(seen.disconnects(), 0);
}

/// Every error that a client saw must begin with one of these.
pub fn assert_errors(seen: &Seen, allowed: &[&str]) {
    for (at, text) in seen.first_errors(usize::MAX) {
        assert!(allowed.iter().any(|begin| text.starts_with(begin)), "at {at:?}: {text}");
    }
}

/// What a client may see when its connection to the proxy or the proxy itself is lost: the driver's words.
pub const LOST: [&str; 3] = ["connection closed", "error communicating with the server", "error connecting to server"];
/// What a client may see when its backend ends. `connection closed` is what the driver makes of a FATAL that comes between two
/// statements. `ERROR 40001`: the leader was lost with it.
pub const LEADER_LOST: [&str; 5] = ["FATAL 57P01", "FATAL 40001", "FATAL 57P03", "connection closed", "ERROR 40001"];
