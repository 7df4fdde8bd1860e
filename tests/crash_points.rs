//! The proxy is killed, or its connection to a server cut, at chosen messages of a commit: G2 to G9 of the catalogue, and the same for
//! SERIALIZABLE, where the leader prepares, too. Afterwards the transaction is on all servers or on none, as the leader decided, and
//! the client was told nothing else.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test that panics has failed")]

mod common;

use common::Cluster;
use common::fault::{Fault, Held, Towards};
use tokio_postgres::Client;

const LEADER: usize = 0;
const FOLLOWER: usize = 1;

struct Scene {
    cluster: Cluster,
    faults: [Fault; 2],
    serializable: bool,
    /// What the row must hold now.
    v: i32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Blow {
    KillProxy,
    Cut,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Becomes {
    Committed,
    RolledBack,
}

type Told = tokio::task::JoinHandle<Result<u64, tokio_postgres::Error>>;

impl Scene {
    async fn new(serializable: bool) -> Self {
        let cluster = common::cluster();
        let faults = [Fault::interpose(&cluster, LEADER).await, Fault::interpose(&cluster, FOLLOWER).await];
        let client = cluster.connect("postgres").await;
        client.batch_execute("create table t (id int primary key, v int); insert into t values (1, 0)").await.unwrap();
        Self { cluster, faults, serializable, v: 0 }
    }

    fn hold(&self, server: usize, towards: Towards, tag: u8, part: &str) -> Held {
        self.faults[server].hold(towards, tag, part)
    }

    /// A client that changes the row and waits for the answer.
    async fn write(&self) -> Told {
        let client = self.cluster.connect("postgres").await;
        if self.serializable {
            client.batch_execute("set default_transaction_isolation = 'serializable'").await.unwrap();
        }
        tokio::spawn(async move { client.execute("update t set v = v + 1 where id = 1", &[]).await })
    }

    async fn client(&self) -> Client {
        self.cluster.connect("postgres").await
    }

    async fn check(&mut self, what: &str, told: Told, becomes: Becomes) {
        self.v += i32::from(becomes == Becomes::Committed);
        match told.await.unwrap() {
            Ok(_) => assert_eq!(becomes, Becomes::Committed, "{what}: told that it was committed"),
            Err(error) if error.as_db_error().is_some() => {
                assert_eq!(becomes, Becomes::RolledBack, "{what}: told that it failed: {error:?}");
            }
            // It lost its connection and does not know.
            Err(_) => {}
        }
        self.cluster.wait_member(1, true).await;
        self.cluster.assert_identical().await;
        let v: i32 = self.client().await.query_one("select v from t", &[]).await.unwrap().get(0);
        assert_eq!(v, self.v, "{what}");
    }

    /// One message, what happens at it, and what must have become of the transaction.
    async fn at(&mut self, message: (usize, Towards, u8, &str), blow: Blow, becomes: Becomes) {
        let what = format!("{blow:?} at {message:?}");
        eprintln!("{what}");
        let (server, towards, tag, part) = message;
        let held = self.hold(server, towards, tag, part);
        let told = self.write().await;
        held.reached().await;
        match blow {
            Blow::KillProxy => {
                self.cluster.kill_proxy();
                held.cut();
                self.cluster.start_again();
            }
            Blow::Cut => held.cut(),
        }
        self.check(&what, told, becomes).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_proxy_is_killed_at_a_message() {
    let mut scene = Scene::new(false).await;
    for (message, becomes) in [
        // G1 to G3: nothing was decided.
        ((FOLLOWER, Towards::Server, b'P', "PREPARE TRANSACTION"), Becomes::RolledBack),
        ((FOLLOWER, Towards::Client, b'C', "PREPARE TRANSACTION"), Becomes::RolledBack),
        ((LEADER, Towards::Server, b'B', "pgtandem_commit"), Becomes::RolledBack),
        // G4, G5: the leader committed, and nobody heard of it.
        ((LEADER, Towards::Client, b'C', "COMMIT"), Becomes::Committed),
        // G6, G7: the client was told, the follower holds it prepared or has just finished.
        ((FOLLOWER, Towards::Server, b'Q', "COMMIT PREPARED"), Becomes::Committed),
        ((FOLLOWER, Towards::Client, b'C', "COMMIT PREPARED"), Becomes::Committed),
    ] {
        scene.at(message, Blow::KillProxy, becomes).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_leaders_connection_is_cut_at_a_message() {
    let mut scene = Scene::new(false).await;
    for (message, becomes) in [
        ((LEADER, Towards::Server, b'B', "pgtandem_commit"), Becomes::RolledBack),
        ((LEADER, Towards::Client, b'C', "COMMIT"), Becomes::Committed),
    ] {
        scene.at(message, Blow::Cut, becomes).await;
    }

    // G8: "failed" is told only once it is rolled back everywhere.
    let lost = scene.hold(LEADER, Towards::Server, b'B', "pgtandem_commit");
    let undone = scene.hold(FOLLOWER, Towards::Server, b'Q', "ROLLBACK PREPARED");
    let told = scene.write().await;
    lost.reached().await;
    lost.cut();
    undone.reached().await;
    assert!(!told.is_finished(), "told before the follower had rolled back");
    undone.release();
    scene.check("G8", told, Becomes::RolledBack).await;
    let undone = scene.hold(FOLLOWER, Towards::Client, b'C', "ROLLBACK PREPARED");
    let lost = scene.hold(LEADER, Towards::Server, b'B', "pgtandem_commit");
    let told = scene.write().await;
    lost.reached().await;
    lost.cut();
    undone.reached().await;
    scene.cluster.kill_proxy();
    undone.cut();
    scene.cluster.start_again();
    scene.check("G8, and the proxy killed", told, Becomes::RolledBack).await;
}

/// G9: killed again while the next epoch finishes what the first one left.
#[tokio::test(flavor = "multi_thread")]
async fn the_proxy_is_killed_while_it_resolves() {
    let mut scene = Scene::new(false).await;
    let held = scene.hold(FOLLOWER, Towards::Server, b'Q', "COMMIT PREPARED");
    let told = scene.write().await;
    held.reached().await;
    scene.cluster.kill_proxy();
    held.cut();
    for (towards, tag) in [(Towards::Server, b'Q'), (Towards::Client, b'C')] {
        let held = scene.hold(FOLLOWER, towards, tag, "COMMIT PREPARED");
        let dir = scene.cluster.dir().to_owned();
        // Its proxy is killed before it serves, so this fails.
        let up = std::thread::spawn(move || common::pgtandem().args(["sandbox", "up", "--dir"]).arg(dir).output());
        held.reached().await;
        scene.cluster.kill_proxy();
        held.cut();
        up.join().unwrap().unwrap();
    }
    scene.cluster.start_again();
    scene.check("G9", told, Becomes::Committed).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_serializable_transaction_and_the_proxy_is_killed() {
    let mut scene = Scene::new(true).await;
    for (message, becomes) in [
        ((LEADER, Towards::Server, b'P', "PREPARE TRANSACTION"), Becomes::RolledBack),
        ((LEADER, Towards::Client, b'C', "PREPARE TRANSACTION"), Becomes::RolledBack),
        ((FOLLOWER, Towards::Client, b'C', "PREPARE TRANSACTION"), Becomes::RolledBack),
        ((LEADER, Towards::Server, b'Q', "COMMIT PREPARED"), Becomes::RolledBack),
        ((LEADER, Towards::Client, b'C', "COMMIT PREPARED"), Becomes::Committed),
        ((FOLLOWER, Towards::Server, b'Q', "COMMIT PREPARED"), Becomes::Committed),
    ] {
        scene.at(message, Blow::KillProxy, becomes).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_serializable_transaction_and_the_leaders_connection_is_cut() {
    let mut scene = Scene::new(true).await;
    for (message, becomes) in [
        ((LEADER, Towards::Server, b'P', "PREPARE TRANSACTION"), Becomes::RolledBack),
        ((LEADER, Towards::Client, b'C', "PREPARE TRANSACTION"), Becomes::RolledBack),
        // All hold it prepared, and only the message was lost: it is sent again.
        ((LEADER, Towards::Server, b'Q', "COMMIT PREPARED"), Becomes::Committed),
        ((LEADER, Towards::Client, b'C', "COMMIT PREPARED"), Becomes::Committed),
    ] {
        scene.at(message, Blow::Cut, becomes).await;
    }
}
