//! Runs a schedule on a cluster and compares the servers at each quiet point.

use std::collections::{BTreeSet, HashMap};
use std::fmt::Write as _;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use futures_util::SinkExt;
use pgtandem::sandbox::{self, Layout, control};
use tokio_postgres::types::ToSql;
use tokio_postgres::{Client, Error};

use crate::common::Cluster;
use crate::judge::{Counts, Situation, Verdict, most_demanding};
use crate::schedule::{End, Kind, Schedule, Sent, Statement, Transaction, Value};

/// A statement that takes longer waits for itself.
const STUCK: Duration = Duration::from_secs(60);
/// What is wrong with a run: told of that many at most.
const FAILURES_MAX: usize = 5;

pub struct Bench {
    pub cluster: Cluster,
    runs: u32,
}

/// What a run gave. No failures: it is green.
#[derive(Debug, Default)]
pub struct Outcome {
    pub counts: Counts,
    pub failures: Vec<String>,
    /// The round after which it was seen.
    pub round: usize,
}

#[derive(Debug, Default)]
struct Shared {
    counts: Counts,
    failures: Vec<String>,
    acknowledged: BTreeSet<(i32, i32)>,
}

impl Bench {
    pub fn up(nodes: usize) -> Self {
        Self { cluster: Cluster::up(&["--nodes", &nodes.to_string()]), runs: 0 }
    }

    fn followers(&self) -> std::ops::Range<usize> {
        1..self.cluster.layout.plan.nodes
    }

    /// Plays the schedule; stops after the first round with a failure.
    pub async fn run(&mut self, schedule: &Schedule) -> Outcome {
        self.runs += 1;
        let schema = format!("run{}", self.runs);
        self.mend().await;
        let logs: Vec<u64> = self.followers().map(|index| self.log_length(index)).collect();
        let admin = self.cluster.connect("postgres").await;
        let mut setup = vec![format!("create schema {schema}"), format!("set search_path = {schema}")];
        setup.extend(schedule.setup.iter().cloned());
        for text in setup {
            admin.batch_execute(&text).await.unwrap_or_else(|error| panic!("{text}: {error:?}"));
        }
        // Partitioned tables are left out: a change of the key moves rows there, which goes by table locks.
        let sql = "select array_agg(c.oid) from pg_class c join pg_index i on indrelid = c.oid and indisprimary
                   where relnamespace = $1::text::regnamespace and relkind = 'r' and not relispartition";
        let keyed: Vec<u32> = admin.query_one(sql, &[&schema]).await.expect("tables").get(0);
        let row_locked: Arc<BTreeSet<u32>> = Arc::new(keyed.into_iter().collect());
        let mut outcome = Outcome::default();
        let mut acknowledged = BTreeSet::new();
        let schedule = Arc::new(schedule.clone());
        for number in 0..schedule.rounds.len() {
            let shared = Arc::new(Mutex::new(Shared::default()));
            let clients: Vec<_> = (0..schedule.rounds[number].clients.len())
                .map(|client| {
                    let (schedule, shared, schema) = (Arc::clone(&schedule), Arc::clone(&shared), schema.clone());
                    let row_locked = Arc::clone(&row_locked);
                    let port = self.cluster.layout.proxy_port();
                    tokio::spawn(async move {
                        let list = &schedule.rounds[number].clients[client];
                        if !list.is_empty() {
                            client_runs(port, &schema, client, list, schedule.changes_schema, &row_locked, &shared)
                                .await;
                        }
                    })
                })
                .collect();
            for client in clients {
                client.await.expect("a client does not panic");
            }
            let shared = Arc::into_inner(shared).expect("clients have ended").into_inner().expect("no panic");
            outcome.counts.add(&shared.counts);
            outcome.failures.extend(shared.failures);
            acknowledged.extend(shared.acknowledged);
            outcome.failures.extend(self.differences(&admin, &acknowledged).await);
            outcome.round = number;
            if !outcome.failures.is_empty() {
                break;
            }
        }
        for (index, length) in self.followers().zip(logs) {
            outcome.failures.extend(self.log_complaints(index, length));
        }
        let dropped = admin.batch_execute(&format!("drop schema {schema} cascade")).await;
        outcome.failures.extend(dropped.err().map(|error| format!("drop schema: {error:?}")));
        outcome
    }

    /// Quiet point: the same rows and definitions everywhere, nothing prepared, all are members, and the ledger has exactly what was
    /// acknowledged.
    async fn differences(&self, admin: &Client, acknowledged: &BTreeSet<(i32, i32)>) -> Vec<String> {
        let layout = &self.cluster.layout;
        let mut found = Vec::new();
        for index in self.followers() {
            let node = Layout::node_name(index);
            if !control::wait_member(layout, &node, true, Duration::from_secs(1)).await {
                found.push(format!("{node} left the member set\n{}", self.cluster.logs()));
            }
        }
        found.extend(sandbox::demo::wait_finished(layout).await.expect("servers answer"));
        found.extend(sandbox::compare::compare(layout).await.expect("servers answer").differences);
        let leader = definitions(&self.cluster, 0).await;
        for index in self.followers() {
            let follower = definitions(&self.cluster, index).await;
            let only = |a: &BTreeSet<String>, b: &BTreeSet<String>| a.difference(b).cloned().collect::<Vec<_>>();
            if leader != follower {
                found.push(format!(
                    "definitions differ on node{index}: {:?}, {:?}",
                    only(&leader, &follower),
                    only(&follower, &leader)
                ));
            }
        }
        let rows = admin.query("select client, n from ledger", &[]).await.expect("the ledger");
        let kept: BTreeSet<(i32, i32)> = rows.iter().map(|row| (row.get(0), row.get(1))).collect();
        if &kept != acknowledged {
            found.push(format!(
                "acknowledged and lost: {:?}; not acknowledged and there: {:?}",
                acknowledged.difference(&kept).collect::<Vec<_>>(),
                kept.difference(acknowledged).collect::<Vec<_>>()
            ));
        }
        found.truncate(FAILURES_MAX);
        found
    }

    /// After a red run: fills what left, or what differs.
    async fn mend(&self) {
        let differs = !sandbox::compare::compare(&self.cluster.layout).await.expect("servers answer").is_identical();
        for index in self.followers() {
            let node = Layout::node_name(index);
            if differs {
                self.cluster.command(&["detach", &node, "--yes"]);
            }
            if differs || !control::wait_member(&self.cluster.layout, &node, true, Duration::from_millis(100)).await {
                self.cluster.recover(index);
            }
        }
    }

    fn log(&self, index: usize) -> std::path::PathBuf {
        self.cluster.layout.node_dir(index).join("postgresql.log")
    }

    fn log_length(&self, index: usize) -> u64 {
        std::fs::metadata(self.log(index)).map_or(0, |metadata| metadata.len())
    }

    /// A follower never waits in a circle.
    fn log_complaints(&self, index: usize, from: u64) -> Option<String> {
        let text = std::fs::read(self.log(index)).unwrap_or_default();
        let text =
            String::from_utf8_lossy(text.get(usize::try_from(from).unwrap_or(0)..).unwrap_or_default()).into_owned();
        let line = text.lines().find(|line| line.contains("deadlock detected") || line.contains("PANIC"))?;
        Some(format!("node{index}'s log: {line}"))
    }
}

/// Definitions by name, without what differs by node.
async fn definitions(cluster: &Cluster, index: usize) -> BTreeSet<String> {
    let client = cluster.connect_node(index, "postgres").await;
    let sql = "select 'column ' || c.oid::regclass || '.' || attname || ' ' || attnum || ' ' || format_type(atttypid, atttypmod)
                    || ' ' || attnotnull || ' ' || coalesce(pg_get_expr(d.adbin, d.adrelid), '')
               from pg_attribute a join pg_class c on c.oid = attrelid left join pg_attrdef d on d.adrelid = c.oid and d.adnum = attnum
               where attnum > 0 and not attisdropped and relnamespace::regnamespace::text ~ '^(run|public)' and relkind in ('r', 'p', 'v')
               union all select 'index ' || indexdef from pg_indexes where schemaname ~ '^(run|public)'
               union all select 'constraint ' || conrelid::regclass || ' ' || conname || ' ' || pg_get_constraintdef(oid)
               from pg_constraint where connamespace::regnamespace::text ~ '^(run|public)' and conrelid <> 0
               union all select 'function ' || oid::regprocedure || ' ' || md5(prosrc) from pg_proc
               where pronamespace::regnamespace::text ~ '^(run|public)'";
    client.query(sql, &[]).await.expect("definitions").iter().map(|row| row.get(0)).collect()
}

async fn client_runs(
    port: u16,
    schema: &str,
    number: usize,
    list: &[Transaction],
    changes_schema: bool,
    row_locked: &BTreeSet<u32>,
    shared: &Mutex<Shared>,
) {
    let fail = |text: String| shared.lock().expect("no panic").failures.push(text);
    let place = (port, schema);
    let client = match connect(place).await {
        Ok(client) => client,
        Err(Broken(what)) => return fail(format!("client {number}: {what}")),
    };
    let mut player =
        Player { client, place, lost: false, prepared: HashMap::new(), changes_schema, row_locked, shared };
    for transaction in list {
        match tokio::time::timeout(STUCK, player.play(transaction)).await {
            Ok(Ok(())) => {}
            Ok(Err(Broken(what))) => return fail(format!("client {number}: {what}")),
            Err(_) => {
                let sessions = sessions(port).await;
                return fail(format!("client {number}: no end of {transaction:?}\n{sessions}"));
            }
        }
    }
}

async fn connect((port, schema): (u16, &str)) -> Result<Client, Broken> {
    let client = sandbox::compare::connect(port, "postgres").await.map_err(|error| Broken(error.to_string()))?;
    let settings =
        format!("set search_path = {schema}; set deadlock_timeout = '100ms'; set client_min_messages = error");
    client.batch_execute(&settings).await.map_err(|error| Broken(format!("{error:?}")))?;
    Ok(client)
}

/// What the leader's and the first follower's sessions do, for a failure's message.
async fn sessions(proxy_port: u16) -> String {
    let sql = "select pid || ' ' || usename || ' ' || state || ' ' || coalesce(wait_event, '-') || ' ' || left(query, 100)
               from pg_stat_activity where backend_type = 'client backend' and pid <> pg_backend_pid() and state <> 'idle'
               union all select 'prepared ' || gid from pg_prepared_xacts
               union all select 'waits ' || pid || ' ' || locktype || ' ' || mode || ' ' || pg_blocking_pids(pid)::text
               from pg_locks where not granted";
    let mut text = String::new();
    // PostgreSQL's ports follow the proxy's.
    for port in [proxy_port + 1, proxy_port + 2] {
        let client = sandbox::compare::connect(port, "postgres").await.expect("a server answers");
        let rows = client.query(sql, &[]).await.expect("sessions");
        let lines: Vec<String> = rows.iter().map(|row| row.get(0)).collect();
        let _ = writeln!(text, "port {port}:\n  {}\n", lines.join("\n  "));
    }
    text
}

/// The run is red, and this client stops.
struct Broken(String);

struct Player<'a> {
    client: Client,
    place: (u16, &'a str),
    /// The connection can not be used any more, although the server's end is well.
    lost: bool,
    prepared: HashMap<String, tokio_postgres::Statement>,
    changes_schema: bool,
    row_locked: &'a BTreeSet<u32>,
    shared: &'a Mutex<Shared>,
}

impl Player<'_> {
    async fn play(&mut self, transaction: &Transaction) -> Result<(), Broken> {
        let Some(begin) = &transaction.begin else {
            for statement in &transaction.statements {
                let committed = self.one(statement, false).await?;
                if self.lost {
                    self.connect_again().await?;
                }
                let mut shared = self.shared.lock().expect("no panic");
                *(if committed { &mut shared.counts.committed } else { &mut shared.counts.rolled_back }) += 1;
            }
            return Ok(());
        };
        let fixed_snapshot = begin.contains("repeatable") || begin.contains("serializable");
        self.control(begin).await?;
        let mut savepoints: Vec<&str> = Vec::new();
        let mut ledger = None;
        for statement in &transaction.statements {
            let ok = self.one(statement, fixed_snapshot).await?;
            if ok && let Some(entry) = ledger_entry(&statement.text) {
                ledger = Some(entry);
            }
            let words: Vec<&str> = statement.text.split(' ').collect();
            match (ok, &words[..]) {
                (true, ["savepoint", name]) => savepoints.push(name),
                (true, ["rollback", "to", name]) => savepoints.truncate(1 + position(&savepoints, name)),
                (true, ["release", name]) => savepoints.truncate(position(&savepoints, name)),
                (true, _) => {}
                (false, _) if self.lost => {
                    self.connect_again().await?;
                    return self.ended(false, None, "").await;
                }
                (false, _) => match savepoints.last() {
                    Some(name) => self.control(&format!("rollback to {name}")).await?,
                    None => return self.ended(false, None, "rollback").await,
                },
            }
        }
        if transaction.end == End::Rollback {
            return self.ended(false, None, "rollback").await;
        }
        let kind = most_demanding(transaction.statements.iter().map(|s| s.kind));
        match self.client.batch_execute("commit").await {
            Ok(()) => self.ended(true, ledger, "").await,
            Err(error) => {
                self.judge(kind, fixed_snapshot, &error, "commit")?;
                self.ended(false, None, "").await
            }
        }
    }

    async fn connect_again(&mut self) -> Result<(), Broken> {
        self.client = connect(self.place).await?;
        self.prepared.clear();
        self.lost = false;
        Ok(())
    }

    async fn ended(&mut self, committed: bool, ledger: Option<(i32, i32)>, last: &str) -> Result<(), Broken> {
        if !last.is_empty() {
            self.control(last).await?;
        }
        let mut shared = self.shared.lock().expect("no panic");
        *(if committed { &mut shared.counts.committed } else { &mut shared.counts.rolled_back }) += 1;
        shared.acknowledged.extend(ledger);
        Ok(())
    }

    /// What must work on any server.
    async fn control(&mut self, text: &str) -> Result<(), Broken> {
        self.client.batch_execute(text).await.map_err(|error| Broken(format!("{text}: {error:?}")))
    }

    /// False: it failed in a way that is right.
    async fn one(&mut self, statement: &Statement, fixed_snapshot: bool) -> Result<bool, Broken> {
        match self.send(statement).await {
            Ok(()) => {
                let mut shared = self.shared.lock().expect("no panic");
                *shared.counts.statements.entry((statement.kind, Verdict::Done)).or_default() += 1;
                Ok(true)
            }
            Err(error) => {
                self.judge(statement.kind, fixed_snapshot, &error, &statement.text)?;
                Ok(false)
            }
        }
    }

    fn judge(&self, kind: Kind, fixed_snapshot: bool, error: &Error, text: &str) -> Result<(), Broken> {
        let (changes_schema, row_locked) = (self.changes_schema, self.row_locked);
        let situation = Situation { kind, fixed_snapshot, changes_schema, row_locked };
        let Some(known) = error.as_db_error() else { return Err(Broken(format!("{text}: {error:?}"))) };
        let verdict = self.shared.lock().expect("no panic").counts.judge(situation, known);
        if verdict == Verdict::Wrong {
            return Err(Broken(format!("no lone server says so: {text}: {known:?}")));
        }
        Ok(())
    }

    async fn send(&mut self, statement: &Statement) -> Result<(), Error> {
        match &statement.sent {
            Sent::Text => self.client.batch_execute(&statement.text).await,
            Sent::Copy(data) => {
                let sink = match self.client.copy_in(&statement.text).await {
                    Ok(sink) => sink,
                    Err(error) => {
                        // Where the server refuses to begin, a lone one, too, the library sends a CopyFail and a Sync more, and
                        // takes each later answer for the one before it.
                        self.lost = true;
                        return Err(error);
                    }
                };
                let mut sink = Box::pin(sink);
                sink.send(Bytes::from(data.clone())).await?;
                sink.as_mut().finish().await.map(|_| ())
            }
            Sent::Prepared(values) => {
                if !self.prepared.contains_key(&statement.text) {
                    let made = self.client.prepare(&statement.text).await?;
                    self.prepared.insert(statement.text.clone(), made);
                }
                let values: Vec<&(dyn ToSql + Sync)> = values
                    .iter()
                    .map(|value| match value {
                        Value::Int(number) => number as &(dyn ToSql + Sync),
                        Value::Text(text) => text as &(dyn ToSql + Sync),
                    })
                    .collect();
                self.client.query(&self.prepared[&statement.text], &values).await.map(|_| ())
            }
        }
    }
}

/// `insert into ledger values (client, n)`
fn ledger_entry(text: &str) -> Option<(i32, i32)> {
    let values = text.strip_prefix("insert into ledger values (")?.strip_suffix(')')?;
    let (client, n) = values.split_once(", ")?;
    Some((client.parse().ok()?, n.parse().ok()?))
}

fn position(savepoints: &[&str], name: &str) -> usize {
    savepoints.iter().rposition(|known| *known == name).unwrap_or(0)
}
