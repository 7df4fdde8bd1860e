//! A cluster that cases share, a schema for each.

use std::panic::AssertUnwindSafe;
use std::time::Duration;

use futures_util::FutureExt;
use pgtandem::sandbox::{self, Layout, control};
use tokio::task::JoinHandle;
use tokio_postgres::{Client, Error, SimpleQueryMessage};

use crate::common::{self, Cluster};

pub struct Stage {
    pub cluster: Cluster,
    only: Option<String>,
    failed: Vec<String>,
}

/// What a case works with.
pub struct Case<'a> {
    pub cluster: &'a Cluster,
    pub schema: &'static str,
}

/// Plays cases in order.
macro_rules! play {
    ($stage:expr, $($name:ident),+ $(,)?) => { $(
        if $stage.wants(stringify!($name)) {
            let verdict = {
                let case = $stage.case(stringify!($name)).await;
                crate::stage::outcome($name(&case)).await
            };
            $stage.judge(stringify!($name), verdict).await;
        }
    )+ };
}
pub(crate) use play;

/// None: it ended well; else what it panicked with.
pub async fn outcome(case: impl Future<Output = ()>) -> Option<String> {
    let panic = AssertUnwindSafe(case).catch_unwind().await.err()?;
    let text =
        panic.downcast_ref::<String>().cloned().or_else(|| panic.downcast_ref::<&str>().map(ToString::to_string));
    Some(text.unwrap_or_default())
}

impl Stage {
    pub fn new() -> Self {
        let setting = |name| std::env::var(name).ok().filter(|text| !text.is_empty());
        let nodes = setting("CATALOGUE_NODES").unwrap_or_else(|| "2".to_owned());
        let cluster = Cluster::up(&["--nodes", &nodes]);
        Self { cluster, only: setting("CATALOGUE_CASE"), failed: Vec::new() }
    }

    pub fn wants(&self, name: &str) -> bool {
        self.only.as_ref().is_none_or(|only| name.starts_with(only.as_str()))
    }

    pub async fn case(&self, name: &'static str) -> Case<'_> {
        let client = self.cluster.connect("postgres").await;
        let case = Case { cluster: &self.cluster, schema: name };
        run(&client, &format!("create schema {name}")).await;
        case
    }

    /// After a case: all are members, and hold the same.
    pub async fn judge(&mut self, name: &str, panicked: Option<String>) {
        let mut found: Vec<String> = panicked.into_iter().collect();
        let layout = &self.cluster.layout;
        let mut lost = Vec::new();
        for index in 1..layout.plan.nodes {
            let node = Layout::node_name(index);
            if !control::wait_member(layout, &node, true, Duration::from_secs(1)).await {
                found.push(format!("{node} left: {}", self.cluster.status().0));
                lost.push(index);
            }
        }
        found.extend(sandbox::demo::wait_finished(layout).await.expect("servers answer"));
        let differences = sandbox::compare::compare(layout).await.expect("servers answer").differences;
        if !differences.is_empty() {
            found.extend(differences);
            for index in 1..layout.plan.nodes {
                self.cluster.command(&["detach", &Layout::node_name(index), "--yes"]);
                lost.push(index);
            }
        }
        // The next case has whole servers again.
        for index in lost {
            self.cluster.recover(index);
        }
        eprintln!("{name}: {}", if found.is_empty() { "ok" } else { "FAILED" });
        if !found.is_empty() {
            self.failed.push(format!("{name}: {}", found.join("\n    ")));
        }
    }

    pub fn end(self) {
        assert!(self.failed.is_empty(), "\n{}", self.failed.join("\n"));
    }
}

pub async fn run(client: &Client, text: &str) {
    client.batch_execute(text).await.unwrap_or_else(|error| panic!("{text}: {error:?}"));
}

/// First column of the first row; of several statements, of the last that has rows.
pub async fn value(client: &Client, text: &str) -> String {
    let answer = client.simple_query(text).await.unwrap_or_else(|error| panic!("{text}: {error:?}"));
    let row =
        answer.iter().filter_map(|m| if let SimpleQueryMessage::Row(row) = m { Some(row) } else { None }).next_back();
    row.and_then(|row| row.get(0)).unwrap_or_default().to_owned()
}

pub fn code(error: &Error) -> String {
    error.code().map_or_else(|| error.to_string(), |code| code.code().to_owned())
}

/// The SQLSTATE that a text ends with; `00000`: it worked.
pub async fn code_of(client: &Client, text: &str) -> String {
    client.batch_execute(text).await.map_or_else(|error| code(&error), |()| "00000".to_owned())
}

/// What becomes of a statement: docs/limits.md says what is refused.
#[derive(Clone, Copy, Debug)]
pub enum Fate {
    /// It works, and the servers are the same afterwards.
    Exact,
    Refused,
}

pub async fn check(client: &Client, fate: Fate, text: &str) {
    match fate {
        Fate::Exact => run(client, text).await,
        Fate::Refused => refused(client, text).await,
    }
}

/// It is refused with a reason and a hint; a block it was in is rolled back.
pub async fn refused(client: &Client, text: &str) {
    let error = client.batch_execute(text).await.expect_err(text);
    let known = error.as_db_error().unwrap_or_else(|| panic!("{text}: {error:?}"));
    assert_eq!(known.code().code(), "0A000", "{text}: {known:?}");
    assert!(known.hint().is_some_and(|hint| !hint.is_empty()), "{text}: refused without a hint: {known:?}");
    let _ = client.batch_execute("rollback").await;
}

/// A statement that runs while the case goes on.
pub fn start(client: Client, text: &str) -> JoinHandle<(Client, Result<u64, Error>)> {
    let text = text.to_owned();
    tokio::spawn(async move {
        let done = client.execute(&text, &[]).await;
        (client, done)
    })
}

impl Case<'_> {
    pub async fn client(&self) -> Client {
        let client = self.cluster.connect("postgres").await;
        run(
            &client,
            &format!(
                "set search_path = {}; set client_min_messages = error; set deadlock_timeout = '100ms'",
                self.schema
            ),
        )
        .await;
        client
    }

    pub async fn clients(&self) -> (Client, Client) {
        (self.client().await, self.client().await)
    }

    /// Waits until somebody waits for a lock on the leader, or has an answer already.
    pub async fn blocked_or_done<T>(&self, task: &JoinHandle<T>) {
        let watch = self.cluster.connect_node(0, "postgres").await;
        common::wait_for("somebody waits for a lock", async || {
            task.is_finished() || value(&watch, "select count(*) from pg_locks where not granted").await != "0"
        })
        .await;
    }

    /// The same on every node.
    pub async fn on_each_node(&self, sql: &str) -> Vec<String> {
        let mut values = Vec::new();
        for index in 0..self.cluster.layout.plan.nodes {
            let client = self.cluster.connect_node(index, "postgres").await;
            run(&client, &format!("set search_path = {}", self.schema)).await;
            values.push(value(&client, sql).await);
        }
        values
    }

    pub async fn same_on_each_node(&self, sql: &str) -> String {
        let values = self.on_each_node(sql).await;
        assert!(values.iter().all(|value| *value == values[0]), "{sql}: {values:?}");
        values[0].clone()
    }

    /// Rewrites a table on the followers alone, so that rows lie there in another order than on the leader.
    pub async fn reorder_followers(&self, table: &str, index: &str) {
        for node in 1..self.cluster.layout.plan.nodes {
            let client = self.cluster.connect_node(node, "postgres").await;
            run(&client, &format!("set search_path = {}; cluster {table} using {index}", self.schema)).await;
        }
    }
}
