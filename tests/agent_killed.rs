//! An agent is killed under load and started again: no client notices, whichever node it is.

mod common;

use common::load;

#[tokio::test(flavor = "multi_thread")]
async fn the_leaders() {
    let cluster = common::cluster();
    let probe = load::start(&cluster).await;
    cluster.kill_agent(0);
    load::wait_writes(&cluster, &probe, 50).await;
    let (status, _) = cluster.status();
    assert!(status.contains("the agent of the leader node0 can not be reached"), "{status}");
    assert!(status.contains("pgtandem agent --node node0"), "{status}");
    cluster.start_again();
    load::wait_writes(&cluster, &probe, 50).await;
    cluster.wait_well().await;
    let seen = load::finish(&cluster, probe).await;
    load::assert_unharmed(&cluster, &seen);
}

/// The agent is also the door to the follower's PostgreSQL: without it the node leaves, and with it it comes back.
#[tokio::test(flavor = "multi_thread")]
async fn the_followers() {
    let cluster = common::cluster();
    let probe = load::start(&cluster).await;
    cluster.kill_agent(1);
    cluster.wait_member(1, false).await;
    load::wait_writes(&cluster, &probe, 50).await;
    let (status, _) = cluster.status();
    assert!(status.contains("node1 is out, and its agent can not be reached"), "{status}");
    assert!(status.contains("pgtandem agent --node node1; it joins again by itself"), "{status}");
    cluster.start_again();
    cluster.wait_member(1, true).await;
    load::wait_writes(&cluster, &probe, 50).await;
    let seen = load::finish(&cluster, probe).await;
    load::assert_unharmed(&cluster, &seen);
    cluster.wait_well().await;
}

/// A smaller member set can not be stored without the leader's agent: commits wait for it, and none fails.
#[tokio::test(flavor = "multi_thread")]
async fn the_leaders_while_the_follower_is_lost() {
    let cluster = common::cluster();
    let probe = load::start(&cluster).await;
    cluster.kill_agent(0);
    cluster.kill_postgres(1);
    cluster.start_again();
    load::wait_writes(&cluster, &probe, 50).await;
    cluster.recover(1);
    let seen = load::finish(&cluster, probe).await;
    load::assert_unharmed(&cluster, &seen);
    cluster.wait_well().await;
}
