//! Writers that are busy while moments pass, and what a server of one of those moments must hold.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::SystemTime;

use pgtandem::archive::moment;
use tokio_postgres::Client;

use crate::Restored;
use crate::common::{Cluster, wait_for};

pub fn now_us() -> u64 {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).expect("a clock");
    u64::try_from(now.as_micros()).expect("a clock")
}

/// One transaction of a writer: when it was sent and when its commit was acknowledged, microseconds.
#[derive(Clone, Copy)]
pub struct Written {
    sent_us: u64,
    acknowledged_us: Option<u64>,
}

/// Writers that insert one number after the other, each into two tables in one transaction.
pub struct Busy {
    writers: Vec<Arc<Mutex<Vec<Written>>>>,
    stop: Arc<AtomicBool>,
    tasks: Vec<tokio::task::JoinHandle<()>>,
}

impl Busy {
    pub async fn start(cluster: &Cluster, count: i32) -> Busy {
        let client = cluster.connect("postgres").await;
        for table in ["ledger", "mirror"] {
            let create = format!("create table {table} (writer int, n int, filler text, primary key (writer, n))");
            client.batch_execute(&create).await.expect("a table");
        }
        let mut busy = Busy { writers: Vec::new(), stop: Arc::default(), tasks: Vec::new() };
        for writer in 0..count {
            let (log, stop) = (Arc::new(Mutex::new(Vec::new())), Arc::clone(&busy.stop));
            busy.writers.push(Arc::clone(&log));
            let client = cluster.connect("postgres").await;
            busy.tasks.push(tokio::spawn(async move {
                let filler = "x".repeat(200);
                for n in 0_i32.. {
                    if stop.load(Ordering::Relaxed) {
                        return;
                    }
                    log.lock().expect("a log").push(Written { sent_us: now_us(), acknowledged_us: None });
                    let texts = ["ledger", "mirror"]
                        .map(|table| format!("insert into {table} values ({writer}, {n}, '{filler}');"));
                    client.batch_execute(&format!("begin; {} commit", texts.concat())).await.expect("a write");
                    log.lock().expect("a log").last_mut().expect("its entry").acknowledged_us = Some(now_us());
                }
            }));
        }
        busy
    }

    pub fn written(&self) -> usize {
        self.writers.iter().map(|log| log.lock().expect("a log").len()).sum()
    }

    pub async fn wait(&self, more: usize) {
        let before = self.written();
        wait_for("the writers write", async || self.written() >= before + more).await;
    }

    pub async fn end(self) {
        self.stop.store(true, Ordering::Relaxed);
        for task in self.tasks {
            task.await.expect("a writer");
        }
    }

    /// Fails unless the restored server holds exactly what was committed at the moment: all that was acknowledged before it, nothing that
    /// was sent after it, of what was under way whole transactions only, and none after a missing one.
    pub async fn check(&self, restored: &Restored, moment: &Moment) {
        let differ =
            "select count(*) from ledger full join mirror using (writer, n) where ledger.n is null or mirror.n is null";
        assert_eq!(restored.value::<i64>(differ).await, 0, "half a transaction at {moment:?}");
        for (writer, log) in self.writers.iter().enumerate() {
            let log = log.lock().expect("a log").clone();
            let count: i64 = restored.value(&format!("select count(*) from ledger where writer = {writer}")).await;
            let highest: i64 = restored
                .value(&format!("select coalesce(max(n) + 1, 0)::int8 from ledger where writer = {writer}"))
                .await;
            assert_eq!(count, highest, "a hole in what writer {writer} wrote, at {moment:?}");
            let count = usize::try_from(count).expect("a count");
            let must =
                log.iter().take_while(|entry| entry.acknowledged_us.is_some_and(|at| at < moment.before_us)).count();
            let may = log.iter().take_while(|entry| entry.sent_us <= moment.after_us).count();
            assert!(
                (must..=may).contains(&count),
                "writer {writer} has {count} rows at {moment:?}; {must} were acknowledged before, {may} were sent by then"
            );
        }
    }
}

/// A moment of the run, and how to name it to `restore`.
#[derive(Debug)]
pub struct Moment {
    pub before_us: u64,
    pub after_us: u64,
    pub arguments: Vec<String>,
}

impl Moment {
    pub async fn now(leader: &Client, by_position: bool) -> Moment {
        let before_us = now_us();
        let arguments = if by_position {
            let row = leader.query_one("select pg_current_wal_flush_lsn()::text", &[]).await.expect("a position");
            ["--target-lsn", row.get(0), "--node", "node0"].map(str::to_owned).to_vec()
        } else {
            vec!["--target-time".to_owned(), moment::for_postgres(before_us)]
        };
        let after_us = if by_position { now_us() } else { before_us };
        Moment { before_us, after_us, arguments }
    }
}
