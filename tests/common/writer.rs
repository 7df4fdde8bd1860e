//! Clients that insert one number after the other and remember what they were told, through whatever happens to the proxy.

use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use tokio::runtime::Handle;
use tokio::task::JoinHandle;

use super::{Cluster, LIMIT};

/// Lets a number in twice, so that it would be seen.
pub const TABLE: &str = "create table written (n bigint)";
/// Each has numbers of its own from here on: this many.
const NUMBERS: i64 = 1 << 40;

#[derive(Debug, Default)]
struct Told {
    acknowledged: Vec<i64>,
    /// An error that leaves no doubt that nothing was committed.
    failed: Vec<i64>,
    errors: Vec<String>,
}

pub struct Writers {
    told: Arc<Mutex<Told>>,
    stop: Arc<AtomicBool>,
    tasks: Vec<JoinHandle<()>>,
}

impl Writers {
    /// Makes the table and starts.
    pub async fn start(cluster: &Cluster, count: i64) -> Self {
        let client = cluster.connect("postgres").await;
        client.batch_execute(TABLE).await.expect("a table");
        Self::on(&Handle::current(), cluster.layout.proxy_port(), 0..count)
    }

    /// On a runtime whose network reaches a proxy on this port. Each of the writers has numbers of its own.
    pub fn on(runtime: &Handle, port: u16, writers: Range<i64>) -> Self {
        let (told, stop) = (Arc::default(), Arc::default());
        let write = |writer| runtime.spawn(write(port, writer * NUMBERS, Arc::clone(&told), Arc::clone(&stop)));
        let tasks = writers.map(write).collect();
        Self { told, stop, tasks }
    }

    /// What was acknowledged until now.
    pub fn acknowledged(&self) -> Vec<i64> {
        self.told.lock().expect("no panic").acknowledged.clone()
    }

    pub fn count(&self) -> usize {
        self.told.lock().expect("no panic").acknowledged.len()
    }

    /// What clients were told since the last call, without doubt.
    pub fn take_errors(&self) -> Vec<String> {
        std::mem::take(&mut self.told.lock().expect("no panic").errors)
    }

    /// Waits until `count` more are written.
    pub async fn wait(&self, cluster: &Cluster, count: usize) {
        let (target, began) = (self.count() + count, Instant::now());
        while self.count() < target {
            assert!(began.elapsed() < 3 * LIMIT, "nobody can write\n{}\n{}", cluster.status().0, cluster.logs());
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    /// What was acknowledged until now is on each of these nodes, and what failed on none.
    pub async fn check(&self, cluster: &Cluster, nodes: impl IntoIterator<Item = usize>, what: &str) {
        let (acknowledged, failed) = {
            let told = self.told.lock().expect("no panic");
            (told.acknowledged.clone(), told.failed.clone())
        };
        for node in nodes {
            let client = cluster.connect_node(node, "postgres").await;
            let lacks = async || {
                let sql = "select count(*) from unnest($1::bigint[]) n where n not in (select n from written)";
                client.query_one(sql, &[&acknowledged]).await.expect("a count").get::<_, i64>(0)
            };
            // A follower may have the last ones prepared only, for a moment.
            let all = super::comes(async || lacks().await == 0).await;
            assert!(all, "{what}: acknowledged, and not on node{node}: {}\n{}", lacks().await, cluster.logs());
            let sql = "select count(*) filter (where n = any($1)), count(*) - count(distinct n) from written";
            let row = client.query_one(sql, &[&failed]).await.expect("counts");
            let (failed, twice): (i64, i64) = (row.get(0), row.get(1));
            assert_eq!((failed, twice), (0, 0), "{what}: told that it failed, and there; twice; on node{node}");
        }
    }

    /// No more writes, and nothing under way.
    pub async fn stop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        for task in std::mem::take(&mut self.tasks) {
            task.await.expect("a writer");
        }
    }
}

async fn write(port: u16, mut next: i64, told: Arc<Mutex<Told>>, stop: Arc<AtomicBool>) {
    while !stop.load(Ordering::Relaxed) {
        let Ok(client) = pgtandem::sandbox::compare::connect(port, "postgres").await else {
            tokio::time::sleep(Duration::from_millis(20)).await;
            continue;
        };
        while !stop.load(Ordering::Relaxed) {
            // One whose outcome is not known may be there or not; its number is not used again.
            next += 1;
            let done = client.execute("insert into written values ($1)", &[&next]).await;
            let mut told = told.lock().expect("no panic");
            match done {
                Ok(_) => told.acknowledged.push(next),
                Err(error) => {
                    if let Some(error) = error.as_db_error() {
                        told.errors.push(error.to_string());
                        if error.severity() == "ERROR" {
                            told.failed.push(next);
                            continue;
                        }
                    }
                    break;
                }
            }
        }
    }
}
