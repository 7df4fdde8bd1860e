//! Between the leader's COMMIT and a follower's COMMIT PREPARED a transaction is there on one and not yet on the other. A fault proxy
//! holds it in that state, to show what others may see of it: A5, A8, A9, C1, C7, C8 of the catalogue.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test that panics has failed")]

mod common;

use common::ask::{run, value};
use std::time::Duration;

use common::Cluster;
use common::fault::{Fault, Held, Towards};
use tokio::task::JoinHandle;
use tokio_postgres::Client;

struct Scene {
    cluster: Cluster,
    fault: Fault,
    clients: Vec<Client>,
}

impl Scene {
    async fn new(setup: &str) -> Self {
        let cluster = common::cluster();
        let fault = Fault::interpose(&cluster, 1).await;
        let mut clients = Vec::new();
        for _ in 0..3 {
            clients.push(cluster.connect("postgres").await);
        }
        run(&clients[0], setup).await;
        cluster.assert_identical().await;
        Self { cluster, fault, clients }
    }

    /// Runs and commits this, and holds it prepared on the follower.
    async fn half(&self, text: &str) -> Held {
        let held = self.fault.hold(Towards::Server, b'Q', "COMMIT PREPARED");
        run(&self.clients[0], text).await;
        held.reached().await;
        held
    }

    /// Another client's work, in the background.
    fn spawn(&mut self, text: &str) -> JoinHandle<Client> {
        let (client, text) = (self.clients.pop().expect("a client"), text.to_owned());
        tokio::spawn(async move {
            run(&client, &text).await;
            client
        })
    }

    async fn end(self, sql: &str, expected: &str) {
        self.cluster.wait_member(1, true).await;
        self.cluster.assert_identical().await;
        assert_eq!(value(&self.clients[0], sql).await, expected);
    }
}

/// A8: the follower does not have the row yet that the leader's second transaction changed.
#[tokio::test(flavor = "multi_thread")]
async fn a08_an_update_of_a_row_that_is_half_committed() {
    let mut scene = Scene::new("create table t (id int primary key, v int)").await;
    let half = scene.half("insert into t values (7, 1)").await;
    let count_differs = scene.fault.watch(Towards::Client, b'E', "22012");
    let second = scene.spawn("update t set v = v + 1 where id = 7");
    count_differs.reached().await;
    half.release();
    second.await.expect("no error");
    scene.end("select v from t", "2").await;
}

/// A9: nor the parent of the row that was inserted.
#[tokio::test(flavor = "multi_thread")]
async fn a09_a_child_of_a_parent_that_is_half_committed() {
    let mut scene =
        Scene::new("create table p (id int primary key); create table c (id int primary key, p int references p)")
            .await;
    let half = scene.half("insert into p values (1)").await;
    let refused = scene.fault.watch(Towards::Client, b'E', "23503");
    let child = scene.spawn("insert into c values (1, 1)");
    refused.reached().await;
    half.release();
    child.await.expect("no error");
    scene.end("select count(*) from c", "1").await;
}

/// A5: the numbers of rows agree, the rows would not.
#[tokio::test(flavor = "multi_thread")]
async fn a05_offsetting_counts() {
    let mut scene =
        Scene::new("create table t (id int primary key, grp int); insert into t values (1, 1), (9, 2)").await;
    let half = scene.half("insert into t values (2, 1)").await;
    let deleter = scene.clients.pop().unwrap();
    run(&deleter, "begin").await;
    assert_eq!(deleter.execute("delete from t where grp = 1", &[]).await.unwrap(), 2);
    // Commits at once, or waits for a lock of the DELETE's.
    let third = scene.spawn("insert into t values (3, 1)");
    let watch = scene.cluster.connect_node(0, "postgres").await;
    common::wait_for("the third is done or waits", async || {
        third.is_finished() || value(&watch, "select count(*) from pg_locks where not granted").await != "0"
    })
    .await;
    let commit = tokio::spawn(async move { run(&deleter, "commit").await });
    half.release();
    commit.await.expect("no error");
    third.await.expect("no error");
    scene.end("select string_agg(id::text, ',' order by id) from t", "3,9").await;
}

/// C1: nor the table.
#[tokio::test(flavor = "multi_thread")]
async fn c01_an_insert_into_a_table_that_is_half_committed() {
    let mut scene = Scene::new("create table other (id int primary key)").await;
    // Other commits wait at the gate until the definition is everywhere.
    let held = scene.fault.hold(Towards::Server, b'Q', "COMMIT PREPARED");
    let definition = scene.spawn("create table t (id int primary key)");
    held.reached().await;
    let insert = scene.spawn("insert into other values (1); insert into t values (1)");
    held.release();
    definition.await.expect("no error");
    // It came before the table was there, or after.
    let _ = insert.await;
    run(&scene.clients[0], "insert into t values (2)").await;
    scene.end("select count(*) from t where id = 2", "1").await;
}

/// C7: a row that moved to another partition, and its next change.
#[tokio::test(flavor = "multi_thread")]
async fn c07_a_row_that_moves_to_another_partition() {
    let mut scene = Scene::new(
        "create table t (id int, grp int, v int, primary key (id, grp)) partition by list (grp);
         create table t1 partition of t for values in (1); create table t2 partition of t for values in (2);
         insert into t values (1, 1, 0)",
    )
    .await;
    let half = scene.half("update t set grp = 2 where id = 1 and grp = 1").await;
    let flight = scene.fault.watch(Towards::Server, b'P', "PREPARE TRANSACTION");
    let second = scene.spawn("update t set v = v + 1 where id = 1 and grp = 2");
    flight.reached().await;
    half.release();
    second.await.expect("no error");
    scene.end("select grp || '/' || v from t", "2/1").await;
}

/// C8: a cascade on the leader takes a child that the follower does not have yet.
#[tokio::test(flavor = "multi_thread")]
async fn c08_a_cascade_over_a_child_that_is_half_committed() {
    let mut scene = Scene::new(
        "create table p (id int primary key); create table c (id int primary key, p int references p on delete cascade);
         insert into p values (1), (2); insert into c values (1, 2)",
    )
    .await;
    let half = scene.half("insert into c values (2, 1)").await;
    let flight = scene.fault.watch(Towards::Server, b'P', "PREPARE TRANSACTION");
    let delete = scene.spawn("delete from p where id = 1");
    let watch = scene.cluster.connect_node(0, "postgres").await;
    common::wait_for("the DELETE has run on the leader", async || {
        value(&watch, "select count(*) from pg_stat_activity where query ilike 'delete from p%'").await != "0"
    })
    .await;
    // A flight that did not wait for the half would come in this time, and miss the child.
    let waits = tokio::time::timeout(Duration::from_millis(500), flight.reached()).await.is_err();
    half.release();
    assert!(waits, "the DELETE overtook what the leader had seen before it");
    delete.await.expect("no error");
    scene.end("select string_agg(id::text, ',') from c", "1").await;
}
