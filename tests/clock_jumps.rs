//! H10 of the catalogue: the clocks on the walls jump by a day, differently on each host, while leases run and a host is lost. Leases run on
//! clocks that know no time of day, so neither goes on without the other too early, and whoever is cut off says so.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test that panics has failed")]

mod common;

use std::time::{Duration, Instant, SystemTime};

use common::clock::Clock;
use common::writer::Writers;
use common::{Cluster, comes, text};
use pgtandem::agent::client::Control;
use pgtandem::agent::record::peek;
use pgtandem::agent::tls::Identity;
use pgtandem_proto::message::{NodeStatus, Reply, Request};
use rustix::process::Signal;

const WRITERS: i64 = 3;
const DAY: u64 = 24 * 3600;

/// Two hosts, each with a clock of its own; everything on them goes by it.
struct Hosts {
    cluster: Cluster,
    clocks: [Clock; 2],
}

impl Hosts {
    async fn new() -> Self {
        let cluster = common::cluster();
        let clocks = [Clock::new(&cluster, "node0"), Clock::new(&cluster, "node1")];
        let hosts = Self { cluster, clocks };
        hosts.cluster.lose_host(0);
        hosts.cluster.kill_agent(1);
        hosts.cluster.kill_postgres(1);
        hosts.cluster.write_setting("follower_ms_max = 30000", "follower_ms_max = 1000");
        hosts.start_agent(1);
        hosts.start_host(0);
        hosts.cluster.wait_well().await;
        hosts
    }

    fn start_agent(&self, index: usize) {
        self.cluster.start_agent_in(index, &self.clocks[index].environment());
    }

    fn start_host(&self, index: usize) {
        self.start_agent(index);
        self.cluster.start_proxy_in(index, &self.clocks[index].environment());
    }

    /// What the agent says of its node.
    async fn status(&self, index: usize) -> NodeStatus {
        let node = self.cluster.layout.config().nodes.remove(index);
        let identity = Identity::load(&self.cluster.layout.proxy_dir()).unwrap();
        let mut control = Control::connect(&identity, &node).await.unwrap();
        match control.request(&Request::Status).await.unwrap() {
            Reply::Status(status) => *status,
            other => panic!("{other:?}"),
        }
    }

    /// How far the clock of a node's PostgreSQL, which its agent has started, is off: about so many days.
    async fn days_off(&self, index: usize) -> i64 {
        let client = self.cluster.connect_node(index, "postgres").await;
        let sql = "select extract(epoch from clock_timestamp())::bigint";
        let theirs: i64 = client.query_one(sql, &[]).await.unwrap().get(0);
        let ours = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_secs();
        let day = i64::try_from(DAY).unwrap();
        (theirs - i64::try_from(ours).unwrap() + day / 2).div_euclid(day)
    }

    /// Members of the set that is durable on the node.
    fn recorded(&self, index: usize) -> Vec<String> {
        let record = peek(&self.cluster.layout.node_dir(index)).unwrap();
        record.members.map(|set| set.nodes).unwrap_or_default()
    }

    /// The clocks jump, and nothing comes of it.
    async fn jump(&self, writers: &Writers, by: [&str; 2], days: [i64; 2]) {
        for (clock, by) in self.clocks.iter().zip(by) {
            clock.jump(by);
        }
        assert_eq!([self.days_off(0).await, self.days_off(1).await], days);
        writers.wait(&self.cluster, 50).await;
        self.cluster.wait_well().await;
        assert_eq!(self.recorded(0), ["node0", "node1"]);
        assert_eq!(writers.take_errors(), Vec::<String>::new());
    }
}

/// The follower is cut off. Nothing is acknowledged without it while its lease runs, whatever the clocks say; then its agent knows that it
/// may have been left behind.
#[tokio::test(flavor = "multi_thread")]
async fn a_follower_is_cut_off_while_clocks_jump() {
    let hosts = Hosts::new().await;
    let cluster = &hosts.cluster;
    let mut writers = Writers::start(cluster, WRITERS).await;
    for (by, days) in [(["+1d", "-1d"], [1, -1]), (["-1d", "+1d"], [-1, 1]), (["+0", "+0"], [0, 0])] {
        hosts.jump(&writers, by, days).await;
    }
    for by in [["+1d", "-1d"], ["-1d", "+1d"]] {
        let asked = Instant::now();
        let left = hosts.status(1).await.lease_ms.expect("a lease");
        cluster.signal_agent(1, Signal::STOP);
        for (clock, by) in hosts.clocks.iter().zip(by) {
            clock.jump(by);
        }
        assert!(comes(async || hosts.recorded(0) == ["node0"]).await, "{}", cluster.logs());
        assert!(asked.elapsed() >= Duration::from_millis(left), "the lease of node1 was not waited out");
        writers.wait(cluster, 50).await;
        cluster.signal_agent(1, Signal::CONT);
        let knows = async || {
            let status = hosts.status(1).await;
            status.lease_ms.is_none() && (status.record.uncertain || hosts.recorded(1) == ["node0"])
        };
        assert!(comes(knows).await, "node1 believes in a lease\n{}", cluster.logs());
        cluster.wait_well().await;
        assert_eq!(writers.take_errors(), Vec::<String>::new());
    }
    writers.stop().await;
    cluster.assert_identical().await;
    writers.check(cluster, 0..2, "at the end").await;
}

/// The leader's host is lost. However far the follower's clock goes back meanwhile, its lease ends, and a person can promote it.
#[tokio::test(flavor = "multi_thread")]
async fn the_leaders_host_is_lost_while_clocks_jump() {
    let hosts = Hosts::new().await;
    let cluster = &hosts.cluster;
    let mut writers = Writers::start(cluster, WRITERS).await;
    hosts.jump(&writers, ["-1d", "+1d"], [-1, 1]).await;
    assert!(hosts.status(1).await.lease_ms.is_some());
    cluster.lose_host(0);
    hosts.clocks[0].jump("+1d");
    hosts.clocks[1].jump("-1d");
    let knows = async || {
        let status = hosts.status(1).await;
        status.lease_ms.is_none() && status.record.uncertain
    };
    assert!(comes(knows).await, "node1 believes in a lease\n{}", cluster.logs());
    let output = cluster.command(&["promote", "--node", "node1", "--peer-is-dead", "node0", "--yes"]);
    assert!(output.status.success(), "{}\n{}", text(&output), cluster.logs());
    cluster.start_proxy_in(1, &hosts.clocks[1].environment());
    writers.wait(cluster, 50).await;
    hosts.start_agent(0);
    let output = cluster.command(&["recover", "node0"]);
    assert!(output.status.success(), "{}\n{}", text(&output), cluster.logs());
    writers.wait(cluster, 50).await;
    writers.stop().await;
    cluster.wait_well().await;
    cluster.assert_identical().await;
    writers.check(cluster, 0..2, "at the end").await;
}
