//! The proxy, or everything at once, is killed under load and started again: every acknowledged write is on every member,
//! and nothing is left prepared.

mod common;

use common::load;

#[tokio::test(flavor = "multi_thread")]
async fn the_proxy_is_killed() {
    let cluster = common::cluster();
    let probe = load::start(&cluster).await;
    for _ in 0..3 {
        cluster.kill_proxy();
        let (status, code) = cluster.status();
        assert!(status.contains("the proxy is not running: clients can not connect"), "{status}");
        assert_eq!(code, Some(3), "{status}");
        cluster.start_again();
        load::wait_writes(&cluster, &probe, 50).await;
    }
    let seen = load::finish(&cluster, probe).await;
    load::assert_errors(&seen, &load::LOST);
    cluster.wait_well().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn everything_is_killed_at_once() {
    let cluster = common::cluster();
    let probe = load::start(&cluster).await;
    cluster.kill_proxy();
    for index in 0..2 {
        cluster.kill_agent(index);
        cluster.kill_postgres(index);
    }
    cluster.start_again();
    load::wait_writes(&cluster, &probe, 50).await;
    let seen = load::finish(&cluster, probe).await;
    load::assert_errors(&seen, &load::LOST);
    cluster.wait_well().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn taken_down_and_up_again() {
    let cluster = common::cluster();
    let probe = load::start(&cluster).await;
    let output = common::pgtandem().args(["sandbox", "down", "--dir"]).arg(cluster.dir()).output().expect("pgtandem");
    assert!(output.status.success(), "{}", common::text(&output));
    cluster.start_again();
    load::wait_writes(&cluster, &probe, 50).await;
    load::finish(&cluster, probe).await;
    cluster.wait_well().await;
}
